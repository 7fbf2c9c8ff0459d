"""The ledger of speed: what a row holds, what is compared, and when a row is refused."""

import json
import subprocess

import pytest
import torch
from helpers import assert_refused, flags, run_main

from benchmarks import ledger
from benchmarks.ledger import NUMBERS, Sizes, product_run, summarize, worse

SMALL = {"d_model": 64, "n_layer": 1, "num_heads": 1, "vocab_size": 64}
TINY = Sizes(
    SMALL, SMALL, SMALL, batch=1, length=8, demo_length=8, long_length=16, tokens=2, sessions=2
)
HERE = {"cpu": "a", "cores": 2, "threads": 2, "torch": "2.13.0", "transformers": "5.23.0"}


@pytest.fixture
def small(monkeypatch):
    """Tiny models, and two rounds; nothing is compiled."""
    monkeypatch.setattr(ledger, "SIZES", TINY)
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    for name, number in NUMBERS.items():
        monkeypatch.setitem(NUMBERS, name, number._replace(rounds=2, warmup=0))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with a ledger of no rows."""
    monkeypatch.setattr(ledger, "ROOT", tmp_path.resolve())
    (tmp_path / "docs").mkdir()
    for name in ("code.py", "docs/ledger.jsonl"):
        (tmp_path / name).touch()
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def row_of(machine=HERE, commit="first", **ratios) -> dict:
    """A row whose spreads are 0.1."""
    numbers = {name: {"ratio": ratio, "spread": 0.1} for name, ratio in ratios.items()}
    return {"machine": machine, "commit": commit, "numbers": numbers}


def run_ledger(*words, cwd):
    return run_main(ledger.main, *words, "--output", cwd / "docs" / "ledger.jsonl", cwd=cwd)


def test_a_row_has_all_numbers_their_spread_and_times_and_a_picture(checkout, small):
    assert len(NUMBERS) == 12
    done = run_ledger(cwd=checkout)
    assert done.returncode == 0, done.stderr
    [row] = [json.loads(line) for line in (checkout / "docs/ledger.jsonl").read_text().splitlines()]
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True)
    assert head.startswith(row["commit"]) and len(row["commit"]) == 10
    assert row["machine"].keys() == HERE.keys() and row["machine"]["torch"] == torch.__version__
    assert row["machine"]["threads"] == torch.get_num_threads()
    assert [*row["numbers"]] == [*NUMBERS]
    for name, number in row["numbers"].items():
        assert 0 < number["low"] <= number["ratio"] <= number["high"], name
        assert number["spread"] == pytest.approx(number["high"] - number["low"], abs=2e-4)
        assert number["ms"] > 0 and number["reference_ms"] > 0
        assert f"{name} " in done.stdout
    assert (checkout / "docs/ledger.png").read_bytes().startswith(b"\x89PNG")
    again = run_ledger("--only", "loss_head", cwd=checkout)  # the first row is not committed
    assert again.returncode == 0, again.stderr
    assert len((checkout / "docs/ledger.jsonl").read_text().splitlines()) == 2


def test_changed_files_are_refused_except_for_a_dry_run(checkout, small):
    (checkout / "code.py").write_text("changed")
    done = run_ledger("--only", "loss_head", cwd=checkout)
    assert_refused(done, "git: code.py differs from the last commit", "--dry_run")
    done = run_ledger("--only", "loss_head", "--dry_run", cwd=checkout)
    assert done.returncode == 0 and "loss_head " in done.stdout
    assert not (checkout / "docs/ledger.jsonl").read_text()
    assert not (checkout / "docs/ledger.png").exists()


def test_what_git_does_not_know_is_no_change_and_no_repository_is_an_error(checkout, monkeypatch):
    (checkout / "notes").touch()
    assert len(ledger.committed(checkout / "elsewhere.jsonl")) == 10
    monkeypatch.setattr(ledger, "ROOT", checkout.parent)
    done = run_ledger(cwd=checkout)
    assert_refused(done, "git: ", "not a git repository", "--dry_run")


def test_check_warns_of_what_is_worse_beyond_the_noise_and_appends_nothing(checkout, small):
    words = flags(only="loss_head", threads=1)
    assert run_ledger(*words, cwd=checkout).returncode == 0
    path = checkout / "docs/ledger.jsonl"
    row = json.loads(path.read_text())
    row["numbers"]["loss_head"] |= {"ratio": 1e-4, "spread": 0.0}
    path.write_text(json.dumps(row) + "\n")
    (checkout / "code.py").write_text("changed")  # as in every change that is checked
    before = path.read_bytes()
    done = run_ledger("--check", *words, cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert "measuring again what seems worse: loss_head" in done.stdout
    assert "warning: loss_head is " in done.stdout and f"at {row['commit']}" in done.stdout
    assert path.read_bytes() == before
    done = run_ledger("--check", "--only", "prefill", cwd=checkout)
    assert done.returncode == 0 and "note: this machine has no row with prefill" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "warns"),
    [
        (1.0, 1.2, True),
        (1.0, 1.09, False),  # within the spread
        (4.0, 4.15, False),  # within 5%
        (4.0, 4.25, True),
        (1.0, 0.5, False),  # better
    ],
)
def test_worse_is_beyond_both_spreads_and_five_percent(old, new, warns):
    rows = [row_of(token=9.0), row_of(token=old, commit="c1")]
    found = worse(rows, row_of(token=new, scan=9.0))
    assert [*found] == ["token"] * warns
    assert all(line.startswith("warning: token is ") and "c1" in line for line in found.values())


def test_a_wide_spread_on_either_side_is_noise():
    for wide in (0, 1):
        rows = [row_of(token=1.0), row_of(token=1.2)]
        rows[wide]["numbers"]["token"]["spread"] = 0.3
        assert not worse(rows[:1], rows[1])


@pytest.mark.parametrize("field", HERE)
def test_another_machine_is_not_compared(field, capsys):
    other = row_of({**HERE, field: "other"}, token=1.0)
    ledger.check([other], row_of(token=2.0))
    assert capsys.readouterr().out == "note: this machine has no row with token\n"
    assert [*worse([row_of(token=1.0), other], row_of(token=2.0))] == ["token"]


def test_each_number_is_compared_with_the_last_row_that_has_it():
    rows = [row_of(token=1.0, scan=5.0, commit="c1"), row_of(scan=1.0, commit="c2")]
    found = worse(rows, row_of(token=2.0, scan=2.0))
    assert "at c1" in found["token"] and "at c2" in found["scan"]


def test_what_is_worse_once_only_is_no_warning(monkeypatch, capsys):
    monkeypatch.setattr(
        ledger, "measure_all", lambda names, commit: row_of(**dict.fromkeys(names, 1.0))
    )
    ledger.check([row_of(token=1.0, scan=1.0)], row_of(token=2.0, scan=1.0))
    assert capsys.readouterr().out == "measuring again what seems worse: token\nnot confirmed\n"


def test_ratios_are_of_rounds_and_the_spread_is_their_middle_half():
    found = summarize([2.0, 4.0, 9.0, 8.0, 1.0], [1.0, 1.0, 3.0, 8.0, 0.1])  # 2 4 3 1 10
    assert (found["ratio"], found["low"], found["high"], found["spread"]) == (3.0, 2.0, 4.0, 2.0)
    assert (found["ms"], found["reference_ms"]) == (4000.0, 1000.0)


@pytest.mark.parametrize("count", [5_000_000, 3 * 4096 * 64 * 256])
def test_a_product_has_as_many_multiplications_as_asked(count, monkeypatch):
    done = []
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: done.append(a.numel() * b.shape[1])
    )
    product_run(count, inner=64)()
    assert sum(done) == pytest.approx(count, rel=0.05)
