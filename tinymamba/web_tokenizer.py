"""Which tokenizers web/tokenizer.js can read, to be known before a site is exported."""

from __future__ import annotations

import json
from typing import Any

from tinymamba.cli import UserError
from tinymamba.tokenizer import FILES, byte_alphabet

REMEDY = "export a model with a byte-level BPE, such as data/prepare.py makes"
UNREAD = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
SPLITS = ("Split Isolated", "Split Removed, inverted")


def require_readable(record: dict[str, Any], source: str) -> None:
    """Reject a record of SimpleTokenizer of another kind than a vocab.txt or byte-level BPE.

    Patterns are not looked at: the page itself refuses one that it cannot read.
    """
    if record["name"] == FILES[0] and (problem := find_problem(json.loads(record["content"]))):
        raise UserError(source, f"{problem} does not work in a browser", REMEDY)


def find_problem(parts: dict[str, Any]) -> str | None:
    """The first part of a tokenizer.json that the page cannot read, in the page's words."""
    model, decoder = parts["model"], parts.get("decoder") or {"type": "null"}
    if model.get("type", "BPE") != "BPE":
        return f"the model {model['type']}"
    if decoder["type"] != "ByteLevel":
        return f"the decoder {decoder['type']}"
    problem = find_normalizer_problem(parts.get("normalizer"))
    problem = problem or find_splitter_problem(parts.get("pre_tokenizer"))
    if problem:
        return problem
    lacks_bytes = not {*byte_alphabet()} <= {*model["vocab"]}
    unread = [name for name in UNREAD if model.get(name)]
    unread += ["unk_token"] if model.get("unk_token") and lacks_bytes else []
    return f"the model's {unread[0]}" if unread else None


def find_normalizer_problem(normalizer: dict[str, Any] | None) -> str | None:
    """The same of a normalizer."""
    if normalizer is None or normalizer["type"] == "NFC":
        return None
    if normalizer["type"] == "Sequence":
        return next(filter(None, map(find_normalizer_problem, normalizer["normalizers"])), None)
    return f"the normalizer {normalizer['type']}"


def find_splitter_problem(splitter: dict[str, Any] | None) -> str | None:
    """The same of a pre-tokenizer."""
    splitter = splitter or {"type": "null"}
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    kinds = [kind_of(step) for step in steps] or ["null"]
    wrong = [kind for kind in kinds[:-1] if kind not in (*SPLITS, "Digits")]
    wrong += kinds[-1:] if kinds[-1:] != ["ByteLevel"] else []
    return f"the pre-tokenizer {wrong[0]}" if wrong else None


def kind_of(step: dict[str, Any]) -> str:
    """The type of a pre-tokenizer, and what a Split does."""
    if step["type"] != "Split":
        return str(step["type"])
    return f"Split {step['behavior']}{', inverted' if step.get('invert') else ''}"
