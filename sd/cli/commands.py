"""The commands beside drawing, `artist convert` and others: a parser and a function each, listed at the end.

Nothing that imports torch is imported before it is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..files import check_output
from .options import DEFAULTS, add_drawing_options, add_source_options, call_of, load_model, make_sampler


class Command(NamedTuple):
    what: str  # for the help of `artist`
    parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], Any]


# ---- convert


def convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="artist convert",
        description="Write a model as one self-contained file, which loads with nothing else and no network.",
    )
    parser.add_argument("source", help="a .ckpt or .safetensors file, a folder, or a Hub repository")
    parser.add_argument("output", metavar="OUT.safetensors")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="as in the source if not given")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    add_source_options(parser)
    return parser


def convert(args: argparse.Namespace) -> None:
    import torch

    from ..loader import convert as write

    write(
        args.source,
        args.output,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        force=args.force,
        revision=args.revision,
        variant=args.hub_variant,
        tokenizer=args.tokenizer,
        config=args.config,
        ema=args.ema,
    )
    print(f"{args.output}  {Path(args.output).stat().st_size / 1e6:.1f} MB")


# ---- info


def info_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="artist info", description="Say what a file, folder or Hub repository holds, without loading it."
    )
    parser.add_argument("source")
    add_source_options(parser, "revision")
    return parser


def info(args: argparse.Namespace) -> None:
    from ..weights.source import format_info
    from ..weights.source import info as look

    print(format_info(look(args.source, revision=args.revision)))


# ---- compare


def compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="artist compare",
        description="Compare a model with diffusers, block by block on the same inputs: largest relative difference, "
        "time and memory of both. Or two sources of weights: which tensors differ, and what that does.",
        epilog="Exit code 1 where something is over its bound or differs. diffusers comes with "
        "pip install 'artificial-artist[compare]'; two sources need nothing.",
    )
    add = parser.add_argument
    add("source", nargs="?", help="as of artist --model; shapes, the built-in model, if not given")
    add("other", nargs="?", help="a second source, to compare with in place of diffusers")
    add("--random", choices=["full", "small"], help="random weights in place of a source")
    add("--dtype", choices=["float16", "bfloat16", "float32", "float64"], help="to compute in; float64, but float32 "
        "for two sources")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda; cpu")
    add("--size", type=int, metavar="PIXELS", help="edge of the picture; the model's own if not given")
    add("--only", nargs="+", metavar="PART", help="of text, unet, vae, schedulers; not for two sources")
    add("--bound", type=float, help="largest that passes; 1e-10 in float64, 1e-5 in float32; 0 for two sources")
    add("--repeats", type=int, metavar="N", help="how often a block is timed; 1, and 0 for no measuring; not for two "
        "sources")  # fmt: skip
    add("--json", metavar="FILE", help="write the figures there as well")
    add("--force", action="store_true", help="write over an existing file")
    add_source_options(parser)
    return parser


def compare(args: argparse.Namespace) -> None:
    if args.random and args.source:
        raise ValueError("Random weights and a source exclude each other: leave one of them out.")
    for option in ("tokenizer", "config", "ema", "revision", "hub_variant") if args.random else ():
        if getattr(args, option):
            raise ValueError(
                f"--{option.replace('_', '-')} is of a source, which --random has none of: leave it out."
            )
    if args.other and args.only:
        raise ValueError("--only is for the comparison with diffusers: two sources are compared whole.")
    if args.other and args.repeats is not None:
        raise ValueError("--repeats is for the comparison with diffusers: two sources are not timed.")
    if args.bound is not None and not args.bound >= 0:
        raise ValueError(f"--bound must be a number of at least 0, not {args.bound}.")
    if args.json:
        check_output(args.json, force=args.force)  # before any work is done
    from ..compare.comparison import compare_command
    from ..compare.report import format_report, write_report

    report = compare_command(args)
    print(format_report(report))
    if args.json:
        write_report(report, Path(args.json))
    if not report.same:
        raise SystemExit(1)


# ---- describe


def describe_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="artist describe",
        description="A model as a table, or as a tree: every block with its output's shape, its parameters, FLOPs "
        "and bytes. Weights are not read.",
    )
    add = parser.add_argument
    add("source", nargs="?", help="as of artist --model; Stable Diffusion v1 itself if not given")
    add("--height", type=int, metavar="PIXELS", help="of the picture; the model's own size if not given")
    add("--width", type=int, metavar="PIXELS")
    add("--dtype", choices=["float16", "bfloat16", "float32", "float64"], help="in which bytes are counted")
    add("--tree", action="store_true", help="every module, in place of the table")
    add("--depth", type=int, metavar="N", help="of the tree; all if not given")
    add("--json", action="store_true", help="the same as JSON")
    add_source_options(parser, "revision", "hub-variant", "config")
    return parser


def describe(args: argparse.Namespace) -> None:
    import torch

    from ..study.description import describe as look

    if args.depth is not None and not args.tree:
        raise ValueError("--depth is of --tree only: give that too.")
    if args.depth is not None and args.depth < 1:
        raise ValueError(f"--depth must be at least 1, not {args.depth}.")
    found = look(
        args.source,
        height=args.height,
        width=args.width,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        config=args.config,
        revision=args.revision,
        variant=args.hub_variant,
    )
    print(found.json() if args.json else found.tree(args.depth) if args.tree else found)


# ---- study


def study_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="artist study",
        description="Draw one picture and write a page about it, for any browser: every step, which word acts where, "
        "the noise schedule, and what each block of the UNet returns.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("prompt", help='what to draw: "a large red star on a white background"')
    add("-o", "--output", metavar="HTML", help="report.html if not given")
    add("--trace", metavar="FILE", help="write the tensors of every step there as well, as .safetensors")
    add("--variant", choices=["simple", "lean"], help="how the work is done: simple; lean, in little memory")
    add_drawing_options(parser)
    add_source_options(parser)
    return parser


def study(args: argparse.Namespace) -> None:
    from functools import partial

    from tqdm import tqdm

    from ..study.page import study_page, write_page

    given = vars(args) | {"exact": True}  # the textbook, whose every module is called, not sd.fast
    settings, force = DEFAULTS | given, given.get("force", False)
    page_path, trace_path = Path(given.get("output", "report.html")), given.get("trace")
    if trace_path and Path(trace_path).resolve() == page_path.resolve():
        raise ValueError(f"The page and the trace cannot both be {page_path}: name another file for one of them.")
    for path in (page_path, trace_path):
        if path:
            check_output(path, force=force)  # before any work is done
    sampler = make_sampler(load_model(settings, given), given)
    page, record = study_page(
        sampler,
        settings["prompt"],
        progress=partial(tqdm, desc="drawing", unit="step", disable=given.get("quiet", False)),
        seed=settings["seed"],
        **call_of(settings),
    )
    if trace_path:
        record.save(trace_path, force=force)
    write_page(page, page_path, force=force)
    print(f"{page_path}  {page_path.stat().st_size / 1e6:.1f} MB")


COMMANDS = {
    "compare": Command("a model with diffusers, or two sources", compare_parser, compare),
    "convert": Command("one self-contained file from any source", convert_parser, convert),
    "describe": Command("every block of a model and what it costs", describe_parser, describe),
    "info": Command("what a source holds", info_parser, info),
    "study": Command("a page about one drawing: its steps, words and blocks", study_parser, study),
}
