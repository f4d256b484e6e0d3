"""What a drawing is asked to be, and the model and the sampler that it needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..parallel import launch
from .options import DTYPES, CommandError

if TYPE_CHECKING:
    from ..model import StableDiffusion
    from ..sampler import SimpleSampler

LARGE = 100_000_000  # parameters of a UNet from which on sd.fast pays; with fewer it is no faster


@dataclass(frozen=True)
class Drawing:
    """Every setting of a drawing. None: nothing was asked for, and the model, the sampler or the machine decides."""

    # What is drawn. The names are those of a sampler's arguments.
    prompt: str
    negative_prompt: str = ""
    seed: int = 0  # of the first picture
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    eta: float = 0.0
    # With which model.
    model: str = "shapes"
    revision: str | None = None
    hub_variant: str | None = None
    ema: bool = False
    tokenizer: str | None = None
    config: str | None = None
    again: str | None = None  # the picture that the settings come from
    model_hash: str | None = None  # of the weights that drew that picture
    # How.
    variant: str = "simple"
    exact: bool = False
    memory: str | None = None
    ranks: int | None = None
    split: Mapping[str, int] | None = None
    device: str | None = None
    dtype: str | None = None
    plan: bool = False
    # How many, and where they go.
    count: int = 1
    output: str | None = None
    force: bool = False
    quiet: bool = False

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of a sampler, but for the prompt, the seed, and what is left to the model."""
        names = ("negative_prompt", "num_inference_steps", "guidance_scale", "height", "width", "scheduler", "eta")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def fast(self) -> bool:
        """Whether a large model is drawn with by `sd.fast`: on a CPU, unless something else is asked for."""
        return self.simple_on_cpu and not self.exact

    @property
    def simple_on_cpu(self) -> bool:
        return self.variant == "simple" and place(self.device).partition(":")[0] == "cpu"


RECORDED: dict[str, type | tuple[type, ...]] = {  # what a PNG of `artist` says of how it was drawn
    **dict.fromkeys(["prompt", "negative_prompt", "scheduler", "dtype"], str),
    **dict.fromkeys(["model", "revision", "hub_variant", "model_hash"], str),
    **dict.fromkeys(["seed", "num_inference_steps", "height", "width"], int),
    **dict.fromkeys(["guidance_scale", "eta"], (int, float)),
    "ema": bool,
}


def drawing_of(given: Mapping[str, Any]) -> Drawing:
    """What is given on the command line; what is not, from the picture that is to be drawn again, if there is one."""
    settings = recorded(given["again"]) if "again" in given else {}
    if "model" in given:
        settings.pop("model_hash", None)
    settings |= given
    if "prompt" not in settings:
        raise CommandError('There is nothing to draw: give a prompt, for example artist "a red star".')
    return Drawing(**settings)


def recorded(picture: str) -> dict[str, Any]:
    """The settings in a PNG that `artist` wrote; they may come from anywhere, so their kinds are checked."""
    from ..image import read_settings

    found = {name: v for name, v in read_settings(picture).items() if name in RECORDED and v is not None}
    for name, value in found.items():
        if not isinstance(value, RECORDED[name]) or (name == "dtype" and value not in DTYPES):
            raise CommandError(f"{picture} cannot be drawn again: its setting {name} is damaged ({value!r}).")
    return found


def settings_used(drawing: Drawing, model: StableDiffusion, request: Any) -> dict[str, Any]:
    """What goes into the PNG, but for the seed: enough to draw it again, whatever the model's defaults become."""
    from .. import __version__

    asked = {name: getattr(drawing, name) for name in RECORDED}
    return asked | {
        "num_inference_steps": request.scheduler.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "scheduler": type(request.scheduler).__name__.lower(),
        "height": request.height,
        "width": request.width,
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_hash": model.hash,
        "version": __version__,
    }


# ---- the model and the sampler


def place(device: str | None) -> str:
    """The device to compute on: of several ranks on one machine, each takes its own GPU."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and launch.is_rank() else device


def load_model(drawing: Drawing) -> StableDiffusion:
    import torch

    from ..loader import check_device, load
    from ..speed.malloc import keep, large_pages

    if drawing.simple_on_cpu:  # the textbook, too, is faster for it
        large_pages()
        keep()
    device = place(drawing.device)
    check_device(device)

    def read() -> StableDiffusion:
        return load(
            drawing.model,
            device=device,
            dtype=getattr(torch, drawing.dtype) if drawing.dtype else None,
            revision=drawing.revision,
            variant=drawing.hub_variant,
            tokenizer=drawing.tokenizer,
            config=drawing.config,
            ema=drawing.ema,
        )

    if drawing.variant == "parallel":
        from ..parallel.sampler import load_together

        return load_together(read, torch.device(device))
    return read()


def make_sampler(model: StableDiffusion, drawing: Drawing) -> SimpleSampler:
    if drawing.variant == "lean":
        from ..lean.sampler import LeanSampler

        return LeanSampler(model, drawing.memory)
    if drawing.variant == "parallel":
        from ..parallel.sampler import ParallelSampler

        return ParallelSampler(model, drawing.split)
    from ..sampler import SimpleSampler
    from ..speed.fast_model import fast

    large = sum(p.numel() for p in model.unet.parameters()) >= LARGE
    return SimpleSampler(fast(model) if large and drawing.fast else model)
