"""Preparing data, and reading it in training: megabytes per second, and the share of a step.

    python -m benchmarks.data --megabytes 100
    python -m benchmarks.data --megabytes 500 --bpe_sample_bytes 100000000 --workers 2
    python -m benchmarks.data --text texts/ --vocab_size 16384

The text is that of --text, or the Python files that are installed, in random order; if it is too
short it is repeated, which is reported. data/prepare.py runs twice: first it learns its tokenizer
from the text, then it encodes only. Then the demo model trains on the result. Its data are read in
the training process, and in two others: `share` is how much of a step it waits for them. Rows go to
--output.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

from data import prepare
from tinymamba.cli import parse_flags, require, run_cli, say

SEPARATOR = b"<|endoftext|>\n"


@dataclass
class Options:
    """The command line."""

    text: list[str] | None = None  # files and folders; None means all installed Python files
    megabytes: float = 100.0  # of text
    vocab_size: int = 4096  # number of tokens that bpe learns
    bpe_sample_bytes: int = 200_000_000  # bytes of text that bpe learns from
    workers: int = 0  # processes of data/prepare.py; 0 means one for each core
    num_workers: list[int] | None = None  # processes that read data ahead; None means 0 and 2
    steps: int = 20  # training steps, of which the medians count; 0 trains nothing
    output: str = "data.jsonl"  # file of rows

    LIMITS: ClassVar = {"megabytes": (0.1, math.inf), "steps": (0, math.inf), "workers": (0, 60)}


# ------------------------------------------------------------------------------------ the text


def write_text(options: Options, path: Path) -> None:
    """Write the text, each file as a document."""
    size, passes = int(options.megabytes * 1e6), 0
    with open(path, "wb") as file:
        while file.tell() < size:
            begin = file.tell()
            for document in documents(options.text or installed()):
                file.write(document[: size - file.tell()].decode("utf-8", "ignore").encode())
                if file.tell() + 4 > size:  # the rest is less than a character
                    file.write(b" " * (size - file.tell()))
                    break
                file.write(SEPARATOR[: size - file.tell()])
            passes += 1
            require(file.tell() > begin, "--text", "has no text", "name files of UTF-8 text")
    if passes > 1:
        say(f"the text is too short: it is there {passes} times")


def installed() -> list[str]:
    """Where Python files are installed."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(paths[name] for name in ("stdlib", "purelib", "platlib")))


def documents(names: list[str]) -> Iterator[bytes]:
    """The text of files and folders, a file each, in random order."""
    paths = {Path(name) for name in names if Path(name).is_file()}
    for name in names:
        paths |= {p for p in Path(name).rglob("*.*") if p.suffix in (".py", ".txt", ".md")}
    in_order = sorted(paths)
    random.Random(0).shuffle(in_order)
    for path in in_order:
        data = path.read_bytes() if path.is_file() else b""
        if data and b"\0" not in data and SEPARATOR.strip() not in data:
            yield data.decode("utf-8", "ignore").encode()


# ----------------------------------------------------------------------------------- preparing


def run_prepare(options: Options, text: Path, folder: Path, tokenizer: str) -> dict:
    """Run the command; its seconds, of all processes together too, and the most memory of one."""
    flags = {
        "input": text,
        "output_dir": folder,
        "tokenizer": tokenizer,
        "vocab_size": options.vocab_size,
        "bpe_sample_bytes": options.bpe_sample_bytes,
        "workers": options.workers,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(Path(prepare.__file__)), *words]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        problem = errors.read().strip().removeprefix("error: ")
    require(not process.returncode, "data/prepare.py", problem, "change the flags")
    seconds, used = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
    unit = 1 if sys.platform == "darwin" else 1024
    megabytes = text.stat().st_size / 1e6
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(used, 3),
        "mb_per_second": round(megabytes / seconds, 2),
        "mb_per_cpu_second": round(megabytes / used, 2),
        "peak_mb": round(usage.ru_maxrss * unit / 1e6),
    }


# ------------------------------------------------------------------------------------- reading


class Waiting:
    """Batches, with the seconds that they were waited for."""

    def __init__(self, batches: Iterator):
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        begin = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - begin


def measure_reading(options: Options, folder: Path, num_workers: int) -> dict:
    """Train the demo model; the medians of the seconds of a step and of waiting for its data."""
    from testv2 import PRESETS, Config, Trainer  # here: a process counts the memory of its parent

    config = Config(
        **{
            **PRESETS["demo"],
            "train_data_path": str(folder / "train.bin"),
            "enable_validation": False,
            "generate_samples": False,
            "vocab_size": options.vocab_size,
            "num_workers": num_workers,
            "log_dir": str(folder / "logs"),
        }
    )
    trainer = Trainer(config)
    batches, steps, waits = Waiting(trainer.train_batches(options.steps + 3)), [], []
    for _ in range(options.steps + 2):
        waited, begin = batches.seconds, time.perf_counter()
        trainer.train_step(batches)
        steps.append(time.perf_counter() - begin)
        waits.append(batches.seconds - waited)
    trainer.close()
    step, wait = statistics.median(steps[2:]), statistics.median(waits[2:])
    return {"step_seconds": round(step, 5), "wait_seconds": round(wait, 7), "share": wait / step}


# ---------------------------------------------------------------------------------- the command


def measure(options: Options, folder: Path) -> Iterator[dict]:
    """All rows."""
    text = folder / "text.txt"
    write_text(options, text)
    learned = folder / "bpe" / "tokenizer.json"
    yield {"stage": "learn and encode", **run_prepare(options, text, learned.parent, "bpe")}
    yield {"stage": "encode", **run_prepare(options, text, folder / "again", str(learned))}
    readers = options.num_workers or [0, 2]
    for num_workers in readers if options.steps else ():
        measured = measure_reading(options, learned.parent, num_workers)
        yield {"stage": "read", "num_workers": num_workers, **measured}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse_flags(Options, argv, "python -m benchmarks.data [--FLAG VALUE ...]", __doc__)
    require(hasattr(os, "wait4"), "benchmarks.data", "needs os.wait4", "run it on Linux or macOS")
    with tempfile.TemporaryDirectory(prefix="tinymamba-") as folder:
        for row in measure(options, Path(folder)):
            with open(options.output, "a", encoding="utf-8") as file:
                file.write(json.dumps({**dataclasses.asdict(options), **row}) + "\n")
            print("  ".join(f"{name} {shown(value)}" for name, value in row.items()))
    return 0


def shown(value: Any) -> str:
    """A value for the console."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_cli(main)
