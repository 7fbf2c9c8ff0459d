"""The scan alone, forward and backward: ours, that of transformers' Mamba2, that of mambapy.

    python benchmarks/scan.py --batch_sizes 1 4 --sequence_lengths 512 4096
    python benchmarks/scan.py --dtype float32 --device cuda

All get the same x, dt, A, B, C, D and must give the same y, or the run fails. Each runs as in
training: ours and Mamba2's torch path on x, B and C of --dtype, mambapy on whatever comes of
multiplying them. In every round each runs once, in turn; the medians count.
"""

import functools
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import interleave, timed  # noqa: E402
from testv2 import selective_scan  # noqa: E402
from tinymamba.cli import DTYPES, CliParser, need, require, run_cli  # noqa: E402


def ours(x, dt, A, B, C, D) -> Tensor:
    return selective_scan(x, dt, A, B, C, D)[0]


def mamba2(x, dt, A, B, C, D) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x, dt, A, B[:, :, None], C[:, :, None], chunk_size=64, D=D)


def mambapy(x, dt, A, B, C, D) -> Tensor:
    """As its MambaBlock.selective_scan does, which has no heads: each channel is one."""
    pscan = need("mambapy.pscan").pscan
    P = x.shape[-1]
    dt, A, D = dt.repeat_interleave(P, 2), A.repeat_interleave(P), D.repeat_interleave(P)
    flat = x.flatten(2)  # (b, l, e)
    decay = torch.exp(dt * A)[..., None].expand(*dt.shape, B.shape[-1])  # (b, l, e, n)
    written = dt[..., None] * B[:, :, None] * flat[..., None]
    y = (pscan(decay, written) @ C.to(written.dtype)[..., None]).squeeze(3) + D * flat
    return y.unflatten(2, x.shape[2:])


SCANS = {"ours": ours, "mamba2": mamba2, "mambapy": mambapy}


def draw(args, batch: int, length: int) -> list[Tensor]:
    """x (b, l, h, p), dt (b, l, h), A (h,), B and C (b, l, n), D (h,), as leaves of a graph."""
    g = torch.Generator().manual_seed(0)
    H, P, N = args.heads, args.head_dim, args.d_state

    def normal(*shape, dtype=torch.float32) -> Tensor:
        t = torch.randn(*shape, generator=g)
        return t.to(args.device, dtype).requires_grad_()

    x = normal(batch, length, H, P, dtype=DTYPES[args.dtype])
    B, C = (normal(batch, length, N, dtype=DTYPES[args.dtype]) for _ in "BC")
    dt = F.softplus(normal(batch, length, H).detach() - 4).requires_grad_()
    A = (-1 - 15 * torch.rand(H, generator=g)).to(args.device).requires_grad_()
    return [x, dt, A, B, C, normal(H)]


def maker(scan, inputs: list[Tensor], args):
    """A function that runs the scan once, forward and backward, and returns its seconds."""
    dy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(args.device)

    def work() -> None:
        y = scan(*inputs)
        torch.autograd.grad(y, inputs, dy.to(y.dtype))

    return functools.partial(timed, work, torch.device(args.device))


def compare(args, batch: int, length: int) -> list[dict]:
    """A row for each scan; those that do not agree with ours are refused."""
    inputs, rows = draw(args, batch, length), []
    near = 1e-3 if args.dtype == "float32" else 3e-2
    expected = ours(*inputs).float()
    for name in args.scans:
        error = (SCANS[name](*inputs).float() - expected).abs().max() / expected.abs().max()
        require(error < near, name, f"differs from ours by {error:.1e}", "do not compare them")
    makers = {n: functools.partial(maker, SCANS[n], inputs, args) for n in args.scans}
    for name, timing in interleave(makers, args.warmup_iterations, args.test_iterations).items():
        require(not timing.reason, name, f"failed ({timing.reason})", "leave it out of --scans")
        rows.append(
            {
                "scan": name,
                "batch": batch,
                "length": length,
                "seconds": statistics.median(timing.seconds),
                "all": timing.seconds,
            }
        )
    return rows


def main() -> None:
    parser = CliParser(description=__doc__)
    parser.add_argument("--scans", nargs="+", choices=SCANS, default=list(SCANS))
    for name, default in (("batch_sizes", [4]), ("sequence_lengths", [512])):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=default)
    for name, default, text in (
        ("heads", 12, "H"),
        ("head_dim", 64, "P"),
        ("d_state", 16, "N"),
        ("warmup_iterations", 1, "rounds that do not count"),
        ("test_iterations", 5, "rounds"),
        ("threads", 0, "of the CPU; 0 takes all"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} [{default}]")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of x, B, C [bfloat16]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="scan.jsonl", help="file of rows [scan.jsonl]")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for batch in args.batch_sizes:
        for length in args.sequence_lengths:
            rows = compare(args, batch, length)
            with open(args.output, "a") as file:
                file.writelines(json.dumps({**vars(args), **row}) + "\n" for row in rows)
            first = rows[0]["seconds"]
            for row in rows:
                print(
                    f"batch {batch}  length {length}  {row['scan']:8s} "
                    f"{1000 * row['seconds']:9.1f} ms  {row['seconds'] / first:6.1f} x"
                )


if __name__ == "__main__":
    run_cli(main)
