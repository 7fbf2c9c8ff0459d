"""Training with testv2.py: learning, checkpoints, logs, resume, signals, compilation, processes."""

import functools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    FIRST_FORM,
    LATEST,
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
    files_below,
    free_port,
    go_on,
    run_script,
    start_fork,
    tiny_config,
    write_tokens,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode

import testv2
from testv2 import (
    Config,
    StreamingTokenDataset,
    TinyMambaModel,
    Trainer,
    load_model,
    make_optimizer,
)
from tinymamba.checkpoint import digest, load_checkpoint
from tinymamba.cli import UserError
from tinymamba.runtime import Signals, pick_device
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_alphabet

BEST = Path("tinymamba_model_best.pt")
VALIDATION = re.compile(r"^validation at step (\d+): (\S+) nats(?:, (\S+) bits per byte)?", re.M)


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """Count this process's event files from 0: TensorBoard sorts those of a second as text.

    Runs in one process can start in the same second, and then file 10 comes before file 9.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def scalars(log_dir: Path) -> dict[str, dict[int, float]]:
    """Every scalar of the only run logged there: {tag: {step: value}}."""
    [folder] = {path.parent for path in log_dir.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}


def losses(trainer: Trainer) -> list[float]:
    return [loss for _, loss in trainer.progress["history"]["train"]]


# ---------------------------------------------------------------------------------- learning


def test_model_overfits_one_batch():
    torch.manual_seed(0)
    config = tiny_config(lr=1e-2, weight_decay=0.0, deepnet=False)
    model = TinyMambaModel(config)
    optimizer = make_optimizer(model, config)
    ids = torch.randint(0, 257, (2, 17))
    for _ in range(100):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() < 0.05


def test_small_run_beats_the_unigram_entropy(place):
    counts = np.bincount(np.fromfile("data/text/val.bin", np.int32))
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    settings = {"max_steps": 150, "lr": 1e-2, "block_size": 64, "log_interval": 50}
    assert Trainer(brief_config(**settings, enable_validation=True)).run() == 0
    assert load_checkpoint(LATEST)["val_loss"] < 0.6 * entropy


def test_accumulation_equals_one_large_batch(place):
    def train(batch_size, pieces):
        trainer = Trainer(brief_config(  # Muon rounds to bfloat16, which would hide mistakes
            max_steps=4, batch_size=batch_size, gradient_accumulation_steps=pieces,
            optimizer="adamw"))  # fmt: skip
        trainer.run()
        return trainer

    pieces, whole = train(2, 4), train(8, 1)
    assert losses(pieces) == pytest.approx(losses(whole), abs=1e-5)
    for a, b in zip(pieces.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


@pytest.mark.parametrize("limit", [0.0, 0.05, 1e6])
def test_gradient_is_clipped_for_the_update_and_logged_as_it_was(place, limit):
    trainer = Trainer(brief_config(max_steps=3, grad_clip=limit, log_dir="logs"))
    used = []

    def measure(optimizer, *_):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        used.append(torch.stack([g.norm() for g in grads]).norm().item())

    trainer.optimizer.register_step_pre_hook(measure)
    trainer.run()
    logged = scalars(Path("logs"))["train/grad_norm"]
    assert len(used) == 3 and all(norm > 0.5 for norm in logged.values())
    expected = [min(norm, limit) if limit else norm for norm in logged.values()]
    assert used == pytest.approx(expected, rel=1e-3)


def poisoned_trainer(bad_calls: set[int], **changes) -> tuple[Trainer, list[str]]:
    """A Trainer whose n-th backward passes give NaN, and digests of all state after real steps."""
    trainer, calls, states = Trainer(brief_config(**changes)), [], []

    def poison(grad):
        calls.append(1)
        return grad * math.nan if len(calls) in bad_calls else grad

    def remember(*_):
        states.append(digest([trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]]))

    trainer.model.blocks[0].residual_scale.register_hook(poison)
    trainer.optimizer.register_step_post_hook(remember)
    return trainer, states


def test_nan_steps_change_nothing_and_end_the_run_after_max_bad_steps(place, capsys):
    trainer, states = poisoned_trainer({3, 4, 5}, max_steps=9, max_bad_steps=3)
    with pytest.raises(UserError, match="3 steps in a row"):
        trainer.run()
    model, optimizer = trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]
    assert len(states) == 2 and digest([model, optimizer]) == states[-1]
    assert all(t.isfinite().all() for t in model.values())
    assert "step 3: gradient norm nan" in capsys.readouterr().out


def test_nan_steps_apart_do_not_end_the_run(place):
    trainer, states = poisoned_trainer({2, 3, 5, 6, 8}, max_steps=9, max_bad_steps=3)
    assert trainer.run() == 0
    assert len(states) == 4 and load_checkpoint(LATEST)["global_step"] == 9


# ------------------------------------------------------------ one plain run and what it leaves

VAL_BYTES = 3  # bytes a token, as the sidecar of the validation data says
KEYS = {
    "model", "optimizer", "scheduler", "scaler", "epoch", "global_step", "tokens_seen", "val_loss",
    "config", "data", "rng", "format_version",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """`python testv2.py` in a folder with data/text/, in a real process: (folder, stdout)."""
    folder = tmp_path_factory.mktemp("plain")
    text = folder / "data" / "text"
    text.mkdir(parents=True)
    for name, first in (("train", 0), ("val", 1)):
        words = [f"{a} plus {b} is {a + b}.\n" for a in range(first, 40, 2) for b in range(20)]
        path = write_tokens(text / f"{name}.bin", "".join(words))
        tokens = path.stat().st_size // 4
        facts = {"dtype": "int32", "tokens": tokens, "bytes": VAL_BYTES * tokens}
        path.with_suffix(".json").write_text(json.dumps(facts))
    vocabulary = [*byte_alphabet(), EOS_TOKEN]
    (text / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    words = brief_flags(
        max_steps=12, lr=0.3, min_lr_ratio=1, dropout=0.1, enable_validation="true",
        validation_interval=2, validation_steps=5, save_top_k=3, generate_samples="true",
        generation_interval=6, generation_length=20, generation_prompt="3 plus",
        checkpoint_interval=5)  # fmt: skip
    done = run_script("testv2.py", *words, cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder, done.stdout


def test_checkpoints_hold_the_promised_keys_and_a_complete_config(plain_run):
    folder, _ = plain_run
    for path in (folder / LATEST, folder / BEST):
        state = torch.load(path, weights_only=True)
        assert set(state) >= KEYS
        assert set(state["config"]) == set(Config().to_dict())
        assert state["config"]["d_model"] == 32 and state["config"]["amp_dtype"] == "float32"
        assert state["model"] and state["optimizer"]["state"] and state["data"] and state["rng"]
        load_model(path).load_state_dict(state["model"])
    latest = load_checkpoint(folder / LATEST)
    assert (latest["global_step"], latest["tokens_seen"]) == (12, 12 * 4 * 32)
    assert latest["data"]["samples"] == 12 * 4 and latest["epoch"] == 0


def test_console_line_holds_loss_rate_norm_speed_and_time_left(plain_run):
    lines = [line for line in plain_run[1].splitlines() if line.startswith("step ")]
    number = r"\d[\d.,e+-]*"
    for step, line in enumerate(lines, start=1):
        assert re.fullmatch(
            rf"step {step}/12 \| loss {number} \| lr {number} \| grad norm {number} \| "
            rf"{number} tokens/s \| \d+:\d\d:\d\d left",
            line,
        )
    assert len(lines) == 12


def test_validation_prints_nats_and_bits_per_byte(plain_run):
    found = VALIDATION.findall(plain_run[1])
    assert [int(step) for step, _, _ in found] == [2, 4, 6, 8, 10, 12]
    for _, nats, bits in found:
        assert float(bits) == pytest.approx(float(nats) / math.log(2) / VAL_BYTES, abs=1e-4)


def test_samples_continue_the_prompt(plain_run):
    samples = re.findall(r"^sample at step (\d+):\n(.*)", plain_run[1], re.M)
    assert [step for step, _ in samples] == ["6", "12"]
    assert all(text.startswith("3 plus") for _, text in samples)


def test_tensorboard_holds_losses_and_gates(plain_run):
    folder, out = plain_run
    logged = scalars(folder / "logs")
    printed = {int(step): float(loss) for step, _, loss in STEP.findall(out)}
    assert logged["train/loss"] == pytest.approx(printed, abs=1e-4) and len(printed) == 12
    printed = {int(step): float(nats) for step, nats, _ in VALIDATION.findall(out)}
    assert logged["val/loss"] == pytest.approx(printed, abs=1e-4)
    for step in printed:
        for layer in ("layer0", "layer1"):
            shares = [logged[f"gate_{b}/{layer}"][step] for b in ("ssm", "attention", "mlp")]
            assert sum(shares) == pytest.approx(1) and min(shares) > 0
            assert 0 < logged[f"gate_entropy/{layer}"][step] <= math.log(3) + 1e-5


def test_loss_curve_is_a_picture(plain_run):
    [path] = (plain_run[0] / "logs").rglob("loss_curve.png")
    from matplotlib.image import imread

    picture = imread(path)
    assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01


def validation_loss(path: Path, folder: Path) -> float:
    """Mean loss of a checkpoint's model on the samples that `plain_run` validates on."""
    data = StreamingTokenDataset(folder / "data" / "text" / "val.bin", 32)
    x, y = (torch.stack(t) for t in zip(*(data[i] for i in range(20)), strict=True))
    with torch.no_grad():
        return load_model(path)(x, y).item()


def test_best_checkpoints_are_those_of_lowest_validation_loss(plain_run):
    folder, out = plain_run
    printed = {int(step): float(nats) for step, nats, _ in VALIDATION.findall(out)}
    ranked = sorted(printed, key=printed.get)  # the rate is so high that the last is not the best
    kept = {int(p.stem.split("_step")[1]) for p in folder.glob("*_step*.pt")}
    assert kept == set(ranked[:3])
    paths = [(step, folder / f"tinymamba_model_step{step}.pt") for step in kept]
    for step, path in [*paths, (ranked[0], folder / BEST), (12, folder / LATEST)]:
        saved = load_checkpoint(path)
        assert saved["global_step"] == step
        assert saved["val_loss"] == pytest.approx(printed[step], abs=1e-4)
        assert validation_loss(path, folder) == pytest.approx(printed[step], abs=1e-4)


def test_resuming_a_finished_run_trains_nothing(plain_run, monkeypatch):
    folder, _ = plain_run
    monkeypatch.chdir(folder)
    before, best = load_checkpoint(folder / LATEST), (folder / BEST).read_bytes()
    done = call("--resume")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not STEP.findall(done.stdout)
    after = load_checkpoint(folder / LATEST)
    for part in ("model", "optimizer", "global_step", "tokens_seen", "val_loss", "data"):
        assert digest(after[part]) == digest(before[part]), part
    assert (folder / BEST).read_bytes() == best and not list(folder.glob("*.pt.*"))


# ---------------------------------------------------------------------------- samples and logs


def test_run_without_tokenizer_says_so_and_goes_on(place):
    done = call(*brief_flags(max_steps=1, generate_samples="true"))
    assert done.returncode == 0 and "no sample: there is no tokenizer.json" in done.stdout


class Upper:
    """The least that the README asks of a custom tokenizer."""

    def __init__(self):
        self.read, self.written = [], []

    def encode(self, text):
        self.read.append(text)
        return [1, 2, 3]

    def decode(self, ids):
        self.written.append(ids)
        return "MY OWN TEXT"


def test_custom_tokenizer_is_used(place, capsys):
    write_tokens(place / "data" / "text" / "vocab.txt", [])
    tokenizer = Upper()
    settings = {"generate_samples": True, "generation_prompt": "abc", "generation_length": 5}
    assert Trainer(brief_config(max_steps=1, **settings), tokenizer=tokenizer).run() == 0
    assert tokenizer.read == ["abc"]
    assert len(tokenizer.written[0]) == 8 and list(tokenizer.written[0][:3]) == [1, 2, 3]
    assert "MY OWN TEXT" in capsys.readouterr().out


@pytest.mark.parametrize("vocab_size, tokens, prompt", [
    (4096, "abcdefgh", "abc"),  # the model has more ids than the tokenizer, and samples them
    (257, "abcdefgh" * 40, "é"),  # the tokenizer has more ids than the model, and gives them
])  # fmt: skip
def test_vocabularies_of_different_size_do_not_end_a_run(place, vocab_size, tokens, prompt):
    Path("data/text/vocab.txt").write_text("\n".join(tokens) + "\n")
    words = brief_flags(
        max_steps=2, vocab_size=vocab_size, generate_samples="true", generation_prompt=prompt,
        generation_interval=1, generation_temperature=2.0, generation_length=60)  # fmt: skip
    done = call(*words)
    assert done.returncode == 0 and LATEST.exists()


def test_missing_wandb_is_refused_and_changes_nothing(place, monkeypatch):
    assert call(*brief_flags(max_steps=1)).returncode == 0
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = brief_flags(max_steps=1, use_wandb="true")
    assert_refuses(*words, naming=["use_wandb", "pip install wandb"])


def test_wandb_that_cannot_start_is_one_line(place, monkeypatch):
    import wandb

    def no_key(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", no_key)
    assert_refused(call(*brief_flags(max_steps=1, use_wandb="true")), "use_wandb", "No API key")


# ------------------------------------------------------------------------------------ resume

TWO_SOURCES = {
    "train_data_path": ["data/text/train.bin", "data/text/val.bin"],
    "train_data_weights": [0.7, 0.3], "dropout": 0.1, "gradient_accumulation_steps": 2,
    "batch_size": 2, "max_steps": 12, "enable_validation": True, "validation_interval": 3,
    "validation_steps": 2, "wandb_run_name": "run",
}  # fmt: skip


def test_a_run_resumed_twice_is_bitwise_the_uninterrupted_one(place):
    whole = Trainer(brief_config(**TWO_SOURCES, log_dir="whole"))
    assert whole.run() == 0
    LATEST.rename("whole.pt")

    trainer = Trainer(brief_config(**TWO_SOURCES, log_dir="logs"))
    after_step(trainer, 4, lambda: signal.raise_signal(signal.SIGTERM))
    assert trainer.run() == 143
    assert load_checkpoint(LATEST)["global_step"] == 4
    assert go_on(stop_after=3).step == 7
    torch.manual_seed(99)  # whatever state the process is in
    assert call("--resume").returncode == 0

    expected, got = load_checkpoint("whole.pt"), load_checkpoint(LATEST)
    for part in ("model", "optimizer", "global_step", "tokens_seen", "val_loss", "data"):
        assert digest(got[part]) == digest(expected[part]), part
    assert got["progress"]["history"] == expected["progress"]["history"]
    assert len(losses(whole)) == 12
    logged = [scalars(Path(folder))["train/loss"] for folder in ("whole", "logs")]
    assert logged[0] == logged[1], "TensorBoard shows the two runs alike"


@pytest.fixture
def stopped(place):
    """A run of 6 steps that was stopped after 3."""
    trainer = Trainer(brief_config(max_steps=6, enable_validation=True))
    after_step(trainer, 3, lambda: signal.raise_signal(signal.SIGTERM))
    assert trainer.run() == 143
    return place


OTHER_SHAPE = {
    "d_model": 64, "n_layer": 3, "vocab_size": 300, "bias": "false", "tie_embeddings": "false",
    "low_rank": 4, "activation": "gelu", "d_state": 16, "d_conv": 3, "expand_factor": 4,
    "ssm_head_dim": 16, "window_size": 9, "num_heads": 4, "rope_theta": 500.0, "gate": "sparsemax",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_SHAPE)
def test_resume_with_another_shape_is_refused_by_name(stopped, name):
    assert_refuses("--resume", f"--{name}", OTHER_SHAPE[name], naming=[f"error: {name}: "])


def test_resume_on_other_data_is_refused_by_name(stopped):
    write_tokens(Path("other.bin"), [1] * 5000)
    words = ["--resume", "--train_data_path"]
    assert_refuses(*words, "other.bin", naming=["other.bin", "train.bin"])
    assert_refuses(*words, "data/text/train.bin", "other.bin", naming=["other.bin"])
    for name, value in {"block_size": 16, "seed": 5}.items():
        assert_refuses("--resume", f"--{name}", value, naming=[name, str(value)])


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_resume_with_another_optimizer_is_refused_by_name(place, name):
    assert call(*brief_flags(max_steps=1, optimizer=name)).returncode == 0
    other = {"muon": "adamw", "adamw": "muon"}[name]
    assert_refuses("--resume", "--max_steps", 2, "--optimizer", other, naming=["optimizer", name])


def test_resume_takes_settings_from_the_checkpoint_and_flags_override(stopped):
    done = call("--resume", "--max_steps", 5, "--lr", 0.25, "--min_lr_ratio", 1)
    assert done.returncode == 0, done.stderr
    assert [found[:2] for found in STEP.findall(done.stdout)] == [("4", "5"), ("5", "5")]
    assert "lr 2.50e-01" in done.stdout
    config = load_checkpoint(LATEST)["config"]
    assert (config["lr"], config["max_steps"], config["d_model"]) == (0.25, 5, 32)


def test_resume_accepts_the_flags_of_the_first_run_again(stopped):
    for words in (["--d_model", 32], ["--num_heads", 2], brief_flags(max_steps=6)):
        done = call("--resume", *words)
        assert done.returncode == 0, done.stderr


def test_resume_goes_on_from_the_newest_good_checkpoint(stopped):
    trainer = go_on()
    assert trainer.step == 6 and load_checkpoint(BEST)["global_step"] == 6
    raw = LATEST.read_bytes()
    LATEST.write_bytes(raw[: len(raw) // 2])
    done = call("--resume", "--max_steps", 8)
    assert done.returncode == 0, done.stderr
    assert str(LATEST) in done.stdout + done.stderr, "it must say which file is bad"
    assert load_checkpoint(LATEST)["global_step"] == 8


def test_new_run_moves_every_checkpoint_of_an_earlier_one_aside(place):
    words = brief_flags(enable_validation="true", validation_interval=1, save_top_k=2, max_steps=2)
    first, second = call(*words), files_below(place)
    assert first.returncode == 0 and " of an earlier run" not in first.stdout
    models = {name: raw for name, raw in second.items() if name.endswith(".pt")}
    assert len(models) == 4  # latest, best, and two of step n
    out = call(*words, "--seed", 2).stdout
    after = files_below(place)
    assert f"{LATEST}.1" in out and f"{BEST}.1" in out
    assert after[f"{LATEST}.1"] == models[f"{LATEST}"] != after[f"{LATEST}"]
    assert set(models.values()) <= set(after.values()), "a checkpoint of the first run is lost"
    assert f"{LATEST}.2" in call(*words, "--seed", 3).stdout
    final = files_below(place)
    assert final[f"{LATEST}.1"] == after[f"{LATEST}.1"]
    assert final[f"{LATEST}.2"] == after[f"{LATEST}"]


# -------------------------------------------------------------------- best models, early stopping


def test_save_top_k_0_keeps_no_best_model(place):
    words = brief_flags(max_steps=3, enable_validation="true", validation_interval=1)
    assert call(*words, "--save_top_k", 0).returncode == 0
    assert [p.name for p in place.glob("*.pt*")] == [str(LATEST)]
    assert call(*words, "--save_top_k", 1, "--checkpoint_path", "a_latest.pt").returncode == 0
    assert {p.name for p in place.glob("a_*")} == {"a_latest.pt", "a_best.pt"}


def test_early_stopping_waits_for_patience_validations(place):
    words = brief_flags(
        max_steps=20, enable_validation="true", validation_interval=2, use_early_stopping="true",
        early_stopping_patience=2, early_stopping_min_delta=100)  # fmt: skip
    done = call(*words)
    assert done.returncode == 0 and "early stopping" in done.stdout
    assert [int(step) for step, *_ in VALIDATION.findall(done.stdout)] == [2, 4, 6]
    assert load_checkpoint(LATEST)["global_step"] == 6


def test_best_checkpoint_counts_its_own_validation_as_an_improvement(place):
    trainer = Trainer(brief_config(max_steps=4, enable_validation=True, validation_interval=1))
    values = iter([2.0, 3.0, 3.0, 1.0])
    trainer.validate = lambda: next(values)
    trainer.run()
    saved = load_checkpoint(BEST)
    assert (saved["global_step"], saved["val_loss"]) == (4, 1.0)
    assert (saved["progress"]["lowest"], saved["progress"]["bad_validations"]) == (1.0, 0)


def test_validation_that_is_not_finite_is_never_the_best(place):
    trainer = Trainer(brief_config(max_steps=3, enable_validation=True, validation_interval=1))
    values = iter([math.nan, 2.0, 3.0])
    trainer.validate = lambda: next(values)
    trainer.run()
    assert load_checkpoint(BEST)["val_loss"] == 2.0


# ----------------------------------------------------------------------------------- signals


@pytest.fixture
def start(place):
    """A function that starts testv2.py on an endless run; killed should it hang."""
    started = []

    def begin(**changes) -> subprocess.Popen:
        words = brief_flags(max_steps=10**6, checkpoint_interval=0, **changes)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = start_fork(testv2.main, *words, env={"PATH": str(place), "CXX": ""}, **streams)
        watch = threading.Timer(60, process.kill)
        watch.start()
        started.append((process, watch))
        return process

    yield begin
    for process, watch in started:
        watch.cancel()
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen, beginning: str) -> str:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return "".join(lines)
    raise AssertionError(f"no {beginning!r} in {''.join(lines)}{process.stderr.read()}")


def end(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate()
    assert err == ""
    return process.returncode, out


@POSIX
def test_sigusr1_saves_and_goes_on_and_sigterm_saves_and_ends(start):
    process = start()
    read_until(process, "step 3/")
    process.send_signal(signal.SIGUSR1)
    read_until(process, "saved")
    first = load_checkpoint(LATEST)["global_step"]
    read_until(process, f"step {first + 5}/")
    process.send_signal(signal.SIGTERM)
    code, out = end(process)
    steps = [first + 5, *(int(step) for step, *_ in STEP.findall(out))]
    assert code == 143 and first >= 3
    assert load_checkpoint(LATEST)["global_step"] == steps[-1]


@POSIX
def test_sigint_saves_and_ends_and_no_compiler_is_no_obstacle(start):
    process = start(use_compile="true")
    assert re.search(r"torch.compile is off: .*C\+\+", read_until(process, "step 2/"))
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130
    step = load_checkpoint(LATEST)["global_step"]
    assert step >= 2
    words = ["--resume", "--max_steps", step + 1, "--use_compile", "false"]
    done = call(*words)
    assert done.returncode == 0 and f"step {step + 1}/{step + 1} " in done.stdout, done.stderr


@POSIX
def test_sigusr1_does_not_make_sigterm_forgotten(place):
    trainer = Trainer(brief_config(max_steps=6))
    after_step(
        trainer, 2, lambda: [signal.raise_signal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    )
    assert trainer.run() == 143 and trainer.step == 2


def test_handlers_of_the_caller_are_put_back(place):
    names = [getattr(signal, name) for name in Signals.NAMES if hasattr(signal, name)]
    before = [signal.getsignal(name) for name in names]
    Trainer(brief_config(max_steps=1)).run()
    assert [signal.getsignal(name) for name in names] == before


# ------------------------------------------------------------------------ compile and profile


def broken_compile(fails_at: int, message: str):
    """A torch.compile of which the n-th call fails, as a backend does, whatever was compiled."""
    calls = []

    def compile(method, **settings):
        def forward(*args):
            calls.append(1)
            if len(calls) == fails_at:
                raise torch._dynamo.exc.TorchDynamoException(message)
            return method(*args)

        return forward

    return compile


@pytest.mark.parametrize(
    "fails_at, message",  # a micro-batch calls two blocks and the loss
    [(1, "boom\nmore"), (1, ""), (2, "boom"), (3, "boom"), (4, "boom"), (9, "boom")],
)
def test_failing_compiler_falls_back_to_the_same_result(
    place, monkeypatch, capsys, fails_at, message
):
    settings = {"max_steps": 3, "dropout": 0.2, "gradient_accumulation_steps": 2}
    eager = Trainer(brief_config(**settings))
    eager.run()
    monkeypatch.setattr(torch, "compile", broken_compile(fails_at, message))
    monkeypatch.setattr(testv2, "why_no_compile", lambda device: None)
    trainer = Trainer(brief_config(**settings, use_compile=True))
    assert trainer.run() == 0
    out = capsys.readouterr().out
    assert "torch.compile failed" in out and message.split("\n")[0] in out
    assert losses(trainer) == losses(eager)
    assert digest(trainer.model.state_dict()) == digest(eager.model.state_dict())


def test_graphs_train_as_eager_through_validation_samples_and_two_micro_batches(
    place, monkeypatch, capsys
):
    """The graphs are interpreted here; the next test compiles them to machine code."""
    settings = {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "enable_validation": True,
        "validation_interval": 2,
        "generate_samples": True,
        "generation_interval": 1,
    }
    eager = Trainer(brief_config(**settings), SimpleTokenizer())
    eager.run()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    trainer = Trainer(brief_config(**settings, use_compile=True), SimpleTokenizer())
    assert trainer.run() == 0
    assert_compiled(capsys.readouterr().out)
    assert losses(trainer) == pytest.approx(losses(eager), abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # two kinds of blocks, loss


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone, in which DDP works."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fail_to_compile(graph, inputs):
    raise torch._dynamo.exc.TorchDynamoException("no shared memory")


@pytest.mark.parametrize("parallel", [False, True], ids=["alone", "ddp"])
def test_a_backward_pass_that_cannot_be_compiled_falls_back_to_the_same_result(
    place, monkeypatch, capsys, process_group, parallel
):
    """It fails after the last layers have their gradients, and DDP has sent some."""
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=fail_to_compile)
    found = []
    for compiled in (False, True):
        trainer = Trainer(brief_config(max_steps=2))
        monkeypatch.setattr(trainer, "world", 2 if parallel else 1)  # for `wrap`, DDP is needed
        torch.compiler.reset()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
            trainer.forward = trainer.wrap(compiled)
            batches = list(islice(trainer.train_batches(25), 3))
            for _ in range(2):
                trainer.train_step(iter(batches))
        assert not trainer.compiled
        found.append(digest(trainer.model.state_dict()))
    assert "no shared memory" in capsys.readouterr().out
    assert found[0] == found[1]


def test_too_many_shapes_to_compile_fall_back(place, monkeypatch, capsys):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1):
        for size in (16, 24):
            assert Trainer(brief_config(max_steps=1, use_compile=True, block_size=size)).run() == 0
    assert "torch.compile failed" in capsys.readouterr().out


def test_gradients_of_compiled_blocks_are_sent_while_others_are_computed(
    process_group, monkeypatch
):
    """DDP sends those of the last block before the first block has computed its own."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, order = TinyMambaModel(tiny_config(n_layer=3, **FIRST_FORM)), []  # of few operators
    model.compile_blocks()
    for i, block in enumerate(model.blocks):
        block.norm.weight.register_hook(lambda _, i=i: order.append(f"block {i}"))
    ddp = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)

    def send(state, bucket):
        order.append("sent")
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, send)
    for _ in range(2):  # DDP forms its buckets in the first step
        order.clear()
        ddp(*torch.randint(257, (2, 2, 40))).backward()
    assert order.index("block 2") < order.index("sent") < order.index("block 0")


@pytest.mark.slow
def test_real_compile_trains_as_eager(place):
    words = brief_flags(max_steps=2, n_layer=1)
    eager, compiled = call(*words), call(*words, "--use_compile", "true")
    assert compiled.returncode == 0, compiled.stderr
    assert_compiled(compiled.stdout)
    found = [[float(loss) for *_, loss in STEP.findall(d.stdout)] for d in (eager, compiled)]
    assert found[0] == pytest.approx(found[1], abs=1e-3) and len(found[0]) == 2


class Numbers(TorchDispatchMode):
    """Operations that make the host wait for the numbers of a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.found += [name] if name in self.WAITING else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"skip_spikes": 6.0, "amp_dtype": torch.bfloat16}])
def test_a_step_brings_loss_norm_and_news_to_the_host_at_once(place, monkeypatch, settings):
    trainer = Trainer(brief_config(max_steps=3, gradient_accumulation_steps=2, **settings))
    batches, asked = trainer.train_batches(6), []
    real = testv2.all_reduce
    monkeypatch.setattr(testv2, "all_reduce", lambda *args: asked.append(args[0]) or real(*args))
    trainer.train_step(batches)
    asked.clear()
    with Numbers() as numbers:
        loss, norm = trainer.train_step(batches)
    [[loss_there, norm_there, *news]] = asked
    assert (loss_there.item(), norm_there.item()) == (loss, norm) and not any(news)
    assert not numbers.found


def test_the_next_batches_are_read_before_the_host_waits(place, monkeypatch):
    trainer, order = Trainer(brief_config(max_steps=3)), []
    for name in ("accumulate", "read", "exchange"):
        method = getattr(trainer, name)
        monkeypatch.setattr(
            trainer, name, lambda *a, name=name, method=method: order.append(name) or method(*a)
        )
    assert trainer.run() == 0
    assert order == ["read", *["accumulate", "read", "exchange"] * 3]


def test_products_in_float32_are_not_rounded_in_any_script(monkeypatch):
    """`pick_device`, which every script calls, makes the setting, and nothing else touches it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        pick_device("cpu")
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    setting = re.compile("set_float32_matmul_precision|allow_tf32|fp32_precision")
    scripts = [
        f for folder in (".", "tinymamba", "benchmarks") for f in ROOT.glob(f"{folder}/*.py")
    ]
    assert {f.name for f in scripts if setting.search(f.read_text())} == {"runtime.py"}
    for name in ("testv2", "streaming", "benchmark", "export_model"):
        assert "pick_device(" in (ROOT / f"{name}.py").read_text(), name


def test_profile_prints_a_table_writes_a_trace_and_touches_no_checkpoint(place):
    LATEST.write_bytes(b"of an earlier run")
    done = call(*brief_flags(max_steps=2), "--profile")
    assert done.returncode == 0, done.stderr
    assert "Self CPU" in done.stdout and "aten::" in done.stdout
    assert "| SSM: scan " in done.stdout and "the parts account for" in done.stdout
    [trace] = place.rglob("*trace*.json")
    assert len(json.loads(trace.read_text())["traceEvents"]) > 100
    assert [p.name for p in place.rglob("*.pt*")] == [str(LATEST)]
    assert LATEST.read_bytes() == b"of an earlier run"


# ------------------------------------------------------------------------------- two processes

TOGETHER = {  # stops early after step 3: of 9, so that the rate has far to go
    "max_steps": 9, "enable_validation": "true", "validation_interval": 1,
    "use_early_stopping": "true", "early_stopping_patience": 2, "early_stopping_min_delta": 100,
    "validation_steps": 4,
}  # fmt: skip


@POSIX
@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.launch",
        pytest.param("torch.distributed.run", marks=pytest.mark.slow),  # other tests start it too
    ],
)
def test_two_processes_train_as_one_with_twice_the_batch(place, monkeypatch, launcher):
    one = call(*brief_flags(**TOGETHER))
    command = [sys.executable, "-m", launcher, "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += [ROOT / "testv2.py", *brief_flags(**TOGETHER, batch_size=2)]
    two = place / "two"
    two.mkdir()
    (two / "data").symlink_to(place / "data")
    how = {"capture_output": True, "text": True, "timeout": 100}
    done = subprocess.run(command, cwd=two, env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)
    assert done.returncode == one.returncode == 0, done.stderr
    for form, count in ((STEP, 3), (VALIDATION, 3)):
        expected, got = form.findall(one.stdout), form.findall(done.stdout)
        assert [found[0] for found in got] == [found[0] for found in expected] == ["1", "2", "3"]
        assert len(got) == count, "two ranks write"
    for tag in ("train/loss", "val/loss", "train/lr"):
        expected, got = scalars(place / "logs")[tag], scalars(two / "logs")[tag]
        assert got == pytest.approx(expected, abs=1e-4), tag
    assert len(list(two.rglob("*tfevents*"))) == 1
    assert_same_run(place, two, step=3)
    words = ["--resume", "--batch_size", 4, "--use_early_stopping", "false"]
    assert call(*words).returncode == 0
    monkeypatch.chdir(two)
    assert call(*words).returncode == 0
    assert_same_run(place, two, step=9)


def assert_same_run(one: Path, two: Path, step: int) -> None:
    a, b = (load_checkpoint(folder / LATEST) for folder in (one, two))
    assert a["global_step"] == b["global_step"] == step and a["tokens_seen"] == b["tokens_seen"]
    for name, weight in a["model"].items():
        torch.testing.assert_close(weight, b["model"][name], atol=1e-4, rtol=0)


# ------------------------------------------------------------------- settings changed on resume


def test_resume_with_smaller_batches_and_another_decay(stopped):
    words = ["--max_steps", 9, "--batch_size", 2, "--weight_decay", 0.5, "--beta2", 0.9]
    done = call("--resume", *words)
    assert done.returncode == 0, done.stderr
    saved = load_checkpoint(LATEST)
    assert saved["global_step"] == 9
    groups = saved["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [group.get("betas") for group in groups] == [None, (0.9, 0.9)]  # Muon has none


def test_gates_are_logged_without_validation_too(place):
    assert call(*brief_flags(max_steps=2, validation_interval=1)).returncode == 0
    [events] = place.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    assert len(found.Scalars("gate/ssm")) == len(found.Scalars("gate_entropy/layer0")) == 2


def test_a_damaged_best_checkpoint_is_passed_over_for_a_good_one(place):
    words = brief_flags(enable_validation="true", validation_interval=1, save_top_k=2, max_steps=2)
    assert call(*words).returncode == 0
    for path in (LATEST, BEST):
        path.write_bytes(b"damaged")
    done = call("--resume", "--max_steps", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: ") == 2 and "continuing from" in done.stdout


def test_an_error_in_a_worker_is_one_line(place):
    trainer, before = Trainer(brief_config(num_workers=1)), set(multiprocessing.active_children())
    Path("data/text/train.bin").write_bytes(bytes(8))
    with pytest.raises(UserError) as caught:
        next(trainer.train_batches(2))
    assert str(caught.value).startswith("./data/text/train.bin: was cut to 2 tokens")
    assert "\n" not in str(caught.value)
    assert {*multiprocessing.active_children()} <= before


def test_a_document_mask_without_eos_is_refused_before_anything_is_touched(place):
    LATEST.write_bytes(b"of an earlier run")
    done = call(*brief_flags(document_mask="true"))
    assert_refused(done, "eos_id: ")
    assert LATEST.read_bytes() == b"of an earlier run"
