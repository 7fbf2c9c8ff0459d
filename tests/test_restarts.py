"""Runs that begin, continue, branch and are started again: by hand, by a queue, by torchrun.

`make chaos` runs the kills with CHAOS=1, ten times.
"""

import contextlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    BRIEF,
    LATEST,
    LINUX,
    POSIX,
    ROOT,
    after_step,
    assert_refused,
    assert_refuses,
    brief_config,
    brief_flags,
    call,
    flags,
    free_port,
    run_two_ranks,
    start_fork,
    tiny_config,
)

import testv2
from testv2 import Config, StreamingTokenDataset, Trainer, learning_rate, parse_command_line
from tinymamba.checkpoint import digest, load_checkpoint, load_newest, sibling
from tinymamba.cli import UserError

CHAOS = "CHAOS" in os.environ
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


BEST = sibling(LATEST, "best")
RATE = re.compile(r"^step (\d+)/\d+ \| .* lr (\S+) ", re.M)


def rates(text: str) -> dict[int, float]:
    """The learning rate of each step that a run has printed."""
    return {int(step): float(rate) for step, rate in RATE.findall(text)}


def train(*words) -> str:
    """testv2.py with these words; what it prints."""
    done = call(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -------------------------------------------------------------------------- begin or continue


def test_the_same_line_twice_begins_and_then_continues(place):
    words = [*brief_flags(checkpoint_interval=2), "--resume", "auto", "--max_steps"]
    assert "steps 0 to 4" in train(*words, 4)
    assert "steps 4 to 8" in train(*words, 8)
    again = train(*words, 8)
    assert "steps 8 to 8" in again and "nothing is left to do" in again
    assert load_checkpoint(sibling(LATEST, "previous"))["global_step"] == 6
    assert_refuses(*words, 7, naming=["max_steps", "7", "step 8"])
    LATEST.unlink()  # killed between the two renames of a save
    assert "steps 6 to 8" in train(*words, 8)
    assert not list(place.glob("*.pt.1"))


def test_auto_never_begins_over_a_damaged_run(place):
    words = [*brief_flags(max_steps=2), "--resume", "auto"]
    train(*words)
    LATEST.write_bytes(LATEST.read_bytes()[:-100])
    assert_refuses(*words, naming=["damaged"])


def test_a_run_that_torchrun_starts_again_continues_what_it_saved(place, monkeypatch):
    """And nothing else: an earlier run's files are not its own, however early it failed."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    train(*brief_flags(max_steps=2, seed=5))  # an earlier run
    with monkeypatch.context() as patch:
        patch.setattr(testv2, "Trainer", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(*brief_flags(max_steps=4))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "steps 0 to 2" in train(*brief_flags(max_steps=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert "steps 2 to 4" in train(*brief_flags(max_steps=4))
    assert [p.name for p in place.glob("*.pt.*")] == [f"{LATEST}.1"]


def test_a_run_that_stopped_early_does_not_train_on_by_itself(place):
    words = brief_flags(max_steps=20, enable_validation="true", validation_interval=2)
    stopping = ["--use_early_stopping", "--early_stopping_min_delta", 100, "--resume", "auto"]
    assert "steps 0 to 20" in train(*words, *stopping, "--early_stopping_patience", 1)
    again = train(*words, *stopping, "--early_stopping_patience", 1)
    assert "steps 4 to 20" in again and "raise --early_stopping_patience" in again
    assert "step 6/20" in train(*words, *stopping, "--early_stopping_patience", 2)


def test_a_branch_reads_one_run_and_writes_another(place):
    train(*brief_flags(max_steps=6, validation_interval=2, enable_validation="true", save_top_k=2))
    read = {path: path.read_bytes() for path in place.glob("*.pt")}
    assert len(read) == 4
    for name in ("resume_from", "init_from"):
        assert_refuses(*brief_flags(), f"--{name}", BEST, naming=[name, "--checkpoint_path"])
    assert_refuses("--resume", "--checkpoint_path", BEST, naming=["--resume_from"])
    branch = ["--resume_from", BEST, "--checkpoint_path", "b.pt", "--resume", "auto"]
    assert "steps 6 to 8" in train(*branch, "--max_steps", 8)
    assert load_checkpoint("b.pt")["config"]["checkpoint_path"] == "b.pt"
    assert "steps 8 to 10" in train(*branch, "--max_steps", 10), "its own file comes first"
    other = ["--init_from", BEST, "--checkpoint_path", "c.pt", "--resume", "auto", "--lr", 0]
    assert "steps 0 to 1" in train(*brief_flags(max_steps=1), *other)
    same, began = (load_checkpoint(path)["model"] for path in (BEST, "c.pt"))
    assert digest(same) == digest(began)
    assert "steps 1 to 2" in train(*brief_flags(max_steps=2), *other)
    assert {path: path.read_bytes() for path in read} == read
    assert not list(place.glob("*.pt.*"))


@pytest.mark.parametrize(
    "words, naming",
    [
        (["--resume", "--resume_from", "a.pt"], ["resume_from and resume", "two starts"]),
        (["--init_from", "a.pt", "--resume_from", "a.pt"], ["init_from and resume_from"]),
        (["--init_from", "a.pt", "--d_model", "64"], ["d_model", "64", "32"]),
        (["--init_from", "no.pt"], ["no.pt", "no such checkpoint"]),
        (["--resume", "maybe"], ["resume", "maybe", "auto"]),
        (["--checkpoint_path", "a_step7.pt"], ["a_step7.pt", "step7"]),
        (["--checkpoint_path", "a_latest.pt"], ["a_latest.pt", "a_best.pt", "a.pt"]),
        (["--checkpoint_path", "n" * 245], ["too long"]),
        pytest.param(["--checkpoint_path", "/proc/a.pt"], ["/proc", "written"], marks=LINUX),
        (["--resume", "--checkpoint_path", "a.pt", "--warmup_steps", "1"], ["warmup_steps"]),
    ],
)
def test_two_starts_or_one_that_cannot_be_are_refused(place, words, naming):
    if "no.pt" not in words:
        train(*brief_flags(max_steps=1, checkpoint_path="a.pt"))
    assert_refuses(*brief_flags(max_steps=2)[2:], *words, naming=naming)


def test_the_shape_comes_from_init_from(place):
    train(*brief_flags(max_steps=1, checkpoint_path="a.pt"))
    few = {"max_steps": 1, "block_size": 16, "batch_size": 2, **BRIEF, "device": "cpu"}
    said = train(*flags(**few, use_compile=False), "--init_from", "a.pt")
    assert "45,360 parameters" in said
    assert load_checkpoint(LATEST)["config"]["d_model"] == 32


def test_an_error_at_the_start_of_one_process_is_told_to_the_others(place, monkeypatch):
    told = []

    class Watchdog:
        def __init__(self, *_):
            self.close = told.append

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(testv2, "join_process_group", Watchdog)
    monkeypatch.setattr(testv2, "is_same", lambda *_: False)
    with pytest.raises(UserError, match="do not see the same file") as caught:
        Trainer(brief_config())
    assert told == [caught.value]


# ------------------------------------------------------------------------------ learning rate


def test_a_finished_run_that_is_extended_never_warms_up_again(place):
    words = brief_flags(warmup_steps=100, min_lr_ratio=0.5, lr=1e-3, max_steps=20)
    assert rates(train(*words))[2] == pytest.approx(1e-3), "a tenth of the run"
    said = train("--resume", "--max_steps", 40)
    assert "was 5.00e-04 at step 20, continues with 7.61e-04, and ends with 5.00e-04" in said
    found = rates(said)
    assert min(found) == 21 and max(found.values()) == found[21] == pytest.approx(7.61e-4)
    assert sorted(found.values(), reverse=True) == list(found.values())


def test_a_run_extended_in_its_warm_up_finishes_that_warm_up(place):
    train(*brief_flags(max_steps=2, schedule="constant", lr=4e-3, warmup_steps=4))
    found = rates(train("--resume", "--max_steps", 6))
    assert found == {3: 3e-3, 4: 4e-3, 5: 4e-3, 6: 4e-3}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("decay_steps", [0, 4, 1000])
def test_schedules_hold_the_rate_and_then_lower_it(schedule, decay_steps):
    """Against the formulas, written down once more."""
    c = tiny_config(
        schedule=schedule, decay_steps=decay_steps, warmup_steps=3, lr=1.0, min_lr_ratio=0.2
    )
    got = [learning_rate(step, 40, c) for step in range(40)]
    assert got[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    decay = {"cosine": 36, "linear": 36, "wsd": 4, "constant": 36}[schedule]
    decay = min(36, decay_steps) if decay_steps else decay
    for step in range(3, 40):
        part = max(0, step - (39 - decay)) / decay
        left = {
            "cosine": (1 + math.cos(math.pi * part)) / 2,
            "linear": 1 - part,
            "wsd": 1 - part**0.5,
            "constant": 1,
        }[schedule]
        assert got[step] == pytest.approx(0.2 + 0.8 * left), step


def test_the_stable_phases_of_two_wsd_runs_are_the_same_bits_and_either_can_decay(place):
    words = brief_flags(schedule="wsd", warmup_steps=2, decay_steps=4, dropout=0.1)
    short = [*words, "--max_steps", 10, "--checkpoint_path", "short.pt"]
    train(*short)
    long = [*words, "--max_steps", 30, "--checkpoint_interval", 6, "--save_top_k", 1]
    trainer = Trainer(parse_command_line(list(map(str, long)))[0])
    after_step(trainer, 6, lambda: signal.raise_signal(signal.SIGTERM))
    assert trainer.run() == 143
    train("--resume_from", LATEST, "--checkpoint_path", "branch.pt", "--max_steps", 10)
    branch, whole = load_checkpoint("branch.pt"), load_checkpoint("short.pt")
    for part in ("model", "optimizer", "data"):
        assert digest(branch[part]) == digest(whole[part]), part
    assert branch["progress"]["history"] == whole["progress"]["history"]


# --------------------------------------------------------------------------------- new sources


def test_a_further_source_begins_a_new_epoch_whose_order_is_a_pure_function(place):
    first, more = "data/text/train.bin", "data/text/val.bin"
    train(*brief_flags(max_steps=5, seed=3))
    before = load_checkpoint(LATEST)["data"]
    extended = ["--resume", "--train_data_path", first, more, "--train_data_weights", 0.5, 0.5]
    assert_refuses(*extended, "--max_steps", 9, naming=["train_data_weights", "--accept"])
    assert_refuses(*extended[:4], "--max_steps", 9, naming=["sources", "--accept_changed_data"])
    said = train(*extended, "--max_steps", 7, "--accept_changed_data")
    assert "the training data have changed: a new epoch begins" in said
    got = load_checkpoint(LATEST)
    assert got["data"]["first_sample"] == before["samples"] and got["data"]["first_epoch"] == 1
    assert got["epoch"] == 1
    train("--resume", "--max_steps", 9)
    twice = load_checkpoint(LATEST)
    assert not twice["config"]["accept_changed_data"], "it was for one start"
    kind = {"shuffle": True, "seed": 3, "weights": [0.5, 0.5]}
    data = StreamingTokenDataset([first, more], 32, **kind)
    wanted = [data[len(data) + i][0] for i in range(16)]
    batches = []
    trainer = Trainer(Config.from_dict(twice["config"]), saved=got)
    trainer.model.register_forward_pre_hook(lambda _, inputs: batches.extend(inputs[0]))
    trainer.total_steps = 9
    assert trainer.run() == 0
    assert torch.equal(torch.stack(batches), torch.stack(wanted[8:]))
    assert digest(load_checkpoint(LATEST)["model"]) == digest(twice["model"])


def test_a_folder_or_a_pattern_of_shards_trains_as_the_one_file(place):
    whole = np.fromfile("data/text/train.bin", np.int32)
    Path("shards").mkdir()
    cuts = [0, 1000, 1001, 5000, len(whole)]  # shard 2 is shorter than a block
    for number, (begin, end) in enumerate(itertools.pairwise(cuts), 9):
        whole[begin:end].tofile(f"shards/part_{number}.bin")
    words = brief_flags(max_steps=3, num_workers=1)
    train(*words)
    expected = load_checkpoint(LATEST)["model"]
    for source in ("shards", "shards/part_*.bin"):
        train(*words, "--train_data_path", source)
        assert digest(load_checkpoint(LATEST)["model"]) == digest(expected)
    whole[:100].tofile("shards/part_13.bin")
    assert_refuses("--resume", "--max_steps", 4, naming=["sources", "--accept_changed_data"])


def test_a_file_of_nanogpt_is_named_with_the_flags_to_pass(place):
    Path("data/text/meta.pkl").write_bytes(b"never read")
    assert_refuses(*brief_flags(), naming=["train.bin", "nanoGPT", "--data_dtype uint16"])
    ids = np.fromfile("data/text/train.bin", np.int32).astype(np.uint16)
    ids.tofile("data/text/train.bin")
    assert "steps 0 to 1" in train(*brief_flags(max_steps=1), "--data_dtype", "uint16")


# --------------------------------------------------------------------------- neighbors and locks


def test_a_neighbor_whose_name_begins_alike_is_left_alone(place):
    names = [
        "a_stepwise_latest.pt",
        "a_step2_latest.pt",
        "a_b.pt",
        "a_best_latest.pt",
        "ab_best.pt",
    ]
    for name in names:
        Path(name).write_bytes(b"another run")
    words = brief_flags(max_steps=2, checkpoint_path="a_latest.pt")
    train(*words)
    train(*words)  # moves its own files aside
    Path("a_latest.pt").unlink()
    Path("a_latest.pt.1").rename("a_step2.pt")
    assert "continuing from a_step2.pt" in train("--resume", "--checkpoint_path", "a_latest.pt")
    assert all(Path(name).read_bytes() == b"another run" for name in names)


@POSIX
def test_a_second_run_on_one_name_is_refused_and_a_dead_ones_lock_is_free(place):
    words = brief_flags(max_steps=10**6, checkpoint_interval=2, num_workers=1)
    first = start_fork(testv2.main, *words, stdout=subprocess.PIPE)
    try:
        assert any("saved" in line for line in first.stdout)
        first.send_signal(signal.SIGSTOP)  # it holds its lock all the same
        who = f"in use by process {first.pid} on "
        for second in ([], ["--resume"]):
            done = call(*brief_flags(max_steps=1), *second)
            assert_refused(done, "tinymamba_model", who, "--checkpoint_path")
    finally:
        first.kill()
        first.communicate()
    lock = place / "tinymamba_model_run.pt.lock"
    assert lock.exists(), "the kill left it"
    step = load_newest(LATEST)["global_step"]
    assert f"steps {step} to {step + 2}" in train("--resume", "--max_steps", step + 2)
    assert not lock.exists()


# -------------------------------------------------------------------------------- by torchrun


@contextlib.contextmanager
def torchrun(*words, restarts: int = 2):
    """Two processes of testv2.py under an agent that starts them again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--max-restarts={restarts}", f"--master_port={free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENV}
    script = [str(ROOT / "testv2.py"), *map(str, words)]
    agent = subprocess.Popen([*command, *script], start_new_session=True, **pipes)
    try:
        yield agent
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.communicate()


def process_of(agent: subprocess.Popen, rank: int) -> int:
    """The process id of a rank, from the environment of the agent's children."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


def kill_after_saves(agent: subprocess.Popen, rank: int, step: int) -> None:
    """kill -9 a process once the checkpoint has reached a step."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        assert agent.poll() is None, agent.communicate()
        with contextlib.suppress(UserError):  # there is none yet
            if load_checkpoint(LATEST)["global_step"] >= step:
                os.kill(process_of(agent, rank), signal.SIGKILL)
                return
        time.sleep(0.01)
    raise AssertionError("nothing was saved")


@LINUX
@pytest.mark.parametrize(
    "number, parallel",
    [
        *((number, "ddp") for number in range(10 if CHAOS else 1)),
        *(pytest.param(number, "fsdp", marks=pytest.mark.slow) for number in range(4)),
    ],
)
def test_a_group_that_torchrun_starts_again_ends_as_if_never_killed(place, number, parallel):
    steps = {"max_steps": 80, "checkpoint_interval": 20, "log_interval": 20}
    steps |= {"parallel": parallel, "async_save": number > 1}
    words = brief_flags(**steps, batch_size=2, dropout=0.1, rank_timeout=3)
    assert call(*brief_flags(max_steps=1, seed=5)).returncode == 0  # an earlier run
    with torchrun(*words) as agent:
        kill_after_saves(agent, 1 - number % 2, 20)
        out, err = agent.communicate(timeout=120)
    assert agent.returncode == 0, err
    assert "steps 20 to" in out or "steps 40 to" in out or "steps 60 to" in out, out
    got = load_checkpoint(LATEST)
    assert load_checkpoint(f"{LATEST}.1")["global_step"] == 1
    assert not Path(f"{LATEST}.2").exists(), "only the earlier run was moved aside"
    run_two_ranks(*words)
    expected = load_checkpoint(LATEST)
    for part in ("model", "optimizer", "global_step", "tokens_seen"):
        assert digest(got[part]) == digest(expected[part]), part
    assert got["progress"]["history"] == expected["progress"]["history"]
