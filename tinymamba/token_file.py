"""The .bin files of token ids, and the .json beside each that describes it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from tinymamba.cli import UserError, require


def read_sidecar(path: str) -> dict:
    """The .json beside a .bin, or {}: dtype, vocab_size, eos_id, tokens, bytes, tokenizer.

    `tokenizer` is the hash of the tokenizer that the ids were made with. Conversations have a kind,
    and how many they are, and how many of their tokens count.
    """
    sidecar = Path(path).with_suffix(".json")
    if not sidecar.is_file():
        return {}
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(str(sidecar), f"is not JSON ({e})", "fix it or delete it") from None
    known = isinstance(facts, dict) and facts.get("dtype", "int32") in ("int32", "uint16")
    require(
        known,
        str(sidecar),
        "must be an object whose dtype is int32 or uint16",
        "fix it or delete it",
    )
    kinds = {"vocab_size": int, "eos_id": int, "tokenizer": str}
    kinds |= {"kind": str, "conversations": int, "counted": int}
    for name, kind in kinds.items():
        problem = f"says {name} {facts.get(name)!r}"
        valid = facts.get(name) is None or type(facts[name]) is kind
        require(valid, str(sidecar), problem, "fix it or delete it")
    return facts


class TokenFile:
    """The raw ids of one .bin file, memory-mapped and never read as a whole."""

    def __init__(self, path: str | Path, data_dtype: str = "auto"):
        self.path, self.tokens = str(path), None  # type: str, np.ndarray | None
        remedy = "make it with python data/prepare.py"
        require(Path(path).is_file(), self.path, "no such file", remedy)
        facts = read_sidecar(self.path)
        asked = facts.get("dtype", "int32") if data_dtype == "auto" else data_dtype
        problem = f"{asked}, but the .json of {self.path} says {facts.get('dtype')}"
        require(facts.get("dtype", asked) == asked, "data_dtype", problem, "leave it out")
        self.dtype, size = np.dtype(asked), os.path.getsize(path)
        hint = "is it cut off?" if size % 2 else "pass --data_dtype uint16 if it holds uint16"
        self.length, rest = divmod(size, self.dtype.itemsize)
        require(not rest, self.path, f"{size} bytes are not a whole number of {asked} ids", hint)
        problem = f"has {self.length} tokens, its .json says {facts.get('tokens')}"
        remedy = "prepare it again, or delete the .json if it describes another file"
        require(facts.get("tokens", self.length) == self.length, self.path, problem, remedy)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Ids begin .. end-1; a UserError if the file has become shorter."""
        if self.tokens is None:
            self.tokens = np.memmap(self.path, self.dtype, mode="r")
        size = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        there = min(len(self.tokens), size // self.dtype.itemsize)
        problem = f"was cut to {there} tokens while it was read"
        require(end <= there, self.path, problem, "restore it and start again")
        return self.tokens[begin:end]

    def sampled_hash(self) -> str:
        """SHA-256 over 64 pieces of 2,048 ids, evenly spaced from the first to the last."""
        last, h = max(0, self.length - 2048), hashlib.sha256()
        for begin in (last * i // 63 for i in range(64)):
            h.update(self.read(begin, min(begin + 2048, self.length)).tobytes())
        return h.hexdigest()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "tokens": None}  # a worker process maps the file itself

    def check(self, vocab_size: int, begin: int, end: int) -> None:
        """Reject ids outside the vocabulary, naming the first one and its offset."""
        for at in range(begin, end, 1 << 22):
            ids = self.read(at, min(at + (1 << 22), end))
            if ids.max() < vocab_size and ids.min() >= 0:
                continue
            first = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
            remedy = "raise --vocab_size, or tokenize the text again"
            halves = ids.copy().view(np.uint16)  # two uint16 ids read as one int32 are large
            if np.mean((ids < 0) | (ids >= 1 << 16)) > 0.5 and halves.max() < vocab_size:
                remedy = "it looks like uint16 ids: pass --data_dtype uint16"
            problem = f"id {ids[first]} at offset {at + first} is outside vocab_size={vocab_size}"
            raise UserError(self.path, problem, remedy)
