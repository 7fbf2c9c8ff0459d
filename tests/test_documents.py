"""tinymamba/documents.py, inputs.py, archives.py: files, archives, rows, and what is left out."""

import bz2
import contextlib
import functools
import gzip
import io
import itertools
import json
import lzma
import os
import random
import re
import socket
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import POSIX, ROOT, assert_refused, run_main
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare
from tinymamba import documents, inputs
from tinymamba.archives import Item, LeftOut, Stream, encoding_of, is_binary, tar_headers
from tinymamba.cli import UserError
from tinymamba.documents import Corpus, JsonText, Reading, TextKey, json_rows, text_parts

ROWS = '{"text": "one"}\n{"text": "two"}\n'
TWO = ["one", "two"]


def zstd(data):
    return pytest.importorskip("pyarrow").Codec("zstd").compress(data).to_pybytes()


def frozen_gzip(data):
    return gzip.compress(data, mtime=0)


COMPRESSIONS = {".gz": frozen_gzip, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def tar(members, mode="w"):
    """A tar archive of names with their bytes, or with the type of a member without content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            if data in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
                member.type, member.linkname, data = data, "/etc/passwd", b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def parquet(columns, **options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def command(folder, *words, input=""):
    """data/prepare.py in this process, with all documents in their order in train.bin."""
    flags = ["--tokenizer", "byte", "--val_fraction", 0, "--output_dir", folder / "out"]
    return run_main(prepare.main, *flags, *words, cwd=folder, input=input)


def written(folder):
    """The documents in train.bin."""
    ids = np.fromfile(folder / "out" / "train.bin", np.int32)
    ends = np.flatnonzero(ids == 256)
    assert ends[-1] == len(ids) - 1
    return [bytes(part[part < 256].tolist()).decode() for part in np.split(ids, ends + 1)[:-1]]


def read(folder, names=("in",), outputs=(), **reading):
    """The places and texts of the documents, the same in two passes, and the corpus."""
    with contextlib.chdir(folder):
        corpus = Corpus(list(names), Reading(**reading), outputs, folder / "spool")
        told = []
        found = [(d.place, "".join(d.parts)) for d in corpus.documents(told.append)]
        assert sum(told) == corpus.total_bytes
        lines = corpus.left_out.lines()
        assert [(d.place, "".join(d.parts)) for d in corpus.documents()] == found
        assert corpus.left_out.lines() == lines
    return found, corpus


def texts_of(folder, names=("in",), **reading):
    return [text for _, text in read(folder, names, **reading)[0]]


# --------------------------------------------------------------------------- forms of content

LIBRARY = json.dumps({"name": "demo", "text2": 1})
CASES = {  # name: (files, flags, the documents, what is said)
    "jsonl": ({"a.jsonl": ROWS}, "", TWO, []),
    "ndjson": ({"a.ndjson": ROWS}, "", TWO, []),
    "json by lines": ({"a.json": ROWS}, "", TWO, []),
    "json array": ({"a.json": json.dumps([{"text": t} for t in TWO], indent=1)}, "", TWO, []),
    "json array as jsonl": ({"a.jsonl": '[{"text": "one"}, {"text": "two"}]'}, "", TWO, []),
    "json arrays": ({"a.json": '[{"text": "one"},]\n[{"text": "two"}]'}, "", TWO, []),
    "json object": ({"a.json": '\n {"text":\n "one"}\n'}, "", ["one"], []),
    "json objects on several lines": (
        {"a.json": '{\n"text": "one"\n}\n{\n"text": "two"\n}'},
        "",
        TWO,
        [],
    ),
    "json of settings is text": (
        {"package.json": LIBRARY},
        "",
        [LIBRARY],
        ["note: JSON object without 'text', read as text: 1 (in/package.json)"],
    ),
    "json with comments is text": (
        {"a.json": '{"text": "one" /* why */}'},
        "",
        ['{"text": "one" /* why */}'],
        ["note: JSON with an error, read as text: 1 (in/a.json)"],
    ),
    "other json is text": ({"a.json": "[1, 2]", "b.json": '"x"'}, "", ["[1, 2]", '"x"'], []),
    "no suffix": ({"part-0": ROWS, "README": "{not JSON}"}, "", ["{not JSON}", *TWO], []),
    "text that looks like rows": ({"a.txt": ROWS}, "", [ROWS], []),
    "rows without text": (
        {"a.jsonl": '{"text": null}\nnull\n\n{"text": ""}\n{"body": "x"}\n' + ROWS},
        "",
        TWO,
        [
            "left out: null row: 1 (in/a.jsonl:2)",
            "left out: row whose 'text' is empty: 1 (in/a.jsonl:4)",
            "left out: row whose 'text' is null: 1 (in/a.jsonl:1)",
            "left out: row without 'text': 1 (in/a.jsonl:5)",
        ],
    ),
    "no rows": (
        {"a.jsonl": "\n\n", "b.json": "[]", "c.txt": "c"},
        "",
        ["c"],
        ["left out: table without rows: 2 (in/a.jsonl, in/b.json)"],
    ),
    "nested key": (
        {"a.jsonl": '{"m": {"t": "one"}}\n{"m.t": "two", "m": {"t": "no"}}\n{"m": null}'},
        "--text_key m.t",
        TWO,
        ["left out: row without 'm.t': 1 (in/a.jsonl:3)"],
    ),
    "template": (
        {"a.jsonl": '{"t": "T", "m": {"n": 3}, "b": "B"}\n{"t": "T"}'},
        r"--text_key {t}\n\t{m.n}{{\\n}}{b}.",
        ["T\n\t3{\\n}B."],
        [r"left out: row without '{t}\n\t{m.n}{{\\n}}{b}.': 1 (in/a.jsonl:2)"],
    ),
    "huge numbers, NaN, equal keys": (
        {"a.jsonl": '{"n": %s, "text": "no", "text": "one", "f": [NaN]}' % ("9" * 5000)},
        "",
        ["one"],
        [],
    ),
    "half a surrogate pair": (
        {"a.jsonl": '{"text": "\\ud800"}'},
        "--encoding_errors replace",
        ["?"],
        [],
    ),
    "a stray zero byte is text": ({"a.txt": "ab\0c" + "d" * 99}, "", ["ab\0c" + "d" * 99], []),
    "line ends are kept": ({"a.txt": "a\r\nb\rc\n\n"}, "", ["a\r\nb\rc\n\n"], []),
    "marks inside JSON lines": ({"a.jsonl": f"\ufeff{ROWS}\ufeff{ROWS}"}, "", TWO * 2, []),
    "mark before a row's text": ({"a.jsonl": '{"text": "\\ufeffone"}'}, "", ["one"], []),
    "binary files": (
        {
            "a.txt": "a",
            "b.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
            "c.docx": zipped({"a": "b"}),
            "d.pdf": b"%PDF-1.7 text",
            "e.txt": "é".encode("utf-16-le") * 99,
            "f": b"\0" * 99,
        },
        "",
        ["a"],
        ["left out: binary: 5 (in/b.png, in/c.docx, in/d.pdf, ...)"],
    ),
    "pointers to large files": (
        {"a.txt": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "b": "b"},
        "",
        ["b"],
        ["left out: a Git LFS pointer: 1 (in/a.txt)"],
    ),
    "hidden and empty": (
        {"a.txt": "a", ".git/x": "x", "d/.b.txt": "x", "c.txt": "", "d.txt": b"\xef\xbb\xbf"},
        "",
        ["a"],
        ["left out: empty: 2 (in/c.txt, in/d.txt)", "left out: hidden: 2 (in/.git, in/d/.b.txt)"],
    ),
    "folder with a suffix": ({"x.jsonl/a.txt": "a", "y.gz/b.txt": "b"}, "", ["a", "b"], []),
    "tar": (
        {
            "a.tar": tar(
                {
                    "./d": tarfile.DIRTYPE,
                    "./d/b.jsonl": ROWS.encode(),
                    "/etc/a.txt": b"absolute",
                    "../../up.txt": b"up",
                    "long" * 99: b"long",
                    ".git/config": b"x",
                    "sym.txt": tarfile.SYMTYPE,
                    "hard.txt": tarfile.LNKTYPE,
                    "pipe": tarfile.FIFOTYPE,
                    "e.txt": b"",
                    "f.bin": b"\0\1\2",
                }
            )
        },
        "",
        [*TWO, "absolute", "up", "long"],
        [
            "left out: binary: 1 (in/a.tar/f.bin)",
            "left out: empty: 1 (in/a.tar/e.txt)",
            "left out: hidden: 1 (in/a.tar/.git/config)",
            "left out: link in an archive: 2 (in/a.tar/sym.txt, in/a.tar/hard.txt)",
            "left out: not a regular file: 1 (in/a.tar/pipe)",
        ],
    ),
    "tars put together": ({"a.tar": tar({"a": b"a"}) + tar({"b": b"b"})}, "", ["a", "b"], []),
    "zip": (
        {"a.zip": zipped({"b.txt": "b", "d/": "", "d/a.jsonl": ROWS, "__MACOSX/b.txt": "x"})},
        "",
        ["b", *TWO],
        ["left out: hidden: 1 (in/a.zip/__MACOSX/b.txt)"],
    ),
    "archives in archives": (
        {"a.tgz": frozen_gzip(tar({"b.zip": zipped({"c.tar": tar({"d.jsonl": ROWS.encode()})})}))},
        "",
        TWO,
        [],
    ),
    "compressed, but not by name": ({"a.txt": bz2.compress(b"one")}, "", ["one"], []),
    "unpacked, but not by name": ({"a.txt.gz": "one", "b.jsonl.zst": ROWS}, "", ["one", *TWO], []),
}


@pytest.mark.parametrize("name", CASES)
def test_the_command_reads(tmp_path, name):
    files, flags, texts, said = CASES[name]
    write(tmp_path / "in", files)
    done = command(tmp_path, "--input", "in", *flags.split())
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == texts
    found = [line for line in done.stdout.splitlines() if line.startswith(("left out", "note"))]
    assert [line.replace("\\", "/") for line in found] == [s.replace("\\", "/") for s in said]
    if said:
        done = command(tmp_path, "--force", "--strict", "--input", "in", *flags.split())
        assert_refused(done, "--strict: ", said[0].split(": ")[1])
        assert written(tmp_path) == texts


ENCODINGS = ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_byte_order_marks_vanish_and_say_the_encoding(tmp_path, encoding):
    content = {
        "a.json": '[{"text": "één"}]',
        "b.jsonl": '{"text": "日本"}\n{"text": "🙂"}',
        "c.txt": "Zeile\r\n\0",
        "d": '{"text": "no suffix"}',
    }
    mark = "\ufeff".encode(encoding)
    files = {name: mark + text.encode(encoding) for name, text in content.items()}
    files["e.txt.gz"] = gzip.compress(mark + "gz".encode(encoding))
    files["f.zip"] = zipped({"g.txt": mark + "zip".encode(encoding)})
    write(tmp_path / "in", files)
    expected = ["één", "日本", "🙂", "Zeile\r\n\0", "no suffix", "gz", "zip"]
    assert texts_of(tmp_path) == expected


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files_are_read_as_what_is_in_them(tmp_path, suffix):
    pack = COMPRESSIONS[suffix]
    long = "".join(f"line {i}\n" for i in range(20_000))
    columns = {"text": TWO}
    files = {
        f"a.txt{suffix}": pack(long.encode()),
        f"b.jsonl{suffix}": pack(ROWS[:16].encode()) + pack(ROWS[16:].encode()),
        f"c.json{suffix}": pack(b'[{"text": "three"}]'),
        f"d.tar{suffix}": pack(tar({"e.txt": b"e", f"f.jsonl{suffix}": pack(ROWS.encode())})),
        f"g.parquet{suffix}": pack(parquet(columns)),
        "h.tar": tar({"h.parquet": parquet(columns), f"i.txt{suffix}": pack(b"i")}),
        f"j.txt{suffix}": pack(b""),
    }
    write(tmp_path / "in", files)
    expected = [long, *TWO, "three", "e", *TWO, *TWO, *TWO, "i"]
    found, corpus = read(tmp_path)
    assert [text for _, text in found] == expected
    assert [place.replace(os.sep, "/") for place, _ in found[4:6]] == [
        f"in/d.tar{suffix}/e.txt",
        f"in/d.tar{suffix}/f.jsonl{suffix}:1",
    ]
    assert corpus.left_out.counts == {"empty": 1}


def test_parquet_columns(tmp_path):
    columns = {
        "text": ["one", None, "", "two"],
        "m": [{"t": "a"}, {"t": None}, None, {"t": "d"}],
        "x.y": list("1234"),
        "raw": [b"w", b"x", b"y", b"\xff"],
        "n": [1, 2, 3, 4],
    }
    write(tmp_path / "in", {"a.parquet": parquet(columns), "no suffix": parquet(columns)})
    assert texts_of(tmp_path) == TWO * 2
    assert texts_of(tmp_path, text_key="m.t") == ["a", "d"] * 2
    assert texts_of(tmp_path, text_key="x.y") == list("1234") * 2
    assert texts_of(tmp_path, text_key="{m.t}{n}{x.y}") == ["a11", "d44"] * 2
    assert texts_of(tmp_path, text_key="raw", encoding_errors="replace") == [*"wxy", "\ufffd"] * 2


# -------------------------------------------------------------------------------------- errors


def damaged_zip(flag=0, method=None):
    data = bytearray(zipped({"a.txt": "text " * 99}))
    for at, offset in ((0, 6), (data.index(b"PK\1\2"), 8)):
        data[at + offset] |= flag
        data[at + offset + 2] = data[at + offset + 2] if method is None else method
    return bytes(data)


def damaged_tar():
    data = bytearray(tar({"a.txt": b"a", "b.txt": b"b"}))
    data[1024 + 100] ^= 3
    return bytes(data)


DEEP = '{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}"
REFUSED = {  # name: (files, flags, what the error line says)
    "no key": (
        {"a.jsonl": '{"body": "x", "m": {"t": 1}}\n' * 2},
        "",
        r"in/a\.jsonl: no 'text' in any row \(keys: 'body', 'm\.t'\); pass --text_key KEY",
    ),
    "no column": (
        lambda: {"a.parquet": parquet({"body": ["x"], "n": [1]})},
        "",
        r"in/a\.parquet: no 'text' in any row \(keys: 'body', 'n'\); pass --text_key KEY",
    ),
    "no nested column": (
        lambda: {"a.parquet": parquet({"m": [{"t": "x"}]})},
        "--text_key m.u",
        r"no 'm\.u' in any row \(keys: 'm\.t'\)",
    ),
    "many long keys": (
        {"a.jsonl": json.dumps({f"{i}" + "k" * 5000: "x" for i in range(500)})},
        "",
        r"a\.jsonl: no 'text' in any row \(keys: ('\d+k{140,}\.\.\.k+', ){19}'\d+k+\.\.\.k+'\)",
    ),
    "number": ({"a.jsonl": '{"text": 3}'}, "", r"a\.jsonl:1: 'text' is int \(keys: 'text'\)"),
    "number column": (
        lambda: {"a.parquet": parquet({"n": [3]})},
        "--text_key n",
        r"a\.parquet:1: 'n' is int",
    ),
    "bytes": (
        lambda: {"a.parquet": parquet({"text": [b"a", b"\xff"]})},
        "",
        r"a\.parquet:2: not UTF-8 at byte 0 of 'text'; correct it, or pass --encoding_errors",
    ),
    "not an object": ({"a.jsonl": '"x"'}, "", r"a\.jsonl:1: not a JSON object; write {\"text\":"),
    "not an object in an array": (
        {"a.json": '[{"text": "a"}, 3]'},
        "",
        r"a\.json, item 2: not a JSON object",
    ),
    "bad line": (
        {"a.jsonl": ROWS + '{"text":\n' + ROWS},
        "",
        r"a\.jsonl:3: not JSON \(Expecting value at column 9\); write one JSON object per line",
    ),
    "bad line behind a blank one": ({"a.jsonl": "\n\r\nbad"}, "", r"a\.jsonl:3: not JSON"),
    "cut object": ({"a.jsonl": ROWS + '{"text": "a'}, "", r"a\.jsonl:3: not JSON \(Unterminated"),
    "cut array": (
        {"a.json": '[{"text": "a"}, {"text": '},
        "",
        r"a\.json, item 2: not JSON \(Expecting value at column 10\); write \[",
    ),
    "array without end": ({"a.json": '[{"text": "a"},'}, "", r"\(the array does not end\)"),
    "no comma": ({"a.json": '[{"text": "a"} {}]'}, "", r"item 2: not JSON \('{' is out of place"),
    "behind the array": ({"a.json": '[{"text": "a"}] x'}, "", r"\('x' is out of place\)"),
    "deep line": ({"a.jsonl": ROWS + DEEP}, "", r"a\.jsonl:3: JSON .* too deeply; make it flat"),
    "deep item": ({"a.json": f"[{DEEP}]"}, "", r"a\.json, item 1: JSON that is nested too deeply"),
    "deep object": ({"a.json": DEEP}, "", r"a\.json:1: JSON that is nested too deeply"),
    "huge number as text": ({"a.jsonl": '{"text": %s}' % ("1" * 9999)}, "", r"'text' is float"),
    "half a pair": ({"a.jsonl": '{"text": "\\udfff"}'}, "", r"a\.jsonl:1: half a surrogate pair"),
    "not UTF-8": ({"a.txt": b"caf\xe9"}, "", r"a\.txt: not UTF-8 at byte 3; convert it, or pass"),
    "not UTF-8 behind a mark": ({"a.txt": b"\xef\xbb\xbfcaf\xe9"}, "", r"not UTF-8 at byte 6;"),
    "not UTF-8 in rows": ({"a.jsonl": ROWS.encode() + b"\xff"}, "", r"a\.jsonl: not UTF-8 at byte"),
    "not UTF-16": ({"a.txt": b"\xff\xfea\0b"}, "", r"a\.txt: not UTF-16-LE at byte 4"),
    "not UTF-8 in an archive": (
        {"a.tar": tar({"b.txt": b"caf\xe9"})},
        "",
        r"in/a\.tar/b\.txt: not UTF-8 at byte 3",
    ),
    "encrypted": ({"a.zip": damaged_zip(1)}, "", r"in/a\.zip/a\.txt: is encrypted; unpack it"),
    "unknown method": (
        {"a.zip": damaged_zip(method=9)},
        "",
        r"in/a\.zip/a\.txt: not readable as \.zip \(That compression method is not supported\)",
    ),
    "not a zip": ({"a.zip": "text"}, "", r"a\.zip: not readable as \.zip \(File is not a zip"),
    "not a tar": ({"a.tar": "text" * 500}, "", r"a\.tar: not readable as \.tar \(invalid header"),
    "long tar header": (
        {"a.tar": tar({"a": b"a", "b" * 2_000_000: b"b"})},
        "",
        r"a\.tar: not readable as \.tar \(a header of 2,[\d,]+ bytes\)",
    ),
    "bad tar header": ({"a.tar": damaged_tar()}, "", r"a\.tar: not readable as \.tar \(bad check"),
    "not Parquet": (
        {"a.parquet": "text"},
        "",
        r"a\.parquet: not readable as Parquet \(.*\); write",
    ),
    "not gzip": ({"a.gz": b"\0\1\2\3"}, "", r"a\.gz: not readable as \.gz \(Not a gzipped file"),
    "behind bzip2": ({"a.bz2": bz2.compress(b"a") + b"b"}, "", r"a\.bz2: not readable as \.bz2"),
    "behind xz": ({"a.xz": lzma.compress(b"a") + b"b"}, "", r"a\.xz: not readable as \.xz"),
    "packed too often": (
        {"a.gz": functools.reduce(lambda data, _: gzip.compress(data), range(9), b"a")},
        "",
        r"a\.gz: is packed more than 8 times over; unpack it first",
    ),
    "brace": ({"a.jsonl": ROWS}, "--text_key {a", r"--text_key: '{a': expected '}' before end"),
    "no name": ({"a.jsonl": ROWS}, "--text_key {}", r"--text_key: '{}' is not a template of keys"),
    "no keys": ({"a.jsonl": ROWS}, "--text_key {{}}", r"--text_key: '{{}}' is not a template of"),
    "format": ({"a.jsonl": ROWS}, "--text_key {a:>9}", r"--text_key: '{a:>9}' is not a template"),
    "nothing to read": (
        {".a": "a", "b.txt": "", "c.bin": b"\0"},
        "",
        r"in: holds nothing to read \(hidden: 1, empty: 1, binary: 1\); give UTF-8 text",
    ),
    "no match": ({"a.txt": "a"}, "--input in/*.md", r"in/\*\.md: no such file or folder"),
    "control characters in a name": pytest.param(
        {"a\n\x1b[31mb.jsonl": "bad"}, "", r"in/a\\n\\x1b\[31mb\.jsonl:1: not JSON", marks=POSIX
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_command_refuses_in_one_line(tmp_path, name):
    case = REFUSED[name]
    files, flags, message = getattr(case, "values", case)
    write(tmp_path / "in", files() if callable(files) else files)
    done = command(tmp_path, "--input", "in", *flags.split())
    assert_refused(done)
    assert re.search(message, done.stderr.replace(os.sep + "a.", "/a.")), done.stderr
    assert not list(tmp_path.glob("out/*.bin"))


# ---------------------------------------------------------------------- files, links and pipes


@POSIX
def test_links_are_followed_once_and_what_is_left_out_is_named(tmp_path):
    inside = {"z/b.txt": "b", "y/c.txt": "c"}
    write(tmp_path / "in", inside)
    write(tmp_path / "out", {"x.txt": "x", "sub/y.txt": "y"})
    targets = {
        "a": "z",  # a real folder goes before a link to it
        "ext": "../out",
        "ext2": "../out",
        "sub": "../out/sub",  # found in ext before
        "z/loop": "..",
        "up": "../..",
        "a.txt": "z/b.txt",
        "far.txt": "../out/x.txt",
        "broken": "nowhere",
        "self": "self",
    }
    for name, target in targets.items():
        (tmp_path / "in" / name).symlink_to(target)
    os.mkfifo(tmp_path / "in" / "pipe")
    with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(tmp_path):
        bound.bind("in/socket")
    found, corpus = read(tmp_path)
    assert found == [
        ("in/ext/sub/y.txt", "y"),
        ("in/ext/x.txt", "x"),
        ("in/y/c.txt", "c"),
        ("in/z/b.txt", "b"),
    ]
    assert [file.key for file in corpus.files][0] == "ext/sub/y.txt"
    assert corpus.left_out.lines() == [
        "left out: broken link: 2 (in/broken, in/self)",
        "left out: link to a folder around it: 1 (in/up)",
        "left out: not a regular file: 2 (in/pipe, in/socket)",
        "left out: read already under another name: 6 (in/a, in/ext2, in/sub, ...)",
    ]


@POSIX
def test_linked_folders_are_read_by_the_command_and_second_names_are_no_loss(tmp_path):
    write(tmp_path / "real", {"a.txt": "a", "b.jsonl": ROWS})
    write(tmp_path / "in", {"c.txt": "c"})
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "same").symlink_to(tmp_path / "real")
    done = command(tmp_path, "--strict", "--input", "in")
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == ["c", "a", *TWO]
    assert "left out: read already under another name: 1 (in/same)\n" in done.stdout


def test_the_order_depends_on_names_alone(tmp_path, monkeypatch):
    names = ["b/x.txt", "a.txt", "b.txt", "C.txt", "a/b/c.txt", "a/z.txt", "é.txt"]
    write(tmp_path / "in", {name: name for name in names})
    expected = read(tmp_path)[0]
    assert len(expected) == len(
        {name.lower() for name in names} | set(os.listdir(tmp_path / "in")) & {"B.txt"}
    )
    scandir = os.scandir

    @contextlib.contextmanager
    def shuffled(folder):
        with scandir(folder) as entries:
            entries = list(entries)
        random.Random(len(entries)).shuffle(entries)
        yield entries[::-1]

    monkeypatch.setattr(inputs.os, "scandir", shuffled)
    assert read(tmp_path)[0] == expected


def test_inputs_may_overlap(tmp_path):
    write(tmp_path / "in", {"a.txt": "a", "s/b.txt": "b"})
    found, corpus = read(tmp_path, ["in/s", "in", "in", "./in/a.txt", "./in"])
    assert [text for _, text in found] == ["b", "a"]
    assert corpus.left_out.counts == {"read already under another name": 3}


def test_outputs_are_no_inputs(tmp_path):
    write(tmp_path / "in", {"a.txt": "a", "out/vocab.txt": "v", "out/.part/x.txt": "x"})
    outputs = [tmp_path / "in" / "out" / name for name in ("vocab.txt", ".part")]
    found, corpus = read(tmp_path, outputs=outputs)
    assert ([text for _, text in found], corpus.left_out.counts) == (["a"], {})
    with pytest.raises(UserError, match="is an output too; name another --output_dir"):
        Corpus([str(outputs[0])], Reading(), outputs)


def test_patterns_and_names_that_look_like_patterns(tmp_path):
    write(tmp_path / "in", {"a1.txt": "1", "a2.txt": "2", "a.md": "m", "d/a3.txt": "3"})
    write(tmp_path / "in", {"a[12].txt": "brackets"})
    assert texts_of(tmp_path, ["in/a[12].txt"]) == ["brackets"]
    assert texts_of(tmp_path, ["in/a?.txt", "in/*.md"]) == ["1", "2", "m"]
    assert texts_of(tmp_path, ["in/**/a3.txt"]) == ["3"]


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    write(tmp_path / "in", {"a.txt": "a", "locked/b.txt": "b", "secret.txt": "s"})
    scandir, is_open = os.scandir, open

    def refuse(function):
        def refusing(path, *rest, **options):
            if Path(str(path)).name in ("locked", "secret.txt"):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *rest, **options)

        return refusing

    monkeypatch.setattr(inputs.os, "scandir", refuse(scandir))
    monkeypatch.setattr(inputs, "open", refuse(is_open), raising=False)
    found, corpus = read(tmp_path)
    assert [text for _, text in found] == ["a"]
    [line] = corpus.left_out.lines()
    names = [str(Path("in", name)) for name in ("secret.txt", "locked")]
    assert line == f"left out: unreadable (Permission denied): 2 ({', '.join(names)})"
    done = command(tmp_path, "--input", "in/secret.txt")
    assert_refused(done, "secret.txt: Permission denied; check the path")


@POSIX
def test_names_of_any_bytes_and_any_length(tmp_path):
    folder = tmp_path / "in"
    write(folder, {"a.txt": "a"})
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("latin")
    with contextlib.chdir(folder):
        for _ in range(25):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        Path("deep.txt").write_text("deep")
    done = command(tmp_path, "--input", "in")
    assert done.returncode == 0, done.stderr
    assert sorted(written(tmp_path)) == ["a", "latin"]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("left out")]
    assert line.startswith("left out: unreadable (File name too long): 1 (in/ddd")
    assert len(line) < 400


@POSIX
def test_a_pipe_is_read_like_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(ROWS,))
    writer.start()
    done = command(tmp_path, "--input", "pipe")
    writer.join()
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == TWO


STDIN = {  # what is piped in: the documents
    b"a text\n": ["a text\n"],
    ROWS.encode(): TWO,
    b'[{"text": "one"}, {"text": "two"}]': TWO,
    frozen_gzip(ROWS.encode()): TWO,
    frozen_gzip(tar({"a.jsonl": ROWS.encode()})): TWO,
    "\ufeffa text".encode("utf-16-le"): ["a text"],
}


@pytest.mark.parametrize("data", STDIN, ids=range(len(STDIN)))
def test_standard_input_is_recognized_by_its_content(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    corpus = Corpus(["-"], Reading(), [], tmp_path / "spool")
    assert ["".join(d.parts) for d in corpus.documents()] == STDIN[data]
    print_of = corpus.fingerprint()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert Corpus(["-"], Reading(), [], tmp_path / "spool").fingerprint() == print_of


def test_the_command_reads_standard_input_and_leaves_no_copy(tmp_path):
    flags = ["--input", "-", "--tokenizer", "byte", "--val_fraction", "0", "--output_dir", "out"]
    words = [sys.executable, str(ROOT / "data" / "prepare.py"), *flags]
    packed = gzip.compress(ROWS.encode())
    done = subprocess.run(words, cwd=tmp_path, input=packed, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == TWO
    assert not list(tmp_path.rglob("input-*"))
    for empty, problem in (("", "is empty"), ("\0\1", "is binary")):
        done = command(tmp_path, "--force", "--input", "-", input=empty)
        assert_refused(done, f"standard input: {problem}; give UTF-8 text or JSON lines")


def test_the_library_leaves_out_what_is_not_utf8(tmp_path, monkeypatch):
    write(tmp_path, {f"{i}.py": "pass\n" for i in range(30)})
    write(tmp_path, {"latin.py": b"# caf\xe9\n", "test/t.py": "pass", "a.txt": "no"})
    monkeypatch.setattr(inputs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = Corpus(None, Reading(), [])
    assert len(list(corpus.documents())) == 30
    assert corpus.left_out.counts == {"not UTF-8": 1}
    for path in tmp_path.glob("1*.py"):
        path.unlink()
    with pytest.raises(UserError, match="no source there; pass --input"):
        Corpus(None, Reading(), [])


# ------------------------------------------------------------------- changes, cuts and memory


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.zip", "a.tar"])
@pytest.mark.parametrize("change", ["grow", "shrink", "replace", "remove"])
def test_a_file_that_changes_is_refused(tmp_path, monkeypatch, name, change):
    monkeypatch.chdir(tmp_path)
    texts = [json.dumps({"text": f"row {i}"}) + "\n" for i in range(1000)]
    content = "".join(texts).encode()
    packed = {
        ".gz": gzip.compress(content),
        ".zip": zipped({"a.txt": content, "b.txt": content}),
        ".tar": tar({"a.txt": content, "b.txt": content}),
    }
    data = packed.get(Path(name).suffix, content)
    Path(name).write_bytes(data)
    os.utime(name, ns=(1, 1))
    corpus = Corpus([name], Reading(), [])
    assert list(corpus.documents())
    documents = corpus.documents()
    next(documents)
    if change == "remove":
        os.name == "nt" or Path(name).unlink()
    if change != "remove" or os.name == "nt":
        new = {"grow": data + data, "shrink": data[: len(data) // 2], "replace": data}
        Path(name).write_bytes(new.get(change, b""))
    with pytest.raises(UserError, match=rf"^{re.escape(name)}"):
        for document in documents:
            list(document.parts)
    with pytest.raises(UserError, match=rf"^{re.escape(name)}: changed while the input was read"):
        list(corpus.documents())


@pytest.mark.parametrize("suffix", [*COMPRESSIONS, ".zip", ".tar", ".parquet"])
def test_a_file_cut_anywhere_is_refused(tmp_path, suffix):
    lines = "".join(f"{i} {random.Random(i).random()}\n" for i in range(300)).encode()
    make = {
        ".zip": lambda data: zipped({"a.txt": data, "b.txt": data}),
        ".tar": lambda data: tar({"a.txt": data, "b.txt": data})[: -10 * 512],
        ".parquet": lambda data: parquet({"text": data.decode().split("\n")}),
    }
    data = {**make, **COMPRESSIONS}[suffix](lines)
    path = tmp_path / f"a.txt{suffix}"
    ends = {1, 2, 5, 511, 512, 513, len(data) - 1}
    ends |= set(range(7, len(data), len(data) // 40)) | set(range(512, len(data), 512))
    for end in sorted(end for end in ends if end < len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(
            UserError, match=r"a\.txt.*: not readable as \.?\w+ \(.+\); write it again"
        ):
            for document in Corpus([str(path)], Reading(), []).documents():
                list(document.parts)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip", ".parquet"])
def test_a_flipped_byte_is_never_read_as_another_text(tmp_path, suffix):
    lines = [f"{i} {random.Random(i).random()}" for i in range(300)]
    make = {
        ".zip": lambda data: zipped({"a.txt": data}),
        ".parquet": lambda data: parquet({"text": lines}, write_page_checksum=True),
    }
    data = {**COMPRESSIONS, **make}[suffix]("\n".join(lines).encode())
    path, refused = tmp_path / f"a.txt{suffix}", 0
    for at in range(0, len(data), len(data) // 60):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :])
        try:
            parts = [d.parts for d in Corpus([str(path)], Reading(), []).documents()]
            assert "\n".join("".join(part) for part in parts) == "\n".join(lines)
        except UserError:
            refused += 1
    assert refused > 50


def stored(folder, name, megabytes):
    """A file with so many MB of text or of rows."""
    text = b"How much memory does a line like this one take?\n" * 20_000  # 1 MB
    row = json.dumps({"text": text[:5000].decode()}).encode()
    path = folder / name
    if name.endswith((".gz", ".xz")):
        opener = gzip.open if name.endswith(".gz") else lzma.open
        with opener(path, "wb") as file:
            for _ in range(megabytes):
                file.write(text)
    elif name.endswith(".zip"):
        path.write_bytes(zipped({"a.txt": text * megabytes}))
    elif name.endswith(".json"):
        path.write_bytes(b"[" + b",\n".join([row] * (megabytes * 200)) + b"]")
    elif name.endswith(".parquet"):
        rows = [f"{i:05} {row.decode()}" for i in range(megabytes * 200)]
        options = {"compression": "none", "use_dictionary": False}
        path.write_bytes(parquet({"text": rows}, row_group_size=1 << 20, **options))
    return path


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.zip", "a.json", "a.parquet"])
def test_memory_does_not_grow_with_what_is_in_a_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "BATCH_BYTES", 1 << 20)  # a fourth of it
    arrow = pytest.importorskip("pyarrow")
    corpus, size = Corpus([str(stored(tmp_path, name, 24))], Reading(), []), 0
    before = highest = arrow.total_allocated_bytes()
    tracemalloc.start()
    for document in corpus.documents():
        for part in document.parts:
            size += len(part)
        highest = max(highest, arrow.total_allocated_bytes())
    peak = tracemalloc.get_traced_memory()[1] + highest - before
    tracemalloc.stop()
    assert size >= 23e6
    assert peak < 15e6


def test_an_archive_does_not_remember_its_members():
    data = tar({f"{i}.txt": b"text" for i in range(50)})
    kept = [len(a.members) for a, _ in tar_headers(Stream(io.BytesIO(data), "a.tar", ""))]
    assert len(kept) == 50
    assert max(kept) == 1


def test_a_row_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_ROW", 1 << 20)
    monkeypatch.setattr(documents, "LONGEST_FIRST_ROW", 1 << 19)
    long = '{"text": "' + "a" * (5 << 20)
    write(tmp_path / "in", {"a.jsonl": long})
    for start in ("", ROWS, f"[{ROWS[:15]},"):
        parts = itertools.chain([start + long[:99]], itertools.repeat("a" * 65536, 200))
        with pytest.raises(UserError, match=r": a row of more than [\d,]+ characters; split the"):
            list(json_rows(JsonText(parts, "a.jsonl")))
        assert len(list(parts)) > 150
    write(tmp_path, {"d.json": long})
    found, corpus = read(tmp_path, ["d.json"])
    assert [text for _, text in found] == [long]
    assert corpus.left_out.lines() == [
        f"note: JSON of more than {1 << 19:,} characters, read as text: 1 (d.json)"
    ]


# ------------------------------------------------------------------------- pieces of a text


def item(data, place="a.txt"):
    return Item(place, place, place, len(data), Stream(io.BytesIO(data), place, ""))


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_bad_bytes_are_replaced_as_python_does_or_named(data):
    encoding, skipped = encoding_of(data)
    expected = data[skipped:].decode(encoding, errors="replace")
    assert "".join(text_parts(item(data), "replace")) == expected
    try:
        data[skipped:].decode(encoding)
    except UnicodeDecodeError as error:
        with pytest.raises(UserError, match=rf"byte {skipped + error.start};"):
            list(text_parts(item(data), "strict"))


def test_bad_byte_is_named_by_its_place_in_a_large_file():
    data = "日".encode() * 1_000_000 + b"\xff" + b"a" * 10
    with pytest.raises(UserError, match="not UTF-8 at byte 3000000;"):
        list(text_parts(item(data), "strict"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


ROW = st.dictionaries(st.text(), VALUES, min_size=1, max_size=3)


@given(
    st.lists(ROW, min_size=1, max_size=4),
    st.sampled_from(["lines", "array", "objects"]),
    st.booleans(),
    st.integers(1, 9),
)
@settings(max_examples=150, deadline=None)
def test_rows_do_not_depend_on_how_a_text_is_cut(rows, form, ascii_only, size):
    indent = None if form == "lines" else 1
    lines = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    text = "[" + ",".join(lines) + "]" if form == "array" else "\r\n".join(lines)
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert [row for _, row in json_rows(JsonText(parts, "a.json"))] == rows
    undecided = JsonText(parts, "a.json", undecided=True)
    assert undecided.form() == ("object" if form != "array" and len(rows) == 1 else "objects")
    assert "".join(undecided.from_start()) == text


@given(st.text(alphabet='[]{}",:1ntrue\\ \n', max_size=12), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_a_text_that_is_no_json_is_kept_whole(text, size):
    undecided = JsonText([text[i : i + size] for i in range(0, len(text), size)], "a", True)
    undecided.form()
    assert "".join(undecided.from_start()) == text
    with contextlib.suppress(UserError):
        list(json_rows(JsonText([text], "a.jsonl")))


def test_binary_is_told_from_text():
    rng = random.Random(0)
    texts = [
        b"plain",
        "日本語🙂".encode() * 999,
        b"a\0" + b"b" * 99,
        b"\x1b[31mred\x1b[0m" * 9 + b"\0",
    ]
    texts += ["\ufeffa\0b".encode(name) for name in ENCODINGS]
    binary = [rng.randbytes(8192), bytes(range(256)), np.arange(2000).tobytes(), b"\0", b"%PDF-1.4"]
    assert not [text for text in texts if is_binary(text[:8192])]
    assert all(map(is_binary, binary))


def test_names_and_counts_of_what_is_left_out():
    left_out = LeftOut()
    for i in range(1500):
        left_out.add("binary", f"{i}.bin")
    left_out.add("hidden", ".a")
    assert left_out.lines() == [
        "left out: binary: 1,500 (0.bin, 1.bin, 2.bin, ...)",
        "left out: hidden: 1 (.a)",
    ]
    with pytest.raises(UserError, match=r"^--strict: binary: 1,500 \(.*, \.\.\.\), hidden: 1"):
        left_out.refuse()


def test_a_pass_that_ends_early_says_what_it_left_out(tmp_path, monkeypatch):
    write(tmp_path, {"a.jsonl": '{"text": null}\n' + ROWS + '{"text": ""}'})
    monkeypatch.chdir(tmp_path)
    corpus = Corpus(["a.jsonl"], Reading(), [])
    assert corpus.left_out.total() == 0
    list(itertools.islice(corpus.documents(), 1))
    assert corpus.left_out.total() == 1
    list(corpus.documents())
    list(itertools.islice(corpus.documents(), 1))
    assert corpus.left_out.total() == 2


def test_the_fingerprint_changes_with_names_sizes_and_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fingerprint():
        return Corpus(["in"], Reading(), []).fingerprint()

    write(tmp_path / "in", {"a.txt": "a", "b.txt": "b"})
    os.utime("in/a.txt", ns=(1, 1))
    prints = [fingerprint()]
    assert fingerprint() == prints[0]
    os.utime("in/a.txt", ns=(2, 2))
    prints.append(fingerprint())
    os.rename("in/a.txt", "in/c.txt")
    prints.append(fingerprint())
    write(tmp_path / "in", {"d.txt": "d"})
    prints.append(fingerprint())
    assert len(set(prints)) == 4


def test_a_template_has_each_part_once():
    key = TextKey("{a}{{}}{b.c}")
    assert key.keys == ["a", "b.c"]
    assert key.text("", {"a": "x", "b": {"c": 1.5}}, "strict") == ("x{}1.5", "")
    assert key.text("", {"a": "", "b": {"c": ""}}, "strict") == (
        "",
        "row whose '{a}{{}}{b.c}' is empty",
    )
    with pytest.raises(UserError, match=r"'a' is bool \(keys: 'a', 'b\.c'\)"):
        key.text("", {"a": True, "b": {"c": "x"}}, "strict")


# -------------------------------------------------------------------------- library `datasets`


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A local folder that the library opens without the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_OFFLINE", True)
    rows = [{"text": t, "m": {"n": i}} for i, t in enumerate(["one", None, "two"])]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write(tmp_path / "set", {"train.jsonl": lines, "test.jsonl": '{"text": "t", "m": {"n": 9}}'})
    monkeypatch.chdir(tmp_path)
    return "set"


def test_datasets_are_read_as_a_stream(dataset, tmp_path):
    done = command(tmp_path, "--dataset", dataset)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == TWO
    assert "left out: row whose 'text' is null: 1 (set:2)\n" in done.stdout
    for words, texts in (
        (["--split", "test"], ["t"]),
        (["--text_key", "m.n"], None),
        (["--text_key", "{m.n}: {text}"], ["0: one", "2: two"]),
    ):
        done = command(tmp_path, "--force", "--dataset", dataset, *words)
        if texts is None:
            assert_refused(done, "set:1: 'm.n' is int")
        else:
            assert done.returncode == 0, done.stderr
            assert written(tmp_path) == texts


def test_datasets_have_a_fingerprint(dataset):
    reading = Reading(dataset=dataset)
    first = Corpus(None, reading, []).fingerprint()
    assert Corpus(None, reading, []).fingerprint() == first
    assert Corpus(None, Reading(dataset=dataset, split="test"), []).fingerprint() != first
    os.utime("set/train.jsonl", ns=(1, 1))
    assert Corpus(None, reading, []).fingerprint() != first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset none/such", r"--dataset: none/such cannot be read \(.+\); check --dataset,"),
        ("--dataset ./empty", r"--dataset: \./empty cannot be read \(.+\); check --dataset"),
        (
            "--dataset set --config x",
            r"\(BuilderConfig 'x' not found.+\); check --dataset, --config",
        ),
        (
            "--dataset set --split x",
            r"\(Bad split: x\. .+\); check --dataset, --config and --split",
        ),
        ("--dataset set --text_key x", r"set: no 'x' in any row \(keys: 'text', 'm'\); pass"),
        ("--dataset bad", r"--dataset: bad cannot be read \(.+\)"),
        ("--dataset code", r"--dataset: code cannot be read \(.+\)"),
    ],
)
def test_datasets_that_cannot_be_read_are_refused_in_one_line(dataset, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path, {"bad/train.jsonl": ROWS + "{bad", "code/code.py": "open('ran', 'w')"})
    done = command(tmp_path, *words.split())
    assert_refused(done)
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.zst": b"\x28\xb5\x2f\xfd" + b"x" * 9})
    for module in ("datasets", "pyarrow", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    done = command(tmp_path, "--dataset", "any")
    assert_refused(done, "datasets: is not installed; pip install datasets")
    done = command(tmp_path, "--input", "a.zst")
    assert_refused(done, "pyarrow: is not installed; pip install pyarrow")
