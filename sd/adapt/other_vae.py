"""`with_vae`: a model with another VAE than its own."""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

from ..files import printable
from ..loader import load
from ..model import StableDiffusion
from ..vae import VAE, VAEConfig
from ..weights.unread import computes_in, leave_in_file
from ..weights.vaes import FoundVAE, find_vae, vae_of
from .taesd import TinyVAE, tiny_vae_of


def with_vae(
    model: StableDiffusion,
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    variant: str | None = None,
) -> StableDiffusion:
    """A model with another VAE; `model` stays as it is, and shares its UNet and its text encoder.

    source   a file (.vae.pt, .safetensors, a checkpoint, of which the VAE is taken), a folder of the Hub's layout
             or a repository, such as "stabilityai/sd-vae-ft-mse"; or TAESD, the small VAE for previews, as the Hub's
             AutoencoderTiny ("madebyollin/taesd") or in its own files taesd_decoder.* and taesd_encoder.*
    revision, token, variant   as for `sd.load`

    The weights stay in their file until the VAE is called; it then computes where and in what the model's own would.
    Take `sd.fast` of the result. A checkpoint that has no VAE is loaded with `sd.load(..., vae=...)`.

    Raises LoadError, HubError or CheckpointError, all of them ValueErrors, in one sentence: also for a VAE of another
    latent, which has other channels, another size or another scale than the UNet draws.
    """
    found = find_vae(source, revision=revision, token=token, variant=variant)
    vae = made_of(found, latent_of(model.vae))
    leave_in_file(vae, *computes_in(model.vae))
    result = model.with_parts(model.unet, vae, model.text)
    result.files = model.files.with_part("vae", found.maps)
    return result


def load_with_vae(source: Any, vae: str | os.PathLike[str] | None = None, **options: Any) -> StableDiffusion:
    """`sd.load`, with another VAE in place of the source's, if one is given: TAESD, too.

    A source without a VAE is loaded with any but TAESD. Raises as `load` and `with_vae` do.
    """
    if vae is None or not find_vae(vae).tiny:
        return load(source, vae=vae, **options)
    return with_vae(load(source, **options), vae)


def made_of(found: FoundVAE, like: VAEConfig) -> VAE:
    """The VAE or TAESD that was found, for the latents of a VAE of this config."""
    if re.search("sdxl", found.name.rpartition("/")[2].lower()):  # its VAEs have the same shapes
        warnings.warn(
            f"{printable(found.name, 80)} is for SDXL, by its name, whose latents are others: colours may be wrong.",
            stacklevel=3,
        )
    return tiny_vae_of(found, like) if found.tiny else vae_of(found, like)


def latent_of(vae: VAE) -> VAEConfig:
    """The config of the VAE whose latents a model draws."""
    return vae.stands_for if isinstance(vae, TinyVAE) else vae.config
