"""What data/prepare.py says: a console that fails does not end hours of work."""

from __future__ import annotations

import os
import sys


def say(text: object) -> None:
    """Print a line; if nobody can read it any more, this and all that follows is dropped."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):  # a full disk, a closed pipe, a closed file
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
