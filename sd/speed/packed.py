"""Products and convolutions by oneDNN, with weights that stand in its own layout.

On x86 PyTorch computes float32 products by MKL, which is slow on processors of another maker (half of oneDNN's rate,
as measured on Zen 5), and convolutions by oneDNN, which puts the weights in its blocked layout again in every call:
half of the time where images are small. These operators, made for torch.compile, take weights in that layout.

Elsewhere (other dtypes, devices and processors, or with oneDNN switched off) the usual operators do the same.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

X86 = platform.machine().lower() in ("x86_64", "amd64")


def onednn(x: Tensor) -> bool:
    """Whether oneDNN computes with `x`: in float32, and in bfloat16 where that is faster."""
    here = x.device.type == "cpu" and X86 and torch.backends.mkldnn.is_available()
    here = here and bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return here and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and bfloat16_gain() > 1))


@cache
def bfloat16_gain() -> float:
    """How many times as fast as in float32 oneDNN multiplies matrices in bfloat16 on this machine.

    Found by trying, once a process (30 ms): processors that have AMX or avx512_bf16 gain, others lose. 0 where there
    is no such product.
    """
    if not X86 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0.0
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(1024, 640, dtype=dtype), torch.ones(640, 640, dtype=dtype)
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        times = []
        for _ in range(4):
            start = time.perf_counter()
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


class Derived:
    """Something made of weights on first use, and again when they, or what it is made for, have changed.

    Noticed are other memory, another dtype, and a change in place, but for one through `.data`.
    """

    def __init__(self, make: Callable[..., Any], *weights: Tensor | None):
        self.make = make
        self.weights = [w for w in weights if w is not None]
        self.kept: tuple[Any, Any] | None = None  # in one, so that no thread sees the one without the other

    def __call__(self, *key: Any) -> Any:
        stamp = (key, *((w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in self.weights))
        kept = self.kept
        if kept is None or kept[0] != stamp:
            self.kept = kept = None  # before the next is made: never two in memory
            kept = self.kept = stamp, self.make(*key)
        return kept[1]

    def forget(self) -> None:
        self.kept = None


def no_bias() -> None:
    """The bias of a layer without one."""


class Linear:
    """x (..., K) -> x weight^T + bias (..., N), for weight (N, K). `gelu`: the exact GELU of that.

    weight, bias   functions that give them, made of `sources`; the weight in any dtype, as it is in a file
    pack           keep the weight in oneDNN's layout, which takes its memory once more
    """

    def __init__(
        self, weight: Callable[[], Tensor], *sources: Tensor, bias: Callable[[], Any] = no_bias, pack: bool = True
    ):
        self.weight, self.bias, self.pack = weight, bias, pack
        self.packed = Derived(self._pack, *sources)

    def _pack(self, dtype: torch.dtype, rows: int) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight().to(dtype).contiguous(), rows)

    def __call__(self, x: Tensor, rows: int | None = None, gelu: bool = False) -> Tensor:
        """rows: how many to pack for, where the next calls have more than this one."""
        flat = x.reshape(-1, x.shape[-1])
        if not onednn(x) or len(flat) < 16:  # a few rows: the time goes into reading the weight in any case
            y = F.linear(x, self.weight().to(x.dtype), self.bias())
            return F.gelu(y) if gelu else y
        weight = self.packed(x.dtype, rows or len(flat)) if self.pack else self.weight().to(x.dtype).contiguous()
        post: tuple[Any, ...] = ("gelu", [], "none") if gelu else ("none", [], "")
        y = torch.ops.mkldnn._linear_pointwise(flat, weight, self.bias(), *post)
        return y.view(*x.shape[:-1], y.shape[-1])


class Conv:
    """x (B, H, W, C) -> (B, H', W', O): a convolution of weight (O, C, kh, kw) over pixels with channels last."""

    def __init__(
        self,
        weight: Callable[[], Tensor],
        *sources: Tensor,
        bias: Callable[[], Any] = no_bias,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        pack: bool = True,
    ):
        self.weight, self.bias, self.pack = weight, bias, pack
        self.stride, self.padding, self.groups = stride, padding, groups
        self.packed = Derived(self._pack, *sources)

    def _pack(self, dtype: torch.dtype, *shape: int) -> Tensor:
        around = [[n, n] for n in (self.padding, self.stride, 1)]
        weight = self.weight().to(dtype).contiguous()
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *around, self.groups, list(shape))

    def __call__(self, x: Tensor) -> Tensor:
        y = x.permute(0, 3, 1, 2)
        if onednn(x) and self.pack:
            around = [[n, n] for n in (self.padding, self.stride, 1)]
            rest = (self.bias(), *around, self.groups, "none", [], "")
            y = torch.ops.mkldnn._convolution_pointwise(y, self.packed(y.dtype, *y.shape), *rest)
        else:
            y = F.conv2d(y, self.weight().to(x.dtype), self.bias(), self.stride, self.padding, groups=self.groups)
        return y.permute(0, 2, 3, 1).contiguous()
