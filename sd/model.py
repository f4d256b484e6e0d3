"""`StableDiffusion`: the three parts of a model, and what its files say about them."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .scheduler import V1, NoiseSchedule
from .text import TextEncoder
from .unet import UNet
from .vae import VAE
from .weights.source import LoadError


@dataclass(frozen=True)
class Defaults:
    """How to draw with a model where a call does not say: what its files say of it, or else Stable Diffusion v1's."""

    scheduler: str = "pndm"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int | None = None  # pixels; the size that the model was trained for
    width: int | None = None
    prediction_type: str = "epsilon"
    schedule: NoiseSchedule = V1


class StableDiffusion:
    """The three parts of a model. `device` and `dtype` are the UNet's, `name` and `hash` tell which weights."""

    defaults = Defaults()
    is_fast = False  # of `sd.fast`: what the blocks compute is not what their parts say

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text: TextEncoder,
        *,
        name: str = "",
        size: int = 512,
        weights: Path | None = None,
        files: Collection[Path] = (),
        lazy: tuple[torch.device, torch.dtype] | None = None,
    ):
        self.unet, self.vae, self.text = unet, vae, text
        self._mapped = lazy is not None  # whether weights are read from the file after loading
        self._lazy = lazy  # where and in what to compute, while the weights are still as they are in the file
        self.name = name
        self.size = size  # pixels along an edge that it was trained for
        self._weights = weights
        files = dict.fromkeys([*([weights] if weights is not None else []), *files])
        self._files = {file: file.stat().st_size for file in files}

    @property
    def lazy(self) -> bool:
        """Whether the weights are still as they are in the file."""
        return self._lazy is not None

    @property
    def device(self) -> torch.device:
        return self._lazy[0] if self._lazy else next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self._lazy[1] if self._lazy else next(self.unet.parameters()).dtype

    @property
    def hash(self) -> str | None:
        """The first 10 digits of the weights file's SHA-256, as AUTOMATIC1111 writes it; read on first use."""
        if "_hash" not in self.__dict__:
            self._hash = None
            if self._weights is not None:
                with open(self._weights, "rb") as file:
                    digest = hashlib.sha256()
                    while block := file.read(1 << 24):
                        digest.update(block)
                self._hash = digest.hexdigest()[:10]
        return self._hash

    def check_file(self) -> None:
        """Raise LoadError if the file that the model computes from is gone, or has become shorter.

        For a model that was loaded lazily, and a fast one that was made of it; others pass. Reading a map beyond its
        file's end would end the process.
        """
        for file, before in self._files.items() if self._mapped else ():
            try:
                size = os.stat(file).st_size
            except OSError:
                size = 0
            if size < before:
                what = "is gone" if not size else f"has shrunk from {before} to {size} bytes"
                raise LoadError(f"{file} {what} while it was in use: put it back, and draw again.")

    @torch.no_grad()
    def encode_prompt(self, prompts: str | list[str]) -> Tensor:
        """Texts -> (B, 77, C), for the UNet; see `TextEncoder.encode` for warnings and errors."""
        return self.text.encode(prompts).to(device=self.device, dtype=self.dtype)

    def ready(self) -> StableDiffusion:
        """The model with its weights where and in what it computes; one that is loaded lazily is loaded now."""
        return self.to(self.device, self.dtype) if self._lazy else self

    def with_parts(self, unet: UNet, vae: VAE, text: TextEncoder) -> StableDiffusion:
        """The same model by name and file, with these in place of its parts, as they are."""
        result = copy.copy(self)
        result.unet, result.vae, result.text, result._lazy = unet, vae, text, None
        result.is_fast = False
        return result

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Move or convert the three parts in place, and return the model."""
        if self._lazy is not None:
            device, dtype, self._lazy = device or self._lazy[0], dtype or self._lazy[1], None
            self._mapped = False
        self.unet.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=dtype)
        self.text.to(device=device, dtype=dtype)
        return self


def refuse_fast(model: StableDiffusion, who: str) -> None:
    """Raise ValueError for a model of `sd.fast`: `who` works with the parts of blocks, which it does not call."""
    if model.is_fast:
        raise ValueError(
            f"{who} takes the blocks apart, and those of sd.fast cannot be: give it the model from sd.load."
        )
