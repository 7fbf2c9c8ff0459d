"""The merges of a byte-level BPE tokenizer, learned from counted words.

The result is that of the library `tokenizers`, which learns from text only and keeps every word of
it in memory. Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
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
        left, right = pair >> PAIR_BITS, pair & SYMBOL_MASK
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
    each_adds_one = len(vocab) == len(specials) + len(alphabet) + len(merges)
    known = row.known_words(known_bytes) if each_adds_one else None
    return vocab, list(merges.values()), known


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

    def count_pairs(self) -> dict[int, int]:
        """How often each pair of neighbours occurs."""
        inside = (self.symbols[:-1] >= 0) & (self.symbols[1:] >= 0)
        places = np.flatnonzero(inside).astype(np.int32)
        ranks = self.ranks[self.text]  # two of them fit 16 bits, which are sorted fastest
        places = places[np.argsort(ranks[places] << 8 | ranks[places + 1], kind="stable")]
        keys = pairs(self.symbols[places], self.symbols[places + 1])
        starts = group_starts(keys)
        self.made[BORDER] = [(keys, places)]
        return dict(zip(keys[starts].tolist(), sums(self.weights[places], starts), strict=True))

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
        last, end = at[no_pair_follows], after[no_pair_follows]
        end_weights = weights[no_pair_follows]
        ended = [pairs(symbols[self.before[at]], left), pairs(right, symbols[end])]
        symbols[at], symbols[gone] = merged, DEAD
        self.following[at], self.before[after] = after, at
        before = self.before[at]
        begun = [pairs(symbols[before], merged), pairs(merged, symbols[end])]
        keys = np.concatenate([*ended, *begun])
        order = np.argsort(keys)
        order = order[np.searchsorted(keys, 0, sorter=order) :]  # without the ends of words
        keys, places = keys[order], np.concatenate([before, last, before, last])[order]
        changes = np.concatenate([-weights, -end_weights, weights, end_weights])[order]
        is_new = (keys >> PAIR_BITS == merged) | (keys & SYMBOL_MASK == merged)
        self.made.setdefault(merged, []).append((keys[is_new], places[is_new]))
        starts = group_starts(keys)
        return zip(keys[starts].tolist(), sums(changes, starts), strict=True)

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


def group_starts(keys: np.ndarray) -> np.ndarray:
    """Where equal keys begin, of sorted ones (n,)."""
    return np.flatnonzero(np.diff(keys, prepend=-1))


def sums(changes: np.ndarray, starts: np.ndarray) -> list[int]:
    """The sum of the changes of each group."""
    return np.add.reduceat(changes, starts).tolist() if len(starts) else []
