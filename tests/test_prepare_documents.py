"""How data/prepare.py divides text: sides, separators, chunks that keep their ids, processes."""

import base64
import functools
import json
import multiprocessing
import operator
import os
import random
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import POSIX, assert_refused, run_main
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data import encoding, prepare, processes, sides, vocabulary
from tinymamba.cli import UserError
from tinymamba.tokenizer import EOS_TOKEN, byte_tokenizer

EOS = 256


def make(folder, *words):
    """Run the command with bytes as tokens; the documents of each side that is written."""
    done = run_main(prepare.main, "--tokenizer", "byte", "--output_dir", "out", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {side: documents(folder / "out", side) for side in ("train", "val")}, done


def documents(folder, side):
    if not (folder / f"{side}.bin").exists():
        return None
    ids = np.fromfile(folder / f"{side}.bin", np.int32)
    assert ids[-1] == EOS
    ends = np.flatnonzero(ids == EOS)
    return [bytes(d[d != EOS].astype(np.uint8)).decode() for d in np.split(ids, ends + 1)[:-1]]


# -------------------------------------------------------------------------------------- sides


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize("count", [2, 3, 5, 20, 41])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.999])
def test_few_rows_have_the_nearest_share_and_never_an_empty_side(tmp_path, count, fraction):
    for seed in range(3):
        write_rows(tmp_path / "a.jsonl", [f"{seed} row {i}" for i in range(count)])
        flags = ("--input", "a.jsonl", "--val_fraction", fraction, "--force")
        made, _ = make(tmp_path, *flags)
        wanted = min(max(count * fraction, 1), count - 1)
        assert abs(len(made["val"]) - wanted) <= 0.5
        assert len(made["train"]) == count - len(made["val"])


def test_a_small_share_of_many_rows_is_not_nothing():
    hashes = [sides.hash_fraction(str(i)) for i in range(1000)]
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        limit = sides.nearest_limit(hashes, fraction, False)
        assert 0 < sum(each <= limit for each in hashes) < 1000
    assert sides.nearest_limit(hashes, 0.5, False) == 0.5


def test_rows_that_are_all_the_same_cannot_be_divided(tmp_path):
    write_rows(tmp_path / "a.jsonl", ["same"] * 9)
    done = run_main(prepare.main, "--input", "a.jsonl", "--tokenizer", "byte", cwd=tmp_path)
    assert_refused(done, "nothing is left for", "--val_input, or --val_fraction 0")


@given(st.text(max_size=60), st.floats(0.01, 0.99), st.integers(1, 9))
@settings(max_examples=200, deadline=None, derandomize=True)
@example("日", 0.5, 1)
@example("ab\n", 0.3, 2)
def test_the_end_of_a_text_begins_between_characters(text, fraction, step):
    parts = [text[i : i + step] for i in range(0, len(text), step)]
    size = len(text.encode())
    both = ["".join(d) for d in sides.documents_in(sides.cut_tail(parts, size, fraction))]
    assert "".join(both) == text
    assert len(both) == 2 if text else not any(both)
    if len(text) > 1 and text.isascii():
        assert all(both)


def test_the_end_of_a_compressed_file_is_validation_too(tmp_path):
    import gzip

    text = "".join(f"line {i}\n" for i in range(5000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    made, _ = make(tmp_path, "--input", "a.txt.gz")
    assert made["train"][0] + made["val"][0] == text
    assert 0.04 < len(made["val"][0]) / len(text) <= 0.05


def test_val_input_is_all_of_the_validation(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}\n" * 50)
    made, _ = make(tmp_path, "--input", "a.txt", "--val_input", "b.txt")
    assert made == {"train": ["text of a.txt\n" * 50], "val": ["text of b.txt\n" * 50]}


def test_what_is_validation_is_not_training_too(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text(f"text of {name}\n" * 50)
    made, done = make(tmp_path, "--input", "in", "--val_input", "in/../in/b.txt", "--strict")
    assert made == {"train": ["text of a.txt\n" * 50], "val": ["text of b.txt\n" * 50]}
    assert f"only validation: 1 ({Path('in', 'b.txt')})" in done.stdout
    flags = ("--input", "in/a.txt", "--val_input", "in", "--output_dir", "new")
    assert_refused(run_main(prepare.main, *flags, cwd=tmp_path), "--val_input: has all files of")
    done = run_main(prepare.main, "--dataset", "x", "--val_split", "train", cwd=tmp_path)
    assert_refused(done, "--val_split: train is the training split; name another")


def test_fraction_0_writes_no_validation_and_leaves_no_older_one(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    make(tmp_path, "--input", "a.txt")
    made, done = make(tmp_path, "--input", "a.txt", "--val_fraction", 0, "--force")
    assert made == {"train": ["some text\n" * 50], "val": None}
    assert "train with --enable_validation false" in done.stdout
    names = {"tokenizer.json", "train.bin", "train.json", "vocab.txt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


# --------------------------------------------------------------------------------- separators


def test_separators_end_documents_of_a_file_and_no_other_special_text_does(tmp_path):
    texts = [f"story {i} </s> <|im_end|> [SEP]\nends.\n" for i in range(40)]
    (tmp_path / "a.txt").write_text(f"{EOS_TOKEN}\n".join(texts) + EOS_TOKEN)
    write_rows(tmp_path / "b.jsonl", [f"row {EOS_TOKEN} {i}" for i in range(40)])
    made, done = make(tmp_path, "--input", "a.txt", "b.jsonl", "--val_fraction", 0.25)
    rows = [f"row {EOS_TOKEN} {i}" for i in range(40)]
    assert sorted(made["train"] + made["val"]) == sorted(texts + rows)
    assert len(made["val"]) == 20
    assert "ended 40 documents within files; --document_separator '' keeps it" in done.stdout

    made, done = make(
        tmp_path, "--input", "a.txt", "--document_separator", "", "--force", "--val_fraction", 0
    )
    assert made["train"] == [f"{EOS_TOKEN}\n".join(texts) + EOS_TOKEN]
    assert "ended" not in done.stdout
    made, _ = make(
        tmp_path, "--input", "a.txt", "--document_separator", "[SEP]\nends.", "--force",
        "--val_fraction", 0,
    )  # fmt: skip
    assert len(made["train"]) == 41


@pytest.mark.parametrize("marked", ["Title" + EOS_TOKEN + "{}", "{}" + EOS_TOKEN])
def test_a_few_separators_leave_the_end_of_the_file_as_validation(tmp_path, marked):
    text = "".join(f"line {i}\n" for i in range(5000))
    (tmp_path / "a.txt").write_text(marked.format(text))
    made, done = make(tmp_path, "--input", "a.txt")
    assert made["train"][-1] + made["val"][0] == text
    assert len(made["train"]) == (2 if marked.startswith("Title") else 1)
    assert 0.04 < len(made["val"][0]) / len(text) <= 0.05
    assert "ended 1 documents" in done.stdout


def test_a_separator_that_comes_late_ends_documents_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sides, "HEAD_CHARS", 10)
    text = "long " * 1000 + EOS_TOKEN + "next " * 1000
    (tmp_path / "a.txt").write_text(text)
    made, _ = make(tmp_path, "--input", "a.txt", "--val_fraction", 0.1)
    assert made["train"][0] == "long " * 1000 and len(made["train"]) == 2
    assert made["train"][1] + made["val"][0] == "next " * 1000


@given(st.lists(st.sampled_from(["--", "-", "a", "\n", "\r", "\r\n"])), st.integers(1, 5))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_separator_may_lie_across_parts(pieces, step):
    text = "".join(pieces)
    parts = [text[i : i + step] for i in range(0, len(text), step)]
    split = ["".join(d) for d in sides.documents_in(sides.split_documents(parts, "--"))]
    whole = ["".join(d) for d in sides.documents_in(sides.split_documents([text], "--"))]
    assert split == whole
    assert len(whole) == text.count("--") + 1
    first, *rest = text.split("--")
    ends = [r[2:] if r.startswith("\r\n") else r.removeprefix("\n") for r in rest]
    assert whole == [first, *ends]


# ------------------------------------------------------------------------------------- chunks

RANDOM = random.Random(0)
CODE = Path(random.__file__).read_text(encoding="utf-8")[:24_000]
PARTS = ["hello", "world ", "日本語", "  two", "\n", "\n\n", " \n  ", "é", "<s>", "42", "\t"]
TEXTS = {
    "code": CODE,
    "mixed": "".join(RANDOM.choices(PARTS, k=5000)),
    "one line": CODE.replace("\n", " "),
    "no spaces": "".join(chr(0x4E00 + int(RANDOM.random() ** 3 * 300)) for _ in range(12_000)),
    "dna": "".join(RANDOM.choices("ACGT", k=12_000)),
    "base64": base64.b64encode(RANDOM.randbytes(9000)).decode(),
    "one letter": "a" * 12_000,
    "only spaces": " " * 7000,
}
BYTES = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def learned(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    return tokenizer


def byte_level_kind(prefix):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    before = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return learned(models.BPE(), trainer, pre_tokenizer=before, decoder=decoders.ByteLevel())


def metaspace_kind(scheme, split=True):
    model = models.BPE(unk_token="<unk>", byte_fallback=True)
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=BYTES, max_token_length=16, show_progress=False
    )
    before = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = learned(model, trainer, pre_tokenizer=before)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(SPACES + strip)
    return tokenizer


def llama_kind():
    """As Llama 2: a normalizer puts the space before the text, and nothing splits it."""
    rules = json.loads(metaspace_kind("first").to_str())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    rules["normalizer"] = {"type": "Sequence", "normalizers": [prepend, space]}
    rules["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(rules))


@functools.cache  # it learns for seconds
def unigram_kind():
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=BYTES, unk_token="<unk>", show_progress=False
    )
    rules = [normalizers.NFKC(), normalizers.Strip(left=False), normalizers.Replace("\t", " ")]
    before = pre_tokenizers.Metaspace(prepend_scheme="always")
    normalizer = normalizers.Sequence(rules)
    return learned(models.Unigram(), trainer, normalizer=normalizer, pre_tokenizer=before)


def word_piece_kind():
    trainer = trainers.WordPieceTrainer(
        vocab_size=1000, special_tokens=["[UNK]"], show_progress=False
    )
    parts = {"normalizer": normalizers.BertNormalizer(), "decoder": decoders.WordPiece()}
    before = pre_tokenizers.BertPreTokenizer()
    return learned(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizer=before, **parts)


KINDS = {  # name: how it is made, whether it keeps every text
    "bytes": (byte_tokenizer, True),
    "bpe": (lambda: vocabulary.train_bpe(TEXTS.values(), vocabulary.Learning(500, 10**9)), True),
    "gpt2": (lambda: byte_level_kind(False), True),
    "roberta": (lambda: byte_level_kind(True), False),  # its decoder keeps the first space
    "llama": (llama_kind, True),
    "metaspace first": (lambda: metaspace_kind("first"), True),
    "metaspace always": (lambda: metaspace_kind("always", split=False), True),
    "metaspace never": (lambda: metaspace_kind("never"), True),
    "unigram": (unigram_kind, False),
    "word piece": (word_piece_kind, False),
}
LONG_WORDS = {
    "word piece": {"no spaces", "dna", "one letter", "base64"},
    "unigram": {"one letter", "only spaces"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_have_the_ids_of_the_whole_document(tmp_path, monkeypatch, kind):
    make_kind, lossless = KINDS[kind]
    make_kind().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(encoding, "CHUNK_CHARS", 3000)
    encoder = encoding.Encoder(tmp_path / "tokenizer.json", EOS, "int32")
    whole = encoding.plain(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    for name in TEXTS.keys() - LONG_WORDS.get(kind, set()):
        text = TEXTS[name]
        parts = [text[i : i + 1777] for i in range(0, len(text), 1777)]
        chunks = list(encoder.chunks([sides.Text("train", parts)]))
        assert "".join(chunk.text for chunk in chunks) == text
        assert max(len(chunk.text) for chunk in chunks) <= 3000 and len(chunks) > 2
        data = b"".join(encoded.ids for encoded in encoder(chunks))
        *ids, eos = np.frombuffer(data, np.int32).tolist()
        assert eos == EOS
        assert ids == whole.encode(text, add_special_tokens=False).ids, name
        unprepended = name != "only spaces" or kind in ("bytes", "bpe", "gpt2", "llama")
        if lossless and unprepended:
            assert whole.decode(ids, skip_special_tokens=False) == text, name


@pytest.mark.parametrize("kind", LONG_WORDS)
def test_words_longer_than_a_chunk_are_cut_all_the_same(tmp_path, monkeypatch, kind):
    KINDS[kind][0]().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(encoding, "CHUNK_CHARS", 3000)
    encoder = encoding.Encoder(tmp_path / "tokenizer.json", EOS, "int32")
    for name in LONG_WORDS[kind]:
        chunks = list(encoder.chunks([sides.Text("train", [TEXTS[name]])]))
        assert "".join(chunk.text for chunk in chunks) == TEXTS[name]
        assert max(len(chunk.text) for chunk in chunks) <= 3000


# ------------------------------------------------------------------------------- learning bpe


def test_bpe_words_are_bounded_and_lose_nothing():
    tokenizer = vocabulary.train_bpe(TEXTS.values(), vocabulary.Learning(500, 10**9))
    for text in (*TEXTS.values(), "ab" * 200, "1" * 300, " -" + "-" * 300, " \t" * 200):
        words = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert max(end - start for _, (start, end) in words) <= 129  # and a space before it
        assert "".join(text[start:end] for _, (start, end) in words) == text


def test_bpe_learns_from_a_part_of_text_without_spaces_only(capsys):
    long = "".join(RANDOM.choices("abcd", k=400))
    parts = ["some words and\n" * 10, *[long] * 1000, f"{long} then words\n"]
    kept = list(vocabulary.sample(parts, vocabulary.Learning(300, 10**9)))
    assert kept[0] == parts[0] and kept[-1] == " then words\n"
    assert sum(map(len, kept)) < 256 * 300 + 2000
    assert "text without spaces" in capsys.readouterr().out


def test_bpe_learns_from_the_same_text_without_spaces_however_it_is_read():
    run = "".join(RANDOM.choices("abcd", k=100_000))
    cuts = [[run], [run[:65_000], run[65_000:]]]
    learning = vocabulary.Learning(300, 10**9)
    assert {"".join(vocabulary.sample(parts, learning)) for parts in cuts} == {run[: 256 * 300]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no spaces", "dna", "base64", "one letter", "only spaces"])
def test_text_without_spaces_takes_at_most_three_times_as_long(tmp_path, kind):
    seconds = {}
    library = sorted(Path(random.__file__).parent.glob("*.py"))
    code = "".join(path.read_text(encoding="utf-8") for path in library[:100])
    for name, text in (("code", code), (kind, "".join(RANDOM.choices(TEXTS[kind], k=len(code))))):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        begin = time.process_time()
        done = run_main(prepare.main, "--input", "a.txt", "--force", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        seconds[name] = (time.process_time() - begin) / len(text.encode())
    assert seconds[kind] < 3 * seconds["code"]


# ------------------------------------------------------------------------------------ processes


def test_any_number_of_processes_writes_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "WORKER_CHARS", 5000)
    monkeypatch.setattr(encoding, "CHUNK_CHARS", 3000)
    monkeypatch.setattr(vocabulary, "COUNTED_CHARS", 9000)
    (tmp_path / "in").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    write_rows(tmp_path / "in" / "rows.jsonl", [f"row {i}" for i in range(900)])
    contents = []
    for workers in (1, 2, 3):
        flags = ("--input", "in", "--vocab_size", 300, "--workers", workers, "--force")
        done = run_main(prepare.main, *flags, "--output_dir", "out", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        contents.append({p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1] == contents[2]


@POSIX
def test_a_process_that_is_killed_is_one_line(tmp_path, monkeypatch):
    tokenizer = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(tokenizer))
    encoder = encoding.Encoder(tokenizer, EOS, "int32")
    chunk = encoding.Chunk("train", "x" * 100_000, False, True)  # its ids fill a pipe
    before = multiprocessing.active_children()

    def chunks():
        yield from [chunk] * 9
        own = [child for child in multiprocessing.active_children() if child not in before]
        os.kill(own[0].pid, signal.SIGKILL)
        yield from [chunk] * 99

    monkeypatch.setattr(encoding, "WORKER_CHARS", 1)
    problem = "--workers: a process .* was ended, .*; pass fewer"
    with pytest.raises(UserError, match=problem), encoding.encoding_with(encoder, 2) as encode:
        list(encode(chunks()))


@POSIX
def test_a_process_that_is_killed_while_it_answers_is_one_line():
    pipe, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 100) + b"half of it")
    theirs.close()
    with pytest.raises(UserError, match="--workers: a process .* was ended"):
        processes.receive(pipe)


def children():
    return {child.pid for child in multiprocessing.active_children()}


def test_processes_answer_in_order_and_end_with_the_iterator():
    before = children()
    first, items = operator.itemgetter(0), [[i] if i != 9 else [] for i in range(99)]
    answers = processes.map_in_processes(first, items, 2)
    assert [next(answers) for _ in range(9)] == [*range(9)]
    assert len(children() - before) == 2
    with pytest.raises(IndexError):
        next(answers)
    assert children() == before
    answers = processes.map_in_processes(first, items, 1)
    assert next(answers) == 0
    answers.close()
    assert children() == before


def test_a_crew_works_for_one_function_after_another_and_ends():
    before, items = children(), [[i, -i] for i in range(9)]
    with processes.Crew() as crew:
        assert list(crew.map(operator.itemgetter(0), items, 2)) == [*range(9)]
        working = children() - before
        assert list(crew.map(operator.itemgetter(1), items, 2)) == [-i for i in range(9)]
        assert len(working) == 2 and children() - before == working
        unfinished = crew.map(operator.itemgetter(0), items, 2)
        next(unfinished)
        unfinished.close()
        assert children() == before
        assert list(crew.map(operator.itemgetter(1), items, 1)) == [-i for i in range(9)]
    assert children() == before


def test_a_little_text_starts_no_process(monkeypatch):
    def refuse(*_):
        raise AssertionError("a process is started")

    monkeypatch.setattr(processes, "process", refuse)
    monkeypatch.setattr(processes, "available_cores", lambda: 4)
    batching = processes.Batching(len, 10, 1000)
    few = ["x" * 900] * (processes.AT_FIRST // 1000)
    assert sum(map(len, processes.map_in_order(list, few, batching, 0))) == len(few)
    with pytest.raises(AssertionError, match="a process is started"):
        list(processes.map_in_order(list, few * 2, batching, 0))


# ------------------------------------------------------------------------- datasets and pipes


def test_a_dataset_is_read_up_to_max_tokens_with_a_split_for_validation(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", [f"row {i:04}" for i in range(300)])
    write_rows(tmp_path / "set" / "test.jsonl", [f"test {i}" for i in range(3)])
    flags = ("--dataset", "set", "--val_split", "test", "--max_tokens", 100)
    made, _ = make(tmp_path, *flags)
    assert made["train"] == [f"row {i:04}" for i in range(12)]  # 9 tokens each
    assert made["val"] == [f"test {i}" for i in range(3)]
    made, _ = make(tmp_path, "--dataset", "set", "--val_fraction", 0.1, "--force")
    assert sorted(made["train"] + made["val"]) == [f"row {i:04}" for i in range(300)]
    assert len(made["val"]) == 30


def test_standard_input_goes_on_after_a_kill_if_it_is_the_same(tmp_path, monkeypatch):
    def run(text, *words):
        flags = ("--input", "-", "--tokenizer", "byte", "--output_dir", "out", *words)
        return run_main(prepare.main, *flags, cwd=tmp_path, input=text)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Run, "write_facts", interrupted)
        assert run("some text\n" * 50).returncode == 130
    assert_refused(run("other text\n" * 50, "--resume"), "--input: is not what it was")
    assert run("some text\n" * 50, "--resume").returncode == 0
    assert "".join(documents(tmp_path / "out", "train")).startswith("some text\n")
    assert not list((tmp_path / "out").glob(".*"))
