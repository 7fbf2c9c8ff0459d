"""Whether a state carried from step to step (--carry_state) lowers the loss far into a text.

    python data/prepare.py --tokenizer byte --output_dir data/bytes
    python -m benchmarks.carry code --data data/bytes     # Python files, by byte
    python -m benchmarks.carry facts                      # facts stated once, asked for once later
    python -m benchmarks.carry --table docs/training.md

Three ways to train one model once on the same text, each step on --long tokens: blocks of --block
without carrying, the same with it, and blocks of --long. Every model then reads validation texts of
16,384 tokens with `advance`, so that its state is carried whatever the training did. Bits are those
of each byte of code, or of each answer to a question, by how much of its text was read before.

facts: a text of filler, facts (a sign, a key, a value) and questions (another sign, the key,
its value). A fact is asked for once, 8 to 2,048 tokens later, the logarithm of which is uniform. A
key is then free for another fact. A value that is guessed costs 4 bits.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
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
import torch.nn.functional as F
from torch import Tensor

from benchmark import append_row
from benchmarks.report import finite, read_rows, require_task, write_between
from testv2 import Config, TokenFile, Trainer
from tinymamba.cli import CliParser, add_flags, make_options, require, run_cli

TASKS = ("code", "facts")
WAYS = ("blocks", "carried", "long")
EDGES = (0, 512, 4096, 16_384)  # the ranges of positions
LENGTH, PIECE = EDGES[-1], 512  # tokens of a text to validate on, and of those read at once
BYTES = 257  # ids of code: bytes and the end of a file
KEYS, VALUES = 32, 16
FILLER, FACT, ASK, FIRST_KEY, FIRST_VALUE = 0, 1, 2, 3, 3 + KEYS  # ids of facts
NEAREST, FARTHEST = 8, 2048  # tokens from a fact to its question


@dataclass
class Options:
    """The command line."""

    # Data
    data: str = "data/bytes"  # code: folder with train.bin and val.bin, of bytes

    # Runs
    ways: list[str] | None = None  # blocks, carried, long; None means all of them
    tokens: int = 2_000_000  # to train on
    block: int = 512  # tokens of a block
    long: int = 4096  # tokens of a long block, and of a step
    d_model: int = 64  # width
    n_layer: int = 2  # blocks of the model
    lr: float = 8e-3  # peak learning rate
    seeds: list[int] | None = None  # random seeds; None means 0 1
    texts: int = 16  # texts to validate on, at most
    threads: int = 0  # CPU threads; 0 means all

    # Rows
    output: str = "carry.jsonl"  # file of rows
    table: str | None = None  # Markdown file to write all rows of --output into

    CHOICES: ClassVar = {"ways": WAYS}
    LIMITS: ClassVar = {
        **dict.fromkeys(("tokens", "block", "long", "n_layer", "texts"), (1, math.inf)),
        "d_model": (32, math.inf),
    }


# ------------------------------------------------------------------------------------ texts


def write_facts(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A text of facts, and how many tokens ago the fact of each answer stood: 0 elsewhere."""
    random = np.random.default_rng(seed)
    ids: list[int] = []
    ages: list[int] = []
    free, due = list(range(KEYS)), []  # type: list[int], list[tuple[int, int, int, int]]
    while len(ids) < length:
        if due and due[0][0] <= len(ids):
            _, stated, key, value = heapq.heappop(due)
            ids += [ASK, FIRST_KEY + key, FIRST_VALUE + value]
            ages += [0, 0, len(ids) - 1 - stated]
            free.append(key)
        elif free and random.random() < 0.5:
            key, value = free.pop(random.integers(len(free))), int(random.integers(VALUES))
            ids += [FACT, FIRST_KEY + key, FIRST_VALUE + value]
            ages += [0, 0, 0]
            wait = NEAREST * (FARTHEST / NEAREST) ** random.random()
            heapq.heappush(due, (len(ids) - 1 + int(wait), len(ids) - 1, key, value))
        else:
            ids.append(FILLER)
            ages.append(0)
    return np.array(ids[:length], np.int32), np.array(ages[:length])


def texts_of_facts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Texts (b, l+1), and how long ago the fact of each answer stood."""
    pairs = [write_facts(LENGTH + 1, 1000 * (seed + 1) + i) for i in range(count)]
    ids, ages = (
        torch.from_numpy(np.stack(part).astype(np.int64)) for part in zip(*pairs, strict=True)
    )
    return ids, ages


def texts_of_code(file: TokenFile, most: int) -> Tensor:
    """Pieces (b, l+1) of files that are long enough: the next file has nothing to do with one."""
    ids = file.read(0, file.length).astype(np.int64)
    ends = [-1, *np.flatnonzero(ids == BYTES - 1).tolist(), len(ids)]
    starts = [
        start
        for begin, end in itertools.pairwise(ends)
        for start in range(begin + 1, end - LENGTH, LENGTH)
    ]
    require(starts, file.path, f"has no file of {LENGTH:,} bytes", "prepare more text")
    return torch.from_numpy(np.stack([ids[s : s + LENGTH + 1] for s in starts[:most]]))


# ------------------------------------------------------------------------------------ runs


def config_of(o: Options, task: str, way: str, seed: int, folder: Path, source: Path) -> Config:
    """The settings of one training."""
    size = o.long if way == "long" else o.block
    heads = math.ceil(o.d_model / 64)
    return Config(
        d_model=o.d_model,
        n_layer=o.n_layer,
        num_heads=heads,
        ssm_head_dim=o.d_model // heads,
        vocab_size=BYTES if task == "code" else FIRST_VALUE + VALUES,
        dropout=0.0,
        bias=False,
        block_size=size,
        batch_size=max(1, o.long // size),
        gradient_accumulation_steps=1,
        carry_state=way == "carried",
        lr=o.lr,
        seed=seed,
        use_compile=False,
        amp_dtype=torch.float32,
        train_data_path=str(source),
        enable_validation=False,
        generate_samples=False,
        checkpoint_path=str(folder / "model.pt"),
        checkpoint_interval=0,
        log_interval=25,
        log_dir=str(folder),
    )


@torch.no_grad()
def read_texts(model: Any, texts: Tensor) -> Tensor:
    """The loss in bits of each token of texts (b, l+1) after the first: (b, l)."""
    model.eval()
    state, losses = model.init_state(len(texts)), []
    for at in range(0, texts.shape[1] - 1, PIECE):
        piece = texts[:, at : at + PIECE + 1]
        logits, state = model.advance(piece[:, :-1], state)
        losses.append(F.cross_entropy(logits.mT, piece[:, 1:], reduction="none"))
    return torch.cat(losses, dim=1) / math.log(2)


def by_range(bits: Tensor, counts: Tensor) -> list[float | None]:
    """The mean of bits (b, l) over the tokens that count, of bool (b, l), in each of EDGES."""
    spans = [slice(a, b) for a, b in itertools.pairwise(EDGES)]
    return [finite(bits[:, s][counts[:, s]].mean().item(), 4) for s in spans]


def run(o: Options, task: str, way: str, seed: int) -> dict:
    """Train and validate once: a row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, count = folder / "tokens.bin", o.tokens // o.long * o.long + 1
        if task == "facts":
            ids = write_facts(count, seed)[0]
        else:
            ids = TokenFile(Path(o.data) / "train.bin").read(0, count).astype(np.int32)
        ids.tofile(source)
        trainer = Trainer(config_of(o, task, way, seed, folder, source))
        started = time.perf_counter()
        if code := trainer.run():  # a signal
            sys.exit(code)
        seconds = time.perf_counter() - started
    if task == "facts":
        texts, ages = texts_of_facts(o.texts, seed)
    else:
        texts = texts_of_code(TokenFile(Path(o.data) / "val.bin"), o.texts)
        ages = torch.ones_like(texts)
    bits, ages = read_texts(trainer.model, texts), ages[:, 1:]
    row = {"task": task, "way": way, "seed": seed, "tokens": o.tokens, "d_model": o.d_model}
    row |= {"n_layer": o.n_layer, "lr": o.lr, "block": o.block, "long": o.long}
    row["bits"] = by_range(bits, ages > 0)
    if task == "facts":  # of all answers, those whose fact stood in a block before
        row["bits_near"] = finite(bits[(ages > 0) & (ages <= o.block)].mean().item(), 4)
        row["bits_far"] = finite(bits[ages > o.block].mean().item(), 4)
    return {**row, "texts": len(texts), "seconds": round(seconds)}


def table(rows: list[dict]) -> list[str]:
    """The lines of a Markdown table: means over the seeds, and the smallest and largest value."""
    heads = [
        "text",
        "tokens",
        "training",
        "seeds",
        *(f"{a:,} to {b:,}" for a, b in itertools.pairwise(EDGES)),
        "far answers",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|--:|---|" + "--:|" * len(heads[3:])]
    sizes = sorted({row["tokens"] for row in rows})
    for task, tokens, way in itertools.product(TASKS, sizes, WAYS):
        kind = (task, tokens, way)
        runs = {r["seed"]: r for r in rows if (r["task"], r["tokens"], r["way"]) == kind}
        if not runs:
            continue
        columns = [*zip(*(row["bits"] for row in runs.values()), strict=True)]
        columns.append(tuple(row.get("bits_far") for row in runs.values()))
        size = next(iter(runs.values()))["long" if way == "long" else "block"]
        training = f"blocks of {size:,}" + (", carried" if way == "carried" else "")
        cells = [task, f"{tokens:,}", training, str(len(runs)), *map(show, columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def show(values: Any) -> str:
    """The mean and the range of the bits of several seeds."""
    if None in values:
        return ""
    mean, low, high = (f"{f(values):.3f}" for f in (statistics.mean, min, max))
    return f"{mean} ({low} to {high})"


# ------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python -m benchmarks.carry [code|facts] [--FLAG VALUE ...]"
    parser = CliParser(usage=usage, description=__doc__)
    parser.add_argument("task", nargs="?", default="", help="code or facts; none for --table")
    add_flags(parser, Options)
    args = parser.parse_args(argv)
    o = make_options(Options, args)
    require_task(args.task, TASKS, o.table, "carry")
    if o.threads:
        torch.set_num_threads(o.threads)
    for seed, way in itertools.product(o.seeds or [0, 1], o.ways or WAYS) if args.task else ():
        append_row(o.output, run(o, args.task, way, seed))
    if o.table:
        write_between(o.table, "carry", table(read_rows(o.output)))
    return 0


if __name__ == "__main__":
    run_cli(main)
