"""Stable Diffusion v1, written by hand. `sd.load("shapes")` gives a model, `sd.SimpleSampler` draws with it.

Names are imported on first use, so that `artist --help` need not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import study
    from .attention import attention, chunked_attention, use_attention
    from .checkpoint import CheckpointError
    from .describe import describe
    from .fast import fast
    from .lean import LeanSampler
    from .loader import StableDiffusion, convert, load, save
    from .parallel import ParallelSampler
    from .sampler import NotFiniteError, SimpleSampler, Step, denoise
    from .scheduler import DDIM, LMS, PNDM, NoiseSchedule
    from .source import LoadError, info
    from .unet import UNet, UNetConfig
    from .vae import VAE, VAEConfig

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(["attention", "chunked_attention", "use_attention"], "attention"),
    "CheckpointError": "checkpoint",
    **dict.fromkeys(["UNet", "UNetConfig"], "unet"),
    **dict.fromkeys(["VAE", "VAEConfig"], "vae"),
    **dict.fromkeys(["DDIM", "LMS", "PNDM", "NoiseSchedule"], "scheduler"),
    **dict.fromkeys(["StableDiffusion", "convert", "load", "save"], "loader"),
    "LeanSampler": "lean",
    "ParallelSampler": "parallel",
    "describe": "describe",
    "fast": "fast",
    **dict.fromkeys(["LoadError", "info"], "source"),
    **dict.fromkeys(["NotFiniteError", "SimpleSampler", "Step", "denoise"], "sampler"),
}
__all__ = [
    "DDIM",
    "LMS",
    "PNDM",
    "VAE",
    "CheckpointError",
    "LeanSampler",
    "LoadError",
    "NoiseSchedule",
    "NotFiniteError",
    "ParallelSampler",
    "SimpleSampler",
    "StableDiffusion",
    "Step",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "attention",
    "chunked_attention",
    "convert",
    "denoise",
    "describe",
    "fast",
    "info",
    "load",
    "save",
    "study",
    "use_attention",
]


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name == "study":  # a file that is used by its name: sd.study.trace
            return import_module("sd.study")
        if name not in _HOME:
            raise AttributeError(f"module 'sd' has no attribute {name!r}")
        value = getattr(import_module(f"sd.{_HOME[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the file sd/attention.py would bind it here as sd.attention, which is the function.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *_HOME, "study"})


sys.modules[__name__].__class__ = _Package
