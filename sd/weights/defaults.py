"""How a model draws where a call does not say: `Defaults`, and what a scheduler_config.json says of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import read_utf8
from ..scheduler import SCHEDULERS, V1, NoiseSchedule


@dataclass(frozen=True)
class Defaults:
    """How a model draws where a call does not say; the values here are Stable Diffusion v1's.

    Raises ValueError, the rest of a sentence, for what no sampler can take.
    """

    scheduler: str = "pndm"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int | None = None  # pixels; None: the model's size
    width: int | None = None
    prediction_type: str = "epsilon"
    schedule: NoiseSchedule = V1

    def __post_init__(self) -> None:
        def whole(n: Any, low: int, high: int) -> bool:
            return type(n) is int and low <= n <= high

        if self.scheduler not in tuple(SCHEDULERS):
            raise ValueError(f"no scheduler is called {self.scheduler!r}; there are {', '.join(SCHEDULERS)}")
        if not whole(self.num_inference_steps, 1, self.schedule.num_train_timesteps):
            raise ValueError(f"num_inference_steps cannot be {self.num_inference_steps!r}")
        if type(self.guidance_scale) not in (int, float) or not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale cannot be {self.guidance_scale!r}")
        for side in (self.height, self.width):
            if side is not None and not whole(side, 8, 8192):
                raise ValueError(f"height and width cannot be {side!r}")
        if self.prediction_type != "epsilon":
            raise ValueError(f"prediction_type cannot be {self.prediction_type!r}, but is 'epsilon'")
        if self.schedule.prediction_type != self.prediction_type:
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}, and {self.schedule.prediction_type!r} in the schedule"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in the header of a file; `from_dict` takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Defaults:
        """What `as_dict` gave, or a part of it: what is left out is v1's. Raises ValueError, TypeError."""
        schedule = data.get("schedule", {})
        for kind, values in ((cls, data), (NoiseSchedule, schedule)):
            if unknown := sorted(values.keys() - {f.name for f in fields(kind)}):
                raise ValueError(f"there is no default called {unknown[0]!r}")
        for field in fields(NoiseSchedule):
            wanted = (int, float) if isinstance(field.default, float) else (type(field.default),)
            if type(schedule.get(field.name, field.default)) not in wanted:
                raise ValueError(f"{field.name} cannot be {schedule[field.name]!r}")
        if schedule.get("num_train_timesteps", 2) > 100_000 or schedule.get("steps_offset", 0) > 100_000:
            raise ValueError("the noise schedule is longer than 100,000 steps")
        return cls(**{**data, "schedule": NoiseSchedule(**schedule)})


# ---- of the Hub

_SCHEDULE: dict[str, Any] = {  # how a model was trained; how it is sampled is the caller's choice
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}


def check_schedule(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a scheduler_config.json of a model that was trained otherwise than v1."""
    for key, value in _SCHEDULE.items():
        if key in config and config[key] != value:
            raise ValueError(f"it was trained with {key} = {config[key]!r}, and v1 with {value!r}")
    for key in ("beta_start", "beta_end"):
        if key in config and not (type(config[key]) is float and 0 < config[key] < 1):
            raise ValueError(f"it was trained with {key} = {config[key]!r}, which is no share of noise")
    if config.get("beta_start", 0.00085) > config.get("beta_end", 0.012):
        raise ValueError("it was trained with beta_end smaller than beta_start")
    for key, least in (("num_train_timesteps", 2), ("steps_offset", 0)):
        if key in config and not (type(config[key]) is int and least <= config[key] <= 100_000):
            raise ValueError(f"it was trained with {key} = {config[key]!r}, which is no number of steps")
    if not isinstance(config.get("set_alpha_to_one", False), bool):
        raise ValueError(f"it was trained with set_alpha_to_one = {config['set_alpha_to_one']!r}, not true or false")


_SOLVERS = {"PNDMScheduler": "pndm", "DDIMScheduler": "ddim", "LMSDiscreteScheduler": "lms"}
_SCHEDULE_FIELDS = ("beta_start", "beta_end", "num_train_timesteps", "steps_offset", "set_alpha_to_one")


def defaults_from_hub(config: Mapping[str, Any]) -> Defaults:
    """A scheduler_config.json that `check_schedule` let pass -> a model's defaults.

    A solver that is not here leaves v1's, "pndm". A value that is left out is v1's, whatever the class of
    diffusers has: its DDIM would end at abar 1, which is wrong for Stable Diffusion.
    """
    schedule = {key: config[key] for key in _SCHEDULE_FIELDS if key in config}
    if "steps_offset" in schedule:
        schedule["steps_offset"] = 1  # diffusers' StableDiffusionPipeline puts it there, whatever the file says
    solver = config.get("_class_name")
    steps = {"num_inference_steps": min(50, config.get("num_train_timesteps", 50))}
    return Defaults.from_dict(steps | {"scheduler": _SOLVERS.get(str(solver), "pndm"), "schedule": schedule})


# ---- of single files

_V = {"v", "v_prediction", "v-prediction", "vpred", "velocity"}  # words for one thing
_PARAMETERIZATION = re.compile(r"""^\s*parameterization\s*:\s*["']?([\w-]+)""", re.MULTILINE)


def prediction_type(path: Path, metadata: Mapping[str, Any], tensors: Iterable[str]) -> str:
    """What the model of a single file predicts, as far as that is said: "epsilon", where nothing is.

    Said in the header (the keys of modelspec and of kohya's trainer), by a tensor called v_pred, or in a CompVis
    config beside the file, of the same name with the ending .yaml.
    """
    said = [str(metadata.get("modelspec.prediction_type", ""))]
    if str(metadata.get("ss_v_parameterization", "")).lower() in ("true", "1") or "v_pred" in tensors:
        said.append("v")
    for beside in (path.with_suffix(".yaml"), path.with_suffix(".yml")):
        if beside.is_file():
            try:
                said += _PARAMETERIZATION.findall(read_utf8(beside, limit=1 << 20))
            except ValueError:  # of something else
                continue
    said = [word.lower() for word in said if word.lower() not in ("", "eps", "epsilon")]
    return "epsilon" if not said else "v_prediction" if said[0] in _V else said[0][:40]
