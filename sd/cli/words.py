"""What the command says: on one terminal or another, whatever stands in the messages."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterator

from ..files import printable, reason_of

LINE = 1000  # characters of a line that are shown at most
OPTIONS = {  # what the library calls by the name of an argument, and the command by that of an option
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_rescale": "--guidance-rescale",
    "prompt_style": "--prompt-style",
    "clip_skip": "--clip-skip",
    "rng": "--rng",
    "negative_prompt": "--negative",
    "num_images_per_prompt": "--count",
    "mask_image": "--mask",
    "control_image": "--control-image",
    **{
        name: f"--{name}"
        for name in ("height", "width", "seed", "eta", "memory", "scheduler", "dtype", "device", "strength", "image")
    },
}
NO_MEMORY = (
    "There is not enough memory for this: draw a smaller picture (--height, --width), take --variant lean, with "
    "--memory for the most that it may use, or end other programs."
)
ALLOCATORS = (
    "DefaultCPUAllocator",
    "an't allocate memory",
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
)


def say(text: str) -> None:
    """A message on the terminal. Escape sequences in it are shown, not obeyed, and long lines are cut."""
    if sys.stderr is not None:
        print("\n".join(printable(line, LINE) for line in text.split("\n")), file=sys.stderr)


def sentence(error: BaseException) -> str:
    """What an error says, for somebody who knows the options of the command and no Python."""
    if out_of_memory(error):
        return NO_MEMORY
    if isinstance(error, OSError) and error.strerror:
        what = f"{os.fsdecode(error.filename)} cannot be used: " if isinstance(error.filename, str | bytes) else ""
        return f"{what}{reason_of(error)}."
    text = " ".join(str(error).split("\n"))
    text = re.sub(r"\[Errno -?\d+\] ", "", text)
    text = re.sub(r"\w+=\S* \((--[^()]+)\)", r"\1", text)  # "dtype=torch.float32 (--dtype float32)" is for both
    text = re.sub(r"^mask_image (\S+) cannot be read", r"--mask \1 cannot be read", text)
    text = re.sub(r"^control_image (\S+) (is|cannot)\b", r"--control-image \1 \2", text)
    name = re.match(r"(\w+) (must|cannot) be ", text)
    if name and name[1] in OPTIONS:
        option = OPTIONS[name[1]]
        text = option + (f" ({name[1]})" if name[1] != option.strip("-") else "") + text[len(name[1]) :]
    return text if text.endswith(".") else f"{text}."


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, the system or torch, on whatever device, could not have the memory that it asked for."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    kind = type(error).__name__
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS)
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or told


def unsupported(error: BaseException) -> bool:
    """Whether torch says that a device has no such operation for numbers of this kind."""
    return isinstance(error, RuntimeError | TypeError) and any(
        words in str(error) for words in ("not implemented for", "doesn't support float64", "Could not run 'aten::")
    )


# ---- the terminal


def any_letters() -> None:
    """Have letters escaped that the terminal does not know, so that printing does not fail after the work is done."""
    for stream in (sys.stdout, sys.stderr):  # either may be a stream of somebody's own
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            with contextlib.suppress(ValueError, OSError):
                stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """At the end of the block all is printed: here, where a closed pipe or a full disk can still be told."""
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def hush() -> None:
    """Nobody reads any more: Python itself must not complain of that when it ends."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # no file, as in a test
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
