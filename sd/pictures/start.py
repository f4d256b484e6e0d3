"""What the loop starts from where a picture is given: the order of operations, and of noise, is that of diffusers.

    StableDiffusionImg2ImgPipeline    the picture's latents under the noise of the step that is begun with
    StableDiffusionInpaintPipeline    with strength 1 pure noise; what the mask keeps is put back after each step,
                                      or, for weights of 9 channels, mask and masked picture are told to the UNet

Each image draws from its own generator, in this order: the latents of its picture, the noise that it starts from, the
latents of its masked picture, the noise of steps. (diffusers draws those of a batch from the first generator alone.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .given import Pictures

Encode = Callable[[Tensor, tuple[int, ...], Tensor], Tensor]  # pictures, which for each image, unit noise -> latents
Restore = Callable[[int, Tensor], Tensor]  # after step i: x -> x, with what is to stay put back
Network = Callable[..., Tensor]  # x, t, context, and what a ControlNet adds


@dataclass(frozen=True)
class Start:
    """Where the loop begins: x (B, 4, h, w), as it stands at step `begin`.

    beside   (B, 5, h, w): what weights of 9 channels are told beside x, the mask and the masked picture's latents
    """

    x: Tensor
    begin: int = 0
    restore: Restore | None = None
    beside: Tensor | None = None


def begin_from(
    request: Any, draw: Callable[..., Tensor], encode: Encode, in_channels: int, posterior: bool = True
) -> Start:
    """request: of a sampler. `draw` gives (B, 4, h, w) of unit noise, each image's from its own generator.

    posterior: whether the VAE's latents are drawn; if not, nothing is drawn for them, and `encode` is given zeros.
    """
    pictures: Pictures | None = request.pictures
    scheduler, begin = request.scheduler, request.begin
    told = in_channels > 4
    pure = pictures is None or (pictures.mask is not None and pictures.strength == 1)
    originals = None
    if pictures is not None and not (told and pure):
        nothing = request.context.new_zeros(len(request.context), 1, 1, 1)
        originals = encode(pictures.images, pictures.which, draw() if posterior else nothing)
    if originals is not None and pictures is not None and pictures.mask is not None:
        originals = originals.contiguous()  # the layout that diffusers gives them, for convolutions round by it
    noise = draw() if request.latents is None else request.latents
    if pure:
        x = noise * scheduler.init_noise_sigma
    else:
        assert originals is not None
        x = scheduler.add_noise(originals, noise, begin)
    masked = pictures is not None and pictures.mask is not None
    second = None
    if masked or told:
        second = draw() if posterior else torch.zeros_like(noise)  # diffusers draws for weights of 4 channels, too
    if told:
        assert second is not None
        return Start(x, begin, None, told_beside(pictures, request, second, encode))
    if not masked:
        return Start(x, begin)
    assert pictures is not None
    assert originals is not None
    return Start(x, begin, restoring(pictures, originals, noise, scheduler, begin))


def latent_mask(mask: Tensor, like: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, 1, h, w), by the nearest pixel, as diffusers."""
    return F.interpolate(mask, size=like.shape[-2:]).to(like)


def restoring(pictures: Pictures, originals: Tensor, noise: Tensor, scheduler: Any, begin: int) -> Restore:
    """What is kept is the picture, under the noise that the image started from, at the level of the next step.

    A pixel whose mask is m is free in the last m of the steps: 1, in all; 0, in none.
    """
    mask, count = latent_mask(pictures.masks(), originals), len(scheduler.timesteps)

    def restore(i: int, x: Tensor) -> Tensor:
        done = (i + 1 - begin) / (count - begin)
        kept = originals if i + 1 == count else scheduler.add_noise(originals, noise, i + 1)
        return torch.where((mask > 0) & (mask >= 1 - done - 1e-6), x, kept)

    return restore


def told_beside(pictures: Pictures | None, request: Any, noise: Tensor, encode: Encode) -> Tensor:
    """The mask, and the latents of the picture with mid-grey where the mask is 1. Without a picture all is mask."""
    if pictures is None or pictures.mask is None:
        mask = torch.ones(1, 1, request.height, request.width)
        grey = torch.zeros(1, 3, request.height, request.width).contiguous(memory_format=torch.channels_last)
        images, which = grey, (0,) * len(noise)
        masks = mask.expand(len(noise), -1, -1, -1)
    else:
        masks = (pictures.masks() >= 0.5).float()
        hard = (pictures.mask >= 0.5).float()
        images, which = pictures.images * (hard < 0.5), pictures.which
    return torch.cat([latent_mask(masks, noise), encode(images, which, noise).contiguous()], dim=1)


def beside(unet: Network, channels: Tensor | None) -> Network:
    """The UNet, told these channels (B, 5, h, w) beside x, in each half of guidance; without them, as it is."""
    if channels is None:
        return unet

    def call(x: Tensor, t: Tensor, context: Any, **more: Any) -> Tensor:
        return unet(torch.cat([x, channels.repeat(len(x) // len(channels), 1, 1, 1)], dim=1), t, context, **more)

    return call
