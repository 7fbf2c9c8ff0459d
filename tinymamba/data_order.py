"""The order of training data, as pure functions: of a shuffle, of a mixture, of several ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any


def permute(index: int, size: int, key: bytes) -> int:
    """The image of `index` under a pseudo-random permutation of range(size), in constant memory.

    A four-round Feistel network on the next even number of bits, applied again while the result is
    outside of the range (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(4):
            mixed = hashlib.blake2b(b"%d %d" % (round_, right), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
        index = left << half | right
        if index < size:
            return index


class MixtureSchedule:
    """Assigns samples 0, 1, 2, ... to sources in proportion to their weights.

    After n samples each source has provided n * weight / sum(weights) of them, within 2.

    A balanced binary tree: of its first n samples a node sends round(n * left / total) to the left,
    in integers, so no error builds up. No inner child holds over 2/3 of its parent's weight, so the
    errors of 1/2 per node add up to less than 2.
    """

    def __init__(self, weights: list[int]):
        """`weights`: positive integers."""
        self.weights = weights
        self.tree = self._grow(sorted(range(len(weights)), key=lambda i: -weights[i]))

    def _grow(self, sources: list[int]) -> Any:
        if len(sources) == 1:
            return sources[0]
        total, left, cut = sum(self.weights[i] for i in sources), 0, 0
        while cut < len(sources) - 1 and 3 * left < total:
            left, cut = left + self.weights[sources[cut]], cut + 1
        return self._grow(sources[:cut]), self._grow(sources[cut:]), left, total

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and how many samples that source had before."""
        node = self.tree
        while not isinstance(node, int):
            low, high, left, total = node
            to_left, after = ((2 * n * left + total) // (2 * total) for n in (sample, sample + 1))
            node, sample = (low, to_left) if after > to_left else (high, sample - to_left)
        return node, sample

    def counts(self, n: int, node: Any = None) -> dict[int, int]:
        """How many of the first n samples each source gets."""
        node = self.tree if node is None else node
        if isinstance(node, int):
            return {node: n}
        low, high, left, total = node
        to_left = (2 * n * left + total) // (2 * total)
        return self.counts(to_left, low) | self.counts(n - to_left, high)


class ShardedBatches:
    """Batches of consecutive sample numbers, distributed over the ranks one after another."""

    def __init__(self, first: int, last: int, batch_size: int, rank: int = 0, world: int = 1):
        self.starts = range(first + rank * batch_size, last, batch_size * world)
        self.last, self.batch_size = last, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(s, min(s + self.batch_size, self.last))) for s in self.starts)

    def __len__(self) -> int:
        return len(self.starts)
