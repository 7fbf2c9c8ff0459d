"""A number for each different word, found for many words at once.

A word of up to 15 bytes is two integers. They are looked up in a hash table with linear probing
(Knuth, The Art of Computer Programming 3, 6.4), all words of a block by the same array operations.
"""

from __future__ import annotations

import numpy as np

END = 0xFF  # the byte after each text; no text has it
PADDING = 8  # bytes that may be read behind the last word
SHORT, MEDIUM = 7, 15  # bytes of words that are one integer with their length, or two
LENGTH_BITS = 56  # where the length is in the second integer of a word
MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # any odd ones
IS_MEDIUM = np.uint64(1 << 63)  # no length of a short word has this bit
FIRST_SLOTS = 1 << 12


class WordNumbers:
    """Different words, numbered from 0, which is the byte END."""

    def __init__(self) -> None:
        self.words: list[bytes] = []
        self.size = 0  # bytes of all words
        self.long: dict[bytes, int] = {}
        self.keys = np.zeros(FIRST_SLOTS, np.uint64)  # (slots,) 0 where nothing is
        self.numbers = np.full(FIRST_SLOTS, -1, np.int64)  # (slots,) of the words
        self.parts = np.zeros((FIRST_SLOTS // 2, 2), np.uint64)  # the integers of each word
        self(bytes([END]) * (1 + PADDING), np.arange(2))

    def __call__(self, block: bytes, places: np.ndarray) -> np.ndarray:
        """The number of each word of a block, int64 (n,); new words get the next ones.

        Word i is from places[i] to places[i + 1], int64 (n + 1,); PADDING bytes follow the last.
        """
        parts, medium, is_long = parts_of(block, places)
        keys = parts[0] | parts[1]
        keys[medium] = (parts[:, medium].T * FACTORS).sum(1, dtype=np.uint64) | IS_MEDIUM
        numbers = self.find(keys)
        new = numbers < 0
        new[medium[is_long]] = False
        if new.any():
            first = np.flatnonzero(new)[np.unique(keys[new], return_index=True)[1]]
            self.add(keys[first], parts[:, first].T, words_at(block, places, first))
            numbers[new] = self.find(keys[new])
        differs = (self.parts[numbers[medium]] != parts[:, medium].T).any(1)
        others = medium[differs | is_long]  # the key is another word's, or of no word
        numbers[others] = [self.number_of(word) for word in words_at(block, places, others)]
        return numbers

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The number of the word with each key, or -1, int64 (n,)."""
        slots = self.slots(keys)
        held, numbers = self.keys[slots], self.numbers[slots]
        others = np.flatnonzero((held != keys) & (held != 0))
        while len(others):
            at = slots[others] = (slots[others] + 1) % len(self.keys)
            held, numbers[others] = self.keys[at], self.numbers[at]
            others = others[(held != keys[others]) & (held != 0)]
        return numbers

    def slots(self, keys: np.ndarray) -> np.ndarray:
        """Where the search for each key begins, int64 (n,)."""
        bits = len(self.keys).bit_length() - 1
        return ((keys * FACTORS[0]) >> np.uint64(64 - bits)).view(np.int64)

    def add(self, keys: np.ndarray, parts: np.ndarray, words: list[bytes]) -> None:
        """Number new words; their keys differ (n,), `parts` is (n, 2)."""
        numbers = np.arange(len(self.words), len(self.words) + len(words))
        self.words += words
        self.size += sum(map(len, words))
        if 2 * len(self.words) > len(self.keys):
            self.grow()
        self.parts[numbers] = parts
        self.insert(keys, numbers)

    def grow(self) -> None:
        """Make the table at least four times as large as its words are many."""
        slots = 1 << (4 * len(self.words) - 1).bit_length()
        kept = np.flatnonzero(self.keys)
        keys, numbers = self.keys[kept], self.numbers[kept]
        self.keys = np.zeros(slots, np.uint64)
        self.numbers = np.full(slots, -1, np.int64)
        parts = np.zeros((slots // 2, 2), np.uint64)
        parts[: len(self.parts)] = self.parts
        self.parts = parts
        self.insert(keys, numbers)

    def insert(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Put keys that are not there into free slots; of several in one slot, one stays."""
        slots = self.slots(keys)
        while len(keys):
            free = self.keys[slots] == 0
            self.keys[slots[free]] = keys[free]
            stays = self.keys[slots] == keys
            self.numbers[slots[stays]] = numbers[stays]
            keys, numbers, slots = keys[~stays], numbers[~stays], slots[~stays]
            slots = (slots + 1) % len(self.keys)

    def number_of(self, word: bytes) -> int:
        """The number of a word that the table cannot have."""
        number = self.long.get(word)
        if number is None:
            number = self.long[word] = len(self.words)
            self.words.append(word)
            self.size += len(word)
        return number


def parts_of(block: bytes, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words as two integers each, uint64 (2, n); which are not short, and are these long.

    The first has the first eight bytes; the second has the others, and the length.
    """
    starts, lengths = places[:-1], np.diff(places)
    eight = np.ndarray((len(block) - 7,), "<u8", block, strides=(1,))
    first = eight[starts] & MASKS[np.minimum(lengths, 8)]
    second = lengths.astype(np.uint64) << np.uint64(LENGTH_BITS)
    medium = np.flatnonzero(lengths > SHORT)
    rest = np.minimum(lengths[medium] - 8, 8)
    second[medium] |= eight[starts[medium] + 8] & MASKS[rest]
    return np.stack([first, second]), medium, lengths[medium] > MEDIUM


def words_at(block: bytes, places: np.ndarray, which: np.ndarray) -> list[bytes]:
    """Some words of a block."""
    ends = zip(places[which].tolist(), places[which + 1].tolist(), strict=True)
    return [block[begin:end] for begin, end in ends]
