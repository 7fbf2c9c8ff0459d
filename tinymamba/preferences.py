"""Preferences: pairs of answers to one prompt, and the losses that make a model prefer the better.

DPO (Rafailov et al., arXiv 2305.18290) compares the model with a reference, the model before
training. SimPO (Meng et al., arXiv 2405.14734) needs none: it compares mean log-probabilities.

`data/prepare.py --chat` writes the files; conversations alternate: chosen, rejected, chosen, ...

Dimension letters in the comments on shapes:
    b pairs      r rows: two for each pair      l length      d channels
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinymamba.cli import check_fields, require
from tinymamba.conversations import (
    IGNORED,
    PREFERENCES,
    REMEDY,
    ConversationFile,
    empty_rows,
    find_kind,
    put,
)
from tinymamba.dataset import StreamingTokenDataset
from tinymamba.kernels import in_chunks, promoted
from tinymamba.token_shards import files_of

# ------------------------------------------------------------------------------------- losses


@dataclass
class Objective:
    """What a run minimizes, and the settings of that."""

    # Objective
    objective: str = "likelihood"  # the loss; dpo and simpo learn from pairs of answers
    beta: float | None = None  # scale of the rewards of dpo and simpo; None is 0.1 and 2.0
    gamma: float | None = None  # margin that simpo asks for between rewards; None is 1.0

    CHOICES: ClassVar = {"objective": ("likelihood", "dpo", "simpo")}
    LIMITS: ClassVar = {"beta": (1e-6, math.inf), "gamma": (0, math.inf)}

    def validate(self) -> Objective:
        """Reject impossible and unused values with a UserError; fill in defaults; return self."""
        check_fields(self)
        remedy = "leave it out"
        unused = {"beta": self.objective == "likelihood", "gamma": self.objective != "simpo"}
        for name, is_unused in unused.items():
            problem = f"has no meaning with --objective {self.objective}"
            require(getattr(self, name) is None or not is_unused, name, problem, remedy)
        if self.beta is None and self.of_pairs:
            self.beta = 0.1 if self.objective == "dpo" else 2.0
        if self.gamma is None and self.objective == "simpo":
            self.gamma = 1.0
        return self

    @property
    def of_pairs(self) -> bool:
        """Whether it learns from pairs of answers."""
        return self.objective != "likelihood"

    def rewards(self, scores: Tensor, lengths: Tensor, reference: Tensor | None) -> Tensor:
        """The implicit rewards of both answers (b, 2).

        `scores` and `reference` are log-probabilities (b, 2) of the answers under the model and
        the reference, `lengths` (b, 2) their tokens. DPO: section 4; SimPO: eq. 4.
        """
        if self.objective == "simpo":
            return self.beta * scores / lengths
        return self.beta * (scores - reference)

    def losses(self, rewards: Tensor) -> Tensor:
        """-log sigmoid(reward of the chosen - of the rejected - gamma): (b, 2) -> (b,).

        DPO: eq. 7; SimPO: eq. 6.
        """
        return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - (self.gamma or 0.0))


def score_rows(hidden: Tensor, targets: Tensor, head: Callable, chunk: int) -> Tensor:
    """The sum of the log-probabilities of each row's counted targets (r, l): (r,).

    `head` maps hidden (r, l, d) to logits. Only tokens that count get them, and those of `chunk`
    tokens are in memory at a time: the backward pass makes them again.
    """

    def score_tokens(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h)
        return -F.cross_entropy(logits.to(promoted(logits)), t, reduction="none")

    counted = targets != IGNORED
    scores = torch.cat([*in_chunks(score_tokens, chunk, hidden[counted], targets[counted])])
    table = scores.new_zeros(targets.shape).masked_scatter(counted, scores)  # (r, l)
    return table.sum(-1)


# --------------------------------------------------------------------------------------- data


class PairFile(ConversationFile):
    """The conversations of one source, of which two and two are a pair."""

    def __init__(self, path: str | Path, data_dtype: str = "auto"):
        remedy = "prepare rows with chosen and rejected, or leave --objective out"
        for file in files_of(path):
            require(Path(file).is_file(), file, "no such file", REMEDY)
            kind = find_kind(file)
            require(kind == PREFERENCES, file, f"holds {kind}, not {PREFERENCES}", remedy)
        super().__init__(path, data_dtype)
        count = len(self.offsets) - 1
        problem = f"{count} conversations are not pairs of a chosen and a rejected one"
        require(count % 2 == 0, self.path, problem, REMEDY)
        self.pairs = count // 2

    def read_pair(self, number: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
        """Ids and mask (length,) of both conversations; how many tokens their prompt has.

        A pair that teaches nothing is a UserError.
        """
        both = [self.read(2 * number), self.read(2 * number + 1)]
        (chosen, counts), (rejected, others) = both
        name = f"{self.path}: pair {number}"
        require(counts.any() and others.any(), name, "an answer has no token that counts", REMEDY)
        length = int(counts.argmax())
        shared = length == others.argmax() and (chosen[:length] == rejected[:length]).all()
        require(length and shared, name, "the prompts differ", REMEDY)
        require(
            not np.array_equal(chosen, rejected), name, "both answers are equal", "leave it out"
        )
        return both, length

    def count_cut(self, block_size: int) -> int:
        """How many pairs lose tokens; an answer that does not fit is a UserError."""
        lengths = np.diff(self.offsets).reshape(-1, 2).max(1)  # (pairs,)
        cut = np.flatnonzero(lengths > block_size).tolist()
        # At least one token has to precede an answer.
        missing = {n: int(lengths[n]) - block_size + 1 - self.read_pair(n)[1] for n in cut}
        longest = max(missing, key=lambda n: missing[n], default=0)
        more = missing.get(longest, 0)
        problem = f"an answer of pair {longest} is longer than block_size={block_size}"
        remedy = f"pass --block_size {block_size + more}, or leave the pair out"
        require(more <= 0, self.path, problem, remedy)
        return len(cut)


class PairDataset(StreamingTokenDataset):
    """Pairs of conversations of one or more .bin files, in an order that is a pure function.

    `dataset[i]` is (inputs, targets, ends, number): a row for the chosen and one for the rejected
    conversation, each (2, block_size), as a ConversationDataset has them, and the pair's number. A
    pair that is too long loses the beginning of its prompt, the same tokens in both rows.
    """

    masked = True

    def open_file(self, path: str | Path, data_dtype: str) -> PairFile:
        """One source."""
        return PairFile(path, data_dtype)

    def count_blocks(self, file: PairFile) -> int:
        """How many pairs a source has."""
        file.cut = file.count_cut(self.block_size)
        return file.pairs

    @property
    def first(self) -> list[int]:
        """The number of each source's first pair, and the number of all pairs."""
        return [0, *itertools.accumulate(self.blocks)]

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        source, pair = self.locate(i)
        return self.rows(self.first[source] + pair)

    def rows(self, number: int) -> tuple[Tensor, ...]:
        """The sample of a pair, by its number."""
        source = bisect.bisect_right(self.first, number) - 1
        pair = number - self.first[source]
        both, _ = self.files[source].read_pair(pair)
        excess = max(0, *(len(ids) - self.block_size for ids, _ in both))
        pair_rows = empty_rows(2, self.block_size)
        for row, (ids, counts) in enumerate(both):
            put([part[row] for part in pair_rows], 0, ids[excess:], counts[excess:])
        return *pair_rows, torch.tensor(number)

    def describe(self) -> Iterator[str]:
        """What to say of the data before they are used."""
        for file in self.files:
            yield f"{file.path}: {file.pairs} pairs"
            if file.cut:
                longer = f"{file.cut} are longer than {self.block_size}"
                yield f"{file.path}: {longer} and lose the beginning of their prompt"

    def first_prompt(self) -> list[int]:
        """The ids of the first prompt."""
        [(ids, _), _], length = self.files[0].read_pair(0)
        return ids[:length].tolist()


class EveryPair(torch.utils.data.Dataset):
    """The samples of all pairs of a PairDataset, by number."""

    def __init__(self, data: PairDataset):
        self.data = data

    def __len__(self) -> int:
        return self.data.first[-1]

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        return self.data.rows(number)


def flatten_pairs(batch: list[Tensor], multiple: int) -> list[Tensor]:
    """Rows (b, 2, l) of a batch as (2b, l), without the columns in which nothing counts any more.

    What is left is a multiple of `multiple` columns, so that there are few shapes to compile.
    """
    *parts, numbers = batch
    rows = [part.flatten(0, 1) for part in parts]  # inputs, targets, ends: (r, l)
    used = int((rows[1] != IGNORED).any(0).nonzero().max()) + 1
    width = -(-used // multiple) * multiple
    return [*(part[:, :width].contiguous() for part in rows), numbers]
