"""Several processes that train one model: how they meet, share numbers, and notice a failure.

One process needs none of this, and imports no more for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import socket
import sys
import threading
import time
import typing
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinymamba.cli import UserError, from_launcher, require, say


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
    keep(dist.group.WORLD)
    return watchdog


def keep(group: Any) -> None:
    """Never delete a process group: that would join a thread that may wait for the interpreter."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


MEETING = 10  # times the watchdog's timeout that the processes wait for one another at the start


def meet(store: Any, rank: int, world: int, timeout: float) -> str:
    """Wait for all processes; returns a name for this life of the group, the same on all of them.

    After a restart by torchrun, the store still has the addresses and the last messages of the
    processes before. So the first process draws a new name, and confirms every process that
    answers to it. One that has read the name of an earlier life is not confirmed, and reads again.
    """
    me, until = secrets.token_hex(8), time.monotonic() + timeout
    quiet_until = until - 0.9 * timeout

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
        nonlocal quiet_until
        if time.monotonic() > quiet_until:
            quiet_until = until
            say(f"rank {rank} waits for rank {other}")
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
        self.store.set(
            f"name {rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        )
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
            except Exception as e:  # without this thread, the process would wait for ever
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
        try:
            print(f"error: {why}; fix that and pass --resume", file=sys.stderr, flush=True)
            self.publish("ended")
        finally:  # whatever has become of the console and the store
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


def is_same(number: int, device: torch.device) -> bool:
    """Whether a whole number below 2^26 is the same in all processes."""
    count, total, squares = all_reduce([1.0, float(number), float(number) ** 2], device)
    return total**2 == count * squares


def full_tensor(t: Any) -> Any:
    """A tensor that is sharded over the processes (FSDP), assembled; anything else unchanged."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def local_tensor(t: Any) -> Tensor:
    """What this process holds of a tensor: its rows if it is sharded, else all."""
    return t.to_local() if hasattr(t, "to_local") else t


def shard_like(t: Tensor, like: Any) -> Tensor:
    """This process's shard of a full tensor, sharded as `like` is."""
    if not hasattr(like, "device_mesh") or t.shape != like.shape:
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def own_rows(p: Any) -> slice:
    """Which rows of a parameter that `make_sharded` has sharded are this process's."""
    count, place = p.device_mesh.size(-1), p.device_mesh.get_local_rank(p.device_mesh.ndim - 1)
    first = min(len(p), place * -(-len(p) // count))  # as torch.chunk does
    return slice(first, first + len(p.to_local()))


@torch.no_grad()
def fill_parameter(p: Any, values: Tensor) -> None:
    """Copy values of the full shape into a parameter; if it is sharded, this process's rows."""
    assert p.shape == values.shape
    if hasattr(p, "device_mesh"):
        p.to_local().copy_(values[own_rows(p)])
    else:
        p.copy_(values)


def arrange_processes(config: Any, world: int) -> dict[str, int]:
    """Over how many processes a model is sharded, and with hsdp how often; {} if it is not."""
    if world == 1 or config.parallel == "ddp":
        return {}
    if config.parallel == "fsdp":
        return {"shard": world}
    size = config.shard_group or from_launcher("LOCAL_WORLD_SIZE", world)
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    problem = f"{size} processes do not divide the {world} of this run"
    require(size in divisors, "shard_group", problem, f"use one of {divisors}")
    return {"replicate": world // size, "shard": size} if size < world else {"shard": world}


def make_mesh(device: torch.device, sizes: dict[str, int]) -> Any:
    """All processes as a grid with named dimensions; those along the last one are neighbours."""
    from torch.distributed.device_mesh import init_device_mesh  # half a second to import

    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for group in mesh.get_all_groups():
        keep(group)
    return mesh


def make_sharded(make: Callable[[], Any], device: torch.device, sizes: dict[str, int]) -> Any:
    """The model that `make` makes, sharded as `arrange_processes` says, without values yet.

    No process holds all of it at any time; a block is gathered only while it is used.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", ".*returned a view tensor")  # no view is changed in place
    mesh = make_mesh(device, sizes)
    with torch.device("meta"):
        model = make()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "advance")
    model.to_empty(device=device)
    if model.config.tie_embeddings:  # to_empty has made two of them
        model.head.weight = model.embedding.weight
    return model
