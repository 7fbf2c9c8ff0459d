"""benchmarks/gpu.py: every stage at small sizes, time limits, crashes, the table, predictions."""

import json
import os
import re
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from helpers import POSIX, assert_refused, run_main, run_script, some_ids, wide
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmarks import gpu, gpu_stages, quality, scan
from tinymamba.runtime import Signals

MACHINE = {"name": "a card", "torch": "1", "triton": "2", "transformers": "3", "date": "today"}
MACHINE["command"] = "--force"


def rows_of(folder: Path) -> list[dict]:
    return gpu_stages.read_rows(folder / "rows.jsonl")


def keys_of(rows: list[dict], stage: str) -> set[tuple[str, str]]:
    return {(row["case"], row["name"]) for row in rows if row["stage"] == stage}


def line_of(text: str, stage: str, start: str) -> list[str]:
    """The cells of the only line of a stage's table that begins with `start`."""
    own = text.split(f"\n## {stage}\n")[-1].split("\n## ")[0]
    [line] = [line for line in own.splitlines() if line.startswith(f"| {start} ")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def table_of(*rows: dict) -> str:
    full = [{"status": "ok", "reason": None, **row} for row in rows]
    return gpu.markdown(MACHINE, full, gpu_stages.REAL)


def job(tmp_path: Path, stage: str = "decode") -> gpu_stages.Job:
    """A job of small sizes on the CPU."""
    setup = gpu_stages.make_setup(gpu_stages.TINY.model, [32])
    (tmp_path / "rows.jsonl").touch()
    end = time.monotonic() + 100
    return gpu_stages.Job(stage, gpu_stages.TINY, setup, tmp_path / "rows.jsonl", end)


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a whole run at small sizes, and what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    done = run_script("benchmarks.gpu", "--tiny", "--output_dir", "out", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done.stdout


@pytest.mark.slow
def test_every_stage_writes_what_is_expected(tiny):
    rows = rows_of(tiny[0])
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["machine", *gpu.STAGES]
    for stage in gpu.STAGES:
        assert set(gpu.expected(stage, gpu_stages.TINY)) <= keys_of(rows, stage), stage
    skipped = {(row["name"], row["reason"]) for row in rows if row["status"] == "skipped"}
    assert {row["status"] for row in rows} == {"ok", "skipped"}
    if not torch.cuda.is_available():
        assert {why for name, why in skipped if "graph" in name} == {"needs CUDA"}
    assert len([row for row in rows if row["stage"] == "profile"]) == 2 * (1 + 3)


@pytest.mark.slow
def test_rows_have_what_the_table_shows(tiny):
    rows = [row for row in rows_of(tiny[0]) if row["status"] == "ok"]
    for row in rows:
        if row["stage"] in ("scan", "decode") or (row["stage"] == "training" and row["case"]):
            assert row["tokens_per_second"] > 0 and row["ms"] > 0 and row["first"] > 0
        if row["stage"] == "training" and row["case"]:
            assert row["utilization"] > 0 and row["peak_gb"] >= 0
        if row["case"] == "4/4":
            assert 0 < row["bits_per_byte"] < 12 and row["spent"] >= 0.2
    assert any(row["name"].startswith("attention of llama: flash") for row in rows)


@pytest.mark.slow
def test_the_table_is_printed_and_written(tiny):
    text = (tiny[0] / "table.md").read_text()
    assert text in tiny[1]
    assert "    python -m benchmarks.gpu --tiny --output_dir out\n" in text
    assert "the numbers mean nothing" in text and "predicted" not in text
    assert all(f"\n## {name}\n" in text for name in gpu.STAGES)
    assert line_of(text, "training", "64, tinymamba compiled")[-1] == "measured"
    assert line_of(text, "quality", "4/4, llama")[-1] == "measured"


@pytest.mark.slow
def test_results_of_an_earlier_run_are_kept_unless_forced(tiny):
    before = (tiny[0] / "rows.jsonl").read_text()
    done = run_main(gpu.main, "--tiny", "--output_dir", tiny[0])
    assert_refused(done, "--output_dir: ", "holds rows.jsonl, table.md; pass --force")
    assert (tiny[0] / "rows.jsonl").read_text() == before


def test_a_gpu_is_needed_without_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run_main(gpu.main, cwd=tmp_path)
    assert_refused(done, "device: there is no CUDA GPU; use a machine that has one, or pass --tiny")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ processes


def run_with(monkeypatch, folder: Path, codes: dict[str, str], *words):
    """Run the command with stages that are these Python programs, in place of the real ones."""
    ran = []

    def command(options, stage, limit):
        ran.append(stage)
        row = {"stage": stage, "case": "", "name": "done", "status": "ok", "reason": None}
        write = f"open('gpu_results/rows.jsonl', 'a').write({json.dumps(row) + chr(10)!r})\n"
        return [sys.executable, "-c", write + codes.get(stage, "")]

    monkeypatch.setattr(gpu, "stage_command", command)
    return run_main(gpu.main, "--tiny", *words, cwd=folder), ran


def test_a_crash_is_a_failed_row_and_the_other_stages_run(tmp_path, monkeypatch):
    done, ran = run_with(monkeypatch, tmp_path, {"scan": "raise SystemExit(7)"})
    assert done.returncode == 1 and ran == list(gpu.STAGES)
    bad = [row for row in rows_of(tmp_path / "gpu_results") if row["status"] != "ok"]
    assert [(r["stage"], r["status"], r["reason"]) for r in bad] == [
        ("scan", "failed", "ended with exit code 7")
    ]
    assert line_of(done.stdout, "scan", "the whole stage")[-1] == "failed: ended with exit code 7"
    measured = re.findall(r"^\| done .*\| +measured \|$", done.stdout, re.M)
    assert len(measured) == len(gpu.STAGES), "what a stage wrote before its crash is kept"


def test_only_the_stages_that_are_asked_for_run(tmp_path, monkeypatch):
    done, ran = run_with(monkeypatch, tmp_path, {}, "--stages", "decode", "ceilings")
    assert done.returncode == 0 and ran == ["ceilings", "decode"]


def test_a_stage_measured_again_keeps_the_rows_of_the_others(tmp_path, monkeypatch):
    path = tmp_path / "gpu_results" / "rows.jsonl"
    run_with(monkeypatch, tmp_path, {}, "--stages", "decode", "scan")
    done, _ = run_with(monkeypatch, tmp_path, {}, "--stages", "scan", "ceilings")
    assert_refused(done, "--output_dir: ", "pass --force")
    done, _ = run_with(monkeypatch, tmp_path, {}, "--stages", "scan", "ceilings", "--force")
    assert done.returncode == 0
    stages = [row["stage"] for row in rows_of(path.parent)]
    assert sorted(stages) == ["ceilings", "decode", "machine", "scan"]
    path.write_text(path.read_text().replace('"name": "', '"name": "another '))  # of another card
    run_with(monkeypatch, tmp_path, {}, "--stages", "scan", "--force")
    assert [row["stage"] for row in rows_of(path.parent)] == ["machine", "scan"]


def test_a_row_that_a_killed_stage_left_unfinished_is_skipped(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"name": "a"}\n{"name": "b", "m{"name": "c"}\n{"na')
    assert rows_of(tmp_path) == [{"name": "a"}]


def test_what_no_longer_fits_is_left_out_and_named(tmp_path, monkeypatch):
    done, ran = run_with(monkeypatch, tmp_path, {}, "--minutes", 0.4)
    assert done.returncode == 0 and ran == ["ceilings", "correctness", "scan", "profile"]
    rows = [row for row in rows_of(tmp_path / "gpu_results") if row["status"] == "left out"]
    assert [row["stage"] for row in rows] == ["training", "decode", "resume", "quality"]
    assert rows[0]["reason"].startswith("needs 60 s, and 2")
    assert "left out: needs 120 s, and 2" in done.stdout


@POSIX
def test_a_stage_past_its_limit_is_killed_with_its_children(tmp_path, monkeypatch):
    start_child = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    monkeypatch.setitem(gpu.STAGES, "scan", gpu.STAGES["scan"]._replace(limit=1.0))
    done, ran = run_with(monkeypatch, tmp_path, {"scan": start_child})
    assert done.returncode == 1 and ran == list(gpu.STAGES)
    assert line_of(done.stdout, "scan", "the whole stage")[-1] == "failed: took longer than 1 s"
    assert ("", "done") in keys_of(rows_of(tmp_path / "gpu_results"), "scan")
    assert has_ended(int((tmp_path / "child").read_text()))


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or dead and not collected yet."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@POSIX
def test_a_signal_ends_the_stage_and_the_table_is_still_printed(tmp_path, monkeypatch):
    stop = "import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    done, ran = run_with(monkeypatch, tmp_path, {"training": stop})
    assert done.returncode == 128 + signal.SIGTERM
    assert ran == ["ceilings", "correctness", "training"]
    rows = [row for row in rows_of(tmp_path / "gpu_results") if row["status"] != "ok"]
    assert rows[0]["reason"] == "stopped by a signal"
    assert [row["stage"] for row in rows] == list(gpu.STAGES)[2:]
    assert "left out: the run was stopped" in done.stdout


def test_a_process_that_ends_by_itself_has_no_reason():
    with Signals() as signals:
        assert gpu.supervise([sys.executable, "-c", ""], 60, signals) is None


def test_an_exception_in_a_stage_is_a_row(tmp_path, monkeypatch):
    def broken(job):
        """A stage."""
        job.add("", "first")
        raise RuntimeError("no\nsuch | thing")

    monkeypatch.setattr(torch, "compile", torch.compile)  # --tiny changes it
    monkeypatch.setitem(gpu.STAGES, "scan", gpu.Stage(broken, 1, 1))
    done = run_main(gpu.main, "--tiny", "--here", "scan", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = rows_of(tmp_path)
    assert first["name"] == "first" and first["status"] == "ok"
    assert (last["status"], last["reason"]) == ("failed", "RuntimeError: no such | thing")


# ------------------------------------------------------------------------------------ the table


def test_predictions_stand_until_a_row_replaces_them():
    text = table_of()
    assert text.startswith("# GPU benchmark\n\na card, torch 1, triton 2, transformers 3, today\n")
    assert "0.55 (predicted)" in line_of(text, "training", "512, tinymamba eager")
    assert "0.65 (predicted)" in line_of(text, "training", "512, tinymamba compiled")
    assert "0.95 (predicted)" in line_of(text, "training", "16384, tinymamba eager")
    assert text.count("11.50 (predicted)") == 2 and text.count("(predicted)") == 5
    assert line_of(text, "training", "2048, llama compiled")[-1] == "not measured"
    assert " measured " not in text.replace("not measured", "")

    at_512 = {"stage": "training", "case": "512"}
    text = table_of(
        {**at_512, "name": "tinymamba eager", "tokens_per_second": 300.0, "ms": 1.0},
        {**at_512, "name": "llama eager", "tokens_per_second": 200.0, "ms": 1.0},
        {**at_512, "name": "llama compiled", "tokens_per_second": 400.0, "ms": 1.0},
        {**at_512, "name": "tinymamba compiled", "status": "failed", "reason": "out of | memory"},
    )
    line = line_of(text, "training", "512, tinymamba eager")
    assert "300" in line and "0.75" in line and line[-1] == "measured"
    line = line_of(text, "training", "512, tinymamba compiled")
    assert "0.65 (predicted)" in line and line[-1] == "failed: out of / memory"


def test_quality_shows_the_best_rate_of_each_model():
    run = {"stage": "quality", "name": "llama", "tokens": 4096, "spent": 1.0, "train_loss": 3.0}
    text = table_of(
        {**run, "case": "1/4", "lr": 0.004},
        {**run, "case": "4/4", "lr": 0.004, "bits_per_byte": 1.5},
        {**run, "case": "1/4", "lr": 0.002, "train_loss": 2.5},
        {**run, "case": "4/4", "lr": 0.002, "bits_per_byte": 1.25},
        {**run, "case": "4/4", "lr": 0.008, "bits_per_byte": 1.75},
        {**run, "case": "1/4", "lr": 0.006, "name": "tinymamba"},
    )
    assert line_of(text, "quality", "1/4, llama")[1:] == [
        "0.002",
        "1.0",
        "4,096",
        "2.500",
        "",
        "measured",
    ]
    assert "1.250" in line_of(text, "quality", "4/4, llama")
    assert "0.006" in line_of(text, "quality", "1/4, tinymamba")
    assert line_of(text, "quality", "4/4, tinymamba")[-1] == "not measured"


# ----------------------------------------------------------------------------------- measurements


def test_a_length_that_does_not_fit_is_left_out(tmp_path):
    late = job(tmp_path)._replace(end=time.monotonic() + 10)
    assert late.fits(512, ["a"], 5) and not late.fits(512, ["a", "b"], 60)
    rows = rows_of(tmp_path)
    assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["status"] == "left out"
    assert rows[0]["reason"].startswith("takes about 60 s, and ")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_text_of_tinymamba_goes_on_and_back(in_place):
    model, ids = wide(), some_ids(1, 4)
    with torch.no_grad():
        text = gpu_stages.TinyMambaText(model, 5, False, in_place)
        read = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], dim=1)
        want = model(read)[:, 5:]
        state = text.state
        for _ in range(2):
            got = torch.cat([text.step(token) for token in ids.split(1, 1)], dim=1)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            assert (text.state is state) == in_place
            text.rewind()


def test_a_text_of_llama_goes_back(tmp_path):
    setup = job(tmp_path).setup
    model, ids = benchmark.make_runner("llama", setup).model.eval(), some_ids(1, 4)
    with torch.no_grad():
        text = gpu_stages.LlamaText(model, 8, False, 4)
        first = [text.step(token) for token in ids.split(1, 1)]
        assert int(text.cache.get_seq_length()) == 12
        text.rewind()
        for token, want in zip(ids.split(1, 1), first, strict=True):
            torch.testing.assert_close(text.step(token), want)


def test_what_is_compared_with_the_cpu_has_no_noise(tmp_path, monkeypatch):
    """A GPU draws other random numbers than a CPU; here the seed of the model's noise differs."""
    setup = job(tmp_path).setup._replace(dtype=torch.float32)
    assert setup.config.state_noise > 0
    build, results = gpu_stages.make_runner, []

    def runner(name, setup):
        made = build(name, setup)
        assert made.model is not None  # built, so that only noise comes after the seed
        torch.manual_seed(len(results))
        return made

    monkeypatch.setattr(gpu_stages, "make_runner", runner)
    for _ in range(2):
        results.append(gpu_stages.loss_and_norm(setup, 32))
    assert results[0] == results[1]


def test_simple_gla_computes_what_our_scan_computes(monkeypatch):
    def recurrence(q, k, v, g, scale):
        """What the package documents: S = exp(g) S + k v, o = scale q S."""
        state, out = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]), []
        for t in range(q.shape[1]):
            state = g[:, t, :, None, None].exp() * state + k[:, t, ..., None] * v[:, t, :, None]
            out.append(scale * (q[:, t, ..., None] * state).sum(-2))
        return torch.stack(out, dim=1), None

    library = types.SimpleNamespace(chunk_simple_gla=recurrence)
    monkeypatch.setattr(gpu_stages.importlib, "import_module", lambda name: library)
    options = scan.Options(heads=3, head_dim=4, d_state=8, dtype=torch.float32)
    inputs = scan.draw(options, 2, 50)
    got, want = gpu_stages.simple_gla(*inputs), scan.ours(*inputs)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="y differs by"):
        gpu_stages.require_near(1.1 * got, want, "y", 3e-2)


@pytest.mark.parametrize("name", gpu_stages.NAMES)
def test_flops_of_products_are_those_that_pytorch_counts(name, tmp_path):
    setup = job(tmp_path).setup
    runner = benchmark.make_runner(name, setup)
    ids = benchmark.random_ids(setup, 1, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        runner.logits(runner.model, ids)
    products = sum(
        flops
        for op, flops in counter.get_flop_counts()["Global"].items()
        if str(op) in ("aten.mm", "aten.addmm")
    )
    c, got = setup.config, gpu_stages.flops_per_token(runner, setup.config, 32)
    rest = {
        "llama": 6 * runner.size["layers"] * c.d_model * 32,
        "tinymamba": c.n_layer * (12 * c.d_model * 32 + 18 * 2 * c.d_model * c.d_state),
    }
    assert got == pytest.approx(3 * products / 32 + rest[name], rel=0.01)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [quality.schedule(step, 1000, 100) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and max(rates) == 1.0
    assert rates[100:] == sorted(rates[100:], reverse=True) and rates[-1] < 1e-5
