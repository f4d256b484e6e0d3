"""Whether a file can be written, asked before the work whose result it is to hold. Imports nothing of torch."""

from __future__ import annotations

import os
from pathlib import Path


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Raise ValueError for a missing or read-only folder, a path that is a folder, and, without `force`, a file."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it first.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: the folder {path.parent} is read-only for you.")
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder; name a file.")
    if path.exists() and not force:
        raise ValueError(f"{path} exists: choose another name, or write over it with --force.")
