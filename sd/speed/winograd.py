"""Convolutions of 3 x 3 with a fraction of the multiplications: Winograd's minimal filtering, exact up to rounding.

A tile of m x m outputs of an r x r convolution is A ((G g) * (B d)), each along both axes: the filter g and the
n x n inputs d, n = m + r - 1, are evaluated at n points, multiplied there, and interpolated (Toom and Cook; Winograd
1980; for networks Lavin & Gray 2015, arXiv:1509.09308). F(4, 3) takes 36 multiplications for 16 outputs where the
definition takes 144. Over C input and O output channels each point is a product of matrices, and all 36 of them are
one convolution of 1 x 1 with 36 groups.

The points decide the rounding error. 0, +-1, +-2, infinity, as usually taken, has 2.7 times the error of a direct
convolution; the points here have 1.2 times (F(4, 3)), 1.1 times (F(4, 2)) and 0.4 times (F(2, 3)).

Everything is done for a band of tiles at a time, so that what lies between the steps stays in cache: the norm and
SiLU before the convolution are computed as the band is read, and what is added after it as the band is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed import Conv, Derived, onednn

POINTS = {  # (outputs, taps of the filter) along an edge: all points but infinity
    (4, 3): (0.0, 0.625, -0.625, 1.5, -1.5),
    (2, 3): (0.0, 1.0, -1.0),
    (4, 2): (0.5, -0.5, 1.25, -1.25),
    (2, 2): (1.0, -1.0),
}
TILES = 128  # in a band, or one row of tiles where that is more


class Norm(NamedTuple):
    """silu(x * scale + shift), scale and shift (B, 1, 1, C): a group norm and what comes after it."""

    scale: Tensor
    shift: Tensor

    def into(self, out: Tensor, x: Tensor) -> Tensor:
        return F.silu(torch.addcmul(self.shift, x, self.scale, out=out), inplace=True)


def halve(weight: Tensor, dim: int, parity: int) -> Tensor:
    """Three weights along `dim` to the two of even (0) or odd (1) rows of an upsampled tensor."""
    w = weight.unbind(dim)
    return torch.stack([w[0], w[1] + w[2]] if parity == 0 else [w[0] + w[1], w[2]], dim)


def polynomial(roots: list[float]) -> list[float]:
    """The coefficients of the product of (x - root), from x**0 on."""
    p = [1.0]
    for root in roots:
        p = [low - root * high for low, high in zip([0.0, *p], [*p, 0.0], strict=True)]
    return p


def transforms(m: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (m, n), G (n, r), B (n, n) in float64: A ((G g) * (B d)) is the correlation of d with g, m values of it."""
    points, n = list(POINTS[m, r]), m + r - 1
    a, g, b = (torch.zeros(s, dtype=torch.float64) for s in ((m, n), (n, r), (n, n)))
    for j, p in enumerate(points):
        others = [q for q in points if q != p]
        a[:, j] = torch.tensor([p**i for i in range(m)], dtype=a.dtype)
        g[j] = torch.tensor([p**i for i in range(r)], dtype=a.dtype) / math.prod(p - q for q in others)
        b[j, :-1] = torch.tensor(polynomial(others), dtype=a.dtype)
    a[-1, -1] = g[-1, -1] = 1.0  # the point at infinity
    b[-1] = torch.tensor(polynomial(points), dtype=a.dtype)
    scale = 2.0 ** b.abs().amax(dim=1).log2().round()  # of each point: exact, for values of like size
    return a, g * scale[:, None], b / scale[:, None]


class Winograd:
    """A 3 x 3 convolution of padding 1, x (B, H, W, C) -> (B, H, W, O), in tiles of m x m pixels.

    upsample: of x enlarged to twice its size (nearest), -> (B, 2H, 2W, O). Output rows 2i see rows i-1, i of x,
    rows 2i+1 see i, i+1: four convolutions of 2 x 2, one for each parity ("phase") of row and column.
    """

    def __init__(self, weight: Tensor, bias: Tensor, m: int, upsample: bool = False):
        self.weight, self.bias, self.m = weight, bias, m
        self.phases, r = (2, 2) if upsample else (1, 3)
        a, self.g, b = transforms(m, r)
        self.n = m + r - 1
        self.to_points, self.from_points = torch.kron(b, b), torch.kron(a, a)  # (n*n, n*n), (m*m, n*n)
        self.kron = Derived(self._kron, bias)
        self.groups = self.phases**2 * self.n**2
        self.product = Conv(self.filters, weight, groups=self.groups)
        self.plain = Derived(self.filters, weight)  # where there is no oneDNN

    def forget(self) -> None:
        """Drop the prepared filters."""
        self.product.packed.forget()
        self.plain.forget()

    def _kron(self) -> tuple[Tensor, Tensor]:
        return self.to_points.to(self.bias), self.from_points.to(self.bias)

    def filters(self) -> Tensor:
        """The filters at all points: (groups * O, C, 1, 1)."""
        w = self.weight.detach()
        out, into = w.shape[:2]
        all_points = self.bias.new_empty(self.phases**2, self.n**2, out, into)
        g2 = torch.kron(self.g, self.g)  # (n*n, r*r)
        for k, points in enumerate(all_points):
            for o in range(0, out, 256):  # in pieces: computed in float64
                part = w[o : o + 256].double()
                if self.phases == 2:
                    part = halve(halve(part, 2, k // 2), 3, k % 2)
                points[:, o : o + 256] = (g2 @ part.permute(2, 3, 0, 1).reshape(g2.shape[1], -1)).view(
                    self.n**2, -1, into
                )
        return all_points.view(-1, into, 1, 1)

    def products(self, values: Tensor) -> Tensor:
        """(tiles, groups, C) -> (tiles, groups, O): a product of matrices for each group."""
        tiles, groups, channels = values.shape
        if onednn(values):
            return self.product(values.view(1, 1, tiles, groups * channels)).view(tiles, groups, -1)
        weight = self.plain().view(groups, -1, channels)
        return torch.bmm(values.transpose(0, 1), weight.mT).transpose(0, 1).contiguous()

    def __call__(self, x: Tensor, norm: Norm | None = None, add: Tensor | None = None) -> Tensor:
        """norm: applied to x first; add: added to the result, and of its shape."""
        batch, height, width, channels = x.shape
        m, n, s = self.m, self.n, self.phases
        assert add is None or s == 1
        down, across = -(-height // m), -(-width // m)  # tiles
        images, rows = 1, max(1, TILES // across)  # of tiles, in a band
        if rows >= down:
            images, rows = max(1, min(batch, TILES // (down * across))), down
        else:
            rows = -(-down // -(-down // rows))
        tiles = images * rows * across
        into, outof = (k.expand(tiles * s * s, -1, -1) for k in self.kron())
        # With zeros around; all bands use the same memory.
        band = x.new_empty(images, m * rows + 2, m * across + 2, channels)
        band[:, :, 0] = band[:, :, width + 1 :] = 0.0
        windows = x.new_empty(tiles * s * s, n * n, channels)  # the first band, if not the last, fills it
        values, pixels = torch.empty_like(windows), x.new_empty(tiles * s * s, m * m, len(self.bias))
        out = x.new_empty(batch, m * down, s, m * across, s, len(self.bias))
        for b in range(0, batch, images):
            for i in range(0, down, rows):
                here = slice(b, b + images)
                shape = len(x[here]), min(rows, down - i), across
                count = math.prod(shape) * s * s
                self.read(band, x[here], m * i, norm and Norm(norm.scale[here], norm.shift[here]))
                self.cut(band, windows[:count].view(*shape, s, s, n, n, channels))
                torch.bmm(into, windows, out=values)
                # As many tiles in the last band, where fewer are needed: another count is another layout of weights.
                points = self.products(values.view(tiles, self.groups, channels))
                torch.bmm(outof, points.view(tiles * s * s, n * n, -1), out=pixels)
                result = pixels[:count].view(*shape, s, s, m, m, -1).permute(0, 1, 5, 3, 2, 6, 4, 7)
                place = out[here, m * i : m * (i + rows)]
                torch.add(result, self.bias, out=place.view(result.shape))
                if add is not None:
                    valid = place[:, :, 0, :width, 0][:, : height - m * i]
                    valid.add_(add[here, m * i : m * (i + rows)])
        out = out.view(batch, s * m * down, s * m * across, -1)
        return out[:, : s * height, : s * width].contiguous()

    def read(self, band: Tensor, x: Tensor, first: int, norm: Norm | None) -> None:
        """Rows of x from `first` - 1 on into `band`, with zeros where there are none."""
        height, width = x.shape[1:3]
        top, bottom = max(first - 1, 0), min(first - 1 + band.shape[1], height)
        a, b = top - first + 1, bottom - first + 1
        band[:, :a] = 0.0
        band[:, b:] = 0.0
        inner = band[: len(x), a:b, 1 : width + 1]
        if norm is None:
            inner.copy_(x[:, top:bottom])
        else:
            norm.into(inner, x[:, top:bottom])

    def cut(self, band: Tensor, windows: Tensor) -> None:
        """The overlapping n x n windows of a band: (images, rows, across, s, s, n, n, C)."""
        image, row, column, _ = band.stride()
        strides = image, self.m * row, self.m * column, row, column, row, column, 1
        windows.copy_(band.as_strided(windows.shape, strides))


def direct(layer: nn.Conv2d, pack: bool) -> Callable[[Tensor], Tensor]:
    """Upsampling and a 3 x 3 convolution as four of 2 x 2: (B, H, W, C) -> (B, 2H, 2W, O)."""

    weight = layer.weight

    def phase(p: int, q: int) -> Conv:
        return Conv(
            lambda: halve(halve(weight.detach().to(layer.bias), 2, p), 3, q),
            weight,
            bias=lambda: layer.bias,
            pack=pack,
        )

    convs = [[phase(p, q) for q in (0, 1)] for p in (0, 1)]

    def upsample(x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 1, 1, 1, 1))
        out = x.new_empty(batch, height, 2, width, 2, len(weight))
        for p in (0, 1):
            for q in (0, 1):
                out[:, :, p, :, q] = convs[p][q](x[:, p : p + height + 1, q : q + width + 1].contiguous())
        return out.view(batch, 2 * height, 2 * width, -1)

    return upsample
