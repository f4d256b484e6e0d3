"""The one writer of files, the one bounded reader of small ones, and `printable`. Imports nothing of torch.

Everything that `sd` writes for a user goes through `writing`: it is there whole or not at all. Every small file that
comes from elsewhere (configs, tokenizers) goes through `read_small` or `read_json`: a pipe, a device, a file of
gigabytes or a million nested brackets is refused in one sentence. Every foreign word goes through `printable` before
a person reads it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import IO, Any

SMALL = 16 << 20  # bytes; the largest file that is read whole, a tokenizer.json of CLIP, has below 4 MB
DEPTH = 32  # of brackets in each other; configs have 3
_DIGESTS: dict[tuple[int, ...], str] = {}  # device, inode, size, times of the last change -> SHA-256
_DIGESTING = threading.Lock()
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters by Unicode's book, which show nothing


# ---- for people


def printable(text: object, limit: int = 200) -> str:
    """A foreign text for one line of a terminal: what is invisible or moves the cursor is escaped, a long one is cut.

    That is: control characters, line ends, marks of writing direction, characters of no width, lone surrogates. A
    long text loses its middle, for what to do stands at the end of a message.
    """
    whole = str(text)
    ends = [whole] if len(whole) <= limit else [whole[:limit], whole[-limit:]]
    parts = ["".join(c if c.isprintable() and c not in BLANK else ascii(c)[1:-1] for c in end) for end in ends]
    if len(parts) == 1 and len(parts[0]) <= limit:
        return parts[0]
    return f"{parts[0][: 2 * limit // 3]} ... {parts[-1][-(limit // 3) :]}"


def shown(value: object, limit: int = 100) -> str:
    """A value as messages show it: in quotation marks if it is a text, printable, and cut."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason_of(error: OSError) -> str:
    """What the system says is wrong, without the number that Python puts before it."""
    return error.strerror or str(error) or type(error).__name__


class PlainError(ValueError):
    """An error about somebody's file or request: one sentence of bounded length, whatever foreign words are in it."""

    def __init__(self, message: object):
        super().__init__(printable(message, 700))


class SmallFileError(PlainError):
    """A small file that cannot be read. The message is one sentence; `reason` is what is wrong alone."""

    def __init__(self, what: str, path: str | os.PathLike[str], reason: str):
        super().__init__(f"{what} {path} cannot be read: {reason}.")
        self.reason = reason


def from_root(path: str) -> bool:
    """Whether a path, of any system, begins at a disk's root or at somebody's home, and so tells of a machine."""
    return path.startswith(("/", "\\", "~")) or PureWindowsPath(path).is_absolute()


# ---- writing


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Raise ValueError where no file can be written to `path`, or, without `force`, where the name is taken.

    To be asked before the work whose result the file is to hold. What the folder says of itself is not believed: a
    file of no content is made in it, and removed.
    """
    path = Path(path)
    try:
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it first.")
        if path.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder; name a file.")
        check_target(path, force)
    except FileExistsError:
        raise ValueError(f"{path} exists: choose another name, or write over it with --force.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {reason_of(error)}; choose another name.") from None
    probe = temporary(path)
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: the folder {path.parent} takes no new file ({reason_of(error)}); choose "
            "another."
        ) from None


def temporary(path: Path) -> Path:
    """A name beside `path` that nobody else has: short, however long the file's own name is."""
    return path.parent / f".sd-{os.urandom(4).hex()}.part"


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[IO[bytes]]:
    """`with writing(path) as file:` a new file, open for bytes, that gets its name when the block ends well.

    Until then it has a short name of its own in the same folder. Where the block raises, Ctrl-C too, nothing of it
    stays. An existing file is replaced in one step, and only with `force`; a link is replaced, not what it names.
    Raises FileExistsError or OSError in one sentence; what else the block raises goes through as it is.
    """
    path = Path(path)
    part = temporary(path)
    try:
        check_target(path, force)
        with open(part, "xb") as file:  # with the permissions that any new file has
            yield file
            file.flush()
            sync(file)
        if force:
            os.replace(part, path)
        else:
            put(part, path)
    except FileExistsError as error:
        raise FileExistsError(
            f"{path} exists: choose another name, or write over it with force (--force)."
        ) from error
    except OSError as error:
        raise OSError(f"{path} cannot be written: {reason_of(error)}; make room, or choose another place.") from error
    finally:
        with contextlib.suppress(OSError, ValueError):  # most often it is not there, or has its final name
            part.unlink()


def sync(file: IO[bytes]) -> None:
    """Wait until the content is on the disk, where the file system can say so; some network drives cannot."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def check_target(path: Path, force: bool) -> None:
    """Raise OSError where the name belongs to a folder, a device or a pipe, or, without `force`, to any file.

    A link that leads nowhere is a file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.lexists(path) and not force:
            raise FileExistsError from None
        return
    except ValueError as error:  # a NUL in the path
        raise OSError(str(error)) from error
    if not stat.S_ISREG(mode):
        raise OSError("it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
    if not force:
        raise FileExistsError


def put(part: Path, path: Path) -> None:
    """Give a file its name unless that is taken. Raises FileExistsError, OSError."""
    try:
        os.link(part, path)  # unlike a rename, fails where the name has been taken meanwhile
        return
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # no hard links here, as on FAT and some network drives
        pass
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # takes the name, or fails
    try:
        os.replace(part, path)
    except BaseException:
        path.unlink()
        raise


def write_text(path: str | os.PathLike[str], text: str, *, force: bool = False) -> None:
    """Write a text in UTF-8 as `writing` does."""
    data = text.encode()
    with writing(path, force=force) as file:
        file.write(data)


# ---- reading


def read_small(path: str | os.PathLike[str], what: str = "The file", limit: int = SMALL) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises SmallFileError; `what` begins its sentence."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            raise SmallFileError(what, path, "it is not a regular file")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise SmallFileError(what, path, "it does not exist") from None
    except OSError as error:
        raise SmallFileError(what, path, reason_of(error)) from error
    except ValueError as error:
        if isinstance(error, SmallFileError):
            raise
        raise SmallFileError(what, repr(path), str(error)) from None  # a NUL in the path
    if len(data) > limit:
        raise SmallFileError(what, path, f"it has more than {limit:,} bytes")
    return data


def read_utf8(path: str | os.PathLike[str], what: str = "The file", limit: int = SMALL) -> str:
    """The text of a file in UTF-8, by `read_small`."""
    try:
        return read_small(path, what, limit).decode()
    except UnicodeDecodeError as error:
        raise SmallFileError(what, path, f"it is not text in UTF-8 (byte {error.start})") from None


def read_json(path: str | os.PathLike[str], what: str = "The file", limit: int = SMALL, depth: int = DEPTH) -> Any:
    """The JSON in a file, by `read_small` and `parse_json`. Raises SmallFileError."""
    try:
        return parse_json(read_small(path, what, limit), depth)
    except SmallFileError:
        raise
    except ValueError as error:
        raise SmallFileError(what, path, str(error)) from None


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file of any size, in hexadecimal. Raises OSError.

    Remembered while the process lives and the file stays as it is: a thread may ask for it before it is needed.
    """
    with _DIGESTING, open(path, "rb") as file:  # one at a time: whoever comes second finds it done
        before = _as_it_is(file)
        if before not in _DIGESTS:
            digest = hashlib.sha256()
            while block := file.read(1 << 24):
                digest.update(block)
            if _as_it_is(file) != before:  # written while it was read
                return digest.hexdigest()
            _DIGESTS[before] = digest.hexdigest()
        return _DIGESTS[before]


def _as_it_is(file: IO[bytes]) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def parse_json(data: str | bytes, depth: int = DEPTH) -> Any:
    """JSON with at most `depth` brackets in each other. Raises ValueError, the rest of a sentence ("it is ...")."""
    try:
        content = json.loads(data)
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg}, line {error.lineno})") from None
    except ValueError:  # a whole number of thousands of digits
        raise ValueError("it has a number that is too long") from None
    except RecursionError:
        raise ValueError(f"it has more than {depth} brackets in each other") from None
    level = [content]
    for _ in range(depth + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return content
        level = [value for item in level for value in (item.values() if isinstance(item, dict) else item)]
    raise ValueError(f"it has more than {depth} brackets in each other")
