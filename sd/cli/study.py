"""`artist study`: one drawing, and a page about it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..files import check_output
from .options import CommandError, Parser, add_drawing_options, add_source_options, one_of
from .output import save_result
from .recipes import explain
from .settings import drawing_of, load_model, make_sampler, with_controls, with_solver

SUMMARY = "draw, and write a page about the steps, words and blocks of the drawing"


def parser() -> Parser:
    result = Parser(
        "artist study",
        "Draw one picture and write a page about it, for any browser: every step, which word acts where, the noise\n"
        "schedule, and what each block of the UNet returns.",
    )
    result.add_argument("prompt", metavar="PROMPT", help='What to draw: "a large red star on a white background".')
    add_drawing_options(result)
    add = result.add_argument_group("what is written, and how the work is done").add_argument
    add("-o", "--output", metavar="HTML", help="The page. Default: report.html.")
    add("--trace", metavar="FILE", help="Write the tensors of every step to this file too, as .safetensors.")
    add("--variant", type=one_of("simple", "lean"), metavar="NAME", help="simple; or lean, which takes little "
        "memory. Default: simple.")  # fmt: skip
    add_source_options(result)
    return result


def run(arguments: Sequence[str]) -> int:
    given = parser().parse(arguments)
    page_file, trace_file = Path(given.pop("output", "report.html")), given.pop("trace", None)
    if trace_file and Path(trace_file).resolve() == page_file.resolve():
        raise CommandError(f"The page and the trace cannot both be {page_file}: name another file for one of them.")
    drawing = drawing_of({**given, "exact": True})  # the textbook, whose every module is called, not sd.fast
    for path in (page_file, trace_file):
        if path:
            check_output(path, force=drawing.force)  # before any work is done
    from tqdm import tqdm

    from ..study.page import study_page, write_page

    explain(drawing)
    model = load_model(drawing)
    drawing = with_controls(with_solver(drawing, model), model)
    page, trace = study_page(
        make_sampler(model, drawing),
        drawing.prompt,
        progress=partial(tqdm, desc="drawing", unit="step", disable=drawing.quiet),
        seed=drawing.seed,
        **drawing.call,
    )
    saves = {"page": (page_file, lambda path, force: write_page(page, path, force=force))}
    if trace_file:
        saves["trace"] = (Path(trace_file), lambda path, force: trace.save(path, force=force))
    for what, (path, save) in saves.items():
        save_result(save, path, what, force=drawing.force)
    print(f"{page_file}  {len(page.encode()) / 1e6:.1f} MB, seed {drawing.seed}")
    return 0
