"""Everything that is worth measuring on one GPU, within nine minutes, and a table of it.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --stages quality --force     # measured again, in the same table
    python -m benchmarks.gpu --tiny             # every stage at small sizes, on a CPU too
    python -m benchmarks.gpu --here profile     # one stage in this process, without a limit

The stages run in this order, each in a process of its own that is killed after its time limit. A
stage that no longer fits into --minutes is left out, and named.

    ceilings     what the card can do: copy memory, multiply bf16 matrices
    correctness  loss and gradients of the whole model against the CPU's; tests/test_gpu.py
    training     153M parameters, 32,768 tokens a step: eager and compiled, against Llama
    scan         the scan alone, against flash-linear-attention's simple_gla if it is installed
    decode       one text after 512 and 32,768 tokens: eager, CUDA graph, compiled, against Llama
    profile      the 30 costliest kernels of a training step, eager and compiled
    resume       the tests that train, resume and compile
    quality      25M parameters, three learning rates for each model, equal time for each run

Llama has equal parameters (within 2%). Speeds are medians over rounds, in each of which every form
runs once. Rows are appended to rows.jsonl in --output_dir as soon as they are measured. The table
is printed at the end, whatever ended early, and written to table.md after each stage. It shows what
was predicted before any measurement, marked as predicted, until a row replaces it. The exit code
is 1 if anything failed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch

from benchmark import append_row, attempt, describe_machine, table
from benchmarks import gpu_stages
from benchmarks.gpu_stages import (
    FORMS,
    FUSED,
    NAMES,
    PLAIN,
    REAL,
    ROOT,
    SCANS,
    TINY,
    Job,
    Sizes,
    forms_of,
    make_setup,
    read_rows,
)
from tinymamba.checkpoint import atomic_write, require_writable
from tinymamba.cli import UserError, parse_flags, require, run_cli
from tinymamba.runtime import Signals


class Stage(NamedTuple):
    """A stage and its time."""

    run: Callable[[Job], None]
    least: float  # seconds without which it is left out
    limit: float  # seconds after which it is killed


STAGES = {
    "ceilings": Stage(gpu_stages.ceilings, 15, 30),
    "correctness": Stage(gpu_stages.correctness, 20, 60),
    "training": Stage(gpu_stages.training, 60, 190),
    "scan": Stage(gpu_stages.scans, 15, 30),
    "decode": Stage(gpu_stages.decode, 30, 110),
    "profile": Stage(gpu_stages.profile, 20, 40),
    "resume": Stage(gpu_stages.resume, 30, 80),
    "quality": Stage(gpu_stages.learning, 120, 240),
}
# What was expected before anything was measured: (stage, case, name) -> values of the row.
PREDICTED = {
    ("training", "512", "tinymamba eager"): {"ratio": 0.55},
    ("training", "512", "tinymamba compiled"): {"ratio": 0.65},
    ("training", "16384", "tinymamba eager"): {"ratio": 0.95},
    ("decode", "512", "tinymamba eager"): {"ms": 11.5},
    ("decode", "32768", "tinymamba eager"): {"ms": 11.5},
}
WHOLE = "the whole stage"  # name of a row about a stage that did not end well


@dataclass
class Options:
    """The command line."""

    stages: list[str] | None = None  # what to measure; None means all
    minutes: float = 9.0  # for all stages together
    tiny: bool = False  # small sizes that a CPU can do; the numbers mean nothing
    output_dir: Path = Path("gpu_results")  # folder for rows.jsonl and table.md
    force: bool = False  # replace the results of an earlier run; of --stages, if they are given

    # One stage by itself
    here: str | None = None  # run this stage in this process
    seconds: float = 600.0  # time for which it plans; nothing ends it

    CHOICES: ClassVar = {"stages": tuple(STAGES), "here": tuple(STAGES)}
    LIMITS: ClassVar = dict.fromkeys(("minutes", "seconds"), (0, math.inf))


# ------------------------------------------------------------------------------------ processes


def run_here(options: Options, stage: str) -> int:
    """Run a stage in this process. If it fails, that is a row."""
    sizes = TINY if options.tiny else REAL
    setup = make_setup(sizes.model, list(sizes.lengths))
    if options.tiny and setup.device.type == "cpu":  # for Inductor a CPU takes a minute
        torch.compile = functools.partial(torch.compile, backend="eager")
    rows, end = options.output_dir / "rows.jsonl", time.monotonic() + options.seconds
    rows.touch()
    job = Job(stage, sizes, setup, rows, end)
    try:
        _, reason = attempt(STAGES[stage].run, job)
    except UserError as e:
        reason = str(e)
    if reason:
        job.add("", WHOLE, reason)
    return 0


def stage_command(options: Options, stage: str, limit: float) -> list[str]:
    """The command of a stage's process."""
    plan = max(0.0, limit - 10)  # it takes some seconds to start
    words = ["--here", stage, "--seconds", str(plan), "--output_dir", str(options.output_dir)]
    return [sys.executable, "-m", "benchmarks.gpu", *words, *(["--tiny"] if options.tiny else [])]


def supervise(command: list[str], limit: float, signals: Signals) -> str | None:
    """Run a command for at most `limit` seconds; why it ended early, if it did.

    What it has started ends with it.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env, end = {**os.environ, "PYTHONPATH": path}, time.monotonic() + limit
    with subprocess.Popen(command, env=env, start_new_session=True) as process:
        while process.poll() is None and time.monotonic() < end and not signals.stop:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        code = process.returncode
        kill(process)
    if code is None:
        return "stopped by a signal" if signals.stop else f"took longer than {limit:.0f} s"
    return f"ended with exit code {code}" if code else None


def kill(process: subprocess.Popen) -> None:
    """End a process and all others of its session."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with contextlib.suppress(OSError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)


def run_stages(options: Options, rows: Path, signals: Signals) -> Iterator[None]:
    """Run the stages one after another, and write which did not run or did not end well.

    Yields after each.
    """
    end = time.monotonic() + 60 * options.minutes
    for name, stage in STAGES.items():
        if name not in (options.stages or STAGES):
            continue
        left, status = end - time.monotonic(), "left out"
        limit = min(left, stage.limit)
        if signals.stop:
            reason: str | None = "the run was stopped"
        elif left < stage.least:
            reason = f"needs {stage.least:.0f} s, and {max(0, left):.0f} s are left"
        else:
            print(f"\n{name}, up to {limit:.0f} s", flush=True)
            status = "failed"
            reason = supervise(stage_command(options, name, limit), limit, signals)
        if reason:
            row = {"stage": name, "case": "", "name": WHOLE, "status": status, "reason": reason}
            append_row(str(rows), row)
        yield


# ------------------------------------------------------------------------------------ table

COLUMNS = {  # key of a row: title, format
    "gb_per_second": ("GB/s", "{:,.0f}"),
    "tflops": ("TFLOP/s", "{:,.0f}"),
    "difference": ("difference", "{:.1e}"),
    "tokens_per_second": ("tokens per second", "{:,.0f}"),
    "ms": ("ms", "{:,.2f}"),
    "ratio": ("multiple of Llama's speed", "{:.2f}"),
    "utilization": ("FLOPs utilization", "{:.1%}"),
    "peak_gb": ("peak memory, GB", "{:.1f}"),
    "first": ("first call, s", "{:.1f}"),
    "share": ("share of the step", "{:.1%}"),
    "calls": ("calls", "{:,}"),
    "lr": ("learning rate", "{:g}"),
    "spent": ("seconds", "{:.1f}"),
    "tokens": ("tokens", "{:,}"),
    "train_loss": ("training loss", "{:.3f}"),
    "bits_per_byte": ("validation, bits per byte", "{:.3f}"),
}


def expected(stage: str, sizes: Sizes) -> list[tuple[str, str]]:
    """(case, name) of the rows that a stage will write, as far as that is known before."""
    steps, decoded = forms_of(FORMS), forms_of((*PLAIN, *FUSED))
    keys = {
        "ceilings": [("", "copy in memory"), ("", "bf16 product")],
        "training": [(str(length), name) for length in sizes.lengths for name in steps],
        "scan": [(f"{batch} x {length}", name) for batch, length in sizes.scans for name in SCANS],
        "decode": [(str(context), name) for context in sizes.contexts for name in decoded],
        "quality": [(f"{quarter}/4", name) for name in NAMES for quarter in (1, 2, 3, 4)],
    }
    return keys.get(stage, [])


def add_ratios(rows: list[dict]) -> None:
    """Add TinyMamba's speed as a multiple of that of Llama's fastest form in the same case."""
    best: dict[tuple, float] = {}
    for row in rows:
        if row["name"].startswith("llama"):
            case = row["stage"], row["case"]
            best[case] = max(best.get(case, 0.0), row.get("tokens_per_second", 0.0))
    for row in rows:
        llama = best.get((row["stage"], row["case"]))
        if row["name"].startswith("tinymamba") and "tokens_per_second" in row and llama:
            row["ratio"] = row["tokens_per_second"] / llama


def at_best_rates(rows: list[dict]) -> list[dict]:
    """Of the runs of the stage quality, each model's best; the other rows as they are."""
    ended = [row for row in rows if "bits_per_byte" in row]
    ended.sort(key=lambda row: row["bits_per_byte"], reverse=True)
    best = {row["name"]: row["lr"] for row in ended}  # the last row counts
    return [r for r in rows if "lr" not in r or r["lr"] == best.get(r["name"], r["lr"])]


def cell(key: str, row: dict, predicted: dict) -> str:
    """The text of one column: the measurement, else the prediction, else nothing."""
    if row.get(key) is not None:
        return COLUMNS[key][1].format(row[key])
    return f"{COLUMNS[key][1].format(predicted[key])} (predicted)" if key in predicted else ""


def stage_table(stage: str, rows: list[dict], sizes: Sizes) -> str:
    """What was measured in a stage, what is predicted, and what is missing and why."""
    measured = {(row["case"], row["name"]): row for row in at_best_rates(rows)}
    keys = list(dict.fromkeys([*expected(stage, sizes), *measured]))
    predicted = {key: PREDICTED.get((stage, *key), {}) for key in keys}
    seen = [*measured.values(), *predicted.values()]
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in seen)]
    lines = [["", *(COLUMNS[key][0] for key in columns), "status"]]
    for key in keys:
        row = measured.get(key, {"status": "not measured", "reason": None})
        status = "measured" if row["status"] == "ok" else row["status"]
        status += f": {row['reason']}" if row["reason"] else ""
        cells = [cell(column, row, predicted[key]) for column in columns]
        lines.append([", ".join(filter(None, key)), *cells, status])
    return table([[text.replace("|", "/") for text in line] for line in lines])


def markdown(machine: dict, rows: list[dict], sizes: Sizes) -> str:
    """The text of table.md."""
    add_ratios(rows)
    text = [
        f"# GPU benchmark\n\n{machine['name']}, torch {machine['torch']}, "
        f"triton {machine['triton']}, transformers {machine['transformers']}, {machine['date']}\n",
        f"    python -m benchmarks.gpu {machine['command']}\n",
    ]
    if sizes is TINY:
        text.append("With --tiny: the numbers mean nothing.\n")
    for name, stage in STAGES.items():
        own = [row for row in rows if row["stage"] == name]
        title = str(stage.run.__doc__).partition("\n")[0]
        known = own or expected(name, sizes)
        body = stage_table(name, own, sizes) if known else "not measured\n"
        text.append(f"## {name}\n\n{title}\n\n{body}")
    return "\n".join(text)


# ------------------------------------------------------------------------------------ main


def version(package: str) -> str:
    """The version of an installed package, or "none"."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "none"


def describe(sizes: Sizes, argv: list[str]) -> dict:
    """The card, the libraries, the command and the day."""
    machine = describe_machine(make_setup(sizes.model, []), argv)
    machine |= {name: version(name) for name in ("triton", "transformers")}
    return {**machine, "date": time.strftime("%Y-%m-%d")}


def other_rows(path: Path, stages: list[str] | None, card: str) -> list[dict]:
    """The rows of an earlier run on this card that a run of these stages does not replace."""
    rows = read_rows(path) if stages and path.exists() else []
    known = any(row["stage"] == "machine" and row["name"] == card for row in rows)
    return [row for row in rows if known and row["stage"] not in ("machine", *(stages or []))]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    usage = "python -m benchmarks.gpu [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    remedy, present = "use a machine that has one, or pass --tiny", torch.cuda.is_available()
    require(options.tiny or present, "device", "there is no CUDA GPU", remedy)
    require_writable(options.output_dir, "--output_dir")
    if options.here:
        return run_here(options, options.here)
    files = [options.output_dir / name for name in ("rows.jsonl", "table.md")]
    old = ", ".join(file.name for file in files if file.exists())
    remedy = "pass --force or another folder"
    require(options.force or not old, "--output_dir", f"{options.output_dir} holds {old}", remedy)
    sizes = TINY if options.tiny else REAL
    machine = describe(sizes, argv)
    kept = other_rows(files[0], options.stages, machine["name"])
    files[0].write_text("".join(json.dumps(row) + "\n" for row in kept))
    append_row(str(files[0]), {"stage": "machine", "case": "", "status": "ok", **machine})
    with Signals() as signals:
        for _ in run_stages(options, files[0], signals):  # a killed run has a table, too
            rows = read_rows(files[0])
            text = markdown(machine, rows, sizes)
            write = functools.partial(lambda text, to: Path(to).write_text(text, "utf-8"), text)
            atomic_write(files[1], write)
    print(f"\n{text}\nwritten to {options.output_dir}")
    failed = any(row["status"] == "failed" for row in rows)
    return 128 + signals.stop if signals.stop else int(failed)


if __name__ == "__main__":
    run_cli(main)
