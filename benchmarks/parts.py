"""What parts of the model cost: forward and backward passes as it is, and with other settings.

    python -m benchmarks.parts --variants memory=false memory_products=0
    python -m benchmarks.parts --sequence_lengths 256 --d_model 192 --n_layer 4 --num_heads 3
    python -m benchmarks.parts --variants "memory=false k_conv=false" --compile --threads 1

A variant is fields of Config that differ. In every round each model runs once; a ratio is that of
the model as it is to the variant: of the medians, and of the fastest rounds. Rows go to --output.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
from torch import Tensor

from benchmark import interleave, timed
from benchmarks.peers import build_tinymamba
from testv2 import Config, TinyMambaModel
from tinymamba.cli import parse_flags, require, run_cli


@dataclass
class Options:
    """The command line."""

    variants: list[str] | None = None  # FIELD=VALUE words for each; None means memory=false

    # Model
    d_model: int = 320  # width
    n_layer: int = 5  # blocks
    num_heads: int = 5  # attention heads
    vocab_size: int = 4096  # ids

    # Runs
    sequence_lengths: list[int] | None = None  # tokens of a text; None means 512
    tokens_per_step: int = 4096  # tokens of a pass, of as many texts as fit
    compile: bool = False  # compile the blocks
    warmup_iterations: int = 2  # rounds that do not count
    test_iterations: int = 9  # rounds that count
    threads: int = 0  # CPU threads; 0 means all
    output: str = "parts.jsonl"  # file of rows

    LIMITS: ClassVar = dict.fromkeys(
        ("test_iterations", "tokens_per_step", "sequence_lengths"), (1, math.inf)
    )


def make_run(model: TinyMambaModel, ids: Tensor) -> Callable[[], float]:
    """A function that runs both passes on ids (b, l+1), in bfloat16, and returns its seconds."""

    def work() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        model.zero_grad()

    return functools.partial(timed, work, ids.device)


def compare(options: Options, length: int) -> list[dict]:
    """A row for the model as it is, and for each variant."""
    o, makers = options, {}
    config = Config(
        d_model=o.d_model,
        n_layer=o.n_layer,
        num_heads=o.num_heads,
        vocab_size=o.vocab_size,
        bias=False,
        dropout=0.0,
    ).validate()
    ids = torch.randint(o.vocab_size, (max(1, o.tokens_per_step // length), length + 1))
    for words in ["", *(o.variants or ["memory=false"])]:
        model = build_tinymamba(config, words)
        if o.compile:
            model.compile_blocks()
        makers[words] = functools.partial(make_run, model, ids)
    rows = []
    for words, timing in interleave(makers, o.warmup_iterations, o.test_iterations).items():
        require(not timing.reason, words, f"failed ({timing.reason})", "leave it out of --variants")
        rows.append({"variant": words, "length": length, "all": timing.seconds})
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse_flags(Options, argv, "python -m benchmarks.parts [--FLAG VALUE ...]", __doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    for length in options.sequence_lengths or [512]:
        rows = compare(options, length)
        whole = rows[0]["all"]
        with open(options.output, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**asdict(options), **row}) + "\n" for row in rows)
        for row in rows:
            median, least = statistics.median(row["all"]), min(row["all"])
            print(
                f"length {length}  {row['variant'] or 'as it is':24s} {1000 * median:9.1f} ms  "
                f"{statistics.median(whole) / median:5.2f} {min(whole) / least:5.2f}"
            )
    return 0


if __name__ == "__main__":
    run_cli(main)
