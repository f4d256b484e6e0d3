"""One picture cut by rows over ranks, exactly: the operations of the UNet and of the VAE's decoder with neighbours.

Each rank holds some rows of every tensor. A convolution needs a row more on either side, from the rank that has it; a
group norm the mean and the variance of the whole (Chan, Golub & LeVeque 1979, of the population); self-attention the
keys and values of all rows. The rest is of a pixel by itself. The moments of a norm and the rows for the convolution
after it travel in one message: the rows are sent raw, and normalised where they arrive. So a forward of the v1 UNet
has 84 exchanges: 45 norms with convolutions, 16 norms and 16 gatherings of keys and values in the transformers,
6 changes of resolution, and the noise itself at the end.

`rows_of_unet` and `rows_of_vae` are copies of the networks with these operations: they take and give whole tensors,
and the blocks know nothing of ranks. Ranks may have different numbers of rows, also none.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt.controlnet import ControlNet
from ..operations import Attention, NormSiLUConvolution, Operations, copy_of
from ..sampler import announced
from ..unet import UNet
from ..vae import VAE
from ..weights.unread import at_rest
from .ranks import Ranks

Span = tuple[int, int]
Network = TypeVar("Network", UNet, ControlNet)


class Resolution:
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

    def downsample(self, conv: nn.Conv2d, x: Tensor, to: Resolution) -> Tensor:
        """Stride 2, padding 1."""
        windows = [(max(2 * a - 1, 0), min(2 * b, self.height)) if b > a else (0, 0) for a, b in to.spans]
        pieces, _ = self.exchange(x, windows)
        (a, b), (top, bottom) = to.span, windows[self.ranks.me]
        if a == b:
            return x.new_empty(len(x), conv.out_channels, 0, to.width)
        x = F.pad(torch.cat(pieces, dim=2), (0, 0, top - (2 * a - 1), 2 * b - bottom))
        return F.conv2d(x, conv.weight, conv.bias, stride=2, padding=(0, 1))

    def upsample(self, conv: nn.Conv2d, x: Tensor, to: Resolution) -> Tensor:
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


class CutByRows(Operations):
    """On this rank's rows. `resolutions` are those of a network, finest first; `at` is the one of the call under way.

    A forward begins with the whole tensor, at the resolution `start`, and ends with this rank's rows of the result.
    """

    def __init__(self, resolutions: list[Resolution], start: int):
        self.resolutions, self.start, self.at = resolutions, start, start

    @property
    def here(self) -> Resolution:
        return self.resolutions[self.at]

    def norm_silu_conv(self, layers: NormSiLUConvolution, x: Tensor, add: Tensor | None = None) -> Tensor:
        y = self.here.norm_silu_conv(layers.norm, layers.conv, x)
        return y if add is None else y.add_(add)

    def upsample(self, conv: nn.Conv2d, x: Tensor, size: tuple[int, ...]) -> Tensor:
        before, self.at = self.here, self.at - 1
        return before.upsample(conv, x, self.here)

    def project(
        self,
        to_q: nn.Linear | nn.Conv2d,
        to_k: nn.Linear | nn.Conv2d,
        to_v: nn.Linear | nn.Conv2d,
        x: Tensor,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if context is not None:
            return super().project(to_q, to_k, to_v, x, context)
        # The keys and values of others travel while the queries are computed.
        wait = self.here.all_tokens(torch.cat([self.linear(to_k, x), self.linear(to_v, x)], dim=-1))
        q = self.linear(to_q, x)
        k, v = wait().chunk(2, dim=-1)
        return q, k, v

    def attention(self, attend: Attention) -> Attention:
        return lambda q, k, v: attend(q, k, v) if q.shape[2] else q  # a rank may have no rows


def rows_of_conv(ops: CutByRows, layer: nn.Conv2d, x: Tensor) -> Tensor:
    """One of 1 x 1 is of each pixel by itself; one of stride 2 halves the size; the others begin a network."""
    if layer.kernel_size == (1, 1):
        if x.shape[2]:
            return F.conv2d(x, layer.weight, layer.bias)
        return x.new_empty(len(x), layer.out_channels, *x.shape[2:])  # of no rows at all, which torch refuses
    if layer.stride == (2, 2):
        before, ops.at = ops.here, ops.at + 1
        return before.downsample(layer, x, ops.here)
    ops.at = ops.start
    return ops.here.conv_of_whole(layer, x)


def rows_of_norm(ops: CutByRows, layer: nn.GroupNorm, x: Tensor) -> Tensor:
    return ops.here.norm(layer, x)


CutByRows.layers = {nn.Conv2d: rows_of_conv, nn.GroupNorm: rows_of_norm}


def cut_by_rows(network: Network, ranks: Ranks, height: int, width: int) -> tuple[Network, Resolution]:
    """A copy of the UNet, or of a ControlNet, for latents of this size, and their resolution."""
    cuts = [i * height // len(ranks) for i in range(len(ranks) + 1)]
    resolutions = [Resolution(ranks, cuts, width)]
    for _ in network.config.channel_mult[1:]:
        cuts = [-(-cut // 2) for cut in cuts]  # so that a rank's rows and their halves belong together
        width = -(-width // 2)
        resolutions.append(Resolution(ranks, cuts, width))
    with at_rest(network):  # another thread may be calling it for the first time
        return copy_of(network, CutByRows(resolutions, start=0)), resolutions[0]


def rows_of_unet(unet: UNet, ranks: Ranks, height: int, width: int) -> Callable[..., Tensor]:
    """The UNet for latents of this size: x, t, context -> the noise in x, whole tensors on every rank.

    What a ControlNet adds is this rank's rows alone, as `RowsOfControlNet` gives it.
    """
    copied, finest = cut_by_rows(unet, ranks, height, width)

    def call(x: Tensor, t: Tensor, context: Tensor, **more: Any) -> Tensor:
        with announced(whole=False):
            return finest.gather(copied(x, t, context, **more))

    return call


class RowsOfControlNet:
    """A ControlNet for latents of this size: what is added on this rank's rows."""

    def __init__(self, net: ControlNet, ranks: Ranks, height: int, width: int):
        if net.config.global_pool:
            raise ValueError(
                f"The ControlNet {net.name} adds means over the whole picture, and a rank has only some of its rows: "
                "split by image or guidance."
            )
        self.net, self.config, self.files = net, net.config, net.files
        self.copied, self.finest = cut_by_rows(net, ranks, height, width)

    def hint(self, pictures: Tensor) -> Tensor:
        """Computed whole on every rank, once, of which each takes its own rows."""
        a, b = self.finest.span
        return self.net.hint(pictures)[:, :, a:b]

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        with announced(whole=False):
            return self.copied(x, t, context, hint)


def rows_of_vae(vae: VAE, ranks: Ranks, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """The VAE's decoder for latents of this size: scaled latent -> image, whole tensors on every rank."""
    cuts = [i * height // len(ranks) for i in range(len(ranks) + 1)]
    factors = [2**i for i in reversed(range(len(vae.config.ch_mult)))]
    resolutions = [Resolution(ranks, [f * cut for cut in cuts], f * width) for f in factors]
    with at_rest(vae):
        copied = copy_of(vae, CutByRows(resolutions, start=len(resolutions) - 1))
    return lambda latent: resolutions[0].gather(copied.decode(latent))
