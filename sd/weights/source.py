"""What is at a source, before a model is made of it: `find`, and `info` for people who want to know.

Nothing here reads weights: tensors are names, shapes and a memory map.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..text import TextConfig, own_names
from ..unet import UNet, UNetConfig
from ..vae import VAE, VAEConfig
from . import hub, names
from .checkpoint import read
from .tokenizer import ADDED, read_tokenizer

BUILT_IN = Path(__file__).parents[1] / "shapes.safetensors"
METADATA = "sd"  # the header entry of a self-contained file: JSON with config, tokenizer and more


class LoadError(ValueError):
    """A source that cannot become a model; the message is one sentence: what is wrong, and what to do."""


@dataclass
class Source:
    """What was found at a source, before a model is made of it."""

    name: str
    kind: str  # "CompVis file", "self-contained file", "Hub layout"
    parts: dict[str, dict[str, Tensor]]  # "unet", "vae", "text" -> CompVis name without prefix -> tensor
    unknown: list[str]
    weights: Path  # the file, or that of the UNet
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # as far as the source tells
    tokenizer: dict[str, str] | None = None
    size: int | None = None
    known_words: list[str] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)  # of a drawing, as far as the source tells
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of a single file: all, by its own names
    metadata: dict[str, Any] = field(default_factory=dict)
    maps: list[tuple[Path, mmap]] = field(default_factory=list)  # of all files that tensors are mapped from
    problem: str | None = None  # why `load` refuses it, where `find` was told to look only


def find(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: Any = None,
    variant: str | None = None,
    look: bool = False,
) -> Source:
    """Look at a source without loading it: tensors are names, shapes and a memory map. Raises as `load` does.

    With `look`, the weights of a repository are not downloaded (only .safetensors headers are), and a folder
    that `load` refuses is described, with the reason as `problem`.
    """
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
        raise LoadError(f"A source is a path, a repository's name or 'shapes', not {source!r}.")
    if source == "shapes":
        if not BUILT_IN.exists():
            raise LoadError(f"The built-in model is missing ({BUILT_IN.name}): install the package again.")
        return find_file(BUILT_IN, "shapes")
    path = Path(os.path.expanduser(source))
    text = os.fspath(source)
    if text and path.is_dir():  # Path("") is the folder here
        return find_folder(path, text, variant, look)
    if text and path.exists():
        return find_file(path, path.name)
    looks_like_file = path.suffix.lower() in {".ckpt", ".safetensors", ".pt", ".pth", ".bin"}
    if not looks_like_file and hub.REPO_ID.fullmatch(text) and not text.startswith("."):
        folder = hub.download(text, variant=variant, revision=revision, token=token, weights=False)
        if not look:
            read_configs(folder, text)  # refuses other models before their gigabytes come
        elif headers := hub.look(text, variant, revision, token):
            return describe_folder(folder, text, headers, folder, look)
        return find_folder(hub.download(text, variant=variant, revision=revision, token=token), text, variant, look)
    raise LoadError(
        f"There is no file or folder {text or repr(text)}: give a .ckpt or .safetensors file, a folder of the Hub's "
        'layout, a repository such as CompVis/stable-diffusion-v1-4, or "shapes", the built-in model.'
    )


def find_file(path: Path, name: str) -> Source:
    file = read(path)
    parts, unknown = names.split(file.tensors)
    found = Source(name, "CompVis file", parts, unknown, path, tensors=file.tensors, metadata=file.metadata)
    found.maps = [(path, file.map)]
    if METADATA in file.metadata:
        try:
            ours = json.loads(file.metadata[METADATA])
            found.configs, found.tokenizer = ours["config"], ours["tokenizer"]
            found.size, found.known_words = ours["image_size"], ours["known_words"]
            found.defaults = ours.get("defaults") or {}  # files of version 0.1 have none
            found.kind = "self-contained file"
            sound = all(isinstance(found.configs[part], dict) for part in names.PARTS)
            sound &= all(isinstance(found.tokenizer[name], str) for name in names.TOKENIZER_FILES)
            sound &= isinstance(found.tokenizer.get(ADDED, ""), str)
            found.tokenizer = {
                name: found.tokenizer[name] for name in (*names.TOKENIZER_FILES, ADDED) if name in found.tokenizer
            }
            sound &= isinstance(found.defaults, dict)
            sound &= type(found.size) is int and found.size > 0
            sound &= all(isinstance(word, str) for word in found.known_words or [])
            if not sound:
                raise ValueError("values of other types")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LoadError(f"{path} has damaged metadata ({error!r}): convert it again.") from None
    return found


# ---- the Hub's layout


def find_folder(folder: Path, name: str, variant: str | None, look: bool = False) -> Source:
    """A folder of the Hub's layout; tensors get their CompVis names here."""
    if not (folder / "unet/config.json").is_file():
        files = sorted(p.name for p in folder.iterdir() if p.suffix in {".ckpt", ".safetensors"})
        hint = f"give the path of {files[0]} in it" if files else "give a weights file or another folder"
        raise LoadError(f"{name} is a folder without unet/config.json, not of the Hub's layout: {hint}.")
    chosen = hub.weight_files(hub.local_files(folder), variant, name)
    opened = {part: read(folder / file) for part, file in chosen.items()}
    tensors = {part: file.tensors for part, file in opened.items()}
    found = describe_folder(folder, name, tensors, folder / chosen["unet"], look)
    found.maps = [(file.path, file.map) for file in opened.values()]
    return found


def describe_folder(
    folder: Path, name: str, tensors: dict[str, dict[str, Tensor]], weights: Path, look: bool
) -> Source:
    """The tensors of a Hub layout under CompVis names; with `look`, under their own where that fails."""
    try:
        configs = read_configs(folder, name)
        parts = {part: rename(part, found, configs) for part, found in tensors.items()}
    except LoadError as error:
        if not look:
            raise
        return Source(name, "Hub layout", dict(tensors), [], weights, problem=str(error))
    try:
        texts = read_tokenizer(folder / "tokenizer")
    except ValueError as error:
        raise LoadError(f"{name} has a tokenizer that cannot be read ({error}): replace it.") from None
    side = read_config_file(folder, name, "unet/config.json").get("sample_size") or 64
    side = side if type(side) is int else 64
    size = 2 ** (len(configs["vae"]["ch_mult"]) - 1) * side
    found = Source(name, "Hub layout", parts, [], weights, configs, tokenizer=texts, size=size)
    if (folder / "scheduler/scheduler_config.json").exists():
        found.defaults = names.defaults_from_hub(read_config_file(folder, name, "scheduler/scheduler_config.json"))
    return found


def rename(part: str, tensors: dict[str, Tensor], configs: Mapping[str, Any]) -> dict[str, Tensor]:
    if part == "text":
        return own_names(tensors)
    with torch.device("meta"):
        if part == "unet":
            unet = config_of(UNetConfig, configs["unet"])
            wanted = UNet(unet).state_dict()
            table = names.unet_to_hub(wanted, unet)
        else:
            vae = config_of(VAEConfig, configs["vae"])
            wanted = VAE(vae).state_dict()
            table = names.vae_to_hub(wanted, vae)
    return names.from_hub(tensors, table, {n: t.shape for n, t in wanted.items()})


def read_config_file(folder: Path, name: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / where).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{name} has no readable {where} ({error}): give the whole folder.") from None
    return content


def read_configs(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """The sizes of the three parts. Raises LoadError for what is no Stable Diffusion v1."""
    try:
        configs = {
            "unet": names.unet_from_hub(read_config_file(folder, name, "unet/config.json")),
            "vae": names.vae_from_hub(read_config_file(folder, name, "vae/config.json")),
            "text": names.text_from_hub(read_config_file(folder, name, "text_encoder/config.json")),
        }
        if (folder / "scheduler/scheduler_config.json").exists():
            names.check_schedule(read_config_file(folder, name, "scheduler/scheduler_config.json"))
        config_of(UNetConfig, configs["unet"])
        config_of(VAEConfig, configs["vae"])
        config_of(TextConfig, configs["text"])
    except LoadError:
        raise
    except (ValueError, TypeError) as error:
        raise LoadError(
            f"{name} is not Stable Diffusion v1, text to image: {error}; give a v1 model, such as "
            "CompVis/stable-diffusion-v1-4."
        ) from None
    return configs


def refuse_other_kinds(found: Source) -> None:
    """Raise LoadError for weights of another model, by its name."""
    tensors = found.tensors or {
        names.PREFIXES[part] + n: t for part, tensors in found.parts.items() for n, t in tensors.items()
    }
    kind = names.kind_of(tensors)
    if kind != "Stable Diffusion v1":
        what = "weights that are not recognised" if kind == "unknown" else f"{kind} weights"
        raise LoadError(
            f"{found.name} holds {what}: this library draws with Stable Diffusion v1 (text to image) only; "
            "give a v1 checkpoint, such as CompVis/stable-diffusion-v1-4."
        )
    if found.unknown:
        more = f" and {len(found.unknown) - 3} more" if len(found.unknown) > 3 else ""
        raise LoadError(
            f"{found.name}: a tensor is surplus ({', '.join(found.unknown[:3])}{more}); "
            "the file is not of Stable Diffusion v1 alone."
        )


def ema_weights(found: Source) -> dict[str, Tensor]:
    table = names.ema_names(found.parts["unet"])
    missing = [name for name in table.values() if name not in found.tensors]
    if missing:
        raise LoadError(
            f"{found.name} has no EMA weights (such as {missing[0]}): leave ema out, or give a full-EMA checkpoint."
        )
    return {name: found.tensors[flat] for name, flat in table.items()}


ACTIVATIONS = ("quick_gelu", "gelu")  # of a text encoder; v1's is the first
LIST = 8  # the most levels of a UNet or a VAE

# What each field of a config may be: a whole number from 1 to this; a tuple of them; a number between 0 and this; or,
# for hidden_act, one of ACTIVATIONS. Every size is bounded: a file's word for it must not make us build layers for
# hours.
WIDTH, DEEP = 1 << 17, 64
WHOLE: dict[str, int] = {
    **dict.fromkeys(["in_channels", "out_channels", "out_ch", "z_channels", "model_channels", "ch"], WIDTH),
    **dict.fromkeys(["context_dim", "hidden_size", "intermediate_size", "vocab_size", "num_groups"], WIDTH),
    **dict.fromkeys(["num_heads", "num_attention_heads", "max_position_embeddings"], WIDTH),
    **{"num_res_blocks": 16, "transformer_depth": DEEP, "num_hidden_layers": 128},
}
SEVERAL: dict[str, int] = {"channel_mult": DEEP, "ch_mult": DEEP, "attention_resolutions": WIDTH}
FACTORS: dict[str, float] = {"scale_factor": 1e6, "layer_norm_eps": 1.0}


def fits(field: str, value: Any) -> bool:
    """Whether a field of a config can have this value."""
    if field in WHOLE:
        return type(value) is int and 0 < value <= WHOLE[field]
    if field in SEVERAL:
        if not isinstance(value, tuple) or len(value) > LIST or (not value and field != "attention_resolutions"):
            return False
        return all(type(n) is int and 0 < n <= SEVERAL[field] for n in value)
    if field in FACTORS:
        return type(value) in (int, float) and 0 < value < FACTORS[field]
    return field == "hidden_act" and value in ACTIVATIONS


def config_of(kind: type, settings: Mapping[str, Any]) -> Any:
    """A config dataclass from fields, with lists (of JSON) as tuples. Raises LoadError for values that do not fit."""
    known = sorted(f.name for f in fields(kind))
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise LoadError(f"config: {kind.__name__} has no {unknown[0]!r}; its fields are {', '.join(known)}.")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    for key, value in settings.items():
        if not fits(key, value):
            raise LoadError(f"config: {kind.__name__} cannot have {key} = {value!r}: give it a usable size.")
    config = kind(**settings)
    if kind is TextConfig:
        divided = {"num_attention_heads": [config.hidden_size]}
    elif kind is VAEConfig:
        divided = {"num_groups": [config.ch * m for m in (1, *config.ch_mult)]}
    else:
        widths = [config.model_channels * m for m in (1, *config.channel_mult)]
        divided = {"num_groups": widths, "num_heads": widths[1:]}
    for key, widths in divided.items():
        if odd := [width for width in widths if width % getattr(config, key)]:
            part = kind.__name__.removesuffix("Config").lower()
            raise LoadError(
                f"config: {odd[0]} channels cannot be split by {key} = {getattr(config, key)}: "
                f'give it as config, {{"{part}": {{"{key}": ...}}}}.'
            )
    return config


# ---- looking


def info(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: Any = None,
) -> dict[str, Any]:
    """What a source holds, as plain data, without loading its weights; also of files that `load` refuses."""
    found = find(source, revision=revision, variant=variant, token=token, look=True)
    problem = found.problem
    if problem is None:
        try:
            refuse_other_kinds(found)
        except LoadError as error:
            problem = str(error)
    tensors = found.tensors or {f"{p}.{n}": t for p, ts in found.parts.items() for n, t in ts.items()}
    prefixed = found.tensors or {names.PREFIXES[p] + n: t for p, ts in found.parts.items() for n, t in ts.items()}
    configs = dict(found.configs)
    for part, infer in (("unet", names.infer_unet), ("vae", names.infer_vae), ("text", names.infer_text)):
        if part not in configs and found.parts[part]:
            try:
                configs[part] = infer(found.parts[part])
            except (KeyError, IndexError, ValueError, ZeroDivisionError):
                configs[part] = {}

    def sums(ts: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "tensors": len(ts),
            "parameters": sum(t.numel() for t in ts.values()),
            "bytes": sum(t.numel() * t.element_size() for t in ts.values()),
            "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in ts.values()}),
        }

    return {
        "source": found.name,
        "form": found.kind,
        "kind": names.kind_of(prefixed),
        "total": sums(tensors),
        "parts": {part: sums(ts) | {"config": configs.get(part)} for part, ts in found.parts.items() if ts},
        "ema": any(n.startswith("model_ema.diffusion_model") for n in tensors),
        "tokenizer": found.tokenizer is not None,
        "image_size": found.size,
        "unknown": found.unknown,
        "problem": problem,
        "metadata": {k: v for k, v in found.metadata.items() if k != METADATA},
    }


def format_info(facts: Mapping[str, Any]) -> str:
    """What `info` found, for people."""
    total = facts["total"]
    lines = [
        f"{facts['source']}: {facts['kind']}, {facts['form']}",
        f"{total['tensors']:,} tensors, {total['bytes'] / 1e6:,.1f} MB, {', '.join(total['dtypes'])}",
    ]
    for part, p in facts["parts"].items():
        lines.append(
            f"{names.PARTS[part]:13} {p['parameters']:>13,} parameters in {p['tensors']} tensors, "
            f"{', '.join(p['dtypes'])}"
        )
        if p["config"]:
            lines.append("              " + ", ".join(f"{k}={v}" for k, v in p["config"].items()))
    lines.append(f"EMA weights   {'yes: --ema takes them' if facts['ema'] else 'no'}")
    lines.append(f"tokenizer     {'its own' if facts['tokenizer'] else 'none: CLIP’s is taken from the Hub'}")
    if facts["metadata"]:
        lines.append("metadata      " + ", ".join(f"{k}={str(v)[:60]}" for k, v in facts["metadata"].items()))
    if facts["unknown"]:
        shown = ", ".join(facts["unknown"][:5])
        lines.append(
            f"unknown       {len(facts['unknown'])} tensors: {shown}{', ...' if facts['unknown'][5:] else ''}"
        )
    if facts["problem"]:
        lines.append(f"not loaded    {facts['problem']}")
    return "\n".join(lines)
