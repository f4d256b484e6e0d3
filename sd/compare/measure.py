"""Two functions that should return the same: how far apart they are, and how long and how much memory each takes."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Row:
    """One block, ours and theirs on the same inputs."""

    name: str  # "unet.input_blocks.4", "vae.decoder.up.2", "text", "pndm"; "unet (whole)"
    difference: float  # max |ours - theirs| / max |theirs|; inf for NaN or another shape
    bound: float
    seconds: tuple[float, float] | None = None  # ours, theirs: medians
    peak: tuple[int, int] | None = None  # bytes, see `Peak`
    note: str = ""

    @property
    def over(self) -> bool:
        return not self.difference <= self.bound


def relative(got: Tensor, expected: Tensor) -> float:
    """max |got - expected| / max |expected|, in float64; inf where shapes differ or a value is not finite."""
    if got.shape != expected.shape:
        return math.inf
    got, expected = (x.detach().cpu().double() for x in (got, expected))
    difference = (got - expected).abs().max().item() if got.numel() else 0.0
    if difference == 0:
        return 0.0
    result = difference / max(expected.abs().max().item(), 1e-300)
    return result if math.isfinite(result) else math.inf


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it and alive at once; `peak` is the most.

    Weights and inputs are not counted, nor is what a kernel takes and gives back inside itself. So the figure is
    the same on every run and device, which that of the process is not: an allocator keeps what is freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or x.is_meta:
                continue
            if (storage := x.untyped_storage())._cdata not in given:
                given.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def pair(
    name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], bound: float, repeats: int, note: str = ""
) -> tuple[Row, Tensor]:
    """The row of two functions that should return the same, and what ours returned.

    Each runs once for its result and its memory, which also warms it up, then `repeats` times by the clock, in
    turn. With no repeats, neither memory nor time is measured.
    """
    results, peaks = [], []
    for call in (ours, theirs):
        with Peak() if repeats else nullcontext() as mode:
            results.append(call())
        peaks.append(mode.peak if mode else 0)
    difference = relative(*results)
    result = results[0]
    del results
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        for call, into in zip((ours, theirs), times, strict=True):
            into.append(clock(call, result.device))
    if not repeats:
        return Row(name, difference, bound, note=note), result
    seconds = statistics.median(times[0]), statistics.median(times[1])
    return Row(name, difference, bound, seconds, (peaks[0], peaks[1]), note), result


def clock(call: Callable[[], Any], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


Around = Callable[[str, Callable[..., Tensor], tuple, dict], Tensor]  # name, forward, args, kwargs -> result


@contextmanager
def wrapped(modules: Mapping[str, nn.Module], around: Around) -> Iterator[None]:
    """Within the block, a call of one of these modules is `around(name, forward, args, kwargs)`."""
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            forward = module.forward
            module.__dict__["forward"] = lambda *a, _n=name, _f=forward, **k: around(_n, _f, a, k)
        yield
    finally:
        for name, module in modules.items():
            if before[name] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before[name]


def compare_blocks(
    part: str,
    modules: Mapping[str, nn.Module],
    counterparts: Mapping[str, Callable[..., Tensor]],
    run: Callable[[], Any],
    bound: float,
    repeats: int,
) -> list[Row]:
    """Run our model, and beside each of its blocks the counterpart on the same inputs; a row for each."""
    rows = []

    def around(name: str, forward: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
        ours, theirs = (lambda: forward(*args, **kwargs)), (lambda: counterparts[name](*args, **kwargs))
        row, result = pair(f"{part}.{name}", ours, theirs, bound, repeats)
        rows.append(row)
        return result

    with wrapped(modules, around):
        run()
    return rows


@contextmanager
def weights_on_use(modules: Mapping[str, nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Within the block, the weights of these modules are of `dtype` while they run, and as they are otherwise."""

    def around(name: str, forward: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
        kept = [(p, p.data) for p in modules[name].parameters()]
        try:
            for p, data in kept:
                p.data = data.to(dtype)
            return forward(*args, **kwargs)
        finally:
            for p, data in kept:
                p.data = data

    with wrapped(modules, around):
        yield
