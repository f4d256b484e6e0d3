"""Noise schedule and solvers: from latents, and the noise predicted in them, to the next latents.

A model is trained on x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, arXiv:2006.11239, formula 4).

    PNDM    PLMS: fourth-order multistep along x_t             arXiv:2202.09778, ldm's plms.py
    DDIM    first order along x_t; eta puts fresh noise in     arXiv:2010.02502, ldm's ddim.py
    LMS     fourth-order multistep along x_t / sqrt(abar_t)    arXiv:2206.00364, k-diffusion's sample_lms

One loop serves them all:

    x, state = unit_noise * scheduler.init_noise_sigma, scheduler.init_state()
    for i, t in enumerate(scheduler.timesteps):
        noise = model(scheduler.scale_input(i, x), t)
        x, state = scheduler.step(i, noise, x, state)

Timesteps and results are those of diffusers 0.42.1, for PNDM and DDIM to the last bit: coefficients come
from the same float32 operations in the same order. They are then kept as Python floats, which multiply a
tensor as diffusers' 0-dimensional tensors do, without waiting for its device. (One exception: with half
precision on the CPU, diffusers rounds the coefficients to half too; ours stay float32.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # what a solver remembers


@dataclass(frozen=True)
class NoiseSchedule:
    """How a model was trained; the defaults are Stable Diffusion v1's, the names scheduler_config.json's.

    The betas are "scaled_linear", the model predicts the noise, nothing is clipped. `steps_offset` and
    `set_alpha_to_one` (should the last step end at abar 1, or at abar_0?) are for PNDM and DDIM only.
    Raises ValueError unless 0 < beta_start <= beta_end < 1, num_train_timesteps > 1 and steps_offset >= 0.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.beta_start <= self.beta_end < 1 < self.num_train_timesteps and self.steps_offset >= 0):
            raise ValueError(
                "a noise schedule needs 0 < beta_start <= beta_end < 1, num_train_timesteps of at least 2 "
                f"and steps_offset of at least 0, not {self}"
            )

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar, the share of signal in the variance of x_t: (num_train_timesteps,), float32, on the CPU."""
        start, end = self.beta_start**0.5, self.beta_end**0.5
        # in float32 as diffusers has it; CompVis' float64 moves abar by up to 5e-7
        betas = torch.linspace(start, end, self.num_train_timesteps, dtype=torch.float32, device="cpu") ** 2
        return torch.cumprod(1.0 - betas, dim=0)


V1 = NoiseSchedule()


@dataclass(frozen=True)
class Scheduler:
    """What all solvers have in common. Immutable, and cheap to make: what changes travels in `state`.

    Raises ValueError unless num_inference_steps is an int from 1 to 1000 (num_train_timesteps). Methods that
    take the index i of a step raise IndexError unless 0 <= i < len(timesteps). i may start anywhere, with
    init_state() and x from `add_noise`; multistep solvers then begin there with order 1.
    """

    num_inference_steps: int
    schedule: NoiseSchedule = field(default=V1, kw_only=True)

    eta = 0.0  # a sampler draws variance_noise if this is above 0, as only DDIM's can be

    def __post_init__(self) -> None:
        n, most = self.num_inference_steps, self.schedule.num_train_timesteps
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= most:
            raise ValueError(f"num_inference_steps must be a whole number from 1 to {most}, not {n!r}")

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """t for each call of the model, falling: ints, but for LMS floats (of float32 values)."""
        raise NotImplementedError

    @property
    def init_noise_sigma(self) -> float:
        """What x starts from is unit noise times this: 1, but for LMS 14.6."""
        return 1.0

    def init_state(self) -> State:
        """The state to pass to the first step: nothing remembered."""
        return ()

    def scale_input(self, i: int, x: Tensor) -> Tensor:
        """What the model sees of x at step i: x itself, but for LMS."""
        return x

    def step(
        self, i: int, noise: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """From x, and the (guided) noise predicted in it at step i, to the x and the state of step i + 1.

        noise, x and result are of one shape, whichever. variance_noise, unit noise of that shape, is needed
        where eta > 0 and else not looked at. No argument is written into; but the state refers to `noise`
        and `x`, so the caller must not write into them either.
        """
        raise NotImplementedError

    def denoised(self, i: int, noise: Tensor, x: Tensor) -> Tensor:
        """The x_0 from which this noise makes x, as it stands at step i: a preview of the result."""
        signal, sigma = self._level(i)
        return (x - sigma * noise) / signal

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Clean latents x0 under unit noise, as x stands at step i."""
        # in the latents' own precision, as in diffusers, where `step` has float32's levels even for float64
        signal, sigma = self._level(i, torch.promote_types(x0.dtype, torch.float32))
        return signal * x0 + sigma * noise

    def _level(self, i: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
        """(signal, sigma) of x = signal x_0 + sigma noise at step i."""
        self._check(i)
        abar = self.schedule.alphas_cumprod[int(self.timesteps[i])].to(dtype)
        return (abar**0.5).item(), ((1 - abar) ** 0.5).item()

    def _check(self, i: int) -> None:
        if not 0 <= i < len(self.timesteps):
            raise IndexError(f"there is no step {i}: the steps are 0 to {len(self.timesteps) - 1}")

    # for PNDM and DDIM:

    @property
    def _stride(self) -> int:
        return self.schedule.num_train_timesteps // self.num_inference_steps

    @cached_property
    def _visited(self) -> tuple[int, ...]:
        """The timesteps that x passes through, 981, 961, ..., 1 of 50 ("leading" in diffusers)."""
        first = (self.num_inference_steps - 1) * self._stride
        # 1000 steps leave no room for the offset: diffusers reads past the end of abar there, we run 999 to 0
        first += min(self.schedule.steps_offset, self.schedule.num_train_timesteps - 1 - first)
        return tuple(first - k * self._stride for k in range(self.num_inference_steps))

    def _abar(self, timesteps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """abar at these timesteps and after a step from each: two of shape (len(timesteps),)."""
        abar = self.schedule.alphas_cumprod
        t = torch.tensor(timesteps, device="cpu")
        final = torch.ones_like(abar[0]) if self.schedule.set_alpha_to_one else abar[0]
        return abar[t], torch.where(t < self._stride, final, abar[(t - self._stride).clamp(min=0)])


@dataclass(frozen=True)
class PNDM(Scheduler):
    """PLMS, the solver of the v1 weights: Adams-Bashforth on the noise (arXiv:2202.09778, formulas 9, 12).

    The model is called num_inference_steps + 1 times (but once for 1 step), for lack of history at the
    start: step 0 is of order 1; step 1 looks at what came out and takes step 0 again with the mean of both
    noises; then follow orders 2, 3 and 4. Step 1 raises ValueError without the state that step 0 returned.
    """

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        return self._visited[:2] + self._visited[1:]

    @cached_property
    def _coefficients(self) -> list[list[float]]:
        levels = self._visited[:1] + self._visited  # not `timesteps`: step 1 leaves from where step 0 did
        a, a_next = self._abar(levels[: len(self.timesteps)])
        b, b_next = 1 - a, 1 - a_next
        denominator = a * b_next**0.5 + (a * b * a_next) ** 0.5
        return torch.stack(((a_next / a) ** 0.5, a_next - a, denominator), dim=1).tolist()

    def step(
        self, i: int, noise: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check(i)
        if i == 1:
            if len(state) != 2:
                raise ValueError("PNDM's step 1 takes step 0 again: it needs the state that step 0 returned")
            first, x = state
            noise, state = (noise + first) / 2, (first,)
        else:
            e = (noise, *state)  # newest first
            state = (noise, x) if i == 0 else e[:3]
            if len(e) == 2:
                noise = (3 * e[0] - e[1]) / 2
            elif len(e) == 3:
                noise = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
            elif len(e) == 4:
                noise = (1 / 24) * (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3])
        scale, gain, denominator = self._coefficients[i]
        return scale * x - gain * noise / denominator, state  # formula 9


@dataclass(frozen=True)
class DDIM(Scheduler):
    """DDIM (arXiv:2010.02502, formulas 12 and 16): one call of the model a step, nothing remembered.

    eta, from 0 to 1 (else ValueError), is the part of DDPM's randomness that each step has: with 0 the noise
    at the start decides everything; above 0 `step` raises ValueError if variance_noise is missing.
    """

    eta: float = 0.0

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

    def step(
        self, i: int, noise: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x0 = self.denoised(i, noise, x)
        signal, direction, std = self._coefficients[i]
        x = signal * x0 + direction * noise  # formula 12
        if self.eta > 0:
            if variance_noise is None:
                raise ValueError(f"DDIM with eta={self.eta} needs variance_noise, drawn anew for each step")
            x = x + std * variance_noise
        return x, state


@dataclass(frozen=True)
class LMS(Scheduler):
    """Linear multistep of order 4 in sigma, the noise level of x = x_0 + sigma noise (k-diffusion).

    dx/dsigma is the noise itself, so a step adds the integral of the polynomial through the last four
    predictions. Timesteps go evenly from 999 to 0 ("linspace" in diffusers), sigma from 14.6 to 0.029 and
    then to 0. The integral is exact here; diffusers' is numerical, in float32, and differs by its rounding.
    """

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        n, last = self.num_inference_steps, self.schedule.num_train_timesteps - 1
        t = torch.arange(n - 1, -1, -1, dtype=torch.float64, device="cpu") * (last / max(n - 1, 1))
        return tuple(t.float().tolist())

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """The sigma of x at each step and after the last: num_inference_steps + 1 float32 values."""
        abar = self.schedule.alphas_cumprod
        table = (((1 - abar) / abar) ** 0.5).double()
        t = torch.tensor(self.timesteps, dtype=torch.float64, device="cpu")
        low = t.long().clamp(max=len(table) - 2)
        sigmas = table[low] + (table[low + 1] - table[low]) * (t - low)
        return (*sigmas.float().tolist(), 0.0)

    @property
    def init_noise_sigma(self) -> float:
        return self.sigmas[0]

    def scale_input(self, i: int, x: Tensor) -> Tensor:
        self._check(i)
        sigma = torch.tensor(self.sigmas[i], dtype=torch.float32, device="cpu")
        return x / ((sigma**2 + 1) ** 0.5).item()  # = x_t

    def _level(self, i: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
        self._check(i)
        return 1.0, self.sigmas[i]

    def _weights(self, i: int, order: int) -> list[float]:
        """Integral from sigmas[i] to sigmas[i + 1] of the Lagrange polynomials on the last `order` sigmas."""
        nodes = [self.sigmas[i - k] for k in range(order)]
        middle, half = (self.sigmas[i + 1] + self.sigmas[i]) / 2, (self.sigmas[i + 1] - self.sigmas[i]) / 2
        points = (middle - half / 3**0.5, middle + half / 3**0.5)  # Gauss-Legendre: exact up to degree 3

        def lagrange(node: float, s: float) -> float:
            return math.prod((s - other) / (node - other) for other in nodes if other != node)

        return [half * sum(lagrange(node, s) for s in points) for node in nodes]

    def step(
        self, i: int, noise: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        self._check(i)
        e = (noise, *state)  # newest first
        change = sum(weight * past for weight, past in zip(self._weights(i, len(e)), e, strict=True))
        return x + change, e[:3]


SCHEDULERS: dict[str, type[Scheduler]] = {"pndm": PNDM, "ddim": DDIM, "lms": LMS}
OTHER_NAMES = {"plms": "pndm", "lmsdiscrete": "lms"}  # ldm's, and diffusers' LMSDiscreteScheduler


def make_scheduler(
    name: str, num_inference_steps: int, eta: float = 0.0, *, schedule: NoiseSchedule = V1
) -> Scheduler:
    """The solver of this name in SCHEDULERS, in whatever case; the names of ldm and of diffusers' classes do too.

    Raises ValueError for an unknown name, what the class itself refuses, and eta where the solver has none.
    """
    given, name = name, str(name).lower().removesuffix("scheduler")
    name = OTHER_NAMES.get(name, name)
    if name not in tuple(SCHEDULERS):
        raise ValueError(f"no scheduler is called {str(given)[:60]!r}; there are {', '.join(SCHEDULERS)}")
    if name == "ddim":
        return DDIM(num_inference_steps, eta, schedule=schedule)
    if eta != 0:
        raise ValueError(f"eta must be 0 for {name}, which adds no noise (ddim can), not {eta!r}")
    return SCHEDULERS[name](num_inference_steps, schedule=schedule)
