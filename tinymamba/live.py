"""Texts that decode together: one token of each at a time, with states that change in place.

tinymamba/decode.py is the reference. Here states lie in buffers that every step reads and writes
where they are; keys, values and the inputs of the convolutions in rings, so that nothing moves. A
block has two matrices: one for all that reads u, one for all that is added to the stream. They are
copies, in the layout that oneDNN multiplies fastest; what is a function of the weights alone is
computed once. Values between the products are float32 in every dtype.

A step does not write to what the state before it is made of: the slots of the rings that it fills
are free ones, and SSMs and memories are read from one buffer and written to another. Only `commit`
makes the new state the current one. Until then, any thread may copy the one before.

Dimension letters in the comments on shapes are those of tinymamba/decode.py, but
    c channels of all convolutions that a block can have, d + 2n + 3d: of u; B, C; q, k, v
    o outputs of a block's first matrix
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymamba.decode import (
    BlockParts,
    find_plan,
    normalize,
    rotary_factors,
    rotate,
    step_memory,
    step_sizes,
)
from tinymamba.kernels import QuantizedLinear

# ------------------------------------------------------------------------------------ weights


class LiveBlock(NamedTuple):
    """A block's weights; those that are not packed are float32."""

    parts: BlockParts
    read: Tensor  # (o, d) packed: to z, x, B, C, q, k, v, the MLP's two halves, dt and the gate
    read_bias: Tensor  # (o,) in the dtype of the model
    exact: Tensor  # (r, d), or (r + 3a, d) with a memory: to angles; to write, fade and read
    exact_bias: Tensor  # (r,) or (r + 3a,)
    write: Tensor  # (d, 2e + d) packed: from SSM, attention and MLP
    write_bias: Tensor | None  # (3, d)
    norm: Tensor  # (d,) times the root of d
    head_norms: Tensor  # (2, 1, f) of queries and keys, times the root of f
    dt_bias: Tensor  # (h,)
    A: Tensor  # (h,)
    least: Tensor  # (h,) what is taken from every dt
    D: Tensor  # (h, 1)
    residual_scale: Tensor  # (d,)


class LiveModel:
    """A model with its weights as a LiveBatch reads them."""

    def __init__(self, model: Any):
        c, first = model.config, model.blocks[0]
        self.model, self.dtype, self.known = model, model.embedding.weight.dtype, versions(model)
        d, e, n = c.d_model, c.expand_factor * c.d_model, c.d_state
        self.sizes = [e, e, 2 * n + 3 * d, e, e, first.ssm.n_heads, 3]  # of LiveBlock.read
        self.sources = torch.tensor([0] * c.expand_factor + [1] + [2] * c.expand_factor)
        self.channels, taps = place_convolutions(model)
        self.taps = taps[:-1]  # (k-1, L, c) of the inputs before, from the oldest
        self.newest = (taps[-1] + 1.0).unbind()  # (c,) of each block; 1: its input is added
        self.blocks = [make_block(parts) for parts in find_plan(model).blocks]
        self.norm = float32(model.norm.weight) * d**0.5
        self.head, self.head_bias = pack(model.head.weight), model.head.bias

    def holds(self) -> bool:
        """Whether the model has the weights that it had; a write through `.data` goes unseen."""
        return self.known == versions(self.model)


def why_not_live(model: Any) -> str | None:
    """Why texts of a model cannot decode in a LiveBatch; None if they can."""
    weight, head, plan, c = model.embedding.weight, model.head, find_plan(model), model.config
    library = torch.backends.mkldnn
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return "it is not on a CPU, or has weights of another dtype"
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not known or not library.is_available() or not library.enabled:
        return "there is no oneDNN"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this CPU"
    if any(type(m) is QuantizedLinear for m in model.modules()):
        return "it is quantized"
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return "its head is not a plain one"
    if c.gate != "softmax" or c.d_conv < 2:
        return "a sparse gate skips branches; a convolution of one tap has no ring"
    return plan.problem or plan.why_not_now()


def versions(model: Any) -> list[tuple]:
    """What changes as soon as a parameter is written or replaced."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]


def float32(weight: Tensor) -> Tensor:
    """A copy of a weight."""
    return weight.detach().to(torch.float32, copy=True)


def pack(weight: Tensor) -> Tensor:
    """A matrix (out, in) in the layout in which oneDNN multiplies it fastest."""
    few = 32  # rows of the other factor; any number may follow, but 1 would mean another layout
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), few)


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (b, in) -> (b, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def place_convolutions(model: Any) -> tuple[Tensor, Tensor]:
    """Which of the c channels a state holds, and all taps (k, L, c), 0 for the other channels."""
    d, n, conv = model.config.d_model, model.config.d_state, model.blocks[0].attention.conv
    of_keys = conv is not None and conv.channels == d  # of keys only
    begins = (0, d, d + 2 * n + (d if of_keys else 0))
    taps = torch.zeros(len(model.blocks), 4 * d + 2 * n, model.config.d_conv)
    channels = torch.zeros(4 * d + 2 * n, dtype=torch.bool)
    for i, block in enumerate(model.blocks):
        convs = (block.conv, block.ssm.conv, block.attention.conv)
        for begin, conv in zip(begins, convs, strict=True):
            if conv is not None:
                taps[i, begin : begin + conv.channels] = float32(conv.weight)
                channels[begin : begin + conv.channels] = True
    return channels.nonzero()[:, 0], taps.permute(2, 0, 1).contiguous()


def with_bias(layer: tuple[Tensor, Any]) -> tuple[Tensor, Tensor]:
    """The weight (out, in) and the bias (out,) of a linear layer, 0 if it has none."""
    weight, bias = layer
    return weight.detach(), weight.new_zeros(len(weight)) if bias is None else bias.detach()


def make_block(parts: BlockParts) -> LiveBlock:
    """The weights of one block."""
    ssm, d, f = parts.ssm, len(parts.norm.weight), len(parts.attention.q_norm.weight)
    heads = ssm.n_heads
    sources = [with_bias(p) for p in (parts.ssm_in, parts.qkv, parts.mlp_in, parts.controller)]
    read, read_bias = (
        torch.cat((ssm_in[:-heads], qkv, mlp, ssm_in[-heads:], gate))
        for ssm_in, qkv, mlp, gate in zip(*sources, strict=True)
    )
    exact = [parts.ssm_angle] if parts.memory is None else [parts.ssm_angle, parts.memory[1]]
    exact, exact_bias = (
        torch.cat(pieces).float() for pieces in zip(*map(with_bias, exact), strict=True)
    )
    outputs = [parts.ssm_out, parts.attention_out, parts.mlp_out]
    biases = [float32(with_bias(layer)[1]) for layer in outputs]
    head_norms = torch.stack([parts.attention.q_norm.weight, parts.attention.k_norm.weight])
    A_log = float32(ssm.A_log)
    return LiveBlock(
        parts,
        pack(read),
        read_bias,
        exact,
        exact_bias,
        pack(torch.cat([weight for weight, _ in outputs], dim=1)),
        None if outputs[0][1] is None else torch.stack(biases),
        float32(parts.norm.weight) * d**0.5,
        float32(head_norms)[:, None] * f**0.5,
        float32(ssm.dt_bias),
        -A_log.exp(),
        ssm.config.min_decay * (-A_log).exp(),
        float32(ssm.D)[:, None],
        float32(parts.residual_scale),
    )


# ------------------------------------------------------------------------------------ states


class LiveLayer(NamedTuple):
    """The states of one block, float32; a step reads one buffer of a pair and writes the other."""

    ssm: tuple[Tensor, ...]  # a pair (b, n, h, p): the transpose of LayerState's
    phase: tuple[Tensor, ...]  # a pair (b, r)
    cache: tuple[Tensor, ...]  # keys and values (b, a, w, f), rings
    memory: tuple[Tensor, ...]  # a pair (b, a, f, m), or nothing

    def first(self, rows: int) -> LiveLayer:
        """Views of the first rows."""
        return LiveLayer(*(tuple(t[:rows] for t in part) for part in self))


class LiveBatch:
    """Texts, a row of the buffers for each, which `step` and `commit` advance by a token."""

    def __init__(self, live: LiveModel):
        self.live, self.time = live, 0  # time: steps so far; says where rings and pairs begin
        self.positions: list[int] = []  # of each row: tokens read
        self.starts: list[int] = []  # of each row: where its document begins
        self.room: Any = ()  # all buffers: (conv, layers), with more rows than are in use
        self.empty: Any = None  # a ModelState without rows
        self.ended: list[int] = []  # rows whose document the last step has ended

    @torch.inference_mode()
    def regroup(self, order: list[int], states: list[Any]) -> LiveBatch:
        """Row i becomes what row order[i] >= i was; ModelStates of one row follow."""
        rows = len(order) + len(states)
        self.make_room(rows, states)
        for row, old in enumerate(order):
            if row != old:
                for t in self.buffers():
                    t[row] = t[old]
        for row, state in enumerate(states, len(order)):
            self.put(row, state)
        self.positions = [self.positions[row] for row in order]
        self.positions += [int(state.position) for state in states]
        self.starts = [self.starts[row] for row in order]
        self.starts += [int(state.document_start) for state in states]
        conv, layers = self.room
        self.conv, self.layers = conv[:rows], [layer.first(rows) for layer in layers]
        return self

    def buffers(self) -> list[Tensor]:
        """All of them; the first dimension is that of rows."""
        conv, layers = self.room
        return [conv, *(t for layer in layers for part in layer for t in part)]

    def make_room(self, rows: int, states: list[Any]) -> None:
        """Have buffers for so many rows; they double, so that a row is rarely copied."""
        if self.room and len(self.room[0]) >= rows:
            return
        old = self.buffers() if self.room else []
        self.empty = self.empty or states[0].select([])
        room = 1 << (rows - 1).bit_length()
        before, count, channels = self.live.taps.shape
        layers = []
        for layer in self.empty.layers:
            _, h, p, n = layer.ssm.shape
            _, a, w, f = layer.keys.shape
            shapes = [(n, h, p), layer.phase.shape[1:], (a, w + 1, f)]
            shapes += [] if layer.memory is None else [layer.memory.shape[1:]]
            pairs = [tuple(torch.zeros(room, *shape) for _ in range(2)) for shape in shapes]
            layers.append(LiveLayer(*pairs, *[()] * (4 - len(pairs))))
        self.room = torch.zeros(room, before + 1, count, channels), layers
        for new, full in zip(self.buffers(), old, strict=False):
            new[: len(full)] = full

    def put(self, row: int, state: Any) -> None:
        """Copy a ModelState of one row into the buffers."""
        if self.live.model.config.document_mask:
            state = state.forget_inputs()
        side, (conv, layers) = self.time % 2, self.room
        for layer, own in zip(state.layers, layers, strict=True):
            own.ssm[side][row] = layer.ssm[0].permute(2, 0, 1)
            own.phase[side][row] = layer.phase[0]
            for ring, cached in zip(own.cache, (layer.keys, layer.values), strict=True):
                ring[row] = F.pad(cached[0].float(), (0, 0, 1, 0)).roll(self.time, 1)
            if own.memory:
                own.memory[side][row] = layer.memory[0]
        tails = torch.stack([layer.conv[0] for layer in state.layers], 1).float()  # (k-1, L, ...)
        padded = torch.zeros_like(conv[row])  # (k, L, c)
        padded[1:, :, self.live.channels] = tails
        conv[row] = padded.roll(self.time, 0)

    @torch.inference_mode()
    def select(self, rows: list[int]) -> Any:
        """A ModelState of copies of some rows: as it was before a step that is not committed."""
        side, dtype = self.time % 2, self.live.dtype
        conv = self.conv[rows].roll(-self.time, 1)[:, 1:, :, self.live.channels].to(dtype)
        layers = []
        for i, (own, layer) in enumerate(zip(self.layers, self.empty.layers, strict=True)):
            keys, values = (
                ring[rows].roll(-self.time, 2)[:, :, 1:].to(dtype) for ring in own.cache
            )
            layers.append(
                layer._replace(
                    conv=conv[:, :, i].contiguous(),
                    ssm=own.ssm[side][rows].permute(0, 2, 3, 1).contiguous(),
                    phase=own.phase[side][rows],
                    keys=keys.contiguous(),
                    values=values.contiguous(),
                    memory=own.memory[side][rows] if own.memory else None,
                )
            )
        position, start = (
            torch.tensor([known[row] for row in rows]) for known in (self.positions, self.starts)
        )
        return replace(self.empty, layers=layers, position=position, document_start=start)

    def commit(self) -> None:
        """Make the state after the last step the current one."""
        self.time += 1
        self.positions = [position + 1 for position in self.positions]
        for row in self.ended:
            self.begin_document(row)

    @torch.inference_mode()
    def begin_document(self, row: int) -> None:
        """Erase what a document must not see of the one before; attention sees by its start."""
        self.starts[row] = self.positions[row]
        self.conv[row] = 0.0
        for layer in self.layers:
            for t in (*layer.ssm, *layer.memory):
                t[row] = 0.0

    @torch.inference_mode()
    def norms(self, rows: list[int]) -> list[list[Tensor]]:
        """Of each layer the norms of the SSM's heads (rows, h), and of the memory's (rows, a).

        They are those of the state after the last step, before `commit`.
        """
        side, ended = 1 - self.time % 2, [i for i, row in enumerate(rows) if row in self.ended]
        layers = []
        for layer in self.layers:
            parts = [matrix_norms(layer.ssm[side][rows].transpose(1, 2))]
            parts += [matrix_norms(t[rows]) for t in layer.memory[side : side + 1]]
            for norms in parts:
                norms[ended] = 0.0  # `commit` will erase their states
            layers.append(parts)
        return layers

    # A step ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, LiveBatch]:
        """The next id of each row (b,) -> hidden (b, 1, d), logits (b, v), gates (L, b, 1, 3).

        The batch is returned as well. Its state stays what it was until `commit`.
        """
        live, model = self.live, self.live.model
        x = F.embedding(ids, model.embedding.weight).float()  # (b, d)
        before, new = self.convolved(), self.conv[:, self.time % len(self.conv[0])]  # (b, L, c)
        cos, sin = rotary_factors(model, torch.tensor(self.positions))  # (b, f) each
        turn = cos[:, None, None], sin[:, None, None], self.hidden()
        gates = []
        for i, block in enumerate(live.blocks):
            inputs = before[:, i], live.newest[i], new[:, i]
            x, weights = self.step_block(block, self.layers[i], x, inputs, turn)
            gates.append(weights)
        if live.dtype != torch.float32:
            new.copy_(new.to(live.dtype))  # as exact as a state
        hidden = normalize(x, model.norm.eps, live.norm).to(live.dtype)
        ends = model.find_ends(ids)
        self.ended = [] if ends is None else ends.nonzero()[:, 0].tolist()
        logits = product(hidden, live.head, live.head_bias).float()
        return hidden[:, None], logits, torch.stack(gates)[:, :, None], self

    def convolved(self) -> Tensor:
        """What the convolutions owe to the inputs before, (b, L, c)."""
        ring = self.conv.unbind(1)
        total, *others = (ring[(self.time + 1 + i) % len(ring)] for i in range(len(ring) - 1))
        taps = self.live.taps
        total = total * taps[0]
        for inputs, tap in zip(others, taps[1:], strict=True):
            total.addcmul_(inputs, tap)
        return total

    def hidden(self) -> Tensor | None:
        """Which slots attention does not see, of bool (b, 1, w); None if it sees all."""
        ages = [at - start for at, start in zip(self.positions, self.starts, strict=True)]
        window = self.layers[0].cache[0].shape[2]
        if min(ages) >= window - 1:
            return None
        back = (self.time - torch.arange(window)) % window  # (w,) tokens since the slot was filled
        return back > torch.tensor(ages)[:, None, None]

    def step_block(
        self, block: LiveBlock, layer: LiveLayer, x: Tensor, inputs: tuple, turn: tuple
    ) -> tuple[Tensor, Tensor]:
        """x (b, d) -> new x, gates (b, 3); writes the new states and inputs of convolutions.

        inputs: of the convolutions, what they owe to the past (b, c), the factors of the newest
        (c,), and where to write those (b, c). turn: cos, sin and hidden slots.
        """
        live, parts, d = self.live, block.parts, x.shape[1]
        before, taps, new = inputs
        normed = normalize(x, parts.norm.eps, block.norm)  # (b, d)
        u = torch.addcmul(before[:, :d], normed, taps[:d])
        read = product(u.to(live.dtype), block.read, block.read_bias).float()  # (b, o)
        exact = F.linear(u, block.exact, block.exact_bias)  # (b, r + 3a)
        z, xs, convolved, half, up, raw, gates = read.split_with_sizes(live.sizes, 1)
        new[:, :d], new[:, d:] = normed, convolved
        convolved = torch.addcmul(before[:, d:], convolved, taps[d:])  # (b, 2n + 3d)
        BC, qkv = convolved[:, : -3 * d], convolved[:, -3 * d :]
        ssm = self.step_ssm(block, layer, (xs, BC, raw, exact))
        attention = self.step_attention(block, layer, (qkv, exact), turn)
        branches = (ssm * F.silu(z), attention, parts.mlp.activation(half) * up)
        gates = gates.softmax(-1)  # (b, 3)
        mixed = torch.cat(branches, 1).view(len(x), -1, d)
        mixed = mixed * gates.index_select(1, live.sources)[:, :, None]  # (b, 2e/d + 1, d)
        mix = product(mixed.flatten(1).to(live.dtype), block.write).float()
        if block.write_bias is not None:
            mix = mix.addmm(gates, block.write_bias)
        return torch.addcmul(x, mix, block.residual_scale), gates

    def step_ssm(self, block: LiveBlock, layer: LiveLayer, inputs: tuple) -> Tensor:
        """The SSM before its gate, (b, e).

        inputs: x (b, e), B and C (b, 2n), dt before its softplus (b, h), angles first (b, r + 3a).
        """
        x, BC, raw, exact = inputs
        side = self.time % 2
        old, new = layer.ssm[side], layer.ssm[1 - side]
        rows, states, heads, width = old.shape
        x = x.view(rows, 1, heads, width)
        dt = step_sizes(block.parts, raw, block.dt_bias, block.least)  # (b, h)
        decay = (dt * block.A).exp_()[:, None, :, None]  # (b, 1, h, 1)
        half_turns = F.hardtanh(F.softshrink(exact[:, : layer.phase[0].shape[1]], 0.5))
        phase = (layer.phase[side] + half_turns).remainder_(2).remainder_(2)  # the first may be 2
        layer.phase[1 - side].copy_(phase)
        B, C = rotate(BC.view(rows, 2, states), phase).chunk(2, dim=1)  # (b, 1, n) each
        torch.mul(old, decay, out=new)
        new = new.view(rows, states, heads * width)
        new.addcmul_(B.mT, (x * dt[:, None, :, None]).view(rows, 1, -1))
        y = torch.bmm(C, new).view_as(x)
        return torch.addcmul(y, x, block.D).view(rows, -1)

    def step_attention(
        self, block: LiveBlock, layer: LiveLayer, inputs: tuple, turn: tuple
    ) -> Tensor:
        """Attention and memory: q, k, v (b, 3d) and what the memory reads (b, r + 3a) -> (b, d)."""
        qkv, exact = inputs
        cos, sin, hidden = turn
        keys, values = layer.cache
        rows, heads, window, width = keys.shape
        qk, v = qkv.view(rows, 3, heads, width).split_with_sizes([2, 1], 1)
        qk = normalize(qk, block.parts.attention.q_norm.eps, block.head_norms)  # (b, 2, a, f)
        turned = torch.addcmul(qk * cos, qk.roll(width // 2, -1), sin)
        for ring, fresh in ((keys, turned[:, 1]), (values, v[:, 0])):  # (b, a, f) each
            ring[:, :, self.time % window] = fresh.to(self.live.dtype)
        y = attend(turned[:, 0] * width**-0.5, keys, values, hidden)  # (b, a, f)
        if layer.memory:
            old, new = layer.memory[self.time % 2], layer.memory[1 - self.time % 2]
            raw, v = exact[:, -3 * heads :], v.transpose(1, 2)  # (b, a, 1, f)
            y = y + step_memory(block.parts.memory, raw, qk, v, old, new)[0][:, :, 0]
        return y.flatten(1)


def matrix_norms(heads: Tensor) -> Tensor:
    """The Frobenius norms (b, h) of one matrix per head (b, h, m, n), float32."""
    return torch.linalg.vector_norm(heads, dim=(2, 3), dtype=torch.float32)


def attend(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """Attention of q (b, a, f), scaled, to keys and values (b, a, w, f): (b, a, f).

    Two products read memory faster here than PyTorch's fused kernel.
    """
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    scores = torch.bmm(q.view(-1, 1, q.shape[2]), keys.mT).view(*q.shape[:2], -1)  # (b, a, w)
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    weights = scores.softmax(-1).view(-1, 1, scores.shape[2])
    return torch.bmm(weights, values).view_as(q)
