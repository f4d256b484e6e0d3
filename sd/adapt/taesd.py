"""TAESD, a VAE of 2.4 million parameters that imitates Stable Diffusion's: https://github.com/madebyollin/taesd

It was made for previews: it decodes with a seventeenth of the arithmetic, and less sharply. It works on *scaled*
latents, and its encoder's are certain, so nothing is drawn. With the original configuration, at 512 x 512:

    encoder.layers   0: convolution; 1: block, 512 x 512; 2: convolution that halves; 3-5: blocks, 256 x 256; 6, 7-9;
                     10, 11-13: blocks, 64 x 64; 14: convolution to 4 channels
    decoder.layers   0, 1: convolution, ReLU; 2-4: blocks, 64 x 64; 5, 6: enlarged to twice the size, convolution;
                     7-9, 10, 11; 12-14, 15, 16; 17: block, 512 x 512; 18: convolution to 3 channels

Names of modules are those of the Hub's AutoencoderTiny.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vae import VAE, VAEConfig
from ..weights.source import check_fit, shapes_of
from ..weights.vaes import FoundVAE, check_latent


class TinyBlock(nn.Module):
    """Three convolutions with ReLU between, added to the input, and ReLU."""

    def __init__(self, width: int):
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(c.in_channels, c.ch, 3, padding=1), TinyBlock(c.ch)]
        for _ in c.ch_mult[1:]:
            layers.append(nn.Conv2d(c.ch, c.ch, 3, stride=2, padding=1, bias=False))
            layers += [TinyBlock(c.ch) for _ in range(c.num_res_blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(c.ch, c.z_channels, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image.add(1).div(2))  # [-1, 1] -> [0, 1]


class TinyDecoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(c.z_channels, c.ch, 3, padding=1), nn.ReLU()]
        for _ in c.ch_mult[1:]:
            layers += [TinyBlock(c.ch) for _ in range(c.num_res_blocks)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(c.ch, c.ch, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, TinyBlock(c.ch), nn.Conv2d(c.ch, c.out_ch, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(torch.tanh(z / 3) * 3).mul(2).sub(1)  # [0, 1] -> [-1, 1]


class NoEncoder(nn.Module):
    """In place of the encoder, where only the decoder is there."""

    def forward(self, image: Tensor) -> Tensor:
        raise ValueError("This TAESD has no encoder, which is needed to draw from a picture: put its file beside it.")


class TinyVAE(VAE):
    """TAESD, to be called like the VAE that it stands in for, whose sizes are `stands_for`.

    config   of its own: `ch` channels at every level, `num_res_blocks` blocks at each but the largest, which has one
    """

    draws = False

    def __init__(self, config: VAEConfig, stands_for: VAEConfig, encoder: bool = True):
        nn.Module.__init__(self)
        self.config, self.stands_for = config, stands_for
        self.add_module("encoder", TinyEncoder(config) if encoder else NoEncoder())
        self.add_module("decoder", TinyDecoder(config))

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> scaled latent (B, 4, H/8, W/8), and its log-variance: minus infinity."""
        latent = self.encoder(image)
        return latent, torch.full_like(latent, -torch.inf)

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latent (B, 4, H/8, W/8). The generator is left as it is."""
        return super().encode(image)

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent (B, 4, h, w) -> image (B, 3, 8h, 8w), about [-1, 1] (not clamped)."""
        return self.decoder(latent)


def tiny_vae_of(found: FoundVAE, like: VAEConfig) -> TinyVAE:
    """TAESD, with its tensors where they are in the file. Raises LoadError where they do not fit."""
    config = check_latent(found, like)
    encoder = any(name.startswith("encoder.") for name in found.tensors)
    with torch.device("meta"):
        vae = TinyVAE(config, like, encoder)
    check_fit(found.name, "TAESD", found.tensors, shapes_of(vae))
    vae.load_state_dict(found.tensors, strict=True, assign=True)
    return vae.eval()
