"""Validation loss against transformers' Llama and Mamba2 at equal parameters and equal tokens.

    python benchmarks/quality.py S --text wiki.test.raw wiki.valid.raw  # bytes, 0.8M parameters
    python benchmarks/quality.py M                                      # built-in corpus, 10M
    python benchmarks/quality.py M --models llama --lr 1e-3 2e-3 4e-3   # find a peer's best rate
    python benchmarks/quality.py S --text ... --seeds 0 1 2 --output quality.jsonl

Every model sees the same batches of a seed, the same schedule and the same kind of optimizer: Muon
for matrices and AdamW for the rest, or AdamW for all with --optimizer adamw. S trains on the first
file of --text and validates on the second: 2,000 steps of 12 x 64 bytes. M trains on what
`python data/prepare.py` makes: 1,000 steps of 8 x 512 tokens.

Each run appends a row to --output. `bits_per_byte` is on validation data cut into blocks as in
training. `bits_per_byte_read` is on the same data read as one long text: TinyMamba by its state,
the others by a window of one block that moves on by an eighth of a block.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import append_row  # noqa: E402
from testv2 import Config, TinyMambaModel, TokenFile, make_optimizer, read_sidecar  # noqa: E402
from tinymamba.cli import CliParser, require, run_cli  # noqa: E402

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
RATES = {  # the best that was found, with Muon
    "S": {"tinymamba": 4e-3, "llama": 2e-3, "mamba2": 8e-3},
    "M": {"tinymamba": 8e-3, "llama": 4e-3, "mamba2": 8e-3},
}
WARMUP = 100  # steps


def build(task: str, name: str) -> torch.nn.Module:
    vocab, block, _, _ = TASKS[task]
    shape = SHAPES[task][name]
    if name == "tinymamba":
        return TinyMambaModel(Config(vocab_size=vocab, dropout=0.0, bias=False, **shape))
    import transformers

    transformers.logging.set_verbosity_error()  # Mamba2 warns at length of missing CUDA kernels
    common = {"vocab_size": vocab, "tie_word_embeddings": True, "use_cache": False}
    if name == "llama":
        config = transformers.LlamaConfig(**common, **shape, max_position_embeddings=block)
        return transformers.LlamaForCausalLM(config)
    config = transformers.Mamba2Config(**common, **shape, n_groups=1, chunk_size=64)
    return transformers.Mamba2ForCausalLM(config)


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    """(b, l) -> (b, l, v), float32."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
    return (out if isinstance(out, torch.Tensor) else out.logits).float()


def load_data(args) -> tuple:
    """Training and validation tokens, and the bytes that one validation token stands for."""
    vocab = TASKS[args.task][0]
    if args.task == "S":
        require(args.text, "text", "S needs two files", "pass --text TRAIN VALIDATION")
        for path in args.text:
            require(Path(path).is_file(), path, "no such file", "pass two files of text")
        train, val = (np.fromfile(path, dtype=np.uint8).astype(np.int64) for path in args.text)
        return torch.from_numpy(train), torch.from_numpy(val[: args.validation_tokens + 1]), 1.0
    files = [TokenFile(f"{args.data}/{name}.bin", "auto") for name in ("train", "val")]
    train, val = (torch.from_numpy(f.read(0, f.length).astype(np.int64)) for f in files)
    facts = read_sidecar(files[1].path)
    require(
        int(train.max()) < vocab,
        "data",
        f"has ids of {vocab} and more",
        f"python data/prepare.py --vocab_size {vocab}",
    )
    return train, val[: args.validation_tokens + 1], facts["bytes"] / facts["tokens"]


@torch.no_grad()
def blockwise(model, val: torch.Tensor, block: int) -> float:
    """Nats per token of validation data cut into blocks, each read with nothing before it."""
    count = (len(val) - 1) // block * block
    x, y = val[:count].view(-1, block), val[1 : count + 1].view(-1, block)
    step = max(1, 2**14 // block)
    total = sum(
        F.cross_entropy(logits_of(model, a).flatten(0, 1), b.flatten(), reduction="sum")
        for a, b in zip(x.split(step), y.split(step), strict=True)
    )
    return total.item() / count


@torch.no_grad()
def read_through(model, val: torch.Tensor, block: int) -> float:
    """Nats per token of validation data read as 16 long texts."""
    rows, stride = 16, block // 8
    length = (len(val) - 1) // rows // block * block
    x, y = (val[i : i + rows * length].view(rows, length) for i in (0, 1))
    total = 0.0
    if isinstance(model, TinyMambaModel):
        state = model.init_state(rows)
        for a, b in zip(x.split(1024, 1), y.split(1024, 1), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                logits, state = model.advance(a, state)
            total += F.cross_entropy(logits.float().flatten(0, 1), b.flatten(), reduction="sum")
        return total.item() / y.numel()
    windows = [(0, block, 0)]  # begin, end, first token that counts
    windows += [(i - block, i, block - stride) for i in range(block + stride, length + 1, stride)]
    for begin, end, first in windows:
        logits = logits_of(model, x[:, begin:end])[:, first:]
        total += F.cross_entropy(
            logits.flatten(0, 1), y[:, begin + first : end].flatten(), reduction="sum"
        )
    return total.item() / y.numel()


def train(model, data: torch.Tensor, args, seed: int, lr: float) -> None:
    """The recipe that all models share: linear warm-up, cosine to zero, clipping at 1."""
    _, block, batch, steps = TASKS[args.task]
    steps = args.steps or steps
    config = Config(lr=lr, optimizer=args.optimizer, weight_decay=args.weight_decay)
    optimizer, random = make_optimizer(model, config), torch.Generator().manual_seed(1000 + seed)
    start = time.perf_counter()
    for step in range(steps):
        rate = 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP) / max(1, steps - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(rate, (step + 1) / WARMUP)
        begin = torch.randint(len(data) - block - 1, (batch, 1), generator=random)
        window = data[begin + torch.arange(block + 1)]
        logits = logits_of(model, window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (steps // 10 or 1) == 0:
            print(
                f"  step {step + 1:5d}  loss {loss.item():.4f}  "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )


def run(args, data: tuple, name: str, seed: int, lr: float) -> dict:
    torch.manual_seed(seed)
    model, (tokens, val, bytes_per_token) = build(args.task, name), data
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.task}  {name}  {parameters:,} parameters  seed {seed}  lr {lr}", flush=True)
    start = time.perf_counter()
    train(model, tokens, args, seed, lr)
    seconds = time.perf_counter() - start
    model.eval()
    block = TASKS[args.task][1]
    nats = {"": blockwise(model, val, block), "_read": read_through(model, val, block)}
    row = {
        "task": args.task,
        "model": name,
        "seed": seed,
        "lr": lr,
        "optimizer": args.optimizer,
        "parameters": parameters,
        "seconds": round(seconds, 1),
    }
    for kind, value in nats.items():
        row[f"nats_per_token{kind}"] = round(value, 5)
        row[f"bits_per_byte{kind}"] = round(value / math.log(2) / bytes_per_token, 5)
    return row


def main() -> None:
    parser = CliParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--text", nargs=2, help="for S: text to train on, text to validate on")
    parser.add_argument("--data", default="data/text", help="for M: folder of .bin [data/text]")
    parser.add_argument("--models", nargs="+", choices=SHAPES["S"], default=list(SHAPES["S"]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", nargs="+", type=float, help="peak rates [each model's best]")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--weight_decay", type=float, default=0.0, help="of matrices [0.0]")
    parser.add_argument("--steps", type=int, default=0, help="0 takes the task's")
    parser.add_argument("--validation_tokens", type=int, default=2**18, help="at most [262144]")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--output", default="quality.jsonl", help="file of rows [quality.jsonl]")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = load_data(args)
    for seed in args.seeds:
        for name in args.models:
            for lr in args.lr or [RATES[args.task][name]]:
                append_row(args.output, run(args, data, name, seed, lr))


if __name__ == "__main__":
    run_cli(main)
