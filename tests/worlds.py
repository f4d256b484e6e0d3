"""Small worlds of ranks on this machine, for the tests: processes on gloo, forked from one that has torch loaded."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "sd.parallel.sampler", "tests.layouts"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def enter(
    rank: int, count: int, folder: str, queue: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    from sd.parallel.launch import environment

    torch.set_num_threads(1)
    os.environ |= environment(rank, count, Path(folder))
    try:
        queue.put((rank, function(rank, *args), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def in_world(count: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """What `function(rank, *args)`, of a module, returns on each of `count` ranks. Raises what one of them raised."""
    queue = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=enter, args=(r, count, folder, queue, function, args)) for r in range(count)
        ]
        for process in processes:
            process.start()
        try:
            said = [queue.get(timeout=timeout) for _ in processes]
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    errors = [f"rank {rank}: {error}" for rank, _, error in said if error]
    if errors:
        raise AssertionError("\n".join(errors))
    return [value for _, value, _ in sorted(said, key=lambda one: one[0])]
