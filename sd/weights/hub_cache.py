"""The cache of the Hub's client on the disk: which repositories and revisions are in it, and where.

models--CompVis--stable-diffusion-v1-4/
    refs/main           the commit that a branch or tag is at
    snapshots/COMMIT/   the files as they are in the repository; each is a link to
    blobs/              where their contents are
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from pathlib import Path

from ..files import read_utf8, write_text
from .layout import HubError
from .web import client_constants

COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDER = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")


def folder_of(repo: str) -> Path:
    """The folder of a repository in the cache, whether it is there or not."""
    return Path(client_constants().HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def refs_of(folder: Path) -> dict[str, str]:
    """The commits of the branches and tags that are known in a repository's folder."""
    refs = {}
    for path in sorted((folder / "refs").rglob("*")):
        if path.is_file():
            with contextlib.suppress(ValueError):  # damaged: the Hub is asked again
                refs[path.relative_to(folder / "refs").as_posix()] = read_utf8(path, limit=1000).strip()
    return refs


def snapshots_of(folder: Path) -> dict[str, Path]:
    """The snapshots in a repository's folder: by revision, or by commit where no branch or tag is at it."""
    commits = sorted(path for path in (folder / "snapshots").glob("*") if path.is_dir())
    refs = refs_of(folder)
    found: dict[str, Path] = {}
    for path in commits:
        names = [ref for ref, commit in refs.items() if commit == path.name] or [path.name]
        found |= dict.fromkeys(names, path)
    return found


def snapshot(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a revision in the cache, if there is one. It may lack files."""
    folder = folder_of(repo)
    commit = refs_of(folder).get(revision or "main", revision or "main")
    path = folder / "snapshots" / commit
    return path if COMMIT.fullmatch(commit) and path.is_dir() else None


def remember(repo: str, revision: str, commit: str) -> None:
    """Note which commit a branch or tag is at, for times without network."""
    path = folder_of(repo) / "refs" / revision
    if revision != commit and refs_of(folder_of(repo)).get(revision) != commit:
        with contextlib.suppress(OSError):  # a cache that is read-only for us still has its files
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, commit, force=True)


def files_size(repo: str) -> int:
    """The bytes that the cache has of a repository, files that are still arriving included."""
    total = 0
    for path in (folder_of(repo) / "blobs").glob("*"):
        with contextlib.suppress(OSError):  # just renamed
            total += path.lstat().st_size
    return total


def free_space() -> float:
    """The bytes that the disk of the cache has left, as far as it tells."""
    folder = folder_of("a/b").parent
    there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return math.inf
    return usage.free if usage.total else math.inf  # a system that does not tell says 0


def snapshot_in(path: Path, revision: str | None) -> Path:
    """The snapshot to take where a path is a repository's folder in the cache; any other path as it is.

    Raises HubError where it has none, or several.
    """
    folder = path.parent if path.name == "snapshots" else path
    match = _FOLDER.fullmatch(folder.resolve().name)
    if match is None or not (folder / "snapshots").is_dir():
        return path
    repo = f"{match['owner']}/{match['name']}"
    found = snapshots_of(folder)
    if revision in found:
        return found[revision]
    if revision is None and len(set(found.values())) == 1:
        return next(iter(found.values()))
    if by_commit := [p for p in found.values() if revision and p.name == revision]:
        return by_commit[0]
    names = ", ".join(f"{path} ({name})" for name, path in found.items())
    if not found:
        raise HubError(f"{path} is the cache's folder of {repo}, without a snapshot: give {repo} as the source.")
    if revision is None:
        raise HubError(f"{path} is the cache's folder of {repo}, with several snapshots: give one of them, {names}.")
    raise HubError(
        f"{path} is the cache's folder of {repo}, without revision {revision}: give {repo} as the source, or one of "
        f"its snapshots, {names}."
    )
