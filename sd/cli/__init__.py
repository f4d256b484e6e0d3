"""The command `artist`. Nothing that imports torch is imported before it is needed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from ..parallel import launch
from .commands import COMMANDS
from .draw import draw, draw_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(argv[0]) if argv else None
    if argv and (command or argv[0] == "draw"):
        argv.pop(0)
    launch.enter()
    warnings.showwarning = lambda message, *_: print(f"artist: warning: {message}", file=sys.stderr)
    if launch.rank() > 0:
        warnings.showwarning = lambda *_: None  # rank 0 says it
    try:
        if command:
            command.run(command.parser().parse_args(argv))
        else:
            given = vars(draw_parser().parse_args(argv))
            if not given:
                draw_parser().print_help()
                return 2
            draw(given, argv)
    except KeyboardInterrupt:
        if not launch.is_rank():  # whoever started the ranks says it
            print("\nartist: stopped.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # the library's own sentences, and the system's on files
        if not launch.report(str(error)):
            print(f"artist: error: {error}", file=sys.stderr)
        return getattr(error, "code", 2)
    except Exception as error:
        if not launch.report(f"{type(error).__name__}: {error}"):  # a rank's, for whoever started it
            raise
        return 1
    return 0
