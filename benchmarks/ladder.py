"""How the loss falls with tokens, with time and with size, against peers on bytes of Python code.

    P=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    python data/prepare.py --input $P/torch $P/transformers $P/sympy $P/numpy $P/networkx \
        --tokenizer byte --output_dir data/python
    python -m benchmarks.ladder --d_model 80 --tokens 1 2 5 10 20     # of 0.4M parameters
    python -m benchmarks.ladder --d_model 40 80 128 --tokens 20       # sizes
    python -m benchmarks.ladder --d_model 64 128 256 --models tinymamba --steps 100 --lr 4e-3 8e-3
    python -m benchmarks.ladder --table docs/benchmarks.md --plot docs/ladder.png

Every run has a schedule of its own, with a warm-up of at most a tenth, and sees each block of 512
bytes at most once. TinyMamba has four blocks and a window of 256 bytes, Llama six layers and Mamba2
nine; all have the same number of parameters. peers.py has the models. Muon for matrices, AdamW for
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
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmark import append_row
from benchmarks.peers import (
    MODELS,
    Shape,
    build_peer,
    build_tinymamba,
    count,
    fit,
    require_variant_of_ours,
)
from benchmarks.quality import blockwise, read_through, schedule, update
from benchmarks.report import Column, best_rate, finite, read_rows, write_between
from testv2 import Config, TokenFile, make_optimizer
from tinymamba.cli import CliParser, add_flags, make_options, need, require, run_cli

VOCAB = 257  # bytes and the end of a file
BLOCK, BATCH = 512, 8  # bytes of a block, blocks of a step
TEXTS, LENGTH = 16, 2**13  # texts to validate on, and bytes of each
WINDOW = 256  # bytes that TinyMamba's attention sees: about the text of its usual 64 tokens
LAYERS = {"tinymamba": 4, "mamba2": 9}  # of a model; others have six
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
    LIMITS: ClassVar = {"d_model": (32, math.inf), "steps": (0, math.inf)}


# ------------------------------------------------------------------------------------ runs


def build(name: str, width: int, variant: str = "") -> torch.nn.Module:
    """A model with random weights; the peers have as many parameters as TinyMamba."""
    heads = math.ceil(width / 64)
    head = width // heads
    shape: dict[str, Any] = {"d_model": width, "num_heads": heads, "ssm_head_dim": head}
    rest: dict[str, Any] = {"vocab_size": VOCAB, "window_size": WINDOW, "dropout": 0.0}
    ours = Config(n_layer=LAYERS["tinymamba"], bias=False, **shape, **rest).validate()
    if name == "tinymamba":
        return build_tinymamba(ours, variant)
    with torch.device("meta"):
        target = count(build_tinymamba(ours))
    heads = 2 * heads if name == "mamba2" else heads
    return build_peer(name, fit(name, Shape(VOCAB, width, LAYERS.get(name, 6), heads), target))


def batches(file: TokenFile, steps: int, seed: int) -> Any:
    """Blocks (b, l+1) in random order, none twice."""
    blocks = (file.length - 1) // BLOCK
    problem = f"has {blocks:,} blocks of {BLOCK} bytes; {steps * BATCH:,} are needed"
    require(steps * BATCH <= blocks, file.path, problem, "prepare more text, or lower --tokens")
    order = np.random.default_rng(1000 + seed).permutation(blocks)[: steps * BATCH]
    for chosen in order.reshape(steps, BATCH).tolist():
        rows = [file.read(i * BLOCK, (i + 1) * BLOCK + 1) for i in chosen]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def train(model: torch.nn.Module, file: TokenFile, steps: int, seed: int, lr: float) -> None:
    """One pass over the blocks that `steps` need."""
    optimizer = make_optimizer(model, Config(lr=lr, optimizer="muon", weight_decay=0.0))
    warmup, start = max(1, min(100, steps // 10)), time.perf_counter()
    for step, window in enumerate(batches(file, steps, seed)):
        loss = update(model, optimizer, window, lr * schedule(step, steps, warmup))
        if (step + 1) % (steps // 5 or 1) == 0:
            spent = time.perf_counter() - start
            print(f"  step {step + 1:5d}  loss {loss:.4f}  {spent:.0f} s", flush=True)


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
    start = time.perf_counter()
    print({**row, "parameters": parameters, "steps": steps}, flush=True)
    train(model, files[0], steps, row["seed"], row["lr"])
    seconds = time.perf_counter() - start
    model.eval()
    found = {"parameters": parameters, "steps": steps, "seconds": round(seconds, 1)}
    for kind, nats in (
        ("", blockwise(model, files[1], BLOCK)),
        ("_read", read_through(model, files[1], BLOCK)),
    ):
        found[f"bits_per_byte{kind}"] = finite(nats / math.log(2), 5)
    return row | found


# ------------------------------------------------------------------------------------ table, plot

Budget = tuple[int, float, int]  # d_model, and tokens per parameter or else steps
Curve = dict[float, dict[str, float]]  # tokens per parameter: what was measured at the best rate


def order(name: str) -> int:
    """The place of a model, and of its variants, among all."""
    return MODELS.index(name.split()[0])


def at_best_rate(rows: list[dict]) -> dict[Budget, dict[str, dict[str, Any]]]:
    """For every budget and model: its rate, whether that is bracketed, and means over seeds."""
    runs: dict[Budget, dict[str, dict[float, dict[int, dict]]]] = {}
    for row in rows:
        tokens = row["tokens"] or 0
        budget = row["d_model"], tokens, 0 if tokens else row["steps"]
        name = f"{row['model']} {row.get('variant', '')}".strip()
        rates = runs.setdefault(budget, {}).setdefault(name, {})
        rates.setdefault(row["lr"], {})[row["seed"]] = row
    found: dict[Budget, dict[str, dict[str, Any]]] = {}
    for budget in sorted(runs, key=lambda b: (b[2] > 0, *b)):
        for model in sorted(runs[budget], key=order):
            rate, bracketed = best_rate(runs[budget][model], LOSS)
            best = list(runs[budget][model][rate].values())
            means = {
                name: statistics.mean(row[name] for row in best)
                for name in ("bits_per_byte", "bits_per_byte_read", "seconds", "parameters")
            }
            entry = {"rate": rate, "bracketed": bracketed, "seeds": len(best), **means}
            found.setdefault(budget, {})[model] = entry
    return found


def tokens_to_reach(curve: Curve, loss: float) -> float | None:
    """The tokens per parameter at which a curve reaches a loss; None where it was not measured."""
    points = [(tokens, curve[tokens]["bits_per_byte"]) for tokens in sorted(curve)]
    for (t0, y0), (t1, y1) in itertools.pairwise(points):
        if y1 <= loss <= y0:
            share = (y0 - loss) / (y0 - y1)
            return t0 * (t1 / t0) ** share
    return None


def curves(best: dict[Budget, dict[str, dict[str, Any]]], width: int) -> dict[str, Curve]:
    """The curve of every model of one width."""
    found: dict[str, Curve] = {}
    for (d_model, tokens, _), models in best.items():
        for name, entry in models.items() if d_model == width and tokens else ():
            found.setdefault(name, {})[tokens] = entry
    return found


def table(rows: list[dict]) -> list[str]:
    """The lines of a Markdown table."""
    best, lines = at_best_rate(rows), []
    heads = ["d_model", "bytes", "model", "rate", "seeds", "bits per byte", "as long texts"]
    heads += ["times tinymamba's", "bytes to the same loss", "seconds"]
    lines = [f"| {' | '.join(heads)} |", "|--:|---|---|" + "--:|" * 7]
    for (width, tokens, steps), models in best.items():
        budget = f"{tokens:g} per parameter" if tokens else f"{steps} steps"
        ours = models.get("tinymamba")
        for name, entry in models.items():
            ratio = more = ""
            if ours and name != "tinymamba":
                ratio = f"{entry['bits_per_byte'] / ours['bits_per_byte']:.3f}"
                curve = curves(best, width).get(name, {})
                reached = tokens_to_reach(curve, ours["bits_per_byte"]) if tokens else None
                more = f"{reached / tokens:.2f} times" if tokens and reached else ""
            rate = f"{entry['rate']:g}" + ("" if entry["bracketed"] else " (edge)")
            cells = [str(width), budget, name, rate, str(entry["seeds"])]
            cells += [f"{entry[key]:.3f}" for key in ("bits_per_byte", "bits_per_byte_read")]
            lines.append(
                f"| {' | '.join([*cells, ratio, more, format(entry['seconds'], '.0f')])} |"
            )
    return lines


def plot(rows: list[dict], path: str) -> None:
    """Draw the loss against tokens and against seconds."""
    best = at_best_rate(rows)
    figure = need("matplotlib.figure").Figure(figsize=(9, 3.6), layout="constrained")
    for axes, label in zip(figure.subplots(1, 2, sharey=True), ("bytes", "seconds"), strict=True):
        for width in sorted({budget[0] for budget in best}):
            for name, curve in curves(best, width).items():
                x = [
                    t * curve[t]["parameters"] if label == "bytes" else curve[t]["seconds"]
                    for t in sorted(curve)
                ]
                y = [curve[t]["bits_per_byte"] for t in sorted(curve)]
                style = {"marker": "o", "ms": 4, "color": f"C{order(name)}"}
                axes.plot(x, y, label=name, **style)
                axes.annotate(f" {width}", (x[-1], y[-1]), fontsize=8)
        axes.set(xscale="log", xlabel=label)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("validation loss, bits per byte")
    handles, names = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.axes[1].legend(unique.values(), unique.keys(), frameon=False)
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
    for seed in o.seeds or [0]:
        for width in o.d_model or [80]:
            for tokens in [None] if o.steps else o.tokens or [1, 2, 5, 10, 20]:
                for model in o.models or ():
                    for lr in o.lr or [8e-3, 1.6e-2]:
                        row = {"model": model, "variant": o.variant, "d_model": width}
                        row |= {"tokens": tokens, "steps": o.steps, "seed": seed, "lr": lr}
                        append_row(o.output, run(files, row))
    return 0


if __name__ == "__main__":
    run_cli(main)
