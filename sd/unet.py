"""The UNet that predicts the noise: ldm/modules/diffusionmodules/openaimodel.py, without its options.

Modules carry the names of CompVis checkpoints. At 512 x 512 with the v1 configuration:

    input_blocks           channels  latent    contents
    0                           320  64 x 64   convolution
    1, 2                        320  64 x 64   ResBlock, SpatialTransformer
    3                           320  32 x 32   Downsample
    4, 5                        640  32 x 32   ResBlock, SpatialTransformer
    6                           640  16 x 16   Downsample
    7, 8                       1280  16 x 16   ResBlock, SpatialTransformer
    9                          1280   8 x 8    Downsample
    10, 11                     1280   8 x 8    ResBlock
    middle_block               1280   8 x 8    ResBlock, SpatialTransformer, ResBlock
    output_blocks (each takes the output of the input block that mirrors it as well)
    0, 1                       1280   8 x 8    ResBlock
    2                          1280  16 x 16   ResBlock, Upsample
    3, 4                       1280  16 x 16   ResBlock, SpatialTransformer
    5                          1280  32 x 32   ResBlock, SpatialTransformer, Upsample
    6, 7                        640  32 x 32   ResBlock, SpatialTransformer
    8                           640  64 x 64   ResBlock, SpatialTransformer, Upsample
    9, 10, 11                   320  64 x 64   ResBlock, SpatialTransformer
    out                           4  64 x 64   GroupNorm, SiLU, convolution
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SpatialTransformer


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are Stable Diffusion v1's (names as in v1-inference.yaml)."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (1, 2, 4)  # factors of downsampling that have attention
    num_heads: int = 8
    context_dim: int = 768
    transformer_depth: int = 1
    num_groups: int = 32  # of every GroupNorm


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """(B,) timesteps, also fractional -> (B, dim) in float32: cosines, then sines.

    Float32 whatever the model's dtype, as in the original and in diffusers.
    """
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    args = t[:, None].float() * torch.exp(exponent / half)[None]  # (B, half)
    return torch.cat([args.cos(), args.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, added to the input."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        # Index 2 was a dropout of rate 0; it keeps its place so that the convolution is out_layers.3.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        h = h + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """To `size`, that of the skip which comes next: twice x, or one less where that one is odd."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.ModuleList):
    """Layers in sequence, each given what it takes (ldm's TimestepEmbedSequential)."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """eps(x_t, t, context): Rombach et al. 2022 (arXiv:2112.10752), 859,520,964 parameters by default."""

    def __init__(self, config: UNetConfig | None = None):
        super().__init__()
        self.config = c = config or UNetConfig()
        emb = 4 * c.model_channels
        self.time_embed = nn.Sequential(nn.Linear(c.model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        def res(channels: int, out_channels: int) -> ResBlock:
            return ResBlock(channels, out_channels, emb, c.num_groups)

        def transformer(channels: int) -> SpatialTransformer:
            return SpatialTransformer(channels, c.num_heads, c.context_dim, c.transformer_depth, c.num_groups)

        ch = c.model_channels
        blocks = [Block([nn.Conv2d(c.in_channels, ch, 3, padding=1)])]
        skips = [ch]  # channels of each input block's output, taken from the end on the way up
        last = len(c.channel_mult) - 1
        for level, mult in enumerate(c.channel_mult):
            out = mult * c.model_channels
            attend = 2**level in c.attention_resolutions
            for _ in range(c.num_res_blocks):
                blocks.append(Block([res(ch, out)] + ([transformer(out)] if attend else [])))
                ch = out
                skips.append(ch)
            if level != last:
                blocks.append(Block([Downsample(ch)]))
                skips.append(ch)
        self.input_blocks = nn.ModuleList(blocks)

        self.middle_block = Block([res(ch, ch), transformer(ch), res(ch, ch)])

        blocks = []
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            out = mult * c.model_channels
            attend = 2**level in c.attention_resolutions
            for i in range(c.num_res_blocks + 1):
                layers: list[nn.Module] = [res(ch + skips.pop(), out)]
                ch = out
                if attend:
                    layers.append(transformer(ch))
                if level > 0 and i == c.num_res_blocks:
                    layers.append(Upsample(ch))
                blocks.append(Block(layers))
        self.output_blocks = nn.ModuleList(blocks)

        self.out = nn.Sequential(
            nn.GroupNorm(c.num_groups, ch, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(ch, c.out_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The noise in `x`.

        x: (B, 4, h, w), any h and w; t: (B,) timesteps in [0, 1000), also fractional;
        context: (B, 77, context_dim). Returns (B, 4, h, w).
        """
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb, context, size=skips[-1].shape[-2:] if skips else None)
        return self.out(x)
