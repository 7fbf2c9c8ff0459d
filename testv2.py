"""TinyMamba: a hybrid small language model, its data and its trainer, in one file.

In every block a selective state-space branch, sliding-window attention and a SwiGLU MLP read the
same normalized input side by side, and a learned gate mixes them for each token.

    python testv2.py --preset demo                    # minutes on a 2-core CPU
    python testv2.py                                  # 153M parameters, for a GPU
    python testv2.py --resume                         # go on from the checkpoint
    python testv2.py --train_data_path a.bin b.bin --train_data_weights 0.7 0.3
    torchrun --nproc_per_node=2 testv2.py             # several GPUs or processes
    python -m torch.distributed.launch --nproc_per_node=2 testv2.py
    python testv2.py --profile                        # where does a step's time go?
    python testv2.py --help                           # every field of Config is a flag

Letters in the comments on shapes:
    B batch      L length        D d_model             E inner width, expand_factor * D
    H SSM heads  P SSM head width (E = H * P)          N d_state     K d_conv
    A attention heads            F attention head width (D = A * F)  W window_size
    V vocabulary                 Q chunk_size          C chunks (L / Q)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import difflib
import functools
import glob
import hashlib
import importlib
import inspect
import json
import math
import operator
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from socket import gethostname
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from ssm_kernels import (
    ChunkedScan,
    DepthwiseConv,
    QuantizedLinear,
    count_blocks,
    depthwise,
    is_writing_graph,
    lower_triangle,
    pack,
    scan_in_one_tile,
    unpack,
    whole_weight,
)

# ------------------------------------------------------------------------------------ errors


class UserError(Exception):
    """A mistake the user can mend: which field or file, what is wrong, what to do."""

    def __init__(self, field: str, problem: str = "", remedy: str = ""):
        super().__init__(field, problem, remedy)

    def __str__(self) -> str:
        field, problem, remedy = self.args
        if problem:
            return f"{field}: {problem}; {remedy}"
        # A DataLoader worker's error comes as one text: a traceback, and last the error itself.
        return field.strip().split("\n")[-1].partition("UserError: ")[2] or field


def require(holds, field: str, problem: str, remedy: str) -> None:
    """Raise a UserError unless `holds`."""
    if not holds:
        raise UserError(field, problem, remedy)


def require_plain_name(name, field: str) -> None:
    """Refuse what could be no part of a path or of another name."""
    require(
        isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name),
        field,
        f"{name!r} is no plain name",
        "use up to 64 letters, digits, - and _",
    )


def require_spans(holder, spans: dict[str, tuple]) -> None:
    """Refuse fields that are not of their (type, lowest, highest)."""
    for name, (kind, low, high) in spans.items():
        value = getattr(holder, name)
        legal = has_type(value, kind) and (value is None or low <= value <= high)
        require(legal, name, f"{value!r} is not legal", f"it must be from {low} to {high}")


def need(module: str):
    """An optional package's module; a UserError with the pip line where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(package, "is not installed", f"pip install {package}") from None


def run_cli(main) -> typing.NoReturn:
    """Exit with what `main()` returns; a UserError becomes one line on stderr and exit code 2."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # who read the output, as head does, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


class CliParser(argparse.ArgumentParser):
    """argparse with exact flag names, [defaults] in --help and errors of one line."""

    def __init__(self, **kwargs):
        wide = functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=42, width=110
        )
        super().__init__(allow_abbrev=False, formatter_class=wide, **kwargs)

    def error(self, message: str) -> typing.NoReturn:
        message = re.sub(r"^argument (--[\w-]+)[^:]*: ", r"\1: ", message)
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists every flag"
            message = f"{unknown[1]}: unknown flag; {hint}"
        self.exit(2, f"error: {message}\n")


# ------------------------------------------------------------------------------------ config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Config:
    """All settings. Edit a default here, pass it as a flag, or `Config(d_model=256)`."""

    # Model
    d_model: int = 768  # model width D
    n_layer: int = 12  # blocks
    vocab_size: int = 50304  # ids are 0 .. vocab_size-1
    dropout: float = 0.1  # dropout rate on the embedding and on every block's update
    bias: bool = True  # biases in the linear projections
    tie_embeddings: bool = True  # one matrix for embedding and output layer
    deepnet: bool = True  # DeepNet scaling of residual updates and of the initial weights
    low_rank: int = 0  # rank of the branches' projections; 0 is full rank

    # Architecture
    activation: str = "silu"  # activation of the MLP
    d_state: int = 16  # SSM state size N for each channel
    d_conv: int = 4  # width K of the causal convolution before the SSM
    expand_factor: int = 2  # inner width of SSM and MLP, as a multiple of d_model
    ssm_head_dim: int = 64  # channels P that share one SSM decay
    scan: str = "chunked"  # the parallel scan, or its slow reference
    chunk_size: int = 32  # tokens the parallel scan treats as one matrix product
    window_size: int = 64  # a token attends to itself and window_size-1 tokens before it
    num_heads: int = 6  # attention heads
    rope_theta: float = 10000.0  # longest RoPE period, in tokens, over 2 pi
    gate: str = "softmax"  # how the three branch weights of a token are made
    gate_top_k: int = 2  # branches kept for each token by gate=top_k
    document_mask: bool = False  # after eos, forget: conv, SSM and attention start afresh
    eos_id: int = -1  # the id that ends a document; -1 takes it from the data's .json

    # Training
    block_size: int = 512  # training length in tokens; the model itself has no limit
    batch_size: int = 8  # sequences per process and micro-batch
    gradient_accumulation_steps: int = 4  # micro-batches per optimizer step
    num_epochs: int = 1  # passes over the training data, unless max_steps says otherwise
    max_steps: int = 0  # optimizer steps; 0 takes num_epochs
    optimizer: str = "muon"  # of the matrices; everything else has AdamW
    lr: float = 6e-4  # peak learning rate
    min_lr_ratio: float = 0.1  # last learning rate as a share of the peak
    warmup_steps: int = 1000  # steps of linear warm-up, at most a tenth of the run
    grad_clip: float = 1.0  # largest gradient norm; 0 is no clipping
    weight_decay: float = 0.01  # decay of projection matrices, and of nothing else
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    max_bad_steps: int = 10  # steps in a row without a finite gradient before the run gives up
    skip_spikes: float = 0.0  # skip a gradient norm so many deviations above the mean; 0 is off
    seed: int = 1337  # initial weights, data order, dropout, samples

    # Hardware
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    use_compile: bool = True  # torch.compile, where a compiler is present
    use_flash_attn: bool = True  # PyTorch's fused attention; false writes the softmax out
    amp_dtype: torch.dtype = torch.bfloat16  # autocast type, where the hardware has it
    empty_cache_freq: int = 50  # steps between two clearings of the CUDA cache; 0 is never
    num_workers: int = 0  # processes that read data ahead
    parallel: str = "ddp"  # several processes: ddp, or fsdp for a model too large for one of them
    checkpoint_activations: bool = False  # make blocks again in the backward pass: saves memory
    rank_timeout: int = 60  # seconds of silence after which the other processes give one up

    # Data
    train_data_path: str | list[str] = "./data/text/train.bin"  # one .bin of tokens, or several
    train_data_weights: list[float] | None = None  # shares of several sources; None goes by size
    val_data_path: str | list[str] = "./data/text/val.bin"  # .bin of tokens to validate on
    data_dtype: str = "auto"  # type of the ids in the .bin; auto asks its .json, else int32
    accept_changed_data: bool = False  # resume though the training data are not what they were

    # Checkpoints
    checkpoint_path: str = "tinymamba_model_latest.pt"  # newest state; the best is ..._best.pt
    checkpoint_interval: int = 1000  # steps between two saves; 0 saves at the end only
    save_top_k: int = 1  # best checkpoints to keep, by validation loss
    async_save: bool = False  # write checkpoints in the background, from a copy in memory
    resume: bool = False  # go on from checkpoint_path, with its settings

    # Validation and samples
    enable_validation: bool = True  # measure the loss on val_data_path
    validation_interval: int = 2000  # steps between two validations
    validation_steps: int = 50  # batches of each process in one validation; 0 is all of the data
    use_early_stopping: bool = False  # stop when validation no longer improves
    early_stopping_patience: int = 5  # validations without improvement to wait for
    early_stopping_min_delta: float = 0.0  # nats that count as improvement
    generate_samples: bool = True  # print text while training
    generation_interval: int = 1000  # steps between two samples
    generation_length: int = 200  # tokens in a sample
    generation_temperature: float = 0.8  # 0 takes the likeliest token every time
    generation_prompt: str = ""  # how a sample begins; empty begins a new document

    # Logging
    log_interval: int = 20  # steps between two console lines
    log_dir: str = "./logs"  # TensorBoard logs, loss curve and profile, one folder a run
    use_wandb: bool = False  # log to Weights & Biases as well
    wandb_project: str = "tinymamba"  # W&B project
    wandb_run_name: str = ""  # W&B run and log folder; empty is the time of the start

    def validate(self) -> Config:
        """Refuse ill-typed and impossible values with a UserError; return self."""
        for name, hint in HINTS.items():
            value, default = getattr(self, name), f"the default is {show(getattr(Config, name))}"
            kind = Config.__annotations__[name]
            require(has_type(value, hint), name, f"{value!r} is not {kind}", default)
            low, high = LIMITS.get(name, (None, None))
            span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            require(
                low is None or low <= value <= high,
                name,
                f"{value} is not legal",
                f"it must be {span}",
            )
            legal = CHOICES.get(name, (value,))
            require(
                value in legal,
                name,
                f"{show(value)} is not a choice",
                f"use one of {', '.join(map(show, legal))}",
            )
        D, E = self.d_model, self.expand_factor * self.d_model
        legal = [n for n in range(1, D + 1) if D % (2 * n) == 0]
        require(
            self.num_heads in legal,
            "num_heads",
            f"{self.num_heads} heads do not cut d_model={D} into even widths, for RoPE",
            f"use one of {legal}" if legal else "make d_model even",
        )
        require(
            E % self.ssm_head_dim == 0,
            "ssm_head_dim",
            f"{self.ssm_head_dim} does not divide expand_factor*d_model = {E}",
            f"use one of {[p for p in range(1, E + 1) if E % p == 0]}",
        )
        require(
            self.d_state % 2 == 0,
            "d_state",
            f"{self.d_state} cannot be split into pairs",
            "make it even",
        )
        require(
            self.low_rank < D,
            "low_rank",
            f"{self.low_rank} saves nothing at d_model={D}",
            f"it must be from 0 to {D - 1}",
        )
        require(
            self.eos_id < self.vocab_size,
            "eos_id",
            f"{self.eos_id} is not in the vocabulary",
            f"it must be from -1 to {self.vocab_size - 1}",
        )
        return self

    def to_dict(self) -> dict:
        """Plain values only, for checkpoints and JSON."""
        return {**asdict(self), "amp_dtype": show(self.amp_dtype)}

    @staticmethod
    def from_dict(values: dict) -> Config:
        """The opposite of `to_dict`; an unknown name is a UserError."""
        for name in values:
            require(name in HINTS, name, "is not a field of Config", "was a newer release used?")
        dtype = DTYPES.get(show(values.get("amp_dtype", Config.amp_dtype)))
        return Config(**{**values, "amp_dtype": dtype}).validate()


HINTS = typing.get_type_hints(Config)
CHOICES = {
    "activation": ("silu", "gelu", "relu"),
    "gate": ("softmax", "top_k", "sparsemax"),
    "scan": ("chunked", "sequential"),
    "optimizer": ("muon", "adamw"),
    "parallel": ("ddp", "fsdp"),
    "data_dtype": ("auto", "int32", "uint16"),
    "amp_dtype": tuple(DTYPES.values()),
}
AT_LEAST_ONE = """d_model n_layer vocab_size d_state d_conv expand_factor ssm_head_dim chunk_size
    window_size num_heads rope_theta block_size batch_size gradient_accumulation_steps num_epochs
    max_bad_steps early_stopping_patience generation_length log_interval validation_interval
    generation_interval rank_timeout"""
AT_LEAST_ZERO = """low_rank max_steps lr warmup_steps grad_clip weight_decay empty_cache_freq
    num_workers checkpoint_interval save_top_k skip_spikes validation_steps early_stopping_min_delta
    generation_temperature"""
LIMITS = {
    **dict.fromkeys(AT_LEAST_ONE.split(), (1, math.inf)),
    **dict.fromkeys(AT_LEAST_ZERO.split(), (0, math.inf)),
    **dict.fromkeys(("dropout", "beta1", "beta2"), (0, 0.9999)),
    "min_lr_ratio": (0, 1),
    "gate_top_k": (1, 3),
    "eos_id": (-1, math.inf),
    "seed": (0, 2**63 - 1),
}
PRESETS = {
    "demo": {
        "d_model": 192,
        "n_layer": 4,
        "num_heads": 3,
        "vocab_size": 4096,
        "dropout": 0.0,
        "block_size": 256,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 1000,
        "lr": 8e-3,
        "warmup_steps": 100,
        "use_compile": False,
        "validation_interval": 200,
        "validation_steps": 20,
        "generation_interval": 500,
        "checkpoint_interval": 500,
        "generation_prompt": "import os\n\nclass",
        "generation_temperature": 0.7,
    },
    "small": {
        "d_model": 384,
        "n_layer": 8,
        "vocab_size": 4096,
        "lr": 4e-3,
        "num_epochs": 4,
        "warmup_steps": 100,
        "validation_interval": 200,
        "generation_interval": 200,
    },
    "base": {},
}
# What the weights and states of a checkpoint mean: these cannot change when it is read again.
SHAPE_FIELDS = [
    "d_model",
    "n_layer",
    "vocab_size",
    "bias",
    "tie_embeddings",
    "low_rank",
    "activation",
    "d_state",
    "d_conv",
    "expand_factor",
    "ssm_head_dim",
    "window_size",
    "num_heads",
    "rope_theta",
    "gate",
    "gate_top_k",
    "document_mask",
]
# What a model takes along when it is written without its training.
FOLDER_FIELDS = [*SHAPE_FIELDS, "eos_id", "block_size", "deepnet", "scan", "chunk_size", "dropout"]
RUN_FIELDS = [*SHAPE_FIELDS, "optimizer", "block_size", "seed", "train_data_weights"]


def show(value) -> str:
    """A value as the user would type it."""
    return str(value).removeprefix("torch.")


def has_type(value, hint) -> bool:
    """Is `value` of the annotated type? Whole numbers count as floats, booleans as neither."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and bool(value) and all(has_type(v, *options) for v in value)
    if options:
        return any(has_type(value, option) for option in options)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is hint


def parse_as(hint, text: str):
    """The value of type `hint` that the text of a flag stands for."""
    words = {bool: {"true": True, "1": True, "false": False, "0": False}, torch.dtype: DTYPES}
    try:
        return words[hint][text.lower()] if hint in words else hint(text)
    except (ValueError, KeyError):
        legal = "one of " + ", ".join(words[hint]) if hint in words else hint.__name__
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; pass {legal}") from None


def add_config_flags(parser: argparse.ArgumentParser, defaults: dict, leave_out=()) -> None:
    """One flag for every field, but for some; the help text is the comment beside the field."""
    group = parser
    for line in inspect.getsource(Config).split("\n"):
        if title := re.match(r"    # (\w.*)$", line):
            group = parser.add_argument_group(title[1])
        found = re.match(r"    (\w+): .*?  # (.*)$", line)
        if not found or found[1] in leave_out:
            continue
        (name, text), hint = found.groups(), HINTS[found[1]]
        kind = {"nargs": "?", "const": True} if hint is bool else {}
        if options := typing.get_args(hint):
            hint, kind = float if list[float] in options else str, {"nargs": "+"}
        if name in CHOICES:
            text += f": {', '.join(map(show, CHOICES[name]))}"
        text = f"{text} [{show(defaults.get(name, getattr(Config, name)))}]".replace("%", "%%")
        kind |= {"type": functools.partial(parse_as, hint), "metavar": hint.__name__.upper()}
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **kind)


def named_fields(given: dict) -> dict:
    """The fields of Config among parsed flags."""
    named = {name: value for name, value in given.items() if name in HINTS}
    for name in ("train_data_path", "val_data_path"):
        if len(named.get(name, ())) == 1:
            named[name] = named[name][0]
    return named


def parse_command_line(argv: list[str] | None = None) -> tuple[Config, dict, bool]:
    """The Config of a preset and the flags over it; the fields so named; is it to profile?

    A Config that resumes is not validated: most of its fields are still to come from a checkpoint.
    """
    usage = "python testv2.py [--preset PRESET] [--FIELD VALUE ...]"
    description = __doc__.split("Letters")[0] + "Defaults stand in [brackets]."
    parser = CliParser(usage=usage, description=description)
    presets = "demo: 3.2M parameters, minutes on a CPU; small: 21M; base: the defaults, 153M"
    parser.add_argument("--preset", choices=PRESETS, default="base", help=presets)
    profile = "time a few steps with torch.profiler, write a trace, and end"
    parser.add_argument("--profile", action="store_true", help=profile)
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    add_config_flags(parser, {})
    given = vars(parser.parse_args(argv))
    named = named_fields(given)
    config = Config(**{**PRESETS[given["preset"]], **named})
    return config if config.resume else config.validate(), named, given["profile"]


# -------------------------------------------------------------------------------- primitives


def widen(x: Tensor) -> Tensor:
    """float32, unless `x` is float64 already: what decays and states are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def to_autocast(x: Tensor) -> Tensor:
    """In the type that autocast takes matrix products in, once for all of them."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich, arXiv 1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class RotaryEmbedding(nn.Module):
    """Angles of RoPE (Su et al., arXiv 2104.09864, eq. 15).

    `forward(positions)` takes whole numbers (...) and gives cos and sin, float32 (..., F/2). Angles
    are taken in float64 so that position 10,000,000 is as exact as position 10.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0):
        super().__init__()
        require(
            head_dim >= 2 and head_dim % 2 == 0,
            "head_dim",
            f"{head_dim} cannot be split into pairs, which RoPE turns",
            "make it even",
        )
        self.head_dim, self.theta = head_dim, theta

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
        device = positions.device
        wide = "cpu" if device.type == "mps" else device  # which has no float64
        rates = self.theta ** (-pairs.to(wide) / self.head_dim)
        angles = positions.to(wide).double()[..., None] * rates
        return angles.cos().float().to(device), angles.sin().float().to(device)


def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + F/2) of x (..., L, F) by the angles of cos, sin (..., L, F/2)."""
    if cos.shape != sin.shape or (cos.shape[-2], 2 * cos.shape[-1]) != x.shape[-2:]:
        got = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(
            f"RoPE: x of shape {tuple(x.shape)} needs cos and sin of shape "
            f"({x.shape[-2]}, {x.shape[-1] // 2}), got {got}"
        )
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class WideLinear(nn.Linear):
    """A linear map in float32, also under autocast and with weights of another type."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else widen(self.bias)
            return F.linear(widen(x), widen(self.weight), bias)


class LowRankProjection(nn.Module):
    """A linear map through `rank` channels: rank * (d_in + d_out) weights for d_in * d_out."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool = True):
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def projection(d_in: int, parts: list[int], config: Config) -> nn.Module:
    """The linear map of a branch to one or more things of so many channels, at the rank asked for.

    The optimizer takes the rows of each part as a matrix of its own.
    """
    if config.low_rank:
        linear = LowRankProjection(d_in, sum(parts), config.low_rank, config.bias)
    else:
        linear = nn.Linear(d_in, sum(parts), bias=config.bias)
    last_layer(linear).parts = parts
    return linear


def last_layer(projection: nn.Module) -> nn.Linear:
    return projection.up if isinstance(projection, LowRankProjection) else projection


# ------------------------------------------------------------------------------------ scan

# exp(-30) is 1e-13: nothing is left of the state in float32. With no term below it, differences of
# a chunk's cumulative sums are good to 1e-4 even where every token forgets all before it.
MIN_LOG_DECAY = -30.0
# A token whose dt would be below this leaves the state exactly as it was, so that a state can hold
# what it has for any number of tokens. A softplus alone is never 0, and small leaks add up.
MIN_DT = 1e-3


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    method: str = "chunked",
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Run the selective recurrence of Mamba-2 (Dao & Gu, arXiv 2405.21060, eq. 2 with scalar A):

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

    x (B, L, H, P), dt (B, L, H) >= 0, A (H,) < 0, B and C (B, L, N), D (H,), state (B, H, P, N)
    before the first token (zeros if None), resets (B, L) of bool: tokens before which the past is
    forgotten. Returns y (B, L, H, P) in the type of x, which is that of the matrix products too,
    and the state after the last token. Decays and states are float32, or float64 if x is.
    Where dt is exactly 0, the gradient that reaches it through what it writes counts as 0.
    """
    if method not in CHOICES["scan"]:
        raise ValueError(f"method {method!r} is none of {CHOICES['scan']}")
    with torch.autocast(x.device.type, enabled=False):
        dt, A, D = (t.to(widen(x[:0]).dtype) for t in (dt, A, D))
        if state is None:
            state = dt.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
        state = state.to(dt.dtype)
        if x.shape[1] == 0:
            return x, state
        log_decay = (dt * A).clamp(min=MIN_LOG_DECAY)  # (B, L, H)
        if resets is not None:
            log_decay = log_decay.masked_fill(resets[..., None], MIN_LOG_DECAY)
        if method == "sequential" or x.shape[1] == 1:
            return scan_sequential(x, dt, log_decay, B, C, D, state)
        B, C = B.to(x.dtype), C.to(x.dtype)
        scan = scan_in_one_tile if is_writing_graph() else ChunkedScan.apply
        y, state = scan(x, dt, log_decay, B, C, D, state.mT, chunk_size)
        return y, state.mT


def scan_sequential(x, dt, log_decay, B, C, D, state):
    """The recurrence word for word: the reference, and the single step of decoding."""
    outputs, wide = [], [t.to(dt.dtype) for t in (x, B, C)]
    for t in range(x.shape[1]):
        x_t, B_t, C_t = (w[:, t] for w in wide)  # (B, H, P), (B, N), (B, N)
        written = (dt[:, t, :, None] * x_t)[..., None] * B_t[:, None, None]  # (B, H, P, N)
        state = log_decay[:, t, :, None, None].exp() * state + written
        outputs.append((state * C_t[:, None, None]).sum(-1) + D[:, None] * x_t)  # (B, H, P)
    return torch.stack(outputs, dim=1).to(x.dtype), state


# ------------------------------------------------------------------------------------ branches


class LayerState(NamedTuple):
    """What one block remembers, of constant size."""

    conv: Tensor  # (B, K-1, D) last inputs of the convolution
    ssm: Tensor  # (B, H, P, N) float32
    phase: Tensor  # (B, N/2) float32, by how many half turns the SSM state has turned, modulo 2
    keys: Tensor  # (B, A, W-1, F) after RoPE
    values: Tensor  # (B, A, W-1, F)


class Piece(NamedTuple):
    """What the blocks must know of a piece of tokens besides its activations.

    Indices count from the first token of the piece, so a document begun in an earlier piece starts
    at a negative one. None stands for the plain case: one document that starts at 0, no padding.
    """

    cos: Tensor  # (L, F/2), or (B, 1, L, F/2) where rows are at different positions: RoPE
    sin: Tensor  # the same
    mask: Tensor  # of attention, see LocalAttention.mask
    starts: Tensor | None = None  # (B, L) where the document of each token begins
    lengths: Tensor | None = None  # (B,) tokens of each row; what follows them is padding
    packed: bool = False  # documents may begin inside the piece: at `starts`, forget the past
    recorder: typing.Any = None  # from hf_integration.py: attends in place of LocalAttention


def keep_last(history: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The `count` entries of history (B, count + L, ...) up to the end of each row's tokens."""
    if lengths is None:
        return history[:, history.shape[1] - count :]
    index = lengths[:, None] + torch.arange(count, device=history.device)  # (B, count)
    index = index.view(*index.shape, *(1,) * (history.dim() - 2))
    return history.gather(1, index.expand(-1, -1, *history.shape[2:]))


class ShortConv(nn.Module):
    """u plus a causal depthwise convolution of u over K tokens, for all branches at once.

    The residual form is that of Canon layers (Allen-Zhu, arXiv 2512.17351).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.width = config.d_conv
        self.weight = nn.Parameter(torch.empty(config.d_model, config.d_conv))

    def forward(self, u: Tensor, piece: Piece, past: LayerState | None):
        """u (B, L, D) -> the same shape, and the new tail (B, K-1, D)."""
        K, L, weight = self.width, u.shape[1], self.weight.to(u.dtype)
        if past is None:
            history = F.pad(u, (0, 0, K - 1, 0))  # (B, K-1+L, D)
        else:
            history = torch.cat((past.conv.to(u.dtype), u), dim=1)
        if L == 1 and not piece.packed:
            u = u + (history * weight.T).sum(1, keepdim=True)
        elif piece.packed:
            age = torch.arange(L, device=u.device) - piece.starts  # (B, L)
            taps = ((history[:, k : k + L] * weight[:, k], age >= K - 1 - k) for k in range(K))
            u = u + sum(tap * known[..., None] for tap, known in taps)
        else:
            u = u + (depthwise if is_writing_graph() else DepthwiseConv.apply)(history, weight)
        return u, keep_last(history, K - 1, piece.lengths)


class MambaSSM(nn.Module):
    """Selective state-space branch: Mamba-2 (arXiv 2405.21060, section 7) with a turning state.

    Every token turns the pairs of state channels (n, n + N/2) by angles that it chooses itself, so
    that a state can count (Mamba-3, arXiv 2603.15569). As with RoPE, turning B and C by the sum of
    all angles so far is the same as turning the state. An angle is exactly 0 or exactly half a turn
    over wide ranges of its input: nothing drifts, however long the text.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.d_inner = config.expand_factor * config.d_model
        self.n_heads = self.d_inner // config.ssm_head_dim
        E, N = self.d_inner, config.d_state
        self.sizes = [E, E, N, N, self.n_heads]
        self.in_proj = projection(config.d_model, self.sizes, config)  # z, x, B, C, dt
        self.angle_proj = WideLinear(config.d_model, N // 2, config.bias)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.out_proj = projection(self.d_inner, [config.d_model], config)
        self.offset = None  # from peft.py: C before it turns (B, L, N) -> more to add to y

    def forward(self, u: Tensor, piece: Piece, past: LayerState | None):
        """u (B, L, D) -> the branch's output (B, L, D), the new SSM state and its phase."""
        c = self.config
        z, x, B, C, dt = self.in_proj(u).split(self.sizes, dim=-1)
        x = x.unflatten(-1, (self.n_heads, c.ssm_head_dim))  # (B, L, H, P)
        dt = F.threshold(F.softplus(widen(dt) + widen(self.dt_bias)), MIN_DT, 0.0)  # (B, L, H)
        # By how much each token turns the state, in [-1, 1]; float32, as rounding would add up.
        half_turns = F.hardtanh(F.softshrink(self.angle_proj(u), 0.5))  # (B, L, N/2)
        index, resets = torch.arange(u.shape[1], device=u.device), None
        if piece.lengths is not None:
            real = (index < piece.lengths[:, None])[..., None]
            dt, half_turns = dt * real, half_turns * real
        if piece.packed:
            resets = (piece.starts == index) & (index > 0)
        state, phase = (None, None) if past is None else (past.ssm, past.phase)
        phase = running_phase(half_turns, phase)
        cos, sin = (math.pi * phase).cos(), (math.pi * phase).sin()
        plain_C = C
        B, C = apply_rotary_pos_emb(B, cos, sin), apply_rotary_pos_emb(C, cos, sin)  # (B, L, N)
        A = -widen(self.A_log).exp()
        y, state = selective_scan(x, dt, A, B, C, self.D, state, resets, c.scan, c.chunk_size)
        y = y if self.offset is None else y + self.offset(plain_C)
        return self.out_proj(y.flatten(2) * F.silu(z)), state, phase[:, -1]


def running_phase(half_turns: Tensor, phase: Tensor | None) -> Tensor:
    """Sum of half_turns (B, L, N/2) up to each token and of the phase before, modulo 2.

    Whole half turns are exact; for the others the sum is taken in float64, where there is such a
    type, so that a long piece is as exact as a short one.
    """
    wide = half_turns if half_turns.device.type == "mps" else half_turns.double()
    total = wide.cumsum(1) if phase is None else wide.cumsum(1) + phase[:, None]
    return total.remainder(2).to(half_turns.dtype).remainder(2)  # rounding may have made it 2


class LocalAttention(nn.Module):
    """Causal attention to the last W tokens, in blocks: O(L W) time and memory.

    Keys are cached as RoPE has turned them at their position in the text. Queries and keys are
    normalized (Henry et al., arXiv 2010.04245).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.window, self.n_heads = config.window_size, config.num_heads
        self.use_flash_attn = config.use_flash_attn
        self.head_dim = config.d_model // config.num_heads
        self.qkv = projection(config.d_model, [config.d_model] * 3, config)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.out_proj = projection(config.d_model, [config.d_model], config)
        self.prefix = None  # from peft.py: queries before RoPE (B, A, L, F) -> more to add

    def forward(self, u: Tensor, piece: Piece, past: LayerState | None):
        """u (B, L, D) -> the branch's output (B, L, D), last W-1 keys and values."""
        q, k, v = self.qkv(u).unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))  # (B, A, L, F)
        plain_q = q
        q, k = (apply_rotary_pos_emb(t, piece.cos, piece.sin) for t in (q, k))
        keys = self.after(None if past is None else past.keys, k)  # (B, A, W+L, F)
        values = self.after(None if past is None else past.values, v)
        attend = self.attend_written_out if self.written_out(q.shape[2], q.device) else self.attend
        if piece.recorder is None:
            y = attend(q, keys, values, piece.mask)
        else:
            y = piece.recorder.attend(attend, q, keys, values, piece)
        y = y if self.prefix is None else y + self.prefix(plain_q)
        tails = (
            keep_last(t[:, :, 1:].transpose(1, 2), self.window - 1, piece.lengths)
            for t in (keys, values)
        )
        return self.out_proj(y.transpose(1, 2).flatten(2)), *(t.transpose(1, 2) for t in tails)

    def after(self, cached: Tensor | None, new: Tensor) -> Tensor:
        """The W keys or values before the piece, of which the first is padding, and its own."""
        if cached is None:
            return F.pad(new, (0, 0, self.window, 0))
        return torch.cat((torch.zeros_like(new[:, :, :1]), cached.to(new.dtype), new), dim=2)

    def written_out(self, length: int, device: torch.device) -> bool:
        """Plain matrix products beat the fused kernels on a CPU, but not for a few tokens."""
        any_length = is_writing_graph() and not isinstance(length, int)
        return (
            not self.use_flash_attn
            or any_length
            or (device.type == "cpu" and length >= self.window)
        )

    def mask(self, length: int, starts: Tensor | None, device: torch.device) -> Tensor:
        """The mask that the attention of a piece needs, the same in every layer; of bool.

        Written out: where no key is, (B or 1, 1, blocks, W, W), without the blocks that see all.
        Fused: where a key is, (B or 1, 1, blocks, block, W-1+block).
        """
        W, written_out = self.window, self.written_out(length, device)
        block = W if written_out else min(length, W)
        blocks = count_blocks(length, W) if written_out else -(-length // block)
        first = block * torch.arange(blocks, device=device)[:, None, None]
        token = first + torch.arange(block, device=device)[:, None]  # (blocks, block, 1)
        begin = torch.zeros_like(token)
        if starts is not None:
            begin = F.pad(starts, (0, blocks * block - length)).unflatten(1, (blocks, block))
            begin = begin[:, None, ..., None]  # (B, 1, blocks, block, 1)
        if written_out:
            key = first + torch.arange(W, device=device)
            hidden = torch.where(key <= token, key, key - W) < begin
            return hidden[:1][None, None] if starts is None else hidden
        key = first - (W - 1) + torch.arange(W - 1 + block, device=device)
        visible = (key <= token) & (key > token - W) & (key >= begin)
        return visible[None, None] if starts is None else visible

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """q (B, A, L, F), keys and values (B, A, W+L, F) -> (B, A, L, F), by fused attention.

        The first of the W keys before the piece is padding. A block of queries sees W-1 of them.
        """
        L, W = q.shape[2], self.window
        if L <= W:
            return F.scaled_dot_product_attention(
                q, keys[:, :, 1:], values[:, :, 1:], attn_mask=mask[:, :, 0]
            )
        q = F.pad(q, (0, 0, 0, -L % W)).unflatten(2, (-1, W))  # (B, A, blocks, W, F)
        keys, values = (
            F.pad(t[:, :, 1:], (0, 0, 0, -L % W)).unfold(2, 2 * W - 1, W).mT for t in (keys, values)
        )  # (B, A, blocks, 2W-1, F)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return y.flatten(2, 3)[:, :, :L]

    def attend_written_out(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The same as `attend`, in products of W x W.

        Query r of a block sees keys c <= r of its own block and keys c > r of the block before,
        together one full row: one softmax over W columns serves both.
        """
        (B, A, L), W = q.shape[:3], self.window
        blocks = count_blocks(L, W)
        q, keys, values = (
            F.pad(t, (0, 0, 0, blocks * W - L))
            .unflatten(2, (blocks + more, W))
            .flatten(0, 1)  # (B*A, blocks, W, F)
            for t, more in ((q * self.head_dim**-0.5, 0), (keys, 1), (values, 1))
        )
        own = lower_triangle(q.new_empty(W, W))
        scores = torch.where(own, q @ keys[:, 1:].mT, q @ keys[:, :-1].mT)  # (B*A, blocks, W, W)
        scores = scores.unflatten(0, (B, A))
        scores[:, :, : mask.shape[2]].masked_fill_(mask, -math.inf)
        weights = scores.softmax(-1).to(values.dtype).flatten(0, 1)
        y = weights.tril() @ values[:, 1:] + weights.triu(1) @ values[:, :-1]
        return y.unflatten(0, (B, A)).flatten(2, 3)[:, :, :L]


class SwiGLU(nn.Module):
    """Gated MLP: down(act(gate) * up) (Shazeer, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: Config):
        super().__init__()
        hidden = config.expand_factor * config.d_model
        self.activation = getattr(F, config.activation)
        self.in_proj = projection(config.d_model, [hidden] * 2, config)
        self.out_proj = projection(hidden, [config.d_model], config)

    def forward(self, u: Tensor) -> Tensor:
        gate, up = self.in_proj(u).chunk(2, dim=-1)  # (B, L, E) each
        return self.out_proj(self.activation(gate) * up)


def sparsemax(logits: Tensor) -> Tensor:
    """Projection onto the probability simplex (Martins & Astudillo, arXiv 1602.02068, alg. 1)."""
    logits = logits - logits.amax(-1, keepdim=True)  # changes nothing but the rounding
    ordered = logits.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
    sums = ordered.cumsum(-1) - 1
    support = (ordered * ranks > sums).sum(-1, keepdim=True)
    threshold = sums.gather(-1, support - 1) / support
    return (logits - threshold).clamp(min=0)


class TokenAdaptiveGating(nn.Module):
    """Three branch weights for every token: non-negative, of sum one, float32."""

    BRANCHES = ("ssm", "attention", "mlp")

    def __init__(self, config: Config):
        super().__init__()
        self.form, self.top_k = config.gate, config.gate_top_k
        self.controller = nn.Linear(config.d_model, len(self.BRANCHES))

    def forward(self, u: Tensor) -> Tensor:
        """u (B, L, D) -> (B, L, 3)."""
        logits = widen(self.controller(u))
        if self.form == "sparsemax":
            return sparsemax(logits)
        if self.form == "top_k":
            kept = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
        return logits.softmax(-1)


# ------------------------------------------------------------------------------- block and model


class TinyMambaBlock(nn.Module):
    """x + residual_scale * (g0 SSM(u) + g1 Attention(u) + g2 MLP(u)), u = ShortConv(RMSNorm(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm = RMSNorm(config.d_model)
        self.conv = ShortConv(config)
        self.gate = TokenAdaptiveGating(config)
        self.ssm = MambaSSM(config)
        self.attention = LocalAttention(config)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)
        self.residual_scale = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x: Tensor, piece: Piece, past: LayerState | None):
        """x (B, L, D) -> new x, new LayerState, gate weights (B, L, 3)."""
        u, conv_tail = self.conv(to_autocast(self.norm(x)), piece, past)
        gates = self.gate(u)
        g = gates.to(u.dtype).unsqueeze(-2)  # (B, L, 1, 3)
        ssm, *ssm_state = self.ssm(u, piece, past)
        attention, keys, values = self.attention(u, piece, past)
        mix = g[..., 0] * ssm + g[..., 1] * attention + g[..., 2] * self.run_mlp(u, gates[..., 2])
        x = x + self.residual_scale * self.dropout(mix)
        return x, LayerState(conv_tail, *ssm_state, keys, values), gates

    def run_mlp(self, u: Tensor, weight: Tensor) -> Tensor:
        """The MLP, only for the tokens that a sparse gate sends there (it has no state)."""
        if self.gate.form == "softmax" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.mlp(u)
        asked = weight > 0  # (B, L)
        rows = self.mlp(u[asked])
        return torch.zeros_like(u, dtype=rows.dtype).masked_scatter(asked[..., None], rows)


class TinyMambaModel(nn.Module):
    """The language model. `forward` for training, `advance` for text that arrives in pieces."""

    BLOCK = TinyMambaBlock
    LOSS_CHUNK = 512  # tokens whose logits exist at one time

    def __init__(self, config: Config):
        super().__init__()
        self.config = config.validate()
        require(
            config.eos_id >= 0 or not config.document_mask,
            "eos_id",
            "document_mask needs to know which id ends a document",
            "set it in the config",
        )
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.BLOCK(config) for _ in range(config.n_layer))
        self.rotary = RotaryEmbedding(config.d_model // config.num_heads, config.rope_theta)
        self.norm = RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.start = None  # from peft.py: zeros of init_state -> the learned first states
        self.quantization: dict | None = None  # from quantize.py, as it stands in config.json
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        init_weights(self)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_gates: bool = False,
    ):
        """ids (B, L) of int64 -> logits (B, L, V); with targets (B, L), their mean loss in nats.

        attention_mask (B, L) is 0 at padding, which leaves the row as if it were not there.
        `return_gates` adds the branch weights, (n_layer, B, L, 3).
        """
        hidden, _, gates = self.run(ids, attention_mask=attention_mask)
        out = self.head(hidden) if targets is None else self.cross_entropy(hidden, targets)
        return (out, gates) if return_gates else out

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats over targets (B, L), leaving out those of -100."""
        return self(ids, targets)

    def advance(
        self,
        ids: Tensor,
        state: ModelState,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, ModelState]:
        """Read any number of further tokens: ids (B, L) -> logits (B, L, V) and the new state.

        `state` itself is left as it was. `last_only` gives logits (B, 1, V) of the last column.
        """
        if ids.shape[0] != state.position.shape[0]:
            raise ValueError(f"ids has {ids.shape[0]} rows, the state {state.position.shape[0]}")
        if ids.shape[1] == 0:
            return self.head(self.embedding(ids)), state.clone()
        hidden, state, _ = self.run(ids, state, attention_mask)
        return self.head(hidden[:, -1:] if last_only else hidden), state

    def run(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        embedded: Tensor | None = None,
        ends: Tensor | None = None,
        recorder=None,
    ):
        """Embedding to last norm: hidden (B, L, D), new state (None if none came), gates.

        embedded (B, L, D) takes the place of the embeddings of ids (B, L). ends (B, L) of bool are
        tokens after which a document begins, besides those that document_mask finds itself.
        """
        back, lengths = None, None
        if ids.shape[1] == 0 or (attention_mask is not None and attention_mask.shape != ids.shape):
            raise ValueError(f"ids {tuple(ids.shape)} must hold a token, and attention_mask fit")
        x = self.embedding(ids) if embedded is None else embedded
        found, given = self.find_ends(ids), ends is not None
        ends = ends if found is None else found | ends if given else found
        if attention_mask is not None:  # padding is moved to the end, where causality hides it
            order, back, lengths = padding_last(attention_mask)
            x = take_tokens(x, order)
            ends = None if ends is None else ends.gather(1, order)
        asked = state is not None
        if self.start is not None and not asked:
            state = self.init_state(ids.shape[0])
        starts, document = find_documents(ids, ends, state, lengths)
        piece = self.describe(ids, state, starts, lengths, ends is not None)
        piece = piece._replace(recorder=recorder)
        x, layers, gates = self.dropout(x), [], []
        for i, block in enumerate(self.blocks):
            if self.config.checkpoint_activations and self.training:
                block = functools.partial(recompute_in_backward, block, use_reentrant=False)
            x, layer, weights = block(x, piece, None if state is None else state.layers[i])
            layers.append(layer)
            gates.append(weights)
        x = self.norm(x)
        if back is not None:
            x, *gates = (take_tokens(t, back) for t in (x, *gates))
        if asked:
            state = state.after(layers, document, ids.shape[1] if lengths is None else lengths)
            state = state.forget_inputs() if given else state  # document_mask looks at ages itself
        return x, state if asked else None, torch.stack(gates)

    def find_ends(self, ids: Tensor) -> Tensor | None:
        """Which of ids (B, L) end a document, with document_mask."""
        return ids == self.config.eos_id if self.config.document_mask else None

    def describe(
        self,
        ids: Tensor,
        state: ModelState | None,
        starts: Tensor | None,
        lengths: Tensor | None,
        packed: bool = False,
    ) -> Piece:
        """What all blocks must know of the piece ids (B, L)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        if state is not None:
            positions = positions + state.position[:, None, None]  # (B, 1, L)
        mask = self.blocks[0].attention.mask(ids.shape[1], starts, ids.device)
        return Piece(*self.rotary(positions), mask, starts, lengths, packed)

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean loss without all logits: they are made LOSS_CHUNK tokens at a time, twice."""
        hidden, targets = hidden.flatten(0, 1), targets.flatten()

        def chunk_loss(h: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(widen(self.head(h)), t, reduction="sum")

        total = torch.zeros((), device=hidden.device)
        for h, t in zip(hidden.split(self.LOSS_CHUNK), targets.split(self.LOSS_CHUNK), strict=True):
            total = total + recompute_in_backward(chunk_loss, h, t, use_reentrant=False)
        return total / (targets != -100).sum().clamp(min=1)

    def init_state(self, batch: int) -> ModelState:
        """The state before any token, for `batch` rows; its size never changes."""
        c, ssm, weight = self.config, self.blocks[0].ssm, self.embedding.weight

        def zeros(*shape, dtype=weight.dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=weight.device)

        keys = (c.num_heads, c.window_size - 1, c.d_model // c.num_heads)
        state = (ssm.n_heads, c.ssm_head_dim, c.d_state)
        layers = []
        for _ in self.blocks:
            h, phase = widen(zeros(*state)), widen(zeros(c.d_state // 2))
            tail = zeros(c.d_conv - 1, c.d_model)
            layers.append(LayerState(tail, h, phase, zeros(*keys), zeros(*keys)))
        layers = layers if self.start is None else self.start(layers)
        return ModelState(layers, zeros(dtype=torch.int64), zeros(dtype=torch.int64))

    def count_parameters(self) -> dict[str, int]:
        """Parameters of each component; a tied head counts as embedding."""
        parts = (
            "embedding",
            "conv",
            "ssm",
            "attention",
            "mlp",
            "gate",
            "norm",
            "residual_scale",
            "head",
        )
        counts = dict.fromkeys(parts, 0)
        codes = {name: t for name, t in self.named_buffers() if name.endswith(".codes")}
        if self.config.tie_embeddings:
            codes.pop("head.codes", None)
        for name, p in (*self.named_parameters(), *codes.items()):
            part = name.split(".")[2 if name.startswith("blocks.") else 0]
            counts[part] = counts.get(part, 0) + p.numel()
        return {**counts, "total": sum(counts.values())}

    def fingerprint(self) -> str:
        """SHA-256 of the architecture and of every weight."""
        shape = {name: getattr(self.config, name) for name in SHAPE_FIELDS}
        if self.quantization:
            shape["quantization"] = self.quantization
        return digest({"config": shape, "weights": dict(self.state_dict())})


def padding_last(attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where to take each token from (B, L) to have padding last, where it went, rows' lengths."""
    order = (attention_mask == 0).long().argsort(dim=1, stable=True)
    return order, order.argsort(dim=1), (attention_mask != 0).sum(1)


def take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """x (B, L, ...) in another order (B, L) of its tokens."""
    index = order.view(*order.shape, *(1,) * (x.dim() - 2))
    return x.gather(1, index.expand_as(x))


def find_documents(
    ids: Tensor, ends: Tensor | None, state: ModelState | None, lengths: Tensor | None
):
    """Where the document of each token begins (None: at 0), and that of each row's next."""
    if state is None and ends is None:
        return None, None
    first = ids.new_zeros(ids.shape[0])  # 0 or less: begun before this piece
    if state is not None:
        first = state.document_start - state.position
    if ends is None:
        return first[:, None].expand_as(ids), first
    index = torch.arange(ids.shape[1], device=ids.device)
    if lengths is not None:
        ends = ends & (index < lengths[:, None])
    begins = running_max(torch.where(ends, index + 1, first[:, None]))  # (B, L)
    starts = torch.cat((first[:, None], begins), dim=1)[:, : ids.shape[1]]
    return starts, begins[:, -1]


def running_max(x: Tensor) -> Tensor:
    """x (B, L) -> the largest up to each token. ONNX has no cummax, so a graph gets a table."""
    if not is_writing_graph():
        return x.cummax(dim=1).values
    table = x[:, None].expand(-1, x.shape[1], -1)  # (B, L, L)
    return table.masked_fill(~lower_triangle(table), torch.iinfo(x.dtype).min).amax(-1)


def init_weights(model: TinyMambaModel) -> None:
    """All initialization, in one place; nothing touches a weight after it.

    - Projections: normal, variance 2/(5 d_in) (Nguyen & Salazar, arXiv 1910.05895), biases zero;
      of a low-rank pair the first keeps the variance of its input, 1/d_in.
    - Convolution: uniform within 1/sqrt(4 K), half of PyTorch's own, as it is added to its input.
    - Embedding: normal, deviation 0.02.
    - Gate: zero, so that every branch starts with a third. For gate=top_k tiny noise breaks the
      tie, differently for each token, or one branch would never be chosen and never learn.
    - SSM: dt log-uniform in [1e-3, 1e-1], A uniform in [1, 16], as Mamba-2's.
    - DeepNet (arXiv 2203.00555, table 1, decoder-only, one sublayer a block): its stream is
      norm(alpha x + f) with alpha = n_layer^(1/4), and values and output projections start at
      beta = (4 n_layer)^(-1/4). Only the ratio of x to f counts before a norm, so the stream here
      is x + f / alpha, with 1/alpha as the first value of the learned residual_scale.
    """
    config = model.config
    alpha, beta = 1.0, 1.0
    if config.deepnet:
        alpha, beta = config.n_layer**0.25, (4 * config.n_layer) ** -0.25
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            share = 1.0 if name.endswith(".down") else 0.4  # of 1/d_in, as variance
            nn.init.normal_(module.weight, std=math.sqrt(share / module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for table in (model.embedding, model.head):
        nn.init.normal_(table.weight, std=0.02)
    for block in model.blocks:
        noise = 1e-3 * config.d_model**-0.5 if config.gate == "top_k" else 0.0
        nn.init.normal_(block.gate.controller.weight, std=noise)
        nn.init.uniform_(block.conv.weight, -0.5 * config.d_conv**-0.5, 0.5 * config.d_conv**-0.5)
        init_ssm(block.ssm)
        nn.init.constant_(block.residual_scale, 1 / alpha)
        with torch.no_grad():
            last_layer(block.attention.qkv).weight[-config.d_model :] *= beta
            for branch in (block.ssm, block.attention, block.mlp):
                last_layer(branch.out_proj).weight *= beta


@torch.no_grad()
def init_ssm(ssm: MambaSSM) -> None:
    dt = torch.empty_like(ssm.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    ssm.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
    ssm.A_log.copy_(torch.empty_like(ssm.A_log).uniform_(1, 16).log())


# ------------------------------------------------------------------------------------ state


@dataclass
class ModelState:
    """All that the model remembers of B texts, of a size that does not depend on their length."""

    layers: list[LayerState]
    position: Tensor  # (B,) int64: tokens read so far
    document_start: Tensor  # (B,) int64: position at which the next token's document begins

    def map(self, f) -> ModelState:
        """`f` applied to every tensor."""
        layers = [LayerState(*map(f, layer)) for layer in self.layers]
        return ModelState(layers, f(self.position), f(self.document_start))

    def clone(self) -> ModelState:
        return self.map(torch.clone)

    def select(self, rows) -> ModelState:
        """The states of some rows, in the order given: a list, a slice or a tensor of indices."""
        return self.map(lambda t: t[rows].clone())

    def to(self, device) -> ModelState:
        return self.map(lambda t: t.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        named = {
            f"layers.{i}.{name}": t
            for i, layer in enumerate(self.layers)
            for name, t in layer._asdict().items()
        }
        return {**named, "position": self.position, "document_start": self.document_start}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def after(self, layers: list[LayerState], document: Tensor, count) -> ModelState:
        """The state `count` tokens later; `document` (B,) is where the next document begins."""
        position, start = self.position + count, self.position + document
        ended = ((start == position) & (position > 0))[:, None, None, None]  # eos came last
        layers = [new._replace(ssm=new.ssm.masked_fill(ended, 0.0)) for new in layers]
        layers = [
            LayerState(*(n.to(o.dtype) for n, o in zip(new, old, strict=True)))
            for new, old in zip(layers, self.layers, strict=True)
        ]
        return ModelState(layers, position, start)

    def begin_document(self, rows: Tensor) -> ModelState:
        """The state with nothing before it, in the rows (B,) of bool."""
        layers = [
            layer._replace(ssm=layer.ssm.masked_fill(rows[:, None, None, None], 0.0))
            for layer in self.layers
        ]
        start = torch.where(rows, self.position, self.document_start)
        return ModelState(layers, self.position, start).forget_inputs()

    def forget_inputs(self) -> ModelState:
        """Without the convolution's inputs from before each row's document."""
        age = torch.arange(self.layers[0].conv.shape[1], 0, -1, device=self.position.device)
        foreign = age > (self.position - self.document_start)[:, None]  # (B, K-1)
        layers = [
            layer._replace(conv=layer.conv.masked_fill(foreign[..., None], 0.0))
            for layer in self.layers
        ]
        return ModelState(layers, self.position, self.document_start)

    @staticmethod
    def join(states: list[ModelState]) -> ModelState:
        """One state of all their rows."""
        layers = [
            LayerState(*map(torch.cat, zip(*parts, strict=True)))
            for parts in zip(*(state.layers for state in states), strict=True)
        ]
        ends = (
            torch.cat([getattr(state, name) for state in states])
            for name in ("position", "document_start")
        )
        return ModelState(layers, *ends)

    def save(self, path: str | Path, model: TinyMambaModel) -> None:
        """Write a safetensors file that carries the fingerprint of the model."""
        write_tensors(path, self.tensors(), {"model": model.fingerprint()})

    @staticmethod
    def load(path: str | Path, model: TinyMambaModel) -> ModelState:
        """Read a state of this very model; anything else is a UserError."""
        like = model.init_state(1).tensors()
        tensors, _ = read_tensors(path, like, {"model": model.fingerprint()})
        return model.init_state(len(tensors["position"])).fill(tensors)

    def fill(self, tensors: dict[str, Tensor]) -> ModelState:
        """Take over the values of all tensors, by name."""
        for name, t in self.tensors().items():
            t.copy_(tensors[name])
        return self


STATE_FORMAT = "tinymamba-state-2"


def write_tensors(path: str | Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """A safetensors file with a checksum over the tensors and the notes."""
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    notes = {"format": STATE_FORMAT, **notes}
    said = {**notes, "checksum": digest([tensors, notes])}
    replace_file(path, lambda temporary: Path(temporary).write_bytes(save(tensors, said)))


def read_tensors(
    path: str | Path, like: dict[str, Tensor], notes: dict[str, str], rows: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and notes of such a file, if its notes agree with `notes`.

    Names, types and shapes must be those of `like`, but for the number of rows, where `rows` leaves
    it open; no tensor is read before that is known. All else is a UserError.
    """
    from safetensors import SafetensorError, safe_open

    name, remedy = str(path), "save it anew"
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            wanted = {**notes, "format": STATE_FORMAT}
            require(
                all(said.get(k) == v for k, v in wanted.items()),
                name,
                "is no state of this model",
                "load the model that it belongs to",
            )
            slices = {n: file.get_slice(n) for n in file.keys()}  # noqa: SIM118
            known = slices.keys() == like.keys()
            rows = rows or (slices["position"].get_shape()[0] if known else 1)
            for n, t in like.items() if known else ():
                known = known and slices[n].get_shape() == [rows, *t.shape[1:]]
                known = known and slices[n][:0].dtype == t.dtype
            require(known, name, "has other tensors than a state of this model", remedy)
            tensors = {n: file.get_tensor(n) for n in like}
    except (SafetensorError, OSError) as e:
        raise UserError(name, f"cannot be read ({e})", remedy) from None
    checksum = said.pop("checksum", None)
    require(checksum == digest([tensors, said]), name, "is damaged", remedy)
    return tensors, said


def read_all_tensors(
    path: str | Path, remedy: str, unsigned: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and notes of a safetensors file of any content; a damaged one is a UserError.

    A file without a checksum is one of others' only if all its names begin with `unsigned`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
            notes = file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise UserError(str(path), f"cannot be read ({e})", remedy) from None
    checksum = notes.pop("checksum", None)
    others = unsigned is not None and checksum is None
    sound = (
        all(name.startswith(unsigned) for name in tensors)
        if others
        else (checksum == digest([tensors, notes]))
    )
    require(sound, str(path), "is damaged", remedy)
    return tensors, notes


# -------------------------------------------------------------------------------- tokenizer

EOS_TOKEN = "<|endoftext|>"
EOS_NAMES = (EOS_TOKEN, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]")


def byte_alphabet() -> list[str]:
    """A printable character for each byte value, as GPT-2's vocabulary files write bytes."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    other = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


class SimpleTokenizer:
    """Text to ids and back: a `tokenizer.json`, a `vocab.txt` by longest match, or plain bytes.

    Every string survives the round trip: a byte that `vocab.txt` has no token for gets an id of
    its own after the last. Text is the user's: nothing in it is read as a special token, unless
    `encode(..., allow_special=True)`.
    """

    def __init__(self, path: str | Path | None = None):
        self.path, self.library = path, None
        if path is None:
            self._read_vocabulary([*byte_alphabet(), EOS_TOKEN])
        elif not Path(path).is_file():
            raise UserError(str(path), "no such file", "pass tokenizer.json or vocab.txt")
        elif Path(path).suffix == ".json":
            self._read_library(str(path))
        else:
            self._read_vocabulary(self._lines(Path(path)))
        self.bos_token_id = self.pad_token_id = self.eos_token_id  # eos alone parts documents

    @staticmethod
    def _lines(path: Path) -> list[str]:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise UserError(str(path), f"is not UTF-8 ({e.reason})", "convert it") from None
        # A lone carriage return may be a token; a file written on Windows has one on every line.
        end = "\r\n" if text.count("\r\n") == text.count("\n") > 0 else "\n"
        return text.removesuffix(end).split(end)

    def _read_library(self, path: str) -> None:
        from tokenizers import Tokenizer

        try:
            self.library = Tokenizer.from_file(path)
        except Exception as e:  # the library raises nothing narrower
            remedy = "make it with python data/prepare.py"
            raise UserError(path, f"is not a tokenizer ({e})", remedy) from None
        ids = map(self.library.token_to_id, EOS_NAMES)
        self.eos_token_id = next((i for i in ids if i is not None), None)

    def _read_vocabulary(self, tokens: list[str]) -> None:
        byte_of = {c: b for b, c in enumerate(byte_alphabet())}
        gpt2_notation = set(byte_of) <= set(tokens)  # else a token is literal text
        self.pieces, self.special, self.ids = [], {}, {}
        for i, token in enumerate(tokens):
            piece = token.encode()
            if escaped := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
                piece = bytes([int(escaped[1], 16)])
            elif token in EOS_NAMES or re.fullmatch(r"<\|.*\|>", token):
                self.special.setdefault(token, i)
            elif gpt2_notation and set(token) <= set(byte_of):
                piece = bytes(byte_of[c] for c in token)
            self.pieces.append(piece)
            if piece and token not in self.special:
                self.ids.setdefault(piece, i)
        for piece in (bytes([b]) for b in range(256)):
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        self.longest = max(map(len, self.ids))
        self.eos_token_id = next((i for t, i in self.special.items() if t in EOS_NAMES), None)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`; half of a surrogate pair, which is no character, is read as "?"."""
        text = text.encode(errors="replace").decode()
        if self.library is not None:
            self.library.encode_special_tokens = not allow_special
            return self.library.encode(text, add_special_tokens=False).ids
        if allow_special and self.special:
            parts = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)
            special, encode = self.special, self.encode
            return [i for p in parts for i in ([special[p]] if p in special else encode(p))]
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            size = min(self.longest, len(data) - at)
            while data[at : at + size] not in self.ids:
                size -= 1
            ids.append(self.ids[data[at : at + size]])
            at += size
        return ids

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, unknown ids that or nothing."""
        ids = [int(i) for i in ids]
        if self.library is not None:
            return self.library.decode(ids, skip_special_tokens=skip_special_tokens)
        hidden = set(self.special.values()) if skip_special_tokens else ()
        pieces = (self.pieces[i] if 0 <= i < len(self) else b"\xff" for i in ids if i not in hidden)
        return b"".join(pieces).decode(errors="replace")

    def __len__(self) -> int:
        """Number of ids, special ones included."""
        return len(self.pieces) if self.library is None else self.library.get_vocab_size()


def byte_level(model, use_regex: bool = True):
    """A Tokenizer of the library `tokenizers` over a model whose tokens are written as bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_tokenizer():
    """What SimpleTokenizer() does, as one of that library: an id for each byte, and eos."""
    from tokenizers.models import BPE

    tokenizer = byte_level(BPE({c: i for i, c in enumerate(byte_alphabet())}, []), use_regex=False)
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def find_tokenizer(data_path: str) -> SimpleTokenizer | None:
    """The tokenizer that lies beside a file, or in a folder, or None."""
    folder = Path(data_path) if Path(data_path).is_dir() else Path(data_path).parent
    files = (folder / name for name in ("tokenizer.json", "vocab.txt"))
    return next((SimpleTokenizer(file) for file in files if file.is_file()), None)


def open_tokenizer(given, model: TinyMambaModel, beside: list):
    """The one given, or what lies beside these files or the model's training data, or None."""
    if given is not None:
        return SimpleTokenizer(given) if isinstance(given, str | Path) else given
    data = model.config.train_data_path
    beside = [*beside, *([data] if isinstance(data, str) else data)]
    return next(filter(None, (find_tokenizer(str(path)) for path in beside)), None)


def copy_tokenizer(tokenizer, folder: Path) -> None:
    """Put the file of a SimpleTokenizer, if it has one, where find_tokenizer looks for it."""
    path = Path(getattr(tokenizer, "path", None) or "")
    if path.is_file():
        name = "tokenizer.json" if path.suffix == ".json" else "vocab.txt"
        shutil.copyfile(path, folder / name)


# ------------------------------------------------------------------------------------ data


def read_sidecar(path: str) -> dict:
    """What the .json beside a .bin says of it: dtype, vocab_size, eos_id, tokens, bytes."""
    sidecar = Path(path).with_suffix(".json")
    if not sidecar.is_file():
        return {}
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(str(sidecar), f"is not JSON ({e})", "mend it or delete it") from None
    known = isinstance(facts, dict) and facts.get("dtype", "int32") in ("int32", "uint16")
    require(known, str(sidecar), "names no dtype int32 or uint16", "mend it or delete it")
    return facts


class TokenFile:
    """The raw ids of one .bin file, mapped into memory and never read whole."""

    def __init__(self, path: str | Path, data_dtype: str = "auto"):
        self.path, self.tokens = str(path), None
        require(
            Path(path).is_file(), self.path, "no such file", "make it with python data/prepare.py"
        )
        facts = read_sidecar(self.path)
        asked = facts.get("dtype", "int32") if data_dtype == "auto" else data_dtype
        require(
            facts.get("dtype", asked) == asked,
            "data_dtype",
            f"{asked}, but the .json of {self.path} says {facts.get('dtype')}",
            "leave it out",
        )
        self.dtype, size = np.dtype(asked), os.path.getsize(path)
        hint = "is it cut off?" if size % 2 else "pass --data_dtype uint16 if it holds uint16"
        self.length, rest = divmod(size, self.dtype.itemsize)
        require(not rest, self.path, f"{size} bytes are no whole number of {asked} ids", hint)
        require(
            facts.get("tokens", self.length) == self.length,
            self.path,
            f"has {self.length} tokens, its .json says {facts.get('tokens')}",
            "prepare it anew, or delete the .json if it describes another file",
        )

    def read(self, begin: int, end: int) -> np.ndarray:
        if self.tokens is None:
            self.tokens = np.memmap(self.path, self.dtype, mode="r")
        size = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        there = min(len(self.tokens), size // self.dtype.itemsize)
        require(
            end <= there,
            self.path,
            f"was cut to {there} tokens while it was read",
            "put it back and start again",
        )
        return self.tokens[begin:end]

    def sampled_hash(self) -> str:
        """SHA-256 over 64 pieces of 2,048 ids, evenly spaced from the first to the last."""
        last, h = max(0, self.length - 2048), hashlib.sha256()
        for i in range(64):
            h.update(self.read(begin := last * i // 63, min(begin + 2048, self.length)).tobytes())
        return h.hexdigest()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "tokens": None}  # a worker process maps the file itself

    def check(self, vocab_size: int, begin: int, end: int) -> None:
        """Refuse ids outside the vocabulary, naming the first one and where it is."""
        for at in range(begin, end, 1 << 22):
            ids = self.read(at, min(at + (1 << 22), end))
            if ids.max() < vocab_size and ids.min() >= 0:
                continue
            first = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
            remedy = "raise --vocab_size, or tokenize the text anew"
            halves = ids.copy().view(np.uint16)  # two ids of uint16 make one large int32
            if np.mean((ids < 0) | (ids >= 1 << 16)) > 0.5 and halves.max() < vocab_size:
                remedy = "it looks like uint16 ids: pass --data_dtype uint16"
            problem = f"id {ids[first]} at offset {at + first} is outside vocab_size={vocab_size}"
            raise UserError(self.path, problem, remedy)


def permute(index: int, size: int, key: bytes) -> int:
    """Where a pseudo-random permutation of range(size) sends `index`, in constant memory.

    A four-round Feistel network on the next even number of bits; indices that fall outside are
    sent on until they land inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = hashlib.blake2b(b"%d %d" % (turn, right), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
        index = left << half | right
        if index < size:
            return index


class Shares:
    """Deals samples 0, 1, 2, ... to sources so that after n samples each has n * weight, +-2.

    A balanced binary tree: of its first n samples a node sends round(n * left / total) to the left,
    in whole numbers, so nothing drifts. No inner child holds over 2/3 of its parent, so the errors
    of 1/2 at each node add up to less than 2.
    """

    def __init__(self, weights: list[int]):
        """Whole weights, each above 0."""
        self.weights = weights
        self.tree = self._grow(sorted(range(len(weights)), key=lambda i: -weights[i]))

    def _grow(self, sources: list[int]):
        if len(sources) == 1:
            return sources[0]
        total, left, cut = sum(self.weights[i] for i in sources), 0, 0
        while cut < len(sources) - 1 and 3 * left < total:
            left, cut = left + self.weights[sources[cut]], cut + 1
        return self._grow(sources[:cut]), self._grow(sources[cut:]), left, total

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, how many samples it had before) of one sample."""
        node = self.tree
        while not isinstance(node, int):
            low, high, left, total = node
            share, after = ((2 * n * left + total) // (2 * total) for n in (sample, sample + 1))
            node, sample = (low, share) if after > share else (high, sample - share)
        return node, sample

    def counts(self, n: int, node=None) -> dict[int, int]:
        """How many of the first n samples each source gets."""
        node = self.tree if node is None else node
        if isinstance(node, int):
            return {node: n}
        low, high, left, total = node
        share = (2 * n * left + total) // (2 * total)
        return self.counts(share, low) | self.counts(n - share, high)


class StreamingTokenDataset(torch.utils.data.Dataset):
    """Blocks of tokens from one or more .bin files, in an order that is a pure function.

    `dataset[i]` is a pair of int64 tensors, inputs and targets, each (block_size,). Any i >= 0 is
    valid: `i // len(dataset)` is the epoch. Sample i depends on (seed, i) alone, so a position in
    the data is one number, whatever the processes and workers. No block comes twice in an epoch;
    the epoch ends before the first source would repeat one. `weights` are the sources' shares
    (default: by size, which reads everything once).
    """

    def __init__(
        self,
        data_sources,
        block_size: int,
        weights=None,
        shuffle: bool = False,
        seed: int = 1337,
        vocab_size: int | None = None,
        data_dtype: str = "auto",
    ):
        paths = [data_sources] if isinstance(data_sources, str | Path) else data_sources
        self.block_size, self.shuffle, self.seed = block_size, shuffle, seed
        self.vocab_size = vocab_size
        self.files = [TokenFile(path, data_dtype) for path in paths]
        require(self.files, "data_sources", "is empty", "name at least one .bin file")
        for file in self.files:
            problem = f"{file.length} tokens are too few for block_size={block_size}"
            require(file.length > block_size, file.path, problem, f"it needs {block_size + 1}")
            if vocab_size is not None:
                file.check(vocab_size, 0, file.length)
        self.blocks = [(file.length - 1) // block_size for file in self.files]
        self.shares = Shares(self.blocks if weights is None else self._whole_weights(weights))
        self.length = sum(self.blocks) if weights is None else self._epoch_length()
        self.epoch, self.given = 0, self.shares.counts(0)  # samples given before the epoch at hand

    def _whole_weights(self, weights) -> list[int]:
        weights, field = [float(w) for w in weights], "train_data_weights"
        require(
            len(weights) == len(self.files),
            field,
            f"{len(weights)} weights for {len(self.files)} sources",
            "give one for each",
        )
        require(
            all(math.isfinite(w) and w > 0 for w in weights),
            field,
            f"{weights} are not all above 0",
            "leave out sources of share 0",
        )
        exact = [Fraction(str(w)) for w in weights]
        whole = [int(w * math.lcm(*(e.denominator for e in exact))) for w in exact]
        return [w // math.gcd(*whole) for w in whole]

    def _epoch_length(self) -> int:
        """The most samples in which no source can run out, in any epoch."""
        total, weights = sum(self.shares.weights), self.shares.weights
        whole_cycles = min(b // w for b, w in zip(self.blocks, weights, strict=True)) * total
        with_slack = min((b - 4) * total // w for b, w in zip(self.blocks, weights, strict=True))
        return max(whole_cycles, with_slack, min(self.blocks))

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.length

    def locate(self, i: int) -> tuple[int, int]:
        """(source, block) of sample i."""
        i = operator.index(i)  # whole numbers of any size, also when a sampler gives numpy's
        if i < 0:
            raise IndexError(f"sample {i}: samples are numbered from 0")
        epoch, (source, nth) = i // self.length, self.shares.locate(i)
        if epoch != self.epoch:
            self.epoch, self.given = epoch, self.shares.counts(epoch * self.length)
        nth -= self.given[source]
        if not self.shuffle:
            return source, nth
        key = hashlib.sha256(b"%d %d %d" % (self.seed, source, epoch)).digest()
        return source, permute(nth, self.blocks[source], key)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        source, block = self.locate(i)
        begin, end = block * self.block_size, (block + 1) * self.block_size + 1
        if self.vocab_size is not None:  # once more, for a file that was changed meanwhile
            self.files[source].check(self.vocab_size, begin, end)
        ids = torch.from_numpy(self.files[source].read(begin, end).astype(np.int64))
        return ids[:-1], ids[1:]

    def __iter__(self):
        """One epoch, in order."""
        return map(self.__getitem__, range(len(self)))

    def fingerprint(self) -> dict:
        """What a position in the data is only valid for."""
        return {
            "block_size": self.block_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "sources": [
                [Path(f.path).name, f.length, str(f.dtype), f.sampled_hash()] for f in self.files
            ],
            "weights": [str(w) for w in self.shares.weights],
        }


class ShardedBatches:
    """Batches of consecutive sample numbers, dealt to the ranks in turn."""

    def __init__(self, first: int, last: int, batch_size: int, rank: int = 0, world: int = 1):
        self.starts = range(first + rank * batch_size, last, batch_size * world)
        self.last, self.batch_size = last, batch_size

    def __iter__(self):
        return (list(range(s, min(s + self.batch_size, self.last))) for s in self.starts)

    def __len__(self) -> int:
        return len(self.starts)


# ------------------------------------------------------------------------ optimizer and schedule


def whole(t):
    """A tensor of which each process holds a part (FSDP), put together; anything else as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def share_of(t: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as `like` is."""
    if not hasattr(like, "device_mesh") or t.shape != like.shape:
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices and AdamW for all else, as one optimizer.

    The rows of a matrix that makes several things at once, as queries, keys and values, are as many
    matrices to Muon. Updates are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982,
    eq. 4), so that one learning rate serves both.
    """

    MOMENTUM = 0.95

    def __init__(self, matrices: dict[nn.Parameter, list[int]], others: list, config: Config):
        """`matrices` says into how many rows each is cut."""
        self.rows = list(matrices.values())
        self.adamw = torch.optim.AdamW(
            others, config.lr, (config.beta1, config.beta2), weight_decay=0.0, fused=True
        )
        muon = {"params": list(matrices), "lr": config.lr, "weight_decay": config.weight_decay}
        super().__init__([muon, *self.adamw.param_groups], {})
        self.share()

    def share(self) -> None:
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    def __setstate__(self, state: dict) -> None:  # load_state_dict makes groups and state anew
        super().__setstate__(state)
        self.share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.adamw.step()
        group, alike, updates = self.param_groups[0], {}, {}
        for p, rows in zip(group["params"], self.rows, strict=True):
            if p.grad is None:
                continue
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            mean = self.state[p]["momentum_buffer"]
            mean.lerp_(p.grad, 1 - self.MOMENTUM)
            updates[p] = whole(p.grad.lerp(mean, self.MOMENTUM))
            for part in updates[p].split(rows):
                alike.setdefault(part.shape, []).append(part)
        for shape, parts in alike.items():
            made = orthogonalize(torch.stack(parts)).to(parts[0].dtype)
            torch._foreach_copy_(parts, made.mul_(0.2 * max(shape) ** 0.5).unbind())
        if updates:
            torch._foreach_mul_(list(updates), 1 - group["lr"] * group["weight_decay"])
            shares = [share_of(update, p) for p, update in updates.items()]
            torch._foreach_add_(list(updates), shares, alpha=-group["lr"])
        return loss


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices (count, rows, columns) with singular values near 1: Newton-Schulz, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.bfloat16().mT if tall else x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Muon or AdamW for the matrices of linear projections, with decay; AdamW for the rest.

    Norms, biases, A_log, D, dt_bias, convolutions and scales are no matrices, nor are the few rows
    that make gates and angles. The embedding's rows are looked up one by one: decay would shrink
    those of rare tokens between their visits.
    """
    no_matrix = ("head", "controller", "angle_proj")
    linear = {
        m.weight: getattr(m, "parts", [m.out_features])
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and not name.endswith(no_matrix) and m.weight.requires_grad
    }
    others = [p for p in model.parameters() if p.requires_grad and p not in linear]
    if config.optimizer == "muon":
        return MuonAdamW(linear, others, config)
    groups = [
        {"params": list(linear), "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), fused=True)


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """Linear warm-up to `lr`, then a cosine down to min_lr_ratio * lr at the last step."""
    warmup = min(config.warmup_steps, total_steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


# -------------------------------------------------------------------------------- checkpoints

CHECKPOINT_FORMAT = 3
FOLDER_FORMAT = 2


def digest(value) -> str:
    """SHA-256 over nested dicts and lists of tensors and plain values."""
    h = hashlib.sha256()

    def feed(v) -> None:
        if isinstance(v, Tensor):
            h.update(f"{v.dtype}{tuple(v.shape)}".encode())
            h.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(v, dict):
            feed([[str(k), v[k]] for k in sorted(v, key=str)])
        elif isinstance(v, list | tuple):
            h.update(b"[%d" % len(v))
            for item in v:
                feed(item)
        else:
            h.update(f"{type(v).__name__} {v!r};".encode())

    feed(value)
    return h.hexdigest()


REPLACING = threading.Lock()  # two writers of one file would share its temporary name


def replace_file(path: str | Path, write, previous: Path | None = None) -> None:
    """Let `write(temporary name)` make the file, then put it in place in one step, on disk.

    What was there becomes `previous`, if that is given.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        if os.path.lexists(path) and not path.is_file():
            raise OSError("something is there that is no plain file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with REPLACING:
            write(str(temporary))
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
        if os.name == "posix":  # the rename itself is on disk when the folder is
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError, ValueError) as e:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
        raise UserError(str(path), f"cannot be written ({e})", "free space or name another") from e


def write_json(path: str | Path, value) -> None:
    text = json.dumps(value, indent=2) + "\n"
    replace_file(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def save_checkpoint(path: str | Path, state: dict, previous: Path | None = None) -> None:
    """Write `state` (tensors and plain values) with a checksum, and read it back.

    Only then it takes the place of the file at `path`, which becomes `previous`, if that is given.
    """
    state = {**state, "format_version": CHECKPOINT_FORMAT}
    state["checksum"] = digest(state)

    def write(temporary: str) -> None:
        torch.save(state, temporary)
        load_checkpoint(temporary)

    replace_file(path, write, previous)


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU; a missing, damaged or foreign file is a UserError.

    Only tensors and plain values are read, so no code in a file is ever run.
    """
    name, remedy = str(path), "use a checkpoint that testv2.py saved"
    require(Path(path).is_file(), name, "no such checkpoint", "train one, or check the path")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(name, "is damaged, or holds code, which is never run", remedy) from None
    except Exception as e:  # what a damaged pickle raises depends on where it is damaged
        raise UserError(name, f"is damaged ({type(e).__name__})", remedy) from e
    require(
        isinstance(state, dict) and state.get("format_version") == CHECKPOINT_FORMAT,
        name,
        f"is no TinyMamba checkpoint of format {CHECKPOINT_FORMAT}",
        remedy,
    )
    require(
        state.pop("checksum", None) == digest(state),
        name,
        "is damaged: its checksum is wrong",
        remedy,
    )
    return state


def require_same_run(old: dict, new: dict) -> None:
    """Refuse settings under which a checkpoint's tensors or its place in the data would not fit."""
    changed = [name for name in RUN_FIELDS if old[name] != new[name]]
    asked, had = (", ".join(str(values[name]) for name in changed) for values in (new, old))
    require(
        not changed,
        ", ".join(changed),
        f"{asked} asked for, but the checkpoint has {had}",
        "leave the flags out, or start a new run",
    )


def resumed_config(saved: dict, named: dict) -> Config:
    """The settings of a checkpoint, with those that the user has named over them."""
    settings = {**saved["config"], **named, "resume": True}
    require_same_run(saved["config"], settings)
    return Config.from_dict(settings)


def run_files(path: str | Path) -> list[Path]:
    """The checkpoints of the run that saves to `path`: that file, then the others, newest first."""
    path = Path(path)
    stem = glob.escape(path.stem.removesuffix("_latest"))
    others = {
        sibling(path, "previous"),
        sibling(path, "best"),
        *path.parent.glob(f"{stem}_step*{glob.escape(path.suffix)}"),
    }
    others = [f for f in others if f.is_file() and f != path]
    return [path, *sorted(others, key=lambda f: f.stat().st_mtime, reverse=True)]


def load_newest(path: str | Path) -> dict:
    """The checkpoint at `path`, or if that is damaged or gone the newest good one of its run.

    What is damaged is renamed, so that no save takes it for a good one.
    """
    damaged = {}
    for file in run_files(path):
        try:
            saved = load_checkpoint(file)
        except UserError as e:
            damaged[file] = e
            continue
        for other, error in damaged.items():
            if from_launcher("RANK", 0) == 0:
                print(f"warning: {error}: going on from {file}")
                move_aside(other, ".damaged")
        return saved
    raise next(iter(damaged.values()))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> TinyMambaModel:
    """The model of a checkpoint, or of a folder that `save_folder` wrote, in eval mode."""
    if Path(path).is_dir():
        return load_folder(Path(path)).to(device).eval()
    state = load_checkpoint(path)
    require(
        "adapter" not in state,
        str(path),
        "holds an adapter only, no model",
        "pass the base's checkpoint, and the adapter's folder as --adapter",
    )
    model = TinyMambaModel(Config.from_dict(state["config"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval()


def save_folder(folder: Path, model: TinyMambaModel) -> None:
    """Write model.safetensors, with a checksum, and config.json: a model without pickle."""
    write_tensors(folder / "model.safetensors", stored_tensors(model), {"format": "pt"})
    write_json(folder / "config.json", describe_model(model))


def stored_tensors(model: TinyMambaModel) -> dict[str, Tensor]:
    """What a file holds of a model.

    Numbers of 4 bits lie two in a byte. Of a tied embedding and a quantized head, the head is kept.
    """
    tensors = model.state_dict()
    for name in [n for n in tensors if n.endswith(".factors")]:
        codes = name.replace(".factors", ".codes")
        tensors[codes] = pack(tensors[codes], tensors[name])
    if model.config.tie_embeddings:
        tensors.pop("head.weight" if "head.weight" in tensors else "embedding.weight")
    return tensors


def describe_model(model: TinyMambaModel) -> dict:
    """What config.json says of a model."""
    config = {name: getattr(model.config, name) for name in FOLDER_FIELDS}
    config |= {"quantization": model.quantization} if model.quantization else {}
    return {"model_type": "tinymamba", "format_version": FOLDER_FORMAT, **config}


def load_folder(folder: Path) -> TinyMambaModel:
    """The model of such a folder; a missing, damaged or foreign file is a UserError.

    `transformers` writes the names with "model." before them, and no checksum.
    """
    path, remedy = folder / "config.json", "export the model again"
    try:
        config = json.loads(path.read_bytes())
        known = config["model_type"] == "tinymamba" and config["format_version"] == FOLDER_FORMAT
        require(known, str(path), f"is no TinyMamba model of format {FOLDER_FORMAT}", remedy)
        model = TinyMambaModel(Config.from_dict({n: config[n] for n in FOLDER_FIELDS}))
        if config.get("quantization") is not None:
            quantize_like(model, config["quantization"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise UserError(str(path), f"cannot be read ({e})", remedy) from None
    path, tensors = folder / "model.safetensors", {}
    for file in weight_files(path):
        tensors |= read_all_tensors(file, remedy, unsigned="model.")[0]
    tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
    try:
        fill_model(model, tensors)
    except (RuntimeError, KeyError):
        raise UserError(str(path), "does not fit its config.json", remedy) from None
    return model


def weight_files(path: Path) -> list[Path]:
    """The file, or those that `transformers` has cut it into."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return [path]
    try:
        names = {Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(str(index), f"cannot be read ({e})", "export the model again") from None
    return [path.with_name(name) for name in sorted(names)]


def fill_model(model: TinyMambaModel, tensors: dict[str, Tensor]) -> None:
    """Give the model what `save_folder` has written."""
    for name in [n for n in tensors if n.endswith(".factors")]:
        codes = name.replace(".factors", ".codes")
        tensors[codes] = unpack(tensors[codes], tensors[name])
    if model.config.tie_embeddings and isinstance(model.head, QuantizedLinear):
        tensors["embedding.weight"] = whole_weight(tensors["head.codes"], tensors["head.scale"])
    elif model.config.tie_embeddings:
        tensors["head.weight"] = tensors.get("embedding.weight")
    model.load_state_dict(tensors)


QUANTIZATION_FORMAT = 1
QUANTIZATION_MODES = ("dynamic", "weight_only")


def quantize_like(model: TinyMambaModel, scheme: dict) -> None:
    """Put quantized layers, still to be filled, where a scheme has them."""
    version, mode, size = (scheme[name] for name in ("version", "mode", "group_size"))
    if version != QUANTIZATION_FORMAT or mode not in QUANTIZATION_MODES:
        raise ValueError(f"quantization of version {version} and mode {mode!r} is unknown")
    if type(size) is not int or size < 2 or size % 2:
        raise ValueError(f"groups of {size!r} are not legal")
    for name, bits in scheme["layers"].items():
        layer = model.get_submodule(name)
        cut = bits == 8 or layer.in_features % size == 0
        if not isinstance(layer, nn.Linear) or bits not in (4, 8) or not cut:
            raise ValueError(f"{name} cannot be quantized to {bits} bits in groups of {size}")
        model.set_submodule(
            name,
            QuantizedLinear(
                layer.in_features, layer.out_features, layer.bias is not None, bits, mode, size
            ),
        )
    model.quantization = scheme


def sibling(path: str | Path, tag: str) -> Path:
    """x_latest.pt -> x_tag.pt."""
    path = Path(path)
    return path.with_name(f"{path.stem.removesuffix('_latest')}_{tag}{path.suffix}")


def move_aside(path: Path, mark: str = "") -> None:
    """Rename a file to path.1, path.2, ..., with the mark before the number: nothing is lost."""
    if path.exists():
        number = next(n for n in range(1, 1 << 30) if not Path(f"{path}{mark}.{n}").exists())
        path.rename(f"{path}{mark}.{number}")
        print(f"{path}{'' if mark else ' of an earlier run'} is now {path}{mark}.{number}")


def require_writable(folder: Path, field: str) -> None:
    """Make the folder if need be; refuse one that cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(field, f"{folder} cannot be made ({e.strerror})", "name another") from e
    require(os.access(folder, os.W_OK), field, f"{folder} cannot be written to", "name another")


def replace_files(made: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Move files to a folder, out of one below it that goes; those that are missing go as well."""
    for name in names:
        if (made / name).exists():
            (made / name).replace(folder / name)
        else:  # no tokenizer of another model may stay
            (folder / name).unlink(missing_ok=True)
    made.rmdir()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` if all went well, and else is gone."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
        temporary.chmod(0o755)
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as e:
        remedy = "free space or name another"
        raise UserError(str(folder), f"cannot be written ({e})", remedy) from e
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------ sampling


@torch.no_grad()
def generate(
    model: TinyMambaModel,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
    until=lambda: False,
) -> Tensor:
    """Continue ids (B, L), L >= 1, by up to max_new_tokens: (B, L + new). Temperature 0 is greedy.

    Ends early when every row has met eos_id, or when `until()` is true; a row that ended is filled
    with eos_id. Put the model in eval mode first, or dropout stays on.
    """
    state = model.init_state(ids.shape[0])
    piece, ended = ids, torch.zeros_like(ids[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits, state = model.advance(piece, state, last_only=True)
        piece = logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
        if temperature > 0:
            weights = (widen(logits[:, -1]).cpu() / temperature).softmax(-1)
            piece = torch.multinomial(weights, 1, generator=generator).to(ids.device)
        if eos_id is not None:
            piece = piece.masked_fill(ended, eos_id)
            ended = ended | (piece == eos_id)
        ids = torch.cat((ids, piece), dim=1)
        if ended.all() or until():
            break
    return ids


# ------------------------------------------------------------------------------------ logging


class Logger:
    """TensorBoard, W&B and the console; silent on all ranks but the first."""

    def __init__(self, config: Config, folder: Path, active: bool, first_step: int):
        self.active, self.board, self.wandb = active, None, None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        if config.use_wandb:
            try:
                import wandb

                self.wandb = wandb.init(
                    project=config.wandb_project,
                    name=config.wandb_run_name or None,
                    dir=str(folder),
                    config=config.to_dict(),
                )
            except ModuleNotFoundError as e:
                raise UserError("use_wandb", str(e), "pip install wandb") from None
            except wandb.Error as e:
                remedy = "wandb login, or set WANDB_MODE=offline"
                raise UserError("use_wandb", str(e).split("\n")[0], remedy) from None
        self.board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def say(self, text: str) -> None:
        if self.active:
            from tqdm import tqdm

            tqdm.write(text)
            sys.stdout.flush()

    def record(self, values: dict[str, float], step: int) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def plot_losses(history: dict[str, list], path: Path) -> None:
    """Draw training and validation loss over the steps into a PNG."""
    figure = need("matplotlib.figure").Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, marker in (("train", ""), ("val", "o")):
        if history[name]:
            axes.plot(*zip(*history[name], strict=True), label=name, marker=marker, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def gate_statistics(gates: Tensor) -> dict[str, float]:
    """Mean weight of each branch and mean entropy in nats; gates is (n_layer, B, L, 3)."""
    share = gates.mean(dim=(1, 2))  # (n_layer, 3)
    entropy = torch.special.entr(gates).sum(-1).mean(dim=(1, 2))  # (n_layer,)
    columns = dict(zip(TokenAdaptiveGating.BRANCHES, share.T, strict=True)) | {"entropy": entropy}
    values = {f"gate/{name}": column.mean().item() for name, column in columns.items()}
    for name, column in columns.items():
        values |= {f"gate_{name}/layer{i}": value for i, value in enumerate(column.tolist())}
    return values


# ------------------------------------------------------------------------------------ training


def from_launcher(name: str, default: int) -> int:
    """What torchrun or torch.distributed.launch say: RANK, LOCAL_RANK or WORLD_SIZE."""
    return int(os.environ.get(name, default))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name, or for "auto" the fastest; a UserError where it is not there."""
    mps = torch.backends.mps.is_available()
    have = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in have.items() if present)
    known = re.fullmatch(r"cuda(:\d+)?|mps|cpu", name) and have[name.split(":")[0]]
    legal = ", ".join(kind for kind, present in have.items() if present)
    require(known, "device", f"{name} is not here", f"use auto, {legal}")
    device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    require(
        device.type != "cuda" or device.index < torch.cuda.device_count(),
        "device",
        f"{device} is not here",
        f"there are {torch.cuda.device_count()} GPUs",
    )
    return device


def pick_amp_dtype(wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """The autocast type that the hardware is fast in; float32 stands for no autocast."""
    if device.type == "cuda" and wanted == torch.bfloat16:
        return wanted if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return wanted if wanted == torch.bfloat16 and fast else torch.float32
    return wanted


def why_no_compile(device: torch.device) -> str | None:
    """What stands in the way of torch.compile, as far as it can be known beforehand."""
    if device.type == "mps":
        return "it is experimental on Apple GPUs"
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")
    missing = device.type == "cpu" and not any(map(shutil.which, compilers))
    return "no C++ compiler was found" if missing else None


SPIKE_SHARE = 0.01  # of one step in the running mean of the gradient norm
SPIKE_WARMUP = 20  # steps that this mean must have seen


class Watchdog:
    """Ends this process, naming the one to blame, when another has failed or fallen silent.

    Once a second a thread of every process counts up a number of its own in the store through which
    they met. A process that is dead, stopped or cut off counts no more, while the others wait for
    it inside a collective operation that may take half an hour to give up.
    """

    def __init__(self, store, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = store.clone(), rank, world, timeout
        self.store.set_timeout(timedelta(seconds=timeout))
        self.over = threading.Event()
        self.heard = {}  # rank: what it said last, and since when
        self.say("alive 0")
        self.store.set(f"name {rank}", f"rank {rank} (process {os.getpid()} on {gethostname()})")
        dist.barrier()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def say(self, text: str) -> None:
        self.store.set(f"rank {self.rank}", text)

    def watch(self) -> None:
        beat = 0
        while not self.over.wait(1.0):
            beat += 1
            try:
                self.say(f"alive {beat}")
                for other in range(self.world):
                    self.listen(other)
            except dist.DistError as e:
                self.end(f"the store of the processes is gone ({e})")

    def listen(self, other: int) -> None:
        """Note whether a process has said something new; end if it failed or is silent."""
        said, now = self.store.get(f"rank {other}").decode(), time.monotonic()
        before, since = self.heard.get(other, ("", now))
        since = since if said == before else now
        self.heard[other] = said, since
        if other == self.rank or said == "done":
            return
        if said.startswith("failed"):
            self.end(f"{self.name(other)} {said}")
        if now - since > self.timeout:
            self.end(f"{self.name(other)} has been silent for {self.timeout} seconds")

    def name(self, other: int) -> str:
        return self.store.get(f"name {other}").decode()

    def end(self, why: str) -> None:
        print(f"error: {why}; mend that and pass --resume", file=sys.stderr, flush=True)
        with contextlib.suppress(dist.DistError):
            self.say("ended")
        os._exit(2)  # the main thread may wait for ever

    def blame(self, error: Exception) -> typing.NoReturn:
        """After a failed collective: wait until it is known who is to blame, and end."""
        self.timeout = min(self.timeout, 5.0)
        self.thread.join(3 * self.timeout)
        raise UserError("WORLD_SIZE", f"the processes lost touch ({error})", "see their messages")

    def close(self, error: BaseException | None) -> None:
        """Tell the others how this process ended, and let them hear it before the store is gone."""
        self.over.set()
        self.thread.join()
        why = str(error) if isinstance(error, UserError) else repr(error)
        until = time.monotonic() + min(self.timeout, 5.0)
        with contextlib.suppress(dist.DistError):
            self.say(f"failed ({why})" if error else "done")
            while self.rank == 0 and self.others_go_on() and time.monotonic() < until:
                time.sleep(0.02)

    def others_go_on(self) -> bool:
        said = (self.store.get(f"rank {other}").decode() for other in range(1, self.world))
        return any(text.startswith("alive") for text in said)


class Trainer:
    """One training run, from the first batch to the last checkpoint."""

    def __init__(self, config: Config, tokenizer=None, saved: dict | None = None):
        """`tokenizer`: any object with encode and decode. `saved`: a checkpoint to go on from."""
        self.config = config = replace(config).validate()
        self.rank, self.world = from_launcher("RANK", 0), from_launcher("WORLD_SIZE", 1)
        self.main = self.rank == 0
        self.signal, self.saves_asked, self.saves_done = 0, 0, 0  # what this process was sent
        self.stopped_by = 0  # the signal that all processes agreed to stop for
        self.writer, self.writing = ThreadPoolExecutor(1), None  # of checkpoints, see save
        self.device = pick_device(config.device, from_launcher("LOCAL_RANK", 0))
        self.amp = pick_amp_dtype(config.amp_dtype, self.device)
        self.open_data(tokenizer)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.watchdog = self.meet_others() if self.world > 1 else None
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")
        self.model = self.build().to(self.device)
        self.fsdp = config.parallel == "fsdp" and self.world > 1
        if self.fsdp:
            self.shard()
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.step = self.samples = self.tokens = 0
        self.progress = {
            "history": {"train": [], "val": []},  # [step, loss in nats]
            "best": [],  # [validation loss, file name] of the save_top_k best, best first
            "lowest": math.inf,
            "bad_validations": 0,
            "bad_steps": 0,
            "skipped": 0,
            "norm": [0.0, 0.0, 0],  # mean and variance of the gradient norm, steps in them
            "unfinished": False,  # a signal ended the run between this step and its validation
            "folder": config.wandb_run_name or time.strftime("%Y%m%d-%H%M%S"),
        }
        self.resumed = saved is not None
        if self.resumed:
            self.restore(saved)
        left = config.num_epochs * len(self.train_data) - self.samples
        self.total_steps = config.max_steps or self.step + max(0, left // self.samples_per_step)
        require(
            self.total_steps,
            "batch_size",
            f"one step takes {self.samples_per_step} samples, the data has {left}",
            "lower it, or set --max_steps",
        )
        self.folder, path = Path(config.log_dir) / self.progress["folder"], config.checkpoint_path
        require(
            path and not os.path.isdir(path),
            "checkpoint_path",
            f"{path!r} is no file name",
            "name a file",
        )
        if self.main:
            require_writable(Path(path).parent, "checkpoint_path")
            require_writable(self.folder, "log_dir")
        self.log = Logger(config, self.folder, self.main, self.step)
        self.forward = self.wrap(config.use_compile)

    def build(self) -> TinyMambaModel:
        return TinyMambaModel(self.config)

    def weights(self) -> dict[str, Tensor]:
        """What of the model a checkpoint holds."""
        return self.model.state_dict()

    def meet_others(self) -> Watchdog:
        """Set up the process group that the launcher asks for."""
        store, rank, world = next(dist.rendezvous("env://"))
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world
        )
        # Its destructor would join a thread that may be waiting for the interpreter: a deadlock.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
        return Watchdog(store, rank, world, self.config.rank_timeout)

    def shard(self) -> None:
        """Cut every parameter over the processes; each block is put together while it is used."""
        from torch.distributed.device_mesh import init_device_mesh  # half a second to import
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        warnings.filterwarnings("ignore", ".*returned a view tensor")  # none is changed in place
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        register_fsdp_forward_method(self.model, "advance")

    def open_data(self, tokenizer) -> None:
        """The data and its tokenizer."""
        c = self.config
        kind = {"vocab_size": c.vocab_size, "data_dtype": c.data_dtype, "seed": c.seed}
        self.train_data = StreamingTokenDataset(
            c.train_data_path, c.block_size, c.train_data_weights, shuffle=True, **kind
        )
        self.fingerprint = self.train_data.fingerprint()
        self.val_data, self.bytes_per_token = None, None
        if c.enable_validation:
            self.val_data = StreamingTokenDataset(c.val_data_path, c.block_size, **kind)
            facts = [read_sidecar(f.path) for f in self.val_data.files]
            if all(f.get("tokens") and f.get("bytes") for f in facts):
                tokens = sum(f["tokens"] for f in facts)
                self.bytes_per_token = sum(f["bytes"] for f in facts) / tokens
        first = self.train_data.files[0].path
        self.tokenizer = tokenizer or find_tokenizer(first)
        if c.eos_id < 0:
            eos = read_sidecar(first).get("eos_id", getattr(self.tokenizer, "eos_token_id", None))
            c.eos_id = -1 if eos is None else eos
            c.validate()
        self.samples_per_step = c.batch_size * c.gradient_accumulation_steps * self.world

    def wrap(self, compiled: bool):
        """The model as the training step calls it: compiled and data-parallel where asked."""
        model, reason = self.model, why_no_compile(self.device)
        if compiled and reason:
            self.log.say(f"torch.compile is off: {reason}")
        elif compiled:
            model = torch.compile(model)
        if self.world == 1 or self.fsdp:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, forward_sync_buffers=False
        )

    def autocast(self):
        return torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32)

    def batches(self, data: StreamingTokenDataset, first: int, last: int):
        """This rank's batches of the samples first .. last-1, on the device."""
        c, pinned = self.config, self.device.type == "cuda"
        plan = ShardedBatches(first, last, c.batch_size, self.rank, self.world)
        loader = torch.utils.data.DataLoader(
            data, batch_sampler=plan, num_workers=c.num_workers, pin_memory=pinned
        )
        for x, y in loader:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def over_ranks(self, values: list[float], op=dist.ReduceOp.SUM) -> list[float]:
        """Each value summed (or as `op` says) over all processes."""
        if self.world == 1:
            return values
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(t, op)
        return t.tolist()

    def train_step(self, batches) -> tuple[float, float]:
        """Read `gradient_accumulation_steps` batches, update once: (mean loss, gradient norm)."""
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, c)
        taken = self.read(batches)
        try:
            loss = self.accumulate(taken)
        except torch._dynamo.exc.TorchDynamoException as e:
            reason = str(e).partition("\n")[0]
            self.log.say(f"torch.compile failed, going on without it: {reason}")
            self.optimizer.zero_grad()
            self.forward = self.wrap(compiled=False)
            loss = self.accumulate(taken)
        self.scaler.unscale_(self.optimizer)
        limit = c.grad_clip or math.inf
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), limit)).item()
        if self.is_good(loss, norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.samples += self.samples_per_step
        self.tokens += self.samples_per_step * c.block_size
        return loss, norm

    def read(self, batches) -> list:
        """The batches of one step; where one process cannot read its own, all end and save."""
        taken, error = [], None
        try:
            taken = [next(batches) for _ in range(self.config.gradient_accumulation_steps)]
        except UserError as e:
            error = e
        if self.over_ranks([float(error is not None)])[0]:
            self.save()
            raise error or UserError(
                "train_data_path",
                "another process could not read its data",
                "see its message, and resume",
            )
        return taken

    def is_good(self, loss: float, norm: float) -> bool:
        """Whether a step may change the weights: its loss and gradient are finite and no spike."""
        p, limit = self.progress, self.config.skip_spikes
        if not math.isfinite(loss + norm):
            p["bad_steps"], p["skipped"] = p["bad_steps"] + 1, p["skipped"] + 1
            return False
        p["bad_steps"] = 0
        (mean, variance, steps), deviation = p["norm"], p["norm"][1] ** 0.5
        spike = limit > 0 and steps >= SPIKE_WARMUP and norm > mean + limit * deviation
        seen = min(norm, mean + limit * deviation) if spike else norm  # it may have come to stay
        share = max(SPIKE_SHARE, 1 / (steps + 1))
        change = seen - mean
        p["norm"] = [mean + share * change, (1 - share) * (variance + share * change**2), steps + 1]
        p["skipped"] += spike
        if spike:
            self.log.say(
                f"step {self.step + 1}: gradient norm {norm:.2f} is a spike (mean "
                f"{mean:.2f}, deviation {deviation:.2f}); the weights stay as they were"
            )
        return not spike

    def accumulate(self, taken: list) -> float:
        """Gradients of the mean loss over the batches taken, synchronized once; that loss."""
        c = self.config
        # Dropout is a function of (seed, step, rank): a resumed run needs no generator state.
        torch.manual_seed(((c.seed * 1_000_003 + self.step) * 65_537 + self.rank) % (1 << 63))
        total, self.last_ids = 0.0, taken[-1][0]
        for i, (x, y) in enumerate(taken):
            with self.synchronized(i == len(taken) - 1):
                with self.autocast():
                    loss = self.forward(x, y) / len(taken)
                self.scaler.scale(loss).backward()
            total += loss.item()
        return self.over_ranks([total])[0] / self.world

    def synchronized(self, last: bool):
        """Where the backward pass sums gradients over the processes only if it is the last one."""
        if self.fsdp:
            self.model.set_requires_gradient_sync(last)
        skip = self.world > 1 and not self.fsdp and not last
        return self.forward.no_sync() if skip else contextlib.nullcontext()

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss in nats on the first `validation_steps` batches of the validation data.

        Bits per byte are by the whole file's bytes per token. None if a signal ended it early.
        """
        c, last, total, count, values = self.config, len(self.val_data), 0.0, 0, {}
        if c.validation_steps:
            last = min(last, c.validation_steps * c.batch_size * self.world)
        self.model.eval()
        batches = self.batches(self.val_data, 0, last)
        for _ in range(math.ceil(last / (c.batch_size * self.world))):
            if self.heed_signals():
                self.model.train()
                return None
            x, y = next(batches, (None, None))
            if x is None:  # the others have one more: take part, in what FSDP does together
                self.model(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
                continue
            with self.autocast():
                loss, gates = self.model(x, y, return_gates=True)
            total, count = total + loss.item() * y.numel(), count + y.numel()
            values = values or gate_statistics(gates)
        self.model.train()
        total, count = self.over_ranks([total, count])
        values["val/loss"] = loss = total / count
        line = f"validation at step {self.step}: {loss:.4f} nats"
        if self.bytes_per_token:
            values["val/bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
            line += f", {values['val/bits_per_byte']:.4f} bits per byte"
        if self.main:
            names = (*TokenAdaptiveGating.BRANCHES, "entropy")
            line += " | gate " + " ".join(f"{n} {values[f'gate/{n}']:.2f}" for n in names)
        self.log.say(line)
        self.log.record(values, self.step)
        self.progress["history"]["val"].append([self.step, loss])
        return loss

    def judge(self, loss: float) -> bool:
        """Keep the checkpoint if it is among the best; say whether to stop early."""
        c, p = self.config, self.progress
        if loss < p["lowest"] - c.early_stopping_min_delta:
            p["lowest"], p["bad_validations"] = loss, 0
        else:
            p["bad_validations"] += 1
        self.keep_best(loss)
        if not c.use_early_stopping or p["bad_validations"] < c.early_stopping_patience:
            return False
        self.log.say(f"early stopping: {p['bad_validations']} validations without improvement")
        return True

    def keep_best(self, loss: float) -> None:
        """Write ..._best.pt, and with save_top_k > 1 each of the best as ..._stepN.pt too."""
        k, path, best = self.config.save_top_k, self.config.checkpoint_path, self.progress["best"]
        name = sibling(path, f"step{self.step}").name
        if not math.isfinite(loss):
            return
        ranked = sorted([*best, [loss, name]])
        self.progress["best"] = ranked[:k]
        if [loss, name] not in ranked[:k]:
            return
        state = self.state(loss)
        if ranked[0][1] == name:
            self.write(sibling(path, "best"), state)
        if k > 1 and self.main:
            self.write(Path(path).with_name(name), state)
            self.finish_writing()  # before what it takes the place of goes
            for _, old in ranked[k:]:
                Path(path).with_name(old).unlink(missing_ok=True)

    def sample(self) -> None:
        """Print a continuation of generation_prompt, or a new document."""
        c = self.config
        if not self.main and not self.fsdp:
            return
        if self.tokenizer is None:
            self.log.say("no sample: no tokenizer.json or vocab.txt beside the training data")
            return
        ids = list(self.tokenizer.encode(c.generation_prompt)) if c.generation_prompt else []
        if max(ids, default=0) >= c.vocab_size:
            self.log.say("no sample: generation_prompt has ids outside of vocab_size")
            return
        prompt = torch.tensor([ids or [max(c.eos_id, 0)]], device=self.device)
        generator = torch.Generator().manual_seed(c.seed)
        self.model.eval()
        with self.autocast():
            out = generate(
                self.model,
                prompt,
                c.generation_length,
                c.generation_temperature,
                generator,
                until=lambda: self.signal and not self.fsdp,
            )
        self.model.train()
        text = self.tokenizer.decode(out[0].tolist())
        self.log.say(f"sample at step {self.step}:\n{text}\n")
        if self.main:
            self.log.board.add_text("sample", text, self.step)

    def state(self, val_loss: float | None = None) -> dict:
        """The whole run as tensors and plain values, for `save_checkpoint`."""
        history = self.progress["history"]["val"]
        return {
            "model": tree_map(whole, dict(self.weights())),
            "optimizer": tree_map(whole, self.optimizer.state_dict()),
            "scheduler": {"step": self.step, "total_steps": self.total_steps},
            "scaler": self.scaler.state_dict(),
            "epoch": self.samples // len(self.train_data),
            "global_step": self.step,
            "tokens_seen": self.tokens,
            "val_loss": history[-1][1] if val_loss is None and history else val_loss,
            "config": self.config.to_dict(),
            "data": {"samples": self.samples, **self.fingerprint},
            "rng": {"seed": self.config.seed, "step": self.step},  # all there is: see accumulate
            "progress": self.progress,
        }

    def save(self) -> None:
        """Write the newest state; the one before it is kept as ..._previous.pt."""
        path = self.config.checkpoint_path
        self.write(path, self.state(), sibling(path, "previous"))
        done = "writing" if self.config.async_save else "saved"
        self.log.say(f"{done} {path} at step {self.step}")

    def write(self, path, state: dict, previous: Path | None = None) -> None:
        """Save one file on the first rank, in the background with async_save."""
        if not self.main:
            return
        self.finish_writing()
        if not self.config.async_save:
            save_checkpoint(path, state, previous)
            return
        self.writing = self.writer.submit(save_checkpoint, path, copy.deepcopy(state), previous)

    def finish_writing(self) -> None:
        """Wait for the background write in hand; an error in it is raised here."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def restore(self, saved: dict) -> None:
        """Take up a run where `saved` left it; another shape or other data is a UserError."""
        require_same_run(saved["config"], self.config.to_dict())
        for name, value in self.fingerprint.items():
            old = saved["data"][name]
            require(
                old == value or self.config.accept_changed_data,
                self.config.checkpoint_path,
                f"the data's {name} was {old} and is {value}",
                "start a new run, or pass --accept_changed_data",
            )
        cut = {
            name: share_of(saved["model"][name].to(self.device), value)
            for name, value in self.weights().items()
        }
        self.model.load_state_dict(cut, strict=False)
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for p, kept in self.optimizer.state.items():
            kept |= {name: share_of(t, p) for name, t in kept.items() if isinstance(t, Tensor)}
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
            if "betas" in group:
                group["betas"] = (self.config.beta1, self.config.beta2)
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.tokens = saved["global_step"], saved["tokens_seen"]
        self.samples, self.progress = saved["data"]["samples"], saved["progress"]

    def announce(self) -> None:
        c, counts = self.config, self.model.count_parameters()
        parts = ", ".join(f"{name} {n:,}" for name, n in counts.items() if n and name != "total")
        self.log.say(f"{counts['total']:,} parameters: {parts}")
        self.log.say(f"{self.world} x {self.device}, {show(self.amp)}; logs in {self.folder}")
        epochs = self.total_steps * self.samples_per_step / len(self.train_data)
        steps = f"steps {self.step} to {self.total_steps}, {epochs:.2f} epochs in all"
        self.log.say(f"{steps}; a step is {self.samples_per_step * c.block_size:,} tokens")
        if c.warmup_steps > self.total_steps // 10:
            self.log.say(f"warm-up: {self.total_steps // 10} steps, a tenth of this short run")
        known = len(self.tokenizer) if hasattr(self.tokenizer, "__len__") else c.vocab_size
        if known < c.vocab_size // 2:
            self.log.say(f"hint: this data needs no more than --vocab_size {known}")

    def run(self) -> int:
        """Train to the end; the exit code: 0, or 143 or 130 after SIGTERM or SIGINT.

        Both let the step in hand finish and save; SIGUSR1 saves and goes on.
        """

        def remember(number, frame) -> None:
            if number == getattr(signal, "SIGUSR1", None):
                self.saves_asked += 1
            else:
                self.signal = number

        names = [n for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]
        before, error = {n: signal.signal(getattr(signal, n), remember) for n in names}, None
        try:
            self.announce()
            if self.main and not self.resumed:
                for file in run_files(self.config.checkpoint_path):
                    move_aside(file)
            self.loop()
            self.save()
            self.finish_writing()
            if self.main and self.progress["history"]["train"]:
                plot_losses(self.progress["history"], self.folder / "loss_curve.png")
                self.log.say(f"loss curve in {self.folder / 'loss_curve.png'}")
        except Exception as e:  # raised again: the other processes are to hear of it
            error = e
            if self.watchdog and (isinstance(e, dist.DistError) or "gloo" in str(e)):
                self.watchdog.blame(e)
            raise
        finally:
            for n, handler in before.items():
                signal.signal(getattr(signal, n), handler)
            self.close(error)
        return 128 + self.stopped_by if self.stopped_by else 0

    def loop(self) -> None:
        from tqdm import tqdm

        c = self.config
        last = self.samples + (self.total_steps - self.step) * self.samples_per_step
        batches, since, seconds = self.batches(self.train_data, self.samples, last), self.step, 0.0
        bar = tqdm(total=self.total_steps, initial=self.step, disable=None if self.main else True)
        done = self.step >= self.total_steps
        if self.progress["unfinished"]:
            done = self.between_steps() or done
        while not done:
            begin = time.perf_counter()
            loss, norm = self.train_step(batches)
            seconds += time.perf_counter() - begin
            bar.update()
            self.check_gradient(loss, norm)
            if self.step % c.log_interval == 0 or self.step == self.total_steps:
                self.report(loss, norm, seconds / (self.step - since))
                since, seconds = self.step, 0.0
            done = self.between_steps()
        bar.close()

    def check_gradient(self, loss: float, norm: float) -> None:
        if not (bad := self.progress["bad_steps"]):
            return
        self.log.say(
            f"step {self.step}: gradient norm {norm}, loss {loss:.4f}; the weights stay "
            f"as they were ({self.progress['skipped']} steps skipped so far)"
        )
        require(
            bad < self.config.max_bad_steps,
            "lr",
            f"{bad} steps in a row had no finite gradient",
            "lower it, or look at the data; the last checkpoint is intact",
        )

    def between_steps(self) -> bool:
        """Validation, samples, saves and signals, each in its turn; True ends the run."""
        c, end, stop = self.config, self.step == self.total_steps, False
        if self.val_data is not None and (end or self.step % c.validation_interval == 0):
            self.progress["unfinished"] = True
            if (loss := self.validate()) is None:
                return True
            self.progress["unfinished"] = False
            stop = self.judge(loss)
        elif self.val_data is None and self.step % c.validation_interval == 0:
            with torch.no_grad(), self.autocast():
                gates = self.model(self.last_ids[:1], return_gates=True)[1]
                self.log.record(gate_statistics(gates), self.step)
        if c.generate_samples and (end or stop or self.step % c.generation_interval == 0):
            self.sample()
        if c.checkpoint_interval and self.step % c.checkpoint_interval == 0 and not end:
            self.save()
        if c.empty_cache_freq and self.step % c.empty_cache_freq == 0:
            torch.cuda.empty_cache()  # does nothing without CUDA
        return self.heed_signals() or end or stop

    def heed_signals(self) -> bool:
        """Save if any process was asked to; whether all are to end, for a signal to any of them."""
        asked = self.saves_asked
        found = self.over_ranks([self.signal, asked > self.saves_done], dist.ReduceOp.MAX)
        self.stopped_by, self.saves_done = int(found[0]), asked
        if found[1]:
            self.save()
        return self.stopped_by != 0

    def report(self, loss: float, norm: float, seconds_per_step: float) -> None:
        speed = self.samples_per_step * self.config.block_size / seconds_per_step
        rate = learning_rate(self.step - 1, self.total_steps, self.config)
        left = int((self.total_steps - self.step) * seconds_per_step)
        self.log.say(
            f"step {self.step}/{self.total_steps} | loss {loss:.4f} | lr {rate:.2e} | "
            f"grad norm {norm:.2f} | {speed:,.0f} tokens/s | "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        self.log.record(
            {
                "train/loss": loss,
                "train/lr": rate,
                "train/grad_norm": norm,
                "train/tokens_per_second": speed,
                "train/skipped_steps": self.progress["skipped"],
            },
            self.step,
        )
        self.progress["history"]["train"].append([self.step, loss])

    def profile(self) -> int:
        """Two steps to warm up, three under torch.profiler: a table and a trace; saves nothing."""
        on_gpu = self.device.type == "cuda"
        last = self.samples + 5 * self.samples_per_step
        batches = self.batches(self.train_data, self.samples, last)
        for _ in range(2):
            self.train_step(batches)
        with torch.profiler.profile() as profiler:
            for _ in range(3):
                self.train_step(batches)
        column = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        self.log.say(profiler.key_averages().table(sort_by=column, row_limit=20))
        trace = self.folder / "profile_trace.json"
        if self.main:
            profiler.export_chrome_trace(str(trace))
        self.log.say(f"trace in {trace}: open it in chrome://tracing or ui.perfetto.dev")
        self.close()
        return 0

    def close(self, error: Exception | None = None) -> None:
        self.writer.shutdown()
        self.log.close()
        if self.watchdog:
            self.watchdog.close(error)
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------ main


def prepare_default_data(config: Config, named: dict) -> None:
    """Make the built-in corpus if the user named no data and the default is not there."""
    path = Path(Config.train_data_path)
    chosen = "train_data_path" in named or config.train_data_path != Config.train_data_path
    if chosen or path.exists():
        return
    require(
        from_launcher("WORLD_SIZE", 1) == 1,
        str(path),
        "no such file",
        "run python data/prepare.py once, then launch",
    )
    print(f"{path} is not there: preparing the built-in corpus", flush=True)
    script = [Path(__file__).parent / "data" / "prepare.py"]
    if __package__:
        script = ["-m", f"{__package__}.data.prepare"]
    done = subprocess.run([sys.executable, *script, "--output_dir", path.parent], check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def main(argv: list[str] | None = None) -> int:
    config, named, profile = parse_command_line(argv)
    saved = None
    if config.resume:
        saved = load_newest(config.checkpoint_path)
        require(
            "optimizer" in saved and "adapter" not in saved,
            config.checkpoint_path,
            "holds no run that could go on",
            "start one from it: python peft.py --method full",
        )
        config = resumed_config(saved, named)
    first = from_launcher("RANK", 0) == 0
    if first and config.d_model >= 768 and pick_device(config.device).type == "cpu":
        print("hint: this is a large model for a CPU; try --preset demo")
    prepare_default_data(config, named)
    trainer = Trainer(config, saved=saved)
    return trainer.profile() if profile else trainer.run()


if __name__ == "__main__":
    run_cli(main)
