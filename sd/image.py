"""Tensors to pictures and back; what is written into a PNG: how it was drawn, enough to draw it again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .files import parse_json, writing

if TYPE_CHECKING:
    from collections.abc import Mapping

JSON_CHUNK = "sd"  # the PNG text chunk that `artist --again` reads


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> B pictures of 8 bits, rounded as diffusers does (CompVis truncates)."""
    array = images.detach().cpu().permute(0, 2, 3, 1).float().numpy()  # (B, H, W, 3)
    return [Image.fromarray(a) for a in (array * 255).round().astype(np.uint8)]


def from_pil(image: Image.Image) -> Tensor:
    """A picture -> (1, 3, H, W) in [-1, 1], what `VAE.encode` takes."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1)[None].contiguous()


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The text chunk `parameters` in the form of AUTOMATIC1111, which most tools and sites read.

    settings: prompt, negative_prompt, num_inference_steps, scheduler, guidance_scale, seed, width, height,
    model, model_hash.
    """
    fields = {
        "Steps": settings["num_inference_steps"],
        "Sampler": {"pndm": "PLMS", "ddim": "DDIM", "lms": "LMS"}.get(settings["scheduler"], settings["scheduler"]),
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": settings["model_hash"],
        "Model": Path(str(settings["model"])).stem
        if str(settings["model"]).endswith(("ckpt", "safetensors"))
        else settings["model"],
    }
    if settings.get("eta"):
        fields["Eta"] = settings["eta"]
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in fields.items() if v is not None)])


def save_png(
    image: Image.Image,
    path: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> None:
    """Write a PNG with `settings` in its text chunks, whole or not at all.

    Raises FileExistsError where `path` exists, unless `force`; OSError where it cannot be written.
    """
    info = PngInfo()
    if settings is not None:
        info.add_itxt("parameters", parameters_text(settings))
        info.add_itxt(JSON_CHUNK, json.dumps(dict(settings), ensure_ascii=False))
    with writing(path, force=force) as file:
        image.save(file, "PNG", pnginfo=info)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that `save_png` wrote. Raises ValueError where there are none."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from None
    try:
        settings = parse_json(text[JSON_CHUNK])
    except (KeyError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} does not say how it was drawn: it has no text chunk {JSON_CHUNK!r}; `artist` writes one."
        )
    return settings
