"""The solver that a scheduler_config.json of diffusers asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..scheduler import SCHEDULERS, NoiseSchedule, Scheduler, find_name

# What diffusers' classes have beside the noise schedule, under the same names here.
_FIELDS = (
    *("timestep_spacing", "final_sigmas_type", "euler_at_final", "lower_order_final"),
    *("solver_order", "solver_type", "original_inference_steps"),
)
_SPACED = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
_SCHEDULE = [f.name for f in fields(NoiseSchedule)]
_USUAL: dict[str, Any] = {  # other settings, with the one value that is understood here
    "algorithm_type": "dpmsolver++",
    "clip_sample": False,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "flow_shift": 1.0,
    "interpolation_type": "linear",
    "lambda_min_clipped": -math.inf,
    "predict_x0": True,
    "skip_prk_steps": True,
    "time_shift_type": "exponential",
    "timestep_scaling": 10.0,
    "timestep_type": "discrete",
    "variance_type": None,
}
_WITHOUT_EFFECT = ("sample_max_value", "clip_sample_range")  # as long as nothing is clipped


def scheduler_from_config(config: Mapping[str, Any], num_inference_steps: int) -> Scheduler:
    """The solver that a scheduler_config.json asks for, "_class_name" and all, as diffusers' from_config makes it.

    What is left out has the value of diffusers' class, but for the noise schedule, which is then Stable Diffusion
    v1's; what "_use_default_values" names counts as left out. Raises ValueError, by name, for what is not here.
    """
    solver, schedule, options = solver_of(config)
    try:
        return SCHEDULERS[solver](num_inference_steps, schedule=schedule, **options)
    except TypeError as error:
        raise ValueError(f"the scheduler's config has a value of another type ({error})") from None


def solver_of(config: Mapping[str, Any]) -> tuple[str, NoiseSchedule, dict[str, Any]]:
    """The name of the solver that a scheduler_config.json asks for, the noise schedule, and its class's other fields.

    Raises ValueError as `scheduler_from_config` does, but for values that the class itself refuses.
    """
    left_out = config.get("_use_default_values") or ()
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in left_out}
    solver, _ = find_name(config.get("_class_name") or "PNDMScheduler")
    if solver == "dpmpp_2m":
        solver = "dpmpp_2m_sde" if settings.get("algorithm_type") == "sde-dpmsolver++" else solver
        if solver == "dpmpp_2m_sde":
            settings.pop("algorithm_type")
        if settings.pop("solver_order", 2) != 2:
            raise ValueError("the scheduler's config has solver_order other than 2, which is not here")
        if settings.pop("solver_type", "midpoint") not in ("midpoint", "logrho", "bh1", "bh2"):
            raise ValueError("the scheduler's config has solver_type 'heun', which is not here")
    kind = SCHEDULERS[solver]
    known = {f.name for f in fields(kind)}
    schedule = {key: settings.pop(key) for key in _SCHEDULE if settings.get(key) is not None}
    given: dict[str, Any] = {}
    for key, value in settings.items():
        usual = (None, False) if key == "variance_type" else (_USUAL.get(key),)
        if key in _FIELDS and key in known:
            given[key] = value
        elif key in _SPACED:
            if value and ("sigma_spacing" not in known or "sigma_spacing" in given):
                raise ValueError(f"the scheduler's config has {key} = {value!r}, which {solver} does not have")
            given |= {"sigma_spacing": _SPACED[key]} if value else {}
        elif value and value not in usual and key not in (*_WITHOUT_EFFECT, *_FIELDS):
            if key == "variance_type" and value == "fixed_small":
                continue
            raise ValueError(f"the scheduler's config has {key} = {value!r}, which is not here")
    try:
        return solver, NoiseSchedule(**schedule), given
    except TypeError as error:
        raise ValueError(f"the scheduler's config has a value of another type ({error})") from None
