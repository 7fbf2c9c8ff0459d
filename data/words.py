"""Text in the words within which BPE merges, found as a byte-level tokenizer finds them.

The words are those of the library's regular expression. A new word begins where the class of
characters changes, with few exceptions, so that array operations find the words of a whole block.
Most of them came before: each different word has a number, by which it is counted, and its ids are
kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.pre_tokenizers import Split

from data.merges import KnownWords
from data.numbering import END, PADDING, WordNumbers
from tinymamba.tokenizer import byte_alphabet

# The words of GPT-2, and the same with at most 128 characters each.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BOUNDED = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,128}| ?\p{N}{1,128}| ?[^\s\p{L}\p{N}]{1,128}"
    r"|\s{1,128}(?!\S)|\s{1,128}"
)
LONGEST = {GPT2: sys.maxsize, BOUNDED: 128}  # characters of a word, without the space before it
UNKNOWN, OTHER, LETTER, NUMBER, WHITE = range(5)  # classes of characters
MARK = "\0"  # of class OTHER
CLASSES = {r"\p{L}": LETTER, r"\p{N}": NUMBER, r"\s": WHITE}
SPACE, QUOTE = ord(" "), ord("'")
SUFFIXES = np.isin(np.arange(256), [*b"sdmt"])  # (256,) that may follow a quote
LONG_SUFFIXES = np.isin(np.arange(1 << 16), np.frombuffer(b"llvere", ">u2"))  # (65536,)
BLOCK_CHARS = 1 << 19  # of text whose words are found at once
KEPT_BYTES = 1 << 22  # of words whose ids are kept, some 60 MB in all
WORDS_AT_ONCE = 1000  # that the library encodes in one call
LEARNED_BYTES = 1 << 24  # of the different words that are counted, up to 1 GB in all


class Words:
    """A function that finds the words of a text, which together are the text."""

    def __init__(self, rule: str):
        """`rule` is a regular expression of LONGEST."""
        self.rule, self.longest = rule, LONGEST[rule]
        self.numbers = WordNumbers()  # of those that were counted

    def __reduce__(self) -> tuple:
        return Words, (self.rule,)

    def __call__(self, text: str) -> list[str]:
        """The words of a text."""
        block = block_of([text])
        places = self.places(block).tolist()[:-1]
        return [block[begin:end].decode() for begin, end in pairwise(places)]

    def count(self, parts: Iterable[str]) -> dict[str, int]:
        """How often each word occurs in some parts of a text."""
        if self.numbers.size > KEPT_BYTES:
            self.numbers = WordNumbers()
        counts = np.zeros(0, np.int64)
        for block in blocks(parts):
            found = np.bincount(self.numbers(block, self.places(block)), minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
        there = np.flatnonzero(counts[1:]) + 1  # 0 is END
        words = (self.numbers.words[number].decode() for number in there.tolist())
        return dict(zip(words, counts[there].tolist(), strict=True))

    def places(self, block: bytes) -> np.ndarray:
        """Where each word of a block begins, and where the last ends, int64 (n + 1,).

        After each text, END is a word.
        """
        text, kinds = np.frombuffer(block, np.uint8)[:-PADDING], kinds_of(block)[:-PADDING]
        begins = changes(text, kinds)
        part_suffixes(text, begins)
        places = np.flatnonzero(begins)
        if np.diff(places).max() <= self.longest:
            return places
        for cut in (kinds == OTHER, kinds != OTHER):  # a quote at a cut may have a suffix
            self.cut_long(text, kinds, begins, cut)
            part_suffixes(text, begins)
        return np.flatnonzero(begins)

    def cut_long(
        self, text: np.ndarray, kinds: np.ndarray, begins: np.ndarray, of: np.ndarray
    ) -> None:
        """Let new words begin in long ones that end with a character `of` some kind (n,)."""
        places = np.flatnonzero(begins)
        long = np.flatnonzero((np.diff(places) > self.longest) & of[places[1:] - 1])
        for begin, end in zip(places[long].tolist(), places[long + 1].tolist(), strict=True):
            begin += text[begin] == SPACE and kinds[begin + 1] != WHITE
            characters = begin + np.flatnonzero((text[begin:end] & 0xC0) != 0x80)
            begins[characters[self.longest :: self.longest]] = True


def block_of(texts: list[str]) -> bytes:
    """Texts as UTF-8, an END after each."""
    return bytes([END]).join([*(text.encode() for text in texts), bytes([END]) * PADDING])


def blocks(texts: Iterable[str]) -> Iterator[bytes]:
    """Texts in blocks of about BLOCK_CHARS."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BLOCK_CHARS:
            yield block_of(batch)
            batch, chars = [], 0
    if batch:
        yield block_of(batch)


def changes(text: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Where words begin as the kind of characters changes, bool (n + 1,), True at the end.

    White space gives its last character to what follows: a space is its beginning, and any other
    character is a word.
    """
    begins = np.ones(len(text) + 1, bool)
    inner = np.not_equal(kinds[1:], kinds[:-1], out=begins[1:-1])
    is_last = inner & (kinds[:-1] == WHITE) & (kinds[1:] != END)
    inner &= (text[:-1] != SPACE) | (kinds[1:] == END)
    wide = np.flatnonzero(is_last & (text[:-1] >= 0x80))
    is_last[wide] = False
    begins[:-2] |= is_last
    for _ in range(2):  # white space has at most three bytes
        wide -= (text[wide] & 0xC0) == 0x80
    begins[wide] = True
    begins[1:][kinds == END] = True
    return begins


def part_suffixes(text: np.ndarray, begins: np.ndarray) -> None:
    """Let 's, 'll and the like be words where a quote begins a word."""
    quotes = np.flatnonzero((text == QUOTE) & begins[:-1])
    first, second = text[quotes + 1].astype(np.int64), text.take(quotes + 2, mode="clip")
    short, long = quotes[SUFFIXES[first]], quotes[LONG_SUFFIXES[first << 8 | second]]
    for found, length in ((short, 2), (long, 3)):
        begins[found + 1] = False
        begins[found + length] = True


def kinds_of(block: bytes) -> np.ndarray:
    """For each byte the class of its character, or END, uint8 (n,)."""
    text = np.frombuffer(block, np.uint8)
    kinds = np.frombuffer(block.translate(kinds_of_bytes()), np.uint8)
    wide = np.flatnonzero(kinds == UNKNOWN)
    if not len(wide):
        return kinds
    points = code_points(text[wide].tobytes().decode())
    kinds = kinds.copy()
    kinds[wide] = np.repeat(classes_of(points), 2 + (points >= 0x800) + (points >= 0x10000))
    return kinds


@cache
def kinds_of_bytes() -> bytes:
    """The class of each byte: UNKNOWN if it is a part of a character."""
    return bytes([*classes_of(np.arange(128)), *[UNKNOWN] * 127, END])


def classes_of(points: np.ndarray) -> np.ndarray:
    """The class that the library gives to each code point, uint8 (n,)."""
    known = known_classes()
    new = np.unique(points[known[points] == UNKNOWN])
    if len(new):
        known[new] = OTHER
        text = new.astype("<u4").tobytes().decode("utf-32-le")
        for rule, kind in CLASSES.items():
            marked = normalizers.Replace(Regex(rule), MARK).normalize_str(text)
            known[new[(code_points(marked) == ord(MARK)) & (new != ord(MARK))]] = kind
    return known[points]


@cache
def known_classes() -> np.ndarray:
    """The class of each code point, if it came before, uint8 (0x110000,)."""
    return np.full(sys.maxunicode + 1, UNKNOWN, np.uint8)


def code_points(text: str) -> np.ndarray:
    """The code points of a text, uint32 (n,)."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


# -------------------------------------------------------------------------------- to learn from


class WordTable:
    """Different words with their counts; if there are too many, the rarest are forgotten."""

    def __init__(self, longest: int = LEARNED_BYTES):
        """`longest`: bytes of all words together."""
        self.longest, self.size, self.has_forgotten = longest, 0, False
        self.counts: dict[str, int] = {}

    def add(self, counts: dict[str, int]) -> None:
        """Add the counts of some more text."""
        for word, count in counts.items():
            if word in self.counts:
                self.counts[word] += count
            else:
                self.counts[word] = count
                self.size += len(word.encode())
        if self.size > self.longest:
            self.forget()

    def forget(self) -> None:
        """Forget the rarest words until half of the place is free; the older ones come first."""
        rarest = sorted(self.counts, key=self.counts.__getitem__)
        for word in rarest:
            if self.size <= self.longest // 2:
                break
            del self.counts[word]
            self.size -= len(word.encode())
        self.has_forgotten = True


# ----------------------------------------------------------------------------------- to encode


class Column:
    """An array that grows at its end."""

    def __init__(self, dtype: str):
        self.size, self.values = 0, np.zeros(1 << 10, dtype)

    def extend(self, values: np.ndarray) -> None:
        """Add values."""
        size = self.size + len(values)
        if size > len(self.values):
            self.values = np.concatenate([self.values, np.zeros(size, self.values.dtype)])
        self.values[self.size : size] = values
        self.size = size


class WordIds:
    """The ids of each word that came before; once there are more than KEPT_BYTES, of the known."""

    def __init__(self, tokenizer: Tokenizer, dtype: str, known: KnownWords | None):
        self.tokenizer, self.dtype, self.known = Tokenizer(tokenizer.model), dtype, known
        self.tokenizer.pre_tokenizer = Split(" ", "removed")  # no byte has that name
        self.names = dict(enumerate([*byte_alphabet(), " "]))
        vocab = self.tokenizer.get_vocab()
        self.lengths = np.zeros(max(vocab.values()) + 1, np.int64)  # of tokens, in bytes
        self.lengths[[*vocab.values()]] = [*map(len, vocab)]
        self.forget()

    def forget(self) -> None:
        """Forget all words that were not known at first."""
        self.numbers = WordNumbers()
        self.ids = Column(self.dtype)  # of all words
        self.counts = Column("int64")  # (n,) how many a word has
        self.begins = Column("int64")  # (n,) where they begin
        self.add(np.zeros(1), np.zeros(1), np.zeros(0))  # END
        if self.known:
            block = block_of([b"".join(self.known.words).decode()])
            places = np.cumsum([0, *map(len, self.known.words)])
            order = np.argsort(self.numbers(block, places))
            begins = np.cumsum(self.known.counts) - self.known.counts
            self.add(self.known.counts[order], begins[order], self.known.ids)

    def __call__(self, block: bytes, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all words of a block, and how many there are up to the end of each text."""
        if self.numbers.size > KEPT_BYTES:
            self.forget()
        numbers = self.numbers(block, places)
        self.learn(self.numbers.words[self.counts.size :])
        counts = self.counts.values[numbers]  # (n,)
        totals = np.cumsum(counts)
        index = np.arange(totals[-1]) + np.repeat(
            self.begins.values[numbers] + counts - totals, counts
        )
        return self.ids.values[index], totals[numbers == 0]

    def learn(self, words: list[bytes]) -> None:
        """Encode words that are new."""
        for begin in range(0, len(words), WORDS_AT_ONCE):
            part = words[begin : begin + WORDS_AT_ONCE]
            text = chr(256).join(word.decode("latin-1") for word in part).translate(self.names)
            encoded = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
            ids = np.array(encoded[0].ids)
            lengths = np.cumsum([*map(len, part)])
            ends = np.searchsorted(np.cumsum(self.lengths[ids]), lengths) + 1
            counts = np.diff(ends, prepend=0)
            self.add(counts, ends - counts, ids)

    def add(self, counts: np.ndarray, begins: np.ndarray, ids: np.ndarray) -> None:
        """Add the ids of words in the order of their numbers, of which each begins somewhere."""
        self.counts.extend(counts)
        self.begins.extend(self.ids.size + begins)
        self.ids.extend(ids)


class WordEncoder:
    """Encodes text word by word."""

    def __init__(self, words: Words, ids: WordIds):
        self.words, self.ids = words, ids

    def __call__(self, text: str) -> bytes:
        """The ids of a text, as they are in a file."""
        return b"".join(self.each([text]))

    def each(self, texts: Iterable[str]) -> Iterator[bytes]:
        """The ids of each text."""
        for block in blocks(texts):
            ids, ends = self.ids(block, self.words.places(block))
            ends *= ids.itemsize
            data = ids.tobytes()
            yield from (data[begin:end] for begin, end in pairwise([0, *ends.tolist()]))

    def last_start(self, text: str, low: int, high: int) -> int | None:
        """Where the last word before `high` starts, if not before `low`."""
        starts = accumulate(map(len, self.words(text)))
        return max((at for at in starts if low <= at < high), default=None)


class ByteEncoder:
    """Encodes text byte by byte."""

    def __init__(self, vocab: dict[str, int], dtype: str):
        self.ids = np.array([vocab[name] for name in byte_alphabet()], dtype)  # (256,)

    def __call__(self, text: str) -> bytes:
        """The ids of a text, as they are in a file."""
        return self.ids[np.frombuffer(text.encode(), np.uint8)].tobytes()

    def each(self, texts: Iterable[str]) -> Iterator[bytes]:
        """The ids of each text."""
        return map(self, texts)

    def last_start(self, text: str, low: int, high: int) -> int | None:
        """The last place before `high`: each character has its own ids."""
        return high - 1


def fast_encoder(
    tokenizer: Tokenizer, dtype: str, known: KnownWords | None = None
) -> WordEncoder | ByteEncoder | None:
    """What gives a text the ids that a tokenizer gives it; None if its rules are not known."""
    rules = json.loads(tokenizer.to_str())
    model, splits = rules["model"], rules["pre_tokenizer"]
    others = [token["content"] for token in rules["added_tokens"] if not token["special"]]
    is_bpe = model.get("type") == "BPE" and not model.get("dropout")
    if not is_bpe or others or rules["normalizer"]:
        return None
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    marked = model["continuing_subword_prefix"] or model["end_of_word_suffix"]
    if marked or not vocab.keys() >= set(byte_alphabet()):
        return None
    one_word = is_byte_level(splits, use_regex=False)
    if one_word and not model["merges"] and not model["ignore_merges"]:
        return ByteEncoder(vocab, dtype)
    rule = rule_of(splits)
    if rule not in LONGEST:
        return None
    return WordEncoder(Words(rule), WordIds(tokenizer, dtype, known))


def rule_of(splits: Any) -> str:
    """The regular expression by which a byte-level tokenizer finds words, or ""."""
    if is_byte_level(splits, use_regex=True):
        return GPT2
    match splits:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False},
                as_bytes,
            ],
        } if is_byte_level(as_bytes, use_regex=False):
            return rule
    return ""


def is_byte_level(splits: Any, use_regex: bool) -> bool:
    """Whether a pre-tokenizer writes text as bytes, with or without finding words before."""
    match splits:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": found}:
            return found == use_regex
    return False
