"""A ledger of speed: twelve ratios, each to a peer or to a product of equal work in the same run.

    python -m benchmarks.ledger                          # append a row to docs/ledger.jsonl
    python -m benchmarks.ledger --check                  # compare with the last row, append nothing
    python -m benchmarks.ledger --check --only scan passes
    python -m benchmarks.ledger --dry_run                # print the row only

Every ratio is of seconds on the CPU: ours divided by the reference's, so less is better.
docs/benchmarks.md says what they are. In every round each side runs once; the ratio is the median
of the rounds' ratios, and its spread the range of the middle half of them. Llama has as many
parameters as TinyMamba, SDPA attention and the same autocast. The models have random weights.

A row holds the commit, so files under git's control must be as committed. All rows are drawn into
docs/ledger.png. --check warns where a number is worse than in the last row of the same machine by
more than the noise: by more than either spread, and more than 5%, twice. It exits with 0.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch

import benchmark
from benchmark import DEFAULT, Setup, append_row, describe_machine, interleave, timed
from benchmarks import scan
from benchmarks.parts import make_run as passes_run
from benchmarks.report import read_rows
from benchmarks.streaming import GREEDY, llama_run, make_llama, together, token_run
from benchmarks.streaming import Options as StreamingOptions
from quantize import quantize_model
from streaming import StreamingServer
from testv2 import PRESETS, Config, TinyMambaModel
from tinymamba.checkpoint import atomic_write, require_writable
from tinymamba.cli import need, parse_flags, require, run_cli
from tinymamba.runtime import pick_amp_dtype

ROOT = Path(__file__).resolve().parent.parent
NOISE = 0.05  # share by which a number may be worse on any machine
CPU = torch.device("cpu")
DEMO = {name: PRESETS["demo"][name] for name in (*DEFAULT, "window_size") if name != "bias"}

Run = Callable[[], float]  # returns seconds
Makers = tuple[Callable[[], Run], Callable[[], Run]]  # of ours and of the reference


class Sizes(NamedTuple):
    """What is measured."""

    model: dict[str, Any] = DEFAULT  # fields of Config
    demo: dict[str, Any] = DEMO
    wide: dict[str, Any] = {**PRESETS["base"], "n_layer": 4}  # where a token waits for weights
    batch: int = 8  # texts of a training step
    length: int = 512  # of texts and prompts, in tokens
    demo_length: int = PRESETS["demo"]["block_size"]
    long_length: int = 4096  # of a training step of one text
    tokens: int = 16  # over which decoding is timed
    sessions: int = 32  # that answer at one time


SIZES = Sizes()


def config_of(fields: dict[str, Any]) -> Config:
    """A model without dropout, as the peers have none."""
    return Config(**{**fields, "dropout": 0.0}).validate()


# ------------------------------------------------------------------------------------ references


def product_run(multiplications: int, inner: int, repeats: int = 1) -> Run:
    """Seconds of bfloat16 products (4096, inner) x (inner, n) with that many multiplications."""
    rows, columns = 4096, 4 * inner
    times = max(1, round(multiplications / (rows * inner * columns)))
    columns = max(1, round(multiplications / (rows * inner * times)))
    left, right = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16()

    @torch.inference_mode()
    def work() -> None:
        for _ in range(times * repeats):
            left @ right

    return lambda: timed(work, CPU) / repeats


def against_llama(
    kind: str,
    fields: dict[str, Any],
    case: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
) -> Makers:
    """A benchmark of benchmark.py for TinyMamba and for Llama; case: batch and length."""
    dtype = pick_amp_dtype(dtype, CPU)
    options, config = benchmark.Options(), config_of(fields)
    setup = Setup(options, CPU, dtype, config, [kind], [case[1]], ["llama"])
    ids = benchmark.random_ids(setup, *case)
    torch.compiler.reset()  # else a second shape would be compiled as a dynamic one
    ours, llama = (
        functools.partial(
            benchmark.make_run, kind, benchmark.make_runner(name, setup), compiled, ids, setup
        )
        for name in ("tinymamba", "llama")
    )
    return ours, llama


# ------------------------------------------------------------------------------------ numbers


def training(s: Sizes) -> Makers:
    """A training step of 8 x 512 tokens with AdamW / Llama's."""
    return against_llama("training", s.model, (s.batch, s.length))


def training_compiled(s: Sizes) -> Makers:
    """The same, both compiled."""
    return against_llama("training", s.model, (s.batch, s.length), compiled=True)


def training_long(s: Sizes) -> Makers:
    """A training step of one text of 4,096 tokens / Llama's."""
    return against_llama("training", s.model, (1, s.long_length))


def training_demo(s: Sizes) -> Makers:
    """A training step of the preset demo, 8 x 256 tokens / Llama's of its size."""
    return against_llama("training", s.demo, (s.batch, s.demo_length))


def passes(s: Sizes) -> Makers:
    """Both passes of the model, 8 x 512 tokens / products with its matrices' multiplications."""
    config = config_of(s.model)
    ids = torch.randint(config.vocab_size, (s.batch, s.length + 1))
    model = TinyMambaModel(config)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    product = functools.partial(product_run, 3 * s.batch * s.length * weights, config.d_model)
    return functools.partial(passes_run, model, ids), product


def scan_alone(s: Sizes) -> Makers:
    """Both passes of one scan of 8 x 512 tokens / products with the recurrence's multiplications.

    Those are three for each number of the state and token, and twice as many in the backward pass.
    """
    ssm = TinyMambaModel(config_of(s.model)).blocks[0].ssm
    sizes = {"heads": ssm.n_heads, "head_dim": ssm.config.ssm_head_dim}
    options = scan.Options(**sizes, d_state=ssm.config.d_state)
    inputs = scan.draw(options, s.batch, s.length)
    count = 9 * inputs[0].numel() * options.d_state
    product = functools.partial(product_run, count, ssm.config.d_model, repeats=10)
    return functools.partial(scan.make_run, scan.ours, inputs), product


def loss_head(s: Sizes) -> Makers:
    """Head and loss, both passes of 8 x 512 tokens / their three products."""
    config = config_of(s.model)
    model = TinyMambaModel(config)
    hidden = torch.randn(s.batch, s.length, config.d_model, requires_grad=True)
    targets = torch.randint(config.vocab_size, (s.batch, s.length))

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.cross_entropy(hidden, targets)
        loss.backward()
        model.zero_grad()

    count = 3 * hidden.numel() * config.vocab_size
    product = functools.partial(product_run, count, config.d_model)
    return (lambda: functools.partial(timed, work, CPU)), product


def prefill(s: Sizes) -> Makers:
    """A prompt of 512 tokens / Llama's."""
    return against_llama("prefill", s.model, (1, s.length))


def token(s: Sizes) -> Makers:
    """A token after 512, by model.advance in float32 / Llama's with its cache."""
    return against_llama("decode", s.model, (1, s.length), torch.float32)


def make_server(fields: dict[str, Any], dtype: torch.dtype, bits: int = 0) -> StreamingServer:
    """A server of a model with random weights; bits: 0 is not quantized."""
    torch.manual_seed(0)
    model = TinyMambaModel(config_of(fields)).eval()
    model = quantize_model(model, bits) if bits else model
    return StreamingServer(model, "cpu", GREEDY, dtype=dtype)


def server_token(s: Sizes) -> Makers:
    """A token after 512, by the server in bfloat16 / Llama's in bfloat16."""
    server, positions = make_server(s.model, torch.bfloat16), s.length + s.tokens
    llama = make_llama(StreamingOptions(dtype=torch.bfloat16), config_of(s.model), positions)
    case = s.length, s.tokens
    return functools.partial(token_run, server, *case), functools.partial(llama_run, llama, *case)


def sessions(s: Sizes) -> Makers:
    """A token of 32 sessions that answer together, per session / a token of one session."""
    server = make_server(s.model, torch.float32)
    batch = functools.partial(together, server, s.sessions, s.tokens)
    return (lambda: batch), functools.partial(token_run, server, 1, s.tokens)


def int8(s: Sizes) -> Makers:
    """A token of an int8 model of width 768 / of the same model in bfloat16; by the server."""
    ours, theirs = (make_server(s.wide, torch.bfloat16, bits) for bits in (8, 0))
    case = 1, s.tokens
    return functools.partial(token_run, ours, *case), functools.partial(token_run, theirs, *case)


class Number(NamedTuple):
    """A number of the ledger."""

    make: Callable[[Sizes], Makers]
    rounds: int = 7  # that count
    warmup: int = 1  # rounds before


NUMBERS = {
    "training": Number(training),
    "training_long": Number(training_long),
    "training_demo": Number(training_demo, 11),
    "passes": Number(passes),
    "scan": Number(scan_alone, 25, 2),
    "loss_head": Number(loss_head, 15, 2),
    "prefill": Number(prefill, 15, 2),
    "token": Number(token, 15, 2),
    "server_token": Number(server_token, 15, 2),
    "sessions": Number(sessions, 9),
    "int8": Number(int8, 15, 2),
    "training_compiled": Number(training_compiled),  # last: eager code runs as without a compiler
}


@dataclass
class Options:
    """The command line."""

    only: list[str] | None = None  # numbers to measure; None means all
    check: bool = False  # compare with the last row of the same machine, and append nothing
    dry_run: bool = False  # print, and append nothing
    threads: int = 0  # CPU threads; 0 means all
    output: Path = ROOT / "docs" / "ledger.jsonl"  # file of rows; the picture lies beside it

    CHOICES: ClassVar = {"only": tuple(NUMBERS)}


# ------------------------------------------------------------------------------------ rows


def summarize(ours: list[float], reference: list[float]) -> dict[str, float]:
    """A number of a row, from the seconds of every round."""
    ratios = [mine / theirs for mine, theirs in zip(ours, reference, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ratio": round(ratio, 4),
        "spread": round(high - low, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "ms": round(1000 * statistics.median(ours), 4),
        "reference_ms": round(1000 * statistics.median(reference), 4),
    }


def measure(name: str, sizes: Sizes) -> dict[str, float]:
    """A number of a row."""
    number = NUMBERS[name]
    ours, reference = number.make(sizes)
    makers = {"ours": ours, "reference": reference}
    timings = interleave(makers, number.warmup, number.rounds)
    for side, timing in timings.items():
        require(not timing.reason, f"{name}, {side}", str(timing.reason), "fix that, or use --only")
    return summarize(timings["ours"].seconds, timings["reference"].seconds)


def measure_all(names: list[str], commit: str) -> dict[str, Any]:
    """A row; its numbers are printed as they come."""
    start, date = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts, numbers = machine(), {}
    for name in names:
        found = numbers[name] = measure(name, SIZES)
        print(
            f"{name:18s} {found['ratio']:8.3f}   middle half {found['low']:.3f} to "
            f"{found['high']:.3f}   {found['ms']:.2f} / {found['reference_ms']:.2f} ms",
            flush=True,
        )
    seconds = round(time.perf_counter() - start)
    return {
        "date": date,
        "commit": commit,
        "machine": facts,
        "seconds": seconds,
        "numbers": numbers,
    }


def git(*words: str) -> str:
    """What a command of git prints."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    except OSError as e:
        done = subprocess.CompletedProcess(words, 1, "", str(e))
    problem = f"{' '.join(words)} failed ({' '.join(done.stderr.split())})"
    require(done.returncode == 0, "git", problem, "pass --dry_run")
    return done.stdout.strip()


def committed(output: Path) -> str:
    """The commit; a UserError if a file under git's control is not as committed.

    The ledger and its picture may differ: the row before may not be committed yet.
    """
    exempt = [f":(exclude){path}" for path in (output, output.with_suffix(".png"))]
    inside = output.is_relative_to(ROOT)
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *exempt[: 2 * inside])
    names = ", ".join(line.split(maxsplit=1)[1] for line in changed.splitlines())
    problem = f"{names} differs from the last commit, which a row would name"
    require(not changed, "git", problem, "commit first, or pass --dry_run")
    return git("rev-parse", "--short=10", "HEAD")


def machine() -> dict[str, Any]:
    """What must be the same for two rows to be compared."""
    need("transformers")  # describe_machine names its version if it is loaded
    setup = Setup(benchmark.Options(), CPU, torch.bfloat16, config_of(DEFAULT), [], [], [])
    facts = describe_machine(setup, [])
    return {name: facts[name] for name in ("cpu", "cores", "threads", "torch", "transformers")}


def last_of_machine(rows: list[dict], row: dict) -> dict[str, dict]:
    """The numbers that earlier rows of this machine have: each from the last that has it."""
    found: dict[str, dict] = {}
    for earlier in rows:
        if earlier["machine"] == row["machine"]:
            found |= {n: {**v, "commit": earlier["commit"]} for n, v in earlier["numbers"].items()}
    return found


def worse(rows: list[dict], row: dict) -> dict[str, str]:
    """A warning for each number that is worse than the last of this machine by more than noise."""
    before, found = last_of_machine(rows, row), {}
    for name, new in row["numbers"].items():
        if name not in before:
            continue
        old = before[name]
        more, noise = new["ratio"] - old["ratio"], max(new["spread"], old["spread"])
        if more > noise and more > NOISE * old["ratio"]:
            found[name] = (
                f"warning: {name} is {more / old['ratio']:.0%} worse than at {old['commit']}: "
                f"{new['ratio']:.3f} instead of {old['ratio']:.3f}, spread {noise:.3f}"
            )
    return found


def check(rows: list[dict], row: dict) -> None:
    """Print what is worse, in a second measurement as well."""
    if unknown := row["numbers"].keys() - last_of_machine(rows, row):
        print(f"note: this machine has no row with {', '.join(sorted(unknown))}")
    suspects = list(worse(rows, row))
    if suspects:
        print(f"measuring again what seems worse: {', '.join(suspects)}")
        again = worse(rows, measure_all(suspects, ""))
        print("\n".join(again.values()) or "not confirmed")


# ------------------------------------------------------------------------------------ picture


def plot(rows: list[dict], path: Path) -> None:
    """Draw every number over the rows, with its spread; a color for each machine."""
    figure = need("matplotlib.figure").Figure(figsize=(11, 7), dpi=110, layout="constrained")
    panels = figure.subplots(3, 4, sharex=True).flat
    machines = list(dict.fromkeys(describe(row["machine"]) for row in rows))
    for name, axes in zip(NUMBERS, panels, strict=True):
        for color, kind in enumerate(machines):
            points = [
                (i, row["numbers"][name])
                for i, row in enumerate(rows)
                if name in row["numbers"] and describe(row["machine"]) == kind
            ]
            middle = [p["ratio"] for _, p in points]
            around = [[p["ratio"] - p["low"] for _, p in points]]
            around.append([p["high"] - p["ratio"] for _, p in points])
            style = {"marker": "o", "markersize": 3, "capsize": 2, "color": f"C{color}"}
            axes.errorbar([i for i, _ in points], middle, around, label=kind, **style)
        axes.set_title(name, fontsize=9)
        axes.grid(color="0.9")
        ticks = sorted({0, len(rows) // 2, len(rows) - 1})
        labels = [f"{rows[i]['date'][:10]}\n{rows[i]['commit'][:7]}" for i in ticks]
        axes.set_xticks(ticks, labels)
        axes.tick_params(labelsize=7)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=7, frameon=False)
    figure.supylabel("seconds of TinyMamba / seconds of the reference (less is better)", size=9)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))


def describe(facts: dict[str, Any]) -> str:
    """A machine in a line."""
    return f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"


# ------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    o = parse_flags(Options, argv, "python -m benchmarks.ledger [--FLAG VALUE ...]", __doc__)
    if o.threads:
        torch.set_num_threads(o.threads)
    appends, commit = not (o.check or o.dry_run), ""
    if appends:
        commit = committed(o.output.resolve())
        require_writable(o.output.parent, "--output")
        need("matplotlib")
    earlier = read_rows(str(o.output)) if o.output.exists() else []
    row = measure_all(o.only or list(NUMBERS), commit)
    if o.check:
        check(earlier, row)
    if appends:
        append_row(str(o.output), row)
        plot([*earlier, row], o.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    run_cli(main)
