"""Messages between ranks, on torch.distributed, and a watch over them.

All exchanges are point to point over the default group: who needs what from whom is known to both sides from shapes
alone, so any set of ranks can exchange without a group of its own. What is sent at once to a rank is one message.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .launch import report

Shape = tuple[int, ...]


class RankError(ValueError):
    """Another rank is gone, hangs, or disagrees; the message names it."""

    code = 1  # of the command's exit


@dataclass
class Traffic:
    """What went through this rank since the last `clear`."""

    exchanges: int = 0
    messages: int = 0  # received
    received: int = 0  # bytes

    def clear(self) -> None:
        self.exchanges = self.messages = self.received = 0


@dataclass
class Ranks:
    """Some ranks of the world, in order; `me` is this one's place among them."""

    members: Sequence[int]
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        here = dist.get_rank() if dist.is_initialized() else 0
        self.me = list(self.members).index(here)

    def __len__(self) -> int:
        return len(self.members)

    def start(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Shape]], like: Sequence[Tensor]
    ):
        """Begin an exchange: to member i go the tensors outgoing[i], and from it come tensors of incoming[i].

        Tensors at place k are of the dtype of like[k]. Empty ones are not sent. Returns a function that waits, and
        returns the tensors by member.
        """
        operations, buffers = [], []
        for i, member in enumerate(self.members):
            sizes = [
                torch.Size(shape).numel() * t.dtype.itemsize for shape, t in zip(incoming[i], like, strict=False)
            ]
            buffer = torch.empty(sum(sizes) if i != self.me else 0, dtype=torch.uint8, device=like[0].device)
            buffers.append((buffer, sizes))
            if i == self.me:
                continue
            if buffer.numel():
                operations.append(dist.P2POp(dist.irecv, buffer, member))
                self.traffic.messages += 1
                self.traffic.received += buffer.numel()
            parts = [t.contiguous().flatten().view(torch.uint8) for t in outgoing[i] if t.numel()]
            if parts:
                message = parts[0] if len(parts) == 1 else torch.cat(parts)
                operations.append(dist.P2POp(dist.isend, message, member))
        self.traffic.exchanges += 1
        with lost():
            works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> list[list[Tensor]]:
            with lost(), waiting():
                for work in works:
                    work.wait()
            operations.clear()  # what is sent had to live until here
            result = []
            for i, (buffer, sizes) in enumerate(buffers):
                parts = buffer.split(sizes) if i != self.me else []
                result.append([p.view(t.dtype).view(s) for p, t, s in zip(parts, like, incoming[i], strict=False)])
            return result

        return wait

    def gather(self, x: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """The tensor of every member, by place; `shapes` are theirs."""
        wait = self.start([[x]] * len(self), [[s] for s in shapes], [x])
        return [x if i == self.me else parts[0] for i, parts in enumerate(wait())]


@contextmanager
def lost() -> Iterator[None]:
    """Around messages: a broken connection is one sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise RankError(f"Another rank is gone, so this one stops ({reason}).") from None


# ---- the world


def connect(device: torch.device) -> None:
    """Join the process group that the launcher describes, unless there is one already or this is the only rank."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    try:
        if os.environ["RANK"] != "0":
            reach(address, int(port))
        if device.type == "cuda":
            dist.init_process_group(
                "cpu:gloo,cuda:nccl", device_id=device
            )  # connects all ranks before two of them talk
        else:
            dist.init_process_group("gloo")
        atexit.register(end)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{address}:{port}"
        raise RankError(
            f"The ranks cannot meet at {where} ({str(error).splitlines()[0][:200]}): "
            "check that the address is reachable and the port free."
        ) from None


def reach(address: str, port: int, seconds: float = 30.0) -> None:
    """Raise OSError unless somebody listens there within some seconds; torch itself would wait for many minutes."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def end() -> None:
    if dist.is_initialized():
        with suppress(Exception):
            dist.destroy_process_group()


def world() -> tuple[int, int]:
    """This rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(what: dict[str, Any]) -> None:
    """Raise RankError unless all ranks say the same; the message names what and who."""
    count = world()[1]
    if count == 1:
        return
    said: list[Any] = [None] * count
    with lost():
        dist.all_gather_object(said, {k: str(v) for k, v in what.items()})
    for key in what:
        others = [r for r in range(count) if said[r][key] != said[0][key]]
        if others:
            raise RankError(
                f"The ranks disagree on {key}: rank {others[0]} has {said[others[0]][key][:60]}, rank 0 has "
                f"{said[0][key][:60]}; start all of them in the same way."
            )


# ---- the watch


class Pulse:
    """What a rank tells about itself: that it lives, how many layers it has called, whether it waits for others."""

    def __init__(self) -> None:
        self.calls, self.waits, self.timeout = 0, 0, 20.0
        self.on, self.watched = False, False  # drawing; looked at by a thread


PULSE = Pulse()


@contextmanager
def waiting() -> Iterator[None]:
    PULSE.waits += 1
    try:
        yield
    finally:
        PULSE.waits -= 1
        PULSE.calls += 1


def give_up(message: str, who: str = "") -> None:
    """End this process at once, for its main thread may wait for ever; and the rank `who`, if it is on this machine.

    A process that hangs may take no notice of the launcher's polite signals.
    """
    if not report(message):
        print(f"sd: error: {message}", file=sys.stderr, flush=True)
    where, _, pid = who.rpartition("/")
    if where and where == machine() != "unknown":
        with suppress(OSError):
            os.kill(int(pid), signal.SIGKILL)
    os._exit(1)


def watch(timeout: float, fail: Callable[..., None] = give_up) -> None:
    """From now on, end this process where another rank is silent, or stuck in a drawing, for `timeout` seconds."""
    rank, count = world()
    PULSE.timeout = timeout
    if count == 1 or PULSE.watched:
        return
    PULSE.watched = True
    store = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore("sd-watch", store.clone() if hasattr(store, "clone") else store)
    done = threading.Event()
    with lost():
        store.set(f"{rank}", beat(0))
    threading.Thread(target=look, args=(store, rank, count, done, fail), daemon=True).start()

    def leave() -> None:
        done.set()
        with suppress(Exception):
            store.set(f"{rank}", "left")

    atexit.register(leave)


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


def beat(number: int) -> str:
    # Layers called, or seconds of computing: a layer may take long.
    work = PULSE.calls + int(time.process_time())
    return f"{number} {work} {int(PULSE.waits > 0 or not PULSE.on)} {machine()}/{os.getpid()}"


def machine() -> str:
    """Where process ids mean the same: a machine since its start, and its namespace of processes; or "unknown"."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return "unknown"


def look(store: Any, rank: int, count: int, done: threading.Event, fail: Callable[..., None]) -> None:
    now = time.monotonic()
    others = [r for r in range(count) if r != rank]
    beats, works = dict.fromkeys(others, ("", now)), dict.fromkeys(others, ("", now))  # the last, and since when
    who, number = dict.fromkeys(others, ""), 0
    while not done.wait(min(1.0, PULSE.timeout / 8)):
        number += 1
        try:
            store.set(f"{rank}", beat(number))
            now = time.monotonic()
            for other in others:
                said = store.get(f"{other}").decode() if store.check([f"{other}"]) else ""
                if not said or said == "left":  # it has not begun, or is done
                    beats[other] = works[other] = "", now
                    continue
                at, work, idle, who[other] = said.split()
                if at != beats[other][0]:
                    beats[other] = at, now
                if work != works[other][0] or idle == "1":
                    works[other] = work, now
        except Exception:
            if not done.is_set() and PULSE.on:
                fail("The ranks' meeting point does not answer: the rank or the launcher that held it is gone.")
            return
        for what, last in (("has not answered", beats), ("has neither computed nor waited", works)):
            for other in others:
                if now - last[other][1] > PULSE.timeout:
                    fail(f"Rank {other} {what} for {PULSE.timeout:.0f} s, so all were ended.", who[other])
