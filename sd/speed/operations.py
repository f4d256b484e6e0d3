"""The operations of a fast model: the textbook's function, with the same parameters, in other steps.

Pixels lie in memory with their channels last, (B, H, W, C), so that a transformer's tokens are the image as it lies
there. Between operations they are (B, C, H, W) all the same, as a view: `nhwc` and `nchw` go from one to the other
without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import FeedForward, attention
from ..operations import Attention, NormSiLUConvolution, Operations
from .packed import Conv, Derived, Linear, onednn
from .winograd import Norm, Winograd, direct

TOKENS = 1024  # in a piece of the feed-forward
SCORES = 1 << 20  # in a piece of attention
MOMENTS = 1 << 19  # elements in a piece of a norm's statistics
NORMED = 1 << 20  # elements of an image from which on the norm is ours
CHANNELS = 64  # Winograd's transforms do not pay for convolutions with fewer


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


class Fast(Operations):
    """On the CPU. What is prepared of a layer's weights is kept here; with `pack`, in oneDNN's layout.

    The text's keys and values are kept as well, until another text comes or the weights have changed (`Derived`).
    """

    def __init__(self, pack: bool):
        self.pack = pack
        self.made: dict[tuple[Any, nn.Module], Any] = {}

    def __deepcopy__(self, memo: Any) -> Fast:
        return Fast(self.pack)  # what was prepared is of other layers

    def of(self, layer: nn.Module, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make(layer, pack, *arguments)` made on first use."""
        key = (make, *arguments), layer
        if key not in self.made:
            self.made[key] = make(layer, self.pack, *arguments)
        return self.made[key]

    def norm_silu_conv(self, layers: NormSiLUConvolution, x: Tensor, add: Tensor | None = None) -> Tensor:
        conv, given = self.of(layers.conv, Conv3x3), [nhwc(x)] if add is None else [nhwc(x), nhwc(add)]

        def compute(x: Tensor, add: Tensor | None = None) -> Tensor:
            if add is None or add.shape[1:3] == x.shape[1:3]:
                return conv(x, layers.norm, add)
            return conv(x, layers.norm).add_(add)

        with torch.no_grad():
            return nchw(once(compute, *given))

    def upsample(self, conv: nn.Conv2d, x: Tensor, size: tuple[int, ...]) -> Tensor:
        if tuple(size) != (2 * x.shape[2], 2 * x.shape[3]):  # an odd size: its last row is seen once
            return super().upsample(conv, x, size)
        with torch.no_grad():
            return nchw(self.of(conv, Conv3x3, True)(nhwc(x)))

    def linear(self, layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.of(layer, one_by_one)(tokens) if isinstance(layer, nn.Conv2d) else layer(tokens)

    def project(
        self,
        to_q: nn.Linear | nn.Conv2d,
        to_k: nn.Linear | nn.Conv2d,
        to_v: nn.Linear | nn.Conv2d,
        x: Tensor,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if context is None:
            return super().project(to_q, to_k, to_v, x)
        return self.linear(to_q, x), *self.of(to_k, keys_and_values, to_v)(Text(context))

    def pixels(self, tokens: Tensor, size: tuple[int, ...]) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, size)

    def attention(self, attend: Attention) -> Attention:
        return fast_attention if attend is attention else attend


def once(compute: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """compute(*given); for one half of the batch, where both are alike.

    In a call with guidance they are, up to the first cross-attention: 3 % of the work at full size. Where they
    differ, that is seen at their first elements.
    """
    half = len(given[0]) // 2
    if 2 * half != len(given[0]) or not all(torch.equal(x[:half], x[half:]) for x in given):
        return compute(*given)
    y = compute(*(x[:half] for x in given))
    return torch.cat([y, y])


# ---- layers by themselves


@torch.no_grad()
def fast_conv(ops: Fast, layer: nn.Conv2d, x: Tensor) -> Tensor:
    return nchw(ops.of(layer, prepared_conv)(nhwc(x)))


@torch.no_grad()
def fast_norm(ops: Fast, layer: nn.GroupNorm, x: Tensor) -> Tensor:
    return nchw(group_norm(nhwc(x), layer))


@torch.no_grad()
def fast_linear(ops: Fast, layer: nn.Linear, x: Tensor) -> Tensor:
    return ops.of(layer, prepared_linear)(x)


@torch.no_grad()
def fast_feed_forward(ops: Fast, block: FeedForward, x: Tensor) -> Tensor:
    """GEGLU and the projection after it, for some tokens at a time."""
    up, gate, down = ops.of(block, prepared_feed_forward)
    tokens = x.reshape(-1, x.shape[-1])
    pieces = tokens.chunk(-(-len(tokens) // TOKENS))
    rows = len(pieces[0])  # weights are packed for these; the last piece may be shorter
    done = [down(gate(t, rows, gelu=True).mul_(up(t, rows)), rows) for t in pieces]
    return torch.cat(done).view(x.shape)


Fast.layers = {
    nn.Conv2d: fast_conv,
    nn.GroupNorm: fast_norm,
    nn.Linear: fast_linear,
    FeedForward: fast_feed_forward,
}


# ---- what is prepared of their weights


def bias_of(layer: nn.Linear | nn.Conv2d) -> Callable[[], Tensor | None]:
    return lambda: layer.bias  # asked for anew: `to` may have put another in its place


def prepared_linear(layer: nn.Linear, pack: bool) -> Linear:
    return Linear(lambda: layer.weight.detach(), layer.weight, bias=bias_of(layer), pack=pack)


def one_by_one(layer: nn.Conv2d, pack: bool) -> Linear:
    """A convolution of 1 x 1 on (..., C)."""
    return Linear(lambda: layer.weight.detach().flatten(1), layer.weight, bias=bias_of(layer), pack=pack)


def keys_and_values(to_k: nn.Linear, pack: bool, to_v: nn.Linear) -> Derived:
    """Those of a text, by the layers' weights alone: what a hook makes of one call must not be kept for the next."""
    k, v = prepared_linear(to_k, pack), prepared_linear(to_v, pack)
    return Derived(lambda text: (k(text.context), v(text.context)), to_k.weight, to_v.weight)


def prepared_conv(layer: nn.Conv2d, pack: bool) -> Callable[..., Tensor]:
    """(B, H, W, C) -> (B, H', W', O)."""
    stride, padding = layer.stride[0], layer.padding[0]
    if layer.kernel_size == (1, 1):
        return one_by_one(layer, pack)
    if (layer.kernel_size, stride, padding) == ((3, 3), 1, 1) and layer.bias is not None:
        return Conv3x3(layer, pack)
    weight = layer.weight
    return Conv(lambda: weight.detach(), weight, bias=bias_of(layer), stride=stride, padding=int(padding), pack=pack)


def prepared_feed_forward(block: FeedForward, pack: bool) -> tuple[Linear, Linear, Linear]:
    """The two halves of GEGLU's projection, and the projection after it."""
    proj, last = block.net[0].proj, block.net[2]
    assert isinstance(proj, nn.Linear)
    assert isinstance(last, nn.Linear)
    inner, weight = last.in_features, proj.weight
    up = Linear(lambda: weight.detach()[:inner], weight, bias=lambda: proj.bias[:inner], pack=pack)
    gate = Linear(lambda: weight.detach()[inner:], weight, bias=lambda: proj.bias[inner:], pack=pack)
    return up, gate, prepared_linear(last, pack)


class Conv3x3:
    """A 3 x 3 convolution of padding 1, by Winograd where it pays.

    F(4, 3) from 24 x 24 pixels on. Below, the many channels' weights count: F(2, 3) reads less than half of them, and
    on the smallest images (8 x 8 in the UNet) the definition is as fast. In bfloat16 it is so on all: the products
    are fast, the transforms are not, and they would lose digits.
    """

    def __init__(self, layer: nn.Conv2d, pack: bool, upsample: bool = False):
        weight, bias = layer.weight, layer.bias
        assert bias is not None
        self.wide = pack and min(weight.shape[:2]) >= CHANNELS
        self.four, self.two = (Winograd(weight, bias, m, upsample) for m in (4, 2))
        self.direct: Callable[[Tensor], Tensor]
        if upsample:
            self.direct = direct(layer, pack)
        else:
            self.direct = Conv(lambda: weight.detach(), weight, bias=bias_of(layer), padding=1, pack=pack)

    def __call__(self, x: Tensor, norm: nn.GroupNorm | None = None, add: Tensor | None = None) -> Tensor:
        """norm: it and SiLU come before the convolution; add: what comes after it. Pixels with channels last."""
        pixels = x.shape[1] * x.shape[2]
        if self.wide and x.dtype == torch.float32 and pixels >= 12**2:
            ours, other = (self.four, self.two) if pixels >= 24**2 else (self.two, self.four)
            other.forget()  # of another size of image, drawn before
            return ours(x, affine(x, norm) if norm else None, add)
        y = self.direct(F.silu(group_norm(x, norm), inplace=True) if norm else x)
        return y if add is None else y.add_(add)


class Text:
    """A text's embeddings, equal by content: the same tensor may hold another text next time. Takes 0.1 ms."""

    def __init__(self, context: Tensor):
        self.context = context.clone()

    def __eq__(self, other: object) -> bool:
        a, b = self.context, other.context if isinstance(other, Text) else None
        return b is not None and a.dtype == b.dtype and torch.equal(a, b)

    __hash__ = None  # type: ignore[assignment]


# ---- norms and attention


def group_norm(x: Tensor, layer: nn.GroupNorm) -> Tensor:
    """Pixels with channels last. PyTorch's own of that layout takes the variance as a difference of means of squares,
    which loses all digits where the mean is large: so it is given the other layout, or we do it ourselves. In
    bfloat16 the values had not those digits; sums are in float32.
    """
    if x.dtype == torch.bfloat16:
        return nhwc(F.group_norm(nchw(x), layer.num_groups, layer.weight, layer.bias, layer.eps))
    if x.numel() < NORMED:
        return nhwc(F.group_norm(nchw(x).contiguous(), layer.num_groups, layer.weight, layer.bias, layer.eps))
    norm = affine(x, layer)
    return torch.addcmul(norm.shift, x, norm.scale)


def affine(x: Tensor, layer: nn.GroupNorm) -> Norm:
    """The group norm of x (B, H, W, C) as a scale and a shift.

    Moments of the distance to a value near the mean, so that no digits are lost; sums over pieces in float64.
    """
    batch, channels, groups = len(x), x.shape[-1], layer.num_groups
    flat = x.view(batch, -1, channels)
    near = flat[:, ::16].mean(1).view(batch, groups, -1).mean(-1)  # (B, groups)
    center = near.repeat_interleave(channels // groups, 1)
    rows = max(1, MOMENTS // channels)
    first, second = x.new_zeros(2, batch, channels, dtype=torch.float64)
    for b in range(batch):
        for piece in flat[b].split(rows):
            distance = piece - center[b]
            first[b] += distance.sum(0)
            second[b] += distance.square_().sum(0)
    count = flat.shape[1] * channels // groups
    off, square = (z.view(batch, groups, -1).sum(-1) / count for z in (first, second))
    mean, var = near.double() + off, square - off.square()
    rstd = (var + layer.eps).rsqrt().repeat_interleave(channels // groups, 1)
    scale = layer.weight.detach().double() * rstd  # (B, C)
    shift = layer.bias.detach().double() - mean.repeat_interleave(channels // groups, 1) * scale
    scale, shift = (v.to(x.dtype).view(batch, 1, 1, channels) for v in (scale, shift))
    return Norm(scale, shift)


def fast_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention`, a head and some queries at a time: scores stay in cache, and oneDNN computes the products.

    In float32; PyTorch's own does the same in bfloat16, and is faster (262 against 218 GFLOP/s with AMX).
    """
    return once(in_pieces, q, k, v)


def in_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, queries, dim = q.shape
    if (
        q.dtype != torch.float32 or not onednn(q) or queries * k.shape[-2] * dim < 1 << 22
    ):  # little work, which calls would outweigh
        return attention(q, k, v)
    rows = max(256, SCORES // k.shape[-2])
    out = q.new_empty(batch, queries, heads, v.shape[-1])
    product = torch.ops.mkldnn._linear_pointwise
    for b in range(batch):
        for h in range(heads):
            scaled = q[b, h] * dim**-0.5
            keys, values = k[b, h].contiguous(), v[b, h].T.contiguous()  # (S, D), (D, S)
            if queries >= 8 * rows:
                keys, values = (torch.ops.mkldnn._reorder_linear_weight(z, rows) for z in (keys, values))
            for a in range(0, queries, rows):
                scores = product(scaled[a : a + rows], keys, None, "none", [], "")
                torch.softmax(scores, -1, out=scores)
                out[b, a : a + rows, h] = product(scores, values, None, "none", [], "")
    return out.transpose(1, 2)
