"""data/prepare.py: documents, the split, tokenizers, files and errors."""

import codecs
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from helpers import POSIX, ROOT, assert_refused, run_main, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data import prepare, vocabulary
from tinymamba.cli import UserError
from tinymamba.tokenizer import SimpleTokenizer, byte_alphabet, byte_level, byte_tokenizer

EOS = "<|endoftext|>"
NAMES = ["tokenizer.json", "train.bin", "train.json", "val.bin", "val.json", "vocab.txt"]
SENTENCES = "Grüße aus Köln\tund “viel” 日本語🙂.\r\nA second line,  with   spaces.\n\n"


def run(folder, *flags):
    """The command in this process."""
    done = run_main(prepare.main, *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def make(folder, *inputs, **options):
    """The same without the command line."""
    paths = [str(folder / name) for name in inputs]
    options = {"output_dir": str(folder / "out"), "tokenizer": "byte", **options}
    prepare.prepare(prepare.Options(input=paths, **options))
    return Prepared(Path(options["output_dir"]))


class Prepared:
    """What a run left in a folder."""

    def __init__(self, folder):
        assert sorted(path.name for path in folder.iterdir()) == NAMES
        self.folder = folder
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.facts = {s: json.loads((folder / f"{s}.json").read_text()) for s in ("train", "val")}

    def ids(self, side):
        return np.fromfile(self.folder / f"{side}.bin", self.facts[side]["dtype"])

    @functools.cache  # noqa: B019
    def texts(self, side):
        """The documents, each of which must have ended with the end-of-text id."""
        ids, eos = self.ids(side), self.facts[side]["eos_id"]
        assert ids[-1] == eos
        documents = np.split(ids, np.flatnonzero(ids == eos) + 1)[:-1]
        return self.tokenizer.decode_batch([document[:-1] for document in documents])

    def all_texts(self):
        return self.texts("train") + self.texts("val")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    done = run_script(
        "data/prepare.py", "--vocab_size", 512, "--bpe_sample_bytes", 2_000_000, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    prepared = Prepared(folder / "data" / "text")
    prepared.stdout = done.stdout
    return prepared


# ----------------------------------------------------------------------------- sample corpus


def library_texts():
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        folders = set(path.relative_to(root).parts[:-1])
        if not folders & {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}:
            yield path, path.read_bytes()


def test_sample_holds_every_library_file_once(sample):
    expected = sorted(data for _, data in library_texts() if data)
    assert sorted(text.encode() for text in sample.all_texts()) == expected


def test_sample_shares_no_file_between_sides(sample):
    train, val = (set(sample.texts(side)) for side in ("train", "val"))
    assert not train & val
    assert 0.01 < len(val) / len(train | val) < 0.12


def test_sidecars_are_true(sample):
    for side, facts in sample.facts.items():
        assert facts == {
            "dtype": "int32",
            "vocab_size": 512,
            "eos_id": 0,
            "tokens": (sample.folder / f"{side}.bin").stat().st_size // 4,
            "bytes": sum(len(text.encode()) for text in sample.texts(side)),
            "tokenizer": SimpleTokenizer(sample.folder / "tokenizer.json").sha256,
        }
        assert sample.ids(side).min() >= 0
        assert sample.ids(side).max() < 512


def test_last_lines_report_the_counts(sample):
    lines = sample.stdout.splitlines()[-2:]
    for line, (side, facts) in zip(lines, sample.facts.items(), strict=True):
        ratio = facts["bytes"] / facts["tokens"]
        counts = f"{facts['tokens']:,} tokens, {facts['bytes']:,} bytes"
        assert line.endswith(f"{side}.bin: {counts}, {ratio:.2f} bytes per token")


def test_vocab_lines_are_the_tokens_in_order(sample):
    lines = (sample.folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [sample.tokenizer.id_to_token(i) for i in range(512)]
    assert lines[0] == EOS


def test_simple_tokenizer_reads_the_outputs(sample):
    tokenizer = SimpleTokenizer(sample.folder / "tokenizer.json")
    text = sample.texts("val")[0]
    ids = sample.ids("val")[: len(tokenizer.encode(text)) + 1].tolist()
    assert ids == [*tokenizer.encode(text), tokenizer.eos_token_id]
    by_list = SimpleTokenizer(sample.folder / "vocab.txt")
    assert by_list.decode(ids[:-1]) == text
    assert by_list.eos_token_id == 0


# --------------------------------------------------------------------------------- documents


def test_bytes_are_kept_exactly_and_the_end_is_validation(tmp_path):
    text = SENTENCES * 300
    (tmp_path / "a.txt").write_bytes(text.encode())
    made = make(tmp_path, "a.txt")
    assert made.facts["train"]["vocab_size"] == 257
    sides = [made.ids(side) for side in ("train", "val")]
    assert [side[-1] for side in sides] == [256, 256]
    train, val = (bytes(side[:-1].astype(np.uint8)) for side in sides)
    assert train + val == text.encode()
    assert train.endswith(b"\n")
    assert 0.02 < len(val) / len(text.encode()) <= 0.05


def test_jsonl_parquet_and_folder_give_whole_documents(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"{kind} {i}: {SENTENCES}" for kind in "jpf" for i in range(60)]
    lines = [json.dumps({"n": 1, "body": text}) for text in [*texts[:60], ""]]
    (tmp_path / "in" / "deep" / ".hidden").mkdir(parents=True)
    (tmp_path / "in" / "rows.jsonl").write_text("\n\n".join(lines), encoding="utf-8-sig")
    pq.write_table(pa.table({"body": texts[60:120]}), tmp_path / "in" / "rows.parquet")
    for i, text in enumerate(texts[120:]):
        (tmp_path / "in" / "deep" / f"{i}.md").write_bytes(text.encode())
    (tmp_path / "in" / "deep" / ".hidden" / "no.txt").write_text("hidden")
    (tmp_path / "in" / ".no.txt").write_text("hidden")
    (tmp_path / "in" / "empty.txt").write_text("")
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\0\0")
    flags = "--text_key body --val_fraction 0.2 --dtype uint16 --vocab_size 300 --output_dir in/out"
    done = run(tmp_path, "--input", "in", *flags.split())
    made = Prepared(tmp_path / "in" / "out")
    assert sorted(made.all_texts()) == sorted(texts)
    assert 0.1 < len(made.texts("val")) / len(texts) < 0.3
    for line in ("binary: 1 (in/picture.png)", "empty: 1 (in/empty.txt)", "hidden: 2 (in/"):
        assert f"left out: {line}" in done.stdout.replace(os.sep, "/")
    assert made.facts["val"]["dtype"] == "uint16"

    before = contents(made.folder)  # made inside the input folder: not to be read as input
    words = ["--input", "in", "--force", *flags.split()]
    one_thread = {"RAYON_NUM_THREADS": "1"}
    done = run_script("data/prepare.py", *words, cwd=tmp_path, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert contents(made.folder) == before


@pytest.mark.parametrize("damaged", [range(4, 900), range(-900, -4), range(-4, 0)])
def test_damaged_parquet_is_named(tmp_path, damaged):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(200)]}), tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    for i in damaged:
        data[i] ^= 0x5A
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet: not readable as Parquet \(.*\); write it"):
        make(tmp_path, "a.parquet")


def test_equal_rows_fall_on_one_side(tmp_path):
    lines = [json.dumps({"text": f"row {i}"}) + "\n" for i in range(100)] * 3
    (tmp_path / "a.jsonl").write_text("".join(lines))
    made = make(tmp_path, "a.jsonl", val_fraction=0.3)
    assert not set(made.texts("train")) & set(made.texts("val"))
    assert len(made.all_texts()) == 300


def test_twenty_files_are_split_whole_and_one_is_validation(tmp_path):
    texts = [f"file {i}\n" * 50 for i in range(20)]
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i}.txt").write_text(text)
    made = make(tmp_path, "in", val_fraction=1e-6)
    assert sorted(made.all_texts()) == sorted(texts)
    assert len(made.texts("val")) == 1


def test_bpe_learns_from_training_text_only(tmp_path):
    (tmp_path / "a.txt").write_text("plain words\n" * 98 + "zqzqzqzqzqz\n" * 2)
    make(tmp_path, "a.txt", tokenizer="bpe", vocab_size=300)
    vocab = (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert "words" in "".join(vocab)
    assert not any("zq" in token for token in vocab)


def test_bpe_sample_is_capped(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("".join(f"word{i:06}\n" for i in range(30_000)))
    make(tmp_path, "a.txt", tokenizer="bpe", vocab_size=300, bpe_sample_bytes=1000)
    assert "bpe learns from the first 1,000 bytes only" in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_special_text_in_documents_is_text(tmp_path, tokenizer):
    texts = [f"{i} {EOS}{EOS} end" for i in range(40)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    options = {"tokenizer": tokenizer, "vocab_size": 260, "val_fraction": 0.3}
    assert sorted(make(tmp_path, "a.jsonl", **options).all_texts()) == sorted(texts)


PEAKS = """
import resource
from data import encoding, prepare

encoding.BATCH_CHARS = 1 << 17  # else it hides what grows with the input
for name in ("small.txt", "large.txt"):
    options = prepare.Options([name], tokenizer="byte", output_dir="out", force=True)
    prepare.prepare(options)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@POSIX
def test_memory_does_not_grow_with_the_input(tmp_path):
    line = "How many bytes does a line like this one take? 日本\n"
    for name, megabytes in (("small.txt", 2), ("large.txt", 17)):
        text = line * (megabytes * 1_000_000 // len(line.encode()))
        (tmp_path / name).write_text(text, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", PEAKS]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    small, large = (int(peak) for peak in re.findall(r"peak (\d+)", done.stdout))
    unit = 1 if sys.platform == "darwin" else 1024
    assert (large - small) * unit < 60e6  # 15 MB more of text, 60 MB of tokens


# ---------------------------------------------------------------------------- existing files


def test_files_of_an_earlier_run_are_kept_unless_forced(tmp_path):
    (tmp_path / "a.txt").write_text("one two three\n" * 50)
    flags = ["--input", "a.txt", "--tokenizer", "byte", "--output_dir", "out"]
    run(tmp_path, *flags)
    for name in NAMES[1:]:
        (tmp_path / "out" / name).unlink()
    before = contents(tmp_path / "out")
    done = run_main(prepare.main, *flags, cwd=tmp_path)
    assert_refused(done, f"{Path('out', 'tokenizer.json')}: exists; pass --force")
    assert contents(tmp_path / "out") == before

    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n' * 5 + "bad\n")
    flags[1] = "b.jsonl"
    done = run_main(prepare.main, *flags, "--force", cwd=tmp_path)
    assert_refused(done, "b.jsonl:6: not JSON")
    assert contents(tmp_path / "out") == before
    flags[1] = "a.txt"
    run(tmp_path, *flags, "--force")
    Prepared(tmp_path / "out")


# --------------------------------------------------------------------------------- tokenizers


def save_word_tokenizer(folder, eos="</s>"):
    """A tokenizer with line breaks inside tokens, a hole in its ids, and a limit of 3 tokens."""
    words = ["a", "b", "\n", "c\r\nd", "e\u2028f", "?", eos]
    vocab = {word: i for i, word in enumerate(words)}
    vocab["late"] = 9
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=1000)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_local_tokenizer_is_used_as_it_is(tmp_path):
    save_word_tokenizer(tmp_path / "words")
    (tmp_path / "a.txt").write_text("a b late " * 50 + "\n")
    made = make(tmp_path, "a.txt", tokenizer=str(tmp_path / "words"))
    assert made.ids("train").tolist()[:6] == [0, 1, 9, 0, 1, 9]
    assert made.facts["train"]["eos_id"] == 6
    assert made.facts["train"]["vocab_size"] == 10
    assert 100 < len(made.ids("train")) < 160
    lines = (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:6] == ["a", "b", "<0x0A>", "c<0x0D><0x0A>d", "e<0xE2><0x80><0xA8>f", "?"]
    assert (lines[9], len(lines)) == ("late", 10)

    path = str(tmp_path / "words" / "tokenizer.json")
    made = make(tmp_path, "a.txt", tokenizer=path, eos_token="b", force=True)
    assert made.facts["val"]["eos_id"] == 1


def test_the_chat_template_comes_with_a_local_tokenizer(tmp_path):
    save_word_tokenizer(tmp_path / "words")
    (tmp_path / "words" / "chat_template.jinja").write_text("theirs")
    (tmp_path / "a.txt").write_text("a b late " * 50 + "\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "chat_template.jinja").write_text("mine")
    flags = ["--input", "a.txt", "--tokenizer", "words", "--output_dir", "out"]
    assert_refused(run_main(prepare.main, *flags, cwd=tmp_path), "chat_template.jinja: exists;")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "mine"
    run(tmp_path, *flags, "--force")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "theirs"


def test_a_chat_template_does_not_stay_for_another_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("a b late " * 50 + "\n")
    flags = ["--input", "a.txt", "--tokenizer", "byte", "--output_dir", "out"]
    (tmp_path / "out").mkdir()
    for name in prepare.TEMPLATES:
        (tmp_path / "out" / name).write_text("theirs")
    done = run_main(prepare.main, *flags, cwd=tmp_path)
    assert_refused(done, "chat_template.jinja: exists; pass --force")
    run(tmp_path, *flags, "--force")
    Prepared(tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_paths_need_not_be_utf_8(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    byte_tokenizer().save(str(tmp_path / "t.json"))
    (tmp_path / "t.json").rename(tmp_path / "t\udcff.json")
    flags = ["--tokenizer", "t\udcff.json", "--eos_token", byte_alphabet()[0]]
    run(tmp_path, "--input", "a.txt", *flags, "--output_dir", "d\udcff")
    assert sorted(path.name for path in (tmp_path / "d\udcff").iterdir()) == NAMES


def ranks_of(text, size):
    """Ranks as tiktoken keeps them, from a vocabulary learned on `text`."""
    learner = byte_level(models.BPE())
    alphabet = byte_alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([text], trainer)
    byte_of = {character: byte for byte, character in enumerate(alphabet)}
    vocab = learner.get_vocab().items()
    return {bytes(byte_of[c] for c in token): rank for token, rank in vocab}


def tiktoken_encoding(ranks):
    tiktoken = pytest.importorskip("tiktoken")
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def test_ranks_made_by_hand_encode_as_in_tiktoken():
    pairs = [b"ab", b"bc", b"abc", b"cab", b"abcab", b" a", b" abc", b"aa", b"aaa", b"aaaa", b"bbb"]
    ranks = {bytes([b]): b for b in range(256)} | {pair: 256 + i for i, pair in enumerate(pairs)}
    encoding, converted = tiktoken_encoding(ranks), vocabulary.bpe_from_ranks(ranks)
    for letters in itertools.product("abc ", repeat=6):
        text = "".join(letters)
        assert converted.encode(text).ids == encoding.encode_ordinary(text)


@pytest.fixture(scope="module")
def learned_ranks():
    ranks = ranks_of(Path(codecs.__file__).read_text(encoding="utf-8") + SENTENCES * 20, 1500)
    return tiktoken_encoding(ranks), vocabulary.bpe_from_ranks(ranks)


def test_learned_ranks_encode_code_as_in_tiktoken(learned_ranks):
    encoding, converted = learned_ranks
    text = Path(subprocess.__file__).read_text(encoding="utf-8")
    ids = converted.encode(text).ids
    assert ids == encoding.encode_ordinary(text)
    assert converted.decode(ids) == text


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_learned_ranks_encode_any_text_as_in_tiktoken(learned_ranks, text):
    encoding, converted = learned_ranks
    assert converted.encode(text).ids == encoding.encode_ordinary(text)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_survives_the_tokenizers(sample, text):
    byte = byte_tokenizer()
    for tokenizer in (byte, sample.tokenizer):
        tokenizer.encode_special_tokens = True
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert byte.encode(text).ids == list(text.encode())


# ------------------------------------------------------------------------------------- errors

LINES = "some text\n" * 100
ERRORS = {  # name: (file content, flags, what the error line must match)
    "missing": (None, "--input no.txt", r"no\.txt: no such file or folder; check the path"),
    "empty": ("", "--input a.txt", r"a\.txt: is empty; give UTF-8 text"),
    "binary": (b"ab\0cd", "--input a.txt", r"a\.txt: is binary; give UTF-8 text"),
    "not UTF-8": (
        b"caf\xc3\xa9 caf\xe9 \n" * 50,
        "--input a.txt --tokenizer byte",
        r"a\.txt: not UTF-8 at byte 9; convert it, or pass --encoding_errors replace",
    ),
    "not UTF-8, jsonl, bpe": (
        b'{"text": "a"}\n{"text": "\xff"}\n',
        "--input a.jsonl",
        r"a\.jsonl: not UTF-8 at byte 24; .*--encoding_errors replace",
    ),
    "bad JSON": (
        '{"text": "a"}\n\n{"text": \n',
        "--input a.jsonl",
        r"a\.jsonl:3: not JSON \(.*\); ",
    ),
    "not an object": ("[1]\n", "--input a.jsonl", r"a\.jsonl.* 1: not a JSON object; write"),
    "no key": (
        '{"body": "a", "b\\n": 1}\n{"body": "a"}\n',
        "--input a.jsonl",
        r"a\.jsonl: no 'text' in any row \(keys: 'body', 'b\\n'\); pass --text_key",
    ),
    "key of another type": (
        '{"n": 3}',
        "--input a.jsonl --text_key n",
        r":1: 'n' is int \(keys: 'n'\)",
    ),
    "half a pair": ('{"text": "\\ud800"}', "--input a.jsonl", r"a\.jsonl:1: half a surrogate pair"),
    "not Parquet": (
        LINES,
        "--input a.parquet",
        r"a\.parquet: not readable as Parquet \(.*\); write",
    ),
    "tiny bpe": (LINES, "--input a.txt --vocab_size 256", r"--vocab_size: 256 cannot .*; use 257"),
    "large bpe": (
        LINES,
        "--input a.txt --vocab_size 65537 --dtype uint16",
        r"--dtype: 65537 tokens do not fit in uint16; use int32",
    ),
    "fraction below 0": (LINES, "--input a.txt --val_fraction -1", r"_fraction: -1\.0 is not in"),
    "fraction 1": (LINES, "--input a.txt --val_fraction 1", r"--val_fraction: 1\.0 is not in"),
    "fraction nan": (LINES, "--input a.txt --val_fraction nan", r"_fraction: nan is not float"),
    "no validation": (
        '{"text": "one row"}',
        "--input a.jsonl",
        r"--input: nothing is left for val\.bin; ",
    ),
    "no training": (
        "a",
        "--input a.txt --val_fraction 0.999",
        r"nothing is left for (val|train)\.bin; ",
    ),
    "output is a file": (
        LINES,
        "--input a.txt --output_dir a.txt/out",
        r"a\.txt/out: Not a directory; ",
    ),
    "output is that file": (
        LINES,
        "--input a.txt --output_dir a.txt",
        r"a\.txt: is not a folder; ",
    ),
    "no tokenizer": (
        LINES,
        "--input a.txt --tokenizer no",
        r"--tokenizer: no is not a tokenizer\.json; ",
    ),
    "vocab.txt as tokenizer": (
        LINES,
        "--input a.txt --tokenizer a.txt",
        r"a\.txt is not a tokenizer\.json",
    ),
    "bad tokenizer": (LINES, "--input a.json --tokenizer a.json", r"a\.json: is not a tokenizer"),
    "no such eos": (
        LINES,
        "--input a.txt --tokenizer words --eos_token <stop>",
        r"words/tokenizer\.json: no token '<stop>'; pass --eos_token",
    ),
    "eos not told": (
        LINES,
        "--input a.txt --tokenizer words",
        r"words/tokenizer\.json: its end-of-text token is unknown; pass --eos_token",
    ),
    "gpt2 offline": (
        LINES,
        "--input a.txt --tokenizer gpt2",
        r"--tokenizer gpt2: its vocabulary cannot be fetched .*--tokenizer PATH",
    ),
    "no tiktoken": (
        LINES,
        "--input a.txt --tokenizer gpt2",
        r"tiktoken: is not .*; pip install tiktoken",
    ),
    "no pyarrow": (LINES, "--input a.parquet", r"pyarrow: is not installed; pip install pyarrow"),
    "bad dtype": (LINES, "--input a.txt --dtype int8", r"--dtype: int8 is not a choice; use"),
    "a flag of datasets": (
        LINES,
        "--input a.txt --max_tokens 9",
        r"--max_tokens: is of a dataset; ",
    ),
    "two inputs": (LINES, "--input a.txt --dataset x", r"--dataset: is given beside --input; "),
    "two validations": (
        LINES,
        "--dataset x --val_input a.txt --val_split y",
        r"--val_split: is given beside --val_input; ",
    ),
    "strict": (
        '{"text": "a"}\n{"text": null}\n{"text": "b"}\n',
        "--input a.jsonl --tokenizer byte --strict",
        r"--strict: .* null: 1 \(a\.jsonl:2\); ",
    ),
    "unknown flag": (LINES, "--input a.txt --tokeniser byte", r"--tokeniser: unknown flag"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line(tmp_path, monkeypatch, name):
    content, flags, message = ERRORS[name]
    data = content.encode() if isinstance(content, str) else content
    for suffix in ("txt", "jsonl", "json", "parquet") if data is not None else ():
        (tmp_path / f"a.{suffix}").write_bytes(data)
    save_word_tokenizer(tmp_path / "words", eos="stop")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    if name in ("no tiktoken", "no pyarrow"):
        package = name.split()[1]
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    done = run_main(prepare.main, *flags.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr)
    assert not list(tmp_path.glob("data/text/*"))


def test_bad_text_can_be_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait\n" * 100)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "\\ud800"}\n')
    texts = make(tmp_path, "a.txt", "b.jsonl", encoding_errors="replace").all_texts()
    assert "".join(sorted(texts)).count("caf\ufffd au lait\n") == 100
    assert {"\ufffd", "?"} < set(texts)


def test_help_shows_flags_and_defaults(tmp_path):
    done = run(tmp_path, "--help")
    for option in dataclasses.fields(prepare.Options):
        assert f"--{option.name}" in done.stdout
    assert "[4096]" in done.stdout
    assert "[./data/text]" in done.stdout
