"""A ControlNet beside diffusers' ControlNetModel with the same weights: rows of `artist compare`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.control_files import load_controlnet
from ..adapt.controlnet import ControlNet
from ..model import StableDiffusion
from ..weights.unread import read_weights
from . import reference
from .drawings import GUIDANCE, compare_drawing, picture_of
from .measure import Row, compare_blocks, pair


def controlnet_blocks(net: ControlNet) -> dict[str, nn.Module]:
    """Name -> module, of the blocks of a ControlNet."""
    inner = ((f"{name}.{i}", block) for name in ("input_blocks", "zero_convs")
             for i, block in enumerate(getattr(net, name)))  # fmt: skip
    whole = ("input_hint_block", "time_embed", "middle_block", "middle_block_out")
    return dict(inner) | {name: getattr(net, name) for name in whole}


def counterparts(net: ControlNet, theirs: Any, timesteps: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Name of each of these blocks -> diffusers' function of its arguments."""
    table = reference.unet_counterparts(net, theirs)
    table["input_hint_block"], table["middle_block_out"] = (
        theirs.controlnet_cond_embedding,
        theirs.controlnet_mid_block,
    )
    table |= {f"zero_convs.{i}": layer for i, layer in enumerate(theirs.controlnet_down_blocks)}
    # Theirs starts from the timesteps: the sines and cosines are part of it.
    table["time_embed"] = lambda x: theirs.time_embedding(theirs.time_proj(timesteps).to(x.dtype))
    return table


def compare_controlnet(
    model: StableDiffusion,
    inputs: tuple[Tensor, Tensor, Tensor],
    context: Tensor,
    bound: float,
    repeats: int,
    file: str | os.PathLike[str] | None = None,
) -> list[Row]:
    """Rows for each block of a ControlNet, for all that it adds, for the UNet with it, and for a drawing.

    inputs   latents, timesteps and a picture in [-1, 1], as for the rows of the UNet and the VAE
    context  embeddings of a negative prompt and of a prompt
    file     of the ControlNet; one with random weights if not given. Raises as `load_controlnet` does
    """
    net = load_controlnet(file, model=model) if file else random_one(model)
    read_weights(net)
    latents, timesteps, image = inputs
    x, picture = latents[:, : net.config.in_channels], (image / 2 + 0.5).expand(len(latents), -1, -1, -1)
    other, unet = reference.diffusers_controlnet(net), reference.diffusers_unet(model)

    def ours() -> list[Tensor]:
        return net(x, timesteps, context, net.hint(picture))

    def theirs() -> list[Tensor]:
        skips, middle = other(x, timesteps, context, picture, return_dict=False)
        return [*skips, middle]

    blocks, matching = controlnet_blocks(net), counterparts(net, other, timesteps)
    rows = compare_blocks("controlnet", blocks, matching, ours, bound, repeats)
    whole = partial(in_one, ours), partial(in_one, theirs)
    rows.append(pair("controlnet (whole)", *whole, bound, repeats)[0])

    def with_theirs() -> Tensor:
        *skips, middle = theirs()
        more: dict[str, Any] = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        more["timestep_cond"] = reference.told_guidance(model.unet.config, GUIDANCE, latents)
        return unet(latents, timesteps, context, return_dict=False, **more)[0]

    def with_ours() -> Tensor:
        return model.unet(latents, timesteps, context, control=ours(), guidance=GUIDANCE)

    rows.append(pair("unet (with a ControlNet)", with_ours, with_theirs, bound, repeats)[0])
    side, kind = image.shape[-1], "StableDiffusionControlNetPipeline"
    if model.unet.config.in_channels == net.config.in_channels:  # not weights for inpainting
        hint, name = picture_of(side), "drawing (with a ControlNet)"
        call, given = {"controlnet": net, "control_image": hint}, {"image": hint}
        rows.append(compare_drawing(name, model, kind, call, context, side, bound, ({"controlnet": other}, given)))
    return rows


def random_one(model: StableDiffusion) -> ControlNet:
    """A ControlNet for this model, with random weights."""
    halvings = model.vae.config.downsampling.bit_length() - 1
    return reference.random_controlnet(model, hint_widths=(16, 32, 96, 256)[: halvings + 1])


def in_one(function: Callable[[], list[Tensor]]) -> Tensor:
    """All that a ControlNet adds, as one row of numbers."""
    return torch.cat([tensor.flatten() for tensor in function()])
