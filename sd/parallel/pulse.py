"""The watch over ranks: each says every second that it lives and gets on, and ends where another one does not.

A rank that finds another one silent ends only itself. Its launcher, ours or torchrun's, then ends the others, which
are its own children: no rank ends a process by a number that it was told.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch import nn

from .launch import folder, report

LEFT = b"left"  # the last note of a rank that is done


class Pulse:
    """What a rank tells about itself: that it lives, how many layers it has called, whether it waits for others."""

    def __init__(self) -> None:
        self.calls, self.waits, self.timeout = 0, 0, 20.0
        self.on, self.watched = False, False  # drawing; looked at by a thread


PULSE = Pulse()


class Notes:
    """A note of each rank, which the others read: a file in the launcher's private folder.

    torch's own file store only grows, and its lock stays with a process that is stopped.
    """

    def __init__(self, place: Path) -> None:
        self.place = place

    def set(self, rank: int, note: bytes) -> None:
        self.file(rank).write_bytes(note)

    def get(self, rank: int) -> bytes:
        return self.file(rank).read_bytes() if self.file(rank).exists() else b""

    def file(self, rank: int) -> Path:
        return self.place / f"pulse-{rank}"


class StoreNotes:
    """The same in the store of the process group, where ranks do not share a folder."""

    def __init__(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        self.store = dist.PrefixStore("sd-watch", store.clone() if hasattr(store, "clone") else store)

    def set(self, rank: int, note: bytes) -> None:
        self.store.set(f"{rank}", note.decode())

    def get(self, rank: int) -> bytes:
        return self.store.get(f"{rank}") if self.store.check([f"{rank}"]) else b""


@contextmanager
def waiting() -> Iterator[None]:
    """Around a wait for other ranks."""
    PULSE.waits += 1
    try:
        yield
    finally:
        PULSE.waits -= 1
        PULSE.calls += 1


@contextmanager
def drawing() -> Iterator[None]:
    """Around work in which a rank is expected to get on: to call layers, compute, or wait for others."""
    if PULSE.on:
        yield
        return
    hook = nn.modules.module.register_module_forward_pre_hook(count_call)
    PULSE.on = True
    try:
        yield
    finally:
        hook.remove()
        PULSE.on = False


def count_call(*_: Any) -> None:
    PULSE.calls += 1


def give_up(message: str) -> NoReturn:
    """End this process at once, for its main thread may wait for ever."""
    if not report(message):
        print(f"sd: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def watch(timeout: float, fail: Callable[[str], None] = give_up) -> None:
    """From now on, end this process where another rank is silent, or stuck in a drawing, for `timeout` seconds."""
    PULSE.timeout = timeout
    if not dist.is_initialized() or dist.get_world_size() == 1 or PULSE.watched:
        return
    PULSE.watched = True
    rank, count, place = dist.get_rank(), dist.get_world_size(), folder()
    notes = Notes(place) if place else StoreNotes()
    done = threading.Event()
    threading.Thread(target=watch_others, args=(notes, rank, count, done, fail), daemon=True).start()

    def leave() -> None:
        done.set()
        with suppress(Exception):
            notes.set(rank, LEFT)

    atexit.register(leave)


def beat(number: int) -> bytes:
    # Layers called, or seconds of computing: a layer may take long.
    work = PULSE.calls + int(time.process_time())
    return f"{number} {work} {int(PULSE.waits > 0 or not PULSE.on)}".encode()


def watch_others(
    notes: Notes | StoreNotes, rank: int, count: int, done: threading.Event, fail: Callable[[str], None]
) -> None:
    now = time.monotonic()
    others = [r for r in range(count) if r != rank]
    beats, works = dict.fromkeys(others, (b"", now)), dict.fromkeys(others, (b"", now))  # the last, and since when
    number = 0
    while True:
        try:
            notes.set(rank, beat(number))
            now = time.monotonic()
            for other in others:
                note = notes.get(other)
                if note == LEFT or not (note or beats[other][0]):  # it is done, or has not begun
                    beats[other] = works[other] = b"", now
                    continue
                said = re.fullmatch(rb"(\d{1,18}) (\d{1,18}) ([01])", note)
                if not said:  # half written, or nothing that a rank of ours writes: as good as silence
                    continue
                at, work, idle = said.groups()
                if at != beats[other][0]:
                    beats[other] = at, now
                if work != works[other][0] or idle == b"1":
                    works[other] = work, now
        except Exception:
            if not done.is_set() and PULSE.on:
                fail("The ranks' meeting point does not answer: the rank or the launcher that held it is gone.")
            return
        for what, last in (("has not answered", beats), ("has neither computed nor waited", works)):
            for other in others:
                if now - last[other][1] > PULSE.timeout:
                    fail(f"Rank {other} {what} for {PULSE.timeout:.0f} s, so all were ended.")
                    return
        number += 1
        if done.wait(min(1.0, PULSE.timeout / 8)):
            return
