"""How the loss falls with tokens, with time and with size, against peers on bytes of Python code.

    P=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    python data/prepare.py --input $P/torch $P/transformers $P/sympy $P/numpy $P/networkx \
        --tokenizer byte --output_dir data/python
    python -m benchmarks.ladder --d_model 80 --tokens 1 2 5 10 20     # of 0.45M parameters
    python -m benchmarks.ladder --d_model 40 80 128 --tokens 20       # sizes
    python -m benchmarks.ladder --d_model 64 128 256 --models tinymamba --steps 100 --lr 4e-3 8e-3
    python -m benchmarks.ladder --table docs/benchmarks.md --plot docs/ladder.png

Every run has a schedule of its own, with a warm-up of at most a tenth, and sees each block of 512
bytes at most once. TinyMamba has four blocks and a window of 256 bytes, Llama six layers and Mamba2
eight; all have the same number of parameters. peers.py has the models. Muon for matrices, AdamW for
the rest.

Each run appends a row to --output. `bits_per_byte` is on 128 KiB of other files, in blocks of 512;
`bits_per_byte_read` on the same, read as 16 long texts: see quality.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import numpy as np
import torch
from torch import Tensor

from benchmark import append_row
from benchmarks.peers import (
    MODELS,
    build_peer,
    build_tinymamba,
    count,
    peer_shape,
    require_variant_of_ours,
)
from benchmarks.quality import train, validate
from benchmarks.report import Column, best_rate, finite, read_rows, write_between
from testv2 import Config, TokenFile
from tinymamba.cli import CliParser, add_flags, make_options, need, require, run_cli

VOCAB = 257  # bytes and the end of a file
BLOCK, BATCH = 512, 8  # bytes of a block, blocks of a step
TEXTS, LENGTH = 16, 2**13  # texts to validate on, and bytes of each
WINDOW = 256  # bytes that TinyMamba's attention sees: about the text of its usual 64 tokens
N_LAYER = 4  # blocks of TinyMamba
LOSS = Column("bits per byte", lambda row: row["bits_per_byte"], larger=False)


@dataclass
class Options:
    """The command line."""

    # Data
    data: str = "data/python"  # folder with train.bin and val.bin, of bytes

    # Runs
    models: list[str] | None = None  # None means tinymamba llama_start; with --variant, tinymamba
    variant: str = ""  # FIELD=VALUE words that change TinyMamba's Config
    d_model: list[int] | None = None  # widths; None means 80
    tokens: list[float] | None = None  # training bytes per parameter; None means 1 2 5 10 20
    steps: int = 0  # updates, whatever the number of parameters; 0 means as --tokens says
    lr: list[float] | None = None  # peak learning rates; None means 8e-3 1.6e-2
    seeds: list[int] | None = None  # random seeds; None means 0
    threads: int = 0  # CPU threads; 0 means all

    # Rows
    output: str = "ladder.jsonl"  # file of rows
    table: str | None = None  # Markdown file to write all rows of --output into
    plot: str | None = None  # picture to draw all rows of --output into

    CHOICES: ClassVar = {"models": MODELS}
    LIMITS: ClassVar = {
        "d_model": (32, math.inf),
        "tokens": (1e-3, math.inf),
        "steps": (0, math.inf),
    }


# ------------------------------------------------------------------------------------ runs


def build(name: str, width: int, variant: str = "") -> torch.nn.Module:
    """A model with random weights; the peers have as many parameters as TinyMamba."""
    heads = math.ceil(width / 64)
    head = width // heads
    shape: dict[str, Any] = {"d_model": width, "num_heads": heads, "ssm_head_dim": head}
    rest: dict[str, Any] = {"vocab_size": VOCAB, "window_size": WINDOW, "dropout": 0.0}
    ours = Config(n_layer=N_LAYER, bias=False, **shape, **rest).validate()
    if name == "tinymamba":
        return build_tinymamba(ours, variant)
    return build_peer(name, peer_shape(name, ours))


def batches(file: TokenFile, steps: int, seed: int) -> Any:
    """Blocks (b, l+1) in random order, none twice."""
    blocks = (file.length - 1) // BLOCK
    problem = f"has {blocks:,} blocks of {BLOCK} bytes; {steps * BATCH:,} are needed"
    require(steps * BATCH <= blocks, file.path, problem, "prepare more text, or lower --tokens")
    order = np.random.default_rng(1000 + seed).permutation(blocks)[: steps * BATCH]
    for chosen in order.reshape(steps, BATCH).tolist():
        rows = [file.read(i * BLOCK, (i + 1) * BLOCK + 1) for i in chosen]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def validation_text(file: TokenFile) -> Tensor:
    """TEXTS pieces of LENGTH bytes, evenly spaced, one after the other, and one more byte."""
    last = file.length - LENGTH - 1
    require(last >= 0, file.path, f"has {file.length:,} bytes", f"it needs more than {LENGTH:,}")
    begins = [last * i // (TEXTS - 1) for i in range(TEXTS)]
    pieces = [file.read(begin, begin + LENGTH) for begin in begins]
    pieces.append(file.read(file.length - 1, file.length))
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64))


def run(files: tuple[TokenFile, Tensor], row: dict[str, Any]) -> dict[str, Any]:
    """Train and validate the model that the row names; returns the whole row."""
    torch.manual_seed(row["seed"])
    model = build(row["model"], row["d_model"], row["variant"])
    parameters = count(model)
    steps = row["steps"] or max(1, round(row["tokens"] * parameters / BLOCK / BATCH))
    print({**row, "parameters": parameters, "steps": steps}, flush=True)
    windows, warmup = batches(files[0], steps, row["seed"]), max(1, min(100, steps // 10))
    config = Config(lr=row["lr"], optimizer="muon", weight_decay=0.0)
    start = time.perf_counter()
    train(model, windows, config, steps, warmup)
    seconds = time.perf_counter() - start
    found = {"parameters": parameters, "steps": steps, "seconds": round(seconds, 1)}
    for kind, nats in validate(model, files[1], BLOCK).items():
        found[f"bits_per_byte{kind}"] = finite(nats / math.log(2), 5)
    return row | found


# ------------------------------------------------------------------------------------ table, plot


class Budget(NamedTuple):
    """What runs have in common that are compared with each other."""

    width: int
    tokens: float  # per parameter; 0 if the number of steps was given
    steps: int  # 0 if the number of tokens was given

    def __str__(self) -> str:
        return f"{self.tokens:g} per parameter" if self.tokens else f"{self.steps} steps"


class Result(NamedTuple):
    """A model at its best rate: means over its seeds."""

    rate: float
    bracketed: bool  # a worse rate was tried on both sides
    seeds: int
    bits: float  # per byte
    bits_read: float  # per byte, read as long texts
    seconds: float
    parameters: float


MEANS = ("bits_per_byte", "bits_per_byte_read", "seconds", "parameters")


def order(name: str) -> int:
    """The place of a model, and of its variants, among all."""
    return MODELS.index(name.split()[0])


def results_of(rows: list[dict]) -> dict[Budget, dict[str, Result]]:
    """Every model of every budget at its best rate."""
    runs: dict[Budget, dict[str, dict[float, dict[int, dict]]]] = {}
    for row in rows:
        tokens = row["tokens"] or 0
        budget = Budget(row["d_model"], tokens, 0 if tokens else row["steps"])
        name = f"{row['model']} {row['variant']}".strip()
        rates = runs.setdefault(budget, {}).setdefault(name, {})
        rates.setdefault(row["lr"], {})[row["seed"]] = row
    found: dict[Budget, dict[str, Result]] = {}
    for budget in sorted(runs, key=lambda b: (b.steps > 0, b)):
        for name in sorted(runs[budget], key=order):
            rate, bracketed = best_rate(runs[budget][name], LOSS)
            best = list(runs[budget][name][rate].values())
            means = (statistics.mean(row[key] for row in best) for key in MEANS)
            found.setdefault(budget, {})[name] = Result(rate, bracketed, len(best), *means)
    return found


def curve_of(
    results: dict[Budget, dict[str, Result]], width: int, name: str
) -> dict[float, Result]:
    """The results of a model of one width by tokens per parameter."""
    budgets = (b for b in sorted(results) if b.width == width and b.tokens)
    return {b.tokens: results[b][name] for b in budgets if name in results[b]}


def tokens_to_reach(curve: dict[float, Result], bits: float) -> float | None:
    """The tokens per parameter at which a curve reaches a loss; None where it was not measured."""
    for (t0, before), (t1, after) in itertools.pairwise(sorted(curve.items())):
        if after.bits <= bits <= before.bits:
            share = (before.bits - bits) / (before.bits - after.bits)
            return t0 * (t1 / t0) ** share
    return None


def table(rows: list[dict]) -> list[str]:
    """The lines of a Markdown table."""
    results = results_of(rows)
    heads = ["d_model", "bytes", "model", "rate", "seeds", "bits per byte", "as long texts"]
    heads += ["to TinyMamba's", "bytes to TinyMamba's", "seconds"]
    lines = [f"| {' | '.join(heads)} |", "|--:|---|---|" + "--:|" * 7]
    for budget, models in results.items():
        ours = models.get("tinymamba")
        for name, result in models.items():
            ratio = more = ""
            if ours and name != "tinymamba":
                ratio = f"{result.bits / ours.bits:.3f}"
                reached = tokens_to_reach(curve_of(results, budget.width, name), ours.bits)
                more = f"{reached / budget.tokens:.2f} times" if reached and budget.tokens else ""
            rate = f"{result.rate:g}" + ("" if result.bracketed else " (edge)")
            cells = [str(budget.width), str(budget), name, rate, str(result.seeds)]
            cells += [f"{result.bits:.3f}", f"{result.bits_read:.3f}", ratio, more]
            lines.append(f"| {' | '.join(cells)} | {result.seconds:.0f} |")
    return lines


def plot(rows: list[dict], path: str) -> None:
    """Draw the loss against tokens and against seconds."""
    rows = [row for row in rows if row["tokens"]]
    require(rows, path, "there is no row to draw", "add one with --tokens")
    results = results_of(rows)
    names = sorted({name for models in results.values() for name in models}, key=order)
    figure = need("matplotlib.figure").Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, name in enumerate(names):
        for width in sorted({budget.width for budget in results}):
            curve = curve_of(results, width, name)
            x = {left: [t * r.parameters for t, r in curve.items()]}
            x[right] = [r.seconds for r in curve.values()]
            for axes in (left, right):
                style = {"marker": "o", "ms": 4, "color": f"C{number}"}
                axes.plot(x[axes], [r.bits for r in curve.values()], label=name, **style)
    for axes, label in ((left, "training bytes"), (right, "seconds of training, one thread")):
        axes.set(xscale="log", xlabel=label)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("validation loss, bits per byte")
    handles = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=130)


# ------------------------------------------------------------------------------------ main


def parse(argv: list[str] | None) -> Options:
    """The command line, checked."""
    parser = CliParser(usage="python -m benchmarks.ladder [--FLAG VALUE ...]", description=__doc__)
    add_flags(parser, Options)
    options = make_options(Options, parser.parse_args(argv))
    models = ["tinymamba"] if options.variant else ["tinymamba", "llama_start"]
    options = dataclasses.replace(options, models=options.models or models)
    require_variant_of_ours(options.models or [], options.variant)
    return options


def show(rows: list[dict], options: Options) -> None:
    """Write the table and the plot that were asked for."""
    if options.table:
        write_between(options.table, "ladder", table(rows))
    if options.plot:
        plot(rows, options.plot)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    o = parse(argv)
    if o.threads:
        torch.set_num_threads(o.threads)
    if o.table or o.plot:
        show(read_rows(o.output), o)
        return 0
    train_file, val_file = (TokenFile(f"{o.data}/{name}.bin") for name in ("train", "val"))
    for file in (train_file, val_file):
        file.check(VOCAB, 0, file.length)
    files = train_file, validation_text(val_file)
    budgets = [None] if o.steps else o.tokens or [1, 2, 5, 10, 20]
    settings = (o.seeds or [0], o.d_model or [80], budgets, o.models or [], o.lr or [8e-3, 1.6e-2])
    for seed, width, tokens, model, lr in itertools.product(*settings):
        row = {"model": model, "variant": o.variant, "d_model": width, "tokens": tokens}
        append_row(o.output, run(files, {**row, "steps": o.steps, "seed": seed, "lr": lr}))
    return 0


if __name__ == "__main__":
    run_cli(main)
