"""The command `artist`: one file a command. Nothing that imports torch is imported before it is needed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

from ..parallel import launch
from . import compare, convert, describe, draw, info, study
from .options import CommandError, nearest

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {  # from arguments to the exit code
    "draw": draw.run,
    "study": study.run,
    "describe": describe.run,
    "info": info.run,
    "compare": compare.run,
    "convert": convert.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    launch.enter()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"artist: warning: {message}")
        if launch.rank() > 0:
            warnings.showwarning = lambda *_: None  # rank 0 says it
        try:
            return dispatch(list(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt:
            if not launch.is_rank():  # whoever started the ranks says it
                say("\nartist: stopped.")
            return 130
        except (ValueError, OSError) as error:  # the library's own sentences, and the system's on files
            if not launch.report(str(error)):
                say(f"artist: error: {error}")
            return getattr(error, "code", 2)
        except Exception as error:
            if not launch.report(f"{type(error).__name__}: {error}"):  # a rank's, for whoever started it
                raise
            return 1


def dispatch(words: list[str]) -> int:
    """Run the command that the first word names; else the words are a drawing."""
    if words and words[0] == "help":
        about = words[1] if len(words) > 1 else "draw"
        if about in COMMANDS:
            return COMMANDS[about](["--help"])
        refuse_near_misses(about)
        raise CommandError(f"There is no command {about!r}: the commands are {', '.join(COMMANDS)}.")
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    if words:
        refuse_near_misses(words[0])
    return draw.run(words)


def refuse_near_misses(word: str) -> None:
    """Raise CommandError for a word that looks like a mistyped command: to draw it would be a surprise."""
    if word.isalpha() and (near := nearest(word.lower(), [*COMMANDS, "help"], cutoff=0.75)):
        hint = f"did you mean 'artist {near}'? To draw that word: artist draw {word}."
        raise CommandError(f"There is no command {word!r}; {hint}")


def say(text: str) -> None:
    print(text, file=sys.stderr)
