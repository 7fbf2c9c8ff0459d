"""The merges of a byte-level BPE tokenizer, learned from counted words.

The result is that of the library `tokenizers`, which learns from text only and keeps every word of
it in memory. Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from tinymamba.tokenizer import byte_alphabet

PAIR_BITS = 21  # of a symbol in the number of a pair
PAIR_MASK = (1 << 2 * PAIR_BITS) - 1
BORDER, DEAD = -1, -2  # in place of a symbol: between words, and where one was merged away


def learn_merges(
    words: dict[str, int], specials: list[str], vocab_size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of words with their counts.

    The first ids are those of `specials`, then come bytes. The most frequent pair of tokens is
    merged; of equally frequent ones that with the lower ids.
    """
    alphabet = byte_alphabet()
    tokens = [*specials, *sorted(alphabet)]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges: dict[int, tuple[str, str]] = {}
    row = Row(words, np.array([vocab[character] for character in alphabet], np.int32))
    counts = row.count_pairs()
    heap = [entry(pair, count) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(vocab) < vocab_size:
        top = heapq.heappop(heap)
        pair, count = top & PAIR_MASK, counts[top & PAIR_MASK]
        if entry(pair, count) != top:
            if count > 0:
                heapq.heappush(heap, entry(pair, count))
            continue
        left, right = pair >> PAIR_BITS, pair & ((1 << PAIR_BITS) - 1)
        merged = tokens[left] + tokens[right]
        if merged not in vocab:
            vocab[merged] = len(tokens)
            tokens.append(merged)
        merges.pop(pair, None)  # the last of two equal merges counts
        merges[pair] = tokens[left], tokens[right]
        for changed, change in row.merge(left, right, vocab[merged]):
            count = counts[changed] = counts.get(changed, 0) + change
            if change > 0 and count > 0:
                heapq.heappush(heap, entry(changed, count))
    return vocab, list(merges.values())


def entry(pair: int, count: int) -> int:
    """A pair in the heap, as one number: the most frequent first, then that of the lower ids."""
    return pair - (count << 2 * PAIR_BITS)


class Row:
    """All words in one row of symbols, linked to their neighbours; a merge unlinks one of two."""

    def __init__(self, words: dict[str, int], byte_ids: np.ndarray):
        """`byte_ids` (256,) has the symbol of each byte."""
        encoded = [word.encode() for word in words]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        text = np.frombuffer(b" ".join([b"", *encoded, b""]), np.uint8)
        self.symbols = byte_ids[text]  # (n,)
        self.symbols[0] = self.symbols[np.cumsum(lengths + 1)] = BORDER
        self.weights = np.ones(len(text), np.int64)  # (n,) how often the word occurs
        self.weights[1:] = np.repeat(np.fromiter(words.values(), np.int64), lengths + 1)
        self.following = np.arange(1, len(text) + 1, dtype=np.int32)
        self.before = np.arange(-1, len(text) - 1, dtype=np.int32)
        order = np.argsort(self.symbols.astype(np.int16), kind="stable").astype(np.int32)
        starts = np.flatnonzero(np.diff(self.symbols[order])) + 1
        groups = np.split(order, starts)
        self.places = {int(self.symbols[group[0]]): group for group in groups}

    def count_pairs(self) -> dict[int, int]:
        """How often each pair of neighbours occurs."""
        left, right = self.symbols[:-1].astype(np.int64), self.symbols[1:]
        inside = (left >= 0) & (right >= 0)
        pairs = (left[inside] << 9) | right[inside]  # the symbols are bytes yet
        counts = np.bincount(pairs, self.weights[:-1][inside])
        found = np.flatnonzero(counts).tolist()
        return {(p >> 9) << PAIR_BITS | p & 511: int(counts[p]) for p in found}

    def places_of(self, symbol: int) -> np.ndarray:
        """Where a symbol is, in order."""
        places = self.places.get(symbol)
        if places is None:
            return np.empty(0, np.int32)
        places = self.places[symbol] = places[self.symbols[places] == symbol]
        return places

    def find(self, left: int, right: int) -> np.ndarray:
        """Where a pair begins, in order; of two that overlap, the first."""
        symbols = self.symbols
        if len(self.places[left]) <= len(self.places[right]):
            found = self.places_of(left)
            found = found[symbols[self.following[found]] == right]
        else:
            found = self.before[self.places_of(right)]
            found = found[symbols[found] == left]
        if left != right or len(found) < 2:
            return found
        index = np.arange(len(found))
        begins = np.concatenate([[True], self.following[found[:-1]] != found[1:]])
        return found[(index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0]

    def merge(self, left: int, right: int, merged: int) -> Iterable[tuple[int, int]]:
        """Merge a pair of symbols; the pairs that there are more or fewer of now, with the change.

        In "xaby", (x, a) and (b, y) end and (x, ab) and (ab, y) begin. In "abab" two merged pairs
        are neighbours, and what is between them is counted with the second one only.
        """
        symbols, at = self.symbols, self.find(left, right)
        if not len(at):
            return []
        gone = self.following[at]
        after, weights = self.following[gone], self.weights[at]
        no_pair_follows = np.concatenate([after[:-1] != at[1:], [True]])
        end, end_weights = after[no_pair_follows], weights[no_pair_follows]
        ended = [pairs(symbols[self.before[at]], left), pairs(right, symbols[end])]
        symbols[at], symbols[gone] = merged, DEAD
        self.following[at], self.before[after] = after, at
        begun = [pairs(symbols[self.before[at]], merged), pairs(merged, symbols[end])]
        earlier = self.places.get(merged)
        self.places[merged] = at if earlier is None else np.sort(np.concatenate([earlier, at]))
        return totals([*ended, *begun], [-weights, -end_weights, weights, end_weights])


def pairs(left: np.ndarray | int, right: np.ndarray | int) -> np.ndarray:
    """Each pair of symbols as one number (n,), which is negative if one is the end of a word."""
    return (np.asarray(left, np.int64) << PAIR_BITS) | right


def totals(pairs: list[np.ndarray], changes: list[np.ndarray]) -> Iterable[tuple[int, int]]:
    """Each pair with the sum of its changes."""
    keys, sums = np.concatenate(pairs), np.concatenate(changes)
    order = np.argsort(keys)
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    keys, sums = keys[starts], np.add.reduceat(sums[order], starts)
    first = int(np.searchsorted(keys, 0))
    return zip(keys[first:].tolist(), sums[first:].tolist(), strict=True)
