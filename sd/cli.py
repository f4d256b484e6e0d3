"""The command `artist`. Nothing that imports torch is imported before it is needed."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .commands import COMMANDS, add_source_options

if TYPE_CHECKING:
    from .loader import StableDiffusion
    from .sampler import SimpleSampler

DEFAULTS = {  # of a drawing; what the command line or `--again` does not say
    "prompt": None,
    "negative_prompt": "",
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "seed": 0,
    "height": None,
    "width": None,
    "scheduler": "pndm",
    "eta": 0.0,
    "model": "shapes",
    "revision": None,
    "hub_variant": None,
    "ema": False,
    "dtype": None,
}


class CommandError(ValueError):
    """What is wrong with the command line, in one sentence."""


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
    add("--model", help="shapes (built in), a .ckpt or .safetensors file, a folder, or a Hub repository")
    add("--negative", dest="negative_prompt", metavar="TEXT", help="what to stay away from")
    add("--steps", dest="num_inference_steps", type=int, metavar="N", help="1 to 1000; 50 if not given")
    add("--guidance", dest="guidance_scale", type=float, metavar="G", help="how closely to follow; 7.5")
    add("--seed", type=int, metavar="N", help="of the first picture; the next takes the next; 0")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 8; the model's own size if not given")
    add("--width", type=int, metavar="PIXELS")
    add("--count", type=int, metavar="N", help="how many pictures; 1")
    add("--scheduler", metavar="NAME", help="pndm, ddim or lms; pndm")
    add("--eta", type=float, help="0 to 1, how much noise ddim draws anew; 0")
    add("--again", metavar="PNG", help="draw a picture of `artist` again; other options change it")
    add("--variant", choices=["simple", "lean"], help="how the work is done: simple; lean, in little memory")
    add("--memory", metavar="SIZE", help="what lean may take: 600MB, 1.5GB; most of what is free")
    add("--plan", action="store_true", help="say how lean would go about it and what it takes; draw nothing")
    add("--device", help="cpu, cuda, cuda:1, mps; a GPU if there is one")
    add(
        "--dtype",
        choices=["float16", "bfloat16", "float32", "float64"],
        help="float16 on a GPU, else float32",
    )
    add("--force", action="store_true", help="write over existing files")
    add("--quiet", action="store_true", help="no progress bar")
    add("--version", action="version", version=f"artist {__version__}")
    add_source_options(parser)
    return parser


def drawing(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a drawing: from the command line, else from the picture to draw again, else DEFAULTS."""
    settings = dict(DEFAULTS)
    if "again" in given:
        from .image import read_settings

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
    force = given.get("force", False)
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
    if not folder.is_dir():
        raise CommandError(f"{output} cannot be written: there is no folder {folder}; make it first.")
    if not os.access(folder, os.W_OK):
        raise CommandError(f"{output} cannot be written: the folder {folder} is read-only for you.")
    for path in paths:
        if path.is_dir():
            raise CommandError(f"{path} cannot be written: it is a folder; name a file.")
        if path.exists() and not force:
            raise CommandError(f"{path} exists: choose another name, or write over it with --force.")
    return paths


def load_model(settings: dict[str, Any], given: dict[str, Any]) -> StableDiffusion:
    import torch

    from .loader import load

    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise CommandError(
            f"There is no device {device!r} here: try --device cpu, or install a torch that has it."
        ) from None
    dtype = settings["dtype"]
    return load(
        settings["model"],
        device=device,
        dtype=getattr(torch, dtype) if dtype else None,
        revision=settings["revision"],
        variant=settings["hub_variant"],
        tokenizer=given.get("tokenizer"),
        config=given.get("config"),
        ema=settings["ema"],
        lazy=given.get("variant") == "lean",
    )


def make_sampler(model: StableDiffusion, given: dict[str, Any]) -> SimpleSampler:
    if given.get("variant") == "lean":
        from .lean import LeanSampler

        return LeanSampler(model, given.get("memory"))
    from .sampler import SimpleSampler

    return SimpleSampler(model)


def draw(given: dict[str, Any]) -> None:
    settings = drawing(given)
    count = given.get("count", 1)
    if not 1 <= count <= 10_000:
        raise CommandError(f"--count must be from 1 to 10000, not {count}.")
    lean = [f"--{option}" for option in ("memory", "plan") if option in given]
    if lean and given.get("variant") != "lean":
        raise CommandError(f"{lean[0]} is of --variant lean only: give that too.")
    if "memory" in given:
        from .plan import bytes_of

        bytes_of(given["memory"])  # before the model is loaded
    paths = [] if "plan" in given else outputs(given, count)

    from tqdm import tqdm

    from .image import save_png

    model = load_model(settings, given)
    known = settings.get("model_hash")
    if known and known != model.hash:
        warnings.warn(f"{given['again']} was drawn with other weights (hash {known}, now {model.hash}).")
    sampler = make_sampler(model, given)
    call = {
        k: settings[k]
        for k in DEFAULTS
        if k not in ("prompt", "seed", "model", "revision", "hub_variant", "ema", "dtype")
    }
    if "plan" in given:
        print(sampler.plan(settings["prompt"], **call))  # type: ignore[attr-defined]
        return
    for k, path in enumerate(paths):
        start, seed = time.perf_counter(), settings["seed"] + k
        request = sampler.request(settings["prompt"], seed=seed, **call)
        title = "drawing" if count == 1 else f"drawing {k + 1}/{count}"
        steps = tqdm(
            sampler.run(request),
            desc=title,
            total=len(request.scheduler.timesteps),
            unit="step",
            disable=given.get("quiet", False),
        )
        for step in steps:
            latents = step.latents
        (image,) = sampler.decode(latents)
        record = settings | {
            "seed": seed,
            "height": request.height,
            "width": request.width,
            "dtype": str(model.dtype).removeprefix("torch."),
            "model_hash": model.hash,
            "version": __version__,
        }
        save_png(image, path, record, force=given.get("force", False))
        seconds = time.perf_counter() - start
        print(f"{path}  {request.width} x {request.height}, seed {seed}, {seconds:.1f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(argv[0]) if argv else None
    if argv and (command or argv[0] == "draw"):
        argv.pop(0)
    warnings.showwarning = lambda message, *_: print(f"artist: warning: {message}", file=sys.stderr)
    try:
        if command:
            command.run(command.parser().parse_args(argv))
        else:
            given = vars(draw_parser().parse_args(argv))
            if not given:
                draw_parser().print_help()
                return 2
            draw(given)
    except KeyboardInterrupt:
        print("\nartist: stopped.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # the library's own sentences, and the system's on files
        print(f"artist: error: {error}", file=sys.stderr)
        return 2
    return 0
