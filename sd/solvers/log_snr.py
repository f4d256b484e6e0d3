"""Solvers in which x = alpha x_0 + sigma noise, alpha^2 + sigma^2 = 1, over lambda = log(alpha / sigma)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..schedule import State
from .table import SigmaTable, at_least_single, single


@dataclass(frozen=True)
class LambdaSolver(SigmaTable):
    """Family B. x is x_t; a step is exact where the polynomial through the last x_0 over lambda is."""

    @property
    def most_steps(self) -> int:
        return self.schedule.num_train_timesteps - 1  # two steps at one timestep have no distance

    @cached_property
    def _places(self) -> tuple[list[float], list[float]]:
        """The timesteps and sigmas of the steps, without what comes after the last."""
        if self.sigma_spacing:
            sigmas = self.spread(self.table[-1].item(), self.table[0].item())
            timesteps = [self.timestep_of(s) for s in sigmas]
            return [float(round(t) if self.sigma_spacing == "karras" else int(t)) for t in timesteps], sigmas
        n, train = self.num_inference_steps, self.schedule.num_train_timesteps
        if self.timestep_spacing == "linspace":
            timesteps = [float(round(k * ((train - 1) / n))) for k in range(n, 0, -1)]
        elif self.timestep_spacing == "leading":
            stride = train // (n + 1)
            offset = min(self.schedule.steps_offset, train - 1 - n * stride)
            timesteps = [float(k * stride + offset) for k in range(n, 0, -1)]
        else:
            timesteps = list(reversed(self.spaced))
        return timesteps, self.sigmas_at(timesteps)

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(self._places[0])

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """Noise by signal of x at each step and after the last: num_inference_steps + 1 float32 values."""
        return (*single(self._places[1]).tolist(), self.final_sigma)

    @cached_property
    def _levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and lambda at each step and after the last."""
        sigmas = single(list(self.sigmas))
        alpha = 1 / (sigmas**2 + 1) ** 0.5
        return alpha, sigmas * alpha, alpha.log() - (sigmas * alpha).log()

    def level(self, i: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
        self.check_index(i)
        sigma = torch.tensor(self.sigmas[i], dtype=torch.float32, device="cpu").to(dtype)
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha.item(), (sigma * alpha).item()


@dataclass(frozen=True)
class DPMpp2M(LambdaSolver):
    """DPM-Solver++ of second order in multisteps (algorithm 2), which most people draw with.

    The first step is of first order; so is the last where it ends at sigma 0, with `euler_at_final`, or with
    `lower_order_final` and fewer than 15 steps.
    """

    euler_at_final: bool = field(default=False, kw_only=True)
    lower_order_final: bool = field(default=True, kw_only=True)

    name = "dpmpp_2m"

    @cached_property
    def _coefficients(self) -> list[list[float]]:
        """Of x, of the newest x_0, of fresh noise; and 1 / r_0 for the difference from the x_0 before."""
        alpha, sigma, lam = self._levels
        h = lam.diff()
        a, b = sigma[1:] / sigma[:-1], -(alpha[1:] * ((-h).exp() - 1.0))
        r = torch.cat([h[:1], h[:-1] / h[1:]])
        return torch.stack((a, b, torch.zeros_like(a), 1.0 / r), dim=1).tolist()

    def _first_order(self, i: int) -> bool:
        last = i == self.num_inference_steps - 1
        few = self.lower_order_final and self.num_inference_steps < 15
        return last and (self.euler_at_final or few or self.final_sigmas_type == "zero")

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        m = self.denoised(i, prediction, x)
        a, b, c, inverse = self._coefficients[i]
        y = a * at_least_single(x) + b * m
        if state and not self._first_order(i):
            y = y + (0.5 * b) * (inverse * (m - state[0]))
        if self.draws(i):
            y = y + c * at_least_single(self.fresh(i, variance_noise))
        return y.to(x.dtype), (m,)


@dataclass(frozen=True)
class DPMpp2MSDE(DPMpp2M):
    """DPMpp2M for the equation with noise: each step forgets a part of x, and draws it anew."""

    name = "dpmpp_2m_sde"
    noise_dtype = torch.float32  # even in float64, as in diffusers

    @cached_property
    def _coefficients(self) -> list[list[float]]:
        alpha, sigma, lam = self._levels
        h = lam.diff()
        a, b = sigma[1:] / sigma[:-1] * (-h).exp(), alpha[1:] * (1 - (-2.0 * h).exp())
        r = torch.cat([h[:1], h[:-1] / h[1:]])
        return torch.stack((a, b, sigma[1:] * (1.0 - (-2 * h).exp()).sqrt(), 1.0 / r), dim=1).tolist()

    def draws(self, i: int) -> bool:
        return True


@dataclass(frozen=True)
class UniPC(LambdaSolver):
    """Predictor and corrector of order `solver_order`, 1 to 3, by one call of the model a step.

    solver_type   "bh2" or "bh1": what B(h) is, expm1(h) or h (section 3.1)

    Before each step but the first, the x that it got is corrected by what the model says of it. The order rises
    with what is remembered, and falls at the end with `lower_order_final`.
    """

    solver_order: int = field(default=2, kw_only=True)
    solver_type: str = field(default="bh2", kw_only=True)
    lower_order_final: bool = field(default=True, kw_only=True)

    name = "unipc"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_order not in (1, 2, 3) or isinstance(self.solver_order, bool):
            raise ValueError(f"solver_order must be 1, 2 or 3, not {self.solver_order!r}")
        if self.solver_type not in ("bh1", "bh2"):
            raise ValueError(f"solver_type must be 'bh1' or 'bh2', not {self.solver_type!r}")

    @property
    def final_sigma(self) -> float:
        if self.sigma_spacing and self.final_sigmas_type == "sigma_min":
            return single(self._places[1][-1:]).item()  # its own last one
        return super().final_sigma

    def _order(self, i: int, seen: int) -> int:
        """Of the predictor at step i, with so many predictions seen, this one included."""
        left = self.num_inference_steps - i if self.lower_order_final else self.solver_order
        return min(self.solver_order, left, seen)

    def _rates(self, i: int, order: int, correct: bool) -> tuple[float, float, float, list[float], list[float]]:
        """Of a step that ends at i + 1: factors of x, of m_0 and of the sum; r_k; and the weights of the sum."""
        alpha, sigma, lam = self._levels
        h = lam[i + 1] - lam[i]
        phi = torch.expm1(-h)
        size = -h if self.solver_type == "bh1" else phi  # B(h)
        r = [(lam[i - k] - lam[i]) / h for k in range(1, order)]
        terms = order if correct else order - 1
        if terms == 1:
            rho = torch.tensor([0.5])
        else:  # R rho = b, section 3.1
            nodes = torch.stack([*r, torch.ones(())])
            b, term, factorial = [], phi / -h - 1, 1
            for k in range(1, order + 1):
                b.append(term * factorial / size)
                factorial *= k + 1
                term = term / -h - 1 / factorial
            powers = torch.stack([nodes ** (k - 1) for k in range(1, order + 1)])
            rho = torch.linalg.solve(powers[:terms, :terms], torch.stack(b)[:terms])
        keep, gain = sigma[i + 1] / sigma[i], alpha[i + 1] * phi
        return keep.item(), gain.item(), (alpha[i + 1] * size).item(), [k.item() for k in r], rho.tolist()

    def _update(self, i: int, x: Tensor, past: State, order: int, now: Tensor | None) -> Tensor:
        """From step i to i + 1: predicted from the past alone, or corrected by what the model says `now`."""
        if self.sigmas[i] == self.sigmas[i + 1]:
            return x
        keep, gain, factor, r, rho = self._rates(i, order, now is not None)
        m = past[0]
        result = keep * x - gain * m
        terms = [(other - m) / k for other, k in zip(past[1:order], r, strict=True)]
        terms += [] if now is None else [now - m]
        if not terms:
            return result
        return result - factor * sum(weight * term for weight, term in zip(rho, terms, strict=True))

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        m = self.denoised(i, prediction, x)
        before, past = (state[0], state[1:]) if state else (x, ())
        if past:
            x = self._update(i - 1, before, past, self._order(i - 1, len(past)), m)
        past = (m, *past)[: self.solver_order]
        return self._update(i, x, past, self._order(i, len(past)), None), (x, *past)
