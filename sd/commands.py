"""The commands beside drawing: `artist convert`, `artist info`. A parser and a function each, listed at the end.

Nothing that imports torch is imported before it is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Command(NamedTuple):
    what: str  # for the help of `artist`
    parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], Any]


def add_source_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--revision", metavar="REV", help="branch, tag or commit of a Hub repository")
    add("--hub-variant", metavar="NAME", help="which files of a Hub repository: fp16")
    add("--tokenizer", metavar="DIR", help="folder with vocab.json and merges.txt, for files without one")
    add("--config", metavar="JSON", help="sizes that a weights file does not tell, such as the head count")
    add("--ema", action="store_true", help="the EMA weights of a full-EMA checkpoint")


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

    from .loader import convert as write

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
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub repository")
    return parser


def info(args: argparse.Namespace) -> None:
    from .source import format_info
    from .source import info as look

    print(format_info(look(args.source, revision=args.revision)))


COMMANDS = {
    "convert": Command("one self-contained file from any source", convert_parser, convert),
    "info": Command("what a source holds", info_parser, info),
}
