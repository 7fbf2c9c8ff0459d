"""The gated delta rule in chunks: both passes in plain matrix products.

`GatedDeltaRule` is the parallel form of `delta_sequential`, which is its reference. A token t with
key k, value x, query c, write strength beta and decay a changes the state h (n, p) to

    h_t = a_t (h_{t-1} - beta_t k_t k_t^T h_{t-1}) + beta_t k_t x_t^T,    y_t = h_t^T c_t

so a value replaces what its key held before (Yang et al., Gated DeltaNet, arXiv 2412.06464, eq. 10;
the chunks are those of section 3.3). Every head of every sequence is a row of its own. Time it with

    python -m benchmarks.scan --scans ours delta

Dimension letters in the comments on shapes:
    b rows       l length        n width of keys       p width of values
    q chunk_size                 c chunks (l / q)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.autograd.function import once_differentiable

from tinymamba.kernels import (
    GPU_TILE,
    Tiles,
    backward_over_tiles,
    by_tile,
    forward_over_tiles,
    is_in_graph,
    is_writing_graph,
    keeps_tiles,
    promoted,
    sum_of_products,
    to_chunks,
)

CPU_TILE = 8192  # tokens whose intermediate values are in memory at a time
SMALLEST = 8  # size below which a triangular matrix is inverted by its series


def key_features(x: Tensor, products: int, dtype: torch.dtype) -> Tensor:
    """Keys or queries of length 1 (..., max(1, products) f) from vectors x (..., f).

    They are the products of channels i and i + r, for r = 1 .. products (Schlag et al., arXiv
    2102.11174, eq. 37, without its rectifier), or x itself where `products` is 0. Products of
    different vectors overlap less than the vectors do, so a state can tell more keys apart.
    """
    if not products:
        return F.normalize(x.to(promoted(x)), dim=-1).to(dtype)
    if x.requires_grad and torch.is_grad_enabled() and not is_in_graph():
        return KeyFeatures.apply(x, products, dtype)
    wide = x.to(promoted(x))
    z = (wide * feature_scale(wide, products)).to(dtype)
    return torch.cat([z * z.roll(-r, dims=-1) for r in range(1, products + 1)], dim=-1)


def feature_scale(x: Tensor, products: int) -> Tensor:
    """What scales x (..., f) so that all products together have length 1: (..., 1)."""
    square = x * x
    others = torch.stack([square.roll(-r, dims=-1) for r in range(1, products + 1)]).sum(0)
    length = (square * others).sum(-1, keepdim=True).sqrt()  # of all products
    return length.clamp(min=1e-12).rsqrt()


class KeyFeatures(torch.autograd.Function):
    """`key_features`, where a product with zeros and ones takes the place of calls of `roll`.

    It gives the same: each of its sums has one term that is not 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, products: int, dtype: torch.dtype) -> Tensor:
        """The products of channels, of length 1."""
        with torch.autocast(x.device.type, enabled=False):
            shifts = neighbours(x, products, dtype)  # (f, products * f)
            wide = x.to(promoted(x))
            scale = feature_scale(wide, products)  # (..., 1)
            z = (wide * scale).to(dtype)
            ctx.save_for_backward(z, scale, shifts)
            ctx.dtype = x.dtype
            return (z[..., None, :] * (z @ shifts).unflatten(-1, (products, -1))).flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x: through its scaled form z, and through the scale."""
        z, scale, shifts = ctx.saved_tensors
        dy = dy.unflatten(-1, (-1, z.shape[-1]))  # (..., products, f)
        others = (z @ shifts).view(dy.shape)
        dz = (dy * others).sum(-2) + (dy * z[..., None, :]).flatten(-2) @ shifts.T
        table = sum_shifts(shifts)
        slope = z * ((z * z) @ (table + table.T))  # of half the squared length, by z
        dz, slope = dz.to(scale.dtype), slope.to(scale.dtype)
        along = (dz * z).sum(-1, keepdim=True)
        dx = dz.addcmul_(slope, along, value=-0.5).mul_(scale)
        return dx.to(ctx.dtype), None, None


def neighbours(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The matrix (f, count * f) that gives channels i + 1, ..., i + count of x (..., f)."""
    same = torch.eye(x.shape[-1], dtype=dtype, device=x.device)
    return torch.cat([same.roll(r, dims=0) for r in range(1, count + 1)], dim=1)


def sum_shifts(shifts: Tensor) -> Tensor:
    """The matrix (f, f) that sums all neighbours, from `neighbours` (f, count * f)."""
    return shifts.unflatten(1, (-1, len(shifts))).sum(1)


def delta_sequential(
    x: Tensor, beta: Tensor, log_decay: Tensor, K: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the reference, and the single step of decoding.

    x (b, l, p), beta and log_decay (b, l), K and C (b, l, n), state (b, p, n) -> y (b, l, p) and
    the state after the last token. Keys have length 1.
    """
    outputs, wide = [], [t.to(state.dtype) for t in (x, beta, K, C)]
    for t in range(x.shape[1]):
        x_t, beta_t, k_t, c_t = (w[:, t] for w in wide)
        state = log_decay[:, t, None, None].exp() * state
        held = (state * k_t[:, None]).sum(-1)  # (b, p): the value that the key has so far
        state = state + (beta_t[:, None] * (x_t - held))[..., None] * k_t[:, None]
        outputs.append((state * c_t[:, None]).sum(-1))
    return torch.stack(outputs, dim=1).to(x.dtype), state


def run_delta_rule(
    x: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    K: Tensor,
    C: Tensor,
    state: Tensor,
    chunk_size: int,
    stepwise: bool,
) -> tuple[Tensor, Tensor]:
    """`delta_sequential` if `stepwise`, and else its parallel form; the shapes are the same."""
    if stepwise:
        return delta_sequential(x, beta, log_decay, K, C, state)
    run = delta_in_one_tile if is_writing_graph() else without_autocast
    y, state = run(x, beta, log_decay, K.to(x.dtype), C.to(x.dtype), state.mT, chunk_size)
    return y, state.mT


def without_autocast(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """GatedDeltaRule, which chooses the dtype of each product itself."""
    with torch.autocast(x.device.type, enabled=False):
        return GatedDeltaRule.apply(x, *rest)


class GatedDeltaRule(torch.autograd.Function):
    """`delta_sequential` in matrix products over chunks of q tokens.

    As in ChunkedScan, one tile of chunks goes through all steps before the next tile, and is kept
    for the backward pass. States are (b, n, p). torch.compile sees each pass as one operation that
    keeps no tile: it would unroll the loop over chunks. Otherwise the functions are called, as an
    operation would import torch._dynamo first: most of a second.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        beta: Tensor,
        log_decay: Tensor,
        K: Tensor,
        C: Tensor,
        state: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        """The y (b, l, p) and the last state (b, n, p)."""
        inputs, ctx.chunk_size = (x, beta, log_decay, K, C), chunk_size
        if torch.compiler.is_compiling():
            y, last, begins = delta_forward(*inputs, state, chunk_size)
            ctx.save_for_backward(*inputs, begins)
            return y, last
        y, last, kept = forward_in_tiles(*inputs, state, chunk_size, keeps_tiles(ctx))
        ctx.save_for_backward(*inputs, *itertools.chain(*kept))
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, in their order."""
        saved: Any = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return *delta_backward(*saved, dy, dlast, ctx.chunk_size), None
        return *backward_in_tiles(saved[:5], saved[5:], dy, dlast, ctx.chunk_size), None


def forward_in_tiles(
    x: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    K: Tensor,
    C: Tensor,
    state: Tensor,
    chunk_size: int,
    keeps: bool,
) -> tuple[Tensor, Tensor, list[Sequence[Tensor]]]:
    """The y, the last state, and each tile, or [the state before it]."""
    inputs = to_chunks(chunk_size, x, beta, log_decay, K, C)

    def step(tile: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        t = make_tile(tile, state)
        return *tile_forward(t), t if keeps else [state]

    over = tiles(inputs[0].shape, x.device)
    y, last, kept = forward_over_tiles(step, over, inputs, state.contiguous())
    return y.flatten(1, 2)[:, : x.shape[1]].contiguous(), last, kept


@torch.library.custom_op("tinymamba::delta_forward", mutates_args=())
def delta_forward(
    x: Tensor, beta: Tensor, log_decay: Tensor, K: Tensor, C: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The y, the last state, and the states (t, b, n, p) before each of t tiles of the text."""
    y, last, kept = forward_in_tiles(x, beta, log_decay, K, C, state, chunk_size, keeps=False)
    count, begins = tile_count(x, chunk_size), list(itertools.chain(*kept))
    return y, last, torch.stack([torch.cat(begins[i::count]) for i in range(count)])


@delta_forward.register_fake
def _(
    x: Tensor, beta: Tensor, log_decay: Tensor, K: Tensor, C: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the shapes that delta_forward returns."""
    begins = state.new_empty(tile_count(x, chunk_size), *state.shape)
    return x.new_empty(x.shape), state.new_empty(state.shape), begins


def backward_in_tiles(
    given: Sequence[Tensor], saved: Sequence[Tensor], dy: Tensor, dlast: Tensor, chunk_size: int
) -> tuple[Tensor, ...]:
    """The gradients of x, beta, log_decay, K, C (`given`) and the first state.

    `saved` are the tiles, or the states before them, in one row.
    """
    inputs, length = to_chunks(chunk_size, *given), given[0].shape[1]
    [dy], dlast = to_chunks(chunk_size, dy), dlast.contiguous()
    over = tiles(inputs[0].shape, dy.device)

    def step(
        tile: list[Tensor], kept: Sequence[Tensor], dy: Tensor, dlast: Tensor
    ) -> tuple[Tensor, ...]:
        return tile_backward(Tile(*kept) if len(kept) > 1 else make_tile(tile, *kept), dy, dlast)

    kept = by_tile(saved, over)
    grads, dstate = backward_over_tiles(step, over, inputs, kept, dy, dlast)
    return *(g.flatten(1, 2)[:, :length].contiguous() for g in grads), dstate


@torch.library.custom_op("tinymamba::delta_backward", mutates_args=())
def delta_backward(
    x: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    K: Tensor,
    C: Tensor,
    begins: Tensor,
    dy: Tensor,
    dlast: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`backward_in_tiles`, from the states (t, b, n, p) before each of t tiles of the text."""
    given = x, beta, log_decay, K, C
    rows, _ = tiles((len(x), math.ceil(x.shape[1] / chunk_size), chunk_size), x.device)
    saved = [state[row] for row in rows for state in begins]
    dx, dbeta, dlog_decay, dK, dC, dstate = backward_in_tiles(given, saved, dy, dlast, chunk_size)
    return dx, dbeta, dlog_decay, dK, dC, dstate


@delta_backward.register_fake
def _(
    x: Tensor, beta: Tensor, log_decay: Tensor, K: Tensor, C: Tensor, begins: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Tensors of the shapes that delta_backward returns."""
    return tuple(t.new_empty(t.shape) for t in (x, beta, log_decay, K, C, begins[0]))


def delta_in_one_tile(
    x: Tensor, beta: Tensor, log_decay: Tensor, K: Tensor, C: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The forward pass of GatedDeltaRule without a loop over tiles: one graph for every length."""
    y, last = tile_forward(make_tile(to_chunks(chunk_size, x, beta, log_decay, K, C), state))
    return y.flatten(1, 2)[:, : x.shape[1]], last


def tiles(shape: Sequence[int], device: torch.device) -> Tiles:
    """Slices of rows and of chunks of the shape (b, c, q, ...): as many rows as fit, then chunks.

    Rows come first, because chunks go one after the other.
    """
    batch, chunks, size = shape[:3]
    tokens = CPU_TILE if device.type == "cpu" else GPU_TILE
    row = min(batch, max(1, tokens // size))
    span = max(1, tokens // (size * row))
    rows = [slice(i, i + row) for i in range(0, batch, row)]
    return rows, [slice(i, i + span) for i in range(0, chunks, span)]


def tile_count(x: Tensor, chunk_size: int) -> int:
    """How many tiles x (b, l, p) has in the direction of the text."""
    shape = (len(x), math.ceil(x.shape[1] / chunk_size), chunk_size)
    return len(tiles(shape, x.device)[1])


class Tile(NamedTuple):
    """Values of one tile that both passes need.

    Chunks come first, so that each chunk is contiguous: a product would copy it otherwise.
    """

    x: Tensor  # (c, b, q, p)
    beta: Tensor  # (c, b, q)
    K: Tensor  # (c, b, q, n), and
    C: Tensor
    decay: Tensor  # (c, b, q, q) from token j to i; 0 where j > i
    keys: Tensor  # (c, b, q, q) k_i . k_j for j < i
    similarity: Tensor  # (c, b, q, q) c_i . k_j
    overlap: Tensor  # (c, b, q, q) keys times decay, in the dtype of decays
    solve: Tensor  # (c, b, q, q) from the differences to the written values u, beta left out
    scores: Tensor  # (c, b, q, q) factor of u_j in y_i
    whole: Tensor  # (c, b, 1, 1) decay over the chunk, in the dtype of decays
    from_start: Tensor  # (c, b, q, 1) decay since the start of the chunk
    to_end: Tensor  # (c, b, q, 1) decay until its end
    before: Tensor  # (c, b, n, p) the states before each chunk, in the dtype of x
    last: Tensor  # (b, n, p) the state after the last chunk
    difference: Tensor  # (c, b, q, p) values less what the state before the chunk held
    u: Tensor  # (c, b, q, p) what is written: values less what the keys held


def make_tile(inputs: list[Tensor], state: Tensor) -> Tile:
    """The values of a tile, from the state (b, n, p) before it.

    inputs: x (b, c, q, p), beta and log_decay (b, c, q), K and C (b, c, q, n). Decays are
    multiplied to what has q or p columns, never to the n of a key.
    """
    x, beta, log_decay, K, C = chunks_first(*inputs)
    total = log_decay.cumsum(-1)  # (c, b, q)
    between = total[..., :, None] - total[..., None, :]  # at most 0 where j <= i
    decay = between.clamp(max=0).exp().tril()
    keys, similarity = (K @ K.mT).tril_(-1), C @ K.mT  # (c, b, q, q)
    overlap = keys * decay
    solve = unit_lower_inverse(overlap * beta[..., None])
    whole = total[..., -1, None, None].exp()  # (c, b, 1, 1)
    from_start = total.exp()[..., None].to(x.dtype)
    to_end = (total[..., -1:] - total).clamp(max=0).exp()[..., None].to(x.dtype)
    weighted = (solve * beta[..., None, :]).to(x.dtype)
    carried = carry(state, [whole, from_start, to_end, weighted, x, K])
    decay = decay.to(x.dtype)
    scores = similarity * decay
    given = (x, beta, K, C)
    return Tile(
        *given, decay, keys, similarity, overlap, solve, scores,
        whole, from_start, to_end, *carried,
    )  # fmt: skip


def unit_lower_inverse(A: Tensor) -> Tensor:
    """The inverse of I + A (..., q, q), A being strictly lower triangular.

    By halves: [[a, 0], [c, d]] has the inverse [[a', 0], [-d' c a', d']]. Where A^q = 0 ends the
    series early, it is (I - A)(I + A^2)(I + A^4)... A larger one would lose all digits where keys
    repeat: its powers grow as binomials do, and cancel.
    """
    q = int(A.shape[-1])  # torch.jit.trace has a tensor here
    if q > SMALLEST and q % 2:
        return unit_lower_inverse(F.pad(A, (0, 1, 0, 1)))[..., :q, :q]
    if q <= SMALLEST:
        inverse = torch.eye(q, dtype=A.dtype, device=A.device) - A
        for _ in range((q - 1).bit_length() - 1):
            A = A @ A
            inverse = inverse + inverse @ A
        return inverse
    half = q // 2
    diagonal = torch.stack((A[..., :half, :half], A[..., half:, half:]))
    first, second = unit_lower_inverse(diagonal).unbind()
    corner = second @ A[..., half:, :half] @ first
    if is_writing_graph():  # export allows no in-place write to a view
        upper = torch.cat((first, torch.zeros_like(first)), dim=-1)
        return torch.cat((upper, torch.cat((-corner, second), dim=-1)), dim=-2)
    inverse = torch.zeros_like(A)
    inverse[..., :half, :half], inverse[..., half:, half:] = first, second
    inverse[..., half:, :half] = corner.neg_()
    return inverse


def carry(state: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """The last four of a Tile, from the state (b, n, p) before it.

    `parts` are those of `through_chunk`, for every chunk (c, b, ...).
    """
    if torch.jit.is_tracing():
        return scripted_loop()(state, parts)
    return (carry_in_graph if is_writing_graph() else carry_in_loop)(state, parts)


def through_chunk(state: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state after a chunk; what a Tile has of the chunk: `before`, `difference` and `u`.

    state (b, n, p); parts: whole (b, 1, 1), from_start and to_end (b, q, 1), weighted (b, q, q), x
    (b, q, p), K (b, q, n).
    """
    whole, from_start, to_end, weighted, x, K = parts
    before = state.to(x.dtype)
    difference = x - from_start * (K @ before)  # (b, q, p)
    u = weighted @ difference
    return (whole * state).add_(K.mT @ (to_end * u)), before, difference, u


def carry_in_loop(state: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`carry` as Python and TorchScript run it: `through_chunk`, written to its place at once."""
    whole, from_start, to_end, weighted, x, K = parts
    shape = [x.shape[0]] + list(state.shape)  # noqa: RUF005 TorchScript knows no [*shape]
    before = torch.empty(shape, dtype=x.dtype, device=x.device)
    difference, u = torch.empty_like(x), torch.empty_like(x)
    for c in range(x.shape[0]):
        before[c].copy_(state)
        held = from_start[c] * torch.bmm(K[c], before[c])
        torch.sub(x[c], held, out=difference[c])
        torch.bmm(weighted[c], difference[c], out=u[c])
        state = (whole[c] * state).add_(torch.bmm(K[c].mT, to_end[c] * u[c]))
    return before, state, difference, u


@functools.cache
def scripted_loop() -> Callable[..., tuple[Tensor, ...]]:
    """`carry_in_loop` as TorchScript: a trace would unroll the loop to one length."""
    return torch.jit.script(carry_in_loop)


def carry_in_graph(state: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """`carry` as one operation of a graph that torch.export writes; ONNX calls it Scan."""

    def chunk(state: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        new, before, difference, u = through_chunk(state, list(parts))
        return new, (before.clone(), difference, u)  # `before` may be the state itself

    last, (before, difference, u) = scan(chunk, state, tuple(parts))
    return before, last, difference, u


class Gradients(NamedTuple):
    """What `carry_back` finds."""

    first: Tensor  # (b, n, p) of the state before the tile
    after: Tensor  # (c, b, n, p) of the states after each chunk, in the dtype of x
    decay: Tensor  # (c, b) of the logarithm of the decay of the states after each chunk
    given: Tensor  # (c, b, q, p) of u, as far as it comes through the states
    r: Tensor  # (c, b, q, p) of beta times `difference`
    x: Tensor  # (c, b, q, p) of x, and so of `difference`


def carry_back(t: Tile, dy: Tensor, dlast: Tensor) -> Gradients:
    """Gradients that go from chunk to chunk, from the last one on.

    dy (c, b, q, p), dlast (b, n, p).
    """
    beta, K = t.beta[..., None].to(dy.dtype), t.K
    dread, du = t.C.mT @ (t.from_start * dy), t.scores.mT @ dy
    solve, dstate, state = t.solve.mT.to(dy.dtype), dlast, t.last.to(dy.dtype)
    after, ddecay = torch.empty_like(t.before), t.last.new_empty(dy.shape[:2])
    given, dr, dx = torch.empty_like(dy), torch.empty_like(dy), torch.empty_like(dy)
    for c in reversed(range(len(dy))):
        after[c].copy_(dstate)
        ddecay[c] = torch.linalg.vecdot(after[c].flatten(1), state.flatten(1))  # (b,)
        torch.mul(t.to_end[c], K[c] @ after[c], out=given[c])
        torch.bmm(solve[c], du[c] + given[c], out=dr[c])
        torch.mul(beta[c], dr[c], out=dx[c])
        kept = torch.baddbmm(dread[c], K[c].mT, t.from_start[c] * dx[c], alpha=-1)
        dstate, state = (t.whole[c] * dstate).add_(kept), t.before[c]
    return Gradients(dstate, after, ddecay, given, dr, dx)


def chunks_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(b, c, ...) -> (c, b, ...)."""
    return tuple(t.transpose(0, 1).contiguous() for t in tensors)


def tile_forward(t: Tile) -> tuple[Tensor, Tensor]:
    """The y (b, c, q, p) and the last state of one tile."""
    y = t.scores @ t.u + t.from_start * (t.C @ t.before)
    return y.transpose(0, 1), t.last


def tile_backward(t: Tile, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the inputs of `make_tile`, from those of y and the last state."""
    x, beta, K, C, *_ = t
    [dy] = chunks_first(dy)
    wide = beta.dtype

    d = carry_back(t, dy, dlast)
    weight = (d.r @ t.u.mT).mul_(t.overlap)  # (c, b, q, q), as `overlap` strictly lower
    dbeta = (d.r * t.difference).sum(-1, dtype=wide) - weight.sum(-1, dtype=wide)

    doverlap = (d.x @ t.u.mT).mul_(t.decay)  # the negative of it, times decay
    dsimilarity = (dy @ t.u.mT).mul_(t.decay)
    dkeys = -doverlap.tril(-1)  # (c, b, q, q)
    dread = t.from_start * dy
    dK = sum_of_products(
        (-t.from_start * d.x, t.before.mT),
        (t.to_end * t.u, d.after.mT),
        (dkeys + dkeys.mT, K),
        (dsimilarity.mT, C),
    )
    dC = sum_of_products((dread, t.before.mT), (dsimilarity, K))

    # Every decay is the exponential of a sum of logarithms, so its gradient is value * gradient.
    weight = dsimilarity.mul_(t.similarity).sub_(doverlap.mul_(t.keys))
    dtotal = weight.sum(-1, dtype=wide) - weight.sum(-2, dtype=wide)
    through_states = dread * (C @ t.before) + d.x * (t.difference - x) - t.u * d.given
    dtotal = dtotal + through_states.sum(-1, dtype=wide)
    dtotal[..., -1] += d.decay
    dlog_decay = dtotal.flip(-1).cumsum(-1).flip(-1)
    grads = (g.transpose(0, 1) for g in (d.x, dbeta, dlog_decay, dK, dC))
    return *grads, d.first
