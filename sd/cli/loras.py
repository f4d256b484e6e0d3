"""LoRAs of a drawing: named on the command line, in the prompt as AUTOMATIC1111 does, or by a picture."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import from_root, printable
from .options import Chosen, CommandError, nearest

if TYPE_CHECKING:
    from .settings import Drawing

ENDINGS = (".safetensors", ".pt", ".ckpt", ".bin")
MOST = 20_000  # files that are looked at in folders
TAG = re.compile(r"<(lora|lyco|hypernet):([^>]+)>")  # as in AUTOMATIC1111's modules/extra_networks.py


# ---- what is drawn with


def settled(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a drawing with its LoRAs as files, and with a prompt that no longer names any.

    Those of a picture that is drawn again count where none are given. Raises CommandError where one is not found.
    """
    folders = [Path(folder) for folder in settings.get("lora_dir") or ()]
    prompt, tags = without_tags(settings["prompt"])
    hashes = settings.get("lora_hashes") or {}
    if "prompt" not in given and "lora" in given:
        tags = []  # of the picture, whose LoRAs are replaced
    elif tags and not folders:
        raise CommandError(
            f"The prompt names the LoRA {tags[0].file!r}: say with --lora-dir in which folder it is, or take "
            f"<lora:{tags[0].file}> out of the prompt."
        )
    chosen = list(given.get("lora", ()))
    if "lora" not in given:
        chosen = [as_before(str(given.get("again")), entry, folders) for entry in settings.get("lora") or ()]
    for tag in tags:
        digest = hashes.get(re.sub("[:,]", "", tag.file), "")
        file = find_lora(tag.file, digest, folders)
        if file is None:
            raise CommandError(missing(f"The prompt names the LoRA {tag.file!r}", tag.file, folders))
        warn_of_others(given.get("again"), file, digest)
        chosen.append(Chosen(str(file), tag.scale))
    return {**settings, "prompt": prompt, "lora": tuple(chosen) or None, "lora_hashes": None}


def without_tags(prompt: Any) -> tuple[Any, list[Chosen]]:
    """A prompt without <lora:name:0.8> and the like, and what they name. Raises CommandError."""
    if not isinstance(prompt, str):
        return prompt, []
    return TAG.sub("", prompt), [named_lora(match[1], match[2]) for match in TAG.finditer(prompt)]


def named_lora(kind: str, text: str) -> Chosen:
    """Of <lora:...>: the name, the text encoder's scale, and the UNet's; or te=0.5, unet=0.8."""
    what = printable(f"<{kind}:{text}>", 80)
    if kind == "hypernet":
        raise CommandError(f"The prompt names a hypernetwork, {what}, which is not followed here: take it out.")
    words = text.split(":")
    numbers, by_name = [w for w in words[1:] if "=" not in w], dict(w.split("=", 1) for w in words[1:] if "=" in w)
    try:
        of_text = float(by_name.pop("te", numbers[0] if numbers else 1.0))
        of_unet = float(by_name.pop("unet", numbers[1] if len(numbers) > 1 else of_text))
        if by_name or len(numbers) > 2 or not math.isfinite(of_text) or not math.isfinite(of_unet):
            raise ValueError
    except ValueError:
        raise CommandError(f"The prompt has {what}, which is not followed: write <lora:NAME:0.8>.") from None
    return Chosen(words[0], of_text if of_text == of_unet else {"unet": of_unet, "text": of_text})


def as_before(picture: str, entry: Mapping[str, Any], folders: Sequence[Path]) -> Chosen:
    """A LoRA that a picture was drawn with. Raises CommandError where it is not here."""
    file, digest = entry["file"], entry.get("digest", "")
    here = not from_root(file) and os.path.exists(file)
    path = Path(file) if here else find_lora(Path(file).stem, digest, folders)
    if path is None:
        what = f"{printable(picture)} was drawn with the LoRA {printable(file, 80)}, which is no file here"
        raise CommandError(missing(what, Path(file).stem, folders))
    warn_of_others(picture, path, digest)
    return Chosen(str(path), entry.get("scale", 1.0))


def warn_of_others(picture: Any, file: Path, digest: str) -> None:
    """Warn where a picture was drawn with another file than this one, as its digest says."""
    if digest and not is_of(file, digest):
        warnings.warn(
            f"{printable(picture)} was drawn with another LoRA than {printable(file)}, so this picture will differ: "
            f"its digest was {digest}."
        )


def missing(what: str, name: str, folders: Sequence[Path]) -> str:
    near = nearest(name, [file.stem for file in files_in(folders)])
    hint = f"; did you mean {printable(near, 60)}?" if near else "."
    where = f", and there is none of that name in {', '.join(map(str, folders))}" if folders else ""
    return f"{what}{where}: add --lora-dir with the folder that it is in, or --lora with its file{hint}"


# ---- in folders


def files_in(folders: Sequence[Path]) -> Iterator[Path]:
    """Weight files in these folders and below them. Raises CommandError for what is no folder."""
    for folder in folders:
        if not folder.is_dir():
            raise CommandError(f"--lora-dir must be a folder, and {printable(folder, 120)} is none.")
    found = (file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix.lower() in ENDINGS)
    return islice(found, MOST)


def find_lora(name: str, digest: str, folders: Sequence[Path]) -> Path | None:
    """The file of this name; or of this digest, by whatever name, as AUTOMATIC1111 and Civitai write them."""
    files = list(files_in(folders))
    same = [file for file in files if file.stem == name]
    if digest:
        same = [file for file in same or files if is_of(file, digest)] or same
    return next(iter(same), None)


def is_of(file: Path, digest: str) -> bool:
    """Whether a file has this digest, by either way to count, or one that begins with it."""
    return any(known.startswith(digest.lower()) for known in digests(file))


@lru_cache(maxsize=256)
def digests(file: Path) -> tuple[str, str]:
    """The SHA-256 of a file, and that of its content after the header of a .safetensors file.

    The latter's first 12 digits are AUTOMATIC1111's "Lora hashes" (kohya's sshs_model_hash, Civitai's AutoV3); the
    former's first 10 are Civitai's AutoV2.
    """
    if file.is_dir():
        from ..adapt.adapter_files import file_of

        file = file_of(file)
    whole, content = hashlib.sha256(), hashlib.sha256()
    with open(file, "rb") as stream:
        head = stream.read(8)
        skip = 8 + int.from_bytes(head, "little") if file.suffix.lower() == ".safetensors" else 0
        whole.update(head)
        content.update(head[skip:])
        place = len(head)
        while block := stream.read(1 << 22):
            whole.update(block)
            content.update(block[max(skip - place, 0) :])
            place += len(block)
    return whole.hexdigest(), content.hexdigest()


# ---- what a picture says of them


def told(drawing: Drawing) -> list[dict[str, Any]] | None:
    """Names without folders from a disk's root, digests and scales."""
    from ..image import model_name

    found = []
    for chosen in drawing.lora or ():
        entry: dict[str, Any] = {"file": model_name(chosen.file), "scale": chosen.scale}
        with contextlib.suppress(OSError):  # it is gone by now, and the picture is worth more
            whole, content = digests(Path(os.path.expanduser(chosen.file)))
            entry |= {"digest": whole[:10], "hash": content[:12]}
        found.append(entry)
    return found or None


def sound(text: Callable[[Any], bool], digest: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a setting is what `told` says; `text` and `digest` say that of its parts."""

    def number(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) < 1e6

    def entry(value: Any) -> bool:
        if not isinstance(value, dict) or not value.keys() <= {"file", "digest", "hash", "scale"}:
            return False
        scale = value.get("scale", 1.0)
        scales = list(scale.values()) if isinstance(scale, dict) and scale.keys() <= {"unet", "text"} else [scale]
        known = all(digest(value[key]) for key in ("digest", "hash") if key in value)
        return text(value.get("file")) and known and all(map(number, scales))

    return lambda value: isinstance(value, list) and len(value) <= 64 and all(map(entry, value))
