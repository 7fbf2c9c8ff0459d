"""Where the time of a training step goes: by part of the model, and by operator.

A part is a set of calls of modules and functions, which are found by their names. Under the
profiler each of these calls is a range; what an operator takes belongs to the innermost range
around it. In the backward pass it belongs to the part of the forward operator with the same
sequence number: autograd gives one to each node of its graph.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent

PREFIX = "part: "  # of the names of ranges
STEP = "not in any part"  # of a step
MODEL, NORM, MIXING = "rest of the model", "norm and convolution", "gate and mixing"
SCAN, COMPILED = "SSM: scan", "blocks, compiled"
SSM_PRODUCTS, SSM_REST = "SSM: projections", "SSM: steps, rotation, gating"
ATTENTION_PRODUCTS, ATTENTION_REST = "attention: projections", "attention: norms, RoPE, layout"
AUTOGRAD, CLIPPING, DATA = "autograd itself", "clipping", "data"
OPTIMIZER, EXCHANGE = "optimizer", "waiting for the device"

OF_MODEL = {  # modules and methods, from the outermost inwards: their part
    "": MODEL,
    "embedding": "embedding",
    "norm": "last norm",
    "cross_entropy": "head and loss",
}
OF_BLOCK = {
    "": MIXING,
    "gate": MIXING,
    "norm": NORM,
    "conv": NORM,
    "ssm": SSM_REST,
    "ssm.in_proj": SSM_PRODUCTS,
    "ssm.angle_proj": SSM_PRODUCTS,
    "ssm.out_proj": SSM_PRODUCTS,
    "ssm.conv": "SSM: convolution",
    "attention": ATTENTION_REST,
    "attention.qkv": ATTENTION_PRODUCTS,
    "attention.out_proj": ATTENTION_PRODUCTS,
    "attention.conv": "attention: convolution",
    "attention.attend_plain": "attention: core",
    "attention.attend_fused": "attention: core",
    "attention.memory": "memory",
    "mlp": "MLP",
}
PARTS = (
    "embedding", NORM, SSM_PRODUCTS, "SSM: convolution", SCAN, SSM_REST, ATTENTION_PRODUCTS,
    "attention: convolution", "attention: core", ATTENTION_REST, "memory", "MLP", MIXING,
    COMPILED, "last norm", "head and loss", MODEL, AUTOGRAD, CLIPPING, OPTIMIZER, DATA, EXCHANGE,
)  # fmt: skip
BY_EVENT = {"Optimizer.": OPTIMIZER, "enumerate(DataLoader)": DATA}  # ranges that PyTorch records
BACKWARD = "autograd::engine::evaluate_function"  # a node of autograd's graph
PRODUCT = re.compile(r"\w+::(_?\w*mm|_?(add)?mv|dot|_linear_pointwise|_\w*scaled_dot_product_\w+)$")
ENOUGH = 0.95  # share of a step that the parts should account for
WARMUP = 2  # steps before those that are profiled
COLUMNS = ("forward", "backward", "products", "other", "ms", "%")


@dataclass
class Cost:
    """What a part takes, in ms."""

    forward: float = 0.0
    backward: float = 0.0
    products: float = 0.0  # matrix products of both passes, and PyTorch's attention kernels

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    def add(self, spent: float, backward: bool, product: bool) -> None:
        """Count the time of an operator."""
        if backward:
            self.backward += spent
        else:
            self.forward += spent
        self.products += spent if product else 0.0


class Profile(NamedTuple):
    """The costs of a training step."""

    costs: dict[str, Cost]  # by part, in the order of PARTS
    step: float  # ms of a step
    plain: float  # ms of the step before, without the profiler

    @property
    def share(self) -> float:
        """How much of a step the parts account for."""
        return sum(cost.total for cost in self.costs.values()) / self.step

    def table(self) -> list[str]:
        """The lines of a Markdown table, and what share it accounts for."""
        rows = [["part", *COLUMNS]]
        for part, cost in self.costs.items():
            columns = (cost.forward, cost.backward, cost.products, cost.total - cost.products)
            numbers = [f"{ms:.1f}" for ms in (*columns, cost.total)]
            rows.append([part, *numbers, f"{100 * cost.total / self.step:.1f}"])
        width = max(len(row[0]) for row in rows)
        lines = [
            f"| {part:{width}} | {' | '.join(f'{cell:>8}' for cell in cells)} |"
            for part, *cells in rows
        ]
        lines.insert(1, f"|{'-' * (width + 2)}|{'---------:|' * len(COLUMNS)}")
        found = f"the parts account for {self.share:.1%} of a step of {self.step:.1f} ms"
        found += f" ({self.plain:.1f} ms without the profiler)"
        if self.share < ENOUGH:
            found += f": less than {ENOUGH:.0%}, the rest is spent outside of them"
        return [*lines, "", found]


# ------------------------------------------------------------------------------------ ranges


@contextlib.contextmanager
def recorded(owner: Any, name: str, part: str) -> Iterator[None]:
    """Inside `with`, calls of owner.name are ranges of the part."""
    call, own = getattr(owner, name), name in vars(owner)

    @functools.wraps(call)
    def run(*args: Any, **options: Any) -> Any:
        with record_function(PREFIX + part):
            return call(*args, **options)

    setattr(owner, name, run)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, call)
        else:
            delattr(owner, name)


def calls_of(root: nn.Module, parts: dict[str, str]) -> Iterator[tuple[Any, str, str]]:
    """The owner, the name and the part of each call that `parts` names and the module has."""
    for path, part in parts.items():
        above, _, name = path.rpartition(".")
        owner = root.get_submodule(above)
        found = getattr(owner, name, None) if name else owner
        if isinstance(found, nn.Module):
            yield found, "forward", part
        elif found is not None:
            yield owner, name, part


@contextlib.contextmanager
def recorded_parts(trainer: Any) -> Iterator[None]:
    """Inside `with`, the parts of the trainer's steps are ranges."""
    model = trainer.model
    calls = list(calls_of(model, OF_MODEL))
    compiled = "forward" in vars(model.blocks[0])  # by compile_blocks: graphs, without parts
    for block in model.blocks:
        calls += calls_of(block, {"": COMPILED} if compiled else OF_BLOCK)
    if not compiled:
        scans = type(model.blocks[0].ssm)  # FSDP puts classes of its own above it
        calls.append((sys.modules[scans.__module__], "selective_scan", SCAN))
    calls += [
        (trainer, "train_step", STEP),
        (trainer, "read", DATA),
        (trainer, "exchange", EXCHANGE),
        (torch.autograd, "backward", AUTOGRAD),
        (nn.utils, "clip_grad_norm_", CLIPPING),
    ]
    with contextlib.ExitStack() as stack:
        for call in calls:
            stack.enter_context(recorded(*call))
        yield


# ------------------------------------------------------------------------------------ costs


class Place(NamedTuple):
    """Where an operator stands."""

    part: str | None  # None outside of a step
    backward: bool = False
    product: bool = False


def costs_of(events: list[FunctionEvent], step: FunctionEvent, on_gpu: bool) -> dict[str, Cost]:
    """The costs of all parts and of STEP in one step: time of the GPU's kernels, or of the host."""
    costs: dict[str, Cost] = {}
    makers: dict[tuple, Place] = {}  # thread and sequence number: the last operator that had it
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    roots = [(e, Place(None)) for e in on_host if e.cpu_parent is None]
    pending = sorted(roots, key=lambda root: root[0].time_range.start, reverse=True)
    while pending:
        event, above = pending.pop()
        place = place_of(event, above, makers)
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            makers[event.thread, event.sequence_nr] = place
        spent = event.self_cpu_time_total  # in microseconds
        if on_gpu:
            spent = sum(kernel.duration for kernel in event.kernels)
        inside = step.time_range.start <= event.time_range.start <= step.time_range.end
        if inside and place.part is not None:
            cost = costs.setdefault(place.part, Cost())
            cost.add(spent / 1000, place.backward, place.product)
        pending += [(child, place) for child in reversed(event.cpu_children)]
    return costs


def place_of(event: FunctionEvent, above: Place, makers: dict[tuple, Place]) -> Place:
    """Where an event stands, from where the one around it does."""
    name = event.name
    if name.startswith(BACKWARD):
        maker = makers.get((event.fwd_thread, event.sequence_nr), Place(AUTOGRAD))
        return Place(maker.part or AUTOGRAD, backward=True)
    if name.startswith(PREFIX):
        part = name.removeprefix(PREFIX)
        return Place(part, above.backward or part == AUTOGRAD)
    for prefix, part in BY_EVENT.items():
        if name.startswith(prefix):
            return Place(part)
    return above._replace(product=above.product or PRODUCT.match(name) is not None)


# ------------------------------------------------------------------------------------ steps


def profile_parts(trainer: Any, batches: Iterator, steps: int) -> tuple[Profile, Any]:
    """Run WARMUP steps, then `steps` in the profiler: the costs of the fastest; the profiler."""
    for _ in range(WARMUP):
        start = time.perf_counter()
        trainer.train_step(batches)
    plain = time.perf_counter() - start
    with recorded_parts(trainer), torch.profiler.profile() as profiler:
        for _ in range(steps):
            trainer.train_step(batches)
    events = profiler.events()
    step = min((e for e in events if e.name == PREFIX + STEP), key=lambda e: e.cpu_time_total)
    costs = costs_of(events, step, on_gpu=trainer.device.type == "cuda")
    ordered = {part: costs[part] for part in PARTS if part in costs}
    return Profile(ordered, step.cpu_time_total / 1000, 1000 * plain), profiler


def profile_steps(trainer: Any, batches: Iterator, trace: Path | None) -> None:
    """Profile five steps, two of them to warm up: two tables, and a trace file."""
    profile, profiler = profile_parts(trainer, batches, steps=3)
    column = "self_cuda_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
    say: Callable[[str], object] = trainer.log.say
    say(profiler.key_averages().table(sort_by=column, row_limit=20))
    say("\n".join(profile.table()))
    if trace:
        profiler.export_chrome_trace(str(trace))
        say(f"trace in {trace}: open it in chrome://tracing or ui.perfetto.dev")
