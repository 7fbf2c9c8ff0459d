"""Text to tokens: writes the train.bin, val.bin, vocab.txt and tokenizer.json that testv2.py reads.

    python data/prepare.py                                    # sample corpus: Python's own library
    python data/prepare.py --input book.txt --tokenizer byte  # the book's end is validation
    python data/prepare.py --input texts/ more.jsonl --vocab_size 16384 --output_dir ./data/mine
    python data/prepare.py --input rows.parquet --text_key body --tokenizer path/to/tokenizer.json
    python data/prepare.py --input texts/ --tokenizer gpt2    # needs tiktoken, and once the network

A text file is one document, as is a JSONL line or a Parquet row; each one's end is a token.
Whole documents go to training or validation, by a hash of their path or, for a row, of its text;
only where there are fewer than 20 text files does the end of each one become validation instead.
Beside each .bin file a .json file gives its dtype, vocabulary size, end-of-text id and counts.
Memory does not grow with the input.
"""

import codecs
import hashlib
import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, trainers
from tqdm import tqdm

if not __package__:  # a script, whose siblings are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tinymamba.cli import CliParser, UserError, need, run_cli
from tinymamba.tokenizer import (
    EOS_TOKEN,
    SimpleTokenizer,
    byte_alphabet,
    byte_level,
    byte_tokenizer,
)

OUTPUTS = ("train.bin", "val.bin", "train.json", "val.json", "vocab.txt", "tokenizer.json")
READ_BYTES = 1 << 20  # read from disk at a time
PIECE_CHARS = 1 << 16  # tokenized as one string
BATCH_CHARS = 1 << 20  # tokenized in one call, on all cores; takes up to 350 bytes for each
FEW_FILES = 20  # below this, whole files are too coarse for a validation split
LINE_BREAK = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
NOT_SAMPLE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
NOT_SAMPLE |= {"encodings", "pydoc_data"}  # tables and generated text

Files = list[tuple[str, Path]]  # each with a key, by which it is split: its path in a folder


def flag(default, text, **argparse_options):
    return field(default=default, metadata={"help": text, **argparse_options})


@dataclass
class Options:
    """The command line."""

    input: list[str] | None = flag(None, "text, .jsonl, .parquet, folders [sample]", nargs="+")
    tokenizer: str = flag("bpe", "byte, bpe, gpt2, or a tokenizer.json or its folder")
    vocab_size: int = flag(4096, "number of tokens that bpe learns", type=int)
    bpe_sample_bytes: int = flag(200_000_000, "bytes of text that bpe learns from", type=int)
    eos_token: str | None = flag(None, "end-of-text token of a tokenizer.json that does not tell")
    text_key: str = flag("text", "JSONL key or Parquet column that holds the text")
    val_fraction: float = flag(0.05, "share of the text for validation", type=float)
    output_dir: str = flag("./data/text", "folder for the files written")
    dtype: str = flag("int32", "of tokens in the .bin files", choices=["int32", "uint16"])
    encoding_errors: str = flag("strict", "about bad UTF-8", choices=["strict", "replace"])
    force: bool = flag(False, "replace files that exist", action="store_true")


def check(options: Options) -> None:
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
    if vocab_size > np.iinfo(dtype).max + 1:
        raise UserError("--dtype", f"{vocab_size} tokens do not fit in {dtype}", "use int32")


# ------------------------------------------------------------------------------- input files


def walk(root: Path, left_out: Iterable[str] = ()) -> Files:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "." and name not in left_out]
        paths = [Path(folder, name) for name in names if name[0] != "."]
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(found)


def input_files(names: list[str], own: set[Path]) -> Files:
    """`own` are the files of an earlier run, which may lie in a folder that is read."""
    files, skipped = {}, 0
    for name in names:
        root = Path(name)
        if not root.exists():
            raise UserError(name, "no such file or folder", "check --input")
        found = walk(root) if root.is_dir() else [(root.as_posix(), root)]
        found = [pair for pair in found if pair[1].resolve() not in own and pair[1].stat().st_size]
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
    with open(path, "rb") as file:
        return path.suffix.lower() != ".parquet" and b"\0" in file.read(8192)


def sample_files() -> Files:
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
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# --------------------------------------------------------------------------------- documents


def pieces(files: Files, options: Options, label: str) -> Iterator[tuple[str, str, bool]]:
    """Side ("train" or "val"), text, and whether a document ends with it."""
    total = sum(path.stat().st_size for _, path in files)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        for side, chunks in documents(files, options, bar):
            for text, last in cut(chunks):
                yield side, text, last


def documents(files: Files, options: Options, bar: tqdm) -> Iterator[tuple[str, Iterable[str]]]:
    fraction, errors = options.val_fraction, options.encoding_errors
    shares = [share(key) for key, path in files if not is_table(path)]
    # At least one text file is validation, even where chance would leave none.
    limit = max(fraction, min(shares, default=0))
    for key, path in files:
        size = path.stat().st_size
        if is_table(path):
            for text in filter(None, rows(path, options, bar)):
                yield "val" if share(text) < fraction else "train", [text]
        elif len(shares) >= FEW_FILES:
            side = "val" if share(key) <= limit else "train"
            yield side, read_text(path, 0, size, errors, bar)
        else:
            middle = val_start(path, size, fraction)
            for side, start, stop in (("train", 0, middle), ("val", middle, size)):
                if start < stop:
                    yield side, read_text(path, start, stop, errors, bar)


def share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, spread evenly."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_table(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".parquet")


def val_start(path: Path, size: int, fraction: float) -> int:
    """Where a file's validation text starts: after a line break if one is near."""
    start = size - int(size * fraction)
    with open(path, "rb") as file:
        file.seek(start)
        near = file.read(max(3, min(READ_BYTES, (size - start) // 2)))
    inside_character = len(near) - len(near.lstrip(bytes(range(0x80, 0xC0))))
    return start + (near.find(b"\n") + 1 or inside_character)


def read_text(path: Path, start: int, stop: int, errors: str, bar: tqdm) -> Iterator[str]:
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
    remedy = "convert it, or pass --encoding_errors replace"
    return UserError(str(path), f"not UTF-8 at byte {offset}", remedy)


def cut(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Pieces that end at a line break where there is one; the flag marks the last."""
    rest = ""
    for chunk in chunks:
        text, start = rest + chunk, 0
        while len(text) - start > PIECE_CHARS:
            end = text.rfind("\n", start, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
            yield text[start:end], False
            start = end
        rest = text[start:]
    yield rest, True


def rows(path: Path, options: Options, bar: tqdm) -> Iterator[str]:
    key = options.text_key
    read = jsonl_rows if path.suffix.lower() == ".jsonl" else parquet_rows
    for where, row in read(path, options, bar):
        if not isinstance(row, dict):
            raise UserError(where, "not a JSON object", f'write {{"{key}": "..."}} on each line')
        if not isinstance(row.get(key), str):
            problem = f"{key!r} is {type(row[key]).__name__}" if key in row else f"no {key!r}"
            keys = ", ".join(map(repr, row))
            raise UserError(where, f"{problem} (keys: {keys})", "pass --text_key KEY")
        try:  # JSON can spell half of a surrogate pair, which is no character
            yield row[key].encode("utf-8", options.encoding_errors).decode("utf-8")
        except UnicodeEncodeError:
            remedy = "correct it, or pass --encoding_errors replace"
            raise UserError(where, "half a surrogate pair in the text", remedy) from None


def jsonl_rows(path: Path, options: Options, bar: tqdm) -> Iterator[tuple[str, object]]:
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
                raise UserError(f"{path}:{number}", problem, "one JSON object a line") from None


def parquet_rows(path: Path, options: Options, bar: tqdm) -> Iterator[tuple[str, object]]:
    parquet, number = need("pyarrow.parquet"), 0
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
    except (ValueError, OSError) as error:  # how pyarrow says: damaged, or not UTF-8
        problem = f"not readable as Parquet ({str(error).splitlines()[0]})"
        raise UserError(str(path), problem, "write the file again") from None


# -------------------------------------------------------------------------------- tokenizers


def train_bpe(files: Files, options: Options) -> Tokenizer:
    def sample() -> Iterator[str]:
        left = options.bpe_sample_bytes
        for side, text, _ in pieces(files, options, "learning bpe"):
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
    """tiktoken keeps each token's rank, not the two parts it was merged from: they are what its
    bytes become when only lower ranks merge them."""
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
    try:
        encoding = need("tiktoken").get_encoding("gpt2")
    except OSError as error:
        problem = f"its vocabulary cannot be fetched ({type(error).__name__})"
        remedy = "go online once, or pass --tokenizer PATH of a local tokenizer.json"
        raise UserError("--tokenizer gpt2", problem, remedy) from None
    return bpe_from_ranks(encoding._mergeable_ranks)


def local_tokenizer(name: str, eos_token: str | None) -> tuple[Tokenizer, int]:
    path = Path(name, "tokenizer.json") if Path(name).is_dir() else Path(name)
    if not path.is_file() or path.suffix != ".json":
        remedy = "pass byte, bpe, gpt2 or the path of a tokenizer.json"
        raise UserError("--tokenizer", f"{path} is no tokenizer.json", remedy)
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
    """The tokenizer and its end-of-text id."""
    if options.tokenizer not in ("byte", "bpe", "gpt2"):
        return local_tokenizer(options.tokenizer, options.eos_token)
    if options.tokenizer == "byte":
        tokenizer = byte_tokenizer()
    else:
        tokenizer = train_bpe(files, options) if options.tokenizer == "bpe" else gpt2_tokenizer()
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer, tokenizer.token_to_id(EOS_TOKEN)


# ------------------------------------------------------------------------------ output files


def encode(stream: Iterable, tokenizer: Tokenizer, folder: Path, facts: dict[str, dict]) -> None:
    """Writes the .bin files and counts what they hold in `facts`."""
    tokenizer.encode_special_tokens = True  # an end-of-text token spelled out in a text is text
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for batch in batches(stream):
            texts = [text for _, text, _ in batch]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for (side, text, last), encoding in zip(batch, encodings, strict=True):
                fact, file = facts[side], train if side == "train" else val
                ids = encoding.ids + ([fact["eos_id"]] if last else [])
                file.write(np.array(ids, fact["dtype"]).tobytes())
                fact["tokens"] += len(ids)
                fact["bytes"] += len(text.encode())


def batches(stream: Iterable) -> Iterator[list]:
    batch, chars = [], 0
    for piece in stream:
        batch.append(piece)
        chars += len(piece[1])
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def vocab_text(tokens: dict[int, str]) -> str:
    """Line i is token i, so a line break inside a token is written as its bytes, <0x0A>."""

    def escape(found: re.Match) -> str:
        return "".join(f"<0x{byte:02X}>" for byte in found[0].encode())

    lines = [tokens.get(i, f"<unused{i}>") for i in range(max(tokens) + 1)]
    return "".join(LINE_BREAK.sub(escape, line) + "\n" for line in lines)


def write_outputs(files: Files, options: Options, folder: Path) -> dict[str, dict]:
    tokenizer, eos = get_tokenizer(files, options)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    fact = {"dtype": options.dtype, "vocab_size": max(tokens) + 1, "eos_id": eos}
    check_fits(fact["vocab_size"], options.dtype)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text(vocab_text(tokens), encoding="utf-8", newline="\n")
    facts = {side: {**fact, "tokens": 0, "bytes": 0} for side in ("train", "val")}
    encode(pieces(files, options, "encoding"), tokenizer, folder, facts)
    for side, fact in facts.items():
        if not fact["tokens"]:
            remedy = "give more text or another --val_fraction"
            raise UserError("--input", f"nothing is left for {side}.bin", remedy)
        (folder / f"{side}.json").write_text(json.dumps(fact) + "\n")
    return facts


def prepare(options: Options) -> dict[str, dict]:
    """Writes the six files, or none: they take their names together once all are complete."""
    check(options)
    target = Path(options.output_dir)
    try:
        own = {target.resolve() / name for name in OUTPUTS}
        files = input_files(options.input, own) if options.input else sample_files()
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=target) as folder:
            facts = write_outputs(files, options, Path(folder))
            for name in OUTPUTS:
                os.replace(Path(folder, name), target / name)
    except OSError as error:
        where, problem = str(error.filename or target), error.strerror or str(error)
        raise UserError(where, problem, "check its permissions and the room on disk") from None
    for side, fact in facts.items():
        tokens, count = fact["tokens"], fact["bytes"]
        ratio = f"{count / tokens:.2f} bytes per token"
        print(f"{target / side}.bin: {tokens:,} tokens, {count:,} bytes, {ratio}")
    return facts


def main(argv: list[str] | None = None) -> None:
    parser = CliParser(
        usage="python data/prepare.py [--FLAG VALUE ...]",
        description=__doc__,
        epilog="Defaults stand in [brackets].",
    )
    for option in fields(Options):
        kind = dict(option.metadata)
        if option.default:
            kind["help"] += f" [{option.default}]"
        parser.add_argument(f"--{option.name}", default=option.default, **kind)
    prepare(Options(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    run_cli(main)
