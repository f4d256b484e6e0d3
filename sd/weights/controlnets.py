"""A ControlNet by itself, wherever it is: in a file, in a folder or a repository of the Hub's layout.

control_*.pth, .safetensors   CompVis's names, with or without control_model., perhaps beside a whole model
the same with `difference`    what is to be added to the weights of a UNet
diffusion_pytorch_model.*     the Hub's names; its config.json lies beside it
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import parse_json
from . import hub, layout, names
from .checkpoint import read
from .configs import LoadError, count, infer_unet, of_projection, unet_from_hub
from .source import place_of, read_config_file

EXPECTED = (
    "give a ControlNet's .pth or .safetensors file, a folder, or a repository such as lllyasviel/sd-controlnet-canny"
)
METADATA = "sd.controlnet"  # the header entry of a file of ours: JSON, the fields of ControlNetConfig
PREFIX = "control_model."
OWN_OPTIONS = {  # of a Hub's config, beside those of a UNet
    "conditioning_channels",
    "conditioning_embedding_out_channels",
    "controlnet_conditioning_channel_order",
    "global_pool_conditions",
}


@dataclass(frozen=True)
class FoundControlNet:
    """What was found at a source, before a ControlNet is made of it.

    tensors      by CompVis's names without a prefix, or by the Hub's where `hub` says so
    told         fields of ControlNetConfig that the source tells
    inferred     those that the shapes of its tensors tell, or nothing where they are not a ControlNet's
    difference   its tensors are to be added to those of a UNet
    """

    name: str
    form: str  # "CompVis file", "self-contained file", "Hub layout", "file of the Hub's layout"
    tensors: dict[str, Tensor]
    told: dict[str, Any]
    inferred: dict[str, Any]
    hub: bool = False
    difference: bool = False
    files: list[Path] = field(default_factory=list)
    maps: list[tuple[Path, mmap]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


def find_controlnet(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: Any = None,
    variant: str | None = None,
    look: bool = False,
) -> FoundControlNet:
    """Look at a ControlNet without loading it. Raises LoadError, HubError or CheckpointError, in one sentence.

    With `look`, the weights of a repository are not downloaded where their headers tell what they are.
    """
    hub.check_names(revision, variant, token)
    place = place_of(source, revision, EXPECTED)
    if isinstance(place, str):
        repository = hub.Repository(place, revision=revision, token=token)
        folder = repository.top_config()
        controlnet_from_hub(read_config_file(folder, place, "config.json"), place)  # before gigabytes come
        return in_folder(folder, place, variant, repository.top_weights(variant, look))
    return in_folder(place, os.fspath(source), variant) if place.is_dir() else in_file(place)


def in_folder(
    folder: Path, name: str, variant: str | None, headers: Mapping[str, dict[str, Tensor]] | None = None
) -> FoundControlNet:
    """A folder with a ControlNet's config.json, and its weights beside that unless their `headers` are given."""
    if not (folder / "config.json").is_file():
        layout.check_links(folder, ["config.json"], name)
        files = sorted(p.name for p in folder.iterdir() if p.suffix in {".pth", ".safetensors"})
        hint = f"give the path of {files[0]} in it" if files else EXPECTED
        raise LoadError(f"{name} is a folder without a ControlNet (it has no config.json): {hint}.")
    told = controlnet_from_hub(read_config_file(folder, name, "config.json"), name)
    if headers:
        tensors = layout.merged(headers, name)
        return FoundControlNet(name, "Hub layout", tensors, told, {}, hub=True)
    chosen = layout.part_files(layout.local_files(folder), "unet", "", variant, name)
    opened = {file: read(folder / file) for file in chosen}
    return FoundControlNet(
        name,
        "Hub layout",
        layout.merged({file: one.tensors for file, one in opened.items()}, name),
        told,
        {},
        hub=True,
        files=[one.path for one in opened.values()],
        maps=[(one.path, one.map) for one in opened.values()],
    )


def in_file(path: Path) -> FoundControlNet:
    file = read(path)
    tensors = {n.removeprefix(PREFIX): t for n, t in file.tensors.items() if n.startswith(PREFIX)} or file.tensors
    refuse_others(path, file.tensors, tensors)
    tensors = dict(tensors)
    difference = tensors.pop("difference", None) is not None or "difference" in file.tensors
    of_hub = any(n.startswith("controlnet_cond_embedding.") for n in tensors)
    form, told = "file of the Hub's layout" if of_hub else "CompVis file", {}
    if METADATA in file.metadata:
        form = "self-contained file"
        try:
            told = parse_json(str(file.metadata[METADATA]))
            if not isinstance(told, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            raise LoadError(f"{path} has damaged metadata ({error}): write it again.") from None
    try:
        inferred = infer_hub_controlnet(tensors) if of_hub else infer_controlnet(tensors)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise LoadError(
            f"{path} holds a ControlNet that is incomplete, or not of Stable Diffusion v1: tensor {error} is missing "
            f"or misshapen; {EXPECTED}."
        ) from None
    metadata = {k: v for k, v in file.metadata.items() if k != METADATA}
    return FoundControlNet(
        path.name, form, tensors, told, inferred, of_hub, difference, [path], [(path, file.map)], metadata
    )


def refuse_others(path: Path, whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise LoadError for a file that holds something else, by its name."""
    kind, own = names.kind_of(whole), tensors.keys()
    if "lora_controlnet" in whole or any(name.endswith((".up", ".down")) for name in own):
        kind = "Control-LoRA"
    elif any(name.startswith(("label_emb.", "add_embedding.")) for name in own):
        kind = "SDXL's ControlNet"
    elif any(name.startswith(("task_embedding", "control_add_embedding.", "control_type_proj")) for name in own):
        kind = "ControlNet Union"
    if kind != "ControlNet":
        what = "weights that are not recognised" if kind == "unknown" else f"{kind} weights"
        raise LoadError(f"{path} holds {what}, and no ControlNet of Stable Diffusion v1: {EXPECTED}.")


# ---- its sizes


def infer_controlnet(tensors: names.Tensors) -> dict[str, Any]:
    """Fields of ControlNetConfig that shapes tell by CompVis's names; neither the head count nor `global_pool`."""
    first = tensors["input_blocks.0.0.weight"]
    convolutions = count(tensors, r"input_hint_block\.(\d+)\.")
    hints = [tensors[f"input_hint_block.{2 * n}.weight"] for n in range(convolutions)]
    encoder = infer_unet({**tensors, "out.2.weight": first})  # it has no way up, and so no `out`
    return encoder | {"out_channels": first.shape[1]} | hint_sizes(hints)


def infer_hub_controlnet(tensors: names.Tensors) -> dict[str, Any]:
    """The same by the Hub's names."""
    levels = count(tensors, r"down_blocks\.(\d+)\.")
    widths = [tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
    block, middle = "controlnet_cond_embedding.", "mid_block.attentions.0.transformer_blocks"
    hints = [f"{block}blocks.{n}.weight" for n in range(count(tensors, rf"{block}blocks\.(\d+)\."))]
    first = tensors["conv_in.weight"]
    return {
        "in_channels": first.shape[1],
        "out_channels": first.shape[1],
        "model_channels": first.shape[0],
        "channel_mult": tuple(width // first.shape[0] for width in widths),
        "num_res_blocks": count(tensors, r"down_blocks\.0\.resnets\.(\d+)\."),
        "attention_resolutions": tuple(
            2**i for i in range(levels) if f"down_blocks.{i}.attentions.0.proj_in.weight" in tensors
        ),
        "context_dim": tensors[f"{middle}.0.attn2.to_k.weight"].shape[1],
        "transformer_depth": count(tensors, rf"{middle}\.(\d+)\."),
        **of_projection(tensors["mid_block.attentions.0.proj_in.weight"]),
    } | hint_sizes([tensors[name] for name in (f"{block}conv_in.weight", *hints, f"{block}conv_out.weight")])


def hint_sizes(convolutions: list[Tensor]) -> dict[str, Any]:
    """By the weights of the convolutions that the picture passes through, in order."""
    *between, _ = convolutions
    return {
        "hint_channels": between[0].shape[1],
        "hint_widths": tuple(weight.shape[0] for weight in between[::2]),
    }


def controlnet_from_hub(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A Hub ControlNet's config -> fields of ControlNetConfig. Raises LoadError naming what this one does not do."""
    try:
        kind = config.get("_class_name", "ControlNetModel")
        if kind != "ControlNetModel":
            raise ValueError(f"its config.json is of {kind!r}")
        order = config.get("controlnet_conditioning_channel_order") or "rgb"
        if order != "rgb":
            raise ValueError(f"its pictures have their channels in another order ({order!r})")
        widths = config.get("conditioning_embedding_out_channels") or [16, 32, 96, 256]
        if not isinstance(widths, list):
            raise ValueError(f"it has conditioning_embedding_out_channels = {widths!r}, which are no widths")
        encoder = unet_from_hub({key: value for key, value in config.items() if key not in OWN_OPTIONS})
    except (ValueError, TypeError) as error:
        raise LoadError(f"{name} is no ControlNet of Stable Diffusion v1: {error}; {EXPECTED}.") from None
    return encoder | {
        "out_channels": encoder["in_channels"],
        "hint_channels": config.get("conditioning_channels") or 3,
        "hint_widths": tuple(widths),
        "global_pool": bool(config.get("global_pool_conditions")),
    }
