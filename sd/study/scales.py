"""`scale`: how much of a LoRA is added, changed for a while, or from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..adapt.adapters import Adapters, Scale, checked_scale, rescale
from ..sampler import current_call
from .calls import model_of

Setter = Callable[[Scale], None]


@contextmanager
def scale(model: Any, name: str, value: Scale | Callable[[int], Scale]) -> Iterator[Setter]:
    """Within the block, one of a model's adapters has another scale; after it, its own, to the last bit.

        with sd.study.scale(model, "style", 0.4):
            sampler("a red star")
        with sd.study.scale(model, "style", lambda step: 1 - step / 30):
            sampler("a red star", num_inference_steps=30)
        with sd.study.scale(model, "style", 0.0) as change:
            for step in sampler.stream("a red star"):
                change(0.1 * step.index)  # for the next step

    model   to which `sd.lora` has added it, or a sampler of that; of `sd.fast`, the very model that is drawn with
    name    of the adapter, as `model.adapters` lists them
    value   a finite number, one for each part ({"unet": 0.4, "text": 0.8}), or a function of the step, from 0. Texts
            are encoded before the first step, with what the function gives for 0

    Weights that lie in memory are merged anew at every change, which takes about as long as merging them did; weights
    that are streamed (`LeanSampler`) just come with another scale. Raises ValueError for an adapter that there is
    not, and for a scale that is no finite number.
    """
    model = model_of(model)
    adapter = (model.adapters if isinstance(model.adapters, Adapters) else Adapters()).named(name)
    first, before = value(0) if callable(value) else value, dict(adapter.scales)
    checked_scale(first)

    def change(to: Scale) -> None:
        rescale(model, adapter, checked_scale(to))

    def follow(unet: nn.Module, inputs: Any) -> None:
        call = current_call()
        if callable(value) and call is not None:
            change(value(call.step))

    handle = model.unet.register_forward_pre_hook(follow, prepend=True) if callable(value) else None
    try:
        change(first)
        yield change
    finally:
        if handle:
            handle.remove()
        rescale(model, adapter, before)
