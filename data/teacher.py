"""What a teacher expects after each token of prepared data: `data/prepare.py --teacher`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from testv2 import load_model
from tinymamba.cli import UserError, require, say
from tinymamba.distillation import SUFFIX, Teacher, open_teacher, write_lessons
from tinymamba.token_file import TokenFile, read_sidecar
from tinymamba.tokenizer import RunTokenizer

USED = ("teacher", "top_k", "temperature", "block_size", "output_dir", "force")  # of the Options


def prepare_lessons(options: Any) -> None:
    """Write the train.teacher.bin of an --output_dir; the Options are those of prepare.py."""
    unused = [f"--{name}" for name in options.changed() if name not in USED]
    problem = "reads the train.bin of --output_dir, and no other input"
    require(not unused, "--teacher", problem, f"leave {' and '.join(unused)} out")
    path = Path(options.output_dir) / "train.bin"
    remedy = "prepare the data first, without --teacher"
    require(path.is_file(), str(path), "no such file", remedy)
    target = path.with_suffix(SUFFIX)
    free = options.force or not target.exists()
    require(free, str(target), "exists", "pass --force or another --output_dir")
    source, facts = TokenFile(path), read_sidecar(str(path))
    require("kind" not in facts, str(path), "holds conversations", "train with --teacher FOLDER")
    vocab_size: int = facts.get("vocab_size", 0)
    require(vocab_size, str(path.with_suffix(".json")), "says no vocab_size", remedy)
    tokenizer = RunTokenizer(None, [str(path)], vocab_size)
    model = open_teacher(options.teacher, load_model, tokenizer, vocab_size)
    problem, remedy = f"{options.top_k} of {vocab_size} ids", "lower it"
    require(options.top_k <= vocab_size, "--top_k", problem, remedy)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = Teacher(model.to(device), vocab_size, 0.0, options.temperature)
    settings = (options.block_size, options.top_k, {"teacher": options.teacher})
    show = functools.partial(tqdm, desc="teacher", unit="batch", disable=None)
    try:
        write_lessons(source, teacher, *settings, show)
    except OSError as e:
        problem = e.strerror or str(e)
        raise UserError(str(target), problem, "check the free space") from None
    say(f"{target}: {options.top_k} ids for each of {source.length:,} tokens")
