"""Distillation: a student learns what a teacher expects, besides the tokens that came.

    python testv2.py --teacher big_model.pt --distill_alpha 0.5 --temperature 2
    python data/prepare.py --teacher big_model.pt --top_k 32     # once, beside the data
    python testv2.py --teacher data/text/train.teacher.bin       # no teacher in memory

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2: the
loss is (1 - alpha) times the cross entropy, plus alpha T^2 times the divergence of the student from
the teacher, both at the temperature T.

Dimension letters in the comments on shapes: b batch, l length, n tokens, v vocabulary, k top_k.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymamba.checkpoint import write_json
from tinymamba.cli import UserError, need, require
from tinymamba.conversations import IGNORED
from tinymamba.kernels import in_chunks, promoted
from tinymamba.token_file import TokenFile
from tinymamba.tokenizer import find_tokenizer, require_data_of

SUFFIX = ".teacher.bin"
SMALLEST = 1e-7  # the least probability of all ids that a teacher does not name


class Lesson(NamedTuple):
    """What a teacher expects after each token of a batch, at the temperature of the lesson."""

    logprobs: Tensor  # (b, l, v), or (b, l, k) of the likeliest ids
    ids: Tensor | None  # (b, l, k) those ids
    alpha: float
    temperature: float


def lesson_loss(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, lesson: Lesson, chunk: int
) -> Tensor:
    """The mean loss over targets (b, l), without those of -100; hidden is (b, l, d).

    The logits of `chunk` tokens are in memory at a time; the backward pass computes them again.
    """
    count = (targets != IGNORED).sum().clamp(min=1)
    parts = [hidden.flatten(0, 1), targets.flatten(), lesson.logprobs.flatten(0, 1)]
    if lesson.ids is not None:
        parts.append(lesson.ids.flatten(0, 1))

    def chunk_loss(h: Tensor, t: Tensor, logprobs: Tensor, ids: Tensor | None = None) -> Tensor:
        logits = head(h)
        logits = logits.to(promoted(logits))  # (n, v)
        hard = F.cross_entropy(logits, t, reduction="sum")
        soft = (divergence(logits, logprobs, ids, lesson.temperature) * (t != IGNORED)).sum()
        return (1 - lesson.alpha) * hard + lesson.alpha * lesson.temperature**2 * soft

    losses = in_chunks(chunk_loss, chunk, *parts)
    return sum(losses, torch.zeros((), device=hidden.device)) / count


def divergence(logits: Tensor, logprobs: Tensor, ids: Tensor | None, temperature: float) -> Tensor:
    """The Kullback-Leibler divergence (n,), in nats, of a student's logits (n, v) from a teacher.

    With ids (n, k) the teacher names only these, and all others count as one event.
    """
    own = (logits / temperature).log_softmax(-1)  # (n, v)
    logprobs = logprobs.to(own.dtype)
    if ids is None:
        return F.kl_div(own, logprobs, reduction="none", log_target=True).sum(-1)
    own = own.gather(-1, ids)  # (n, k)
    named = F.kl_div(own, logprobs, reduction="none", log_target=True).sum(-1)
    rest, own_rest = ((1 - t.exp().sum(-1)).clamp(min=0) for t in (logprobs, own))
    return named + torch.xlogy(rest, rest) - torch.xlogy(rest, own_rest.clamp(min=SMALLEST))


# ----------------------------------------------------------------------------------- teachers


class Teacher:
    """A model whose expectations are learned; it does not learn itself."""

    def __init__(self, model: nn.Module, vocab_size: int, alpha: float, temperature: float):
        """A TinyMamba model, or any causal model of `transformers`; the student's `vocab_size`."""
        self.model: Any = model.eval().requires_grad_(False)
        self.vocab_size = vocab_size
        self.alpha, self.temperature = alpha, temperature
        self.is_ours = hasattr(model, "find_ends")

    def split(self, batch: Any) -> tuple[Any, Lesson]:
        """A batch of the trainer, and the lesson on it."""
        ids, _, *ends = batch
        return batch, self.lesson(ids, ends[0] if ends else None)

    @torch.no_grad()
    def lesson(self, ids: Tensor, ends: Tensor | None = None) -> Lesson:
        """The lesson on ids (b, l); `ends` (b, l) are tokens after which another text begins."""
        if self.is_ours:
            logits = self.model.head(self.model.run(ids, ends=ends)[0])
        elif ends is None:
            logits = self.model(ids).logits
        else:
            logits = self.score_texts(ids, ends)
        logits = logits[..., : self.vocab_size].float() / self.temperature
        return Lesson(logits.log_softmax(-1), None, self.alpha, self.temperature)

    def score_texts(self, ids: Tensor, ends: Tensor) -> Tensor:
        """The logits (b, l, v) of a model that can read only one text in a row."""
        cuts = [(row.nonzero()[:, 0] + 1).tolist() for row in ends]
        lengths = [[b - a for a, b in zip([0, *cut], [*cut, len(row)], strict=True) if b > a]
                   for cut, row in zip(cuts, ids, strict=True)]  # fmt: skip
        texts = [text for row, size in zip(ids, lengths, strict=True) for text in row.split(size)]
        padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # causality hides what follows
        logits = self.model(padded).logits
        read = [scores[: len(text)] for scores, text in zip(logits, texts, strict=True)]
        return torch.cat(read).view(*ids.shape, -1)


def open_teacher(path: str, load: Callable[[str], Any], tokenizer: Any, vocab_size: int) -> Any:
    """The model of a checkpoint or folder: TinyMamba's, which `load` opens, or of `transformers`.

    `tokenizer` is the RunTokenizer of the data. A model of another vocabulary is a UserError.
    """
    if is_foreign(Path(path)):
        model, record = load_foreign(path)
        size = model.get_output_embeddings().weight.shape[0]
    else:
        model = load(path)
        record, size = model.tokenizer, model.config.vocab_size
    require_data_of(record, tokenizer.facts, path)
    problem = f"the teacher knows {size} ids, the student {vocab_size}"
    require(size >= vocab_size, path, problem, f"pass --vocab_size {size}, or another teacher")
    return model


def is_foreign(folder: Path) -> bool:
    """Whether a folder has a model of `transformers` that is not TinyMamba's."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        return json.loads(file.read_bytes()).get("model_type") != "tinymamba"
    except (ValueError, AttributeError) as e:
        raise UserError(str(file), f"cannot be read ({e})", "export the model again") from None


def load_foreign(folder: str) -> tuple[Any, dict | None]:
    """The causal model of `transformers` in a folder, and the record of its tokenizer."""
    library = need("transformers")
    try:
        model = library.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        problem = f"transformers cannot load it ({str(e).partition(chr(10))[0]})"
        raise UserError(folder, problem, "pass the folder of a causal language model") from None
    found = find_tokenizer(folder)
    return model, None if found is None else found.to_dict()


# ---------------------------------------------------------------------------- stored lessons
#
# X.teacher.bin has a record for each token of the whole blocks of X.bin: the ids of the likeliest
# next tokens, and the logarithms of their probabilities. X.teacher.json says how it was made.


def record_type(top_k: int) -> np.dtype:
    """The dtype of a record."""
    return np.dtype([("ids", "<i4", (top_k,)), ("logprobs", "<f2", (top_k,))])


def write_lessons(
    source: TokenFile,
    teacher: Teacher,
    block_size: int,
    top_k: int,
    about: dict,
    show: Callable[[range], Iterable[int]] = iter,
) -> Path:
    """Write the lessons on each block of a file; nothing is left of it if that is interrupted.

    Every block is read alone, as a training with that `block_size` does. `about` goes into the
    .json; `show` may draw a progress bar.
    """
    path = Path(source.path).with_suffix(SUFFIX)
    part, device = path.with_name(path.name + ".part"), next(teacher.model.parameters()).device
    blocks = (source.length - 1) // block_size
    problem = f"{source.length} tokens are less than a block of {block_size}"
    require(blocks, source.path, problem, "pass a smaller --block_size")
    batch = max(1, 4096 // block_size)
    try:
        with open(part, "wb") as file:
            for first in show(range(0, blocks, batch)):
                last = min(blocks, first + batch)
                ids = source.read(first * block_size, last * block_size).astype(np.int64)
                rows = torch.from_numpy(ids).view(-1, block_size).to(device)
                best = teacher.lesson(rows).logprobs.topk(top_k)
                records = np.empty(rows.shape, record_type(top_k))
                records["ids"], records["logprobs"] = best.indices.cpu(), best.values.cpu()
                file.write(records.tobytes())
            file.flush()
            os.fsync(file.fileno())
        settings = {"top_k": top_k, "block_size": block_size, "temperature": teacher.temperature}
        facts = {**settings, "tokens": blocks * block_size, "data": source.sampled_hash(), **about}
        path.unlink(missing_ok=True)  # before its .json is that of the new one
        write_json(path.with_suffix(".json"), facts)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


class StoredLessons:
    """The lessons of an X.teacher.bin, memory-mapped."""

    def __init__(self, path: str | Path, source: TokenFile, block_size: int, alpha: float = 0.0):
        """`source`: the X.bin that is trained on, in blocks of `block_size`."""
        self.path, remedy = str(path), "make it with python data/prepare.py --teacher FOLDER"
        require(Path(path).is_file(), self.path, "no such file", remedy)
        facts = read_facts_of(Path(path).with_suffix(".json"), remedy)
        self.temperature, self.records = facts["temperature"], None  # type: float, Any
        self.alpha = alpha
        self.dtype = record_type(facts["top_k"])
        size = facts["tokens"] * self.dtype.itemsize
        require(os.path.getsize(path) == size, self.path, f"should have {size} bytes", remedy)
        same = facts["data"] == source.sampled_hash()
        require(same, self.path, f"was made from other tokens than {source.path}", remedy)
        problem = f"was made in blocks of {facts['block_size']} tokens"
        same, remedy = facts["block_size"] == block_size, f"pass --block_size {facts['block_size']}"
        require(same, self.path, problem, remedy)

    def split(self, batch: Any) -> tuple[Any, Lesson]:
        """A batch of the trainer, and the lesson on it."""
        *batch, ids, logprobs = batch
        return batch, Lesson(logprobs, ids, self.alpha, self.temperature)

    def read(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The likeliest ids (end - begin, k) after tokens begin .. end-1, and their logprobs."""
        if self.records is None:
            self.records = np.memmap(self.path, self.dtype, mode="r")
        found = self.records[begin:end]
        ids = torch.from_numpy(found["ids"].astype(np.int64))
        return ids, torch.from_numpy(found["logprobs"].astype(np.float32))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "records": None}  # a worker process maps the file itself


def read_facts_of(path: Path, remedy: str) -> dict:
    """The .json beside stored lessons."""
    try:
        facts = json.loads(path.read_bytes())
        whole = all(isinstance(facts[name], int) for name in ("top_k", "block_size", "tokens"))
        whole = whole and isinstance(facts["temperature"], float) and "data" in facts
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    require(whole, str(path), "does not describe stored lessons", remedy)
    return facts


def open_lessons(
    config: Any, load: Callable[[str], Any], data: Any, tokenizer: Any, device: torch.device
) -> Any:
    """What gives a run its lessons: a Teacher, or StoredLessons, which `data` then reads.

    `config` is a Config, `load` opens a TinyMamba model, `tokenizer` is the RunTokenizer of data.
    """
    path, alpha, temperature = config.teacher, config.distill_alpha, config.temperature
    if not path.endswith(SUFFIX):
        model = open_teacher(path, load, tokenizer, config.vocab_size)
        return Teacher(model.to(device), config.vocab_size, alpha, temperature)
    alone = len(data.files) == 1 and not data.masked and isinstance(data.files[0], TokenFile)
    problem, remedy = "is of one .bin file of plain text", "pass the teacher itself as --teacher"
    require(alone, path, problem, remedy)
    lessons = StoredLessons(path, data.files[0], data.block_size, alpha)
    stored, remedy = lessons.temperature, f"pass --temperature {lessons.temperature:g}"
    require(stored == temperature, path, f"was made at temperature {stored:g}", remedy)
    data.lessons = lessons
    return lessons
