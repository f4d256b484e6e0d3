"""The files that join a model: embeddings and another VAE. What a picture says of them, and where they are again.

A picture says names and digests. A file is taken on its word only where it lies in a folder that is named, or below
the current one, and has the digest; nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from ..files import from_root, printable
from .given_pictures import digest_of
from .options import CommandError

if TYPE_CHECKING:
    from .settings import Drawing

ENDINGS = (".pt", ".bin", ".safetensors")
MOST = 10_000  # files of a folder that are looked at


def told(drawing: Drawing) -> dict[str, Any]:
    """What the drawn picture says of them; of a path that leaves the current folder, the last part alone."""
    result: dict[str, Any] = {}
    if drawing.embedding:
        result["embedding"] = [published(file) for file in drawing.embedding]
        result["embedding_digest"] = [digest_of(file) for file in drawing.embedding]
    if drawing.vae:
        result["vae"] = published(drawing.vae)
    return result


def published(file: str) -> str:
    return file if below(file) else last_part(file)


def last_part(file: str) -> str:
    return PureWindowsPath(file).name


# ---- of a picture that is drawn again


def found_again(picture: str, found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture, with files for the names in it. Raises CommandError for one that is not here."""
    result = dict(found)
    if "embedding" in given:
        result.pop("embedding", None)
    elif names := result.get("embedding"):
        digests = [*result.get("embedding_digest", []), *[None] * len(names)]
        files = [here(name, digest, given) for name, digest in zip(names, digests, strict=False)]
        if None in files:
            name = printable(names[files.index(None)], 80)
            raise CommandError(
                f"{printable(picture)} was drawn with the embedding {name}, which is not here: add --embedding "
                f"{name}, with the folder that it is in, or --embedding-dir and that folder."
            )
        result["embedding"] = files
    if "vae" in given:
        result.pop("vae", None)
    elif (vae := result.get("vae")) and not (below(vae) and os.path.exists(vae)):
        raise CommandError(
            f"{printable(picture)} was drawn with the VAE {printable(vae, 80)}, which is no file here, and nothing "
            f"is downloaded because a picture names it: if you want that VAE, add --vae {printable(vae, 80)}."
        )
    return result


def here(name: str, digest: str | None, given: Mapping[str, Any]) -> str | None:
    """An embedding's file by its name and its digest: in a folder of `--embedding-dir`, or below the current one."""
    wanted = last_part(name)
    paths = [name, wanted] if below(name) else [wanted]
    paths += [os.fspath(path) for path in files_in(given.get("embedding_dir", ())) if path.name == wanted]
    return next((path for path in paths if has_digest(path, digest)), None)


def by_stem(name: str, digest: str | None, folders: Sequence[str]) -> str | None:
    """The same of a picture of AUTOMATIC1111, which names an embedding without the ending of its file."""
    paths = (p for p in files_in(folders) if p.suffix.lower() in ENDINGS and p.name[: -len(p.suffix)] == name)
    return next((os.fspath(path) for path in paths if has_digest(path, digest)), None)


def below(name: str) -> bool:
    """Whether a path that a picture names stays below the current folder."""
    return not from_root(name) and ".." not in PureWindowsPath(name).parts and "\0" not in name


def has_digest(path: str | Path, digest: str | None) -> bool:
    """Whether there is a file with this digest, as far as one is told: its first digits."""
    try:
        return os.path.isfile(path) and (not digest or one_digest(digest_of(path), digest))
    except ValueError:
        return False


def one_digest(a: str | None, b: str | None) -> bool:
    """Whether these may be the first digits of one digest."""
    return bool(a and b) and (str(a).startswith(str(b)) or str(b).startswith(str(a)))


def files_in(folders: Iterable[str]) -> Iterator[Path]:
    """The files in these folders and below them, some thousands at most. Raises CommandError where one is none."""
    for folder in folders:
        if not os.path.isdir(folder):
            raise CommandError(f"--embedding-dir must be a folder, and {printable(folder, 80)} is none.")
        paths = (Path(where, name) for where, _, names in os.walk(folder) for name in sorted(names))
        yield from islice(paths, MOST)


def others(drawing: Drawing) -> list[str]:
    """A sentence, where the embeddings are not those that the picture to be drawn again was drawn with."""
    was, now = drawing.embedding_digest or [], (drawing.told or {}).get("embedding_digest", [])
    if not was or (len(was) == len(now) and all(one_digest(a, b) for a, b in zip(was, now, strict=True))):
        return []
    return [
        f"{drawing.again} was drawn with other embeddings, so this picture may differ: their digests were "
        f"{', '.join(map(str, was))}; --embedding chooses."
    ]
