"""One token at a time: the short way through `TinyMambaModel.run`, on a CPU.

A block of a small model takes as long to call its hundred small operations as to read its weights.
Here a token is a vector: what is computed for a length of one is left out, and what all blocks need
is computed once for all of them. Nothing is kept between tokens but references to the parameters,
so no weight is ever a stale copy. Values between the products are float32 in every dtype.

`why_general` says when the general path is taken, which is the reference. Time both with

    python -m benchmarks.streaming

Dimension letters in the comments on shapes:
    b batch      d d_model               e inner width, expand_factor * d      L blocks
    h SSM heads  p SSM head width (e = h * p)          n d_state     k d_conv
    a attention heads            f attention head width (d = a * f)  w window_size
    r pairs of SSM state channels that rotate          m width of a memory's keys
    c channels of a block's convolutions, d + 2n + 3d: of u; B, C; q, k, v
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymamba.delta_rule import key_features
from tinymamba.kernels import QuantizedLinear, is_in_graph
from tinymamba.packing import erase_states

PLAIN_MODULES: set[type] = set()  # types of modules whose work `step` does; testv2.py fills it
PROJECTIONS = (".in_proj", ".out_proj", ".qkv")  # names of layers that may be quantized
FEW_ROWS = 4  # up to as many rows, attention in bfloat16 is faster on float32 copies of the keys
Affine = tuple[Tensor, Any]  # weight (out, in) and bias (out,) or None

# ------------------------------------------------------------------------------------ which path


class BlockParts(NamedTuple):
    """A block's modules, whose settings may change, and its parameters."""

    gate: nn.Module
    ssm: Any
    attention: Any
    mlp: Any
    norm: nn.Module
    controller: Affine
    ssm_in: Any
    ssm_angle: Affine
    ssm_out: Any
    qkv: Any
    attention_out: Any
    mlp_in: Any
    mlp_out: Any
    residual_scale: Tensor  # (d,)
    memory: Any  # (token_proj, A_log), or None


class Plan:
    """References to all that a step needs of a model, and to what must stay for them to hold."""

    def __init__(self, model: Any):
        parts = (model.embedding, model.dropout, model.blocks, model.norm)
        modules = [m for part in parts for m in part.modules()]
        # Modules and parameters are entries of these dictionaries; a hook is one of the others.
        self.entries: list[dict] = [d for m in modules for d in (m._modules, m._parameters)]
        self.entries.append(model._modules)
        self.hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.objects = [*self.values()]
        self.known = [*map(id, self.objects)]
        self.states = [m.__dict__ for m in modules]
        self.problem = find_problem(model, modules)
        if self.problem is None:
            self.collect(model)

    def collect(self, model: Any) -> None:
        """The parameters that a step reads, in the order in which it does."""
        self.blocks = [block_parts(block) for block in model.blocks]
        convs = [(b.conv, b.ssm.conv, b.attention.conv) for b in model.blocks]
        self.taps = [conv.weight for row in convs for conv in row if conv is not None]
        self.sizes = [0 if conv is None else conv.channels for conv in convs[0]]
        self.vectors = [(b.ssm.dt_bias, b.ssm.A_log, b.ssm.D, b.norm.weight) for b in model.blocks]
        self.head_norms = [
            norm.weight for b in model.blocks for norm in (b.attention.q_norm, b.attention.k_norm)
        ]

    def values(self) -> Iterator[Any]:
        """The modules and parameters as they are now."""
        return chain.from_iterable(map(dict.values, self.entries))

    def holds(self) -> bool:
        """Whether the model still has the same modules and parameters."""
        return [*map(id, self.values())] == self.known

    def why_not_now(self) -> str | None:
        """What besides them forbids the short way at this moment."""
        if any(self.hooks):
            return "a module has hooks"
        if any(state["training"] for state in self.states):
            return "a module is in training mode"
        if any("forward" in state for state in self.states):
            return "a module has a forward of its own"
        if any(b.ssm.offset is not None or b.attention.prefix is not None for b in self.blocks):
            return "a slot is in use"
        return None


PLANS: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def find_problem(model: Any, modules: list[nn.Module]) -> str | None:
    """What in the build of a model the short way does not cover."""
    names = {id(m): name for name, m in model.named_modules()}
    for m in modules:
        name = names.get(id(m), "a module")
        projects = type(m) is QuantizedLinear and name.endswith(PROJECTIONS)
        if type(m) not in PLAIN_MODULES and not projects:
            return f"{name} is a {type(m).__name__}"
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter:
            return f"{name} is a {type(p).__name__}"
    return None


def affine(layer: Any) -> Any:
    """The parameters of a linear layer; a quantized one is taken as it is."""
    return layer if type(layer) is QuantizedLinear else (layer.weight, layer.bias)


def block_parts(block: Any) -> BlockParts:
    """The parts of one block."""
    ssm, attention, mlp, memory = block.ssm, block.attention, block.mlp, block.attention.memory
    return BlockParts(
        gate=block.gate,
        ssm=ssm,
        attention=attention,
        mlp=mlp,
        norm=block.norm,
        controller=affine(block.gate.controller),
        ssm_in=affine(ssm.in_proj),
        ssm_angle=affine(ssm.angle_proj),
        ssm_out=affine(ssm.out_proj),
        qkv=affine(attention.qkv),
        attention_out=affine(attention.out_proj),
        mlp_in=affine(mlp.in_proj),
        mlp_out=affine(mlp.out_proj),
        residual_scale=block.residual_scale,
        memory=None if memory is None else (memory, affine(memory.token_proj), memory.A_log),
    )


def find_plan(model: Any) -> Plan:
    """The plan of a model: the last one, if it still holds."""
    plan = PLANS.get(model)
    if plan is None or not plan.holds():
        plan = PLANS[model] = Plan(model)
    return plan


def why_general(model: Any, ids: Tensor, state: Any, others: tuple = ()) -> str | None:
    """Why `run` takes the general path for ids (b, l) after a state; None if it need not.

    `others` are the other arguments of `run`.
    """
    if is_in_graph():
        return "a graph is recorded"
    if state is None or ids.shape[1] != 1 or any(other is not None for other in others):
        return "it is more than one token after a state"
    if ids.shape[0] == 0:
        return "there are no rows"
    if torch.is_grad_enabled():
        return "gradients are on; use torch.no_grad()"
    if ids.device.type != "cpu" or model.embedding.weight.device.type != "cpu":
        return "it is not on a CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks of all modules"
    dtype, first = model.embedding.weight.dtype, state.layers[0]
    if dtype not in (torch.float32, torch.bfloat16) or first.conv.dtype != dtype:
        return "weights or states are of another dtype"
    plan = find_plan(model)
    return plan.problem or plan.why_not_now()


# ------------------------------------------------------------------------------------ the step


class Shared(NamedTuple):
    """What the blocks of a step have in common, and what is computed for all of them at once."""

    dtype: torch.dtype  # of the weights
    cos: Tensor  # RoPE: (b, 1, 1, f), float32
    sin: Tensor  # the same, negative in the first half
    visible: Any  # keys that attention sees, of bool (b, 1, 1, w); None if all
    before: list[tuple]  # of each block, what the convolutions of u; B, C; q, k, v owe to the past
    taps: list[tuple]  # of each block, the factors (1, channels) of their newest input
    dt_bias: tuple[Tensor, ...]  # (h,) of each block, float32
    A: tuple[Tensor, ...]  # (h,)
    least: tuple[Tensor, ...]  # (h,) what is taken from every dt
    D: tuple[Tensor, ...]  # (h, 1)
    norms: tuple[Tensor, ...]  # (d,) weights of the norms, times the root of d
    head_norms: tuple[Tensor, ...]  # (2, 1, f) those of queries and keys, times the root of f


def step(model: Any, ids: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
    """Read ids (b, 1) after a state that stays as it is, as `run` does.

    Returns the hidden state (b, 1, d), the new state and the gates (L, b, 1, 3).
    """
    plan = PLANS[model]
    x = F.embedding(ids[:, 0], model.embedding.weight)  # (b, d)
    shared, conv = share(model, plan, state)
    x, layers, gates, inputs = x.float(), [], [], []
    for i, layer in enumerate(state.layers):
        x, layer, weights, new = step_block(plan.blocks[i], shared, i, x, layer)
        layers.append(layer)
        gates.append(weights)
        inputs.append(new)
    fresh = torch.stack(inputs)[:, :, None].to(shared.dtype)  # (L, b, 1, c)
    tails = torch.cat((conv, fresh), dim=2)[:, :, 1:].unbind()  # (b, k-1, c) each
    layers = [layer._replace(conv=tail) for layer, tail in zip(layers, tails, strict=True)]
    hidden = normalize(x, model.norm.eps, model.norm.weight * x.shape[1] ** 0.5).to(shared.dtype)
    position, start, ends = state.position + 1, state.document_start, model.find_ends(ids)
    if ends is not None and ends.any():
        start = torch.where(ends[:, 0], position, start)
        layers = erase_states(layers, ends[:, 0])
    state = replace(state, layers=layers, position=position, document_start=start)
    return hidden[:, None], state, torch.stack(gates)[:, :, None]


def share(model: Any, plan: Plan, state: Any) -> tuple[Shared, Tensor]:
    """What the blocks share, and the inputs of their convolutions so far (L, b, k-1, c)."""
    layers, count = state.layers, len(state.layers)
    age = state.position - state.document_start  # (b,) tokens of the document so far
    youngest = int(age.min())
    cos, sin = rotary_factors(model, state.position)  # (b, f) each
    conv = torch.stack([layer.conv for layer in layers])
    taps = torch.cat(plan.taps).float().view(count, sum(plan.sizes), -1).mT  # (L, k, c)
    known, now = conv.float(), taps[:, -1:] + 1.0  # 1: a ShortConv adds its input
    width = known.shape[2]
    if model.config.document_mask and youngest < width:
        foreign = torch.arange(width, 0, -1, device=age.device) > age[:, None]  # (b, k-1)
        known = known.masked_fill(foreign[..., None], 0.0)
    before = (known * taps[:, None, :-1]).sum(2)  # (L, b, c)
    vectors = (torch.stack(rows).float() for rows in zip(*plan.vectors, strict=True))
    dt_bias, A_log, D, norms = vectors  # (L, h) three times, (L, d)
    A = -A_log.exp()  # (L, h)
    least = plan.blocks[0].ssm.config.min_decay * (-A_log).exp()
    head_norms = torch.stack(plan.head_norms).float().view(count, 2, 1, -1)
    norms, head_norms = norms * norms.shape[-1] ** 0.5, head_norms * head_norms.shape[-1] ** 0.5
    shared = Shared(
        model.embedding.weight.dtype,
        cos[:, None, None],
        sin[:, None, None],
        visible_keys(age, youngest, plan.blocks[0].attention.window),
        parts_of_blocks(before, plan.sizes),
        parts_of_blocks(now, plan.sizes),
        dt_bias.unbind(),
        A.unbind(),
        least.unbind(),
        D[..., None].unbind(),
        norms.unbind(),
        head_norms.unbind(),
    )
    return shared, conv


def rotary_factors(model: Any, position: Tensor) -> tuple[Tensor, Tensor]:
    """The cos and sin of RoPE at position (b,), (b, f) each; sin is negative in the first half."""
    cos, sin = model.rotary(position)  # (b, f/2) each
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def parts_of_blocks(x: Tensor, sizes: list[int]) -> list[tuple]:
    """The channels (L, b, c) of three convolutions, for each block."""
    return [*zip(*(part.unbind() for part in x.split_with_sizes(sizes, -1)), strict=True)]


def visible_keys(age: Tensor, youngest: int, window: int) -> Tensor | None:
    """Which of the last w keys attention sees after `age` (b,) tokens, (b, 1, 1, w); None if all.

    The last key is that of the token itself.
    """
    if youngest >= window - 1:
        return None
    return torch.arange(window - 1, -1, -1, device=age.device) <= age[:, None, None, None]


def step_block(
    block: BlockParts, shared: Shared, i: int, x: Tensor, past: Any
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """x (b, d) -> new x, new LayerState but for its `conv`, gates, inputs (b, c) of `conv`."""
    normed = normalize(x, block.norm.eps, shared.norms[i])  # (b, d)
    before, taps = shared.before[i], shared.taps[i]
    u = torch.addcmul(before[0], normed, taps[0])
    narrow = u.to(shared.dtype)
    gates = gate_weights(block, narrow)  # (b, 3)
    g_ssm, g_attention, g_mlp = gates.chunk(3, dim=-1)
    BC, ssm, new, phase = step_ssm(block, shared, i, (u, narrow), past)
    mix = linear(ssm.to(shared.dtype), block.ssm_out) * g_ssm
    qkv, attention, keys, values, memory = step_attention(block, shared, i, (u, narrow), past)
    mix = mix.addcmul(linear(attention.to(shared.dtype), block.attention_out), g_attention)
    if block.gate.form == "softmax" or bool(g_mlp.any()):
        gate, up = linear(narrow, block.mlp_in).chunk(2, dim=-1)  # (b, e) each
        hidden = block.mlp.activation(gate) * up
        mix = mix.addcmul(linear(hidden, block.mlp_out), g_mlp)
    x = torch.addcmul(x, mix, block.residual_scale)
    layer = past._replace(ssm=new, phase=phase, keys=keys, values=values, memory=memory)
    inputs = [t for t in (normed, BC, qkv) if t is not None]
    return x, layer, gates, torch.cat(inputs, dim=-1)


def gate_weights(block: BlockParts, u: Tensor) -> Tensor:
    """u (b, d) -> the weights of the branches (b, 3), float32."""
    if block.gate.form == "softmax":
        return F.linear(u, *block.controller).float().softmax(-1)
    return block.gate.forward(u[:, None])[:, 0]


def step_ssm(
    block: BlockParts, shared: Shared, i: int, u: tuple[Tensor, Tensor], past: Any
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """The SSM of u (b, d), which is given as float32 and in the dtype of the weights.

    Returns the inputs B and C (b, 2n) of their convolution, if there is one, what out_proj reads
    (b, e), the new state (b, h, p, n) and phase (b, r).
    """
    heads, width, states = past.ssm.shape[1:]
    sizes = [heads * width, heads * width, 2 * states, heads]
    z, x, BC, raw = linear(u[1], block.ssm_in).split_with_sizes(sizes, -1)
    x = x.reshape(-1, heads, width).float()  # (b, h, p)
    dt = step_sizes(block, raw, shared.dt_bias[i], shared.least[i])
    decay = (dt * shared.A[i]).exp_()[..., None, None]  # (b, h, 1, 1)
    inputs = None if block.ssm.conv is None else BC
    BC = BC.float() if inputs is None else torch.addcmul(shared.before[i][1], BC, shared.taps[i][1])
    half_turns = F.hardtanh(F.softshrink(float32_linear(u[0], block.ssm_angle), 0.5))  # (b, r)
    phase = (past.phase + half_turns).remainder_(2).remainder_(2)  # the first may round up to 2
    B, C = rotate(BC.reshape(-1, 2, states), phase).chunk(2, dim=1)  # (b, 1, n) each
    state = past.ssm * decay
    flat = state.view(-1, heads * width, states)  # (b, e, n)
    flat.baddbmm_((x * dt[..., None]).view(-1, heads * width, 1), B)
    y = torch.bmm(flat, C.mT).view_as(x)
    y = torch.addcmul(y, x, shared.D[i]).flatten(1)
    return inputs, y * F.silu(z), state, phase


def step_sizes(block: BlockParts, raw: Tensor, dt_bias: Tensor, least: Tensor) -> Tensor:
    """The dt (b, h) of raw (b, h), see MambaSSM.step_sizes; dt_bias and least (h,)."""
    if not block.ssm.config.min_decay:
        return block.ssm.step_sizes(raw)
    return (F.softplus(raw + dt_bias) - least).relu_()


def rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Rotate pairs (i, i + n/2) of x (b, 2, n) by phase (b, r) half turns, for i < r."""
    angle = F.linear(phase, turns(x.shape[2], phase.shape[1]))[:, None]  # (b, 1, n)
    return torch.addcmul(x * angle.cos(), x.roll(x.shape[2] // 2, dims=-1), angle.sin())


@functools.cache
def turns(states: int, pairs: int) -> Tensor:
    """What gives each channel its angle (n, r): that of its pair, negative in the first half."""
    half = torch.eye(states // 2, pairs, dtype=torch.float32, device="cpu") * math.pi
    return torch.cat((-half, half))


def step_attention(
    block: BlockParts, shared: Shared, i: int, u: tuple[Tensor, Tensor], past: Any
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Any]:
    """Attention of u (b, d), which is given as float32 and in the dtype of the weights.

    Returns the inputs of the convolution, if there is one, what out_proj reads (b, d), new keys and
    values (b, a, w-1, f), and the new state of the memory.
    """
    heads, width = block.attention.n_heads, block.attention.head_dim
    qkv = linear(u[1], block.qkv)  # (b, 3d)
    inputs, qkv = convolve_qkv(qkv, shared.before[i][2], shared.taps[i][2])
    qk, v = qkv.view(-1, 3, heads, width).split_with_sizes([2, 1], 1)
    qk = normalize(qk, block.attention.q_norm.eps, shared.head_norms[i])  # (b, 2, a, f)
    turned = torch.addcmul(qk * shared.cos, qk.roll(width // 2, dims=-1), shared.sin)
    q, k = turned.unsqueeze(3).unbind(1)  # (b, a, 1, f) each
    v = v.transpose(1, 2)  # (b, a, 1, f)
    keys = torch.cat((past.keys, k.to(past.keys.dtype)), dim=2)  # (b, a, w, f)
    values = torch.cat((past.values, v.to(past.values.dtype)), dim=2)
    y, memory = attend(q, keys, values, shared.visible), past.memory
    if block.memory is not None:
        raw = float32_linear(u[0], block.memory[1])
        found, memory = step_memory(block.memory, raw, qk, v, memory)
        y = y + found
    return inputs, y.flatten(1), keys[:, :, 1:], values[:, :, 1:], memory


def convolve_qkv(qkv: Tensor, before: Tensor, taps: Tensor) -> tuple[Tensor | None, Tensor]:
    """qkv (b, 3d) -> the inputs of a convolution of all, of k or of none; its output, float32."""
    channels = before.shape[-1]
    if channels == qkv.shape[-1]:
        return qkv, torch.addcmul(before, qkv, taps)
    if channels == 0:
        return None, qkv.float()
    q, k, v = qkv.chunk(3, dim=-1)
    return k, torch.cat((q, torch.addcmul(before, k, taps), v), dim=-1)


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """q (b, a, 1, f), keys and values (b, a, w, f) -> (b, a, 1, f), float32."""
    if q.shape[0] <= FEW_ROWS:
        keys, values = keys.float(), values.float()
    q = q.to(keys.dtype)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible).float()


def step_memory(
    parts: Any, raw: Tensor, qk: Tensor, v: Tensor, state: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The memory's part of attention (b, a, 1, f), and its new state, which is written to `out`.

    raw (b, 3a) of token_proj, qk (b, 2, a, f) before RoPE, v (b, a, 1, f), state (b, a, f, m).
    """
    memory, _, A_log = parts
    write, fade, read = raw[..., None, None].chunk(3, dim=1)  # (b, a, 1, 1) each
    log_decay = -F.softplus(fade) * A_log.float().exp()[:, None, None]
    decay = log_decay.exp_()  # (b, a, 1, 1)
    features = key_features(qk, memory.products, torch.float32)  # (b, 2, a, m)
    # Products with two rows; those with two columns take seven times as long.
    found, held = (decay * (features.transpose(1, 2) @ state.mT)).chunk(2, dim=2)  # (b, a, 1, f)
    q, k = features[:, :, :, None].unbind(1)  # (b, a, 1, m) each
    change = (v - held) * write.sigmoid()  # (b, a, 1, f)
    state = torch.mul(state, decay, out=out)  # the reads above need no pass over the new one
    state.addcmul_(change.mT, k)
    found = torch.addcmul(found, change, (q * k).sum(-1, keepdim=True))
    return found * read.sigmoid(), state


# ------------------------------------------------------------------------------------ operations


def normalize(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    """RMSNorm of x (..., n), float32, given its weight (n,) times the root of n.

    F.rms_norm takes twice as long for a vector. The root of the sum of x^2 + eps is the hypotenuse
    of the norm and the root of n eps.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.hypot(norm, root(x.shape[-1] * eps)) * weight


@functools.cache
def root(x: float) -> Tensor:
    """The square root, as a tensor of no dimension."""
    return torch.tensor(math.sqrt(x), dtype=torch.float32, device="cpu")


def linear(x: Tensor, layer: Affine | QuantizedLinear) -> Tensor:
    """x (b, in) -> (b, out), in the dtype of both.

    For one row and a row-major matrix of float32, BLAS takes half the time if it gets the matrix
    in parts of a few rows. PyTorch's dot products, which serve an odd number of rows, lie between.
    """
    if isinstance(layer, QuantizedLinear):
        return layer.forward(x)
    weight, bias = layer
    if x.shape[0] > 1 or weight.dtype != torch.float32 or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    few = math.gcd(weight.shape[0], 32)
    if few == 1:
        y = torch.linalg.vecdot(weight, x)[None]
    else:
        parts = weight.view(-1, few, weight.shape[1])  # (out / few, few, in)
        y = torch.bmm(parts, x.mT.expand(len(parts), -1, -1)).view(1, -1)
    return y if bias is None else y + bias


def float32_linear(x: Tensor, layer: Affine) -> Tensor:
    """A Float32Linear of few outputs, of x (b, in)."""
    weight, bias = layer
    return F.linear(x, weight.float(), None if bias is None else bias.float())
