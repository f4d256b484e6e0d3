"""What the UNet is told beside the picture and the text: the timestep, and in LCM's UNets the guidance scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """(B,) timesteps, also fractional -> (B, dim) in float32: cosines, then sines.

    Float32 whatever the model's dtype, as in the original and in diffusers.
    """
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    args = t[:, None].float() * torch.exp(exponent / half)[None]  # (B, half)
    return torch.cat([args.cos(), args.sin()], dim=-1)


def guidance_embedding(scale: float, dim: int) -> Tensor:
    """A guidance scale -> (1, dim) in float32: sines, then cosines, of 1000 (scale - 1); for LCM (arXiv:2310.04378).

    As diffusers' LatentConsistencyModelPipeline, to the last bit: the lowest frequency is 1 / 10000 itself.
    """
    half = dim // 2
    rate = torch.log(torch.tensor(10000.0)) / (half - 1)
    args = torch.tensor([[scale - 1]]) * 1000.0 * torch.exp(torch.arange(half, dtype=torch.float32) * -rate)
    return torch.cat([args.sin(), args.cos()], dim=1)


class TimeEmbedding(nn.Sequential):
    """Two layers, as in the checkpoints "0" and "2"; what LCM is told of its guidance is added before them."""

    def __init__(self, channels: int, emb_channels: int, guidance_dim: int | None = None):
        super().__init__(nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        self.cond_proj = nn.Linear(guidance_dim, channels, bias=False) if guidance_dim else None

    def forward(self, x: Tensor, guidance: float | None = None) -> Tensor:
        """Waves of timesteps (B, channels) in the model's dtype -> (B, emb_channels)."""
        return self[2](self[1](self[0](self.waves(x, guidance))))

    def waves(self, x: Tensor, guidance: float | None = None) -> Tensor:
        """Those of timesteps with what is added to them. Raises ValueError where that is not said."""
        if self.cond_proj is None:
            return x
        if guidance is None:
            raise ValueError(
                "This UNet is told its guidance scale (LCM), and there is none: give guidance=, such as 8."
            )
        scale = guidance_embedding(guidance, self.cond_proj.in_features).to(x)
        return x + self.cond_proj(scale.repeat(len(x), 1))
