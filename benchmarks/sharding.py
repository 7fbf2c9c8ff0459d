"""Memory and traffic of each process, for models of 125M to 7B parameters: ddp, fsdp and hsdp.

    python -m benchmarks.sharding
    python -m benchmarks.sharding --processes 16 --shard_group 8 --table docs/distributed.md
    python -m benchmarks.sharding --measure 1 2 4

Computed, with parameters counted on models without memory. Memory is that of weights, gradients,
the optimizer's state, and of what is gathered for a while; activations come on top. Traffic is what
a process sends in a step, by rings, of weights and gradients. All is float32.

--measure starts processes that make a trainer, as testv2.py does, and gives the most host memory
that each had of its own until then.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch

from benchmarks.report import around_markers, write_between
from testv2 import Config, TinyMambaModel, Trainer
from tinymamba.cli import UserError, parse_flags, require, run_cli
from tinymamba.optimizer import make_optimizer

SHAPES = {  # width, blocks, heads
    "125M": (768, 9, 12),
    "350M": (1024, 18, 16),
    "1.3B": (2048, 18, 16),
    "2.7B": (2560, 24, 20),
    "7B": (4096, 25, 32),
}
BYTES = 4  # of a number in float32


@dataclass
class Options:
    """The command line."""

    processes: int = 16  # processes of the run
    shard_group: int = 8  # of these, processes that share one model with hsdp
    accumulation: int = 4  # micro-batches of a step
    optimizer: str = "muon"  # optimizer for weight matrices
    table: str | None = None  # Markdown file to write the table into
    measure: list[int] | None = None  # numbers of processes to start, on a model of 96M parameters
    parallel: str = "fsdp"  # with --measure, how they share the model

    CHOICES: ClassVar = {name: Config.CHOICES[name] for name in ("optimizer", "parallel")}
    LIMITS: ClassVar = dict.fromkeys(("processes", "shard_group", "accumulation"), (1, math.inf))


# ------------------------------------------------------------------------------------ computed


class Sizes(NamedTuple):
    """Numbers of a model and of its optimizer's state."""

    total: int  # parameters
    block: int  # of the largest block
    root: int  # outside of the blocks
    state: int  # what the optimizer keeps


def count(config: Config) -> Sizes:
    """The sizes of a model, which is made without memory."""
    with torch.device("meta"):
        model = TinyMambaModel(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    total = sum(p.numel() for p in model.parameters())
    groups = make_optimizer(model, config).param_groups
    each = [1, *([2] * len(groups[1:]))] if config.optimizer == "muon" else [2] * len(groups)
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    state = sum(n * numbers for n, numbers in zip(each, counts, strict=True))
    return Sizes(total, max(blocks), total - sum(blocks), state)


class Cost(NamedTuple):
    """Bytes of one process."""

    memory: float
    traffic: float  # sent in a step


def cost_of(sizes: Sizes, shards: int, copies: int, accumulation: int = 1) -> Cost:
    """With the model sharded over `shards` processes, `copies` times; one shard is DDP.

    DDP keeps the gradients twice: a second time in the buffers that it sends. FSDP gathers two
    blocks at a time, of which one has gradients, and what is outside of the blocks for longer.
    A ring sends (n - 1) / n of what is gathered or scattered, and twice that to reduce all.
    """
    s, once = sizes, (shards - 1) / shards
    reduced = 2 * (copies - 1) / copies * s.total / shards
    if shards == 1:
        doubled = s.total if copies > 1 else 0
        return Cost(BYTES * (2 * s.total + s.state + doubled), BYTES * reduced)
    kept = (2 * s.total + s.state) / shards + 3 * s.block + 2 * s.root
    gathered = 2 * (s.total - s.root) + s.root  # the root stays until the backward pass
    return Cost(BYTES * kept, BYTES * (accumulation * once * (gathered + s.total) + reduced))


def make_table(options: Options) -> list[str]:
    """Markdown: a row for each size, memory and traffic of each way."""
    o, world = options, options.processes
    ways = {
        "one process": (1, 1),
        "ddp": (1, world),
        "fsdp": (world, 1),
        f"hsdp, {o.shard_group}": (o.shard_group, world // o.shard_group),
    }
    head = ["model", *(f"{name}: memory" for name in ways), *(f"{w}: sent" for w in [*ways][1:])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, (width, blocks, heads) in SHAPES.items():
        shape: dict[str, Any] = {"d_model": width, "n_layer": blocks, "num_heads": heads}
        sizes = count(Config(**shape, optimizer=o.optimizer))
        costs = [cost_of(sizes, *way, o.accumulation) for way in ways.values()]
        cells = [f"{name} ({sizes.total / 1e9:.2f}B)", *(f"{c.memory / 1e9:.1f}" for c in costs)]
        lines.append(
            "| " + " | ".join([*cells, *(f"{c.traffic / 1e9:.1f}" for c in costs[1:])]) + " |"
        )
    return lines


# ------------------------------------------------------------------------------------ measured


def make_trainer(folder: str, **shape: Any) -> Trainer:
    """A trainer of a new model on random tokens, all of whose files lie in `folder`."""
    data = Path(folder) / "tokens.bin"
    data.write_bytes(bytes(1 << 20))
    paths: dict[str, Any] = {"checkpoint_path": f"{folder}/model.pt", "log_dir": folder}
    runs: dict[str, Any] = {"max_steps": 1, "enable_validation": False, "use_compile": False}
    return Trainer(Config(train_data_path=str(data), **shape, **runs, **paths))


def weigh(parallel: str) -> str:
    """Make a trainer in this process, which a launcher has started: how much memory that takes.

    A small one comes first, for all that is imported.
    """
    from resource import RUSAGE_SELF, getrusage

    unit = 1 if sys.platform == "darwin" else 1024
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(folder, d_model=64, n_layer=1, num_heads=1, parallel=parallel).close()
        before = getrusage(RUSAGE_SELF).ru_maxrss
        trainer = make_trainer(folder, n_layer=6, parallel=parallel)
        most = getrusage(RUSAGE_SELF).ru_maxrss
        count = trainer.model.count_parameters()["total"]
        trainer.close()
    return (
        f"{count / 1e6:.0f}M parameters, {parallel}, process {trainer.rank} of {trainer.world}: "
        f"{(most - before) * unit / 1e6:.0f} MB, and {before * unit / 1e6:.0f} MB before"
    )


def measure(count: int, parallel: str) -> None:
    """Start that many processes; each prints its line."""
    root = str(Path(__file__).resolve().parent.parent)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    words = ["-m", "benchmarks.sharding", "--measure", str(count), "--parallel", parallel]
    done = subprocess.run(
        [sys.executable, *launcher, *words],
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": root},
        check=False,
    )
    if done.returncode:
        raise UserError("--measure", f"{count} processes failed", "see their messages")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python -m benchmarks.sharding [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    o = options
    if o.measure and "RANK" in os.environ:
        print(weigh(o.parallel), flush=True)
        return 0
    for processes in o.measure or []:
        measure(processes, o.parallel)
    if o.measure:
        return 0
    problem, remedy = f"{o.shard_group} does not divide {o.processes} processes", "use a divisor"
    require(o.processes % o.shard_group == 0, "--shard_group", problem, remedy)
    if o.table:
        around_markers(o.table, "sharding")
    lines = make_table(o)
    print("\n".join(lines))
    if o.table:
        write_between(o.table, "sharding", lines)
    return 0


if __name__ == "__main__":
    run_cli(main)
