"""Attention: two pure functions, and the transformer block that calls one of them.

Names of modules follow ldm/modules/attention.py of CompVis/stable-diffusion, because the names of its
tensors are the names in the checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .operations import TEXTBOOK, Attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, for q (B, heads, T, D) and k, v (B, heads, S, D) -> (B, heads, T, D)."""
    return F.scaled_dot_product_attention(q, k, v)


class Workspace:
    """Memory for `chunked_attention`, allocated once and used by call after call."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)

    def take(self, like: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Uninitialised tensors of these shapes on the device of `like`; those taken before are invalid."""
        sizes = [prod(shape) for shape in shapes]
        if self.flat.numel() < sum(sizes) or self.flat.dtype != dtype or self.flat.device != like.device:
            self.flat = torch.empty(sum(sizes), dtype=dtype, device=like.device)
        return [part.view(shape) for part, shape in zip(self.flat[: sum(sizes)].split(sizes), shapes, strict=True)]


@torch.no_grad()
def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: int = 1024,
    *,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """The same function as `attention` in bounded memory: never more than chunk x chunk scores.

    Slices of queries are independent. Slices of keys are not: a softmax over each would normalise by the
    wrong sum, so the maximum and the sum are carried from slice to slice and the result is divided at
    the end (Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682).

    Half precision is computed in float32, one slice at a time, so that large logits stay finite.
    With `out`, of the shape of the result, and a `workspace` that has been used before, nothing is allocated;
    `out` may be q itself, for a slice of q is not needed once its result is known.
    For inference: no gradients flow. Raises ValueError if `chunk` is not a positive int.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}: it is the number of queries in a slice.")
    heads, queries, dim = q.shape[-3:]
    keys, dim_v = v.shape[-2:]
    out = q.new_empty(*q.shape[:-1], dim_v) if out is None else out
    dtype = torch.promote_types(q.dtype, torch.float32)
    c, s = min(chunk, queries), min(chunk, keys)
    group = max(1, min(heads, chunk * chunk // (c * s)))  # heads at once: several where sequences are short
    wide = () if q.dtype == dtype else ((group, c, dim), (group, s, dim), (group, s, dim_v))
    shapes = ((group, c, s), (group, c, dim_v), *4 * ((group, c, 1),), *wide)
    spaces = (workspace or Workspace()).take(q, dtype, *shapes)

    for b in range(len(q)):
        for h in range(0, heads, group):
            of = slice(h, h + group)
            for i in range(0, queries, c):
                rows = out[b, of, i : i + c]
                fits = [x[: len(rows), : rows.shape[1]] for x in spaces[:6]]
                rows.copy_(_attend(q[b, of, i : i + c], k[b, of], v[b, of], s, fits, spaces[6:]))
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, chunk: int, spaces: list[Tensor], wide: list[Tensor]) -> Tensor:
    """One slice of queries, q (heads, c, D), over all keys, in the memory of `spaces`."""
    scores, acc, top, total, shrink, new = spaces
    top.fill_(-torch.inf)
    total.zero_()
    acc.zero_()
    if wide:
        q = wide[0][: len(q), : q.shape[1]].copy_(q)
    for j in range(0, k.shape[1], chunk):
        k_slice, v_slice = k[:, j : j + chunk], v[:, j : j + chunk]
        if wide:
            k_slice = wide[1][: len(k), : k_slice.shape[1]].copy_(k_slice)
            v_slice = wide[2][: len(v), : v_slice.shape[1]].copy_(v_slice)
        part = scores[..., : k_slice.shape[1]]
        torch.baddbmm(part, q, k_slice.mT, beta=0, alpha=q.shape[-1] ** -0.5, out=part)  # (heads, c, s)
        torch.amax(part, -1, keepdim=True, out=new)
        torch.maximum(new, top, out=new)
        part.sub_(new).exp_()
        torch.sub(top, new, out=shrink).exp_()  # 0 at the first slice, where top is -inf
        acc.mul_(shrink).baddbmm_(part, v_slice)
        torch.sum(part, -1, keepdim=True, out=top)
        total.mul_(shrink).add_(top)
        top.copy_(new)
    return acc.div_(total)


@contextmanager
def use_attention(model: nn.Module, fn: Attention) -> Iterator[None]:
    """Within the block, every attention of `model` (and of no other model) is computed by `fn`."""
    modules = [m for m in model.modules() if hasattr(m, "attend")]
    before = [m.attend for m in modules]
    try:
        for m in modules:
            m.__dict__["attend"] = fn
        yield
    finally:
        for m, old in zip(modules, before, strict=True):
            m.__dict__["attend"] = old


class CrossAttention(nn.Module):
    """Attention of `x` to `context`, or to itself when there is none."""

    ops = TEXTBOOK

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.attend: Attention = attention
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, D)
            for z in self.ops.project(self.to_q, self.to_k, self.to_v, x, context)
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

    ops = TEXTBOOK

    def __init__(
        self, channels: int, heads: int, context_dim: int, depth: int = 1, groups: int = 32, linear: bool = False
    ):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 elsewhere in the UNet
        # SD 2 projects tokens, where v1 projects pixels by a convolution of 1 x 1: the same map, of other rounding.
        self.linear, shape = linear, (channels, channels)
        self.proj_in = nn.Linear(*shape) if linear else nn.Conv2d(*shape, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context_dim) for _ in range(depth)
        )
        self.proj_out = nn.Linear(*shape) if linear else nn.Conv2d(*shape, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        y = y.flatten(2).transpose(1, 2)  # (B, h*w, C)
        y = self.proj_in(y) if self.linear else y.contiguous()
        for block in self.transformer_blocks:
            y = block(y, context)
        y = self.ops.pixels(self.proj_out(y) if self.linear else y, x.shape[-2:])  # (B, C, h, w)
        return (y if self.linear else self.proj_out(y)) + x
