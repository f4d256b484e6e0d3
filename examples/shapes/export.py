"""Pack what train.py has learned into the one file that `sd.load("shapes")` reads.

python examples/shapes/export.py runs/shapes sd/shapes.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from dataclasses import replace

from train import UNET, VAE_SIZES, Text

from sd.unet import UNet
from sd.vae import VAE


def trained(folder: Path) -> tuple[Text, VAE, UNet]:
    """The three parts from their checkpoints; the UNet's are its averaged weights."""

    def state(name: str, key: str) -> dict:
        return torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)[key]

    text = Text(folder)
    text.load_state_dict(state("text", "module"))
    # The trainer divides latents by their standard deviation: that is the scale factor of the model.
    scale = 1 / torch.load(folder / "latents.pt", weights_only=True).std().item()
    vae = VAE(replace(VAE_SIZES, scale_factor=scale))
    vae.load_state_dict(state("vae", "module"))
    unet = UNet(UNET)
    unet.load_state_dict(state("unet", "ema"))
    return text.eval(), vae.eval(), unet.eval()
