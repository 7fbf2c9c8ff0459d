"""What a model remembers: recall, counting, induction and copying over a long distance.

    python -m benchmarks.memory recall_far                       # several models, rates and seeds
    python -m benchmarks.memory recall_window --window_size 32
    python -m benchmarks.memory parity --models tinymamba --lr 4e-3 --seeds 0
    python -m benchmarks.memory far_copy --models tinymamba llama_conv  # after data/prepare.py
    python -m benchmarks.memory induction --models tinymamba --variant "memory=false d_state=64"
    python -m benchmarks.memory --table docs/benchmarks.md       # of all rows so far

recall_far, recall_window: keys that come again, most of them farther back than the attention of all
blocks reaches. parity, mod5, s5, s5_swaps: the product of all tokens so far; trained on 3 to
--length tokens, all positions count. induction: one token from anywhere in the text; trained on
--length tokens or a half, a quarter or an eighth of them. far_copy: the built-in corpus with a
passage of 64 tokens repeated 200 to 800 later. memory_tasks.py has their texts.

The peers (peers.py) have the parameters of TinyMamba within 1%, and attention to all tokens, which
is enough for recall. In training half of the tokens of recall are in shorter texts.

Each run appends a row to --output. `accuracy` is by length, over all answers; `far` only over those
out of reach of TinyMamba's attention and convolutions; `steps_to_half` is when half of these were
right for the first time. `dt` is the largest step of every head of the SSM, block by block, on
tokens that induction does not need: 0 leaves the state as it is. `loss` is the mean of the last 50
training steps, `copy_loss` that of a repeated passage without its first 4 tokens.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import testv2
from benchmark import append_row
from benchmarks import memory_tasks, quality
from benchmarks.memory_tasks import GROUPS, IGNORE
from benchmarks.peers import (
    MODELS,
    build_peer,
    build_tinymamba,
    count,
    peer_shape,
    require_variant_of_ours,
)
from benchmarks.report import Column, finite, read_rows, require_task, sweep_table, write_between
from testv2 import Config, TinyMambaModel, make_optimizer
from tinymamba.cli import CliParser, add_flags, make_options, require, run_cli

AT_ONCE, PASS = 4096, 2**17  # most tokens of a text that is read at once, and of a forward pass
FEWEST, MOST = 8, 2**18  # texts of a test; tokens of a test that has more texts than that
EVERY, CHECKED = 100, 64  # steps between looks at recall, and the texts of a look

# ------------------------------------------------------------------------------------ tasks

ALL = ["tinymamba", "llama_conv", "llama_start", "mamba2", "gated_delta"]
FAST = ["tinymamba", "llama_conv", "llama_start", "gated_delta"]  # mamba2 takes far longer on a CPU
RECALL = {
    "models": ALL,
    "d_model": 64,
    "n_layer": 2,
    "d_state": 64,
    "vocab_size": 256,
    "batch_size": 16,
    "lr": [2e-3, 4e-3, 8e-3],
    "seeds": [0, 1, 2],
}
COUNTING = {
    "models": ALL,
    "d_model": 32,
    "n_layer": 1,
    "d_state": 16,
    "window_size": 8,
    "length": 40,
    "steps": 1000,
    "batch_size": 128,
    "read": [256, 4096, 65536],
    "lr": [2e-3, 4e-3, 8e-3],
    "seeds": [0, 1, 2, 3, 4],
}
S5 = {
    **COUNTING,
    "models": FAST,
    "d_model": 64,
    "n_layer": 2,
    "d_state": 64,
    "length": 64,
    "steps": 3000,
    "batch_size": 64,
}
TASKS: dict[str, dict[str, Any]] = {  # the settings of each; others it does not have
    "recall_far": {**RECALL, "window_size": 8, "length": 128, "pairs": 8, "steps": 1600},
    "recall_window": {
        **RECALL,
        "models": FAST,
        "window_size": 64,
        "length": 256,
        "pairs": 16,
        "steps": 3000,
    },
    "parity": COUNTING,
    "mod5": COUNTING,
    "s5": S5,
    "s5_swaps": S5,
    "induction": {
        "models": FAST,
        "d_model": 64,
        "n_layer": 2,
        "d_state": 16,
        "window_size": 16,
        "length": 256,
        "vocab_size": 16,
        "steps": 1500,
        "batch_size": 32,
        "read": [4096, 65536, 1048576],
        "lr": [1.5e-3, 3e-3, 6e-3],
        "seeds": [0, 1, 2, 3, 4],
    },
    "far_copy": {
        "models": ALL,
        "d_model": 128,
        "n_layer": 2,
        "d_state": 16,
        "window_size": 64,
        "length": 1024,
        "steps": 400,
        "batch_size": 4,
        "bf16": True,
        "lr": [8e-3, 1.6e-2, 3.2e-2],
        "seeds": [0, 1, 2],
    },
}
VOCABULARY = 4096  # of the built-in corpus
HEAD = {"far_copy": 64}  # width of a head, otherwise 32


@dataclass
class Options:
    """The command line. `task` is an argument without a flag."""

    task: str = ""

    # Model; None means the task's own number, here and below
    models: list[str] | None = None  # models to compare
    variant: str = ""  # FIELD=VALUE words that change TinyMamba's Config
    d_model: int | None = None  # width
    n_layer: int | None = None  # blocks; the peers get three layers for two of them, mamba2 four
    d_state: int | None = None  # size of the SSM's state; mamba2 gets a larger one
    window_size: int | None = None  # attention window in tokens, of TinyMamba only

    # Task
    length: int | None = None  # tokens of a training text, at most
    pairs: int | None = None  # pairs of a key and a value in a text, for recall
    vocab_size: int | None = None  # ids, for recall and induction
    data: str = "data/text"  # for far_copy: folder with train.bin and val.bin

    # Runs
    lr: list[float] | None = None  # peak learning rates to try
    seeds: list[int] | None = None  # random seeds
    steps: int | None = None  # updates
    batch_size: int | None = None  # texts in a step; of recall, if they have the full length
    optimizer: str = "muon"  # muon for matrices and AdamW for the rest, or adamw for all
    bf16: bool | None = None  # autocast to bfloat16
    read: list[int] | None = None  # lengths to read after training, for counting and induction
    test_samples: int = 256  # texts to read after training; fewer if they are long
    log_interval: int = 200  # steps between printed lines
    threads: int = 0  # CPU threads; 0 means all

    # Rows
    output: str = "memory.jsonl"  # file of rows
    table: str | None = None  # Markdown file to write all rows of --output into

    CHOICES: ClassVar = {"models": MODELS, "optimizer": ("muon", "adamw")}
    LIMITS: ClassVar = {
        **dict.fromkeys(("d_model", "n_layer", "d_state", "window_size"), (1, math.inf)),
        **dict.fromkeys(("steps", "batch_size", "test_samples", "log_interval"), (1, math.inf)),
        **dict.fromkeys(("length", "read"), (4, math.inf)),
        **dict.fromkeys(("pairs", "vocab_size"), (1, math.inf)),
    }

    @property
    def is_recall(self) -> bool:
        """Whether the texts are those of mqar."""
        return self.task.startswith("recall")

    @property
    def reach(self) -> int:
        """How many tokens back TinyMamba reads without the state of its SSM, at most."""
        return memory_tasks.reach(self.n_layer or 0, self.window_size or 0, Config.d_conv)


SETTINGS = [  # fields that stand in a row
    *("d_model", "n_layer", "d_state", "window_size", "length", "pairs", "vocab_size", "steps"),
    *("batch_size", "optimizer", "bf16", "read", "test_samples"),
]


def draw(options: Options, random: torch.Generator, length: int = 0, batch: int = 0) -> Any:
    """Ids and targets (b, l): for training unless a length is given."""
    o: Any = options
    batch = batch or o.batch_size
    if o.task in GROUPS:
        length = length or int(torch.randint(3, o.length + 1, (), generator=random))
        return memory_tasks.counting(batch, length, GROUPS[o.task], random)
    easier = 0 if length else int(torch.randint(4, (), generator=random))
    if o.task == "induction":
        return memory_tasks.induction(batch, length or o.length >> easier, o.vocab_size, random)
    pairs = max(1, o.pairs >> easier)
    return memory_tasks.mqar(batch << easier, o.length >> easier, pairs, o.vocab_size, random)


# ------------------------------------------------------------------------------------ models


def config_of(options: Options) -> Config:
    """TinyMamba's settings."""
    o: Any = options
    vocab, head = o.vocab_size or VOCABULARY, HEAD.get(o.task, 32)
    if o.task in GROUPS:
        vocab = len(GROUPS[o.task].product) + 1
    return Config(
        d_model=o.d_model,
        n_layer=o.n_layer,
        num_heads=max(1, o.d_model // head),
        vocab_size=vocab,
        dropout=0.0,
        d_state=o.d_state,
        window_size=o.window_size,
        bias=False,
        ssm_head_dim=head,
    ).validate()


def build(options: Options, name: str) -> nn.Module:
    """A model with random weights."""
    config = config_of(options)
    if name == "tinymamba":
        return build_tinymamba(config, options.variant)
    return build_peer(name, peer_shape(name, config))


def answers(
    model: nn.Module, ids: Tensor, targets: Tensor, bf16: bool, state: Any = None
) -> tuple[Tensor, Tensor, Any]:
    """Logits (n, v) and targets (n,) of the n positions that have one; TinyMamba's new state."""
    asked = targets != IGNORE
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if isinstance(model, TinyMambaModel):
            hidden, state, _ = model.run(ids, state)
            logits = model.head(hidden[asked])
        else:
            logits = model.lm_head(model.base_model(input_ids=ids).last_hidden_state[asked])
    return logits.float(), targets[asked], state


# ------------------------------------------------------------------------------- measurements


@torch.no_grad()
def right_answers(model: nn.Module, options: Options, ids: Tensor, targets: Tensor) -> Tensor:
    """Which answers are right, of bool (n,): text by text if they are read at once."""
    rows = max(1, PASS // ids.shape[1])
    if ids.shape[1] <= AT_ONCE:
        pieces = zip(ids.split(rows), targets.split(rows), strict=True)
        found = [answers(model, i, t, bool(options.bf16)) for i, t in pieces]
        return torch.cat([logits.argmax(-1) == wanted for logits, wanted, _ in found])
    right, state, size = [], model.init_state(len(ids)), max(1, PASS // len(ids))
    for i, t in zip(ids.split(size, 1), targets.split(size, 1), strict=True):
        logits, wanted, state = answers(model, i, t, bool(options.bf16), state)
        right.append(logits.argmax(-1) == wanted)
    return torch.cat(right)


def share(right: Tensor) -> float | None:
    """The share that is True; None of nothing."""
    return round(right.double().mean().item(), 7) if len(right) else None


def accuracy(model: nn.Module, options: Options, length: int) -> float | None:
    """The share of right answers on new texts of `length` tokens; long ones are read in chunks."""
    random = torch.Generator().manual_seed(10**6 + length)
    batch = min(options.test_samples, max(FEWEST, MOST // length))
    return share(right_answers(model, options, *draw(options, random, length, batch)))


def recall(model: nn.Module, options: Options, texts: int) -> tuple[float | None, float | None]:
    """The share of right answers, and the share of those out of reach of the attention."""
    length = options.length or 0
    random = torch.Generator().manual_seed(10**6 + length)
    ids, targets = draw(options, random, length, texts)
    right = right_answers(model, options, ids, targets)
    back = memory_tasks.distances_to_answers(ids, targets)
    return share(right), share(right[back > options.reach])


@torch.no_grad()
def largest_dt(model: TinyMambaModel, options: Options) -> list[list[float]]:
    """The largest dt of every head of every block on tokens that induction does not need.

    These are all that stand before the marker or out of reach of it.
    """
    steps, scan, length = [], testv2.selective_scan, 4 * (options.length or 0)

    def record(x: Tensor, dt: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        steps.append(dt)  # (b, l, h)
        return scan(x, dt, *rest)

    ids, _ = draw(options, torch.Generator().manual_seed(0), length, FEWEST)
    marker = (ids == 0).int().argmax(1, keepdim=True)
    index = torch.arange(length)
    idle = ((index < marker) | (index > marker + 1 + options.reach)) & (index < length - 1)
    with mock.patch.object(testv2, "selective_scan", record):
        model.run(ids)
    return [[round(v, 5) for v in dt[idle].amax(0).tolist()] for dt in steps]


def copy_losses(model: nn.Module, options: Options, val: Tensor) -> dict[str, float | None]:
    """Nats per token of validation data: of repeated passages, and of everything else."""
    length = options.length or 0
    windows = quality.blocks_of(val, length)
    windows, counts = memory_tasks.repeat_passage(windows, torch.Generator().manual_seed(5))
    losses, counts = quality.token_losses(model, windows, bool(options.bf16)), counts[:, 1:]
    means = {"copy_loss": losses[counts].mean(), "rest_loss": losses[~counts].mean()}
    return {name: finite(mean.item(), 5) for name, mean in means.items()}


def measure(model: nn.Module, options: Options, val: Tensor | None) -> dict[str, Any]:
    """What the task asks of a trained model."""
    model.eval()
    if val is not None:
        return copy_losses(model, options, val)
    if options.is_recall:
        everything, far = recall(model, options, options.test_samples)
        return {"accuracy": {options.length: everything}, "far": far}
    lengths = [n for n in options.read or () if isinstance(model, TinyMambaModel) or n <= AT_ONCE]
    found: dict[str, Any] = {"accuracy": {n: accuracy(model, options, n) for n in lengths}}
    if options.task == "induction" and isinstance(model, TinyMambaModel):
        found["dt"] = largest_dt(model, options)
    return found


# ------------------------------------------------------------------------------------ runs


def rate_of(options: Options, step: int) -> float:
    """The share of the peak learning rate: warm-up, then linear to zero from a fifth on.

    For text it is the schedule of quality.py.
    """
    steps = options.steps or 1
    if options.task == "far_copy":
        return quality.schedule(step, steps, max(1, min(100, steps // 5)))
    return min(1.0, (step + 1) / 100, 1.25 * (1 - step / steps))


def train(
    model: nn.Module,
    options: Options,
    seed: int,
    lr: float,
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """Train; returns the loss and, for recall, when half of the far answers were right."""
    config = Config(lr=lr, weight_decay=0.0, optimizer=options.optimizer)
    optimizer, random = make_optimizer(model, config), torch.Generator().manual_seed(seed)
    losses: list[float] = []
    half, start = None, time.perf_counter()
    for step in range(options.steps or 0):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_of(options, step)
        logits, targets, _ = answers(model.train(), *batch(random), bool(options.bf16))
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if options.is_recall and half is None and (step + 1) % EVERY == 0:
            _, far = recall(model.eval(), options, CHECKED)
            half = step + 1 if far is not None and far >= 0.5 else None
        if (step + 1) % options.log_interval == 0:
            spent = time.perf_counter() - start
            print(f"  step {step + 1:5d}  loss {losses[-1]:.4f}  {spent:.0f} s", flush=True)
    found: dict[str, Any] = {"loss": finite(sum(losses[-50:]) / len(losses[-50:]), 5)}
    return {**found, "steps_to_half": half} if options.is_recall else found


def run(options: Options, name: str, seed: int, lr: float, data: tuple | None) -> dict[str, Any]:
    """Train and test one model; returns the row."""
    torch.manual_seed(seed)
    model = build(options, name)
    print(f"{options.task}  {name}  {count(model):,} parameters  seed {seed}  lr {lr}", flush=True)

    def batch(random: torch.Generator) -> tuple[Tensor, Tensor]:
        if data is None:
            return draw(options, random)
        o: Any = options
        window = quality.random_window(data[0], o.batch_size, o.length, random)
        window, _ = memory_tasks.repeat_passage(window, random)
        return window[:, :-1], window[:, 1:]

    start = time.perf_counter()
    trained = train(model, options, seed, lr, batch)
    seconds = time.perf_counter() - start
    return {
        "task": options.task,
        "model": name,
        "variant": options.variant,
        **{setting: getattr(options, setting) for setting in SETTINGS},
        "seed": seed,
        "lr": lr,
        "parameters": count(model),
        "seconds": round(seconds, 1),
        **trained,
        **measure(model, options, data and data[1]),
    }


def run_all(options: Options) -> None:
    """Every model with every seed and rate."""
    data = None
    if options.task == "far_copy":
        data = quality.load_tokens(options.data, VOCABULARY)
        problem = f"{len(data[1])} tokens are too few to validate on"
        least = (options.length or 0) + 1
        require(len(data[1]) >= least, options.data, problem, f"it needs {least}")
    for seed in options.seeds or ():
        for name in options.models or ():
            for lr in options.lr or ():
                append_row(options.output, run(options, name, seed, lr, data))


# ------------------------------------------------------------------------------------ tables


def accuracy_at(length: int) -> Callable[[dict], float | None]:
    """Reads the accuracy at a length from a row; lengths are texts in JSON."""
    return lambda row: row["accuracy"].get(str(length))


def mean_accuracy(row: dict) -> float | None:
    """The mean over all lengths."""
    values = list(row["accuracy"].values())
    return sum(values) / len(values) if values else None


def smallest_dt(row: dict) -> float | None:
    """The dt of the head that leaves the state most as it is."""
    return min(min(heads) for heads in row["dt"]) if row.get("dt") else None


def columns_of(task: str, rows: list[dict]) -> list[Column]:
    """What the table of a task shows; the first column decides which rate is best."""
    if task == "far_copy":
        copy = Column("copy, nats", lambda row: row["copy_loss"], larger=False)
        return [copy, Column("rest, nats", lambda row: row["rest_loss"], larger=False)]
    if task.startswith("recall"):
        return [
            Column("far", lambda row: row["far"], share=True),
            Column("all", mean_accuracy),
            Column("steps to half", lambda row: row["steps_to_half"], digits=0),
        ]
    lengths = sorted({int(length) for row in rows for length in row["accuracy"]})
    columns = [Column(f"{n:,}", accuracy_at(n), share=True) for n in lengths]
    dt = [Column("smallest dt", smallest_dt, digits=5)] if task == "induction" else []
    return [Column("mean", mean_accuracy, share=True), *columns, *dt]


def tables(rows: list[dict]) -> list[str]:
    """The lines of a table for each task."""
    lines = []
    for task in [name for name in TASKS if any(row["task"] == name for row in rows)]:
        own = [row for row in rows if row["task"] == task]
        defaults = {setting: getattr(complete(Options(task)), setting) for setting in SETTINGS}
        lines += [f"**{task}**", "", *sweep_table(own, columns_of(task, own), defaults), ""]
    return lines[:-1]


# ------------------------------------------------------------------------------------ main


def complete(options: Options) -> Options:
    """The options with the task's own values where the user gave none."""
    own = {"bf16": False, **TASKS[options.task]}
    if options.variant:
        own["models"] = ["tinymamba"]
    for name in ("pairs", "vocab_size", "read"):
        unused, problem = name not in own, f"{options.task} has no such setting"
        asked = getattr(options, name) is not None
        require(not (unused and asked), f"--{name}", problem, "leave it out")
    missing = {name: v for name, v in own.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **missing)


def check(options: Options) -> None:
    """Reject what cannot be run."""
    o: Any = options
    require_variant_of_ours(o.models, o.variant)
    config_of(o)
    for name in set(o.models) - {"tinymamba"}:
        peer_shape(name, config_of(o))
    if o.is_recall:
        problem = f"an eighth of {o.length} tokens does not hold an eighth of {o.pairs} pairs twice"
        least = 4 * max(8, o.pairs)
        require(o.length >= least, "--length", problem, f"it must be at least {least}")
        problem, least = f"{o.vocab_size} ids are too few for {o.pairs} pairs", 2 * o.pairs + 2
        require(o.vocab_size >= least, "--vocab_size", problem, f"it must be at least {least}")
    if o.task == "far_copy":
        least = memory_tasks.PASSAGE + memory_tasks.GAP[1]
        problem, remedy = f"{o.length} tokens are too few", f"it must be at least {least}"
        require(o.length >= least, "--length", problem, remedy)
    if o.task == "induction":
        problem = "an eighth of it is too short for two markers and a token"
        require(o.length >= 32, "--length", problem, "it must be at least 32")


def require_readable(options: Options, named: bool) -> None:
    """Reject lengths that a peer cannot read, if the user named them; else say what is left out.

    A peer reads a text at once, TinyMamba through its state.
    """
    long = [n for n in options.read or () if n > AT_ONCE]
    peers = [name for name in options.models or () if name != "tinymamba"]
    if not long or not peers:
        return
    problem = f"{peers[0]} cannot read {long[0]} tokens at once"
    remedy = f"read at most {AT_ONCE}, or pass --models tinymamba"
    require(not named, "--read", problem, remedy)
    print(f"{', '.join(peers)}: read up to {AT_ONCE} tokens only, as they do it at once")


def parse(argv: list[str] | None = None) -> Options:
    """The command line, checked and completed."""
    usage = f"python -m benchmarks.memory [{'|'.join(TASKS)}] [--FLAG VALUE ...]"
    parser = CliParser(usage=usage, description=__doc__)
    parser.add_argument("task", nargs="?", default="", help="see above")
    add_flags(parser, Options)
    given = make_options(Options, parser.parse_args(argv))
    require_task(given.task, TASKS, given.table, "memory")
    if not given.task:
        return given
    options = complete(given)
    check(options)
    require_readable(options, given.read is not None)
    return options


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.task:
        run_all(options)
    if options.table:
        write_between(options.table, "memory", tables(read_rows(options.output)))
    return 0


if __name__ == "__main__":
    run_cli(main)
