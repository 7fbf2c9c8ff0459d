"""TinyMamba against standard models of the same size: speed, memory, perplexity and tasks.

    python benchmark.py --benchmark_type training --sequence_lengths 512 2048 8192
    python benchmark.py --benchmark_type inference memory --models_to_compare llama mamba2
    python benchmark.py --preset small --compile both --device cuda --generate_plots
    python benchmark.py --benchmark_type perplexity --tinymamba_checkpoint model.pt \\
        --eval_dataset ./data/text/val.bin
    python benchmark.py --benchmark_type lm_eval --tinymamba_checkpoint model.pt --tasks piqa
    python benchmark.py --benchmark_type chat --tinymamba_checkpoint model.pt --data held_out.jsonl
    python benchmark.py --tinymamba_checkpoint model.pt --force    # everything
    python benchmark.py --help

The peers come from `transformers` (and `mambapy`, if installed). They have random weights and the
parameter count of the TinyMamba model, within 2%. In every round each model runs once on the same
random ids; the reported numbers are medians over rounds. With --compile, peers are compiled as a
whole and TinyMamba block by block, as in training.

    training    one whole step: forward, loss, backward, clipping, AdamW
    inference   prefill: one forward pass over a prompt, logits at every position, no gradients
                decode: time per token after that prompt, with a state or a KV cache; never compiled
                (a growing cache would be recompiled for every token)
    memory      how far one training step raises the peak, measured in its own process; exact on
                Linux and CUDA, up to one set of gradients too low on macOS; never compiled
    perplexity  of the checkpoint only: the peers are untrained
    lm_eval     the checkpoint's scores on tasks of lm-evaluation-harness, if installed
    chat        the checkpoint's answers in the chats of --data: their loss, how many it writes
                exactly by itself (greedily), and how many of those that it writes come to an end

Results go to results.json and results.md in --output_dir, and plots beside them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import itertools
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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testv2 import PRESETS, Config, StreamingTokenDataset, TinyMambaModel, load_model
from tinymamba.chat_eval import Question, answer_loss, find_questions, write_answers
from tinymamba.chat_rows import read_chats
from tinymamba.chat_session import open_template
from tinymamba.checkpoint import atomic_write, load_checkpoint, require_writable
from tinymamba.cli import (
    CliParser,
    UserError,
    add_flags,
    make_options,
    need,
    require,
    run_cli,
    show,
)
from tinymamba.runtime import pick_amp_dtype, pick_device, reuse_memory, why_no_compile
from tinymamba.token_shards import read_facts
from tinymamba.tokenizer import (
    SimpleTokenizer,
    open_tokenizer,
    read_tokenizer_facts,
    require_data_of,
    why_no_tokenizer,
)

DEFAULT: dict[str, Any] = {
    "d_model": 320,
    "n_layer": 5,
    "vocab_size": 4096,
    "num_heads": 5,
    "bias": False,
}
LENGTHS = [256, 512, 1024, 2048]  # of sequences, in tokens
TOLERANCE = 0.02  # share by which a peer's parameter count may differ
DECODE_TOKENS = 16  # tokens over which one decoding run is timed
MEASURES = {  # benchmark: the key of its main number in a row, its title
    "training": ("median", "Training, tokens per second"),
    "prefill": ("median", "Prefill, tokens per second"),
    "decode": ("median", "Decoding, tokens per second"),
    "memory": ("bytes_per_token", "Peak memory of a training step, bytes per token"),
    "perplexity": ("nats_per_token", "Loss, nats per token"),
    "lm_eval": ("value", "Tasks of lm-evaluation-harness"),
    "chat": ("nats_per_token", "Answers in chats"),
}
OF_CHECKPOINT = {"perplexity", "lm_eval", "chat"}  # meaningless for untrained peers
LISTED = {"lm_eval", "chat"}  # rows without a table and a plot
OUTPUTS = ("results.json", "results.md", *(f"{name}.png" for name in MEASURES))


class Setup(NamedTuple):
    """The command line, checked and completed: what is measured, and how."""

    options: Options
    device: torch.device
    dtype: torch.dtype  # of autocast; float32 means no autocast
    config: Config  # of the TinyMamba model
    benchmarks: list[str]  # keys of BENCHMARKS
    lengths: list[int]  # of the sequences, in tokens
    peers: list[str]  # keys of PEERS


# ------------------------------------------------------------------------------------ runners


class Runner:
    """A model and the calls that are timed. The model is built on first use.

    ids are (b, l) of int64; `call` is the model or its compiled form, see `form`.
    """

    def __init__(self, make: Callable[[], nn.Module], device: torch.device, size: dict):
        self.make, self.device = make, device
        self.size = size  # parameters, layers, width

    @functools.cached_property
    def model(self) -> Any:
        """The model, with the same seed for every runner."""
        torch.manual_seed(Config.seed)
        return self.make().to(self.device)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW as in training."""
        betas, decay = (Config.beta1, Config.beta2), Config.weight_decay
        return torch.optim.AdamW(
            self.model.parameters(), Config.lr, betas, weight_decay=decay, fused=True
        )

    def form(self, compiled: bool) -> Callable:
        """The model, or the model compiled as a whole for ids of one shape."""
        return torch.compile(self.model, dynamic=False) if compiled else self.model

    def loss(self, call: Callable, ids: Tensor) -> Tensor:
        """The mean loss of predicting each next token."""
        return call(ids, ids.roll(-1, 1))

    def logits(self, call: Callable, ids: Tensor) -> Tensor:
        """(b, l) -> (b, l, v)."""
        return call(ids)

    def read(self, ids: Tensor) -> Any:
        """The state or cache after a prompt."""
        raise NotImplementedError

    def step(self, token: Tensor, state: Any) -> Any:
        """The state after one more token (b, 1), whose logits are computed too."""
        raise NotImplementedError


class TinyMamba(Runner):
    """The model of testv2.py."""

    def form(self, compiled: bool) -> Callable:
        """The model. Its blocks are compiled in place: see `as_compiled` for calls without that."""
        if compiled:
            self.model.compile_blocks()
        return self.model

    def read(self, ids: Tensor) -> Any:
        """The state after a prompt."""
        return self.model.advance(ids, self.model.init_state(len(ids)), last_only=True)[1]

    def step(self, token: Tensor, state: Any) -> Any:
        """A new state; the old one is unchanged."""
        return self.model.advance(token, state)[1]


class HuggingFace(Runner):
    """A causal model of transformers. It shifts labels itself, and changes its cache in place."""

    def loss(self, call: Callable, ids: Tensor) -> Tensor:
        """The model's own loss."""
        return call(input_ids=ids, labels=ids, use_cache=False).loss

    def logits(self, call: Callable, ids: Tensor) -> Tensor:
        """(b, l) -> (b, l, v)."""
        return call(input_ids=ids, use_cache=False).logits

    def read(self, ids: Tensor) -> Any:
        """A new cache that holds the prompt."""
        return self.step(ids, None)

    def step(self, token: Tensor, state: Any) -> Any:
        """The same cache, one token longer."""
        name = "cache_params" if self.model.config.model_type == "mamba2" else "past_key_values"
        return self.model(input_ids=token, use_cache=True, **{name: state})[name]


class MambaPy(Runner):
    """A model of mambapy."""

    def read(self, ids: Tensor) -> Any:
        """Token by token: mambapy has no other way from a prompt to a state."""
        c = self.model.core.config
        tail = torch.zeros(len(ids), c.d_inner, c.d_conv - 1, device=ids.device)
        caches = [(None, tail) for _ in range(c.n_layers)]
        for token in ids.split(1, dim=1):
            caches = self.step(token, caches)
        return caches

    def step(self, token: Tensor, state: Any) -> Any:
        """The caches of all layers after one token."""
        return self.model.step(token, state)


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
        """Logits (b, l, v), or the mean loss if there are targets (b, l)."""
        logits = self.head(self.norm(self.core(self.embedding(ids))))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def step(self, token: Tensor, caches: list) -> list:
        """The caches of all layers after one token (b, 1), whose logits are computed too."""
        x, caches = self.core.step(self.embedding(token[:, 0]), caches)
        self.head(self.norm(x))
        return caches


def make_llama(config: Config, positions: int, layers: int, width: int) -> nn.Module:
    """Llama: RoPE, SwiGLU, RMSNorm; `width` is that of the MLP."""
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
    """GPT-2 without dropout; `width` is that of the MLP."""
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
    """Mamba-2; `width` is the size of the state."""
    hf = need("transformers")
    need("transformers.utils.logging").set_verbosity_error()  # it warns of missing CUDA kernels
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
    """A model to compare with."""

    runner: type[Runner]
    make: Callable[..., nn.Module]  # (config, positions, layers, width) -> model
    width: Callable[[int], int]  # usual width, by d_model: of the MLP, Mamba-2's state or channels


PEERS = {
    "llama": Peer(HuggingFace, make_llama, lambda d: 8 * d // 3),
    "gpt2": Peer(HuggingFace, make_gpt2, lambda d: 4 * d),
    "mamba2": Peer(HuggingFace, make_mamba2, lambda d: 128),
    "mambapy": Peer(MambaPy, MambaPyLM, lambda d: 2 * d),
}


def count(make: Callable[..., nn.Module], *args: Any) -> int:
    """Parameters of the model that `make(*args)` gives, shared ones once; none are allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(*args).parameters())


def fit(name: str, config: Config, positions: int, target: int) -> dict:
    """The peer's size: the layers nearest to `target` parameters, then the width that fits."""
    usual, tried = PEERS[name].width(config.d_model), []
    size = functools.partial(count, PEERS[name].make, config, positions)
    one, two = size(1, usual), size(2, usual)
    nearest = max(1, 1 + round((target - one) / (two - one)))
    for layers in (nearest, max(1, nearest - 1)):
        base = size(layers, usual)
        slope = size(layers, usual + 1) - base
        for multiple in (64, 8, 1):  # round widths are fast
            width = max(1, round((usual + (target - base) / slope) / multiple)) * multiple
            total = base + (width - usual) * slope
            tried.append(total)
            if abs(total / target - 1) <= TOLERANCE:
                return {"parameters": total, "layers": layers, "width": width}
    best = min(tried, key=lambda total: abs(total - target))
    problem = f"{name} cannot have {target:,} parameters within {TOLERANCE:.0%} (best: {best:,})"
    remedy = "leave it out, or change the size or the lengths"
    raise UserError("--models_to_compare", problem, remedy)


def make_tinymamba(setup: Setup) -> TinyMambaModel:
    """The checkpoint without its dropout, as the peers have none; or a model of random weights."""
    if not setup.options.tinymamba_checkpoint:
        return TinyMambaModel(setup.config)
    model = load_model(setup.options.tinymamba_checkpoint)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def make_runner(name: str, setup: Setup) -> Runner:
    """The runner of TinyMamba, or of a peer of its size."""
    target = count(TinyMambaModel, setup.config)
    if name == "tinymamba":
        size = {"parameters": target, "layers": setup.config.n_layer, "width": None}
        return TinyMamba(functools.partial(make_tinymamba, setup), setup.device, size)
    positions = max(setup.lengths) + DECODE_TOKENS
    size, peer = fit(name, setup.config, positions, target), PEERS[name]
    make = functools.partial(peer.make, setup.config, positions, size["layers"], size["width"])
    return peer.runner(make, setup.device, size)


# ------------------------------------------------------------------------------------ timing


@dataclass
class Timing:
    """The seconds of one function, or why it failed."""

    first: float | None = None  # seconds of the first call, compilation included
    seconds: list[float] = field(default_factory=list)  # of every counted round
    reason: str | None = None  # why it failed


def attempt(work: Callable, *args: Any) -> tuple[Any, str | None]:
    """(the result of `work`, None), or (None, why it failed in one line)."""
    try:
        return work(*args), None
    except UserError:
        raise
    except Exception as e:  # one model's failure, whatever it is, must not stop the others
        return None, f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]


def interleave(makers: dict, warmup: int, rounds: int) -> dict:
    """A Timing for each key. A maker returns a function that runs once and returns its seconds.

    In every round each function runs once; one that fails is not run again.
    """
    reuse_memory()
    timings = {key: Timing() for key in makers}
    runs: dict[Any, Callable[[], float]] = {}
    for key, make in makers.items():
        run, timings[key].reason = attempt(make)
        runs |= {key: run} if run else {}
    for number in range(warmup + rounds):
        for key in list(runs):
            timing = timings[key]
            seconds, timing.reason = attempt(runs[key])
            if timing.reason:
                del runs[key]  # frees its memory
                continue
            timing.first = seconds if timing.first is None else timing.first
            timing.seconds += [seconds] if number >= warmup else []
    return timings


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work()` takes, until the device is done."""
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def autocast(setup: Setup) -> torch.autocast:
    """The autocast context of every measurement."""
    return torch.autocast(setup.device.type, setup.dtype, enabled=setup.dtype != torch.float32)


def make_run(
    benchmark: str, runner: Runner, compiled: bool, ids: Tensor, setup: Setup
) -> Callable[[], float]:
    """A function that runs the benchmark once and returns its seconds."""
    runner.model.train(benchmark == "training")
    with as_compiled(compiled):
        run = RUNS[benchmark](runner, runner.form(compiled), ids, setup)

    def measured() -> float:
        with as_compiled(compiled):
            return run()

    return measured


def as_compiled(compiled: bool) -> contextlib.AbstractContextManager:
    """Inside `with`, compiled functions run as the plain ones that they are, unless `compiled`."""
    if compiled or "torch._dynamo" not in sys.modules:  # without it nothing has been compiled
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def training_run(runner: Runner, call: Callable, ids: Tensor, setup: Setup) -> Callable[[], float]:
    """Seconds of a training step."""
    optimizer = runner.optimizer

    def step() -> None:
        with autocast(setup):
            loss = runner.loss(call, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(runner.model.parameters(), Config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: timed(step, setup.device)


def prefill_run(runner: Runner, call: Callable, ids: Tensor, setup: Setup) -> Callable[[], float]:
    """Seconds of a forward pass over the prompt `ids`."""

    @torch.no_grad()
    def run() -> float:
        with autocast(setup):
            return timed(lambda: runner.logits(call, ids), setup.device)

    return run


@torch.no_grad()
def decode_run(runner: Runner, call: Callable, ids: Tensor, setup: Setup) -> Callable[[], float]:
    """Seconds per token, after the prompt `ids`."""
    with autocast(setup):
        prompt = runner.read(ids)

    def steps(state: Any) -> None:
        for _ in range(DECODE_TOKENS):
            state = runner.step(ids[:, :1], state)

    @torch.no_grad()
    def run() -> float:
        state = copy.deepcopy(prompt)  # some caches change in place
        with autocast(setup):
            return timed(lambda: steps(state), setup.device) / DECODE_TOKENS

    return run


RUNS = {"training": training_run, "prefill": prefill_run, "decode": decode_run}

# ------------------------------------------------------------------------------------ benchmarks


def cases(options: Options, lengths: list[int]) -> list[tuple[int, int]]:
    """(batch, length) of every measurement."""
    return [
        (batch, length)
        for length in lengths
        for batch in options.batch_sizes or [max(1, options.tokens_per_step // length)]
    ]


def random_ids(setup: Setup, batch: int, length: int) -> Tensor:
    """The same ids (b, l) for every model."""
    generator = torch.Generator().manual_seed(Config.seed)
    ids = torch.randint(setup.config.vocab_size, (batch, length), generator=generator)
    return ids.to(setup.device)


def make_row(
    benchmark: str, model: str, case: tuple, compiled: bool, reason: str | None, **values: Any
) -> dict:
    """One measurement, as it is written to results.json."""
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


def speed(benchmark: str, setup: Setup, runners: dict[str, Runner]) -> Iterator[dict]:
    """Rows of tokens per second."""
    options = setup.options
    forms = {"off": [False], "on": [True], "both": [False, True]}[options.compile]
    forms = [False] if benchmark == "decode" else forms
    for case in cases(options, setup.lengths):
        torch.compiler.reset()  # else a second shape would be compiled as a dynamic one
        ids = random_ids(setup, *case)
        makers = {
            (name, form): functools.partial(make_run, benchmark, runner, form, ids, setup)
            for name, runner in runners.items()
            for form in forms
        }
        timings = interleave(makers, options.warmup_iterations, options.test_iterations)
        tokens = case[0] if benchmark == "decode" else ids.numel()
        for (name, form), timing in timings.items():
            yield make_row(benchmark, name, case, form, timing.reason, **rates(timing, tokens))


def rates(timing: Timing, tokens: int) -> dict:
    """Tokens per second, for runs of `tokens` tokens each."""
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
    """Peak memory so far, or since the last reset; with `reset`, what is held now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # ru_maxrss would start at the parent process's peak
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    usage = importlib.import_module("resource")
    peak = usage.getrusage(usage.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def step_memory(name: str, setup: Setup, case: tuple[int, int]) -> int:
    """Bytes that one training step needs at its peak, beyond the weights and AdamW's state."""
    runner = make_runner(name, setup)
    make_run("training", runner, False, random_ids(setup, 1, 16), setup)()  # AdamW's state
    run = make_run("training", runner, False, random_ids(setup, *case), setup)
    before = peak_bytes(setup.device, reset=True)
    run()
    return peak_bytes(setup.device) - before


def memory(setup: Setup, runners: dict[str, Runner]) -> Iterator[dict]:
    """Rows of peak memory, each measured in a new process."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # makes glibc return freed memory
    spawn = multiprocessing.get_context("spawn")
    for case in cases(setup.options, setup.lengths):
        for name in runners:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                got, reason = attempt(pool.submit(step_memory, name, setup, case).result)
            sizes = {} if reason else {"bytes": got, "bytes_per_token": got / math.prod(case)}
            yield make_row("memory", name, case, False, reason, **sizes)


def open_eval(setup: Setup, length: int) -> StreamingTokenDataset:
    """The blocks of --eval_dataset."""
    path, config = setup.options.eval_dataset, setup.config
    dtype = "auto" if read_facts(path) else config.data_dtype
    return StreamingTokenDataset(path, length, data_dtype=dtype, vocab_size=config.vocab_size)


@torch.no_grad()
def mean_nats(
    model: TinyMambaModel, data: StreamingTokenDataset, batch: int, setup: Setup
) -> float:
    """Mean loss over all whole blocks of the data, each with an empty state before it."""
    total = 0.0
    for x, y in torch.utils.data.DataLoader(data, batch_size=batch):
        with autocast(setup):
            total += model(x.to(setup.device), y.to(setup.device)).item() * y.numel()
    return total / (len(data) * data.block_size)


def perplexity(setup: Setup, runners: dict[str, Runner]) -> Iterator[dict]:
    """Rows of the checkpoint's loss on --eval_dataset."""
    options = setup.options
    path = str(options.tinymamba_checkpoint)
    model = load_model(path, setup.device)
    open_tokenizer(None, model, [path])  # which an old checkpoint does not hold
    require_data_of(model.tokenizer, read_tokenizer_facts(options.eval_dataset)[0], path)
    facts = read_facts(options.eval_dataset)
    for case in cases(options, options.sequence_lengths or [setup.config.block_size]):
        data = open_eval(setup, case[1])
        nats, reason = attempt(mean_nats, model, data, case[0], setup)
        if reason:
            yield make_row("perplexity", "tinymamba", case, False, reason)
            continue
        bits = None
        if facts.get("tokens") and facts.get("bytes"):
            bits = nats / math.log(2) * facts["tokens"] / facts["bytes"]
        values = {"nats_per_token": nats, "perplexity": math.exp(nats), "bits_per_byte": bits}
        tokens = len(data) * case[1]
        yield make_row("perplexity", "tinymamba", case, False, None, **values, tokens=tokens)


@functools.cache
def open_tasks(tasks: tuple[str, ...], include_path: str | None) -> Any:
    """lm-evaluation-harness's manager of tasks, if it knows all of these."""
    harness = need("lm_eval.tasks")
    manager = harness.TaskManager(include_path=include_path, include_defaults=not include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    problem = f"{', '.join(unknown)}: no such task of lm-evaluation-harness"
    remedy = "`lm-eval ls tasks` lists them; --include_path names a folder of your own"
    require(not unknown, "--tasks", problem, remedy)
    return manager


def lm_eval(setup: Setup, runners: dict[str, Runner]) -> Iterator[dict]:
    """Rows of the checkpoint's scores: one for each metric of each task."""
    options = setup.options
    lm = need("lm_eval.models.huggingface").HFLM(
        **open_for_harness(setup),
        batch_size=(options.batch_sizes or [8])[0],
        device=str(setup.device),
        max_length=max(options.sequence_lengths or [2048]),
    )
    found = need("lm_eval").simple_evaluate(
        lm,
        tasks=options.tasks,
        task_manager=open_tasks(tuple(options.tasks or ()), options.include_path),
        limit=options.limit,
        bootstrap_iters=0,
    )
    case = lm.batch_size, lm.max_length
    for task, values in found["results"].items():
        for score in scores(values):
            yield make_row("lm_eval", "tinymamba", case, False, "", task=task, **score)


def scores(values: dict) -> Iterator[dict]:
    """The metrics of one task, from {"METRIC,FILTER": value, "METRIC_stderr,FILTER": ...}."""
    for name, value in values.items():
        metric, _, kind = name.partition(",")
        if type(value) not in (int, float) or not kind or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        error = error if isinstance(error, float) else None
        yield {"metric": metric, "filter": kind, "value": value, "stderr": error}


def open_checkpoint(setup: Setup) -> tuple[TinyMambaModel, SimpleTokenizer]:
    """The checkpoint's model and tokenizer."""
    path = str(setup.options.tinymamba_checkpoint)
    model = load_model(path, setup.device)
    tokenizer = open_tokenizer(None, model, [path])
    problem = why_no_tokenizer(model, "has no tokenizer, and there is none beside it or its data")
    remedy = "convert it with hf_integration.py --tokenizer_file, and pass the folder"
    require(tokenizer, "--tinymamba_checkpoint", problem, remedy)
    return model, tokenizer


def open_for_harness(setup: Setup) -> dict:
    """The checkpoint and its tokenizer as objects of transformers."""
    need("transformers")
    from hf_integration import TinyMambaHFModel, TinyMambaHFTokenizer

    model, tokenizer = open_checkpoint(setup)
    return {
        "pretrained": TinyMambaHFModel.of(model),
        "tokenizer": TinyMambaHFTokenizer.of(tokenizer),
    }


def open_questions(
    setup: Setup, model: TinyMambaModel, tokenizer: SimpleTokenizer
) -> tuple[list[Question], list[int]]:
    """All answers in the first --limit chats of --data, and the ids that end one."""
    remedy = "use one that was trained on chats"
    template = open_template(tokenizer, "--tinymamba_checkpoint", remedy)
    eos = model.config.eos_id if model.config.eos_id >= 0 else tokenizer.eos_token_id
    rows = read_chats(setup.options.data or [], setup.options.encoding_errors)
    first = itertools.islice(rows, setup.options.limit)
    found = [q for where, said in first for q in find_questions(template, said, eos, where)]
    require(found, "--data", "has no chats", "pass files with some")
    return found, [i for i in (template.turn_end, eos) if i is not None]


def chat(setup: Setup, runners: dict[str, Runner]) -> Iterator[dict]:
    """A row of how well the checkpoint answers in the chats of --data."""
    (model, tokenizer), options = open_checkpoint(setup), setup.options
    questions, ends = open_questions(setup, model, tokenizer)
    batch = (options.batch_sizes or [8])[0]
    with autocast(setup):
        nats, tokens = answer_loss(model.eval(), questions, batch)
        written = write_answers(model, questions, batch, options.answer_tokens, ends)
    texts = [tokenizer.decode(answer.ids).strip() for answer in written]
    same = [text == q.text.strip() for text, q in zip(texts, questions, strict=True)]
    values = {
        "nats_per_token": nats,
        "tokens": tokens,
        "answers": len(questions),
        "exact_match": statistics.fmean(same),
        "ended": statistics.fmean(answer.ended for answer in written),
    }
    longest = max(len(q.prompt) + len(q.answer) for q in questions)
    yield make_row("chat", "tinymamba", (batch, longest), False, None, **values)


BENCHMARKS: dict[str, list[Callable[[Setup, dict], Iterator[dict]]]] = {
    "memory": [memory],  # first: this process holds no model yet, so a GPU is empty
    "training": [functools.partial(speed, "training")],
    "inference": [functools.partial(speed, "prefill"), functools.partial(speed, "decode")],
    "perplexity": [perplexity],
    "lm_eval": [lm_eval],
    "chat": [chat],
}

# ------------------------------------------------------------------------------------ results


def label(row: dict) -> str:
    """The model's name in tables and plots."""
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
    """The text of a row in a table."""
    if row["status"] == "failed":
        return "failed: " + row["reason"].replace("|", "/")
    if row["benchmark"] == "perplexity":
        bits = row["bits_per_byte"]
        return f"{row['nats_per_token']:.4f}" + (f", {bits:.4f} bits per byte" if bits else "")
    if row["benchmark"] == "lm_eval":
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        return f"{row['task']}, {row['metric']} ({row['filter']}): {row['value']:.4f}{error}"
    if row["benchmark"] == "chat":
        return (
            f"{row['answers']} answers: {row['nats_per_token']:.4f} nats per token that counts, "
            f"{row['exact_match']:.1%} written exactly, {row['ended']:.1%} ended by the model"
        )
    value = f"{row[MEASURES[row['benchmark']][0]]:,.0f}"
    if row["benchmark"] == "decode":
        value += f", {1000 * row['median_seconds']:.2f} ms"
    ratio = row.get("ratio_to_llama")
    return value if ratio is None else f"{value} ({ratio:.2f})"


def table(lines: list[list[str]]) -> str:
    """A Markdown table of a header and rows, with aligned columns."""
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
    """The text of results.md: a table per benchmark, with models as rows and lengths as columns."""
    m, sizes = results["machine"], [["model", "parameters", "layers", "width"]]
    sizes += [
        [name, f"{size['parameters']:,}", str(size["layers"]), str(size["width"] or "")]
        for name, size in results["models"].items()
    ]
    text = [
        f"# Benchmark\n\n{m['name']}, {m['threads']} threads, torch {m['torch']}, "
        f"transformers {m['transformers']}, {m['dtype']}\n",
        f"    python benchmark.py {m['command']}\n",
        table(sizes),
    ]
    if "llama" in results["models"]:
        text.append("In brackets: the ratio to Llama's number.\n")
    for benchmark, (_, title) in MEASURES.items():
        rows = [row for row in results["rows"] if row["benchmark"] == benchmark]
        if benchmark in LISTED and rows:
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
    """Write a PNG of one benchmark over length, with a line for each model (and batch)."""
    figure = need("matplotlib.figure").Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes, (key, title) = figure.subplots(), MEASURES[rows[0]["benchmark"]]
    lengths = sorted({row["length"] for row in rows})
    lines: dict[str, list[dict]] = {}
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
    """Print a row as JSON, and append it to the file of rows."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def write_results(results: dict, options: Options) -> None:
    """Write results.json, results.md and plots, and delete the plots of an earlier run."""
    add_ratios(results["rows"])
    for name, text in (("json", json.dumps(results, indent=1)), ("md", markdown(results))):
        write = functools.partial(lambda text, to: Path(to).write_text(text, "utf-8"), text)
        atomic_write(options.output_dir / f"results.{name}", write)
    for benchmark in MEASURES:
        path, rows = options.output_dir / f"{benchmark}.png", results["rows"]
        rows = [row for row in rows if row["benchmark"] == benchmark and row["status"] == "ok"]
        if rows and options.generate_plots and benchmark not in LISTED:
            plot(rows, path)
        else:
            path.unlink(missing_ok=True)


def describe_machine(setup: Setup, argv: list[str]) -> dict:
    """The hardware, the libraries and the command behind the numbers."""
    info, cpu = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = found[1]
    gpu = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else None
    transformers = getattr(sys.modules.get("transformers"), "__version__", None)
    return {
        "name": gpu or cpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": str(setup.device),
        "threads": torch.get_num_threads(),
        "dtype": show(setup.dtype),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers,
        "command": shlex.join(argv),
    }


# ------------------------------------------------------------------------------------ command line


@dataclass
class Options:
    """The command line."""

    # Models
    tinymamba_checkpoint: str | None = None  # model to measure: a checkpoint or a folder
    preset: str | None = None  # size of the random model
    d_model: int | None = None  # width of the random model, a multiple of 32
    n_layer: int | None = None  # layers of the random model
    vocab_size: int | None = None  # vocabulary of the random model
    models_to_compare: list[str] | None = None  # peers; tinymamba is always measured

    # Measurements
    benchmark_type: list[str] | None = None  # what to measure
    sequence_lengths: list[int] | None = None  # in tokens; perplexity takes block_size
    batch_sizes: list[int] | None = None  # sequences of one run
    tokens_per_step: int = 4096  # tokens of one run, if --batch_sizes is not given
    warmup_iterations: int = 2  # rounds before those that are counted
    test_iterations: int = 5  # rounds that are counted
    compile: str = "off"  # use torch.compile
    dtype: torch.dtype = torch.bfloat16  # dtype of autocast, on hardware that is fast in it
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps

    # Evaluation of the checkpoint
    eval_dataset: str = str(Config.val_data_path)  # .bin of tokens for perplexity
    tasks: list[str] | None = None  # tasks of lm-evaluation-harness, for lm_eval
    include_path: str | None = None  # folder of tasks' .yaml files, in place of the harness's own
    limit: int | None = None  # examples of each task, or chats of --data
    data: list[str] | None = None  # tables of chats, for chat: all that prepare.py --chat reads
    encoding_errors: str = "strict"  # what to do about invalid UTF-8 in --data
    answer_tokens: int = 256  # tokens after which an answer of the model is cut

    # Output
    output_dir: Path = Path("./benchmark_results")  # folder for the results
    generate_plots: bool = False  # write plots as PNG files too
    force: bool = False  # replace the results of an earlier run

    CHOICES: ClassVar = {
        "preset": tuple(PRESETS),
        "models_to_compare": ("tinymamba", *PEERS),
        "benchmark_type": (*BENCHMARKS, "all"),
        "compile": ("off", "on", "both"),
        "dtype": (torch.bfloat16, torch.float32),
        "encoding_errors": ("strict", "replace"),
    }
    LIMITS: ClassVar = {
        **dict.fromkeys(("d_model", "n_layer", "vocab_size", "limit"), (1, math.inf)),
        **dict.fromkeys(("tokens_per_step", "test_iterations", "answer_tokens"), (1, math.inf)),
        **dict.fromkeys(("sequence_lengths", "batch_sizes"), (1, math.inf)),
        "warmup_iterations": (0, math.inf),
    }


SHOWN = {  # defaults that --help shows in place of None
    **DEFAULT,
    "tinymamba_checkpoint": "one with random weights",
    "preset": "about 10M parameters",
    "limit": "all",
    "models_to_compare": "llama gpt2 mamba2",
    "benchmark_type": "all",
    "sequence_lengths": " ".join(map(str, LENGTHS)),
    "batch_sizes": "tokens_per_step // length",
}


def parse(argv: list[str]) -> Options:
    """The command line, each flag checked by itself."""
    parser = CliParser(usage="python benchmark.py [--FLAG VALUE ...]", description=__doc__)
    add_flags(parser, Options, SHOWN)
    return make_options(Options, parser.parse_args(argv))


def choose_config(options: Options) -> Config:
    """The checkpoint's config, or that of a model of random weights."""
    named = ("preset", "d_model", "n_layer", "vocab_size")
    given = {name: getattr(options, name) for name in named if getattr(options, name)}
    if options.tinymamba_checkpoint:
        remedy = "leave out this flag or --tinymamba_checkpoint"
        require(not given, f"--{next(iter(given), '')}", "is set by the checkpoint", remedy)
        if Path(options.tinymamba_checkpoint).is_dir():
            return load_model(options.tinymamba_checkpoint).config
        return Config.from_dict(load_checkpoint(options.tinymamba_checkpoint)["config"])
    values = PRESETS[given.pop("preset")] if options.preset else DEFAULT
    if width := options.d_model:
        remedy = "pass a multiple of 32"
        require(width % 32 == 0, "--d_model", f"{width} is not a multiple of 32", remedy)
        heads = range(max(1, width // 64), 0, -1)
        given["num_heads"] = next(n for n in heads if width % (2 * n) == 0)
    return Config(**{**values, **given, "dropout": 0.0}).validate()


def choose_benchmarks(options: Options, device: torch.device) -> list[str]:
    """What to measure, in order; `all` leaves out what is not possible."""
    of_checkpoint = () if options.tinymamba_checkpoint else OF_CHECKPOINT
    unable = dict.fromkeys(of_checkpoint, "needs --tinymamba_checkpoint")
    if not options.tasks:
        unable.setdefault("lm_eval", "needs --tasks")
    if not options.data:
        unable.setdefault("chat", "needs --data")
    if device.type == "mps":
        unable["memory"] = "needs a device that reports peak memory: cpu or cuda"
    asked = set(options.benchmark_type or ["all"])
    for kind, reason in unable.items():
        remedy = "pass that, or leave this type out"
        require(kind not in asked, "--benchmark_type", f"{kind} {reason}", remedy)
        if "all" in asked:
            print(f"note: {kind} is left out: it {reason}")
    chosen = set(BENCHMARKS) - set(unable) if "all" in asked else asked
    for kind in chosen & OF_CHECKPOINT if options.models_to_compare else ():
        print(f"note: {kind} is measured for TinyMamba only: the peers are untrained")
    return [kind for kind in BENCHMARKS if kind in chosen]


def resolve(options: Options) -> Setup:
    """Complete the options, and reject what is wrong before the first measurement."""
    device = pick_device(options.device)
    dtype = pick_amp_dtype(options.dtype, device)
    if dtype != options.dtype:
        print(f"note: {device} is slow in {show(options.dtype)}; using {show(dtype)}")
    benchmarks = choose_benchmarks(options, device)
    reason = why_no_compile(device)
    require(options.compile == "off" or not reason, "--compile", reason or "", "leave it off")
    names = options.models_to_compare or ["llama", "gpt2", "mamba2"]
    only_own = OF_CHECKPOINT.issuperset(benchmarks)
    peers = [name for name in PEERS if name in names and not only_own]
    lengths = options.sequence_lengths or LENGTHS
    setup = Setup(options, device, dtype, choose_config(options), benchmarks, lengths, peers)
    if "perplexity" in benchmarks:
        open_eval(setup, max(options.sequence_lengths or [setup.config.block_size]))
    if "lm_eval" in benchmarks:
        open_tasks(tuple(options.tasks or ()), options.include_path)
    if "chat" in benchmarks:
        open_questions(setup, *open_checkpoint(setup))
    if options.generate_plots:
        need("matplotlib")
    old = [name for name in OUTPUTS if (options.output_dir / name).exists()]
    problem = f"{options.output_dir} holds {', '.join(old)}"
    require(options.force or not old, "--output_dir", problem, "pass --force or another folder")
    return setup


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    setup = resolve(parse(argv))
    runners = {name: make_runner(name, setup) for name in ("tinymamba", *setup.peers)}
    require_writable(setup.options.output_dir, "--output_dir")
    models = {name: runner.size for name, runner in runners.items()}
    for name, size in models.items():
        print(f"{name}: {size['parameters']:,} parameters", flush=True)
    results: dict[str, Any] = {
        "machine": describe_machine(setup, argv),
        "models": models,
        "rows": [],
    }
    for benchmark in [b for kind in setup.benchmarks for b in BENCHMARKS[kind]]:
        for row in benchmark(setup, runners):
            results["rows"].append({**row, "parameters": models[row["model"]]["parameters"]})
            where = f"{row['benchmark']}, {row['batch']} x {row['length']}"
            print(f"{where}, {label(row)}: {cell(row)}", flush=True)
        write_results(results, setup.options)
    print(f"\n{markdown(results)}\nwritten to {setup.options.output_dir}")
    return int(any(row["status"] == "failed" for row in results["rows"]))


if __name__ == "__main__":
    run_cli(main)
