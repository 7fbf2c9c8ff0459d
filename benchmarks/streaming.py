"""Streaming: time for a token after a short, a long and a very long text; many sessions; prefill.

    python benchmarks/streaming.py                                  # 9.6M parameters, float32
    python benchmarks/streaming.py --dtype bfloat16 --compile
    python benchmarks/streaming.py --tinymamba_checkpoint tinymamba_model_latest.pt

token: one text goes on by --tokens tokens after so many of context: TinyMamba through its server,
sampling included, transformers' Llama of equal size with its cache of keys and values, greedy. The
cache is filled with random numbers, as reading a long text with Llama would take minutes;
TinyMamba has read its context.
sessions: --sessions answers as one batch, against one after another.
adapters: no LoRA adapter, one, two that take turns from token to token.
prefill: a prompt of 4,096 tokens, against the forward pass of training on 8 x 512 of them.

All runs of one kind take turns; medians of --rounds. Every row is appended to --output.
"""

import contextlib
import copy
import functools
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import DEFAULT, PEERS, append_row, count, fit, interleave, timed  # noqa: E402
from peft import apply_lora_to_model, set_adapter  # noqa: E402
from streaming import StreamingConfig, StreamingServer  # noqa: E402
from testv2 import Config, TinyMambaModel, load_model  # noqa: E402
from tinymamba.cli import DTYPES, CliParser, require, run_cli  # noqa: E402
from tinymamba.runtime import pick_device  # noqa: E402

BATCH, BLOCK = 8, 512  # texts of a training pass, and tokens of each
GREEDY = StreamingConfig(temperature=0.0, eos_token_id=-1)


def read(server: StreamingServer, context: int) -> str:
    """A session that has read so many random tokens."""
    session = server.create_session()
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(server.vocab_size, (context,), generator=random).tolist()
    list(server.answer(ids, session, as_ids=True, max_new_tokens=0))
    return session


def go_on(server: StreamingServer, context: int, tokens: int):
    """Seconds a token of an answer, again and again from the same place."""
    session = read(server, context)

    def run() -> float:
        fork = server.fork_session(session)
        answer = server.answer([], fork, as_ids=True, max_new_tokens=tokens + 1)
        next(answer)  # its logits were known
        spent = timed(lambda: list(answer), server.decoder.device)
        server.delete_session(fork)
        return spent / tokens

    return run


def go_on_with_cache(model, context: int, tokens: int):
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


def together(server: StreamingServer, sessions: int, tokens: int) -> float:
    """Seconds a token of all, as one batch; prompts are read before."""
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
    spent = 0.0
    for i in range(sessions):
        with contextlib.closing(
            server.answer([1 + i], as_ids=True, max_new_tokens=tokens)
        ) as answer:
            next(answer)
            spent += timed(functools.partial(list, answer), server.decoder.device)
    return spent / (sessions * (tokens - 1))


def prefill(server: StreamingServer, ids: list[int]) -> float:
    """Seconds a token."""
    answer = server.answer(ids, as_ids=True, max_new_tokens=0)
    return timed(functools.partial(list, answer), server.decoder.device) / len(ids)


def training_forward(model: TinyMambaModel, ids: torch.Tensor, dtype: torch.dtype) -> float:
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        return timed(lambda: model(ids, ids), ids.device) / ids.numel()


def switching(model: TinyMambaModel, names: list[str | None], tokens: int) -> float:
    """Seconds a token where each of these adapters takes its turn."""
    state, ids = model.init_state(1), torch.zeros(1, 1, dtype=torch.int64)
    ids = ids.to(model.embedding.weight.device)

    @torch.inference_mode()
    def steps() -> None:
        nonlocal state
        for i in range(tokens):
            set_adapter(model, names[i % len(names)])
            _, state = model.advance(ids, state)

    return timed(steps, ids.device) / tokens


def make_models(args) -> tuple[dict[str, StreamingServer], torch.nn.Module, TinyMambaModel]:
    """TinyMamba's servers by name; Llama; TinyMamba as it trains, float32."""
    dtype = DTYPES[args.dtype]

    def tinymamba() -> TinyMambaModel:
        torch.manual_seed(0)
        return (
            load_model(args.tinymamba_checkpoint)
            if args.tinymamba_checkpoint
            else (TinyMambaModel(Config(**DEFAULT, dropout=0.0)))
        )

    forms = {"tinymamba": False} | ({"tinymamba compiled": True} if args.compile else {})
    servers = {
        name: StreamingServer(tinymamba(), str(args.device), GREEDY, dtype=dtype, compiled=compiled)
        for name, compiled in forms.items()
    }
    config = servers["tinymamba"].model.config
    positions = max(args.contexts) + args.tokens
    facts = fit("llama", config, positions, count(TinyMambaModel, config))
    llama = PEERS["llama"].make(config, positions, facts["layers"], facts["width"])
    return servers, llama.to(args.device, dtype).eval(), tinymamba().to(args.device).train()


def kinds(args):
    """For each kind of run, what takes turns in it: a function that gives seconds a token."""
    servers, llama, trained = make_models(args)
    for context in args.contexts:
        rivals = {
            name: functools.partial(go_on, server, context, args.tokens)
            for name, server in servers.items()
        }
        if context <= args.llama_context:
            rivals["llama"] = functools.partial(go_on_with_cache, llama, context, args.tokens)
        yield f"token after {context}", {name: make() for name, make in rivals.items()}
    for name, server in servers.items():
        yield (
            f"{args.sessions} sessions, {name}",
            {
                way.__name__: functools.partial(way, server, args.sessions, args.tokens)
                for way in (together, one_by_one)
            },
        )
    adapted = (
        apply_lora_to_model(apply_lora_to_model(copy.deepcopy(trained).eval(), name="a"), name="b")
        .requires_grad_(False)
        .to(DTYPES[args.dtype])
    )
    yield (
        "adapters",
        {
            way: functools.partial(switching, adapted, names, args.tokens)
            for way, names in {"none": [None], "one": ["a"], "two": ["a", "b"]}.items()
        },
    )
    ids = torch.randint(trained.config.vocab_size, (BATCH, BLOCK), device=args.device)
    yield (
        "prefill",
        {
            "prefill": functools.partial(prefill, servers["tinymamba"], ids.flatten().tolist()),
            "training": functools.partial(training_forward, trained, ids, DTYPES[args.dtype]),
        },
    )


def main(argv: list[str] | None = None) -> int:
    parser = CliParser(
        usage="python benchmarks/streaming.py [--FLAG VALUE ...]", description=__doc__
    )
    whole = {"type": int, "metavar": "N"}
    parser.add_argument("--tinymamba_checkpoint", metavar="FILE", help="[a fresh model]")
    parser.add_argument("--contexts", nargs="+", default=[100, 512, 32_768, 1_000_000], **whole)
    parser.add_argument("--llama_context", default=32_768, help="Llama's longest [32768]", **whole)
    parser.add_argument("--tokens", default=32, help="that follow [32]", **whole)
    parser.add_argument("--sessions", default=32, help="at one time [32]", **whole)
    parser.add_argument("--rounds", default=7, help="that count; two more come first [7]", **whole)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="the step compiled, too")
    parser.add_argument("--device", default="auto", help="[auto]")
    parser.add_argument("--threads", default=0, help="of the CPU; 0 takes all", **whole)
    parser.add_argument("--output", default="streaming.jsonl", help="[streaming.jsonl]")
    args = parser.parse_args(argv)
    for name in ("tokens", "sessions", "rounds"):
        require(getattr(args, name) > 1, f"--{name}", "is too small", "use 2 or more")
    args.device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    for kind, runs in kinds(args):
        timings = interleave(
            {name: lambda run=run: run for name, run in runs.items()}, 2, args.rounds
        )
        row = {"kind": kind, "dtype": args.dtype, "threads": torch.get_num_threads()}
        for name, timing in timings.items():
            require(not timing.reason, name, str(timing.reason), "mend that")
            row[f"ms {name}"] = round(1e3 * statistics.median(timing.seconds), 4)
            row[f"spread {name}"] = [round(1e3 * f(timing.seconds), 4) for f in (min, max)]
        append_row(args.output, row)
    return 0


if __name__ == "__main__":
    run_cli(main)
