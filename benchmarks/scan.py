"""The scan alone, forward and backward: ours, that of transformers' Mamba2, that of mambapy.

    python -m benchmarks.scan --batch_sizes 1 4 --sequence_lengths 512 4096
    python -m benchmarks.scan --dtype float32 --device cuda

All scans get the same x, dt, A, B, C, D and must give the same y, or the run fails. `delta` is the
exception: the gated delta rule gives another y, and tests/test_delta_rule.py checks it. Each runs
as in training: ours and Mamba2's torch path take x, B and C in --dtype; mambapy computes in the
dtype of their products. In every round each scan runs once; the medians count. Rows go to --output.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark import interleave, timed
from testv2 import selective_scan
from tinymamba.cli import DTYPES, need, parse_flags, require, run_cli, show
from tinymamba.delta_rule import run_delta_rule

# ------------------------------------------------------------------------------------ scans


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The scan of testv2.py."""
    return selective_scan(x, dt, A, B, C, D)[0]


def delta(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The gated delta rule of delta_rule.py, with keys of length 1."""
    heads, K, C = x.shape[2], *(F.normalize(t.float(), dim=-1) for t in (B, C))
    rows = [x, (-dt).exp(), dt * A, *(t[:, :, None].expand(-1, -1, heads, -1) for t in (K, C))]
    x_rows, beta, log_decay, K, C = (t.transpose(1, 2).flatten(0, 1) for t in rows)  # (b*h, l, ...)
    state = dt.new_zeros(len(x_rows), x.shape[-1], B.shape[-1])
    y, _ = run_delta_rule(x_rows, beta, log_decay, K, C, state, 32, stepwise=False)
    return y.unflatten(0, (-1, heads)).transpose(1, 2) + D[:, None].to(x.dtype) * x


def mamba2(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The torch path of transformers' Mamba2."""
    library = need("transformers.models.mamba2.modeling_mamba2")
    scan = library.mamba2_chunk_scan
    return scan(x, dt, A, B[:, :, None], C[:, :, None], chunk_size=64, D=D)


def mambapy(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """As its MambaBlock.selective_scan, which has no heads: each channel is one."""
    pscan, width = need("mambapy.pscan").pscan, x.shape[-1]
    dt = dt.repeat_interleave(width, 2)
    A, D = A.repeat_interleave(width), D.repeat_interleave(width)
    flat = x.flatten(2)  # (b, l, e)
    decay = torch.exp(dt * A)[..., None].expand(*dt.shape, B.shape[-1])  # (b, l, e, n)
    written = dt[..., None] * B[:, :, None] * flat[..., None]
    y = (pscan(decay, written) @ C.to(written.dtype)[..., None]).squeeze(3) + D * flat
    return y.unflatten(2, x.shape[2:])


SCANS = {"ours": ours, "delta": delta, "mamba2": mamba2, "mambapy": mambapy}


@dataclass
class Options:
    """The command line."""

    scans: list[str] | None = None  # None means all of these
    batch_sizes: list[int] | None = None  # sequences; None means 4
    sequence_lengths: list[int] | None = None  # in tokens; None means 512
    heads: int = 12  # heads of the SSM
    head_dim: int = 64  # width of a head
    d_state: int = 16  # size of the state
    warmup_iterations: int = 1  # rounds before those that are counted
    test_iterations: int = 5  # rounds that are counted
    threads: int = 0  # CPU threads; 0 means all
    dtype: torch.dtype = torch.bfloat16  # dtype of x, B and C
    device: str = "cpu"  # cpu, cuda or cuda:1
    output: str = "scan.jsonl"  # file of rows

    CHOICES: ClassVar = {"scans": tuple(SCANS), "dtype": tuple(DTYPES.values())}


# ---------------------------------------------------------------------------------- measuring


def draw(options: Options, batch: int, length: int) -> list[Tensor]:
    """x (b, l, h, p), dt (b, l, h), A (h,), B and C (b, l, n), D (h,), as leaves of a graph."""
    generator = torch.Generator().manual_seed(0)
    heads, state = options.heads, options.d_state

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        t = torch.randn(*shape, generator=generator)
        return t.to(options.device, dtype).requires_grad_()

    x = normal(batch, length, heads, options.head_dim, dtype=options.dtype)
    B, C = (normal(batch, length, state, dtype=options.dtype) for _ in range(2))
    dt = F.softplus(normal(batch, length, heads).detach() - 4).requires_grad_()
    A = (-1 - 15 * torch.rand(heads, generator=generator)).to(options.device).requires_grad_()
    return [x, dt, A, B, C, normal(heads)]


def make_run(scan: Callable, inputs: list[Tensor]) -> Callable[[], float]:
    """A function that runs the scan once, forward and backward, and returns its seconds."""
    device = inputs[0].device
    dy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(device)

    def work() -> None:
        y = scan(*inputs)
        torch.autograd.grad(y, inputs, dy.to(y.dtype))

    return functools.partial(timed, work, device)


def compare(options: Options, batch: int, length: int) -> list[dict]:
    """A row for each scan; one that disagrees with ours is an error."""
    inputs, names = draw(options, batch, length), options.scans or list(SCANS)
    near = 1e-3 if options.dtype == torch.float32 else 3e-2
    expected = ours(*inputs).float()
    for name in names:
        if name == "delta":
            continue
        error = (SCANS[name](*inputs).float() - expected).abs().max() / expected.abs().max()
        problem, remedy = f"differs from ours by {error:.1e}", "leave it out of --scans"
        require(error < near, name, problem, remedy)
    makers = {name: functools.partial(make_run, SCANS[name], inputs) for name in names}
    timings = interleave(makers, options.warmup_iterations, options.test_iterations)
    rows = []
    for name, timing in timings.items():
        require(not timing.reason, name, f"failed ({timing.reason})", "leave it out of --scans")
        median = statistics.median(timing.seconds)
        row = {"scan": name, "batch": batch, "length": length, "seconds": median}
        rows.append({**row, "all": timing.seconds})
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse_flags(Options, argv, "python -m benchmarks.scan [--FLAG VALUE ...]", __doc__)
    batch_sizes, lengths = options.batch_sizes or [4], options.sequence_lengths or [512]
    options = dataclasses.replace(
        options,
        scans=options.scans or list(SCANS),
        batch_sizes=batch_sizes,
        sequence_lengths=lengths,
    )
    if options.threads:
        torch.set_num_threads(options.threads)
    for batch, length in [(batch, length) for batch in batch_sizes for length in lengths]:
        rows = compare(options, batch, length)
        about = {**dataclasses.asdict(options), "dtype": show(options.dtype)}
        with open(options.output, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**about, **row}) + "\n" for row in rows)
        for row in rows:
            ratio = row["seconds"] / rows[0]["seconds"]
            print(
                f"batch {batch}  length {length}  {row['scan']:8s} "
                f"{1000 * row['seconds']:9.1f} ms  {ratio:6.1f} x"
            )
    return 0


if __name__ == "__main__":
    run_cli(main)
