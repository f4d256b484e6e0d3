"""`artist describe`: every block of a model, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

from .options import CommandError, Parser, add_source_options, dtype_option, whole

SUMMARY = "list every block of a model, and what it costs"


def parser() -> Parser:
    result = Parser(
        "artist describe",
        "Show a model as a table, or as a tree: every block with the shape of its output, its parameters, FLOPs and\n"
        "bytes. The weights are not read.",
    )
    add = result.add_argument
    add("source", nargs="?", metavar="SOURCE", help="As for artist --model. Default: Stable Diffusion v1 itself.")
    add("--height", type=whole(), metavar="PIXELS", help="The picture's height. Default: the model's own size.")
    add("--width", type=whole(), metavar="PIXELS", help="The picture's width. Default: the model's own size.")
    add("--dtype", **dtype_option("The kind of numbers of which bytes are counted. Default: the source's own."))
    add("--tree", action="store_true", help="Show every module, instead of the table.")
    add("--depth", type=whole(1), metavar="N", help="For --tree: how many levels to show. Default: all.")
    add("--json", action="store_true", help="Print the same as JSON.")
    add_source_options(result, "revision", "hub-variant", "config")
    return result


def run(arguments: Sequence[str]) -> int:
    given = parser().parse(arguments)
    tree, depth, json = given.pop("tree", False), given.pop("depth", None), given.pop("json", False)
    if depth is not None and not tree:
        raise CommandError("--depth only works with --tree: add that, or leave --depth out.")
    if tree and json:
        raise CommandError("--tree and --json are two ways to print the same: leave one of them out.")
    import torch

    from ..study.description import describe

    if "dtype" in given:
        given["dtype"] = getattr(torch, given["dtype"])
    if "hub_variant" in given:
        given["variant"] = given.pop("hub_variant")
    found = describe(given.pop("source", None), **given)
    print(found.json() if json else found.tree(depth) if tree else found)
    return 0
