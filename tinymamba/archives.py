"""What is in a file: compressed files and archives, opened as streams.

    for item in Opener(left_out, folder).open(found):
        data = item.stream.read(1 << 20)

Names and first bytes say how a file is opened:

- gzip, bzip2, xz and zstd are recognized by their first bytes, whatever the name.
- .tar and .zip are archives, and so is a name without a suffix whose first bytes say it. Other
  files that are zip archives inside, such as .docx, are binary.
- A file is binary if there is a zero byte near its start, unless it is text nevertheless: with a
  byte order mark, valid UTF-8, UTF-16 or UTF-32; without, UTF-8 with few control characters.

Nothing is unpacked to disk but a .zip or .parquet that lies in another archive. Memory does not
grow with the input.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import lzma
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tinymamba.cli import UserError, need

READ_BYTES = 1 << 20  # read at a time
HEAD_BYTES = 8192  # of a file, that say what it is
LONGEST_HEADER = READ_BYTES  # of a member of a tar archive
DEEPEST = 8  # archives and compression inside each other
LONGEST_NAME = 300  # characters that are shown
NAMES_SHOWN = 3  # of what is left out, for each reason
READ_ALREADY = "read already under another name"
FOR_VALIDATION = "in --val_input too, so only validation"
AS_TEXT = "read as text"  # ends the reasons of what is read, but not as rows

BOMS = {  # the longer ones first: that of UTF-32-LE begins with that of UTF-16-LE
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"  # in place of a large file
CONTROLS = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x1b"))  # hardly ever in a text
MAGIC: dict[str, tuple[bytes, ...]] = {
    ".gz": (b"\x1f\x8b\x08",),
    ".bz2": tuple(b"BZh%d" % n + block for n in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P")),
    ".xz": (b"\xfd7zXZ\0",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))),
}
TAR_SUFFIXES = {".tgz": ".gz", ".tbz": ".bz2", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}
DAMAGE = (  # what the readers of compressed files and archives raise
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)
END_MARK: Any = vars(tarfile)["EOFHeaderError"]  # the type checker does not know them
NO_MORE: Any = vars(tarfile)["EmptyHeaderError"]

Advance = Callable[[int], object]
Value = TypeVar("Value")


def shown(name: object) -> str:
    """A name as one line that every console can show, with "..." inside if it is very long."""
    text = str(name)
    if len(text) > LONGEST_NAME:
        text = text[: LONGEST_NAME // 2] + "..." + text[-LONGEST_NAME // 2 :]
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    text = getattr(error, "strerror", None) or str(error)
    return shown(text.strip().split("\n")[0]) or type(error).__name__


def unreadable(place: str, kind: str, error: BaseException) -> UserError:
    """The error for a file that its reader rejects."""
    problem = f"not readable as {kind} ({first_line(error)})"
    return UserError(place, problem, "write it again, it may be damaged or cut short")


def guarded(
    values: Iterable[Value], place: str, kind: str, errors: tuple = DAMAGE
) -> Iterator[Value]:
    """The values, with an error of their reader as one line."""
    iterator, end = iter(values), object()
    while True:
        try:
            value: Any = next(iterator, end)
        except errors as error:
            raise unreadable(place, kind, error) from None
        if value is end:
            return
        yield value


# --------------------------------------------------------------------------- what is left out


@dataclass
class LeftOut:
    """What was not read, or not as its name says, and why."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: object) -> None:
        """Count one more, and keep its name if it is one of the first."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMES_SHOWN:
            names.append(shown(name))

    def total(self) -> int:
        """How much was left out."""
        return sum(self.counts.values())

    def copy(self) -> LeftOut:
        """Another one that begins with the same."""
        return LeftOut(dict(self.counts), {reason: [*n] for reason, n in self.names.items()})

    def lines(self) -> list[str]:
        """A line for each reason: the count and the first few names."""
        lines = {reason: self.line(reason) for reason in sorted(self.counts)}
        return [
            ("note: " if reason.endswith(AS_TEXT) else "left out: ") + line
            for reason, line in lines.items()
        ]

    def line(self, reason: str) -> str:
        """A reason with its count and its first few names."""
        more = ", ..." if self.counts[reason] > NAMES_SHOWN else ""
        return f"{reason}: {self.counts[reason]:,} ({', '.join(self.names[reason])}{more})"

    def refuse(self) -> None:
        """Raise a UserError if there is anything; what is read elsewhere is no loss."""
        reasons = sorted(self.counts.keys() - {READ_ALREADY, FOR_VALIDATION})
        if reasons:
            problem = ", ".join(self.line(reason) for reason in reasons)
            raise UserError("--strict", problem, "correct or remove it, or run without --strict")


# -------------------------------------------------------------------------------------- files


class Found(NamedTuple):
    """A file of the inputs."""

    key: str  # its path below its folder, with "/"; the hash of its content if it is a copy
    path: Path
    size: int
    changed: int  # time of its last change, in ns
    place: str  # for messages
    name: str  # with the suffix that says what it holds; "" if it is a copy

    @classmethod
    def at(cls, key: str, path: Path) -> Found:
        """The file at a path."""
        facts = os.stat(path)
        return cls(key, path, facts.st_size, facts.st_mtime_ns, shown(path), path.name)

    def same(self) -> bool:
        """Whether the file is as it was when it was found."""
        try:
            facts = os.stat(self.path)
        except OSError:
            return False
        return (facts.st_size, facts.st_mtime_ns) == (self.size, self.changed)


# ------------------------------------------------------------------------------- kinds of files


def suffix_of(name: str) -> str:
    """The last suffix of a name, in lower case: ".gz"."""
    return os.path.splitext(name)[1].lower()


def plain_name(name: str) -> str:
    """A name without the suffix of its compression: "a.json" of "a.json.gz", "b.tar" of "b.tgz"."""
    suffix = suffix_of(name)
    if suffix in TAR_SUFFIXES:
        return name[: -len(suffix)] + ".tar"
    return name[: -len(suffix)] if suffix in MAGIC else name


def kind_of(name: str, head: bytes) -> str:
    """How it is opened: a suffix of MAGIC, ".tar", ".zip" or ".parquet", or "" for text."""
    suffix = suffix_of(name)
    for kind, magic in MAGIC.items():
        if head.startswith(magic):
            return kind
    if suffix in (".tar", ".zip", ".parquet"):
        return suffix
    named = TAR_SUFFIXES.get(suffix, suffix)
    if named in MAGIC:  # damaged, cut short or already unpacked
        cut = any(magic.startswith(head) for magic in MAGIC[named])
        return named if cut or is_binary(head) else ""
    if not suffix and head.startswith(b"PK\3\4"):
        return ".zip"
    if not suffix and head[257:262] == b"ustar":
        return ".tar"
    return ".parquet" if not suffix and head.startswith(b"PAR1") else ""


def encoding_of(head: bytes) -> tuple[str, int]:
    """The encoding that a byte order mark says, and the length of the mark."""
    for mark, encoding in BOMS.items():
        if head.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def is_binary(head: bytes) -> bool:
    """Whether something with these first bytes is not text."""
    encoding, skipped = encoding_of(head)
    if head.startswith(b"%PDF-"):
        return True
    if encoding == "utf-8" and b"\0" not in head:
        return False
    try:
        codecs.getincrementaldecoder(encoding)().decode(head[skipped:])
    except UnicodeDecodeError:
        return True
    controls = len(head) - len(head.translate(None, CONTROLS))
    return not skipped and controls > len(head) / 20


def problem_of_head(name: str, head: bytes) -> str:
    """Why something of this name and with these first bytes is not read; "" if it is."""
    if len(head) == encoding_of(head)[1]:
        return "empty"
    if head.startswith(LFS_POINTER):
        return "a Git LFS pointer"
    if kind_of(name, head) == "" and is_binary(head):
        return "binary"
    return ""


# ------------------------------------------------------------------------------------ streams


class Disk(io.FileIO):
    """A file as it was found: it tells what is read, and does not see what is appended."""

    def __init__(self, found: Found, advance: Advance):
        super().__init__(found.path, "rb")
        self.size, self.advance, self.told = found.size, advance, 0

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; returns the number of bytes."""
        left = max(0, self.size - self.tell())
        count = super().readinto(memoryview(buffer)[:left]) or 0
        self.tell_progress(count)
        return count

    def tell_progress(self, count: int) -> None:
        """Tell that `count` more bytes are read, but never more than the file has."""
        count = min(count, self.size - self.told)
        self.told += count
        self.advance(count)


class Stream(io.RawIOBase):
    """Bytes to read once, whose first ones can be seen before; its errors name the place."""

    def __init__(self, file: Any, place: str, kind: str):
        self.file, self.place, self.kind = file, place, kind
        self.head = b""
        self.head = self.read(HEAD_BYTES)

    def readable(self) -> bool:
        """Yes."""
        return True

    def read(self, count: int = -1) -> bytes:
        """`count` bytes, or as many as are left."""
        if count < 0:
            return self.readall()
        data, self.head = self.head[:count], self.head[count:]
        try:
            while len(data) < count and (more := self.file.read(count - len(data))):
                data += more
        except DAMAGE as error:
            if self.kind:
                raise unreadable(self.place, self.kind, error) from None
            raise UserError(self.place, first_line(error), "check the disk") from None
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there is something left; returns the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Item(NamedTuple):
    """A text or a table, wherever it lies."""

    place: str
    key: str
    name: str  # without the suffix of its compression
    size: int | None  # bytes of its content, where known
    stream: Stream


class Archive(tarfile.TarFile):
    """A tar archive that is read as a stream."""

    members: list  # those read that it remembers

    def __init__(self, name: Any, mode: Any, fileobj: Any, **options: Any):
        self.ended = False  # whether the mark at the end was read
        read = fileobj.read

        def limited(size: int) -> bytes:
            if size > LONGEST_HEADER:  # only headers are read at once
                raise tarfile.ReadError(f"a header of {size:,} bytes")
            return read(size)

        fileobj.read = limited
        super().__init__(name, mode, fileobj, **options)


class Member(tarfile.TarInfo):
    """A member of an archive; a damaged or missing header is an error, not the end."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        """Read the next header."""
        try:
            return super().fromtarfile(archive)
        except END_MARK:  # a block of zeros: a further archive may follow
            archive.ended = True
            raise
        except tarfile.HeaderError as error:
            if isinstance(error, NO_MORE) and archive.ended:
                raise
            raise tarfile.ReadError(str(error)) from None


class Decompressed:
    """The content of compressed streams one after another. What is none of them is an error."""

    def __init__(self, stream: Any, make: Callable[[], Any]):
        self.stream, self.make = stream, make
        self.decoder = make()

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; none at the end."""
        decoded = b""
        while not decoded:
            data = b""
            if self.decoder.eof:
                data = self.decoder.unused_data or self.stream.read(READ_BYTES)
                if not data.strip(b"\0"):  # nothing, or padding
                    return b""
                self.decoder = self.make()
            elif self.decoder.needs_input:
                data = self.stream.read(READ_BYTES)
                if not data:
                    raise EOFError("the end is missing")
            decoded = self.decoder.decompress(data, count)
        return decoded


class Opener:
    """Opens files: compressed ones and archives give what is in them."""

    def __init__(self, left_out: LeftOut, spool: Path | None):
        self.left_out, self.spool = left_out, spool

    def open(self, found: Found, advance: Advance = lambda count: None) -> Iterator[Item]:
        """The texts and tables in a file; each is to be read before the next is taken."""
        if not found.same():
            raise changed(found)
        try:
            disk = Disk(found, advance)
        except OSError as error:
            raise UserError(found.place, first_line(error), "make it readable") from None
        with disk:
            stream = Stream(io.BufferedReader(disk, READ_BYTES), found.place, "")
            yield from self.items(Item(found.place, found.key, found.name, found.size, stream))
            disk.tell_progress(found.size)
        if not found.same():
            raise changed(found)

    def items(self, item: Item, depth: int = 0) -> Iterator[Item]:
        """The item itself, or what is in it."""
        head = item.stream.head
        if depth > DEEPEST:
            problem = f"is packed more than {DEEPEST} times over"
            raise UserError(item.place, problem, "unpack it first")
        kind = kind_of(item.name, head)
        if problem := problem_of_head(item.name, head):
            item.stream.read(READ_BYTES)  # text of a damaged block looks binary: that is an error
            self.left_out.add(problem, item.place)
        elif kind in MAGIC:
            stream = Stream(decompressor(kind, item.stream), item.place, kind)
            yield from self.items(Item(*item[:2], plain_name(item.name), None, stream), depth + 1)
        elif kind == ".tar":
            yield from self.tar_members(item, depth)
        elif kind == ".zip":
            yield from self.zip_members(item, depth)
        else:
            yield item._replace(name=plain_name(item.name))

    def tar_members(self, item: Item, depth: int) -> Iterator[Item]:
        """The members of a tar archive, in its order."""
        for archive, member in guarded(tar_headers(item.stream), item.place, ".tar"):
            if member.issym() or member.islnk():
                self.left_out.add("link in an archive", f"{item.place}/{member.name}")
            elif not member.isfile() and not member.isdir():
                self.left_out.add("not a regular file", f"{item.place}/{member.name}")
            elif member.isfile():
                file = archive.extractfile(member)
                yield from self.member(item, member.name, member.size, file, depth)

    def zip_members(self, item: Item, depth: int) -> Iterator[Item]:
        """The members of a zip archive, in its order."""
        source = random_access(item.stream, self.spool)
        try:
            archive = zipfile.ZipFile(source)
        except DAMAGE as error:
            raise unreadable(item.place, ".zip", error) from None
        for info in archive.infolist():
            place = f"{item.place}/{shown(info.filename)}"
            if info.is_dir():
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                self.left_out.add("link in an archive", place)
                continue
            if info.flag_bits & 1:
                raise UserError(place, "is encrypted", "unpack it first")
            try:
                file = archive.open(info)
            except DAMAGE as error:
                raise unreadable(place, ".zip", error) from None
            with file:
                yield from self.member(item, info.filename, info.file_size, file, depth)

    def member(self, item: Item, name: str, size: int, file: Any, depth: int) -> Iterator[Item]:
        """What is in one member of an archive."""
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        key = "/".join([item.key, *parts])
        place = "/".join([item.place, *map(shown, parts)])
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            self.left_out.add("hidden", place)
            return
        stream = Stream(file, place, suffix_of(item.name) or "an archive")
        yield from self.items(Item(place, key, parts[-1] if parts else "", size, stream), depth + 1)


def changed(found: Found) -> UserError:
    """The error for a file that is not as it was when it was found."""
    remedy = "run again when nothing writes to it"
    return UserError(found.place, "changed while the input was read", remedy)


def tar_headers(stream: Stream) -> Iterator[tuple[Archive, tarfile.TarInfo]]:
    """An archive with each of its members, which are to be read one after another."""
    with Archive.open(fileobj=stream, mode="r|", tarinfo=Member, ignore_zeros=True) as archive:
        while (member := archive.next()) is not None:
            yield archive, member
            archive.members.clear()  # else it keeps them all


def decompressor(kind: str, stream: Any) -> Any:
    """A file that gives the content of a compressed one."""
    if kind == ".gz":
        return gzip.GzipFile(fileobj=stream)
    if kind == ".bz2":
        return Decompressed(stream, bz2.BZ2Decompressor)
    if kind == ".xz":
        return Decompressed(stream, lzma.LZMADecompressor)
    try:
        zstd: Any = importlib.import_module("compression.zstd")  # Python 3.14
        return Decompressed(stream, zstd.ZstdDecompressor)
    except ImportError:
        arrow: Any = need("pyarrow")
        return arrow.CompressedInputStream(arrow.PythonFile(stream, mode="r"), "zstd")


def random_access(stream: Stream, spool: Path | None) -> Any:
    """A file with the content of a stream, at any place of which one can read."""
    if isinstance(getattr(stream.file, "raw", None), Disk):
        stream.file.seek(0)
        return stream.file
    if spool is not None:
        spool.mkdir(parents=True, exist_ok=True)
    copy = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115
    shutil.copyfileobj(stream, copy, READ_BYTES)
    copy.seek(0)
    return copy
