"""Solvers that go from timestep to timestep with fresh noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..schedule import Scheduler, State


@dataclass(frozen=True)
class LCM(Scheduler):
    """For models that were distilled to consistency: at once to x_0, and from there noised for the next step.

    The timesteps are some of the `original_inference_steps` that such a model was trained at: 999, 759, 499, 259 for
    4 steps. Guidance is part of these models: draw at 1 to 2.
    """

    original_inference_steps: int = field(default=50, kw_only=True)

    name = "lcm"

    def __post_init__(self) -> None:
        most = self.schedule.num_train_timesteps
        steps = self.original_inference_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= most:
            raise ValueError(f"original_inference_steps must be a whole number from 1 to {most}, not {steps!r}")
        super().__post_init__()

    @property
    def most_steps(self) -> int:
        return self.original_inference_steps

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        n, steps = self.num_inference_steps, self.original_inference_steps
        stride = self.schedule.num_train_timesteps // steps
        return tuple((steps - int(k * (steps / n))) * stride - 1 for k in range(n))

    @cached_property
    def _coefficients(self) -> list[list[float]]:
        t = torch.tensor(self.timesteps, device="cpu")
        abar = self.schedule.alphas_cumprod[torch.cat([t[1:], t[-1:]])]
        scaled = t * 10.0
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return torch.stack((skip, out, abar.sqrt(), (1 - abar).sqrt()), dim=1).tolist()

    def draws(self, i: int) -> bool:
        return i < self.num_inference_steps - 1

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        skip, out, signal, sigma = self._coefficients[i]
        clean = out * self.denoised(i, prediction, x) + skip * x
        return (signal * clean + sigma * self.fresh(i, variance_noise) if self.draws(i) else clean), state


@dataclass(frozen=True)
class DDPM(Scheduler):
    """Ancestral sampling as the model was trained for, with the smaller of the paper's two variances."""

    name = "ddpm"

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(round(t) for t in reversed(self.spaced))

    @cached_property
    def _coefficients(self) -> list[list[float]]:
        """Of x_0, of x, and of fresh noise (formulas 6 and 7)."""
        abar = self.schedule.alphas_cumprod[torch.tensor(self.timesteps, device="cpu")]
        after = torch.cat([abar[1:], torch.ones(1)])
        alpha = abar / after
        variance = ((1 - after) / (1 - abar) * (1 - alpha)).clamp(min=1e-20)
        clean, keep = after**0.5 * (1 - alpha) / (1 - abar), alpha**0.5 * (1 - after) / (1 - abar)
        return torch.stack((clean, keep, variance**0.5), dim=1).tolist()

    def draws(self, i: int) -> bool:
        self.check_index(i)
        return self.timesteps[i] > 0

    def step(
        self, i: int, prediction: Tensor, x: Tensor, state: State, *, variance_noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        clean, keep, std = self._coefficients[i]
        x = clean * self.denoised(i, prediction, x) + keep * x
        return (x + std * self.fresh(i, variance_noise) if self.draws(i) else x), state
