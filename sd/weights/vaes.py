"""A VAE by itself, wherever it is: in a file, in a folder or a repository of the Hub's layout.

    .vae.pt, .vae.safetensors   CompVis's names, with or without first_stage_model., perhaps in a `state_dict`
    a checkpoint                its VAE is taken
    diffusion_pytorch_model.*   the Hub's names; its config.json lies beside it, at the top or in vae/
    taesd_decoder.*             TAESD, a small VAE for previews; taesd_encoder.* lies beside it

TAESD's own files number the layers of each half. The Hub's AutoencoderTiny, whose names are ours, calls them
decoder.layers.N; the decoder has one less there, for its first layer has no weights.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..vae import VAE, VAEConfig
from . import hub, layout, names
from .checkpoint import read
from .configs import LoadError, config_of, infer_hub_vae, infer_tiny_vae, infer_vae, tiny_vae_from_hub, vae_from_hub
from .source import Source, check_fit, find_file, place_of, read_config_file, rename, shapes_of

ENDINGS = (".safetensors", ".pth", ".pt")  # of TAESD's own files
EXPECTED = "give a VAE's file, a folder or a repository such as stabilityai/sd-vae-ft-mse"


@dataclass(frozen=True)
class FoundVAE:
    """What was found at a source, before a VAE is made of it.

    tensors   CompVis's names, or those of the Hub's AutoencoderTiny where it is `tiny`
    config    fields of VAEConfig, as far as the source tells; what shapes tell is in it
    """

    name: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    weights: Path
    maps: list[tuple[Path, mmap]]
    tiny: bool = False

    @property
    def files(self) -> list[Path]:
        """All that its tensors are mapped from."""
        return [path for path, _ in self.maps]


def find_vae(
    source: str | os.PathLike[str], *, revision: str | None = None, token: Any = None, variant: str | None = None
) -> FoundVAE:
    """Look at a VAE without loading it. Raises LoadError, HubError or CheckpointError, in one sentence."""
    hub.check_names(revision, variant, token)
    place = place_of(source, revision, EXPECTED)
    if isinstance(place, str):
        return in_folder(hub.Repository(place, revision=revision, token=token).vae(variant), place, variant)
    return in_folder(place, os.fspath(source), variant) if place.is_dir() else in_file(place)


def in_folder(folder: Path, name: str, variant: str | None) -> FoundVAE:
    """A folder with a VAE's config.json and weights, or one with them in vae/, or with TAESD's own files."""
    inner = "" if (folder / "config.json").is_file() else "vae"
    where = folder / inner
    if not (where / "config.json").is_file():
        layout.check_links(folder, ["config.json", "vae/config.json"], name)
        for ending in ENDINGS:
            if (folder / f"taesd_decoder{ending}").is_file():
                return in_file(folder / f"taesd_decoder{ending}")
        files = sorted(p.name for p in folder.iterdir() if p.suffix in {".ckpt", ".safetensors", ".pt"})
        hint = f"give the path of {files[0]} in it" if files else EXPECTED
        raise LoadError(f"{name} is a folder without a VAE (it has no config.json, nor vae/config.json): {hint}.")
    config = read_config_file(where, name, "config.json")
    chosen = layout.part_files(layout.local_files(folder), "vae", inner, variant, name)
    opened = {file: read(folder / file) for file in chosen}
    tensors = layout.merged({file: one.tensors for file, one in opened.items()}, name)
    return by_hub(name, tensors, config, folder / chosen[0], [(one.path, one.map) for one in opened.values()])


def by_hub(
    name: str, tensors: dict[str, Tensor], config: Mapping[str, Any], weights: Path, maps: list[tuple[Path, mmap]]
) -> FoundVAE:
    """Tensors of the Hub's names, and the config.json that they come with. Raises LoadError for other kinds."""
    kind = config.get("_class_name", "AutoencoderKL")
    try:
        if kind == "AutoencoderTiny":
            sizes = tiny_vae_from_hub(config) | infer_tiny_vae(tensors)
            return FoundVAE(name, tensors, sizes, weights, maps, tiny=True)
        if kind != "AutoencoderKL":
            raise ValueError(f"it is a {kind}")
        sizes = vae_from_hub(config)
        return FoundVAE(name, rename("vae", tensors, {"vae": sizes}), sizes, weights, maps)
    except LoadError:
        raise
    except (ValueError, TypeError) as error:
        raise LoadError(f"{name} is no VAE of Stable Diffusion v1: {error}; {EXPECTED}.") from None


def in_file(path: Path) -> FoundVAE:
    found = find_file(path, path.name)
    kind = names.vae_kind(found.tensors)
    try:
        if kind == "TAESD":
            tensors, maps = of_both_halves(found)
            return FoundVAE(path.name, tensors, infer_tiny_vae(tensors), path, maps, tiny=True)
        if kind == "Hub":
            config = {}
            if (path.parent / "config.json").is_file():
                config = read_config_file(path.parent, path.name, "config.json")
            if config.get("_class_name") == "AutoencoderKL":
                return by_hub(path.name, found.tensors, config, path, found.maps)
            sizes = infer_hub_vae(found.tensors)
            return FoundVAE(path.name, rename("vae", found.tensors, {"vae": sizes}), sizes, path, found.maps)
        tensors = found.parts["vae"]
        if not tensors:
            kind = names.kind_of(found.tensors)
            what = "weights that are not recognised" if kind == "unknown" else f"{kind} weights without a VAE"
            raise LoadError(f"{path} holds {what}: {EXPECTED}.")
        return FoundVAE(path.name, tensors, found.configs.get("vae") or infer_vae(tensors), path, found.maps)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(
            f"{path} holds a VAE that is incomplete: tensor {error} is missing or misshapen; {EXPECTED}."
        ) from None


def of_both_halves(found: Source) -> tuple[dict[str, Tensor], list[tuple[Path, mmap]]]:
    """TAESD's tensors by the Hub's names, from its file and from that of its other half, if it is there."""
    if not names.RAW_TAESD.fullmatch(next(iter(found.tensors))):
        return found.tensors, found.maps
    half = names.half_of_taesd(found.tensors)
    other = {"encoder": "decoder", "decoder": "encoder"}[half]
    tensors, maps = names.from_taesd(found.tensors, half), list(found.maps)
    beside = found.weights.with_name(found.weights.name.replace(half, other))
    if beside != found.weights and beside.is_file():
        file = read(beside)
        tensors |= names.from_taesd(file.tensors, other)
        maps.append((file.path, file.map))
    return tensors, maps


# ---- what it is given to


def check_latent(found: FoundVAE, like: VAEConfig) -> VAEConfig:
    """The config of a VAE that stands in for one of `like`. Raises LoadError where its latents are others.

    What a source does not tell, the number of groups of its norms and the factor of its latents, is as in `like`.
    """
    known = {f.name: getattr(like, f.name) for f in fields(VAEConfig) if f.name in ("num_groups", "scale_factor")}
    config: VAEConfig = config_of(VAEConfig, known | found.config)
    apart = []
    if config.z_channels != like.z_channels:
        apart.append(f"{config.z_channels} channels and not {like.z_channels}")
    if config.downsampling != like.downsampling:
        apart.append(f"a {config.downsampling}th of the picture's edge and not a {like.downsampling}th")
    if not found.tiny and not math.isclose(config.scale_factor, like.scale_factor, rel_tol=1e-4):
        apart.append(f"the scale {config.scale_factor:.6g} and not {like.scale_factor:.6g}")
    if apart:
        raise LoadError(
            f"{found.name} is a VAE of another latent, with {' and '.join(apart)} as this model's: give one that was "
            "made for models of this kind."
        )
    return config


def vae_of(found: FoundVAE, like: VAEConfig) -> VAE:
    """The VAE, with its tensors where they are in the file. Raises LoadError where they do not fit."""
    config = check_latent(found, like)
    with torch.device("meta"):
        vae = VAE(config)
    check_fit(found.name, "VAE", found.tensors, shapes_of(vae))
    vae.load_state_dict(found.tensors, strict=True, assign=True)
    return vae.eval()


def put_in(found: Source, other: FoundVAE) -> None:
    """Give a source this VAE in place of its own, or where it has none. Raises LoadError where it does not fit."""
    if other.tiny:
        raise LoadError(
            f"{other.name} is TAESD, which stands in for the VAE that a model has: load the model with its own, then "
            "sd.with_vae(model, ...)."
        )
    own = found.configs.get("vae") or {}
    with contextlib.suppress(KeyError, IndexError, ZeroDivisionError):  # it has none, or a damaged one
        own = own or infer_vae(found.parts["vae"])
    found.configs = found.configs | {"vae": asdict(check_latent(other, config_of(VAEConfig, own)))}
    found.parts["vae"] = other.tensors
    found.files, found.maps = found.files | {"vae": other.files}, found.maps + other.maps
