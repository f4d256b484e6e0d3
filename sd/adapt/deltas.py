"""What an adapter adds to a weight: one formula a kind, for any rows and columns of the weight.

An adapted weight is W + the sum over adapters of scale * delta. A delta is asked for some rows and columns, so that
it can be added to a whole weight in memory, or to the piece of one that has just been copied out of its file. Weights
are (O, I) of linear layers and (O, I, kh, kw) of convolutions; k stands for kh * kw.

    LoRA, LoCon   up (O, r) times down (r, I k)                               Hu et al. 2021, arXiv:2106.09685
    Tucker        the core (r, r, kh, kw) between them
    LoHa          the product, number by number, of two of these              Hyeon-Woo et al. 2021, arXiv:2108.06098
    LoKr          the Kronecker product of two matrices, each whole or a product
    GLoRA         W times a product, plus a product                           Chavan et al. 2023, arXiv:2306.07967
    IA3           W times w, by rows or by columns                            Liu et al. 2022, arXiv:2205.05638
    DoRA          (V m / |V| - W), V = W + one of the above                   Liu et al. 2024, arXiv:2402.09353

At another scale than 1 DoRA's authors say nothing, and programs differ. Here all kinds follow the one rule above, as
ComfyUI's do: from W in a straight line, so that 0 is the plain model. (PEFT puts the scale before V's own product,
LyCORIS goes from V to V m / |V|.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]
PIECE = 1 << 20  # elements of a weight that are looked at together where all of it is


def spans(rows: int, elements: int, most: int = PIECE) -> Iterator[slice]:
    """Rows of a weight in pieces of at most `most` elements, or of one row."""
    step = max(1, most * rows // max(elements, 1))
    for a in range(0, rows, step):
        yield slice(a, min(a + step, rows))


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """Where and in what `like` is computed."""
    return tensor.to(like.device, like.dtype)


@dataclass(frozen=True, eq=False)
class Matrix:
    """(O, I, ...) as it stands in a file: whole; left (O, r) times right (r, I, ...); or with a core between.

    core   (r, r, ...): that of Tucker; right is then (r, I)
    """

    right: Tensor
    left: Tensor | None = None
    core: Tensor | None = None

    @property
    def shape(self) -> Shape:
        """That of the whole."""
        rows = self.right if self.left is None else self.left
        kernel = self.right if self.core is None else self.core
        return (rows.shape[0], self.right.shape[1], *kernel.shape[2:])

    @property
    def at_once(self) -> int:
        """Elements that are converted for a piece: none where it is whole, for those count as the piece's."""
        spread = self.right.numel() * (prod(self.core.shape[2:]) if self.core is not None else 1)
        return 0 if self.left is None else self.left.numel() + spread

    @property
    def rank(self) -> int | None:
        """None where it is whole."""
        return None if self.left is None else self.left.shape[1]

    def sides(self, like: Tensor, rows: slice | Tensor, columns: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Of a product: some rows of the left, (n, r), and columns of the right, (r, m k)."""
        assert self.left is not None
        right = placed(self.right[:, columns], like)
        if self.core is not None:
            right = torch.einsum("pq...,qi->pi...", placed(self.core, like), right)
        return placed(self.left[rows], like), right.flatten(1)

    def part(self, like: Tensor, rows: slice | Tensor, columns: slice | Tensor) -> Tensor:
        """Some rows and columns: (n, m, ...)."""
        if self.left is None:
            return placed(self.right[rows][:, columns], like)
        left, right = self.sides(like, rows, columns)
        return (left @ right).view(len(left), -1, *self.shape[2:])


class Delta(ABC):
    """Of one weight, of `shape`, before the user's scale. `kind` is its name for people."""

    kind = ""
    temporaries = 0  # tensors of the size of what is asked for that are made on the way
    of_base = False  # whether it is computed from the weight that it is added to

    def __init__(self, shape: Shape, scale: float = 1.0):
        self.shape, self.scale = tuple(shape), scale  # scale: alpha / rank, where the kind has that

    @abstractmethod
    def values(self, like: Tensor, rows: slice, columns: slice, given: Tensor | None, base: Tensor) -> Tensor:
        """These rows and columns, (n, m, ...), in the dtype and on the device of `like`.

        given   the same rows and columns of the weight itself, where `of_base`
        base    all of that weight, as it lies in the file or in memory: in any dtype
        """

    def add_(self, out: Tensor, rows: slice, columns: slice, by: float, given: Tensor | None, base: Tensor) -> None:
        """out (n, m, ...), which is contiguous, += by * these rows and columns."""
        out.add_(self.values(out, rows, columns, given, base).view(out.shape), alpha=by)

    @property
    def rank(self) -> int | None:
        return None

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What it is made of."""

    @property
    def at_once(self) -> int:
        """Elements of those tensors that are converted for one piece, beside `temporaries`."""
        return 0

    @property
    def kept(self) -> int:
        """Elements that are computed once and kept."""
        return 0


class Product(Delta):
    """LoRA, LoCon, and with a core Tucker's."""

    kind = "LoRA"

    def __init__(self, shape: Shape, matrix: Matrix, scale: float = 1.0):
        super().__init__(shape, scale)
        self.matrix = matrix

    def values(self, like: Tensor, rows: slice, columns: slice, given: Tensor | None, base: Tensor) -> Tensor:
        return self.matrix.part(like, rows, columns).mul_(self.scale)

    def add_(self, out: Tensor, rows: slice, columns: slice, by: float, given: Tensor | None, base: Tensor) -> None:
        left, right = self.matrix.sides(out, rows, columns)
        out.view(len(left), -1).addmm_(left, right, alpha=by * self.scale)  # nothing is made of the weight's size

    @property
    def rank(self) -> int | None:
        return self.matrix.rank

    @property
    def at_once(self) -> int:
        return self.matrix.at_once

    @property
    def tensors(self) -> list[Tensor]:
        return tensors_of_matrices(self.matrix)


class Hadamard(Delta):
    """LoHa."""

    kind, temporaries = "LoHa", 2

    def __init__(self, shape: Shape, first: Matrix, second: Matrix, scale: float = 1.0):
        super().__init__(shape, scale)
        self.first, self.second = first, second

    def values(self, like: Tensor, rows: slice, columns: slice, given: Tensor | None, base: Tensor) -> Tensor:
        first = self.first.part(like, rows, columns)
        return first.mul_(self.second.part(like, rows, columns)).mul_(self.scale)

    @property
    def rank(self) -> int | None:
        return self.first.rank

    @property
    def at_once(self) -> int:
        return self.first.at_once + self.second.at_once

    @property
    def tensors(self) -> list[Tensor]:
        return tensors_of_matrices(self.first, self.second)


class Kronecker(Delta):
    """LoKr: first (p, q), second (s, t, ...), where O = p s and I = q t. Row i is made of rows i // s and i % s."""

    kind, temporaries = "LoKr", 3

    def __init__(self, shape: Shape, first: Matrix, second: Matrix, scale: float = 1.0):
        super().__init__(shape, scale)
        self.first, self.second = first, second

    def values(self, like: Tensor, rows: slice, columns: slice, given: Tensor | None, base: Tensor) -> Tensor:
        (s, t), devices = self.second.shape[:2], self.first.right.device
        i = torch.arange(*rows.indices(self.shape[0]), device=devices)
        j = torch.arange(*columns.indices(self.shape[1]), device=devices)
        first = self.first.part(like, i // s, j // t)  # (n, m)
        second = self.second.part(like, i % s, j % t)  # (n, m, ...)
        return second.mul_(first.view(*first.shape, *[1] * (second.ndim - 2))).mul_(self.scale)

    @property
    def rank(self) -> int | None:
        return self.first.rank or self.second.rank

    @property
    def tensors(self) -> list[Tensor]:
        return tensors_of_matrices(self.first, self.second)

    @property
    def at_once(self) -> int:
        return self.first.at_once + self.second.at_once


class Difference(Delta):
    """The whole difference of a weight, of a bias, or of a norm's gain and shift."""

    kind, temporaries = "difference", 1

    def __init__(self, shape: Shape, difference: Tensor, scale: float = 1.0):
        super().__init__(shape, scale)
        self.difference = difference

    def values(self, like: Tensor, rows: slice, columns: slice, given: Tensor | None, base: Tensor) -> Tensor:
        part = self.difference[rows] if self.difference.ndim == 1 else self.difference[rows, columns]
        return placed(part, like) * self.scale

    @property
    def tensors(self) -> list[Tensor]:
        return [self.difference]


class Scaling(Delta):
    """IA3: W w, where w has a number for each row, or for each column."""

    kind, temporaries, of_base = "IA3", 1, True

    def __init__(self, shape: Shape, factors: Tensor, on_input: bool):
        super().__init__(shape)
        self.factors, self.on_input = factors, on_input

    def values(self, like: Tensor, rows: slice, columns: slice, given: Tensor | None, base: Tensor) -> Tensor:
        assert given is not None
        return given * along(placed(self.factors[columns if self.on_input else rows], like), given, self.on_input)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.factors]


@dataclass
class Once:
    """Something computed of a whole weight when it is first asked for, once for each dtype and device."""

    make: Callable[[Tensor, Tensor], Tensor]  # (the weight, like) -> what is kept
    made: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def __call__(self, base: Tensor, like: Tensor) -> Tensor:
        key = like.dtype, like.device
        if key not in self.made:
            self.made[key] = self.make(base, like)
        return self.made[key]


class Generalized(Delta):
    """GLoRA: (W a1 a2 + b1 b2) scale, in which W a1, (O, r, ...), is computed once; a1 (I, r), a2 (r, I)."""

    kind, temporaries, of_base = "GLoRA", 2, True

    def __init__(self, shape: Shape, a1: Tensor, a2: Tensor, b: Matrix, scale: float = 1.0):
        super().__init__(shape, scale)
        self.a1, self.a2, self.b = a1, a2, b
        self.first = Once(self._first)

    def _first(self, base: Tensor, like: Tensor) -> Tensor:
        a1 = placed(self.a1, like)
        parts = [
            torch.einsum("oi...,ir->or...", placed(base[rows], like), a1) for rows in spans(len(base), base.numel())
        ]
        return torch.cat(parts)

    def values(self, like: Tensor, rows: slice, columns: slice, given: Tensor | None, base: Tensor) -> Tensor:
        of_w = torch.einsum("or...,rj->oj...", self.first(base, like)[rows], placed(self.a2[:, columns], like))
        return of_w.add_(self.b.part(like, rows, columns).view(of_w.shape)).mul_(self.scale)

    @property
    def rank(self) -> int | None:
        return self.b.rank

    @property
    def at_once(self) -> int:
        return self.a2.numel() + self.b.at_once

    @property
    def tensors(self) -> list[Tensor]:
        return [self.a1, self.a2, *tensors_of_matrices(self.b)]

    @property
    def kept(self) -> int:
        return self.shape[0] * self.a2.shape[0] * prod(self.shape[2:])


class Decomposed(Delta):
    """DoRA: V m / |V| - W, where V = W + inner. m has one magnitude for each row of V, or for each column."""

    of_base = True

    def __init__(self, inner: Delta, magnitude: Tensor, on_input: bool):
        super().__init__(inner.shape)
        self.inner, self.magnitude, self.on_input = inner, magnitude, on_input
        self.kind = f"{inner.kind} with DoRA"
        self.temporaries = inner.temporaries + 2
        self.factors = Once(self._factors)

    def _sum(self, given: Tensor, rows: slice, columns: slice, base: Tensor) -> Tensor:
        v = given.clone(memory_format=torch.contiguous_format)
        self.inner.add_(v, rows, columns, 1.0, given, base)
        return v

    def _factors(self, base: Tensor, like: Tensor) -> Tensor:
        """m / |V|, (O,) or (I,); the norms of all of V, by pieces."""
        every, norms, squares = slice(None), [], like.new_zeros(self.shape[1])
        for rows in spans(len(base), base.numel()):
            v = self._sum(placed(base[rows], like), rows, every, base)
            if self.on_input:
                squares += v.transpose(0, 1).flatten(1).square().sum(1)
            else:
                norms.append(v.flatten(1).norm(dim=1))
        norm = squares.sqrt() if self.on_input else torch.cat(norms)
        return placed(self.magnitude, like) / (norm + torch.finfo(norm.dtype).eps)  # as LyCORIS and ComfyUI

    def values(self, like: Tensor, rows: slice, columns: slice, given: Tensor | None, base: Tensor) -> Tensor:
        assert given is not None
        v = self._sum(given, rows, columns, base)
        factors = self.factors(base, like)[columns if self.on_input else rows]
        return v.mul_(along(factors, v, self.on_input)).sub_(given)

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.inner.tensors, self.magnitude]

    @property
    def at_once(self) -> int:
        return self.inner.at_once

    @property
    def kept(self) -> int:
        return self.inner.kept + self.magnitude.numel()


def along(vector: Tensor, like: Tensor, columns: bool) -> Tensor:
    """A number for each row of `like`, or for each column, in a shape that multiplies it."""
    return vector.view(*[-1 if axis == columns else 1 for axis in range(like.ndim)])


def tensors_of_matrices(*matrices: Matrix) -> list[Tensor]:
    return [t for m in matrices for t in (m.left, m.core, m.right) if t is not None]
