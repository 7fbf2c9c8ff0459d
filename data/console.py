"""The progress bar of data/prepare.py: a console that fails does not end hours of work."""

from __future__ import annotations

import contextlib
import shutil
import sys
from typing import Any

from tqdm import tqdm


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
