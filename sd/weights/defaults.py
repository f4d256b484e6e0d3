"""How a model draws where a call does not say: `Defaults`, and what a scheduler_config.json says of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..image import MAX_SIDE
from ..schedule import PREDICTIONS, SPACINGS
from ..scheduler import SCHEDULERS, V1, NoiseSchedule, Scheduler, find_name, make_scheduler
from .predictions import says_yes
from .scheduler_config import solver_of


@dataclass(frozen=True)
class Defaults:
    """How a model draws where a call does not say; the values here are Stable Diffusion v1's.

    scheduler      a name that `make_scheduler` knows
    options        what else its class takes, as {"timestep_spacing": "trailing"}; it holds for every solver that has
                   such a setting, as with from_config of diffusers
    height, width  in pixels; None: the model's size
    schedule       the noise that the model was trained with; `prediction_type` is in it, too

    Raises ValueError, the rest of a sentence, for what no sampler can take.
    """

    scheduler: str = "pndm"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    prediction_type: str = "epsilon"
    schedule: NoiseSchedule = V1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def whole(n: Any, low: int, high: int) -> bool:
            return type(n) is int and low <= n <= high

        if not whole(self.num_inference_steps, 1, self.schedule.num_train_timesteps):
            raise ValueError(f"num_inference_steps cannot be {self.num_inference_steps!r}")
        if type(self.guidance_scale) not in (int, float) or not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale cannot be {self.guidance_scale!r}")
        for side in (self.height, self.width):
            if side is not None and not whole(side, 8, MAX_SIDE):
                raise ValueError(f"height and width cannot be {side!r}")
        if self.prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type cannot be {self.prediction_type!r}, but is {' or '.join(PREDICTIONS)}")
        if self.schedule.prediction_type != self.prediction_type:
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}, and {self.schedule.prediction_type!r} in the schedule"
            )
        try:
            make_scheduler(self.scheduler, self.num_inference_steps, schedule=self.schedule, **self.options)
        except TypeError as error:
            raise ValueError(f"{self.scheduler} cannot have the options {self.options!r} ({error})") from None

    def make_scheduler(
        self, name: str | None = None, num_inference_steps: int | None = None, eta: float = 0.0
    ) -> Scheduler:
        """The solver of a call, for this model; what is None is as these defaults say. Raises ValueError."""
        name = self.scheduler if name is None else name
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        known = {f.name for f in fields(SCHEDULERS[find_name(name)[0]])}
        options = {key: value for key, value in self.options.items() if key in known}
        return make_scheduler(name, steps, eta, schedule=self.schedule, **options)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in the header of a file; `from_dict` takes it."""
        return {key: value for key, value in asdict(self).items() if key != "options" or value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Defaults:
        """What `as_dict` gave, or a part of it: what is left out is v1's. Raises ValueError, TypeError."""
        schedule = data.get("schedule", {})
        for kind, values in ((cls, data), (NoiseSchedule, schedule)):
            if unknown := sorted(values.keys() - {f.name for f in fields(kind)}):
                raise ValueError(f"there is no default called {unknown[0]!r}")
        for known in fields(NoiseSchedule):
            wanted = (int, float) if isinstance(known.default, float) else (type(known.default),)
            if type(schedule.get(known.name, known.default)) not in wanted:
                raise ValueError(f"{known.name} cannot be {schedule[known.name]!r}")
        if schedule.get("num_train_timesteps", 2) > 100_000 or schedule.get("steps_offset", 0) > 100_000:
            raise ValueError("the noise schedule is longer than 100,000 steps")
        if not isinstance(data.get("options", {}), dict):
            raise ValueError(f"options cannot be {data['options']!r}")
        return cls(**{**data, "schedule": NoiseSchedule(**schedule)})


# ---- of the Hub


def check_schedule(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a scheduler_config.json of a model that was trained as no solver here understands."""
    for key, known in (
        ("beta_schedule", ("scaled_linear", "linear")),
        ("prediction_type", PREDICTIONS),
        ("rescale_betas_zero_snr", (True, False)),
        ("trained_betas", (None,)),
    ):
        if key in config and config[key] not in known:
            expected = " or ".join(map(repr, known))
            raise ValueError(f"it was trained with {key} = {config[key]!r}, where {expected} is expected")
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


STEPS = {"lcm": 4}  # where it is not 50


def defaults_from_hub(config: Mapping[str, Any], name: str) -> Defaults:
    """A scheduler_config.json that `check_schedule` let pass -> the defaults of the model called `name`.

    As diffusers' from_config, but for the noise schedule: what is left out of that is v1's, whatever the class of
    diffusers has (its DDIM would end at abar 1, which is wrong for Stable Diffusion). What of the solver is not here
    leaves v1's, "pndm", with a warning that says what it was.
    """
    # diffusers' StableDiffusionPipeline puts these there, whatever the file says
    fixed = {"steps_offset": 1, "clip_sample": False}
    config = {key: fixed.get(key, value) for key, value in config.items()}
    left_out = config.get("_use_default_values") or ()
    noise = {f.name: config[f.name] for f in fields(NoiseSchedule) if f.name in config and f.name not in left_out}
    return defaults_of(config, NoiseSchedule(**noise), name)


def defaults_of(config: Mapping[str, Any], schedule: NoiseSchedule, name: str) -> Defaults:
    """The defaults of a model with this noise schedule, whose scheduler's config asks for some solver.

    What of the solver is not here leaves v1's, "pndm", with a warning that says what it was.
    """

    def defaults(scheduler: str, options: Mapping[str, Any]) -> Defaults:
        steps = min(STEPS.get(scheduler, 50), schedule.num_train_timesteps - 1)
        return Defaults(
            scheduler, steps, prediction_type=schedule.prediction_type, schedule=schedule, options=options
        )

    try:
        solver, _, options = solver_of(config)
        spacing = options.pop("sigma_spacing", "")
        return defaults(f"{solver}_{spacing}" if spacing else solver, options)
    except ValueError as error:
        solver = "ddim" if schedule.prediction_type == "sample" or schedule.rescale_betas_zero_snr else "pndm"
        warnings.warn(
            f"{name} asks for a scheduler that is not here ({error}): it is drawn with {solver}, where no other is "
            "given.",
            stacklevel=3,
        )
        spacing = config.get("timestep_spacing")
        return defaults(solver, {"timestep_spacing": spacing} if spacing in SPACINGS and solver == "ddim" else {})


# ---- of single files


def defaults_of_file(
    prediction: str, metadata: Mapping[str, Any], tensors: Iterable[str], turbo: bool = False
) -> Defaults:
    """The defaults of a single file whose model predicts this.

    A tensor called ztsnr, or kohya's trainer, says that its last timestep is noise alone. Then the steps begin there
    (arXiv:2305.08891): PNDM cannot, DDIM can. Nor does PNDM work with a predicted x_0. turbo: it is SD-Turbo's.
    """
    to_noise = "ztsnr" in tensors or says_yes(metadata.get("ss_zero_terminal_snr"))
    schedule = NoiseSchedule(prediction_type=prediction, rescale_betas_zero_snr=to_noise)
    if turbo:
        return as_turbo(Defaults(prediction_type=prediction, schedule=schedule))
    solver = "ddim" if to_noise or prediction == "sample" else "pndm"
    options = {"timestep_spacing": "trailing"} if to_noise else {}
    return Defaults(solver, prediction_type=prediction, schedule=schedule, options=options)


def is_turbo(*said: str) -> bool:
    """Whether what a model is called says that it is SD-Turbo's: its files say it in no other way."""
    return any(re.search(r"(?<![a-z])(?:sd)?turbo(?![a-z0-9])", text.lower()) for text in said)


def as_turbo(defaults: Defaults) -> Defaults:
    """SD-Turbo draws in one step, without guidance (arXiv:2311.17042), which begins at noise alone."""
    options = {"timestep_spacing": "trailing"}
    return replace(defaults, scheduler="euler", num_inference_steps=1, guidance_scale=0.0, options=options)
