"""`artist info`: what a source holds."""

from __future__ import annotations

from collections.abc import Sequence

from .options import Parser, add_source_options

SUMMARY = "say what a file, folder or repository holds"


def parser() -> Parser:
    result = Parser("artist info", "Say what a file, folder or Hub repository holds, without loading it.")
    result.add_argument("source", metavar="SOURCE", help="A file, a folder, or a Hub repository.")
    add_source_options(result, "revision", "hub-variant")
    return result


def run(arguments: Sequence[str]) -> int:
    given = parser().parse(arguments)
    if "hub_variant" in given:
        given["variant"] = given.pop("hub_variant")
    from ..weights.contents import format_info, info

    print(format_info(info(**given)))
    return 0
