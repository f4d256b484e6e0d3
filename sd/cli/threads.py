"""How many threads to compute with: as many as there are cores that no other program keeps busy.

A step of a model is thousands of short parallel sections, and each of them waits for its slowest thread. Where
another program has put one thread aside, all wait: on two busy cores 10 steps of the built-in model took 17 to 26 s
with two threads, and 1.3 to 1.5 s with one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ..parallel import launch

QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")


class Neighbours:
    """What other programs make of the cores that this process may use, from now on. Knows nothing but on Linux."""

    def __init__(self) -> None:
        self.start = moment()

    def busy(self) -> float:
        """So many cores have been at work for others, on average; 0.0 where that cannot be told."""
        now = moment()
        if self.start is None or now is None or now.clock - self.start.clock < 0.2:  # too short to tell
            return 0.0
        others = (now.work - self.start.work) - (now.own - self.start.own)
        return max(0.0, others / (now.clock - self.start.clock))


@dataclass(frozen=True)
class Moment:
    clock: float  # seconds
    work: float  # seconds that our cores have been at work, for anybody but programs that give way ("nice")
    own: float  # seconds that they have been at work for this process


def moment() -> Moment | None:
    try:
        cores = {f"cpu{n}" for n in os.sched_getaffinity(0)}
        work = 0.0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *ticks = line.split()
            if name in cores:
                user, _, system, _, _, irq, soft, stolen = map(int, ticks[:8])
                work += (user + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return None
    times = os.times()
    return Moment(time.monotonic(), work, times.user + times.system)


def quota() -> float | None:
    """How many cores a container may use; None where it is not limited."""
    try:
        limit, period = Path(QUOTAS[0]).read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = (Path(file).read_text().strip() for file in QUOTAS[1:])
        except OSError:
            return None
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None


def free_threads(usual: int, busy: float, limit: float | None) -> int:
    """Of so many threads as usual those that have a core: others keep `busy` cores at work, `limit` is a quota."""
    threads = min(usual, round(launch.cores() - busy))
    if limit is not None:
        threads = min(threads, int(limit))
    return max(1, threads)


def choose_threads(asked: int | None, neighbours: Neighbours | None) -> tuple[int, str | None]:
    """Tell torch how many threads to compute with, and return their number; and why there are fewer than usual.

    asked: by the user, or as a picture that is drawn again; else what is free. What OMP_NUM_THREADS says stays, and
    torch's own choice where there are no `neighbours` to look at.
    """
    import torch

    usual = torch.get_num_threads()
    if asked is None and (neighbours is None or os.environ.get("OMP_NUM_THREADS")):
        return usual, None
    busy, limit = neighbours.busy() if neighbours else 0.0, quota()
    threads = free_threads(usual, busy, limit) if asked is None else min(asked, launch.cores())
    if threads == usual:
        return usual, None
    torch.set_num_threads(threads)
    if asked is not None:
        return threads, None
    why = f"other programs keep {busy:.1f} of {launch.cores()} cores busy"
    if limit is not None and int(limit) <= threads:
        why = f"this container may use {limit:g} cores"
    return threads, f"{why}, so {threads} of {usual} threads compute; --threads chooses."
