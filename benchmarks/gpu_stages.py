"""What benchmarks/gpu.py measures. A function for each stage, which writes its rows to a Job.

    python -m benchmarks.gpu --here training    # one stage, in this process

Each model is run in several forms: eager, compiled, and as a CUDA graph. A form that fails is a
row with the reason, and the others go on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import benchmark
from benchmark import Runner, Setup, append_row, as_compiled, interleave, make_runner, timed
from benchmarks import quality, scan
from benchmarks.streaming import llama_run
from testv2 import Config, make_optimizer
from tinymamba.cli import need, show
from tinymamba.runtime import pick_amp_dtype, pick_device

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("tinymamba", "llama")
FORMS = ("eager", "compiled")  # of a training step
PLAIN, FUSED = ("eager", "CUDA graph"), ("compiled", "compiled CUDA graph")  # of decoding
WARMUP = 2  # rounds that are not counted


class Sizes(NamedTuple):
    """How large everything is."""

    model: dict[str, Any]  # flags of benchmark.py that give the model
    small: dict[str, Any]  # flags that give the model of the stage quality
    square: int = 8192  # side of the matrices that are multiplied
    copied: int = 2**31  # bytes that are copied
    step: int = 32_768  # tokens of a training step
    lengths: tuple[int, ...] = (512, 16_384, 2_048, 32_768)  # of texts in training, by worth
    scans: tuple[tuple[int, int], ...] = ((64, 512), (2, 16_384))  # texts, and their length
    contexts: tuple[int, ...] = (512, 32_768)  # tokens before those that are decoded
    tokens: int = 32  # tokens that are decoded in one run
    rounds: int = 5  # rounds that are counted
    kernels: int = 30  # kernels of a profile
    tests: str = "not resume and not compile and not speed"  # of the stage correctness
    slow_tests: str = "resume or compile"  # of the stage resume
    corpus: tuple[str, ...] = ()  # flags of data/prepare.py
    texts: tuple[int, int] = (8, 512)  # of a step in the stage quality, and their length
    seconds: float = 40.0  # of a run in the stage quality, at most
    factors: tuple[float, ...] = (1.0, 0.5, 2.0)  # of the learning rate that is best at 10M


REAL = Sizes(model={"preset": "base"}, small={"preset": "small", "n_layer": 10})
TINY = Sizes(
    model={"d_model": 64, "n_layer": 1, "vocab_size": 256},
    small={"d_model": 32, "n_layer": 1, "vocab_size": 300},
    square=64,
    copied=2**20,
    step=64,
    lengths=(64, 32),
    scans=((2, 40),),
    contexts=(8,),
    tokens=4,
    rounds=1,
    kernels=3,
    tests="orthogonal",
    slow_tests="autocast",
    corpus=("--input", str(ROOT / "benchmark.py"), "--vocab_size", "300"),
    texts=(2, 32),
    seconds=0.2,
    factors=(1.0,),
)


class Job(NamedTuple):
    """What a stage needs: its sizes, the device, the file of rows, and when it will be killed."""

    stage: str
    sizes: Sizes
    setup: Setup
    rows: Path
    end: float  # as time.monotonic() counts

    @property
    def on_cuda(self) -> bool:
        """Whether there is a GPU; --tiny does without."""
        return self.setup.device.type == "cuda"

    def add(self, case: object, name: str, reason: str | None = None, **values: Any) -> None:
        """Write one measurement, or why it failed."""
        what = {"stage": self.stage, "case": str(case), "name": name}
        status = {"status": "failed" if reason else "ok", "reason": reason}
        append_row(str(self.rows), {**what, **status, **values})

    def skip(self, case: object, name: str, reason: str, status: str = "skipped") -> None:
        """Write why there is no measurement although nothing failed."""
        self.add(case, name, reason, status=status)

    def fits(self, case: object, names: Iterable[str], needed: float) -> bool:
        """Whether so many seconds are left; if not, what is left out is written."""
        left = self.end - time.monotonic()
        for name in names if left < needed else ():
            reason = f"takes about {needed:.0f} s, and {left:.0f} s are left"
            self.skip(case, name, reason, "left out")
        return left >= needed

    def compare(
        self,
        case: object,
        makers: Mapping[str, Callable],
        tokens: int,
        more: Callable | None = None,
    ) -> None:
        """Time functions in turn, and write the medians; see benchmark.py:interleave.

        One run is of `tokens` tokens. `more(name, seconds)` gives further values of a row.
        """
        for name, timing in interleave(dict(makers), WARMUP, self.sizes.rounds).items():
            if timing.reason:
                self.add(case, name, timing.reason)
                continue
            median = statistics.median(timing.seconds)
            values = {"tokens_per_second": tokens / median, "ms": 1000 * median}
            values |= more(name, median) if more else {}
            self.add(case, name, **values, first=timing.first, seconds=timing.seconds)


def make_setup(model: dict[str, Any], lengths: list[int]) -> Setup:
    """The setup of benchmark.py for a model of random weights, on the GPU if there is one."""
    device = pick_device("cuda" if torch.cuda.is_available() else "cpu")
    options = benchmark.Options(**model)
    dtype, config = pick_amp_dtype(torch.bfloat16, device), benchmark.choose_config(options)
    return Setup(options, device, dtype, config, [], lengths, ["llama"])


def read_rows(path: Path) -> list[dict]:
    """The rows that were written so far, without one that a killed stage left unfinished."""
    rows = []
    for line in path.read_text("utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def forms_of(forms: Iterable[str]) -> list[str]:
    """The names of the rows: every form of both models."""
    return [f"{name} {form}" for form in forms for name in NAMES]


# ------------------------------------------------------------------------------------ ceilings


def ceilings(job: Job) -> None:
    """What the card can do."""
    source = torch.ones(job.sizes.copied, dtype=torch.uint8, device=job.setup.device)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    moved = 2 * len(source) / fastest(copy, job.setup.device)  # each byte is read and written
    job.add("", "copy in memory", gb_per_second=1e-9 * moved)
    job.add("", "bf16 product", tflops=1e-12 * product_speed(job))


def product_speed(job: Job) -> float:
    """FLOP/s of a product of bf16 matrices."""
    side, device = job.sizes.square, job.setup.device
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * side**3 / fastest(functools.partial(torch.mm, a, b, out=torch.empty_like(a)), device)


def fastest(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the best of five series of ten without a pause."""
    return min(timed(lambda: [work() for _ in range(10)], device) for _ in range(5)) / 10


# ------------------------------------------------------------------------------------ correctness


def correctness(job: Job) -> None:
    """The same results as on the CPU, in float32 and in the trainer's precision."""
    exact, length = job.setup._replace(dtype=torch.float32), min(job.sizes.lengths)
    expected = loss_and_norm(exact._replace(device=torch.device("cpu")), length)
    for setup, near in ((exact, 1e-3), (job.setup, 3e-2)):
        pairs = zip(loss_and_norm(setup, length), expected, strict=True)
        error = max(abs(got / want - 1) for got, want in pairs)
        reason = None if error < near else f"differs by {error:.1e}; up to {near:.0e} is normal"
        job.add("", f"loss and gradient norm in {show(setup.dtype)}", reason, difference=error)
    run_tests(job, job.sizes.tests)


def loss_and_norm(setup: Setup, length: int) -> tuple[float, float]:
    """The loss of one text, and the norm of all gradients; in eval mode, so without noise."""
    runner = make_runner("tinymamba", setup)
    runner.model.eval()
    with benchmark.autocast(setup):
        loss = runner.loss(runner.model, benchmark.random_ids(setup, 1, length))
    loss.backward()
    return loss.item(), nn.utils.get_total_norm(p.grad for p in runner.model.parameters()).item()


def resume(job: Job) -> None:
    """Tests that train, resume and compile."""
    run_tests(job, job.sizes.slow_tests)


def run_tests(job: Job, chosen: str) -> None:
    """The tests of tests/test_gpu.py that `chosen` names, as in `pytest -k`."""
    file, settings = ROOT / "tests" / "test_gpu.py", ROOT / "pyproject.toml"
    words = [file, "-c", settings, "--rootdir", ROOT, "-m", "gpu", "-k", chosen]
    words += ["-p", "no:cacheprovider"]
    code = need("pytest").main([str(word) for word in words], plugins=[RowPlugin(job)])
    if code not in (0, 1):  # 1: a test has failed, and has a row
        job.add("", "pytest", f"exit code {int(code)}")


class RowPlugin:
    """A plugin of pytest that writes a row when a test ends."""

    def __init__(self, job: Job):
        self.job = job

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test, its preparation or its end is over."""
        name, crash = report.nodeid.rpartition("::")[2], getattr(report.longrepr, "reprcrash", None)
        if report.failed:
            reason = crash.message if crash else report.longreprtext
            self.job.add(report.when, name, " ".join(reason.split())[:200])
        elif report.skipped:
            self.job.skip("", name, "skips itself")
        elif report.when == "call":
            self.job.add("", name, seconds=round(report.duration, 1))


# ------------------------------------------------------------------------------------ training


def training(job: Job) -> None:
    """Whole steps with AdamW in bf16; peak memory beyond weights and AdamW's state.

    Llama computes its own loss, for which it keeps all logits.
    """
    runners = {name: make_runner(name, job.setup) for name in NAMES}
    check_attention(job, runners["llama"])
    ceiling, spent = measured_ceiling(job), 0.0
    for length in job.sizes.lengths:
        start = time.monotonic()
        if job.fits(length, forms_of(FORMS), spent):
            train_at(job, runners, length, ceiling)
            spent = time.monotonic() - start


def check_attention(job: Job, runner: Runner) -> None:
    """Write which of PyTorch's kernels Llama's attention runs; a plain one is a failure."""
    ids = benchmark.random_ids(job.setup, 1, min(job.sizes.lengths))
    with torch.profiler.profile() as profiler, torch.no_grad(), benchmark.autocast(job.setup):
        runner.loss(runner.model, ids)
    prefix = "aten::_scaled_dot_product_"
    found = {e.key.removeprefix(prefix) for e in profiler.key_averages() if prefix in e.key}
    fused = any(name.startswith(("flash", "cudnn")) for name in found)
    reason = None if fused else "neither flash nor cudnn"
    job.add("", f"attention of llama: {', '.join(sorted(found))}", reason)


def measured_ceiling(job: Job) -> float:
    """FLOP/s of a bf16 product, as the stage ceilings measured it or measured now."""
    found = [row["tflops"] for row in read_rows(job.rows) if row.get("tflops")]
    return 1e12 * found[-1] if found else product_speed(job)


def train_at(job: Job, runners: dict[str, Runner], length: int, ceiling: float) -> None:
    """Compare the training steps at one length."""
    torch.compiler.reset()  # PyTorch compiles only so many shapes
    ids = benchmark.random_ids(job.setup, job.sizes.step // length, length)
    peaks: dict[str, list[int]] = {name: [] for name in forms_of(FORMS)}
    makers = {
        f"{name} {form}": functools.partial(
            step_run, runners[name], form == "compiled", ids, job.setup, peaks[f"{name} {form}"]
        )
        for form in FORMS
        for name in NAMES
    }

    def more(name: str, seconds: float) -> dict[str, float]:
        flops = flops_per_token(runners[name.split()[0]], job.setup.config, length)
        share = flops * ids.numel() / seconds / ceiling
        return {"utilization": share, "peak_gb": 1e-9 * max(peaks[name][1:])}  # 0 makes the state

    job.compare(length, makers, ids.numel(), more)


def step_run(
    runner: Runner, compiled: bool, ids: Tensor, setup: Setup, peaks: list[int]
) -> Callable[[], float]:
    """A function that times a step, and appends by how many bytes it raises the peak of memory."""
    run = benchmark.make_run("training", runner, compiled, ids, setup)

    def measured() -> float:
        before = benchmark.peak_bytes(setup.device, reset=True)
        seconds = run()
        peaks.append(benchmark.peak_bytes(setup.device) - before)
        return seconds

    return measured


def flops_per_token(runner: Runner, config: Config, length: int) -> float:
    """FLOPs that one token of a training step needs, forward and backward.

        Llama      6 P + 6 L d l
        TinyMamba  6 P + 12 L d min(w, l) + 18 L e n

    P: weights of matrix products, with the head and without the embedding; L: layers. A product
    takes 2 FLOPs per weight, and the backward pass twice as many. Attention takes 4 d FLOPs for
    each key that a token sees: l/2 in the mean, or w. The recurrence multiplies and adds three
    times for each of e n numbers: to forget, to write and to read. What is computed again in the
    backward pass does not count.
    """
    linear = [m for m in runner.model.modules() if isinstance(m, nn.Linear)]
    products, layers = 6 * sum(m.weight.numel() for m in linear), runner.size["layers"]
    if not isinstance(runner, benchmark.TinyMamba):
        return products + 6 * layers * config.d_model * length
    attention = 12 * config.d_model * min(config.window_size, length)
    return products + layers * (
        attention + 18 * config.expand_factor * config.d_model * config.d_state
    )


# ------------------------------------------------------------------------------------ scan


def scans(job: Job) -> None:
    """The scan alone, forward and backward, with x, B and C in bf16."""
    c, found = job.setup.config, getattr(importlib.util.find_spec("fla"), "origin", None)
    heads = c.expand_factor * c.d_model // c.ssm_head_dim
    options = scan.Options(heads=heads, d_state=c.d_state, device=str(job.setup.device))
    names = [name for name in SCANS if found or name != "simple_gla"]
    for batch, length in job.sizes.scans:
        inputs = scan.draw(options, batch, length)
        makers = {name: functools.partial(scan_run, name, inputs) for name in names}
        job.compare(f"{batch} x {length}", makers, batch * length)
        if not found:
            job.skip(f"{batch} x {length}", "simple_gla", "flash-linear-attention is not installed")


def simple_gla(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The scan of flash-linear-attention: its keys are B, its queries C, its values dt x."""
    library: Any = importlib.import_module("fla.ops.simple_gla")
    k, q = (t[:, :, None].expand(-1, -1, x.shape[2], -1).contiguous() for t in (B, C))
    y, _ = library.chunk_simple_gla(q, k, (dt[..., None] * x).to(x.dtype), g=dt * A, scale=1.0)
    return y + (D[:, None] * x).to(x.dtype)


SCANS = {"tinymamba": scan.ours, "simple_gla": simple_gla}


def scan_run(name: str, inputs: list[Tensor]) -> Callable[[], float]:
    """A function that times a scan, which must give what ours gives."""
    require_near(SCANS[name](*inputs), scan.ours(*inputs), "y", 3e-2)
    return scan.make_run(SCANS[name], inputs)


def require_near(got: Tensor, want: Tensor, what: str, near: float) -> None:
    """A ValueError if the largest difference is not below `near`, as a share of the largest."""
    error = ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()
    if not error < near:
        raise ValueError(f"{what} differs by {error:.1e}; up to {near:.0e} is normal")


# ------------------------------------------------------------------------------------ decode


def decode(job: Job) -> None:
    """One text, greedily, with weights in bf16."""
    setup = job.setup._replace(lengths=[max(job.sizes.contexts) + job.sizes.tokens])
    models = {name: make_runner(name, setup).model.to(torch.bfloat16).eval() for name in NAMES}
    for forms in (PLAIN, FUSED):
        spent = 0.0
        for context in job.sizes.contexts:
            start = time.monotonic()
            if job.fits(context, forms_of(forms), spent):
                decode_after(job, models, context, forms)
                spent = time.monotonic() - start


def decode_after(job: Job, models: dict, context: int, forms: Iterable[str]) -> None:
    """Compare forms of decoding after so many tokens."""
    makers = {}
    for form in forms:
        for name, model in models.items():
            if "graph" in form and not job.on_cuda:
                job.skip(context, f"{name} {form}", "needs CUDA")
                continue
            make = functools.partial(decode_run, name, form, model, context, job.sizes.tokens)
            makers[f"{name} {form}"] = make
    job.compare(context, makers, 1)


class TinyMambaText:
    """A text that is continued token by token.

    In place, its state stays in the same tensors, as a CUDA graph needs it.
    """

    def __init__(self, model: Any, context: int, compiled: bool, in_place: bool):
        self.advance = torch.compile(model.advance, dynamic=False) if compiled else model.advance
        ids = torch.zeros(1, context, dtype=torch.int64, device=model.embedding.weight.device)
        self.first = model.advance(ids, model.init_state(1), last_only=True)[1]
        self.state, self.in_place = self.first.clone(), in_place

    def step(self, token: Tensor) -> Tensor:
        """(1, 1) -> logits (1, 1, v)."""
        logits, state = self.advance(token, self.state, last_only=True)
        self.state = self.state.fill(state.tensors()) if self.in_place else state
        return logits

    def rewind(self) -> None:
        """Go back to the end of the context."""
        self.state = self.state.fill(self.first.tensors()) if self.in_place else self.first


class LlamaText:
    """The same for Llama, with a cache of random numbers that has room for `tokens` more."""

    def __init__(self, model: Any, context: int, compiled: bool, tokens: int):
        self.call = torch.compile(model, dynamic=False) if compiled else model
        c, weight, self.context = model.config, model.lm_head.weight, context
        self.cache = need("transformers").StaticCache(config=c, max_cache_len=context + tokens)
        one = weight.new_zeros(1, c.num_key_value_heads, 1, c.hidden_size // c.num_attention_heads)
        for layer in self.cache.layers:
            layer.lazy_initialization(one, one)
            layer.keys.normal_()
            layer.values.normal_()
        self.rewind()

    def step(self, token: Tensor) -> Tensor:
        """(1, 1) -> logits (1, 1, v)."""
        return self.call(input_ids=token, past_key_values=self.cache, use_cache=True).logits

    def rewind(self) -> None:
        """Go back to the end of the context."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)


@torch.no_grad()
def decode_run(name: str, form: str, model: Any, context: int, tokens: int) -> Callable[[], float]:
    """A function that returns the seconds per token of a greedy answer."""
    graph, compiled = form.endswith("graph"), form.startswith("compiled")
    if (name, form) == ("llama", "eager"):
        return llama_run(model, context, tokens)  # its cache grows, as in transformers' generate
    if name == "llama":
        text: Any = LlamaText(model, context, compiled, tokens)
    else:
        text = TinyMambaText(model, context, compiled, in_place=graph)
    step = capture(text) if graph else text.step
    first = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)

    def steps() -> None:
        token = first
        for _ in range(tokens):
            token = step(token)[:, -1:].argmax(-1)

    @torch.no_grad()
    def run() -> float:
        text.rewind()
        return timed(steps, first.device) / tokens

    return run


def capture(text: Any) -> Callable[[Tensor], Tensor]:
    """`text.step` as a CUDA graph, which must give the same logits."""
    tokens = [torch.full((1, 1), i, device="cuda") for i in range(4)]
    expected = [text.step(token).clone() for token in tokens]
    text.rewind()
    given, graph, side = tokens[0].clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what libraries do in their first calls cannot be captured
        for _ in range(3):
            text.step(given)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        logits = text.step(given)

    def step(token: Tensor) -> Tensor:
        given.copy_(token)
        graph.replay()
        return logits

    text.rewind()
    for token, want in zip(tokens, expected, strict=True):
        require_near(step(token), want, "the graph's logits", 2e-2)
    return step


# ------------------------------------------------------------------------------------ profile


def profile(job: Job) -> None:
    """The kernels in which a training step of TinyMamba spends most time."""
    length, setup = job.sizes.lengths[0], job.setup
    ids = benchmark.random_ids(setup, job.sizes.step // length, length)
    runner = make_runner("tinymamba", setup)
    for form in FORMS:
        run = benchmark.make_run("training", runner, form == "compiled", ids, setup)
        wall, kernels = busiest(run, job.on_cuda)
        seconds, calls = (sum(kernel[i] for kernel in kernels) for i in (1, 2))
        kernels.insert(0, ("all kernels", seconds, calls))
        for name, seconds, calls in kernels[: 1 + job.sizes.kernels]:
            values = {"ms": 1000 * seconds, "share": seconds / wall, "calls": calls}
            job.add(f"{length}, {form}", name[:90], **values)


def busiest(run: Callable[[], float], on_cuda: bool) -> tuple[float, list[tuple]]:
    """(seconds of a step, its kernels as (name, seconds, calls), the costliest first).

    On a CPU there are operations in place of kernels.
    """
    for _ in range(WARMUP):
        run()
    with torch.profiler.profile() as profiler:
        wall = run()
    kind, spent = ("CUDA", "self_device_time_total") if on_cuda else ("CPU", "self_cpu_time_total")
    kernels = [
        (event.key, 1e-6 * getattr(event, spent), event.count)
        for event in profiler.key_averages()
        if event.device_type.name == kind and not event.is_user_annotation
    ]
    return wall, sorted(kernels, key=lambda kernel: -kernel[1])


# ------------------------------------------------------------------------------------ quality


def learning(job: Job) -> None:
    """Loss on the built-in corpus after equal time, compiled, each model at its best rate."""
    sizes, setup = job.sizes, make_setup(job.sizes.small, list(job.sizes.texts[1:]))
    data = make_data(sizes.corpus, setup.device)
    learners: dict[str, Learner] = {}
    for name in NAMES:
        learner, reason = benchmark.attempt(compiled_learner, name, setup, sizes.texts, data[0])
        learners |= {name: learner} if learner else {}
        if reason:
            job.add("4/4", name, reason)
    runs = [(name, factor) for factor in sizes.factors for name in learners]
    extra, least = 2.0, min(sizes.seconds, 5.0)  # of a run: seconds to validate, and to train
    if runs and job.fits("4/4", learners, len(runs) * (extra + least)):
        seconds = min(sizes.seconds, (job.end - time.monotonic()) / len(runs) - extra)
        for name, factor in runs:
            learn(job, learners[name], data, factor * quality.RATES["M"][name], seconds)


def compiled_learner(name: str, setup: Setup, texts: tuple[int, int], train: Tensor) -> Learner:
    """A learner that has made a few steps."""
    learner = Learner(name, setup, texts)
    for _ in zip(range(3), learner.train(train, 0.0, math.inf), strict=False):
        pass
    return learner


def make_data(corpus: Iterable[str], device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Training and validation tokens, and the average number of bytes per validation token."""
    from data import prepare  # needs the package tokenizers

    with tempfile.TemporaryDirectory() as folder:
        prepare.main(["--output_dir", folder, *corpus])
        train, val, ratio = quality.load_data(quality.Options("M", data=folder))
    return train.to(device), val.to(device), ratio


class Learner:
    """A model, compiled once, that can be trained several times from its first weights."""

    def __init__(self, name: str, setup: Setup, texts: tuple[int, int]):
        self.name, self.texts, runner = name, texts, make_runner(name, setup)
        self.model = runner.model
        if name == "llama":
            self.model.config.use_cache = False
        self.first = {key: t.clone() for key, t in self.model.state_dict().items()}
        self.call: Any = runner.form(compiled=True)

    def train(self, data: Tensor, lr: float, seconds: float) -> Iterator[tuple[int, float, float]]:
        """Train for so many seconds; yields tokens, seconds and loss after each step."""
        self.model.load_state_dict(self.first)
        optimizer = make_optimizer(self.model.train(), Config(lr=lr, weight_decay=0.0))
        random, (batch, block) = torch.Generator().manual_seed(1000), self.texts
        start, tokens, spent = time.perf_counter(), 0, 0.0
        while spent < seconds:
            share = quality.schedule(1000 * spent / seconds, 1000, 100)
            window = quality.random_window(data, batch, block, random)
            loss = quality.update(self.call, optimizer, window, lr * share)
            tokens, spent = tokens + batch * block, time.perf_counter() - start
            yield tokens, spent, loss

    def validate(self, val: Tensor) -> float:
        """Nats per token."""
        with as_compiled(False):
            return quality.blockwise(self.model.eval(), val, self.texts[1])


def learn(job: Job, learner: Learner, data: tuple, lr: float, seconds: float) -> None:
    """Train once. A row after each quarter of the time, the last with the validation loss."""
    train, val, bytes_per_token = data
    losses: list[float] = []
    quarter = 1
    for tokens, spent, loss in learner.train(train, lr, seconds):
        losses = [*losses[-19:], loss]
        values: Any = {"lr": lr, "tokens": tokens, "spent": spent}
        values["train_loss"] = sum(losses) / len(losses)
        if spent >= seconds:
            bits = learner.validate(val) / math.log(2) / bytes_per_token
            job.add("4/4", learner.name, **values, bits_per_byte=bits)
        elif spent >= seconds * quarter / 4:
            job.add(f"{quarter}/4", learner.name, **values)
            quarter += 1
