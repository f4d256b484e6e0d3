"""Weights where and when they are used: a model computes while most of it stays in its file.

`Weights.parts` gives some rows of a weight, ready to compute with. A weight that lies in the file's
memory map in another dtype, or on another device, is copied into a buffer that the next piece reuses; what is kept
(`Weights.keep`) is copied once. What a LoRA adds to these rows is added to the copy. `Streamed` are the operations of
a model whose layers ask for their weights in this way, and write in place where they can.

Large layers come in pieces of output channels, and the feed-forward in pieces of its inner width, so that neither
a whole layer nor its widest activation need exist. Each output is computed as before, by the same sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt.adapters import Adapted
from ..adapt.own_words import LongerEmbedding
from ..attention import GEGLU, FeedForward
from ..operations import NormSiLUConvolution, Operations
from ..weights.unread import Patch

Part = tuple[Tensor, Any]  # a weight, and which part of it: an index
Key = tuple[tuple[int, int], ...]
ALL = slice(None)


def do_nothing() -> None:
    pass


class Weights:
    """Of a model whose parameters stay where they are, given out in `dtype`; pieces of at most `size` elements.

    On the CPU. The buffer is valid until the next piece is asked for. `tidy` is called before each piece.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        size: int = 1 << 22,
        tidy: Callable[[], None] = do_nothing,
    ):
        self.tidy = tidy
        self.dtype, self.size = dtype, size
        self.device = torch.empty(0, device=device).device  # "cuda" is "cuda:0" or another: tensors know which
        self.kept: dict[Tensor, Tensor] = {}
        self.buffer: Tensor | None = None
        self.patches: dict[Tensor, Adapted] = {}

    def patch(self, part: nn.Module, patches: Mapping[str, Patch]) -> None:
        """Give out these weights of a part, by name, with what a LoRA adds to them."""
        for name, patch in patches.items():
            assert isinstance(patch, Adapted)
            self.patches[part.get_parameter(name)] = patch

    def patched(self, weight: Tensor, copy: Tensor, index: Any = ALL) -> Tensor:
        """A copy of a part of a weight, with what is added to it there, in place."""
        if patch := self.patches.get(weight):
            patch.add_to(copy, *index if isinstance(index, tuple) else (index,))
        return copy

    def whole(self, weight: Tensor) -> Tensor:
        """A copy that stays (or the weight itself, if it is as it should be)."""
        if weight in self.kept:
            return self.kept[weight]
        patch = self.patches.get(weight)
        return patch.merged((self.device, self.dtype)) if patch else weight.detach().to(self.device, self.dtype)

    def small(self, weight: Tensor) -> Tensor:
        """A bias, or the gain of a norm: those of a model are about 1 MB, and always kept."""
        if weight not in self.kept:
            self.kept[weight] = self.whole(weight)
        return self.kept[weight]

    def parts(self, *parts: Part) -> list[Tensor]:
        """Some parts of weights, all valid until the next are asked for."""
        self.tidy()
        rows = [self.kept.get(weight, weight).detach()[index] for weight, index in parts]
        ready = [self.ready(weight) for weight, _ in parts]
        wanting = [r for r, is_ready in zip(rows, ready, strict=True) if not is_ready]
        copies = iter(self.copy(wanting)) if wanting else iter(())
        result = [r if is_ready else next(copies) for r, is_ready in zip(rows, ready, strict=True)]
        for (weight, index), piece, is_ready in zip(parts, result, ready, strict=True):
            if not is_ready:
                self.patched(weight, piece, index)
        return result

    def copy(self, rows: Sequence[Tensor]) -> list[Tensor]:
        count = sum(r.numel() for r in rows)
        if self.buffer is None or self.buffer.numel() < count:
            self.buffer = torch.empty(max(count, self.size), dtype=self.dtype, device=self.device)
        places = self.buffer[:count].split([r.numel() for r in rows])
        return [place.view(r.shape).copy_(r) for place, r in zip(places, rows, strict=True)]

    def ready(self, weight: Tensor) -> bool:
        """Whether a weight needs no copy."""
        as_it_is = weight.dtype == self.dtype and weight.device == self.device and weight not in self.patches
        return weight in self.kept or as_it_is

    def pieces(self, weight: Tensor) -> list[tuple[int, int]]:
        """Into which rows a weight is cut: one piece if it is kept or needs no copy."""
        rows = weight.shape[0]
        count = 1 if self.ready(weight) else -(-weight.numel() // self.size)
        step = -(-rows // count)
        return [(a, min(a + step, rows)) for a in range(0, rows, step)]

    def keep(self, weights: Iterable[Tensor], budget: int) -> int:
        """Copy as many weights, in this order, as `budget` bytes hold; returns the bytes used."""
        used = 0
        for weight in weights:
            size = weight.numel() * self.dtype.itemsize
            if not self.ready(weight) and used + size <= budget:
                self.kept[weight] = self.whole(weight)
                used += size
        return used

    def refresh(self) -> None:
        """Copy what is kept and changed by a LoRA once more: its scale is another now."""
        for weight, patch in self.patches.items():
            if weight in self.kept:
                patch.into(self.kept[weight])

    def release(self) -> None:
        """Let go of everything."""
        self.kept, self.buffer = {}, None


class PinnedWeights(Weights):
    """The same for CUDA: while one piece is computed with, the next one is on its way, on a side stream.

    The order of pieces is learned in the first pass. Host memory holds the weights once, pinned.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        size: int = 1 << 22,
        tidy: Callable[[], None] = do_nothing,
    ):
        super().__init__(dtype, device, size, tidy)
        self.stream = torch.cuda.Stream(self.device)
        self.arrived = [torch.cuda.Event(), torch.cuda.Event()]
        self.pinned: dict[Key, Tensor] = {}
        self.release()

    def release(self) -> None:
        super().release()
        self.slots: list[Tensor | None] = [None, None]
        self.follows: dict[Key, Sequence[Tensor]] = {}  # what came after a piece in the pass before
        self.coming: tuple[Key, int] | None = None  # what is on its way, and to which slot
        self.last: Key | None = None
        self.turn = 0

    def copy(self, rows: Sequence[Tensor]) -> list[Tensor]:
        if any(r.device.type != "cpu" for r in rows):  # of a part that lives on some GPU
            return [r.to(self.device, self.dtype, copy=True, memory_format=torch.contiguous_format) for r in rows]
        key, compute = key_of(rows), torch.cuda.current_stream(self.device)
        # All that uses the slot whose turn it is has been queued by now: it may be filled once that is done.
        self.stream.wait_stream(compute)
        if self.coming is not None and self.coming[0] == key:
            slot = self.coming[1]
        else:
            slot = self.turn
            self.send(rows, slot)
        compute.wait_event(self.arrived[slot])
        if self.last is not None:
            self.follows[self.last] = rows
        self.last, self.turn, self.coming = key, 1 - slot, None
        if (following := self.follows.get(key)) is not None:
            self.send(following, self.turn)
            self.coming = key_of(following), self.turn
        buffer = self.slots[slot]
        assert buffer is not None
        places = buffer[: sum(r.numel() for r in rows)].split([r.numel() for r in rows])
        return [place.view(r.shape) for place, r in zip(places, rows, strict=True)]

    def send(self, rows: Sequence[Tensor], slot: int) -> None:
        key = key_of(rows)
        if key not in self.pinned:
            self.pinned[key] = torch.cat([r.to(self.dtype).flatten() for r in rows]).pin_memory()
        source, buffer = self.pinned[key], self.slots[slot]
        if buffer is None or buffer.numel() < source.numel():
            buffer = torch.empty(max(source.numel(), self.size), dtype=self.dtype, device=self.device)
            buffer.record_stream(self.stream)
            self.slots[slot] = buffer
        with torch.cuda.stream(self.stream):
            buffer[: source.numel()].copy_(source, non_blocking=True)
            self.arrived[slot].record(self.stream)


def key_of(rows: Sequence[Tensor]) -> Key:
    return tuple((r.data_ptr(), r.numel()) for r in rows)


def weights_on(
    device: torch.device | str, dtype: torch.dtype, size: int, tidy: Callable[[], None] = do_nothing
) -> Weights:
    kind = PinnedWeights if torch.device(device).type == "cuda" else Weights
    return kind(dtype, device, size, tidy)


# ---- layers that ask for their weights


class Streamed(Operations):
    """`weights` gives the weights; `known` has what some layers give for a whole request, which is computed once."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.known: dict[nn.Module, Callable[[], Tensor]] = {}

    def norm_silu_conv(self, layers: NormSiLUConvolution, x: Tensor, add: Tensor | None = None) -> Tensor:
        if add is None:  # the last of the UNet, which is small
            return layers(x)
        return layers.conv(F.silu(layers.norm(x), inplace=True)).add_(add)


def streamed_linear(ops: Streamed, layer: nn.Linear, x: Tensor) -> Tensor:
    if layer in ops.known:
        return ops.known[layer]()
    weights = ops.weights
    bias = None if layer.bias is None else weights.small(layer.bias)
    pieces = weights.pieces(layer.weight)
    if len(pieces) == 1:
        return F.linear(x, weights.parts((layer.weight, ALL))[0], bias)
    out = x.new_empty(*x.shape[:-1], layer.out_features)
    for a, b in pieces:
        (weight,) = weights.parts((layer.weight, slice(a, b)))
        out[..., a:b] = F.linear(x, weight, None if bias is None else bias[a:b])
    return out


def streamed_conv(ops: Streamed, layer: nn.Conv2d, x: Tensor) -> Tensor:
    weights = ops.weights
    bias = None if layer.bias is None else weights.small(layer.bias)
    pieces, out = weights.pieces(layer.weight), None
    for a, b in pieces:
        (weight,) = weights.parts((layer.weight, slice(a, b)))
        part = None if bias is None else bias[a:b]
        y = F.conv2d(x, weight, part, layer.stride, layer.padding)
        if len(pieces) == 1:
            return y
        if out is None:
            out = y.new_empty(len(y), layer.out_channels, *y.shape[2:])
        out[:, a:b] = y
    assert out is not None
    return out


def streamed_group_norm(ops: Streamed, layer: nn.GroupNorm, x: Tensor) -> Tensor:
    small = ops.weights.small
    return F.group_norm(x, layer.num_groups, small(layer.weight), small(layer.bias), layer.eps)


def streamed_layer_norm(ops: Streamed, layer: nn.LayerNorm, x: Tensor) -> Tensor:
    small = ops.weights.small
    return F.layer_norm(x, layer.normalized_shape, small(layer.weight), small(layer.bias), layer.eps)


def streamed_embedding(ops: Streamed, layer: nn.Embedding, ids: Tensor) -> Tensor:
    """Only the rows that are asked for leave the file."""
    rows = F.embedding(ids.to(layer.weight.device), layer.weight.detach())
    return rows.to(ops.weights.device, ops.weights.dtype)


def streamed_longer_embedding(ops: Streamed, layer: LongerEmbedding, ids: Tensor) -> Tensor:
    return layer.rows(ids.to(layer.weight.device), ops.weights.dtype).to(ops.weights.device)


def streamed_feed_forward(ops: Streamed, layer: FeedForward, x: Tensor) -> Tensor:
    """GEGLU and the projection after it, over pieces of the inner width and of the tokens."""
    weights, geglu, out_layer = ops.weights, layer.net[0], layer.net[2]
    assert isinstance(geglu, GEGLU)
    assert isinstance(out_layer, nn.Linear)
    proj, last = geglu.proj.weight, out_layer.weight
    proj_bias, bias = weights.small(geglu.proj.bias), weights.small(out_layer.bias)
    inner, width = last.shape[1], last.shape[0]
    cut = 1 if weights.ready(proj) and weights.ready(last) else -(-3 * inner * width // weights.size)
    step = -(-inner // cut)
    flat = x.flatten(0, -2)  # (B*T, C)
    out = bias.repeat(
        len(flat), 1
    )  # written into below, so never the bias itself, as `expand` gives it for one token
    tokens = max(64, weights.size // (4 * step))
    for a in range(0, inner, step):
        b = min(a + step, inner)
        halves = slice(a, b), slice(inner + a, inner + b)
        up, gate, down = weights.parts((proj, halves[0]), (proj, halves[1]), (last, (ALL, halves[0])))
        for x_part, out_part in zip(flat.split(tokens), out.split(tokens), strict=True):
            h = F.gelu(F.linear(x_part, gate, proj_bias[halves[1]]))
            out_part.addmm_(h.mul_(F.linear(x_part, up, proj_bias[halves[0]])), down.T)
    return out.view(x.shape)


Streamed.layers = {
    nn.Linear: streamed_linear,
    nn.Conv2d: streamed_conv,
    nn.GroupNorm: streamed_group_norm,
    nn.LayerNorm: streamed_layer_norm,
    nn.Embedding: streamed_embedding,
    LongerEmbedding: streamed_longer_embedding,
    FeedForward: streamed_feed_forward,
}
