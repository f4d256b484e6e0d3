"""What a person says of a source that its files do not tell: `config` of `sd.load`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

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
    if "prediction_type" not in said and found.prediction.guessed:
        warnings.warn(
            f"{found.name} does not say what it predicts: by {found.prediction.by} it is {found.prediction.kind}. If "
            'its pictures look wrong, say so with config={"defaults": {"prediction_type": ...}} (--config).',
            stacklevel=3,
        )
    if not said:
        return sizes
    try:
        if (kind := said.get("prediction_type")) is not None:
            decide(found, Prediction(str(kind), "config"))
        own = (found.defaults or Defaults()).as_dict()
        schedule = own["schedule"] | dict(said.get("schedule", {}))
        schedule["prediction_type"] = kind or own["prediction_type"]
        found.defaults = Defaults.from_dict({**own, **said, "schedule": schedule})
    except (ValueError, TypeError) as error:
        raise LoadError(f"config: the defaults cannot be used ({error}): give fields of sd.Defaults.") from None
    return sizes
