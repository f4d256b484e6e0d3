"""The command `artist`. Nothing that imports torch is imported before it is needed."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..files import check_output
from ..parallel import launch
from .commands import COMMANDS
from .options import (
    DEFAULTS,
    CommandError,
    add_drawing_options,
    add_source_options,
    call_of,
    load_model,
    make_sampler,
    parse_split,
)

if TYPE_CHECKING:
    from ..sampler import SimpleSampler


def draw_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="artist",
        description="Draw a picture from a text: with Stable Diffusion v1, or the small built-in model.",
        epilog="Other commands, which answer --help: "
        + "; ".join(f"artist {name}, {command.what}" for name, command in COMMANDS.items())
        + ". A prompt that is one of these words: artist draw PROMPT.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("prompt", nargs="?", help='what to draw: "a red star above a blue ring on a white background"')
    add("-o", "--output", metavar="PNG", help="file or folder; else the first free artist-001.png")
    add("--count", type=int, metavar="N", help="how many pictures; 1")
    add("--again", metavar="PNG", help="draw a picture of `artist` again; other options change it")
    add(
        "--variant",
        choices=["simple", "lean", "parallel"],
        help="simple; lean, in little memory; parallel, over ranks",
    )
    add("--memory", metavar="SIZE", help="what lean may take: 600MB, 1.5GB; most of what is free")
    add("--ranks", type=int, metavar="N", help="how many processes parallel starts here; under torchrun, not needed")
    add("--split", metavar="SPLIT", help="how parallel splits the work, as image=2,guidance=2,rows=1; as is fastest")
    add("--plan", action="store_true", help="say how lean or parallel would go about it; draw nothing")
    add("--exact", action="store_true", help="simple by the textbook, not by sd.fast: slower, in less memory")
    add("--version", action="version", version=f"artist {__version__}")
    add_drawing_options(parser)
    add_source_options(parser)
    return parser


def drawing(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a drawing: from the command line, else from the picture to draw again, else DEFAULTS."""
    settings = dict(DEFAULTS)
    if "again" in given:
        from ..image import read_settings

        again = read_settings(given["again"])
        settings |= {k: v for k, v in again.items() if k in DEFAULTS}
        if "model" not in given:
            settings["model_hash"] = again.get("model_hash")
    settings |= {k: v for k, v in given.items() if k in DEFAULTS}
    if settings["prompt"] is None:
        raise CommandError('There is nothing to draw: give a prompt, as in artist "a red star".')
    return settings


def outputs(given: dict[str, Any], count: int) -> list[Path]:
    """Where the pictures go; checked before any work is done."""
    output = Path(given.get("output", "."))
    folder = output if output.is_dir() else output.parent
    if output.is_dir():
        free = (folder / f"artist-{n:03d}.png" for n in range(1, 1_000_000))
        paths = [p for p, _ in zip((p for p in free if not p.exists()), range(count), strict=False)]
    else:
        if output.suffix.lower() != ".png":
            raise CommandError(f"{output} cannot be written: pictures are PNG, so name it {output.stem}.png.")
        names = [output.stem] if count == 1 else [f"{output.stem}-{k + 1}" for k in range(count)]
        paths = [folder / f"{name}{output.suffix}" for name in names]
    for path in paths:
        check_output(path, force=given.get("force", False))
    return paths


def check_variant(given: dict[str, Any]) -> None:
    """Options that are of some variants only, before anything is loaded."""
    variant = given.get("variant", "simple")
    for option, of in (
        ("memory", ["lean"]),
        ("plan", ["lean", "parallel"]),
        ("exact", ["simple"]),
        ("ranks", ["parallel"]),
        ("split", ["parallel"]),
    ):
        if option in given and variant not in of:
            raise CommandError(f"--{option} is of --variant {' or '.join(of)} only: give that too.")
    if "memory" in given:
        from ..lean.plan import bytes_of

        bytes_of(given["memory"])
    if not 1 <= given.get("ranks", 1) <= 1024:
        raise CommandError(f"--ranks must be from 1 to 1024, not {given['ranks']}.")
    if "split" in given:
        parse_split(given["split"])


def draw(given: dict[str, Any], argv: Sequence[str] | None = None) -> None:
    settings = drawing(given)
    count = given.get("count", 1)
    if not 1 <= count <= 10_000:
        raise CommandError(f"--count must be from 1 to 10000, not {count}.")
    check_variant(given)
    if given.get("ranks", 1) > 1 and not launch.is_rank() and "plan" not in given:
        outputs(given, count)  # before the ranks are started
        launch.launch(sys.argv[1:] if argv is None else argv, given["ranks"])
        return
    first = given.get("variant") != "parallel" or launch.rank() == 0  # only this one writes and shows progress
    paths = outputs(given, count) if first and "plan" not in given else [Path()] * count

    from tqdm import tqdm

    from ..image import save_png

    model = load_model(settings, given)
    known = settings.get("model_hash")
    if known and known != model.hash:
        warnings.warn(f"{given['again']} was drawn with other weights (hash {known}, now {model.hash}).")
    sampler = make_sampler(model, given)
    call = call_of(settings)
    if "plan" in given:
        if given["variant"] == "parallel":
            call |= {"num_images_per_prompt": count, "ranks": given.get("ranks")}
        plan = sampler.plan(settings["prompt"], **call)  # type: ignore[attr-defined]
        if first:
            print(plan)
        return
    once = at_once(sampler, count, settings["prompt"], call)
    for k in range(0, count, once):
        start, seed, n = time.perf_counter(), settings["seed"] + k, min(once, count - k)
        request = sampler.request(settings["prompt"], seed=seed, num_images_per_prompt=n, **call)
        if n < once and (asked := getattr(sampler, "asked", None)):
            sampler.asked = asked._replace(image=n)  # type: ignore[attr-defined]  # the last ones are fewer
        numbers = f"{k + 1}" if n == 1 else f"{k + 1}-{k + n}"
        steps = tqdm(
            sampler.run(request),
            desc="drawing" if count == 1 else f"drawing {numbers}/{count}",
            total=len(request.scheduler.timesteps),
            unit="step",
            disable=given.get("quiet", False) or not first,
        )
        for step in steps:
            latents = step.latents
        images = sampler.decode(latents)
        seconds = time.perf_counter() - start
        for i, image in enumerate(images if first else []):
            path = paths[k + i]
            record = settings | {
                "seed": seed + i,
                "height": request.height,
                "width": request.width,
                "dtype": str(model.dtype).removeprefix("torch."),
                "model_hash": model.hash,
                "version": __version__,
            }
            save_png(image, path, record, force=given.get("force", False))
            print(f"{path}  {request.width} x {request.height}, seed {seed + i}, {seconds:.1f} s", flush=True)


def at_once(sampler: SimpleSampler, count: int, prompt: str, call: dict[str, Any]) -> int:
    """How many pictures are drawn together: one, or as many as ranks deal out among them."""
    from ..parallel.sampler import ParallelSampler, world

    if not isinstance(sampler, ParallelSampler):
        return 1
    return sampler.plan(prompt, num_images_per_prompt=min(count, world()[1]), **call).split.image
