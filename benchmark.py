"""TinyMamba against standard models of the same size: speed, memory, perplexity and tasks.

    python benchmark.py --benchmark_type training --sequence_lengths 512 2048 8192
    python benchmark.py --benchmark_type inference memory --models_to_compare llama mamba2
    python benchmark.py --preset small --compile both --device cuda --generate_plots
    python benchmark.py --benchmark_type perplexity --tinymamba_checkpoint model.pt \\
        --eval_dataset ./data/text/val.bin
    python benchmark.py --benchmark_type lm_eval --tinymamba_checkpoint model.pt --tasks piqa
    python benchmark.py --tinymamba_checkpoint model.pt --force    # everything
    python benchmark.py --help

Peers come from `transformers` (and `mambapy`, if installed) with random weights and the parameter
count of the TinyMamba at hand, within 2%. In every round each model runs once, in turn, on the
same random ids; medians count.

    training    a whole step: forward, loss, backward, clipping, AdamW
    inference   prefill: one forward pass over a prompt, logits at every position, no gradients
                decode: time per token after that prompt, with a state or KV cache; never compiled
                (a growing cache would be compiled anew for every token)
    memory      by how much one training step raises the peak, in a process of its own; on Linux
                and CUDA exact, on macOS too low by up to one set of gradients; never compiled
    perplexity  of the checkpoint alone: untrained peers have none
    lm_eval     the checkpoint's marks in tasks of lm-evaluation-harness, if installed

Results go to results.json and results.md in --output_dir, plots beside them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import time
import typing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testv2 import PRESETS, Config, StreamingTokenDataset, TinyMambaModel, load_model, read_sidecar
from tinymamba.checkpoint import atomic_write, load_checkpoint, require_writable
from tinymamba.cli import DTYPES, CliParser, UserError, need, require, run_cli, show
from tinymamba.runtime import pick_amp_dtype, pick_device, why_no_compile
from tinymamba.tokenizer import open_tokenizer

DEFAULT = {"d_model": 320, "n_layer": 5, "vocab_size": 4096, "num_heads": 5, "bias": False}
TOLERANCE = 0.02  # share by which a peer's parameter count may differ
DECODE_TOKENS = 16  # tokens that one decoding run is timed over
MEASURES = {  # benchmark: the key in its rows that counts, what it is
    "training": ("median", "Training, tokens per second"),
    "prefill": ("median", "Prefill, tokens per second"),
    "decode": ("median", "Decoding, tokens per second"),
    "memory": ("bytes_per_token", "Peak memory of a training step, bytes per token"),
    "perplexity": ("nats_per_token", "Loss, nats per token"),
    "lm_eval": ("value", "Tasks of lm-evaluation-harness"),
}
CHECKPOINTS_ALONE = {"perplexity", "lm_eval"}
OUTPUTS = ("results.json", "results.md", *(f"{name}.png" for name in MEASURES))

# -------------------------------------------------------------------------------- contestants


class Contestant:
    """A model behind the calls that are timed. It is built when first used.

    ids are (b, l) of int64; `call` is the model or its compiled form.
    """

    def __init__(self, make, device: torch.device, facts: dict):
        self.make, self.device = make, device
        self.facts = facts  # parameters, layers, width

    @functools.cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(Config.seed)
        return self.make().to(self.device)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        betas, decay = (Config.beta1, Config.beta2), Config.weight_decay
        return torch.optim.AdamW(
            self.model.parameters(), Config.lr, betas, weight_decay=decay, fused=True
        )

    def loss(self, call, ids: Tensor) -> Tensor:
        return call(ids, ids.roll(-1, 1))

    def logits(self, call, ids: Tensor) -> Tensor:
        return call(ids)


class TinyMamba(Contestant):
    def read(self, ids: Tensor):
        """The state after a prompt."""
        return self.model.advance(ids, self.model.init_state(len(ids)), last_only=True)[1]

    def step(self, token: Tensor, state):
        """The state after one token (b, 1) more, whose logits are made too."""
        return self.model.advance(token, state)[1]


class HuggingFace(Contestant):
    """A causal model of transformers. It shifts labels itself, and changes its cache in place."""

    def loss(self, call, ids: Tensor) -> Tensor:
        return call(input_ids=ids, labels=ids, use_cache=False).loss

    def logits(self, call, ids: Tensor) -> Tensor:
        return call(input_ids=ids, use_cache=False).logits

    def read(self, ids: Tensor):
        return self.step(ids, None)

    def step(self, token: Tensor, cache):
        name = "cache_params" if self.model.config.model_type == "mamba2" else "past_key_values"
        return self.model(input_ids=token, use_cache=True, **{name: cache})[name]


class MambaPy(Contestant):
    def read(self, ids: Tensor):
        """Token by token: mambapy has no other way from a prompt to a state."""
        c = self.model.core.config
        tail = torch.zeros(len(ids), c.d_inner, c.d_conv - 1, device=ids.device)
        caches = [(None, tail) for _ in range(c.n_layers)]
        for token in ids.split(1, dim=1):
            caches = self.step(token, caches)
        return caches

    def step(self, token: Tensor, caches):
        return self.model.step(token, caches)


# -------------------------------------------------------------------------- peers of equal size


class MambaPyLM(nn.Module):
    """A language model around mambapy's core: its own `lm` does not import without CUDA."""

    def __init__(self, config: Config, positions: int, layers: int, width: int):
        super().__init__()
        library = need("mambapy.mamba")
        shape = library.MambaConfig(config.d_model, layers)
        shape.d_inner = width
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.core = library.Mamba(shape)
        self.norm = library.RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.head(self.norm(self.core(self.embedding(ids))))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def step(self, token: Tensor, caches):
        x, caches = self.core.step(self.embedding(token[:, 0]), caches)
        self.head(self.norm(x))
        return caches


def make_llama(config: Config, positions: int, layers: int, width: int) -> nn.Module:
    hf = need("transformers")
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=positions,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
        )
    )


def make_gpt2(config: Config, positions: int, layers: int, width: int) -> nn.Module:
    hf = need("transformers")
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.d_model,
            n_inner=width,
            n_layer=layers,
            n_head=config.num_heads,
            n_positions=positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
            tie_word_embeddings=config.tie_embeddings,
        )
    )


def make_mamba2(config: Config, positions: int, layers: int, width: int) -> nn.Module:
    hf = need("transformers")
    importlib.import_module("transformers.utils.logging").set_verbosity_error()  # "no kernels"
    head = math.gcd(64, 2 * config.d_model)
    return hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            state_size=width,
            expand=2,
            num_hidden_layers=layers,
            num_heads=2 * config.d_model // head,
            head_dim=head,
            n_groups=1,
            tie_word_embeddings=config.tie_embeddings,
        )
    )


class Peer(NamedTuple):
    kind: type[Contestant]
    make: typing.Callable  # (config, positions, layers, width) -> model
    width: typing.Callable  # d_model -> usual width: of the MLP, Mamba-2's state, Mamba's channels


PEERS = {
    "llama": Peer(HuggingFace, make_llama, lambda d: 8 * d // 3),
    "gpt2": Peer(HuggingFace, make_gpt2, lambda d: 4 * d),
    "mamba2": Peer(HuggingFace, make_mamba2, lambda d: 128),
    "mambapy": Peer(MambaPy, MambaPyLM, lambda d: 2 * d),
}


def count(make, *args) -> int:
    """Parameters of the model that `make(*args)` gives, shared ones once; none are allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(*args).parameters())


def fit(name: str, config: Config, positions: int, target: int) -> dict:
    """The layers nearest to `target` parameters, then the width that comes within TOLERANCE."""
    usual, tried = PEERS[name].width(config.d_model), []
    size = functools.partial(count, PEERS[name].make, config, positions)
    one, two = size(1, usual), size(2, usual)
    nearest = max(1, 1 + round((target - one) / (two - one)))
    for layers in (nearest, max(1, nearest - 1)):
        base = size(layers, usual)
        slope = size(layers, usual + 1) - base
        for multiple in (64, 8, 1):  # round widths are the fast ones
            width = max(1, round((usual + (target - base) / slope) / multiple)) * multiple
            total = base + (width - usual) * slope
            tried.append(total)
            if abs(total / target - 1) <= TOLERANCE:
                return {"parameters": total, "layers": layers, "width": width}
    best = min(tried, key=lambda total: abs(total - target))
    problem = f"{name} cannot have {target:,} parameters within {TOLERANCE:.0%} (best: {best:,})"
    raise UserError("models_to_compare", problem, "leave it out, or change the size or the lengths")


def make_tinymamba(args: argparse.Namespace) -> TinyMambaModel:
    if not args.tinymamba_checkpoint:
        return TinyMambaModel(args.config)
    model = load_model(args.tinymamba_checkpoint)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # as in the peers
    return model


def make_contestants(args: argparse.Namespace) -> dict[str, Contestant]:
    """TinyMamba and the peers, by name."""
    positions = max(args.lengths) + DECODE_TOKENS
    target = count(TinyMambaModel, args.config)
    facts = {"parameters": target, "layers": args.config.n_layer, "width": None}
    found = {"tinymamba": TinyMamba(functools.partial(make_tinymamba, args), args.device, facts)}
    for name in args.models:
        facts, peer = fit(name, args.config, positions, target), PEERS[name]
        make = functools.partial(peer.make, args.config, positions, facts["layers"], facts["width"])
        found[name] = peer.kind(make, args.device, facts)
    return found


# ------------------------------------------------------------------------------------ timing


@dataclass
class Timing:
    first: float | None = None  # seconds of the first call, compilation included
    seconds: list[float] = field(default_factory=list)  # of every round that counts
    reason: str | None = None  # why it failed


def attempt(work, *args):
    """(what `work` gives, None), or (None, why it failed in one line)."""
    try:
        return work(*args), None
    except UserError:
        raise
    except Exception as e:  # whatever one model dies of, the numbers of the others stand
        return None, f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]


def interleave(makers: dict, warmup: int, rounds: int) -> dict:
    """A Timing for each key. A maker gives a function that runs once and returns seconds.

    In every round each function runs once, in turn; one that fails drops out.
    """
    runs, timings = {}, {key: Timing() for key in makers}
    for key, make in makers.items():
        run, timings[key].reason = attempt(make)
        runs |= {key: run} if run else {}
    for number in range(warmup + rounds):
        for key in list(runs):
            timing = timings[key]
            seconds, timing.reason = attempt(runs[key])
            if timing.reason:
                del runs[key]  # with all the memory that it holds
                continue
            timing.first = seconds if timing.first is None else timing.first
            timing.seconds += [seconds] if number >= warmup else []
    return timings


def timed(work, device: torch.device) -> float:
    """Seconds that `work()` takes, until the device is done."""
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def autocast(args: argparse.Namespace):
    return torch.autocast(args.device.type, args.amp, enabled=args.amp != torch.float32)


def make_run(benchmark: str, contestant: Contestant, compiled: bool, ids: Tensor, args):
    """A function that runs the benchmark once and returns its seconds."""
    model = contestant.model.train(benchmark == "training")
    call = torch.compile(model) if compiled else model
    return RUNS[benchmark](contestant, call, ids, args)


def training_run(contestant: Contestant, call, ids: Tensor, args):
    optimizer = contestant.optimizer

    def step() -> None:
        with autocast(args):
            loss = contestant.loss(call, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(contestant.model.parameters(), Config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: timed(step, args.device)


def prefill_run(contestant: Contestant, call, ids: Tensor, args):
    @torch.no_grad()
    def run() -> float:
        with autocast(args):
            return timed(lambda: contestant.logits(call, ids), args.device)

    return run


@torch.no_grad()
def decode_run(contestant: Contestant, call, ids: Tensor, args):
    """Seconds per token, after the prompt `ids`."""
    with autocast(args):
        prompt = contestant.read(ids)

    def steps(state) -> None:
        for _ in range(DECODE_TOKENS):
            state = contestant.step(ids[:, :1], state)

    @torch.no_grad()
    def run() -> float:
        state = copy.deepcopy(prompt)  # some caches change in place
        with autocast(args):
            return timed(lambda: steps(state), args.device) / DECODE_TOKENS

    return run


RUNS = {"training": training_run, "prefill": prefill_run, "decode": decode_run}

# ------------------------------------------------------------------------------------ benchmarks


def cases(args: argparse.Namespace, lengths: list[int]) -> list[tuple[int, int]]:
    """(batch, length) of every measurement."""
    return [
        (batch, length)
        for length in lengths
        for batch in args.batch_sizes or [max(1, args.tokens_per_step // length)]
    ]


def random_ids(args: argparse.Namespace, batch: int, length: int) -> Tensor:
    """The same ids (batch, length) for every model."""
    generator = torch.Generator().manual_seed(Config.seed)
    ids = torch.randint(args.config.vocab_size, (batch, length), generator=generator)
    return ids.to(args.device)


def make_row(benchmark: str, model: str, case: tuple, compiled=False, reason=None, **values):
    """What is known of one measurement, as it stands in results.json."""
    return {
        "benchmark": benchmark,
        "model": model,
        "compiled": compiled,
        "batch": case[0],
        "length": case[1],
        "status": "failed" if reason else "ok",
        "reason": reason,
        **values,
    }


def speed(benchmark: str, args: argparse.Namespace, contestants: dict):
    """Rows of tokens per second."""
    forms = {"off": [False], "on": [True], "both": [False, True]}[args.compile]
    forms = [False] if benchmark == "decode" else forms
    for case in cases(args, args.lengths):
        torch.compiler.reset()  # a shape is not to be made dynamic because another came before
        ids = random_ids(args, *case)
        makers = {
            (name, form): functools.partial(make_run, benchmark, contestant, form, ids, args)
            for name, contestant in contestants.items()
            for form in forms
        }
        timings = interleave(makers, args.warmup_iterations, args.test_iterations)
        tokens = case[0] if benchmark == "decode" else ids.numel()
        for (name, form), timing in timings.items():
            yield make_row(benchmark, name, case, form, timing.reason, **rates(timing, tokens))


def rates(timing: Timing, tokens: int) -> dict:
    """Tokens per second, if each run (in decoding, each step) is of so many tokens."""
    if timing.reason:
        return {}
    found = [tokens / s for s in timing.seconds]
    return {
        "median": statistics.median(found),
        "min": min(found),
        "max": max(found),
        "median_seconds": statistics.median(timing.seconds),
        "seconds": timing.seconds,
        "first_call_seconds": timing.first,
    }


def peak_bytes(device: torch.device, reset: bool = False) -> int:
    """Most memory held so far, or since the last reset; a reset gives what is held now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # ru_maxrss would begin at the peak of the process's parent
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    usage = importlib.import_module("resource")
    peak = usage.getrusage(usage.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def step_memory(name: str, args: argparse.Namespace, case: tuple[int, int]) -> int:
    """Bytes that one training step needs beyond the weights and AdamW's state, at its peak."""
    contestant = make_contestants(args)[name]
    make_run("training", contestant, False, random_ids(args, 1, 16), args)()  # AdamW's state
    run = make_run("training", contestant, False, random_ids(args, *case), args)
    before = peak_bytes(args.device, reset=True)
    run()
    return peak_bytes(args.device) - before


def memory(args: argparse.Namespace, contestants: dict):
    """Rows of peak memory, each measured in a new process."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # there, glibc returns what is freed
    spawn = multiprocessing.get_context("spawn")
    for case in cases(args, args.lengths):
        for name in contestants:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                got, reason = attempt(pool.submit(step_memory, name, args, case).result)
            sizes = {} if reason else {"bytes": got, "bytes_per_token": got / math.prod(case)}
            yield make_row("memory", name, case, False, reason, **sizes)


def open_eval(args: argparse.Namespace, length: int) -> StreamingTokenDataset:
    dtype = "auto" if read_sidecar(args.eval_dataset) else args.config.data_dtype
    return StreamingTokenDataset(
        args.eval_dataset, length, data_dtype=dtype, vocab_size=args.config.vocab_size
    )


@torch.no_grad()
def mean_nats(model: TinyMambaModel, data: StreamingTokenDataset, batch: int, args) -> float:
    """Mean loss over all whole blocks of the data, each read on its own."""
    total = 0.0
    for x, y in torch.utils.data.DataLoader(data, batch_size=batch):
        with autocast(args):
            total += model(x.to(args.device), y.to(args.device)).item() * y.numel()
    return total / (len(data) * data.block_size)


def perplexity(args: argparse.Namespace, contestants: dict):
    """Rows of the checkpoint's loss on --eval_dataset."""
    model = load_model(args.tinymamba_checkpoint, args.device)
    facts = read_sidecar(args.eval_dataset)
    for case in cases(args, args.sequence_lengths or [args.config.block_size]):
        data = open_eval(args, case[1])
        nats, reason = attempt(mean_nats, model, data, case[0], args)
        values = (
            {}
            if reason
            else {
                "nats_per_token": nats,
                "perplexity": math.exp(nats),
                "bits_per_byte": None,
                "tokens": len(data) * case[1],
            }
        )
        if values and facts.get("tokens") and facts.get("bytes"):
            values["bits_per_byte"] = nats / math.log(2) * facts["tokens"] / facts["bytes"]
        yield make_row("perplexity", "tinymamba", case, False, reason, **values)


@functools.cache
def open_tasks(tasks: tuple[str, ...], include_path: str | None):
    """lm-evaluation-harness's manager of tasks, if it knows all of these."""
    manager = need("lm_eval.tasks").TaskManager(
        include_path=include_path, include_defaults=not include_path
    )
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    require(
        not unknown,
        "tasks",
        f"{', '.join(unknown)}: no such task of lm-evaluation-harness",
        "lm-eval ls tasks lists them; --include_path names a folder of your own",
    )
    return manager


def lm_eval(args: argparse.Namespace, contestants: dict):
    """Rows of the checkpoint's marks: one for each metric of each task."""
    lm = need("lm_eval.models.huggingface").HFLM(
        **open_for_harness(args),
        batch_size=(args.batch_sizes or [8])[0],
        device=str(args.device),
        max_length=max(args.sequence_lengths or [2048]),
    )
    found = need("lm_eval").simple_evaluate(
        lm,
        tasks=args.tasks,
        task_manager=open_tasks(tuple(args.tasks), args.include_path),
        limit=args.limit,
        bootstrap_iters=0,
    )
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if type(value) in (int, float) and kind and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kind}")
                yield make_row(
                    "lm_eval",
                    "tinymamba",
                    (lm.batch_size, lm.max_length),
                    False,
                    "",
                    task=task,
                    metric=metric,
                    filter=kind,
                    value=value,
                    stderr=error if isinstance(error, float) else None,
                )


def open_for_harness(args: argparse.Namespace) -> dict:
    """The checkpoint and its tokenizer as `transformers` has them."""
    need("transformers")
    from hf_integration import TinyMambaHFModel, TinyMambaHFTokenizer

    model = load_model(args.tinymamba_checkpoint, args.device)
    tokenizer = open_tokenizer(None, model, [args.tinymamba_checkpoint])
    require(
        tokenizer,
        "tinymamba_checkpoint",
        "has no tokenizer.json beside it or its data",
        "copy it there",
    )
    return {
        "pretrained": TinyMambaHFModel.of(model),
        "tokenizer": TinyMambaHFTokenizer.of(tokenizer),
    }


BENCHMARKS = {  # memory comes first: this process holds no model yet, so a GPU is empty
    "memory": [memory],
    "training": [functools.partial(speed, "training")],
    "inference": [functools.partial(speed, "prefill"), functools.partial(speed, "decode")],
    "perplexity": [perplexity],
    "lm_eval": [lm_eval],
}

# ------------------------------------------------------------------------------------ results


def label(row: dict) -> str:
    return row["model"] + (" compiled" if row["compiled"] else "")


def add_ratios(rows: list[dict]) -> None:
    """Add ratio_to_llama: tokens/s over Llama's (more is faster), or bytes over Llama's."""

    def case(row: dict) -> tuple:
        return row["benchmark"], row["compiled"], row["batch"], row["length"]

    done = [row for row in rows if row["status"] == "ok"]
    llama = {case(row): row for row in done if row["model"] == "llama"}
    for row in done:
        key = MEASURES[row["benchmark"]][0]
        base = llama.get(case(row), {}).get(key)
        row["ratio_to_llama"] = row[key] / base if base else None


def cell(row: dict) -> str:
    """What a table shows of a row."""
    if row["status"] == "failed":
        return "failed: " + row["reason"].replace("|", "/")
    if row["benchmark"] == "perplexity":
        bits = row["bits_per_byte"]
        return f"{row['nats_per_token']:.4f}" + (f", {bits:.4f} bits per byte" if bits else "")
    if row["benchmark"] == "lm_eval":
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        return f"{row['task']}, {row['metric']} ({row['filter']}): {row['value']:.4f}{error}"
    value = f"{row[MEASURES[row['benchmark']][0]]:,.0f}"
    if row["benchmark"] == "decode":
        value += f", {1000 * row['median_seconds']:.2f} ms"
    ratio = row.get("ratio_to_llama")
    return value if ratio is None else f"{value} ({ratio:.2f})"


def table(lines: list[list[str]]) -> str:
    """Markdown of a header and rows, in columns of even width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "".join(
        "| " + " | ".join([line[0].lstrip().ljust(widths[0]), *line[1:]]) + " |\n"
        for line in padded
    )


def markdown(results: dict) -> str:
    """All tables: rows are models, columns lengths."""
    m, sizes = results["machine"], [["model", "parameters", "layers", "width"]]
    sizes += [
        [name, f"{facts['parameters']:,}", str(facts["layers"]), str(facts["width"] or "")]
        for name, facts in results["models"].items()
    ]
    text = [
        f"# Benchmark\n\n{m['name']}, {m['threads']} threads, torch {m['torch']}, "
        f"transformers {m['transformers']}, {m['dtype']}\n",
        f"    python benchmark.py {m['command']}\n",
        table(sizes),
    ]
    if "llama" in results["models"]:
        text.append("In brackets: the number as a multiple of Llama's.\n")
    for benchmark, (_, title) in MEASURES.items():
        rows = [row for row in results["rows"] if row["benchmark"] == benchmark]
        if benchmark == "lm_eval" and rows:
            text.append(f"## {title}\n\n" + "".join(f"- {cell(row)}\n" for row in rows))
            continue
        columns = sorted({(row["length"], row["batch"]) for row in rows})
        lines = [["length (batch)", *(f"{length} ({batch})" for length, batch in columns)]]
        for name in dict.fromkeys(map(label, rows)):
            cells = {(r["length"], r["batch"]): cell(r) for r in rows if label(r) == name}
            lines.append([name, *(cells[column] for column in columns)])
        if rows:
            text.append(f"## {title}\n\n{table(lines)}")
    return "\n".join(text)


def plot(rows: list[dict], path: Path) -> None:
    """One benchmark over length, a line for each model (and batch), into a PNG."""
    figure = need("matplotlib.figure").Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes, (key, title) = figure.subplots(), MEASURES[rows[0]["benchmark"]]
    lengths, lines = sorted({row["length"] for row in rows}), {}
    several = len({(row["batch"], row["length"]) for row in rows}) > len(lengths)
    for row in sorted(rows, key=lambda row: row["length"]):
        name = label(row) + (f", batch {row['batch']}" if several else "")
        lines.setdefault(name, []).append(row)
    for name, points in lines.items():
        x, y = [row["length"] for row in points], [row[key] for row in points]
        low = [row[key] - row.get("min", row[key]) for row in points]
        high = [row.get("max", row[key]) - row[key] for row in points]
        axes.errorbar(x, y, (low, high), label=name, marker="o", markersize=4, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, labels=map(str, lengths))
    axes.set(xlabel="sequence length (tokens)", ylabel=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside right upper")
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))


def append_row(path: str, row: dict) -> None:
    """Print a row as JSON, and add it to the file of rows."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def write_results(results: dict, args: argparse.Namespace) -> None:
    """results.json, results.md and plots; the plots of an earlier run go."""
    add_ratios(results["rows"])
    for name, text in (("json", json.dumps(results, indent=1)), ("md", markdown(results))):
        write = functools.partial(lambda text, to: Path(to).write_text(text, "utf-8"), text)
        atomic_write(args.output_dir / f"results.{name}", write)
    for benchmark in MEASURES:
        path, rows = args.output_dir / f"{benchmark}.png", results["rows"]
        rows = [row for row in rows if row["benchmark"] == benchmark and row["status"] == "ok"]
        if rows and args.generate_plots and benchmark != "lm_eval":
            plot(rows, path)
        else:
            path.unlink(missing_ok=True)


def describe_machine(args: argparse.Namespace, argv: list[str]) -> dict:
    """Where and with what the numbers were taken."""
    info, cpu = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = found[1]
    gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else None
    transformers = getattr(sys.modules.get("transformers"), "__version__", None)
    return {
        "name": gpu or cpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "dtype": show(args.amp),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers,
        "command": shlex.join(argv),
    }


# ------------------------------------------------------------------------------------ command line


def whole(low: int, text: str) -> int:
    """A whole number from `low`."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; pass a whole number from {low}")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CliParser(usage="python benchmark.py [--FLAG VALUE ...]", description=__doc__)
    add, one = parser.add_argument, {"type": functools.partial(whole, 1), "metavar": "N"}
    add("--tinymamba_checkpoint", metavar="FILE", help="model to measure [a fresh one]")
    add("--preset", choices=PRESETS, help="size of a fresh model [about 10M parameters]")
    add("--d_model", **one, help=f"width of a fresh model, a multiple of 32 [{DEFAULT['d_model']}]")
    add("--n_layer", **one, help=f"layers of a fresh model [{DEFAULT['n_layer']}]")
    add("--vocab_size", **one, help=f"vocabulary of a fresh model [{DEFAULT['vocab_size']}]")
    add(
        "--models_to_compare",
        nargs="+",
        choices=["tinymamba", *PEERS],
        metavar="MODEL",
        help=f"any of {', '.join(PEERS)}; tinymamba is always there [llama gpt2 mamba2]",
    )
    add(
        "--benchmark_type",
        nargs="+",
        choices=[*BENCHMARKS, "all"],
        default=["all"],
        metavar="TYPE",
        help=f"any of {', '.join(BENCHMARKS)}, all [all]",
    )
    add(
        "--sequence_lengths",
        nargs="+",
        **one,
        help="in tokens [256 512 1024 2048; for perplexity the checkpoint's block_size]",
    )
    add("--batch_sizes", nargs="+", **one, help="sequences [tokens_per_step // length]")
    add("--tokens_per_step", **one, default=4096, help="without --batch_sizes [4096]")
    add(
        "--warmup_iterations",
        type=functools.partial(whole, 0),
        default=2,
        metavar="N",
        help="rounds before those that count [2]",
    )
    add("--test_iterations", **one, default=5, help="rounds that count [5]")
    add("--compile", choices=["off", "on", "both"], default="off", help="torch.compile [off]")
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="autocast, where the hardware is fast in it [bfloat16]",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps [auto]")
    add(
        "--eval_dataset",
        default=Config.val_data_path,
        metavar="FILE",
        help=f".bin of tokens for perplexity [{Config.val_data_path}]",
    )
    add("--tasks", nargs="+", metavar="TASK", help="of lm-evaluation-harness, for lm_eval")
    add(
        "--include_path",
        metavar="DIR",
        help="folder of tasks' .yaml files, in place of the harness's",
    )
    add("--limit", **one, help="examples of each task [all]")
    add(
        "--output_dir",
        type=Path,
        default=Path("./benchmark_results"),
        metavar="DIR",
        help="folder for the results [./benchmark_results]",
    )
    add("--generate_plots", action="store_true", help="write PNGs too")
    add("--force", action="store_true", help="replace the results of an earlier run")
    return parser.parse_args(argv)


def choose_config(args: argparse.Namespace) -> Config:
    """The checkpoint's config, or that of a fresh model."""
    named = ("preset", "d_model", "n_layer", "vocab_size")
    given = {name: getattr(args, name) for name in named if getattr(args, name)}
    if args.tinymamba_checkpoint:
        require(
            not given,
            next(iter(given), ""),
            "is already said by the checkpoint",
            "leave it or --tinymamba_checkpoint out",
        )
        return Config.from_dict(load_checkpoint(args.tinymamba_checkpoint)["config"])
    values = PRESETS[given.pop("preset")] if args.preset else DEFAULT
    if width := args.d_model:
        require(width % 32 == 0, "d_model", f"{width} is no multiple of 32", "use one")
        heads = range(max(1, width // 64), 0, -1)
        given["num_heads"] = next(n for n in heads if width % (2 * n) == 0)
    return Config(**{**values, **given, "dropout": 0.0}).validate()


def choose_benchmarks(args: argparse.Namespace) -> list[str]:
    """What to measure, in order; `all` leaves out what cannot be."""
    of_checkpoint = () if args.tinymamba_checkpoint else ("perplexity", "lm_eval")
    unable = dict.fromkeys(of_checkpoint, "needs --tinymamba_checkpoint")
    if not args.tasks:
        unable.setdefault("lm_eval", "needs --tasks")
    if args.device.type == "mps":
        unable["memory"] = "needs a device that tells its peak: cpu or cuda"
    everything, asked = "all" in args.benchmark_type, set(args.benchmark_type)
    for kind, reason in unable.items():
        require(kind not in asked, "benchmark_type", f"{kind} {reason}", "name it, or another type")
        if everything:
            print(f"note: {kind} is left out: it {reason}")
    asked = set(BENCHMARKS) - set(unable) if everything else asked
    for kind in asked & CHECKPOINTS_ALONE if args.models_to_compare else ():
        print(f"note: {kind} is TinyMamba's alone: untrained peers have none")
    return [kind for kind in BENCHMARKS if kind in asked]


def settle(args: argparse.Namespace) -> None:
    """Refuse whatever is wrong before the first measurement, and fill in the rest."""
    args.device = pick_device(args.device)
    args.amp = pick_amp_dtype(DTYPES[args.dtype], args.device)
    if show(args.amp) != args.dtype:
        print(f"note: {args.device} is not fast in {args.dtype}: {show(args.amp)} it is")
    args.benchmark_type = choose_benchmarks(args)
    reason = why_no_compile(args.device)
    require(args.compile == "off" or not reason, "compile", reason or "", "leave it off")
    args.config = choose_config(args)
    args.lengths = args.sequence_lengths or [256, 512, 1024, 2048]
    if "perplexity" in args.benchmark_type:
        open_eval(args, max(args.sequence_lengths or [args.config.block_size]))
    if "lm_eval" in args.benchmark_type:
        open_tasks(tuple(args.tasks), args.include_path)
    names = args.models_to_compare or ["llama", "gpt2", "mamba2"]
    alone = set(args.benchmark_type) <= CHECKPOINTS_ALONE
    args.models = [name for name in PEERS if name in names and not alone]
    if args.generate_plots:
        need("matplotlib")
    old = [name for name in OUTPUTS if (args.output_dir / name).exists()]
    require(
        args.force or not old,
        "output_dir",
        f"{args.output_dir} holds {', '.join(old)}",
        "pass --force or name another",
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    settle(args)
    contestants = make_contestants(args)
    require_writable(args.output_dir, "output_dir")
    models = {name: contestant.facts for name, contestant in contestants.items()}
    for name, facts in models.items():
        print(f"{name}: {facts['parameters']:,} parameters", flush=True)
    results = {"machine": describe_machine(args, argv), "models": models, "rows": []}
    for benchmark in [b for kind in args.benchmark_type for b in BENCHMARKS[kind]]:
        for row in benchmark(args, contestants):
            results["rows"].append({**row, "parameters": models[row["model"]]["parameters"]})
            where = f"{row['benchmark']}, {row['batch']} x {row['length']}"
            print(f"{where}, {label(row)}: {cell(row)}", flush=True)
        write_results(results, args)
    print(f"\n{markdown(results)}\nwritten to {args.output_dir}")
    return int(any(row["status"] == "failed" for row in results["rows"]))


if __name__ == "__main__":
    run_cli(main)
