"""What a run needs from its environment: launcher, device, other processes, signals, logs, profile.

Nothing here depends on the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinymamba.cli import UserError, need, require

# ---------------------------------------------------------------------------------- hardware


def from_launcher(name: str, default: int) -> int:
    """An environment variable of torchrun or torch.distributed.launch: RANK, WORLD_SIZE, ..."""
    return int(os.environ.get(name, default))


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


# ---------------------------------------------------------------------------- other processes


def join_process_group(device: torch.device, timeout: float) -> Watchdog:
    """Set up the process group that the launcher asks for, watched with `timeout` in seconds."""
    patience = timedelta(seconds=MEETING * timeout)
    remedy = "are all processes running, and does the address lead to the first?"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
        store = dist.PrefixStore(meet(store, rank, world, patience.total_seconds()), store)
    except dist.DistError as e:
        raise UserError("MASTER_ADDR", f"the first process cannot be reached ({e})", remedy) from e
    watchdog = Watchdog(store, rank, world, timeout)
    backend, group = "nccl" if device.type == "cuda" else "gloo", dist.PrefixStore("group", store)
    try:
        dist.init_process_group(backend, store=group, rank=rank, world_size=world)
    except RuntimeError as e:  # another process has ended meanwhile
        watchdog.raise_cause(e)
    # Its destructor would join a thread that may be waiting for the interpreter: a deadlock.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
    return watchdog


MEETING = 10  # times the watchdog's timeout that the processes wait for one another at the start


def meet(store: Any, rank: int, world: int, timeout: float) -> str:
    """Wait for all processes; returns a name for this life of the group, the same on all of them.

    After a restart by torchrun, the store still has the addresses and the last messages of the
    processes before. So the first process draws a new name, and confirms every process that
    answers to it. One that has read the name of an earlier life is not confirmed, and reads again.
    """
    me, until = secrets.token_hex(8), time.monotonic() + timeout

    def confirm(other: int) -> bool:
        answered = store.check([f"{me} {other}"])
        if answered:
            store.set(f"{me} {other} {store.get(f'{me} {other}').decode()}", "confirmed")
        return answered

    def answer() -> str | None:
        if not store.check(["life"]):
            return None
        life = store.get("life").decode()
        store.set(f"{life} {rank}", me)
        return life if store.check([f"{life} {rank} {me}"]) else None

    def wait(other: int) -> None:
        problem = f"rank {other} has not come for {timeout:.0f} seconds"
        require(time.monotonic() < until, "WORLD_SIZE", problem, "see its messages")
        time.sleep(0.02)

    if rank == 0:
        store.set("life", me)
        for other in range(1, world):
            while not confirm(other):
                wait(other)
        return me
    while (life := answer()) is None:
        wait(0)
    return life


def all_reduce(values: list[Any], device: torch.device) -> list[float]:
    """Each value summed over all processes: numbers, and tensors of one number on the device.

    The host waits for the device once.
    """
    alone, wide = from_launcher("WORLD_SIZE", 1) == 1, torch.float64
    if alone and not any(isinstance(value, Tensor) for value in values):
        return values
    if device.type == "mps":
        wide = torch.float32
    parts = [
        value.to(wide)
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=wide, device=device)
        for value in values
    ]
    t = torch.stack(parts)
    if not alone:
        dist.all_reduce(t)
    return t.tolist()


def full_tensor(t: Any) -> Any:
    """A tensor that is sharded over the processes (FSDP), assembled; anything else unchanged."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def shard_like(t: Tensor, like: Any) -> Tensor:
    """This process's shard of a full tensor, sharded as `like` is."""
    if not hasattr(like, "device_mesh") or t.shape != like.shape:
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


class Watchdog:
    """Ends this process when another one has failed or stopped sending heartbeats, and names it.

    A thread of every process increments a counter in the shared store once a second. The counter
    of a dead, stopped or disconnected process stands still, while the others wait for it inside a
    collective operation that may take half an hour to time out.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = store.clone(), rank, world, timeout
        self.store.set_timeout(timedelta(seconds=timeout))
        self.stopped = threading.Event()
        self.seen: dict[int, tuple[str, float]] = {}  # rank: its last message, and since when
        self.store.set(f"name {rank}", f"rank {rank} (process {os.getpid()} on {gethostname()})")
        self.publish("alive 0")
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def publish(self, text: str) -> None:
        """Leave a message for the other processes."""
        self.store.set(f"rank {self.rank}", text)

    def watch(self) -> None:
        """Send a heartbeat and check the others, once a second."""
        beat = 0
        while not self.stopped.wait(1.0):
            beat += 1
            try:
                self.publish(f"alive {beat}")
                for other in range(self.world):
                    self.check(other)
            except dist.DistError as e:
                self.end(f"the store shared by the processes cannot be reached ({e})")

    def check(self, other: int) -> None:
        """Read the message of a process; end this one if it failed or shows no heartbeat."""
        said, now = self.said_by(other), time.monotonic()
        before, since = self.seen.get(other, ("", now))
        since = since if said == before else now
        self.seen[other] = said, since
        if other == self.rank or said == "done":
            return
        if said.startswith("failed"):
            self.end(f"{self.name(other)} {said}")
        if now - since > self.timeout:
            self.end(f"{self.name(other)} has sent no heartbeat for {self.timeout} seconds")

    def said_by(self, other: int) -> str:
        """The last message of a process; empty before its first."""
        key = f"rank {other}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def name(self, other: int) -> str:
        """Rank, and once it is known the process id and the host."""
        key = f"name {other}"
        return self.store.get(key).decode() if self.store.check([key]) else f"rank {other}"

    def end(self, why: str) -> None:
        """Print one line and exit with code 2, whatever the main thread is doing."""
        print(f"error: {why}; fix that and pass --resume", file=sys.stderr, flush=True)
        with contextlib.suppress(dist.DistError):
            self.publish("ended")
        os._exit(2)  # the main thread may wait for ever

    def raise_cause(self, error: Exception) -> typing.NoReturn:
        """After a failed collective operation: wait for the message of the process that failed."""
        self.timeout = min(self.timeout, 5.0)
        self.thread.join(3 * self.timeout)
        raise UserError(
            "WORLD_SIZE", f"a collective operation failed ({error})", "see their messages"
        )

    def close(self, error: BaseException | None) -> None:
        """Tell the others how this process ended, and wait until they can have read it."""
        self.stopped.set()
        self.thread.join()
        why = str(error) if isinstance(error, UserError) else repr(error)
        until = time.monotonic() + min(self.timeout, 5.0)
        with contextlib.suppress(dist.DistError):
            self.publish(f"failed ({why})" if error else "done")
            while self.rank == 0 and self.others_running() and time.monotonic() < until:
                time.sleep(0.02)

    def others_running(self) -> bool:
        """Whether any other process is still running."""
        return any(self.said_by(other).startswith("alive") for other in range(1, self.world))


class Signals:
    """Inside `with`, SIGTERM, SIGINT and SIGUSR1 are recorded instead of ending the process."""

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows lacks the last
    STOPPING = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.stop = 0  # the number of the last SIGTERM or SIGINT
        self.saves_asked = self.saves_taken = 0  # how many SIGUSR1 have come, and were taken
        self.before: dict[int, Any] = {}

    def handle(self, number: int, frame: object) -> None:
        """Record a signal."""
        if number == getattr(signal, "SIGUSR1", None):
            self.saves_asked += 1
        else:
            self.stop = number

    def take(self) -> list[float]:
        """Of SIGINT, SIGTERM and SIGUSR1, 1 for those that came, else 0.

        Of the first two it is the last to come; SIGUSR1 counts if it came since the last call.
        """
        asked, taken = self.saves_asked, self.saves_taken
        self.saves_taken = asked
        return [*(float(self.stop == number) for number in self.STOPPING), float(asked > taken)]

    def __enter__(self) -> Signals:
        numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------- logs and profile


class Logger:
    """TensorBoard, W&B and the console; silent on all ranks but the first."""

    def __init__(self, folder: Path, active: bool, first_step: int, wandb: dict | None = None):
        """`wandb` holds arguments of wandb.init, or is None to log without it."""
        self.active, self.board, self.wandb = active, None, None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        if wandb is not None:
            self.wandb = self.start_wandb(folder, wandb)
        self.board = SummaryWriter(str(folder), purge_step=first_step + 1)

    @staticmethod
    def start_wandb(folder: Path, arguments: dict) -> Any:
        """A run of Weights & Biases; a UserError if it cannot start."""
        try:
            import wandb

            return wandb.init(dir=str(folder), **arguments)
        except ModuleNotFoundError as e:
            raise UserError("use_wandb", str(e), "pip install wandb") from None
        except wandb.Error as e:
            remedy = "wandb login, or set WANDB_MODE=offline"
            raise UserError("use_wandb", str(e).split("\n")[0], remedy) from None

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            from tqdm import tqdm

            tqdm.write(text)
            sys.stdout.flush()

    def record(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name."""
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def record_text(self, name: str, text: str, step: int) -> None:
        """Log a text to TensorBoard."""
        if self.board is not None:
            self.board.add_text(name, text, step)

    def close(self) -> None:
        """Flush what was logged."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


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


def profile_steps(
    step: Callable[[], object],
    device: torch.device,
    trace: Path | None,
    say: Callable[[str], object],
) -> None:
    """Run two steps to warm up, then three under torch.profiler: a table, and a trace file."""
    for _ in range(2):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    column = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    say(profiler.key_averages().table(sort_by=column, row_limit=20))
    if trace:
        profiler.export_chrome_trace(str(trace))
        say(f"trace in {trace}: open it in chrome://tracing or ui.perfetto.dev")
