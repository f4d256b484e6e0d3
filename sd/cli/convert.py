"""`artist convert`: any source as one self-contained file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import check_output
from .options import Parser, add_source_options, dtype_option

SUMMARY = "write a model from any source as one self-contained file"


def parser() -> Parser:
    result = Parser(
        "artist convert",
        "Write a model as one self-contained file, which can be loaded without anything else and without a network.",
    )
    add = result.add_argument
    add("source", metavar="SOURCE", help="A .ckpt or .safetensors file, a folder, or a Hub repository.")
    add("output", metavar="OUT.safetensors", help="The file to write.")
    kinds = ("float16", "bfloat16", "float32")
    add("--dtype", **dtype_option("The kind of numbers to write. Default: the source's own.", kinds))
    add("--force", action="store_true", help="Write over an existing file.")
    add_source_options(result)
    return result


def run(arguments: Sequence[str]) -> int:
    given = parser().parse(arguments)
    check_output(given["output"], force=given.get("force", False))  # before gigabytes are fetched
    import torch

    from ..loader import convert

    source, output = given.pop("source"), Path(given.pop("output"))
    if "dtype" in given:
        given["dtype"] = getattr(torch, given["dtype"])
    if "hub_variant" in given:
        given["variant"] = given.pop("hub_variant")
    convert(source, output, **given)
    print(f"{output}  {output.stat().st_size / 1e6:.1f} MB")
    return 0
