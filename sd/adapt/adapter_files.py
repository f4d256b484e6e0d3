"""From a LoRA's file to what it adds to each weight: `read_adapter`.

The file is read by `sd/weights/checkpoint.py`, so no code in it runs, and its tensors stay mapped. All of it is
looked at before anything is made of it: shapes against the model's, and every number. What belongs to no module of
the model is reported; what belongs to one and is not understood is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import shown
from ..model import StableDiffusion
from ..weights import names
from ..weights.checkpoint import read
from ..weights.configs import LoadError
from ..weights.embeddings import bundles_words
from ..weights.mapped import WeightFiles
from .deltas import PIECE, Delta
from .dialects import Place, dialect_of, field_of, parts_of, placed_names, refuse_other_models, refused_kind, stems
from .kinds import Fields, ModuleReader
from .peft_settings import PeftSettings

FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors",
                "pytorch_lora_weights.bin")  # fmt: skip  # what PEFT and diffusers write into a folder
Parameter = tuple[str, str]  # "unet" or "text", and the name of a parameter there


@dataclass(eq=False)
class AdapterFile:
    """What a file adds to a model, and what it says about itself."""

    path: Path
    name: str
    dialect: str
    metadata: dict[str, Any]
    files: WeightFiles
    deltas: dict[Parameter, Delta]
    matched: dict[Place, str] = field(default_factory=dict)  # each module, and the kind of what is added there
    unmatched: list[str] = field(default_factory=list)  # names in the file that belong to no module of the model

    @property
    def digest(self) -> str:
        """The SHA-256 of the file; read on first use."""
        digest = self.files.digest()
        assert digest is not None
        return digest

    @property
    def kinds(self) -> list[str]:
        return sorted(set(self.matched.values()))

    @property
    def ranks(self) -> list[int]:
        """All that occur, from low to high."""
        return sorted({delta.rank for delta in self.deltas.values() if delta.rank})


def file_of(path: str | os.PathLike[str]) -> Path:
    """The weights at a path: a file, or a folder as PEFT and diffusers write it. Raises LoadError."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
        raise LoadError(f"A LoRA is the path of a file, or of a folder that PEFT wrote, not {shown(path)}.")
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        return path
    found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if found is None:
        raise LoadError(f"{path} is a folder without {FOLDER_FILES[0]} or {FOLDER_FILES[2]}: give the LoRA's file.")
    return found


def adapter_name(path: Path) -> str:
    """What a LoRA is called: its file's name, or the folder's, where all files have the same."""
    return (path.resolve().parent.name or path.stem) if path.name in FOLDER_FILES else path.stem


def read_adapter(path: str | os.PathLike[str], model: StableDiffusion) -> AdapterFile:
    """What a LoRA's file adds to this model.

    Raises LoadError or CheckpointError, in one sentence, for a file that is no LoRA, is for another model, has a
    tensor that does not fit or is not finite, or is of a kind that is not followed here.
    """
    path = file_of(path)
    checkpoint = read(path)
    tensors, metadata = checkpoint.tensors, checkpoint.metadata
    refuse_other_models(str(path), tensors, metadata, model.unet.config.context_dim)
    if refused := next(((key, kind) for key in tensors if (kind := refused_kind(key))), None):
        raise LoadError(f"{path} holds {refused[1]} ({shown(refused[0], 80)}), which is not followed here.")
    found = placed_names(tensors, stems(model))
    refuse_whole_models(path, found, tensors)
    groups, homes = grouped(path, found, tensors)
    shapes = {
        (part, name): tuple(p.shape)
        for part, module in parts_of(model).items()
        for name, p in module.named_parameters()
    }
    settings = PeftSettings(path, metadata, path.name in FOLDER_FILES)
    files = WeightFiles({"unet": [path]}, [(path, checkpoint.map)])
    unmatched = [key for key in tensors if key not in found and not bundles_words([key])]  # for textual_inversion
    result = AdapterFile(path, adapter_name(path), dialect_of(found) or "", metadata, files, {}, {}, unmatched)
    for place, fields in groups.items():
        check_tensors(path, place, fields)
        own = shapes[place.part, f"{place.module}.weight"], shapes.get((place.part, f"{place.module}.bias"))
        deltas = ModuleReader(path, place, homes[place], fields, own, settings).deltas()
        result.deltas |= {(place.part, f"{place.module}.{name}"): delta for name, delta in deltas.items()}
        result.matched[place] = next(iter(deltas.values())).kind
    return result


def refuse_whole_models(path: Path, found: Mapping[str, tuple[Place, str]], tensors: Mapping[str, Tensor]) -> None:
    """Raise LoadError where nothing in a file belongs to a module of the model, or nothing but whole weights does."""
    if found and any(rest not in ("weight", "bias") for _, rest in found.values()):
        return
    kind = names.kind_of(tensors)
    if found or kind not in ("unknown", "LoRA"):
        raise LoadError(f"{path} holds weights of a model, not a LoRA: give it to sd.load (--model).")
    some = ", ".join(shown(key, 60) for key in list(tensors)[:2])
    raise LoadError(f"{path} is no LoRA for this model: of {len(tensors)} tensors none has a known name ({some}).")


def grouped(
    path: Path, found: Mapping[str, tuple[Place, str]], tensors: Mapping[str, Tensor]
) -> tuple[dict[Place, Fields], dict[Place, str]]:
    """The tensors of each module by our words for them, and what the file calls the module. Raises LoadError."""
    groups: dict[Place, Fields] = {}
    homes: dict[Place, str] = {}
    for key, (place, rest) in found.items():
        word, home = field_of(rest), key[: -len(rest) - 1]
        if word is None:
            raise LoadError(f"{path} has {shown(key, 120)}, and {shown(rest, 60)} of a module is not followed here.")
        if word in groups.setdefault(place, {}):
            first = homes[place]
            raise LoadError(
                f"{path} has {place.module} twice, as {shown(first)} and as {shown(home)}: which is meant?"
            )
        homes.setdefault(place, home)
        groups[place][word] = tensors[key]
    return groups, homes


def check_tensors(path: Path, place: Place, fields: Fields) -> None:
    """Raise LoadError for a tensor that is not of floating point, or not finite."""
    for word, tensor in fields.items():
        if not tensor.is_floating_point() and word not in ("alpha", "on_input"):
            raise LoadError(f"{path}: {word} of {place.module} is not of floating point: the file is damaged.")
        if not all(piece.isfinite().all() for piece in tensor.flatten().split(PIECE)):
            raise LoadError(f"{path}: {word} of {place.module} has NaN or infinity: the file is damaged.")
