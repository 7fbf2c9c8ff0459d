"""The files of the inputs: folders, links, pipes and Python's own library.

    left_out = LeftOut()
    for found in input_files(["texts/", "-"], outputs, left_out, spool=folder):
        print(found.key, found.size)

Each real file and folder is read once, in an order that depends on names alone. Whatever is not
read is counted in `left_out`.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import stat
import sys
import sysconfig
import tempfile
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from tinymamba.archives import (
    HEAD_BYTES,
    READ_ALREADY,
    READ_BYTES,
    Found,
    LeftOut,
    first_line,
    problem_of_head,
    shown,
)
from tinymamba.cli import UserError

FEW_SOURCES = 20  # Python's own library has more
NOT_SAMPLE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
NOT_SAMPLE |= {"encodings", "pydoc_data"}  # tables and generated text


class Walk:
    """Collects files below folders: each real file and folder once, real names before links."""

    def __init__(
        self, left_out: LeftOut, outputs: Collection[Path] = (), excluded: Collection[str] = ()
    ):
        self.left_out = left_out
        self.outputs = {os.path.realpath(path) for path in outputs}
        self.excluded = excluded  # names of folders
        self.seen: set[str] = set()  # real paths

    def files(self, root: Path) -> list[Found]:
        """The files below a folder, ordered by their paths in it."""
        found: list[Found] = []
        linked: list[tuple[str, Path]] = []
        real_folders, linked_folders = deque([("", root)]), deque[tuple[str, Path]]()
        while real_folders or linked_folders:
            prefix, folder = (real_folders or linked_folders).popleft()
            real = os.path.realpath(folder)
            if not self.is_new(real, folder):
                continue
            for entry in self.entries(folder):
                key, path = prefix + entry.name, folder / entry.name
                if entry.is_dir():
                    if not entry.is_symlink():
                        real_folders.append((key + "/", path))
                    elif not self.is_around(path, real):
                        linked_folders.append((key + "/", path))
                elif entry.is_symlink():
                    linked.append((key, path))
                elif self.is_new(os.path.join(real, entry.name), path):
                    found += self.found(key, path)
        for key, path in linked:
            if self.is_new(os.path.realpath(path), path):
                found += self.found(key, path)
        return sorted(found)

    def entries(self, folder: Path) -> Iterator[os.DirEntry]:
        """What a folder has, by name, without what is not to be read."""
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            self.left_out.add(f"unreadable ({first_line(error)})", folder)
            return
        for entry in entries:
            path = folder / entry.name
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                reason = f"unreadable ({first_line(error)})"
                self.left_out.add("broken link" if entry.is_symlink() else reason, path)
                continue
            if entry.name in self.excluded:
                continue
            if entry.name.startswith("."):
                if os.path.realpath(path) not in self.outputs:
                    self.left_out.add("hidden", path)
            elif stat.S_ISDIR(mode) or stat.S_ISREG(mode):
                yield entry
            else:
                self.left_out.add("not a regular file", path)

    def is_new(self, real: str, path: Path) -> bool:
        """Whether a real path is not an output and was not met before."""
        if real in self.outputs:
            return False
        if real in self.seen:
            self.left_out.add(READ_ALREADY, path)
            return False
        self.seen.add(real)
        return True

    def is_around(self, link: Path, real: str) -> bool:
        """Whether a link leads to a folder that holds the link itself, so that it has no end."""
        target = os.path.realpath(link)
        around = target not in self.seen and Path(real).is_relative_to(target)
        if around:
            self.left_out.add("link to a folder around it", link)
        return around

    def found(self, key: str, path: Path) -> list[Found]:
        """The file at a path, or nothing if it cannot be read or is not text."""
        try:
            found = Found.at(key, path)
            problem = problem_of(found)
        except OSError as error:
            problem = f"unreadable ({first_line(error)})"
        if problem:
            self.left_out.add(problem, path)
        return [] if problem else [found]


def problem_of(found: Found) -> str:
    """Why a file is not read, judged by its name and its first bytes; "" if it is."""
    with open(found.path, "rb") as file:
        head = file.read(HEAD_BYTES)
    return problem_of_head(found.name, head)


def input_files(
    names: list[str], outputs: Collection[Path], left_out: LeftOut, spool: Path
) -> list[Found]:
    """The files of --input, without `outputs`: an earlier run may have written into its folder.

    Standard input, "-", and pipes are copied to the folder `spool`, to be read more than once.
    """
    walk, files = Walk(left_out, outputs), []
    for name in dict.fromkeys(expanded(names)):
        root = Path(name)
        try:
            if name == "-":
                files.append(copied_stdin(spool))
            elif root.is_dir():
                files += files_of_folder(walk, root)
            elif is_pipe(root):
                with open(root, "rb") as source:
                    files.append(copied(source, shown(root), spool))
            else:
                files += single_file(walk, root)
        except OSError as error:
            raise UserError(shown(name), first_line(error), "check the path") from None
    return files


def expanded(names: list[str]) -> Iterator[str]:
    """The names, with patterns replaced by what they match: not every shell does it."""
    for name in names:
        if name == "-" or os.path.lexists(name):
            yield name
        elif matches := sorted(glob.glob(name, recursive=True)):
            yield from matches
        else:
            raise UserError(shown(name), "no such file or folder", "check the path")


def is_pipe(path: Path) -> bool:
    """Whether a path can be read only once, as those of `<(command)` in a shell."""
    mode = os.stat(path).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def files_of_folder(walk: Walk, root: Path) -> list[Found]:
    """The files below a folder; a UserError if there is nothing to read."""
    before = walk.left_out.copy().counts
    if files := walk.files(root):
        return files
    counts = {reason: n - before.get(reason, 0) for reason, n in walk.left_out.counts.items()}
    if counts.get(READ_ALREADY):
        return []
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items() if count)
    problem = f"holds nothing to read ({reasons})" if reasons else "is empty"
    raise UserError(shown(root), problem, "give UTF-8 text, .jsonl or .parquet")


def single_file(walk: Walk, root: Path) -> list[Found]:
    """A file that was named; a UserError if it cannot be read."""
    real = os.path.realpath(root)
    if real in walk.outputs:
        raise UserError(shown(root), "is an output too", "name another --output_dir")
    if not walk.is_new(real, root):
        return []
    if not stat.S_ISREG(os.stat(root).st_mode):
        raise UserError(shown(root), "is not a regular file", "give a file or a folder")
    found = Found.at(root.as_posix(), root)
    if problem := problem_of(found):
        raise UserError(shown(root), f"is {problem}", "give UTF-8 text, .jsonl or .parquet")
    return [found]


def copied_stdin(spool: Path) -> Found:
    """A copy of standard input."""
    if sys.stdin is None:
        raise UserError("-", "there is no standard input", "name a file")
    source = getattr(sys.stdin, "buffer", None)  # what replaces sys.stdin may be text only
    source = source or io.BytesIO(sys.stdin.read().encode("utf-8", "surrogateescape"))
    return copied(source, "standard input", spool)


def copied(source: IO[bytes], place: str, spool: Path) -> Found:
    """A copy of a stream in the folder `spool`. Its key is its hash: pipes have no lasting name."""
    digest = hashlib.sha256()
    spool.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=spool, prefix="input-", delete=False) as file:
        while data := source.read(READ_BYTES):
            digest.update(data)
            file.write(data)
    found = Found.at(digest.hexdigest(), Path(file.name))._replace(place=place, name="")
    if problem := problem_of(found):
        raise UserError(place, f"is {problem}", "give UTF-8 text or JSON lines")
    return found


def sample_files(left_out: LeftOut) -> list[Found]:
    """The sample corpus: the source of Python's own library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [f for f in Walk(LeftOut(), (), NOT_SAMPLE).files(root) if f.path.suffix == ".py"]
    files = []
    for file in sources:
        if is_utf8(file.path):
            files.append(file)
        else:
            left_out.add("not UTF-8", file.path)
    if len(files) < FEW_SOURCES:
        raise UserError(shown(root), "Python's library has no source there", "pass --input")
    return files


def is_utf8(path: Path) -> bool:
    """Whether all of a file is valid UTF-8."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
