"""Documents to token ids: cut into chunks that keep their tokens, encoded by several processes.

A long document is encoded in chunks. It is cut where the ids around the cut are the same with and
without it. The ids then are those of the whole document in one call, unless the tokenizer knows
words longer than a chunk. Some tokenizers put a space before a text; for chunks that continue a
document, that part of their rules is taken out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data.merges import KnownWords
from data.processes import Batching, Crew, map_in_order
from data.sides import Text
from data.words import fast_encoder

CHUNK_CHARS = 1 << 16  # longest string that is encoded at once
NEAR_CHARS = 1 << 10  # before the end of a chunk, in whose middle the cut is looked for
TRIES = 64  # places to cut that are tried
BATCH_CHARS = 1 << 20  # encoded in one call; needs up to 350 bytes of memory each
WORKER_CHARS = 1 << 20  # the same for each worker


class Chunk(NamedTuple):
    """A part of a document, short enough to be encoded at once."""

    side: str  # "train" or "val"
    text: str
    continues: bool  # the document began before it
    last: bool  # the document ends here


class Encoded(NamedTuple):
    """The ids of a chunk, as they are in the file."""

    side: str
    ids: bytes
    text_bytes: int
    last: bool


class Encoder:
    """Encodes chunks; finds where documents may be cut."""

    def __init__(self, path: Path, eos: int, dtype: str, known: KnownWords | None = None):
        self.path, self.eos, self.dtype, self.known = path, eos, dtype, known
        self.tokenizer = plain(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        self.fast = fast_encoder(self.tokenizer, dtype, known)  # None: the library encodes

    def __reduce__(self) -> tuple:
        """Another process reads the tokenizer itself."""
        return Encoder, (self.path, self.eos, self.dtype, self.known)

    @cached_property
    def bare(self) -> Tokenizer:
        """The tokenizer for text that continues a document: its beginning stays."""
        rules = json.loads(self.tokenizer.to_str())
        for name in ("normalizer", "pre_tokenizer"):
            rules[name] = without_prefix(rules[name])
        return plain(Tokenizer.from_str(json.dumps(rules)))

    def __call__(self, batch: list[Chunk]) -> list[Encoded]:
        """The ids of chunks; the end-of-text id follows the last one of a document."""
        if self.fast:
            each = self.fast.each(chunk.text for chunk in batch)
            return [self.encoded(chunk, ids) for chunk, ids in zip(batch, each, strict=True)]
        found: list[bytes] = [b""] * len(batch)
        for continues in (False, True):
            chosen = [i for i, chunk in enumerate(batch) if chunk.continues == continues]
            if chosen:
                tokenizer = self.bare if continues else self.tokenizer
                texts = [batch[i].text for i in chosen]
                encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                for i, encoding in zip(chosen, encodings, strict=True):
                    found[i] = self.as_bytes(encoding.ids)
        return [self.encoded(chunk, ids) for chunk, ids in zip(batch, found, strict=True)]

    def as_bytes(self, ids: list[int]) -> bytes:
        """Ids as they are in the file."""
        return np.array(ids, self.dtype).tobytes()

    def encoded(self, chunk: Chunk, ids: bytes) -> Encoded:
        """A chunk with its ids."""
        end = self.as_bytes([self.eos]) if chunk.last else b""
        return Encoded(chunk.side, ids + end, len(chunk.text.encode()), chunk.last)

    def chunks(self, texts: Iterable[Text]) -> Iterator[Chunk]:
        """Documents in chunks of at most CHUNK_CHARS."""
        for side, parts, _ in texts:
            rest, continues = "", False
            for part in parts:
                rest += part
                start = 0
                while len(rest) - start > CHUNK_CHARS:
                    text = rest[start : start + CHUNK_CHARS]
                    end, bare = self.cut(text, continues)
                    yield Chunk(side, text[:end], continues, False)
                    start, continues = start + end, bare
                rest = rest[start:]
            yield Chunk(side, rest, continues, True)

    # ------------------------------------------------------------------------------ where to cut

    def cut(self, text: str, continues: bool) -> tuple[int, bool]:
        """Where a chunk ends, and whether the next one needs the bare tokenizer.

        Between words, judged by the end of the chunk alone; else between tokens of the chunk.
        """
        near, before = text[-NEAR_CHARS:], len(text) - NEAR_CHARS
        [whole] = self.ids([near])
        for at in islice(places(near), TRIES):
            for bare in (False,) if self.fast else (False, True):
                if self.fits(near, at, whole, bare):
                    return before + at, bare
        high = before + NEAR_CHARS // 2
        start = self.fast.last_start(text, before, high) if self.fast else None
        return (start, True) if start else self.cut_tokens(text, continues)

    def ids(self, texts: list[str], bare: bool = False) -> list[Any]:
        """The ids of each text alone."""
        if self.fast:
            return list(self.fast.each(texts))
        return [ids_of(self.bare if bare else self.tokenizer, text) for text in texts]

    def fits(self, near: str, at: int, whole: list[int] | bytes, bare: bool) -> bool:
        """Whether a text cut at this place has the same ids as the whole."""
        if self.fast:
            return b"".join(self.ids([near[:at], near[at:]])) == whole
        [right] = self.ids([near[at:]], bare)
        if right != whole[len(whole) - len(right) :]:
            return False
        return self.ids([near[:at]]) == [whole[: len(whole) - len(right)]]

    def cut_tokens(self, text: str, continues: bool) -> tuple[int, bool]:
        """The same for text without spaces: between two words or tokens of the last ones."""
        encoding = (self.bare if continues else self.tokenizer).encode(
            text, add_special_tokens=False
        )
        ids, words, offsets = encoding.ids, encoding.word_ids, encoding.offsets
        low, high = len(text) - NEAR_CHARS, len(text) - NEAR_CHARS // 2
        found, first = [], 0  # the first of the tokens that a cut is judged by
        for i in range(len(ids) - 1, 0, -1):
            at, starts_word = offsets[i][0], words[i] != words[i - 1]
            if low <= at < high and offsets[i - 1][1] <= at:
                found.append((not starts_word, i, at))
            if at < low - NEAR_CHARS and (starts_word or at < low - 4 * NEAR_CHARS):
                first = i
                break
        tokenizer = self.bare if first or continues else self.tokenizer
        start = offsets[first][0] if first else 0
        for _, i, at in sorted(found, key=lambda place: place[0])[:TRIES]:
            left, right = ids_of(tokenizer, text[start:at]), ids_of(self.bare, text[at:])
            if right == ids[i:] and left == ids[first:i]:
                return at, True
        return found[0][2] if found else low, True


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as files need it: special tokens spelled out in a text are text."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text alone."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def places(near: str) -> Iterator[int]:
    """Where a text may be cut between words: at line breaks, before spaces, before other signs.

    The last of each kind comes first.
    """
    inside = range(3 * len(near) // 4, len(near) // 4, -1)
    yield from (i for i in inside if near[i - 1] == "\n" and not near[i].isspace())
    yield from (i for i in inside if near[i].isspace() and not near[i - 1].isspace())
    yield from (i for i in inside if near[i].isalpha() != near[i - 1].isalpha())


def without_prefix(rules: Any) -> Any:
    """The rules of a tokenizer.json without what changes the beginning of a text."""
    if isinstance(rules, list):
        return [kept for kept in map(without_prefix, rules) if kept is not None]
    if not isinstance(rules, dict):
        return rules
    kind = rules.get("type")
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**rules, "prepend_scheme": "never"}
    if kind == "Strip":
        return {**rules, "strip_left": False}
    if kind == "ByteLevel":
        return {**rules, "add_prefix_space": False}
    return {name: without_prefix(value) for name, value in rules.items()}


# ---------------------------------------------------------------------------------- processes


@contextmanager
def encoding_with(
    encoder: Encoder, workers: int, crew: Crew | None = None
) -> Iterator[Callable[[Iterable[Chunk]], Iterator[Encoded]]]:
    """A function that encodes a stream in order: in this process, or in so many others."""
    with ExitStack() as running:

        def encode(chunks: Iterable[Chunk]) -> Iterator[Encoded]:
            batching = Batching(lambda chunk: len(chunk.text), BATCH_CHARS, WORKER_CHARS)
            count = workers if encoder.fast else workers or 1  # the library uses all cores
            encoded = map_in_order(encoder, chunks, batching, count, crew)
            return chain.from_iterable(running.enter_context(closing(encoded)))

        yield encode
