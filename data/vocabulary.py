"""The tokenizer that data/prepare.py uses: learned, of bytes, GPT-2's or one from a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from data.merges import KnownWords, learn
from data.processes import Batching, Crew, map_in_order
from data.words import BOUNDED, KEPT_BYTES, Words, WordTable
from tinymamba.cli import UserError, need, say
from tinymamba.tokenizer import (
    EOS_TOKEN,
    SimpleTokenizer,
    byte_alphabet,
    byte_level,
    byte_tokenizer,
)

COUNTED_CHARS = 1 << 21  # of text whose words are counted at once
UNSPACED = re.compile(r"\S{129,}")
MARKS = bytes(b" x"[byte not in b"\t\n\v\f\r "] for byte in range(256))  # x: no space
UNSPACED_BYTES = 256  # of text without spaces that bpe learns from, for each token
LINE_BREAK = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


@dataclass
class Learning:
    """How bpe learns."""

    vocab_size: int
    sample_bytes: int
    workers: int = 1
    crew: Crew | None = None


# ----------------------------------------------------------------------------------- learned


def train_bpe(parts: Iterable[str], learning: Learning) -> Tokenizer:
    """A byte-level BPE tokenizer learned from the first text."""
    return learn_bpe(parts, learning)[0]


def learn_bpe(parts: Iterable[str], learning: Learning) -> tuple[Tokenizer, KnownWords | None]:
    """The same, with the ids of the most frequent words."""
    table = WordTable()
    texts, batching = sample(parts, learning), Batching(len, COUNTED_CHARS, COUNTED_CHARS)
    count = Words(BOUNDED).count
    counting = map_in_order(count, texts, batching, learning.workers, learning.crew)
    with closing(counting) as counts:
        for each in counts:
            table.add(each)
    if table.has_forgotten:
        say("bpe forgets the rarest words, as there are too many different ones")
    size = learning.vocab_size
    vocab, merges, known = learn(table.counts, [EOS_TOKEN], size, KEPT_BYTES // 2)
    tokenizer = bounded_byte_level(models.BPE(vocab, merges))
    tokenizer.add_special_tokens([EOS_TOKEN])
    if tokenizer.get_vocab_size() < size:
        say(f"the text gives {tokenizer.get_vocab_size()} tokens, not {size}")
    return tokenizer, known


def bounded_byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer over bytes that splits text into words of bounded length.

    Text without spaces, such as Chinese or DNA, would be one word, and learning takes the square
    of its length.
    """
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(BOUNDED), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sample(parts: Iterable[str], learning: Learning) -> Iterator[str]:
    """The text that bpe learns from.

    In text without spaces hardly any two words are equal. It takes ten times as long to learn
    from, and a smaller sample of it says as much.
    """
    left, unspaced = learning.sample_bytes, UNSPACED_BYTES * learning.vocab_size

    def begin(run: re.Match) -> str:
        nonlocal unspaced
        kept = run[0].encode()[:unspaced]
        unspaced -= len(kept)
        return kept.decode(errors="ignore")

    for part in parts:
        if left <= 0:
            say(f"bpe learns from the first {learning.sample_bytes:,} bytes only")
            return
        before = unspaced
        if b"x" * 129 in part.encode().translate(MARKS):  # the expression takes 20 times as long
            part = UNSPACED.sub(begin, part)
        part = part[:left]
        if unspaced == 0 < before:
            say("bpe learns from the first text without spaces only")
        left -= len(part.encode())
        yield part


# ------------------------------------------------------------------------------- from elsewhere


def bpe_from_ranks(mergeable_ranks: dict[bytes, int]) -> Tokenizer:
    """A BPE tokenizer from the ranks of tiktoken.

    Ranks do not tell which two parts a token was merged from. The parts are what its bytes become
    when only lower ranks are merged.
    """
    alphabet = byte_alphabet()
    name = {token: "".join(alphabet[byte] for byte in token) for token in mergeable_ranks}
    merges = []
    for token, rank in sorted(mergeable_ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
            ranks = [mergeable_ranks.get(pair, rank) for pair in pairs]
            if min(ranks) >= rank:
                break
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [pairs[i]]
        if len(parts) == 2:
            merges.append((name[parts[0]], name[parts[1]]))
    vocab = {name[token]: rank for token, rank in mergeable_ranks.items()}
    return byte_level(models.BPE(vocab, merges, ignore_merges=True))


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer, which tiktoken downloads once."""
    tiktoken: Any = need("tiktoken")
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:
        problem = f"its vocabulary cannot be fetched ({type(error).__name__})"
        remedy = "go online once, or pass --tokenizer PATH of a local tokenizer.json"
        raise UserError("--tokenizer gpt2", problem, remedy) from None
    return bpe_from_ranks(encoding._mergeable_ranks)


def local_tokenizer(name: str, eos_token: str | None) -> tuple[Tokenizer, int]:
    """The tokenizer of a tokenizer.json, and its end-of-text id."""
    path = Path(name, "tokenizer.json") if Path(name).is_dir() else Path(name)
    if not path.is_file() or path.suffix != ".json":
        remedy = "pass byte, bpe, gpt2 or the path of a tokenizer.json"
        raise UserError("--tokenizer", f"{path} is not a tokenizer.json", remedy)
    simple = SimpleTokenizer(str(path))
    eos, tokenizer = simple.eos_token_id, Tokenizer.from_str(simple.content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if eos_token is not None:
        eos = tokenizer.token_to_id(eos_token)
    if eos is None:
        problem = f"no token '{eos_token}'" if eos_token else "its end-of-text token is unknown"
        raise UserError(str(path), problem, "pass --eos_token with one of its tokens")
    return tokenizer, eos


def make_tokenizer(
    name: str, parts: Iterable[str], learning: Learning
) -> tuple[Tokenizer, int, KnownWords | None]:
    """The tokenizer "byte", "bpe" or "gpt2", its end-of-text id, and the ids of some words."""
    known = None
    if name == "bpe":
        tokenizer, known = learn_bpe(parts, learning)
    else:
        tokenizer = byte_tokenizer() if name == "byte" else gpt2_tokenizer()
    tokenizer.add_special_tokens([EOS_TOKEN])
    eos = tokenizer.token_to_id(EOS_TOKEN)
    assert eos is not None
    return tokenizer, eos, known


# ---------------------------------------------------------------------------------- as a file


def tokenizer_text(tokenizer: Tokenizer) -> str:
    """The content of tokenizer.json; the library itself takes no path that is not UTF-8."""
    return tokenizer.to_str(pretty=True)


def vocab_text(tokens: dict[int, str]) -> str:
    """The content of vocab.txt: line i is token i, with line breaks inside it as <0x0A>."""

    def escape(found: re.Match) -> str:
        return "".join(f"<0x{byte:02X}>" for byte in found[0].encode())

    lines = [tokens.get(i, f"<unused{i}>") for i in range(max(tokens) + 1)]
    return "".join(LINE_BREAK.sub(escape, line) + "\n" for line in lines)
