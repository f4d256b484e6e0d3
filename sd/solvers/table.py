"""The noise levels that the solvers of both families go through."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..schedule import Scheduler

SIGMA_SPACINGS = ("", "karras", "exponential", "beta")
FINAL = ("zero", "sigma_min")


def single(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu").float()


def at_least_single(x: Tensor) -> Tensor:
    """x in float32 if its precision is lower than that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class SigmaTable(Scheduler):
    """The noise levels of both families: sigma = noise / signal of x_t.

    sigma_spacing      "": those of the timesteps; else between the largest and the smallest of them evenly in
                       sigma^(1/7) ("karras", arXiv:2206.00364, formula 5), in log(sigma) ("exponential"), or by the
                       quantiles of the beta distribution with 0.6 and 0.6 ("beta", arXiv:2407.12173)
    final_sigmas_type  after the last step: "zero", or "sigma_min", that of timestep 0
    """

    timestep_spacing: str = field(default="linspace", kw_only=True)
    sigma_spacing: str = field(default="", kw_only=True)
    final_sigmas_type: str = field(default="zero", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("sigma_spacing", SIGMA_SPACINGS), ("final_sigmas_type", FINAL)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {', '.join(map(repr, known))}, not {getattr(self, name)!r}")

    @cached_property
    def table(self) -> Tensor:
        """Sigma at each timestep of the training: (num_train_timesteps,), float32."""
        abar = self.schedule.alphas_cumprod
        if self.schedule.rescale_betas_zero_snr:
            abar[-1] = 2**-24  # diffusers': nearly the sigma of noise alone, which is infinite
        return ((1 - abar) / abar) ** 0.5

    def sigmas_at(self, timesteps: list[float]) -> list[float]:
        """Sigma at timesteps of any kind, linearly between whole ones."""
        table = self.table.double()
        t = torch.tensor(timesteps, dtype=torch.float64, device="cpu").clamp(0, len(table) - 1)
        low = t.long().clamp(max=len(table) - 2)
        return (table[low] + (table[low + 1] - table[low]) * (t - low)).tolist()

    def timestep_of(self, sigma: float) -> float:
        """The timestep with this sigma, linearly in its logarithm between whole ones."""
        logs = self.table.log()
        log = math.log(max(sigma, 1e-10))
        low = min(max(int((log - logs.double() >= 0).sum()) - 1, 0), len(logs) - 2)
        w = min(max((logs[low].item() - log) / (logs[low] - logs[low + 1]).item(), 0.0), 1.0)
        return (1 - w) * low + w * (low + 1)

    def spread(self, largest: float, smallest: float) -> list[float]:
        """As many sigmas as steps between two, falling, as `sigma_spacing` says."""
        n = self.num_inference_steps
        ramp = [k / max(n - 1, 1) for k in range(n)]
        if self.sigma_spacing == "karras":
            low, high = smallest ** (1 / 7.0), largest ** (1 / 7.0)
            return [(high + r * (low - high)) ** 7.0 for r in ramp]
        if self.sigma_spacing == "exponential":
            low, high = math.log(smallest), math.log(largest)
            return [math.exp(high + r * (low - high)) for r in ramp]
        return [smallest + beta_quantile(1 - r) * (largest - smallest) for r in ramp]

    @property
    def final_sigma(self) -> float:
        """After the last step."""
        return self.table[0].item() if self.final_sigmas_type == "sigma_min" else 0.0


def beta_quantile(p: float, a: float = 0.6) -> float:
    """x such that the beta distribution with a and a has the share p below it."""
    if p in (0.0, 0.5, 1.0):
        return p
    if p > 0.5:
        return 1 - beta_quantile(1 - p, a)
    # The share below x is x^a times a power series (DLMF 8.17.7), which converges fast below 1/2.
    norm = math.exp(2 * math.lgamma(a) - math.lgamma(2 * a))

    def below(x: float) -> float:
        term, total, k = 1.0, 1.0 / a, 0
        while abs(term) > 1e-18 * total:
            k += 1
            term *= (k - a) / k * x
            total += term / (a + k)
        return x**a * total / norm

    low, high = 0.0, 0.5
    x = min((p * a * norm) ** (1 / a), 0.5)
    for _ in range(100):  # Newton, and halving where that leaves the bracket
        error = below(x) - p
        low, high = (low, x) if error > 0 else (x, high)
        slope = (x * (1 - x)) ** (a - 1) / norm
        better = x - error / slope
        better = better if low < better < high else (low + high) / 2
        if abs(better - x) <= 1e-16 * x:
            break
        x = better
    return x
