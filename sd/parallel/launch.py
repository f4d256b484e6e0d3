"""Starting ranks on this machine, for `artist --ranks N`; and what a started rank does first.

The launcher starts the processes, watches them, and ends all when one fails. They meet in a private folder, which is
gone afterwards: nothing here listens on a port, and what a rank has to say is read as text. Nothing imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import printable

if TYPE_CHECKING:
    import subprocess

FOLDER = "SD_RANK"  # in the environment of the ranks that `launch` starts: the private folder where they meet
PARENT = "SD_LAUNCHER"  # the process that started them
SEED = "SD_SEED"  # the seed that it chose at random, which must be one for all
ECHO = "Another rank is gone"  # so begins what a rank says that ends only because another one did
PATIENCE = 1.0  # seconds in which a rank with another reason may still end by itself
NAMES = {item.value: item.name for item in signal.Signals}
NUMBER = re.compile("[0-9]{1,7}")

# What a rank runs: the very `sd` that the launcher runs. Started with -c, Python looks for modules in the current
# folder first (unless PYTHONSAFEPATH is set, which 3.10 does not know). Somebody may have downloaded that folder, and
# a `tqdm.py` in it would be run, so the entry goes before anything else is imported.
BEGIN = """
import sys
getattr(sys.flags, "safe_path", False) or sys.path.pop(0)
from importlib import util
spec = util.spec_from_file_location("sd", sys.argv.pop(1))
sys.modules["sd"] = module = util.module_from_spec(spec)
spec.loader.exec_module(module)
from sd.cli import main
sys.exit(main())
"""


class LaunchError(ValueError):
    """The ranks could not be started, or one of them failed; the message names it."""

    code = 1


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end, as Ctrl-C does; `code` is its exit code then."""

    def __init__(self, number: int):
        super().__init__(NAMES.get(number, str(number)))
        self.code = 128 + number


@dataclass(frozen=True)
class Ended:
    """A rank that failed: its exit code (negative: the signal that killed it), and its last words."""

    rank: int
    code: int
    message: str = ""


# ---- in a rank


def folder() -> Path | None:
    """Where ranks that `launch` started meet; None where there are none, or another launcher started them."""
    return Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None


def is_rank() -> bool:
    """Whether this process is one of several ranks, by whatever launcher: it knows its number, and where to meet."""
    rank, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    meets = folder() or all(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    return bool(NUMBER.fullmatch(rank) and NUMBER.fullmatch(count)) and int(count) > 1 and bool(meets)


def started() -> bool:
    """Whether a launcher, ours or torchrun, started this process and says how it ended."""
    return bool(folder() or os.environ.get("TORCHELASTIC_RUN_ID"))


def rank() -> int:
    """This process's place among several ranks; 0 where it is the only one."""
    return int(os.environ["RANK"]) if is_rank() else 0


def check_environment() -> None:
    """Raise LaunchError where this is to be one of several ranks, and what the environment says of them is nonsense.

    A launcher sets all of these; by hand, one is soon forgotten, and the picture would be drawn by one rank alone.
    """
    meets = folder() or os.environ.get("MASTER_ADDR")
    if not meets or not os.environ.keys() & {"RANK", "WORLD_SIZE"}:
        return  # nobody's, or somebody's own variables: nobody says where to meet
    found = {}
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name)
        if text is None and name == "LOCAL_RANK":
            continue
        if not NUMBER.fullmatch(text or "") or int(text or 0) < least:
            what = "is not set" if text is None else f"is {printable(text, 60)!r}"
            raise misplaced(f"The variable {name} {what} in the environment, but must be a number from {least} up")
        found[name] = int(text or 0)
    if found["RANK"] >= found["WORLD_SIZE"]:
        raise misplaced(f"RANK is {found['RANK']}, but WORLD_SIZE is {found['WORLD_SIZE']}, and ranks begin with 0")


def misplaced(what: str) -> LaunchError:
    error = LaunchError(f"{what}: start the ranks with --ranks or with torchrun.")
    error.code = 2
    return error


def enter() -> None:
    """At the start of a rank: end with the launcher, should that be killed."""
    if folder() and sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.environ.get(PARENT) != str(os.getppid()):  # it was killed before
            os._exit(1)


def report(message: str) -> bool:
    """Leave a message for the launcher. False where it is not ours: then it has to be printed."""
    place = folder()
    if place and is_rank():
        with contextlib.suppress(OSError):
            # In one call of the system, so that what is read is all or nothing.
            note_of(place, rank()).write_bytes(message.encode(errors="replace")[:4096])
            return True
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and not place:
        import json

        with contextlib.suppress(OSError):
            said = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": said}))
    return False


def note_of(place: Path, rank: int) -> Path:
    """The file for the last words of a rank."""
    return place / f"said-{rank}"


# ---- in the launcher


def start_ranks(arguments: Sequence[str], ranks: int, seed: int = 0) -> None:
    """Run `artist` with these arguments as `ranks` processes; `seed` is theirs where `--seed -1` lets them take any.

    Raises LaunchError, naming who failed first.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="artist-ranks-") as name, ended_by_signals():
        place = Path(name)  # readable and writable by this user alone
        children: list[subprocess.Popen[bytes]] = []
        try:
            for k in range(ranks):
                children.append(start(arguments, k, ranks, place, seed))
            failed = wait(children, place)
        finally:
            end_all(children)
        if failed:
            ended = [Ended(k, code, last_words(place, k)) for k, code in failed.items()]
            others = [Ended(k, 1, last_words(place, k)) for k in range(ranks) if k not in failed]
            raise failure([*ended, *(one for one in others if one.message)])  # some were ended while they spoke


def start(arguments: Sequence[str], rank: int, ranks: int, place: Path, seed: int = 0) -> subprocess.Popen[bytes]:
    import subprocess

    home = str(Path(__file__).parents[1] / "__init__.py")
    try:
        return subprocess.Popen(
            [sys.executable, "-c", BEGIN, home, "draw", *arguments],
            env=environment(rank, ranks, place) | {SEED: f"{seed}"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal reaches the launcher alone, which then ends them
        )
    except OSError as error:
        raise LaunchError(
            f"Rank {rank} of {ranks} cannot be started ({error.strerror}): give a smaller number to --ranks."
        ) from None


def environment(rank: int, ranks: int, place: Path) -> dict[str, str]:
    # Another launcher's meeting point is not ours.
    result = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "TORCHELASTIC_"))}
    # An empty entry stands for the current folder.
    path = os.pathsep.join(part for part in result.pop("PYTHONPATH", "").split(os.pathsep) if part)
    if path:
        result["PYTHONPATH"] = path
    result |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}"}
    result.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's own words on connections that end with a rank
    result |= {FOLDER: str(place), PARENT: f"{os.getpid()}", "PYTHONSAFEPATH": "1"}
    result["OMP_NUM_THREADS"] = result.get("OMP_NUM_THREADS") or str(max(1, cores() // ranks))
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback:  # whatever is set for work over several machines: here nobody else has to be reached
        result |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"}
    return result


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does, unless the caller handles them otherwise.

    Only the first one counts: a terminal that is closed sends several, and what is cleaned up must not be cut short.
    """

    def stop(number: int, _: object) -> None:
        for other in ours:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    ours = []
    if threading.current_thread() is threading.main_thread():  # only there can handlers be set
        ours = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP wait: for a rank, which they end at once, while it writes a picture.

    By handlers, for a mask is of one thread, and the system would give the signal to another.
    """
    if not is_rank() or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in heard[:1]:
            signal.raise_signal(number)


def wait(children: Sequence[subprocess.Popen[bytes]], place: Path) -> dict[int, int]:
    """Until all are done, or one has failed: the exit codes of those that failed, in the order in which they did."""
    failed: dict[int, int] = {}
    limit = float("inf")
    while True:
        failed |= {k: child.returncode for k, child in enumerate(children) if child.poll() and k not in failed}
        if all(child.returncode is not None for child in children):
            return failed
        if failed:
            limit = min(limit, time.monotonic() + PATIENCE)
            # A rank that hears of another's end may be gone before that one is.
            echoes = all(code > 0 and last_words(place, k).startswith(ECHO) for k, code in failed.items())
            if not echoes or time.monotonic() > limit:
                return failed
        time.sleep(0.1)


def end_all(children: Sequence[subprocess.Popen[bytes]], seconds: float = 3.0) -> None:
    """End those that still run: politely, and after some seconds by force."""
    try:
        for child in children:
            child.terminate()
        limit = time.monotonic() + seconds
        while any(child.poll() is None for child in children) and time.monotonic() < limit:
            time.sleep(0.02)
    finally:  # also after a second Ctrl-C
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def last_words(place: Path, rank: int) -> str:
    try:
        return note_of(place, rank).read_bytes().decode(errors="replace")
    except OSError:
        return ""


def failure(ended: Sequence[Ended]) -> LaunchError:
    """The cause among what failed, in the order of failing: others end only because one did."""
    for one in ended:
        if one.message.startswith("Rank "):  # it watched another one hang
            return LaunchError(one.message)
    first = min(ended, key=lambda one: (one.code > 0, one.message.startswith(ECHO)))  # the first of those alike
    message = first.message
    if first.code < 0:
        message = f"it was killed by signal {-first.code} ({NAMES.get(-first.code, 'unknown')})."
    error = LaunchError(
        message
        if message and (first.code == 2 or message.startswith("The ranks "))
        else f"Rank {first.rank} failed, so all were ended: {message or f'exit code {first.code}'}"
    )
    error.code = 2 if first.code == 2 else 1
    return error
