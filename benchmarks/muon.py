"""What one step of Muon costs each of several processes: work, messages and memory.

    python -m benchmarks.muon
    python -m benchmarks.muon --d_model 4096 --n_layer 25 --num_heads 32 --processes 8 64
    python -m benchmarks.muon --n_layer 8 --vocab_size 4096 --processes 1 2 4 --run

Counted on tensors without data, so any model and any number of processes will do: it is the step
itself that runs, as one of so many processes, and messages go nowhere. Memory is what the step
needs besides weights, gradients and momentum. With --run the processes are started on this
machine, and the CPU time and the memory of each are measured (on Linux).
"""

from __future__ import annotations

import functools
import math
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.multiprocessing import spawn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from testv2 import Config, TinyMambaModel
from tinymamba.cli import parse_flags, require, run_cli
from tinymamba.distributed import local_tensor, make_sharded
from tinymamba.initial_weights import init_weights
from tinymamba.optimizer import MuonAdamW, make_optimizer
from tinymamba.runtime import return_memory


@dataclass
class Options:
    """The command line."""

    # Model
    d_model: int = 768  # width
    n_layer: int = 12  # blocks
    num_heads: int = 12  # attention heads
    vocab_size: int = 50304  # ids

    # Processes
    processes: list[int] | None = None  # how many; None means 1, 2, 4 and 8
    parallel: list[str] | None = None  # how they share the model; None means ddp and fsdp
    run: bool = False  # start them and measure, instead of counting

    CHOICES: ClassVar = {"parallel": ("ddp", "fsdp")}
    LIMITS: ClassVar = {"processes": (1, math.inf)}


# ------------------------------------------------------------------------------------ counting


class Held(TorchDispatchMode):
    """Counts the bytes of tensors made under it: the most alive at a time, and those received."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.most = self.received = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = {storage._cdata for storage in storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self.received += bytes_received(func.name(), args)
        made = [storage for storage in storages(out) if storage._cdata not in given]
        self.alive += [(StorageWeakRef(storage), storage.nbytes()) for storage in made]
        self.alive = [(ref, size) for ref, size in self.alive if not ref.expired()]
        self.most = max(self.most, sum(size for _, size in self.alive))
        return out


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Those of the tensors in a tree; a DTensor's are seen where its shard is used."""
    leaves = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return [t.untyped_storage() for t in leaves if not isinstance(t, DTensor)]


def bytes_received(name: str, args: tuple) -> int:
    """What an operation brings from other processes."""
    if name.startswith("c10d::alltoall_base_"):
        lengths = args[3]
        return (sum(lengths) - lengths[dist.get_rank()]) * args[0].element_size()
    if name.startswith("c10d::broadcast_") and args[2] != dist.get_rank():
        return sum(t.nbytes for t in args[0])
    return 0


def build(config: Config, parallel: str) -> MuonAdamW:
    """The optimizer of a model, of which every matrix has a gradient, and nothing else."""
    make = functools.partial(TinyMambaModel, config, filled=False)
    sizes = {"shard": dist.get_world_size()}
    model = make_sharded(make, torch.device("cpu"), sizes) if parallel == "fsdp" else make()
    init_weights(model)
    optimizer = make_optimizer(model, config)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
        local_tensor(p.grad).normal_()
    return optimizer


def count_step(optimizer: MuonAdamW) -> dict[str, float]:
    """What a step costs this process."""
    optimizer.step()  # makes the momentum
    with FlopCounterMode(display=False) as counter, Held() as held:
        optimizer.step()
    return {
        "TFLOP": counter.get_total_flops() / 1e12,
        "MB received": held.received / 1e6,
        "MB held": held.most / 1e6,
    }


def count(config: Config, parallel: str, processes: int) -> dict[str, float]:
    """The same for the first of so many processes, on tensors without data.

    `balance` is the mean load of the processes over the largest one.
    """
    dist.init_process_group("fake", rank=0, world_size=processes)
    try:
        with torch.device("meta"):
            optimizer = build(config, parallel)
        cost = count_step(optimizer)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # which rows the first process has, for who is another one
    rounds = optimizer.rounds
    loads = [sum(m.flops for owners in rounds for m in owners[i]) for i in range(processes)]
    return {"rounds": len(rounds), "balance": sum(loads) / processes / max(loads), **cost}


# ----------------------------------------------------------------------------------- measuring


def measure(config: Config, parallel: str, processes: int) -> dict[str, float]:
    """CPU seconds and memory of the process that needs most, over a step of real processes."""
    with tempfile.TemporaryDirectory() as folder:
        words = (processes, config, parallel, folder)
        spawn(measure_one, words, nprocs=processes)
        found = [torch.load(path, weights_only=True) for path in Path(folder).glob("*.pt")]
    return {name: max(row[name] for row in found) for name in found[0]}


def measure_one(rank: int, processes: int, config: Config, parallel: str, folder: str) -> None:
    """What one process measures, into a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    optimizer = build(config, parallel)
    optimizer.step()  # makes the momentum, and the groups' connections
    dist.barrier()
    return_memory()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    start = time.process_time()
    optimizer.step()
    found = {"CPU seconds": time.process_time() - start, "MB more": memory("VmHWM") - before}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def memory(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(rf"^{field}:\s+(\d+) kB", status, re.M)[0]) / 1e3


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    o = parse_flags(Options, argv, "python -m benchmarks.muon [--FLAG VALUE ...]", __doc__)
    shape = ("d_model", "n_layer", "num_heads", "vocab_size")
    config = Config(**{name: getattr(o, name) for name in shape}).validate()
    known = not o.run or sys.platform == "linux"
    require(known, "--run", "memory is measured on Linux only", "leave it out, to count")
    heading = True
    for parallel in o.parallel or ["ddp", "fsdp"]:
        for processes in o.processes or [1, 2, 4, 8]:
            row = (measure if o.run else count)(config, parallel, processes)
            if heading:
                names = ["parallel", "processes", *row]
                print(f"| {' | '.join(names)} |\n|---|{'--:|' * (len(names) - 1)}", flush=True)
            heading = False
            cells = [f"{v:,.0f}" if v >= 100 or v == int(v) else f"{v:.3g}" for v in row.values()]
            print(f"| {parallel} | {processes} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    run_cli(main)
