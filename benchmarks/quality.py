"""Validation loss against transformers' Llama and Mamba2 at equal parameters and equal tokens.

    python -m benchmarks.quality S --text wiki.test.raw wiki.valid.raw  # bytes, 0.8M parameters
    python -m benchmarks.quality M                                      # built-in corpus, 10M
    python -m benchmarks.quality M --models llama --lr 1e-3 2e-3 4e-3   # find a peer's best rate
    python -m benchmarks.quality S --text ... --seeds 0 1 2 --output quality.jsonl

Every model sees the same batches of a seed, the same schedule and the same kind of optimizer: Muon
for matrices and AdamW for the rest, or AdamW for all with --optimizer adamw. S trains on the first
file of --text and validates on the second: 2,000 steps of 12 x 64 bytes. M trains on what
`python data/prepare.py` makes: 1,000 steps of 8 x 512 tokens.

Each run appends a row to --output. `bits_per_byte` is on validation data cut into blocks as in
training. `bits_per_byte_read` is on the same data read as long texts: by TinyMamba with its state,
by the others in a sliding window of one block, with a stride of an eighth of a block.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark import append_row
from testv2 import Config, TinyMambaModel, TokenFile, make_optimizer, read_sidecar
from tinymamba.cli import CliParser, add_flags, make_options, need, require, run_cli

# Shapes with equal numbers of parameters, within 2%: about 0.8M and 9.6M.
SHAPES = {
    "S": {
        "tinymamba": {"d_model": 108, "n_layer": 4, "num_heads": 2, "ssm_head_dim": 54},
        "llama": {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 326,
        },
        "mamba2": {
            "hidden_size": 128,
            "num_hidden_layers": 7,
            "num_heads": 4,
            "head_dim": 64,
            "state_size": 32,
        },
    },
    "M": {
        "tinymamba": {"d_model": 320, "n_layer": 5, "num_heads": 5, "ssm_head_dim": 64},
        "llama": {
            "hidden_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "intermediate_size": 880,
        },
        "mamba2": {
            "hidden_size": 384,
            "num_hidden_layers": 9,
            "num_heads": 12,
            "head_dim": 64,
            "state_size": 16,
        },
    },
}
TASKS = {  # vocabulary, tokens of a block, blocks of a step, steps
    "S": (256, 64, 12, 2000),
    "M": (4096, 512, 8, 1000),
}
RATES = {  # the best learning rates that were found, with Muon
    "S": {"tinymamba": 4e-3, "llama": 2e-3, "mamba2": 8e-3},
    "M": {"tinymamba": 8e-3, "llama": 4e-3, "mamba2": 8e-3},
}
WARMUP = 100  # steps


@dataclass
class Options:
    """The command line. `task` is an argument without a flag."""

    task: str

    # Data
    text: list[str] | None = None  # for S: two files, to train on and to validate on
    data: str = "data/text"  # for M: folder with train.bin and val.bin
    validation_tokens: int = 2**18  # validation tokens at most

    # Runs
    models: list[str] | None = None  # None means all of these
    seeds: list[int] | None = None  # random seeds of every model; None means 0 1 2
    lr: list[float] | None = None  # peak learning rates; None means each model's best
    optimizer: str = "muon"  # muon for matrices and AdamW for the rest, or adamw for all
    weight_decay: float = 0.0  # weight decay of matrices
    steps: int = 0  # updates; 0 means the task's own number
    threads: int = 0  # CPU threads; 0 means all
    output: str = "quality.jsonl"  # file of rows

    CHOICES: ClassVar = {"models": tuple(SHAPES["S"]), "optimizer": ("muon", "adamw")}


# ------------------------------------------------------------------------------------ models


def build(task: str, name: str) -> torch.nn.Module:
    """A model with random weights."""
    vocab, block, _, _ = TASKS[task]
    shape: dict[str, Any] = {**SHAPES[task][name]}
    if name == "tinymamba":
        return TinyMambaModel(Config(vocab_size=vocab, dropout=0.0, bias=False, **shape))
    transformers = need("transformers")
    transformers.logging.set_verbosity_error()  # Mamba2 warns at length of missing CUDA kernels
    common = {"vocab_size": vocab, "tie_word_embeddings": True, "use_cache": False}
    if name == "llama":
        config = transformers.LlamaConfig(**common, **shape, max_position_embeddings=block)
        return transformers.LlamaForCausalLM(config)
    config = transformers.Mamba2Config(**common, **shape, n_groups=1, chunk_size=64)
    return transformers.Mamba2ForCausalLM(config)


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """(b, l) -> (b, l, v), float32."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        out = model(ids)
    return (out if isinstance(out, torch.Tensor) else out.logits).float()


# ------------------------------------------------------------------------------------ data


def load_data(options: Options) -> tuple[Tensor, Tensor, float]:
    """Training and validation tokens, and the average number of bytes per validation token."""
    vocab, last = TASKS[options.task][0], options.validation_tokens + 1
    if options.task == "S":
        text, remedy = options.text or [], "pass --text TRAIN VALIDATION"
        require(len(text) == 2, "--text", "S needs two files", remedy)
        for path in text:
            require(Path(path).is_file(), path, "no such file", "pass two files of text")
        train, val = (np.fromfile(path, dtype=np.uint8).astype(np.int64) for path in text)
        return torch.from_numpy(train), torch.from_numpy(val[:last]), 1.0
    files = [TokenFile(f"{options.data}/{name}.bin", "auto") for name in ("train", "val")]
    ids, val_ids = (torch.from_numpy(f.read(0, f.length).astype(np.int64)) for f in files)
    facts, remedy = read_sidecar(files[1].path), f"python data/prepare.py --vocab_size {vocab}"
    require(int(ids.max()) < vocab, "--data", f"has ids of {vocab} and more", remedy)
    return ids, val_ids[:last], facts["bytes"] / facts["tokens"]


# ------------------------------------------------------------------------------- measurements


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the losses of all tokens."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def blockwise(model: torch.nn.Module, val: Tensor, block: int) -> float:
    """Nats per token of validation data, cut into independent blocks."""
    count = (len(val) - 1) // block * block
    x, y = val[:count].view(-1, block), val[1 : count + 1].view(-1, block)
    step, total = max(1, 2**14 // block), torch.zeros((), device=val.device)
    for a, b in zip(x.split(step), y.split(step), strict=True):
        total += summed_loss(logits_of(model, a), b)
    return total.item() / count


@torch.no_grad()
def read_through(model: torch.nn.Module, val: Tensor, block: int) -> float:
    """Nats per token of validation data read as 16 long texts."""
    rows, stride = 16, block // 8
    length = (len(val) - 1) // rows // block * block
    x, y = (val[i : i + rows * length].view(rows, length) for i in (0, 1))
    total = torch.zeros(())
    if isinstance(model, TinyMambaModel):
        state = model.init_state(rows)
        for a, b in zip(x.split(1024, 1), y.split(1024, 1), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                logits, state = model.advance(a, state)
            total += summed_loss(logits, b)
        return total.item() / y.numel()
    windows = [(0, block, 0)]  # begin, end, first counted token
    windows += [(i - block, i, block - stride) for i in range(block + stride, length + 1, stride)]
    for begin, end, first in windows:
        logits = logits_of(model, x[:, begin:end])[:, first:]
        total += summed_loss(logits, y[:, begin + first : end])
    return total.item() / y.numel()


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


def train(model: torch.nn.Module, data: Tensor, options: Options, seed: int, lr: float) -> None:
    """The recipe that all models share: linear warm-up, cosine to zero, clipping at 1."""
    _, block, batch, steps = TASKS[options.task]
    steps = options.steps or steps
    config = Config(lr=lr, optimizer=options.optimizer, weight_decay=options.weight_decay)
    optimizer, random = make_optimizer(model, config), torch.Generator().manual_seed(1000 + seed)
    start = time.perf_counter()
    for step in range(steps):
        window = random_window(data, batch, block, random)
        loss = update(model, optimizer, window, lr * schedule(step, steps, WARMUP))
        if (step + 1) % (steps // 10 or 1) == 0:
            spent = time.perf_counter() - start
            print(f"  step {step + 1:5d}  loss {loss:.4f}  {spent:.0f} s", flush=True)


# ------------------------------------------------------------------------------------ runs


def run(options: Options, data: tuple, name: str, seed: int, lr: float) -> dict:
    """Train and validate one model; returns the row."""
    torch.manual_seed(seed)
    model, (tokens, val, bytes_per_token) = build(options.task, name), data
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{options.task}  {name}  {parameters:,} parameters  seed {seed}  lr {lr}", flush=True)
    start = time.perf_counter()
    train(model, tokens, options, seed, lr)
    seconds = time.perf_counter() - start
    model.eval()
    block = TASKS[options.task][1]
    nats = {"": blockwise(model, val, block), "_read": read_through(model, val, block)}
    row: dict[str, Any] = {
        "task": options.task,
        "model": name,
        "seed": seed,
        "lr": lr,
        "optimizer": options.optimizer,
        "parameters": parameters,
        "seconds": round(seconds, 1),
    }
    for kind, value in nats.items():
        row[f"nats_per_token{kind}"] = round(value, 5)
        row[f"bits_per_byte{kind}"] = round(value / math.log(2) / bytes_per_token, 5)
    return row


def parse(argv: list[str] | None) -> Options:
    """The command line, checked."""
    usage = "python -m benchmarks.quality S|M [--FLAG VALUE ...]"
    parser = CliParser(usage=usage, description=__doc__)
    parser.add_argument("task", choices=TASKS, help="S: 0.8M parameters; M: 10M")
    add_flags(parser, Options)
    return make_options(Options, parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    data = load_data(options)
    for seed in options.seeds or [0, 1, 2]:
        for name in options.models or list(SHAPES["S"]):
            for lr in options.lr or [RATES[options.task][name]]:
                append_row(options.output, run(options, data, name, seed, lr))
    return 0


if __name__ == "__main__":
    run_cli(main)
