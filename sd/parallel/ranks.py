"""Messages between ranks, on torch.distributed.

All exchanges are point to point over the default group: who needs what from whom is known to both sides from shapes
alone, so any set of ranks can exchange without a group of its own. What is sent at once to a rank is one message.
What comes from another rank is numbers or text: nothing is unpickled.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .launch import ECHO, folder, is_rank, rank
from .pulse import waiting

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
        raise RankError(f"{ECHO}, so this one stops ({reason}).") from None


# ---- the world


def connect(device: torch.device) -> None:
    """Join the process group that the launcher describes, unless there is one already or this is the only rank.

    Ranks that `launch` started meet in its folder, and their sockets are open to this machine alone. Others meet at
    MASTER_ADDR, as torchrun has it.
    """
    if dist.is_initialized() or not is_rank():
        return
    here, count, place = rank(), int(os.environ["WORLD_SIZE"]), folder()
    if here >= count:
        raise RankError(f"RANK is {here}, but WORLD_SIZE is {count}: give ranks from 0 to {count - 1}.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # With a device all ranks are connected before two of them talk.
    backend, own = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    if place:
        where, hint = str(place), "check that the folder for temporary files has room."
    else:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hint = "check that the address is reachable and the port free."
    try:
        if place:
            store = dist.FileStore(str(place / "meeting"), count)
            dist.init_process_group(backend, store=store, rank=here, world_size=count, device_id=own)
        else:
            if here:
                reach(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            dist.init_process_group(backend, device_id=own)
        atexit.register(end)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise RankError(f"The ranks cannot meet at {where} ({reason}): {hint}") from None


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
    if world()[1] == 1:
        return
    mine = [(key, hashed(str(value)), str(value)[:60]) for key, value in what.items()]
    whole = hashed(*(part for key, code, _ in mine for part in (key, code)))
    if len(set(said_by_all(whole.encode(), 64))) == 1:
        return
    said = [understood(message) for message in said_by_all(json.dumps(mine).encode(), 1 << 14)]
    for key in what:
        first = said[0].get(key)
        others = [r for r, theirs in enumerate(said) if theirs.get(key) != first]
        if others:
            theirs = said[others[0]].get(key)
            raise RankError(
                f"The ranks disagree on {key}: rank {others[0]} has {theirs[1] if theirs else 'none'}, rank 0 has "
                f"{first[1] if first else 'none'}; start all of them in the same way."
            )
    raise RankError("The ranks disagree on what to draw: start all of them in the same way, with the same version.")


def hashed(*texts: str) -> str:
    return hashlib.sha256("".join(f"{len(text)} {text}" for text in texts).encode(errors="replace")).hexdigest()


def said_by_all(message: bytes, size: int) -> list[bytes]:
    """The message of every rank, by rank; of each no more than `size` bytes."""
    device = "cpu" if "cpu" in dist.get_backend_config() else "cuda"
    own = torch.tensor(list(message[:size].ljust(size, b" ")), dtype=torch.uint8, device=device)
    all_ = [torch.empty_like(own) for _ in range(world()[1])]
    with lost():
        dist.all_gather(all_, own)
    return [bytes(t.tolist()).rstrip(b" ") for t in all_]


def understood(message: bytes) -> dict[str, tuple[str, str]]:
    """What a rank says that it has, by name: a digest and a text. Nothing where it is not of that form."""
    try:
        return {str(key): (str(code), str(text)) for key, code, text in json.loads(message)}
    except (ValueError, TypeError, RecursionError):
        return {}
