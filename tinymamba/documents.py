"""The documents of the input files: which files there are, and the text of each in parts.

    corpus = Corpus(["texts/", "rows.jsonl"], Reading(text_key="body"), outputs=[])
    for document in corpus.documents():
        for part in document.parts:
            ...
    print(*corpus.left_out.lines(), sep="\\n")

A text file is one document, and so is each row of a table. The order depends on names alone, and
every pass over the corpus gives the same documents. Memory does not grow with the input.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tinymamba.cli import UserError, need

READ_BYTES = 1 << 20  # read from disk at a time
FEW_SOURCES = 20  # Python's own library has more
NOT_SAMPLE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
NOT_SAMPLE |= {"encodings", "pydoc_data"}  # tables and generated text
NAMES_SHOWN = 3  # of what is left out, for each reason

Advance = Callable[[int], object]


class Document(NamedTuple):
    """One text and where it is from."""

    place: str  # for messages: "rows.jsonl:17", "texts/a.txt"
    key: str  # decides its side: a text file's path below its --input folder; a row's text
    is_row: bool  # a row of a table; else a text file
    size: int | None  # a text file's bytes of content, where known without reading it
    parts: Iterable[str]  # the text in pieces, without a byte order mark


@dataclass
class Reading:
    """How inputs are read."""

    text_key: str = "text"  # JSON key or Parquet column that has the text
    encoding_errors: str = "strict"  # what to do about invalid UTF-8
    dataset: str | None = None  # name or folder that the library `datasets` opens
    config: str | None = None  # one of its configurations
    split: str = "train"  # one of its splits


class LeftOut:
    """What was not read, and why."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one more, and keep its name if it is one of the first."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMES_SHOWN:
            names.append(name)

    def lines(self) -> list[str]:
        """A line for each reason: the count and the first few names."""
        return [f"left out, {reason}: {self.listed(reason)}" for reason in sorted(self.counts)]

    def listed(self, reason: str) -> str:
        """The count of a reason and its first few names."""
        more = ", ..." if self.counts[reason] > NAMES_SHOWN else ""
        return f"{self.counts[reason]:,} ({', '.join(self.names[reason])}{more})"

    def refuse(self) -> None:
        """Raise a UserError if anything was left out, as --strict asks."""
        if self.counts:
            reason = min(self.counts)
            problem = f"left out, {reason}: {self.listed(reason)}"
            raise UserError("--strict", problem, "correct or remove it, or leave out --strict")


class Found(NamedTuple):
    """A file of the inputs."""

    key: str  # its path below its folder
    path: Path
    size: int
    changed: int  # time of its last change, in ns

    @classmethod
    def at(cls, key: str, path: Path) -> Found:
        """The file at a path."""
        stat = path.stat()
        return cls(key, path, stat.st_size, stat.st_mtime_ns)


class Corpus:
    """All documents of the inputs, in an order that depends on names alone."""

    def __init__(
        self,
        inputs: list[str] | None,
        reading: Reading,
        outputs: Collection[Path],
        spool: Path | None = None,
    ):
        self.reading = reading
        self.spool = spool
        self.files_left_out = LeftOut()
        self.left_out = self.files_left_out
        resolved = {Path(path).resolve() for path in outputs}
        if inputs:
            self.files = input_files(inputs, resolved, self.files_left_out)
        else:
            self.files = sample_files(self.files_left_out)
        self.total_bytes: int | None = sum(file.size for file in self.files)

    def documents(self, advance: Advance = lambda count: None) -> Iterator[Document]:
        """Every document; `advance` is told how many more bytes of input were read."""
        for file in self.files:
            if is_table(file.path):
                for place, text in rows(file.path, self.reading, advance):
                    if text:
                        yield Document(place, text, True, None, [text])
            else:
                parts = read_text(file.path, self.reading.encoding_errors, advance)
                yield Document(str(file.path), file.key, False, file.size, parts)

    def fingerprint(self) -> str:
        """A hash of the names, sizes and times of all files."""
        facts = [(file.key, str(file.path), file.size, file.changed) for file in self.files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# ------------------------------------------------------------------------------- input files


def walk(root: Path, excluded: Iterable[str] = ()) -> list[Found]:
    """All files below a folder, without hidden ones and excluded folders."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "." and name not in excluded]
        paths = [Path(folder, name) for name in names if name[0] != "."]
        found += [Found.at(p.relative_to(root).as_posix(), p) for p in paths if p.is_file()]
    return sorted(found)


def input_files(names: list[str], outputs: set[Path], left_out: LeftOut) -> list[Found]:
    """The files of --input, without `outputs`: an earlier run may have written into its folder."""
    files: dict[Path, Found] = {}
    for name in names:
        root = Path(name)
        if not root.exists():
            raise UserError(name, "no such file or folder", "check --input")
        found = walk(root) if root.is_dir() else [Found.at(root.as_posix(), root)]
        found = [file for file in found if file.path.resolve() not in outputs]
        found = [file for file in found if file.size]
        binary = [file for file in found if is_binary(file.path)]
        texts = [file for file in found if file not in binary]
        if not texts:
            problem = "is binary" if found else "is empty"
            raise UserError(name, problem, "give UTF-8 text, .jsonl or .parquet")
        for file in binary:
            left_out.add("binary", str(file.path))
        files.update((file.path.resolve(), file) for file in texts)
    return list(files.values())


def is_binary(path: Path) -> bool:
    """Whether a file other than Parquet has a zero byte near its start."""
    with open(path, "rb") as file:
        return path.suffix.lower() != ".parquet" and b"\0" in file.read(8192)


def sample_files(left_out: LeftOut) -> list[Found]:
    """The sample corpus: the source of Python's own library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [file for file in walk(root, NOT_SAMPLE) if file.path.suffix == ".py" and file.size]
    files = [file for file in sources if is_utf8(file.path)]
    if len(files) < FEW_SOURCES:
        raise UserError(str(root), "Python's library has no source there", "pass --input")
    for file in sources:
        if file not in files:
            left_out.add("not UTF-8", str(file.path))
    return files


def is_utf8(path: Path) -> bool:
    """Whether all of a file is valid UTF-8."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def is_table(path: Path) -> bool:
    """Whether each row of the file is a document."""
    return path.suffix.lower() in (".jsonl", ".parquet")


# ------------------------------------------------------------------------------ text and rows


def read_text(path: Path, errors: str, advance: Advance) -> Iterator[str]:
    """The text of a file, READ_BYTES at a time."""
    decoder, raw = codecs.getincrementaldecoder("utf-8")(errors), None
    with open(path, "rb") as file:
        while raw != b"":
            raw = file.read(READ_BYTES)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise not_utf8(path, file.tell() - len(error.object) + error.start) from None
            advance(len(raw))
            yield text


def not_utf8(path: Path, offset: int) -> UserError:
    """The error for a byte that is not UTF-8."""
    remedy = "convert it, or pass --encoding_errors replace"
    return UserError(str(path), f"not UTF-8 at byte {offset}", remedy)


def rows(path: Path, reading: Reading, advance: Advance) -> Iterator[tuple[str, str]]:
    """The place and the text of each row of a table."""
    key = reading.text_key
    read = jsonl_rows if path.suffix.lower() == ".jsonl" else parquet_rows
    for where, row in read(path, reading, advance):
        if not isinstance(row, dict):
            raise UserError(where, "not a JSON object", f'write {{"{key}": "..."}} on each line')
        if not isinstance(row.get(key), str):
            problem = f"{key!r} is {type(row[key]).__name__}" if key in row else f"no {key!r}"
            keys = ", ".join(map(repr, row))
            raise UserError(where, f"{problem} (keys: {keys})", "pass --text_key KEY")
        try:  # JSON can spell half of a surrogate pair, which is not a character
            yield where, row[key].encode("utf-8", reading.encoding_errors).decode("utf-8")
        except UnicodeEncodeError:
            remedy = "correct it, or pass --encoding_errors replace"
            raise UserError(where, "half a surrogate pair in the text", remedy) from None


def jsonl_rows(path: Path, reading: Reading, advance: Advance) -> Iterator[tuple[str, Any]]:
    """The place and the value of each line that is not empty."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            advance(len(raw))
            try:
                line = raw.decode("utf-8-sig", reading.encoding_errors)
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
            except UnicodeDecodeError as error:
                raise not_utf8(path, file.tell() - len(error.object) + error.start) from None
            except json.JSONDecodeError as error:
                problem = f"not JSON ({error.msg} at column {error.colno})"
                remedy = "write one JSON object per line"
                raise UserError(f"{path}:{number}", problem, remedy) from None


def parquet_rows(path: Path, reading: Reading, advance: Advance) -> Iterator[tuple[str, Any]]:
    """The place and the text column of each row; without that column, the names of all columns."""
    parquet: Any = need("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if reading.text_key not in columns:
                yield str(path), dict.fromkeys(columns)
            for batch in file.iter_batches(1024, columns=[reading.text_key]):
                advance(path.stat().st_size * len(batch) // file.metadata.num_rows)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (ValueError, OSError) as error:  # pyarrow: the file is damaged, or not UTF-8
        problem = f"not readable as Parquet ({str(error).splitlines()[0]})"
        raise UserError(str(path), problem, "write the file again") from None
