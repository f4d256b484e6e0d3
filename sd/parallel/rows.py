"""One picture cut by rows over ranks, exactly: the forwards of the UNet and of the VAE's decoder with neighbours.

Each rank holds some rows of every tensor. A convolution needs a row more on either side, from the rank that has it; a
group norm the mean and the variance of the whole (Chan, Golub & LeVeque 1979, of the population); self-attention the
keys and values of all rows. The rest is of a pixel by itself. The moments of a norm and the rows for the convolution
after it travel in one message: the rows are sent raw, and normalised where they arrive. So a forward of the v1 UNet
has 84 exchanges: 45 norms with convolutions, 16 norms and 16 gatherings of keys and values in the transformers,
6 changes of resolution, and the noise itself at the end.

Applied from outside: `rows_of_unet` and `rows_of_vae` give the forwards of single modules, and the model's code knows
nothing of ranks. Ranks may have different numbers of rows, also none.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import CrossAttention, SpatialTransformer
from ..unet import Block, Downsample, ResBlock, UNet, Upsample
from ..vae import VAE, AttnBlock, ResnetBlock
from ..vae import Upsample as VAEUpsample
from .ranks import Ranks

Span = tuple[int, int]
Forwards = dict[nn.Module, Callable[..., Tensor]]


class Level:
    """The rows of one resolution, dealt out: rank i has rows cuts[i] to cuts[i + 1]."""

    def __init__(self, ranks: Ranks, cuts: list[int], width: int):
        self.ranks, self.cuts, self.width = ranks, cuts, width
        self.spans: list[Span] = list(pairwise(cuts))
        self.span = self.spans[ranks.me]
        self.height = cuts[-1]
        self.rows = torch.tensor([b - a for a, b in self.spans], dtype=torch.float64).view(-1, 1, 1)

    def windows(self, above: int = 1, below: int = 1) -> list[Span]:
        """Each rank's rows, and `above` and `below` them as many more, as far as there are any."""
        return [(max(a - above, 0), min(b + below, self.height)) if b > a else (a, a) for a, b in self.spans]

    def exchange(
        self, x: Tensor, windows: list[Span], own: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """x: this rank's rows (B, C, n, W) -> the pieces of its window, from top to bottom; and `own` of every rank.

        windows: what rows each rank wants; own: something small and of the same shape on all, such as moments.
        """
        a, _ = self.span
        me, small = self.ranks.me, [] if own is None else [own]

        def cut(have: Span, want: Span) -> Span:
            top = max(have[0], want[0])
            return top, max(top, min(have[1], want[1]))

        mine = [cut(self.span, want) for want in windows]
        theirs = [cut(have, windows[me]) for have in self.spans]
        outgoing = [[*small, x[:, :, p - a : q - a]] for p, q in mine]
        incoming = [[*(t.shape for t in small), (*x.shape[:2], q - p, x.shape[3])] for p, q in theirs]
        parts = self.ranks.start(outgoing, incoming, [*small, x])()
        parts[me] = [*small, x[:, :, theirs[me][0] - a : theirs[me][1] - a]]
        return [p[-1] for p in parts if p[-1].shape[2]], [p[0] for p in parts] if small else []

    def gather(self, x: Tensor) -> Tensor:
        """All rows, on every rank."""
        shapes = [(*x.shape[:2], b - a, x.shape[3]) for a, b in self.spans]
        return torch.cat(self.ranks.gather(x, shapes), dim=2)

    def all_tokens(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to gather x (B, T, C), this rank's pixels; call the result for those of all."""
        shapes = [(len(x), (b - a) * self.width, x.shape[2]) for a, b in self.spans]
        wait = self.ranks.start([[x]] * len(self.ranks), [[s] for s in shapes], [x])

        def done() -> Tensor:
            parts = wait()
            return torch.cat([x if i == self.ranks.me else p[0] for i, p in enumerate(parts)], dim=1)

        return done

    # ---- layers

    def scale_and_shift(self, norm: nn.GroupNorm, all_moments: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each channel: (B, C, 1, 1); from the mean and the squared deviations of each rank, (2, B, groups)."""
        each = x.shape[1] // norm.num_groups * x.shape[3]
        means, squares = torch.stack(all_moments).double().unbind(1)  # (ranks, B, groups)
        if self.rows.device != x.device:
            self.rows = self.rows.to(x.device)  # once: a copy makes the host wait
        n = self.rows * each
        mean = (means * n).sum(0) / n.sum()
        var = (squares.sum(0) + (n * (means - mean).square()).sum(0)) / n.sum()
        wide = x.shape[1] // norm.num_groups
        scale = norm.weight.double() * (var + norm.eps).rsqrt().repeat_interleave(wide, dim=1)  # (B, C)
        shift = norm.bias.double() - mean.repeat_interleave(wide, dim=1) * scale
        return scale.to(x.dtype)[:, :, None, None], shift.to(x.dtype)[:, :, None, None]

    def norm(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """A group norm over all rows."""
        _, all_moments = self.exchange(x, [(a, a) for a, _ in self.spans], moments(x, norm.num_groups))
        scale, shift = self.scale_and_shift(norm, all_moments, x)
        return torch.addcmul(shift, x, scale)

    def norm_silu_conv(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """conv(silu(norm(x))), in one exchange."""
        pieces, all_moments = self.exchange(x, self.windows(), moments(x, norm.num_groups))
        if not x.shape[2]:
            return x.new_empty(len(x), conv.out_channels, 0, x.shape[3])
        scale, shift = self.scale_and_shift(norm, all_moments, x)
        (a, b), place = self.span, 0
        above, below = a == 0, b == self.height  # at the picture's borders the convolution sees zeros
        y = x.new_empty(*x.shape[:2], b - a + 2, x.shape[3])
        inside = y[:, :, above : y.shape[2] - below]
        for piece in pieces:
            torch.addcmul(shift, piece, scale, out=inside[:, :, place : place + piece.shape[2]])
            place += piece.shape[2]
        F.silu(inside, inplace=True)
        y[:, :, : int(above)] = 0
        y[:, :, y.shape[2] - below :] = 0
        return F.conv2d(y, conv.weight, conv.bias, padding=(0, 1))

    def conv_of_whole(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """A convolution of 3 x 3 of a tensor that every rank has whole: this rank's rows of the result."""
        (a, b), (top, bottom) = self.span, self.windows()[self.ranks.me]
        if a == b:
            return x.new_empty(len(x), conv.out_channels, 0, x.shape[3])
        x = F.pad(x[:, :, top:bottom], (0, 0, top - (a - 1), b + 1 - bottom))
        return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))

    def downsample(self, conv: nn.Conv2d, x: Tensor, to: Level) -> Tensor:
        """Stride 2, padding 1."""
        windows = [(max(2 * a - 1, 0), min(2 * b, self.height)) if b > a else (0, 0) for a, b in to.spans]
        pieces, _ = self.exchange(x, windows)
        (a, b), (top, bottom) = to.span, windows[self.ranks.me]
        if a == b:
            return x.new_empty(len(x), conv.out_channels, 0, to.width)
        x = F.pad(torch.cat(pieces, dim=2), (0, 0, top - (2 * a - 1), 2 * b - bottom))
        return F.conv2d(x, conv.weight, conv.bias, stride=2, padding=(0, 1))

    def upsample(self, conv: nn.Conv2d, x: Tensor, to: Level) -> Tensor:
        """Nearest, to the size of `to` (twice, or one less); then the convolution."""
        wide = to.windows()  # of the upsampled tensor, whose row i is row i // 2 of x
        pieces, _ = self.exchange(x, [(a // 2, (b + 1) // 2) if b > a else (0, 0) for a, b in wide])
        (a, b), (top, bottom) = to.span, wide[self.ranks.me]
        if a == b:
            return x.new_empty(len(x), conv.out_channels, 0, to.width)
        x = torch.cat(pieces, dim=2).repeat_interleave(2, dim=2)[:, :, top % 2 :][:, :, : bottom - top]
        x = x.repeat_interleave(2, dim=3)[..., : to.width]
        x = F.pad(x, (0, 0, top - (a - 1), b + 1 - bottom))
        return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))


def moments(x: Tensor, groups: int) -> Tensor:
    """Mean and sum of squared deviations of each group: (2, B, groups), at least in float32."""
    x = x.reshape(len(x), groups, -1).to(torch.promote_types(x.dtype, torch.float32))
    if not x.shape[2]:
        return x.new_zeros(2, *x.shape[:2])
    var, mean = torch.var_mean(x, dim=2, correction=0)
    return torch.stack([mean, var * x.shape[2]])


def some(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 1 x 1 convolution, also of no rows at all, which torch refuses."""
    if x.shape[2]:
        return F.conv2d(x, layer.weight, layer.bias)
    return x.new_empty(len(x), layer.out_channels, *x.shape[2:])


# ---- the UNet


def rows_of_unet(unet: UNet, ranks: Ranks, height: int, width: int) -> Forwards:
    """Forwards for latents of this size: with them `unet(x, t, context)` takes and gives whole tensors."""
    cuts = [i * height // len(ranks) for i in range(len(ranks) + 1)]
    levels = [Level(ranks, cuts, width)]
    for _ in unet.config.channel_mult[1:]:
        cuts = [-(-cut // 2) for cut in cuts]  # so that a rank's rows and their halves belong together
        width = -(-width // 2)
        levels.append(Level(ranks, cuts, width))
    forwards: Forwards = {}
    at = 0

    def visit(blocks: list[Block]) -> None:
        nonlocal at
        for layer in (layer for block in blocks for layer in block):
            if isinstance(layer, ResBlock):
                forwards[layer] = res_block(layer, levels[at])
            elif isinstance(layer, SpatialTransformer):
                forwards.update(transformer(layer, levels[at]))
            elif isinstance(layer, Downsample):
                forwards[layer] = down(layer, levels[at], levels[at + 1])
                at += 1
            elif isinstance(layer, Upsample):
                forwards[layer] = up(layer, levels[at], levels[at - 1])
                at -= 1

    first: nn.Conv2d = unet.input_blocks[0][0]  # type: ignore[index]
    norm, _, last = unet.out
    forwards[first] = lambda x: levels[0].conv_of_whole(first, x)
    visit([*unet.input_blocks, unet.middle_block, *unet.output_blocks])
    forwards[unet.out] = lambda x: levels[0].gather(levels[0].norm_silu_conv(norm, last, x))  # type: ignore[arg-type]
    return forwards


def res_block(block: ResBlock, level: Level) -> Callable[..., Tensor]:
    norm1, _, conv1 = block.in_layers
    norm2, _, _, conv2 = block.out_layers
    skip = block.skip_connection

    def forward(x: Tensor, emb: Tensor) -> Tensor:
        h = level.norm_silu_conv(norm1, conv1, x)  # type: ignore[arg-type]
        h = h.add_(block.emb_layers(emb)[:, :, None, None])
        h = level.norm_silu_conv(norm2, conv2, h)  # type: ignore[arg-type]
        return h.add_(some(x, skip) if isinstance(skip, nn.Conv2d) else x)

    return forward


def transformer(layer: SpatialTransformer, level: Level) -> Forwards:
    """Of its parts: all but the norm and the self-attention are of a pixel by itself."""
    forwards: Forwards = {
        layer.norm: lambda x: level.norm(layer.norm, x),
        layer.proj_in: lambda x: some(x, layer.proj_in),
        layer.proj_out: lambda x: some(x, layer.proj_out),
    }
    for block in layer.transformer_blocks:
        forwards[block.attn1] = self_attention(block.attn1, level)  # type: ignore[index, arg-type]
    return forwards


def self_attention(layer: CrossAttention, level: Level) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        # The keys and values of others travel while the queries are computed.
        wait = level.all_tokens(torch.cat([layer.to_k(x), layer.to_v(x)], dim=-1))
        q = layer.to_q(x)
        k, v = wait().chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for z in (q, k, v))
        y = layer.attend(q, k, v) if len(q) and q.shape[2] else q
        return layer.to_out(y.transpose(1, 2).flatten(2))

    return forward


def down(layer: Downsample, level: Level, to: Level) -> Callable[..., Tensor]:
    return lambda x: level.downsample(layer.op, x, to)


def up(layer: Upsample, level: Level, to: Level) -> Callable[..., Tensor]:
    return lambda x, size: level.upsample(layer.conv, x, to)


# ---- the VAE's decoder


def rows_of_vae(vae: VAE, ranks: Ranks, height: int, width: int) -> Forwards:
    """Forwards for latents of this size: with them `vae.decode(latent)` takes and gives whole tensors."""
    cuts = [i * height // len(ranks) for i in range(len(ranks) + 1)]
    d, level = vae.decoder, Level(ranks, cuts, width)
    forwards: Forwards = {d.conv_in: lambda x, level=level: level.conv_of_whole(d.conv_in, x)}
    for block in (d.mid.block_1, d.mid.block_2):
        forwards[block] = resnet(block, level)
    forwards[d.mid.attn_1] = attention_block(d.mid.attn_1, level)
    for stage in reversed(d.up):
        for block in stage.block:  # type: ignore[union-attr]
            forwards[block] = resnet(block, level)
        if isinstance(layer := stage._modules.get("upsample"), VAEUpsample):
            finer = Level(ranks, [2 * cut for cut in level.cuts], 2 * level.width)
            forwards[layer] = vae_up(layer, level, finer)
            level = finer

    def decode(z: Tensor, last: Level = level) -> Tensor:
        z = d.mid(d.conv_in(z))
        for stage in reversed(d.up):
            z = stage(z)
        return last.gather(last.norm_silu_conv(d.norm_out, d.conv_out, z))

    return forwards | {d: decode}


def resnet(block: ResnetBlock, level: Level) -> Callable[..., Tensor]:
    short = block.nin_shortcut

    def forward(x: Tensor) -> Tensor:
        h = level.norm_silu_conv(block.norm1, block.conv1, x)
        h = level.norm_silu_conv(block.norm2, block.conv2, h)
        return h.add_(some(x, short) if isinstance(short, nn.Conv2d) else x)

    return forward


def attention_block(block: AttnBlock, level: Level) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        def linear(layer: nn.Conv2d, y: Tensor) -> Tensor:
            return F.linear(y, layer.weight.flatten(1), layer.bias)

        y = level.norm(block.norm, x).flatten(2).transpose(1, 2)  # (B, n*w, C)
        wait = level.all_tokens(torch.cat([linear(block.k, y), linear(block.v, y)], dim=-1))
        q = linear(block.q, y)
        q, k, v = (z.unsqueeze(1) for z in (q, *wait().chunk(2, dim=-1)))  # (B, 1, T, C)
        y = linear(block.proj_out, (block.attend(q, k, v) if q.shape[2] else q).squeeze(1))
        return y.transpose(1, 2).reshape(x.shape) + x

    return forward


def vae_up(layer: VAEUpsample, level: Level, to: Level) -> Callable[..., Tensor]:
    return lambda x: level.upsample(layer.conv, x, to)
