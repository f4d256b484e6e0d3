"""What a step takes with a LoRA: merged, and added on the fly where weights are streamed; beside the plain model.

    python -m benchmarks.lora                         # full size, 512 x 512, rank 16: writes and removes 2.2 GB
    python -m benchmarks.lora --budgets 300MB 600MB --rank 128 --steps 2 --runs 3
    python -m benchmarks.lora --small --size 64x64    # a small model, to try the command

The weights are random, in one float16 file, computed with in float32; the LoRA is of all linear layers that kohya's
scripts train. Each run is a process of its own, in turn, watched as in benchmarks/memory.py. A step is the least of
those after the first, in which weights are prepared or kept; "first" is how much longer that one took.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

from benchmarks.memory import run

PLAIN = "import sd; model = sd.load(sys.argv[1])\n"
ADAPTED = "import sd; model = sd.lora(sd.load(sys.argv[1]), sys.argv[4])\n"
TIMES = """
steps = [b - a for a, b in zip(marks[:-3], marks[1:-2])]
found = {"step": min(steps[1:]), "first": steps[0] - min(steps[1:])}
"""
MERGED = "s = sd.SimpleSampler(sd.fast(model)); go(s)" + TIMES + "report(found)"
LEAN = "s = sd.LeanSampler(model, sys.argv[3]); request = go(s); plan = s.make_plan(request)" + TIMES
LEAN += "report(found, predicted=plan.peaks)"


def write_files(folder: Path, rank: int, small: bool) -> tuple[Path, Path]:
    """A model of random weights, and a LoRA for it."""
    import torch
    from torch import nn

    import sd
    from tests import loras
    from tests.layouts import make_model, write_full_size

    if small:
        sd.save(make_model(), folder / "full.safetensors", torch.float16)
    else:
        write_full_size(folder)
    model = sd.load(folder / "full.safetensors")
    places = [
        (part, name)
        for part, name in loras.layers_of(model, nn.Linear, nn.Conv2d)
        if part == "text" or "transformer_blocks" in name or "proj_" in name
    ]
    tensors = {}
    for n, (part, name) in enumerate(places):
        root = model.unet if part == "unet" else model.text.model
        rows, columns, *kernel = root.get_submodule(name).weight.shape
        stem = loras.kohya(model, part, name)
        tensors[f"{stem}.lora_up.weight"] = 0.1 * loras.randn(rows, rank, *kernel, seed=n).half()
        tensors[f"{stem}.lora_down.weight"] = loras.randn(rank, columns, *kernel, seed=n + 1).half()
    return folder / "full.safetensors", loras.write_lora(folder / "lora.safetensors", tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budgets", nargs="*", default=["300MB", "1GB"], help="of lean")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--size", default="512x512", help="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=3, help="at least 2")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a small model, whose figures mean nothing")
    parser.add_argument("--folder", type=Path, help="where the weights go for a while")
    args = parser.parse_args()
    import torch

    width, height = map(int, args.size.split("x"))
    call = json.dumps({"num_inference_steps": args.steps, "height": height, "width": width, "scheduler": "ddim"})
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32 "
        f"from a float16 file, {width} x {height}, guidance on, a LoRA of rank {args.rank}; least of {args.runs} runs"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file, lora = map(str, write_files(Path(folder), args.rank, args.small))
        codes = {"fast": MERGED} | {f"lean {budget}": LEAN for budget in args.budgets}
        jobs = {
            f"{name}{with_lora}": (model + code, file, call, name.partition(" ")[2], lora)
            for name, code in codes.items()
            for with_lora, model in (("", PLAIN), (" with LoRA", ADAPTED))
        }
        results: dict[str, list[dict]] = {name: [] for name in jobs}
        for _ in range(args.runs):
            for name, job in jobs.items():
                results[name].append(run(*job))
                print(".", end="", flush=True)
    print()
    report(results)


def report(results: dict[str, list[dict]]) -> None:
    print(f"{'':24} {'step':>9} {'to plain':>9} {'first':>9} {'peak':>9} {'predicted':>10}")
    for name, runs in results.items():
        step, first = (min(r["times"][key] for r in runs) for key in ("step", "first"))
        plain = min(r["times"]["step"] for r in results[name.removesuffix(" with LoRA")])
        peak = max(r["anon"] for r in runs)
        predicted = f"{max(runs[0]['predicted'].values()) / 1e6:7.0f} MB" if "predicted" in runs[0] else ""
        print(f"{name:24} {step:7.2f} s {step / plain:9.3f} {first:7.2f} s {peak / 1e6:6.0f} MB {predicted:>10}")


if __name__ == "__main__":
    main()
