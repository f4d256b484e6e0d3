"""What every benchmark needs: fresh processes in turn, medians with their spread, the machine, a table, a plot."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sd.files import write_text

PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "openvino")  # diffusers loads faster with accelerate


class RunError(Exception):
    """A process ended with an error, and the message is the end of what it wrote; or it took too long."""


@contextmanager
def holding(lock: Path | None) -> Iterator[None]:
    """Within the block, the file is locked (flock); waits for it as long as it takes."""
    if lock is None:
        yield
        return
    import fcntl  # not on Windows, where nobody gives a lock

    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def fresh(module: str, *args: str, lock: Path | None = None, limit: float = 1800) -> dict[str, Any]:
    """Run a module in a process of its own. Returns the JSON that it prints last, with two entries more:

    start  when the process was started, by the system's clock (time.time)
    load   of the machine at its end, over 1 minute: what else there was to do

    `lock` is a file that is locked while the process runs (flock), where several people share a machine; waiting
    for it counts neither against `limit`, in seconds, nor in `start`. Raises RunError where the process fails or
    is not done within the limit; it and all that it started are ended then.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *args]
    with holding(lock):
        start = time.time()
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, start_new_session=True, **pipes)  # a group of its own, to end it whole
        try:
            out, err = process.communicate(timeout=limit)
        except BaseException as error:  # Ctrl-C too, which does not reach a group of its own
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RunError(f"not done within {limit:g} s") from None
            raise
    if process.returncode:
        raise RunError(err.strip()[-1500:] or f"ended with code {process.returncode}")
    return json.loads(out.splitlines()[-1]) | {"start": start, "load": os.getloadavg()[0]}


def in_turn(
    jobs: Mapping[str, Callable[[], dict[str, Any]]], rounds: int, keep: Callable[[dict], None] = lambda r: None
) -> dict[str, list[dict[str, Any]]]:
    """Results by name of job: A B C A B C, so that what slows the machine for a while slows all of them.

    `keep` is given all results after each process, so that a run that is stopped is not lost. A job that fails
    is left out of later rounds, with the reason as its `failed`.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for k in range(rounds):
        for name, job in jobs.items():
            if results[name] and "failed" in results[name][-1]:
                continue
            try:
                results[name].append(job())
            except RunError as error:
                results[name] = [{"failed": str(error)}]
            last = results[name][-1]
            said = last.get("failed", "").splitlines()[-1:] or [f"{key} {values(last, key)}" for key in last["times"]]
            print(f"  round {k + 1}, {name}: {'; '.join(said)}", flush=True)
            keep(results)
    return results


def values(result: Mapping[str, Any], key: str) -> list[float]:
    return [round(value, 3) for value in result["times"][key]]


def spread(samples: Sequence[float], digits: int = 2) -> str:
    """The median, the smallest and the largest: "8.41 (8.32 to 8.77)"."""
    middle = f"{statistics.median(samples):.{digits}f}"
    return middle if len(samples) == 1 else f"{middle} ({min(samples):.{digits}f} to {max(samples):.{digits}f})"


def machine(threads: int) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        facts["cpu"] = f"{fields['model name']}, family {fields['cpu family']} model {fields['model']}"
        facts["avx512"] = "avx512f" in fields["flags"].split()
        facts["memory_gb"] = round(int(Path("/proc/meminfo").read_text().split()[1]) / 1e6, 1)
    except (OSError, KeyError, IndexError):
        pass  # not Linux, or not x86
    facts |= {"threads": threads, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n", force=True)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as it is, and as Markdown."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


class Report:
    """Prints what was measured, and puts it into a file of results as a section of its own, if one is given.

    Write often: what was measured before a run was stopped is in the file then.
    """

    def __init__(self, file: Path | None, heading: str, facts: Mapping[str, Any]):
        self.file, self.heading = file, heading
        said = "; ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        self.parts = [textwrap.fill(f"{said}.", 130)]

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.parts.append(text.strip())
        if self.file is not None:
            before = self.file.read_text(encoding="utf-8") if self.file.exists() else "# Results\n"
            text = "\n\n".join(self.parts)
            write_text(self.file, with_section(before, self.heading, f"    {command()}\n\n{text}"), force=True)


def command() -> str:
    """What was typed to run this, without the paths of this machine."""
    name = getattr(sys.modules["__main__"].__spec__, "name", None) or Path(sys.argv[0]).name
    words = [shlex.quote(word if "/" not in word else Path(word).name) for word in sys.argv[1:]]
    return " ".join(["python -m", name, *words])


def with_section(document: str, heading: str, text: str) -> str:
    """A Markdown document in which the section `## heading` has this text; a new section stands at the end."""
    start = re.search(rf"^## {re.escape(heading)}\n", document, re.MULTILINE)
    section = f"## {heading}\n\n{text}\n"
    if start is None:
        return f"{document.rstrip()}\n\n{section}"
    rest = re.search(r"^## ", document[start.end() :], re.MULTILINE)
    after = "\n" + document[start.end() + rest.start() :] if rest else ""
    return document[: start.start()] + section + after


COLOURS = ["#1f77b4", "#2ca02c", "#ff7f0e", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f"]


def plot_bars(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel of bars for each task, a bar for each peer: the median, with a line from the least to the largest.

    Drawn with pillow: no plotting library for one picture.
    """
    from PIL import Image, ImageDraw

    row, gap, left, wide = 22, 34, 190, 900
    high = 16 + sum(gap + row * len(bars) for bars in panels.values())
    image = Image.new("RGB", (wide, high), "white")
    draw = ImageDraw.Draw(image)
    names = list(dict.fromkeys(name for bars in panels.values() for name in bars))
    y = 8
    for title, bars in panels.items():
        draw.text((12, y), title, fill="black")
        y += gap - 12
        top = max(max(samples) for samples in bars.values())
        scale = (wide - left - 150) / top
        for name, samples in bars.items():
            middle = left + statistics.median(samples) * scale
            draw.text((24, y + 4), name, fill="black")
            draw.rectangle([left, y + 2, middle, y + row - 5], fill=COLOURS[names.index(name) % len(COLOURS)])
            ends = left + min(samples) * scale, left + max(samples) * scale
            draw.line([(ends[0], y + row / 2 - 1), (ends[1], y + row / 2 - 1)], fill="black", width=2)
            draw.text((max(ends[1], middle) + 8, y + 4), f"{statistics.median(samples):.2f} s", fill="black")
            y += row
        y += 12
    image.save(path)
