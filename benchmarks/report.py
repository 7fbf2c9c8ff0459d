"""Rows of benchmarks in Markdown files.

The rows of a sweep have the keys model, variant, lr and seed, the settings of the run and what was
measured. `sweep_table` shows each model, variant and choice of settings at its best rate.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from tinymamba.cli import require

Runs = dict[float, dict[int, dict]]  # learning rate: {seed: row}


def read_rows(path: str) -> list[dict]:
    """The rows of a .jsonl file."""
    require(Path(path).is_file(), path, "no such file", "name a file of rows with --output")
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line]


def write_between(path: str, name: str, lines: list[str]) -> None:
    """Replace what stands between <!-- name --> and <!-- /name --> in a Markdown file."""
    before, after = around_markers(path, name)
    Path(path).write_text(before + "\n".join(lines) + "\n" + after, "utf-8")


def around_markers(path: str, name: str) -> tuple[str, str]:
    """A Markdown file up to the first marker, and from the second one on."""
    require(Path(path).is_file(), path, "no such file", "name an existing Markdown file")
    first, second = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, begin, rest = Path(path).read_text("utf-8").partition(first)
    _, end, after = rest.partition(second)
    remedy = f"add <!-- {name} --> and <!-- /{name} --> to it, each in a line of its own"
    require(begin and end, path, "has no markers", remedy)
    return before + begin, end + after


def require_task(task: str, tasks: Collection[str], table: str | None, name: str) -> None:
    """Reject an unknown task, none at all without --table, and a --table without markers."""
    listed = ", ".join(tasks)
    require(task or table, "task", "there is nothing to do", f"name one of {listed}")
    require(not task or task in tasks, "task", f"{task} is not one", f"name one of {listed}")
    if table:
        around_markers(table, name)


def finite(value: float, digits: int) -> float | None:
    """A number for a row: rounded, or None if it is not finite."""
    return round(value, digits) if math.isfinite(value) else None


# ------------------------------------------------------------------------------------ sweeps


class Column(NamedTuple):
    """A measured number of a table."""

    heading: str
    get: Callable[[dict], float | None]  # from a row; None if the run has not reached it
    larger: bool = True  # is better
    digits: int = 3
    share: bool = False  # also count the seeds that are at exactly 1


def sweep_table(rows: list[dict], columns: list[Column], defaults: dict[str, Any]) -> list[str]:
    """A Markdown table of the rows of one task; the first column decides which rate is best.

    `defaults` are settings of the task; those that a run changes stand in its line. Of rows that
    were run twice the last counts.
    """
    lines: dict[tuple, Runs] = {}
    for row in rows:
        settings = {name: row.get(name, value) for name, value in defaults.items()}
        changed = {name: v for name, v in settings.items() if v != defaults[name]}
        key = (row["model"], row.get("variant", ""), describe(changed))
        lines.setdefault(key, {}).setdefault(row["lr"], {})[row["seed"]] = row
    headings = ["model", "variant", "changed", "rate", "seeds", *(c.heading for c in columns)]
    table = [f"| {' | '.join(headings)} | seconds |", f"|{'---|' * 4}{'--:|' * (len(columns) + 2)}"]
    for (model, variant, changed), runs in lines.items():
        rate, bracketed = best_rate(runs, columns[0])
        best = list(runs[rate].values())
        shown = f"{rate:g}" if bracketed else f"{rate:g} (edge)"
        cells = [model, quoted(variant), quoted(changed), shown, str(len(best))]
        cells += [cell(column, best) for column in columns]
        seconds = statistics.mean(row["seconds"] for row in best)
        table.append(f"| {' | '.join(cells)} | {seconds:.0f} |")
    return table


def best_rate(runs: Runs, column: Column) -> tuple[float, bool]:
    """The best learning rate, and whether no rate that was not tried can be expected to be better.

    That is so if a worse rate was tried on both sides, or if all answers are right. Rates are
    compared by the mean over the seeds that all of them have. Of equal ones the middle is taken.
    """
    shared = set.intersection(*(set(seeds) for seeds in runs.values()))

    def worth(rate: float) -> float:
        seeds = shared or set(runs[rate])
        values = [column.get(runs[rate][seed]) for seed in sorted(seeds)]
        if None in values:
            return -math.inf
        mean = statistics.mean(value for value in values if value is not None)
        return mean if column.larger else -mean

    worths = {rate: worth(rate) for rate in sorted(runs)}
    best = max(worths.values())
    equal = [rate for rate, value in worths.items() if value == best]
    inside = min(worths) < equal[0] and equal[-1] < max(worths)
    return equal[(len(equal) - 1) // 2], inside or (column.share and best == 1.0)


def cell(column: Column, rows: list[dict]) -> str:
    """The mean over seeds, and the smallest and largest value."""
    found = [column.get(row) for row in rows]
    values = [value for value in found if value is not None]
    if not values:
        return "none"
    mean, low, high = (f"{f(values):,.{column.digits}f}" for f in (statistics.mean, min, max))
    text = mean if low == high else f"{mean} ({low} to {high})"
    if len(values) < len(rows):
        text += f", {len(values)} of {len(rows)} seeds"
    if column.share:
        text += f", {sum(value == 1.0 for value in values)} of {len(rows)} at 1"
    return text


def describe(changed: dict[str, Any]) -> str:
    """NAME=VALUE words."""
    return " ".join(f"{name}={str(value).replace(' ', '')}" for name, value in changed.items())


def quoted(text: str) -> str:
    """Code in Markdown, or nothing."""
    return f"`{text}`" if text else ""
