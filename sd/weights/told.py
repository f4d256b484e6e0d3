"""What a person says beside a source: `config` and `device` of `sd.load`, and where a file is to be written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import read_json
from . import names
from .configs import LoadError
from .defaults import Defaults
from .predictions import Prediction
from .source import Source, decide

DEFAULTS = "defaults"  # beside the parts: fields of Defaults


def read_config(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    """A config as it is given, or from a JSON file. Raises LoadError unless it has its form."""
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        try:
            config = read_json(config, "The config")
        except ValueError as error:
            raise LoadError(str(error)) from None
    parts = {*names.PARTS, DEFAULTS}
    fields_of = config.values() if isinstance(config, Mapping) else ()
    if (
        not isinstance(config, Mapping)
        or not config.keys() <= parts
        or not all(isinstance(fields, Mapping) for fields in fields_of)
    ):
        raise LoadError(
            'A config is of the form {"unet": {...}, "vae": {...}, "text": {...}, "defaults": {...}}, of which '
            "any may be left out."
        )
    return dict(config)


def apply_config(found: Source, config: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    """Let what is said of drawing ("defaults" of a config) stand before what the source says; returns the rest."""
    sizes = read_config(config)
    said = dict(sizes.pop(DEFAULTS, {}))
    schedule = said.get("schedule")
    of_schedule = schedule.get("prediction_type") if isinstance(schedule, Mapping) else None
    kind = said.get("prediction_type", of_schedule)
    if kind is None and found.prediction.guessed:
        warnings.warn(
            f"{found.name} does not say what it predicts: by {found.prediction.by} it is {found.prediction.kind}. If "
            'its pictures look wrong, say so with config={"defaults": {"prediction_type": ...}} (--config).',
            stacklevel=3,
        )
    if not said:
        return sizes
    try:
        if kind is not None:
            decide(found, Prediction(str(kind), "config"))
        own = (found.defaults or Defaults()).as_dict()
        predicts = kind or own["prediction_type"]
        schedule = own["schedule"] | {"prediction_type": predicts} | dict(said.get("schedule", {}))
        found.defaults = Defaults.from_dict({**own, **said, "prediction_type": predicts, "schedule": schedule})
    except (ValueError, TypeError) as error:
        raise LoadError(f"config: the defaults cannot be used ({error}): give fields of sd.Defaults.") from None
    return sizes


def check_device(device: str | torch.device) -> None:
    """Raise LoadError unless this torch can compute there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # as torch says it, by kind of device
        raise LoadError(
            f"There is no device {str(device)!r} here: try cpu (--device cpu), or install a torch that has it."
        ) from None


def places(device: str | torch.device | Mapping[str, str | torch.device]) -> dict[str, torch.device]:
    """The device of each part."""
    if not isinstance(device, Mapping):
        return dict.fromkeys(names.PARTS, torch.device(device))
    if "unet" not in device or not device.keys() <= set(names.PARTS):
        raise LoadError(f'device is a name, or like {{"unet": "cuda:0", "vae": "cuda:1"}}, not {device}.')
    return {part: torch.device(device.get(part, device["unet"])) for part in names.PARTS}


def checked_path(path: str | os.PathLike[str], what: str, force: bool) -> Path:
    """Where a file of weights is to be written. Raises LoadError; what: of "models", say."""
    path = Path(path)
    if path.exists() and not force:
        raise LoadError(f"{path} exists: choose another name, or write over it with force (--force).")
    if path.suffix != ".safetensors":
        raise LoadError(f"{path} must end in .safetensors, the form in which {what} are written.")
    return path
