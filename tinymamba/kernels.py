"""Hand-written forward and backward passes, where PyTorch's own are slow; quantized layers.

`ChunkedScan` is the parallel form of `scan_sequential` in testv2.py, which is its reference,
`ResidualConv` a causal convolution, `ChunkedLoss` a loss whose logits are never all in memory, and
`QuantizedLinear` a linear layer of integer weights. All are plain PyTorch, on every device. Time
them with

    python -m benchmarks.scan
    python -m benchmarks.quantize

Dimension letters in the comments on shapes:
    b batch      l length        d channels            h SSM heads  p SSM head width
    n d_state    k d_conv        q chunk_size          c chunks (l / q)   v vocabulary
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from tinymamba.cli import UserError, require
from tinymamba.four_bit import FEW_ROWS as FEW_TILED_ROWS
from tinymamba.four_bit import (
    codes_of_tiles,
    factors_of_tiles,
    tiled_product,
    to_tiles,
    why_not_tiled,
)

# ------------------------------------------------------------------------------------ scan

CPU_TILE, GPU_TILE = 2048, 65_536  # tokens whose intermediate values are in memory at a time
# exp(-30) is 1e-13, which erases the state in float32. With no term below it, differences of a
# chunk's cumulative sums are exact to 1e-4 even where every token erases the past.
MIN_LOG_DECAY = -30.0
GROUP = 64  # chunks whose states one product computes
SCAN_PART = 128  # tokens of a cumulative sum that Inductor does not split
SMALLEST_DT = 1e-20  # takes the place of 0 in a backward pass, which divides by dt
Tiles = tuple[list[slice], list[slice]]  # slices of rows and of chunks


class ChunkedScan(torch.autograd.Function):
    """`selective_scan` in matrix products over chunks of q tokens (arXiv 2405.21060, section 6).

    One tile of chunks goes through all steps before the next tile, so that the intermediate values
    stay in the cache. They are kept for the backward pass, but a compiled one computes them again.
    Shapes are those of `selective_scan`, but states are (b, h, n, p).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        """The y (b, l, h, p) and the last state (b, h, n, p)."""
        keeps = keeps_tiles(ctx)
        dt = dt.clamp(min=SMALLEST_DT) if ctx.needs_input_grad[1] else dt
        inputs = to_chunks(chunk_size, x, dt, log_decay, B, C)

        def step(tile: list[Tensor], h: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
            t = make_tile(tile, D, h)
            return *tile_forward(t), t if keeps else [h]

        y, last, kept = forward_over_tiles(step, tiles(inputs[0]), inputs, state)
        ctx.save_for_backward(x, dt, log_decay, B, C, D, *itertools.chain(*kept))
        ctx.chunk_size = chunk_size
        return y.flatten(1, 2)[:, : x.shape[1]], last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, in their order."""
        x, dt, log_decay, B, C, D, *kept = ctx.saved_tensors
        inputs = to_chunks(ctx.chunk_size, x, dt, log_decay, B, C)
        [dy] = to_chunks(ctx.chunk_size, dy)
        over, dD = tiles(inputs[0]), torch.zeros_like(D)

        def step(
            tile: list[Tensor], kept: Sequence[Tensor], dy: Tensor, dh: Tensor
        ) -> tuple[Tensor, ...]:
            t = Tile(*kept) if len(kept) > 1 else make_tile(tile, D, *kept)
            *parts, part_D, dh = tile_backward(t, dy, dh)
            dD.add_(part_D)
            return *parts, dh

        kept = by_tile(kept, over)
        grads, dstate = backward_over_tiles(step, over, inputs, kept, dy, dlast)
        grads = [grad.flatten(1, 2)[:, : x.shape[1]] for grad in grads]
        return *grads, dD, dstate, None


def scan_in_one_tile(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The forward pass of ChunkedScan without a loop over tiles: one graph for every length."""
    length = x.shape[1]
    y, last = tile_forward(make_tile(to_chunks(chunk_size, x, dt, log_decay, B, C), D, state))
    return y.flatten(1, 2)[:, :length], last


def bounded_decay(log_decay: Tensor, resets: Tensor | None) -> Tensor:
    """log_decay (b, l, h), none below MIN_LOG_DECAY, and that one at `resets`, of bool (b, l)."""
    log_decay = log_decay.clamp(min=MIN_LOG_DECAY)
    return log_decay if resets is None else log_decay.masked_fill(resets[..., None], MIN_LOG_DECAY)


def running_phase(half_turns: Tensor, phase: Tensor | None) -> Tensor:
    """Cumulative sum of half_turns (b, l, r), plus the phase before, modulo 2.

    Whole half turns add up exactly. Other angles are summed in float64 (not on MPS), so that their
    error does not grow with the text.
    """
    wide = half_turns.mT  # a scan over the last dimension is fast on a GPU
    wide = wide if wide.device.type == "mps" else wide.double()
    total = running_sum(wide)
    total = total if phase is None else total + phase[..., None]
    return total.remainder(2).to(half_turns.dtype).remainder(2).mT  # rounding may have made it 2


def running_sum(x: Tensor) -> Tensor:
    """Cumulative sum over the last dimension of x (b, r, l).

    A compiled graph sums parts of SCAN_PART tokens first. Inductor would split one long scan of so
    few rows, and with PyTorch 2.11 that fails if its kernel adds a bias (that of angle_proj).
    """
    length = x.shape[-1]
    in_parts = torch.compiler.is_compiling() and not is_writing_graph()
    if not in_parts or not isinstance(length, int) or length <= SCAN_PART:
        return x.cumsum(-1)
    parts = F.pad(x, (0, -length % SCAN_PART)).unflatten(-1, (-1, SCAN_PART)).cumsum(-1)
    before = F.pad(parts[..., :-1, -1], (1, 0)).cumsum(-1)  # (b, r, parts)
    return (parts + before[..., None]).flatten(-2)[..., :length]


def is_writing_graph() -> bool:
    """Whether torch.export or torch.jit.trace records a graph for inputs of any length."""
    # torch.compile of PyTorch 2.11 takes torch.compiler.is_exporting() for True.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def is_in_graph() -> bool:
    """Whether a compiler or an exporter records the operations: it takes the plain formulas."""
    return torch.compiler.is_compiling() or is_writing_graph()


def promoted(x: Tensor) -> torch.dtype:
    """float32, or float64 if x is: the dtype in which sums are exact enough."""
    return torch.promote_types(x.dtype, torch.float32)


def count_blocks(length: int, size: int) -> int:
    """How many blocks of a size hold a length; at least two while a graph is recorded.

    torch.export would take a single block for a constant.
    """
    return (length + size - 1) // size + (1 if is_writing_graph() else 0)


def to_chunks(chunk_size: int, *tensors: Tensor) -> list[Tensor]:
    """(b, l, ...) -> (b, c, q, ...), padded with zeros, which leave the state as it is."""
    length = tensors[0].shape[1]
    count = count_blocks(length, chunk_size)
    pad = count * chunk_size - length
    needs_pad = is_writing_graph() or pad > 0
    padded = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) if needs_pad else t for t in tensors)
    return [t.unflatten(1, (count, chunk_size)) for t in padded]


def tiles(x: Tensor) -> Tiles:
    """Slices of rows and of chunks of x (b, c, q, h, p) that make up the tiles.

    On a CPU a tile fits the cache. A GPU wants few and large ones; torch.compile wants one, as it
    unrolls the loop over tiles.
    """
    batch, chunks, size = x.shape[:3]
    if torch.compiler.is_compiling():
        return [slice(0, batch)], [slice(0, chunks)]
    tokens = CPU_TILE if x.device.type == "cpu" else GPU_TILE
    span = min(max(1, tokens // size), chunks)
    row = max(1, tokens // (size * span))
    rows = [slice(i, i + row) for i in range(0, batch, row)]
    return rows, [slice(i, i + span) for i in range(0, chunks, span)]


def keeps_tiles(ctx: Any) -> bool:
    """Whether a forward pass keeps all of its tiles, or only the states before them.

    A compiled graph computes a tile again in less time than it takes to read it.
    """
    return ctx.needs_input_grad[0] and not is_in_graph()


def by_tile(kept: Sequence[Tensor], tiles: Tiles) -> list[Sequence[Tensor]]:
    """What was kept of each tile, from that of all tiles in one row."""
    rows, spans = tiles
    width = len(kept) // (len(rows) * len(spans))
    return [kept[i : i + width] for i in range(0, len(kept), width)]


def forward_over_tiles(
    step: Callable[..., tuple[Any, ...]], tiles: Tiles, inputs: list[Tensor], state: Tensor
) -> tuple[Tensor, Tensor, list[Sequence[Tensor]]]:
    """`step` for one tile after the other: (its inputs, state before) -> y, state after, kept.

    Returns y (b, c, q, h, p), the last state, and what each tile keeps for its backward pass.
    """
    y, last, kept = torch.empty_like(inputs[0]), torch.empty_like(state), []
    rows, spans = tiles
    for row in rows:
        h = state[row]
        for span in spans:
            y[row, span], h, part = step([t[row, span] for t in inputs], h)
            kept.append(part)
        last[row] = h
    return y, last, kept


def backward_over_tiles(
    step: Callable[..., tuple[Tensor, ...]],
    tiles: Tiles,
    inputs: list[Tensor],
    kept: list[Sequence[Tensor]],
    dy: Tensor,
    dlast: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """`step` for the tiles in reverse: (inputs, kept, dy, dstate after) -> all gradients.

    Returns the gradients of `inputs` and of the first state.
    """
    grads, dstate = [torch.empty_like(t) for t in inputs], torch.empty_like(dlast)
    rows, spans = tiles
    for row in reversed(rows):
        dh = dlast[row]
        for span in reversed(spans):
            tile = [t[row, span] for t in inputs]
            *parts, dh = step(tile, kept.pop(), dy[row, span], dh)
            for grad, part in zip(grads, parts, strict=True):
                grad[row, span] = part
        dstate[row] = dh
    return grads, dstate


class Tile(NamedTuple):
    """Values of one tile that both passes need."""

    x: Tensor  # (b, h, c, q, p)
    dt: Tensor  # (b, h, c, q), and
    log_decay: Tensor
    B: Tensor  # (b, 1, c, q, n), and
    C: Tensor
    between: Tensor  # (b, h, c, q, q) decay from token j to i, times dt_j
    similarity: Tensor  # (b, 1, c, q, q) C_i . B_j
    scores: Tensor  # (b, h, c, q, q) factor of x_j in y_i
    from_start: Tensor  # (b, h, c, q, 1) decay since the start of the chunk
    to_end: Tensor  # (b, h, c, q, 1) decay until its end, times dt
    reads: Tensor  # (b, h, c, q, n) C times from_start: reads the state before the chunk
    writes: Tensor  # (b, h, c, q, n) B times to_end: writes the state after the chunk
    states: Tensor  # (b, h, c+1, n, p) before each chunk, and after the last


def make_tile(inputs: list[Tensor], D: Tensor, state: Tensor) -> Tile:
    """The values of a tile, from the state (b, h, n, p) before it.

    inputs: x (b, c, q, h, p), dt and log_decay (b, c, q, h), B and C (b, c, q, n).
    """
    x, dt, log_decay = heads_first(*inputs[:3])
    B, C = (t[:, None] for t in inputs[3:])
    total = log_decay.cumsum(-1)  # (b, h, c, q)
    between = total[..., :, None] - total[..., None, :]
    future = torch.full_like(between[0, 0, 0], -math.inf).triu(1)
    between = torch.minimum(between, future).exp_().mul_(dt[..., None, :]).to(x.dtype)
    similarity = C @ B.mT
    scores = similarity * between
    if is_writing_graph():  # export allows no in-place write to a view
        scores = scores + D[:, None, None, None] * torch.eye(scores.shape[-1], device=D.device)
    else:
        scores.diagonal(dim1=-2, dim2=-1).add_(D[:, None, None])
    from_start = total.exp()[..., None]
    to_end = ((total[..., -1:] - total).clamp(max=0).exp() * dt)[..., None]
    reads, writes = (C * from_start).to(x.dtype), (B * to_end).to(x.dtype)
    states = carry(total[..., -1], (writes.mT @ x).to(state.dtype), state)
    given = (x, dt, log_decay, B, C)
    return Tile(*given, between, similarity, scores, from_start, to_end, reads, writes, states)


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(b, c, q, h, ...) -> (b, h, c, q, ...)."""
    return tuple(t.movedim(3, 1).contiguous() for t in tensors)


def tile_forward(t: Tile) -> tuple[Tensor, Tensor]:
    """The y (b, c, q, h, p) and the last state of one tile."""
    y = sum_of_products((t.scores, t.x), (t.reads, t.states[:, :, :-1].to(t.x.dtype)))
    return y.movedim(1, 3), t.states[:, :, -1]


def tile_backward(t: Tile, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the inputs of `make_tile`, from those of y and the last state."""
    x, dt, log_decay, B, C, *_ = t
    [dy] = heads_first(dy)

    dread_states = (t.reads.mT @ dy).to(t.states.dtype)  # (b, h, c, n, p)
    dstates = carry_back(log_decay.sum(-1), dread_states, dlast)  # (b, h, c+1, n, p)
    after = dstates[:, :, 1:].to(x.dtype)
    dx = sum_of_products((t.scores.mT, dy), (t.writes, after))

    dscores = dy @ x.mT  # (b, h, c, q, q)
    dD = dscores.diagonal(dim1=-2, dim2=-1).sum((0, 2, 3), dtype=dt.dtype)
    dscores = dscores.mul_(t.between)
    dsimilarity = dscores.sum(1, keepdim=True)  # (b, 1, c, q, q)
    dreads = (dy @ t.states[:, :, :-1].to(x.dtype).mT).to(dt.dtype)  # (b, h, c, q, n)
    dwrites = (x @ after.mT).to(dt.dtype)
    dC = dsimilarity @ B + (dreads * t.from_start).sum(1, keepdim=True)
    dB = dsimilarity.mT @ C + (dwrites * t.to_end).sum(1, keepdim=True)

    # Every decay is the exponential of a sum of logarithms, so its gradient is value * gradient.
    weight = dscores.mul_(t.similarity).to(dt.dtype)
    read = weight.sum(-1) + (dreads * t.reads).sum(-1)  # (b, h, c, q)
    written = weight.sum(-2) + (dwrites * t.writes).sum(-1)
    dtotal = read - written
    dtotal[..., -1] += (dstates[:, :, 1:] * t.states[:, :, 1:]).sum((-2, -1))
    dlog_decay = dtotal.flip(-1).cumsum(-1).flip(-1)
    ddt = written / dt.clamp(min=SMALLEST_DT)  # to_chunks pads with 0
    dx, ddt, dlog_decay = (g.movedim(1, 3) for g in (dx, ddt, dlog_decay))
    return dx, ddt, dlog_decay, dB[:, 0], dC[:, 0], dD, dstates[:, :, 0]


def carry(log_decay: Tensor, written: Tensor, state: Tensor) -> Tensor:
    """States between chunks, (b, h, c+1, n, p): before the first chunk, then after each one.

    log_decay (b, h, c) is the sum over each chunk; written (b, h, c, n, p), state (b, h, n, p).
    The work of `carry_in_group` grows with the square of the number of chunks. Many chunks are
    therefore split into groups: first from group to group, then inside of all groups at once.
    """
    batch, _, count = log_decay.shape
    if is_writing_graph() or count <= GROUP:
        return carry_in_group(log_decay, written, state)
    pad = -count % GROUP  # with zeros, which leave the state as it is
    log_decay = F.pad(log_decay, (0, pad)).unflatten(2, (-1, GROUP))  # (b, h, groups, 64)
    written = F.pad(written, (0, 0) * 2 + (0, pad)).unflatten(2, (-1, GROUP))
    # From the end of each chunk to the end of its group.
    later = F.pad(log_decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    total = (later.exp()[..., None, None] * written).sum(3)  # (b, h, groups, n, p)
    begins = carry(log_decay.sum(-1), total, state)  # (b, h, groups+1, n, p)
    parts = (log_decay, written, begins[:, :, :-1])
    rows = (t.transpose(1, 2).flatten(0, 1) for t in parts)  # groups are rows of the batch
    inside = carry_in_group(*rows)[:, :, :-1].unflatten(0, (batch, -1))
    inside = inside.transpose(1, 2).flatten(2, 3)[:, :, :count]
    return torch.cat((inside, begins[:, :, -1:]), dim=2)


def carry_back(log_decay: Tensor, dread: Tensor, dlast: Tensor) -> Tensor:
    """The gradients (b, h, c+1, n, p) of the states before each chunk, and of the last state.

    dread (b, h, c, n, p) are those by what each chunk reads: `carry`, backwards in time.
    """
    if log_decay.shape[2] > GROUP:
        return carry(log_decay.flip(2), dread.flip(2), dlast).flip(2)
    return apply_decay(chunk_decay(log_decay).mT, torch.cat((dread, dlast[:, :, None]), dim=2))


def carry_in_group(log_decay: Tensor, written: Tensor, state: Tensor) -> Tensor:
    """The same as `carry`, in one product."""
    return apply_decay(chunk_decay(log_decay), torch.cat((state[:, :, None], written), dim=2))


def chunk_decay(log_decay: Tensor) -> Tensor:
    """The decay (b, h, c+1, c+1) from the end of chunk j - 1 to that of chunk i - 1, 0 if i < j.

    The sum over a chunk can be in the thousands, so sums from chunk j to i are added up one by one:
    a difference of two cumulative sums would lose all digits.
    """
    steps = F.pad(log_decay, (1, 0))[..., None]  # (b, h, c+1, 1)
    steps = steps.expand(-1, -1, -1, steps.shape[2])
    sums = steps.masked_fill(~lower_triangle(steps, -1), 0.0).cumsum(2)  # (b, h, c+1, c+1)
    return sums.masked_fill(~lower_triangle(sums), -math.inf).exp()


def apply_decay(decay: Tensor, sources: Tensor) -> Tensor:
    """The sums of sources (b, h, c+1, n, p), weighted by decay (b, h, c+1, c+1)."""
    return (decay @ sources.flatten(3)).view_as(sources)


def sum_of_products(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of a @ b (..., i, k) over pairs a (..., i, j) and b (..., j, k)."""
    (first, second), *rest = pairs
    total = first @ second
    if is_writing_graph():  # export allows no in-place write to a view
        return sum((a @ b for a, b in rest), total)
    flat = total.flatten(0, -3)
    for a, b in rest:
        flat.baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    return total


def lower_triangle(x: Tensor, diagonal: int = 0) -> Tensor:
    """Where column j <= row i + diagonal: bool of the last two dimensions of x."""
    return torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril(diagonal)


def running_max(x: Tensor) -> Tensor:
    """Cumulative maximum of x (b, l). ONNX has no cummax, so a graph uses an (l, l) table."""
    if not is_writing_graph():
        return x.cummax(dim=1).values
    table = x[:, None].expand(-1, x.shape[1], -1)  # (b, l, l)
    return table.masked_fill(~lower_triangle(table), torch.iinfo(x.dtype).min).amax(-1)


def sparsemax(logits: Tensor) -> Tensor:
    """Projection onto the probability simplex (Martins & Astudillo, arXiv 1602.02068, alg. 1)."""
    logits = logits - logits.amax(-1, keepdim=True)  # changes nothing but the rounding
    ordered = logits.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
    sums = ordered.cumsum(-1) - 1
    support = (ordered * ranks > sums).sum(-1, keepdim=True)
    threshold = sums.gather(-1, support - 1) / support
    return (logits - threshold).clamp(min=0)


# ------------------------------------------------------------------------------------ convolution


class ResidualConv(torch.autograd.Function):
    """u plus its causal depthwise convolution: u (b, l, d), weight (d, k) -> (b, l, d).

    tail (b, k-1, d) or None are the inputs before u. PyTorch's own backward pass takes seven times
    as long on a CPU for one long row as for several.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, tail: Tensor | None, weight: Tensor) -> Tensor:
        """The sum, in the dtype of u."""
        history = with_tail(u, tail, weight.shape[1] - 1)
        ctx.save_for_backward(history, weight)
        ctx.tail_dtype = None if tail is None else tail.dtype
        with torch.autocast(u.device.type, enabled=False):
            return depthwise(history, weight).add_(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of u, tail and weight."""
        history, weight = ctx.saved_tensors
        past = weight.shape[1] - 1
        before = past if ctx.needs_input_grad[1] else 0
        dhistory = depthwise(F.pad(dy, (0, 0, before, past)), weight.flip(1))
        dtail = dhistory[:, :before].to(ctx.tail_dtype) if before else None
        dweight = taps_gradient(history, dy, past + 1)
        return dhistory[:, before:] + dy, dtail, dweight.to(weight.dtype)


def with_tail(u: Tensor, tail: Tensor | None, past: int) -> Tensor:
    """u (b, l, d) after its tail (b, past, d), or after zeros."""
    if tail is None:
        return F.pad(u, (0, 0, past, 0))
    return torch.cat((tail.to(u.dtype), u), dim=1)


def taps_gradient(history: Tensor, dy: Tensor, width: int) -> Tensor:
    """The gradient (d, k) of a convolution's weight, from history (b, k-1+l, d) and dy (b, l, d).

    The products of one part of a row are in memory at a time, and stay in the cache.
    """
    if dy.device.type != "cpu" or torch.compiler.is_compiling():
        taps = (history[:, k : k + dy.shape[1]] for k in range(width))
        return torch.stack([(dy * tap).sum((0, 1), dtype=promoted(dy)) for tap in taps], dim=1)
    span = min(dy.shape[1], CPU_TILE)
    products = dy.new_empty(width, span, dy.shape[2])
    total = dy.new_zeros(products.shape[::2], dtype=promoted(dy))
    for row, drow in zip(history, dy, strict=True):
        for part in range(0, len(drow), span):
            d = drow[part : part + span]
            windows = row[part : part + len(d) + width - 1].unfold(0, len(d), 1).mT  # (k, span, d)
            total += torch.mul(d, windows, out=products[:, : len(d)]).sum(1)
    return total.T


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """The causal convolution of x (b, k-1+l, d) with weight (d, k): (b, l, d).

    On a CPU, and in an exported graph, depthwise conv2d on a height-1 image in channels-last layout
    is fastest; on a GPU, and in a compiled graph, a sum of k products.
    """
    if is_writing_graph() or (x.device.type == "cpu" and not torch.compiler.is_compiling()):
        return F.conv2d(x.mT.unsqueeze(2), weight[:, None, None], groups=len(weight)).squeeze(2).mT
    length = x.shape[1] - weight.shape[1] + 1
    first, *rest = (x[:, k : k + length] * weight[:, k] for k in range(weight.shape[1]))
    return sum(rest, first)


# ------------------------------------------------------------------------------------ loss


class ChunkedLoss(torch.autograd.Function):
    """The sum of the cross entropies of many tokens, with the logits of a few in memory at a time.

    hidden (tokens, d), weight (v, d) of the output layer, targets (tokens,), of which -100 do not
    count. `step` is `loss_and_gradients`, or its compiled form. The gradients are computed in the
    forward pass, where the logits are: else these would be kept, or computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, step: Callable, chunk: int
    ) -> Tensor:
        """The sum, float32 (float64 if weight is)."""
        wide = promoted(weight)
        total, narrow = weight.new_zeros((), dtype=wide), weight.to(hidden.dtype)
        dhidden, dweight, learns = [], None, ctx.needs_input_grad[1]
        # Nothing is changed in place: torch.compile of PyTorch 2.11 would lose it.
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            loss, dh, dw = step(h, narrow, t, learns)
            total = total + loss
            dhidden.append(dh)
            if learns:
                dweight = dw.to(wide) if dweight is None else dweight + dw
        ctx.save_for_backward(torch.cat(dhidden), dweight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of hidden and weight."""
        dhidden, dweight = ctx.saved_tensors
        dhidden = (dhidden * dtotal).to(dhidden.dtype)
        dweight = None if dweight is None else (dweight * dtotal).to(ctx.dtype)
        return dhidden, dweight, None, None, None


def in_chunks(f: Callable[..., Tensor], size: int, *parts: Tensor) -> Iterator[Tensor]:
    """f of `size` rows of all parts (tokens, ...) at a time, computed again in a backward pass."""
    for pieces in zip(*(part.split(size) for part in parts), strict=True):
        yield recompute_in_backward(f, *pieces, use_reentrant=False)


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, learns: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The summed cross entropy, its gradient by hidden, and by weight (None unless it learns)."""
    logits = (hidden @ weight.mT).to(promoted(hidden))
    known = (targets != -100)[:, None]
    index = targets[:, None].masked_fill(~known, 0)
    largest, right = logits.amax(-1, keepdim=True), logits.gather(1, index)
    dlogits = logits.softmax(-1)  # (tokens, v); its largest value gives the logarithm of the sum
    loss = ((largest - dlogits.amax(-1, keepdim=True).log() - right) * known).sum()
    dlogits = dlogits.scatter_add_(1, index, torch.full_like(right, -1.0)).to(hidden.dtype)
    return loss, (dlogits @ weight) * known, dlogits.mT @ (hidden * known) if learns else None


# ------------------------------------------------------------------------------ quantization

FEW_ROWS = 32  # with more rows, weight_only layers multiply by the dequantized weight
CACHE = 1 << 20  # bytes of codes that fit the cache of a CPU core
# Without VNNI instructions int8 products are slow on a CPU, or their sums are rounded.
MULTIPLIES_BYTES = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()


class QuantizedLinear(nn.Module):
    """A linear layer with the weight (out, in) codes * scale: int8 codes, and a scale per row.

    With 8 bits a code is from -127 to 127. With 4 bits it is a number from -8 to 7 times the
    integer factor of its group, which fits a byte again (as in QServe, arXiv 2405.04532). `tile`
    lets 4-bit codes take half a byte, where PyTorch has a kernel for them; elsewhere int8 products
    serve both. In mode `dynamic` activations are rounded to int8 with a scale per token; in mode
    `weight_only` they are not.
    """

    codes: Tensor  # (out, in) int8, if not tiled
    scale: Tensor  # (out,) float32
    factors: Tensor  # (out, groups) int8, only with 4 bits that are not tiled
    tiles: Tensor  # (rows, in/2) uint8 and
    tile_factors: Tensor  # (groups, rows, 2) bfloat16: codes and factors as the kernel takes them

    def __init__(self, d_in: int, d_out: int, bias: bool, bits: int, mode: str, group_size: int):
        super().__init__()
        self.in_features, self.out_features, self.bits = d_in, d_out, bits
        self.dynamic = mode == "dynamic"
        self.register_buffer("codes", torch.zeros(d_out, d_in, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(d_out))
        if bits == 4:
            groups = torch.ones(d_out, d_in // group_size, dtype=torch.int8)
            self.register_buffer("factors", groups)
        self.bias = nn.Parameter(torch.zeros(d_out), requires_grad=False) if bias else None

    def fill(self, codes: Tensor, scale: Tensor, factors: Tensor | None) -> None:
        """Take over the numbers of `quantize.quantize_weight`; the layer is not tiled."""
        self.codes.copy_(codes)
        self.scale.copy_(scale)
        if factors is not None:
            self.factors.copy_(factors)

    @property
    def is_tiled(self) -> bool:
        """Whether 4-bit codes are in the layout of PyTorch's kernel."""
        return "tiles" in self._buffers

    def tile(self) -> None:
        """Hold 4-bit codes as PyTorch's kernel takes them, if it has one for them."""
        if self.bits == 8 or self.is_tiled or why_not_tiled(self.codes, self.factors):
            return
        tiles, factors = to_tiles(self.codes, self.factors)
        del self.codes, self.factors
        self.register_buffer("tiles", tiles, persistent=False)
        self.register_buffer("tile_factors", factors, persistent=False)

    def untile(self) -> None:
        """The opposite of `tile`."""
        if self.is_tiled:
            codes, factors = self.get_codes(), self.get_factors()
            del self.tiles, self.tile_factors
            self.register_buffer("codes", codes.contiguous())
            self.register_buffer("factors", factors.contiguous())

    def get_codes(self) -> Tensor:
        """The codes (out, in), int8."""
        if not self.is_tiled:
            return self.codes
        return codes_of_tiles(self.tiles, self.tile_factors, self.out_features)

    def get_factors(self) -> Tensor:
        """The factors (out, groups) of 4-bit codes, int8."""
        if not self.is_tiled:
            return self.factors
        return factors_of_tiles(self.tile_factors, self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        scale, tiles = self.scale, {}
        if self.is_tiled and fn(scale).device.type == "cpu":  # of any dtype, tiles stay as they are
            tiles = {name: self._buffers.pop(name) for name in ("tiles", "tile_factors")}
        self.untile()
        super()._apply(fn, recurse)
        self._buffers |= tiles
        if self.scale.dtype != scale.dtype:  # float32 in a model of any dtype
            self.scale = scale.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_tiled:
            destination[f"{prefix}codes"] = self.get_codes()
            destination[f"{prefix}factors"] = self.get_factors()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Also of codes that are still packed, so that not all layers' are unpacked at once."""
        self.untile()
        codes, factors = (state_dict.get(f"{prefix}{name}") for name in ("codes", "factors"))
        if codes is not None and codes.dtype == torch.uint8 and factors is not None:
            state_dict = {**state_dict, f"{prefix}codes": self.unpack(codes, factors)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.tile()

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (out, in), float32."""
        return dequantize(self.get_codes(), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        learning = torch.is_grad_enabled() and x.requires_grad
        product: Any = QuantizedProduct.apply if learning else quantized_product
        weights = (self.tiles, self.tile_factors) if self.is_tiled else (self.codes, None)
        return product(x, *weights, self.scale, self.bias, self.dynamic)

    def pack(self) -> Tensor:
        """The codes as files hold them: uint8 (out, in/2) for 4 bits, int8 (out, in) for 8."""
        return self.codes if self.bits == 8 else pack(self.get_codes(), self.get_factors())

    def unpack(self, packed: Tensor, factors: Tensor | None) -> Tensor:
        """The opposite of `pack`; `factors` (out, groups) are those of the file, with 4 bits."""
        return packed if factors is None else unpack(packed, factors)

    def extra_repr(self) -> str:
        """What print(model) shows of the layer."""
        text = f"{self.in_features}, {self.out_features}, bits={self.bits}, dynamic={self.dynamic}"
        return text if self.bits == 8 else f"{text}, tiled={self.is_tiled}"


class QuantizedProduct(torch.autograd.Function):
    """`quantized_product` that keeps no dequantized weight for its backward pass.

    The gradient ignores the rounding of activations (straight-through).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        factors: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        dynamic: bool,
    ) -> Tensor:
        """The product."""
        ctx.save_for_backward(codes, factors, scale)
        ctx.dtype = x.dtype
        return quantized_product(x, codes, factors, scale, bias, dynamic)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x, and None for the rest."""
        codes, factors, scale = ctx.saved_tensors
        codes = codes if factors is None else codes_of_tiles(codes, factors, len(scale))
        dx = dy @ dequantize(codes, scale).to(dy.dtype)
        return dx.to(ctx.dtype), None, None, None, None, None


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (out, in) and scales (out,) -> the weight (out, in), float32."""
    return codes.float() * scale[:, None]


def quantized_product(
    x: Tensor,
    codes: Tensor,
    factors: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    dynamic: bool,
) -> Tensor:
    """x (..., in) times the transpose of codes * scale (out, in), plus bias (out,): (..., out).

    `factors` are there if the codes are in tiles. These multiply no float64.
    """
    rows = x.numel() // x.shape[-1]
    on_cpu = x.device.type == "cpu" and rows > 0 and not is_writing_graph()
    tiled = factors is not None and on_cpu and x.dtype != torch.float64
    if tiled and not dynamic:
        y = tiled_product(x.reshape(rows, -1), codes, factors, len(scale))
        y = y * scale if bias is None else torch.addcmul(bias.float(), y, scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)
    if factors is not None and not (tiled and rows <= FEW_TILED_ROWS):
        codes, tiled = codes_of_tiles(codes, factors, len(scale)), False
    int8 = MULTIPLIES_BYTES and on_cpu and (dynamic or rows <= FEW_ROWS)
    if not tiled and not int8:
        return dequantized_product(x, codes, scale, bias, dynamic)
    wide = x.reshape(rows, -1).float()
    steps, step = to_bytes(wide)
    if tiled:
        y = tiled_product(steps, codes, factors, len(scale))  # (rows, out)
    elif dynamic:
        y = torch._int_mm(steps.to(torch.int8), codes.t())
    else:
        y = int8_product(wide, steps, step, codes)
    y = y * scale
    y = y * step if bias is None else torch.addcmul(bias.float(), y, step)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def dequantized_product(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool
) -> Tensor:
    """The same in products of the dtype of x, on every device."""
    if dynamic:
        steps, step = to_bytes(x.float())
        x = (steps * step).to(x.dtype)
    weight = dequantize(codes, scale).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def int8_product(x: Tensor, steps: Tensor, step: Tensor, codes: Tensor) -> Tensor:
    """x (rows, in) / step times the transpose of codes: (rows, out). `steps` is x / step rounded.

    A second int8 holds the rounding error. Its products find the codes in the cache.
    """
    first = steps.to(torch.int8)
    rest = (x / step).sub_(steps).mul_(254).round_().to(torch.int8)
    parts = codes.t().split(max(1, CACHE // codes.shape[1]), dim=1)
    pairs = [(torch._int_mm(first, part), torch._int_mm(rest, part)) for part in parts]
    high, low = (torch.cat(products, dim=1) for products in zip(*pairs, strict=True))
    return high + low / 254


def to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., in) rounded to integers from -127 to 127, still floating, and their step (..., 1)."""
    step = torch.linalg.vector_norm(x, math.inf, -1, keepdim=True).clamp(min=1e-30) / 127
    return (x / step).round(), step


def pack(codes: Tensor, factors: Tensor) -> Tensor:
    """Codes of 4 bits (out, in) and the factors of their groups -> uint8 (out, in/2)."""
    size = codes.shape[1] // factors.shape[1]
    numbers = (codes.unflatten(1, (-1, size)) // factors[..., None]).flatten(1) + 8  # 0 to 15
    low, high = numbers.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return low | high << 4


def unpack(packed: Tensor, factors: Tensor) -> Tensor:
    """The opposite of `pack`."""
    numbers = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1).to(torch.int8) - 8
    size = numbers.shape[1] // factors.shape[1]
    return (numbers.unflatten(1, (-1, size)) * factors[..., None]).flatten(1)


QUANTIZATION_FORMAT = 1
QUANTIZATION_MODES = ("dynamic", "weight_only")


def quantize_like(model: Any, scheme: dict) -> None:
    """Replace the linear layers that a scheme names by empty quantized ones.

    `scheme` is what config.json holds as "quantization"; one that does not fit is a ValueError.
    """
    version, mode, size = (scheme[name] for name in ("version", "mode", "group_size"))
    if version != QUANTIZATION_FORMAT or mode not in QUANTIZATION_MODES:
        raise ValueError(f"quantization of version {version} and mode {mode!r} is unknown")
    if type(size) is not int or size < 2 or size % 2:
        raise ValueError(f"groups of {size!r} are invalid")
    for name, bits in scheme["layers"].items():
        layer = model.get_submodule(name)
        fits = bits == 8 or layer.in_features % size == 0
        if not isinstance(layer, nn.Linear) or bits not in (4, 8) or not fits:
            raise ValueError(f"{name} cannot be quantized to {bits} bits in groups of {size}")
        sizes = layer.in_features, layer.out_features
        quantized = QuantizedLinear(*sizes, layer.bias is not None, bits, mode, size)
        model.set_submodule(name, quantized.train(layer.training))
    model.quantization = scheme


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def count_codes(model: nn.Module) -> dict[str, int]:
    """The number of codes of each quantized layer."""
    layers = quantized_layers(model).items()
    return {f"{name}.codes": m.in_features * m.out_features for name, m in layers}


def tile_layers(model: nn.Module) -> None:
    """Let all 4-bit codes take half a byte; warn if PyTorch has no kernel for them."""
    for layer in quantized_layers(model).values():
        layer.tile()
        if layer.bits == 4 and not layer.is_tiled:
            reason = why_not_tiled(layer.codes, layer.factors)
            warnings.warn(f"4-bit weights take a whole byte in memory: {reason}", stacklevel=3)
            return  # which is the same for all


def matrices_of(tensors: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The embedding and the matrix of the head among a model's tensors; None for one that lacks."""
    head = tensors.get("head.weight")
    if "head.codes" in tensors:
        codes, factors = tensors["head.codes"], tensors.get("head.factors")
        codes = unpack(codes, factors) if codes.dtype == torch.uint8 else codes
        head = dequantize(codes, tensors["head.scale"])
    return tensors.get("embedding.weight"), head


def share_memory(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are there and are the same memory."""
    if one is None or other is None:
        return False
    return one is other or one.data_ptr() == other.data_ptr()


def heads_differ(tensors: dict[str, Tensor]) -> bool:
    """Whether a model's tensors have an embedding and a head that is another matrix."""
    embedding, head = matrices_of(tensors)
    if embedding is None or head is None or share_memory(embedding, head):
        return False
    if embedding.is_meta or head.is_meta:  # not loaded, or on disk
        return False
    if "head.codes" in tensors:
        head = head.to(embedding.dtype)  # as quantize.py makes the embedding of it
    head = head.to(embedding.device)
    return head.shape != embedding.shape or bool((head != embedding).any())


def untie(model: Any) -> None:
    """Give the head a matrix of its own, and let the config say so."""
    model.config = replace(model.config, tie_embeddings=False)
    if not isinstance(model.head, QuantizedLinear):
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def settle_ties(model: Any, tensors: dict[str, Tensor] | None = None) -> None:
    """Let the config say that head and embedding are not tied, if they differ in `tensors`.

    None stands for the model's own. Every writer calls it: a head may have been replaced.
    """
    if tensors is None:
        parts = {n: m for n, m in model.named_children() if n in ("embedding", "head")}
        own = {name: part.state_dict(keep_vars=True) for name, part in parts.items()}
        tensors = {f"{name}.{n}": t for name, part in own.items() for n, t in part.items()}
    if model.config.tie_embeddings and heads_differ(tensors):
        model.config = replace(model.config, tie_embeddings=False)


def lazy_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict, but with functions that give the codes and factors of tiled layers.

    So only one layer's are unpacked at a time.
    """
    layers = {n: m for n, m in quantized_layers(model).items() if m.is_tiled}
    tiles = {f"{name}.{buffer}" for name in layers for buffer in ("tiles", "tile_factors")}
    buffers = model.named_buffers(remove_duplicate=False)
    named = (*model.named_parameters(remove_duplicate=False), *buffers)
    state: dict[str, Any] = {name: t.detach() for name, t in named if name not in tiles}
    for name, layer in layers.items():
        state |= {f"{name}.codes": layer.get_codes, f"{name}.factors": layer.get_factors}
    return state


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors that a file holds of a model.

    Codes of 4 bits are stored two per byte. Of tied matrices one is kept: the head if it is
    quantized, else the embedding.
    """
    settle_ties(model)
    tensors = lazy_state(model)
    for name, layer in quantized_layers(model).items():
        tensors[f"{name}.codes"] = layer.pack()
        if layer.bits == 4:
            tensors[f"{name}.factors"] = layer.get_factors()
    if model.config.tie_embeddings and "head.codes" in tensors:
        tensors.pop("embedding.weight")
    elif model.config.tie_embeddings:
        tensors.pop("head.weight", None)
    elif share_memory(tensors.get("embedding.weight"), tensors.get("head.weight")):
        tensors["head.weight"] = tensors["head.weight"].clone()  # a file holds no memory twice
    return tensors


def unpack_codes(model: Any, tensors: dict[str, Any]) -> None:
    """Unpack the codes of a file's tensors. A tensor that is missing is a KeyError."""
    for name, layer in quantized_layers(model).items():
        factors = tensors[f"{name}.factors"] if layer.bits == 4 else None
        tensors[f"{name}.codes"] = layer.unpack(tensors[f"{name}.codes"], factors)


def complete_tensors(model: Any, tensors: dict[str, Any], path: str) -> None:
    """Add the one of tied matrices that a file's tensors lack.

    If head and embedding differ, the model is untied. A tensor that is missing is a KeyError.
    """
    if not model.config.tie_embeddings:
        return
    if heads_differ(tensors):
        untie(model)
        problem = "tie_embeddings is true, but its head differs from its embedding"
        warnings.warn(f"{path}: {problem}; the model has both, untied", stacklevel=3)
        return
    embedding, head = matrices_of(tensors)
    tensors.setdefault("embedding.weight", head)
    if "head.codes" not in tensors:
        tensors.setdefault("head.weight", embedding)


def require_head(tensors: dict[str, Any], tied: bool, path: str) -> None:
    """Reject the tensors of what is no language model; hf_integration.py says who loads it."""
    remedy = "load it with AutoModelForSequenceClassification"
    require("score.weight" not in tensors, path, "is a classifier, not a language model", remedy)
    known = tied or not tensors.keys().isdisjoint({"head.weight", "head.codes"})
    remedy = "load it with AutoModel"
    require(known, path, "has no output layer, and its embedding is not tied to one", remedy)


def fill_model(
    model: Any, tensors: dict[str, Any], path: str, config: str, remedy: str, assign: bool = False
) -> None:
    """Load what `stored_tensors` has given, or a state_dict. Tensors that do not fit: a UserError.

    With `assign` the tensors themselves become the model's, uncopied and in their own dtypes.
    If a file holds a head and another embedding, the model has both, whatever its config says.
    """
    require_head(tensors, model.config.tie_embeddings, path)
    try:
        complete_tensors(model, tensors, path)
        model.load_state_dict(tensors, assign=assign)
    except (RuntimeError, KeyError):
        raise UserError(path, f"does not fit its {config}", remedy) from None
