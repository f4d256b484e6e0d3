"""What commands that draw have in common: options, their defaults, and the model and sampler that they ask for.

Nothing that imports torch is imported before it is needed.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from ..parallel import launch

if TYPE_CHECKING:
    from ..model import StableDiffusion
    from ..sampler import SimpleSampler

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

LARGE = 100_000_000  # parameters of a UNet from which on sd.fast pays; with fewer it is no faster


class CommandError(ValueError):
    """What is wrong with the command line, in one sentence."""


SOURCE: dict[str, dict[str, Any]] = {
    "revision": {"metavar": "REV", "help": "branch, tag or commit of a Hub repository"},
    "hub-variant": {"metavar": "NAME", "help": "which files of a Hub repository: fp16"},
    "tokenizer": {"metavar": "DIR", "help": "folder with vocab.json and merges.txt, for files without one"},
    "config": {"metavar": "JSON", "help": "sizes that a weights file does not tell, such as the head count"},
    "ema": {"action": "store_true", "help": "the EMA weights of a full-EMA checkpoint"},
}


def add_source_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options about a source of weights: these, or all."""
    for name in names or SOURCE:
        parser.add_argument(f"--{name}", **SOURCE[name])


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Options of any drawing; to be used with `argument_default=argparse.SUPPRESS`, and DEFAULTS."""
    add = parser.add_argument
    add("--model", help="shapes (built in), a .ckpt or .safetensors file, a folder, or a Hub repository")
    add("--negative", dest="negative_prompt", metavar="TEXT", help="what to stay away from")
    add("--steps", dest="num_inference_steps", type=int, metavar="N", help="1 to 1000; 50 if not given")
    add("--guidance", dest="guidance_scale", type=float, metavar="G", help="how closely to follow; 7.5")
    add("--seed", type=int, metavar="N", help="of the first picture; the next takes the next; 0")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 8; the model's own size if not given")
    add("--width", type=int, metavar="PIXELS")
    add("--scheduler", metavar="NAME", help="pndm, ddim or lms; pndm")
    add("--eta", type=float, help="0 to 1, how much noise ddim draws anew; 0")
    add("--device", help="cpu, cuda, cuda:1, mps; a GPU if there is one")
    add("--dtype", choices=["float16", "bfloat16", "float32", "float64"], help="float16 on a GPU, else float32")
    add("--force", action="store_true", help="write over existing files")
    add("--quiet", action="store_true", help="no progress bar")


def call_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are arguments of a sampler, but for the prompt and the seed."""
    others = ("prompt", "seed", "model", "revision", "hub_variant", "ema", "dtype")
    return {name: settings[name] for name in DEFAULTS if name not in others}


def device_of(given: dict[str, Any]) -> str:
    import torch

    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and launch.is_rank() else device


def is_simple_on_cpu(given: dict[str, Any]) -> bool:
    return given.get("variant", "simple") == "simple" and device_of(given).partition(":")[0] == "cpu"


def is_fast(given: dict[str, Any]) -> bool:
    """Whether the drawing is by `sd.fast`, if the model is large: all not asked for otherwise, on a CPU."""
    return is_simple_on_cpu(given) and "exact" not in given


def load_model(settings: dict[str, Any], given: dict[str, Any]) -> StableDiffusion:
    import torch

    from ..loader import check_device, load
    from ..speed.malloc import keep, large_pages

    if is_simple_on_cpu(given):  # the textbook, too, is faster for it
        large_pages()
        keep()
    device, dtype = device_of(given), settings["dtype"]
    check_device(device)

    def read() -> StableDiffusion:
        return load(
            settings["model"],
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            revision=settings["revision"],
            variant=settings["hub_variant"],
            tokenizer=given.get("tokenizer"),
            config=given.get("config"),
            ema=settings["ema"],
            lazy=given.get("variant") == "lean" or is_fast(given),
        )

    if given.get("variant") == "parallel":
        from ..parallel.sampler import load_together

        return load_together(read, torch.device(device))
    return read()


def make_sampler(model: StableDiffusion, given: dict[str, Any]) -> SimpleSampler:
    if given.get("variant") == "lean":
        from ..lean.sampler import LeanSampler

        return LeanSampler(model, given.get("memory"))
    if given.get("variant") == "parallel":
        from ..parallel.sampler import ParallelSampler

        return ParallelSampler(model, parse_split(given["split"]) if "split" in given else None)
    from ..sampler import SimpleSampler
    from ..speed.fast_model import fast

    large = sum(p.numel() for p in model.unet.parameters()) >= LARGE
    return SimpleSampler(fast(model) if large and is_fast(given) else model)


def parse_split(text: str) -> dict[str, int]:
    parts = [part.split("=") for part in text.split(",")]
    try:
        split = {name.strip(): int(number) for name, number in parts}
    except ValueError:
        split = {}
    known = split.keys() <= {"image", "guidance", "rows"} and len(split) == len(parts)
    if not known or min(split.values()) < 1:
        raise CommandError(f"--split must be like image=2,guidance=2,rows=1, not {text}.")
    return split
