"""The noise schedule that a model was trained with, and what all solvers have in common.

A model is trained on x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, arXiv:2006.11239, formula 4). What it
predicts is the noise ("epsilon"), x_0 itself ("sample"), or the velocity sqrt(abar_t) noise - sqrt(1 - abar_t) x_0
("v_prediction", arXiv:2202.00512).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")

State = tuple[Tensor, ...]  # what a solver remembers


@dataclass(frozen=True)
class NoiseSchedule:
    """How a model was trained; the defaults are Stable Diffusion v1's, the names scheduler_config.json's.

    beta_schedule          "scaled_linear": even in the square root of beta; "linear": even in beta
    steps_offset           added to the timesteps of the spacing "leading"
    set_alpha_to_one       should the last step end at abar 1, or at abar_0? For PNDM and DDIM only
    prediction_type        what the model predicts, one of PREDICTIONS
    rescale_betas_zero_snr whether the last timestep is noise alone (arXiv:2305.08891, algorithm 1)

    Raises ValueError for other names, and unless 0 < beta_start <= beta_end < 1, num_train_timesteps > 1 and
    steps_offset >= 0.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.beta_start <= self.beta_end < 1 < self.num_train_timesteps and self.steps_offset >= 0):
            raise ValueError(
                "a noise schedule needs 0 < beta_start <= beta_end < 1, num_train_timesteps of at least 2 "
                f"and steps_offset of at least 0, not {self}"
            )
        for name, known in (("beta_schedule", ("scaled_linear", "linear")), ("prediction_type", PREDICTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, not {getattr(self, name)!r}")

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar, the share of signal in the variance of x_t: (num_train_timesteps,), float32, on the CPU."""
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        start, end = self.beta_start**power, self.beta_end**power
        # in float32 as diffusers has it; CompVis' float64 moves abar by up to 5e-7
        betas = torch.linspace(start, end, self.num_train_timesteps, dtype=torch.float32, device="cpu")
        betas = betas**2 if power == 0.5 else betas
        if self.rescale_betas_zero_snr:
            betas = zero_terminal_snr(betas)
        return torch.cumprod(1.0 - betas, dim=0)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last abar is 0: sqrt(abar) is shifted, and scaled so that its first value stays."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    abar = root**2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


V1 = NoiseSchedule()


@dataclass(frozen=True)
class Scheduler:
    """What all solvers have in common. Immutable, and cheap to make: what changes travels in `state`.

    Raises ValueError unless num_inference_steps is an int from 1 to `most_steps`, for an unknown timestep_spacing,
    and for a model whose kind of prediction the solver cannot work with. Methods that take the index i of a step
    raise IndexError unless 0 <= i < len(timesteps). i may start anywhere, with init_state() and x from `add_noise`;
    multistep solvers then begin there with order 1.
    """

    num_inference_steps: int
    schedule: NoiseSchedule = field(default=V1, kw_only=True)
    timestep_spacing: str = field(default="leading", kw_only=True)

    eta = 0.0  # above 0 for DDIM alone
    name = ""  # in SCHEDULERS
    calls: ClassVar[int] = 1  # of the model for each of num_inference_steps
    noise_dtype: ClassVar[torch.dtype | None] = None  # which fresh noise is drawn in; None: the model's
    predictions: ClassVar[tuple[str, ...]] = PREDICTIONS  # those that the solver can work with

    def __post_init__(self) -> None:
        n, most = self.num_inference_steps, self.most_steps
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= most:
            raise ValueError(f"num_inference_steps must be a whole number from 1 to {most}, not {n!r}")
        if self.timestep_spacing not in SPACINGS:
            raise ValueError(f"timestep_spacing must be {', '.join(SPACINGS)}, not {self.timestep_spacing!r}")
        if self.schedule.prediction_type not in self.predictions:
            raise ValueError(
                f"{type(self).__name__} cannot work with a model that predicts {self.schedule.prediction_type!r}, "
                f"but with {' or '.join(self.predictions)}"
            )

    @property
    def most_steps(self) -> int:
        """The largest num_inference_steps."""
        return self.schedule.num_train_timesteps

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """t for each call of the model, falling: whole numbers, or floats that float32 has."""
        raise NotImplementedError

    @property
    def init_noise_sigma(self) -> float:
        """What x starts from is unit noise times this: 1 where x is x_t; 14.6, say, where x is x_0 + sigma noise."""
        return 1.0

    def init_state(self) -> State:
        """The state to pass to the first step: nothing remembered."""
        return ()

    def scale_input(self, i: int, x: Tensor) -> Tensor:
        """What the model sees of x at step i: x itself where it is x_t."""
        return x

    def draws(self, i: int) -> bool:
        """Whether step i needs fresh unit noise, as `variance_noise`."""
        return False

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """From x, and the model's (guided) prediction for it at step i, to the x and the state of step i + 1.

        prediction, x and result are of one shape, whichever. variance_noise, unit noise of that shape, is needed
        where `draws(i)` says so, and else not looked at. No argument is written into; but the state refers to
        `prediction` and `x`, so the caller must not write into them either.
        """
        raise NotImplementedError

    def denoised(self, i: int, prediction: Tensor, x: Tensor) -> Tensor:
        """The x_0 that the prediction stands for, with x as it is at step i: a preview of the result."""
        signal, sigma = self.level(i)
        return self.x0_of(prediction, x, signal, sigma)

    def noise(self, i: int, prediction: Tensor, x: Tensor) -> Tensor:
        """The noise in x that the prediction stands for, likewise."""
        return self.noise_of(prediction, x, *self.level(i))

    def x0_of(self, prediction: Tensor, x: Tensor, signal: float, sigma: float) -> Tensor:
        """x_0 by what the model predicts, where x = signal x_0 + sigma noise and signal^2 + sigma^2 = 1."""
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            return (x - sigma * prediction) / signal
        return prediction if kind == "sample" else signal * x - sigma * prediction

    def noise_of(self, prediction: Tensor, x: Tensor, signal: float, sigma: float) -> Tensor:
        """The noise by what the model predicts, for the same x."""
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            return prediction
        return (x - signal * prediction) / sigma if kind == "sample" else signal * prediction + sigma * x

    def fresh(self, i: int, variance_noise: Tensor | None) -> Tensor:
        """The noise that step i was given. Raises ValueError where it was not."""
        if variance_noise is None:
            raise ValueError(f"{type(self).__name__} needs variance_noise at step {i}, drawn anew for each step")
        return variance_noise

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Clean latents x0 under unit noise, as x stands at step i."""
        # in the latents' own precision, as in diffusers, where `step` has float32's levels even for float64
        signal, sigma = self.level(i, torch.promote_types(x0.dtype, torch.float32))
        return signal * x0 + sigma * noise

    def level(self, i: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
        """(signal, sigma) of x = signal x_0 + sigma noise at step i."""
        self.check_index(i)
        abar = self.schedule.alphas_cumprod[int(self.timesteps[i])].to(dtype)
        return (abar**0.5).item(), ((1 - abar) ** 0.5).item()

    def begin(self, strength: float) -> int:
        """The step to begin with where only the last part of the steps is taken, with a fresh state.

        strength: above 0, to 1, as diffusers has it: int(num_inference_steps * strength) steps. Raises ValueError
        where that is none.
        """
        n = self.num_inference_steps
        count = min(int(n * strength), n)
        if count < 1:
            raise ValueError(f"strength {strength:g} of {n} steps leaves none: give more of either")
        return (n - count) * self.calls

    def check_index(self, i: int) -> None:
        """Raise IndexError unless there is a step i."""
        if not 0 <= i < len(self.timesteps):
            raise IndexError(f"there is no step {i}: the steps are 0 to {len(self.timesteps) - 1}")

    @cached_property
    def spaced(self) -> list[float]:
        """The timesteps, rising, as `timestep_spacing` says; whole numbers, but for "linspace"."""
        n, train = self.num_inference_steps, self.schedule.num_train_timesteps
        if self.timestep_spacing == "linspace":
            return [k * ((train - 1) / max(n - 1, 1)) for k in range(n)]
        if self.timestep_spacing == "trailing":
            # as numpy.arange(train, 0, -train / n) has it; it can have one more, which rounds to 0
            stride = (train - train / n) - train
            return [float(round(train + k * stride) - 1) for k in range(n - 1, -1, -1)]
        stride = train // n
        # all steps leave no room for the offset: diffusers reads past the end of abar there, we run 999 to 0
        offset = min(self.schedule.steps_offset, train - 1 - (n - 1) * stride)
        return [float(offset + k * stride) for k in range(n)]
