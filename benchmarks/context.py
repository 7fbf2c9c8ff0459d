"""One training step on one long text: by one process, and in pieces by several.

    python -m benchmarks.context
    python -m benchmarks.context --tokens 65536 --processes 1 2 4

The text is of random tokens, and the processes are those of `testv2.py --context_parallel`, on this
machine. The peak of memory is that of the process that needs most, from its start to the end of the
step. The first one counts what it sends, in both passes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import numpy as np
import torch

from testv2 import FOLDER_FIELDS, Config, Trainer
from tinymamba.cli import need, parse_flags, parse_words, require, run_cli

# One process needs about 4 kB for each token.
TINY = {
    "d_model": 8, "n_layer": 2, "vocab_size": 256, "num_heads": 1, "ssm_head_dim": 8,
    "expand_factor": 1, "d_state": 8, "window_size": 16, "chunk_size": 16, "memory_products": 1,
}  # fmt: skip


@dataclass
class Options:
    """The command line."""

    tokens: int = 1_048_576  # tokens of the text
    processes: list[int] | None = None  # how many read it, run by run; None: 1 and 2
    variant: str = ""  # FIELD=VALUE words that change the model, which is tiny
    checkpoint_activations: bool = True  # recompute blocks in the backward pass

    LIMITS: ClassVar = {"tokens": (64, 2**31)}


def settings(options: Options, folder: Path, count: int) -> dict[str, Any]:
    """The fields of Config for a step of so many processes; its files lie in `folder`."""
    o, data = options, folder / "text.bin"
    words = parse_words(o.variant.split(), Config, FOLDER_FIELDS, "write FIELD=VALUE", "testv2.py")
    ids = np.random.default_rng(0).integers(TINY["vocab_size"], size=o.tokens + 1, dtype=np.int32)
    ids.tofile(data)
    given = {
        **TINY, "block_size": o.tokens, "batch_size": 1, "gradient_accumulation_steps": 1,
        "dropout": 0.0, "state_noise": 0.0, "max_steps": 1, "use_compile": False, "device": "cpu",
        "checkpoint_activations": o.checkpoint_activations, "context_parallel": count,
        "enable_validation": False, "train_data_path": str(data),
        "checkpoint_path": str(folder / "model.pt"), "log_dir": str(folder), **words,
    }  # fmt: skip
    Config(**given).validate()
    return given


def train(rank: int, count: int, port: int, given: dict[str, Any], folder: Path) -> None:
    """One process: what it takes to train for one step."""
    import resource  # which Windows lacks

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    trainer = Trainer(Config(amp_dtype=torch.float32, **given))
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of a unit of ru_maxrss
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    begin = time.perf_counter()
    loss, norm = trainer.train_step(trainer.train_batches(1))
    row = {"seconds": time.perf_counter() - begin, "loss": loss, "norm": norm, "before": held}
    row["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    row["sent"] = trainer.before.sent if trainer.before else 0
    trainer.close()
    (folder / f"{rank}.json").write_text(json.dumps(row))


def measure(options: Options, folder: Path, count: int) -> dict[str, Any]:
    """A step of so many processes: what the first one found, and the largest of all peaks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = (count, port, settings(options, folder, count), folder)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=train, args=(rank, *shared)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ended = all(process.exitcode == 0 for process in processes)
    require(ended, "processes", f"a step of {count} failed", "see its message")
    rows = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    return {**rows[0], "peak": max(row["peak"] for row in rows)}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python -m benchmarks.context [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    need("resource")
    print("| processes | seconds | peak GiB | of it before | MB sent | loss | gradient norm |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="tinymamba-") as folder:
        for count in options.processes or [1, 2]:
            row = measure(options, Path(folder), count)
            memory = f"{row['peak'] / 2**30:.2f} | {row['before'] / 2**30:.2f}"
            rest = f"{row['sent'] / 1e6:.3f} | {row['loss']:.6f} | {row['norm']:.6f}"
            print(f"| {count} | {row['seconds']:.1f} | {memory} | {rest} |", flush=True)
    return 0


if __name__ == "__main__":
    run_cli(main)
