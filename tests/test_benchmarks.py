"""The scripts in benchmarks/: their tasks are what they say, their command lines work."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LINUX,
    assert_refused,
    flags,
    run_main,
    run_script,
    some_ids,
    tiny_config,
    wide,
    write_tokens,
)

import testv2
from benchmarks import carry, data, finetune, quality, scan, streaming
from benchmarks.peers import MODELS, Shape, count
from testv2 import TinyMambaModel, TokenFile
from tinymamba.checkpoint import save_checkpoint
from tinymamba.cli import UserError
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_alphabet


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", quality.TASKS)
def test_compared_models_have_equal_sizes(task):
    with torch.device("meta"):
        sizes = {name: count(quality.build(task, name)) for name in MODELS}
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes
    assert quality.RATES[task].keys() == sizes.keys()


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


def test_long_blocks_say_where_the_loss_is_and_what_the_state_is_worth(tmp_path, monkeypatch):
    monkeypatch.setitem(quality.TASKS, "M-small", quality.Task(300, 300, 1, 1))
    tiny = {"d_model": 32, "n_layer": 1, "num_heads": 2, "ssm_head_dim": 32, "d_state": 8}
    monkeypatch.setitem(quality.OURS, "M-small", tiny)
    shape = Shape(300, width=32, layers=1, heads=2, mlp=32)
    monkeypatch.setitem(quality.SHAPES, "M-small", {"llama_conv": shape})
    for name in ("train", "val"):
        write_tokens(tmp_path / f"{name}.bin", [7 * i % 300 for i in range(5000)])
        (tmp_path / f"{name}.json").write_text(json.dumps({"tokens": 5000, "bytes": 9000}))
    (tmp_path / "notes.md").write_text("<!-- quality -->\n<!-- /quality -->\n")
    words = flags(data=".", seeds=0, models=["tinymamba", "llama_conv"], table="notes.md")
    done = run_main(quality.main, "M-small", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, llama = rows_of(tmp_path / "quality.jsonl")
    assert [*ours["loss_by_position"]] == ["0-63", "64-127", "128-255", "256-299"]
    assert ours["share_by_last_seen"] == {"never": 1.0, "up to 64": 0.0, "farther": 0.0}
    assert ours["loss_by_last_seen"]["farther"] is None  # there is none
    assert ours["state_worth"].keys() == {"all", "never", "up to 64", "farther"}
    assert llama.keys() == ours.keys() - {"state_worth"}
    table = (tmp_path / "notes.md").read_text()
    assert "**M-small**" in table and "| llama_conv |" in table and "`steps" not in table
    (tmp_path / "quality.jsonl").write_text(
        '{"task": "S", "model": "llama", "lr": 0.1, "seed": 0, "bits_per_byte": 2.0, "seconds": 1}'
    )  # as earlier versions wrote it
    assert run_main(quality.main, "--table", "notes.md", cwd=tmp_path).returncode == 0
    assert (
        "| llama |  |  | 0.1 (edge) | 1 | 2.000 | none | 1 |" in (tmp_path / "notes.md").read_text()
    )


def test_a_pair_was_last_seen_where_it_was():
    windows = torch.randint(4, (2, 200), generator=torch.manual_seed(0))
    windows[:, 100] = torch.tensor([9, 11])  # new
    seen = quality.last_seen(windows, 16).tolist()
    for row, found in zip(windows.tolist(), seen, strict=True):
        pairs = list(zip(row, row[1:], strict=False))
        for i, pair in enumerate(pairs):
            back = [i - j for j in range(i) if pairs[j] == pair]
            assert found[i] == (0 if not back else 1 if min(back) <= quality.NEAR else 2)
    assert {0, 1} <= set(seen[0])


@pytest.mark.parametrize("dt, differs", [(-20.0, False), (1.0, True)])
def test_the_state_is_worth_what_it_holds(dt, differs):
    model = TinyMambaModel(tiny_config(vocab_size=64, min_decay=0.0)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.ssm.dt_bias.fill_(dt)  # dt is 0, and nothing is ever written; or 1
            block.ssm.A_log.fill_(-9.0)
            block.ssm.out_proj.weight.mul_(9.0)
        model.embedding.weight.normal_()
    windows = torch.randint(64, (2, 2 * quality.NEAR + 1))
    with_state = quality.token_losses(model, windows)
    change = (quality.losses_without_state(model, windows) - with_state).abs() / with_state.mean()
    assert change[:, : quality.NEAR].mean() < 1e-2
    assert (change[:, quality.NEAR :].mean() > 5e-2) == differs


@pytest.mark.parametrize("words, field", [
    (["S"], "--text"), (["M", "--data", "none"], "train.bin"), ([], "task"), (["L"], "task: L"),
    (["--table", "none.md"], "none.md"),
    (["S", "--models", "llama", "--variant", "x"], "--variant"),
])  # fmt: skip
def test_quality_needs_its_data(tmp_path, words, field):
    assert_refused(run_main(quality.main, *words, cwd=tmp_path), field)
    assert not list(tmp_path.iterdir())


def test_quality_needs_enough_to_validate_on(tmp_path):
    (tmp_path / "a").write_bytes(b"few words " * 100)
    done = run_main(quality.main, "S", "--text", "a", "a", cwd=tmp_path)
    assert_refused(done, "S: 1000 tokens are too few to validate on; it needs 1025")


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
        (length, name) for length in (40, 100) for name in ("ours", "delta", "mamba2", "mambapy")
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


@LINUX
def test_streaming_command_reads_one_long_prompt(tmp_path, small_checkpoint):
    words = flags(tinymamba_checkpoint=small_checkpoint, read=800, threads=1)
    done = run_main(streaming.main, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [row] = rows_of(tmp_path / "streaming.jsonl")
    assert row["kind"] == "read 800"
    assert 0 < row["MB early"] <= row["MB late"] < 1.05 * row["MB early"]
    assert row["us early"] > 0 and row["us late"] > 0


@pytest.mark.parametrize(("flag", "value"), [("--tokens", 1), ("--read", 5)])
def test_streaming_command_refuses_sizes_that_are_too_small(tmp_path, flag, value):
    done = run_main(streaming.main, flag, str(value), cwd=tmp_path)
    assert_refused(done, f"{flag}: {value} is out of range")


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
    done = run_main(finetune.main, *words, cwd=tmp_path)
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


def test_data_command_prepares_and_reads(tmp_path, monkeypatch):
    sizes = {"d_model": 32, "n_layer": 1, "num_heads": 1, "ssm_head_dim": 32, "block_size": 64}
    monkeypatch.setitem(testv2.PRESETS, "demo", {**testv2.PRESETS["demo"], **sizes})
    (tmp_path / "text").mkdir()
    for i in range(30):
        line = f"Text {i} says: wörter, words and 日本語.\n"
        (tmp_path / "text" / f"{i}.txt").write_text(line * 100, encoding="utf-8")
    words = flags(text="text", megabytes=0.25, vocab_size=300, steps=1, workers=1)
    words += flags(num_workers=0)
    done = run_main(data.main, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the text is too short: it is there 2 times" in done.stdout
    rows = rows_of(tmp_path / "data.jsonl")
    assert [row["stage"] for row in rows] == ["learn and encode", "encode", "read"]
    for row in rows[:2]:
        assert row["mb_per_second"] == pytest.approx(0.25 / row["seconds"], abs=0.01)
        assert row["cpu_seconds"] > 0 and row["peak_mb"] > 0
    for row in rows[2:]:
        assert 0 < row["share"] == pytest.approx(row["wait_seconds"] / row["step_seconds"], rel=0.1)
    (tmp_path / "empty").mkdir()
    done = run_main(data.main, "--text", "empty", cwd=tmp_path)
    assert_refused(done, "--text: has no text; name files of UTF-8 text")
    done = run_main(data.main, *words, "--vocab_size", 9, cwd=tmp_path)
    assert_refused(done, "data/prepare.py: --vocab_size: 9 cannot hold the 256 bytes")


# ----------------------------------------------------------------------------- carried states


def test_facts_are_stated_once_and_asked_for_once_as_long_after_as_is_said():
    ids, ages = carry.write_facts(20_000, seed=3)
    known: dict[int, tuple[int, int]] = {}
    found = []
    for at in range(2, len(ids)):
        sign, key, value = ids[at - 2 : at + 1].tolist()
        if sign == carry.FACT:
            assert key not in known and ages[at] == 0
            known[key] = value, at
        elif sign == carry.ASK:
            assert known.pop(key) == (value, at - ages[at])
            found.append(ages[at])
        else:
            assert ages[at] == 0
    assert len(found) > 1500 and min(found) >= carry.NEAREST
    near = sum(age <= 128 for age in found) / len(found)  # half of the range of logarithms
    assert 0.3 < near < 0.6 and sum(age > 512 for age in found) > 200
    assert ids.max() < carry.FIRST_VALUE + carry.VALUES


def test_texts_of_code_lie_within_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(carry, "LENGTH", 8)
    ids = [*range(8), 256, *range(20, 39), 256, *range(50, 60)]
    texts = carry.texts_of_code(TokenFile(write_tokens(tmp_path / "x.bin", ids)), 16)
    assert texts[:, 0].tolist() == [20, 28, 50] and texts.shape == (3, 9)
    assert (texts.diff() == 1).all()


def test_texts_are_read_with_the_state_carried_and_their_bits_are_of_each_range(monkeypatch):
    monkeypatch.setattr(carry, "EDGES", (0, 3, 12))
    monkeypatch.setattr(carry, "PIECE", 5)
    model, ids = wide(), some_ids(2, 13)
    bits = carry.read_texts(model, ids)
    whole = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none") / math.log(2)
    assert torch.allclose(bits, whole, atol=1e-4)
    counts = torch.arange(12).expand(2, -1) % 2 == 0
    want = [bits[:, [0, 2]].mean().item(), bits[:, [4, 6, 8, 10]].mean().item()]
    assert carry.by_range(bits, counts) == pytest.approx(want, abs=1e-4)


def test_carry_trains_in_three_ways_and_shows_them(tmp_path):
    words = ["facts", *flags(tokens=128, block=32, long=64, d_model=32, n_layer=1, seeds=0)]
    done = run_main(carry.main, *words, "--texts", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "carry.jsonl")
    assert [row["way"] for row in rows] == ["blocks", "carried", "long"]
    assert all(3 < value < 9 for row in rows for value in (*row["bits"], row["bits_far"]))
    (tmp_path / "page.md").write_text("<!-- carry -->\n<!-- /carry -->\n")
    assert run_main(carry.main, "--table", "page.md", cwd=tmp_path).returncode == 0
    assert "| facts | 128 | blocks of 32, carried | 1 |" in (tmp_path / "page.md").read_text()
    assert_refused(run_main(carry.main, "stories", cwd=tmp_path), "task: stories is not one")
