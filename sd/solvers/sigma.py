"""Solvers in which x = x_0 + sigma noise, as in k-diffusion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..schedule import State
from .table import SigmaTable, at_least_single, single


@dataclass(frozen=True)
class SigmaSolver(SigmaTable):
    """Family A. The model sees x / sqrt(sigma^2 + 1); dx / dsigma is the noise itself."""

    rounds = False  # whether timesteps of "karras" are rounded
    in_single = True  # whether sigma is looked up at timesteps that were rounded to float32, as in most of diffusers

    @cached_property
    def _places(self) -> tuple[list[float], list[float]]:
        """The timesteps and sigmas of the whole steps, without what comes after the last."""
        timesteps = list(reversed(self.spaced))
        timesteps = single(timesteps).tolist() if self.in_single else timesteps
        sigmas = self.sigmas_at(timesteps)
        if self.sigma_spacing:
            sigmas = self.spread(sigmas[0], sigmas[-1])
            timesteps = [self.timestep_of(s) for s in sigmas]
            if self.rounds and self.sigma_spacing == "karras":
                timesteps = [float(round(t)) for t in timesteps]
        return timesteps, single(sigmas).tolist()

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(single(self._places[0]).tolist())

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """The sigma of x at each whole step and after the last: num_inference_steps + 1 float32 values."""
        return (*self._places[1], self.final_sigma)

    @property
    def init_noise_sigma(self) -> float:
        largest = torch.tensor(max(self.sigmas), dtype=torch.float32, device="cpu")
        return (largest if self.timestep_spacing != "leading" else (largest**2 + 1) ** 0.5).item()

    def scale_input(self, i: int, x: Tensor) -> Tensor:
        sigma = torch.tensor(self.level(i)[1], dtype=torch.float32, device="cpu")
        return x / ((sigma**2 + 1) ** 0.5).item()  # = x_t

    def level(self, i: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
        self.check_index(i)
        return 1.0, self.sigmas[i]

    def denoised(self, i: int, prediction: Tensor, x: Tensor) -> Tensor:
        return self._clean(prediction, x, self.level(i)[1])

    def noise(self, i: int, prediction: Tensor, x: Tensor) -> Tensor:
        epsilon = self.schedule.prediction_type == "epsilon"
        return prediction if epsilon else self._slope(prediction, x, self.level(i)[1])

    def _clean(self, prediction: Tensor, x: Tensor, sigma: float) -> Tensor:
        """x_0 by what the model predicts, at this sigma."""
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            return x - sigma * prediction
        if kind == "sample":
            return prediction
        s = torch.tensor(sigma, dtype=torch.float32, device="cpu")
        return prediction * (-s / (s**2 + 1) ** 0.5).item() + x / (s**2 + 1).item()

    def _slope(self, prediction: Tensor, x: Tensor, sigma: float) -> Tensor:
        """dx / dsigma."""
        return (x - self._clean(prediction, x, sigma)) / sigma


@dataclass(frozen=True)
class Euler(SigmaSolver):
    """First order in sigma (arXiv:2206.00364, algorithm 2 without noise): the same map as DDIM's."""

    name = "euler"

    @cached_property
    def _lengths(self) -> list[float]:
        return single(list(self.sigmas)).diff().tolist()

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        sigma, y = self.level(i)[1], at_least_single(x)
        return (y + self._slope(prediction, y, sigma) * self._lengths[i]).to(x.dtype), state


def ancestral(sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up): step down to the first, and add fresh noise of the second, to be at `after`."""
    up = (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5
    return (after**2 - up**2) ** 0.5, up


@dataclass(frozen=True)
class EulerAncestral(SigmaSolver):
    """Euler to a lower sigma, and fresh noise in each step, also in the last, where its share is 0."""

    name = "euler_a"
    predictions = ("epsilon", "v_prediction")

    @cached_property
    def _coefficients(self) -> list[list[float]]:
        sigmas = single(list(self.sigmas))
        down, up = ancestral(sigmas[:-1], sigmas[1:])
        return torch.stack((down - sigmas[:-1], up), dim=1).tolist()

    def draws(self, i: int) -> bool:
        return True

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        sigma, y = self.level(i)[1], at_least_single(x)
        length, up = self._coefficients[i]
        y = y + self._slope(prediction, y, sigma) * length
        return (y + self.fresh(i, variance_noise) * up).to(x.dtype), state


@dataclass(frozen=True)
class LMS(SigmaSolver):
    """Linear multistep of order 4 in sigma, the noise level of x = x_0 + sigma noise (k-diffusion).

    A step adds the integral of the polynomial through the last four slopes. Timesteps go evenly from 999 to 0
    ("linspace" in diffusers), sigma from 14.6 to 0.029 and then to 0. The integral is exact here; diffusers' is
    numerical, in float32, and differs by its rounding.
    """

    name = "lms"

    def _weights(self, i: int, order: int) -> list[float]:
        """Integral from sigmas[i] to sigmas[i + 1] of the Lagrange polynomials on the last `order` sigmas."""
        nodes = [self.sigmas[i - k] for k in range(order)]
        middle, half = (self.sigmas[i + 1] + self.sigmas[i]) / 2, (self.sigmas[i + 1] - self.sigmas[i]) / 2
        points = (middle - half / 3**0.5, middle + half / 3**0.5)  # Gauss-Legendre: exact up to degree 3

        def lagrange(node: float, s: float) -> float:
            return math.prod((s - other) / (node - other) for other in nodes if other != node)

        return [half * sum(lagrange(node, s) for s in points) for node in nodes]

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        sigma = self.level(i)[1]
        epsilon = self.schedule.prediction_type == "epsilon"
        e = (prediction if epsilon else self._slope(prediction, x, sigma), *state)  # newest first
        change = sum(weight * past for weight, past in zip(self._weights(i, len(e)), e, strict=True))
        return x + change, e[:3]


@dataclass(frozen=True)
class TwoStages(SigmaSolver):
    """Solvers that call the model twice in a step, but for the last, from where it goes to 0: 2 n - 1 calls.

    i counts the calls: 2 k is the first of whole step k, 2 k + 1 the second, for which x stands at `_middle[k]`. A
    second call without the state of the first goes on from there with order 1.
    """

    calls = 2

    @cached_property
    def _middle(self) -> tuple[float, ...]:
        """The sigma at which the second call of each whole step is made; 0 for the last, which has none."""
        raise NotImplementedError

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        whole = self._places[0]
        between = [self.timestep_of(s) for s in self._middle[:-1]]
        pairs = [t for pair in zip(between, whole[1:], strict=True) for t in pair]
        return tuple(single([whole[0], *pairs]).tolist())

    def level(self, i: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
        self.check_index(i)
        return 1.0, self._middle[i // 2] if i % 2 else self.sigmas[i // 2]

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        sigma, k = self.level(i)[1], i // 2
        if i % 2 == 0:
            return self._first(k, self._slope(prediction, x, sigma), x, variance_noise)
        slope = self._slope(prediction, x, sigma)
        if not state:
            return x + slope * (self.sigmas[k + 1] - sigma), ()
        return self._second(k, slope, state, variance_noise), ()

    def _first(self, k: int, slope: Tensor, x: Tensor, fresh: Tensor | None) -> tuple[Tensor, State]:
        length = (single([self._middle[k]]) - single([self.sigmas[k]])).item()
        return x + slope * length, (x,)

    def _second(self, k: int, slope: Tensor, state: State, fresh: Tensor | None) -> Tensor:
        length = (single([self.sigmas[k + 1]]) - single([self.sigmas[k]])).item()
        return state[0] + slope * length


@dataclass(frozen=True)
class Heun(TwoStages):
    """Second order in sigma: the mean of the slopes at both ends of a step (arXiv:2206.00364, algorithm 1)."""

    name = "heun"

    @cached_property
    def _middle(self) -> tuple[float, ...]:
        return self.sigmas[1:]  # the far end: there the second call is made

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        whole = self._places[0]
        return tuple(single([whole[0], *(t for t in whole[1:] for _ in range(2))]).tolist())

    def _first(self, k: int, slope: Tensor, x: Tensor, fresh: Tensor | None) -> tuple[Tensor, State]:
        moved, state = super()._first(k, slope, x, fresh)
        return moved, (*state, slope)

    def _second(self, k: int, slope: Tensor, state: State, fresh: Tensor | None) -> Tensor:
        return super()._second(k, (state[1] + slope) / 2, state, fresh)


@dataclass(frozen=True)
class DPM2(TwoStages):
    """Second order in sigma: the slope half way of a step, in log(sigma) (k-diffusion's sample_dpm_2)."""

    name = "dpm2"
    predictions = ("epsilon", "v_prediction")
    rounds = True

    @cached_property
    def _middle(self) -> tuple[float, ...]:
        logs = single(list(self.sigmas)).log()
        return (*logs[1:].lerp(logs[:-1], 0.5).exp()[:-1].tolist(), 0.0)


@dataclass(frozen=True)
class DPM2Ancestral(DPM2):
    """DPM2 to a lower sigma, and fresh noise in second calls (k-diffusion's sample_dpm_2_ancestral)."""

    name = "dpm2_a"

    @cached_property
    def _ancestral(self) -> tuple[Tensor, Tensor]:
        sigmas = single(list(self.sigmas))
        return ancestral(sigmas[:-1], sigmas[1:])

    @cached_property
    def _middle(self) -> tuple[float, ...]:
        logs, down = single(list(self.sigmas)).log()[:-1], self._ancestral[0].log()
        return (*logs.lerp(down, 0.5).exp()[:-1].tolist(), 0.0)

    def draws(self, i: int) -> bool:
        return i % 2 == 1

    def _second(self, k: int, slope: Tensor, state: State, fresh: Tensor | None) -> Tensor:
        down, up = (values[k] for values in self._ancestral)
        length = (down - single([self.sigmas[k]])[0]).item()
        return state[0] + slope * length + self.fresh(2 * k + 1, fresh) * up.item()


@dataclass(frozen=True)
class DPMppSDE(TwoStages):
    """DPM-Solver++ (SDE) of second order in single steps, r = 1/2 (k-diffusion's sample_dpmpp_sde).

    Two ancestral steps in log(sigma), half way and then whole, each with fresh noise. Both noises belong to one
    Brownian path in sigma: the second step's is made of the first's and of fresh noise for the rest of the way.
    """

    name = "dpmpp_sde"
    predictions = ("epsilon", "v_prediction")
    in_single = False

    @cached_property
    def _times(self) -> tuple[Tensor, Tensor]:
        """-log(sigma) at each whole step and after the last; and half way of each step."""
        t = -single(list(self.sigmas)).log()
        return t, t[:-1] + t.diff() * 0.5

    @cached_property
    def _middle(self) -> tuple[float, ...]:
        return (*(-self._times[1]).exp()[:-1].tolist(), 0.0)

    def draws(self, i: int) -> bool:
        return i < len(self.timesteps) - 1

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        sigma, k = self.level(i)[1], i // 2
        clean = self._clean(prediction, x, sigma)
        if not self.draws(i):
            return x + (x - clean) / sigma * (self.sigmas[k + 1] - sigma), ()
        fresh = self.fresh(i, variance_noise)
        (start, end), middle = self._times[0][k : k + 2], self._times[1][k]
        if i % 2 == 0:
            return self._ancestral_step(clean, x, fresh, start, middle), (x, fresh)
        if not state:
            return self._ancestral_step(clean, x, fresh, middle, end), ()
        before, first = state
        ways = self.sigmas[k] - sigma, sigma - self.sigmas[k + 1]
        noise = (ways[0] ** 0.5 * first + ways[1] ** 0.5 * fresh) / sum(ways) ** 0.5
        return self._ancestral_step(clean, before, noise, start, end), ()

    @staticmethod
    def _ancestral_step(clean: Tensor, x: Tensor, noise: Tensor, t: Tensor, t_after: Tensor) -> Tensor:
        start, end = (-t).exp(), (-t_after).exp()
        down, up = ancestral(start, end)
        up = torch.minimum(end, up)
        t_down = -down.log()
        x = ((-t_down).exp() / start).item() * x - (t - t_down).expm1().item() * clean
        return x + noise * up.item()
