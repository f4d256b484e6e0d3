"""`StableDiffusion`: the three parts of a model, and what its files say about them; `Defaults`: how it draws."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .scheduler import SCHEDULERS, V1, NoiseSchedule
from .text import TextEncoder
from .unet import UNet
from .vae import VAE
from .weights.mapped import WeightFiles
from .weights.unread import computes_in


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


class StableDiffusion:
    """The three parts of a model. `device` and `dtype` are the UNet's, `name` and `hash` tell which weights.

    `defaults` says how it draws where a call of a sampler does not.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text: TextEncoder,
        *,
        name: str = "",
        size: int = 512,
        defaults: Defaults | None = None,
        files: WeightFiles | None = None,
    ):
        self.unet, self.vae, self.text = unet, vae, text
        self.name = name
        self.size = size  # pixels along an edge that it was trained for
        self.defaults = defaults or Defaults()
        self.files = files or WeightFiles()

    @property
    def device(self) -> torch.device:
        return computes_in(self.unet)[0]

    @property
    def dtype(self) -> torch.dtype:
        return computes_in(self.unet)[1]

    @property
    def hash(self) -> str | None:
        """The first 10 digits of the weights file's SHA-256, as AUTOMATIC1111 writes it; read on first use."""
        return self.files.digest[:10] if self.files.digest else None

    def check_file(self) -> None:
        """Raise LoadError if a file that the model still computes from has become shorter."""
        self.files.check()

    @torch.no_grad()
    def encode_prompt(self, prompts: str | list[str]) -> Tensor:
        """Texts -> (B, 77, C), for the UNet; see `TextEncoder.encode` for warnings and errors."""
        return self.text.encode(prompts).to(device=self.device, dtype=self.dtype)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Move or convert the three parts in place, and return the model."""
        self.unet.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=dtype)
        self.text.to(device=device, dtype=dtype)
        return self

    def with_parts(self, unet: UNet, vae: VAE, text: TextEncoder) -> StableDiffusion:
        """The same model by name, files and defaults, with these in place of its parts."""
        result = copy.copy(self)
        result.unet, result.vae, result.text = unet, vae, text
        return result
