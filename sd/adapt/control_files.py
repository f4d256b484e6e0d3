"""`load_controlnet`: a ControlNet from any of the forms that it comes in; and `save_controlnet`, as one file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from ..loader import check_dtype
from ..model import StableDiffusion
from ..unet import UNetConfig
from ..weights import names
from ..weights.checkpoint import write_safetensors
from ..weights.configs import LIST, WIDTH, LoadError, config_of
from ..weights.controlnets import METADATA, PREFIX, FoundControlNet, find_controlnet
from ..weights.mapped import WeightFiles
from ..weights.source import check_fit, shapes_of
from ..weights.told import check_device, checked_path
from ..weights.unread import leave_in_file, tensors_of
from .controlnet import ControlNet, ControlNetConfig

OWN = {f.name for f in fields(ControlNetConfig)} - {f.name for f in fields(UNetConfig)}


def load_controlnet(
    source: str | os.PathLike[str],
    *,
    model: StableDiffusion | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    variant: str | None = None,
) -> ControlNet:
    """A ControlNet, to be given to a sampler: sampler(prompt, controlnet=net, control_image=picture).

    source   a .pth or .safetensors file of CompVis's names (of the ControlNet alone, or of a whole model with it) or
             of the Hub's; a folder of the Hub's layout, or a repository such as "lllyasviel/sd-controlnet-canny"
    model    the model that it is to draw with. It is asked for what is not given here: device, dtype, and the head
             count, which files of CompVis's names do not tell (without a model, 8 as in Stable Diffusion v1). Files
             that hold the differences from a UNet alone (`difference`) need it: its weights are added to them
    device, dtype   if there is no model: the CPU, and float32 there, float16 elsewhere
    config   what a file does not tell, as {"num_heads": 4}, or {"global_pool": True} for "shuffle": fields of
             ControlNetConfig
    revision, token, variant   of a Hub repository, as for `sd.load`

    The weights stay in their file until the ControlNet is first called. Raises LoadError, HubError or
    CheckpointError, all of them ValueErrors, in one sentence: also for a ControlNet of SDXL or of another kind, and
    for one whose tensors are not all there.
    """
    check_dtype(dtype)
    if device is not None:
        check_device(device)
    found = find_controlnet(source, revision=revision, token=token, variant=variant)
    net = made_of(found, model, config or {})
    place = torch.device(device) if device is not None else model.device if model else torch.device("cpu")
    usual = model.dtype if model else torch.float32 if place.type == "cpu" else torch.float16
    leave_in_file(net, place, dtype or usual)
    return net


def made_of(found: FoundControlNet, model: StableDiffusion | None, config: Mapping[str, Any]) -> ControlNet:
    """The network with the tensors of what was found, where and in what they are. Raises LoadError."""
    heads = {name: getattr(model.unet.config, name) for name in ("num_heads", "num_head_channels")} if model else {}
    with torch.device("meta"):
        net = ControlNet(config_from(found.name, {**found.inferred, **heads, **found.told, **config}))
    wanted = net.state_dict()
    tensors = found.tensors
    if found.hub:
        table = names.controlnet_to_hub(wanted, net.config, len(net.config.hint_widths))
        tensors = names.from_hub(tensors, table, {name: tensor.shape for name, tensor in wanted.items()})
    check_fit(found.name, "ControlNet", tensors, shapes_of(net))
    if found.difference:
        tensors = added_to(found, tensors, model)
    net.load_state_dict(tensors, strict=True, assign=True)
    net.name, net.files = found.name, WeightFiles({"unet": found.files}, found.maps)
    return net.eval()


def config_from(name: str, settings: Mapping[str, Any]) -> ControlNetConfig:
    """Raises LoadError for fields that there are not, and for sizes that cannot be."""
    own = {key: value for key, value in settings.items() if key in OWN}
    unet = config_of(UNetConfig, {key: value for key, value in settings.items() if key not in OWN})
    if isinstance(own.get("hint_widths"), list):
        own["hint_widths"] = tuple(own["hint_widths"])
    result = ControlNetConfig(**{f.name: getattr(unet, f.name) for f in fields(unet)}, **own)
    numbers = [result.hint_channels, *(result.hint_widths if isinstance(result.hint_widths, tuple) else [None])]
    sound = all(type(n) is int and 0 < n <= WIDTH for n in numbers) and 2 <= len(numbers) <= LIST + 1
    if not sound or type(result.global_pool) is not bool:
        odd = ", ".join(f"{key} = {getattr(result, key)!r}" for key in sorted(OWN))
        raise LoadError(f"{name}: a ControlNet cannot have {odd}: give usable sizes.")
    return result


def added_to(
    found: FoundControlNet, tensors: Mapping[str, Tensor], model: StableDiffusion | None
) -> dict[str, Tensor]:
    """Differences and the UNet's weights, added up; what the UNet has not is as it is."""
    if model is None:
        raise LoadError(
            f"{found.name} holds differences from the weights of a UNet: give the model that it is for, as model=."
        )
    base = {name: tensor for name, tensor, _ in tensors_of(model.unet)}
    result = {}
    for name, tensor in tensors.items():
        if name in base:
            own = base[name][:, : tensor.shape[1]] if tensor.ndim > 1 else base[name]  # of 9 channels, the latents'
            if own.shape != tensor.shape:
                raise LoadError(
                    f"{found.name} holds differences from another UNet than this model's: {name} is "
                    f"{tuple(tensor.shape)} there, and {tuple(own.shape)} here; give it the model that it is for."
                )
            wide = torch.promote_types(torch.promote_types(tensor.dtype, own.dtype), torch.float32)
            tensor = tensor.to(wide) + own.to("cpu", wide)
        result[name] = tensor
    return result


def save_controlnet(
    net: ControlNet, path: str | os.PathLike[str], dtype: torch.dtype | None = None, *, force: bool = False
) -> None:
    """Write a ControlNet as one .safetensors file of CompVis's names, which other programs read as well.

    Its sizes are in the header. Written whole or not at all. Raises LoadError where the file exists, unless `force`.
    """
    check_dtype(dtype)
    path = checked_path(path, "ControlNets", force)
    tensors, types = {}, {}
    for name, tensor, own in tensors_of(net):
        tensors[PREFIX + name], types[PREFIX + name] = tensor, dtype or own
    header = {"format": "pt", METADATA: json.dumps(asdict(net.config))}
    write_safetensors(path, tensors, header, types, force=force)
