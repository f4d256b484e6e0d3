"""Attention: two pure functions, and the transformer block that calls one of them.

Names of modules follow ldm/modules/attention.py of CompVis/stable-diffusion, because the names of its
tensors are the names in the checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, for q (B, heads, T, D) and k, v (B, heads, S, D) -> (B, heads, T, D)."""
    return F.scaled_dot_product_attention(q, k, v)


@torch.no_grad()
def chunked_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 1024) -> Tensor:
    """The same function as `attention` in bounded memory: never more than chunk x chunk scores a head.

    Slices of queries are independent. Slices of keys are not: a softmax over each would normalise by the
    wrong sum, so the maximum and the sum are carried from slice to slice and the result is divided at
    the end (Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682).

    Half precision is computed in float32, one slice at a time, so that large logits stay finite.
    For inference: no gradients flow. Raises ValueError if `chunk` is not a positive int.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}: it is the number of queries in a slice.")
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for out_slice, q_slice in zip(out.split(chunk, dim=-2), q.split(chunk, dim=-2), strict=True):
        q_slice = q_slice.to(dtype) * scale
        top = q_slice.new_full((*q_slice.shape[:-1], 1), -torch.inf)  # (B, heads, chunk, 1)
        total = torch.zeros_like(top)
        acc = q_slice.new_zeros(out_slice.shape)
        for k_slice, v_slice in zip(k.split(chunk, dim=-2), v.split(chunk, dim=-2), strict=True):
            scores = q_slice @ k_slice.to(dtype).transpose(-1, -2)  # (B, heads, chunk, chunk)
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            scores.sub_(new_top).exp_()
            shrink = (top - new_top).exp_()  # 0 at the first slice, where top is -inf
            total.mul_(shrink).add_(scores.sum(-1, keepdim=True))
            acc.mul_(shrink).add_(scores @ v_slice.to(dtype))
            top = new_top
        out_slice.copy_(acc.div_(total))
    return out


@contextmanager
def use_attention(model: nn.Module, fn: Attention) -> Iterator[None]:
    """Within the block, every attention of `model` (and of no other model) is computed by `fn`."""
    modules = [m for m in model.modules() if hasattr(m, "attend")]
    before = [m.attend for m in modules]
    try:
        for m in modules:
            m.attend = fn  # type: ignore[assignment]
        yield
    finally:
        for m, old in zip(modules, before, strict=True):
            m.attend = old


class CrossAttention(nn.Module):
    """Attention of `x` to `context`, or to itself when there is none."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.attend: Attention = attention
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, D)
            for z in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(self.attend(q, k, v).transpose(1, 2).flatten(2))  # (B, T, C)


class GEGLU(nn.Module):
    """x * gelu(gate) with the exact (erf) GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        # Index 1 was a dropout of rate 0; it keeps its place so that the last layer is net.2.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each on its norm, each added."""

    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__()
        self.attn1 = CrossAttention(dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, heads, context_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of an image: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, heads: int, context_dim: int, depth: int = 1, groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 elsewhere in the UNet
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context_dim) for _ in range(depth)
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        y = self.proj_in(self.norm(x))
        y = y.flatten(2).transpose(1, 2).contiguous()  # (B, h*w, C)
        for block in self.transformer_blocks:
            y = block(y, context)
        y = y.transpose(1, 2).unflatten(2, (h, w)).contiguous()  # (B, C, h, w)
        return self.proj_out(y) + x
