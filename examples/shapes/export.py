"""Pack what train.py has learned into the one file that `sd.load("shapes")` reads.

python examples/shapes/export.py runs/shapes sd/shapes.safetensors
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from scenes import SIZE
from text_stage import TEXT, Text
from unet_stage import UNET
from vae_stage import VAE_SIZES
from vocabulary import WORDS, tokenizer_files

import sd
from sd.model import Defaults
from sd.prompts.encoder import TextEncoder, text_model
from sd.text import TextConfig

# The best of the table in README.md: 399 of 400 pictures are wholly right.
BEST = Defaults(scheduler="ddim", num_inference_steps=30, guidance_scale=7.5)


def trained(folder: Path) -> sd.StableDiffusion:
    """The model from the trainer's checkpoints; the UNet's weights are the averaged ones."""

    def state(name: str, key: str) -> dict:
        return torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)[key]

    text = Text(folder)
    text.load_state_dict(state("text", "module"))
    vae = sd.VAE(replace(VAE_SIZES, scale_factor=state("latents", "scale")))
    vae.load_state_dict(state("vae", "module"))
    unet = sd.UNet(UNET)
    unet.load_state_dict(state("unet", "average"))
    config = TextConfig(**TEXT, vocab_size=text.clip.config.vocab_size)
    encoder = TextEncoder(text_model(config, text.clip.state_dict()), tokenizer_files(), WORDS)
    return sd.StableDiffusion(unet.eval(), vae.eval(), encoder, name="shapes", size=SIZE, defaults=BEST)


if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    sd.save(trained(source), out, dtype=torch.float16, force=True)
    print(f"{out}  {out.stat().st_size / 1e6:.1f} MB")
