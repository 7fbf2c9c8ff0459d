"""Answers in chats as questions: what a model is asked, and what it should write.

    for row, messages in read_chats(["held_out.jsonl"]):
        questions += find_questions(template, messages, eos, row)
    nats, tokens = answer_loss(model, questions, batch=8)
    written = write_answers(model, questions, batch=8, most=256, ends=[template.turn_end])

What counts is what a model writes itself: the content of an answer and the token that ends its
turn, which is that of the end of the text if the template has none. Each answer is asked with the
messages before it, as the template writes them then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinymamba.chat_session import encode_messages
from tinymamba.cli import require
from tinymamba.conversations import IGNORED


class Question(NamedTuple):
    """An answer of a chat, and what comes before it."""

    prompt: list[int]  # the ids of the messages before, and of what begins an answer
    answer: list[int]  # the ids that count, with the one that ends the turn
    text: str  # of the answer


class Written(NamedTuple):
    """What a model writes as an answer."""

    ids: list[int]  # without the one that ended it
    ended: bool  # by the model, not by the limit


def find_questions(
    template: Any, messages: Sequence[dict[str, str]], eos: int | None, where: str = "messages"
) -> list[Question]:
    """A question for each answer of a chat; `eos` ends a text, and `where` is named in errors."""
    questions = []
    for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
        prompt = encode_messages(template, messages[:i], where=where)
        whole = encode_messages(template, messages[: i + 1], reply=False, where=where)
        problem = "the template does not write the chat before an answer as its beginning"
        require(whole[: len(prompt)] == prompt, where, problem, "use another template")
        answer = whole[len(prompt) :]
        if template.turn_end in answer:  # only the template writes it: a message's is plain text
            answer = answer[: answer.index(template.turn_end) + 1]
        elif template.turn_end is None and eos is not None and answer[-1:] != [eos]:
            answer.append(eos)
        questions.append(Question(prompt, answer, template.tokenizer.decode(answer)))
    require(questions, where, "has no answer of an assistant", "remove the row")
    return questions


@torch.no_grad()
def answer_loss(model: Any, questions: Sequence[Question], batch: int) -> tuple[float, int]:
    """The mean loss of the answers in nats per token that counts, and how many count."""
    total, count, device = 0.0, 0, model.embedding.weight.device
    ordered = sorted(questions, key=lambda q: len(q.prompt) + len(q.answer))
    for at in range(0, len(ordered), batch):
        ids, targets = pad_answers(ordered[at : at + batch])
        counted = int((targets != IGNORED).sum())
        total += model(ids.to(device), targets.to(device)).item() * counted
        count += counted
    return total / count, count


def pad_answers(questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Ids and targets (b, l); padding follows the answers, so nothing that counts sees it."""
    rows = [q.prompt + q.answer for q in questions]
    length = max(map(len, rows)) - 1
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full_like(ids, IGNORED)
    for i, (row, q) in enumerate(zip(rows, questions, strict=True)):
        ids[i, : len(row) - 1] = torch.tensor(row[:-1])
        begin = len(q.prompt) - 1  # whose target is the answer's first token
        targets[i, begin : len(row) - 1] = torch.tensor(q.answer)
    return ids, targets


@torch.no_grad()
def write_answers(
    model: Any, questions: Sequence[Question], batch: int, most: int, ends: Sequence[int]
) -> list[Written]:
    """The greedy answer of up to `most` tokens to each question; one of `ends` ends it."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    written: dict[int, Written] = {}
    for at in range(0, len(order), batch):
        group = order[at : at + batch]
        answers = continue_prompts(model, [questions[i].prompt for i in group], most, ends)
        written.update(zip(group, answers, strict=True))
    return [written[i] for i in range(len(questions))]


def continue_prompts(
    model: Any, prompts: Sequence[list[int]], most: int, ends: Sequence[int]
) -> list[Written]:
    """What a model writes after each prompt, all in one batch."""
    device, length = model.embedding.weight.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=device)  # (b, l)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    logits, state = model.advance(ids, model.init_state(len(prompts)), mask, last_only=True)
    drawn, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(most):
        drawn.append(logits[:, -1].argmax(-1))  # (b,)
        ended = ended | torch.isin(drawn[-1], torch.tensor(ends, device=device))
        if ended.all():
            break
        logits, state = model.advance(drawn[-1][:, None], state, last_only=True)
    rows = torch.stack(drawn, dim=1).tolist()
    first = [next((i for i, token in enumerate(row) if token in ends), None) for row in rows]
    return [Written(row[:end], end is not None) for row, end in zip(rows, first, strict=True)]
