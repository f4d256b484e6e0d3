"""What a comparison found, as plain data, as JSON and as a table. See `compare.py`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_text
from ..weights.names import PARTS
from .measure import Row


@dataclass(frozen=True)
class Change:
    """A tensor that differs between two sources."""

    part: str  # "unet", "vae", "text"
    name: str  # CompVis name, without the part's prefix
    kind: str  # "missing in A", "missing in B", "shape", "value"
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]  # of A, of B
    difference: float = math.inf  # max |A - B| / max |A|


@dataclass
class Report:
    title: str
    names: tuple[str, str]  # of the two sides
    rows: list[Row] = field(default_factory=list)  # in the order in which a picture is made
    changes: list[Change] | None = None  # of two sources; None against diffusers
    tensors: int = 0  # that were compared
    differences: list[str] = field(default_factory=list)  # of two sources in what is no tensor: sentences
    notes: list[str] = field(default_factory=list)

    @property
    def first_over(self) -> Row | None:
        """The first row over its bound: the block to look at."""
        return next((row for row in self.rows if row.over), None)

    @property
    def same(self) -> bool:
        return self.first_over is None and not self.changes and not self.differences


def write_report(report: Report, path: Path, *, force: bool = True) -> None:
    """The report as JSON, whole or not at all, over what is there unless told otherwise.

    Infinity, which JSON does not have, is a string.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    first = report.first_over
    content = asdict(report) | {"same": report.same, "first_over": first and first.name}
    write_text(path, json.dumps(plain(content), indent=1) + "\n", force=force)


def format_report(report: Report, most: int = 20) -> str:
    """The report as a table; of tensors that differ, the `most` that differ most."""
    lines = [report.title]
    if report.changes is not None:
        lines += format_changes(report, most)
    lines += ["", *report.differences] if report.differences else []
    if report.rows:
        lines += ["", *format_rows(report)]
    lines += ["", *report.notes] if report.notes else []
    return "\n".join(lines)


def format_changes(report: Report, most: int) -> list[str]:
    changes = report.changes or []
    lines = ["", f"{len(changes)} of {report.tensors} tensors differ" + (":" if changes else ".")]
    worst = sorted(changes, key=lambda change: -change.difference)[:most]
    for c in worst:
        what = c.kind if c.kind != "value" else f"differs by {c.difference:.1e}"
        shapes = [" x ".join(map(str, s)) for s in c.shapes if s is not None]
        size = f"{shapes[0]} and {shapes[-1]}" if c.kind == "shape" else shapes[0]
        lines.append(f"  {PARTS[c.part]:12}  {c.name:60} {what}  ({size})")
    if len(changes) > most:
        lines.append(f"  and {len(changes) - most} more")
    return lines


def format_rows(report: Report) -> list[str]:
    a, b = report.names
    timed = any(row.seconds for row in report.rows)
    head = f"{'block':26} {'difference':>10}"
    if timed:
        head += f" {a + ' ms':>12} {b + ' ms':>12} {a + ' MB':>11} {b + ' MB':>12}"
    lines = [head]
    for row in report.rows:
        line = f"{row.name:26} {row.difference:10.1e}" if row.difference else f"{row.name:26} {'0':>10}"
        if row.seconds:
            line += f" {row.seconds[0] * 1e3:12.1f} {row.seconds[1] * 1e3:12.1f}"
        if row.peak:
            line += f" {row.peak[0] / 1e6:11.1f} {row.peak[1] / 1e6:12.1f}"
        line += f"  {row.note}" if row.note else ""
        over = f"  over {row.bound:g}" if row.bound else "  differs"
        lines.append(line + (over if row.over else ""))
    first = report.first_over
    bounds = sorted({row.bound for row in report.rows})
    below = " or ".join(f"{bound:g}" for bound in bounds)
    if all(bound == math.inf for bound in bounds):
        return lines  # nothing was to be alike
    if first is None:
        lines += ["", f"No block is over its bound ({below})." if any(bounds) else "Every block gives the same."]
    else:
        what = f"over its bound ({first.difference:.1e}, bound {first.bound:g})" if first.bound else "that differs"
        lines += ["", f"The first block {what}: {first.name}"]
    return lines
