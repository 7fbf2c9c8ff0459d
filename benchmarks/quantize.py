"""Quantized models beside float32 and bfloat16: perplexity, size, memory, time of a token.

    python testv2.py --preset demo
    python benchmarks/quantize.py --checkpoint tinymamba_model_latest.pt
    python benchmarks/quantize.py --kinds decode products --threads 1  # random weights, no data

quality: perplexity on --val_tokens of --val_data, in blocks of the model's block_size; bytes of the
folder's weights; that of all layers but embedding and head as a share of float32; bytes of weights
in memory. decode: one token of one text after another, of the checkpoint, and of random weights of
--d_model; quantized layers between float32 activations, not compiled. products: a single layer.

All runs of one kind take turns; medians of --rounds, and their ratio to bfloat16. Every row is
appended to --output.
"""

import copy
import functools
import math
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import append_row, interleave, timed  # noqa: E402
from quantize import mean_loss, quantize_model, read_blocks  # noqa: E402
from testv2 import PRESETS, Config, TinyMambaModel, load_model, save_folder  # noqa: E402
from tinymamba.cli import CliParser, require, run_cli  # noqa: E402
from tinymamba.kernels import QuantizedLinear  # noqa: E402

SCHEMES = {  # bits, mode, calibrated
    "int8 dynamic": (8, "dynamic", False),
    "int8 weight_only": (8, "weight_only", False),
    "int4 rtn": (4, "weight_only", False),
    "int4 gptq": (4, "weight_only", True),
    "int4 dynamic rtn": (4, "dynamic", False),
    "int4 dynamic gptq": (4, "dynamic", True),
}
PRODUCTS = {"3072x768": (3072, 768), "768x3072": (768, 3072), "768x768": (768, 768)}
CPU = torch.device("cpu")


def forms(model: TinyMambaModel, size: int, calibration: torch.Tensor | None):
    """The model in every form, by name; without calibration data, those that need none."""
    yield "float32", model
    yield "bfloat16", copy.deepcopy(model).to(torch.bfloat16)
    for name, (bits, mode, calibrated) in SCHEMES.items():
        if calibration is not None or not calibrated:
            yield name, quantize_model(model, bits, mode, size, calibration if calibrated else None)


def file_bytes(model: TinyMambaModel) -> tuple[int, int]:
    """Bytes of all tensors of the model's folder; of those of its blocks and last norm alone."""
    with tempfile.TemporaryDirectory() as name:
        save_folder(Path(name), model)
        tensors = load_file(Path(name) / "model.safetensors")
    sizes = {n: t.nbytes for n, t in tensors.items()}
    tables = sum(size for n, size in sizes.items() if n.startswith(("embedding.", "head.")))
    return sum(sizes.values()), sum(sizes.values()) - tables


def held_bytes(model: TinyMambaModel) -> int:
    """Bytes of weights in memory, shared ones once."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def quality(args):
    """Rows of the checkpoint's forms."""
    model = load_model(args.checkpoint)
    calibration = read_blocks(args.calibration_data, model, args.calibration_tokens)
    ids, base = read_blocks(args.val_data, model, args.val_tokens), None
    for name, form in forms(model, args.group_size, calibration):
        loss, (whole, blocks) = mean_loss(form, ids), file_bytes(form)
        base = base or (loss, blocks)
        yield {
            "kind": "quality",
            "scheme": name,
            "perplexity": round(math.exp(loss), 4),
            "change": round(math.expm1(loss - base[0]), 5),
            "file_bytes": whole,
            "share_of_blocks": round(blocks / base[1], 4),
            "held_bytes": held_bytes(form),
        }


def next_token(model: TinyMambaModel, tokens: int):
    """Seconds a token of one text that goes on."""
    ids, state = torch.zeros(1, 1, dtype=torch.int64), model.init_state(1)

    @torch.inference_mode()
    def steps() -> None:
        nonlocal state
        for _ in range(tokens):
            _, state = model.advance(ids, state)

    return lambda: timed(steps, CPU) / tokens


def row_of(kind: str, makers: dict, rounds: int, **more) -> dict:
    """Milliseconds of every rival, and how many times faster than bfloat16 it is."""
    timings = interleave(makers, 2, rounds)
    row = {"kind": kind, "threads": torch.get_num_threads(), **more}
    for name, timing in timings.items():
        require(not timing.reason, name, str(timing.reason), "mend that")
        row[f"ms {name}"] = round(1e3 * statistics.median(timing.seconds), 4)
    for name in timings:
        row[f"gain {name}"] = round(row["ms bfloat16"] / row[f"ms {name}"], 2)
    return row


def decode(args):
    """Rows of the checkpoint, if there is one, and of random weights."""
    models = {"checkpoint": lambda: load_model(args.checkpoint)} if args.checkpoint else {}
    shape = {**PRESETS["base"], "d_model": args.d_model, "n_layer": args.n_layer}
    models["random weights"] = lambda: TinyMambaModel(Config(**shape)).eval()
    for kind, make in models.items():
        rivals = {
            name: functools.partial(next_token, form, args.tokens)
            for name, form in forms(make(), args.group_size, None)
        }
        yield row_of(f"decode, {kind}", rivals, args.rounds)


def products(args):
    """Rows of a layer alone, for a token, 8 and 512 of them."""
    for name, (d_out, d_in) in PRODUCTS.items():
        weight, bias = torch.randn(d_out, d_in), torch.randn(d_out)
        for count in (1, 8, 512):
            x = torch.randn(count, d_in)
            calls = {
                str(dtype).removeprefix("torch."): functools.partial(
                    F.linear, *(t.to(dtype) for t in (x, weight, bias))
                )
                for dtype in (torch.float32, torch.bfloat16)
            }
            for mode in ("dynamic", "weight_only"):
                layer = QuantizedLinear(d_in, d_out, True, 8, mode, args.group_size)
                layer.codes.random_(-127, 128)
                calls |= {
                    f"{mode} {x.dtype}".replace("torch.", ""): functools.partial(layer, x)
                    for x in (x, x.bfloat16())
                }
            repeats = max(2, 100 // count)
            yield row_of(
                f"product {name}, {count} tokens",
                {n: functools.partial(repeated, call, repeats) for n, call in calls.items()},
                args.rounds,
            )


def repeated(call, times: int):
    """Seconds a call."""

    @torch.inference_mode()
    def run() -> None:
        for _ in range(times):
            call()

    return lambda: timed(run, CPU) / times


KINDS = {"quality": quality, "decode": decode, "products": products}


def main(argv: list[str] | None = None) -> int:
    parser = CliParser(
        usage="python benchmarks/quantize.py [--FLAG VALUE ...]", description=__doc__
    )
    whole = {"type": int, "metavar": "N"}
    parser.add_argument("--checkpoint", metavar="FILE", help="quality needs one [none]")
    parser.add_argument(
        "--calibration_data",
        default="data/text/train.bin",
        metavar="FILE",
        help="[data/text/train.bin]",
    )
    parser.add_argument("--calibration_tokens", default=65_536, help="[65536]", **whole)
    parser.add_argument(
        "--val_data", default="data/text/val.bin", metavar="FILE", help="[data/text/val.bin]"
    )
    parser.add_argument("--val_tokens", default=65_536, help="[65536]", **whole)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--group_size", default=64, help="of 4 bits [64]", **whole)
    parser.add_argument("--d_model", default=768, help="of random weights [768]", **whole)
    parser.add_argument("--n_layer", default=4, help="of random weights [4]", **whole)
    parser.add_argument("--tokens", default=16, help="of one timing [16]", **whole)
    parser.add_argument("--rounds", default=7, help="that count; two more come first [7]", **whole)
    parser.add_argument("--threads", default=0, help="of the CPU; 0 takes all", **whole)
    parser.add_argument("--output", default="quantize.jsonl", help="[quantize.jsonl]")
    args = parser.parse_args(argv)
    require(
        args.checkpoint or "quality" not in args.kinds,
        "--checkpoint",
        "quality needs one",
        "pass a checkpoint, or --kinds decode products",
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for kind in args.kinds:
        for row in KINDS[kind](args):
            append_row(args.output, row)
    return 0


if __name__ == "__main__":
    run_cli(main)
