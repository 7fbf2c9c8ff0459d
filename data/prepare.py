"""Text to tokens: writes the train.bin, val.bin, vocab.txt and tokenizer.json that testv2.py reads.

    python data/prepare.py                                    # sample corpus: Python's own library
    python data/prepare.py --input book.txt --tokenizer byte  # the end of the book is validation
    python data/prepare.py --input texts/ more.jsonl --vocab_size 16384 --output_dir ./data/mine
    python data/prepare.py --input rows.parquet --text_key body --tokenizer path/to/tokenizer.json
    python data/prepare.py --input texts/ --tokenizer gpt2    # needs tiktoken, and once the network

A text file is one document, and so is each JSONL line and each Parquet row; an end-of-text token
follows every document. Whole documents go to training or validation, by a hash of the file's path
or of the row's text. With fewer than 20 text files, the end of each file is validation instead.
Beside each .bin file, a .json file has its dtype, vocabulary size, end-of-text id and counts.
Memory does not grow with the input.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, trainers
from tqdm import tqdm

if not __package__:  # run as a script: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tinymamba.cli import UserError, need, parse_flags, run_cli
from tinymamba.tokenizer import (
    EOS_TOKEN,
    SimpleTokenizer,
    byte_alphabet,
    byte_level,
    byte_tokenizer,
)

OUTPUTS = ("train.bin", "val.bin", "train.json", "val.json", "vocab.txt", "tokenizer.json")
READ_BYTES = 1 << 20  # read from disk at a time
CHUNK_CHARS = 1 << 16  # longest string that is tokenized at once
BATCH_CHARS = 1 << 20  # tokenized in one call, on all cores; needs up to 350 bytes of memory each
FEW_FILES = 20  # with fewer, whole files are too coarse for a validation split
LINE_BREAK = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
NOT_SAMPLE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
NOT_SAMPLE |= {"encodings", "pydoc_data"}  # tables and generated text


@dataclass
class Options:
    """The command line."""

    # Input
    input: list[str] | None = None  # text, .jsonl, .parquet, folders; None is Python's own library
    text_key: str = "text"  # JSONL key or Parquet column that has the text
    encoding_errors: str = "strict"  # what to do about invalid UTF-8
    val_fraction: float = 0.05  # share of the text for validation
    # Tokenizer
    tokenizer: str = "bpe"  # byte, bpe, gpt2, or a tokenizer.json or its folder
    vocab_size: int = 4096  # number of tokens that bpe learns
    bpe_sample_bytes: int = 200_000_000  # bytes of text that bpe learns from
    eos_token: str | None = None  # end-of-text token, if the tokenizer.json names none
    # Output
    output_dir: str = "./data/text"  # folder for the files written
    dtype: str = "int32"  # of the tokens in the .bin files
    force: bool = False  # replace files that exist

    CHOICES: ClassVar = {"dtype": ("int32", "uint16"), "encoding_errors": ("strict", "replace")}


def check(options: Options) -> None:
    """Reject options that cannot work, and outputs that exist."""
    if not 0 < options.val_fraction < 1:
        raise UserError("--val_fraction", f"{options.val_fraction} is not in (0, 1)", "try 0.05")
    if options.tokenizer == "bpe":
        check_fits(options.vocab_size, options.dtype)
        if options.vocab_size < 257:
            problem = f"{options.vocab_size} cannot hold the 256 bytes and {EOS_TOKEN}"
            raise UserError("--vocab_size", problem, "use 257 or more")
    for path in (Path(options.output_dir, name) for name in OUTPUTS):
        if path.exists() and not options.force:
            raise UserError(str(path), "exists", "pass --force or another --output_dir")


def check_fits(vocab_size: int, dtype: str) -> None:
    """Reject a vocabulary with ids that the dtype cannot hold."""
    if vocab_size > np.iinfo(dtype).max + 1:
        raise UserError("--dtype", f"{vocab_size} tokens do not fit in {dtype}", "use int32")


# ------------------------------------------------------------------------------- input files

Files = list[tuple[str, Path]]  # each with a key that decides its side: its path in a folder


def walk(root: Path, excluded: Iterable[str] = ()) -> Files:
    """All files below a folder, without hidden ones and excluded folders."""
    found: Files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "." and name not in excluded]
        paths = [Path(folder, name) for name in names if name[0] != "."]
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(found)


def input_files(names: list[str], outputs: set[Path]) -> Files:
    """The files of --input, without `outputs`: an earlier run may have written into its folder."""
    files: dict[Path, tuple[str, Path]] = {}
    skipped = 0
    for name in names:
        root = Path(name)
        if not root.exists():
            raise UserError(name, "no such file or folder", "check --input")
        found = walk(root) if root.is_dir() else [(root.as_posix(), root)]
        found = [pair for pair in found if pair[1].resolve() not in outputs]
        found = [pair for pair in found if pair[1].stat().st_size]
        texts = [pair for pair in found if not is_binary(pair[1])]
        if not texts:
            problem = "is binary" if found else "is empty"
            raise UserError(name, problem, "give UTF-8 text, .jsonl or .parquet")
        skipped += len(found) - len(texts)
        files.update((pair[1].resolve(), pair) for pair in texts)
    if skipped:
        print(f"skipped binary files: {skipped}")
    return list(files.values())


def is_binary(path: Path) -> bool:
    """Whether a file other than Parquet has a zero byte near its start."""
    with open(path, "rb") as file:
        return path.suffix.lower() != ".parquet" and b"\0" in file.read(8192)


def sample_files() -> Files:
    """The sample corpus: the source of Python's own library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [pair for pair in walk(root, NOT_SAMPLE) if pair[1].suffix == ".py"]
    sources = [pair for pair in found if pair[1].stat().st_size]
    files = [pair for pair in sources if is_utf8(pair[1])]
    if len(files) < FEW_FILES:
        raise UserError(str(root), "Python's library has no source there", "pass --input")
    if len(files) < len(sources):
        print(f"skipped files that are not UTF-8: {len(sources) - len(files)}")
    return files


def is_utf8(path: Path) -> bool:
    """Whether all of a file is valid UTF-8."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# --------------------------------------------------------------------------------- documents


class Chunk(NamedTuple):
    """A part of a document, short enough to be tokenized at once."""

    side: str  # "train" or "val"
    text: str
    last: bool  # the document ends here


def chunks(files: Files, options: Options, label: str) -> Iterator[Chunk]:
    """All documents in chunks, with a progress bar."""
    total = sum(path.stat().st_size for _, path in files)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        for side, parts in documents(files, options, bar):
            for text, last in split_at_lines(parts):
                yield Chunk(side, text, last)


def documents(files: Files, options: Options, bar: tqdm) -> Iterator[tuple[str, Iterable[str]]]:
    """The side of each document, and its text in parts as read from disk."""
    fraction, errors = options.val_fraction, options.encoding_errors
    hashes = [hash_fraction(key) for key, path in files if not is_table(path)]
    # At least one text file is validation, however small the fraction.
    limit = max(fraction, min(hashes, default=0))
    for key, path in files:
        size = path.stat().st_size
        if is_table(path):
            for text in filter(None, rows(path, options, bar)):
                yield "val" if hash_fraction(text) < fraction else "train", [text]
        elif len(hashes) >= FEW_FILES:
            side = "val" if hash_fraction(key) <= limit else "train"
            yield side, read_text(path, 0, size, errors, bar)
        else:
            middle = val_start(path, size, fraction)
            for side, start, stop in (("train", 0, middle), ("val", middle, size)):
                if start < stop:
                    yield side, read_text(path, start, stop, errors, bar)


def hash_fraction(key: str) -> float:
    """A hash of the key, evenly distributed in [0, 1)."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_table(path: Path) -> bool:
    """Whether each row of the file is a document."""
    return path.suffix.lower() in (".jsonl", ".parquet")


def val_start(path: Path, size: int, fraction: float) -> int:
    """The offset of a file's validation text: after a line break, or else between characters."""
    start = size - int(size * fraction)
    with open(path, "rb") as file:
        file.seek(start)
        near = file.read(max(3, min(READ_BYTES, (size - start) // 2)))
    inside_character = len(near) - len(near.lstrip(bytes(range(0x80, 0xC0))))
    return start + (near.find(b"\n") + 1 or inside_character)


def read_text(path: Path, start: int, stop: int, errors: str, bar: tqdm) -> Iterator[str]:
    """The text of a file between two byte offsets, READ_BYTES at a time."""
    decoder, raw = codecs.getincrementaldecoder("utf-8")(errors), None
    with open(path, "rb") as file:
        file.seek(start)
        while raw != b"":
            raw = file.read(min(READ_BYTES, stop - file.tell()))
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise not_utf8(path, file.tell() - len(error.object) + error.start) from None
            bar.update(len(raw))
            yield text


def not_utf8(path: Path, offset: int) -> UserError:
    """The error for a byte that is not UTF-8."""
    remedy = "convert it, or pass --encoding_errors replace"
    return UserError(str(path), f"not UTF-8 at byte {offset}", remedy)


def split_at_lines(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Strings of at most CHUNK_CHARS that end at a line break if they have one; True if last."""
    rest = ""
    for part in parts:
        text, start = rest + part, 0
        while len(text) - start > CHUNK_CHARS:
            end = text.rfind("\n", start, start + CHUNK_CHARS) + 1 or start + CHUNK_CHARS
            yield text[start:end], False
            start = end
        rest = text[start:]
    yield rest, True


def rows(path: Path, options: Options, bar: tqdm) -> Iterator[str]:
    """The text of each row of a table."""
    key = options.text_key
    read = jsonl_rows if path.suffix.lower() == ".jsonl" else parquet_rows
    for where, row in read(path, options, bar):
        if not isinstance(row, dict):
            raise UserError(where, "not a JSON object", f'write {{"{key}": "..."}} on each line')
        if not isinstance(row.get(key), str):
            problem = f"{key!r} is {type(row[key]).__name__}" if key in row else f"no {key!r}"
            keys = ", ".join(map(repr, row))
            raise UserError(where, f"{problem} (keys: {keys})", "pass --text_key KEY")
        try:  # JSON can spell half of a surrogate pair, which is not a character
            yield row[key].encode("utf-8", options.encoding_errors).decode("utf-8")
        except UnicodeEncodeError:
            remedy = "correct it, or pass --encoding_errors replace"
            raise UserError(where, "half a surrogate pair in the text", remedy) from None


def jsonl_rows(path: Path, options: Options, bar: tqdm) -> Iterator[tuple[str, Any]]:
    """The place and the value of each line that is not empty."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            bar.update(len(raw))
            try:
                line = raw.decode("utf-8-sig", options.encoding_errors)
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
            except UnicodeDecodeError as error:
                raise not_utf8(path, file.tell() - len(error.object) + error.start) from None
            except json.JSONDecodeError as error:
                problem = f"not JSON ({error.msg} at column {error.colno})"
                remedy = "write one JSON object per line"
                raise UserError(f"{path}:{number}", problem, remedy) from None


def parquet_rows(path: Path, options: Options, bar: tqdm) -> Iterator[tuple[str, Any]]:
    """The place and the text column of each row; without that column, the names of all columns."""
    parquet: Any = need("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if options.text_key not in columns:
                yield str(path), dict.fromkeys(columns)
            for batch in file.iter_batches(1024, columns=[options.text_key]):
                bar.update(path.stat().st_size * len(batch) / file.metadata.num_rows)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (ValueError, OSError) as error:  # pyarrow: the file is damaged, or not UTF-8
        problem = f"not readable as Parquet ({str(error).splitlines()[0]})"
        raise UserError(str(path), problem, "write the file again") from None


# -------------------------------------------------------------------------------- tokenizers


def train_bpe(files: Files, options: Options) -> Tokenizer:
    """A BPE tokenizer learned from the training text."""

    def sample() -> Iterator[str]:
        left = options.bpe_sample_bytes
        for side, text, _ in chunks(files, options, "learning bpe"):
            if left <= 0:
                print(f"bpe learns from the first {options.bpe_sample_bytes:,} bytes only")
                return
            if side == "train":
                left -= len(text.encode())
                yield text

    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    tokenizer = byte_level(models.BPE())
    tokenizer.train_from_iterator(sample(), trainer)
    if tokenizer.get_vocab_size() < options.vocab_size:
        print(f"the text gives {tokenizer.get_vocab_size()} tokens, not {options.vocab_size}")
    return tokenizer


def bpe_from_ranks(mergeable_ranks: dict[bytes, int]) -> Tokenizer:
    """A BPE tokenizer from the ranks of tiktoken.

    Ranks do not tell which two parts a token was merged from. The parts are what its bytes become
    when only lower ranks are merged.
    """
    alphabet = byte_alphabet()
    name = {token: "".join(alphabet[byte] for byte in token) for token in mergeable_ranks}
    merges = []
    for token, rank in sorted(mergeable_ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
            ranks = [mergeable_ranks.get(pair, rank) for pair in pairs]
            if min(ranks) >= rank:
                break
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [pairs[i]]
        if len(parts) == 2:
            merges.append((name[parts[0]], name[parts[1]]))
    vocab = {name[token]: rank for token, rank in mergeable_ranks.items()}
    return byte_level(models.BPE(vocab, merges, ignore_merges=True))


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer, which tiktoken downloads once."""
    tiktoken: Any = need("tiktoken")
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:
        problem = f"its vocabulary cannot be fetched ({type(error).__name__})"
        remedy = "go online once, or pass --tokenizer PATH of a local tokenizer.json"
        raise UserError("--tokenizer gpt2", problem, remedy) from None
    return bpe_from_ranks(encoding._mergeable_ranks)


def local_tokenizer(name: str, eos_token: str | None) -> tuple[Tokenizer, int]:
    """The tokenizer of a tokenizer.json, and its end-of-text id."""
    path = Path(name, "tokenizer.json") if Path(name).is_dir() else Path(name)
    if not path.is_file() or path.suffix != ".json":
        remedy = "pass byte, bpe, gpt2 or the path of a tokenizer.json"
        raise UserError("--tokenizer", f"{path} is not a tokenizer.json", remedy)
    eos = SimpleTokenizer(str(path)).eos_token_id
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if eos_token is not None:
        eos = tokenizer.token_to_id(eos_token)
    if eos is None:
        problem = f"no token '{eos_token}'" if eos_token else "its end-of-text token is unknown"
        raise UserError(str(path), problem, "pass --eos_token with one of its tokens")
    return tokenizer, eos


def get_tokenizer(files: Files, options: Options) -> tuple[Tokenizer, int]:
    """The tokenizer of the options, and its end-of-text id."""
    if options.tokenizer not in ("byte", "bpe", "gpt2"):
        return local_tokenizer(options.tokenizer, options.eos_token)
    if options.tokenizer == "byte":
        tokenizer = byte_tokenizer()
    else:
        tokenizer = train_bpe(files, options) if options.tokenizer == "bpe" else gpt2_tokenizer()
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer, tokenizer.token_to_id(EOS_TOKEN)


# ------------------------------------------------------------------------------ output files


def encode(stream: Iterable[Chunk], tokenizer: Tokenizer, folder: Path, facts: dict) -> None:
    """Write the .bin files, and add their counts to the facts of each side."""
    tokenizer.encode_special_tokens = True  # an end-of-text token spelled out in a text is text
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for batch in batches(stream):
            texts = [chunk.text for chunk in batch]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for (side, text, last), encoding in zip(batch, encodings, strict=True):
                fact, file = facts[side], train if side == "train" else val
                ids = encoding.ids + ([fact["eos_id"]] if last else [])
                file.write(np.array(ids, fact["dtype"]).tobytes())
                fact["tokens"] += len(ids)
                fact["bytes"] += len(text.encode())


def batches(stream: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks in lists of about BATCH_CHARS characters."""
    batch: list[Chunk] = []
    chars = 0
    for chunk in stream:
        batch.append(chunk)
        chars += len(chunk.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def vocab_text(tokens: dict[int, str]) -> str:
    """The content of vocab.txt: line i is token i, with line breaks inside it as <0x0A>."""

    def escape(found: re.Match) -> str:
        return "".join(f"<0x{byte:02X}>" for byte in found[0].encode())

    lines = [tokens.get(i, f"<unused{i}>") for i in range(max(tokens) + 1)]
    return "".join(LINE_BREAK.sub(escape, line) + "\n" for line in lines)


def write_outputs(files: Files, options: Options, folder: Path) -> dict[str, dict]:
    """Write all OUTPUTS; returns the facts of each side."""
    tokenizer, eos = get_tokenizer(files, options)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    fact: dict[str, Any] = {"dtype": options.dtype, "vocab_size": max(tokens) + 1, "eos_id": eos}
    check_fits(fact["vocab_size"], options.dtype)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text(vocab_text(tokens), encoding="utf-8", newline="\n")
    facts = {side: {**fact, "tokens": 0, "bytes": 0} for side in ("train", "val")}
    encode(chunks(files, options, "encoding"), tokenizer, folder, facts)
    for side, fact in facts.items():
        if not fact["tokens"]:
            remedy = "give more text or another --val_fraction"
            raise UserError("--input", f"nothing is left for {side}.bin", remedy)
        text = json.dumps(fact) + "\n"
        (folder / f"{side}.json").write_text(text, encoding="utf-8", newline="\n")
    return facts


def prepare(options: Options) -> dict[str, dict]:
    """Write all OUTPUTS, or none: they are renamed into place once all are complete."""
    check(options)
    target = Path(options.output_dir)
    try:
        outputs = {target.resolve() / name for name in OUTPUTS}
        files = input_files(options.input, outputs) if options.input else sample_files()
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=target) as folder:
            facts = write_outputs(files, options, Path(folder))
            for name in OUTPUTS:
                os.replace(Path(folder, name), target / name)
    except OSError as error:
        where, problem = str(error.filename or target), error.strerror or str(error)
        raise UserError(where, problem, "check its permissions and the free space") from None
    for side, fact in facts.items():
        tokens, count = fact["tokens"], fact["bytes"]
        ratio = f"{count / tokens:.2f} bytes per token"
        print(f"{target / side}.bin: {tokens:,} tokens, {count:,} bytes, {ratio}")
    return facts


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python data/prepare.py [--FLAG VALUE ...]"
    prepare(parse_flags(Options, argv, usage, __doc__))
    return 0


if __name__ == "__main__":
    run_cli(main)
