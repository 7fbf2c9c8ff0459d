"""Conversations as training data: whole ones packed into rows, with a mask of what is learned.

    data = open_training_data("data/chat/train.bin", block_size=512, shuffle=True)
    inputs, targets, ends = data[0]

`data/prepare.py --chat` writes the files: beside train.bin there are train.mask.bin, with a bit for
each token that is 1 if it counts as a target, and train.index.bin, with the place at which each
conversation begins.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinymamba.carried_state import RowDataset
from tinymamba.cli import UserError, need, require
from tinymamba.dataset import StreamingTokenDataset
from tinymamba.token_file import TokenFile, read_sidecar
from tinymamba.token_shards import files_of, open_tokens
from tinymamba.tokenizer import listed

IGNORED = -100  # the target of a token without one
TEXT, CHAT, PREFERENCES = "text", "chat", "preferences"
REMEDY = "prepare it again with python data/prepare.py --chat"


def open_training_data(
    data_sources: Any, *args: Any, packed: bool = True, rows: int = 0, **settings: Any
) -> StreamingTokenDataset:
    """A dataset of the kind that the .json files of the sources say, with these arguments.

    With `packed`, a row has as many conversations as fit into it, else one. With `rows`, so many
    rows of text read on from step to step: see RowDataset.
    """
    files = [file for path in listed(data_sources) for file in files_of(path)]
    kinds = {find_kind(file): file for file in files}
    (kind, first), *others = kinds.items() or [(TEXT, "")]
    for other, path in others:
        raise UserError(path, f"holds {other}, but {first} holds {kind}", "train on them apart")
    if kind == TEXT and rows:
        return RowDataset(data_sources, *args, rows=rows, **settings)
    if kind == TEXT:
        return StreamingTokenDataset(data_sources, *args, **settings)
    remedy = "train on it with python peft.py --objective dpo"
    require(kind == CHAT, first, "holds pairs of a chosen and a rejected answer", remedy)
    problem, remedy = "holds conversations, each of which begins anew", "leave out --carry_state"
    require(not rows, first, problem, remedy)
    return ConversationDataset(data_sources, *args, packed=packed, **settings)


def find_kind(path: str) -> str:
    """What a .bin holds, as its .json says."""
    kind, sidecar = read_sidecar(path).get("kind", TEXT), str(Path(path).with_suffix(".json"))
    kinds = (TEXT, CHAT, PREFERENCES)
    require(kind in kinds, sidecar, f"says kind {kind!r}, not one of {', '.join(kinds)}", REMEDY)
    mask = mark_of(path, "mask")
    problem = f"does not say that {path} holds conversations, but {mask.name} lies beside it"
    require(kind != TEXT or not mask.is_file(), sidecar, problem, "restore it, or remove the mask")
    return kind


def mark_of(path: str, name: str) -> Path:
    """The mask or the index beside a .bin."""
    return Path(path).with_suffix(f".{name}.bin")


class Shard(NamedTuple):
    """The marks of one .bin file."""

    mask: Path
    begin: int  # the tokens of the source before it
    offsets: np.ndarray  # (conversations + 1,) int64: where each begins, and the end of the last


def open_shard(file: TokenFile, begin: int) -> Shard:
    """The marks beside a .bin; a UserError unless they fit it."""
    mask, index = mark_of(file.path, "mask"), mark_of(file.path, "index")
    for path in (mask, index):
        require(path.is_file(), str(path), f"no such file, which belongs to {file.path}", REMEDY)
    size, bits = mask.stat().st_size, -(-file.length // 8)
    problem = f"has bits for {8 * size} tokens, but {file.path} has {file.length}"
    require(size == bits, str(mask), problem, REMEDY)
    offsets = np.fromfile(index, np.int64)
    whole = index.stat().st_size % 8 == 0 and len(offsets) > 1
    fits = whole and offsets[0] == 0 and offsets[-1] == file.length and (np.diff(offsets) > 0).all()
    problem = f"does not divide the {file.length} tokens of {file.path} into conversations"
    require(fits, str(index), problem, REMEDY)
    said, count = read_sidecar(file.path).get("conversations"), len(offsets) - 1
    problem = f"has {count} conversations, but the .json of {file.path} says {said}"
    require(said in (None, count), str(index), problem, REMEDY)
    return Shard(mask, begin, offsets)


class ConversationFile:
    """The conversations of one source: a .bin, or several shards that are read as one.

    `pack` divides them into rows; before that there are none.
    """

    def __init__(self, path: str | Path, data_dtype: str = "auto"):
        self.tokens = open_tokens(path, data_dtype)
        self.path, self.length, self.dtype = str(path), self.tokens.length, self.tokens.dtype
        self.check = self.tokens.check
        files = getattr(self.tokens, "shards", [self.tokens])
        begins = accumulate((file.length for file in files), initial=0)
        self.shards = [open_shard(*each) for each in zip(files, begins, strict=False)]
        starts = [shard.offsets[:-1] + shard.begin for shard in self.shards]
        self.offsets = np.concatenate([*starts, [self.length]])  # (conversations + 1,)
        for file, shard in zip(files, self.shards, strict=True):
            (counted,) = self.count_before(np.array([shard.begin + file.length]), shard)
            said = read_sidecar(file.path).get("counted", counted)
            problem = f"{counted} tokens count in it, but the .json of {file.path} says {said}"
            require(said == counted, str(shard.mask), problem, REMEDY)

    def count_before(self, places: np.ndarray, shard: Shard) -> np.ndarray:
        """How many tokens of a shard count before each of these places, which ascend."""
        found, total, local = np.zeros(len(places), np.int64), 0, places - shard.begin
        mask = np.memmap(shard.mask, np.uint8, mode="r")
        for at in range(0, len(mask), 1 << 20):
            bits = np.unpackbits(mask[at : at + (1 << 20)], bitorder="little")
            sums = np.concatenate([[0], np.cumsum(bits, dtype=np.int64)]) + total
            first = np.searchsorted(local, 8 * at)
            last = np.searchsorted(local, 8 * at + len(bits), side="right")
            found[first:last] = sums[local[first:last] - 8 * at]
            total = sums[-1]
        return found

    def has_inside(self, token: int) -> bool:
        """Whether a conversation goes on after this token."""
        last = self.offsets[1:] - 1
        for at in range(0, self.length, 1 << 22):
            ids = self.tokens.read(at, min(at + (1 << 22), self.length))
            places = at + np.flatnonzero(ids == token)
            if (last[np.searchsorted(last, places)] != places).any():
                return True
        return False

    def pack(self, size: int, packed: bool) -> int:
        """Divide the conversations into rows of `size` tokens, by next-fit; how many rows.

        A longer conversation keeps its last tokens. One without a target is left out.
        """
        ends, lengths = self.offsets[1:], np.diff(self.offsets)
        kept = np.minimum(lengths, size)
        targets = [np.zeros(0, np.int64)]
        for shard in self.shards:
            own = shard.begin + shard.offsets[1:]
            sizes = np.minimum(np.diff(shard.offsets), size)
            before = self.count_before(own - sizes + 1, shard)  # a row's first token is no target
            targets.append(self.count_before(own, shard) - before)
        self.numbers = np.flatnonzero(np.concatenate(targets))
        self.cut, self.left_out = int((lengths > size).sum()), len(ends) - len(self.numbers)
        remedy = "raise --block_size, or look at the mask"
        require(len(self.numbers), self.path, "no token in it counts as a target", remedy)
        reached, first, rows = np.cumsum(kept[self.numbers]), 0, [0]
        while packed and first < len(reached):
            limit = size + (reached[first - 1] if first else 0)
            first = int(np.searchsorted(reached, limit, side="right"))
            rows.append(first)
        self.rows = np.array(rows) if packed else np.arange(len(self.numbers) + 1)
        self.kept = int(reached[-1])
        return len(self.rows) - 1

    def row(self, row: int) -> list[int]:
        """The numbers of the conversations in a row."""
        return self.numbers[self.rows[row] : self.rows[row + 1]].tolist()

    def read(self, number: int, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, or `most` of them from its end, and which of them count."""
        begin, end = self.offsets[number : number + 2].tolist()
        begin = begin if most is None else max(begin, end - most)
        shard = next(each for each in reversed(self.shards) if each.begin <= begin)
        first, last = begin - shard.begin, end - shard.begin
        size = -(-last // 8) - first // 8
        packed = np.fromfile(shard.mask, np.uint8, size, offset=first // 8)
        problem = "was cut while it was read"
        require(len(packed) == size, str(shard.mask), problem, "restore it and start again")
        bits = np.unpackbits(packed, bitorder="little")[first % 8 :][: end - begin]
        return self.tokens.read(begin, end).astype(np.int64), bits.astype(bool)

    def sampled_hash(self) -> str:
        """SHA-256 over pieces of the ids, and over all of mask and index."""
        h = hashlib.sha256(self.tokens.sampled_hash().encode())
        h.update(self.offsets.tobytes())
        for shard in self.shards:
            with open(shard.mask, "rb") as file:
                while piece := file.read(1 << 20):
                    h.update(piece)
        return h.hexdigest()


class ConversationDataset(StreamingTokenDataset):
    """Whole conversations in rows of block_size, in an order that is a pure function.

    `dataset[i]` is (inputs, targets, ends), each (block_size,). Targets are int64, and -100 where
    a token does not count, where the next token is another conversation's, and in the padding at
    the end of a row. `ends` is true at the last token of each conversation, and in the padding.
    Without `packed`, a row is one conversation, and has no `ends`.
    """

    masked = True

    def __init__(self, *args: Any, packed: bool = True, **settings: Any):
        """All other arguments are those of StreamingTokenDataset."""
        self.packed = packed
        super().__init__(*args, **settings)

    def open_file(self, path: str | Path, data_dtype: str) -> ConversationFile:
        """One source."""
        return ConversationFile(path, data_dtype)

    def count_blocks(self, file: ConversationFile) -> int:
        """How many rows a source has."""
        return file.pack(self.block_size, self.packed)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        source, row = self.locate(i)
        file, at = self.files[source], 0
        parts = empty_rows(self.block_size)
        for number in file.row(row):
            ids, counts = file.read(number, self.block_size)
            if self.vocab_size is not None:  # again, in case the file has changed since
                begin, end = file.offsets[number : number + 2].tolist()
                file.check(self.vocab_size, begin, end)
            at = put(parts, at, ids, counts)
        return tuple(parts if self.packed else parts[:2])

    def describe(self) -> Iterator[str]:
        """What to say of the data before they are used."""
        size = self.block_size
        for file, rows in zip(self.files, self.blocks, strict=True):
            share, path = file.kept / (rows * size), file.path
            yield f"{path}: {len(file.numbers)} conversations in {rows} rows, {share:.1%} full"
            if file.cut:
                yield f"{path}: {file.cut} of more than {size} tokens (block_size) lose their start"
            if file.left_out:
                yield f"{path}: {file.left_out} are left out, as no token in them counts"

    def first_prompt(self) -> list[int]:
        """The ids of the first conversation up to its first answer."""
        ids, counts = self.files[0].read(int(self.files[0].numbers[0]))
        return ids[: max(1, int(counts.argmax()))].tolist()


def empty_rows(*shape: int) -> list[Tensor]:
    """Inputs, targets and ends that are all padding."""
    inputs = torch.zeros(shape, dtype=torch.int64)
    return [inputs, torch.full_like(inputs, IGNORED), torch.ones_like(inputs, dtype=torch.bool)]


def put(parts: Sequence[Tensor], at: int, ids: np.ndarray, counts: np.ndarray) -> int:
    """Put a conversation into inputs, targets and ends (l,), from `at` on; the place after it."""
    inputs, targets, ends = parts
    last = at + len(ids) - 1
    inputs[at : last + 1] = torch.from_numpy(ids)
    targets[at:last] = torch.from_numpy(np.where(counts, ids, IGNORED)[1:])
    ends[at:last] = False
    return last + 1


def start_answer(tokenizer: Any, message: str, data: Any) -> tuple[list[int], list[int]]:
    """What a sample answers, and the ids that end it; a UserError if the message cannot be written.

    Without a message of the user, it answers the first conversation of a ConversationDataset.
    """
    need("pydantic")
    library = importlib.import_module("tinymamba.chat_template")  # not part of a model folder
    template = library.ChatTemplate(library.copy_tokenizer(tokenizer))
    ends = [template.turn_end, getattr(tokenizer, "eos_token_id", None)]
    known = [i for i in ends if i is not None]
    if not message:
        return data.first_prompt(), known
    problem = "the tokenizer of the data has no chat template"
    require(template.template, "generation_prompt", problem, "leave it out")
    try:
        return template.encode([library.Message(role="user", content=message)]), known
    except library.ApiError as e:
        raise e.as_user_error("generation_prompt", "use another") from None
