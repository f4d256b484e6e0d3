"""The VAE by bands of rows: the same function as `VAE.decode` and `VAE.encode`, in a fraction of the memory.

A picture's rows are asked for where they are needed: `Rows` is a tensor (1, C, H, W) that gives any of its rows,
either because they are stored (`Stored`, a list of bands) or by computing them from the rows of another one.
Nothing is approximated. A convolution asks for one row more on either side. A group norm needs the mean and the
variance of the whole: they are gathered band by band, between-band term included (Chan, Golub & LeVeque 1979).
Upsampling and the convolution after it are one step, four 2 x 2 convolutions, so that no upsampled tensor exists.
So there are no seams; diffusers' tiles have their own statistics each, and blend.

What is stored and what is computed again is a choice between memory and time, see `Choice`. Every band of a
stored tensor is let go when no row of it will be asked for again, while the tensor after it grows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..speed.winograd import halve
from ..vae import VAE, AttnBlock, Downsample, Mid, ResnetBlock, Upsample

Weights = Callable[[nn.Module], tuple[Tensor, Tensor]]  # a layer's weight and bias, ready for computing


def as_they_are(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias  # type: ignore[return-value]


@dataclass(frozen=True)
class Choice:
    """What a residual block stores beside its result; what it does not, it computes twice or three times."""

    input: bool = True  # the upsampled input, where there is one
    hidden: bool = True  # the result of the first convolution


# ---- rows


class Rows(ABC):
    """A tensor (1, C, H, W) by rows. `wide`: elements of the widest tensor met in computing one of them."""

    def __init__(self, channels: int, height: int, width: int, wide: int = 0):
        self.channels, self.height, self.width = channels, height, width
        self.wide = max(channels * width, wide)

    @abstractmethod
    def rows(self, a: int, b: int) -> Tensor:
        """Rows a to b (0 <= a < b <= H): (1, C, b - a, W), for reading only."""

    @abstractmethod
    def release(self, a: int) -> None:
        """No row above `a` will be asked for again."""


class Stored(Rows):
    """Bands of `band` rows, the last one perhaps of fewer, made one after another."""

    def __init__(self, like: Rows, band: int):
        super().__init__(like.channels, like.height, like.width)  # those of its source are behind it
        self.band = band
        self.bands: list[Tensor | None] = []

    def rows(self, a: int, b: int) -> Tensor:
        pieces = []
        for k in range(a // self.band, (b - 1) // self.band + 1):
            start, piece = k * self.band, self.bands[k]
            assert piece is not None, "rows asked for after their release"
            pieces.append(piece[:, :, max(a - start, 0) : b - start])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def release(self, a: int) -> None:
        for k in range(min(a // self.band, len(self.bands))):
            self.bands[k] = None

    def whole(self) -> Tensor:
        return self.rows(0, self.height)


class Given(Rows):
    """A tensor that somebody else holds."""

    def __init__(self, x: Tensor):
        super().__init__(*x.shape[1:])
        self.x = x

    def rows(self, a: int, b: int) -> Tensor:
        return self.x[:, :, a:b]

    def release(self, a: int) -> None:
        pass


class Moments(NamedTuple):
    """Of each group over the whole tensor, (groups,), in float64."""

    mean: Tensor
    var: Tensor  # of the population


class NormSilu(Rows):
    """silu(group_norm(x)), on read."""

    def __init__(self, x: Rows, layer: nn.GroupNorm, moments: Moments, weights: Weights):
        super().__init__(x.channels, x.height, x.width, x.wide)
        self.x = x
        gain, bias = weights(layer)
        each = x.channels // layer.num_groups
        rstd = (moments.var + layer.eps).rsqrt().repeat_interleave(each)
        scale = wide(gain) * rstd
        shift = wide(bias) - moments.mean.repeat_interleave(each) * scale
        self.scale, self.shift = (v.to(gain.dtype).view(1, -1, 1, 1) for v in (scale, shift))

    def rows(self, a: int, b: int) -> Tensor:
        return F.silu(torch.addcmul(self.shift, self.x.rows(a, b), self.scale), inplace=True)

    def release(self, a: int) -> None:
        self.x.release(a)


class ConvRows(Rows):
    """A convolution of 3 x 3 with padding 1, or of 1 x 1."""

    def __init__(self, x: Rows, layer: nn.Conv2d, weights: Weights):
        super().__init__(layer.out_channels, x.height, x.width, x.wide)
        self.x, self.halo = x, layer.kernel_size[0] // 2
        self.weight, self.bias = weights(layer)

    def rows(self, a: int, b: int) -> Tensor:
        top, bottom = max(a - self.halo, 0), min(b + self.halo, self.height)
        x = self.x.rows(top, bottom)
        above, below = self.halo - (a - top), self.halo - (bottom - b)
        if above or below:
            x = F.pad(x, (0, 0, above, below))
        return F.conv2d(x, self.weight, self.bias, padding=(0, self.halo))

    def release(self, a: int) -> None:
        self.x.release(max(a - self.halo, 0))


class UpsampleConv(Rows):
    """Nearest x2, then a convolution of 3 x 3, as four of 2 x 2, one for each parity of row and column.

    Row 2i of the result sees rows i-1, i, i of x, and row 2i+1 sees i, i, i+1: equal rows share the sum of their
    weights. 4/9 of the operations.
    """

    def __init__(self, x: Rows, layer: nn.Conv2d, weights: Weights):
        super().__init__(layer.out_channels, 2 * x.height, 2 * x.width, x.wide // 2)
        self.x = x
        weight, self.bias = weights(layer)
        self.phases = [[halve(halve(weight, 2, p), 3, q).contiguous() for q in (0, 1)] for p in (0, 1)]

    def rows(self, a: int, b: int) -> Tensor:
        first, last = a // 2, (b + 1) // 2  # rows of x
        top, bottom = max(first - 1, 0), min(last + 1, self.x.height)
        x = self.x.rows(top, bottom)
        x = F.pad(x, (1, 1, top - first + 1, last + 1 - bottom))
        n = last - first
        out = x.new_empty(1, self.channels, 2 * n, self.width)
        for p in (0, 1):
            for q in (0, 1):
                part = x[:, :, p : p + n + 1, q : q + self.x.width + 1]
                out[:, :, p::2, q::2] = F.conv2d(part, self.phases[p][q], self.bias)
        return out[:, :, a - 2 * first : b - 2 * first]

    def release(self, a: int) -> None:
        self.x.release(max(a // 2 - 1, 0))


class DownsampleConv(Rows):
    """The encoder's: padding on the right and at the bottom only, then 3 x 3 with stride 2."""

    def __init__(self, x: Rows, layer: nn.Conv2d, weights: Weights):
        super().__init__(layer.out_channels, x.height // 2, x.width // 2, 2 * x.wide)
        self.x = x
        self.weight, self.bias = weights(layer)

    def rows(self, a: int, b: int) -> Tensor:
        bottom = min(2 * b + 1, self.x.height)
        x = F.pad(self.x.rows(2 * a, bottom), (0, 1, 0, 2 * b + 1 - bottom))
        return F.conv2d(x, self.weight, self.bias, stride=2)

    def release(self, a: int) -> None:
        self.x.release(2 * a)


class Sum(Rows):
    """The end of a residual block: its second convolution plus its input, or the shortcut of that."""

    def __init__(self, x: Rows, y: Rows):
        super().__init__(x.channels, x.height, x.width, max(x.wide, y.wide))
        self.x, self.y = x, y

    def rows(self, a: int, b: int) -> Tensor:
        return self.x.rows(a, b).add_(self.y.rows(a, b))  # x is a convolution: its rows are nobody else's

    def release(self, a: int) -> None:
        self.x.release(a)
        self.y.release(max(a - 2, 0))  # where x is computed from y's source, through two convolutions


# ---- passes over all rows


class Bands:
    """Runs the VAE's networks by bands of at most `size` elements, or of one row where a row is more.

    `choices` has one entry for each residual block, in order of use; all is stored where it is too short.
    `tidy` is called before each band.
    """

    def __init__(
        self,
        size: int = 1 << 21,
        choices: tuple[Choice, ...] = (),
        weights: Weights = as_they_are,
        tidy: Callable[[], None] = lambda: None,
    ):
        self.size, self.tidy = size, tidy
        self.weights = weights
        self.choices = list(choices)

    def band(self, x: Rows) -> int:
        return max(1, min(x.height, self.size // x.wide))

    def spans(self, x: Rows) -> Iterator[tuple[int, int]]:
        band = self.band(x)
        for a in range(0, x.height, band):
            self.tidy()
            yield a, min(a + band, x.height)

    def store(self, x: Rows, groups: int = 0) -> tuple[Stored, Moments | None]:
        """All rows of x, computed once, with the moments of `groups` groups; x's own sources are used up."""
        out = Stored(x, self.band(x))
        moments = Gather(groups) if groups else None
        for a, b in self.spans(x):
            band = x.rows(a, b).contiguous()
            if moments:
                moments.add(band)
            out.bands.append(band)
            x.release(b)
        return out, moments.total() if moments else None

    def moments(self, x: Rows, groups: int) -> Moments:
        """Those of x, which is not kept."""
        gather = Gather(groups)
        for a, b in self.spans(x):
            gather.add(x.rows(a, b))
        return gather.total()

    # ---- the VAE's parts; each takes rows and the moments of the norm that comes next

    def resnet(self, x: Rows, block: ResnetBlock, moments: Moments | None) -> tuple[Stored, Moments | None]:
        choice = self.choices.pop(0) if self.choices else Choice()
        groups = block.norm1.num_groups
        if not isinstance(x, Stored) and choice.input:
            x, moments = self.store(x, groups)
        moments = moments or self.moments(x, groups)
        h: Rows = ConvRows(NormSilu(x, block.norm1, moments, self.weights), block.conv1, self.weights)
        if choice.hidden:
            h, inner = self.store_beside(h, groups)
        else:
            inner = self.moments(h, groups)
        h = ConvRows(NormSilu(h, block.norm2, inner, self.weights), block.conv2, self.weights)
        short = block.nin_shortcut
        return self.store(Sum(h, ConvRows(x, short, self.weights) if isinstance(short, nn.Conv2d) else x), groups)

    def store_beside(self, x: Rows, groups: int) -> tuple[Stored, Moments]:
        """`store`, of something whose sources are needed again."""
        out = Stored(x, self.band(x))
        gather = Gather(groups)
        for a, b in self.spans(x):
            band = x.rows(a, b).contiguous()
            gather.add(band)
            out.bands.append(band)
        return out, gather.total()

    def attention(self, x: Stored, block: AttnBlock, moments: Moments | None) -> tuple[Stored, Moments | None]:
        assert moments is not None
        whole = x.whole()  # (1, C, h, w): the smallest of the VAE's resolutions
        x.release(x.height)
        mean, var = (m.repeat_interleave(x.channels // block.norm.num_groups) for m in moments)
        gain, bias = self.weights(block.norm)
        scale = wide(gain) * (var + block.norm.eps).rsqrt()
        shift = wide(bias) - mean * scale
        y = torch.addcmul(shift.to(whole).view(1, -1, 1, 1), whole, scale.to(whole).view(1, -1, 1, 1))
        y = y.flatten(2).transpose(1, 2)  # (1, h*w, C)

        def linear(layer: nn.Conv2d, y: Tensor) -> Tensor:
            weight, bias = self.weights(layer)
            return F.linear(y, weight.flatten(1), bias)

        q, k, v = (linear(layer, y).unsqueeze(1) for layer in (block.q, block.k, block.v))
        del y
        y = block.attend(q, k, v).squeeze(1)
        del q, k, v
        whole = whole + linear(block.proj_out, y).transpose(1, 2).reshape(whole.shape)
        return self.store(Given(whole), block.norm.num_groups)

    def mid(self, x: Rows, moments: Moments | None, mid: Mid) -> tuple[Stored, Moments | None]:
        out, moments = self.resnet(x, mid.block_1, moments)
        out, moments = self.attention(out, mid.attn_1, moments)
        return self.resnet(out, mid.block_2, moments)

    def decode(self, vae: VAE, latent: Tensor) -> Tensor:
        """`vae.decode` of one scaled latent (1, 4, h, w) -> (1, 3, 8h, 8w)."""
        d, groups = vae.decoder, vae.config.num_groups
        z = ConvRows(Given(latent / vae.config.scale_factor), vae.post_quant_conv, self.weights)
        x: Rows
        moments: Moments | None
        x, moments = self.mid(*self.store(ConvRows(z, d.conv_in, self.weights), groups), d.mid)
        for level in reversed(d.up):
            for block in blocks_of(level):
                x, moments = self.resnet(x, block, moments)
            if isinstance(up := level._modules.get("upsample"), Upsample):
                x, moments = UpsampleConv(x, up.conv, self.weights), None
        assert moments is not None
        image = ConvRows(NormSilu(x, d.norm_out, moments, self.weights), d.conv_out, self.weights)
        return self.store(image)[0].whole()

    def encode(self, vae: VAE, image: Tensor) -> tuple[Tensor, Tensor]:
        """`vae.moments` of one image (1, 3, H, W) -> mean and log-variance, (1, 4, H/8, W/8)."""
        e, groups = vae.encoder, vae.config.num_groups
        x, moments = self.store(ConvRows(Given(image), e.conv_in, self.weights), groups)
        for level in e.down:
            for block in blocks_of(level):
                x, moments = self.resnet(x, block, moments)
            if isinstance(down := level._modules.get("downsample"), Downsample):
                x, moments = self.store(DownsampleConv(x, down.conv, self.weights), groups)
        x, moments = self.mid(x, moments, e.mid)
        assert moments is not None
        out = ConvRows(NormSilu(x, e.norm_out, moments, self.weights), e.conv_out, self.weights)
        mean, logvar = self.store(ConvRows(out, vae.quant_conv, self.weights))[0].whole().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)


class Whole:
    """Called like `Bands`, for a VAE that is small enough to be computed as it is: TAESD."""

    def decode(self, vae: VAE, latent: Tensor) -> Tensor:
        return vae.decode(latent)

    def encode(self, vae: VAE, image: Tensor) -> tuple[Tensor, Tensor]:
        return vae.moments(image)


def wide(x: Tensor) -> Tensor:
    """In float64, where the device has that: small vectors only."""
    return x.float() if x.device.type == "mps" else x.double()


def blocks_of(level: nn.Module) -> list[ResnetBlock]:
    return list(level.block)  # type: ignore[arg-type]


class Gather:
    """Moments of each group from bands: count, mean and sum of squared deviations, merged in float64."""

    def __init__(self, groups: int):
        self.groups, self.count = groups, 0
        self.mean = self.m2 = torch.zeros(())  # (groups,) in float64, on the bands' device, once there is one

    def add(self, band: Tensor) -> None:
        grouped = band.reshape(self.groups, -1).to(torch.promote_types(band.dtype, torch.float32))
        var, mean = torch.var_mean(grouped, dim=1, correction=0)
        n = grouped.shape[1]
        total, delta = self.count + n, wide(mean) - self.mean
        self.m2 = self.m2 + wide(var) * n + delta.square() * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    def total(self) -> Moments:
        return Moments(self.mean, self.m2 / self.count)
