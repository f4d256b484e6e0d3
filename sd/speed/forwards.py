"""What the modules of a fast model compute: the textbook's function, with the same parameters, in other steps.

Each function here makes a forward for a module of the kind that FORWARDS names. Inside, pixels have their channels
last: (B, H, W, C), so that a transformer's tokens are the image as it lies there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import BasicTransformerBlock, CrossAttention, FeedForward, SpatialTransformer, attention
from ..unet import Block, ResBlock
from ..unet import Upsample as UNetUpsample
from ..vae import AttnBlock, ResnetBlock
from ..vae import Upsample as VAEUpsample
from .packed import Conv, Derived, Linear, onednn
from .winograd import Norm, Winograd, direct

TOKENS = 1024  # in a piece of the feed-forward
SCORES = 1 << 20  # in a piece of attention
MOMENTS = 1 << 19  # elements in a piece of a norm's statistics
NORMED = 1 << 20  # elements of an image from which on the norm is ours
CHANNELS = 64  # Winograd's transforms do not pay for convolutions with fewer

# ---- layouts: (B, C, H, W) with channels last in memory, and (B, H, W, C)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


# ---- layers


def linear(layer: nn.Linear, pack: bool) -> Linear:
    return Linear(lambda: layer.weight.detach(), layer.weight, bias=bias_of(layer), pack=pack)


def bias_of(layer: nn.Linear | nn.Conv2d) -> Callable[[], Tensor | None]:
    return lambda: layer.bias  # asked for anew: `to` may have put another in its place


class Conv3x3:
    """A 3 x 3 convolution of padding 1, by Winograd where it pays.

    F(4, 3) from 24 x 24 pixels on. Below, the many channels' weights count: F(2, 3) reads less than half of them, and
    on the smallest images (8 x 8 in the UNet) the definition is as fast.
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
        if self.wide and pixels >= 12**2:
            ours, other = (self.four, self.two) if pixels >= 24**2 else (self.two, self.four)
            other.forget()  # of another size of image, drawn before
            return ours(x, affine(x, norm) if norm else None, add)
        y = self.direct(F.silu(group_norm(x, norm), inplace=True) if norm else x)
        return y if add is None else y.add_(add)


def conv(layer: nn.Conv2d, pack: bool) -> Callable[..., Tensor]:
    """(B, H, W, C) -> (B, H', W', O)."""
    stride, padding = layer.stride[0], layer.padding[0]
    if (layer.kernel_size, stride, padding) == ((3, 3), 1, 1):
        return Conv3x3(layer, pack)
    weight = layer.weight
    return Conv(lambda: weight.detach(), weight, bias=bias_of(layer), stride=stride, padding=int(padding), pack=pack)


def group_norm(x: Tensor, layer: nn.GroupNorm) -> Tensor:
    """Pixels with channels last. PyTorch's own of that layout takes the variance as a difference of means of squares,
    which loses all digits where the mean is large: so it is given the other layout, or we do it ourselves.
    """
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


# ---- modules


def conv_module(layer: nn.Conv2d, pack: bool) -> Callable[..., Tensor]:
    compute = conv(layer, pack)
    return lambda x: nchw(compute(nhwc(x)))


def norm_module(layer: nn.GroupNorm, pack: bool) -> Callable[..., Tensor]:
    return lambda x: nchw(group_norm(nhwc(x), layer))


def linear_module(layer: nn.Linear, pack: bool) -> Callable[..., Tensor]:
    return linear(layer, pack)


def res_block(block: ResBlock, pack: bool) -> Callable[..., Tensor]:
    norm1, norm2 = block.in_layers[0], block.out_layers[0]
    conv1, conv2 = Conv3x3(block.in_layers[2], pack), Conv3x3(block.out_layers[3], pack)  # type: ignore[arg-type]
    skip = block.skip_connection
    shortcut = conv(skip, pack) if isinstance(skip, nn.Conv2d) else None

    def forward(x: Tensor, emb: Tensor) -> Tensor:
        x = nhwc(x)
        h = conv1(x, norm1)  # type: ignore[arg-type]
        h += block.emb_layers(emb)[:, None, None]
        return nchw(conv2(h, norm2, shortcut(x) if shortcut else x))  # type: ignore[arg-type]

    return forward


def resnet_block(block: ResnetBlock, pack: bool) -> Callable[..., Tensor]:
    conv1, conv2 = Conv3x3(block.conv1, pack), Conv3x3(block.conv2, pack)
    skip = block.nin_shortcut
    shortcut = conv(skip, pack) if isinstance(skip, nn.Conv2d) else None

    def forward(x: Tensor) -> Tensor:
        x = nhwc(x)
        h = conv1(x, block.norm1)
        return nchw(conv2(h, block.norm2, shortcut(x) if shortcut else x))

    return forward


def unet_upsample(block: UNetUpsample, pack: bool) -> Callable[..., Tensor]:
    compute = Conv3x3(block.conv, pack, upsample=True)

    def forward(x: Tensor, size: torch.Size) -> Tensor:
        if tuple(size) == (2 * x.shape[2], 2 * x.shape[3]):
            return nchw(compute(nhwc(x)))
        return block.conv(F.interpolate(x, size=size, mode="nearest"))  # an odd size: its last row is seen once

    return forward


def vae_upsample(block: VAEUpsample, pack: bool) -> Callable[..., Tensor]:
    compute = Conv3x3(block.conv, pack, upsample=True)
    return lambda x: nchw(compute(nhwc(x)))


def fast_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention`, a head and some queries at a time: scores stay in cache, and oneDNN computes the products."""
    batch, heads, queries, dim = q.shape
    if not onednn(q) or queries * k.shape[-2] * dim < 1 << 22:  # little work, which calls would outweigh
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


def cross_attention(block: CrossAttention, pack: bool) -> Callable[..., Tensor]:
    to_q, to_k, to_v = (linear(layer, pack) for layer in (block.to_q, block.to_k, block.to_v))
    of_text = Derived(lambda text: (to_k(text.context), to_v(text.context)), block.to_k.weight, block.to_v.weight)

    def forward(x: Tensor, context: Tensor | None = None) -> Tensor:
        k, v = (to_k(x), to_v(x)) if context is None else of_text(Text(context))
        q, k, v = (z.unflatten(-1, (block.heads, -1)).transpose(1, 2) for z in (to_q(x), k, v))
        return block.to_out(block.attend(q, k, v).transpose(1, 2).flatten(2))

    return forward


class Text:
    """A text's embeddings, equal by content: the same tensor may hold another text next time. Takes 0.1 ms."""

    def __init__(self, context: Tensor):
        self.context = context.clone()

    def __eq__(self, other: object) -> bool:
        a, b = self.context, other.context if isinstance(other, Text) else None
        return b is not None and a.dtype == b.dtype and torch.equal(a, b)

    __hash__ = None  # type: ignore[assignment]


def feed_forward(block: FeedForward, pack: bool) -> Callable[..., Tensor]:
    """GEGLU and the projection after it, for some tokens at a time."""
    proj, last = block.net[0].proj, block.net[2]
    assert isinstance(proj, nn.Linear)
    assert isinstance(last, nn.Linear)
    inner, weight = last.in_features, proj.weight
    up = Linear(lambda: weight.detach()[:inner], weight, bias=lambda: proj.bias[:inner], pack=pack)
    gate = Linear(lambda: weight.detach()[inner:], weight, bias=lambda: proj.bias[inner:], pack=pack)
    down = linear(last, pack)

    def forward(x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        pieces = tokens.chunk(-(-len(tokens) // TOKENS))
        rows = len(pieces[0])  # weights are packed for these; the last piece may be shorter
        done = [down(gate(t, rows, gelu=True).mul_(up(t, rows)), rows) for t in pieces]
        return torch.cat(done).view(x.shape)

    return forward


def spatial_transformer(block: SpatialTransformer, pack: bool) -> Callable[..., Tensor]:
    proj_in, proj_out = one_by_one(block.proj_in, pack), one_by_one(block.proj_out, pack)

    def forward(x: Tensor, context: Tensor) -> Tensor:
        x = nhwc(x)
        y = proj_in(group_norm(x, block.norm).flatten(1, 2))  # (B, h*w, C)
        for layer in block.transformer_blocks:
            # The first cross-attention is where the halves of guidance part: see `shared_halves`.
            y = layer(y, context)
        y = proj_out(y).view(len(y), *x.shape[1:])
        return nchw(y + (x if len(x) == len(y) else x.repeat(len(y) // len(x), 1, 1, 1)))

    return forward


def one_by_one(layer: nn.Conv2d, pack: bool) -> Linear:
    """A convolution of 1 x 1 on (..., C)."""
    return Linear(lambda: layer.weight.detach().flatten(1), layer.weight, bias=bias_of(layer), pack=pack)


def transformer_block(block: BasicTransformerBlock, pack: bool) -> Callable[..., Tensor]:
    def forward(x: Tensor, context: Tensor) -> Tensor:
        x = block.attn1(block.norm1(x)).add_(x)
        query = block.norm2(x)
        if len(x) < len(context):  # both halves of guidance so far
            x, query = (torch.cat([z] * (len(context) // len(x))) for z in (x, query))
        x = block.attn2(query, context).add_(x)
        return block.ff(block.norm3(x)).add_(x)

    return forward


def attn_block(block: AttnBlock, pack: bool) -> Callable[..., Tensor]:
    q, k, v, proj_out = (one_by_one(layer, pack) for layer in (block.q, block.k, block.v, block.proj_out))

    def forward(x: Tensor) -> Tensor:
        x = nhwc(x)
        y = group_norm(x, block.norm).flatten(1, 2)  # (B, h*w, C)
        y = block.attend(*(layer(y).unsqueeze(1) for layer in (q, k, v))).squeeze(1)
        return nchw(proj_out(y).view(x.shape).add_(x))

    return forward


def alike_rows(layers: nn.Sequential, wave: Tensor) -> Tensor:
    """The time embedding, of one row where all are alike. Else rows of a product may differ in their last digit."""
    if not torch.equal(wave, wave[:1].expand_as(wave)):
        return nn.Sequential.forward(layers, wave)
    return nn.Sequential.forward(layers, wave[:1]).expand(len(wave), -1)


def shared_halves(block: Block, x: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
    """A block before or at the first cross-attention: where both halves of the batch are alike, for one of them."""
    half = len(x) // 2
    alike = 2 * half == len(x) and torch.equal(x[:half], x[half:]) and torch.equal(emb[:half], emb[half:])
    if not alike:
        return Block.forward(block, x, emb, context, size)
    y = Block.forward(block, x[:half], emb[:half], context, size)
    return y if len(y) == len(x) else torch.cat([y, y])


FORWARDS: dict[type, Callable[..., Callable[..., Tensor]]] = {
    nn.Conv2d: conv_module,
    nn.GroupNorm: norm_module,
    nn.Linear: linear_module,
    ResBlock: res_block,
    ResnetBlock: resnet_block,
    UNetUpsample: unet_upsample,
    VAEUpsample: vae_upsample,
    CrossAttention: cross_attention,
    FeedForward: feed_forward,
    SpatialTransformer: spatial_transformer,
    BasicTransformerBlock: transformer_block,
    AttnBlock: attn_block,
}
