"""Muon over several processes: who orthogonalizes which matrix, and what is sent for that.

Newton-Schulz needs a whole matrix, so every matrix has one process that owns it. With FSDP all
processes send their rows of its update to the owner, which sends back their rows of the result.
With DDP each process has the whole update, and gets the results of the owners. Both happen in
rounds of bounded size. Messages are in bfloat16 as Newton-Schulz is, so they lose nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tinymamba.distributed import local_tensor

ROUND = 2**25  # most numbers that a process orthogonalizes at a time
ITERATIONS = 5  # of Newton-Schulz


def orthogonalize(x: Tensor) -> Tensor:
    """Bring the singular values of x (count, rows, columns) near 1: Newton-Schulz in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.bfloat16().mT if tall else x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_all(matrices: list[Tensor]) -> list[Tensor]:
    """The same for each (rows, columns), in batches of equal shape."""
    places: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        places.setdefault(matrix.shape, []).append(i)
    new = list(matrices)
    for same in places.values():
        batch = orthogonalize(torch.stack([matrices[i] for i in same]))
        for i, matrix in zip(same, batch, strict=True):
            new[i] = matrix
    return new


# -------------------------------------------------------------------------------------- the plan


class Matrix(NamedTuple):
    """A matrix that Muon orthogonalizes: rows of a parameter, or all of them."""

    parameter: int  # its place among the parameters
    first: int  # its first row there
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.rows * self.columns

    @property
    def flops(self) -> int:
        """Of `orthogonalize`: two products with x, and one of two Gram matrices."""
        small, large = sorted((self.rows, self.columns))
        return ITERATIONS * (4 * small**2 * large + 2 * small**3)


Round = Sequence[Sequence[Matrix]]  # the matrices that each process orthogonalizes in a round


def list_matrices(parts: dict[Tensor, list[int]]) -> list[Matrix]:
    """The matrices in the parameters, each of which has parts of so many rows."""
    return [
        Matrix(i, sum(rows[:k]), count, p.shape[1])
        for i, (p, rows) in enumerate(parts.items())
        for k, count in enumerate(rows)
    ]


def assign(matrices: list[Matrix], processes: int) -> list[list[Matrix]]:
    """The matrices of each process, of about equal FLOPs: the largest first, to who has least.

    The largest load is at most 4/3 of the best possible one (Graham, 1969). The result depends on
    the shapes alone, so all processes find the same.
    """
    owned: list[list[Matrix]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for matrix in sorted(matrices, key=lambda m: (-m.flops, m.rows)):
        owner = loads.index(min(loads))
        owned[owner].append(matrix)
        loads[owner] += matrix.flops
    return owned


def plan_rounds(matrices: list[Matrix], processes: int) -> list[Round]:
    """Rounds in which each process takes matrices of ROUND numbers at most, or a single one."""
    owned = [cut(own, ROUND) for own in assign(matrices, processes)]
    return list(itertools.zip_longest(*owned, fillvalue=()))


def cut(matrices: list[Matrix], limit: int) -> list[list[Matrix]]:
    """Cut a list where the numbers in a piece would exceed the limit."""
    pieces: list[list[Matrix]] = []
    room = 0
    for matrix in matrices:
        if not pieces or matrix.size > room:
            pieces.append([])
            room = limit
        pieces[-1].append(matrix)
        room -= matrix.size
    return pieces


# ----------------------------------------------------------------------------------- the exchange


def pack(tensors: Iterable[Tensor], device: torch.device | None) -> Tensor:
    """All numbers of bfloat16 tensors, one after another."""
    nothing = torch.empty(0, dtype=torch.bfloat16, device=device)
    return torch.cat([nothing, *(t.reshape(-1) for t in tensors)])


def unpack(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The tensors of these shapes that `pack` has put together."""
    pieces = flat.split([rows * columns for rows, columns in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


class Copies:
    """Each process holds whole parameters and the same gradients (DDP), or there is one process."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.device = parameters[0].device if parameters else None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def held(self, t: Any, matrix: Matrix) -> Tensor:
        """The rows of a matrix in its parameter, or in a tensor like it."""
        return t[matrix.first : matrix.first + matrix.rows]

    def collect(self, owners: Round, read: Callable[[Matrix], Tensor]) -> list[Tensor]:
        """The updates of this process's matrices; `read` gives what this process has of one."""
        return [read(matrix) for matrix in owners[self.rank]]

    def share(self, owners: Round, mine: list[Tensor]) -> Iterator[list[Tensor]]:
        """The results of one owner after the other, which broadcasts them.

        That sends as much as an all-gather would, but nobody holds the results of all owners.
        """
        for owner, matrices in enumerate(owners):
            if self.size == 1 or not matrices:
                yield mine if owner == self.rank else []
                continue
            flat = pack(mine, self.device)
            if owner != self.rank:
                flat = flat.new_empty(sum(matrix.size for matrix in matrices))
            dist.broadcast(flat, owner)
            yield unpack(flat, [matrix.shape for matrix in matrices])


class Shards:
    """Each process holds some rows of every parameter, as torch.chunk cuts them (FSDP)."""

    def __init__(self, parameters: Sequence[Any]):
        self.device = local_tensor(parameters[0]).device
        mesh, placements = parameters[0].device_mesh, parameters[0].placements
        [dim] = [i for i, placement in enumerate(placements) if placement.is_shard(0)]
        self.group, self.rank = mesh.get_group(dim), mesh.get_local_rank(dim)
        self.size = mesh.size(dim)
        self.most = [-(-len(p) // self.size) for p in parameters]  # rows of a process
        for i, p in enumerate(parameters):
            rows = self.span(Matrix(i, 0, *p.shape), self.rank)
            assert len(local_tensor(p)) == len(rows), "parameters are cut in another way"

    def span(self, matrix: Matrix, rank: int) -> range:
        """The rows of a matrix, counted from its first, that a process holds."""
        begin = rank * self.most[matrix.parameter] - matrix.first
        end = begin + self.most[matrix.parameter]
        return range(*(min(max(row, 0), matrix.rows) for row in (begin, end)))

    def held(self, t: Any, matrix: Matrix) -> Tensor:
        """The rows of a matrix in this process's shard of its parameter, or of a tensor like it."""
        rows = self.span(matrix, self.rank)
        before = matrix.first - self.rank * self.most[matrix.parameter]
        return local_tensor(t)[before + rows.start : before + rows.stop]

    def shapes(self, matrices: Iterable[Matrix], rank: int) -> list[tuple[int, int]]:
        """The shapes of what a process holds of each matrix."""
        return [(len(self.span(matrix, rank)), matrix.columns) for matrix in matrices]

    def collect(self, owners: Round, read: Callable[[Matrix], Tensor]) -> list[Tensor]:
        """The updates of this process's matrices; `read` gives what this process has of one."""
        sent = [[read(matrix) for matrix in matrices] for matrices in owners]
        mine = owners[self.rank]
        received = self.exchange(sent, [self.shapes(mine, rank) for rank in range(self.size)])
        return [torch.cat(shards) for shards in zip(*received, strict=True)]

    def share(self, owners: Round, mine: list[Tensor]) -> Iterable[list[Tensor]]:
        """This process's rows of the results, a list for each owner."""
        sent = [
            [
                new[rows.start : rows.stop]
                for matrix, new in zip(owners[self.rank], mine, strict=True)
                for rows in [self.span(matrix, rank)]
            ]
            for rank in range(self.size)
        ]
        return self.exchange(sent, [self.shapes(matrices, self.rank) for matrices in owners])

    def exchange(
        self, sent: list[list[Tensor]], shapes: list[list[tuple[int, int]]]
    ) -> list[list[Tensor]]:
        """All-to-all: send tensors to each process, and get those of `shapes` from each."""
        lengths = [sum(t.numel() for t in tensors) for tensors in sent]
        expected = [sum(rows * columns for rows, columns in each) for each in shapes]
        flat = pack(itertools.chain(*sent), self.device)
        received = flat.new_empty(sum(expected))
        dist.all_to_all_single(received, flat, expected, lengths, group=self.group)
        return [
            unpack(piece, each)
            for piece, each in zip(received.split(expected), shapes, strict=True)
        ]


def find_layout(parameters: Sequence[Tensor]) -> Copies | Shards:
    """How the parameters of this process lie with those of the others."""
    sharded = any(hasattr(p, "device_mesh") for p in parameters)
    return Shards(parameters) if sharded else Copies(parameters)
