"""What is at a source, before a model is made of it: `find`, and `info` for people who want to know.

Nothing here reads weights: tensors are names, shapes and a memory map.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import hub, names
from .checkpoint import read
from .text import own_names
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

BUILT_IN = Path(__file__).with_name("shapes.safetensors")
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
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of a single file: all, by its own names
    metadata: dict[str, Any] = field(default_factory=dict)


def find(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: Any = None,
    variant: str | None = None,
) -> Source:
    """Look at a source without loading it: tensors are names, shapes and a memory map. Raises as `load` does."""
    if source == "shapes":
        if not BUILT_IN.exists():
            raise LoadError(f"The built-in model is missing ({BUILT_IN.name}): install the package again.")
        return find_file(BUILT_IN, "shapes")
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return find_folder(path, str(source), variant)
    if path.exists():
        return find_file(path, path.name)
    text = os.fspath(source)
    looks_like_file = path.suffix.lower() in {".ckpt", ".safetensors", ".pt", ".pth", ".bin"}
    if not looks_like_file and hub.REPO_ID.fullmatch(text) and not text.startswith("."):
        return find_folder(hub.download(text, variant=variant, revision=revision, token=token), text, variant)
    raise LoadError(
        f"There is no file or folder {text}: give a .ckpt or .safetensors file, a folder of the Hub's layout, "
        'a repository such as CompVis/stable-diffusion-v1-4, or "shapes", the built-in model.'
    )


def find_file(path: Path, name: str) -> Source:
    file = read(path)
    parts, unknown = names.split(file.tensors)
    found = Source(name, "CompVis file", parts, unknown, path, tensors=file.tensors, metadata=file.metadata)
    if METADATA in file.metadata:
        try:
            ours = json.loads(file.metadata[METADATA])
            found.configs, found.tokenizer = ours["config"], ours["tokenizer"]
            found.size, found.known_words = ours["image_size"], ours["known_words"]
            found.kind = "self-contained file"
        except (ValueError, KeyError, TypeError) as error:
            raise LoadError(f"{path} has damaged metadata ({error!r}): convert it again.") from None
    return found


def find_folder(folder: Path, name: str, variant: str | None) -> Source:
    """A folder of the Hub's layout; tensors get their CompVis names here."""
    chosen = hub.weight_files(hub.local_files(folder), variant, name)

    def config(where: str) -> dict[str, Any]:
        try:
            return json.loads((folder / where).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(f"{name} has no readable {where} ({error}): give the whole folder.") from None

    try:
        unet_config = config("unet/config.json")
        configs = {
            "unet": names.unet_from_hub(unet_config),
            "vae": names.vae_from_hub(config("vae/config.json")),
            "text": names.text_from_hub(config("text_encoder/config.json")),
        }
    except ValueError as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{name} is not Stable Diffusion v1: {error}.") from None
    scheduler = folder / "scheduler/scheduler_config.json"
    settings = config("scheduler/scheduler_config.json") if scheduler.exists() else {}
    if (kind := settings.get("prediction_type", "epsilon")) != "epsilon":
        raise LoadError(f"{name} is not Stable Diffusion v1: it predicts {kind}, not the noise.")

    parts: dict[str, dict[str, Tensor]] = {}
    for part, file in chosen.items():
        tensors = read(folder / file).tensors
        if part == "text":
            parts[part] = own_names(tensors)
            continue
        with torch.device("meta"):
            if part == "unet":
                unet = config_of(UNetConfig, configs["unet"])
                wanted = UNet(unet).state_dict()
                table = names.unet_to_hub(wanted, unet)
            else:
                vae = config_of(VAEConfig, configs["vae"])
                wanted = VAE(vae).state_dict()
                table = names.vae_to_hub(wanted, vae)
        parts[part] = names.from_hub(tensors, table, {n: t.shape for n, t in wanted.items()})
    files = [folder / "tokenizer" / n for n in names.TOKENIZER_FILES]
    texts = {f.name: f.read_text(encoding="utf-8") for f in files} if all(f.exists() for f in files) else None
    side = unet_config.get("sample_size", 64)
    size = 2 ** (len(configs["vae"]["ch_mult"]) - 1) * side if isinstance(side, int) else None
    return Source(name, "Hub layout", parts, [], folder / chosen["unet"], configs, tokenizer=texts, size=size)


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


def config_of(kind: type, settings: Mapping[str, Any]) -> Any:
    """A config dataclass from fields, with lists (of JSON) as tuples."""
    known = {f.name for f in fields(kind)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise LoadError(f"config: {kind.__name__} has no {unknown[0]!r}; its fields are {', '.join(sorted(known))}.")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


# ---- looking


def info(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: Any = None,
) -> dict[str, Any]:
    """What a source holds, as plain data, without loading its weights; also of files that `load` refuses."""
    found = find(source, revision=revision, variant=variant, token=token)
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
    return "\n".join(lines)
