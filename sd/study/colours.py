"""Latents as rough colours, for previews, without the VAE."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from ..adapt.other_vae import latent_of
from ..model import StableDiffusion
from ..weights.unread import computes_in

V1_SCALE = 0.18215
V1_RGB = ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473))


def latent_rgb(model: StableDiffusion) -> Tensor:
    """(5, 3): a row for each channel of the latent and one to add, to the image in [0, 1], an eighth the size.

    For Stable Diffusion v1 the matrix that is in use for previews; for another VAE the least squares fit to its
    encodings of coloured fields. TAESD's latents are those of the VAE that it stands in for.
    """
    c = latent_of(model.vae)
    if c.scale_factor == V1_SCALE and c.z_channels == 4:
        return torch.cat([torch.tensor(V1_RGB) / 2, torch.full((1, 3), 0.5)])
    vae = model.vae
    device, dtype = computes_in(vae)
    if dtype not in (torch.float32, torch.float64):  # half precision is slow or missing on some processors
        vae, dtype = deepcopy(vae).float(), torch.float32
    generator = torch.Generator().manual_seed(0)
    side = 4 * c.downsampling
    colours = torch.rand(4, 3, 4, 4, generator=generator)
    fields = colours.repeat_interleave(side, 2).repeat_interleave(side, 3)  # (4, 3, 16 f, 16 f)
    with torch.no_grad():
        latents = vae.encode((2 * fields - 1).to(device, dtype)).cpu().double()
    known = torch.cat([latents, torch.ones_like(latents[:, :1])], 1).transpose(0, 1).flatten(1).T  # (n, 5)
    wanted = colours.repeat_interleave(4, 2).repeat_interleave(4, 3).transpose(0, 1).flatten(1).T.double()
    return torch.linalg.lstsq(known, wanted, driver="gelsd").solution.float()


def to_rgb(latents: Tensor, rgb: Tensor) -> Tensor:
    """(B, 4, h, w) -> (B, 3, h, w) in [0, 1], by a matrix of `latent_rgb`."""
    colours = torch.einsum("bchw,cr->brhw", latents.float(), rgb[:-1]) + rgb[-1][:, None, None]
    return colours.clamp(0, 1)
