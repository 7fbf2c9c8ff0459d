"""Text in the words within which BPE merges, found as a byte-level tokenizer finds them.

Words repeat: most text consists of words that came before. So words are counted to learn from, and
the ids of a word are kept for the next time. The words are those of the library's regular
expression, but Python's `re` finds them in ASCII several times as fast. Other characters are
replaced by ASCII of the same class first, by the library's own classes.
"""

from __future__ import annotations

import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from tinymamba.tokenizer import byte_alphabet

# The words of GPT-2, and the same with at most 128 characters each.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BOUNDED = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,128}| ?\p{N}{1,128}| ?[^\s\p{L}\p{N}]{1,128}"
    r"|\s{1,128}(?!\S)|\s{1,128}"
)
REPEATS = {GPT2: "+", BOUNDED: "{1,128}"}
CLASSES = {r"\p{L}": "Z", r"\p{N}": "0", r"\s": "\v"}  # with a character that no rule names
OTHER = "~"
ASSIGNED = 0x40000  # beyond are no letters, numbers or spaces
KEPT_CHARS = 1 << 20  # of words whose ids are kept, some 60 MB in all
LEARNED_BYTES = 1 << 24  # of the different words that are counted, up to 1 GB in all


class Words:
    """A function that finds the words of a text, which together are the text."""

    def __init__(self, rule: str):
        """`rule` is a regular expression of REPEATS."""
        self.rule, self.find = rule, re.compile(ascii_rule(REPEATS[rule]), re.ASCII).findall

    def __call__(self, text: str) -> list[str]:
        """The words of a text."""
        if text.isascii():
            return self.find(text)
        words: list[str] = []
        for piece in pieces(text):
            words += self.find(piece) if piece.isascii() else self.find_any(piece)
        return words

    def find_any(self, text: str) -> list[str]:
        """The words of a text with any characters."""
        ends = accumulate(map(len, self.find(as_ascii(text))), initial=0)
        return [text[begin:end] for begin, end in pairwise(ends)]

    def __reduce__(self) -> tuple:
        return Words, (self.rule,)

    def count(self, parts: Iterable[str]) -> dict[str, int]:
        """How often each word occurs in some parts of a text."""
        counts = Counter[str]()
        for part in parts:
            counts.update(self(part))
        return dict(counts)


def ascii_rule(repeat: str) -> str:
    """The rules of REPEATS for ASCII, in the order in which they are found most quickly."""
    letters, numbers, others = (f"[{s}]{repeat}" for s in ("A-Za-z", "0-9", r"^\sA-Za-z0-9"))
    after_space = f" (?:{letters}|{others}|{numbers})"
    spaces = rf"\s{repeat}(?!\S)|\s{repeat}"
    return f"{letters}|{after_space}|'(?:[sdmt]|ll|ve|re)|{others}|{spaces}|{numbers}"


def pieces(text: str) -> Iterator[str]:
    """A text in pieces, most of which are only ASCII if most lines are.

    They begin with white space after something else, where there is always a new word.
    """
    rest = ""
    for _, lines in groupby(text.split("\n"), str.isascii):
        rest += "\n".join(lines)
        end = len(rest.rstrip(spaces()))
        if end:
            yield rest[:end]
        rest = rest[end:] + "\n"
    if len(rest) > 1:
        yield rest[:-1]


@cache
def spaces() -> str:
    """All white space."""
    ascii_spaces = np.frombuffer(b"\t\n\v\f\r ", np.uint8)
    return "".join(map(chr, np.flatnonzero(np.isin(ascii_classes(), ascii_spaces))))


def as_ascii(text: str) -> str:
    """A text of the same length, whose words have the same lengths."""
    return ascii_classes()[code_points(text)].tobytes().decode("ascii")


@cache
def ascii_classes() -> np.ndarray:
    """For each code point an ASCII character of the same class, uint8 (0x110000,)."""
    classes = np.full(sys.maxunicode + 1, ord(OTHER), np.uint8)
    classes[:128] = np.arange(128)
    asked = np.concatenate([np.arange(128, 0xD800), np.arange(0xE000, ASSIGNED)])
    text = asked.astype("<u4").tobytes().decode("utf-32-le")
    for rule, character in CLASSES.items():
        marked = normalizers.Replace(Regex(rule), character).normalize_str(text)
        classes[asked[code_points(marked) < 128]] = ord(character)
    return classes


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


class WordIds(dict[str, bytes]):
    """The ids of each word that is asked for, kept for the next time.

    Once KEPT_CHARS are kept, those not asked for since as many were kept before are forgotten.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str):
        super().__init__()
        self.model, self.code = tokenizer.model, np.dtype(dtype).char
        self.byte_names = dict(enumerate(byte_alphabet()))
        self.older: dict[str, bytes] = {}
        self.room = KEPT_CHARS

    def __missing__(self, word: str) -> bytes:
        self.room -= len(word)
        if self.room < 0:
            self.older = dict(self)
            self.clear()
            self.room = KEPT_CHARS - len(word)
        ids = self[word] = self.older.get(word) or self.encode(word)
        return ids

    def encode(self, word: str) -> bytes:
        """The ids of a word."""
        written = word
        if not (word.isascii() and word.isalnum()):
            written = word.encode().decode("latin-1").translate(self.byte_names)
        return array(self.code, [token.id for token in self.model.tokenize(written)]).tobytes()


class WordEncoder:
    """Encodes text word by word."""

    def __init__(self, tokenizer: Tokenizer, words: Words, dtype: str):
        self.words, self.ids = words, WordIds(tokenizer, dtype)

    def __call__(self, text: str) -> bytes:
        """The ids of a text, as they are in a file."""
        return b"".join(map(self.ids.__getitem__, self.words(text)))

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

    def last_start(self, text: str, low: int, high: int) -> int | None:
        """The last place before `high`: each character has its own ids."""
        return high - 1


def fast_encoder(tokenizer: Tokenizer, dtype: str) -> WordEncoder | ByteEncoder | None:
    """What gives a text the ids that a tokenizer gives it; None if its rules are not known."""
    rules = json.loads(tokenizer.to_str())
    model, splits = rules["model"], rules["pre_tokenizer"]
    others = [token["content"] for token in rules["added_tokens"] if not token["special"]]
    is_bpe = model.get("type") == "BPE" and not model.get("dropout")
    if not is_bpe or others or rules["normalizer"]:
        return None
    one_word = is_byte_level(splits, use_regex=False)
    if one_word and not model["merges"] and not model["ignore_merges"]:
        vocab = tokenizer.get_vocab()
        return ByteEncoder(vocab, dtype) if vocab.keys() >= set(byte_alphabet()) else None
    rule = rule_of(splits)
    return WordEncoder(tokenizer, Words(rule), dtype) if rule in REPEATS else None


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
