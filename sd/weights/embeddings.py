"""Words of one's own (textual inversion, Gal et al. 2022, arXiv:2208.01618): what their files hold, in every form.

    string_to_param    of AUTOMATIC1111 and of the paper's code: {"string_to_param": {"*": (V, C)}, "name": ...}
    WORD               of diffusers: {"<cat>": (C,) or (V, C)}
    emb_params         as .safetensors: {"emb_params": (V, C)}
    bundle_emb.WORD    beside the tensors of a LoRA

In the first and the third form the word is the file's name, without its ending. AUTOMATIC1111 does not look at
`name`; diffusers does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..files import shown
from . import names
from .checkpoint import read
from .configs import LoadError

INSIDE = ("string_to_param",)  # keys of a .pt under which the tensors are
UNNAMED = ("*", "emb_params")
OF_SDXL = ("clip_l", "clip_g")
MOST = 75  # vectors of a word: as many as the model reads at a time, but for start and end
_BUNDLE = re.compile(r"bundle_emb\.(?P<word>.+?)\.(?P<part>string_to_param\.[^.]*|[^.]+)")
_LAYERS = (".weight", ".bias", ".alpha")  # ends of names that are no words
GENERIC = re.compile(r"(learned_embeds?|pytorch_model|diffusion_pytorch_model|model)\b.*", re.IGNORECASE)


@dataclass(frozen=True)
class Word:
    """A word of a file and its vectors (V, C). `also`: other words for the same, as far as nobody else has them."""

    name: str
    vectors: Tensor
    also: tuple[str, ...] = ()


def holds_words(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a file of words alone: few, of one or two axes, and equally wide."""
    if not 0 < len(tensors) <= 100 or not all(t.ndim in (1, 2) and t.is_floating_point() for t in tensors.values()):
        return False
    if tensors.keys() <= {*UNNAMED, *OF_SDXL}:
        return True
    widths = {t.shape[-1] for t in tensors.values()}
    sound = len(widths) == 1 and min(widths) >= 16 and not any(name.endswith(_LAYERS) for name in tensors)
    return sound and all(t.ndim == 1 or len(t) <= MOST for t in tensors.values())


def bundles_words(tensors: Iterable[str]) -> bool:
    """Whether there are words among the tensors of something else, a LoRA."""
    return any(name.startswith("bundle_emb.") for name in tensors)


def read_words(path: str | os.PathLike[str]) -> list[Word]:
    """The words of a file. Raises LoadError, in one sentence, for a file of another kind; CheckpointError."""
    file = read(path, INSIDE)
    stem = Path(path).stem
    bundled = {name: match for name in file.tensors if (match := _BUNDLE.fullmatch(name))}
    if bundled:
        if any(match["part"] in OF_SDXL for match in bundled.values()):
            raise of_sdxl(path)
        return [
            Word(match["word"], sound_vectors(path, match["word"], file.tensors[n])) for n, match in bundled.items()
        ]
    if file.tensors.keys() & set(OF_SDXL):
        raise of_sdxl(path)
    if not holds_words(file.tensors):
        kind = names.kind_of(file.tensors)
        what = "an embedding in no form that is known" if kind == "unknown" else f"no embedding but {kind} weights"
        raise LoadError(
            f"{path} holds {what}: give a file of AUTOMATIC1111 (string_to_param), of diffusers (a word and its "
            "vectors), or one with emb_params."
        )
    result = []
    for name, tensor in file.tensors.items():
        if name in UNNAMED:
            own = file.metadata.get("name")
            result.append(Word(stem, sound_vectors(path, stem, tensor), (own,) if isinstance(own, str) else ()))
        else:
            by_file = len(file.tensors) == 1 and not GENERIC.fullmatch(stem)
            result.append(Word(name, sound_vectors(path, name, tensor), (stem,) if by_file else ()))
    return result


def of_sdxl(path: str | os.PathLike[str]) -> LoadError:
    return LoadError(
        f"{path} is an embedding of SDXL (it has clip_l and clip_g), which Stable Diffusion v1 cannot read: give one "
        "that was made for v1."
    )


def sound_vectors(path: str | os.PathLike[str], word: str, tensor: Tensor) -> Tensor:
    """The vectors of a word, (V, C). Raises LoadError."""
    vectors = tensor[None] if tensor.ndim == 1 else tensor
    if vectors.ndim != 2 or not vectors.is_floating_point() or not 1 <= len(vectors) <= MOST:
        raise LoadError(
            f"{path} has {tuple(tensor.shape)} of {tensor.dtype} for the word {shown(word)}, where 1 to {MOST} "
            "vectors are expected: give another file."
        )
    if not vectors.float().isfinite().all():
        raise LoadError(
            f"{path} has NaN or infinity in the vectors of {shown(word)}: it is damaged; give another file."
        )
    return vectors.float() if vectors.dtype.itemsize == 1 else vectors  # float8 does not mix with others
