"""The merges of a byte-level BPE tokenizer, learned from counted words.

The result is that of the library `tokenizers`, which learns from text only and keeps every word of
it in memory. Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
"""

from __future__ import annotations

import heapq
from itertools import compress
from typing import NamedTuple

import numpy as np

from tinymamba.tokenizer import byte_alphabet

PAIR_BITS = 21  # of a symbol in the number of a pair
SYMBOL_MASK = (1 << PAIR_BITS) - 1
PAIR_MASK = (1 << 2 * PAIR_BITS) - 1
BORDER, DEAD = -1, -2  # in place of a symbol: between words, and where one was merged away


class KnownWords(NamedTuple):
    """Words with their ids."""

    words: list[bytes]
    counts: np.ndarray  # (n,) of the ids of each word
    ids: np.ndarray  # of all words


def learn_merges(
    words: dict[str, int], specials: list[str], vocab_size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of words with their counts."""
    return learn(words, specials, vocab_size)[:2]


def learn(
    words: dict[str, int], specials: list[str], vocab_size: int, known_bytes: int = 0
) -> tuple[dict[str, int], list[tuple[str, str]], KnownWords | None]:
    """The same, with the ids of the most frequent words, `known_bytes` in all.

    There are none if two merges give one token: words are then encoded with both.

    The first ids are those of `specials`, then come bytes. The most frequent pair of tokens is
    merged; of equally frequent ones that with the lower ids.
    """
    alphabet = byte_alphabet()
    tokens = [*specials, *sorted(alphabet)]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges: dict[int, tuple[str, str]] = {}
    row = Row(words, np.array([vocab[character] for character in alphabet], np.int32))
    frequent = FrequentPairs(row)
    while len(vocab) < vocab_size and (pair := frequent.pop()) is not None:
        left, right = pair >> PAIR_BITS, pair & SYMBOL_MASK
        merged = tokens[left] + tokens[right]
        is_new = merged not in vocab
        if is_new:
            vocab[merged] = len(tokens)
            tokens.append(merged)
        merges.pop(pair, None)  # the last of two equal merges counts
        merges[pair] = tokens[left], tokens[right]
        ended, begun = row.merge(left, right, vocab[merged])
        frequent.subtract(*ended)
        frequent.add(*(begun if is_new else row.count_pairs(vocab[merged])))
    each_adds_one = len(vocab) == len(specials) + len(alphabet) + len(merges)
    known = row.known_words(known_bytes) if each_adds_one else None
    return vocab, list(merges.values()), known


class FrequentPairs:
    """Pairs of symbols, the most frequent first; those that occur less than `least` times wait.

    A pair is most frequent when its newer symbol is made, and only becomes rarer then. So rare
    pairs need no count until the frequent ones are merged: all are counted again then.
    """

    RANGE = 4  # of counts that are kept: `least` is the highest count divided by this

    def __init__(self, row: Row):
        self.row = row
        self.begin(*row.first_pairs())

    def begin(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Begin with all pairs (n,) that occur, and their counts."""
        self.least = max(1, int(counts.max(initial=0)) // self.RANGE)
        self.counts: dict[int, int] = {}
        self.heap: list[int] = []
        self.add(keys, counts)

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Take in pairs (n,) with their counts."""
        often = counts >= self.least
        for pair, count in zip(keys[often].tolist(), counts[often].tolist(), strict=True):
            self.counts[pair] = count
            heapq.heappush(self.heap, entry(pair, count))

    def subtract(self, keys: np.ndarray, losses: np.ndarray) -> None:
        """Each pair occurs so many times less."""
        counts = self.counts
        for pair, loss in zip(keys.tolist(), losses.tolist(), strict=True):
            if pair in counts:
                counts[pair] -= loss

    def pop(self) -> int | None:
        """The most frequent pair, and of equally frequent ones that with the lower ids."""
        while self.heap or self.least > 1:
            if not self.heap:
                self.begin(*self.row.count_pairs())
                continue
            top = heapq.heappop(self.heap)
            pair = top & PAIR_MASK
            count = self.counts.get(pair, 0)
            if entry(pair, count) == top:
                del self.counts[pair]
                return pair
            if count >= self.least:
                heapq.heappush(self.heap, entry(pair, count))
        return None


def entry(pair: int, count: int) -> int:
    """A pair in the heap, as one number: the most frequent first, then that of the lower ids."""
    return pair - (count << 2 * PAIR_BITS)


class Row:
    """All words in one row of symbols, linked to their neighbours; a merge unlinks one of two."""

    def __init__(self, words: dict[str, int], byte_ids: np.ndarray):
        """`byte_ids` (256,) has the symbol of each byte."""
        self.words = encoded = [word.encode() for word in words]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        self.text = np.frombuffer(b" ".join([b"", *encoded, b""]), np.uint8)
        self.symbols = byte_ids[self.text]  # (n,)
        self.ranks = np.argsort(np.argsort(byte_ids)).astype(np.uint16)  # of bytes, by symbol
        self.symbols[0] = self.symbols[np.cumsum(lengths + 1)] = BORDER
        self.weights = np.ones(len(self.text), np.int64)  # (n,) how often the word occurs
        self.weights[1:] = np.repeat(np.fromiter(words.values(), np.int64), lengths + 1)
        self.following = np.arange(1, len(self.text) + 1, dtype=np.int32)
        self.before = np.arange(-1, len(self.text) - 1, dtype=np.int32)
        # Where pairs began, by the symbol whose merge made them: sorted pairs, and their places.
        self.made: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def first_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of bytes (n,) that are neighbours, and how often each occurs."""
        inside = (self.symbols[:-1] >= 0) & (self.symbols[1:] >= 0)
        places = np.flatnonzero(inside).astype(np.int32)
        ranks = self.ranks[self.text]  # two of them fit 16 bits, which are sorted fastest
        places = places[np.argsort(ranks[places] << 8 | ranks[places + 1], kind="stable")]
        keys = pairs(self.symbols[places], self.symbols[places + 1])
        self.made[BORDER] = [(keys, places)]
        return sums(keys, self.weights[places])

    def count_pairs(self, of: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of neighbours (n,), or those of one symbol, and how often each occurs."""
        if of is None:
            places = np.flatnonzero(self.symbols >= 0)
        else:
            places = np.flatnonzero(self.symbols == of)
            places = np.union1d(places, self.before[places])
        keys = pairs(self.symbols[places], self.symbols[self.following[places]])
        order = sorted_pairs(keys)
        return sums(keys[order], self.weights[places[order]])

    def find(self, left: int, right: int) -> np.ndarray:
        """Where a pair begins, in order; of two that overlap, the first."""
        pair, kept = left << PAIR_BITS | right, []
        for symbol in {BORDER, left, right}:
            for keys, places in self.made.get(symbol, ()):
                begin, end = np.searchsorted(keys, (pair, pair + 1)).tolist()
                kept.append(places[begin:end])
        found = np.unique(np.concatenate(kept))
        found = found[self.symbols[found] == left]
        found = found[self.symbols[self.following[found]] == right]
        if left != right or len(found) < 2:
            return found
        index = np.arange(len(found))
        begins = np.concatenate([[True], self.following[found[:-1]] != found[1:]])
        return found[(index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0]

    def merge(self, left: int, right: int, merged: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Merge a pair of symbols; which pairs there are less of now, and more of, and how many.

        In "xaby", (x, a) and (b, y) end and (x, ab) and (ab, y) begin. In "abab" two merged pairs
        are neighbours, and what is between them is counted with the second one only.
        """
        symbols, at = self.symbols, self.find(left, right)
        gone = self.following[at]
        after = self.following[gone]
        no_pair_follows = np.concatenate([after[:-1] != at[1:], [True]])
        last, end = at[no_pair_follows], after[no_pair_follows]
        weights = np.concatenate([self.weights[at], self.weights[last]])
        ended = np.concatenate([pairs(symbols[self.before[at]], left), pairs(right, symbols[end])])
        symbols[at], symbols[gone] = merged, DEAD
        self.following[at], self.before[after] = after, at
        before = self.before[at]
        begun = np.concatenate([pairs(symbols[before], merged), pairs(merged, symbols[end])])
        lost, order = sorted_pairs(ended), sorted_pairs(begun)
        keys = begun[order]
        self.made.setdefault(merged, []).append((keys, np.concatenate([before, last])[order]))
        return [sums(ended[lost], weights[lost]), sums(keys, weights[order])]

    def known_words(self, most: int) -> KnownWords:
        """The most frequent words, `most` bytes in all, as they are after all merges."""
        borders = np.flatnonzero(self.symbols == BORDER)
        order = np.argsort(-self.weights[borders[1:]], kind="stable")
        chosen = np.zeros(len(order), bool)
        chosen[order[np.cumsum(np.diff(borders)[order]) <= most]] = True
        is_id = self.symbols >= 0
        counts = np.add.reduceat(is_id, borders)[:-1]
        ids = self.symbols[is_id][np.repeat(chosen, counts)]
        return KnownWords([*compress(self.words, chosen)], counts[chosen], ids)


def pairs(left: np.ndarray | int, right: np.ndarray | int) -> np.ndarray:
    """Each pair of symbols as one number (n,), which is negative if one is the end of a word."""
    return (np.asarray(left, np.int64) << PAIR_BITS) | right


def sorted_pairs(keys: np.ndarray) -> np.ndarray:
    """The order in which pairs (n,) are sorted, without the ends of words."""
    order = np.argsort(keys)
    return order[np.searchsorted(keys, 0, sorter=order) :]


def sums(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pair once, and the sum of its counts, of sorted pairs (n,)."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    if not len(starts):
        return keys, counts
    return keys[starts], np.add.reduceat(counts, starts)
