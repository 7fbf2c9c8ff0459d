"""The folder in which data/prepare.py works, and from which an interrupted run goes on.

Files are on disk before the progress that tells of them, so the progress is true at any time: what
a .bin file has beyond it was written after it, and is written again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tinymamba.cli import UserError, require

FORMAT = 2
PREFIX = ".prepare-"  # of the folder's name; those of the first release ended at random
TOKENIZER = "tokenizer.json"


@dataclass
class Progress:
    """How far a run is."""

    options: dict[str, Any]  # those that decide the result
    inputs: list[str]  # fingerprints
    tokenizer: str = ""  # hash of the tokenizer.json, once it is there
    eos_id: int = 0
    source: int = 0  # the first is training, or both sides; a second one is validation
    chunks: int = 0  # of the source that are written
    taken: int = 0  # tokens of the source that are written
    tokens: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    kind: str = ""  # of the rows of --chat, "chat" or "preferences"
    conversations: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    counted: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})  # targets
    templates: list[str] = field(default_factory=list)  # files that came with the tokenizer
    reports: list[dict[str, Any]] = field(default_factory=list)  # on each source that is written
    facts: dict[str, dict] = field(default_factory=dict)  # of each side, once all is written
    format: int = FORMAT


class Unfinished:
    """The folder of a run that is not complete."""

    def __init__(self, target: Path):
        self.target = target
        self.folder = target / f"{PREFIX}unfinished"
        self.file = self.folder / "progress.json"

    def find(self, options: dict[str, Any], resume: bool, force: bool) -> Progress | None:
        """The progress to go on from, or None to begin.

        A UserError if an earlier run left something, and it is not said what to do about it.
        """
        if not self.file.exists():
            self.remove()  # it ended before anything was worth keeping, or after it had moved all
        left = {path for path in self.target.glob(f"{PREFIX}*") if path.is_dir()}
        resumable = self.folder in left and resume
        for path in sorted(left - ({self.folder} if resumable else set())):
            remedy = "pass --force to start again"
            if path == self.folder:
                remedy = "pass --resume to go on with it, or --force to start again"
            if not force:
                raise UserError(str(path), "was left by a run that was interrupted", remedy)
            shutil.rmtree(path)
        progress = self.load() if resumable else None
        for name, value in options.items() if progress else ():
            was = progress.options.get(name) if progress else None
            if was != value:
                problem = f"{value} now, but {was} in the run to go on with"
                raise UserError(f"--{name}", problem, "pass the same, or --force without --resume")
        return progress

    def load(self) -> Progress:
        """The progress that was saved last."""
        try:
            facts = json.loads(self.file.read_text(encoding="utf-8"))
            progress = Progress(**facts)
        except (ValueError, TypeError):
            progress = None
        if progress is None or progress.format != FORMAT:
            problem = "is damaged, or of another version"
            raise UserError(str(self.file), problem, "pass --force without --resume to start again")
        return progress

    def has_tokens(self) -> bool:
        """Whether any tokens can be gone on from."""
        return self.file.exists() and sum(self.load().tokens.values()) > 0

    def save(self, progress: Progress) -> None:
        """Write the progress; what it tells of must be on disk."""
        text = json.dumps(dataclasses.asdict(progress))
        new = self.file.with_suffix(".new")
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            sync(file)
        os.replace(new, self.file)
        sync_folder(self.folder)

    def check_tokenizer(self, progress: Progress) -> bool:
        """Whether the tokenizer is there; a UserError if it is not the one of the progress."""
        if not progress.tokenizer:
            return False
        path = self.folder / TOKENIZER
        same = path.is_file() and file_hash(path) == progress.tokenizer
        if not same:
            raise UserError(str(path), "is not as it was written", "start again with --force")
        return True

    def publish(self, names: Iterable[str], obsolete: Iterable[str]) -> None:
        """Move the files to their places, and remove the folder.

        Old files go first: at no time do they stand beside new ones.
        """
        names = [name for name in names if (self.folder / name).exists()]
        for name in [*names, *obsolete]:
            (self.target / name).unlink(missing_ok=True)
        for name in names:
            os.replace(self.folder / name, self.target / name)
        sync_folder(self.target)
        self.remove()

    def remove(self) -> None:
        """Remove the folder; the progress goes first, so that nothing goes on from a part."""
        self.file.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_at(path: Path, size: int) -> IO[bytes]:
    """A file of which so many bytes are known, to go on behind them."""
    there = path.stat().st_size if path.exists() else 0
    require(there >= size, str(path), "has lost what was written", "start again with --force")
    file = open(path, "rb+" if there else "wb+")  # noqa: SIM115
    file.truncate(size)
    file.seek(size)
    return file


def sync(file: Any) -> None:
    """See to it that what was written is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The same for the names in a folder, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
