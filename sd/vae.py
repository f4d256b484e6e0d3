"""The autoencoder between images and latents: ldm/modules/diffusionmodules/model.py and autoencoder.py.

Modules carry the names of CompVis checkpoints. At 512 x 512 with the v1 configuration:

    encoder                channels  size       contents
    conv_in                     128  512 x 512  convolution
    down.0                      128  512 x 512  2 ResnetBlocks, then downsample to 256 x 256
    down.1                      256  256 x 256  2 ResnetBlocks, then downsample to 128 x 128
    down.2                      512  128 x 128  2 ResnetBlocks, then downsample to 64 x 64
    down.3                      512   64 x 64   2 ResnetBlocks
    mid                         512   64 x 64   ResnetBlock, AttnBlock, ResnetBlock
    norm_out, conv_out            8   64 x 64   mean and log-variance of 4 channels; quant_conv follows

    decoder (after post_quant_conv; the levels run from up.3 to up.0)
    conv_in                     512   64 x 64   convolution
    mid                         512   64 x 64   ResnetBlock, AttnBlock, ResnetBlock
    up.3                        512   64 x 64   3 ResnetBlocks, then upsample to 128 x 128
    up.2                        512  128 x 128  3 ResnetBlocks, then upsample to 256 x 256
    up.1                        256  256 x 256  3 ResnetBlocks, then upsample to 512 x 512
    up.0                        128  512 x 512  3 ResnetBlocks
    norm_out, conv_out            3  512 x 512  the image
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .operations import TEXTBOOK, Attention, Normed


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE; the defaults are Stable Diffusion v1's (names as in v1-inference.yaml)."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    scale_factor: float = 0.18215  # latents times this have about unit variance
    num_groups: int = 32  # of every GroupNorm

    @property
    def downsampling(self) -> int:
        """Image pixels for one latent pixel, along an edge: 8."""
        return 2 ** (len(self.ch_mult) - 1)


def norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 throughout the VAE, unlike the UNet


class ResnetBlock(nn.Module):
    ops = TEXTBOOK

    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ops.norm_silu_conv(Normed(self.norm1, self.conv1), x)
        return self.ops.norm_silu_conv(Normed(self.norm2, self.conv2), h, add=self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention over all pixels, one head as wide as the channels."""

    ops = TEXTBOOK

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attend: Attention = attention
        self.norm = norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.contiguous()).flatten(2).transpose(1, 2)  # (B, h*w, C)
        q, k, v = (z.unsqueeze(1) for z in self.ops.project(self.q, self.k, self.v, y))  # (B, 1, h*w, C)
        y = self.ops.linear(self.proj_out, self.attend(q, k, v).squeeze(1))
        return y.transpose(1, 2).reshape(x.shape) + x


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # on the right and at the bottom only


class Upsample(nn.Module):
    ops = TEXTBOOK

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.upsample(self.conv, x, (2 * x.shape[2], 2 * x.shape[3]))


class Mid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, and the way to the next one unless it is the last."""

    def __init__(self, channels: list[int], groups: int, **resample: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(channels))
        for name, module in resample.items():  # "downsample" or "upsample", as checkpoints call it
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.block:
            x = layer(x)
        for resample in list(self.children())[1:]:
            x = resample(x)
        return x


def encoder_widths(c: VAEConfig) -> list[list[int]]:
    """For each level, down.0 first: the channels that go into its first residual block, and those out of each."""
    widths = [c.ch * m for m in c.ch_mult]
    return [[a, *[b] * c.num_res_blocks] for a, b in zip([c.ch, *widths], widths, strict=False)]


def decoder_widths(c: VAEConfig) -> list[list[int]]:
    """The same of the decoder, up.0 first, which is the last to be used; it has a residual block more a level."""
    widths = [c.ch * m for m in c.ch_mult]
    return [[a, *[b] * (c.num_res_blocks + 1)] for a, b in zip([*widths[1:], widths[-1]], widths, strict=True)]


class Encoder(nn.Module):
    ops = TEXTBOOK

    def __init__(self, c: VAEConfig):
        super().__init__()
        levels = encoder_widths(c)
        width = levels[-1][-1]
        self.conv_in = nn.Conv2d(c.in_channels, c.ch, 3, padding=1)
        self.down = nn.ModuleList(
            [Level(widths, c.num_groups, downsample=Downsample(widths[-1])) for widths in levels[:-1]]
            + [Level(levels[-1], c.num_groups)]
        )
        self.mid = Mid(width, c.num_groups)
        self.norm_out = norm(width, c.num_groups)
        self.conv_out = nn.Conv2d(width, 2 * c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.ops.norm_silu_conv(Normed(self.norm_out, self.conv_out), self.mid(x))


class Decoder(nn.Module):
    ops = TEXTBOOK

    def __init__(self, c: VAEConfig):
        super().__init__()
        levels = decoder_widths(c)
        width = levels[-1][0]
        self.conv_in = nn.Conv2d(c.z_channels, width, 3, padding=1)
        self.mid = Mid(width, c.num_groups)
        self.up = nn.ModuleList(
            [Level(levels[0], c.num_groups)]
            + [Level(widths, c.num_groups, upsample=Upsample(widths[-1])) for widths in levels[1:]]
        )
        self.norm_out = norm(c.ch * c.ch_mult[0], c.num_groups)
        self.conv_out = nn.Conv2d(c.ch * c.ch_mult[0], c.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            z = level(z)
        return self.ops.norm_silu_conv(Normed(self.norm_out, self.conv_out), z)


class VAE(nn.Module):
    """Kingma & Welling 2013 (arXiv:1312.6114) with the networks of ldm; 83,653,863 parameters by default."""

    draws = True  # `encode` draws from a posterior; False of one whose latents are certain

    def __init__(self, config: VAEConfig | None = None):
        super().__init__()
        self.config = c = config or VAEConfig()
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.z_channels, 2 * c.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.z_channels, c.z_channels, 1)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the latent before scaling, (B, 4, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W multiples of 8 -> scaled latent (B, 4, H/8, W/8).

        With a generator the latent is drawn from the posterior (noise made on the generator's device, as
        diffusers does); without one it is the posterior's mean. Raises ValueError on other sizes.
        """
        f = self.config.downsampling
        if image.shape[-1] % f or image.shape[-2] % f:
            h, w = image.shape[-2:]
            raise ValueError(f"An image of {w} x {h} cannot be encoded: both sides must be multiples of {f}.")
        latent, logvar = self.moments(image)
        if generator is not None:
            noise = torch.randn(latent.shape, generator=generator, device=generator.device, dtype=latent.dtype)
            latent = latent + torch.exp(0.5 * logvar) * noise.to(latent.device)
        return latent * self.config.scale_factor

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent (B, 4, h, w) -> image (B, 3, 8h, 8w), about [-1, 1] (not clamped)."""
        return self.decoder(self.post_quant_conv(latent / self.config.scale_factor))
