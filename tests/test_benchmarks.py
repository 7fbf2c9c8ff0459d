"""The scripts in benchmarks/: their tasks are what they say, their command lines work."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused, flags, run_main, run_script, tiny_config

from benchmarks import finetune, quality, scan, streaming, synthetic
from testv2 import TinyMambaModel
from tinymamba.checkpoint import save_checkpoint
from tinymamba.cli import UserError
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_alphabet


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("pairs", (1, 4, 16))
def test_mqar_asks_for_the_value_that_followed_the_key(pairs):
    ids, targets = synthetic.mqar(8, 64, pairs, 64, random())
    assert ids.shape == targets.shape == (8, 64)
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        keys, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and max(keys) < 32 <= min(values)
        where = [i for i, value in enumerate(asked) if value != synthetic.IGNORE]
        assert len(where) == pairs and min(where) >= 2 * pairs
        found = dict(zip(keys, values, strict=True))
        assert all(asked[i] == found[row[i]] for i in where)


def test_induction_asks_for_the_token_after_the_only_other_marker():
    ids, targets = synthetic.induction(32, 20, 16, random())
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        assert row.count(0) == 2 and row[-1] == 0
        assert asked[:-1] == [synthetic.IGNORE] * 19 and asked[-1] == row[row.index(0) + 1]


def test_parity_is_that_of_the_bits_so_far():
    ids, targets = synthetic.parity(4, 10, random())
    assert ids[:, 0].eq(2).all() and targets[:, 0].eq(synthetic.IGNORE).all()
    for row, odd in zip(ids.tolist(), targets.tolist(), strict=True):
        assert odd[1:] == [sum(row[1 : i + 1]) % 2 for i in range(1, 11)]


def test_long_texts_are_read_in_chunks_as_in_one_pass(monkeypatch):
    options = synthetic.parse(["induction", "--d_model", "32", "--test_samples", "8"])
    model = synthetic.build(options)
    torch.nn.init.normal_(model.embedding.weight)
    whole = synthetic.accuracy(model, options, 100)
    monkeypatch.setattr(synthetic, "AT_ONCE", 10)
    monkeypatch.setattr(synthetic, "CHUNK", 7)
    assert synthetic.accuracy(model, options, 100) == whole


@pytest.mark.parametrize(
    "task, model", [("mqar", "tinymamba"), ("induction", "llama"), ("parity", "tinymamba")]
)
def test_synthetic_command(task, model, tmp_path):
    words = flags(
        model=model,
        steps=2,
        d_model=32,
        d_state=8,
        read=64,
        length=64,
        pairs=4,
        test_samples=4,
        seeds=[0, 1],
    )
    if task == "parity":  # one of them in a process of its own
        done = run_script("benchmarks.synthetic", task, *words, cwd=tmp_path)
    else:
        done = run_main(synthetic.main, task, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "synthetic.jsonl")
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(row["task"] == task and row["model"] == model for row in rows)
    assert all(math.isfinite(row["loss"]) and 0 <= row["accuracy"]["64"] <= 1 for row in rows)


def test_synthetic_refuses_what_does_not_fit(tmp_path):
    words = ("mqar", "--length", 32, "--pairs", 16)
    assert_refused(run_main(synthetic.main, *words, cwd=tmp_path), "length")
    words = ("induction", "--model", "llama", "--read", 8192, "--steps", 1, "--d_model", 32)
    assert_refused(run_main(synthetic.main, *words, cwd=tmp_path), "read")


@pytest.mark.parametrize("task", quality.TASKS)
def test_compared_models_have_equal_sizes(task):
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in quality.build(task, name).parameters())
            for name in quality.SHAPES[task]
        }
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes


def test_quality_command(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 20)
    words = flags(text=["a", "b"], steps=2, seeds=0, lr=[1e-3, 2e-3], models=["tinymamba", "llama"])
    done = run_main(quality.main, "S", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "quality.jsonl")
    assert [(row["model"], row["lr"]) for row in rows] == [
        (name, lr) for name in ("tinymamba", "llama") for lr in (1e-3, 2e-3)
    ]
    for row in rows:
        assert row["bits_per_byte"] == pytest.approx(row["nats_per_token"] / math.log(2), abs=1e-4)


def test_quality_needs_its_data(tmp_path):
    assert_refused(run_main(quality.main, "S", cwd=tmp_path), "text")
    assert_refused(run_script("benchmarks.quality", "M", cwd=tmp_path), "train.bin")


def test_a_sliding_window_counts_every_token_once():
    class Counting(torch.nn.Module):
        """Says how many tokens it sees before each: the loss is then known by hand."""

        def forward(self, ids):
            logits = torch.zeros(*ids.shape, 256)
            logits[..., 7] = torch.arange(ids.shape[1]).float()
            return logits

    val = torch.full((16 * 256 + 1,), 7)
    seen = list(range(64)) + [56 + i for _ in range(24) for i in range(8)]
    expected = sum(math.log(255 + math.exp(s)) - s for s in seen) / 256
    assert quality.read_through(Counting(), val, 64) == pytest.approx(expected, rel=1e-4)


SCAN = {"heads": 2, "head_dim": 8, "d_state": 4}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scan_command_compares_scans_that_agree(tmp_path, dtype):
    words = flags(**SCAN, sequence_lengths=[40, 100], dtype=dtype, batch_sizes=2, test_iterations=3)
    done = run_main(scan.main, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "scan.jsonl")
    assert [(row["length"], row["scan"]) for row in rows] == [
        (length, name) for length in (40, 100) for name in ("ours", "mamba2", "mambapy")
    ]
    assert all(len(row["all"]) == 3 and row["seconds"] == sorted(row["all"])[1] for row in rows)
    assert all(row["dtype"] == dtype and row["batch_sizes"] == [2] for row in rows)


def test_scan_command_in_its_own_process(tmp_path):
    words = flags(**SCAN, scans=["ours", "mambapy"], sequence_lengths=20)
    done = run_script("benchmarks.scan", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["scan"] for row in rows_of(tmp_path / "scan.jsonl")] == ["ours", "mambapy"]


def test_a_scan_that_differs_is_not_timed(monkeypatch):
    monkeypatch.setitem(scan.SCANS, "mamba2", lambda *inputs: scan.ours(*inputs) * 1.1)
    options = scan.Options(**SCAN, dtype=torch.float32, scans=["ours", "mamba2"])
    with pytest.raises(UserError, match="mamba2: differs from ours"):
        scan.compare(options, 1, 20)


def test_streaming_command_times_tokens_sessions_adapters_and_prefill(tmp_path, small_checkpoint):
    words = flags(
        tinymamba_checkpoint=small_checkpoint,
        contexts=[5, 40],
        llama_context=5,
        tokens=3,
        sessions=2,
        rounds=2,
        threads=1,
    )
    done = run_main(streaming.main, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "streaming.jsonl")
    assert [row["kind"] for row in rows] == [
        "token after 5",
        "token after 40",
        "2 sessions, tinymamba",
        "adapters",
        "prefill",
    ]
    names = [{name[3:] for name in row if name.startswith("ms ")} for row in rows]
    assert names == [
        {"tinymamba", "llama"},
        {"tinymamba"},
        {"together", "one_by_one"},
        {"none", "one", "two"},
        {"prefill", "training"},
    ]
    for row in rows:
        for name, value in row.items():
            if name.startswith("ms "):
                low, high = row["spread " + name[3:]]
                assert 0 < low <= value <= high


def test_streaming_command_refuses_a_single_token(tmp_path):
    done = run_script("benchmarks.streaming", "--tokens", 1, cwd=tmp_path)
    assert_refused(done, "--tokens: 1 is out of range")


@pytest.fixture
def small_checkpoint(tmp_path):
    model = TinyMambaModel(tiny_config(d_model=64, vocab_size=64))
    save_checkpoint(
        tmp_path / "small.pt", {"model": model.state_dict(), "config": model.config.to_dict()}
    )
    return tmp_path / "small.pt"


def finetune_data(task, tmp_path) -> tuple[str, list]:
    """The training text of a task, and what is asked in the end."""
    tokenizer = SimpleTokenizer()
    asked = finetune.make_data(task, None, tokenizer, tmp_path)
    assert len(asked) == finetune.QUESTIONS
    return tokenizer.decode(np.fromfile(tmp_path / "train.bin", dtype=np.int32)), asked


def test_lookup_asks_for_what_training_says_often(tmp_path):
    text, asked = finetune_data("lookup", tmp_path)
    assert all(text.count(question + answer) == 40 for question, answer in asked)


def test_format_asks_for_what_training_never_says(tmp_path):
    text, asked = finetune_data("format", tmp_path)
    lines = text.splitlines()
    for question, answer in asked:
        assert question not in text
        name, age = question.removeprefix("name=").removesuffix(" =>").split(" age=")
        assert json.loads(answer) == {"name": name, "age": int(age)}
    assert len(lines) == 40 * 64 and len(set(lines)) > 2000


def test_the_share_of_right_answers(monkeypatch):
    tokenizer, asked = SimpleTokenizer(), [("a ->", " b\n"), ("c ->", " d\n")]

    def parrot(model, ids, count, temperature):
        said = tokenizer.encode(" b\nand more")
        return torch.cat((ids, torch.tensor([said])), dim=1)

    monkeypatch.setattr(finetune, "generate", parrot)
    assert finetune.share_right(None, tokenizer, asked) == 0.5


@pytest.fixture
def finetune_words(tmp_path):
    """The base model and its tokenizer, in tmp_path; flags that name them."""
    model = TinyMambaModel(tiny_config(vocab_size=300))
    save_checkpoint(
        tmp_path / "m.pt", {"model": model.state_dict(), "config": model.config.to_dict()}
    )
    (tmp_path / "vocab.txt").write_text("\n".join([*byte_alphabet(), EOS_TOKEN]) + "\n")
    return flags(checkpoint="m.pt", tokenizer="vocab.txt", steps=2)


def test_finetune_runs_methods_in_processes_of_their_own(tmp_path, finetune_words, monkeypatch):
    words = [*finetune_words, *flags(tasks="lookup", methods="lora")]
    done = run_script("benchmarks.finetune", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [lora] = rows_of(tmp_path / "finetune.jsonl")
    monkeypatch.chdir(tmp_path)
    options = finetune.Options(checkpoint="m.pt", tokenizer="vocab.txt", steps=2)
    full = finetune.run("lookup", "full", None, options)
    assert [lora["method"], full["method"]] == ["lora", "full"] and lora.keys() == full.keys()
    assert lora["trained"] < full["trained"] == 1.0 and lora["right"] == full["right"] == 0.0


def test_finetune_refuses_bad_words(tmp_path, finetune_words):
    assert_refused(run_main(finetune.main, *finetune_words, cwd=tmp_path), "--text")
    words = flags(checkpoint="x", tasks="format")
    assert_refused(run_main(finetune.main, *words, cwd=tmp_path), "x")
