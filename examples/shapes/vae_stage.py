"""The second stage: a VAE that reproduces edges, also from latents that are not quite right."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bank import Bank, as_input
from fitting import Run, fit
from scenes import SIZE
from stepping import Batch
from torch import Tensor

from sd.vae import VAE, VAEConfig

VAE_SIZES = VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, num_groups=16, scale_factor=1.0)


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


def train_vae(vae: VAE, bank: Bank, run: Run, recipe: Mapping[str, Any]) -> None:
    """On pictures of the bank, with noise in the latents of every other one: up to recipe["noise"] of their spread.

    A UNet's latents are never quite those of a picture. A decoder that has met such ones draws flat areas flat and
    edges sharp all the same; and an encoder that has, says things more than once.
    """
    batch, steps, noise = recipe["batch"], recipe["steps"], recipe["noise"]

    def batch_of(step: int) -> Batch:
        whole = step > 0.8 * steps  # before, only quarters: four times as many pictures for the same work
        index = torch.randint(bank.count, (batch if whole else 2 * batch,), device=bank.device)
        x = bank.pictures[index]
        if not whole:
            top, left = torch.randint(SIZE // 2 + 1, (2,)).tolist()
            x = x[:, top : top + SIZE // 2, left : left + SIZE // 2]
        x, rand = as_input(x).contiguous(), partial(torch.rand, len(x), 1, 1, 1, device=x.device)
        much = noise * rand() * (rand() < 0.5)
        return x, much, torch.randn(len(x), 4, x.shape[-1] // 8, x.shape[-1] // 8, device=x.device)

    def loss_of(x: Tensor, much: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = (moment.float() for moment in vae.moments(x))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        spread = (torch.exp(0.5 * logvar) ** 2 + (much * mean.std()) ** 2).sqrt()
        y = vae.decode(mean + spread * noise).float()
        return reconstruction_loss(y, x) + recipe["kl"] * kl

    fit("vae", vae, batch_of, loss_of, run, recipe)
