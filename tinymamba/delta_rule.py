"""The gated delta rule in chunks: both passes in plain matrix products.

`GatedDeltaRule` is the parallel form of `delta_sequential`, which is its reference. A token t with
key k, value x, read vector c, write strength beta and decay a changes the state h (n, p) to

    h_t = a_t (h_{t-1} - beta_t k_t k_t^T h_{t-1}) + beta_t k_t x_t^T,    y_t = h_t^T c_t

so a value replaces what its key held before (Yang et al., Gated DeltaNet, arXiv 2412.06464, eq. 10;
the chunks are those of section 3.3). Time it with

    python -m benchmarks.scan --scans ours delta

Dimension letters in the comments on shapes:
    b batch      l length        h SSM heads           p SSM head width
    n d_state    q chunk_size    c chunks (l / q)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinymamba.kernels import (
    GPU_TILE,
    Tiles,
    backward_over_tiles,
    forward_over_tiles,
    heads_first,
    is_writing_graph,
    to_chunks,
)

CPU_TILE = 1024  # tokens whose intermediate values are in memory at a time
LEVELS = 16  # of `carry_in_parallel` in an exported graph: enough for 65,536 chunks
SMALLEST = 8  # size below which a triangular matrix is inverted by its series


def delta_sequential(
    x: Tensor, beta: Tensor, log_decay: Tensor, K: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the reference, and the single step of decoding.

    x (b, l, h, p), beta and log_decay (b, l, h), K and C (b, l, n), state (b, h, p, n) -> y
    (b, l, h, p) and the state after the last token. Keys have length 1.
    """
    outputs, wide = [], [t.to(state.dtype) for t in (x, beta, K, C)]
    for t in range(x.shape[1]):
        x_t, beta_t, k_t, c_t = (w[:, t] for w in wide)
        k_t, c_t = k_t[:, None, None], c_t[:, None, None]  # (b, 1, 1, n)
        state = log_decay[:, t, :, None, None].exp() * state
        held = (state * k_t).sum(-1)  # (b, h, p): the value that the key has so far
        state = state + (beta_t[..., None] * (x_t - held))[..., None] * k_t
        outputs.append((state * c_t).sum(-1))
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
    run = delta_in_one_tile if is_writing_graph() else GatedDeltaRule.apply
    y, state = run(x, beta, log_decay, K.to(x.dtype), C.to(x.dtype), state.mT, chunk_size)
    return y, state.mT


class GatedDeltaRule(torch.autograd.Function):
    """`delta_sequential` in matrix products over chunks of q tokens.

    As in ChunkedScan, one tile of chunks goes through all steps before the next tile, and the
    backward pass computes a tile's intermediate values again. States are (b, h, n, p).
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
        """The y (b, l, h, p) and the last state (b, h, n, p)."""
        inputs = to_chunks(chunk_size, x, beta, log_decay, K, C)
        y, last, begins = forward_over_tiles(tile_forward, tiles(inputs[0]), inputs, state)
        ctx.save_for_backward(x, beta, log_decay, K, C, *begins)
        ctx.chunk_size = chunk_size
        return y.flatten(1, 2)[:, : x.shape[1]], last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, in their order."""
        x, beta, log_decay, K, C, *begins = ctx.saved_tensors
        inputs = to_chunks(ctx.chunk_size, x, beta, log_decay, K, C)
        [dy] = to_chunks(ctx.chunk_size, dy)
        over = tiles(inputs[0])
        grads, dstate = backward_over_tiles(tile_backward, over, inputs, begins, dy, dlast)
        grads = [grad.flatten(1, 2)[:, : x.shape[1]] for grad in grads]
        return *grads, dstate, None


def delta_in_one_tile(
    x: Tensor, beta: Tensor, log_decay: Tensor, K: Tensor, C: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The forward pass of GatedDeltaRule without a loop: one graph for every length."""
    y, last = tile_forward(to_chunks(chunk_size, x, beta, log_decay, K, C), state)
    return y.flatten(1, 2)[:, : x.shape[1]], last


def tiles(x: Tensor) -> Tiles:
    """Slices of rows and of chunks of x (b, c, q, h, p): as many rows as fit, then chunks.

    Rows come first, because chunks go one after the other.
    """
    batch, chunks, size = x.shape[:3]
    if torch.compiler.is_compiling():
        return [slice(0, batch)], [slice(0, chunks)]
    tokens = CPU_TILE if x.device.type == "cpu" else GPU_TILE
    row = min(batch, max(1, tokens // size))
    span = max(1, tokens // (size * row))
    rows = [slice(i, i + row) for i in range(0, batch, row)]
    return rows, [slice(i, i + span) for i in range(0, chunks, span)]


class Tile(NamedTuple):
    """Intermediate values of one tile that both passes need."""

    decay: Tensor  # (b, c, h, q, q) from token j to i; 0 where j > i
    keys: Tensor  # (b, c, 1, q, q) k_i . k_j for j < i
    similarity: Tensor  # (b, c, 1, q, q) c_i . k_j
    overlap: Tensor  # (b, c, h, q, q) keys times decay, in the dtype of decays
    solve: Tensor  # (b, c, h, q, q) from the differences to the written values u, beta left out
    scores: Tensor  # (b, c, h, q, q) factor of u_j in y_i
    from_start: Tensor  # (b, c, h, q, 1) decay since the start of the chunk
    to_end: Tensor  # (b, c, h, q, 1) decay until its end
    reads: Tensor  # (b, c, h, q, n) C times from_start: reads the state before the chunk
    erases: Tensor  # (b, c, h, q, n) K times from_start: reads what the keys held before it
    writes: Tensor  # (b, c, h, q, n) K times to_end: writes the state after the chunk
    keeps: Tensor  # (b, c, h, q, n) factor of the state before the chunk in -u
    transition: Tensor  # (b, c, h, n, n) factor of the state before the chunk in that after it
    states: Tensor  # (b, c+1, h, n, p) before each chunk, and after the last
    u: Tensor  # (b, c, h, q, p) what is written: values less what the keys held


def make_tile(
    x: Tensor, beta: Tensor, log_decay: Tensor, K: Tensor, C: Tensor, state: Tensor
) -> Tile:
    """The intermediate values of a tile.

    x (b, c, h, q, p), beta and log_decay (b, c, h, q), K and C (b, c, 1, q, n).
    """
    total = log_decay.cumsum(-1)  # (b, c, h, q)
    between = total[..., :, None] - total[..., None, :]
    future = torch.full_like(between[0, 0, 0], -math.inf).triu(1)
    decay = torch.minimum(between, future).exp_()
    keys, similarity = (K @ K.mT).tril(-1), C @ K.mT  # (b, c, 1, q, q)
    overlap = keys.to(decay.dtype) * decay
    solve = unit_lower_inverse(overlap * beta[..., None])
    from_start = total.exp()[..., None]
    to_end = (total[..., -1:] - total).clamp(max=0).exp()[..., None]
    reads, erases = (C * from_start).to(x.dtype), (K * from_start).to(x.dtype)
    writes = (K * to_end).to(x.dtype)
    weighted = (solve * beta[..., None, :]).to(x.dtype)
    keeps, values = weighted @ erases, weighted @ x
    identity = torch.eye(K.shape[-1], dtype=decay.dtype, device=K.device)
    transition = from_start[..., -1:, :] * identity - (writes.mT @ keeps).to(decay.dtype)
    states = carry(transition, (writes.mT @ values).to(state.dtype), state)
    u = values - keeps @ states[:, :-1].to(x.dtype)
    decay = decay.to(x.dtype)
    scores = similarity * decay
    return Tile(
        decay, keys, similarity, overlap, solve, scores, from_start, to_end, reads, erases, writes,
        keeps, transition, states, u,
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


def carry(transition: Tensor, written: Tensor, state: Tensor) -> Tensor:
    """States between chunks, (b, c+1, h, n, p): before the first chunk, then after each one.

    s_{c+1} = transition_c s_c + written_c; transition (b, c, h, n, n), written (b, c, h, n, p),
    state (b, h, n, p). One after the other on a CPU, where it is cheapest; else in parallel.
    """
    if is_writing_graph() or torch.compiler.is_compiling() or state.device.type != "cpu":
        return carry_in_parallel(transition, written, state)
    states, shape = [state], state.shape
    for t, w in zip(transition.unbind(1), written.unbind(1), strict=True):
        last = states[-1].flatten(0, 1)
        states.append(torch.baddbmm(w.flatten(0, 1), t.flatten(0, 1), last).view(shape))
    return torch.stack(states, dim=1)


def carry_in_parallel(transition: Tensor, written: Tensor, state: Tensor) -> Tensor:
    """The same as `carry` in log2(c) steps, each of which doubles how far back a chunk reaches."""
    count, graph = transition.shape[1], is_writing_graph()
    index = torch.arange(count, device=state.device)
    identity = torch.eye(transition.shape[-1], dtype=state.dtype, device=state.device)
    for level in range(LEVELS if graph else (count - 1).bit_length()):
        before, known = (index - 2**level).clamp(min=0), index >= 2**level
        known = known[:, None, None, None]
        earlier = torch.where(known, transition.index_select(1, before), identity)
        added = written.index_select(1, before) * known
        written = written + transition @ added
        transition = transition @ earlier
    return torch.cat((state[:, None], transition @ state[:, None] + written), dim=1)


def tile_forward(inputs: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """The y and the last state of one tile.

    inputs: x (b, c, q, h, p), beta and log_decay (b, c, q, h), K and C (b, c, q, n).
    """
    x, beta, log_decay, K, C = inputs
    x, beta, log_decay = heads_first(x, beta, log_decay)
    t = make_tile(x, beta, log_decay, K[:, :, None], C[:, :, None], state)
    y = t.scores @ t.u + t.reads @ t.states[:, :-1].to(x.dtype)
    return y.transpose(2, 3), t.states[:, -1]


def tile_backward(
    inputs: list[Tensor], state: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of `inputs` and state from those of y and the last state."""
    x, beta, log_decay, K, C = inputs
    x, beta, log_decay, dy = heads_first(x, beta, log_decay, dy)
    K, C = K[:, :, None], C[:, :, None]
    t = make_tile(x, beta, log_decay, K, C, state)
    wide, before = beta.dtype, t.states[:, :-1].to(x.dtype)

    # dstates[:, c] is the gradient of the state before chunk c: `carry`, backwards in time.
    du = t.scores.mT @ dy  # (b, c, h, q, p)
    dread = (t.reads.mT @ dy - t.keeps.mT @ du).to(state.dtype)
    dstates = carry(t.transition.mT.flip(1), dread.flip(1), dlast).flip(1)  # (b, c+1, h, n, p)
    after = dstates[:, 1:].to(x.dtype)
    du = du + t.writes @ after
    dr = t.solve.mT.to(x.dtype) @ du  # of beta (x - erases @ before)
    dx = dr * beta[..., None].to(x.dtype)
    difference = x - t.erases @ before
    weight = (dr @ t.u.mT).mul_(t.overlap)  # (b, c, h, q, q), as `overlap` strictly lower
    dbeta = (dr * difference).sum(-1, dtype=wide) - weight.sum(-1, dtype=wide)

    doverlap = (dx @ t.u.mT).mul_(t.decay)  # the negative of it, times decay
    dscores = (dy @ t.u.mT).mul_(t.decay)
    dkeys = -doverlap.sum(2, keepdim=True).tril(-1)  # (b, c, 1, q, q)
    dsimilarity = dscores.sum(2, keepdim=True)
    derases = -(dx @ before.mT).to(wide)  # (b, c, h, q, n)
    dreads, dwrites = (dy @ before.mT).to(wide), (t.u @ after.mT).to(wide)
    dK = (derases * t.from_start + dwrites * t.to_end).sum(2, keepdim=True)
    dK = dK + (dkeys + dkeys.mT) @ K + dsimilarity.mT @ C
    dC = (dreads * t.from_start).sum(2, keepdim=True) + dsimilarity @ K

    # Every decay is the exponential of a sum of logarithms, so its gradient is value * gradient.
    weight = dscores.mul_(t.similarity).sub_(doverlap.mul_(t.keys))
    dtotal = weight.sum(-1, dtype=wide) - weight.sum(-2, dtype=wide)
    dtotal = dtotal - (dwrites * t.writes).sum(-1)
    dtotal = dtotal + (dreads * t.reads).sum(-1) + (derases * t.erases).sum(-1)
    dtotal[..., -1] += (dstates[:, 1:] * t.states[:, 1:]).sum((-2, -1))
    dlog_decay = dtotal.flip(-1).cumsum(-1).flip(-1)
    dx, dbeta, dlog_decay = (g.transpose(2, 3) for g in (dx, dbeta, dlog_decay))
    return dx, dbeta, dlog_decay, dK[:, :, 0], dC[:, :, 0], dstates[:, 0]
