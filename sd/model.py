"""`StableDiffusion`: the three parts of a model, and what its files say about them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .prompts.encoder import TextEncoder
from .unet import UNet
from .vae import VAE
from .weights.defaults import Defaults
from .weights.mapped import WeightFiles
from .weights.unread import computes_in


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
        self.adapters: Any = ()  # what `sd.lora` has added

    @property
    def device(self) -> torch.device:
        return computes_in(self.unet)[0]

    @property
    def dtype(self) -> torch.dtype:
        return computes_in(self.unet)[1]

    @property
    def hash(self) -> str | None:
        """The first 10 digits of the weights file's SHA-256, as AUTOMATIC1111 writes it; read on first use.

        Of a folder, that of the UNet's file.
        """
        digest = self.files.digest()
        return digest and digest[:10]

    def check_file(self) -> None:
        """Raise LoadError if a file that the model still computes from has become shorter."""
        self.files.check()

    @torch.no_grad()
    def encode_prompt(
        self, prompts: str | list[str], prompt_style: str = "plain", clip_skip: int | None = None
    ) -> Tensor:
        """Texts -> (B, 77k, C), for the UNet; see `TextEncoder.encode` for the styles, warnings and errors."""
        self.check_file()
        return self.text.encode(prompts, prompt_style, clip_skip).to(device=self.device, dtype=self.dtype)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Move or convert the three parts in place, and return the model."""
        self.unet.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=dtype)
        self.text.model.to(device=device, dtype=dtype)
        return self

    def with_parts(self, unet: UNet, vae: VAE, text: TextEncoder) -> StableDiffusion:
        """The same model by name, files and defaults, with these in place of its parts."""
        result = copy.copy(self)
        result.unet, result.vae, result.text = unet, vae, text
        return result
