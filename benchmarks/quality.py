"""Validation loss against models of transformers at equal parameters and equal tokens.

    python -m benchmarks.quality S --text wiki.test.raw wiki.valid.raw  # bytes, 0.8M parameters
    python -m benchmarks.quality M                                      # built-in corpus, 10M
    python -m benchmarks.quality M-small                                # long blocks, 3M
    python -m benchmarks.quality M --models llama --lr 1e-3 2e-3 4e-3   # find a peer's best rate
    python -m benchmarks.quality S --text ... --seeds 0 1 2 --output quality.jsonl
    python -m benchmarks.quality M-small --models tinymamba --variant "memory=false d_state=64"
    python -m benchmarks.quality --table docs/benchmarks.md             # of all rows so far

Every model sees the same batches of a seed, the same schedule and the same kind of optimizer: Muon
for matrices and AdamW for the rest, or AdamW for all with --optimizer adamw. peers.py has the
models. S trains on the first file of --text and validates on the second: 2,000 steps of 12 x 64
bytes. M and M-small train on what `python data/prepare.py` makes: 1,000 steps of 8 x 512 tokens,
and 366 of 4 x 1,024.

Each run appends a row to --output. `bits_per_byte` is on validation data cut into blocks as in
training. `bits_per_byte_read` is on the same data read as long texts: by TinyMamba with its state,
by the others in a sliding window of one block, with a stride of an eighth of a block.

M-small also has the nats per token by position in the block, and by how far back the pair of a
token and the next one was last seen in it. `state_worth` is how much higher TinyMamba's loss is if
the states of its SSM and memory, and nothing else, are cleared every 64 tokens.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark import append_row
from benchmarks.peers import (
    MODELS,
    Shape,
    build_peer,
    build_tinymamba,
    count,
    require_variant_of_ours,
)
from benchmarks.report import Column, finite, read_rows, require_task, sweep_table, write_between
from testv2 import Config, TinyMambaModel, TokenFile, erase_states, make_optimizer, read_sidecar
from tinymamba.cli import CliParser, add_flags, make_options, require, run_cli


class Task(NamedTuple):
    """What all models of a task have in common."""

    vocab: int
    block: int  # tokens of a block
    batch: int  # blocks of a step
    steps: int
    warmup: int = 100  # steps


TASKS = {
    "S": Task(256, 64, 12, 2000),
    "M": Task(4096, 512, 8, 1000),
    "M-small": Task(4096, 1024, 4, 366, warmup=73),
}
OURS: dict[
    str, dict[str, Any]
] = {  # fields of TinyMamba's Config: about 0.8M, 9.6M and 3.2M parameters
    "S": {"d_model": 108, "n_layer": 4, "num_heads": 2, "ssm_head_dim": 54},
    "M": {"d_model": 320, "n_layer": 5, "num_heads": 5, "ssm_head_dim": 64},
    "M-small": {"d_model": 192, "n_layer": 4, "num_heads": 3, "ssm_head_dim": 64},
}
LLAMAS = ("llama", "llama_conv", "llama_canon", "llama_start")  # convolutions are small
SHAPES = {  # of the peers, with as many parameters, within 2%
    "S": {
        **dict.fromkeys(LLAMAS, Shape(256, width=128, layers=4, heads=2, mlp=326)),
        "mamba2": Shape(256, width=128, layers=7, heads=4, state=32),
        "gated_delta": Shape(256, width=128, layers=4, heads=2, mlp=258),
    },
    "M": {
        **dict.fromkeys(LLAMAS, Shape(4096, width=384, layers=5, heads=6, mlp=880)),
        "mamba2": Shape(4096, width=384, layers=9, heads=12, state=16),
        "gated_delta": Shape(4096, width=384, layers=5, heads=6, mlp=669),
    },
    "M-small": {
        **dict.fromkeys(LLAMAS, Shape(4096, width=192, layers=6, heads=3, mlp=427)),
        "mamba2": Shape(4096, width=192, layers=10, heads=6, state=32),
        "gated_delta": Shape(4096, width=192, layers=6, heads=3, mlp=326),
    },
}
RATES = {  # peak learning rates, with Muon: the best found, but for those marked, which are guesses
    "S": {
        "tinymamba": 4e-3,
        "llama": 2e-3,
        "llama_conv": 4e-3,  # guess
        "llama_canon": 4e-3,  # guess
        "llama_start": 4e-3,  # guess
        "mamba2": 8e-3,
        "gated_delta": 4e-3,  # guess
    },
    "M": {
        "tinymamba": 8e-3,
        "llama": 4e-3,
        "llama_conv": 1.6e-2,
        "llama_canon": 1.6e-2,  # guess
        "llama_start": 1.6e-2,
        "mamba2": 8e-3,
        "gated_delta": 8e-3,  # guess
    },
    "M-small": dict.fromkeys(MODELS, 1.6e-2),  # guesses
}
READERS = 16  # long texts that validation data are read as
NEAR = Config.window_size  # tokens back that TinyMamba's attention sees in one block
POSITIONS = (0, 64, 128, 256)  # where the parts of a block begin that are told apart
LAST_SEEN = ("never", f"up to {NEAR}", "farther")


@dataclass
class Options:
    """The command line. `task` is an argument without a flag."""

    task: str = ""

    # Data
    text: list[str] | None = None  # for S: two files, to train on and to validate on
    data: str = "data/text"  # for M and M-small: folder with train.bin and val.bin
    validation_tokens: int = 2**18  # validation tokens at most

    # Runs
    models: list[str] | None = None  # None means all of these; with --variant, tinymamba
    variant: str = ""  # FIELD=VALUE words that change TinyMamba's Config
    seeds: list[int] | None = None  # random seeds of every model; None means 0 1 2
    lr: list[float] | None = None  # peak learning rates; None means each model's best
    optimizer: str = "muon"  # muon for matrices and AdamW for the rest, or adamw for all
    weight_decay: float = 0.0  # weight decay of matrices
    steps: int = 0  # updates; 0 means the task's own number
    threads: int = 0  # CPU threads; 0 means all

    # Rows
    output: str = "quality.jsonl"  # file of rows
    table: str | None = None  # Markdown file to write all rows of --output into

    CHOICES: ClassVar = {"models": MODELS, "optimizer": ("muon", "adamw")}


# ------------------------------------------------------------------------------------ models


def build(task: str, name: str, variant: str = "") -> torch.nn.Module:
    """A model with random weights."""
    if name != "tinymamba":
        return build_peer(name, SHAPES[task][name])
    vocab, ours = TASKS[task].vocab, OURS[task]
    return build_tinymamba(Config(vocab_size=vocab, dropout=0.0, bias=False, **ours), variant)


def logits_of(model: torch.nn.Module, ids: Tensor, bf16: bool = True) -> Tensor:
    """(b, l) -> (b, l, v), float32."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        out = model(ids)
    return (out if isinstance(out, torch.Tensor) else out.logits).float()


# ------------------------------------------------------------------------------------ data


def load_data(options: Options) -> tuple[Tensor, Tensor, float]:
    """Training and validation tokens, and the average number of bytes per validation token."""
    last = options.validation_tokens + 1
    if options.task == "S":
        text, remedy = options.text or [], "pass --text TRAIN VALIDATION"
        require(len(text) == 2, "--text", "S needs two files", remedy)
        for path in text:
            require(Path(path).is_file(), path, "no such file", "pass two files of text")
        train, val = (np.fromfile(path, dtype=np.uint8).astype(np.int64) for path in text)
        return torch.from_numpy(train), torch.from_numpy(val[:last]), 1.0
    ids, val_ids, ratio = load_tokens(options.data, TASKS[options.task].vocab)
    return ids, val_ids[:last], ratio


def load_tokens(folder: str, vocab: int) -> tuple[Tensor, Tensor, float]:
    """The same from a folder that data/prepare.py has written."""
    files = [TokenFile(f"{folder}/{name}.bin", "auto") for name in ("train", "val")]
    ids, val_ids = (torch.from_numpy(f.read(0, f.length).astype(np.int64)) for f in files)
    facts, remedy = read_sidecar(files[1].path), f"python data/prepare.py --vocab_size {vocab}"
    require(int(ids.max()) < vocab, "--data", f"has ids of {vocab} and more", remedy)
    return ids, val_ids, facts["bytes"] / facts["tokens"]


# ------------------------------------------------------------------------------- measurements


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each token: logits (b, l, v) and targets (b, l) -> (b, l)."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets)


def blocks_of(val: Tensor, block: int) -> Tensor:
    """Validation data as blocks, each with the token after it: (n, block+1)."""
    return val.unfold(0, block + 1, block)


def some_at_a_time(windows: Tensor) -> tuple[Tensor, ...]:
    """Blocks (n, l+1) in groups of a few thousand tokens."""
    return windows.split(max(1, 2**14 // (windows.shape[1] - 1)))


@torch.no_grad()
def token_losses(model: torch.nn.Module, windows: Tensor, bf16: bool = True) -> Tensor:
    """Nats of each token but the first of windows (n, l+1): (n, l)."""
    groups = some_at_a_time(windows)
    return torch.cat([losses_of(logits_of(model, w[:, :-1], bf16), w[:, 1:]) for w in groups])


def blockwise(model: torch.nn.Module, val: Tensor, block: int) -> float:
    """Nats per token of validation data, cut into independent blocks."""
    return token_losses(model, blocks_of(val, block)).double().mean().item()


@torch.no_grad()
def read_through(model: torch.nn.Module, val: Tensor, block: int) -> float:
    """Nats per token of validation data read as READERS long texts."""
    rows, stride = READERS, block // 8
    length = (len(val) - 1) // rows // block * block
    x, y = (val[i : i + rows * length].view(rows, length) for i in (0, 1))
    total = torch.zeros(())
    if isinstance(model, TinyMambaModel):
        state = model.init_state(rows)
        for a, b in zip(x.split(1024, 1), y.split(1024, 1), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                logits, state = model.advance(a, state)
            total += losses_of(logits, b).sum()
        return total.item() / y.numel()
    windows = [(0, block, 0)]  # begin, end, first counted token
    windows += [(i - block, i, block - stride) for i in range(block + stride, length + 1, stride)]
    for begin, end, first in windows:
        logits = logits_of(model, x[:, begin:end])[:, first:]
        total += losses_of(logits, y[:, begin + first : end]).sum()
    return total.item() / y.numel()


@torch.no_grad()
def losses_without_state(model: TinyMambaModel, windows: Tensor) -> Tensor:
    """`token_losses` if the state of the SSM is cleared after every NEAR tokens."""
    found = []
    for w in some_at_a_time(windows):
        state, pieces = model.init_state(len(w)), []
        everywhere = torch.ones(len(w), dtype=torch.bool)
        for x, y in zip(w[:, :-1].split(NEAR, 1), w[:, 1:].split(NEAR, 1), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                logits, state = model.advance(x, state)
            pieces.append(losses_of(logits, y))
            state = dataclasses.replace(state, layers=erase_states(state.layers, everywhere))
        found.append(torch.cat(pieces, dim=1))
    return torch.cat(found)


def last_seen(windows: Tensor, vocab: int) -> Tensor:
    """Where each token of windows (n, l+1) was last seen after the one before it: (n, l).

    An index of LAST_SEEN.
    """
    index, found = torch.arange(windows.shape[1] - 1), []
    for w in windows.split(8):
        pairs = w[:, :-1] * vocab + w[:, 1:]  # (b, l)
        same = (pairs[:, :, None] == pairs[:, None, :]).tril(-1)  # (b, l, l)
        last = torch.where(same, index, -1).amax(2)
        found.append(torch.where(last < 0, 0, torch.where(index - last <= NEAR, 1, 2)))
    return torch.cat(found)


def by_place(model: torch.nn.Module, val: Tensor, task: Task) -> dict[str, Any]:
    """The loss by position and by where the next token was last seen, and the state's worth."""
    windows = blocks_of(val, task.block)
    losses, seen = token_losses(model, windows), last_seen(windows, task.vocab)
    ends = [*POSITIONS[1:], task.block]
    kinds = {name: seen == i for i, name in enumerate(LAST_SEEN)}

    def split(values: Tensor) -> dict[str, float | None]:
        return {name: finite(values[kind].mean().item(), 4) for name, kind in kinds.items()}

    found: dict[str, Any] = {
        "loss_by_position": {
            f"{begin}-{end - 1}": finite(losses[:, begin:end].mean().item(), 4)
            for begin, end in zip(POSITIONS, ends, strict=True)
        },
        "loss_by_last_seen": split(losses),
        "share_by_last_seen": {n: round(k.float().mean().item(), 4) for n, k in kinds.items()},
    }
    if isinstance(model, TinyMambaModel):
        worth = losses_without_state(model, windows) - losses
        found["state_worth"] = {"all": finite(worth.mean().item(), 4), **split(worth)}
    return found


# ------------------------------------------------------------------------------------ training


def random_window(data: Tensor, batch: int, block: int, random: torch.Generator) -> Tensor:
    """Texts of a block and one more token from random places of the data: (b, l+1)."""
    begin = torch.randint(len(data) - block - 1, (batch, 1), generator=random)
    return data[(begin + torch.arange(block + 1)).to(data.device)]


def schedule(step: float, steps: float, warmup: float) -> float:
    """The share of the peak learning rate: linear warm-up, then a cosine to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    return min(cosine, (step + 1) / warmup)


def update(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, window: Tensor, lr: float
) -> float:
    """One step on window (b, l+1); returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    logits = logits_of(model, window[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(
    model: torch.nn.Module, windows: Iterable[Tensor], config: Config, steps: int, warmup: int
) -> None:
    """The recipe that all models share: linear warm-up, cosine to zero, clipping at 1.

    windows: (b, l+1) for each step; config: peak learning rate, optimizer and weight decay.
    """
    optimizer, start = make_optimizer(model, config), time.perf_counter()
    for step, window in enumerate(windows):
        loss = update(model, optimizer, window, config.lr * schedule(step, steps, warmup))
        if (step + 1) % (steps // 10 or 1) == 0:
            spent = time.perf_counter() - start
            print(f"  step {step + 1:5d}  loss {loss:.4f}  {spent:.0f} s", flush=True)


def validate(model: torch.nn.Module, val: Tensor, block: int) -> dict[str, float]:
    """Nats per token in independent blocks, and (`_read`) read as long texts."""
    model.eval()
    return {"": blockwise(model, val, block), "_read": read_through(model, val, block)}


# ------------------------------------------------------------------------------------ runs


def run(options: Options, data: tuple, name: str, seed: int, lr: float) -> dict:
    """Train and validate one model; returns the row."""
    torch.manual_seed(seed)
    task, (tokens, val, bytes_per_token) = TASKS[options.task], data
    model = build(options.task, name, options.variant)
    parameters = count(model)
    print(f"{options.task}  {name}  {parameters:,} parameters  seed {seed}  lr {lr}", flush=True)
    steps, random = options.steps or task.steps, torch.Generator().manual_seed(1000 + seed)
    windows = (random_window(tokens, task.batch, task.block, random) for _ in range(steps))
    config = Config(lr=lr, optimizer=options.optimizer, weight_decay=options.weight_decay)
    start = time.perf_counter()
    train(model, windows, config, steps, task.warmup)
    seconds = time.perf_counter() - start
    nats = validate(model, val, task.block)
    row: dict[str, Any] = {
        "task": options.task,
        "model": name,
        "variant": options.variant,
        "seed": seed,
        "lr": lr,
        "optimizer": options.optimizer,
        "weight_decay": options.weight_decay,
        "steps": steps,
        "parameters": parameters,
        "seconds": round(seconds, 1),
    }
    for kind, value in nats.items():
        row[f"nats_per_token{kind}"] = finite(value, 5)
        row[f"bits_per_byte{kind}"] = finite(value / math.log(2) / bytes_per_token, 5)
    return row | (by_place(model, val, task) if options.task == "M-small" else {})


def state_worth(row: dict) -> float | None:
    """How much TinyMamba's state is worth where the next token was last seen out of sight."""
    return row["state_worth"]["farther"] if "state_worth" in row else None


def tables(rows: list[dict]) -> list[str]:
    """The lines of a table for each task."""
    lines = []
    for name in [name for name in TASKS if any(row["task"] == name for row in rows)]:
        columns = [
            Column("bits per byte", lambda row: row["bits_per_byte"], larger=False),
            Column("read as long texts", lambda row: row.get("bits_per_byte_read"), larger=False),
        ]
        if name == "M-small":
            columns.append(Column(f"state's worth beyond {NEAR}, nats", state_worth))
        defaults = {"optimizer": "muon", "weight_decay": 0.0, "steps": TASKS[name].steps}
        own = [row for row in rows if row["task"] == name]
        lines += [f"**{name}**", "", *sweep_table(own, columns, defaults), ""]
    return lines[:-1]


def parse(argv: list[str] | None) -> Options:
    """The command line, checked."""
    usage = f"python -m benchmarks.quality [{'|'.join(TASKS)}] [--FLAG VALUE ...]"
    parser = CliParser(usage=usage, description=__doc__)
    parser.add_argument(
        "task", nargs="?", default="", help="S: 0.8M parameters; M-small: 3M; M: 10M"
    )
    add_flags(parser, Options)
    options = make_options(Options, parser.parse_args(argv))
    require_task(options.task, TASKS, options.table, "quality")
    models = ["tinymamba"] if options.variant else list(MODELS)
    options = dataclasses.replace(options, models=options.models or models)
    require_variant_of_ours(options.models or [], options.variant)
    return options


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.task:
        data = load_data(options)
        least = READERS * TASKS[options.task].block + 1
        problem = f"{len(data[1])} tokens are too few to validate on"
        require(len(data[1]) >= least, options.task, problem, f"it needs {least}")
        for seed in options.seeds or [0, 1, 2]:
            for name in options.models or ():
                for lr in options.lr or [RATES[options.task][name]]:
                    append_row(options.output, run(options, data, name, seed, lr))
    if options.table:
        write_between(options.table, "quality", tables(read_rows(options.output)))
    return 0


if __name__ == "__main__":
    run_cli(main)
