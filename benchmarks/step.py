"""Where the time of a training step goes, part by part of the model.

    python -m benchmarks.step
    python -m benchmarks.step --variant "window_size=256 memory=false" --threads 1
    python -m benchmarks.step --table docs/benchmarks.md

Steps of the trainer on random tokens, data and optimizer included: the table of testv2.py
--profile, see tinymamba/profiling.py. Numbers are of the fastest of --steps, in ms.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import numpy as np
import torch

from benchmarks.report import around_markers, write_between
from testv2 import FOLDER_FIELDS, Config, Trainer
from tinymamba.cli import parse_flags, parse_words, run_cli
from tinymamba.profiling import WARMUP, Profile, profile_parts


@dataclass
class Options:
    """The command line."""

    # Model
    variant: str = ""  # FIELD=VALUE words that change the model
    d_model: int = 320  # width
    n_layer: int = 5  # blocks
    num_heads: int = 5  # attention heads
    vocab_size: int = 4096  # ids

    # Training
    batch_size: int = 8  # texts of a step
    block_size: int = 512  # tokens of a text
    optimizer: str = "muon"  # optimizer for weight matrices
    compile: bool = False  # compile blocks: each is then one part
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps

    # Runs
    steps: int = 5  # steps that count; two more come first
    threads: int = 0  # CPU threads; 0 means all
    table: str | None = None  # Markdown file to write the table into

    CHOICES: ClassVar = {"optimizer": Config.CHOICES["optimizer"]}
    LIMITS: ClassVar = dict.fromkeys(("steps", "batch_size", "block_size"), (1, math.inf))


def make_config(options: Options, folder: Path) -> Config:
    """The run's settings; all of its files lie in `folder`."""
    o, data = options, folder / "tokens.bin"
    words = parse_words(o.variant.split(), Config, FOLDER_FIELDS, "write FIELD=VALUE", "testv2.py")
    tokens = (o.steps + WARMUP) * o.batch_size * o.block_size + 1
    np.random.default_rng(0).integers(o.vocab_size, size=tokens, dtype=np.int32).tofile(data)
    shared = ("d_model", "n_layer", "num_heads", "vocab_size", "batch_size", "block_size")
    config = Config(
        **{name: getattr(o, name) for name in (*shared, "optimizer", "device")},
        use_compile=o.compile,
        bias=False,
        dropout=0.0,
        gradient_accumulation_steps=1,
        max_steps=o.steps + WARMUP,
        train_data_path=str(data),
        enable_validation=False,
        checkpoint_path=str(folder / "model.pt"),
        log_dir=str(folder),
    )
    return dataclasses.replace(config, **words)


def measure(options: Options) -> Profile:
    """Train on random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(make_config(options, Path(folder)))
        batches = trainer.train_batches(options.steps + WARMUP)
        try:
            profile, _ = profile_parts(trainer, batches, options.steps)
        finally:
            trainer.close()
    return profile


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse_flags(Options, argv, "python -m benchmarks.step [--FLAG VALUE ...]", __doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.table:
        around_markers(options.table, "step")  # before the steps, which take long
    lines = measure(options).table()
    print("\n".join(lines))
    if options.table:
        write_between(options.table, "step", lines)
    return 0


if __name__ == "__main__":
    run_cli(main)
