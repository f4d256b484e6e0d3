"""Whole drawings beside diffusers' pipelines: from text, from a picture, and with a mask."""

from __future__ import annotations

import time
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..model import StableDiffusion
from ..sampler import SimpleSampler
from . import reference
from .measure import Row, relative

SOLVER, STEPS, GUIDANCE, SEED = (
    "ddim",
    4,
    3.0,
    0,
)  # it draws with what any model predicts; LCM's UNets are told the guidance
FROM = {"image": "StableDiffusionImg2ImgPipeline", "mask": "StableDiffusionInpaintPipeline"}


def picture_of(side: int) -> Image.Image:
    """Coarse colours, the same for every comparison."""
    colours = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(colours.numpy()).resize((side, side), Image.Resampling.BICUBIC)


def mask_of(side: int) -> Image.Image:
    """White in the middle."""
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (side // 4, side // 4, side - side // 4, side - side // 4))
    return mask


def compare_drawings(model: StableDiffusion, side: int, texts: list[str], bound: float) -> list[Row]:
    """Final latents of four steps of DDIM, with guidance: rows for what these weights can draw in diffusers, too.

    texts: a negative prompt and a prompt. Both sides are given their embeddings.
    """
    picture = {"image": picture_of(side), "strength": 0.75}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "drawing (from text)": ("StableDiffusionPipeline", {}),
        "drawing (from a picture)": (FROM["image"], picture),
        "drawing (with a mask)": (FROM["mask"], {**picture, "mask_image": mask_of(side)}),
    }
    if model.unet.config.in_channels != model.vae.config.z_channels:  # weights for inpainting
        kinds = {"drawing (with a mask)": kinds["drawing (with a mask)"]}
    context = model.encode_prompt(texts)
    return [
        compare_drawing(name, model, kind, options, context, side, bound) for name, (kind, options) in kinds.items()
    ]


def compare_drawing(
    name: str,
    model: StableDiffusion,
    kind: str,
    options: dict[str, Any],
    context: Tensor,
    side: int,
    bound: float,
    theirs: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> Row:
    """theirs: what diffusers' pipeline has beside a model's parts, and the options that are others in its call."""
    parts, other = theirs or ({}, options)
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    call |= {"negative_prompt_embeds": context[:1], "prompt_embeds": context[1:]}
    if kind != FROM["image"]:  # that pipeline takes the picture's size
        call |= {"height": side, "width": side}
    scheduler = reference.diffusers_scheduler(model.defaults.make_scheduler(SOLVER, STEPS))
    pipe = reference.diffusers_pipeline(model, kind, scheduler, text=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    begin = time.perf_counter()
    ours = SimpleSampler(model)(scheduler=SOLVER, seed=SEED, **call, **options)
    middle = time.perf_counter()
    with reference.without_notices():
        began = time.perf_counter()
        expected = pipe(generator=generator, **call, **other).images
    seconds = middle - begin, time.perf_counter() - began
    return Row(name, relative(ours, expected), bound, seconds, None, f"{SOLVER}, {STEPS} steps, with guidance")
