"""Fine-tuning: adapters against training every weight, on three small tasks.

    python testv2.py --preset demo
    python -m benchmarks.finetune --text wiki.test.raw wiki.valid.raw
    python -m benchmarks.finetune --text ... --tasks lookup --methods lora --lr 2e-3 8e-3

style: English prose (the first file of --text) for a model of source code; reported is the loss on
the second file in nats per token. lookup: 64 made-up words, each with a made-up value, to be
memorized. format: `name=anna age=31` is to become JSON, with names and numbers that are not in the
training data. For lookup and format, `right` is the share of answers that match exactly.

Every run is its own process and starts from the same base with the same batches. `memory_mb` is its
peak memory beyond that of the loaded model, `trained` the share of weights that change. Each run
appends a row to --output.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
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

from benchmark import append_row, peak_bytes
from peft import METHODS, AdapterConfig, FineTuner, get_trainable_parameters, settings
from peft import Options as PeftOptions
from testv2 import generate, load_model
from tinymamba.cli import parse_flags, require, run_cli
from tinymamba.tokenizer import open_tokenizer

QUESTIONS = 64  # of lookup and format
CPU = torch.device("cpu")
TASKS = ("style", "lookup", "format")
VARIANTS = {"dora": AdapterConfig(use_dora=True)} | {m: AdapterConfig(method=m) for m in METHODS}


@dataclass
class Options:
    """The command line."""

    # Base model
    checkpoint: str = "tinymamba_model_latest.pt"  # a checkpoint, or a quantized folder
    tokenizer: str = "data/text/train.bin"  # an old checkpoint's tokenizer is beside this file

    # Runs
    tasks: list[str] | None = None  # None means all of these
    text: list[str] | None = None  # for style: two files, to train on and to test on
    methods: list[str] | None = None  # None means all of these
    lr: list[float] | None = None  # peak learning rates; None means each method's own
    steps: int = 300  # updates, of 8 x 128 tokens
    threads: int = 0  # CPU threads; 0 means all
    output: str = "finetune.jsonl"  # file of rows

    CHOICES: ClassVar = {"tasks": TASKS, "methods": tuple(VARIANTS)}


# ------------------------------------------------------------------------------------ tasks


def word(draw: random.Random) -> str:
    """A made-up word of three syllables."""
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))


def questions(task: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of a question, and its answer up to the new line."""
    draw, pairs = random.Random(seed), []
    for _ in range(count):
        name, number = word(draw), draw.randrange(10, 100)
        if task == "lookup":
            pairs.append((f"{name} ->", f" {word(draw)}\n"))
        else:
            answer = f' {{"name": "{name}", "age": {number}}}\n'
            pairs.append((f"name={name} age={number} =>", answer))
    return pairs


def make_data(
    task: str, text: list[str] | None, tokenizer: Any, folder: Path
) -> list[tuple[str, str]]:
    """Write train.bin and val.bin of the task; the questions to ask after training."""
    if task == "style":
        texts = [Path(path).read_text(encoding="utf-8")[: 2**21] for path in text or ()]
        texts[1] = texts[1][: 2**17]
        asked = []
    else:
        asked = questions(task, QUESTIONS, seed=0)
        draw, known, lines = random.Random(1), asked, []
        for epoch in range(40):
            known = questions(task, QUESTIONS, seed=2 + epoch) if task == "format" else known
            lines += draw.sample(known, len(known))
        texts = ["".join(q + a for q, a in lines), "".join(q + a for q, a in asked)]
    for name, part in zip(("train", "val"), texts, strict=True):
        np.asarray(tokenizer.encode(part), dtype=np.int32).tofile(folder / f"{name}.bin")
    return asked


@torch.no_grad()
def share_right(model: Any, tokenizer: Any, asked: list[tuple[str, str]]) -> float:
    """The share of greedy answers that match exactly."""
    right = 0
    for question, answer in asked:
        ids = torch.tensor([tokenizer.encode("\n" + question)])
        out = generate(model, ids, len(tokenizer.encode(answer)) + 2, 0.0)
        text = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        right += text.partition("\n")[0] == answer.rstrip("\n")
    return right / len(asked)


# ------------------------------------------------------------------------------------ runs


def make_tuner(
    variant: str, lr: float | None, options: Options, tokenizer: Any, folder: Path
) -> FineTuner:
    """The run of one method on the data in `folder`."""
    adapter, base = VARIANTS[variant], load_model(options.checkpoint)
    fields = {
        "train_data_path": str(folder / "train.bin"),
        "val_data_path": str(folder / "val.bin"),
        "max_steps": options.steps,
        "batch_size": 8,
        "block_size": 128,
        "validation_interval": options.steps,
        "validation_steps": 0,
        "checkpoint_interval": 0,
        "generate_samples": False,
        "device": "cpu",
        **({"lr": lr} if lr else {}),
    }
    config = settings(PeftOptions(output_dir=str(folder / "out")), adapter.method, fields, base)
    return FineTuner(config, base, adapter, tokenizer)


def run(task: str, variant: str, lr: float | None, options: Options) -> dict:
    """Train and evaluate once; returns the row."""
    if options.threads:
        torch.set_num_threads(options.threads)
    beside = [options.checkpoint, options.tokenizer]
    tokenizer = open_tokenizer(None, load_model(options.checkpoint), beside)
    require(tokenizer, "--tokenizer", "none was found", "pass a file that has one beside it")
    with tempfile.TemporaryDirectory() as name:
        asked = make_data(task, options.text, tokenizer, Path(name))
        tuner = make_tuner(variant, lr, options, tokenizer, Path(name))
        before, start = peak_bytes(CPU, reset=True), time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            tuner.run()
        seconds, after = time.perf_counter() - start, peak_bytes(CPU)
        model = tuner.model.eval()
        trained = sum(p.numel() for p in get_trainable_parameters(model))
        row = {
            "task": task,
            "method": variant,
            "lr": tuner.config.lr,
            "steps": options.steps,
            "trained": round(trained / tuner.base.count_parameters()["total"], 4),
            "seconds": round(seconds, 1),
            "memory_mb": round((after - before) / 2**20),
            "loss": round(tuner.progress["history"]["val"][-1][1], 4),
        }
        return {**row, "right": share_right(model, tokenizer, asked)} if asked else row


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python -m benchmarks.finetune [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    tasks, text = options.tasks or list(TASKS), options.text or []
    remedy = "pass two, or --tasks lookup format"
    require(len(text) == 2 or "style" not in tasks, "--text", "style needs two files", remedy)
    for path in [options.checkpoint, *text]:
        require(os.path.exists(path), path, "no such file", "check the path")
    spawn = multiprocessing.get_context("spawn")
    rates: list[float | None] = [*options.lr] if options.lr else [None]
    for task in tasks:
        for variant in options.methods or list(VARIANTS):
            for lr in rates:
                with spawn.Pool(1) as pool:
                    append_row(options.output, pool.apply(run, (task, variant, lr, options)))
    return 0


if __name__ == "__main__":
    run_cli(main)
