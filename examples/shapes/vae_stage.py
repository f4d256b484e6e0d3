"""The second stage: a VAE that reproduces edges, also from latents that are not quite right."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fitting import Run, fit
from scenes import SIZE, Scene, paint, random_scene, to_array
from torch import Tensor

from sd.vae import VAE, VAEConfig

VAE_SIZES = VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, num_groups=16, scale_factor=1.0)


def pictures(scenes: list[Scene], rng: random.Random) -> Tensor:
    return torch.from_numpy(np.stack([to_array(paint(s, rng)) for s in scenes]))


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The differences between neighbouring pixels, across and down."""
    return x.diff(dim=-1), x.diff(dim=-2)


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """How far y is from the picture x, both (B, 3, H, W) in [-1, 1].

    Flat areas are easy and most of the picture: pixels beside an edge count four times, and up to ten times where
    the two colours are near each other. Slopes count too, for a soft edge and a faint lattice differ little in their
    pixels, and much in those.
    """
    contrast = (F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)).amax(1, keepdim=True)
    difference = (y - x) * torch.where(contrast > 0.1, 4 / contrast.clamp(0.4, 1), 1)
    steepness = sum((a - b).abs().mean() for a, b in zip(slopes(y), slopes(x), strict=True))
    return difference.abs().mean() + 0.5 * difference.square().mean() + 2 * steepness


def train_vae(vae: VAE, run: Run, recipe: Mapping[str, Any]) -> None:
    """With noise in the latents of every other picture, up to recipe["noise"] of their standard deviation.

    A UNet's latents are never quite those of a picture. A decoder that has met such ones draws flat areas flat and
    edges sharp all the same; and an encoder that has, says things more than once.
    """
    batch, steps = recipe["batch"], recipe["steps"]

    def loss_of(step: int) -> Tensor:
        rng = random.Random(step)
        whole = step > 0.8 * steps  # before, only quarters: four times as many pictures for the same work
        scenes = [random_scene(rng, pairs=0.6) for _ in range(batch if whole else 2 * batch)]
        x = pictures(scenes, rng).to(run.device)
        if not whole:
            top, left = rng.randrange(SIZE // 2 + 1), rng.randrange(SIZE // 2 + 1)
            x = x[:, :, top : top + SIZE // 2, left : left + SIZE // 2].contiguous()
        mean, logvar = (moment.float() for moment in vae.moments(x))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        much = (recipe["noise"] * torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.5)).to(x)
        spread = (torch.exp(0.5 * logvar) ** 2 + (much * mean.std()) ** 2).sqrt()
        y = vae.decode(mean + spread * torch.randn_like(mean)).float()
        return reconstruction_loss(y, x) + recipe["kl"] * kl

    fit("vae", vae, loss_of, run, recipe)
