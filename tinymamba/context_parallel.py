"""Context parallelism: each text lies in pieces on several processes.

    torchrun --nproc_per_node=2 testv2.py --context_parallel 2

Every process runs the whole model on its own piece. What a model needs of the text before a piece
is of constant size, and so is what the pieces tell each other, however long the text is:

- the last k-1 inputs of each convolution, and the last w-1 keys and values, from the piece before;
- the sum of all angles before, which is the phase of the SSM's state;
- the state before. A piece makes T S + U of the state S before it: U is what it writes to an empty
  state, T a decay per head of the SSM, and a matrix per head of the delta rule. All processes get
  all T and U, and apply them in order. (flash-linear-attention does the same for the delta rule.)

The backward pass has the same messages in the other direction. The gradient G of the state before a
piece, as far as its own outputs read that state, goes to all processes; the gradient of the state
after a piece is then the sum of those of all later pieces, each through the T between them. So no
gradient of T and U is needed.

All processes of a group call the same methods in the same order, in both passes.

Dimension letters in the comments on shapes:
    b batch      l length        d channels            a attention heads  f attention head width
    h SSM heads  p SSM head width, or width of values  n d_state, or width of keys
    r rotating pairs             g processes of a group
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinymamba.cli import require
from tinymamba.delta_rule import run_delta_rule
from tinymamba.distributed import keep
from tinymamba.kernels import bounded_decay, promoted

Times = Callable[[Tensor, Tensor], Tensor]  # a state and a transition: the state after it


class PiecesBefore:
    """What comes before this process's piece of each text. All pieces are equally long."""

    def __init__(self, group: Any = None):
        """`group`: the processes that share a text, in the order of its pieces; None: all."""
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0  # bytes that this process has sent so far

    def offset(self, length: int) -> int:
        """How many tokens come before a piece of that length."""
        return self.rank * length

    def document_start(self, ids: Tensor, ends: Tensor | None) -> Tensor:
        """The index (b,), at most 0, at which the document begins that reaches ids (b, l).

        It is -l for one that began before the piece before: nothing looks back further. ends (b, l)
        of bool are the tokens after which a document begins; None: there are none.
        """
        length = ids.shape[1]
        begin = ids.new_full(ids.shape[:1], -length)  # as the next piece counts
        if ends is not None:
            index = torch.arange(1 - length, 1, device=ids.device)  # of the token after each
            begin = torch.where(ends, index, -length).amax(1)
        return self.pass_on(begin, 1)

    def last_inputs(self, u: Tensor, count: int) -> Tensor:
        """The last `count` of the u (b, l, d) of the piece before: (b, count, d)."""
        if count > u.shape[1]:
            raise ValueError(f"a piece of {u.shape[1]} tokens is shorter than {count}")
        return LastInputs.apply(u[:, u.shape[1] - count :], self)

    def last_keys(self, keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, ...]:
        """The last `count` keys and values (b, a, l, f) before the piece: (b, a, count, f) each."""
        both = torch.cat((keys, values), dim=-1).transpose(1, 2)  # (b, l, a, 2f)
        return self.last_inputs(both, count).transpose(1, 2).chunk(2, dim=-1)

    def phase(self, half_turns: Tensor) -> Tensor:
        """The sum of all half_turns (b, l, r) before the piece, modulo 2: (b, r) of float64."""
        return SumBefore.apply(half_turns.double().sum(1), self).remainder(2)

    def scan(
        self, run: Callable[..., tuple[Tensor, Tensor]], x: Tensor, dt: Tensor, A: Tensor,
        B: Tensor, C: Tensor, D: Tensor, state: None, resets: Tensor | None, *settings: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`run`, which is selective_scan, from the state that the pieces before leave.

        The text itself begins without a `state`.
        """
        wide = promoted(x)
        with exact(x):
            log_decay = bounded_decay(dt.to(wide) * A.to(wide), resets)  # (b, l, h)
            later = F.pad(log_decay[:, 1:], (0, 0, 0, 1)).flip(1).double().cumsum(1).flip(1)
            written = outer_sum(later.exp().to(wide) * dt.to(wide), x, B)  # (b, h, p, n)
            decay = log_decay.double().sum(1).exp().to(wide)[..., None, None]
            state, decays = self.state_before(written, decay, torch.mul)
        y, last = run(x, dt, A, B, C, D, state, resets, *settings)
        return LaterPieces.apply(y, last, self, torch.mul, read_ssm, decays, log_decay, C), last

    def delta_rule(
        self, x: Tensor, beta: Tensor, log_decay: Tensor, K: Tensor, C: Tensor, state: Tensor,
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """run_delta_rule from the state that the pieces before leave; that of the text is 0.

        Zeros as values, and the identity as the first state, give the transition of the piece; what
        a query then reads is what it would read of the state before the piece.
        """
        width, wide = x.shape[-1], state.dtype
        with exact(x):
            same = torch.eye(K.shape[-1], dtype=wide, device=x.device).expand(len(x), -1, -1)
            values = F.pad(x.to(wide), (0, K.shape[-1]))  # (b, l, p+n)
            y, last = run_delta_rule(
                values, beta, log_decay, K, C, torch.cat((state, same), dim=1), *settings
            )
            written, transition = last.split((width, K.shape[-1]), dim=1)  # (b, p, n), (b, n, n)
            state, transitions = self.state_before(written, transition, torch.matmul)
            reads = y[..., width:].to(x.dtype)  # (b, l, n)
        y, last = run_delta_rule(x, beta, log_decay, K, C, state, *settings)
        return LaterPieces.apply(y, last, self, torch.matmul, read_delta, transitions, reads), last

    def state_before(
        self, written: Tensor, transition: Tensor, times: Times
    ) -> tuple[Tensor, Tensor]:
        """The state before the piece, and the transitions of all pieces (g, ...)."""
        parts, transitions = self.gather(written, transition)
        return fold(parts[: self.rank], transitions, times, written), transitions

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Each of the tensors, of one dtype, from all processes: (g, ...)."""
        message = torch.cat([t.flatten() for t in tensors])
        found = message.new_empty(self.size, len(message))
        dist.all_gather(list(found), message, group=self.group)
        self.sent += message.nbytes * (self.size - 1)
        parts = found.split([t.numel() for t in tensors], dim=1)
        return [part.reshape(-1, *t.shape) for part, t in zip(parts, tensors, strict=True)]

    def pass_on(self, t: Tensor, step: int) -> Tensor:
        """Send t `step` pieces on, 1 or -1, and get that of the other side; zeros at the end."""
        t, work = t.contiguous(), []
        found = torch.zeros_like(t)
        for act, tensor, other in ((dist.isend, t, step), (dist.irecv, found, -step)):
            if 0 <= self.rank + other < self.size:
                peer = dist.get_global_rank(self.group or dist.group.WORLD, self.rank + other)
                work.append(dist.P2POp(act, tensor, peer, self.group))
                self.sent += t.nbytes if act is dist.isend else 0
        for request in dist.batch_isend_irecv(work):
            request.wait()
        return found


@contextlib.contextmanager
def exact(x: Tensor) -> Iterator[None]:
    """Without gradients, and without autocast, which would round states on the device of x."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def fold(parts: Tensor, transitions: Tensor, times: Times, like: Tensor) -> Tensor:
    """The state after a row of pieces (g, ...), each of which adds its part to what it keeps."""
    state = torch.zeros_like(like)
    for part, transition in zip(parts, transitions, strict=False):
        state = times(state, transition) + part
    return state


def outer_sum(weights: Tensor, x: Tensor, B: Tensor) -> Tensor:
    """The weighted sum of x B^T over tokens, (b, h, p, n).

    weights (b, l, h), x (b, l, h, p), B (b, l, n).
    """
    weighted = x.to(weights.dtype) * weights[..., None]
    return torch.einsum("blhp,bln->bhpn", weighted, B.to(weights.dtype))


def read_ssm(dy: Tensor, log_decay: Tensor, C: Tensor) -> Tensor:
    """The gradient (b, h, p, n) of the state before a piece from that of y (b, l, h, p)."""
    since_start = log_decay.double().cumsum(1).exp()  # (b, l, h)
    return outer_sum(since_start.to(log_decay.dtype), dy, C)


def read_delta(dy: Tensor, reads: Tensor) -> Tensor:
    """The same (b, p, n) of the delta rule; dy (b, l, p), reads (b, l, n)."""
    wide = promoted(dy)
    return dy.to(wide).mT @ reads.to(wide)


class LastInputs(torch.autograd.Function):
    """The tensor of the piece before, or zeros; its gradient goes back there."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, pieces: PiecesBefore) -> Tensor:
        """The tensor of the piece before."""
        ctx.pieces = pieces
        return pieces.pass_on(t, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor, None]:
        """The gradient that the next piece has for this one's tensor."""
        return ctx.pieces.pass_on(dt, -1), None


class SumBefore(torch.autograd.Function):
    """The sum of a tensor over the pieces before."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, pieces: PiecesBefore) -> Tensor:
        """That sum."""
        ctx.pieces = pieces
        return pieces.gather(t)[0][: pieces.rank].sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor, None]:
        """The sum of the gradients of the pieces after."""
        return ctx.pieces.gather(dt)[0][ctx.pieces.rank + 1 :].sum(0), None


class LaterPieces(torch.autograd.Function):
    """y as it is. The backward pass gives the last state the gradient that later pieces have."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, last: Tensor, pieces: PiecesBefore, times: Times,
        read: Callable[..., Tensor], transitions: Tensor, *saved: Tensor,
    ) -> Tensor:  # fmt: skip
        """`read` gives the gradient of the state before a piece, from that of y and `saved`."""
        ctx.pieces, ctx.times, ctx.read = pieces, times, read
        ctx.save_for_backward(transitions, *saved)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of y and of the last state."""
        transitions, *saved = ctx.saved_tensors
        own = ctx.read(dy, *saved)
        [gradients] = ctx.pieces.gather(own)
        later = slice(ctx.pieces.rank + 1, None)
        parts = gradients[later].flip(0)  # from the last piece on
        dlast = fold(parts, transitions[later].mT.flip(0), ctx.times, own)
        return dy, dlast, *[None] * (4 + len(saved))


# ------------------------------------------------------------------------------------ a run


class Pieces(torch.utils.data.Dataset):
    """The same part of every sample of a dataset: of `count` equal ones, the one of a number."""

    def __init__(self, data: Any, number: int, count: int):
        self.data, self.number, self.count = data, number, count

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return tuple(t.chunk(self.count)[self.number] for t in self.data[i])


def check_pieces(config: Any) -> None:
    """Reject a Config whose texts cannot be cut into `context_parallel` pieces."""
    count, field = config.context_parallel, "context_parallel"
    if count == 1:
        return
    length = config.block_size // count
    problem = f"{count} pieces of block_size={config.block_size} would not be equally long"
    require(length * count == config.block_size, field, problem, "make it a divisor")
    for name in ("window_size", "d_conv"):
        least = getattr(config, name) - 1
        problem = f"pieces of {length} tokens are shorter than what {name}={least + 1} looks back"
        remedy = f"lower it, or raise block_size to {count * least}"
        require(length >= least, field, problem, remedy)
    stored = not config.teacher or config.teacher.endswith(".teacher.bin")
    problem, remedy = "reads whole texts, not pieces", "store its lessons with data/prepare.py"
    require(stored, "teacher", f"{problem} of context_parallel={count}", remedy)


def join_pieces(count: int, world: int) -> PiecesBefore | None:
    """The group of `count` consecutive processes that this one shares its texts with."""
    if count == 1:
        return None
    problem = f"{count} does not divide the number of processes, {world}"
    remedy = "start as many with torchrun --nproc_per_node, or pass another number"
    require(world % count == 0, "context_parallel", problem, remedy)
    group, _ = dist.new_subgroups(count)
    keep(group)
    return PiecesBefore(group)
