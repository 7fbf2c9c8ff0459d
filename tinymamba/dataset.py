"""Training data: blocks of tokens from .bin files, in an order that is a pure function."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinymamba.cli import require
from tinymamba.data_order import MixtureSchedule, permute
from tinymamba.token_shards import open_tokens


class StreamingTokenDataset(torch.utils.data.Dataset):
    """Blocks of tokens from one or more .bin files, in an order that is a pure function.

    `dataset[i]` is a pair of int64 tensors, inputs and targets, each (block_size,). Any i >= 0 is
    valid: `i // len(dataset)` is the epoch. Sample i depends on (seed, i) alone, so one integer is
    the position in the data, for any number of processes and workers. No block is read twice in an
    epoch, which ends before the first source would repeat one. `weights` are the sources' weights
    (default: their sizes, which reads everything once).
    """

    masked = False  # every target counts in the loss
    lessons: Any = None  # StoredLessons of a teacher: a sample has its ids and logprobs as well

    def __init__(
        self,
        data_sources: str | Path | list,
        block_size: int,
        weights: list[float] | None = None,
        shuffle: bool = False,
        seed: int = 1337,
        vocab_size: int | None = None,
        data_dtype: str = "auto",
    ):
        paths = [data_sources] if isinstance(data_sources, str | Path) else data_sources
        self.block_size, self.shuffle, self.seed = block_size, shuffle, seed
        self.vocab_size = vocab_size
        self.files = [self.open_file(path, data_dtype) for path in paths]
        require(self.files, "data_sources", "is empty", "name at least one .bin file")
        self.blocks = []
        for file in self.files:
            self.blocks.append(self.count_blocks(file))
            if vocab_size is not None:
                file.check(vocab_size, 0, file.length)
        integers = self.blocks if weights is None else self._integer_weights(weights)
        self.schedule = MixtureSchedule(integers)
        self.length = sum(self.blocks) if weights is None else self._epoch_length()
        self.epoch, self.before_epoch = 0, self.schedule.counts(0)  # samples before the epoch

    def open_file(self, path: str | Path, data_dtype: str) -> Any:
        """One source."""
        return open_tokens(path, data_dtype)

    def count_blocks(self, file: Any) -> int:
        """How many samples a source has."""
        size = self.block_size
        problem = f"{file.length} tokens are too few for block_size={size}"
        require(file.length > size, file.path, problem, f"it needs {size + 1}")
        return (file.length - 1) // size

    def _integer_weights(self, given: list[float]) -> list[int]:
        weights, field = [float(w) for w in given], "train_data_weights"
        problem = f"{len(weights)} weights for {len(self.files)} sources"
        require(len(weights) == len(self.files), field, problem, "give one for each")
        problem = f"{weights} are not all above 0"
        remedy = "leave out sources of weight 0"
        require(all(math.isfinite(w) and w > 0 for w in weights), field, problem, remedy)
        exact = [Fraction(str(w)) for w in weights]
        whole = [int(w * math.lcm(*(e.denominator for e in exact))) for w in exact]
        return [w // math.gcd(*whole) for w in whole]

    def _epoch_length(self) -> int:
        """The most samples in which no source can run out, in any epoch."""
        total, weights = sum(self.schedule.weights), self.schedule.weights
        whole_cycles = min(b // w for b, w in zip(self.blocks, weights, strict=True)) * total
        # The schedule is within 2 at both ends of an epoch, so 4 blocks of slack are always enough.
        with_slack = min((b - 4) * total // w for b, w in zip(self.blocks, weights, strict=True))
        return max(whole_cycles, with_slack, min(self.blocks))

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.length

    def has_inside(self, token: int) -> bool:
        """Whether a conversation goes on after this token; plain text has no conversations."""
        return self.masked and any(file.has_inside(token) for file in self.files)

    def locate(self, i: int) -> tuple[int, int]:
        """(source, block) of sample i."""
        i = operator.index(i)  # any integer type, as numpy's
        if i < 0:
            raise IndexError(f"sample {i}: samples are numbered from 0")
        epoch, (source, nth) = i // self.length, self.schedule.locate(i)
        if epoch != self.epoch:
            self.epoch, self.before_epoch = epoch, self.schedule.counts(epoch * self.length)
        nth -= self.before_epoch[source]
        if not self.shuffle:
            return source, nth
        key = hashlib.sha256(b"%d %d %d" % (self.seed, source, epoch)).digest()
        return source, permute(nth, self.blocks[source], key)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        source, block = self.locate(i)
        begin, end = block * self.block_size, (block + 1) * self.block_size + 1
        if self.vocab_size is not None:  # again, in case the file has changed since
            self.files[source].check(self.vocab_size, begin, end)
        ids = torch.from_numpy(self.files[source].read(begin, end).astype(np.int64))
        lesson = () if self.lessons is None else self.lessons.read(begin, end - 1)
        return ids[:-1], ids[1:], *lesson

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """One epoch, in order."""
        return map(self.__getitem__, range(len(self)))

    def fingerprint(self) -> dict:
        """What a position in the data depends on; a resumed run compares it."""
        files = [[Path(f.path).name, f.length, str(f.dtype), f.sampled_hash()] for f in self.files]
        weights = [str(w) for w in self.schedule.weights]
        order = {"block_size": self.block_size, "seed": self.seed, "shuffle": self.shuffle}
        return {**order, "sources": files, "weights": weights}
