"""Signals to all processes of a run, a terminal that closes, logs that fail, and log folders."""

import contextlib
import errno
import io
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import (
    LATEST,
    LINUX,
    POSIX,
    ROOT,
    STEP,
    after_step,
    assert_refuses,
    brief_config,
    brief_flags,
    call,
    files_below,
    free_port,
    heed_signals,
    start_fork,
)

import testv2
from testv2 import Trainer
from tinymamba import runtime
from tinymamba.checkpoint import load_checkpoint, require_writable
from tinymamba.cli import UserError, run_cli
from tinymamba.lock import hold_lock
from tinymamba.runtime import Signals, open_log_folder, signals_held
from tinymamba.tokenizer import EOS_TOKEN, byte_alphabet

ENDLESS = {"max_steps": 10**6, "checkpoint_interval": 0}


def saved_step() -> int:
    return load_checkpoint(LATEST)["global_step"]


@pytest.fixture
def start(place):
    """A function that starts testv2.py as the first process of a group; the group is killed."""
    started = []

    def begin(*, how: dict | None = None, **changes) -> subprocess.Popen:
        words, pipes = brief_flags(**ENDLESS | changes), {"start_new_session": True}
        if how:  # streams that Python itself has to open
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(ROOT / "testv2.py"), *words]
            process = subprocess.Popen(command, env=env, text=True, **how, **pipes)
        else:
            pipes |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = start_fork(testv2.main, *words, **pipes)
        watch = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
        watch.start()
        started.append((process, watch))
        return process

    yield begin
    for process, watch in started:
        watch.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until(process: subprocess.Popen, beginning: str) -> None:
    assert any(line.startswith(beginning) for line in process.stdout), process.stderr.read()


def wait_until(holds, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


# ------------------------------------------------------------------------------------- signals


@POSIX
def test_sigterm_to_the_whole_group_saves_the_run_and_its_workers_end(start):
    """As systemd, `timeout` and `scancel --full` send it; torchrun sends it once more."""
    process = start(num_workers=2)
    read_until(process, "step 3/")
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, err) == (143, "")
    assert saved_step() == max((int(step) for step, *_ in STEP.findall(out)), default=3)


@LINUX
def test_workers_end_when_their_process_is_killed(start):
    process = start(num_workers=2)
    read_until(process, "step 3/")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert len(children) >= 2
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


@POSIX
def test_a_worker_that_is_killed_ends_the_run_saved_and_in_one_line(place):
    """As the system does for lack of memory; PyTorch raises an error in the middle of a step."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # another test's DataLoader may have set one
    trainer = Trainer(brief_config(**ENDLESS, num_workers=1))
    after_step(trainer, 3, lambda: multiprocessing.active_children()[0].kill())
    with pytest.raises(UserError, match="^num_workers: a DataLoader worker has ended"):
        trainer.run()
    assert saved_step() == trainer.step >= 3


def test_a_process_that_still_holds_its_workers_ends(place):
    """As a notebook does; the workers ignore the signal that multiprocessing ends them with."""
    code = """if True:
        from testv2 import Trainer, parse_command_line
        import sys
        trainer = Trainer(parse_command_line(sys.argv[1:])[0])
        batches = trainer.train_batches(3)
        next(batches)"""
    words = brief_flags(max_steps=3, num_workers=1)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, timeout=60)
    assert done.returncode == 0


@pytest.mark.slow
@POSIX
def test_a_terminal_that_closes_leaves_a_saved_run(start):
    """It sends SIGHUP, and whatever is written to it fails from then on."""
    ours, theirs = os.openpty()
    process = start(how={"stdout": theirs, "stderr": theirs})
    os.close(theirs)
    seen = b""
    while b"step 3/" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 129
    assert saved_step() >= 3


@POSIX
def test_a_second_ctrl_c_says_what_it_waits_for_and_a_third_ends_at_once(start):
    process = start(gradient_accumulation_steps=10**6)  # a step of half an hour
    read_until(process, "steps 0 to")
    said = []
    reader = threading.Thread(target=lambda: said.append(process.stderr.readline()), daemon=True)
    reader.start()

    def interrupt(done) -> bool:
        process.send_signal(signal.SIGINT)
        return done()

    wait_until(lambda: interrupt(lambda: said))
    line = "step 1 is being finished; press Ctrl-C again to end at once\n"
    assert said == [line]
    wait_until(lambda: interrupt(lambda: process.poll() is not None))
    assert process.returncode == 130 and not LATEST.exists()


@pytest.mark.parametrize(
    "presses, said, ended",
    [([0.0], "", []), ([0.0, 0.1, 0.2], "", []), ([0.0, 1.0], "step 9", []),
     ([0.0, 0.1, 1.0, 1.1], "step 9", []), ([0.0, 1.0, 2.0], "step 9", [130])],
)  # fmt: skip
def test_a_ctrl_c_that_the_launcher_repeats_counts_once(presses, said, ended, monkeypatch, capsys):
    codes, signals = [], Signals()
    monkeypatch.setattr(runtime.os, "_exit", codes.append)
    signals.wait_for("step 9 is being finished", 8)
    signals.saved_step = 7
    for seconds in presses:
        signals.interrupt(seconds)
    line = " is being finished; press Ctrl-C again to end at once, unsaved since step 7\n"
    assert capsys.readouterr().err == (said and said + line) and codes == ended


STOPS = ["SIGHUP", "SIGXCPU", "SIGBREAK", "SIGTERM", "SIGINT"]
PHASES = {
    "enable_validation": True, "validation_interval": 2, "validation_steps": 2,
    "generate_samples": True, "generation_interval": 2, "generation_length": 4, "max_steps": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_each_signal_to_stop_ends_a_run_with_its_number_and_saved(place, name):
    if not hasattr(signal, name):
        pytest.skip(f"no {name} here")
    trainer, number = Trainer(brief_config(**PHASES)), getattr(signal, name)
    after_step(trainer, 1, lambda: [signal.raise_signal(number) for _ in range(2)])
    assert trainer.run() == 128 + number
    assert saved_step() == trainer.step == 1


@POSIX
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_each_signal_to_save_is_heeded_once_and_the_run_goes_on(place, name, capsys):
    trainer = Trainer(brief_config(**PHASES))
    after_step(trainer, 1, lambda: signal.raise_signal(getattr(signal, name)))
    assert trainer.run() == 0
    assert re.findall("^saved .* at step (.)", capsys.readouterr().out, re.M) == ["1", "4"]


@POSIX
def test_a_signal_that_was_ignored_stays_ignored(place):
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = Trainer(brief_config(**PHASES))
        after_step(trainer, 1, lambda: signal.raise_signal(signal.SIGHUP))
        assert trainer.run() == 0 and trainer.step == 4
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_the_last_curve_is_drawn_does_not_undo_a_finished_run(place, monkeypatch):
    draw = runtime.plot_losses
    stop = lambda: signal.raise_signal(signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(runtime, "plot_losses", lambda *a: (stop(), draw(*a)))
    assert Trainer(brief_config(max_steps=2)).run() == 0
    assert len(list(Path("logs").rglob("loss_curve.png"))) == 1


def test_a_run_outside_the_main_thread_trains_without_handlers(place):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(Trainer(brief_config(max_steps=2)).run()))
    thread.start()
    thread.join()
    assert codes == [0] and saved_step() == 2


@POSIX
def test_processes_that_start_while_signals_are_held_get_none(place):
    before, seen = signal.getsignal(signal.SIGCHLD), []
    with Signals() as signals, signals_held():
        signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGCHLD, lambda *_: seen.append(1))
        assert signals.stop == 0
    assert signals.stop == signal.SIGTERM and signal.getsignal(signal.SIGCHLD) is before


# ------------------------------------------------------------------------------------- console


class Broken(io.StringIO):
    """A stream whose every write fails, as on a full disk or after the reader has gone."""

    def __init__(self, error: Exception):
        super().__init__()
        self.raised, self.tries = error, 0

    def write(self, text: str) -> int:
        self.tries += 1
        raise self.raised

    def isatty(self) -> bool:
        return True  # so that there is a progress bar


FAILURES = [
    BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"), ValueError("I/O operation on closed file."),
]  # fmt: skip


@LINUX
def test_a_reader_that_has_gone_and_a_full_disk_do_not_end_the_command(start):
    """`python testv2.py 2> /dev/full | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(writer, "w") as pipe:
        process = start(how={"stdout": pipe, "stderr": full}, max_steps=4)
    assert process.wait(60) == 0 and saved_step() == 4
    assert "standard output failed" in events_text()


def test_streams_that_python_found_closed_do_not_end_the_command(place, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: testv2.main(brief_flags(max_steps=2)))
    assert ended.value.code == 0 and saved_step() == 2


@pytest.mark.slow
@POSIX
def test_closed_streams_do_not_end_the_command(place):
    """`python testv2.py <&- >&- 2>&-`; a file that is opened later must not get their numbers."""
    words = " ".join(brief_flags(max_steps=2))
    line = f"exec {sys.executable} {ROOT / 'testv2.py'} {words} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], check=False).returncode == 0
    assert saved_step() == 2


@pytest.mark.parametrize(
    "broken, failure",
    [("both", FAILURES[0]), *(("stdout", e) for e in FAILURES), *(("stderr", e) for e in FAILURES)],
)
def test_a_console_that_fails_is_announced_once_on_another(place, broken, failure, monkeypatch):
    streams = {"stdout": io.StringIO(), "stderr": io.StringIO()}
    for name in streams:
        if broken in (name, "both"):
            streams[name] = Broken(failure)
        monkeypatch.setattr(sys, name, streams[name])
    assert Trainer(brief_config(max_steps=3)).run() == 0
    assert saved_step() == 3
    said = "".join(stream.getvalue() for stream in streams.values())
    count = {"stdout": said.count("standard output failed"), "stderr": said.count("bar failed")}
    assert count == {name: int(broken == name) for name in count}, said
    if broken == "both":
        assert "standard output failed" in events_text()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-16", "utf-8"])
def test_a_console_shows_what_it_can_of_a_sample(place, encoding, monkeypatch):
    """Without run_cli, as in a program that calls `main` itself; the sample has all bytes."""
    vocabulary = [*byte_alphabet(), EOS_TOKEN]
    Path("data/text/vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    words = brief_flags(max_steps=1, generate_samples="true", generation_length=60)
    words += ["--generation_temperature", "5", "--generation_prompt", "naïve 日本 \N{PILE OF POO}"]
    assert testv2.main(words) == 0 and saved_step() == 1
    said = raw.getvalue().decode(encoding)
    assert "sample at step 1" in said
    assert ("日本" in said) == encoding.startswith("utf") and ("na" in said)


class Bare:
    """What some programs put in place of sys.stdout."""

    def __init__(self):
        self.said = ""

    def write(self, text: str) -> None:
        self.said += text

    def flush(self) -> None:
        pass


def test_a_console_without_encoding_isatty_and_file_is_written(place, monkeypatch):
    streams = {"stdout": Bare(), "stderr": Bare()}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: testv2.main(brief_flags(max_steps=2)))
    assert ended.value.code == 0 and "step 2/2" in streams["stdout"].said


@pytest.mark.parametrize("code, error", [(0, None), (2, UserError("a", "b", "c"))])
def test_the_exit_code_of_a_command_whose_output_cannot_be_written(code, error, monkeypatch):
    """Other scripts: their output is what they were started for."""

    def main() -> int:
        if error:
            raise error
        return code

    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == 2 and errors.getvalue().count("\n") == 1
    assert errors.getvalue().startswith("error: " + ("a: b; c" if error else "stdout: cannot be"))


def test_a_command_that_ends_searches_nothing_for_garbage():
    """What is frozen is not searched; the first function that atexit knows is called last."""
    code = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))
from tinymamba.cli import run_cli
run_cli(lambda: print(len(gc.get_objects())))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    tracked, frozen = map(int, re.findall(r"\d+", done.stdout))
    assert frozen > 0.9 * tracked > 9000, done.stderr


def test_a_free_port_is_none_that_another_process_is_given():
    with socket.socket() as taken:
        first = free_port()
        taken.bind(("127.0.0.1", first + 1))
        second = free_port()
    assert 10_000 <= first < second - 1 < 30_000


@POSIX
def test_the_tests_can_run_in_the_background():
    """`pytest &` and `nohup pytest`."""
    numbers = signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        heed_signals()
        heeded = [signal.getsignal(number) for number in numbers]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert heeded == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL]


# ---------------------------------------------------------------------------------------- logs


def events() -> list:
    """All events that TensorBoard reads from logs/."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    files = sorted(Path("logs").rglob("events.out.tfevents.*"))
    return [event for file in files for event in loader.EventFileLoader(str(file)).Load()]


def events_text() -> str:
    return " ".join(str(event) for event in events())


def test_a_full_disk_of_the_logs_does_not_end_the_command(place, monkeypatch):
    """TensorBoard writes in a thread of its own; its error comes with a later call."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    failed = threading.Event()

    def full(self, data) -> None:
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # of pytest: a warning
    done = call(*brief_flags(max_steps=20))
    assert failed.is_set() and done.returncode == 0 and saved_step() == 20
    assert done.stdout.count("TensorBoard failed (OSError: [Errno 28] No space left") == 1


def fail(*_, **__) -> None:
    raise RuntimeError("this log is broken\nsecond line")


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "add_text", "close"])
def test_tensorboard_that_fails_does_not_end_the_command(place, method, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    Path("data/text/vocab.txt").write_text("\n".join([*byte_alphabet(), EOS_TOKEN]) + "\n")
    monkeypatch.setattr(SummaryWriter, method, fail)
    done = call(*brief_flags(max_steps=2, generate_samples="true", generation_length=2))
    assert done.returncode == 0 and saved_step() == 2
    assert done.stdout.count("TensorBoard failed (RuntimeError: this log is broken); the run") == 1
    assert "second line" not in done.stdout


@POSIX  # Windows deletes no open file
def test_logs_deleted_in_a_run_are_announced_once_and_the_curve_is_drawn(place, capsys):
    trainer = Trainer(brief_config(max_steps=4))
    after_step(trainer, 2, lambda: shutil.rmtree("logs"))
    assert trainer.run() == 0 and saved_step() == 4
    assert capsys.readouterr().out.count(f"{trainer.folder} was deleted") == 1
    assert files_below(Path("logs")).keys() == {f"{trainer.folder.name}/loss_curve.png"}


@pytest.mark.parametrize("how", ["missing", "failing", pytest.param("no folder", marks=POSIX)])
def test_a_curve_that_cannot_be_drawn_does_not_end_the_command(place, how, monkeypatch):
    if how == "missing":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    elif how == "failing":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    else:
        save = Trainer.save

        def block(trainer: Trainer) -> None:
            save(trainer)
            shutil.rmtree("logs")
            Path("logs").write_text("a file")

        monkeypatch.setattr(Trainer, "save", block)
    done = call(*brief_flags(max_steps=2))
    assert done.returncode == 0 and saved_step() == 2
    assert done.stdout.count("the loss curve failed (") == 1, done.stdout
    assert "loss curve in" not in done.stdout


# -------------------------------------------------------------------------------- log folders


def test_runs_of_one_name_have_a_folder_each_and_keep_what_is_in_it(place):
    kept = {}
    for name in ("same", "same-2", "same-3"):
        assert call(*brief_flags(max_steps=2, wandb_run_name="same")).returncode == 0
        assert {p.name for p in Path("logs").iterdir()} == {*(n.split("/")[0] for n in kept), name}
        files = files_below(Path("logs"))
        assert kept.items() <= files.items()
        assert f"{name}/loss_curve.png" in files and len(files) == len(kept) + 2
        kept = files


def test_runs_that_start_in_one_second_have_a_folder_each(tmp_path):
    barrier, names = threading.Barrier(8), []

    def make() -> None:
        barrier.wait()
        names.append(open_log_folder(tmp_path / "logs", "20260101-000000", resumed=False))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 8 and {p.name for p in (tmp_path / "logs").iterdir()} == set(names)


def test_a_resumed_run_goes_on_in_its_folder_even_if_that_was_deleted(place):
    for name in ("run", "run"):
        assert call(*brief_flags(max_steps=2, wandb_run_name=name)).returncode == 0
    for steps in (3, 4):
        assert call("--resume", "--max_steps", steps).returncode == 0
        names = {"run", "run-2"} if steps == 3 else {"run-2"}
        assert {p.name for p in Path("logs").iterdir()} == names
        shutil.rmtree("logs")


def test_a_log_dir_that_is_a_file_or_a_name_that_is_too_long_is_refused(place):
    Path("taken").write_text("")
    assert_refuses(*brief_flags(max_steps=2, log_dir="taken"), naming=["log_dir"])
    long = "x" * 400
    assert_refuses(*brief_flags(max_steps=2, wandb_run_name=long), naming=["log_dir", "created"])


# ------------------------------------------------------------------------------------------ W&B


class FakeRun:
    """A run of Weights & Biases that keeps what it is told."""

    fails = frozenset()  # methods that raise

    def __init__(self, number: int, settings: dict):
        self.settings, self.id = settings, settings.get("id") or f"id{number}"
        self.step = 0
        self.rows, self.metrics, self.code = [], [], None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict, step: int) -> None:
        if "log" in self.fails:
            fail()
        if step >= self.step:  # else W&B drops the row
            self.rows.append(row)
            self.step = step

    def finish(self, exit_code: int) -> None:
        self.code = exit_code
        if "finish" in self.fails:
            fail()

    def points(self, name: str) -> list[tuple[int, float]]:
        return [(row["global_step"], row[name]) for row in self.rows if name in row]


@pytest.fixture
def runs(place, monkeypatch) -> list[FakeRun]:
    """The runs that a fake module wandb has started."""
    started: list[FakeRun] = []

    def init(**settings) -> FakeRun:
        run = FakeRun(len(started), settings)
        run.step = max((old.step + 1 for old in started if old.id == run.id), default=0)
        started.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return started


WATCHED = {"use_wandb": "true", "wandb_run_name": "try"}
VALIDATED = {"enable_validation": "true", "validation_interval": 2, "validation_steps": 1}


def test_wandb_and_the_console_agree_on_every_step(runs):
    done = call(*brief_flags(max_steps=4, **WATCHED, **VALIDATED))
    [run] = runs
    assert done.returncode == run.code == 0
    said = [(int(step), loss) for step, _, loss in STEP.findall(done.stdout)]
    assert [(step, f"{loss:.4f}") for step, loss in run.points("train/loss")] == said
    assert len(said) == 4
    said = re.findall(r"^validation at step (\d+): (\S+) nats", done.stdout, re.M)
    assert [(str(s), f"{v:.4f}") for s, v in run.points("val/loss")] == said
    assert ("*", "global_step") in run.metrics and run.step == 4


def test_a_resumed_run_is_one_run_of_wandb_and_a_new_one_is_another(runs):
    trainer = Trainer(brief_config(max_steps=6, use_wandb=True, wandb_run_name="try"))
    after_step(trainer, 3, lambda: signal.raise_signal(signal.SIGTERM))
    assert trainer.run() == 143
    assert call("--resume").returncode == 0
    assert call(*brief_flags(max_steps=1, **WATCHED)).returncode == 0
    assert [run.id for run in runs] == ["id0", "id0", "id2"]
    assert [run.settings.get("resume") for run in runs] == [None, "allow", None]
    assert [run.code for run in runs] == [143, 0, 0]
    assert [[s for s, _ in run.points("train/loss")] for run in runs] == [[1, 2, 3], [4, 5, 6], [1]]
    assert [Path(run.settings["dir"]).name for run in runs] == ["try", "try", "try-2"]


def test_steps_that_are_trained_again_are_logged_again(runs):
    """After kill -9 W&B has steps that the checkpoint has not, and would drop them."""
    words = brief_flags(max_steps=4, checkpoint_interval=3, **WATCHED, **VALIDATED)
    assert call(*words).returncode == 0
    testv2.sibling(LATEST, "previous").replace(LATEST)
    assert call("--resume").returncode == 0 and runs[1].id == runs[0].id
    assert runs[1].points("train/loss") == runs[0].points("train/loss")[3:]
    assert runs[1].points("val/loss") == runs[0].points("val/loss")[1:]


def test_a_run_that_was_not_logged_to_wandb_begins_there_when_resumed(runs):
    assert call(*brief_flags(max_steps=2)).returncode == 0
    assert call("--resume", "--max_steps", 4, "--use_wandb").returncode == 0
    assert call("--resume", "--max_steps", 5).returncode == 0
    assert [run.id for run in runs] == ["id0", "id0"]


@pytest.mark.parametrize("error, code", [(UserError("a", "b", "c"), 2), (RuntimeError("bug"), 1)])
def test_a_run_that_fails_is_a_failed_run_of_wandb(runs, error, code):
    trainer = Trainer(brief_config(max_steps=2, use_wandb=True))

    def end() -> None:
        raise error

    after_step(trainer, 1, end)
    with pytest.raises(type(error)):
        trainer.run()
    assert runs[0].code == code


@pytest.mark.parametrize("fails", [{"log"}, {"finish"}, {"log", "finish"}])
def test_wandb_that_fails_is_announced_once_and_dropped(runs, fails, monkeypatch):
    monkeypatch.setattr(FakeRun, "fails", fails)
    done = call(*brief_flags(max_steps=3, **WATCHED))
    assert done.returncode == 0 and saved_step() == 3
    assert done.stdout.count("Weights & Biases failed (RuntimeError: this log is broken)") == 1
    assert runs[0].code == 0 and len(runs[0].rows) == (0 if "log" in fails else 3)


@pytest.mark.parametrize("error", [OSError("no network"), AttributeError("module has no init")])
def test_wandb_that_cannot_start_is_refused_whatever_its_error(runs, error, monkeypatch):
    def init(**_) -> None:
        raise error

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    assert_refuses(*brief_flags(max_steps=2, **WATCHED), naming=["use_wandb", str(error)])
    assert not any(Path("logs").iterdir())


@POSIX
@pytest.mark.parametrize(("process", "code"), [(1, 143), (2, -signal.SIGTERM)])
def test_sigterm_ends_process_1_of_a_container_too(process, code):
    """There the kernel ignores it; tests/test_image.py has a real process 1."""
    script = f"""
import os, signal
from tinymamba.cli import run_cli
os.getpid = lambda: {process}
run_cli(lambda: signal.raise_signal(signal.SIGTERM) or print("still here"))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and not done.stdout + done.stderr


@POSIX
@pytest.mark.parametrize("act", [require_writable, hold_lock])
def test_a_folder_of_another_user_is_named_with_the_user(tmp_path, monkeypatch, act):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    user = os.getuid() or 65534
    if os.getuid() == 0:  # root may write everywhere
        os.setresuid(user, user, 0)
    try:
        with pytest.raises(UserError, match=f"let user {user} write to {tmp_path}$"):
            if act is hold_lock:
                with hold_lock(Path("run.lock"), "run", "wait"):
                    pass
            else:
                require_writable(Path("new"), "output_dir")
        with pytest.raises(UserError, match=f"let user {user} write to {tmp_path}$"):
            require_writable(Path("."), "output_dir")
    finally:
        if user == 65534:
            os.setresuid(0, 0, 0)
        tmp_path.chmod(0o755)
