"""`lora`: a model with a LoRA or one of its kin added, beside the model that it is given.

An adapted weight is W + the sum over adapters of scale * delta (`deltas.py`). Where weights are computed with as they
lie in memory, it is made when its part is first used (`merged`, by `sd/weights/unread.py`). Where they are streamed
out of their file, deltas are added to each piece (`add_`, by `sd/lean/stream.py`). Always from W itself: nothing is
ever subtracted, so a scale of 0 is the plain model to the last bit.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..files import shown
from ..model import StableDiffusion
from ..weights.unread import Patch, Target, patches_of, sharing
from .adapter_files import AdapterFile, Parameter, read_adapter
from .deltas import Delta, spans
from .dialects import PARTS, parts_of

ALL = slice(None)
Scale = float | Mapping[str, float]  # of both parts, or {"unet": 0.8, "text": 0.5}


class Adapter:
    """A LoRA in a model, as `model.adapters` lists them.

    name, dialect, kinds, ranks, digest   of the file
    scales      how much of it is added to each part: {"unet": 0.8, "text": 0.8}; `sd.study.scale` changes it
    matched     the modules that it changes: "unet.input_blocks.1.1.proj_in" -> "LoRA"
    unmatched   names in the file that belong to no module of the model
    """

    def __init__(self, file: AdapterFile, name: str, scales: dict[str, float]):
        self.file, self.name, self.scales = file, name, scales

    dialect = property(lambda self: self.file.dialect)
    kinds = property(lambda self: self.file.kinds)
    ranks = property(lambda self: self.file.ranks)
    digest = property(lambda self: self.file.digest)

    @property
    def matched(self) -> dict[str, str]:
        return {f"{place.part}.{place.module}": kind for place, kind in self.file.matched.items()}

    @property
    def unmatched(self) -> list[str]:
        return list(self.file.unmatched)

    @property
    def scale(self) -> float | dict[str, float]:
        """One number where both parts have the same."""
        return next(iter(self.scales.values())) if len({*self.scales.values()}) == 1 else dict(self.scales)

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, scale={self.scale})"

    def __str__(self) -> str:
        """What was matched, for people."""
        counts = {part: sum(name.startswith(part) for name in self.matched) for part in self.scales}
        ranks = f", rank {' '.join(map(str, self.ranks))}" if self.ranks else ""
        lines = [
            f"{self.name}: {', '.join(self.kinds)}{ranks}, names as of {self.dialect}, scale {self.scale}",
            f"changes {counts['unet']} modules of the UNet and {counts['text']} of the text encoder",
        ]
        if self.unmatched:
            lines.append(f"not used: {some(self.unmatched)}, which belong to no module of this model")
        return "\n".join(lines)


def some(names: Sequence[str], most: int = 3) -> str:
    """Some of many names, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name, 80) for name in names[:most]) + more


class Adapted(Patch):
    """What adapters add to one weight; the scales are those that they have when it is asked."""

    def __init__(self, base: Tensor, part: str, deltas: Sequence[tuple[Adapter, Delta]]):
        self.base, self.part, self.deltas = base, part, list(deltas)

    def active(self) -> list[tuple[float, Delta]]:
        return [(by, delta) for adapter, delta in self.deltas if (by := adapter.scales[self.part])]

    def add_(self, out: Tensor, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """out: these rows and columns of the weight itself, contiguous, in float32 or float64; adapted in place."""
        active = self.active()
        given = out.clone() if any(delta.of_base for _, delta in active) else None
        for by, delta in active:
            delta.add_(out, rows, columns, by, given, self.base)
        return out

    def add_to(self, copy: Tensor, rows: slice = ALL, columns: slice = ALL) -> None:
        """`add_`, to a copy of these rows and columns in any dtype."""
        work = torch.promote_types(copy.dtype, torch.float32)
        if copy.dtype == work:
            self.add_(copy, rows, columns)
        elif self.active():
            copy.copy_(self.add_(copy.to(work), rows, columns))

    def merged(self, target: Target) -> Tensor:
        """The adapted weight, in memory of its own; computed in float32 or float64, and then converted."""
        return self.into(torch.empty(self.base.shape, dtype=target[1], device=target[0]))

    def into(self, out: Tensor) -> Tensor:
        """Write the adapted weight there, by pieces."""
        work = torch.promote_types(out.dtype, torch.float32)
        for rows in spans(len(out), out.numel()):
            piece = self.base[rows]
            if self.active():
                piece = piece.to(out.device, work, copy=True, memory_format=torch.contiguous_format)
                self.add_(piece, rows)
            out[rows] = piece
        return out


class Adapters(Sequence[Adapter]):
    """The adapters of a model in the order in which they were added, and what they make of each weight."""

    def __init__(self, adapters: Iterable[Adapter] = (), patches: Mapping[Parameter, Adapted] | None = None):
        self.list, self.patches = list(adapters), dict(patches or {})

    def __getitem__(self, index: Any) -> Any:
        return self.list[index]

    def __len__(self) -> int:
        return len(self.list)

    def __repr__(self) -> str:
        return repr(self.list)

    def named(self, name: str) -> Adapter:
        """The adapter of this name. Raises ValueError."""
        found = next((adapter for adapter in self.list if adapter.name == name), None)
        if found is None:
            there = f"it has {', '.join(a.name for a in self.list)}" if self.list else "sd.lora adds one"
            raise ValueError(f"The model has no adapter that is called {shown(name)}: {there}.")
        return found

    def of_part(self, part: str) -> dict[str, Adapted]:
        """By the names of the parameters of "unet" or "text"."""
        return {name: patch for (where, name), patch in self.patches.items() if where == part}


def lora(
    model: StableDiffusion, path: str | os.PathLike[str], scale: Scale = 1.0, *, name: str | None = None
) -> StableDiffusion:
    """A model with a LoRA, or one of its kin, added to its UNet and its text encoder.

    model   stays as it is, to the last bit; all weights that the LoRA does not change are shared with it
    path    a .safetensors file, a .pt, .ckpt or .bin, or a folder that PEFT or diffusers wrote
    scale   how much of it is added: any finite number; 0 gives the plain model. {"unet": 0.8, "text": 0.5} tells them
            apart
    name    by which `sd.study.scale` and `model.adapters` call it; the file's, if not given

    Files of kohya's scripts, LyCORIS, diffusers, PEFT, SimpleTuner and ComfyUI are understood; of kinds, LoRA of
    linear layers and convolutions (LoCon, Tucker), LoHa, LoKr, GLoRA, IA3, DoRA, whole differences, and changes of
    norms and biases. Several are added one after another, and all act. Nothing is computed before the model is used.

    The model that is returned lists them in `model.adapters`, each with what it matched. Warns (UserWarning) of
    tensors that belong to no module of the model. Raises LoadError or CheckpointError, both ValueErrors, in one
    sentence, for a file of another model or of no dialect, for what does not fit, and for NaN.
    """
    scales = checked_scale(scale)
    if any(isinstance(module.__dict__.get("forward"), FunctionType) for module in model.unet.modules()):
        raise ValueError("This model was compiled by sd.fast: add the LoRA first, and take sd.fast of the result.")
    file = read_adapter(path, model)
    if file.unmatched:
        warnings.warn(
            f"{file.path}: {len(file.unmatched)} tensors belong to no module of this model and are not used "
            f"({some(file.unmatched)}).",
            stacklevel=2,
        )
    adapters = [Adapter(a.file, a.name, dict(a.scales)) for a in model.adapters]
    adapters.append(Adapter(file, free_name(name or file.name, adapters), scales))
    return with_adapters(model, adapters)


def checked_scale(scale: Any) -> dict[str, float]:
    """Of each part. Raises ValueError for what is no finite number."""
    scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(PARTS, scale)
    for number in scales.values():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"scale must be a finite number, such as 0.8, not {shown(number)}.")
    if not scales.keys() <= set(PARTS):
        raise ValueError(f'A scale of parts is like {{"unet": 0.8, "text": 0.5}}, not {shown(scale)}.')
    return {part: float(scales.get(part, 0.0)) for part in PARTS}


def free_name(name: str, adapters: Iterable[Adapter]) -> str:
    """This name, or with a number after it where it is taken."""
    taken = {adapter.name for adapter in adapters}
    return next(n for n in chain([name], (f"{name}-{k}" for k in count(2))) if n not in taken)


def with_adapters(model: StableDiffusion, adapters: Sequence[Adapter]) -> StableDiffusion:
    """The model with these adapters in place of those that it has; it shares all other weights."""
    parts, before = parts_of(model), getattr(model.adapters, "patches", {})
    deltas: dict[Parameter, list[tuple[Adapter, Delta]]] = {}
    for adapter in adapters:
        for key, delta in adapter.file.deltas.items():
            deltas.setdefault(key, []).append((adapter, delta))
    patches = {}
    for (part, name), added in deltas.items():
        known = before.get((part, name))
        base = known.base if known else parts[part].get_parameter(name).detach()
        patches[part, name] = Adapted(base, part, added)
    listed = Adapters(adapters, patches)
    unet, vae = sharing(model.unet, listed.of_part("unet")), sharing(model.vae, {})
    text = model.text.with_model(sharing(model.text.model, listed.of_part("text")))
    result = model.with_parts(unet, vae, text)
    result.adapters = listed
    for adapter in adapters:
        if not any(adapter.file is old.file for old in model.adapters):
            result.files = result.files.and_maps_of(adapter.file.files)
    return result


def rescale(model: StableDiffusion, adapter: Adapter, scales: Mapping[str, float]) -> None:
    """Give one of a model's adapters other scales.

    Weights that are merged are merged anew, in place, from what they were without any adapter, so that what was made
    of them (packed weights of `sd.fast`) notices. Others are merged, or streamed, with these scales in their turn.
    """
    changed = {part for part in PARTS if adapter.scales[part] != scales[part]}
    adapter.scales = dict(scales)
    for part, module in parts_of(model).items():
        waiting = patches_of(module) if part in changed else {}
        for name, patch in model.adapters.of_part(part).items() if part in changed else ():
            if name not in waiting and any(other is adapter for other, _ in patch.deltas):
                parameter = module.get_parameter(name)
                with torch.inference_mode(False), torch.no_grad():
                    patch.into(parameter)
