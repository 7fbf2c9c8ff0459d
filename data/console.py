"""What data/prepare.py says: a console that fails does not end hours of work."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from typing import Any

from tqdm import tqdm


def say(text: object) -> None:
    """Print a line; if nobody can read it any more, this and all that follows is dropped."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):  # a full disk, a closed pipe, a closed file
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


class Screen:
    """Standard error for a progress bar, which shows nothing if it fails or is no terminal."""

    def write(self, text: str) -> None:
        """Write a piece."""
        if sys.stderr:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(text)
                sys.stderr.flush()

    def flush(self) -> None:
        """All is written at once."""

    def isatty(self) -> bool:
        """Whether there is a terminal."""
        return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(label: str, total: int | None) -> tqdm:
    """A bar of bytes that are read."""
    columns = shutil.get_terminal_size().columns - 1
    file: Any = Screen()
    return tqdm(
        total=total, desc=label, unit="B", unit_scale=True, disable=None, file=file, ncols=columns
    )
