"""Which call of the UNet is under way: instruments listen to what the sampler announces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..model import StableDiffusion
from ..sampler import Call, current_call

Now = Callable[[], Call | None]


def model_of(model: Any) -> StableDiffusion:
    """The model itself, or that of a sampler."""
    model = getattr(model, "model", model)
    if not isinstance(model, StableDiffusion):
        raise ValueError(f"An instrument looks at a model or a sampler, as sd.load gives it, not at {model!r}.")
    return model


@contextmanager
def listen(model: StableDiffusion, nets: Iterable[nn.Module] = ()) -> Iterator[Now]:
    """Within the block, a function that says which call of the UNet is under way in this thread, or None.

    A call that no sampler announced is a run of its own: step 0, and all rows are told what to draw.
    nets: ControlNets, whose calls count as well; they come before the UNet's.
    """
    under_way: dict[int, list[Call]] = {}  # of each thread

    def enter(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = current_call() or Call()
        if not call.images:  # the denoiser was called without the loop, or the UNet without either
            x, t = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("x", "t")))
            images = len(x) // 2 if call.half == "both" else len(x)
            call = replace(call, images=images, size=(x.shape[-2], x.shape[-1]), timestep=float(t.flatten()[0]))
        under_way.setdefault(threading.get_ident(), []).append(call)

    def leave(unet: nn.Module, args: Any, out: Any) -> None:
        calls = under_way.get(threading.get_ident())
        if calls:
            calls.pop()

    def now() -> Call | None:
        calls = under_way.get(threading.get_ident())
        return calls[-1] if calls else None

    handles = []
    for network in (model.unet, *nets):
        handles.append(network.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(network.register_forward_hook(leave, always_call=True))  # after the hooks that are there
    try:
        yield now
    finally:
        for handle in handles:
            handle.remove()


def rows_of(call: Call, rows: int) -> tuple[slice, slice]:
    """Of a batch of `rows`, those that are told the prompt, and those that are told the negative prompt."""
    first = {"both": rows // 2, "cond": 0, "uncond": rows}[call.half]
    return slice(first, rows), slice(0, first)
