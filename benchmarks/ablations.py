"""What each part of the block is worth: one research block with a switch for everything tried.

    python benchmarks/ablations.py --text wiki.test.raw wiki.valid.raw --run "no_gate gate=none"
    python benchmarks/ablations.py --text ... --run R "R_N64 d_state=64" --seeds 0 1 2
    python benchmarks/ablations.py --text ... --run "llama kind=llama n_layer=4 hidden=336"
    python benchmarks/ablations.py --table docs/ablations.md --plot docs/ablations.png

A run is a name and the settings in which it differs from the defaults, which are those of the run
`R`; --help lists them all. It trains on the bytes of the first file of --text, 2,000 steps of
12 x 64, and takes its loss on the first 256 KiB of the second, in blocks of 64. Each run appends
a row to --output. --base names the run that the new rows are to be compared with.

--table writes all rows of that file between the two markers of a Markdown file, --plot draws them.
Parameters and operations come in the order of the script that made the first 36 rows: on the same
machine and libraries the first 20 losses were the same bits.

Letters in the comments on shapes:
    B batch      l length        D d_model             e inner, the SSM's width
    h SSM heads  p SSM head width (e = h * p)          n d_state     k width of a convolution
    A attention heads            F attention head width (D = A * F)  v vocabulary
"""

import argparse
import inspect
import json
import math
import re
import sys
import time
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from testv2 import orthogonalize, sparsemax  # noqa: E402
from tinymamba.cli import CliParser, UserError, parse_as, require, run_cli  # noqa: E402

V = 256  # bytes
VALIDATION = 2**18  # bytes
MOMENTUM = 0.95
PRIME = 40503  # spreads pairs over the rows of a table (Knuth's multiplicative hash)
NOISE = 0.007  # nats: below this one run says nothing
DEFAULTS = "R"  # the run of the default settings

# ------------------------------------------------------------------------------------ settings

ORDERS = {  # branches that read the same input, group after group: 0 SSM, 1 attention, 2 MLP
    "parallel": ((0, 1, 2),),
    "mixers_first": ((0, 1), (2,)),
    "sequential": ((0,), (1,), (2,)),
}


@dataclass
class Settings:
    """All that a run can vary. The heading above a field is its group in table and plot."""

    # Model
    kind: str = "tinymamba"  # tinymamba, or a peer from transformers: llama, mamba2

    # Block
    order: str = "parallel"  # the branches: which of ORDERS
    gate: str = "softmax"  # weights of the branches: softmax, top2, sparsemax, sigmoid, none
    gate_scale: float = 1.0  # the weights times this, unless gate=none
    norms: int = 1  # norm weights of a parallel block: 1 for all, or 3, one a branch
    branch_norm: bool = False  # a norm after every branch as well
    x0: bool = False  # every block mixes the embedding into the stream again
    embedding_norm: bool = False  # a norm after the embedding
    bigrams: int = 0  # rows of a table that pairs of bytes are hashed to, added to the embedding
    value_embedding: bool = False  # a table of its own for each block, added to attention's values
    loops: int = 1  # times that the stack of blocks is run
    activation: str = "swiglu"  # MLP: swiglu, or relu2: no gate, ReLU squared
    dropout: float = 0.0  # rate on every update of the stream
    tie: bool = True  # one matrix for embedding and output layer
    zero_out: bool = False  # output projections begin at zero
    deepnet: bool = True  # DeepNet's constants (arXiv 2203.00555); without, 1
    init: float = 0.4  # variance of a matrix's first weights, times its inputs
    rank: int = 0  # of the branches' matrices, as products of two; 0 is full rank

    # Convolution
    block_conv: int = 4  # width k of the residual convolution on the block's input; 0 is none
    ssm_conv: int = 0  # width k of Mamba-2's convolution over x, B, C; 0 is none

    # State space
    ssm_silu: bool = False  # SiLU on x, B, C
    ssm_norm: bool = False  # norm of y * silu(z)
    z_gate: bool = True  # y * silu(z); without it y has a norm instead
    rot: str = "tanh"  # turns of the state: none; tanh: pi tanh(a); exact: flat at 0 and pi
    angle_float32: bool = False  # the running sum of the angles; rows without it had bfloat16
    trapezoid: bool = False  # trapezoidal step of Mamba-3 (arXiv 2603.15569)
    delta: bool = False  # delta rule of Gated DeltaNet (arXiv 2412.06464)
    bc_norm: bool = False  # norm of B and of C
    bc_bias: bool = False  # bias of B and of C, beginning at one

    # Attention
    qk_norm: bool = True  # norm of queries and keys
    sink: bool = False  # a learned logit a head that attends to nothing
    head_gate: bool = False  # each head's output times 2 sigmoid of the input
    value_residual: bool = False  # mix in the first block's values (arXiv 2410.17897)

    # Size
    d_model: int = 128  # D
    n_layer: int = 3  # blocks
    inner: int = 256  # e
    ssm_head_dim: int = 64  # p
    d_state: int = 16  # n
    num_heads: int = 2  # A
    window_size: int = 64  # a token attends to itself and window_size-1 tokens before it
    hidden: int = 0  # width of the MLP; 0 takes what gives `parameters`, in steps of 8
    parameters: int = 800_000  # of the whole model, if hidden is 0

    # Training
    optimizer: str = "muon"  # of the matrices, or adamw for everything
    lr: float = 0.01  # peak rate of the matrices; of everything with adamw
    adam_lr: float = 3e-3  # peak rate of everything else with muon
    gate_proj_muon: bool = False  # Muon for Llama's gate_proj; rows without it had AdamW there
    weight_decay: float = 0.0  # of matrices
    schedule: str = "cosine"  # cosine to zero; wsd: constant, and linear to zero from 60% on
    warmup: int = 100  # steps
    steps: int = 2000
    batch_size: int = 12  # blocks of a step
    block_size: int = 64  # l in training and validation

    def validate(self) -> "Settings":
        """Refuse what cannot be built with a UserError; return self."""
        for name, legal in CHOICES.items():
            value = getattr(self, name)
            require(
                value in legal,
                name,
                f"{value} is not a choice",
                f"use one of {', '.join(map(str, legal))}",
            )
        for name, low in AT_LEAST.items():
            value = getattr(self, name)
            require(value >= low, name, f"{value} is not legal", f"it must be at least {low}")
        require(0 <= self.dropout < 1, "dropout", f"{self.dropout} is not legal", "stay in [0, 1)")
        require(
            self.d_model % (2 * self.num_heads) == 0,
            "num_heads",
            f"{self.num_heads} do not cut d_model={self.d_model} into even widths",
            "change one of the two",
        )
        require(
            self.inner % self.ssm_head_dim == 0,
            "ssm_head_dim",
            f"{self.ssm_head_dim} does not divide inner={self.inner}",
            "change one of the two",
        )
        require(
            self.rot == "none" or self.d_state % 2 == 0,
            "d_state",
            f"{self.d_state} cannot be split into pairs",
            "make it even, or rot=none",
        )
        require(
            not (self.delta and self.trapezoid),
            "delta",
            "has no trapezoidal step",
            "leave one of the two",
        )
        require(
            self.kind != "llama" or self.hidden,
            "hidden",
            "llama needs a width of its MLP",
            "hidden=336 with n_layer=4 has 0.8M parameters",
        )
        return self


CHOICES = {
    "kind": ("tinymamba", "llama", "mamba2"),
    "order": tuple(ORDERS),
    "gate": ("softmax", "top2", "sparsemax", "sigmoid", "none"),
    "norms": (1, 3),
    "activation": ("swiglu", "relu2"),
    "rot": ("none", "tanh", "exact", "half"),
    "optimizer": ("muon", "adamw"),
    "schedule": ("cosine", "wsd"),
}
AT_LEAST = {
    **dict.fromkeys(("block_conv", "ssm_conv", "hidden", "rank", "lr", "adam_lr"), 0),
    **dict.fromkeys(("weight_decay", "init"), 0),
    **dict.fromkeys(("d_model", "n_layer", "inner", "ssm_head_dim", "d_state", "num_heads"), 1),
    **dict.fromkeys(("window_size", "warmup", "steps", "batch_size", "block_size"), 1),
}
BRANCHES = ("ssm", "attention", "mlp")


def groups() -> dict[str, str]:
    """The heading that every field of Settings stands under."""
    found, heading = {}, ""
    for line in inspect.getsource(Settings).split("    def ")[0].split("\n"):
        if title := re.match(r"    # (\w.*)$", line):
            heading = title[1]
        elif field := re.match(r"    (\w+): ", line):
            found[field[1]] = heading
    return found


def parse_run(text: str) -> tuple[str, dict]:
    """'NAME FIELD=VALUE ...' -> the name and the values that are not the default."""
    name, *words = text.split() or [""]
    require(
        name and "=" not in name,
        "run",
        f"{text!r} begins with no name",
        'write --run "NAME FIELD=VALUE ..."',
    )
    hints, values = typing.get_type_hints(Settings), {}
    for word in words:
        field, equals, value = word.partition("=")
        require(equals, word, "is not FIELD=VALUE", 'write --run "NAME FIELD=VALUE ..."')
        require(field in hints, field, "no such setting", "--help lists them all")
        try:
            values[field] = parse_as(hints[field], value)
        except argparse.ArgumentTypeError as e:
            raise UserError(field, *str(e).split("; ")) from None
    Settings(**values).validate()
    return name, {f: v for f, v in values.items() if v != getattr(Settings, f)}


# ------------------------------------------------------------------------------------ the model


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of the last dimension of x by the angles of cos and sin."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise: x (b, l, d), weight (d, k), the last column for the token itself."""
    length, width = x.shape[1], weight.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))  # (b, k-1+l, d)
    return sum(padded[:, i : i + length] * weight[:, i] for i in range(width))


def uniform(*shape: int, bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def lower_triangle(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def linear(d_in: int, d_out: int, s: Settings) -> nn.Module:
    if s.rank:
        return nn.Sequential(
            nn.Linear(d_in, s.rank, bias=False), nn.Linear(s.rank, d_out, bias=False)
        )
    return nn.Linear(d_in, d_out, bias=False)


class SSM(nn.Module):
    """Mamba-2's branch (arXiv 2405.21060) as one l x l matrix product, and its rivals."""

    def __init__(self, s: Settings):
        super().__init__()
        self.s, self.heads = s, s.inner // s.ssm_head_dim
        self.z_proj = linear(s.d_model, s.inner, s) if s.z_gate else None
        self.x_proj = linear(s.d_model, s.inner, s)
        self.bc_proj = nn.Linear(s.d_model, 2 * s.d_state, bias=False)
        self.dt_proj = nn.Linear(s.d_model, self.heads, bias=False)
        if s.trapezoid:
            self.share_proj = nn.Linear(s.d_model, self.heads)
        if s.rot != "none":
            self.angle_proj = nn.Linear(s.d_model, s.d_state // 2)
        if s.delta:
            self.beta_proj = nn.Linear(s.d_model, self.heads)
        channels = s.inner + 2 * s.d_state
        if s.ssm_conv:
            self.conv = uniform(channels, s.ssm_conv, bound=s.ssm_conv**-0.5)
            self.conv_bias = nn.Parameter(torch.zeros(channels))
        if s.bc_bias:
            self.bc_bias = nn.Parameter(torch.ones(2, 1, s.d_state))
        dt = torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt again
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        # There in every variant, used or not: the rows' MLP widths come from a count that has it.
        self.norm = nn.Parameter(torch.ones(s.inner))
        self.out_proj = linear(s.inner, s.d_model, s)

    def forward(self, u: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        s = self.s
        x, b, c = self.inputs(u)
        dt = F.softplus(self.dt_proj(u) + self.dt_bias)  # (b, l, h)
        log_decay = -self.A_log.exp() * dt
        if s.rot != "none":
            angle = self.angles(u)[:, :, None]  # (b, l, 1, n/2)
            cos, sin = angle.cos(), angle.sin()
            b, c = turn(b, cos, sin), turn(c, cos, sin)
        if s.delta:
            b, c = F.normalize(b, dim=-1), F.normalize(c, dim=-1)
        total = log_decay.cumsum(1).transpose(1, 2)  # (b, h, l)
        between = (total[..., :, None] - total[..., None, :]).clamp(max=0)  # (b, h, l, l)
        decay = between.masked_fill(~lower_triangle(u.shape[1]), -math.inf).exp()
        x, b, c = (t.transpose(1, 2) for t in (x, b, c))  # (b, h, l, p), (b, 1, l, n)
        mix = self.delta_rule if s.delta else self.trapezoid if s.trapezoid else self.euler
        y = mix(u, x, b, c, dt, decay).transpose(1, 2).flatten(2)  # (b, l, e)
        if s.z_gate:
            y = y * F.silu(self.z_proj(u))
        if s.ssm_norm or not s.z_gate:
            y = rms(y, self.norm)
        return self.out_proj(y)

    def inputs(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, l, h, p), B and C (b, l, 1, n)."""
        s = self.s
        xbc = torch.cat((self.x_proj(u), self.bc_proj(u)), -1)
        if s.ssm_conv:
            xbc = self.conv_bias + causal_conv(xbc, self.conv)
        if s.ssm_silu:
            xbc = F.silu(xbc)
        x, b, c = xbc.split([s.inner, s.d_state, s.d_state], -1)
        if s.bc_norm:
            b, c = rms(b), rms(c)
        b, c = b[:, :, None], c[:, :, None]
        if s.bc_bias:
            b, c = b + self.bc_bias[0], c + self.bc_bias[1]
        return x.unflatten(2, (self.heads, -1)), b, c

    def angles(self, u: Tensor) -> Tensor:
        """By how much the state has turned since the first token: (b, l, n/2)."""
        raw = self.angle_proj(u)
        if self.s.angle_float32:
            raw = raw.float()
        if self.s.rot == "half":
            exact, free = raw.chunk(2, -1)
            turns = torch.cat((F.hardtanh(F.softshrink(exact, 0.5)), torch.tanh(free)), -1)
            return (math.pi * turns).cumsum(1)
        if self.s.rot == "exact":
            return (math.pi * F.hardtanh(F.softshrink(raw, 0.5))).cumsum(1)
        return (math.pi * torch.tanh(raw)).cumsum(1)

    def euler(self, u, x, b, c, dt, decay) -> Tensor:
        """h_t = a_t h_{t-1} + dt_t x_t B_t: the step of Mamba-2."""
        write = dt.transpose(1, 2)[..., None]  # (b, h, l, 1)
        return (c @ b.mT * decay) @ (write * x) + self.D[:, None, None] * x

    def trapezoid(self, u, x, b, c, dt, decay) -> Tensor:
        """h_t = a_t h_{t-1} + (1 - s_t) dt_t a_t x_{t-1} B_{t-1} + s_t dt_t x_t B_t."""
        read = c @ b.mT  # (b, 1, l, l)
        share = torch.sigmoid(self.share_proj(u))  # (b, l, h)
        later = F.pad(((1 - share) * dt)[:, 1:], (0, 0, 0, 1))  # written one token later
        write = (share * dt + later).transpose(1, 2)[..., None]  # (b, h, l, 1)
        later = later.transpose(1, 2)[..., None]
        itself = (c * b).sum(-1, keepdim=True)  # (b, 1, l, 1)
        return (read * decay) @ (write * x) + (self.D[:, None, None] - later * itself) * x

    def delta_rule(self, u, x, b, c, dt, decay) -> Tensor:
        """h_t = a_t h_{t-1} (1 - beta_t B_t B_t^T) + beta_t x_t B_t, beta from 0 to 2."""
        read = c @ b.mT  # (b, 1, l, l)
        beta = (2 * torch.sigmoid(self.beta_proj(u))).transpose(1, 2)[..., None]  # (b, h, l, 1)
        system = torch.eye(u.shape[1]) + (beta * (b @ b.mT) * decay).tril(-1)  # (b, h, l, l)
        written = torch.linalg.solve_triangular(system, beta * x, upper=False)  # (b, h, l, p)
        return (read * decay) @ written + self.D[:, None, None] * x


class Attention(nn.Module):
    """Causal attention within a window, with RoPE, written out."""

    def __init__(self, s: Settings):
        super().__init__()
        self.s, width, length = s, s.d_model // s.num_heads, s.block_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear(s.d_model, s.d_model, s) for _ in range(4)
        )
        frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
        angle = torch.arange(length)[:, None] * frequency  # (l, f/2)
        self.cos, self.sin = angle.cos(), angle.sin()
        seen = lower_triangle(length) & ~lower_triangle(length).tril(-s.window_size)
        self.mask = torch.zeros(length, length).masked_fill(~seen, -math.inf)
        if s.sink:
            self.sink = nn.Parameter(torch.zeros(s.num_heads))
        if s.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(width))
            self.k_norm = nn.Parameter(torch.ones(width))
        if s.value_residual:
            self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        if s.head_gate:
            self.head_gate = nn.Linear(s.d_model, s.num_heads)
        if s.value_embedding:
            self.value_embedding = nn.Embedding(V, s.d_model)

    def forward(self, u: Tensor, values: list[Tensor], ids: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d); `values` takes the first block's values to the later ones."""
        s = self.s
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(u).unflatten(2, (s.num_heads, -1)).transpose(1, 2) for p in projections)
        if s.value_embedding:
            v = v + self.value_embedding(ids).unflatten(2, (s.num_heads, -1)).transpose(1, 2)
        if s.value_residual and values:
            v = self.value_mix[0] * v + self.value_mix[1] * values[0]
        elif s.value_residual:
            values.append(v)
        if s.qk_norm:
            q, k = rms(q, self.q_norm), rms(k, self.k_norm)
        q, k = (turn(t, self.cos, self.sin) for t in (q, k))  # (b, a, l, f)
        scores = q @ k.mT * q.shape[-1] ** -0.5 + self.mask  # (b, a, l, l)
        if s.sink:
            nothing = self.sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            share = torch.cat((scores, nothing), -1).softmax(-1)[..., :-1]
        else:
            share = scores.softmax(-1)
        y = share @ v  # (b, a, l, f)
        if s.head_gate:
            y = y * 2 * torch.sigmoid(self.head_gate(u)).transpose(1, 2)[..., None]
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        self.up_proj = linear(s.d_model, s.hidden, s)
        gated = s.activation == "swiglu"
        self.act_proj = linear(s.d_model, s.hidden, s) if gated else None
        self.out_proj = linear(s.hidden, s.d_model, s)

    def forward(self, u: Tensor) -> Tensor:
        if self.act_proj is None:
            return self.out_proj(F.relu(self.up_proj(u)).square())
        return self.out_proj(F.silu(self.act_proj(u)) * self.up_proj(u))


def branch_weights(logits: Tensor, gate: str) -> Tensor:
    """(b, l, 3) -> (b, l, 3)."""
    if gate == "sigmoid":
        return 2 * logits.sigmoid()
    if gate == "sparsemax":
        return sparsemax(logits)
    if gate == "top2":
        best = logits.topk(2, -1)
        dropped = torch.full_like(logits, -math.inf)
        logits = dropped.scatter(-1, best.indices, best.values)
    return logits.softmax(-1)


class Block(nn.Module):
    """The three branches, side by side or one after the other."""

    def __init__(self, s: Settings):
        super().__init__()
        self.s, self.groups = s, ORDERS[s.order]
        self.ssm, self.attention, self.mlp = SSM(s), Attention(s), MLP(s)
        count = 3 if s.norms == 3 else len(self.groups)
        self.norm = nn.ParameterList(torch.ones(s.d_model) for _ in range(count))
        if s.branch_norm:
            self.branch_norm = nn.ParameterList(torch.ones(s.d_model) for _ in BRANCHES)
        if s.gate != "none":
            self.gate = nn.Linear(s.d_model, len(BRANCHES))
        alpha = s.n_layer**0.25 if s.deepnet else 1.0
        self.scale = nn.Parameter(torch.full((s.d_model,), 1 / alpha))
        self.dropout = nn.Dropout(s.dropout)
        if s.x0:
            self.stream_mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        if s.block_conv:
            bound = 0.5 * s.block_conv**-0.5
            self.conv = uniform(len(self.groups), s.d_model, s.block_conv, bound=bound)

    def forward(self, x: Tensor, embedded: Tensor, values: list[Tensor], ids: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        s = self.s
        if s.x0:
            x = self.stream_mix[0] * x + self.stream_mix[1] * embedded
        if s.order == "parallel":
            v = self.convolve(rms(x), 0)
            inputs = [v * weight for weight in self.norm] * (3 // len(self.norm))
            gates = self.weights(inputs[0])
            y = sum(gates[i] * self.branch(i, inputs[i], values, ids) for i in range(3))
            return x + self.dropout(self.scale * y)
        gates = None
        for place, group in enumerate(self.groups):
            u = self.convolve(rms(x), place) * self.norm[place]
            gates = gates or self.weights(u)
            y = sum(gates[i] * self.branch(i, u, values, ids) for i in group)
            x = x + self.dropout(self.scale * y)
        return x

    def convolve(self, v: Tensor, place: int) -> Tensor:
        return v + causal_conv(v, self.conv[place]) if self.s.block_conv else v

    def weights(self, u: Tensor) -> list:
        """What each branch's output is multiplied by: three numbers, or three of (b, l, 1)."""
        if self.s.gate == "none":
            return [1.0, 1.0, 1.0]
        weights = branch_weights(self.gate(u), self.s.gate) * self.s.gate_scale
        return list(weights.split(1, -1))

    def branch(self, i: int, u: Tensor, values: list[Tensor], ids: Tensor) -> Tensor:
        y = self.attention(u, values, ids) if i == 1 else (self.ssm, None, self.mlp)[i](u)
        return rms(y, self.branch_norm[i]) if self.s.branch_norm else y


class Model(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        self.s = s
        self.embedding = nn.Embedding(V, s.d_model)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.n_layer))
        self.norm = nn.Parameter(torch.ones(s.d_model))
        self.head = nn.Linear(s.d_model, V, bias=False)
        if s.tie:
            self.head.weight = self.embedding.weight
        if s.bigrams:
            self.bigram_embedding = nn.Embedding(s.bigrams, s.d_model)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """DeepNet's beta on values and outputs; gates begin equal for every token."""
        beta = (4 * self.s.n_layer) ** -0.25 if self.s.deepnet else 1.0
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            inside = self.s.rank and name.endswith(".0")  # the first of two keeps the variance
            share = 1.0 if inside else self.s.init
            nn.init.normal_(module.weight, std=math.sqrt(share / module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("out_proj", "v_proj", "out_proj.1", "v_proj.1")):
                zero = self.s.zero_out and "out_proj" in name
                module.weight *= 0 if zero else beta
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if not self.s.tie:
            nn.init.normal_(self.head.weight, std=0.02)
        for block in self.blocks:
            if self.s.gate != "none":
                nn.init.zeros_(block.gate.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, l) -> (b, l, v)."""
        x = self.embedding(ids)
        if self.s.bigrams:
            pairs = V * F.pad(ids[:, :-1], (1, 0)) + ids
            x = x + self.bigram_embedding(pairs * PRIME % 2**16 % self.s.bigrams)
        embedded = x = rms(x) if self.s.embedding_norm else x
        values = []
        for block in [*self.blocks] * self.s.loops:
            x = block(x, embedded, values, ids)
        return self.head(rms(x, self.norm))


class Peer(nn.Module):
    """Llama or Mamba2 of transformers."""

    def __init__(self, s: Settings):
        super().__init__()
        import transformers

        transformers.logging.set_verbosity_error()  # Mamba2 warns of missing CUDA kernels
        common = {
            "vocab_size": V,
            "hidden_size": s.d_model,
            "num_hidden_layers": s.n_layer,
            "tie_word_embeddings": s.tie,
            "use_cache": False,
        }
        if s.kind == "llama":
            config = transformers.LlamaConfig(
                **common,
                num_attention_heads=s.num_heads,
                intermediate_size=s.hidden,
                max_position_embeddings=s.block_size,
            )
            self.model = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.Mamba2Config(
                **common,
                num_heads=2 * s.d_model // s.ssm_head_dim,
                head_dim=s.ssm_head_dim,
                state_size=s.d_state,
                n_groups=1,
                expand=2,
                chunk_size=64,
            )
            self.model = transformers.Mamba2ForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build(s: Settings) -> nn.Module:
    """The model; its `s.hidden` is what `hidden=0` came to."""
    if s.kind != "tinymamba":
        return Peer(s)
    if not s.hidden:
        low, high = (count_parameters(Model(replace(s, hidden=h))) for h in (32, 40))
        s = replace(s, hidden=32 + 8 * max(0, round((s.parameters - low) / (high - low))))
    return Model(s)


# ------------------------------------------------------------------------------------ training


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024), matrices of equal shape in one batch."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[tuple, list] = {}
            for p in group["params"]:
                alike.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), batch in alike.items():
                updates = orthogonalize(torch.stack([self.nesterov(p) for p in batch]))
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for p, update in zip(batch, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.to(p.dtype), alpha=-rate)

    def nesterov(self, p: nn.Parameter) -> Tensor:
        mean = self.state[p].setdefault("mean", torch.zeros_like(p))
        mean.lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(mean, MOMENTUM)


def make_optimizers(model: nn.Module, s: Settings) -> list[torch.optim.Optimizer]:
    """For the matrices, and for the rest: embeddings, gates, convolutions, vectors, thin ones."""
    skipped = ("embed", "head", "gate", "conv")

    def is_matrix(name: str, p: nn.Parameter) -> bool:
        if name.endswith("gate_proj.weight") and s.gate_proj_muon:
            return True
        return p.ndim == 2 and min(p.shape) > 8 and not any(word in name for word in skipped)

    matrices = [p for name, p in model.named_parameters() if is_matrix(name, p)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    common = {"betas": (0.9, 0.95), "weight_decay": 0, "fused": True}
    if s.optimizer == "muon":
        return [
            Muon(matrices, s.lr, s.weight_decay),
            torch.optim.AdamW(rest, lr=s.adam_lr, **common),
        ]
    decayed = {"params": matrices, "weight_decay": s.weight_decay}
    return [torch.optim.AdamW([decayed, {"params": rest}], lr=s.lr, **common)]


def rate(step: int, s: Settings) -> float:
    """The share of the peak learning rate at a step."""
    if step < s.warmup:
        return (step + 1) / s.warmup
    if s.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / (s.steps - s.warmup)))
    bend = int(0.6 * s.steps)
    return 1.0 if step < bend else (s.steps - step) / (s.steps - bend)


def train(model: nn.Module, data: Tensor, s: Settings, seed: int) -> list[float]:
    """The loss of every step; it ends early where one is not finite."""
    random, optimizers, losses = torch.Generator().manual_seed(1000 + seed), [], []
    optimizers = make_optimizers(model, s)
    every = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in every]
    model.train()
    for step in range(s.steps):
        begin = torch.randint(len(data) - s.block_size - 1, (s.batch_size, 1), generator=random)
        window = data[begin + torch.arange(s.block_size + 1)]  # (b, l+1)
        for group, peak in zip(every, peaks, strict=True):
            group["lr"] = peak * rate(step, s)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return losses


@torch.no_grad()
def validate(model: nn.Module, data: Tensor, block: int) -> float:
    """Nats per byte of the data in blocks, each read with nothing before it."""
    model.eval()
    count = (len(data) - 1) // block * block
    x, y, total = data[:count].view(-1, block), data[1 : count + 1].view(-1, block), 0.0
    for a, b in zip(x.split(256), y.split(256), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(a)
        total += F.cross_entropy(logits.float().flatten(0, 1), b.flatten(), reduction="sum").item()
    return total / count


def run(name: str, values: dict, base: str, seed: int, texts: tuple[Tensor, Tensor]) -> dict:
    """One run: its row. A loss that is not finite is None there."""
    s = Settings(**values)
    torch.manual_seed(seed)
    model = build(s)
    start = time.perf_counter()
    train(model, texts[0], s, seed)
    seconds = time.perf_counter() - start
    nats = validate(model, texts[1], s.block_size)
    known = math.isfinite(nats)
    return {
        "name": name,
        "base": base if base != name else None,
        "seed": seed,
        "settings": values,
        "parameters": count_parameters(model),
        "hidden": model.s.hidden if isinstance(model, Model) else s.hidden,
        "nats_per_byte": round(nats, 4) if known else None,
        "bits_per_byte": round(nats / math.log(2), 4) if known else None,
        "seconds": round(seconds, 1),
    }


def read_bytes(path: str, limit: int | None, block: int) -> Tensor:
    require(Path(path).is_file(), path, "no such file", "pass --text TRAIN VALIDATION")
    data = np.fromfile(path, dtype=np.uint8, count=-1 if limit is None else limit)
    require(
        len(data) > block + 1,
        path,
        f"{len(data)} bytes are too few",
        f"blocks of {block} need at least {block + 2}",
    )
    return torch.from_numpy(data.astype(np.int64))


# ------------------------------------------------------------------------------------ reports


@dataclass
class Line:
    """A row as it is shown."""

    row: dict
    base: dict | None  # the row it is compared with
    changed: dict  # settings that differ from those of the base, or from the defaults
    group: str

    @property
    def percent(self) -> str:
        """How much higher the loss is than that of the base."""
        if not self.base or None in (self.base["nats_per_byte"], self.row["nats_per_byte"]):
            return ""
        more = 100 * (self.row["nats_per_byte"] / self.base["nats_per_byte"] - 1)
        return f"{round(more, 1) + 0.0:+.1f}%"  # + 0.0 makes 0 of -0


def read_rows(path: str) -> list[dict]:
    require(Path(path).is_file(), path, "no such file", "name a file of rows with --output")
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line]


def lines_of(rows: list[dict]) -> list[Line]:
    """Group by group, each sorted by loss. The base of a row has its seed, where there is one."""
    heading = groups()
    order = ["Start", *dict.fromkeys(heading.values())]
    lines = []
    for row in rows:
        bases = [r for r in rows if r["name"] == row["base"]]
        base = next((r for r in bases if r["seed"] == row["seed"]), bases[0] if bases else None)
        mine, theirs = row["settings"], base["settings"] if base else {}
        changed = {
            f.name: mine.get(f.name, f.default)
            for f in fields(Settings)
            if mine.get(f.name, f.default) != theirs.get(f.name, f.default)
        }
        first = "kind" if "kind" in mine else next(iter(changed), None)
        group = heading[first] if base and first else "Start"
        lines.append(Line(row, base, changed, group))
    worst = math.inf
    return sorted(
        lines,
        key=lambda line: (
            order.index(line.group),
            line.row["nats_per_byte"] or worst,
            line.row["seed"],
        ),
    )


def words(settings: dict) -> str:
    """As --run takes them."""
    shown = {k: str(v).lower() if isinstance(v, bool) else v for k, v in settings.items()}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def write_table(rows: list[dict], path: str) -> None:
    """Replace what stands between the two markers of a Markdown file."""
    require(Path(path).is_file(), path, "no such file", "it must be there, with the two markers")
    before, begin, rest = Path(path).read_text().partition("<!-- rows -->\n")
    _, end, after = rest.partition("<!-- /rows -->")
    require(begin and end, path, "has no markers", "write <!-- rows --> and <!-- /rows --> in it")
    table = [
        "| varied | run | seed | against | changed | parameters | nats/byte | bits/byte | |",
        "|---|---|--:|---|---|--:|--:|--:|--:|",
    ]
    for line in lines_of(rows):
        row = line.row
        nats, bits = row["nats_per_byte"], row["bits_per_byte"]
        loss = f"{nats:.4f} | {bits:.4f}" if nats else "diverged | "
        changed = f"`{words(line.changed)}`" if line.changed else ""
        table.append(
            f"| {line.group} | {row['name']} | {row['seed']} | {row['base'] or ''} | {changed} "
            f"| {row['parameters']:,} | {loss} | {line.percent} |"
        )
    Path(path).write_text(before + begin + "\n".join(table) + "\n" + end + after)


def draw_line(axes, y: int, line: Line, right: float) -> None:
    """A row: a line from its base's loss to its own; past the right edge it is an arrow."""
    nats, ours = line.row["nats_per_byte"], "kind" not in line.row["settings"]
    if nats is None:
        axes.text(right, y, "diverged", va="center", ha="right", fontsize=8)
        return
    base = line.base["nats_per_byte"] if line.base else None
    change = nats - base if base else 0.0
    color = "0.45" if abs(change) < NOISE else "tab:green" if change < 0 else "tab:red"
    at = min(nats, right)
    if base:
        axes.plot([min(base, right), at], [y, y], color=color, lw=1.6, zorder=2)
        axes.plot(min(base, right), y, "|", color="0.3", ms=9, zorder=3)
    color_of_dot = "tab:blue" if ours else "tab:orange"
    inside = "white" if "steps" in line.row["settings"] else color_of_dot
    marker = ">" if nats > right else "o" if ours else "s"
    axes.plot(at, y, marker, color=color_of_dot, mfc=inside, ms=6.5, zorder=4)
    axes.annotate(
        f"{nats:.4f}  {line.percent}",
        (1.01, y),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=9,
        color=color if line.base else "black",
    )


def draw_key(axes) -> None:
    from matplotlib.lines import Line2D

    axes.legend(
        handles=[
            Line2D([], [], color="tab:blue", marker="o", ls="", label="the research block"),
            Line2D([], [], color="tab:orange", marker="s", ls="", label="transformers' peer"),
            Line2D(
                [],
                [],
                color="tab:blue",
                marker="o",
                mfc="white",
                ls="",
                label=f"not {Settings.steps:,} steps",
            ),
            Line2D([], [], color="0.3", marker="|", ls="", ms=9, label="the run compared with"),
            Line2D([], [], color="tab:green", label="better"),
            Line2D([], [], color="tab:red", label="worse"),
            Line2D([], [], color="0.45", label=f"less than {NOISE} nats: noise"),
        ],
        ncols=7,
        loc="lower center",
        bbox_to_anchor=(0.3, 1.01),
        frameon=False,
        fontsize=9,
        columnspacing=1.2,
        handletextpad=0.4,
    )


def plot(rows: list[dict], path: str) -> None:
    """All rows, in groups of what was varied."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = lines_of(rows)
    known = [line.row["nats_per_byte"] for line in lines if line.row["nats_per_byte"]]
    require(known, path, "there is no row with a loss to draw", "run something first")
    left, right = min(known) * 0.997, min(known) * 1.06
    rows_high = len(lines) + 1.5 * len({line.group for line in lines})
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.25 * rows_high))
    y, ticks, labels, last = 0, [], [], None
    for line in lines:
        if line.group != last:
            y += 0.4 if last else 0
            axes.axhline(y - 0.55, color="0.8", lw=0.8)
            axes.annotate(
                line.group,
                (-0.01, y),
                xycoords=("axes fraction", "data"),
                va="center",
                ha="right",
                weight="bold",
                fontsize=10,
            )
            y, last = y + 1, line.group
        draw_line(axes, y, line, right)
        ticks.append(y)
        seed = f" (seed {line.row['seed']})" if line.row["seed"] else ""
        labels.append(f"{line.row['name']}{seed}   {words(line.changed)}")
        y += 1
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(left, right + 0.002), ylim=(y - 0.4, -0.8))
    axes.set_xlabel("validation loss, nats per byte; an arrow is past the edge")
    axes.grid(axis="x", color="0.9", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    draw_key(axes)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


# ------------------------------------------------------------------------------------ main


def settings_help() -> str:
    """The fields of Settings with their comments, as they stand in the source."""
    source = inspect.getsource(Settings).split("    def ")[0].split('"""\n')[-1]
    return "settings of a run:\n" + source.rstrip()


def main() -> None:
    parser = CliParser(description=__doc__.split("Letters")[0], epilog=settings_help())
    parser.add_argument("--text", nargs=2, help="file to train on, file to validate on")
    parser.add_argument("--run", nargs="+", default=[], metavar="'NAME FIELD=VALUE ...'")
    parser.add_argument("--base", default=DEFAULTS, help=f"compare with this run [{DEFAULTS}]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of every run [0]")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU [1]")
    parser.add_argument(
        "--output", default="docs/ablations.jsonl", help="file of rows [docs/ablations.jsonl]"
    )
    parser.add_argument("--table", help="Markdown file to write the rows into")
    parser.add_argument("--plot", help="picture to draw of the rows")
    args = parser.parse_args()
    runs = [parse_run(text) for text in args.run]
    require(
        runs or args.table or args.plot,
        "run",
        "there is nothing to do",
        "pass --run, --table or --plot",
    )
    require(args.text or not runs, "text", "a run needs two files", "pass --text TRAIN VALIDATION")
    torch.set_num_threads(args.threads)
    for name, values in runs:
        block = Settings(**values).block_size
        texts = (
            read_bytes(args.text[0], None, block),
            read_bytes(args.text[1], VALIDATION + 1, block),
        )
        for seed in args.seeds:
            row = run(name, values, args.base, seed, texts)
            with open(args.output, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    if args.table:
        write_table(read_rows(args.output), args.table)
    if args.plot:
        plot(read_rows(args.output), args.plot)


if __name__ == "__main__":
    run_cli(main)
