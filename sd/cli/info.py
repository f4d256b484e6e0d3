"""`artist info`: what a source holds."""

from __future__ import annotations

from collections.abc import Sequence

from .options import Parser, add_source_options

SUMMARY = "say what a file, folder or repository holds"


def parser() -> Parser:
    result = Parser(
        "artist info",
        "Say what a file, folder or Hub repository holds, without loading it: a model; or a LoRA, and what of it\n"
        "Stable Diffusion v1 has a place for.",
    )
    result.add_argument("source", metavar="SOURCE", help="A file, a folder, or a Hub repository.")
    add_source_options(result, "revision", "hub-variant")
    return result


def run(arguments: Sequence[str]) -> int:
    given = parser().parse(arguments)
    if "hub_variant" in given:
        given["variant"] = given.pop("hub_variant")
    from ..adapt.adapter_facts import format_lora_info, is_lora_folder, lora_info
    from ..weights.contents import format_info, info

    source = given["source"]
    facts = None if is_lora_folder(source) else info(**given)
    print(format_info(facts) if facts and facts["kind"] != "LoRA" else format_lora_info(lora_info(source)))
    return 0
