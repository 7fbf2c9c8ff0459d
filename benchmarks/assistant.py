"""Answers to questions about Python's library, before and after fine-tuning.

    make assistant    # trains both checkpoints, and asks them
    python -m benchmarks.assistant --checkpoints before.pt after.pt --answers answers.jsonl

Each checkpoint is asked the questions of --data (rows of data/instructions.py that it was not
trained on) through its own chat template, or in plain text if it has none. It takes the likeliest
token each time, until it ends its turn or has written --max_tokens.

body: the share of answers that Python parses, indented and after the signature. name: the share
that give the right name, alone or with its module. Both: the share that ended by themselves, the
share that match the library exactly, and the mean length in tokens.

A row for every checkpoint and task is appended to --output, every answer to --answers.
"""

from __future__ import annotations

import ast
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch

from benchmark import append_row
from data.instructions import with_body
from testv2 import TinyMambaModel, load_model
from tinymamba.chat_template import ChatTemplate
from tinymamba.cli import UserError, parse_flags, require, run_cli, say
from tinymamba.openai_api import Message
from tinymamba.tokenizer import (
    SimpleTokenizer,
    copy_tokenizer,
    open_tokenizer,
    read_utf8,
    why_no_tokenizer,
)

TASKS = {"body": "parses", "name": "right"}  # task: what its main number says


@dataclass
class Options:
    """The command line."""

    # Models
    checkpoints: list[str] | None = None  # checkpoints or folders of models, to compare

    # Questions
    data: str = "data/assistant/val.jsonl"  # file that data/instructions.py has written
    rows: int = 120  # most questions of each task
    max_tokens: int = 128  # longest answer

    # Output
    threads: int = 0  # CPU threads; 0 means all
    output: str = "assistant.jsonl"  # file of rows
    answers: str | None = None  # file for every question with its answer

    LIMITS: ClassVar = {"rows": (1, 1 << 20), "max_tokens": (1, 1 << 20), "threads": (0, 1 << 10)}


class Question(NamedTuple):
    """A row of the data."""

    task: str
    text: str
    answer: str
    function: str  # dotted name
    signature: str

    def is_solved_by(self, answer: str) -> bool:
        """Whether an answer does what the task asks for."""
        if self.task == "body":
            return parses(with_body(self.signature, answer))
        said = answer.strip().removesuffix(".").strip("`").removesuffix("()")
        return said in (self.function, self.function.rpartition(".")[2])


class Answer(NamedTuple):
    """What a model wrote."""

    text: str
    tokens: int
    ended: bool  # by itself


def parses(code: str) -> bool:
    """Whether Python can parse source."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a model may write anything
        return False
    return True


def read_questions(path: str, most: int) -> list[Question]:
    """The first questions of each task."""
    require(Path(path).is_file(), path, "no such file", "run python -m data.instructions")
    questions: dict[str, list[Question]] = {task: [] for task in TASKS}
    for number, line in enumerate(read_utf8(Path(path)).rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            asked, answer = (message["content"] for message in row["messages"])
            question = Question(row["task"], asked, answer, row["function"], row["signature"])
        except (ValueError, KeyError, TypeError):
            remedy = "run python -m data.instructions"
            raise UserError(f"{path}:{number}", "is no question", remedy) from None
        found = questions.get(question.task, [])
        if len(found) < most:
            found.append(question)
    for task, found in questions.items():
        require(found, path, f"has no question of {task}", "run python -m data.instructions")
    return [question for found in questions.values() for question in found]


# ----------------------------------------------------------------------------------- asking


class Assistant:
    """A model that is asked one question at a time."""

    def __init__(self, checkpoint: str):
        self.model = load_model(checkpoint)
        tokenizer = open_tokenizer(None, self.model, [checkpoint])
        problem = why_no_tokenizer(self.model)
        require(tokenizer, checkpoint, problem, "copy tokenizer.json beside it")
        self.tokenizer: SimpleTokenizer = tokenizer
        self.template = ChatTemplate(copy_tokenizer(tokenizer))
        problem = self.template.problem or ""
        require(not problem, checkpoint, problem, "train it with another chat template")
        ends = (self.template.turn_end, tokenizer.eos_token_id)
        self.ends = {token for token in ends if token is not None}

    def answer(self, question: str, most: int) -> Answer:
        """The likeliest answer, token by token."""
        prompt = self.template.encode([Message(role="user", content=question)])
        ids = write_greedily(self.model, prompt, self.ends, most)
        ended = ids[-1] in self.ends
        text = self.tokenizer.decode(ids[: len(ids) - ended])
        for stop in self.template.stops:
            text, found, _ = text.partition(stop)
            ended = ended or bool(found)
        return Answer(text, len(ids), ended)


@torch.inference_mode()
def write_greedily(
    model: TinyMambaModel, prompt: list[int], ends: set[int], most: int
) -> list[int]:
    """The likeliest ids after a prompt, up to the first of `ends` or the limit."""
    unread, state, ids = torch.tensor([prompt]), model.init_state(1), list[int]()
    while len(ids) < most and not (ids and ids[-1] in ends):
        logits, state = model.advance(unread, state, last_only=True)  # (1, 1, v)
        unread = logits[:, -1].argmax(-1, keepdim=True)  # (1, 1)
        ids.append(int(unread))
    return ids


def score(checkpoint: str, questions: list[Question], options: Options) -> Iterator[dict]:
    """A row for each task; every answer goes to --answers."""
    assistant = Assistant(checkpoint)
    for task, main_number in TASKS.items():
        asked = [question for question in questions if question.task == task]
        answers = [assistant.answer(question.text, options.max_tokens) for question in asked]
        pairs = [*zip(asked, answers, strict=True)]
        solved = [question.is_solved_by(answer.text) for question, answer in pairs]
        if options.answers:
            write_answers(options.answers, checkpoint, pairs, solved)
        exact = [answer.text.strip() == question.answer.strip() for question, answer in pairs]
        yield {
            "checkpoint": checkpoint,
            "task": task,
            "questions": len(asked),
            main_number: share(solved),
            "exact": share(exact),
            "ended": share([answer.ended for answer in answers]),
            "tokens": round(statistics.mean(answer.tokens for answer in answers), 1),
        }


def share(found: list[bool]) -> float:
    """The share that is true."""
    return round(sum(found) / len(found), 4)


def write_answers(
    path: str, checkpoint: str, pairs: list[tuple[Question, Answer]], solved: list[bool]
) -> None:
    """Append every question with its answer to a file."""
    with open(path, "a", encoding="utf-8") as file:
        for (question, answer), is_solved in zip(pairs, solved, strict=True):
            facts: dict[str, Any] = {"checkpoint": checkpoint, "solved": is_solved}
            facts |= {"question": question.text, "answer": answer.text, "library": question.answer}
            file.write(json.dumps(facts, ensure_ascii=False) + "\n")


def side_by_side(rows: list[dict]) -> Iterator[str]:
    """The lines of a table: a column for each checkpoint."""
    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    widths = [max(10, len(name)) + 2 for name in names]
    yield " " * 16 + "".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True))
    for task, main_number in TASKS.items():
        for number in (main_number, "exact", "ended"):
            found = [row[number] for row in rows if row["task"] == task]
            cells = (f"{v:>{w}.1%}" for v, w in zip(found, widths, strict=True))
            yield f"{task + ' ' + number:16}" + "".join(cells)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python -m benchmarks.assistant --checkpoints FILE ... [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    remedy = "pass one or more, such as the model before and after"
    checkpoints = list(dict.fromkeys(options.checkpoints or ()))
    require(checkpoints, "--checkpoints", "names none", remedy)
    if options.threads:
        torch.set_num_threads(options.threads)
    questions, rows = read_questions(options.data, options.rows), list[dict]()
    for checkpoint in checkpoints:
        for row in score(checkpoint, questions, options):
            append_row(options.output, row)
            rows.append(row)
    for line in side_by_side(rows):
        say(line)
    return 0


if __name__ == "__main__":
    run_cli(main)
