"""Tasks that distinguish architectures: recall, copying over a long distance, counting.

    python -m benchmarks.synthetic mqar --d_model 64 --length 512 --pairs 64
    python -m benchmarks.synthetic induction --read 256 4096 65536 1048576
    python -m benchmarks.synthetic parity --seeds 0 1 2
    python -m benchmarks.synthetic parity --model llama        # or mamba2, of equal size

mqar: multi-query associative recall (Zoology, arXiv 2312.04927, appendix E.1): pairs of a key and a
value, then the keys again far apart, among zeros; the answer to each key is its value. A quarter
each of the training tokens are in texts of the full length, and of a half, a quarter and an eighth.
induction: a marker somewhere, a token after it, the marker again at the very end; the answer is the
token (Mamba, arXiv 2312.00752, section 4.1.2). Trained on 32 to 256 tokens, read on 4,096 or more.
parity: is the number of ones so far odd? (Mamba-3, arXiv 2603.15569, section 4.3). Trained on up to
40 bits, read on 256: decays between 0 and 1 cannot count, a state that rotates can.

Every run appends its row to --output.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from testv2 import Config, TinyMambaModel, make_optimizer
from tinymamba.cli import CliParser, add_flags, make_options, need, require, run_cli

VOCABULARY = {"mqar": 8192, "induction": 16, "parity": 3}
STEPS = {"mqar": 3000, "induction": 3000, "parity": 3000}
BATCH = {"mqar": 64, "induction": 32, "parity": 128}
IGNORE = -100
AT_ONCE, CHUNK = 4096, 16384  # most tokens read in one pass; longer texts are read in chunks


@dataclass
class Options:
    """The command line. `task` is an argument without a flag."""

    task: str

    # Model
    model: str = "tinymamba"  # llama and mamba2 are those of transformers, of equal size
    d_model: int = 64  # width
    n_layer: int = 2  # blocks; the peers get two layers for each
    d_state: int = 64  # size of the SSM's state
    window_size: int = 32  # attention window in tokens

    # Task
    length: int = 256  # tokens of an mqar text
    pairs: int = 16  # pairs of an mqar text
    vocab_size: int = 0  # 0 means the task's: 8192, 16, 3

    # Runs
    steps: int = 0  # updates; 0 means the task's own number
    batch_size: int = 0  # texts in a step; 0 means the task's own number
    test_samples: int = 256  # texts to read after training
    log_interval: int = 200  # steps between printed lines
    threads: int = 0  # CPU threads; 0 means all
    read: list[int] | None = None  # lengths to read after training; None means the task's
    seeds: list[int] | None = None  # random seeds; None means 0
    lr: float = 4e-3  # peak learning rate
    optimizer: str = "muon"  # muon for matrices and AdamW for the rest, or adamw for all
    bf16: bool = False  # autocast to bfloat16
    output: str = "synthetic.jsonl"  # file of rows

    CHOICES: ClassVar = {"model": ("tinymamba", "llama", "mamba2"), "optimizer": ("muon", "adamw")}


# ------------------------------------------------------------------------------------ tasks


def mqar(
    batch: int, length: int, pairs: int, vocab: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids and targets (b, l): the second half of the vocabulary are values."""
    half, space = vocab // 2, (length - 2 * pairs) // 2
    keys = 1 + torch.rand(batch, half - 1, generator=random).argsort(1)[:, :pairs]
    values = half + torch.rand(batch, half, generator=random).argsort(1)[:, :pairs]
    ids = torch.zeros(batch, length + 1, dtype=torch.int64)
    ids[:, : 2 * pairs] = torch.stack((keys, values), dim=2).flatten(1)
    gaps = torch.arange(1, space + 1) ** (0.01 - 1.0)  # most keys come again soon, some late
    at = 2 * pairs + 2 * torch.multinomial(gaps.expand(batch, -1), pairs, generator=random)
    ids.scatter_(1, at, keys)
    targets = torch.full_like(ids, IGNORE).scatter_(1, at, values)
    return ids[:, :length], targets[:, :length]


def induction(
    batch: int, length: int, vocab: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids and targets (b, l): the marker is id 0, the only target is at the end."""
    ids = torch.randint(1, vocab, (batch, length), generator=random)
    at = torch.randint(length - 2, (batch, 1), generator=random)
    ids.scatter_(1, at, 0)
    ids[:, -1] = 0
    targets = torch.full_like(ids, IGNORE)
    targets[:, -1:] = ids.gather(1, at + 1)
    return ids, targets


def parity(batch: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and targets (b, 1+l): id 2, then bits; is the number of ones so far odd?"""
    bits = torch.randint(2, (batch, length), generator=random)
    ids = F.pad(bits, (1, 0), value=2)
    return ids, F.pad(bits.cumsum(1) % 2, (1, 0), value=IGNORE)


def draw(
    options: Options, random: torch.Generator, length: int | None = None, batch: int | None = None
) -> tuple[Tensor, Tensor]:
    """A batch of the task, for training unless a length is given."""
    batch = batch or options.batch_size
    easier = int(torch.randint(4, (), generator=random))  # mixes in texts of 1/2, 1/4, 1/8 length
    if options.task == "mqar":
        easier = 0 if length else easier
        pairs = max(1, options.pairs >> easier)
        return mqar(batch << easier, options.length >> easier, pairs, options.vocab_size, random)
    if options.task == "induction":
        return induction(batch, length or 256 >> easier, options.vocab_size, random)
    return parity(batch, length or int(torch.randint(3, 41, (), generator=random)), random)


# ------------------------------------------------------------------------------------ models


def build(options: Options) -> torch.nn.Module:
    """The model, or a peer from transformers of the same width and depth."""
    width, heads = options.d_model, max(1, options.d_model // 32)
    if options.model == "tinymamba":
        config = Config(
            d_model=width,
            n_layer=options.n_layer,
            num_heads=heads,
            vocab_size=options.vocab_size,
            dropout=0.0,
            d_state=options.d_state,
            window_size=options.window_size,
            bias=False,
            ssm_head_dim=32,
        )
        return TinyMambaModel(config)
    hf = need("transformers")
    common = {
        "vocab_size": options.vocab_size,
        "hidden_size": width,
        "num_hidden_layers": 2 * options.n_layer,
        "use_cache": False,
        "tie_word_embeddings": True,
    }
    if options.model == "llama":
        shape = {"num_attention_heads": heads, "intermediate_size": 3 * width}
        return hf.LlamaForCausalLM(hf.LlamaConfig(**common, **shape))
    shape = {"num_heads": 2 * width // 32, "head_dim": 32, "n_groups": 1, "chunk_size": 64}
    return hf.Mamba2ForCausalLM(hf.Mamba2Config(**common, **shape, state_size=options.d_state))


def answers(
    model: torch.nn.Module, ids: Tensor, targets: Tensor, bf16: bool
) -> tuple[Tensor, Tensor]:
    """Logits (n, v) and targets (n,) of the n positions that have a target."""
    asked = targets != IGNORE
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if isinstance(model, TinyMambaModel):
            logits = model.head(model.run(ids)[0][asked])
        else:
            logits = model.lm_head(model.base_model(input_ids=ids).last_hidden_state[asked])
    return logits.float(), targets[asked]


def share_right(logits: Tensor, targets: Tensor) -> float:
    """The share of right answers."""
    return (logits.argmax(-1) == targets).float().mean().item()


@torch.no_grad()
def accuracy(model: torch.nn.Module, options: Options, length: int) -> float:
    """The share of right answers on new texts of `length` tokens; long ones are read in chunks."""
    random = torch.Generator().manual_seed(10**6 + length)
    model.eval()
    if length <= AT_ONCE:
        texts = draw(options, random, length, options.test_samples)
        return share_right(*answers(model, *texts, options.bf16))
    problem = f"{options.model} cannot read {length} tokens in one pass"
    ours = isinstance(model, TinyMambaModel)
    require(ours, "--read", problem, f"read at most {AT_ONCE}")
    ids, targets = draw(options, random, length, min(options.test_samples, 16))
    state = model.init_state(len(ids))
    for chunk in ids.split(CHUNK, dim=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            logits, state = model.advance(chunk, state, last_only=True)
    return share_right(logits[:, -1], targets[:, -1])


# ------------------------------------------------------------------------------------ runs


def train(options: Options, seed: int) -> dict:
    """Train and test once; returns the row."""
    torch.manual_seed(seed)
    model, random = build(options), torch.Generator().manual_seed(seed)
    config = Config(lr=options.lr, weight_decay=0.0, optimizer=options.optimizer)
    optimizer, start = make_optimizer(model, config), time.perf_counter()
    for step in range(options.steps):
        rate = min(1.0, (step + 1) / 100, 1.25 * (1 - step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        model.train()
        logits, targets = answers(model, *draw(options, random), options.bf16)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % options.log_interval == 0:
            right, spent = share_right(logits, targets), time.perf_counter() - start
            numbers = f"loss {loss.item():.4f}  right {right:.3f}  {spent:.0f} s"
            print(f"seed {seed}  step {step + 1}  {numbers}", flush=True)
    read = {n: round(accuracy(model, options, n), 4) for n in options.read or ()}
    return {
        **dataclasses.asdict(options),
        "seed": seed,
        "loss": loss.item(),
        "accuracy": read,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - start),
    }


def parse(argv: list[str] | None = None) -> Options:
    """The command line, checked and completed."""
    usage = "python -m benchmarks.synthetic mqar|induction|parity [--FLAG VALUE ...]"
    parser = CliParser(usage=usage, description=__doc__)
    parser.add_argument("task", choices=STEPS, help="see above")
    add_flags(parser, Options)
    options = make_options(Options, parser.parse_args(argv))
    task, length, pairs = options.task, options.length, options.pairs
    problem = f"{length} tokens do not hold {pairs} pairs twice"
    require(length >= 4 * pairs, "--length", problem, f"it must be at least {4 * pairs}")
    lengths = {"mqar": [length], "induction": [256, 4096], "parity": [40, 256]}[task]
    return dataclasses.replace(
        options,
        vocab_size=options.vocab_size or VOCABULARY[task],
        steps=options.steps or STEPS[task],
        batch_size=options.batch_size or BATCH[task],
        read=options.read or lengths,
        seeds=options.seeds or [0],
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    for seed in options.seeds or ():
        row = train(options, seed)
        with open(options.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        about = f"{options.task}  {options.model}  seed {seed}"
        print(f"{about}  accuracy by length {row['accuracy']}")
    return 0


if __name__ == "__main__":
    run_cli(main)
