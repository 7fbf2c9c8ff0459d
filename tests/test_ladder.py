"""benchmarks/ladder.py: one pass, equal sizes, and what its table and plot say."""

import json

import pytest
import torch
from helpers import assert_refused, flags, run_main, write_tokens

from benchmarks import ladder
from benchmarks.peers import count
from testv2 import TokenFile
from tinymamba.cli import UserError


def row(model, tokens, loss, lr=0.01, width=80, **rest) -> dict:
    found = {"model": model, "variant": "", "d_model": width, "tokens": tokens, "steps": 7}
    found |= {"seed": 0, "lr": lr}
    found |= {"parameters": 1000, "seconds": 60.0, "bits_per_byte": loss}
    return found | {"bits_per_byte_read": loss - 0.1, **rest}


@pytest.mark.parametrize("width", [40, 128])
def test_models_have_equal_sizes(width):
    with torch.device("meta"):
        sizes = [count(ladder.build(name, width)) for name in ("tinymamba", "llama_start")]
        sizes.append(count(ladder.build("mamba2", width)))
    assert max(sizes) < 1.02 * min(sizes)


def test_no_block_is_seen_twice(tmp_path):
    blocks = ladder.BATCH * 3
    ids = [i // ladder.BLOCK for i in range(blocks * ladder.BLOCK + 1)]
    file = TokenFile(write_tokens(tmp_path / "train.bin", ids))
    windows = list(ladder.batches(file, 3, 0))
    assert [w.shape for w in windows] == 3 * [(ladder.BATCH, ladder.BLOCK + 1)]
    first = torch.cat([w[:, 0] for w in windows]).tolist()
    assert sorted(first) == list(range(blocks)) != first
    assert torch.equal(windows[0], next(ladder.batches(file, 2, 0)))
    assert not torch.equal(windows[0], next(ladder.batches(file, 3, 1)))
    with pytest.raises(UserError, match="24 blocks of 512 bytes; 32 are needed"):
        next(ladder.batches(file, 4, 0))


def test_the_command_trains_and_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "LENGTH", 512)
    for name in ("train", "val"):
        write_tokens(tmp_path / f"{name}.bin", "words and more " * 600)
    words = flags(data=".", d_model=32, tokens=0.1, lr=[1e-3, 8e-3], threads=1)
    done = run_main(ladder.main, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "ladder.jsonl").read_text().splitlines()]
    assert [(r["model"], r["lr"]) for r in rows] == [
        (name, lr) for name in ("tinymamba", "llama_start") for lr in (1e-3, 8e-3)
    ]
    assert all(0 < r["bits_per_byte"] < 9 and r["steps"] == 2 for r in rows)
    (tmp_path / "page.md").write_text("<!-- ladder -->\n<!-- /ladder -->\n")
    done = run_main(ladder.main, "--table", "page.md", "--plot", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert "| 32 | 0.1 per parameter | tinymamba |" in page and "(edge)" in page
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_has_the_best_rate_and_the_bytes_to_the_same_loss():
    rows = [row("tinymamba", 1.0, 2.0), row("tinymamba", 4.0, 1.5)]
    rows += [row("llama_start", 1.0, 2.5), row("llama_start", 4.0, 2.0, lr=0.02)]
    rows += [row("llama_start", 4.0, 2.2, lr=lr) for lr in (0.01, 0.04)]
    lines = ladder.table(rows)
    assert lines[3].startswith("| 80 | 1 per parameter | llama_start | 0.01 (edge) | 1 | 2.500 ")
    assert "| 1.250 | 4.00 times | 60 |" in lines[3]
    assert "| llama_start | 0.02 | 1 | 2.000 | 1.900 | 1.333 |  | 60 |" in lines[5]
    some = ladder.Result(0.01, True, 1, 0.0, 0.0, 1.0, 1.0)
    curve = {1.0: some._replace(bits=3.0), 16.0: some._replace(bits=2.0)}
    assert ladder.tokens_to_reach(curve, 2.5) == pytest.approx(4)
    assert ladder.tokens_to_reach(curve, 1.9) is None


def test_what_does_not_fit_is_refused(tmp_path):
    assert_refused(run_main(ladder.main, cwd=tmp_path), "data/python/train.bin: no such file")
    for name in ("train", "val"):
        write_tokens(tmp_path / f"{name}.bin", [300] * 30_000)
    done = run_main(ladder.main, *flags(data=".", steps=1), cwd=tmp_path)
    assert_refused(done, "train.bin: id 300 at offset 0 is outside vocab_size=257")
    for name, text in (("train", "long enough " * 600), ("val", "too short")):
        write_tokens(tmp_path / f"{name}.bin", text)
    done = run_main(ladder.main, *flags(data=".", steps=1), cwd=tmp_path)
    assert_refused(done, "val.bin: has 9 bytes")
    steps_only = json.dumps(row("tinymamba", None, 2.0))
    (tmp_path / "ladder.jsonl").write_text(steps_only)
    assert "| 80 | 7 steps | tinymamba |" in ladder.table([json.loads(steps_only)])[2]
    done = run_main(ladder.main, "--plot", "a.png", cwd=tmp_path)
    assert_refused(done, "a.png: there is no row to draw")
