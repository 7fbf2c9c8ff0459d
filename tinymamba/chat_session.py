"""Chats in the sessions of a StreamingServer: a turn reads only what is new in the chat.

    chats = ChatSessions(server)
    session = server.create_session()
    with contextlib.closing(chats.ask(session, "Hello")) as turn:
        for chunk in turn:
            print(chunk.text, end="")

Before it answers, a session has read exactly the ids that ChatTemplate.encode gives for the whole
chat. Mostly they begin with those that it has read already. Where they do not, since a template
drops the reasoning of earlier answers or the text of an answer has other ids than were drawn, the
session goes back to the last state that is kept before the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinymamba.cli import need, require
from tinymamba.prefix_cache import PrefixCache, count_equal
from tinymamba.tokenizer import copy_tokenizer

ROLES = ("system", "user", "assistant")
STATES = 2**28  # bytes of the states that are kept, to go back to


class ChatHistory(NamedTuple):
    """The chat of a session."""

    messages: tuple[dict[str, str], ...] = ()  # of "role" and "content"
    ids: tuple[int, ...] = ()  # what the session has read: a prefix of the chat's ids

    @staticmethod
    def from_dict(record: Any, recent: Sequence[int], position: int) -> ChatHistory:
        """The chat in a saved session, or a ValueError if it is not what the session has read."""
        messages, ids = tuple(record["messages"]), tuple(record["ids"])
        known = all(
            m.keys() == {"role", "content"} and m["role"] in ROLES and type(m["content"]) is str
            for m in messages
        )
        same = len(ids) == position and ids[len(ids) - len(recent) :] == tuple(recent)
        numbers = {int}.issuperset(map(type, ids)) and all(0 <= i < 2**31 for i in ids)
        if not (known and same and numbers):
            raise ValueError("its messages do not fit its state")
        return ChatHistory(messages, ids)


def open_template(tokenizer: Any, field: str, remedy: str) -> Any:
    """The ChatTemplate of a tokenizer; a UserError of a field if there is none that can be used."""
    need("fastapi")  # of Message and ApiError
    from tinymamba.chat_template import ChatTemplate

    template = ChatTemplate(copy_tokenizer(tokenizer))
    problem = template.problem or "the model has no chat template"
    require(template.template, field, problem, remedy)
    return template


def encode_messages(
    template: Any, messages: Sequence[dict[str, str]], reply: bool = True, where: str = "messages"
) -> list[int]:
    """As ChatTemplate.encode; what the template rejects is a UserError that names `where`."""
    from tinymamba.openai_api import ApiError, Message

    try:
        return template.encode([Message.model_validate(m) for m in messages], reply)
    except ApiError as e:
        raise e.as_user_error(where, "change them") from None


class ChatSessions:
    """Asks and answers in the sessions of a server.

    settings   fields of StreamingConfig, for every answer
    template   the ChatTemplate of the model
    """

    def __init__(self, server: Any, settings: dict[str, Any] | None = None):
        self.server, self.states = server, PrefixCache(STATES)
        remedy = "pass --tokenizer, a tokenizer.json with chat_template.jinja beside it"
        self.template = open_template(server.tokenizer, "chat", remedy)
        end = self.template.turn_end
        own = {"stop_ids": None if end is None else [end], "bos_token_id": None}
        self.settings: dict[str, Any] = {**(settings or {}), **own, "reset_on_eos": False}

    def encode(self, messages: Sequence[dict[str, str]], reply: bool = True) -> list[int]:
        """The ids of the messages; what the template rejects is a UserError."""
        return encode_messages(self.template, messages, reply)

    def history(self, session_id: str) -> ChatHistory:
        """The chat of a session; one that has read other text is a UserError."""
        session = self.server.find(session_id)
        problem = "the session has text that is no chat"
        remedy = "use --interactive for it, or begin another"
        require(session.chat or session.now.position == 0, "chat", problem, remedy)
        return session.chat or ChatHistory()

    def ask(self, session_id: str, text: str) -> Turn:
        """Begin the turn of a user. Nothing has changed until its answer is asked for."""
        history = self.history(session_id)
        messages = (*history.messages, {"role": "user", "content": text})
        return Turn(self, session_id, messages, self.encode(messages))

    def set_system(self, session_id: str, text: str) -> None:
        """Begin the chat with this system message, or without one if it is empty."""
        history = self.history(session_id)
        turns = [m for m in history.messages if m["role"] != "system"]
        messages = [{"role": "system", "content": text}, *turns] if text else turns
        asked = {"role": "user", "content": "0"}
        written = not text or self.encode([*messages, asked]) != self.encode([*turns, asked])
        remedy = "say it in the first message"
        require(written, "system", "the chat template leaves it out", remedy)
        self.replace(session_id, messages)

    def undo(self, session_id: str) -> None:
        """Take back the last message of the user and its answer."""
        messages = self.history(session_id).messages
        said = [i for i, m in enumerate(messages) if m["role"] == "user"]
        require(said, "undo", "the chat has no turn to undo", "say something first")
        self.replace(session_id, messages[: said[-1]])

    def reset(self, session_id: str) -> None:
        """Forget all but the system message."""
        messages = self.history(session_id).messages
        self.replace(session_id, [m for m in messages if m["role"] == "system"])

    def replace(self, session_id: str, messages: Sequence[dict[str, str]]) -> None:
        """Let the chat of a session be these messages."""
        answered = any(m["role"] == "assistant" for m in messages)
        ids = self.encode(messages, reply=False) if answered else []
        self.place(self.server.find(session_id), messages, ids)

    def place(self, session: Any, messages: Sequence[dict[str, str]], ids: Sequence[int]) -> None:
        """Let a session hold these messages, after the longest prefix of `ids` that is kept."""
        self.keep(session)
        root = self.server.configured(session.config, self.settings).adapter
        found, read = self.states.find(root, np.array(ids, np.int32)), session.chat
        length, now = found.length, found.value or self.server.initial[root]
        if read and length < len(read.ids) and read.ids == tuple(ids[: len(read.ids)]):
            length, now = len(read.ids), session.now  # a state that is too large to be kept
        session.now, session.chat = now, ChatHistory(tuple(messages), tuple(ids[:length]))
        session.turns = sum(m["role"] == "user" for m in messages)

    def keep(self, session: Any) -> None:
        """Keep the state of a session, to go back to."""
        if session.chat and session.chat.ids:
            root = self.server.configured(session.config, self.settings).adapter
            ids = np.array(session.chat.ids, np.int32)
            self.states.store(root, ids, session.now, session.now.nbytes)


class Turn:
    """A user's message and its answer: an iterator of Chunk. Read it to the end, or close it.

    Then the chat has both messages, and the answer is the text that was given out. A turn that is
    stopped before its first text, or fails, changes nothing.

    ids        the chat before the answer, as the session reads it
    repeated   how many tokens the session has read in vain: they are different now
    """

    def __init__(
        self,
        chats: ChatSessions,
        session_id: str,
        messages: tuple[dict[str, str], ...],
        ids: list[int],
    ):
        self.chats, self.session_id, self.messages, self.ids = chats, session_id, messages, ids
        self.session = chats.server.find(session_id)
        self.before, self.turns = (self.session.now, self.session.chat), self.session.turns
        read = chats.history(session_id).ids
        self.repeated = len(read) - count_equal(np.array(read), np.array(ids))
        self.text, self.drawn = "", []  # type: str, list[int]
        self.answer: Any = None  # the Answer, once the prompt is read
        self.step: Any = None  # the Answer that runs
        self.stopped, self.open = False, True

    @property
    def finish_reason(self) -> str | None:
        """As of an Answer."""
        return self.answer.finish_reason if self.answer else None

    def __iter__(self) -> Iterator[Any]:
        """Read what is new, and answer.

        The state before the last token of the prompt is kept: where a template writes answers
        anew, the next turn goes back to it.
        """
        chats, session = self.chats, self.session
        chats.place(session, self.messages[:-1], self.ids)
        rest = self.ids[len(session.chat.ids) :]
        if rest[:-1]:
            for _ in self.start(rest[:-1], max_new_tokens=0):
                pass
            if self.stopped or self.step.error:
                return
            session.chat = ChatHistory(self.messages[:-1], tuple(self.ids[:-1]))
            chats.keep(session)
        self.answer = self.start(rest[-1:])
        for chunk in self.answer:
            self.text += chunk.text
            self.drawn += [token.id for token in chunk.tokens]
            yield chunk

    def start(self, ids: list[int], **settings: Any) -> Any:
        """The Answer to these ids."""
        settings = {**self.chats.settings, **settings}
        self.step = self.chats.server.answer(ids, self.session_id, **settings)
        if self.stopped:  # meanwhile
            self.step.stop()
        return self.step

    def stop(self) -> None:
        """End the answer, also from a signal's handler."""
        self.stopped = True
        if self.step:
            self.step.stop()

    def close(self) -> None:
        """End the turn; a second call does nothing."""
        if not self.open:
            return
        self.open = False
        if self.step:
            self.step.close()
        session, complete = self.session, self.finish_reason is not None
        if not self.answer or self.answer.error or not (self.text or complete):
            (session.now, session.chat), session.turns = self.before, self.turns
            return
        read = tuple(self.ids + self.drawn)
        recent = session.now.recent
        exact = session.now.position == len(read) and recent == read[len(read) - len(recent) :]
        session.chat = ChatHistory(self.messages, read) if exact else None
        said = {"role": "assistant", "content": self.text}
        self.chats.place(session, (*self.messages, said), read)
        session.before, session.chat_before = self.before
