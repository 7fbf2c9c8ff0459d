"""What a run needs from its environment: device, signals, loader, logs.

Nothing here depends on the model.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinymamba.checkpoint import require_writable
from tinymamba.cli import UserError, from_launcher, need, print_error, require, silence

# ---------------------------------------------------------------------------------- hardware


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name, or the fastest for "auto"; a UserError if it is not available.

    Products in float32 are exact on it: TF32 would round the angles and states of the model, which
    are float32 so that they are not rounded. All other products are in the dtype of autocast.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    mps = torch.backends.mps.is_available()
    have = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in have.items() if present)
    known = re.fullmatch(r"cuda(:\d+)?|mps|cpu", name) and have[name.split(":")[0]]
    available = ", ".join(kind for kind, present in have.items() if present)
    require(known, "device", f"{name} is not available", f"use auto, {available}")
    device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    require(
        device.type != "cuda" or device.index < torch.cuda.device_count(),
        "device",
        f"{device} is not available",
        f"there are {torch.cuda.device_count()} GPUs",
    )
    return device


def c_function(name: str) -> Any:
    """A function of the C library that is glibc's own; None in another library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def return_memory() -> None:
    """Give memory that is free again back to the system, which glibc does not do by itself."""
    if trim := c_function("malloc_trim"):
        trim(0)


def reuse_memory() -> bool:
    """Let glibc keep freed memory for the next tensor; returns whether this C library can.

    It gives large blocks back to the system otherwise, which fills every page with zeros before it
    lends it again: a twentieth of a training step on a CPU.
    """
    mallopt, largest, m_trim_threshold, m_mmap_threshold = c_function("mallopt"), 2**31 - 1, -1, -3
    return mallopt is not None and all(
        mallopt(name, largest) for name in (m_trim_threshold, m_mmap_threshold)
    )


def pick_amp_dtype(wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """The autocast dtype that the hardware is fast in; float32 means no autocast."""
    if device.type == "cuda" and wanted == torch.bfloat16:
        return wanted if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return wanted if wanted == torch.bfloat16 and fast else torch.float32
    return wanted


def why_no_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot work on this device, as far as that is known beforehand."""
    if device.type == "mps":
        return "it is experimental on Apple GPUs"
    compilers = [os.environ.get("CXX", "g++"), "g++", "clang++"]
    if os.name == "nt":  # torch.compile knows no other compiler on Windows
        compilers = ["cl"]
    missing = device.type == "cpu" and not any(map(shutil.which, compilers))
    return "no C++ compiler was found" if missing else None


# ----------------------------------------------------------------------------------- signals


def numbers_of(*names: str) -> tuple[signal.Signals, ...]:
    """The signals of these names that the platform has."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


class Signals:
    """Inside `with`, signals that ask to stop or to save are recorded, and do not end the process.

    One that was ignored before stays ignored, as SIGHUP under nohup. SIGINT is also counted by a
    thread, as the main thread may be inside a long operation: the second prints what is waited
    for, the third ends the process at once. Outside the main thread `with` does nothing.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGBREAK", "SIGUSR1", "SIGUSR2")
    STOPPING = numbers_of(*NAMES[:5])
    SAVING = numbers_of(*NAMES[5:])
    TOGETHER = 0.3  # seconds: torchrun repeats the Ctrl-C that the terminal sent to all

    def __init__(self) -> None:
        self.stop = 0  # the number of the last signal to stop
        self.saves_asked = self.saves_taken = 0  # how many signals to save have come, were taken
        self.doing = "the run is being ended"  # what a second Ctrl-C says is waited for
        self.step = self.saved_step = 0  # of the run, and of its last checkpoint
        self.interrupts, self.last_interrupt = 0, -math.inf
        self.before: dict[int, Any] = {}
        self.wakeup: socket.socket | None = None

    def handle(self, number: int, frame: object) -> None:
        """Record a signal."""
        if number in self.SAVING:
            self.saves_asked += 1
        else:
            self.stop = number

    def take(self) -> list[float]:
        """For each signal of STOPPING, whether it was the last to stop; and whether to save.

        The last counts if such a signal came since the last call.
        """
        asked, taken = self.saves_asked, self.saves_taken
        self.saves_taken = asked
        return [*(float(self.stop == number) for number in self.STOPPING), float(asked > taken)]

    def wait_for(self, doing: str, step: int) -> None:
        """Set what a second Ctrl-C says, and the step of the run."""
        self.doing, self.step = doing, step

    def watch(self, reader: socket.socket) -> None:
        """Count SIGINT until a zero comes; Python writes the number of each signal."""
        with reader:
            while (number := reader.recv(1)[0]) != 0:
                if number == signal.SIGINT:
                    self.interrupt(time.monotonic())

    def interrupt(self, now: float) -> None:
        """Count a SIGINT that came at that time."""
        if now - self.last_interrupt < self.TOGETHER:
            return
        self.interrupts, self.last_interrupt = self.interrupts + 1, now
        if self.interrupts == 2 and from_launcher("RANK", 0) == 0:
            lost = self.step != self.saved_step
            loss = f", unsaved since step {self.saved_step}" if lost else ""
            with contextlib.suppress(OSError, ValueError):
                print_error(f"{self.doing}; press Ctrl-C again to end at once{loss}")
        if self.interrupts > 2:
            os._exit(128 + signal.SIGINT)

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        thread = threading.Thread(target=self.watch, args=(reader,), daemon=True)
        thread.start()
        self.old_wakeup = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        for number in (*self.STOPPING, *self.SAVING):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
        if self.wakeup is not None:
            signal.set_wakeup_fd(self.old_wakeup)
            with self.wakeup, contextlib.suppress(OSError):  # full, if the thread cannot print
                self.wakeup.send(b"\0")
            self.wakeup = None


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold signals back while processes are started that are to run `outlive_signals`.

    A handler of SIGCHLD that is set inside is removed: PyTorch's raises an error in the middle of
    a step. A worker that died is noticed when the next batch is taken.
    """
    masks = hasattr(signal, "pthread_sigmask")
    if not masks or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers, child = {*Signals.STOPPING, *Signals.SAVING}, signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        if child is not None:  # None: one that Python did not set
            signal.signal(signal.SIGCHLD, child)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(worker: int) -> None:
    """Ignore, in a worker of a DataLoader, the signals that the main process obeys.

    A launcher sends them to both. A worker ends with the main process.
    """
    signal.set_wakeup_fd(-1)  # a forked worker has the main process's
    numbers = (*Signals.STOPPING, *Signals.SAVING)
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def make_loader(data: Any, plan: Any, workers: int, pinned: bool) -> Any:
    """A DataLoader over a dataset in the order of `plan`, whose workers outlive signals.

    It keeps its workers when it is used again. To start them again and again is slow, and CPython
    3.11 may hang in a fork while another thread ends, as those of the workers before do.
    """
    return torch.utils.data.DataLoader(
        data,
        batch_sampler=plan,
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=outlive_signals,
        persistent_workers=workers > 0,
    )


def take_batches(loader: Any) -> Iterator:
    """All batches of a loader; a UserError if a worker dies."""
    before = multiprocessing.active_children()
    with signals_held():
        batches = iter(loader)
    for worker in multiprocessing.active_children():
        if worker not in before:  # at exit Python sends SIGTERM, which it ignores, and waits
            atexit.register(worker.kill)
    try:
        yield from batches
    except Exception as e:
        if loader.num_workers:  # now: a garbage collector would close their queues first, and wait
            loader._iterator = None  # it cannot be used again
            batches._shutdown_workers()
        if not isinstance(e, RuntimeError | OSError | EOFError):  # the last two: a worker died
            raise
        own = "Caught" in str(e) or not loader.num_workers  # an error of reading the data
        died = "DataLoader worker" in str(e) if isinstance(e, RuntimeError) else not own
        problem = f"a DataLoader worker has ended ({str(e) or type(e).__name__})"
        require(not died, "num_workers", problem, "resume with fewer")
        raise


# -------------------------------------------------------------------------------------- logs


def open_log_folder(parent: Path, name: str, resumed: bool) -> str:
    """Create a folder of that name, or with -2, -3, ... if it exists; return its name.

    Of two runs that ask for one name at the same time, each gets its own. Only a resumed run
    takes one that exists.
    """
    require_writable(parent / name if resumed else parent, "log_dir")
    free, number = name, 1
    while not resumed:
        try:
            (parent / free).mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            free = f"{name}-{number}"
        except OSError as e:
            problem = f"{parent / free} cannot be created ({e.strerror})"
            raise UserError("log_dir", problem, "choose another") from e
    return free


class TolerantStream:
    """A text stream that keeps its first error in `error` instead of raising it."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Write, as far as that works."""
        self.attempt(lambda: self.stream.write(text))

    def flush(self) -> None:
        """Flush, as far as that works."""
        self.attempt(lambda: self.stream.flush())

    def attempt(self, act: Callable[[], object]) -> None:
        """Keep the error of a call."""
        try:
            act()
        except Exception as e:
            self.error = self.error or e


def gate_statistics(gates: Tensor, branches: Sequence[str]) -> dict[str, float]:
    """Mean weight of each of the branches and mean entropy in nats; gates (n_layer, b, l, 3)."""
    mean = gates.mean(dim=(1, 2))  # (n_layer, 3)
    entropy = torch.special.entr(gates).sum(-1).mean(dim=(1, 2))  # (n_layer,)
    columns = dict(zip(branches, mean.T, strict=True)) | {"entropy": entropy}
    values = {f"gate/{name}": column.mean().item() for name, column in columns.items()}
    for name, column in columns.items():
        values |= {f"gate_{name}/layer{i}": value for i, value in enumerate(column.tolist())}
    return values


class Logger:
    """TensorBoard, W&B and the console with a progress bar; silent on all ranks but the first.

    No log ends a run: one that fails is announced once on another, and dropped.
    """

    CONSOLE, ERRORS, BAR = "standard output", "standard error", "the progress bar"
    BOARD, WANDB, CURVE = "TensorBoard", "Weights & Biases", "the loss curve"

    def __init__(self, folder: Path, active: bool, first_step: int, wandb: dict | None = None):
        """`wandb` holds arguments of wandb.init, or is None to log without it."""
        self.folder, self.active, self.step = folder, active, first_step
        self.dropped: set[str] = set()
        self.board: Any = None
        self.wandb: Any = None
        self.bar: Any = None
        if not active:
            return
        if wandb is not None:
            self.start_wandb(wandb)
        self.board = self.attempt(self.BOARD, self.start_board)

    def attempt(self, log: str, write: Callable[..., Any], *args: Any) -> Any:
        """Call `write`; a log that fails is announced and dropped."""
        if not self.active or log in self.dropped:
            return None
        try:
            return write(*args)
        except Exception as e:  # each library has its own, and none is worth the run
            self.dropped.add(log)
            reason = f"{type(e).__name__}: {e}".partition("\n")[0]
            if log == self.CONSOLE:
                silence(sys.stdout)
            self.announce(f"{log} failed ({reason}); the run goes on without it")
        return None

    def announce(self, text: str) -> None:
        """Say it on the console, or else on standard error and in TensorBoard."""
        self.say(text)
        if self.CONSOLE in self.dropped:
            self.attempt(self.ERRORS, print_error, text)
            self.record_text("log", text, self.step)

    def start_board(self) -> Any:
        """A TensorBoard writer; steps after the first, of a run that is resumed, are replaced."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=self.step + 1)

    def start_wandb(self, arguments: dict) -> None:
        """Start a run of Weights & Biases; a UserError if that fails.

        W&B drops what is logged for a step before its newest. If that is ahead of a resumed run,
        W&B's own steps are shifted; the metric global_step has those of the run.
        """
        try:
            import wandb

            self.wandb = wandb.init(dir=str(self.folder), **arguments)
            self.wandb.define_metric("global_step")
            self.wandb.define_metric("*", step_metric="global_step")
            self.wandb_shift = max(0, self.wandb.step - self.step)
        except Exception as e:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only an empty one
            missing, remedy = isinstance(e, ImportError), "wandb login, or set WANDB_MODE=offline"
            remedy = "pip install wandb" if missing else remedy
            raise UserError("use_wandb", str(e).partition("\n")[0], remedy) from None

    def start_bar(self, total: int, first: int) -> None:
        """Show a progress bar on a terminal."""
        from tqdm import tqdm

        self.bar_stream = TolerantStream(sys.stderr)  # an error inside tqdm would keep its lock
        settings = {"total": total, "initial": first, "file": self.bar_stream, "disable": None}
        self.bar = self.attempt(self.BAR, lambda: tqdm(**settings))

    def draw(self, act: str) -> None:
        """Call a method of the progress bar, such as "update", if there is one."""

        def write() -> None:
            getattr(self.bar, act)()
            if self.bar_stream.error:
                raise self.bar_stream.error

        if self.bar is not None:
            self.attempt(self.BAR, write)

    def say(self, text: str) -> None:
        """Print a line above the progress bar; "?" for what the console cannot show."""
        self.attempt(self.CONSOLE, self.show, text)

    def show(self, text: str) -> None:
        """As `say`, with the console's errors."""
        self.draw("clear")
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
        self.draw("refresh")

    def record(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name."""
        self.step = step
        if self.board is not None:
            self.attempt(self.BOARD, self.write_scalars, values, step)
        if self.wandb is not None:
            row = {**values, "global_step": step}
            self.attempt(self.WANDB, lambda: self.wandb.log(row, step=step + self.wandb_shift))

    def write_scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers to TensorBoard; a deleted file would take them without an error."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} was deleted")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def record_text(self, name: str, text: str, step: int) -> None:
        """Log a text to TensorBoard."""
        if self.board is not None:
            whole = text.encode("utf-8", "replace").decode()  # a lone surrogate would be an error
            self.attempt(self.BOARD, self.board.add_text, name, whole, step)

    def plot(self, history: dict[str, list]) -> None:
        """Draw the losses, see plot_losses, into the log folder."""
        if self.active:
            self.attempt(self.CURVE, self.draw_curve, history, self.folder / "loss_curve.png")

    def draw_curve(self, history: dict[str, list], path: Path) -> None:
        """As `plot`, with its errors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_losses(history, path)
        self.say(f"loss curve in {path}")

    def close(self, exit_code: int = 0) -> None:
        """Flush what was logged; W&B shows a run that failed by its exit code."""
        self.draw("close")
        if self.board is not None:
            self.attempt(self.BOARD, self.board.close)
        if self.wandb is not None and self.WANDB not in self.dropped:
            self.attempt(self.WANDB, self.wandb.finish, exit_code)
        elif self.wandb is not None:  # W&B would show it as running
            with contextlib.suppress(Exception):
                self.wandb.finish(exit_code)


def plot_losses(history: dict[str, list], path: Path) -> None:
    """Draw training and validation loss over the steps into a PNG."""
    figure = need("matplotlib.figure").Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, marker in (("train", ""), ("val", "o")):
        if history[name]:
            axes.plot(*zip(*history[name], strict=True), label=name, marker=marker, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
