"""A source of tokens wherever a path is taken: one .bin file, or the shards of a folder or pattern.

    file = open_tokens("data/text/train.bin")
    file = open_tokens("fineweb/")  # every .bin file in it, as one long file
    file = open_tokens("fineweb/train_*.bin")

Shards are one source with one weight. They follow each other in the order of their names, in which
numbers count as numbers; a block may begin in one and end in the next. So what is read at a
position depends on the names and the contents of the shards alone.
"""

from __future__ import annotations

import bisect
import glob
import itertools
import re
from pathlib import Path

import numpy as np

from tinymamba.cli import UserError, require
from tinymamba.token_file import TokenFile, read_sidecar

SIDE = re.compile(r"(?<![a-z])(train|val|valid|validation)(?![a-z])")
LLM_C_MAGIC = 20240520  # the first int32 of a file that llm.c wrote


def open_tokens(path: str | Path, data_dtype: str = "auto") -> TokenFile:
    """The tokens of a .bin file, of a folder of .bin files, or of those that a pattern matches."""
    if is_sharded(path):
        return ShardedTokenFile(path, data_dtype)
    reject_foreign(path, data_dtype)
    return TokenFile(path, data_dtype)


def is_sharded(path: str | Path) -> bool:
    """Whether a source is a folder or a pattern, not one file."""
    return Path(path).is_dir() or (glob.has_magic(str(path)) and not Path(path).exists())


def files_of(path: str | Path) -> list[str]:
    """The .bin files of a source."""
    return find_shards(path) if is_sharded(path) else [str(path)]


def reject_foreign(path: str | Path, data_dtype: str) -> None:
    """Reject a file of another program that would be read wrongly; nothing is unpickled."""
    path = Path(path)
    if not path.is_file():
        return
    if path.with_name("meta.pkl").exists() and data_dtype == "auto" and not read_sidecar(str(path)):
        problem = "has a meta.pkl beside it and no .json, as nanoGPT's files of uint16"
        raise UserError(str(path), problem, "pass --data_dtype uint16 --vocab_size N")
    head = np.fromfile(path, "<i4", 1)
    problem, remedy = "begins with the header of llm.c", "write its tokens without the header"
    require(head.tolist() != [LLM_C_MAGIC], str(path), problem, remedy)


def read_facts(path: str | Path) -> dict:
    """What the .json beside a source says; of shards, what all say, and the sums of their counts.

    Empty if there is none, and without the counts if a shard does not have them.
    """
    facts = [read_sidecar(file) for file in files_of(path)]
    first = facts[0]
    shared = {k: v for k, v in first.items() if all(each.get(k) == v for each in facts)}
    for name in ("tokens", "bytes"):
        shared.pop(name, None)
        if all(name in each for each in facts):
            shared[name] = sum(each[name] for each in facts)
    return shared


def find_shards(path: str | Path) -> list[str]:
    """The .bin files of a folder, or those that a pattern matches, in the order of their names."""
    is_folder, remedy = Path(path).is_dir(), "make them with python data/prepare.py"
    names = glob.glob("*.bin", root_dir=path) if is_folder else glob.glob(str(path), recursive=True)
    found = [str(Path(path, name)) if is_folder else name for name in names]
    found = [name for name in found if Path(name).is_file() and not is_mark(name)]
    found.sort(key=by_number)
    require(found, str(path), "no .bin file is there", remedy)
    sides = {side[1][0] for name in found if (side := SIDE.search(Path(name).stem.lower()))}
    example = Path(path, "train*.bin") if is_folder else "train*.bin"
    problem = "holds files for training and for validation"
    require(len(sides) < 2, str(path), problem, f"pass a pattern such as '{example}'")
    return found


def is_mark(name: str) -> bool:
    """Whether a file is the mask or the index of the conversations in the .bin beside it."""
    mark = re.fullmatch(r"(.+)\.(mask|index)\.bin", name)
    return mark is not None and Path(f"{mark[1]}.bin").is_file()


def by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts shard_2 before shard_10."""
    pieces = re.findall(r"(\d+)|(\D+)", name)
    return [(int(digits or -1), digits or text) for digits, text in pieces]


class ShardedTokenFile(TokenFile):
    """Several .bin files, read as if they were one."""

    def __init__(self, path: str | Path, data_dtype: str = "auto"):
        self.path = str(path)
        names = find_shards(path)
        for name in names:
            reject_foreign(name, data_dtype)
        self.shards = [TokenFile(name, data_dtype) for name in names]
        first = self.shards[0]
        facts = read_sidecar(first.path)
        for shard in self.shards:
            other = read_sidecar(shard.path)
            for name in ("dtype", "vocab_size", "eos_id", "tokenizer"):
                problem = f"{name} is {other.get(name)}, but {facts.get(name)} in {first.path}"
                same = other.get(name) == facts.get(name)
                require(same, shard.path, problem, "prepare them alike, or pass them apart")
        self.dtype = first.dtype
        lengths = (shard.length for shard in self.shards)
        self.starts = list(itertools.accumulate(lengths, initial=0))
        self.length = self.starts.pop()

    def pieces(self, begin: int, end: int) -> list[tuple[TokenFile, int, int]]:
        """The shards that hold ids begin .. end-1, each with its own range."""
        found = []
        at = bisect.bisect_right(self.starts, begin) - 1
        while begin < min(end, self.length):
            shard, start = self.shards[at], self.starts[at]
            stop = min(end, start + shard.length)
            if begin < stop:
                found.append((shard, begin - start, stop - start))
            begin, at = max(begin, stop), at + 1
        return found

    def read(self, begin: int, end: int) -> np.ndarray:
        """Ids begin .. end-1; a UserError if a shard has become shorter."""
        problem = f"has {self.length} tokens, not {end}"
        require(end <= self.length, self.path, problem, "restore it and start again")
        parts = [shard.read(*span) for shard, *span in self.pieces(begin, end)]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self.dtype)])

    def check(self, vocab_size: int, begin: int, end: int) -> None:
        """Reject ids outside the vocabulary, naming the shard."""
        for shard, first, last in self.pieces(begin, end):
            shard.check(vocab_size, first, last)

    def __getstate__(self) -> dict:
        return self.__dict__  # each shard leaves out its own memory
