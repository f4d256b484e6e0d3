"""`python -m sd` is the command `artist`."""

import os
import sys

# `python -m` looks for modules in the current folder first. Somebody may have downloaded that folder, and a `tqdm.py`
# in it would be run, so the entry goes before anything else is imported.
try:
    if not getattr(sys.flags, "safe_path", False) and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
except OSError:  # the folder is gone
    pass

from .cli import main

sys.exit(main())
