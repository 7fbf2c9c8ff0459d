"""Quantization: linear layers with weights of 8 or 4 bits, saved as a folder like any model.

    python quantize.py --checkpoint ./tinymamba_model_latest.pt --bits 8 --output_dir ./int8_model
    python quantize.py --checkpoint ./tinymamba_model_latest.pt --bits 4 --group_size 64 \\
        --calibration_data data/text/train.bin --output_dir ./int4_model
    python quantize.py --checkpoint ... --bits 8 --mode weight_only --output_dir ./int8_model
    python quantize.py --checkpoint ... --bits 4 --rtn --output_dir ./int4_model
    python quantize.py --checkpoint ... --bits 4 --calibration_data ... --report

8-bit weights have one scale per row. 4-bit weights also have one factor per --group_size inputs.
With calibration data, rounding is GPTQ's (Frantar et al., arXiv 2210.17323): the weights of later
inputs compensate for the rounding errors of earlier ones, and each block is fitted to the outputs
of the quantized blocks before it. Without data (--rtn), each weight is rounded to the nearest code.

In mode `dynamic` activations are rounded to 8 bits too, with a scale per token; in `weight_only`
they are not. Quantized are the projections of the branches, and the head to 8 bits, together with
the embedding if they are tied. --report prints what quantizing each part alone does to the loss.

The folder can be used like a checkpoint: streaming.py and peft.py take it as --checkpoint.

As a library:

    model = quantize_model(load_model("tinymamba_model_latest.pt"), bits=8)
    save_folder(Path("int8_model"), model)

Letters in the comments on shapes:
    l length
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
from torch import Tensor, nn

from testv2 import (
    ModelState,
    SequenceContext,
    TinyMambaModel,
    find_documents,
    load_model,
    save_folder,
    upcast,
)
from tinymamba.checkpoint import new_folder, replace_files, require_writable
from tinymamba.cli import parse_flags, require, run_cli
from tinymamba.kernels import (
    QUANTIZATION_FORMAT,
    QUANTIZATION_MODES,
    quantize_like,
    settle_ties,
    tile_layers,
    to_bytes,
)
from tinymamba.token_shards import open_tokens
from tinymamba.tokenizer import open_tokenizer, read_tokenizer_facts, require_data_of

PROJECTIONS = r"blocks\.\d+\.(ssm|attention|mlp)\.(in_proj|qkv|out_proj)(\.down|\.up)?"
# The layers of a block in the order of the forward pass.
STAGES = (r"(in_proj|qkv)(\.down)?", r"(in_proj|qkv)\.up", r"out_proj(\.down)?", r"out_proj\.up")
DAMPING = 0.01  # added to the Hessian's diagonal, times its mean
MAX_FACTOR = 15  # of a group: 8 times that still fits a byte
BATCH_ROWS = 16  # rows of ids per forward pass
GROUP_SIZE = 64  # inputs that share a factor

# ------------------------------------------------------------------------------------ rounding


def row_scale(weight: Tensor, bits: int) -> Tensor:
    """(out, in) -> (out, 1), so that the largest code of a row is 127, or 7 * MAX_FACTOR."""
    largest = 127 if bits == 8 else 7 * MAX_FACTOR
    return weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest


def best_factors(group: Tensor) -> Tensor:
    """Columns of one group in units of the scale (out, size) -> the best factor (out, 1)."""
    factors = torch.arange(1.0, MAX_FACTOR + 1, device=group.device)[:, None, None]
    rounded = (group / factors).round().clamp(-8, 7) * factors
    errors = (rounded - group).square().sum(-1)  # (MAX_FACTOR, out)
    return 1.0 + errors.argmin(0)[:, None]


def nearest_codes(columns: Tensor, factor: Tensor | None) -> Tensor:
    """The nearest 4-bit codes if there is a factor (out, 1), else the nearest 8-bit codes."""
    if factor is None:
        return columns.round().clamp(-127, 127)
    return (columns / factor).round().clamp(-8, 7) * factor


def quantize_weight(
    weight: Tensor, bits: int, size: int, hessian: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight (out, in) -> codes, scale (out,), factors of groups of `size` (None for 8 bits).

    hessian (in, in): the sum of x x^T over inputs x, for GPTQ; None rounds to the nearest.
    """
    scale = row_scale(weight.float(), bits)
    target, codes = weight.float() / scale, torch.empty_like(weight, dtype=torch.float32)
    root = None if hessian is None else inverse_root(hessian)
    factors, width = [], size if bits == 4 else min(128, weight.shape[1])
    for begin in range(0, weight.shape[1], width):
        group = slice(begin, begin + width)
        factor = best_factors(target[:, group]) if bits == 4 else None
        factors.append(factor)
        if root is None:
            codes[:, group] = nearest_codes(target[:, group], factor)
            continue
        codes[:, group], errors = gptq_codes(target[:, group], factor, root[group, group])
        target[:, begin + width :] -= errors @ root[group, begin + width :]
    joined = torch.cat(factors, dim=1).to(torch.int8) if bits == 4 else None
    return codes.to(torch.int8), scale[:, 0], joined


def gptq_codes(target: Tensor, factor: Tensor | None, root: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of one group's columns, each compensating for those before it, and their errors."""
    target, codes, errors = target.clone(), torch.empty_like(target), torch.empty_like(target)
    for i in range(target.shape[1]):
        codes[:, i : i + 1] = nearest_codes(target[:, i : i + 1], factor)
        errors[:, i] = (target[:, i] - codes[:, i]) / root[i, i]
        target[:, i:] -= errors[:, i : i + 1] * root[i, i:]
    return codes, errors


def inverse_root(hessian: Tensor) -> Tensor:
    """The upper triangle U, U^T U being the inverse of the damped Hessian (in, in)."""
    wide = hessian.double()
    mean = wide.diagonal().mean().clamp(min=1e-30)
    wide = wide + DAMPING * mean * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return torch.linalg.cholesky(inverse, upper=True).float()


# ------------------------------------------------------------------------------------ model


def layer_bits(model: TinyMambaModel, bits: int) -> dict[str, int]:
    """The layers to quantize, and to how many bits each."""
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {name: bits for name in linear if re.fullmatch(PROJECTIONS, name)} | {"head": 8}


@torch.no_grad()
def quantize_model(
    model: TinyMambaModel,
    bits: int = 8,
    mode: str = "dynamic",
    group_size: int = GROUP_SIZE,
    calibration: Tensor | None = None,
    layers: dict[str, int] | None = None,
) -> TinyMambaModel:
    """A quantized copy of a model.

    calibration: ids (rows, l) for GPTQ; None rounds to the nearest. `layers`: the layers to
    quantize, with their bits; None stands for those of `layer_bits`.
    """
    settle_ties(model)
    layers = layer_bits(model, bits) if layers is None else layers
    if 4 not in layers.values():
        group_size = GROUP_SIZE  # has no effect, but is part of the fingerprint
    require_quantizable(model, layers, mode, group_size)
    old, new = model, copy.deepcopy(model).eval().requires_grad_(False)
    scheme = {"version": QUANTIZATION_FORMAT, "bits": bits, "mode": mode, "group_size": group_size}
    method = "rtn" if calibration is None else "gptq"
    quantize_like(new, {**scheme, "method": method, "layers": layers})
    new.to(model.embedding.weight.device)
    if "head" in layers:  # before the blocks, as a tied embedding changes with it
        quantize_layer(new, old, "head")
    if new.config.tie_embeddings and "head" in layers:
        rows = new.head.weight.to(old.embedding.weight.dtype)
        new.embedding.weight = nn.Parameter(rows, requires_grad=False)
    if calibration is not None:
        quantize_blocks(new, old, calibration)
    else:
        for name in layers:
            quantize_layer(new, old, name)
    tile_layers(new)
    return new


def quantize_layer(
    new: TinyMambaModel, old: TinyMambaModel, name: str, hessian: Tensor | None = None
) -> None:
    """Quantize one layer of the old model into the new one."""
    layer: Any = new.get_submodule(name)
    source: Any = old.get_submodule(name)
    size = new.quantization["group_size"]
    layer.fill(*quantize_weight(source.weight, layer.bits, size, hessian))
    if source.bias is not None:
        layer.bias.copy_(source.bias)


Batch = tuple[Tensor, SequenceContext]  # x (rows, l, d), the input of a block, and its context


def quantize_blocks(new: TinyMambaModel, old: TinyMambaModel, calibration: Tensor) -> None:
    """GPTQ of each block on the outputs of the quantized blocks before it."""
    batches: list[Batch] = []
    for ids in calibration.to(new.embedding.weight.device).split(BATCH_ROWS):
        ends = new.find_ends(ids)
        starts, _ = find_documents(ids, ends, None, None)
        context = new.make_context(ids, None, starts, None, ends is not None)
        batches.append((new.embedding(ids), context))
    for i, block in enumerate(new.blocks):
        left = [n for n in new.quantization["layers"] if n.startswith(f"blocks.{i}.")]
        for stage in STAGES:
            names = [n for n in left if re.fullmatch(rf".*\.{stage}", n)]
            hessians = input_hessians({n: new.get_submodule(n) for n in names}, block, batches)
            for name, hessian in hessians.items():
                quantize_layer(new, old, name, hessian)
            left = [n for n in left if n not in names]
        for name in left:  # not in a stage: the gate's controller, if `layers` names it
            quantize_layer(new, old, name)
        batches = [(block(x, context, None)[0], context) for x, context in batches]


def input_hessians(
    layers: dict[str, Any], block: nn.Module, batches: list[Batch]
) -> dict[str, Tensor]:
    """The sum of x x^T over all inputs x of each layer: (in, in), float32."""
    device = batches[0][0].device
    sums = {n: torch.zeros(m.in_features, m.in_features, device=device) for n, m in layers.items()}

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        sums[name].addmm_(x.T, x)

    hooks = [
        m.register_forward_pre_hook(lambda _, inputs, name=name: add(name, *inputs))
        for name, m in layers.items()
    ]
    for x, context in batches if layers else ():
        block(x, context, None)
    for hook in hooks:
        hook.remove()
    return sums


def require_quantizable(
    model: TinyMambaModel, layers: dict[str, int], mode: str, size: int
) -> None:
    """Reject a model that cannot be quantized, or not in this way."""
    quantized, adapted = model.quantization, hasattr(model, "adapter_state")
    require(not quantized, "checkpoint", "is quantized already", "use the one it was made from")
    require(not adapted, "checkpoint", "has adapters", "quantize the base model, then load them")
    remedy = f"use one of {', '.join(QUANTIZATION_MODES)}"
    require(mode in QUANTIZATION_MODES, "mode", f"{mode!r} is not a choice", remedy)
    bits = sorted({*layers.values()})
    require({*bits} <= {4, 8}, "bits", f"{bits} is invalid", "use 8 or 4")
    for name, t in model.state_dict().items():
        problem = f"{name} has values that are not finite"
        require(t.isfinite().all(), "checkpoint", problem, "use another checkpoint")
    even = type(size) is int and size > 0 and size % 2 == 0
    require(even, "group_size", f"{size!r} is invalid", "it must be even and above 0")
    four: list[Any] = [(n, model.get_submodule(n)) for n, width in layers.items() if width == 4]
    common = math.gcd(*(layer.in_features for _, layer in four))
    sizes = [n for n in range(2, common + 1, 2) if common % n == 0]
    for name, layer in four:
        problem = f"{size} does not divide the {layer.in_features} inputs of {name}"
        require(layer.in_features % size == 0, "group_size", problem, f"use one of {sizes}")


# ------------------------------------------------------------------------------------ report


@torch.no_grad()
def mean_loss(model: TinyMambaModel, ids: Tensor) -> float:
    """Nats per token over rows of ids (rows, l)."""
    parts = ids.split(BATCH_ROWS)
    return sum(model.loss(p[:, :-1], p[:, 1:]).item() * len(p) for p in parts) / len(ids)


@torch.no_grad()
def loss_of_rounded_state(model: TinyMambaModel, ids: Tensor) -> float:
    """The same if the states of SSM and memory were rounded to 8 bits after every token."""

    def rounded(state: ModelState) -> ModelState:
        layers = []
        for layer in state.layers:
            sums = {"ssm": layer.ssm, "memory": layer.memory}
            rounded = {name: to_bytes(t) for name, t in sums.items() if t is not None}
            rounded = {name: steps * step for name, (steps, step) in rounded.items()}
            layers.append(layer._replace(**rounded))
        return ModelState(layers, state.position, state.document_start)

    state, total = model.init_state(len(ids)), 0.0
    for t in range(ids.shape[1] - 1):
        logits, state = model.advance(ids[:, t : t + 1], state)
        state = rounded(state)
        total += nn.functional.cross_entropy(upcast(logits[:, 0]), ids[:, t + 1]).item()
    return total / (ids.shape[1] - 1)


@torch.no_grad()
def with_rounded(model: TinyMambaModel, names: list[str]) -> TinyMambaModel:
    """A copy with these parameters rounded to 8 bits, with a scale per row."""
    new = copy.deepcopy(model)
    for name in names:
        p = new.get_parameter(name)
        steps, step = to_bytes(p)
        p.copy_(steps * step)
    return new


def group_parameters(model: TinyMambaModel) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Linear layers by kind and one by one, and all other parameters by kind."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    other = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in linear]

    def by_kind(names: list[str]) -> dict[str, list[str]]:
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(name)
        return kinds

    return {**by_kind(linear), **{n: [n] for n in linear}}, by_kind(other)


def report(model: TinyMambaModel, bits: int, mode: str, size: int, ids: Tensor) -> Iterator[dict]:
    """For each part of the model, the loss on ids (rows, l) if that part alone is quantized."""
    require_quantizable(model, layer_bits(model, bits), mode, size)
    base = mean_loss(model, ids)
    linear, other = group_parameters(model)

    def row(part: str, bits: int, loss: float) -> dict:
        return {"part": part, "bits": bits, "loss": loss, "change": math.expm1(loss - base)}

    yield row("nothing", 32, base)
    for part, names in linear.items():
        new = quantize_model(model, bits, mode, size, layers=dict.fromkeys(names, bits))
        yield row(part, bits, mean_loss(new, ids))
    for width in sorted({8, bits}, reverse=True):
        new = quantize_model(model, bits, mode, size, layers={"head": width})
        yield row("head", width, mean_loss(new, ids))
    for part, names in other.items():
        yield row(part, 8, mean_loss(with_rounded(model, names), ids))
    yield row("ssm state", 8, loss_of_rounded_state(model, ids))


# ------------------------------------------------------------------------------------ main

OUTPUTS = (
    "model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja",
    "tokenizer_config.json",
)  # fmt: skip


@dataclass
class Options:
    """The command line."""

    checkpoint: str = "tinymamba_model_latest.pt"  # a checkpoint of testv2.py, or a folder
    bits: int = 8  # bits per weight
    mode: str | None = None  # None is dynamic for 8 bits and weight_only for 4
    group_size: int | None = None  # inputs that share a factor, only for 4 bits; None is 64
    calibration_data: str | None = None  # a .bin of tokens, for GPTQ
    calibration_tokens: int = 65_536  # number of tokens to read from it
    data_dtype: str = "auto"  # dtype of the tokens in it
    rtn: bool = False  # round to the nearest, without data
    report: bool = False  # print what quantizing each part alone does to the loss; write nothing
    output_dir: str = "./quantized_model"  # folder to write
    force: bool = False  # replace files in output_dir

    CHOICES: ClassVar = {
        "bits": (8, 4),
        "mode": QUANTIZATION_MODES,
        "data_dtype": ("auto", "int32", "uint16"),
    }
    LIMITS: ClassVar = {"group_size": (2, math.inf)}

    def scheme(self) -> tuple[int, str, int]:
        """Bits, mode and group size, with the defaults that depend on the bits."""
        mode = self.mode or ("dynamic" if self.bits == 8 else "weight_only")
        return self.bits, mode, self.group_size or GROUP_SIZE


def parse(argv: list[str] | None) -> Options:
    """The command line, checked."""
    usage = "python quantize.py --checkpoint FILE [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, str(__doc__).split("As a library")[0])
    rtn, data = options.rtn, options.calibration_data
    grouped = options.bits == 4 or options.group_size is None
    require(grouped, "--group_size", "8 bits have no groups", "leave it out")
    require(not (rtn and data), "--rtn", "needs no calibration data", "leave one of the two out")
    required = not rtn and (options.bits == 4 or options.report)
    remedy = "pass a .bin of tokens, such as train.bin" + ("" if options.report else ", or --rtn")
    require(data or not required, "calibration_data", "is missing", remedy)
    require(not (rtn and options.report), "--rtn", "--report always rounds so", "leave it out")
    return options


def read_blocks(path: str, model: TinyMambaModel, tokens: int, data_dtype: str = "auto") -> Tensor:
    """Evenly spaced blocks of a .bin of ids: (rows, block_size)."""
    size = model.config.block_size
    problem, remedy = f"{tokens} is less than one block", f"it must be at least {size}"
    require(tokens >= size, "calibration_tokens", problem, remedy)
    require_data_of(model.tokenizer, read_tokenizer_facts(path)[0], "the model")
    file = open_tokens(path, data_dtype)
    problem = f"has {file.length} tokens, not {tokens}"
    remedy = "pass a longer file, or fewer --calibration_tokens"
    require(file.length >= tokens, file.path, problem, remedy)
    rows = tokens // size
    begins = [i * (file.length - size) // max(1, rows - 1) for i in range(rows)]
    for begin in begins:
        file.check(model.config.vocab_size, begin, begin + size)
    return torch.stack([torch.from_numpy(file.read(b, b + size).astype("int64")) for b in begins])


def write(options: Options, model: TinyMambaModel, calibration: Tensor | None) -> None:
    """Quantize the model and write its folder."""
    folder, (bits, mode, size) = Path(options.output_dir), options.scheme()
    there = [f for f in OUTPUTS if (folder / f).exists()]
    problem, remedy = f"holds {', '.join(there)}", "pass --force or another --output_dir"
    require(options.force or not there, str(folder), problem, remedy)
    require_quantizable(model, layer_bits(model, bits), mode, size)
    require_writable(folder, "output_dir")  # before the minutes of work
    quantized = quantize_model(model, bits, mode, size, calibration)
    with new_folder(folder / "made") as made:  # all is on disk before anything is replaced
        save_folder(made, quantized)
    replace_files(folder / "made", folder, OUTPUTS)
    written = (folder / OUTPUTS[0]).stat().st_size
    whole = 4 * sum(p.numel() for p in model.parameters())
    print(f"{folder / OUTPUTS[0]}: {written:,} bytes, {written / whole:.3f} of float32")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(argv)
    model, calibration = load_model(options.checkpoint), None
    open_tokenizer(None, model, [options.checkpoint])  # which an old checkpoint does not hold
    if data := options.calibration_data:
        calibration = read_blocks(data, model, options.calibration_tokens, options.data_dtype)
    if calibration is None or not options.report:
        write(options, model, calibration)
        return 0
    for row in report(model, *options.scheme(), calibration):
        loss = f"loss {row['loss']:.5f}  perplexity {100 * row['change']:+.3f}%"
        print(f"{row['part']:32} {row['bits']:2} bits  {loss}", flush=True)
    return 0


if __name__ == "__main__":
    run_cli(main)
