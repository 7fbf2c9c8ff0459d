"""Quantized models beside float32 and bfloat16: perplexity, size, memory, time of a token.

    python testv2.py --preset demo
    python -m benchmarks.quantize --checkpoint tinymamba_model_latest.pt
    python -m benchmarks.quantize --kinds decode products --threads 1  # random weights, no data
    python -m benchmarks.quantize --kinds decode --threads 1 --d_model 320 --vocab_size 8192

quality: perplexity on --val_tokens of --val_data, in blocks of the model's block_size; bytes of the
folder's weights; bytes of all layers except embedding and head, as a share of float32; bytes of
weights in memory. decode: time of one token, and the same bytes, of the checkpoint and of random
weights of --d_model; quantized layers between float32 activations, not compiled. products: time of
a single layer.

In every round each form runs once; rows have medians over --rounds and their ratio to bfloat16.
Every row is appended to --output.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from benchmark import append_row, interleave, timed
from quantize import mean_loss, quantize_model, quantize_weight, read_blocks
from testv2 import PRESETS, Config, TinyMambaModel, load_model, save_folder
from tinymamba.cli import parse_flags, require, run_cli, show
from tinymamba.kernels import QuantizedLinear

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


@dataclass
class Options:
    """The command line."""

    # Measurements
    kinds: list[str] | None = None  # what to measure; None means all of these
    rounds: int = 7  # rounds that are counted; two more come first
    threads: int = 0  # CPU threads; 0 means all
    output: str = "quantize.jsonl"  # file of rows

    # Checkpoint
    checkpoint: str | None = None  # model to quantize; quality needs one
    calibration_data: str = "data/text/train.bin"  # .bin of tokens for GPTQ
    calibration_tokens: int = 65_536  # tokens of it
    val_data: str = "data/text/val.bin"  # .bin of tokens for the perplexity
    val_tokens: int = 65_536  # tokens of it

    # Layers
    group_size: int = 64  # weights that share a scale, for 4 bits
    d_model: int = 768  # width of the model of random weights
    n_layer: int = 4  # layers of the model of random weights
    vocab_size: int = 50_304  # its tokens
    tokens: int = 16  # tokens over which one decoding run is timed

    CHOICES: ClassVar = {"kinds": ("quality", "decode", "products")}


def forms(
    model: TinyMambaModel, size: int, calibration: torch.Tensor | None
) -> Iterator[tuple[str, TinyMambaModel]]:
    """The model in every form, by name; without calibration data, only those that need none."""
    yield "float32", model
    yield "bfloat16", copy.deepcopy(model).to(torch.bfloat16)
    for name, (bits, mode, calibrated) in SCHEMES.items():
        if calibration is not None or not calibrated:
            yield name, quantize_model(model, bits, mode, size, calibration if calibrated else None)


def file_bytes(model: TinyMambaModel) -> tuple[int, int]:
    """Bytes of all tensors in the model's folder, and of those outside embedding and head."""
    with tempfile.TemporaryDirectory() as name:
        save_folder(Path(name), model)
        tensors = load_file(Path(name) / "model.safetensors")
    sizes = {n: t.nbytes for n, t in tensors.items()}
    tables = sum(size for n, size in sizes.items() if n.startswith(("embedding.", "head.")))
    return sum(sizes.values()), sum(sizes.values()) - tables


def memory_bytes(model: TinyMambaModel) -> int:
    """Bytes of weights in memory, shared ones once."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def quality(options: Options) -> Iterator[dict]:
    """Rows of the checkpoint in every form."""
    model = load_model(str(options.checkpoint))
    calibration = read_blocks(options.calibration_data, model, options.calibration_tokens)
    ids, base = read_blocks(options.val_data, model, options.val_tokens), None
    for name, form in forms(model, options.group_size, calibration):
        loss, (whole, blocks) = mean_loss(form, ids), file_bytes(form)
        base = base or (loss, blocks)
        yield {
            "kind": "quality",
            "scheme": name,
            "perplexity": round(math.exp(loss), 4),
            "change": round(math.expm1(loss - base[0]), 5),
            "file_bytes": whole,
            "share_of_blocks": round(blocks / base[1], 4),
            "held_bytes": memory_bytes(form),
        }


def decode_run(model: TinyMambaModel, tokens: int) -> Callable[[], float]:
    """A function that continues one text and returns its seconds per token."""
    ids, state = torch.zeros(1, 1, dtype=torch.int64), model.init_state(1)

    @torch.inference_mode()
    def steps() -> None:
        nonlocal state
        for _ in range(tokens):
            _, state = model.advance(ids, state)

    return lambda: timed(steps, CPU) / tokens


def time_all(kind: str, makers: dict, rounds: int) -> dict:
    """A row: milliseconds of every form, and how many times faster than bfloat16 it is."""
    timings = interleave(makers, 2, rounds)
    row: dict[str, Any] = {"kind": kind, "threads": torch.get_num_threads()}
    for name, timing in timings.items():
        require(not timing.reason, name, str(timing.reason), "fix that")
        row[f"ms {name}"] = round(1e3 * statistics.median(timing.seconds), 4)
    for name in timings:
        row[f"gain {name}"] = round(row["ms bfloat16"] / row[f"ms {name}"], 2)
    return row


def decode(options: Options) -> Iterator[dict]:
    """Rows of the checkpoint, if there is one, and of random weights."""
    own = {name: getattr(options, name) for name in ("d_model", "n_layer", "vocab_size")}
    shape = {**PRESETS["base"], **own, "num_heads": max(1, options.d_model // 64)}
    models: dict[str, Callable[[], TinyMambaModel]] = {}
    if options.checkpoint:
        models["checkpoint"] = lambda: load_model(str(options.checkpoint))
    models["random weights"] = lambda: TinyMambaModel(Config(**shape)).eval()
    for kind, make in models.items():
        models_of = dict(forms(make(), options.group_size, None))
        runs = {
            name: functools.partial(decode_run, form, options.tokens)
            for name, form in models_of.items()
        }
        row = time_all(f"decode, {kind}", runs, options.rounds)
        yield row | {f"bytes {name}": memory_bytes(form) for name, form in models_of.items()}


def products(options: Options) -> Iterator[dict]:
    """Rows of a single layer, for 1, 8, 32 and 512 tokens."""
    for name, (d_out, d_in) in PRODUCTS.items():
        weight, bias = torch.randn(d_out, d_in), torch.randn(d_out)
        layers: dict[str, Callable] = {
            f"int{bits} {mode}": random_layer(d_in, d_out, bits, mode, options.group_size)
            for bits, mode in itertools.product((8, 4), ("dynamic", "weight_only"))
        }
        for count in (1, 8, 32, 512):
            x = torch.randn(count, d_in)
            calls: dict[str, Callable] = {}
            for dtype in (torch.float32, torch.bfloat16):
                inputs = [t.to(dtype) for t in (x, weight, bias)]
                calls[show(dtype)] = functools.partial(F.linear, *inputs)
                for kind, layer in layers.items():
                    calls[f"{kind} {show(dtype)}"] = functools.partial(layer, inputs[0])
            repeats = max(2, 100 // count)
            runs = {n: functools.partial(repeated, call, repeats) for n, call in calls.items()}
            yield time_all(f"product {name}, {count} tokens", runs, options.rounds)


def random_layer(d_in: int, d_out: int, bits: int, mode: str, size: int) -> QuantizedLinear:
    """A layer of random weights, rounded to the nearest."""
    layer = QuantizedLinear(d_in, d_out, True, bits, mode, size)
    layer.fill(*quantize_weight(torch.randn(d_out, d_in), bits, size))
    layer.tile()
    return layer


def repeated(call: Callable, times: int) -> Callable[[], float]:
    """A function that makes the call many times and returns its seconds per call."""

    @torch.inference_mode()
    def run() -> None:
        for _ in range(times):
            call()

    return lambda: timed(run, CPU) / times


KINDS = {"quality": quality, "decode": decode, "products": products}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python -m benchmarks.quantize [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    kinds = options.kinds or list(KINDS)
    remedy = "pass a checkpoint, or --kinds decode products"
    known = options.checkpoint or "quality" not in kinds
    require(known, "--checkpoint", "quality needs one", remedy)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for kind in kinds:
        for row in KINDS[kind](options):
            append_row(options.output, row)
    return 0


if __name__ == "__main__":
    run_cli(main)
