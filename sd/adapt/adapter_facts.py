"""What a LoRA's file says about itself, and what of it a model has a place for: `lora_info`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import parse_json, printable
from ..model import StableDiffusion
from ..prompts.encoder import TextEncoder
from ..text import CLIPText, TextConfig
from ..unet import UNet
from ..vae import VAE, VAEConfig
from ..weights.checkpoint import read
from ..weights.configs import LoadError
from .adapter_files import FOLDER_FILES, adapter_name, file_of, read_adapter
from .dialects import dialect_of, family_of, said_of_base, width_of

WORDS = 20  # of those that it was trained with, the most frequent
TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words")
SIDES = re.compile(r".*(lora_down|[._]down|lora_A(\.[\w-]+)?)\.weight|.*hada_w1_b(\.[\w-]+)?")


def lora_info(path: str | os.PathLike[str], model: StableDiffusion | None = None) -> dict[str, Any]:
    """What a LoRA's file holds, as plain data; also of files that `sd.lora` refuses.

    model   that it is to be added to; Stable Diffusion v1 itself, if not given

    `problem` says why `sd.lora` refuses it; it is None where that takes it. `modules` counts those that it changes,
    and `unmatched` names what belongs to none. Raises LoadError and CheckpointError where it cannot be read at all.
    """
    file = file_of(path)
    checkpoint = read(file)
    tensors, metadata = checkpoint.tensors, checkpoint.metadata
    facts: dict[str, Any] = {
        "source": os.fspath(path),
        "name": adapter_name(file),
        "kind": "LoRA",
        "dialect": dialect_of(tensors),
        "tensors": len(tensors),
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "kinds": [],
        "ranks": sorted({t.shape[0] for key, t in tensors.items() if SIDES.fullmatch(key) and t.ndim > 1}),
        "base_model": family_of(tensors, metadata),
        "base_model_said": said_of_base(metadata),
        "text_width": width_of(tensors),
        "trained_words": trained_words(metadata),
        "modules": {"unet": 0, "text": 0},
        "unmatched": list(tensors),
        "problem": None,
        "metadata": dict(metadata),
    }
    try:
        found = read_adapter(path, model or stable_diffusion_v1())
    except LoadError as error:
        return facts | {"problem": str(error)}
    counts = Counter(place.part for place in found.matched)
    facts |= {"kinds": found.kinds, "ranks": found.ranks, "unmatched": found.unmatched, "dialect": found.dialect}
    return facts | {"modules": {part: counts[part] for part in ("unet", "text")}}


def stable_diffusion_v1() -> StableDiffusion:
    """Its shapes alone."""
    with torch.device("meta"):
        text = TextEncoder(CLIPText(TextConfig()), dict)
        return StableDiffusion(UNet(), VAE(VAEConfig(ch=32, ch_mult=(1,))), text)  # a LoRA does not look at the VAE


def trained_words(metadata: Mapping[str, Any]) -> list[str]:
    """What the file says is to be written for it to act, or else the words that its pictures were labelled with."""
    said = [word for key in TRIGGERS if isinstance(word := metadata.get(key), str) and word.strip()]
    if said:
        return said
    try:
        folders = parse_json(metadata.get("ss_tag_frequency") or "{}")
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag.strip(): n for tag, n in tags.items() if isinstance(n, int)})
    except (ValueError, AttributeError, TypeError):
        return []
    return [tag for tag, _ in counts.most_common(WORDS)]


def is_lora_folder(path: str | os.PathLike[str]) -> bool:
    """Whether PEFT or diffusers wrote this folder, with a LoRA in it."""
    return any((Path(path) / name).is_file() for name in FOLDER_FILES)


def format_lora_info(facts: Mapping[str, Any]) -> str:
    """What `lora_info` found, for people."""
    dialect = f"names as of {facts['dialect']}" if facts["dialect"] else "names of no program that is known"
    ranks = f"rank {', '.join(map(str, facts['ranks']))}" if facts["ranks"] else "without a rank"
    base = [facts["base_model"] or "not told"]
    base += [f"its text is {facts['text_width']} wide"] if facts["text_width"] else []
    base += [f"it says {printable(facts['base_model_said'], 60)!r}"] if facts["base_model_said"] else []
    lines = [
        f"{printable(facts['source'])}: {facts['kind']}, {dialect}",
        f"{facts['tensors']:,} tensors, {facts['bytes'] / 1e6:,.1f} MB, {', '.join(facts['dtypes'])}",
        f"kind          {', '.join(facts['kinds']) or 'not looked at'}, {ranks}",
        f"base model    {'; '.join(base)}",
    ]
    if facts["trained_words"]:
        lines.append("trained words " + ", ".join(printable(word, 60) for word in facts["trained_words"]))
    if facts["problem"]:
        return "\n".join([*lines, f"not used      {printable(facts['problem'], 600)}"])
    unet, text = facts["modules"]["unet"], facts["modules"]["text"]
    lines.append(f"changes       {unet} modules of the UNet, {text} of the text encoder")
    if left := facts["unmatched"]:
        some = ", ".join(printable(name, 80) for name in left[:5])
        lines.append(f"not used      {len(left)} tensors: {some}{', ...' if left[5:] else ''}")
    return "\n".join(lines)
