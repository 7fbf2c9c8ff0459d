"""A vocabulary that grows: tokens are added to a tokenizer, and rows to the model that learns them.

Dimension letters in the comments on shapes: v vocabulary, d model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinymamba.cli import require
from tinymamba.initial_weights import TABLES
from tinymamba.tokenizer import (
    FILES,
    RunTokenizer,
    hash_content,
    open_tokenizer,
    read_tokenizer_facts,
)


def data_vocabulary(*sources: str | list[str]) -> int:
    """The ids of the tokenizer of some data, as their .json files say; 0 if they do not."""
    return read_tokenizer_facts(*sources)[0].get("vocab_size") or 0


def count_before(tokenizer: Any, record: dict | None) -> int | None:
    """How many ids a record's tokenizer has, if `tokenizer` is it with tokens added at the end.

    None if that is the very same, or another one.
    """
    old = record or {}
    kinds = getattr(tokenizer, "name", None), old.get("name")
    if kinds != (FILES[0], FILES[0]) or tokenizer.sha256 == old.get("sha256"):
        return None
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(old["content"])
    count, added = library.get_vocab_size(), tokenizer.library.get_added_tokens_decoder()
    for i in range(count, len(tokenizer)):
        token = added.get(i)
        if token is None or library.token_to_id(token.content) is not None:
            return None
        add = library.add_special_tokens if token.special else library.add_tokens
        add([token])
    return count if hash_content(FILES[0], library.to_str()) == tokenizer.sha256 else None


def grow(weights: dict[str, Tensor], known: int, used: int, vocab_size: int) -> dict[str, Tensor]:
    """The weights of a model with `vocab_size` ids, from those of one that knows the first `known`.

    The rows of tokens that are new are the mean of the known rows (Hewitt, 2021, "Initializing New
    Word Embeddings"). Rows of no token, from id `used` on, stay if they are there.
    """
    grown = dict(weights)
    for name in TABLES:
        old = weights[name]  # (v, d)
        mean = old[:known].double().mean(0).to(old.dtype)
        new = mean.repeat(vocab_size, 1)
        new[:known], new[used : len(old)] = old[:known], old[used:]
        grown[name] = new
    return grown


def inherited_weights(
    base: Any, run: RunTokenizer, vocab_size: int, owner: str
) -> dict[str, Tensor]:
    """The weights of the model `base`, from the file `owner`, for a run with `vocab_size` ids.

    The tokenizer of the run must be that of `base`, or it with tokens added at the end.
    """
    have, weights = base.config.vocab_size, base.state_dict()
    if vocab_size > have:
        open_tokenizer(None, base, [owner])  # which an old checkpoint does not hold
        known = "content" in (base.tokenizer or {})
        problem = "has fewer ids than the data, and no tokenizer to compare theirs with"
        require(known, owner, problem, "put its tokenizer.json beside it")
    before = count_before(run.opened, base.tokenizer)
    if before is not None:
        return grow(weights, before, len(run.opened), vocab_size)
    run.inherit(base.tokenizer, owner)
    return weights if vocab_size == have else grow(weights, have, have, vocab_size)
