"""The files that a model's weights come from: their digest, and whether what is mapped from them is still there."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any
from weakref import ref

from ..files import sha256_of
from .configs import LoadError


def stamp(path: Path) -> tuple[int, ...] | None:
    """Which file this is (the first two numbers), and when its content was changed last; None: it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class WeightFiles:
    """The files of a model.

    parts   those of "unet", "vae" and "text", as a folder has them, several where one is split; or the one file of
            all three as "unet"
    maps    each file that tensors are mapped from, and its map
    """

    def __init__(self, parts: Mapping[str, Sequence[Path]] | None = None, maps: Iterable[tuple[Path, mmap]] = ()):
        self._parts = dict(parts or {})
        # A map lives as long as a tensor is in it.
        self._maps = [(path, ref(mapped), stamp(path)) for path, mapped in maps]
        self._digests: dict[Path, str] = {}

    def digest(self, part: str = "unet") -> str | None:
        """The SHA-256 of the file of a part; read on first use. None where the part has no file of its own.

        Of a part that is split over several files, that of their digests in order. Raises OSError.
        """
        digests = [self._digest_of(path) for path in self._parts.get(part, ())]
        if len(digests) > 1:
            return hashlib.sha256(" ".join(digests).encode()).hexdigest()
        return digests[0] if digests else None

    def _digest_of(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = sha256_of(path)
        return self._digests[path]

    def with_part(self, part: str, maps: Sequence[tuple[Path, mmap]]) -> WeightFiles:
        """These files, but those of a part are others."""
        result = self.and_maps_of(WeightFiles(maps=maps))
        result._parts = self._parts | {part: [path for path, _ in maps]}
        return result

    def and_maps_of(self, other: WeightFiles) -> WeightFiles:
        """These files, and to be checked beside them the maps of others."""
        result = copy.copy(self)
        result._maps = [*self._maps, *other._maps]
        return result

    def check(self) -> None:
        """Raise LoadError if a file that tensors are still mapped from has been changed in place.

        Reading a map beyond its file's end would end the process, and other bytes would be other weights. A file that
        is deleted, or replaced by another one, does no harm: the system keeps the old one for the map.
        """
        for path, reference, before in self._maps:
            mapped = reference()
            if mapped is None:
                continue
            if mapped.size() < len(mapped):
                raise LoadError(
                    f"{path} has shrunk from {len(mapped)} to {mapped.size()} bytes while it was in use: "
                    "put it back, and load it again."
                )
            if before and (now := stamp(path)) and now[:2] == before[:2] and now != before:
                raise LoadError(f"{path} has been changed while it was in use: load it again.")

    def __getstate__(self) -> dict[str, Any]:  # a copy, or what is pickled, has tensors of its own
        return self.__dict__ | {"_maps": []}
