"""From a source to a model: `load`, and the other way, `save` and `convert`.

Models are built on the meta device and given their tensors by assignment, so that nothing is initialised in
vain and a tensor that needs no conversion stays in the file's memory map.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .model import StableDiffusion
from .prompts.encoder import TextEncoder
from .text import Texts, own_names
from .weights import names
from .weights.checkpoint import write_safetensors
from .weights.configs import LoadError
from .weights.mapped import WeightFiles
from .weights.source import METADATA, Source, ema_weights, find, modules, refuse_other_kinds
from .weights.tokenizer import check_added, find_texts, tokenizer_texts
from .weights.told import apply_config, checked_path, places
from .weights.unread import leave_in_file, tensors_of
from .weights.vaes import find_vae, put_in


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | Mapping[str, str | torch.device] = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    variant: str | None = None,
    ema: bool = False,
    lazy: bool = False,
    vae: str | os.PathLike[str] | None = None,
) -> StableDiffusion:
    """A model from "shapes" (built in), a .ckpt or .safetensors file, a Hub repository, or a folder of its layout.

    device     of all three parts, or {"unet": "cuda:0", "vae": "cuda:1", "text": "cpu"}; a part that is not named
               goes where the UNet is
    dtype      float32 on the CPU and float16 elsewhere, if not given; tensors that have it already stay
               memory-mapped, others are converted one by one when they are needed
    revision, token, variant   of a Hub repository: branch, tag or commit; access; "fp16". A part without the variant
               is taken without it. The environment variable SD_HUB_TIMEOUT says for how many seconds the Hub may
               be silent; 30 if it is not set
    tokenizer  a folder with vocab.json and merges.txt; if not given, the source's own, else CLIP's: from the Hub's
               cache, an installed open_clip or clip package, or the Hub
    config     what a file does not tell, as {"unet": {"num_heads": 4}, "vae": {...}, "text": {...}, "defaults":
               {"prediction_type": "v_prediction"}} or the path of such a JSON file; fields of UNetConfig, VAEConfig,
               transformers' CLIPTextConfig, and Defaults
    ema        the EMA weights of a full-EMA checkpoint in place of the others
    vae        a VAE in place of the source's, which need not have one: as for `sd.with_vae`, but not TAESD
    lazy       no longer matters: weights always stay in the file until someone computes with them

    The parts are in eval mode and take gradients. Each is read, moved and converted when it is first called, or
    asked for its state_dict; a tokenizer that is neither in the source nor given is looked for when a text is first
    encoded. Raises LoadError, HubError or CheckpointError, all of them
    ValueErrors, in one sentence; a missing, surplus or misshapen tensor is named.
    """
    check_dtype(dtype)
    found = find(source, revision=revision, token=token, variant=variant)
    sizes = apply_config(found, config)
    refuse_other_kinds(found)
    if ema:
        found.parts["unet"] = ema_weights(found)
    if vae is not None:
        put_in(found, find_vae(vae, token=token))
    devices = places(device)
    dtypes = {part: dtype or (torch.float32 if d.type == "cpu" else torch.float16) for part, d in devices.items()}
    texts = find_texts(found, tokenizer, token)
    return build(found, sizes, texts, devices, dtypes)


def build(
    found: Source,
    config: Mapping[str, Any],
    texts: Texts | Callable[[], Texts],
    devices: Mapping[str, torch.device] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> StableDiffusion:
    """Make the model, each part for its device and dtype; else on the CPU, and as it is in the file."""
    unet, vae, text = modules(found, config)
    unet.load_state_dict(found.parts["unet"], strict=True, assign=True)
    vae.load_state_dict(found.parts["vae"], strict=True, assign=True)
    text.load_state_dict(own_names(found.parts["text"]), strict=True, assign=True)
    if devices and dtypes:
        for name, part in (("unet", unet), ("vae", vae), ("text", text)):
            leave_in_file(part, devices[name], dtypes[name])
    try:
        encoder = TextEncoder(text.eval().requires_grad_(False), texts, found.known_words)
        check_added(text.config.vocab_size, {} if callable(texts) else texts)
    except ValueError as error:
        raise LoadError(
            f"{found.name} and its tokenizer do not fit: {error}; give another as tokenizer= (--tokenizer)."
        ) from None
    return StableDiffusion(
        unet.eval(),
        vae.eval(),
        encoder,
        name=found.name,
        size=found.size or 512,
        defaults=found.defaults,
        files=WeightFiles(found.files, found.maps),
    )


def check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise LoadError(f"dtype must be torch.float16, bfloat16, float32 or float64, not {dtype!r}.")


# ---- writing


def save(
    model: StableDiffusion,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    force: bool = False,
) -> None:
    """Write a model as one self-contained .safetensors file, which `load` reads with nothing else.

    Weights have CompVis names, so other tools read them too; config and tokenizer are in the header. Written
    tensor by tensor, whole or not at all. Raises LoadError where the file exists, unless `force`.
    """
    check_dtype(dtype)
    path = checked_path(path, "models", force)
    if not model.vae.draws:
        raise LoadError(
            "A model that has TAESD for its VAE cannot be written as a file that other programs read: save it with "
            "its own VAE."
        )
    ours = {
        "config": {
            "unet": asdict(model.unet.config),
            "vae": asdict(model.vae.config),
            "text": asdict(model.text.config),
        },
        "tokenizer": dict(model.text.texts),
        "image_size": model.size,
        "defaults": model.defaults.as_dict(),
        "known_words": sorted(model.text.known_words) if model.text.known_words else None,
    }
    tensors: dict[str, torch.Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for part, module in (("unet", model.unet), ("vae", model.vae), ("text", model.text.model)):
        for name, tensor, own in tensors_of(module):  # as it lies in the file, and converted when it is its turn
            tensors[names.PREFIXES[part] + name], types[names.PREFIXES[part] + name] = tensor, dtype or own
    header = {"format": "pt", METADATA: json.dumps(ours), "modelspec.prediction_type": model.defaults.prediction_type}
    write_safetensors(path, tensors, header, types, force=force)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    force: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    variant: str | None = None,
    ema: bool = False,
    vae: str | os.PathLike[str] | None = None,
) -> None:
    """Write any source as a self-contained file; dtype None keeps the source's. See `load` and `save`."""
    check_dtype(dtype)
    if Path(out).exists() and not force:
        raise LoadError(f"{out} exists: choose another name, or write over it with force (--force).")
    found = find(source, revision=revision, token=token, variant=variant)
    sizes = apply_config(found, config)
    refuse_other_kinds(found)
    if ema:
        found.parts["unet"] = ema_weights(found)
    if vae is not None:
        put_in(found, find_vae(vae, token=token))
    model = build(found, sizes, tokenizer_texts(found, tokenizer, token))
    save(model, out, dtype, force=force)
