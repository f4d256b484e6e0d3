"""The house: which room may import which, what names say, how long the textbook is, and what it needs to run.

The rules are those of the design: rooms in rows, each row importing only from rows above it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import sd
from tests.code_lines import code_lines

ROOT = Path(sd.__file__).parent
ROWS = [  # as in the README; each room that is added says here which row it is of
    {
        "attention",
        "files",
        "image",
        "noise",
        "operations",
        "schedule",
        "scheduler",
        "solvers",
        "text",
        "time_embedding",
        "unet",
        "vae",
    },
    {"pictures", "prompts", "weights"},
    {"model"},
    {"loader", "sampler"},
    {"adapt", "speed"},
    {"lean", "parallel"},
    {"compare", "study"},
    {"cli"},
    {"__main__"},
]
ROW = {room: row for row, rooms in enumerate(ROWS, 1) for room in rooms}
ALIKE = {"Downsample", "Upsample"}  # of the UNet and of the VAE, as in CompVis's code: they halve and double the size
MOVES = {"os.link", "os.rename", "os.replace", "tempfile.mkstemp"}
TEXTBOOK_LINES, UNET_LINES, TYPE_IGNORES = 1800, 150, 8


def module_name(file: Path) -> str:
    """sd.weights.hub; of a room's __init__.py, sd.weights"""
    parts = ["sd", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in FILES.items()}


def room_of(module: str) -> str:
    """The room of a module: a folder of sd/, or a file that stands at the top; "" for sd itself."""
    return module.split(".")[1] if "." in module else ""


def imports(module: str) -> Iterator[tuple[int, str, str]]:
    """Line, module of sd, and name ("" where the module itself is meant) of each import, wherever it stands.

    Those under TYPE_CHECKING and those inside functions count like all others: who names a type depends on it.
    """
    package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "sd":
                    yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            for alias in node.names if source.split(".")[0] == "sd" else ():
                inner = f"{source}.{alias.name}"
                yield (node.lineno, inner, "") if inner in FILES else (node.lineno, source, alias.name)


def public(module: str, *kinds: type[ast.stmt]) -> list[str]:
    """The names of classes and functions at the top of a module that do not begin with an underscore."""
    return [n.name for n in TREES[module].body if isinstance(n, kinds) and not n.name.startswith("_")]


def none(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


# ---- who imports whom


def test_every_room_has_its_row():
    none(sorted({room_of(m) for m in FILES} - ROW.keys() - {""}))


def test_a_row_imports_only_from_rows_above_it():
    wrong = []
    for module in FILES:
        room = room_of(module)
        for line, other, _ in imports(module) if room else ():
            there = room_of(other)  # "" is sd itself, which has the version
            allowed = there in ("", room) or ROW[there] < ROW[room] or ROW[there] == ROW[room] == 1
            if not allowed:
                wrong.append(
                    f"{FILES[module].relative_to(ROOT)}:{line} (row {ROW[room]}) imports {other} (row {ROW[there]})"
                )
    none(wrong)


def test_the_first_row_has_no_circles():
    graph = {
        room: {room_of(o) for module in FILES if room_of(module) == room for _, o, _ in imports(module)}
        & ROWS[0] - {room}
        for room in ROWS[0]
    }
    while leaves := [room for room, needs in graph.items() if not needs & graph.keys()]:
        for room in leaves:
            del graph[room]
    none(sorted(graph))


def test_no_module_uses_another_modules_private_names():
    def private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__")

    def defined(tree: ast.AST) -> set[str]:
        functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        stored = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        return {name for name in functions | stored | names if private(name)}

    own = {module: defined(tree) for module, tree in TREES.items()}
    wrong = []
    for module in FILES:
        others = set().union(*(names for other, names in own.items() if other != module)) - own[module]
        used = [(line, name) for line, _, name in imports(module) if private(name)]
        used += [
            (n.lineno, n.attr) for n in ast.walk(TREES[module]) if isinstance(n, ast.Attribute) and n.attr in others
        ]
        wrong += [f"{FILES[module].relative_to(ROOT)}:{line} uses {name}" for line, name in used]
    none(wrong)


# ---- names


def test_no_public_function_has_a_modules_name():
    """In the package where the function is found; sd.attention.attention is fixed by the contract.

    The files of sd/cli are named after commands, and the names that sd hands out do not come from there.
    """
    wrong = [
        f"sd.{name} is a function, and {module} a module"
        for name in sd.__all__
        for module in FILES
        if module.split(".")[-1] == name
        and room_of(module) != "cli"
        and not isinstance(getattr(sd, name), types.ModuleType)
    ]
    for module in FILES:
        package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
        for name in public(module, ast.FunctionDef):
            if f"{package}.{name}" in FILES and module != "sd.attention":
                wrong.append(f"{module}.{name} is a function, and {package}.{name} a module")
    none(wrong)


def test_names_that_stand_in_two_rooms_mean_one_thing():
    homes: dict[str, set[str]] = {}
    for module in FILES:
        for name in set(public(module, ast.ClassDef, ast.FunctionDef)) - ALIKE:
            homes.setdefault(name, set()).add(room_of(module))
    none([f"{name}: {', '.join(sorted(rooms))}" for name, rooms in sorted(homes.items()) if len(rooms) > 1])


def test_import_sd_swaps_no_class():
    assert type(sd) is types.ModuleType
    assert type(sd.attention) is types.ModuleType
    assert sd.attention is sys.modules["sd.attention"]
    assert callable(sd.attention.attention)


# ---- how much there is


def test_the_textbook_stays_short():
    counts = {
        module: code_lines(FILES[module].read_text(encoding="utf-8"))
        for module in FILES
        if FILES[module].parent == ROOT and FILES[module].name not in ("__init__.py", "__main__.py")
    }
    assert counts["sd.unet"] <= UNET_LINES
    assert sum(counts.values()) <= TEXTBOOK_LINES, counts


def test_code_lines_leave_out_what_is_no_code():
    assert (
        code_lines('"""A docstring\n\nof three lines."""\n\nx = 1  # a comment\n# another\ny = """two\nlines"""\n')
        == 3
    )
    assert code_lines('def f():\n    "what it does"\n    return (\n        1\n    )\n') == 4


def test_the_type_checker_is_seldom_overruled():
    found = {m: len(re.findall(r"#\s*type:\s*ignore", f.read_text(encoding="utf-8"))) for m, f in FILES.items()}
    assert sum(found.values()) <= TYPE_IGNORES, {module: count for module, count in found.items() if count}


def test_one_place_writes_files():
    """Whole or not at all: a temporary file that then takes the place of the real one."""
    wrong = [
        f"{FILES[module].relative_to(ROOT)}:{node.lineno} calls {ast.unparse(node.func)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("os.replace", "os.rename", "os.link", "tempfile.mkstemp")
    ]
    none([found for found in wrong if not found.startswith("files.py")])


# ---- what the textbook needs

ALONE = """
import json, sys

blocked = set(json.loads(sys.argv[1]))
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())

import torch
import sd

unet = sd.UNet(sd.UNetConfig(model_channels=32, num_heads=2, context_dim=16))
vae = sd.VAE(sd.VAEConfig(ch=32))
with torch.no_grad():
    latents = torch.randn(1, 4, 8, 8)
    noise = unet(latents, torch.tensor([981.0]), torch.randn(1, 77, 16))
    assert noise.shape == latents.shape
    assert vae.decode(latents).shape == (1, 3, 64, 64)
    assert vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1).shape == latents.shape
q = torch.randn(1, 2, 5, 8)
assert sd.attention.attention(q, q, q).shape == q.shape
assert sd.chunked_attention(q, q, q, chunk=2).shape == q.shape
scheduler = sd.PNDM(3)
x, state = scheduler.step(0, noise, latents, scheduler.init_state())
assert x.shape == latents.shape
assert not blocked & {name.split(".")[0] for name in sys.modules}, "the test refuses nothing"
"""


def needs(distribution: str) -> set[str]:
    """What a distribution requires, with all that this requires, and itself; by normalised name."""
    found: set[str] = set()
    todo = [distribution]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name not in found:
            found.add(name)
            try:
                wanted = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            todo += [re.match(r"[\w.-]+", w)[0] for w in wanted if "extra ==" not in w]
    return found


def test_the_networks_and_the_scheduler_need_torch_alone():
    """UNet, VAE, attention and scheduler import and compute with nothing installed but torch and its own needs."""
    allowed = needs("torch")
    blocked = [
        package
        for package, distributions in importlib.metadata.packages_distributions().items()
        if package != "sd" and not {re.sub(r"[-_.]+", "-", d).lower() for d in distributions} & allowed
    ]
    assert {"numpy", "transformers", "safetensors", "PIL", "tqdm"} <= set(blocked)
    done = subprocess.run([sys.executable, "-c", ALONE, json.dumps(blocked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
