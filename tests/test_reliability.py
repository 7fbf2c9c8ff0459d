"""Breaking a run on purpose: kill -9, damaged files, full disks, signals, spikes, changed data.

The counts here are small; `make chaos` runs the same with CHAOS=1, in the numbers of
docs/reliability.md.
"""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import (
    LATEST,
    LINUX,
    POSIX,
    ROOT,
    STEP,
    after_step,
    assert_compiled,
    assert_refused,
    assert_refuses,
    brief_config,
    brief_flags,
    call,
    free_port,
    go_on,
    most_memory,
    run_script,
    run_two_ranks,
    start_fork,
    tiny_config,
    two_ranks,
)
from torch.utils._pytree import tree_leaves

import testv2
from testv2 import Trainer
from tinymamba.checkpoint import (
    copy_to_host,
    digest,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    sibling,
)
from tinymamba.cli import UserError
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_alphabet

CHAOS = "CHAOS" in os.environ
PREVIOUS = sibling(LATEST, "previous")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def times(usual: int, chaos: int) -> int:
    return chaos if CHAOS else usual


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory) -> bytes:
    """A checkpoint file with a model, Muon's and AdamW's state."""
    path = tmp_path_factory.mktemp("small") / "model.pt"
    model = testv2.TinyMambaModel(tiny_config(n_layer=1))
    optimizer = testv2.make_optimizer(model, model.config)
    ids = torch.randint(257, (1, 9))
    model(ids, ids).backward()
    optimizer.step()
    save_checkpoint(
        path,
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "config": model.config.to_dict(),
        },
    )
    return path.read_bytes()


# ----------------------------------------------------------------------------- bitwise resume

EVERYTHING = {
    "train_data_path": [f"data/text/{name}.bin" for name in ("train", "val", "more")],
    "train_data_weights": [0.5, 0.3, 0.2],
    "dropout": 0.1,
    "gradient_accumulation_steps": 2,
    "batch_size": 2,
    "gate": "top_k",
    "max_steps": 12,
    "enable_validation": True,
    "validation_interval": 3,
    "validation_steps": 2,
    "checkpoint_interval": 4,
    "use_early_stopping": True,
    "early_stopping_patience": 3,
    "early_stopping_min_delta": 0.05,
}


def stop_in_forward(trainer: Trainer, number: int) -> None:
    """SIGTERM in the n-th pass of this run through the model: inside an accumulation, at odd n."""
    seen = []

    def hook(*_) -> None:
        seen.append(1)
        if len(seen) == number:
            signal.raise_signal(signal.SIGTERM)

    trainer.model.register_forward_hook(hook)


def go_on_until(number: int) -> int:
    """Resume, and stop in that pass of the new run; the exit code."""
    saved = load_checkpoint(LATEST)
    trainer = Trainer(testv2.Config.from_dict(saved["config"]), saved=saved)
    stop_in_forward(trainer, number)
    return trainer.run()


AMPS = (torch.float32, torch.bfloat16, torch.float16)
STOPS = [(1, 2), (3, 4), (6, 7), (7, 8), (9, 1), (11, 5)]


@pytest.mark.parametrize(
    "amp, stops",
    [
        *((amp, STOPS[i::3]) for i, amp in enumerate(AMPS)),
        *(pytest.param(amp, STOPS, marks=pytest.mark.slow) for amp in AMPS),
    ],
)
def test_stopped_twice_anywhere_is_bitwise_never_stopped(place, monkeypatch, amp, stops):
    """Float16 brings the GradScaler, whose first steps overflow."""
    monkeypatch.setattr(testv2, "pick_amp_dtype", lambda *_: amp)
    (place / "data/text/more.bin").write_bytes((place / "data/text/train.bin").read_bytes()[:4000])
    config = brief_config(**EVERYTHING, wandb_run_name="run")
    assert Trainer(config).run() == 0
    expected = load_checkpoint(LATEST)
    for first, second in stops:
        trainer = Trainer(config)
        stop_in_forward(trainer, first)
        assert trainer.run() == 143
        assert go_on_until(second) == 143
        assert go_on_until(0) == 0
        got = load_checkpoint(LATEST)
        for part in ("model", "optimizer", "scaler", "global_step", "tokens_seen", "val_loss"):
            assert digest(got[part]) == digest(expected[part]), (first, second, part)
        assert got["data"] == expected["data"]
        for part in ("history", "best", "bad_validations", "bad_steps", "skipped", "norm"):
            assert got["progress"][part] == expected["progress"][part], (first, second, part)


# ------------------------------------------------------------------------------ damaged files


def test_every_flipped_bit_is_caught(tmp_path, small_checkpoint):
    path, dice = tmp_path / "model.pt", random.Random(0)
    path.write_bytes(small_checkpoint)
    whole, refused = digest(load_checkpoint(path)), 0
    for _ in range(times(100, 1000)):
        raw, at = bytearray(small_checkpoint), dice.randrange(len(small_checkpoint))
        raw[at] ^= 1 << dice.randrange(8)
        path.write_bytes(raw)
        try:
            same = digest(load_checkpoint(path)) == whole
        except UserError:
            refused += 1
            continue
        assert same, f"byte {at}: the damage may lie only where nothing is kept"
    assert refused > 0.8 * times(100, 1000), "most of the file is tensors"


def test_every_truncation_is_refused(tmp_path, small_checkpoint):
    path, dice = tmp_path / "model.pt", random.Random(0)
    for _ in range(times(20, 100)):
        path.write_bytes(small_checkpoint[: dice.randrange(len(small_checkpoint))])
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)


def test_the_one_before_is_kept_and_used_when_the_newest_is_damaged(place):
    assert call(*brief_flags(max_steps=6, checkpoint_interval=2)).returncode == 0
    assert load_checkpoint(LATEST)["global_step"] == 6
    assert load_checkpoint(PREVIOUS)["global_step"] == 4
    LATEST.write_bytes(LATEST.read_bytes()[:-100])
    done = call("--resume", "--max_steps", 8)
    assert done.returncode == 0, done.stderr
    assert f"{LATEST}: is damaged" in done.stdout and f"continuing from {PREVIOUS}" in done.stdout
    assert load_checkpoint(LATEST)["global_step"] == 8
    assert load_checkpoint(PREVIOUS)["global_step"] == 6
    assert Path(f"{LATEST}.damaged.1").exists()


def test_a_damaged_file_never_takes_the_place_of_the_good_one_before(place):
    assert call(*brief_flags(max_steps=4, checkpoint_interval=2)).returncode == 0
    LATEST.write_bytes(b"damaged")
    done = call("--resume", "--max_steps", 3)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(PREVIOUS)["global_step"] == 2, "what was read is still there"


def test_a_run_whose_newest_file_is_gone_goes_on_from_the_one_before(place):
    assert call(*brief_flags(max_steps=4, checkpoint_interval=2)).returncode == 0
    LATEST.unlink()
    done = call("--resume", "--max_steps", 5)
    assert done.returncode == 0 and f"continuing from {PREVIOUS}" in done.stdout, done.stderr


def test_without_a_good_file_there_is_an_error_and_no_new_start(place):
    assert call(*brief_flags(max_steps=4, checkpoint_interval=2)).returncode == 0
    for path in (LATEST, PREVIOUS):
        path.write_bytes(b"damaged")
    assert_refuses("--resume", naming=[str(LATEST), "damaged"])


# ------------------------------------------------------------------------------------ kill -9


def stop_inside_a_save(process: subprocess.Popen) -> None:
    """Stop it while it writes a file, which would be in place before a kill arrives, at times."""
    writing = Path(f"{LATEST}.tmp")
    while True:
        while not writing.exists():
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        if writing.exists():
            return
        process.send_signal(signal.SIGCONT)


@POSIX
def test_kill_9_at_any_moment_loses_at_most_one_save_interval(place):
    """Half of the kills wait until a file is being written."""
    size = {"d_model": 128, "num_heads": 4, "vocab_size": 4096, "checkpoint_interval": 1}
    words, dice = brief_flags(max_steps=10**6, **size), random.Random(0)
    kills, inside, reached = times(3, 100), 0, 0
    for number in range(kills):
        log = open("log", "w+")  # noqa: SIM115
        now = ["--resume"] if number else words
        process = start_fork(testv2.main, *now, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 100
        while "saved" not in Path("log").read_text() and time.monotonic() < deadline:
            assert process.poll() is None, Path("log").read_text()
            os.sched_yield()
        moment = time.monotonic() + dice.uniform(0.0, 0.3)
        while time.monotonic() < moment:
            os.sched_yield()
        if number % 2 == 0:
            stop_inside_a_save(process)
        inside += Path(f"{LATEST}.tmp").exists()
        process.kill()
        process.wait()
        log.close()
        said = [int(n) for n in re.findall(r"saved \S+ at step (\d+)", Path("log").read_text())]
        found = load_newest(LATEST)["global_step"]
        assert found >= said[-1] - 1 and found > reached, (found, said[-1], reached)
        reached = found
    assert inside >= 0.4 * kills, f"{inside} of {kills} kills were inside a save"


# ---------------------------------------------------------------------------------- full disks


@POSIX
def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_last_checkpoint(place):
    assert call(*brief_flags(max_steps=2)).returncode == 0
    good = LATEST.read_bytes()

    resource = pytest.importorskip("resource")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, len(good) // 2))

    command = [sys.executable, ROOT / "testv2.py", "--resume", "--max_steps", "4"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, preexec_fn=limit)
    assert_refused(done, str(LATEST), "cannot be written")
    assert LATEST.read_bytes() == good and not Path(f"{LATEST}.tmp").exists()
    assert call("--resume", "--max_steps", 4).returncode == 0


@LINUX
@pytest.mark.slow
def test_a_full_file_system_keeps_the_last_checkpoint(place):
    disk = place / "disk"
    disk.mkdir()
    train = " ".join(map(str, [sys.executable, ROOT / "testv2.py"]))
    first = " ".join(brief_flags(max_steps=2, checkpoint_path=disk / LATEST))
    script = f"""mount -t tmpfs -o size=1500k none {disk} && {train} {first} || exit 99
        head -c 2000000 /dev/zero > {disk}/filler; {train} --resume --max_steps 4 \
            --checkpoint_path {disk / LATEST} && exit 98; rm {disk}/filler
        {train} --resume --max_steps 4 --checkpoint_path {disk / LATEST}"""
    how = {"env": ENV, "capture_output": True, "text": True}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], **how)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.strerror(errno.ENOSPC) in done.stderr or "cannot be written" in done.stderr


def test_an_unreadable_file_is_never_put_in_place(place, monkeypatch):
    """A disk that takes the bytes and gives back others."""
    assert call(*brief_flags(max_steps=2)).returncode == 0
    good, save = LATEST.read_bytes(), torch.save

    def rotten(state, path):
        save(state, path)
        with open(path, "r+b") as file:
            file.seek(len(good) // 2)
            file.write(bytes(64))

    monkeypatch.setattr(torch, "save", rotten)
    assert_refused(call("--resume", "--max_steps", 4), "damaged")
    assert LATEST.read_bytes() == good


# ---------------------------------------------------------------------------- background saves


def test_saves_in_the_background_hold_the_same(place):
    words = {
        "max_steps": 5,
        "checkpoint_interval": 2,
        "enable_validation": "true",
        "validation_interval": 2,
        "save_top_k": 2,
        "wandb_run_name": "run",
    }
    files = []
    for asynchronous in ("false", "true"):
        assert call(*brief_flags(**words, async_save=asynchronous)).returncode == 0
        found = {path: load_checkpoint(path) for path in sorted(Path().glob("*.pt"))}
        for state in found.values():
            state["config"].pop("async_save")
        files.append({str(path): digest(state) for path, state in found.items()})
        for path in found:
            path.unlink()
        shutil.rmtree("logs")  # else the second run has a folder of its own
    assert files[0] == files[1] and len(files[0]) == 5


def test_the_copy_for_the_background_is_of_all_and_tied_tensors_stay_tied():
    weight = torch.arange(6.0).view(2, 3)
    state = {"a": weight, "tied": [weight], "view": weight.T, "n": {"list": [1, [2, "x"]]}}
    before, made = digest(state), copy_to_host(state)
    weight.zero_()
    state["n"]["list"][1].append(3)
    assert digest(made) == before and made["a"] is made["tied"][0]
    assert torch.equal(made["view"], made["a"].T)


def test_an_error_in_the_background_ends_the_run(place, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    done = call(*brief_flags(max_steps=5, checkpoint_interval=2, async_save="true"))
    assert_refused(done, str(LATEST), "No space left on device")


# ------------------------------------------------------------------------------------ signals

PHASES = {
    "enable_validation": True,
    "validation_interval": 2,
    "validation_steps": 4,
    "generate_samples": True,
    "generation_interval": 2,
    "generation_length": 8,
}


def raise_in(trainer: Trainer, phase: str, number: int, monkeypatch) -> None:
    """Send this process a signal the first time that the run is in that phase."""
    waiting = [number]

    def act(*_) -> None:
        if waiting:
            signal.raise_signal(waiting.pop())

    if phase == "training":
        after_step(trainer, 2, act)
    elif phase == "validation":
        trainer.model.register_forward_hook(lambda m, *_: None if m.training else act())
    elif phase == "generation":
        advance = trainer.model.advance
        monkeypatch.setattr(trainer.model, "advance", lambda *a, **k: (act(), advance(*a, **k))[1])
    else:
        save = torch.save
        monkeypatch.setattr(torch, "save", lambda *a: (act(), save(*a)))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", pytest.param("SIGUSR1", marks=POSIX)])
def test_a_signal_in_any_phase_and_the_run_that_goes_on(place, name, monkeypatch):
    assert Trainer(brief_config(max_steps=6, **PHASES)).run() == 0
    expected, number = load_checkpoint(LATEST), getattr(signal, name)
    config = brief_config(max_steps=6, checkpoint_interval=2, **PHASES)
    for phase in ("training", "validation", "generation", "saving"):
        trainer = Trainer(config, SimpleTokenizer())
        with monkeypatch.context() as patch:
            raise_in(trainer, phase, number, patch)
            code = trainer.run()
        if name == "SIGUSR1":
            assert code == 0 and trainer.step == 6, phase
        else:
            assert code == 128 + number and trainer.step <= 3, phase
            assert load_checkpoint(LATEST)["global_step"] == trainer.step
            trainer = go_on()
        got = load_checkpoint(LATEST)
        for part in ("model", "optimizer", "val_loss"):
            assert digest(got[part]) == digest(expected[part]), (phase, part)
        assert got["progress"]["history"] == expected["progress"]["history"], phase


@POSIX
def test_a_checkpoint_asked_for_before_a_validation_knows_that_it_is_due(place, monkeypatch):
    trainer, saved = Trainer(brief_config(max_steps=2, **PHASES)), []
    after_read = trainer.exchange

    def exchange(*values):
        signal.raise_signal(signal.SIGUSR1)
        return after_read(*values)

    monkeypatch.setattr(trainer, "exchange", exchange)
    monkeypatch.setattr(trainer, "validate", lambda: saved.append(load_checkpoint(LATEST)) or 1.0)
    assert trainer.run() == 0
    assert [state["global_step"] for state in saved] == [2]
    assert saved[0]["progress"]["unfinished"]


def test_a_signal_in_validation_does_not_wait_for_its_end(place):
    trainer = Trainer(brief_config(max_steps=6, **{**PHASES, "validation_steps": 0}))
    seen = []

    def act(model, *_) -> None:
        if not model.training:
            seen.append(1)
            signal.raise_signal(signal.SIGTERM)

    trainer.model.register_forward_hook(act)
    assert trainer.run() == 143 and len(seen) == 1


# ------------------------------------------------------------------------------------- spikes


def spiked_trainer(spikes: set[int], **changes) -> Trainer:
    """A Trainer whose n-th backward passes give huge gradients."""
    trainer, calls = Trainer(brief_config(**changes)), []

    def hook(grad):
        calls.append(1)
        return grad * 1e6 if len(calls) in spikes else grad

    trainer.model.norm.weight.register_hook(hook)
    return trainer


def test_a_spike_leaves_weights_and_optimizer_as_they_were(place, capsys):
    trainer = spiked_trainer({25, 27}, max_steps=30, skip_spikes=6.0)
    states = []
    trainer.optimizer.register_step_post_hook(lambda *_: states.append(trainer.step))
    assert trainer.run() == 0
    assert len(states) == 28 and trainer.progress["skipped"] == 2
    assert capsys.readouterr().out.count("is a spike") == 2


def test_a_level_that_stays_high_is_no_spike_for_ever(place):
    trainer = spiked_trainer(set(range(25, 400)), max_steps=200, skip_spikes=6.0)
    assert trainer.run() == 0
    assert 0 < trainer.progress["skipped"] < 150


def test_spikes_are_taken_by_default(place):
    trainer = spiked_trainer({25}, max_steps=30)
    assert trainer.run() == 0 and trainer.progress["skipped"] == 0


def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is(place, monkeypatch):
    trainer = Trainer(brief_config(max_steps=2, max_bad_steps=1))
    before = digest(trainer.model.state_dict())
    monkeypatch.setattr(trainer, "accumulate", lambda taken: float("inf"))
    with pytest.raises(UserError, match="no finite"):
        trainer.run()
    assert digest(trainer.model.state_dict()) == before


# ------------------------------------------------------------------------------- changed data


@pytest.fixture
def stopped(place):
    trainer = Trainer(brief_config(max_steps=6))
    after_step(trainer, 3, lambda: signal.raise_signal(signal.SIGTERM))
    assert trainer.run() == 143
    return place


def test_resume_on_data_of_the_same_size_but_other_content_is_refused(stopped):
    path = Path("data/text/train.bin")
    ids = np.fromfile(path, dtype=np.int32)
    ids[:8] = 5
    ids.tofile(path)
    assert_refuses("--resume", naming=["sources", "--accept_changed_data"])
    assert call("--resume", "--accept_changed_data").returncode == 0


def test_all_changed_settings_are_named_at_once(stopped):
    line = assert_refuses("--resume", "--d_model", 64, "--seed", 5, "--block_size", 16)
    assert line.startswith("error: d_model, block_size, seed: 64, 16, 5 asked for")
    assert "has 32, 32, 1337" in line


def test_harmless_settings_may_change(stopped):
    words = ["--log_interval", 2, "--rank_timeout", 5, "--checkpoint_interval", 7]
    assert call("--resume", *words).returncode == 0


@POSIX
@pytest.mark.parametrize("workers", [0, 2])
def test_data_cut_during_a_run_saves_and_ends_it_in_one_line(place, workers):
    trainer = Trainer(brief_config(max_steps=10**4, num_workers=workers))
    after_step(trainer, 3, lambda: os.truncate("data/text/train.bin", 8))
    with pytest.raises(UserError, match="was cut to 2 tokens"):
        trainer.run()
    assert load_checkpoint(LATEST)["global_step"] == trainer.step >= 3


@POSIX
def test_a_sparse_file_of_40_gigabytes_is_read_at_once(place):
    path = Path("data/text/train.bin")
    os.truncate(path, 40 * 10**9 // 4 * 4)
    before = most_memory()
    start = time.process_time()  # to read a hole takes no disk, and seconds of the processor
    data = testv2.StreamingTokenDataset(path, 32, shuffle=True)
    x, y = data[10**9]
    seconds = time.process_time() - start
    grown = most_memory() - before
    assert x.shape == y.shape == (32,) and seconds < 1.0
    assert grown < 64 * 1024**2, f"{grown:,} bytes"


# ------------------------------------------------------------------------------ secrets


def test_keys_and_environment_reach_no_file(place, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "5ecre7ed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MY_OTHER_SECRET", "hunter2hunter2")
    words = brief_flags(max_steps=3, use_wandb="true", checkpoint_interval=2)
    done = run_script("testv2.py", *words, cwd=place)  # W&B would change this process's environment
    assert done.returncode == 0, done.stderr
    [run] = place.rglob("offline-run-*/run-*.wandb")
    assert run.stat().st_size > 500
    secrets = [os.environ[name].encode() for name in ("WANDB_API_KEY", "MY_OTHER_SECRET")]
    said = [done.stdout.encode(), done.stderr.encode()]
    for text in [*said, *(p.read_bytes() for p in place.rglob("*") if p.is_file())]:
        assert not any(secret in text for secret in secrets)


# --------------------------------------------------------------------------- several processes


def wait_for(process: subprocess.Popen, beginning: str) -> str:
    """The first line that begins so."""
    line = next((line for line in process.stdout if line.startswith(beginning)), "")
    assert line, process.stderr.read()
    return line


def test_a_signal_while_the_cause_of_a_failure_is_found_does_not_hide_it(place, monkeypatch):
    """A launcher sends SIGTERM to the others as soon as one process has ended."""

    class Watchdog:
        def raise_cause(self, error: Exception) -> None:
            signal.raise_signal(signal.SIGTERM)
            raise UserError("WORLD_SIZE", f"rank 1 has failed ({error})", "see its message")

        def close(self, error: Exception | None) -> None:
            assert isinstance(error, dist.DistError)

    def fail() -> None:
        raise dist.DistError("connection closed")

    trainer = Trainer(brief_config(max_steps=2))
    trainer.watchdog = Watchdog()
    monkeypatch.setattr(trainer, "train", fail)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="rank 1 has failed"):
        trainer.run()
    assert signal.getsignal(signal.SIGTERM) is before


@POSIX
@pytest.mark.parametrize("how", ["SIGSTOP", "SIGKILL"])
def test_a_process_that_is_dead_or_hangs_ends_the_others_by_name(place, how):
    words = brief_flags(max_steps=10**6, rank_timeout=3, batch_size=2)
    with two_ranks(*words) as (first, second):
        wait_for(first, "step 3/")
        second.send_signal(getattr(signal, how))
        _, err = first.communicate(timeout=60)
    assert_refused(
        subprocess.CompletedProcess(words, first.returncode, "", err),
        f"rank 1 (process {second.pid} on ",
        "no heartbeat",
    )


@pytest.mark.parametrize("failing", [pytest.param(0, marks=LINUX), pytest.param(1, marks=POSIX)])
def test_an_error_of_one_process_ends_the_other_with_its_words(place, failing):
    """The writer's disk is full, or the data of the other are gone."""
    words = brief_flags(max_steps=10**6, batch_size=2, checkpoint_interval=10**6, rank_timeout=30)
    with two_ranks(*words) as both:
        wait_for(both[0], "step 3/")
        if failing == 0:
            resource = pytest.importorskip("resource")
            resource.prlimit(both[0].pid, resource.RLIMIT_FSIZE, (4096, 4096))
            both[0].send_signal(signal.SIGUSR1)
        else:
            os.truncate("data/text/train.bin", 100)
        errors = [process.communicate(timeout=25)[1] for process in both]
    for process, err in zip(both, errors, strict=True):
        done = subprocess.CompletedProcess(words, process.returncode, "", err)
        assert_refused(done, f"{LATEST}: cannot be written" if failing == 0 else "train.bin")
    other = errors[1 - failing]
    if failing == 0:
        assert f"rank 0 (process {both[0].pid} on " in other, other


@POSIX
@pytest.mark.parametrize("number", range(times(2, 50)))
def test_a_signal_to_any_process_at_any_moment_is_heeded_by_all(place, number):
    """One asks for a checkpoint, after which the run goes on, and the next one ends it."""
    dice = random.Random(number)
    name = ("SIGTERM", "SIGINT")[number % 2]
    words = brief_flags(
        **{
            **PHASES,
            "max_steps": 10**6,
            "checkpoint_interval": 3,
            "validation_steps": 50,
            "generation_length": 40,
            "batch_size": 2,
        }
    )
    vocabulary = [*byte_alphabet(), EOS_TOKEN]
    Path("data/text/vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    with two_ranks(*words) as both:
        wait_for(both[0], "step 4/")
        for asked in ("SIGUSR1", name):
            until = time.monotonic() + dice.uniform(0.0, 1.0)
            while time.monotonic() < until:
                os.sched_yield()
            both[dice.randrange(2)].send_signal(getattr(signal, asked))
            if asked == "SIGUSR1":
                wait_for(both[0], "saved")
                last = int(wait_for(both[0], "step ").split("/")[0].split()[1])
        outs = [process.communicate(timeout=60) for process in both]
    assert [p.returncode for p in both] == [128 + getattr(signal, name)] * 2, outs
    assert [err for _, err in outs] == ["", ""]
    steps = [int(step) for step, _, _ in STEP.findall(outs[0][0])]
    assert load_checkpoint(LATEST)["global_step"] == max(steps, default=last)


def launch(ranks: int, *words, nodes: int = 1, timeout: float = 200) -> str:
    """testv2.py in several processes, started by torchrun, once for each node; what they print."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks // nodes}",
        f"--nnodes={nodes}",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]
    script = [str(ROOT / "testv2.py"), *map(str, words)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENV}
    agents = [
        subprocess.Popen([*command, f"--node_rank={node}", *script], **how) for node in range(nodes)
    ]
    done = [agent.communicate(timeout=timeout) for agent in agents]
    assert all(agent.returncode == 0 for agent in agents), done
    return "".join(out for out, _ in done)


STEPS = {
    "enable_validation": "true",
    "validation_interval": 3,
    "validation_steps": 3,
    "checkpoint_interval": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
}


def losses() -> list[float]:
    """Every step's loss, as the run's last checkpoint has them."""
    return [loss for _, loss in load_checkpoint(LATEST)["progress"]["history"]["train"]]


@POSIX
def test_cut_parameters_train_as_whole_ones_and_checkpoints_fit_both(place):
    """FSDP on two processes, then one process, then two again: as one process all the time."""
    call(*brief_flags(**STEPS), "--max_steps", 3)
    call("--resume", "--max_steps", 6)
    call("--resume", "--max_steps", 9)
    expected, whole = losses(), load_checkpoint(LATEST)
    words = [*brief_flags(**{**STEPS, "batch_size": 2}), "--checkpoint_activations"]
    run_two_ranks(*words, "--parallel", "fsdp", "--max_steps", 3)
    call("--resume", "--max_steps", 6, "--batch_size", 4)
    run_two_ranks("--resume", "--max_steps", 9, "--batch_size", 2)
    assert len(expected) == 9 and losses() == pytest.approx(expected, abs=1e-5)
    cut = load_checkpoint(LATEST)
    for part in ("model", "optimizer"):
        pairs = zip(tree_leaves(cut[part]), tree_leaves(whole[part]), strict=True)
        for a, b in pairs:
            if isinstance(b, torch.Tensor):
                torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_autocast_and_recomputed_on_two_processes(place, parallel):
    words = brief_flags(**{**STEPS, "batch_size": 2, "max_steps": 3, "rank_timeout": 600})
    words[words.index("--amp_dtype") + 1] = "bfloat16"
    launch(2, *words, "--parallel", parallel)
    eager = losses()
    said = launch(
        2,
        *words,
        "--parallel",
        parallel,
        "--use_compile",
        "true",
        "--checkpoint_activations",
        timeout=900,
    )
    assert_compiled(said)
    assert losses() == pytest.approx(eager, abs=2e-2) and len(eager) == 3


COUNTS = [(1, 2), (1, 4), (2, 0), (2, 2), (2, 4), (4, 0), (4, 2), (4, 4)]


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("ranks, workers", COUNTS)
def test_any_number_of_processes_and_workers_gives_the_same_losses(place, ranks, workers):
    """Two processes with two workers each are also in the next test."""
    call(*brief_flags(**STEPS))
    expected = losses()
    launch(ranks, *brief_flags(**{**STEPS, "batch_size": 4 // ranks, "num_workers": workers}))
    assert len(expected) == 6 and losses() == pytest.approx(expected, abs=1e-5)


@POSIX
def test_two_nodes_train_as_one(place):
    call(*brief_flags(**STEPS))
    expected = losses()
    launch(2, *brief_flags(**{**STEPS, "batch_size": 2, "num_workers": 2}), nodes=2)
    assert len(expected) == 6 and losses() == pytest.approx(expected, abs=1e-5)


def test_activations_made_again_give_the_same_bits_and_keep_fewer(place):
    held, gradients = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = testv2.TinyMambaModel(
            tiny_config(n_layer=4, dropout=0.1, checkpoint_activations=again)
        ).train()
        ids, kept = torch.randint(257, (2, 64), generator=torch.Generator().manual_seed(0)), []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.nbytes), t)[1],  # noqa: B023
            lambda t: t,
        ):
            loss = model(ids, ids)
        held.append(sum(kept))
        loss.backward()
        gradients.append(digest([p.grad for p in model.parameters()]))
    assert gradients[0] == gradients[1]
    assert held[1] < 0.5 * held[0], held
