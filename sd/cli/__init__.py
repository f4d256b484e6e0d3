"""The command `artist`: one file a command. Nothing that imports torch is imported before it is needed."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence

from ..files import printable
from ..parallel import launch
from . import compare, convert, describe, draw, info, study
from .options import CommandError, nearest
from .words import any_letters, flushed, hush, out_of_memory, say, sentence, unsupported

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {  # from arguments to the exit code
    "draw": draw.run,
    "study": study.run,
    "describe": describe.run,
    "info": info.run,
    "compare": compare.run,
    "convert": convert.run,
}
# Words that are commands of other tools: whoever types one alone hardly wants a picture of it.
OF_OTHERS = """
benchmark commands config create delete doctor download edit env export generate gui images img2img import
init inpaint install list login logout ls model models options pull quit remove rm run sample samplers save
schedulers search serve server settings setup show status test train txt2img uninstall update upgrade upload
upscale usage version webui
"""
CLOSED_PIPE = 141  # the exit code of a program that SIGPIPE ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C, 128 and more after a signal."""
    any_letters()
    launch.enter()
    # A rank that waits for another one would not hear a signal in Python: ranks are ended by the system.
    signals = contextlib.nullcontext() if launch.is_rank() else launch.ended_by_signals()
    with warnings.catch_warnings(), signals:
        warnings.showwarning = lambda message, *_: say(f"artist: warning: {message}")
        try:
            with flushed():
                return dispatch(list(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt as error:
            if not launch.started():  # whoever started the ranks says it
                with contextlib.suppress(OSError):  # the terminal is closed, perhaps
                    say("\nartist: stopped.")
            return getattr(error, "code", 130)
        except BrokenPipeError:
            hush()
            return CLOSED_PIPE
        except Exception as error:
            return failed(error)


def failed(error: Exception) -> int:
    """Say what went wrong, or leave it to whoever started this rank. Raises what is a fault of ours."""
    if out_of_memory(error):
        text, code = sentence(error), 2
    elif isinstance(error, ValueError | OSError):  # the library's own sentences, and the system's on files
        text, code = sentence(error), getattr(error, "code", 2)
    elif unsupported(error):
        text, code = "This device cannot compute in these numbers: choose another --dtype, or another --device.", 2
    else:
        if not launch.report(f"{type(error).__name__}: {error}"):
            raise error
        return 1
    if not launch.report(text):
        say(f"artist: error: {text}")
    return code


def dispatch(words: list[str]) -> int:
    """Run the command that the first word names; else the words are a drawing."""
    if words and words[0] == "help":
        about = words[1] if len(words) > 1 else "draw"
        if about in COMMANDS:
            return COMMANDS[about](["--help"])
        refuse_near_misses(about)
        what = printable(about, 60)
        raise CommandError(f"There is no command {what!r}: the commands are {', '.join(COMMANDS)}.")
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    if words:
        refuse_near_misses(words[0])
    return draw.run(words)


def refuse_near_misses(word: str) -> None:
    """Raise CommandError for a word that looks like a mistyped command: to draw it would be a surprise."""
    if len(word) < 40 and word.isalpha() and (near := nearest(word.lower(), [*COMMANDS, "help"], cutoff=0.75)):
        hint = f"did you mean 'artist {near}'? To draw that word: artist draw {word}."
        raise CommandError(f"There is no command {word!r}; {hint}")
    if word.lower() in OF_OTHERS.split():
        hint = (
            f"artist {'--version says which this is' if word.lower() == 'version' else '--help lists the commands'}"
        )
        raise CommandError(f"There is no command {word!r}; {hint}. To draw that word: artist draw {word}.")
