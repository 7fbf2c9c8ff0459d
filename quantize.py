"""Quantization: linear layers of 8 or 4 bits, in a folder that loads without any other library.

    python quantize.py --checkpoint ./tinymamba_model_latest.pt --bits 8 --output_dir ./int8_model
    python quantize.py --checkpoint ./tinymamba_model_latest.pt --bits 4 --group_size 64 \\
        --calibration_data data/text/train.bin --output_dir ./int4_model
    python quantize.py --checkpoint ... --bits 8 --mode weight_only --output_dir ./int8_model
    python quantize.py --checkpoint ... --bits 4 --rtn --output_dir ./int4_model
    python quantize.py --checkpoint ... --bits 4 --calibration_data ... --report

8 bits have one scale for each row of a weight, 4 bits a factor besides for every --group_size
inputs. With calibration data, rounding is GPTQ's (Frantar et al., arXiv 2210.17323): what rounding
the weights of one input does to a layer's output, those of the inputs after it take back; block by
block, so that each layer is fitted to what the quantized ones before it give. Without, it is to the
nearest (--rtn).

In mode `dynamic` activations are rounded to 8 bits, too, for each token; in `weight_only` they are
not. The projections of the branches are quantized, and the head to 8 bits, with the embedding where
they are one; nothing else is. --report says what each part of the model would cost.

The folder serves wherever a checkpoint does: streaming.py and peft.py take it as --checkpoint.

As a library:

    model = quantize_model(load_model("tinymamba_model_latest.pt"), bits=8)
    save_folder(Path("int8_model"), model)
"""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from testv2 import (
    ModelState,
    TinyMambaModel,
    TokenFile,
    find_documents,
    load_model,
    save_folder,
    upcast,
)
from tinymamba.checkpoint import new_folder, replace_files, require_writable
from tinymamba.cli import CliParser, require, run_cli
from tinymamba.kernels import QUANTIZATION_FORMAT, QUANTIZATION_MODES, quantize_like, to_bytes
from tinymamba.tokenizer import copy_tokenizer, open_tokenizer

PROJECTIONS = r"blocks\.\d+\.(ssm|attention|mlp)\.(in_proj|qkv|out_proj)(\.down|\.up)?"
# Layers of a block in the order in which they read one another.
STAGES = (r"(in_proj|qkv)(\.down)?", r"(in_proj|qkv)\.up", r"out_proj(\.down)?", r"out_proj\.up")
DAMPING = 0.01  # of the mean of the Hessian's diagonal
LARGEST = 15  # factor of a group: 8 times that is within a byte
ROWS = 16  # texts of a batch
GROUP_SIZE = 64  # inputs that share a factor

# ------------------------------------------------------------------------------------ rounding


def row_scale(weight: Tensor, bits: int) -> Tensor:
    """(out, in) -> (out, 1), so that the largest code of a row is 127, or 7 times LARGEST."""
    return weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / (127 if bits == 8 else 7 * LARGEST)


def best_factors(part: Tensor) -> Tensor:
    """Columns of one group, in units of the scale (out, size) -> the best factor (out, 1)."""
    tries = torch.arange(1.0, LARGEST + 1, device=part.device)[:, None, None]
    errors = ((part / tries).round().clamp(-8, 7) * tries - part).square().sum(-1)  # (tries, out)
    return 1.0 + errors.argmin(0)[:, None]


def to_code(part: Tensor, factor: Tensor | None) -> Tensor:
    """What lies nearest, of 4 bits if there is a factor (out, 1)."""
    if factor is None:
        return part.round().clamp(-127, 127)
    return (part / factor).round().clamp(-8, 7) * factor


def quantize_weight(
    weight: Tensor, bits: int, size: int, hessian: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight (out, in) -> codes, scale (out,), factors of groups of `size` (None of 8 bits).

    hessian (in, in): the sum of x x^T over inputs x, for GPTQ; None rounds to the nearest.
    """
    scale = row_scale(weight.float(), bits)
    left, codes = weight.float() / scale, torch.empty_like(weight, dtype=torch.float32)
    spread = None if hessian is None else inverse_root(hessian)
    factors, step = [], size if bits == 4 else min(128, weight.shape[1])
    for begin in range(0, weight.shape[1], step):
        group = slice(begin, begin + step)
        factor = best_factors(left[:, group]) if bits == 4 else None
        factors.append(factor)
        if spread is None:
            codes[:, group] = to_code(left[:, group], factor)
            continue
        codes[:, group], errors = correct_group(left[:, group], factor, spread[group, group])
        left[:, begin + step :] -= errors @ spread[group, begin + step :]
    factors = torch.cat(factors, dim=1).to(torch.int8) if bits == 4 else None
    return codes.to(torch.int8), scale[:, 0], factors


def correct_group(part: Tensor, factor: Tensor | None, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the columns of one group, each correcting those after it, and their errors."""
    part, codes, errors = part.clone(), torch.empty_like(part), torch.empty_like(part)
    for i in range(part.shape[1]):
        codes[:, i : i + 1] = to_code(part[:, i : i + 1], factor)
        errors[:, i] = (part[:, i] - codes[:, i]) / spread[i, i]
        part[:, i:] -= errors[:, i : i + 1] * spread[i, i:]
    return codes, errors


def inverse_root(hessian: Tensor) -> Tensor:
    """The upper triangle U with U^T U the inverse of the damped Hessian (in, in)."""
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
    """A new model of quantized layers; the given one stays as it is.

    calibration: ids (rows, l) for GPTQ; None rounds to the nearest. `layers`: other layers than
    the usual ones, with their bits.
    """
    layers = layer_bits(model, bits) if layers is None else layers
    if 4 not in layers.values():
        group_size = GROUP_SIZE  # of nothing, but part of the fingerprint
    refuse_unfit(model, layers, mode, group_size)
    old, new = model, copy.deepcopy(model).eval().requires_grad_(False)
    quantize_like(
        new,
        {
            "version": QUANTIZATION_FORMAT,
            "bits": bits,
            "mode": mode,
            "group_size": group_size,
            "method": "rtn" if calibration is None else "gptq",
            "layers": layers,
        },
    )
    new.to(model.embedding.weight.device)
    if "head" in layers:  # first, as the embedding changes with it
        fill(new, old, "head")
    if new.config.tie_embeddings and "head" in layers:
        new.embedding.weight = nn.Parameter(new.head.weight.to(old.embedding.weight.dtype), False)
    for name in layers if calibration is None else ():
        fill(new, old, name)
    if calibration is not None:
        correct_blocks(new, old, calibration)
    return new


def fill(
    new: TinyMambaModel, old: TinyMambaModel, name: str, hessian: Tensor | None = None
) -> None:
    """Quantize one layer of the old model into the new one."""
    layer, given = new.get_submodule(name), old.get_submodule(name)
    size = new.quantization["group_size"]
    codes, scale, factors = quantize_weight(given.weight, layer.bits, size, hessian)
    layer.codes.copy_(codes)
    layer.scale.copy_(scale)
    if factors is not None:
        layer.factors.copy_(factors)
    if given.bias is not None:
        layer.bias.copy_(given.bias)


def correct_blocks(new: TinyMambaModel, old: TinyMambaModel, calibration: Tensor) -> None:
    """GPTQ: the layers of each block, fitted to what the quantized ones before them give."""
    pieces = []
    for ids in calibration.to(new.embedding.weight.device).split(ROWS):
        ends = new.find_ends(ids)
        starts, _ = find_documents(ids, ends, None, None)
        piece = new.make_context(ids, None, starts, None, ends is not None)
        pieces.append((new.embedding(ids), piece))
    for i, block in enumerate(new.blocks):
        left = [n for n in new.quantization["layers"] if n.startswith(f"blocks.{i}.")]
        for stage in STAGES:
            names = [n for n in left if re.fullmatch(rf".*\.{stage}", n)]
            hessians = watch({n: new.get_submodule(n) for n in names}, block, pieces)
            for name, hessian in hessians.items():
                fill(new, old, name, hessian)
            left = [n for n in left if n not in names]
        for name in left:  # such as a gate's controller, if it is asked for
            fill(new, old, name)
        pieces = [(block(x, piece, None)[0], piece) for x, piece in pieces]


def watch(layers: dict[str, nn.Module], block: nn.Module, pieces: list) -> dict[str, Tensor]:
    """The sum of x x^T over all inputs x of each layer, (in, in) of float32."""
    sums = {
        name: torch.zeros(m.in_features, m.in_features, device=pieces[0][0].device)
        for name, m in layers.items()
    }

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        sums[name].addmm_(x.T, x)

    hooks = [
        m.register_forward_pre_hook(lambda _, inputs, name=name: add(name, *inputs))
        for name, m in layers.items()
    ]
    for x, piece in pieces if layers else ():
        block(x, piece, None)
    for hook in hooks:
        hook.remove()
    return sums


def refuse_unfit(model: TinyMambaModel, layers: dict[str, int], mode: str, size: int) -> None:
    """A UserError for a model that cannot be quantized, or not so."""
    require(
        not model.quantization, "checkpoint", "is quantized already", "use the one it was made from"
    )
    require(
        not hasattr(model, "adapter_state"),
        "checkpoint",
        "has adapters",
        "quantize the base, and load them after",
    )
    require(
        mode in QUANTIZATION_MODES,
        "mode",
        f"{mode!r} is not a choice",
        f"use one of {', '.join(QUANTIZATION_MODES)}",
    )
    require(
        {*layers.values()} <= {4, 8},
        "bits",
        f"{sorted({*layers.values()})} are not legal",
        "use 8 or 4",
    )
    for name, t in model.state_dict().items():
        require(
            t.isfinite().all(),
            "checkpoint",
            f"{name} has values that are not finite",
            "use another checkpoint",
        )
    require(
        type(size) is int and size > 0 and size % 2 == 0,
        "group_size",
        f"{size!r} is not legal",
        "it must be even and above 0",
    )
    widths = {n: model.get_submodule(n).in_features for n, bits in layers.items() if bits == 4}
    common = math.gcd(*widths.values())
    for name, width in widths.items():
        require(
            width % size == 0,
            "group_size",
            f"{size} does not divide the {width} inputs of {name}",
            f"use one of {[n for n in range(2, common + 1, 2) if common % n == 0]}",
        )


# ------------------------------------------------------------------------------------ report


@torch.no_grad()
def mean_loss(model: TinyMambaModel, ids: Tensor) -> float:
    """Nats a token over rows of ids (rows, l)."""
    total = sum(
        model.loss(part[:, :-1], part[:, 1:]).item() * len(part) for part in ids.split(ROWS)
    )
    return total / len(ids)


@torch.no_grad()
def loss_of_rounded_state(model: TinyMambaModel, ids: Tensor) -> float:
    """The same, if the SSM's states were bytes from token to token."""

    def rounded(state: ModelState) -> ModelState:
        layers = []
        for layer in state.layers:
            first, step = to_bytes(layer.ssm)
            layers.append(layer._replace(ssm=first * step))
        return ModelState(layers, state.position, state.document_start)

    state, total = model.init_state(len(ids)), 0.0
    for t in range(ids.shape[1] - 1):
        logits, state = model.advance(ids[:, t : t + 1], state)
        state = rounded(state)
        total += nn.functional.cross_entropy(upcast(logits[:, 0]), ids[:, t + 1]).item()
    return total / (ids.shape[1] - 1)


@torch.no_grad()
def with_rounded(model: TinyMambaModel, names: list[str]) -> TinyMambaModel:
    """A copy with these parameters rounded to 8 bits, by row."""
    new = copy.deepcopy(model)
    for name in names:
        p = new.get_parameter(name)
        first, step = to_bytes(p)
        p.copy_(first * step)
    return new


def parts_of(model: TinyMambaModel) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Linear layers, and all other parameters, by kind and (the first) one by one."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    other = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in linear]
    kinds: list[dict[str, list[str]]] = [{}, {}]
    for names, found in zip((linear, other), kinds, strict=True):
        for name in names:
            found.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(name)
    return {**kinds[0], **{n: [n] for n in linear}}, kinds[1]


def report(model: TinyMambaModel, bits: int, mode: str, size: int, ids: Tensor) -> Iterator[dict]:
    """For each part of the model alone, what quantizing it costs on ids (rows, l)."""
    refuse_unfit(model, layer_bits(model, bits), mode, size)
    base = mean_loss(model, ids)
    linear, other = parts_of(model)

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

OUTPUTS = ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CliParser(
        usage="python quantize.py --checkpoint FILE [--FLAG VALUE ...]",
        description=__doc__.split("As a library")[0],
    )
    whole = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--checkpoint",
        default="tinymamba_model_latest.pt",
        metavar="FILE",
        help="a checkpoint or a folder [tinymamba_model_latest.pt]",
    )
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of a weight [8]")
    parser.add_argument(
        "--mode", choices=QUANTIZATION_MODES, help="[dynamic for 8 bits, weight_only for 4]"
    )
    parser.add_argument("--group_size", help="inputs of a group of 4 bits [64]", **whole)
    parser.add_argument("--calibration_data", metavar="FILE", help="a .bin of tokens, for GPTQ")
    parser.add_argument("--calibration_tokens", default=65_536, help="of it [65536]", **whole)
    parser.add_argument(
        "--data_dtype",
        choices=("auto", "int32", "uint16"),
        default="auto",
        help="type of the ids in it [auto]",
    )
    parser.add_argument("--rtn", action="store_true", help="round to the nearest, without data")
    parser.add_argument(
        "--report",
        action="store_true",
        help="what quantizing each part alone does to the loss; writes nothing",
    )
    parser.add_argument(
        "--output_dir", default="./quantized_model", metavar="DIR", help="[./quantized_model]"
    )
    parser.add_argument("--force", action="store_true", help="let it replace files of output_dir")
    args = parser.parse_args(argv)
    args.mode = args.mode or ("dynamic" if args.bits == 8 else "weight_only")
    require(
        args.group_size is None or args.bits == 4,
        "--group_size",
        "8 bits have no groups",
        "leave it out",
    )
    args.group_size = GROUP_SIZE if args.group_size is None else args.group_size
    return args


def read_blocks(path: str, model: TinyMambaModel, tokens: int, data_dtype: str = "auto") -> Tensor:
    """Evenly spaced blocks of a .bin of ids: (rows, block_size)."""
    size = model.config.block_size
    require(
        tokens >= size,
        "calibration_tokens",
        f"{tokens} is less than one block",
        f"it must be at least {size}",
    )
    file = TokenFile(path, data_dtype)
    require(
        file.length >= tokens,
        file.path,
        f"has {file.length} tokens of {tokens}",
        "pass a longer file, or fewer --calibration_tokens",
    )
    rows = tokens // size
    begins = [i * (file.length - size) // max(1, rows - 1) for i in range(rows)]
    for begin in begins:
        file.check(model.config.vocab_size, begin, begin + size)
    return torch.stack([torch.from_numpy(file.read(b, b + size).astype("int64")) for b in begins])


def write(args, model: TinyMambaModel, calibration: Tensor | None) -> int:
    folder = Path(args.output_dir)
    there = [f for f in OUTPUTS if (folder / f).exists()]
    require(
        args.force or not there,
        str(folder),
        f"holds {', '.join(there)}",
        "pass --force or another --output_dir",
    )
    refuse_unfit(model, layer_bits(model, args.bits), args.mode, args.group_size)
    require_writable(folder, "output_dir")  # before minutes are spent
    tokenizer = open_tokenizer(None, model, [args.checkpoint])
    new = quantize_model(model, args.bits, args.mode, args.group_size, calibration)
    with new_folder(folder / "made") as made:  # all is on disk before anything is replaced
        save_folder(made, new)
        copy_tokenizer(tokenizer, made)
    replace_files(folder / "made", folder, OUTPUTS)
    size = (folder / OUTPUTS[0]).stat().st_size
    whole = 4 * sum(p.numel() for p in model.parameters())
    print(f"{folder / OUTPUTS[0]}: {size:,} bytes, {size / whole:.3f} of float32")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    require(
        not (args.rtn and args.calibration_data),
        "--rtn",
        "needs no calibration data",
        "leave one of the two out",
    )
    require(
        args.rtn or args.calibration_data or (args.bits == 8 and not args.report),
        "calibration_data",
        "is missing",
        "pass a .bin of tokens, such as train.bin" + ("" if args.report else ", or --rtn"),
    )
    require(not (args.rtn and args.report), "--rtn", "is how --report rounds", "leave it out")
    model = load_model(args.checkpoint)
    calibration = None
    if args.calibration_data:
        calibration = read_blocks(
            args.calibration_data, model, args.calibration_tokens, args.data_dtype
        )
    if not args.report:
        return write(args, model, calibration)
    for row in report(model, args.bits, args.mode, args.group_size, calibration):
        print(
            f"{row['part']:32} {row['bits']:2} bits  loss {row['loss']:.5f}  "
            f"perplexity {100 * row['change']:+.3f}%",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
