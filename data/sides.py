"""Which documents are training and which are validation, and where documents end in a text.

A unit is a row, a document of a file with separators, or a whole text file. A file has separators
if there are FEW_FILES of them in its first HEAD_CHARS characters; with fewer, its documents are too
coarse for a split. A hash of the unit decides its side, so that equal rows fall on one side and
order plays no part. Each side gets at least one unit. If the corpus has fewer than SURVEYED rows,
the limit between the sides is put where the share is nearest. If it has fewer than FEW_FILES text
files without separators, the end of each of these is validation instead.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from tinymamba.documents import Corpus, Document

FEW_FILES = 20  # with fewer, whole files or documents are too coarse for a validation split
SURVEYED = 1000  # units that the limit between the sides is made from
HEAD_CHARS = 1 << 22  # where the separators of a file are counted
KEY_CHARS = 1 << 16  # a document's beginning, which decides its side
LINE_BYTES = 1 << 20  # farthest that a line break is looked for

Pieces = Iterator[tuple[str, bool]]  # text, and whether a document ends after it


class Text(NamedTuple):
    """A document with its side; `parts` are to be used up before the next one is taken."""

    side: str  # "train" or "val"
    parts: Iterable[str]
    place: str = ""  # of a row, for messages


@dataclass
class Split:
    """The rule that gives every document its side."""

    fraction: float  # share of validation: 0 is nothing, 1 everything
    separator: str = ""  # what ends a document within a text file; "" is nothing
    limit: float = 0.0  # units whose hash is up to this are validation
    tails: bool = False  # the end of each text file without separators is validation
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of files that do not say it
    found: int = 0  # separators in the last pass

    def survey(self, corpus: Corpus) -> Split:
        """Look at the first units of a corpus to set the limit; returns itself."""
        self.limit = self.fraction
        if self.fraction in (0, 1):
            return self
        rows: list[float] = []
        files: list[float] = []
        complete = True
        for document in corpus.documents():
            if document.is_row:
                rows.append(hash_fraction(document.key))
            else:
                self.survey_file(document, rows, files)
            if len(rows) + len(files) >= SURVEYED:
                complete = False
                break
        self.tails = len(files) < FEW_FILES
        units = rows if self.tails else rows + files
        self.limit = nearest_limit(units, self.fraction, complete and self.tails)
        return self

    def survey_file(self, document: Document, rows: list[float], files: list[float]) -> None:
        """Add the hashes of a text file's documents to `rows`, or that of the file to `files`."""
        head, parts = peek(document.parts, HEAD_CHARS)
        if self.separates(head):
            for text in documents_in(self.split(parts)):
                beginning, _ = peek(text, KEY_CHARS)
                rows += [hash_fraction(beginning)] if beginning else []
                if len(rows) + len(files) >= SURVEYED:
                    return
                exhaust(text)
            return
        files.append(hash_fraction(document.key))
        if document.size is None and len(files) < FEW_FILES:
            self.sizes[document.place] = sum(len(part.encode()) for part in parts)

    def texts(self, documents: Iterable[Document]) -> Iterator[Text]:
        """All documents, those within files included, each with its side; empty ones vanish."""
        self.found = 0
        for document in documents:
            if document.is_row:
                yield Text(self.side(document.key), document.parts, document.place)
                continue
            head, parts = peek(document.parts, HEAD_CHARS)
            if self.separates(head):
                yield from self.separated(parts)
            else:
                yield from self.of_file(document, parts)

    def separated(self, parts: Iterable[str]) -> Iterator[Text]:
        """The documents of a file with separators, each on the side of its beginning."""
        for text in documents_in(self.split(parts)):
            beginning, whole = peek(text, KEY_CHARS)
            if beginning:
                yield Text(self.side(beginning), whole)

    def of_file(self, document: Document, parts: Iterable[str]) -> Iterator[Text]:
        """A whole file, or its beginning and its end; a few separators end documents there too."""
        size = self.sizes.get(document.place, document.size)
        both: Iterator[Iterable[str]]
        if not self.tails or size is None:
            sides, both = [self.side(document.key)], iter([parts])
        else:
            sides, both = ["train", "val"], documents_in(cut_tail(parts, size, self.fraction))
        for side, whole in zip(sides, both, strict=False):
            for text in documents_in(self.split(whole)):
                beginning, rest = peek(text, 1)
                if beginning:
                    yield Text(side, rest)

    def split(self, parts: Iterable[str]) -> Pieces:
        """Text in pieces, with the separators counted."""
        for text, last in split_documents(parts, self.separator):
            self.found += last
            yield text, last
        self.found -= 1  # the end of the file

    def separates(self, head: str) -> bool:
        """Whether the documents in a file, judged by its beginning, have a side each."""
        return bool(self.separator) and head.count(self.separator) >= FEW_FILES

    def side(self, key: str) -> str:
        """The side of a unit."""
        return "val" if self.limit and hash_fraction(key) <= self.limit else "train"


def hash_fraction(key: str) -> float:
    """A hash of the key, evenly distributed in [0, 1)."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def nearest_limit(hashes: list[float], fraction: float, complete: bool) -> float:
    """The limit between the sides, with at least one of the hashes on each if there are two.

    If the hashes are not `complete`, more units follow, and the fraction is exact enough.
    """
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        return fraction
    if not complete:
        return min(max(fraction, distinct[0]), distinct[-2])
    wanted, limit, nearest = fraction * len(hashes), distinct[0], float(len(hashes))
    counts = dict.fromkeys(distinct, 0)
    for each in hashes:
        counts[each] += 1
    so_far = 0
    for each in distinct[:-1]:
        so_far += counts[each]
        if abs(so_far - wanted) < nearest:
            limit, nearest = each, abs(so_far - wanted)
    return limit


# ------------------------------------------------------------------------ documents in a stream


def peek(parts: Iterable[str], chars: int) -> tuple[str, Iterable[str]]:
    """The first characters of a text, fewer if it ends before, and the whole text."""
    parts, seen, count = iter(parts), [], 0
    while count < chars and (part := next(parts, None)) is not None:
        seen.append(part)
        count += len(part)
    return "".join(seen)[:chars], chain(seen, parts)


def exhaust(parts: Iterable[str]) -> None:
    """Read to the end."""
    for _ in parts:
        pass


def documents_in(pieces: Iterable[tuple[str, bool]]) -> Iterator[Iterator[str]]:
    """The documents that pieces make up; each is to be used up before the next is taken."""
    pieces = iter(pieces)

    def document(text: str, last: bool) -> Iterator[str]:
        while True:
            if text:
                yield text
            if last:
                return
            text, last = next(pieces)

    for first in pieces:
        yield document(*first)


def split_documents(parts: Iterable[str], separator: str) -> Pieces:
    """Text in pieces, without the separators and the line breaks directly behind them."""
    if not separator:
        yield from ((part, False) for part in parts)
        yield "", True
        return
    pattern = re.compile(re.escape(separator) + "(?:\r?\n)?")
    longest, text = len(separator) + len("\r\n"), ""
    for part in chain(parts, [None]):
        text += part or ""
        known = len(text) - (longest if part is not None else 0)  # matches up to it are whole
        start = 0
        for found in pattern.finditer(text):
            if found.start() > known:
                break
            yield text[start : found.start()], True
            start = found.end()
        end = max(start, known)
        yield text[start:end], False
        text = text[end:]
    yield "", True


def cut_tail(parts: Iterable[str], size: int, fraction: float) -> Pieces:
    """A text of `size` bytes in two documents, of which the second has the given share.

    The cut is after a line break, if there is one in the first half of the second document.
    """
    target, parts = size - max(1, int(size * fraction)), iter(parts)
    reach, seen = min(LINE_BYTES, (size - target) // 2), 0
    for part in parts:
        data = part.encode()
        if seen + len(data) <= target:
            seen += len(data)
            yield part, False
            continue
        at = target - seen
        while len(data) < at + reach and (more := next(parts, None)) is not None:
            data += more.encode()
        line = data.find(b"\n", at, at + reach) + 1
        while not line and 0x80 <= data[at] < 0xC0:  # inside a character
            at -= 1
        yield data[: line or at].decode(), True
        yield data[line or at :].decode(), False
        yield from ((part, False) for part in parts)
    yield "", True
