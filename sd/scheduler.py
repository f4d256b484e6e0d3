"""Solvers: from latents, and what the model predicts for them, to the next latents.

    PNDM    PLMS: fourth-order multistep along x_t             arXiv:2202.09778, ldm's plms.py
    DDIM    first order along x_t; eta puts fresh noise in     arXiv:2010.02502, ldm's ddim.py

are here, as Stable Diffusion v1 came with them; the others are in solvers/. One loop serves them all:

    x, state = unit_noise * scheduler.init_noise_sigma, scheduler.init_state()
    for i, t in enumerate(scheduler.timesteps):
        prediction = model(scheduler.scale_input(i, x), t)
        fresh = unit_noise_again if scheduler.draws(i) else None
        x, state = scheduler.step(i, prediction, x, state, variance_noise=fresh)

Timesteps and results are those of diffusers 0.42.1, for PNDM and DDIM to the last bit: coefficients come
from the same float32 operations in the same order. They are then kept as Python floats, which multiply a
tensor as diffusers' 0-dimensional tensors do, without waiting for its device. (One exception: with half
precision on the CPU, diffusers rounds the coefficients to half too; ours stay float32.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .schedule import V1, NoiseSchedule, Scheduler, State
from .solvers import LMS as LMS  # which Stable Diffusion v1 came with, too
from .solvers import SOLVERS
from .solvers.table import SigmaTable


@dataclass(frozen=True)
class AlongX(Scheduler):
    """Solvers that go along x_t itself, from timestep to timestep: a step goes back by a fixed stride."""

    @property
    def _stride(self) -> int:
        return self.schedule.num_train_timesteps // self.num_inference_steps

    @cached_property
    def _visited(self) -> tuple[int, ...]:
        """The timesteps that x passes through: 981, 961, ..., 1 of 50 with the spacing "leading"."""
        return tuple(round(t) for t in reversed(self.spaced))

    def _abar(self, timesteps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """abar at these timesteps and after a step from each: two of shape (len(timesteps),)."""
        abar = self.schedule.alphas_cumprod
        t = torch.tensor(timesteps, device="cpu")
        final = torch.ones_like(abar[0]) if self.schedule.set_alpha_to_one else abar[0]
        return abar[t], torch.where(t < self._stride, final, abar[(t - self._stride).clamp(min=0)])


@dataclass(frozen=True)
class PNDM(AlongX):
    """PLMS, the solver of the v1 weights: Adams-Bashforth on the noise (arXiv:2202.09778, formulas 9, 12).

    The model is called num_inference_steps + 1 times (but once for 1 step), for lack of history at the
    start: step 0 is of order 1; step 1 looks at what came out and takes step 0 again with the mean of both
    noises; then follow orders 2, 3 and 4. Step 1 raises ValueError without the state that step 0 returned.
    A predicted velocity is combined as it is, and turned into noise last, as diffusers does.
    """

    name = "pndm"
    predictions = ("epsilon", "v_prediction")

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        return self._visited[:2] + self._visited[1:]

    def begin(self, strength: float) -> int:
        # diffusers' timestep, so a step more than the share says: the second timestep stands twice. Of these two, the
        # first would take step 0 again, which there is not.
        i = super().begin(strength)
        return 2 if i == 1 else i

    @cached_property
    def _coefficients(self) -> list[list[float]]:
        t = self._visited  # not `timesteps`: step 1 arrives at t[1], where step 2 leaves from
        a, a_next = self._abar((t[0], *(t[1] + self._stride for _ in t[1:2]), *t[1:])[: len(self.timesteps)])
        b, b_next = 1 - a, 1 - a_next
        denominator = a * b_next**0.5 + (a * b * a_next) ** 0.5
        return torch.stack(((a_next / a) ** 0.5, a_next - a, denominator, a**0.5, b**0.5), dim=1).tolist()

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self.check_index(i)
        if i == 1:
            if len(state) != 2:
                raise ValueError("PNDM's step 1 takes step 0 again: it needs the state that step 0 returned")
            first, x = state
            combined, state = (prediction + first) / 2, (first,)
        else:
            e = (prediction, *state)  # newest first
            combined, state = prediction, (prediction, x) if i == 0 else e[:3]
            if len(e) == 2:
                combined = (3 * e[0] - e[1]) / 2
            elif len(e) == 3:
                combined = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
            elif len(e) == 4:
                combined = (1 / 24) * (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3])
        scale, gain, denominator, signal, sigma = self._coefficients[i]
        noise = self.noise_of(combined, x, signal, sigma)
        return scale * x - gain * noise / denominator, state  # formula 9


@dataclass(frozen=True)
class DDIM(AlongX):
    """DDIM (arXiv:2010.02502, formulas 12 and 16): one call of the model a step, nothing remembered.

    eta, from 0 to 1 (else ValueError), is the part of DDPM's randomness that each step has: with 0 the noise
    at the start decides everything; above 0 `step` raises ValueError if variance_noise is missing.
    """

    eta: float = 0.0

    name = "ddim"

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.eta, (int, float)) and not isinstance(self.eta, bool)
        if not number or not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be a number from 0 to 1, not {self.eta!r}")

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        return self._visited

    @cached_property
    def _coefficients(self) -> list[list[float]]:
        a, a_next = self._abar(self._visited)
        std = self.eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5  # formula 16
        direction = (1 - a_next - std**2) ** 0.5
        return torch.stack((a_next**0.5, direction, std), dim=1).tolist()

    def draws(self, i: int) -> bool:
        return self.eta > 0

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x0, noise = self.denoised(i, prediction, x), self.noise(i, prediction, x)
        signal, direction, std = self._coefficients[i]
        x = signal * x0 + direction * noise  # formula 12
        return (x + std * self.fresh(i, variance_noise) if self.draws(i) else x), state


SCHEDULERS: dict[str, type[Scheduler]] = {"pndm": PNDM, "ddim": DDIM, **SOLVERS}
SUFFIXES = ("karras", "exponential", "beta")  # of the names of solvers in solvers/ that have sigmas
OTHER_NAMES = {  # of diffusers' classes, of AUTOMATIC1111 and of ldm, in lower case, without spaces and signs
    "plms": "pndm",
    "lmsdiscrete": "lms",
    "eulerdiscrete": "euler",
    "eulerancestral": "euler_a",
    "eulerancestraldiscrete": "euler_a",
    "heundiscrete": "heun",
    "kdpm2discrete": "dpm2",
    "kdpm2ancestraldiscrete": "dpm2_a",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmsolversde": "dpmpp_sde",
    "unipcmultistep": "unipc",
}


def make_scheduler(
    name: str, num_inference_steps: int, eta: float = 0.0, *, schedule: NoiseSchedule = V1, **options: Any
) -> Scheduler:
    """The solver of this name in SCHEDULERS, those with sigmas also with _karras, _exponential or _beta behind it.

    The names of AUTOMATIC1111 ("DPM++ 2M Karras") and of diffusers' classes do too, in whatever case. options are
    fields of the solver's class, such as timestep_spacing. Raises ValueError for an unknown name, what the class
    itself refuses, and eta where the solver has none; TypeError for a field that it does not have.
    """
    solver, spacing = find_name(name)
    if solver == "ddim":
        return DDIM(num_inference_steps, eta, schedule=schedule, **options)
    if eta != 0:
        raise ValueError(f"eta must be 0 for {solver}, which has none (ddim has), not {eta!r}")
    options |= {"sigma_spacing": spacing} if spacing else {}
    return SCHEDULERS[solver](num_inference_steps, schedule=schedule, **options)


def find_name(name: object) -> tuple[str, str]:
    """A name of a solver -> its name in SCHEDULERS, and the spacing of its sigmas or "". Raises ValueError."""
    squeezed = "".join(c for c in str(name).lower().replace("dpm++", "dpmpp") if c.isalnum()).removesuffix(
        "scheduler"
    )
    ours = {"".join(c for c in key if c.isalnum()): key for key in SCHEDULERS} | OTHER_NAMES
    for suffix in ("", *SUFFIXES):
        fits = isinstance(name, str) and squeezed.endswith(suffix)
        solver = ours.get(squeezed.removesuffix(suffix)) if fits else None
        if solver and (not suffix or issubclass(SCHEDULERS[solver], SigmaTable)):
            return solver, suffix
    raise ValueError(f"no scheduler is called {str(name)[:60]!r}; there are {', '.join(SCHEDULERS)}")


def scheduler_name(scheduler: Scheduler) -> str:
    """The name by which `make_scheduler` makes one of this kind."""
    spacing = getattr(scheduler, "sigma_spacing", "")
    return scheduler.name + (f"_{spacing}" if spacing else "")
