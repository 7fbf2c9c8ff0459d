"""What each part of the block is worth: one research block with a switch for everything tried.

    python -m benchmarks.ablations --text wiki.test.raw wiki.valid.raw --run "no_gate gate=none"
    python -m benchmarks.ablations --text ... --run R "R_N64 d_state=64" --seeds 0 1 2
    python -m benchmarks.ablations --text ... --run "llama kind=llama n_layer=4 hidden=336"
    python -m benchmarks.ablations --table docs/ablations.md --plot docs/ablations.png

A run is a name and the settings in which it differs from the defaults, which are those of the run
`R`; --help lists them all. It trains on the bytes of the first file of --text, 2,000 steps of
12 x 64, and takes its loss on the first 256 KiB of the second, in blocks of 64. Each run appends
a row to --output. --base names the run that the new rows are to be compared with.

--table writes all rows of that file between the two markers of a Markdown file, --plot draws them.
Parameters and operations are in the order of the script that made the first 36 rows: on the same
machine and libraries, the first 20 losses were bitwise equal.

Dimension letters in shape comments:
    b batch      l length        d d_model             e inner, the SSM's width
    h SSM heads  p SSM head width (e = h * p)          n d_state     k width of a convolution
    a attention heads            f attention head width (d = a * f)  v vocabulary
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark import append_row
from benchmarks.report import read_rows, write_between
from testv2 import sparsemax
from tinymamba.cli import (
    CliParser,
    add_flags,
    check_fields,
    describe_fields,
    make_options,
    need,
    parse_words,
    require,
    run_cli,
)
from tinymamba.muon import orthogonalize

VOCAB = 256  # bytes
VALIDATION = 2**18  # bytes
MOMENTUM = 0.95
PRIME = 40503  # spreads pairs over the rows of a table (Knuth's multiplicative hash)
NOISE = 0.007  # nats: smaller differences between single runs mean nothing
DEFAULTS = "R"  # the run of the default settings

# ------------------------------------------------------------------------------------ settings

ORDERS = {  # groups of branches that read the same input: 0 SSM, 1 attention, 2 MLP
    "parallel": ((0, 1, 2),),
    "mixers_first": ((0, 1), (2,)),
    "sequential": ((0,), (1,), (2,)),
}
BRANCHES = ("ssm", "attention", "mlp")


@dataclass
class Settings:
    """All that a run can vary. The comment above fields is their group in the table and plot."""

    # Model
    kind: str = "tinymamba"  # the research block, or a model of transformers

    # Block
    order: str = "parallel"  # of the branches
    gate: str = "softmax"  # weights of the branches; none adds them
    gate_scale: float = 1.0  # factor on the weights, unless gate=none
    norms: int = 1  # norm weights of a parallel block: one for all branches, or one each
    branch_norm: bool = False  # a norm after every branch as well
    x0: bool = False  # every block mixes the embedding into the residual stream again
    embedding_norm: bool = False  # a norm after the embedding
    bigrams: int = 0  # rows of a table of hashed byte pairs, added to the embedding; 0 is none
    value_embedding: bool = False  # one embedding table per block, added to attention's values
    loops: int = 1  # how often the stack of blocks is run
    activation: str = "swiglu"  # of the MLP; relu2 is ReLU squared, without a gate
    dropout: float = 0.0  # rate on every update of the residual stream
    tie: bool = True  # one matrix for embedding and output layer
    zero_out: bool = False  # output projections start at zero
    deepnet: bool = True  # DeepNet's constants (arXiv 2203.00555); 1 without them
    init: float = 0.4  # variance of a matrix's initial weights, times its inputs
    rank: int = 0  # of the branches' matrices, as products of two; 0 is full rank

    # Convolution
    block_conv: int = 4  # width k of the residual convolution on the block's input; 0 is none
    ssm_conv: int = 0  # width k of Mamba-2's convolution over x, B, C; 0 is none

    # State space
    ssm_silu: bool = False  # SiLU on x, B, C
    ssm_norm: bool = False  # norm of y * silu(z)
    z_gate: bool = True  # y * silu(z); without it y has a norm instead
    rot: str = "tanh"  # rotation of the state; tanh: pi tanh(a), exact: flat at 0 and pi
    angle_float32: bool = False  # cumulative angles in float32; rows without it had bfloat16
    trapezoid: bool = False  # trapezoidal step of Mamba-3 (arXiv 2603.15569)
    delta: bool = False  # delta rule of Gated DeltaNet (arXiv 2412.06464)
    bc_norm: bool = False  # norm of B and of C
    bc_bias: bool = False  # bias of B and of C, initially one

    # Attention
    qk_norm: bool = True  # norm of queries and keys
    sink: bool = False  # a learned logit per head that attends to nothing
    head_gate: bool = False  # each head's output times 2 sigmoid of the input
    value_residual: bool = False  # mix in the first block's values (arXiv 2410.17897)

    # Size
    d_model: int = 128  # width d of the residual stream
    n_layer: int = 3  # blocks
    inner: int = 256  # width e of the SSM
    ssm_head_dim: int = 64  # width p of an SSM head
    d_state: int = 16  # size n of the state
    num_heads: int = 2  # attention heads a
    window_size: int = 64  # a token attends to itself and window_size-1 tokens before it
    hidden: int = 0  # width of the MLP; 0 takes the multiple of 8 that gives `parameters`
    parameters: int = 800_000  # of the whole model, if hidden is 0

    # Training
    optimizer: str = "optimizer"  # muon for the matrices and AdamW for the rest, or adamw for all
    lr: float = 0.01  # peak rate of the matrices; of everything with adamw
    adam_lr: float = 3e-3  # peak rate of everything else with muon
    gate_proj_muon: bool = False  # Muon for Llama's gate_proj; rows without it had AdamW there
    weight_decay: float = 0.0  # of matrices
    schedule: str = "cosine"  # cosine to zero; wsd: constant, and linear to zero after 60%
    warmup: int = 100  # steps
    steps: int = 2000  # updates of the weights
    batch_size: int = 12  # blocks of a step
    block_size: int = 64  # bytes of a block in training and validation

    CHOICES: ClassVar = {
        "kind": ("tinymamba", "llama", "mamba2"),
        "order": tuple(ORDERS),
        "gate": ("softmax", "top2", "sparsemax", "sigmoid", "none"),
        "norms": (1, 3),
        "activation": ("swiglu", "relu2"),
        "rot": ("none", "tanh", "exact", "half"),
        "optimizer": ("optimizer", "adamw"),
        "schedule": ("cosine", "wsd"),
    }
    LIMITS: ClassVar = {
        **dict.fromkeys(("block_conv", "ssm_conv", "hidden", "rank", "bigrams"), (0, math.inf)),
        **dict.fromkeys(("lr", "adam_lr", "weight_decay", "init"), (0, math.inf)),
        **dict.fromkeys(("d_model", "n_layer", "inner", "ssm_head_dim"), (1, math.inf)),
        **dict.fromkeys(("d_state", "num_heads", "window_size", "loops"), (1, math.inf)),
        **dict.fromkeys(("warmup", "steps", "batch_size", "block_size"), (1, math.inf)),
        "dropout": (0, 0.99),
    }

    def validate(self) -> Settings:
        """Reject settings that cannot be built with a UserError; return self."""
        check_fields(self)
        problem = f"{self.num_heads} heads do not divide d_model={self.d_model} into even widths"
        remedy = "change one of the two"
        require(self.d_model % (2 * self.num_heads) == 0, "num_heads", problem, remedy)
        problem = f"{self.ssm_head_dim} does not divide inner={self.inner}"
        require(self.inner % self.ssm_head_dim == 0, "ssm_head_dim", problem, remedy)
        problem, remedy = f"{self.d_state} cannot be split into pairs", "make it even, or rot=none"
        require(self.rot == "none" or self.d_state % 2 == 0, "d_state", problem, remedy)
        both, remedy = self.delta and self.trapezoid, "leave out one of the two"
        require(not both, "delta", "has no trapezoidal step", remedy)
        problem = "llama needs the width of its MLP"
        remedy = "hidden=336 with n_layer=4 has 0.8M parameters"
        require(self.kind != "llama" or self.hidden, "hidden", problem, remedy)
        return self


def parse_run(text: str) -> tuple[str, dict]:
    """'NAME FIELD=VALUE ...' -> the name and the values that are not the default."""
    name, *words = text.split() or [""]
    remedy = 'write --run "NAME FIELD=VALUE ..."'
    require(name and "=" not in name, "run", f"{text!r} begins with no name", remedy)
    values = parse_words(words, Settings, {f.name for f in fields(Settings)}, remedy)
    Settings(**values).validate()
    return name, {f: v for f, v in values.items() if v != getattr(Settings, f)}


# ------------------------------------------------------------------------------------ the model


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """RMSNorm."""
    return F.rms_norm(x, x.shape[-1:], weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + half) of the last dimension of x by the angles of cos and sin."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise: x (b, l, d), weight (d, k), whose last column is for the token itself."""
    length, width = x.shape[1], weight.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))  # (b, k-1+l, d)
    return sum(padded[:, i : i + length] * weight[:, i] for i in range(width))


def uniform(*shape: int, bound: float) -> nn.Parameter:
    """A parameter drawn from [-bound, bound]."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def lower_triangle(length: int) -> Tensor:
    """The causal mask (l, l): True where a token may read."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def linear(d_in: int, d_out: int, s: Settings) -> nn.Module:
    """A linear layer, of low rank if the settings say so."""
    if s.rank:
        return nn.Sequential(
            nn.Linear(d_in, s.rank, bias=False), nn.Linear(s.rank, d_out, bias=False)
        )
    return nn.Linear(d_in, d_out, bias=False)


class SSM(nn.Module):
    """Mamba-2's branch (arXiv 2405.21060) as one l x l matrix product, and its alternatives."""

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
        # In every variant, used or not: the MLP widths of the rows come from a count with it.
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
            b, c = rotate(b, cos, sin), rotate(c, cos, sin)
        if s.delta:
            b, c = F.normalize(b, dim=-1), F.normalize(c, dim=-1)
        total = log_decay.cumsum(1).transpose(1, 2)  # (b, h, l)
        between = (total[..., :, None] - total[..., None, :]).clamp(max=0)  # (b, h, l, l)
        decay = between.masked_fill(~lower_triangle(u.shape[1]), -math.inf).exp()
        x, b, c = (t.transpose(1, 2) for t in (x, b, c))  # (b, h, l, p), (b, 1, l, n)
        mix = self.delta_rule if s.delta else self.trapezoid if s.trapezoid else self.euler
        y = mix(u, x, b, c, dt, decay).transpose(1, 2).flatten(2)  # (b, l, e)
        if self.z_proj is not None:
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
        """The rotation of the state since the first token: (b, l, n/2)."""
        raw = self.angle_proj(u)
        if self.s.angle_float32:
            raw = raw.float()
        if self.s.rot == "half":
            exact, free = raw.chunk(2, -1)
            steps = torch.cat((F.hardtanh(F.softshrink(exact, 0.5)), torch.tanh(free)), -1)
            return (math.pi * steps).cumsum(1)
        if self.s.rot == "exact":
            return (math.pi * F.hardtanh(F.softshrink(raw, 0.5))).cumsum(1)
        return (math.pi * torch.tanh(raw)).cumsum(1)

    def euler(
        self, u: Tensor, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, decay: Tensor
    ) -> Tensor:
        """h_t = a_t h_{t-1} + dt_t x_t B_t: the step of Mamba-2."""
        write = dt.transpose(1, 2)[..., None]  # (b, h, l, 1)
        return (c @ b.mT * decay) @ (write * x) + self.D[:, None, None] * x

    def trapezoid(
        self, u: Tensor, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, decay: Tensor
    ) -> Tensor:
        """h_t = a_t h_{t-1} + (1 - s_t) dt_t a_t x_{t-1} B_{t-1} + s_t dt_t x_t B_t."""
        read = c @ b.mT  # (b, 1, l, l)
        share = torch.sigmoid(self.share_proj(u))  # (b, l, h)
        later = F.pad(((1 - share) * dt)[:, 1:], (0, 0, 0, 1))  # written one token later
        write = (share * dt + later).transpose(1, 2)[..., None]  # (b, h, l, 1)
        later = later.transpose(1, 2)[..., None]
        itself = (c * b).sum(-1, keepdim=True)  # (b, 1, l, 1)
        return (read * decay) @ (write * x) + (self.D[:, None, None] - later * itself) * x

    def delta_rule(
        self, u: Tensor, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, decay: Tensor
    ) -> Tensor:
        """h_t = a_t h_{t-1} (1 - beta_t B_t B_t^T) + beta_t x_t B_t, beta from 0 to 2."""
        read = c @ b.mT  # (b, 1, l, l)
        beta = (2 * torch.sigmoid(self.beta_proj(u))).transpose(1, 2)[..., None]  # (b, h, l, 1)
        system = torch.eye(u.shape[1]) + (beta * (b @ b.mT) * decay).tril(-1)  # (b, h, l, l)
        written = torch.linalg.solve_triangular(system, beta * x, upper=False)  # (b, h, l, p)
        return (read * decay) @ written + self.D[:, None, None] * x


class Attention(nn.Module):
    """Causal attention within a window, with RoPE, in plain operations."""

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
            self.value_embedding = nn.Embedding(VOCAB, s.d_model)

    def forward(self, u: Tensor, values: list[Tensor], ids: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d); `values` keeps the first block's values for later blocks."""
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
        q, k = (rotate(t, self.cos, self.sin) for t in (q, k))  # (b, a, l, f)
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
    """SwiGLU, or ReLU squared."""

    def __init__(self, s: Settings):
        super().__init__()
        self.up_proj = linear(s.d_model, s.hidden, s)
        gated = s.activation == "swiglu"
        self.act_proj = linear(s.d_model, s.hidden, s) if gated else None
        self.out_proj = linear(s.hidden, s.d_model, s)

    def forward(self, u: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        if self.act_proj is None:
            return self.out_proj(F.relu(self.up_proj(u)).square())
        return self.out_proj(F.silu(self.act_proj(u)) * self.up_proj(u))


def branch_weights(logits: Tensor, gate: str) -> Tensor:
    """The branches' weights from the gate's logits: (b, l, 3) -> (b, l, 3)."""
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
    """The three branches, in parallel or one after the other."""

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
        shared: list = []  # the weights come from the first group's input
        for place, group in enumerate(self.groups):
            u = self.convolve(rms(x), place) * self.norm[place]
            shared = shared or self.weights(u)
            y = sum(shared[i] * self.branch(i, u, values, ids) for i in group)
            x = x + self.dropout(self.scale * y)
        return x

    def convolve(self, v: Tensor, place: int) -> Tensor:
        """Add the convolution of the group at `place`, if there is one."""
        return v + causal_conv(v, self.conv[place]) if self.s.block_conv else v

    def weights(self, u: Tensor) -> list:
        """The factors of the branches' outputs: three numbers, or three tensors (b, l, 1)."""
        if self.s.gate == "none":
            return [1.0, 1.0, 1.0]
        weights = branch_weights(self.gate(u), self.s.gate) * self.s.gate_scale
        return list(weights.split(1, -1))

    def branch(self, i: int, u: Tensor, values: list[Tensor], ids: Tensor) -> Tensor:
        """The output of branch `i`: (b, l, d) -> (b, l, d)."""
        if BRANCHES[i] == "attention":
            y = self.attention(u, values, ids)
        else:
            y = self.ssm(u) if BRANCHES[i] == "ssm" else self.mlp(u)
        return rms(y, self.branch_norm[i]) if self.s.branch_norm else y


class Model(nn.Module):
    """Embedding, blocks, norm and output layer."""

    def __init__(self, s: Settings):
        super().__init__()
        self.s = s
        self.embedding = nn.Embedding(VOCAB, s.d_model)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.n_layer))
        self.norm = nn.Parameter(torch.ones(s.d_model))
        self.head = nn.Linear(s.d_model, VOCAB, bias=False)
        if s.tie:
            self.head.weight = self.embedding.weight
        if s.bigrams:
            self.bigram_embedding = nn.Embedding(s.bigrams, s.d_model)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """DeepNet's beta on values and outputs; gates start equal for every token."""
        beta = (4 * self.s.n_layer) ** -0.25 if self.s.deepnet else 1.0
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            first = self.s.rank and name.endswith(".0")  # the first of two keeps the variance
            variance = (1.0 if first else self.s.init) / module.in_features
            nn.init.normal_(module.weight, std=math.sqrt(variance))
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
            pairs = VOCAB * F.pad(ids[:, :-1], (1, 0)) + ids
            x = x + self.bigram_embedding(pairs * PRIME % 2**16 % self.s.bigrams)
        embedded = x = rms(x) if self.s.embedding_norm else x
        values: list[Tensor] = []
        for block in [*self.blocks] * self.s.loops:
            x = block(x, embedded, values, ids)
        return self.head(rms(x, self.norm))


class Peer(nn.Module):
    """Llama or Mamba2 of transformers."""

    def __init__(self, s: Settings):
        super().__init__()
        transformers = need("transformers")
        transformers.logging.set_verbosity_error()  # Mamba2 warns of missing CUDA kernels
        common = {
            "vocab_size": VOCAB,
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
        """(b, l) -> (b, l, v)."""
        return self.model(input_ids=ids).logits


def count_parameters(model: nn.Module) -> int:
    """Weights of the model, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def build(s: Settings) -> nn.Module:
    """The model; its `s.hidden` is the width that was chosen for `hidden=0`."""
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
        """One update of every matrix."""
        for group in self.param_groups:
            by_shape: dict[tuple, list] = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), batch in by_shape.items():
                updates = orthogonalize(torch.stack([self.nesterov(p) for p in batch]))
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for p, update in zip(batch, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.to(p.dtype), alpha=-rate)

    def nesterov(self, p: nn.Parameter) -> Tensor:
        """The gradient with Nesterov's momentum."""
        mean = self.state[p].setdefault("mean", torch.zeros_like(p))
        mean.lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(mean, MOMENTUM)


def make_optimizers(model: nn.Module, s: Settings) -> list[torch.optim.Optimizer]:
    """One for the matrices, one for the rest: embeddings, gates, convolutions, vectors."""
    skipped = ("embed", "head", "gate", "conv")

    def is_matrix(name: str, p: nn.Parameter) -> bool:
        if name.endswith("gate_proj.weight") and s.gate_proj_muon:
            return True
        return p.ndim == 2 and min(p.shape) > 8 and not any(word in name for word in skipped)

    matrices = [p for name, p in model.named_parameters() if is_matrix(name, p)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    common = {"betas": (0.9, 0.95), "weight_decay": 0, "fused": True}
    if s.optimizer == "optimizer":
        return [
            Muon(matrices, s.lr, s.weight_decay),
            torch.optim.AdamW(rest, lr=s.adam_lr, **common),
        ]
    decayed = {"params": matrices, "weight_decay": s.weight_decay}
    return [torch.optim.AdamW([decayed, {"params": rest}], lr=s.lr, **common)]


def rate(step: int, s: Settings) -> float:
    """The learning rate at a step, as a share of its peak."""
    if step < s.warmup:
        return (step + 1) / s.warmup
    if s.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / (s.steps - s.warmup)))
    decay = int(0.6 * s.steps)  # the first step of the decay
    return 1.0 if step < decay else (s.steps - step) / (s.steps - decay)


def train(model: nn.Module, data: Tensor, s: Settings, seed: int) -> list[float]:
    """The loss of every step; training stops at one that is not finite."""
    random, optimizers = torch.Generator().manual_seed(1000 + seed), make_optimizers(model, s)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks, losses = [group["lr"] for group in groups], []
    model.train()
    for step in range(s.steps):
        begin = torch.randint(len(data) - s.block_size - 1, (s.batch_size, 1), generator=random)
        window = data[begin + torch.arange(s.block_size + 1)]  # (b, l+1)
        for group, peak in zip(groups, peaks, strict=True):
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
    """Nats per byte of the data, cut into independent blocks."""
    model.eval()
    count = (len(data) - 1) // block * block
    x, y, total = data[:count].view(-1, block), data[1 : count + 1].view(-1, block), 0.0
    for a, b in zip(x.split(256), y.split(256), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(a)
        total += F.cross_entropy(logits.float().flatten(0, 1), b.flatten(), reduction="sum").item()
    return total / count


def run(name: str, values: dict, base: str, seed: int, texts: tuple[Tensor, Tensor]) -> dict:
    """Train and validate once; returns the row, in which a loss that is not finite is None."""
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
    """The first `limit` bytes of a file, enough for at least one block of inputs and targets."""
    require(Path(path).is_file(), path, "no such file", "pass --text TRAIN VALIDATION")
    data = np.fromfile(path, dtype=np.uint8, count=-1 if limit is None else limit)
    remedy = f"blocks of {block} need at least {block + 2}"
    require(len(data) > block + 1, path, f"{len(data)} bytes are too few", remedy)
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


def lines_of(rows: list[dict]) -> list[Line]:
    """Group by group, each sorted by loss. A row's base is of the same seed, if there is one."""
    group_of = {name: group for name, (group, _) in describe_fields(Settings).items()}
    order = ["Start", *dict.fromkeys(group_of.values())]
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
        group = group_of[first] if base and first else "Start"
        lines.append(Line(row, base, changed, group))

    def key(line: Line) -> tuple:
        loss = line.row["nats_per_byte"] or math.inf
        return order.index(line.group), loss, line.row["seed"]

    return sorted(lines, key=key)


def words(settings: dict) -> str:
    """FIELD=VALUE words, as --run takes them."""
    shown = {k: str(v).lower() if isinstance(v, bool) else v for k, v in settings.items()}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def write_table(rows: list[dict], path: str) -> None:
    """Replace the text between the two markers of a Markdown file."""
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
    write_between(path, "rows", table)


def draw_line(axes: Any, y: float, line: Line, right: float) -> None:
    """Draw a row: a line from its base's loss to its own, or an arrow past the right edge."""
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
    edge = "tab:blue" if ours else "tab:orange"
    inside = "white" if "steps" in line.row["settings"] else edge
    marker = ">" if nats > right else "o" if ours else "s"
    axes.plot(at, y, marker, color=edge, mfc=inside, ms=6.5, zorder=4)
    axes.annotate(
        f"{nats:.4f}  {line.percent}",
        (1.01, y),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=9,
        color=color if line.base else "black",
    )


def draw_legend(axes: Any) -> None:
    """Explain the marks and colors above the plot."""
    make = need("matplotlib.lines").Line2D
    blue, steps = {"color": "tab:blue", "marker": "o", "ls": ""}, f"not {Settings.steps:,} steps"
    handles = [
        make([], [], **blue, label="the research block"),
        make([], [], color="tab:orange", marker="s", ls="", label="transformers' peer"),
        make([], [], **blue, mfc="white", label=steps),
        make([], [], color="0.3", marker="|", ls="", ms=9, label="the run compared with"),
        make([], [], color="tab:green", label="better"),
        make([], [], color="tab:red", label="worse"),
        make([], [], color="0.45", label=f"less than {NOISE} nats: noise"),
    ]
    place = {"loc": "lower center", "bbox_to_anchor": (0.3, 1.01), "ncols": 7}
    spacing = {"columnspacing": 1.2, "handletextpad": 0.4}
    axes.legend(handles=handles, frameon=False, fontsize=9, **place, **spacing)


def plot(rows: list[dict], path: str) -> None:
    """Draw all rows, grouped by what was varied."""
    lines = lines_of(rows)
    known = [line.row["nats_per_byte"] for line in lines if line.row["nats_per_byte"]]
    require(known, path, "there is no row with a loss to draw", "add one with --run")
    left, right = min(known) * 0.997, min(known) * 1.06
    rows_high = len(lines) + 1.5 * len({line.group for line in lines})
    figure = need("matplotlib.figure").Figure(figsize=(8, 1.4 + 0.25 * rows_high))
    axes = figure.subplots()
    y, ticks, labels, last = 0.0, [], [], None
    for line in lines:
        if line.group != last:
            y += 0.4 if last else 0
            axes.axhline(y - 0.55, color="0.8", lw=0.8)
            style = {"va": "center", "ha": "right", "weight": "bold", "fontsize": 10}
            axes.annotate(line.group, (-0.01, y), xycoords=("axes fraction", "data"), **style)
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
    draw_legend(axes)
    figure.savefig(path, dpi=130, bbox_inches="tight")


# ------------------------------------------------------------------------------------ main


@dataclass
class Options:
    """The command line."""

    # Runs
    run: list[str] | None = None  # one or more of 'NAME FIELD=VALUE ...'
    text: list[str] | None = None  # two files: to train on, to validate on
    base: str = DEFAULTS  # run that the new rows are compared with
    seeds: list[int] | None = None  # random seeds of every run; None means 0
    threads: int = 1  # CPU threads

    # Rows
    output: str = "docs/ablations.jsonl"  # file of rows
    table: str | None = None  # Markdown file to write the rows into
    plot: str | None = None  # image file to draw the rows into


def settings_help() -> str:
    """Every setting of a run with its default and what it is."""
    lines, last = ["settings of a run, with their defaults:"], ""
    for name, (group, text) in describe_fields(Settings).items():
        lines += [f"\n{group}:"] if group != last else []
        last, setting = group, words({name: getattr(Settings, name)})
        if name in Settings.CHOICES:
            text += f" ({', '.join(map(str, Settings.CHOICES[name]))})"
        lines.append(f"  {setting:24} {text}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> Options:
    """The command line, checked."""
    usage = "python -m benchmarks.ablations [--FLAG VALUE ...]"
    description = str(__doc__).split("Dimension")[0]
    parser = CliParser(usage=usage, description=description, epilog=settings_help())
    add_flags(parser, Options)
    options = make_options(Options, parser.parse_args(argv))
    asked = options.run or options.table or options.plot
    require(asked, "--run", "there is nothing to do", "pass --run, --table or --plot")
    two, remedy = len(options.text or ()) == 2, "pass --text TRAIN VALIDATION"
    require(two or not options.run, "--text", "a run needs two files", remedy)
    return options


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    train_file, validation_file = options.text or ("", "")
    for name, values in [parse_run(text) for text in options.run or ()]:
        block = Settings(**values).block_size
        data = read_bytes(train_file, None, block)
        validation = read_bytes(validation_file, VALIDATION + 1, block)
        for seed in options.seeds or [0]:
            row = run(name, values, options.base, seed, (data, validation))
            append_row(options.output, row)
    if options.table:
        write_table(read_rows(options.output), options.table)
    if options.plot:
        plot(read_rows(options.output), options.plot)
    return 0


if __name__ == "__main__":
    run_cli(main)
