"""From the tensors of one module in a LoRA's file to what is added to its weight and its bias."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..weights.configs import LoadError
from .deltas import Decomposed, Delta, Difference, Generalized, Hadamard, Kronecker, Matrix, Product, Scaling, Shape
from .dialects import Place
from .peft_settings import PeftSettings

Fields = dict[str, Tensor]  # by our words for them
NUMBERS = ("alpha", "on_input")  # of one element
VECTORS = ("weight", "dora_scale", "magnitude", "up_bias", "diff", "diff_b", "w_norm", "b_norm", "ia3_l")  # perhaps


class ModuleReader:
    """From the tensors of one module to what is added to its weight and its bias."""

    def __init__(
        self,
        path: Path,
        place: Place,
        home: str,  # what the file calls the module
        fields: Fields,
        shapes: tuple[Shape, Shape | None],  # of the weight and of the bias
        scales: PeftSettings,
    ):
        self.path, self.place, self.home, self.fields, self.scales = path, place, home, dict(fields), scales
        self.shape, self.bias_shape = shapes

    def wrong(self, what: str) -> LoadError:
        return LoadError(
            f"{self.path}, {self.place.module}: {what}; the LoRA does not fit this model, or is damaged."
        )

    def take(self, word: str) -> Tensor:
        if word not in self.fields:
            raise self.wrong(f"{word} is missing")
        return self.fields.pop(word)

    def deltas(self) -> dict[str, Delta]:
        """By "weight" and "bias". Raises LoadError where tensors are missing, left over, or of other shapes."""
        f, result = self.fields, {}
        for word, tensor in f.items():
            if (word in NUMBERS and tensor.numel() != 1) or tensor.ndim < (
                0 if word in NUMBERS else 1 if word in VECTORS else 2
            ):
                raise self.wrong(f"{word} is {tuple(tensor.shape)}")
        if "up_bias" in f and "down" in f:
            bias = f.pop("up_bias")
            result["bias"] = self.difference(bias, self.bias_shape, self.rank_scale(f["down"].shape[0]))
        peft = "ia3_l" in f
        inner = self.inner()
        if peft and isinstance(inner, Scaling) and not inner.on_input and self.bias_shape:
            result["bias"] = Scaling(self.bias_shape, inner.factors, False)  # PEFT multiplies what the layer returns
        if inner is not None:
            result = {"weight": self.decomposed(inner)} | result
        for word in ("diff_b", "b_norm"):
            if word in f:
                result["bias"] = self.difference(f.pop(word), self.bias_shape)
        f.pop("alpha", None)  # beside kinds that have no use for it
        if f or not result:
            raise self.wrong(f"{', '.join(sorted(f))} cannot be used alone" if f else "it has nothing but alpha")
        return result

    def inner(self) -> Delta | None:
        f = self.fields
        if "down" in f or "up" in f:
            matrix = self.matrix("up", "down", "mid")
            return Product(self.shape, matrix, self.rank_scale(matrix.rank))
        if "hada_w1_a" in f:
            first, second = (self.matrix(f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
            return Hadamard(self.shape, first, second, self.rank_scale(first.rank))
        if any(word.startswith("lokr_") for word in f):
            return self.kronecker()
        if "b1.weight" in f:
            return self.generalized()
        if "on_input" in f or "ia3_l" in f:
            return self.scaling()
        if "diff" in f or "w_norm" in f:
            return self.difference(f.pop("diff") if "diff" in f else f.pop("w_norm"), self.shape)
        return None

    # ---- numbers

    def rank_scale(self, rank: int | None) -> float:
        """alpha / rank, by the tensor beside the others, or else by PEFT's settings; 1 without either."""
        if "alpha" in self.fields:
            return self.fields["alpha"].item() / rank if rank else 1.0
        return self.scales.scale(self.place.part, self.home, rank)

    # ---- matrices

    def matrix(self, left: str, right: str, core: str, shape: Shape | None = None) -> Matrix:
        """A product in the shape of the weight: left (O, r), right (r, I k). With a core, sides (O, r) and (r, I)."""
        shape = self.shape if shape is None else shape
        a, b, c = self.take(left), self.take(right), self.fields.pop(core, None)
        if c is not None and left != "up" and a.ndim == 2:  # LyCORIS' (r, O)
            a = a.T
        a = a.flatten(1) if a.ndim > 2 and prod(a.shape[2:]) == 1 else a
        rank = b.shape[0] if b.ndim > 1 else 0
        inside = shape[1:] if c is None else shape[1:2]
        b = self.padded(b, inside)
        good = a.ndim == 2 and tuple(a.shape) == (shape[0], rank) and b.numel() == rank * prod(inside) and rank > 0
        if c is not None:
            good = good and tuple(c.shape) == (rank, rank, *shape[2:])
        if not good:
            sizes = " and ".join(str(tuple(t.shape)) for t in (a, b, c) if t is not None)
            raise self.wrong(f"{left} and {right} are {sizes}, which do not make {shape}")
        return Matrix(b.reshape(rank, *inside), a, c)

    def padded(self, tensor: Tensor, inside: Shape) -> Tensor:
        """For weights of 9 input channels, of which a LoRA made for 4 changes the first 4."""
        rest = prod(inside[1:])
        if (self.place.module, inside[0]) != ("input_blocks.0.0", 9) or tensor.numel() != len(tensor) * 4 * rest:
            return tensor
        return F.pad(tensor.reshape(len(tensor), 4, rest), (0, 0, 0, 5)).reshape(len(tensor), *inside)

    def kronecker(self) -> Delta:
        first, second = (self.half(n) for n in (1, 2))
        p, q = first.shape[:2]
        whole = (p * second.shape[0], q * second.shape[1], *second.shape[2:])
        if whole != self.shape and (*whole, 1, 1) != self.shape:
            raise self.wrong(f"lokr_w1 and lokr_w2 make {whole}, not {self.shape}")
        return Kronecker(self.shape, first, second, self.rank_scale(first.rank or second.rank))

    def half(self, n: int) -> Matrix:
        """lokr_w1 or lokr_w2: whole, or a product, whose shape only the two of them tell."""
        f, word = self.fields, f"lokr_w{n}"
        if word in f:
            whole = f.pop(word)
            if whole.ndim < 2 or (n == 1 and whole.ndim > 2):
                raise self.wrong(f"{word} is {tuple(whole.shape)}")
            return Matrix(whole)
        core = f"lokr_t{n}"
        for side in ("_a", "_b"):
            if f"{word}{side}" not in f or f[f"{word}{side}"].ndim != 2:
                raise self.wrong(f"{word}{side} is missing or misshapen")
        a, b = f[f"{word}_a"], f[f"{word}_b"]
        rows = a.shape[1] if core in f else a.shape[0]
        kernel = self.shape[2:] if n == 2 else ()
        columns = b.shape[1] if core in f else b.shape[1] // prod(kernel)
        return self.matrix(f"{word}_a", f"{word}_b", core, (rows, columns, *kernel))

    # ---- other kinds

    def generalized(self) -> Delta:
        a1, a2, b1, b2 = (self.take(f"{word}.weight") for word in ("a1", "a2", "b1", "b2"))
        if b1.shape[0] != self.shape[0]:  # LyCORIS before 2.0 had them the other way round
            a1, a2, b1, b2 = a2, a1, b2, b1
        self.fields |= {"up": b1, "down": b2}
        if "bm.weight" in self.fields:
            self.fields["mid"] = self.take("bm.weight")
        b = self.matrix("up", "down", "mid")
        a1, a2 = a1.flatten(1), a2.flatten(1)
        rank, width = b.rank, self.shape[1]
        if (tuple(a1.shape), tuple(a2.shape)) != ((width, a1.shape[1]), (a1.shape[1], width)):
            raise self.wrong(f"a1 and a2 are {tuple(a1.shape)} and {tuple(a2.shape)}, for {width} inputs")
        return Generalized(self.shape, a1, a2, b, self.rank_scale(rank))

    def scaling(self) -> Delta:
        if "ia3_l" in self.fields:  # PEFT's multiplies, and its shape says what: (O, 1) or (1, I)
            factors = self.take("ia3_l")
            if factors.ndim > 2 and self.shape[0] == self.shape[1]:
                raise self.wrong("IA3 of PEFT does not tell whether it is of the inputs or of the outputs")
            on_input = factors.ndim > 1 and factors.shape[0] == 1 and factors.shape[1] == self.shape[1]
            factors = factors.double().flatten() - 1
        else:
            factors, on_input = self.take("weight").flatten(), bool(self.take("on_input").item())
        wanted = self.shape[1 if on_input else 0]
        if len(factors) != wanted:
            raise self.wrong(f"IA3 has {len(factors)} factors for {wanted} {'inputs' if on_input else 'outputs'}")
        return Scaling(self.shape, factors, on_input)

    def difference(self, tensor: Tensor, shape: Shape | None, scale: float = 1.0) -> Delta:
        if shape is None:
            raise self.wrong("it changes a bias, and this layer has none")
        tensor = self.padded(tensor, shape[1:]) if len(shape) > 1 else tensor
        if tensor.numel() != prod(shape) or tensor.shape[0] != shape[0]:
            raise self.wrong(f"a difference is {tuple(tensor.shape)}, not {shape}")
        return Difference(shape, tensor.reshape(shape), scale)

    def decomposed(self, inner: Delta) -> Delta:
        """DoRA around it, where there are magnitudes; their shape says whether of rows or of columns."""
        if "magnitude" in self.fields:  # PEFT's, always of rows
            magnitude, on_input = self.take("magnitude"), False
        elif "dora_scale" in self.fields:
            magnitude = self.take("dora_scale")
            on_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 and self.shape[0] != 1
        else:
            return inner
        wanted = self.shape[1 if on_input else 0]
        if magnitude.numel() != wanted:
            raise self.wrong(f"DoRA has {magnitude.numel()} magnitudes for {wanted}")
        return Decomposed(inner, magnitude.flatten(), on_input)
