"""Conversations in tables: rows of many forms, as messages.

    for where, messages in read_chats(["held_out.jsonl", "more.parquet"]):
        print(where, messages[-1]["content"])

A row is one conversation, or two of a preference: the chosen and the rejected one. `Row` reads one
from any of FORMS. `ConversationRows` reads the rows of a `Corpus`, which knows kinds of files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from tinymamba.cli import UserError, require, say
from tinymamba.documents import Corpus, Reading, key_names, listed, quoted

ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT
ROLES |= {role: role for role in ("system", "developer", "user", "assistant", "tool")}
PAIR = ("chosen", "rejected")
COLUMNS = {*PAIR, "messages", "conversations", "prompt", "completion", "instruction", "input"}
COLUMNS |= {"output", "system", "tools", "history", "label"}
FORMS = "messages, conversations, prompt and completion, instruction and output, or prompt, chosen"
FORMS += " and rejected"
UNREAD = ("tools", "history")  # of rows
UNREAD_PARTS = ("tool_calls", "function_call", "weight", "train", "loss_mask")  # of messages

Messages = list[dict[str, str]]  # role and content


class Row(NamedTuple):
    """A row and where it is from."""

    where: str
    values: dict[str, Any]
    errors: str  # what to do about invalid UTF-8

    def error(self, problem: str, remedy: str) -> UserError:
        """An error that names the row."""
        return UserError(self.where, problem, remedy)

    def has(self, *names: str) -> bool:
        """Whether it has all of these; null is nothing."""
        return all(self.values.get(name) is not None for name in names)

    def conversations(self) -> list[Messages]:
        """The conversation in it, or the chosen and the rejected one."""
        for name in UNREAD:
            if self.values.get(name):
                raise self.error(f"has {name}, which are not read", f"remove {name}")
        if self.has(*PAIR):
            return self.pair()
        return [self.checked(self.conversation())]

    def conversation(self) -> Messages:
        """A conversation in any of the forms."""
        for name in ("messages", "conversations"):
            if self.has(name):
                return self.with_system(self.messages(name))
        if self.has("prompt", "completion"):
            if self.has("label"):  # of KTO: whether the completion is a good one
                remedy = "keep the rows whose label is true, and remove it from them"
                raise self.error("has a label, which is not read", remedy)
            return self.with_system(self.after_prompt("completion"))
        if self.has("instruction", "output"):
            parts = [self.text(n, self.values.get(n) or "") for n in ("instruction", "input")]
            question = "\n\n".join(part for part in parts if part)
            answer = self.text("output", self.values["output"])
            return self.with_system([message("user", question), message("assistant", answer)])
        keys = listed(key_names(self.values))
        raise self.error(f"is no conversation (keys: {keys})", f"give {FORMS}")

    def pair(self) -> list[Messages]:
        """The chosen and the rejected conversation, which differ in the last answer alone."""
        both = [self.checked(self.with_system(self.after_prompt(name))) for name in PAIR]
        for name, messages in zip(PAIR, both, strict=True):
            last = messages[-1]["role"]
            if last != "assistant":
                raise self.error(f"{name} ends with a turn of {last}", "end it with an answer")
        if both[0] == both[1]:
            raise self.error("rejected is equal to chosen", "remove the row")
        if both[0][:-1] != both[1][:-1]:
            problem = "chosen and rejected differ before the last answer"
            raise self.error(problem, "give both the same prompt")
        return both

    def after_prompt(self, name: str) -> Messages:
        """The prompt, if there is one, and the answer or the messages under a name.

        A list that has the prompt already, as many data sets do, is the whole conversation.
        """
        given, prompt = self.values[name], self.values.get("prompt")
        if isinstance(given, str):
            if prompt is None:
                raise self.error(f"{name} is text without a prompt", "give prompt too")
            answer = [message("assistant", self.text(name, given))]
        else:
            answer = self.messages(name)
        before = [] if prompt is None else self.messages("prompt")
        of_text = isinstance(prompt, str) and not isinstance(given, str)
        is_whole = answer[0]["role"] != "assistant" if of_text else answer[: len(before)] == before
        return answer if is_whole else before + answer

    def messages(self, name: str) -> Messages:
        """The messages under a name; text is one of the user."""
        value = self.values[name]
        if isinstance(value, str):
            return [message("user", self.text(name, value))]
        if not isinstance(value, list) or not value:
            raise self.error(f"{name} is no list of messages", "give [{role, content}, ...]")
        return [self.message(f"{name}.{i}", each) for i, each in enumerate(value)]

    def message(self, field: str, value: Any) -> dict[str, str]:
        """A message of OpenAI's form or of ShareGPT's."""
        if not isinstance(value, dict):
            raise self.error(f"{field} is no message", "give role and content, or from and value")
        for name in UNREAD_PARTS:
            if value.get(name) not in (None, [], 1):
                raise self.error(f"{field} has {name}, which is not read", f"remove {name}")
        role, content = given(value, "role", "from"), given(value, "content", "value")
        if not isinstance(role, str) or role not in ROLES:
            problem = f"{field} has the role {quoted(str(role))}"
            raise self.error(problem, f"use one of {', '.join(ROLES)}")
        if isinstance(content, list):
            content = "".join(self.part(field, part) for part in content)
        return message(ROLES[role], self.text(field, content))

    def part(self, field: str, part: Any) -> str:
        """The text of one of the parts that OpenAI's content may have."""
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise self.error(f"{field} has a part that is no text", "remove it")
        return text

    def text(self, field: str, value: Any) -> str:
        """A value as valid text."""
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(f"{field} is {type(value).__name__}", "make it text")
        try:  # JSON can spell half of a surrogate pair, which is not a character
            return value.encode("utf-8", self.errors).decode("utf-8")
        except UnicodeEncodeError:
            remedy = "correct it, or pass --encoding_errors replace"
            raise self.error(f"half a surrogate pair in {field}", remedy) from None

    def with_system(self, messages: Messages) -> Messages:
        """The messages after the system message that a row may have apart."""
        system = self.text("system", self.values.get("system"))
        if not system or messages[0]["role"] == "system":
            return messages
        return [message("system", system), *messages]

    def checked(self, messages: Messages) -> Messages:
        """The messages; a UserError if they are no conversation to learn from."""
        roles = [m["role"] for m in messages]
        for i, m in enumerate(messages):
            if not m["content"].strip():
                raise self.error(f"turn {i + 1}, of {roles[i]}, is empty", "remove the row")
            if i and roles[i] == roles[i - 1]:
                problem = f"turns {i} and {i + 1} are both of {roles[i]}"
                raise self.error(problem, "join them")
        if "assistant" not in roles:
            raise self.error("no turn of assistant", "give an answer, or remove the row")
        return messages


def given(value: dict, *names: str) -> Any:
    """What is under the first of these names that has something; null is nothing."""
    return next((value[name] for name in names if value.get(name) is not None), None)


def message(role: str, content: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": content}


class ConversationRows:
    """Reads rows for a `Corpus`: the text of a row is its conversations as JSON."""

    def __init__(self, kind: str = ""):
        self.kind = kind  # "chat" or "preferences", once a row was read

    def columns(self, names: Collection[str], place: str) -> list[str]:
        """The columns of a table that are read; all, if none is known, for the message."""
        return [name for name in names if name in COLUMNS] or [*names]

    def is_in(self, row: Any) -> bool:
        """Every row has a conversation, or is an error."""
        return True

    def not_there(self, place: str, names: Iterable[str]) -> UserError:
        """The error for a table without conversations."""
        return UserError(place, f"no conversations (keys: {listed(names)})", f"give {FORMS}")

    def text(self, where: str, row: Any, errors: str) -> tuple[str, str]:
        """The conversations of a row, and no reason to leave it out."""
        if not isinstance(row, dict):
            raise UserError(where, "not a JSON object", f"give {FORMS}")
        conversations = Row(where, row, errors).conversations()
        kind = "preferences" if len(conversations) == 2 else "chat"
        if self.kind not in ("", kind):
            problem = f"a row of {kind} after rows of {self.kind}"
            raise UserError(where, problem, "prepare them apart, each in its own --output_dir")
        self.kind = kind
        return json.dumps(conversations, ensure_ascii=False), ""


def contents(text: str) -> Iterator[str]:
    """What the messages of a row say, each once."""
    first, *second = json.loads(text)
    for each in [*first, *(messages[-1] for messages in second)]:
        yield each["content"]


def read_chats(paths: list[str], errors: str = "strict") -> Iterator[tuple[str, Messages]]:
    """The place and the messages of each row, in all files that `data/prepare.py --chat` reads.

    `errors` says what to do about invalid UTF-8. A row of preferences is a UserError.
    """
    corpus = Corpus(paths, Reading(encoding_errors=errors, rows=ConversationRows()), outputs=[])
    for document in corpus.documents():
        messages, *rejected = json.loads("".join(document.parts))
        problem, remedy = "has two answers, chosen and rejected", "pass chats"
        require(not rejected, document.place, problem, remedy)
        yield document.place, messages
    for line in corpus.left_out.lines():
        say(line)
