"""`artist compare`: a model beside diffusers, or one source of weights beside another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import check_output
from .options import CommandError, Parser, add_source_options, dtype_option, lora_file, number, one_of, whole

SUMMARY = "compare a model with diffusers, or two sources with each other"
OF_SOURCES = ("tokenizer", "config", "ema", "revision", "hub_variant")
AGAINST_DIFFUSERS = ("only", "repeats", "ema", "vae", "controlnet")
ONLY_ALIKE = ("only", "repeats", "bound", "controlnet")  # of comparisons of what should be alike


def parser() -> Parser:
    result = Parser(
        "artist compare",
        "Compare a model with diffusers, block by block on the same inputs: the largest relative difference, and\n"
        "the time and memory of both. Or compare two sources of weights: which tensors differ, and what that does.\n"
        "Or see which blocks a LoRA changes.",
        "The exit code is 1 where something is over its bound or differs. Comparing with diffusers needs\n"
        "pip install 'artificial-artist[compare]'; comparing two sources needs nothing more.",
    )
    add = result.add_argument
    add("source", nargs="?", metavar="SOURCE", help="As for artist --model. Default: shapes, the built-in model.")
    add("other", nargs="?", metavar="OTHER", help="A second source, to compare with instead of diffusers.")
    add("--random", type=one_of("full", "small", "small-sd2", "small-lcm"), metavar="SIZE", help="Take random "
        "weights instead of a source, in a model of full or small size, or in a small one of the structure of SD 2 "
        "or of LCM.")  # fmt: skip
    add("--dtype", **dtype_option("The kind of numbers to compute with. Default: float64; float32 for two sources."))
    add("--device", help="Where to compute: cpu or cuda. Default: cpu.")
    add("--size", type=whole(), metavar="PIXELS", help="The edge of the picture. Default: the model's own size.")
    add("--only", nargs="+", metavar="PART", help="Compare only these of text, unet, controlnet, vae, schedulers "
        "and drawings. Two sources are always compared whole.")  # fmt: skip
    add("--bound", type=number, metavar="X", help="The largest difference that passes. Default: 1e-10 in float64, "
        "1e-5 in float32; 0 for two sources.")  # fmt: skip
    add("--repeats", type=whole(0), metavar="N", help="How often each block is timed; 0 measures no time. Default: "
        "1. Two sources are not timed.")  # fmt: skip
    add("--lora", action="append", type=lora_file, metavar="FILE[:SCALE]", help="Compare the source with itself and "
        "this LoRA: which blocks it changes, and by how much. May be given several times.")  # fmt: skip
    add("--controlnet", metavar="FILE", help="The ControlNet that is compared with diffusers'. Default: one "
        "of random weights.")  # fmt: skip
    add("--json", metavar="FILE", help="Write the figures to this file too.")
    add("--force", action="store_true", help="Write over an existing file.")
    add_source_options(result)
    return result


def run(arguments: Sequence[str]) -> int:
    given = parser().parse(arguments)
    if "random" in given and "source" in given:
        raise CommandError("--random takes random weights instead of a source: leave one of them out.")
    for name in OF_SOURCES if "random" in given else ():
        if name in given:
            raise CommandError(f"--{name.replace('_', '-')} is about a source, and --random has none: leave it out.")
    for name in AGAINST_DIFFUSERS if "other" in given else ():
        if name in given:
            raise CommandError(
                f"--{name} only works in a comparison with diffusers, not with two sources: leave it out."
            )
    for name in (n for n in ("other", *ONLY_ALIKE) if n in given and "lora" in given):
        what = "A second source" if name == "other" else f"--{name}"
        raise CommandError(f"{what} does not go with --lora, which compares a model with itself: leave one out.")
    if "other" in given and given.get("device", "cpu") != "cpu":
        raise CommandError("Two sources are compared on the CPU: leave --device out.")
    if not given.get("bound", 0.0) >= 0:
        raise CommandError(f"--bound must be a number of at least 0, not {given['bound']}.")
    file, force = given.pop("json", None), given.pop("force", False)
    if file:
        check_output(file, force=force)  # before any work is done
    loras = [(chosen.file, chosen.scale) for chosen in given.pop("lora", ())]
    if "hub_variant" in given:
        given["variant"] = given.pop("hub_variant")
    from ..compare.comparison import compare_command
    from ..compare.report import format_report, write_report

    report = compare_command(**given, loras=loras)
    print(format_report(report))
    if file:
        write_report(report, Path(file), force=force)
    return 0 if report.same or loras else 1
