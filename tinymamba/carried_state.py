"""Truncated back-propagation through time: rows read on from step to step, and states go with them.

With --carry_state, row r of a step goes on in the text where row r of the step before has ended,
from the state that the model had there (Williams & Peng 1990, "An efficient gradient-based
algorithm for on-line training of recurrent network trajectories"). The state is a constant: the
gradient ends where the block begins, so a step takes the memory of one block.

A step has `rows` rows: those of all its micro-batches and processes. Row r of step s is sample
s * rows + r.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tinymamba.cli import from_launcher, require
from tinymamba.data_order import permute
from tinymamba.dataset import StreamingTokenDataset

# ----------------------------------------------------------------------------------- the order


class Epoch(NamedTuple):
    """Where an epoch reads: its tape is one stretch of each source, laid end to end."""

    bounds: list[int]  # the place on the tape at which the stretch of each source begins
    first: list[int]  # the block of each source with which its stretch begins
    shift: int  # the place on the tape at which the first run begins
    key: bytes  # of the permutation that gives each row its run


class RowOrder:
    """Which block row r of step s reads: a pure function.

    The stretches of an epoch are as long as the weights say, so that no source ends before the
    tape. The tape is cut into as many equal runs as there are rows, and each row reads one run. As
    runs begin at even distances, every step takes its share from each source, within one row. Where
    a run comes to the next source, or to the end of a file, its text begins anew. Less than a block
    for each row is left out. All places are drawn anew for each epoch.
    """

    def __init__(self, blocks: list[int], weights: list[int], rows: int, seed: int):
        """`blocks` and `weights` of each source, which are positive integers."""
        self.blocks, self.weights, self.rows, self.seed = blocks, weights, rows, seed
        most = min(Fraction(b, w) for b, w in zip(blocks, weights, strict=True))
        self.tape = math.floor(most * sum(weights))  # blocks of an epoch
        self.steps = self.tape // rows
        self.number, self.epoch = 0, self.draw_epoch(0)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.steps * self.rows

    def draw_epoch(self, number: int) -> Epoch:
        """The places of an epoch. A stretch of no whole number of blocks is rounded at random."""

        def draw(what: str) -> int:
            text = b"%d %d %s" % (self.seed, number, what.encode())
            return int.from_bytes(hashlib.sha256(text).digest()[:16], "little")

        part, total = Fraction(draw("rounding"), 1 << 128), sum(self.weights)
        before = [0, *accumulate(self.weights)][:-1]
        return Epoch(
            [math.floor(Fraction(self.tape * weight, total) + part) for weight in before],
            [draw(f"source {i}") % count for i, count in enumerate(self.blocks)],
            draw("shift") % self.tape,
            draw("rows").to_bytes(16, "little"),
        )

    def locate(self, i: int) -> tuple[int, int]:
        """(source, block) of sample i."""
        step, row = divmod(i, self.rows)
        number, step = divmod(step, self.steps)
        if number != self.number:
            self.number, self.epoch = number, self.draw_epoch(number)
        epoch = self.epoch
        run = permute(row, self.rows, epoch.key)
        place = (epoch.shift + run * self.tape // self.rows + step) % self.tape
        source = bisect_right(epoch.bounds, place) - 1
        block = epoch.first[source] + place - epoch.bounds[source]
        return source, block % self.blocks[source]

    def begins(self, i: int) -> bool:
        """Whether sample i does not go on where the sample of its row in the step before ended."""
        if i // self.rows % self.steps == 0:
            return True
        source, block = self.locate(i - self.rows)
        return self.locate(i) != (source, block + 1)


class RowDataset(StreamingTokenDataset):
    """Blocks of tokens in the order of RowOrder: sample i goes on where sample i - rows ended."""

    def __init__(self, *args: Any, rows: int, **settings: Any):
        """All other arguments are those of StreamingTokenDataset; the order is always shuffled."""
        super().__init__(*args, **settings)
        self.rows = rows
        self.order = RowOrder(self.blocks, self.schedule.weights, rows, self.seed)
        self.length = len(self.order)
        problem = f"a step reads {rows} rows, but an epoch has {self.order.tape} blocks of text"
        require(self.length, "batch_size", problem, "lower it or block_size")

    def locate(self, i: int) -> tuple[int, int]:
        """(source, block) of sample i."""
        if i < 0:
            raise IndexError(f"sample {i}: samples are numbered from 0")
        return self.order.locate(int(i))

    def fingerprint(self) -> dict:
        """What a position in the data depends on; a resumed run compares it."""
        return {**super().fingerprint(), "rows": self.rows}


def row_settings(config: Any, rows: int) -> dict[str, int]:
    """The argument that makes a run's dataset one of rows; none without carry_state.

    Settings of a Config that do not go with it are a UserError.
    """
    if not config.carry_state:
        return {}
    remedy = "leave one of them out"
    problem = "reads each block alone, but with carry_state the model knows the text before it"
    require(not config.teacher, "teacher", problem, remedy)
    whole = config.context_parallel == 1
    require(whole, "context_parallel", "does not go with carry_state", remedy)
    return {"rows": rows}


# ---------------------------------------------------------------------------------- the states


class CarriedStates:
    """The states of this process's rows: a ModelState for each micro-batch of a step."""

    def __init__(self, model: Any, data: RowDataset, config: Any):
        """Every row of `data` stands at the beginning of a text."""
        problem = "of prefix tuning learns the state before a text, which carry_state keeps at zero"
        require(model.start is None, "method", problem, "use another method, or no carry_state")
        self.data, self.batch = data, config.batch_size
        self.rank, self.world = from_launcher("RANK", 0), from_launcher("WORLD_SIZE", 1)
        count = config.gradient_accumulation_steps
        self.states = [model.init_state(self.batch) for _ in range(count)]
        self.next = list(self.states)  # what the step in progress has computed

    def rows(self, i: int) -> range:
        """The rows of a step that micro-batch i of this process reads."""
        first = (i * self.world + self.rank) * self.batch
        return range(first, first + self.batch)

    def loss(self, model: Any, batch: Any, i: int) -> Tensor:
        """The mean loss of micro-batch i, which goes on from its state."""
        ids, targets = batch
        loss, state = model(ids, targets, state=self.states[i])
        # A copy: some tensors are views of what the backward pass holds of the whole block.
        self.next[i] = state.map(lambda t: t.detach().clone())
        return loss

    def advance(self, first: int, good: bool) -> None:
        """Go on to the step that begins with sample `first`; rows whose text ends begin anew.

        After a step that was not good, so do rows whose state is not finite: they would never be.
        """
        for i, state in enumerate(self.next):
            begins = [self.data.order.begins(first + row) for row in self.rows(i)]
            erased = torch.tensor(begins, device=state.position.device)
            if not good:
                erased |= find_broken(state)
            if not good or any(begins):
                state = erase_rows(state, erased)
            self.states[i] = state

    def gather(self) -> dict[str, Tensor]:
        """The states of all rows by name, in order, on the first process; {} on the others."""
        tensors = self.states[0].join(self.states).tensors()
        if self.world == 1:
            return tensors
        gathered = {name: self.gather_rows(t) for name, t in tensors.items()}
        return gathered if self.rank == 0 else {}

    def gather_rows(self, t: Tensor) -> Tensor:
        """The rows of all processes, of t (micro-batches * batch, ...), on the first process."""
        parts = [torch.empty_like(t) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(t, parts)
        if parts is None:
            return t
        each = torch.stack(parts).unflatten(1, (-1, self.batch))  # (world, micro-batches, batch,)
        return each.transpose(0, 1).flatten(0, 2)

    def restore(self, saved: dict, config: Any, path: str) -> None:
        """Take this process's rows from a checkpoint; if the data have changed, all begin anew."""
        told, rows = self.data.fingerprint(), self.data.rows
        had, remedy = saved["data"].get("rows"), "use a checkpoint of this run, or start a new run"
        problem = f"a step has {rows} rows, but {path} has the states of {had}"
        ways = f"make batch_size x gradient_accumulation_steps x processes {had}"
        same = had == rows or config.accept_changed_data
        require(same, "batch_size", problem, f"{ways}, or pass --accept_changed_data")
        if any(saved["data"].get(name) != value for name, value in told.items()):
            return
        tensors, like = saved.get("carried_state", {}), self.states[0].tensors()
        known = tensors.keys() == like.keys()
        for name, t in like.items() if known else ():
            shape, dtype = (rows, *t.shape[1:]), t.dtype
            known = known and (tensors[name].shape, tensors[name].dtype) == (shape, dtype)
        require(known, path, f"has no states of {rows} rows of this model", remedy)
        for i, state in enumerate(self.states):
            own = slice(self.rows(i).start, self.rows(i).stop)
            state.fill({name: t[own] for name, t in tensors.items()})


def find_broken(state: Any) -> Tensor:
    """The rows (b,) of a ModelState that hold a number that is not finite."""
    finite = [t.flatten(1).isfinite().all(1) for t in state.tensors().values() if t.dim() > 1]
    return ~torch.stack(finite).all(0)


def erase_rows(state: Any, rows: Tensor) -> Any:
    """A ModelState that is, in the rows (b,) of bool, that before any token."""
    return state.map(lambda t: t.masked_fill(rows.view(-1, *[1] * (t.dim() - 1)), 0))
