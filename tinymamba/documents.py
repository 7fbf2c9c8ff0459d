"""The documents of the inputs: the text of each file, and of each row of each table.

    corpus = Corpus(["texts/", "rows.jsonl"], Reading(text_key="body"), outputs=[])
    for document in corpus.documents():
        for part in document.parts:
            ...
    print(*corpus.left_out.lines(), sep="\\n")

A text file is one document, and so is each row of a table. Tables are:

- .parquet files;
- .jsonl and .ndjson files: a JSON object on each line;
- .json files, names without a suffix and standard input, if their content is JSON objects: an
  array of them, one after another, or a single one that has the text. Other JSON is text, such as
  the settings of a program; if it looks like rows, that is reported.

Everything else is text, whatever it begins with. The order depends on names alone, and every pass
over the corpus gives the same documents. Memory does not grow with the input. `archives.py` says
how compressed files and archives are recognized.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import re
import string
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tinymamba.archives import (
    AS_TEXT,
    DAMAGE,
    FOR_VALIDATION,
    READ_BYTES,
    Advance,
    Found,
    Item,
    LeftOut,
    Opener,
    encoding_of,
    first_line,
    guarded,
    kind_of,
    random_access,
    shown,
    suffix_of,
)
from tinymamba.cli import UserError, need
from tinymamba.inputs import input_files, sample_files

LONGEST_ROW = 1 << 26  # characters of JSON
TOO_LONG = f"a row of more than {LONGEST_ROW:,} characters"
LONGEST_FIRST_ROW = 1 << 24  # of a .json file, which may be text after all
KEYS_SHOWN = 20  # in messages
BATCH_ROWS = 1024  # of a Parquet file that are read at once, but
BATCH_BYTES = 1 << 22  # no more than this, if all are equally long
SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # between JSON values; files put together have marks
ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}  # in a template
ESCAPE = re.compile(r"\\[nt\\]")
MISSING = object()


class Document(NamedTuple):
    """One text and where it is from."""

    place: str  # for messages: "rows.jsonl:17", "books.zip/a.txt", "texts/a.txt"
    key: str  # decides its side: a text file's path below its --input folder; a row's text
    is_row: bool  # a row of a table; else a text file
    size: int | None  # a text file's bytes of content, where known without reading it
    parts: Iterable[str]  # the text in pieces, without a byte order mark


class Rows(Protocol):
    """What reads the text of a row. `TextKey` is one."""

    def columns(self, names: Collection[str], place: str) -> list[str]:
        """The columns of a table that are wanted."""

    def is_in(self, row: Any) -> bool:
        """Whether a row has what is wanted."""

    def not_there(self, place: str, names: Iterable[str]) -> UserError:
        """The error for a table in which no row has it."""

    def text(self, where: str, row: Any, errors: str) -> tuple[str, str]:
        """The text of a row, or why it is left out."""


@dataclass
class Reading:
    """How inputs are read."""

    text_key: str = "text"  # key or column that has the text, or a template of several
    encoding_errors: str = "strict"  # what to do about invalid UTF-8
    dataset: str | None = None  # name or folder that the library `datasets` opens
    config: str | None = None  # one of its configurations
    split: str = "train"  # one of its splits
    rows: Rows | None = None  # reads rows in another way than by text_key; only tables are read


class Corpus:
    """All documents of the inputs, in an order that depends on names alone."""

    def __init__(
        self,
        inputs: list[str] | None,
        reading: Reading,
        outputs: Collection[Path],
        spool: Path | None = None,
    ):
        self.reading, self.spool = reading, spool
        self.text_key: Rows = reading.rows or TextKey(reading.text_key)
        self.files: list[Found] = []
        self.files_left_out = LeftOut()
        self.left_out = self.files_left_out  # by the last whole pass, else by the longest
        self.total_bytes: int | None = None
        if reading.dataset is not None:
            self.builder = dataset_builder(reading)
            return
        if inputs:
            if spool is None:
                self.temporary = tempfile.TemporaryDirectory(prefix="tinymamba-")
                spool = Path(self.temporary.name)
            self.files = input_files(inputs, outputs, self.files_left_out, spool)
        else:
            self.files = sample_files(self.files_left_out)
        self.total_bytes = sum(file.size for file in self.files)

    def leave_to(self, validation: Corpus) -> None:
        """Do without the files of the corpus that is validation."""
        theirs = {os.path.realpath(found.path) for found in validation.files}
        kept = []
        for found in self.files:
            if os.path.realpath(found.path) in theirs:
                self.files_left_out.add(FOR_VALIDATION, found.place)
            else:
                kept.append(found)
        if self.files and not kept:
            raise UserError("--val_input", "has all files of --input", "name other files")
        if len(kept) < len(self.files):
            self.files, self.total_bytes = kept, sum(found.size for found in kept)

    def documents(self, advance: Advance = lambda count: None) -> Iterator[Document]:
        """Every document; `advance` is told how many more bytes of input were read.

        The parts of a document are to be read before the next document is taken.
        """
        left_out, whole = self.files_left_out.copy(), False
        try:
            if self.reading.dataset is not None:
                yield from self.of_dataset(advance, left_out)
            opener = Opener(left_out, self.spool)
            for found in self.files:
                for item in opener.open(found, advance):
                    yield from self.of_item(item, left_out)
            whole = True
        finally:
            if whole or left_out.total() > self.left_out.total():
                self.left_out = left_out

    def of_dataset(self, advance: Advance, left_out: LeftOut) -> Iterator[Document]:
        """The documents of a dataset; `advance` is told the bytes of text."""
        rows = dataset_rows(self.builder, self.reading, self.text_key)
        for document in self.rows(rows, shown(self.reading.dataset), left_out):
            advance(len(document.key.encode()))
            yield document

    def fingerprint(self) -> str:
        """A hash of the names, sizes and times of all files."""
        if self.reading.dataset is not None:
            reading = self.reading
            facts: list = [reading.dataset, reading.config, reading.split, self.builder.hash]
        else:
            facts = [(f.key, *((f.place, f.size, f.changed) if f.name else ())) for f in self.files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def of_item(self, item: Item, left_out: LeftOut) -> Iterator[Document]:
        """The documents of a text or a table."""
        place, suffix = item.place, suffix_of(item.name)
        if kind_of(item.name, item.stream.head) == ".parquet":
            yield from self.rows(parquet_rows(item, self.spool, self.text_key), place, left_out)
            return
        encoding, skipped = encoding_of(item.stream.head)
        size = item.size - skipped if item.size is not None and encoding == "utf-8" else None
        parts: Iterable[str] = text_parts(item, self.reading.encoding_errors)
        if suffix in (".jsonl", ".ndjson"):
            yield from self.rows(json_rows(JsonText(parts, place)), place, left_out)
            return
        if suffix in (".json", ""):
            text = JsonText(parts, place, undecided=True)
            if self.has_rows(text, suffix, left_out):
                yield from self.rows(json_rows(text), place, left_out)
                return
            parts = text.from_start()
        if self.reading.rows:
            left_out.add("text, not a table", place)
            return
        yield Document(place, item.key, False, size, parts)

    def has_rows(self, text: JsonText, suffix: str, left_out: LeftOut) -> bool:
        """Whether a text is rows, judged by its content; reports JSON that is not."""
        form = text.form()
        if self.reading.rows and (suffix == ".json" or form != "text"):
            form = "objects"  # what is wrong with it is an error of a row
        if form == "object" and self.text_key.is_in(text.parse()[0]):
            form = "objects"
        if form == "objects":
            text.decide()
            return True
        reason = {
            "object": f"JSON object without {self.text_key}",
            "long": f"JSON of more than {LONGEST_FIRST_ROW:,} characters",
            "damaged": "JSON with an error",
        }.get(form)
        if reason and suffix == ".json":
            left_out.add(f"{reason}, {AS_TEXT}", text.place)
        return False

    def rows(
        self, rows: Iterable[tuple[str, Any]], place: str, left_out: LeftOut
    ) -> Iterator[Document]:
        """A document for each row that has a text; a UserError if none has the key."""
        count, found, names = 0, False, dict[str, None]()
        for where, row in rows:
            count += 1
            text, reason = self.text_key.text(where, row, self.reading.encoding_errors)
            found = found or self.text_key.is_in(row)
            if not found and len(names) < KEYS_SHOWN:
                names.update(dict.fromkeys(key_names(row)))
            if reason:
                left_out.add(reason, where)
            else:
                yield Document(where, text, True, None, [text])
        if not count:
            left_out.add("table without rows", place)
        elif names and not found:
            raise self.text_key.not_there(place, names)


# ------------------------------------------------------------------------------- text of a row


class TextKey:
    """Which text of a row is wanted: that of a key, or several in a template.

    "a.b" is the key b inside a, unless there is a key "a.b". With braces it is a template, such as
    "{title}\\n\\n{body}", in which \\n, \\t and \\\\ are escapes, and {{ and }} are braces.
    """

    def __init__(self, flag: str):
        self.flag, self.is_template = flag, "{" in flag or "}" in flag
        self.pieces: list[tuple[str, str | None]] = [("", flag)]  # a literal, and a key behind it
        if self.is_template:
            self.pieces = self.read_template()
        self.keys = [key for _, key in self.pieces if key is not None]
        self.missing = f"row without {self}"

    def __str__(self) -> str:
        """The flag in quotes."""
        return quoted(self.flag)

    def read_template(self) -> list[tuple[str, str | None]]:
        """The pieces of a template."""
        remedy = "write {KEY}, and {{ for a brace"
        try:
            fields = list(string.Formatter().parse(self.flag))
        except ValueError as error:
            raise UserError("--text_key", f"{self}: {error}", remedy) from None
        with_key = [
            (key, spec, conversion) for _, key, spec, conversion in fields if key is not None
        ]
        if not with_key or any(not key or spec or conversion for key, spec, conversion in with_key):
            raise UserError("--text_key", f"{self} is not a template of keys", remedy)
        return [(ESCAPE.sub(lambda m: ESCAPES[m[0]], text), key) for text, key, _, _ in fields]

    def is_in(self, row: Any) -> bool:
        """Whether a row has every key."""
        return all(lookup(row, key) is not MISSING for key in self.keys)

    def columns(self, names: Collection[str], place: str) -> list[str]:
        """The columns of a table that have the keys; a UserError if there are none."""
        columns = [key if key in names else key.partition(".")[0] for key in self.keys]
        if not set(columns) <= set(names):
            raise self.not_there(place, map(quoted, names))
        return list(dict.fromkeys(columns))

    def not_there(self, place: str, names: Iterable[str]) -> UserError:
        """The error for a table in which no row has the key."""
        problem = f"no {self} in any row (keys: {listed(names)})"
        return UserError(place, problem, "pass --text_key KEY")

    def text(self, where: str, row: Any, errors: str) -> tuple[str, str]:
        """The text of a row, or why it is left out."""
        if row is None:
            return "", "null row"
        if not isinstance(row, dict):
            raise UserError(where, "not a JSON object", f'write {{"{self.keys[0]}": "..."}}')
        values = [lookup(row, key) for key in self.keys]
        if any(value is MISSING for value in values):
            return "", self.missing
        if any(value is None for value in values):
            return "", f"row whose {self} is null"
        texts: dict[str | None, str] = {
            key: self.valid(where, row, key, value, errors)
            for key, value in zip(self.keys, values, strict=True)
        }
        if not any(texts.values()):
            return "", f"row whose {self} is empty"
        return "".join(literal + texts.get(key, "") for literal, key in self.pieces), ""

    def valid(self, where: str, row: dict, key: str, value: Any, errors: str) -> str:
        """The value of a key as valid text, without a byte order mark."""
        if self.is_template and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        remedy = "correct it, or pass --encoding_errors replace"
        try:
            if isinstance(value, bytes):  # a Parquet column of bytes
                value = value.decode("utf-8", errors)
            if not isinstance(value, str):
                problem = (
                    f"{quoted(key)} is {type(value).__name__} (keys: {listed(key_names(row))})"
                )
                raise UserError(where, problem, "pass --text_key KEY")
            # JSON can spell half of a surrogate pair, which is not a character.
            return value.encode("utf-8", errors).decode("utf-8").removeprefix("\ufeff")
        except UnicodeEncodeError:
            raise UserError(where, "half a surrogate pair in the text", remedy) from None
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 at byte {error.start} of {quoted(key)}"
            raise UserError(where, problem, remedy) from None


def lookup(row: Any, key: str) -> Any:
    """The value of a key, or of a path of keys such as "a.b"; MISSING if there is none."""
    if not isinstance(row, dict):
        return MISSING
    if key in row:
        return row[key]
    first, dot, rest = key.partition(".")
    return lookup(row[first], rest) if dot and first in row else MISSING


def key_names(row: Any) -> list[str]:
    """The keys of a row in quotes, with those of objects in it as paths."""
    names = []
    for key, value in row.items() if isinstance(row, dict) else ():
        inner = value if isinstance(value, dict) and value else ()
        names += [quoted(f"{key}.{name}") for name in inner] or [quoted(key)]
    return names


def quoted(name: str) -> str:
    """A name in quotes, on one line."""
    return f"'{shown(name)}'"


def listed(names: Iterable[str]) -> str:
    """The first names of several."""
    return ", ".join(itertools.islice(names, KEYS_SHOWN))


# ------------------------------------------------------------------------------- text and JSON


def text_parts(item: Item, errors: str) -> Iterator[str]:
    """The text of an item, READ_BYTES at a time, without a byte order mark."""
    encoding, offset = encoding_of(item.stream.head)
    item.stream.read(offset)
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    ended = False
    while not ended:
        data = item.stream.read(READ_BYTES)
        ended = not data
        try:
            text = decoder.decode(data, final=ended)
        except UnicodeDecodeError as error:
            offset += len(data) - len(error.object) + error.start
            remedy = "convert it, or pass --encoding_errors replace"
            problem = f"not {encoding.upper()} at byte {offset}"
            raise UserError(item.place, problem, remedy) from None
        offset += len(data)
        if text:
            yield text


def whole_number(digits: str) -> int | float:
    """A number without a fraction; one that Python refuses to convert is infinite."""
    return int(digits) if len(digits) < 1000 else float(digits)


DECODER = json.JSONDecoder(parse_int=whole_number)


class JsonText:
    """A text that is read as far as its JSON values need it."""

    def __init__(self, parts: Iterable[str], place: str, undecided: bool = False):
        self.parts, self.place = iter(parts), place
        self.text, self.at = "", 0  # what is read and not used, from `at` on
        self.line = 1  # of the text's first character
        self.column = 0  # of the last error in a value, counted from its beginning
        self.seen: list[str] | None = [] if undecided else None  # all parts, to begin again
        self.limit = LONGEST_FIRST_ROW if undecided else LONGEST_ROW

    def decide(self) -> None:
        """It is JSON: forget what was read, and accept longer rows."""
        self.seen, self.limit = None, LONGEST_ROW

    def from_start(self) -> Iterator[str]:
        """It is not JSON: all parts."""
        return itertools.chain(self.seen or [], self.parts)

    def more(self) -> bool:
        """Read at least as much as is there already; whether there was more."""
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        parts, size = [self.text], 0
        for part in self.parts:
            parts.append(part)
            size += len(part)
            if size >= len(self.text):
                break
        if self.seen is not None:
            self.seen += parts[1:]
        self.text = "".join(parts)
        return size > 0

    def next(self, offset: int = 0) -> str:
        """The next character that is not white space, `offset` characters on; "" at the end."""
        while True:
            end = self.skipped(offset)
            if end < len(self.text):
                return self.text[end]
            if not self.more():
                return ""

    def skipped(self, offset: int) -> int:
        """Where the white space ends that begins `offset` characters on."""
        found = SPACE.match(self.text, self.at + offset)
        assert found  # it matches nothing too
        return found.end()

    def parse(self, offset: int = 0) -> tuple[Any, int]:
        """The JSON value `offset` characters on, and its length with the white space before it."""
        while True:
            start = self.skipped(offset)
            try:
                value, end = DECODER.raw_decode(self.text, start)
                return value, end - self.at
            except json.JSONDecodeError as error:
                self.column = error.pos - start + 1
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated")
                if not cut or self.is_long(self.text) or not self.more():
                    raise

    def is_long(self, text: str) -> bool:
        """Whether a text is longer than any row."""
        return len(text) > self.limit

    def form(self) -> str:
        """What the text is: "object" for a single one, "objects" for several, or "text".

        JSON that cannot be read is "damaged", or "long" if it is not known to be.
        """
        inner = 0
        first = self.next()
        if first == "[":
            inner = self.skipped(0) - self.at + 1
            if self.next(inner) == "]":
                return "text" if self.next(self.skipped(inner) - self.at + 1) else "objects"
        if self.next(inner) != "{":
            return "text"
        try:
            after = self.next(self.parse(inner)[1])
        except json.JSONDecodeError:
            return "long" if self.is_long(self.text) else "damaged"
        except RecursionError:
            return "objects"
        return "objects" if inner else {"": "object", "{": "objects"}.get(after, "damaged")

    def is_by_line(self) -> bool:
        """Whether the first value ends on its line, or is damaged."""
        try:
            length = self.parse()[1]
        except (json.JSONDecodeError, RecursionError):
            return True
        return "\n" not in self.text[self.skipped(0) : self.at + length]

    def lines(self) -> Iterator[tuple[int, str]]:
        """The rest of the text by lines, with their numbers."""
        self.line += self.text.count("\n", 0, self.at)
        rest = ""
        for part in itertools.chain([self.text[self.at :]], self.parts):
            *lines, rest = (rest + part).split("\n")
            for line in lines:
                yield self.line, line
                self.line += 1
            if self.is_long(rest):
                raise UserError(f"{self.place}:{self.line}", TOO_LONG, "split the row")
        yield self.line, rest


def json_rows(text: JsonText) -> Iterator[tuple[str, Any]]:
    """The place and the value of each row: of a line, of an item of an array, or one by one."""
    if text.next() == "[":
        return array_rows(text)
    return line_rows(text) if text.is_by_line() else value_rows(text)


def line_rows(text: JsonText) -> Iterator[tuple[str, Any]]:
    """The value of each line that is not empty."""
    for number, line in text.lines():
        if not line.strip("\ufeff \t\r\n"):
            continue
        where = f"{text.place}:{number}"
        try:
            yield where, DECODER.decode(line.lstrip("\ufeff"))
        except (json.JSONDecodeError, RecursionError) as error:
            column = getattr(error, "colno", 0)
            raise not_json(where, error, column, "write one JSON object per line") from None


def value_rows(text: JsonText) -> Iterator[tuple[str, Any]]:
    """One value after another, however they are spread over lines."""
    number = 0
    while text.next():
        number += 1
        yield one_row(text, f"{text.place}, object {number}")


def array_rows(text: JsonText) -> Iterator[tuple[str, Any]]:
    """The items of an array, and of further arrays that follow it."""
    number, is_open = 0, False
    remedy = "write [{...}, {...}]"
    while character := text.next():
        where = f"{text.place}, item {number + 1}"
        if character not in (",]" if is_open else "["):
            raise UserError(where, f"not JSON ({character!r} is out of place)", remedy)
        text.at = text.skipped(0) + 1
        is_open = character != "]"
        if is_open and text.next() not in ("]", ""):
            number += 1
            yield one_row(text, where)
    if is_open:
        raise UserError(text.place, "not JSON (the array does not end)", remedy)


def one_row(text: JsonText, where: str) -> tuple[str, Any]:
    """The place and the value of the row that is next."""
    try:
        value, length = text.parse()
    except (json.JSONDecodeError, RecursionError) as error:
        if text.is_long(text.text):
            raise UserError(where, TOO_LONG, "split the row") from None
        remedy = "write [{...}, {...}], or one JSON object per line"
        raise not_json(where, error, text.column, remedy) from None
    text.at += length
    return where, value


def not_json(where: str, error: Exception, column: int, remedy: str) -> UserError:
    """The error for a row that is not JSON."""
    if isinstance(error, json.JSONDecodeError):
        return UserError(where, f"not JSON ({error.msg} at column {column})", remedy)
    return UserError(where, "JSON that is nested too deeply", "make it flat, or remove it")


# ---------------------------------------------------------------------- Parquet and `datasets`


def parquet_rows(item: Item, spool: Path | None, text_key: Rows) -> Iterator[tuple[str, Any]]:
    """The place of each row, and the columns with its text."""
    parquet: Any = need("pyarrow.parquet")
    damage = (*DAMAGE, need("pyarrow").lib.ArrowException)

    def batches() -> Iterator[list]:
        source = random_access(item.stream, spool)
        # Pages are read one after another; else it keeps a whole row group in memory.
        options = {
            "buffer_size": READ_BYTES,
            "pre_buffer": False,
            "page_checksum_verification": True,
        }
        with source, parquet.ParquetFile(source, **options) as file:
            columns = text_key.columns(file.schema_arrow.names, item.place)
            for batch in file.iter_batches(batch_rows(file.metadata), columns=columns):
                yield batch.to_pylist()

    rows = itertools.chain.from_iterable(guarded(batches(), item.place, "Parquet", damage))
    for number, row in enumerate(rows, 1):
        yield f"{item.place}:{number}", row


def batch_rows(metadata: Any) -> int:
    """How many rows are read at once, so that they take about BATCH_BYTES."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    total = sum(group.total_byte_size for group in groups)
    return max(1, min(BATCH_ROWS, BATCH_BYTES * metadata.num_rows // max(1, total)))


def dataset_builder(reading: Reading) -> Any:
    """What the library `datasets` finds under a name or in a folder; none of its code is run."""
    datasets: Any = need("datasets")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it reports each error twice
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset_builder(reading.dataset, reading.config)
    except Exception as error:  # the library raises many kinds
        raise not_a_dataset(reading, error) from None


def dataset_rows(builder: Any, reading: Reading, text_key: Rows) -> Iterator[tuple[str, Any]]:
    """The place and the text columns of each row of a dataset, which is read as a stream."""
    name = shown(reading.dataset)
    try:
        rows = builder.as_streaming_dataset(split=reading.split)
        if names := rows.column_names:  # else they are not known before a row is read
            rows = rows.select_columns(text_key.columns(names, name))
        for number, row in enumerate(rows, 1):
            yield f"{name}:{number}", row
    except UserError:
        raise
    except Exception as error:
        raise not_a_dataset(reading, error) from None


def not_a_dataset(reading: Reading, error: Exception) -> UserError:
    """The error for a dataset that cannot be read."""
    problem = f"{shown(reading.dataset)} cannot be read ({first_line(error)})"
    return UserError("--dataset", problem, "check --dataset, --config and --split")
