"""Streaming: time per token after short and very long texts; many sessions; adapters; prefill.

    python -m benchmarks.streaming                                  # 9.6M parameters, float32
    python -m benchmarks.streaming --dtype bfloat16 --compile
    python -m benchmarks.streaming --engine onnx                    # ONNX Runtime as well
    python -m benchmarks.streaming --tinymamba_checkpoint tinymamba_model_latest.pt
    python -m benchmarks.streaming --read 1000000                   # one long prompt, and no more

token: one text is continued by --tokens tokens after each length of --contexts: by TinyMamba
through its server, sampling included, and by transformers' Llama of equal size with its KV cache,
greedily. The cache is filled with random numbers, as reading a long text with Llama would take
minutes; TinyMamba has read its context.
sessions: --sessions answers as one batch, against one after another.
adapters: no LoRA adapter, one, and two that alternate from token to token.
prefill: a prompt of 4,096 tokens, against the forward pass of training on 8 x 512 of them.
read: with --read only: the time per token and the memory of the process over one long prompt, which
is given in pieces; neither may grow.

In every round each form runs once; rows have medians over --rounds. Every row is appended to
--output.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch

from benchmark import DEFAULT, PEERS, append_row, count, fit, interleave, timed
from peft import apply_lora_to_model, set_adapter
from streaming import StreamingConfig, StreamingServer
from testv2 import Config, TinyMambaModel, load_model
from tinymamba.cli import parse_flags, require, run_cli, show
from tinymamba.onnx_engine import ENGINES
from tinymamba.runtime import pick_device

PIECE = 8192  # tokens of a prompt that are given at a time
BATCH, BLOCK = 8, 512  # texts of a training pass, and tokens of each
CONTEXTS = [100, 512, 32_768, 1_000_000]
GREEDY = StreamingConfig(temperature=0.0, eos_token_id=-1)


@dataclass
class Options:
    """The command line."""

    tinymamba_checkpoint: str | None = None  # model to measure; None means random weights
    contexts: list[int] | None = None  # tokens before; None means 100 512 32768 1000000
    llama_context: int = 32_768  # Llama's longest context in tokens
    tokens: int = 32  # tokens that are timed
    sessions: int = 32  # sessions that answer at one time
    rounds: int = 7  # rounds that are counted; two more come first
    dtype: torch.dtype = torch.float32  # dtype of the weights
    compile: bool = False  # measure the compiled step as well
    engine: str = "torch"  # onnx measures ONNX Runtime as well, in float32 on a CPU
    onnx_folder: str = ""  # keeps what it exports; empty takes ~/.cache/tinymamba/onnx
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    threads: int = 0  # CPU threads; 0 means all
    read: int = 0  # read a prompt of so many tokens, and measure nothing else
    output: str = "streaming.jsonl"  # file of rows

    CHOICES: ClassVar = {"dtype": (torch.float32, torch.bfloat16), "engine": ENGINES}
    LIMITS: ClassVar = {
        **dict.fromkeys(("tokens", "sessions", "rounds"), (2, math.inf)),
        "read": (0, math.inf),
    }


# ------------------------------------------------------------------------------------ tokens


def read(server: StreamingServer, context: int) -> str:
    """A session that has read `context` random tokens."""
    session = server.create_session()
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(server.vocab_size, (context,), generator=random).tolist()
    list(server.answer(ids, session, as_ids=True, max_new_tokens=0))
    return session


def token_run(server: StreamingServer, context: int, tokens: int) -> Callable[[], float]:
    """A function that returns the seconds per token of an answer, always after the same text."""
    session = read(server, context)

    def run() -> float:
        fork = server.fork_session(session)
        answer = server.answer([], fork, as_ids=True, max_new_tokens=tokens + 1)
        next(answer)  # its logits are known already
        spent = timed(lambda: list(answer), server.decoder.device)
        server.delete_session(fork)
        return spent / tokens

    return run


def llama_run(model: Any, context: int, tokens: int) -> Callable[[], float]:
    """The same for Llama."""
    from transformers import DynamicCache

    c, weight = model.config, model.lm_head.weight
    shape = (1, c.num_key_value_heads, context, c.hidden_size // c.num_attention_heads)
    cache = DynamicCache(config=c)
    for layer in range(c.num_hidden_layers):
        cache.update(weight.new_empty(shape).normal_(), weight.new_empty(shape).normal_(), layer)

    @torch.inference_mode()
    def steps() -> None:
        token = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
        for _ in range(tokens):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)

    def run() -> float:
        spent = timed(steps, weight.device)
        cache.crop(-tokens)
        return spent / tokens

    return run


# ------------------------------------------------------------------- sessions, adapters, prefill


def together(server: StreamingServer, sessions: int, tokens: int) -> float:
    """Seconds per token of all sessions as one batch, after their prompts are read."""
    answers = [server.answer([1 + i], as_ids=True, max_new_tokens=tokens) for i in range(sessions)]
    for answer in answers:
        next(answer)

    def run() -> None:
        for _ in range(tokens - 1):
            for answer in answers:
                next(answer)

    spent = timed(run, server.decoder.device)
    for answer in answers:
        answer.close()
    return spent / (sessions * (tokens - 1))


def one_by_one(server: StreamingServer, sessions: int, tokens: int) -> float:
    """Seconds per token of the same answers, one after another."""
    spent = 0.0
    for i in range(sessions):
        stream = server.answer([1 + i], as_ids=True, max_new_tokens=tokens)
        with contextlib.closing(stream) as answer:
            next(answer)
            spent += timed(functools.partial(list, answer), server.decoder.device)
    return spent / (sessions * (tokens - 1))


def prefill(server: StreamingServer, ids: list[int]) -> float:
    """Seconds per token of a prompt."""
    answer = server.answer(ids, as_ids=True, max_new_tokens=0)
    return timed(functools.partial(list, answer), server.decoder.device) / len(ids)


def reading(server: StreamingServer, tokens: int) -> dict[str, Any]:
    """A row: microseconds per token and MB of the process, early and late in one long prompt.

    Early is the second eighth, so that what is allocated once is there.
    """
    import resource  # Windows has none

    session, random = server.create_session(), torch.Generator().manual_seed(0)
    seconds, memory, piece = [], [], min(PIECE, tokens // 16)
    for _ in range(tokens // piece):
        ids = torch.randint(server.vocab_size, (piece,), generator=random).tolist()
        answer = server.answer(ids, session, as_ids=True, max_new_tokens=0)
        seconds.append(timed(functools.partial(list, answer), server.decoder.device) / piece)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    eighth = len(seconds) // 8
    early, late = slice(eighth, 2 * eighth), slice(-eighth, None)
    row: dict[str, Any] = {"kind": f"read {tokens}"}
    for name, part in (("early", early), ("late", late)):
        row[f"us {name}"] = round(1e6 * statistics.median(seconds[part]), 3)
        row[f"MB {name}"] = round(max(memory[part]), 1)
    return row


def training_forward(model: TinyMambaModel, ids: torch.Tensor, dtype: torch.dtype) -> float:
    """Seconds per token of the forward pass of training."""
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        return timed(lambda: model(ids, ids), ids.device) / ids.numel()


def switching(model: TinyMambaModel, names: list[str | None], tokens: int) -> float:
    """Seconds per token with these adapters, which alternate from token to token."""
    state, ids = model.init_state(1), torch.zeros(1, 1, dtype=torch.int64)
    ids = ids.to(model.embedding.weight.device)

    @torch.inference_mode()
    def steps() -> None:
        nonlocal state
        for i in range(tokens):
            set_adapter(model, names[i % len(names)])
            _, state = model.advance(ids, state)

    return timed(steps, ids.device) / tokens


# ------------------------------------------------------------------------------------ main


def make_tinymamba(options: Options) -> TinyMambaModel:
    """The checkpoint, or a model with random weights."""
    torch.manual_seed(0)
    if options.tinymamba_checkpoint:
        return load_model(options.tinymamba_checkpoint)
    return TinyMambaModel(Config(**DEFAULT, dropout=0.0))


def make_servers(options: Options, device: torch.device) -> dict[str, StreamingServer]:
    """TinyMamba's servers by name."""
    forms: dict[str, dict] = {"tinymamba": {}}
    forms |= {"tinymamba compiled": {"compiled": True}} if options.compile else {}
    if options.engine == "onnx":
        forms["tinymamba onnx"] = {"engine": "onnx", "onnx_folder": options.onnx_folder}
    return {
        name: StreamingServer(
            make_tinymamba(options), str(device), GREEDY, dtype=options.dtype, **form
        )
        for name, form in forms.items()
    }


def make_llama(options: Options, config: Config, positions: int) -> torch.nn.Module:
    """Llama of the size of the TinyMamba model with this config."""
    size = fit("llama", config, positions, count(TinyMambaModel, config))
    llama = PEERS["llama"].make(config, positions, size["layers"], size["width"])
    return llama.to(options.dtype).eval()


def kinds(options: Options, device: torch.device) -> Iterator[tuple[str, dict]]:
    """For each kind of measurement, the functions to compare; each returns seconds per token."""
    contexts, tokens = options.contexts or CONTEXTS, options.tokens
    servers = make_servers(options, device)
    config = servers["tinymamba"].model.config
    llama = make_llama(options, config, max(contexts) + tokens).to(device)
    trained = make_tinymamba(options).to(device).train()
    for context in contexts:
        runs = {name: token_run(server, context, tokens) for name, server in servers.items()}
        if context <= options.llama_context:
            runs["llama"] = llama_run(llama, context, tokens)
        yield f"token after {context}", runs
    for name, server in servers.items():
        ways = {"together": together, "one_by_one": one_by_one}
        sizes = server, options.sessions, tokens
        runs = {way: functools.partial(measure, *sizes) for way, measure in ways.items()}
        yield f"{options.sessions} sessions, {name}", runs
    adapted = copy.deepcopy(trained).eval()
    for name in ("a", "b"):
        apply_lora_to_model(adapted, name=name)
    adapted.requires_grad_(False).to(options.dtype)
    choices: dict[str, list] = {"none": [None], "one": ["a"], "two": ["a", "b"]}
    yield (
        "adapters",
        {
            way: functools.partial(switching, adapted, names, tokens)
            for way, names in choices.items()
        },
    )
    ids = torch.randint(config.vocab_size, (BATCH, BLOCK), device=device)
    runs = {
        name.replace("tinymamba", "prefill"): functools.partial(
            prefill, server, ids.flatten().tolist()
        )
        for name, server in servers.items()
        if "compiled" not in name  # that compiles the step only
    }
    runs["training"] = functools.partial(training_forward, trained, ids, options.dtype)
    yield "prefill", runs


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python -m benchmarks.streaming [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.read:
        remedy = "use at least 16, or 0 for the other measurements"
        require(options.read >= 16, "--read", f"{options.read} is out of range", remedy)
        server = make_servers(options, device)["tinymamba"]
        found = reading(server, options.read) | {"threads": torch.get_num_threads()}
        append_row(options.output, found)
        return 0
    for kind, runs in kinds(options, device):
        makers = {name: lambda run=run: run for name, run in runs.items()}
        timings = interleave(makers, 2, options.rounds)
        row: dict[str, Any] = {"kind": kind, "dtype": show(options.dtype)}
        row["threads"] = torch.get_num_threads()
        for name, timing in timings.items():
            require(not timing.reason, name, str(timing.reason), "fix that")
            row[f"ms {name}"] = round(1e3 * statistics.median(timing.seconds), 4)
            row[f"spread {name}"] = [round(1e3 * f(timing.seconds), 4) for f in (min, max)]
        append_row(options.output, row)
    return 0


if __name__ == "__main__":
    run_cli(main)
