"""Fine-tuning: adapters against training every weight, on three small tasks.

    python testv2.py --preset demo
    python benchmarks/finetune.py --text wiki.test.raw wiki.valid.raw
    python benchmarks/finetune.py --text ... --tasks lookup --methods lora --lr 2e-3 8e-3

style: English prose, first file of --text, for a model of source code; loss on the second file in
nats a token. lookup: 64 made-up words, each with a made-up value, to be known by heart; format:
`name=anna age=31` is to become JSON, on names and numbers not seen in training; both in share of
answers that are right to the letter.

Every run is a process of its own, from the same base, with the same batches. `memory` is its peak
beyond what the loaded model takes, `trained` the share of weights that change. Each run appends its
row to --output.
"""

import contextlib
import io
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import append_row, peak_bytes  # noqa: E402
from peft import METHODS, AdapterConfig, FineTuner, get_trainable_parameters, parse, settings  # noqa: E402
from testv2 import generate, load_model  # noqa: E402
from tinymamba.cli import CliParser, require, run_cli  # noqa: E402
from tinymamba.tokenizer import find_tokenizer  # noqa: E402

ASKED = 64  # questions of lookup and format
TASKS = ("style", "lookup", "format")
VARIANTS = {"dora": ["--method", "lora", "--use_dora"]} | {m: ["--method", m] for m in METHODS}


def word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))


def questions(task: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of a question, up to where the answer begins, and its answer, up to a new line."""
    draw, pairs = random.Random(seed), []
    for _ in range(count):
        name, number = word(draw), draw.randrange(10, 100)
        if task == "lookup":
            pairs.append((f"{name} ->", f" {word(draw)}\n"))
        else:
            pairs.append(
                (f"name={name} age={number} =>", f' {{"name": "{name}", "age": {number}}}\n')
            )
    return pairs


def make_data(task: str, args, tokenizer, folder: Path) -> list[tuple[str, str]]:
    """train.bin and val.bin of the task; what is asked in the end."""
    if task == "style":
        texts = [Path(path).read_text(encoding="utf-8")[: 2**21] for path in args.text]
        texts[1] = texts[1][: 2**17]
        asked = []
    else:
        asked = questions(task, ASKED, seed=0)
        draw, known = random.Random(1), asked
        lines = []
        for turn in range(40):
            known = questions(task, ASKED, seed=2 + turn) if task == "format" else known
            lines += draw.sample(known, len(known))
        texts = ["".join(q + a for q, a in lines), "".join(q + a for q, a in asked)]
    for name, text in zip(("train", "val"), texts, strict=True):
        np.asarray(tokenizer.encode(text), dtype=np.int32).tofile(folder / f"{name}.bin")
    return asked


@torch.no_grad()
def share_right(model, tokenizer, asked: list[tuple[str, str]]) -> float:
    """Of greedy answers."""
    right = 0
    for question, answer in asked:
        ids = torch.tensor([tokenizer.encode("\n" + question)])
        out = generate(model, ids, len(tokenizer.encode(answer)) + 2, 0.0)
        text = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        right += text.partition("\n")[0] == answer.rstrip("\n")
    return right / len(asked)


def run(task: str, variant: str, lr: float | None, args) -> dict:
    """One run: its row."""
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = find_tokenizer(args.tokenizer) or find_tokenizer(args.checkpoint)
    require(tokenizer, "tokenizer", "none was found", "pass a file beside it as --tokenizer")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = make_data(task, args, tokenizer, folder)
        words = [
            *VARIANTS[variant],
            "--output_dir",
            str(folder / "out"),
            "--train_data",
            str(folder / "train.bin"),
            "--val_data",
            str(folder / "val.bin"),
            "--steps",
            str(args.steps),
            "--batch_size",
            "8",
            "--block_size",
            "128",
            "--validation_interval",
            str(args.steps),
            "--validation_steps",
            "0",
            "--checkpoint_interval",
            "0",
            "--generate_samples",
            "false",
            "--device",
            "cpu",
            *(["--lr", str(lr)] if lr else []),
        ]
        parsed, named = parse(words)
        base = load_model(args.checkpoint)
        config = settings(parsed, named, base)
        tuner = FineTuner(config, base, AdapterConfig(**parsed.asked), tokenizer)
        before, start = peak_bytes(torch.device("cpu"), reset=True), time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            tuner.run()
        seconds, after = time.perf_counter() - start, peak_bytes(torch.device("cpu"))
        model = tuner.model.eval()
        trained = sum(p.numel() for p in get_trainable_parameters(model))
        row = {
            "task": task,
            "method": variant,
            "lr": config.lr,
            "steps": args.steps,
            "trained": round(trained / base.count_parameters()["total"], 4),
            "seconds": round(seconds, 1),
            "memory_mb": round((after - before) / 2**20),
            "loss": round(tuner.progress["history"]["val"][-1][1], 4),
        }
        return {**row, "right": share_right(model, tokenizer, asked)} if asked else row


def main(argv: list[str] | None = None) -> int:
    parser = CliParser(
        usage="python benchmarks/finetune.py [--FLAG VALUE ...]", description=__doc__
    )
    parser.add_argument(
        "--checkpoint",
        default="tinymamba_model_latest.pt",
        metavar="FILE",
        help="the base, or a quantized folder [tinymamba_model_latest.pt]",
    )
    parser.add_argument(
        "--tokenizer",
        default="data/text/train.bin",
        metavar="FILE",
        help="beside this file [data/text/train.bin]",
    )
    parser.add_argument("--text", nargs=2, metavar="FILE", help="for style: to train on, to test")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lr", nargs="+", type=float, help="peak rates [each method's own]")
    parser.add_argument("--steps", type=int, default=300, help="of 8 x 128 tokens [300]")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--output", default="finetune.jsonl", help="of rows [finetune.jsonl]")
    args = parser.parse_args(argv)
    require(
        args.text or "style" not in args.tasks,
        "--text",
        "style needs two files",
        "pass two, or --tasks lookup format",
    )
    for path in [args.checkpoint, *(args.text or ())]:
        require(os.path.exists(path), path, "no such file", "check the path")
    spawn = multiprocessing.get_context("spawn")
    for task in args.tasks:
        for variant in args.methods:
            for lr in args.lr or [None]:
                with spawn.Pool(1) as pool:
                    append_row(args.output, pool.apply(run, (task, variant, lr, args)))
    return 0


if __name__ == "__main__":
    run_cli(main)
