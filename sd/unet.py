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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import SpatialTransformer
from .operations import TEXTBOOK, NormSiLUConv
from .time_embedding import TimeEmbedding, timestep_embedding


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
    num_head_channels: int | None = None  # SD 2's 64: a head has so many, and num_heads does not count
    use_linear_in_transformer: bool = False  # SD 2's projections into and out of a transformer
    guidance_dim: int | None = None  # LCM's guidance embedding; time_cond_proj_dim of diffusers

    def heads(self, channels: int) -> int:
        """How many there are in an attention of so many channels."""
        return channels // self.num_head_channels if self.num_head_channels else self.num_heads


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, added to the input."""

    ops = TEXTBOOK

    def __init__(self, channels: int, out_channels: int, emb_channels: int, groups: int):
        super().__init__()
        self.in_layers = NormSiLUConv(
            nn.GroupNorm(groups, channels, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        # Index 2 was a dropout of rate 0; it keeps its place so that the convolution is out_layers.3.
        self.out_layers = NormSiLUConv(
            nn.GroupNorm(groups, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.ops.norm_silu_conv(self.in_layers, x, add=self.emb_layers(emb)[:, :, None, None])
        return self.ops.norm_silu_conv(self.out_layers, h, add=self.skip_connection(x))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    ops = TEXTBOOK

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """To `size`, that of the skip which comes next: twice x, or one less where that one is odd."""
        return self.ops.upsample(self.conv, x, size)


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


class Part(NamedTuple):
    """A layer of a block, as the configuration draws it."""

    kind: str  # "conv", "res", "transformer", "down", "up"
    channels: int  # that go in; those of the skip included
    out_channels: int
    level: int  # of what goes in: 0 is the latent's own resolution, 1 is half of it
    out_level: int


Blocks = list[list[Part]]


def topology(c: UNetConfig) -> tuple[Blocks, Blocks, Blocks]:
    """The layers of all input blocks, of the middle block (one), and of all output blocks, in order of use."""

    def block(channels: int, out: int, level: int) -> list[Part]:
        parts = [Part("res", channels, out, level, level)]
        if 2**level in c.attention_resolutions:
            parts.append(Part("transformer", out, out, level, level))
        return parts

    ch, last = c.model_channels, len(c.channel_mult) - 1
    inputs = [[Part("conv", c.in_channels, ch, 0, 0)]]
    for level, mult in enumerate(c.channel_mult):
        for _ in range(c.num_res_blocks):
            inputs.append(block(ch, mult * c.model_channels, level))
            ch = mult * c.model_channels
        if level != last:
            inputs.append([Part("down", ch, ch, level, level + 1)])
    middle = [Part(kind, ch, ch, last, last) for kind in ("res", "transformer", "res")]
    skips = [parts[-1].out_channels for parts in inputs]  # taken from the end on the way up
    outputs = []
    for level, mult in reversed(list(enumerate(c.channel_mult))):
        for i in range(c.num_res_blocks + 1):
            parts = block(ch + skips.pop(), mult * c.model_channels, level)
            ch = mult * c.model_channels
            if level > 0 and i == c.num_res_blocks:
                parts.append(Part("up", ch, ch, level, level - 1))
            outputs.append(parts)
    return inputs, [middle], outputs


class UNet(nn.Module):
    """eps(x_t, t, context): Rombach et al. 2022 (arXiv:2112.10752), 859,520,964 parameters by default."""

    ops = TEXTBOOK

    def __init__(self, config: UNetConfig | None = None):
        super().__init__()
        self.config = c = config or UNetConfig()
        emb, linear = 4 * c.model_channels, c.use_linear_in_transformer
        make: dict[str, Callable[[int, int], nn.Module]] = {
            "conv": lambda channels, out: nn.Conv2d(channels, out, 3, padding=1),
            "res": lambda channels, out: ResBlock(channels, out, emb, c.num_groups),
            "transformer": lambda channels, _: SpatialTransformer(
                channels, c.heads(channels), c.context_dim, c.transformer_depth, c.num_groups, linear
            ),
            "down": lambda channels, _: Downsample(channels),
            "up": lambda channels, _: Upsample(channels),
        }
        self.time_embed = TimeEmbedding(c.model_channels, emb, c.guidance_dim)
        inputs, (middle,), outputs = (
            [Block(make[part.kind](part.channels, part.out_channels) for part in parts) for parts in blocks]
            for blocks in topology(c)
        )
        self.input_blocks, self.middle_block = nn.ModuleList(inputs), middle
        self.output_blocks = nn.ModuleList(outputs)
        self.out = NormSiLUConv(
            nn.GroupNorm(c.num_groups, c.model_channels * c.channel_mult[0], eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(c.model_channels * c.channel_mult[0], c.out_channels, 3, padding=1),
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        control: Sequence[Tensor] | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """The noise in `x`.

        x: (B, 4, h, w), any h and w; t: (B,) timesteps in [0, 1000), also fractional;
        context: (B, 77, context_dim). Returns (B, 4, h, w).
        control: what a ControlNet adds (arXiv:2302.05543) to the skip of each input block, and to the middle block.
        guidance: the guidance scale, for LCM's UNets alone, which are told it (arXiv:2310.04378).
        Raises ValueError where a UNet is to be told it and is not.
        """
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype), guidance)
        skips = []
        for i, block in enumerate(self.input_blocks):
            x = block(x, emb, context)
            skips.append(x if control is None else x + control[i])
        x = self.middle_block(x, emb, context)
        if control is not None:
            x = x + control[-1]
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb, context, size=skips[-1].shape[-2:] if skips else None)
        return self.ops.norm_silu_conv(self.out, x)
