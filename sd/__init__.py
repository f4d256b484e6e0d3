"""Stable Diffusion v1, written by hand. `sd.load("shapes")` gives a model, `sd.SimpleSampler` draws with it.

Names are imported on first use, so that `artist --help` need not wait for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import attention, study
    from .adapt.adapter_facts import lora_info
    from .adapt.adapters import lora
    from .adapt.control_files import load_controlnet, save_controlnet
    from .adapt.controlnet import ControlNet
    from .adapt.other_vae import with_vae
    from .adapt.own_words import textual_inversion
    from .attention import chunked_attention, use_attention
    from .compare.bridge import from_diffusers, to_diffusers
    from .lean.sampler import LeanSampler
    from .loader import convert, load, save
    from .model import StableDiffusion
    from .parallel.sampler import ParallelSampler
    from .pictures import alpha_mask, extend
    from .pictures.inversion import invert
    from .sampler import NotFiniteError, SimpleSampler, Step, denoise
    from .scheduler import DDIM, LMS, PNDM, NoiseSchedule, make_scheduler
    from .speed.fast_model import fast
    from .study.description import describe
    from .unet import UNet, UNetConfig
    from .vae import VAE, VAEConfig
    from .weights.checkpoint import CheckpointError
    from .weights.configs import LoadError
    from .weights.contents import info
    from .weights.defaults import Defaults
    from .weights.scheduler_config import scheduler_from_config

__version__ = "0.2.0"

_HOME = {
    **dict.fromkeys(["chunked_attention", "use_attention"], "attention"),
    "CheckpointError": "weights.checkpoint",
    "lora": "adapt.adapters",
    "lora_info": "adapt.adapter_facts",
    "ControlNet": "adapt.controlnet",
    **dict.fromkeys(["load_controlnet", "save_controlnet"], "adapt.control_files"),
    **dict.fromkeys(["UNet", "UNetConfig"], "unet"),
    **dict.fromkeys(["VAE", "VAEConfig"], "vae"),
    **dict.fromkeys(["DDIM", "LMS", "PNDM", "NoiseSchedule", "make_scheduler"], "scheduler"),
    **dict.fromkeys(["convert", "load", "save"], "loader"),
    "Defaults": "weights.defaults",
    "scheduler_from_config": "weights.scheduler_config",
    "StableDiffusion": "model",
    **dict.fromkeys(["from_diffusers", "to_diffusers"], "compare.bridge"),
    **dict.fromkeys(["alpha_mask", "extend"], "pictures"),
    "invert": "pictures.inversion",
    "LeanSampler": "lean.sampler",
    "ParallelSampler": "parallel.sampler",
    "describe": "study.description",
    "fast": "speed.fast_model",
    "textual_inversion": "adapt.own_words",
    "with_vae": "adapt.other_vae",
    "LoadError": "weights.configs",
    "info": "weights.contents",
    **dict.fromkeys(["NotFiniteError", "SimpleSampler", "Step", "denoise"], "sampler"),
}
__all__ = [
    "DDIM",
    "LMS",
    "PNDM",
    "VAE",
    "CheckpointError",
    "ControlNet",
    "Defaults",
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
    "alpha_mask",
    "attention",
    "chunked_attention",
    "convert",
    "denoise",
    "describe",
    "extend",
    "fast",
    "from_diffusers",
    "info",
    "invert",
    "load",
    "load_controlnet",
    "lora",
    "lora_info",
    "make_scheduler",
    "save",
    "save_controlnet",
    "scheduler_from_config",
    "study",
    "textual_inversion",
    "to_diffusers",
    "use_attention",
    "with_vae",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"sd.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and find_spec(f"sd.{name}"):  # a file or a room: sd.attention, sd.study
        return import_module(f"sd.{name}")
    raise AttributeError(f"module 'sd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
