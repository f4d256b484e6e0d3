"""Starting ranks on this machine by torch's launcher, for `artist --ranks N`; and what a started rank does first.

The launcher (torch elastic) sets up the meeting point, watches the processes, and ends all when one fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTED = "SD_RANK"  # in the environment of the ranks that `launch` starts


class LaunchError(ValueError):
    """The ranks could not be started, or one of them failed; the message names it."""

    code = 1


def is_rank() -> bool:
    """Whether this process is one of several ranks, by whatever launcher."""
    count = os.environ.get("WORLD_SIZE", "1")
    return count.isdecimal() and int(count) > 1 and "RANK" in os.environ


def rank() -> int:
    """This process's place among several ranks; 0 where it is the only one."""
    return int(os.environ["RANK"]) if is_rank() and os.environ["RANK"].isdecimal() else 0


def launch(arguments: Sequence[str], ranks: int) -> None:
    """Run `artist` with these arguments as `ranks` processes. Raises LaunchError, naming who failed first."""
    import inspect

    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # one message, and that is ours
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // ranks))
    with tempfile.TemporaryDirectory() as logs, environment({"OMP_NUM_THREADS": threads, STARTED: "1"}):
        more: dict[str, Any] = {"shutdown_timeout": 3}  # seconds until a rank that does not end is killed
        known = inspect.signature(LaunchConfig).parameters
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="artist",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            local_addr="127.0.0.1",
            **{k: v for k, v in more.items() if k in known},
        )
        try:
            elastic_launch(config, sys.executable)("-m", "sd", "draw", *arguments)
        except ChildFailedError as error:
            raise failure(error.failures, Path(logs)) from None
        except SignalException as error:
            raise KeyboardInterrupt from error


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Any:
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def failure(failures: dict[int, Any], logs: Path | None = None) -> LaunchError:
    """The cause among what failed: others end only because one did.

    failures: torch's, by rank; logs: the launcher's folder, with what ranks left there
    """
    for file in logs.rglob("error.json") if logs else ():
        message = ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # half-written, or not ours
            message = json.loads(file.read_text())["message"]["message"]
        if message.startswith("Rank "):  # one that watched another hang, and ended it
            return LaunchError(message)

    def order(rank: int) -> tuple[bool, bool, float]:
        item = failures[rank]
        killed = item.exitcode < 0 and item.exitcode != -signal.SIGTERM
        return not killed, "Another rank is gone" in said(item), item.timestamp

    rank = min(failures, key=order)
    first = failures[rank]
    message = said(first)
    if first.exitcode < 0:
        message = f"it was killed by signal {-first.exitcode} ({signal.Signals(-first.exitcode).name})."
    error = LaunchError(
        message
        if message and (first.exitcode == 2 or message.startswith("The ranks "))
        else f"Rank {rank} failed, so all were ended: {message or f'exit code {first.exitcode}'}"
    )
    error.code = 2 if first.exitcode == 2 else 1
    return error


def said(item: Any) -> str:
    message = item.message
    if isinstance(message, dict):
        message = message.get("message", "")
    return "" if str(message).startswith("Signal ") or "To enable traceback" in str(message) else str(message)


def enter() -> None:
    """At the start of a rank: end with the launcher, should that be killed."""
    if os.environ.get(STARTED) and sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def report(message: str) -> bool:
    """Leave a message for the launcher. False where it is not ours: then it has to be printed."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:  # torchrun's, or ours
        part = f"{file}.{os.getpid()}"
        with open(part, "w") as out:
            json.dump({"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}, out)
        os.replace(part, file)
    return bool(file and os.environ.get(STARTED))
