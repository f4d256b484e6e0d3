"""Where results go: under names that are free, and somewhere else where the named place fails after all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from ..files import check_output, printable, reason_of
from ..parallel import launch
from .options import CommandError
from .words import sentence

MOST = 1_000_000  # pictures that are numbered in a folder
Save = Callable[[Path, bool], None]  # to a path, over what is there or not; raises OSError or ValueError


def picture_paths(output: str | None, count: int, *, force: bool) -> tuple[list[Path], bool]:
    """The files that pictures will be written to, and whether they are numbered: then any other number is as good.

    A folder that is asked for by a slash at the end is made. Raises ValueError where one of them cannot be written.
    """
    if output and output.endswith(("/", os.sep)):
        make_folder(output)
    path = Path(output or ".")
    numbered = path.is_dir()
    if numbered:
        paths = list(islice(free_names(path), count))
    elif path.suffix.lower() != ".png":
        name = printable(path.stem)
        raise CommandError(
            f"{printable(path)} cannot be written: pictures are PNG files, so name it {name}.png; or {name}/, a "
            "folder."
        )
    elif count == 1:
        paths = [path]
    else:
        paths = [path.with_name(f"{path.stem}-{k + 1}{path.suffix}") for k in range(count)]
    if len(paths) < count:
        raise CommandError(f"{path} has too many pictures: name another folder.")
    for path in paths:
        check_output(path, force=force)
    return paths, numbered


def make_folder(output: str) -> None:
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise CommandError(f"The folder {printable(output)} cannot be made: {reason_of(error)}.") from None


def free_names(folder: Path, stem: str = "artist", suffix: str = ".png") -> Iterator[Path]:
    """artist-001.png and so on, as far as nobody has them: neither a file nor a link that leads nowhere."""
    names = (folder / f"{stem}-{n:03d}{suffix}" for n in range(1, MOST))
    return (name for name in names if not os.path.lexists(name))


def save_result(save: Save, path: Path, what: str, *, force: bool = False, numbered: bool = False) -> Path:
    """Save a result, and return where it is: under `path`, or, of `numbered` ones, under the next free number.

    Where that fails, hours of work may be at stake: it is saved somewhere else, and CommandError says where.
    """
    with launch.signals_wait():
        try:
            for name in chain([path], free_names(path.parent)) if numbered else [path]:
                try:
                    save(name, force and not numbered)
                    return name
                except FileExistsError:
                    if not numbered:
                        raise
            raise CommandError(f"{path.parent} has no free number for it.")
        except (OSError, ValueError) as error:
            reason = sentence(error)
            elsewhere = rescued(save, path)
        end = (
            f"The {what} is in {printable(elsewhere)} instead."
            if elsewhere
            else f"The {what} is lost: no folder takes it."
        )
        raise CommandError(f"{reason} {end}")


def rescued(save: Save, path: Path) -> Path | None:
    """Save it in its own folder under another name, else the current folder, the home, or that of temporary files."""
    for find in (lambda: path.parent, Path.cwd, Path.home, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
            folder = find()
            for name in [folder / path.name, *islice(free_names(folder, "artist", path.suffix), 3)]:
                with contextlib.suppress(OSError, ValueError):
                    save(name, False)
                    return name.absolute()
    return None
