"""Writes docs/api.md, the reference of every public name, from the docstrings: `make api`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import sd
from sd import study


def reference() -> str:
    lines = ["# Reference", "", "Made from the docstrings by `make api`; do not edit it here.", ""]
    for title, module in (("sd", sd), ("sd.study", study)):
        lines += [f"## `{title}`", ""]
        for name in sorted(module.__all__, key=str.lower):
            lines += entry(f"{title}.{name}", getattr(module, name))
    return "\n".join(lines).rstrip() + "\n"


def entry(path: str, value: Any) -> list[str]:
    if inspect.ismodule(value):
        return [f"### `{path}`", "", *text(value), ""]
    lines = [f"### `{path}{signature(value)}`", "", *text(value), ""]
    if inspect.isclass(value):
        for name, member in vars(value).items():
            member = getattr(member, "__func__", member)
            if not name.startswith("_") and inspect.isfunction(member) and member.__doc__:
                lines += [f"#### `{name}{signature(member)}`", "", *text(member), ""]
    return lines


def signature(value: Any) -> str:
    try:
        return str(inspect.signature(value)).replace("'", "")
    except (TypeError, ValueError):
        return ""


def text(value: Any) -> list[str]:
    """The docstring as it stands, for its tables are made of spaces."""
    return ["```text", *(inspect.getdoc(value) or "").splitlines(), "```"]


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(reference(), encoding="utf-8")
