"""Conversations for training: rows of many forms to token ids, with a mask of what is learned.

A row becomes one conversation, or two of a preference: the chosen and the rejected one. They are
read as JSON (`ConversationRows`), divided into sides like documents, and encoded by the chat
template (`ConversationEncoder`). `Marks` are the files beside a .bin that plain text has not:

    train.mask.bin     a bit for each token, the lowest of a byte first: 1 is a target
    train.index.bin    int64: where each conversation begins, and the number of all tokens
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from data.sides import Text
from data.unfinished import TOKENIZER, Progress, open_at, sync
from tinymamba.cli import UserError, need, require
from tinymamba.documents import key_names, listed, quoted
from tinymamba.tokenizer import (
    SETTINGS_FILE,
    TEMPLATE_FILE,
    SimpleTokenizer,
    read_template,
    read_utf8,
)

CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
TOKEN = re.compile(r"<\|[^|<>\s]+\|>")  # a special token as a template writes it
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT
ROLES |= {role: role for role in ("system", "developer", "user", "assistant", "tool")}
PAIR = ("chosen", "rejected")
COLUMNS = {*PAIR, "messages", "conversations", "prompt", "completion", "instruction", "input"}
COLUMNS |= {"output", "system", "tools", "history"}
FORMS = "messages, conversations, prompt and completion, instruction and output, or prompt, chosen"
FORMS += " and rejected"
UNREAD = ("tools", "history")  # of rows
UNREAD_PARTS = ("tool_calls", "function_call", "weight", "train", "loss_mask")  # of messages

Messages = list[dict[str, str]]  # role and content


# --------------------------------------------------------------------------------------- rows


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
        role = value.get("role", value.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            problem = f"{field} has the role {quoted(str(role))}"
            raise self.error(problem, f"use one of {', '.join(ROLES)}")
        content = value.get("content", value.get("value"))
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


# ---------------------------------------------------------------------------------- tokenizer


def add_template(
    tokenizer: Tokenizer, eos: int, given: str | None, folder: Path | None
) -> dict[str, str]:
    """Give a tokenizer the special tokens of its chat template; the files that go beside it.

    The template is the file `given`, else that in the folder of the tokenizer, which has its tokens
    already, else ChatML. What it writes as <|name|> becomes a special token, new ones with the next
    ids.
    """
    template = read_template(folder)[0] if folder else None
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["eos_token"] = tokenizer.id_to_token(eos)
    if folder and (folder / SETTINGS_FILE).is_file():
        settings |= json.loads(read_utf8(folder / SETTINGS_FILE))
        settings.pop("chat_template", None)  # the file of the template counts
    if given is not None:
        template = read_utf8(Path(given))
    if given is not None or not template:
        names = dict.fromkeys(TOKEN.findall(template or CHATML))
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    texts = template or CHATML, json.dumps(settings, indent=2) + "\n"
    return dict(zip((TEMPLATE_FILE, SETTINGS_FILE), texts, strict=True))


# ----------------------------------------------------------------------------------- encoding


class Example(NamedTuple):
    """A row: its side, where it is from, and its conversations as JSON."""

    side: str
    place: str
    text: str


class EncodedExample(NamedTuple):
    """The ids of a row, as they are in the file."""

    side: str
    ids: bytes
    text_bytes: int  # of what the messages say
    last: bool
    mask: bytes  # for each token, whether it is a target
    lengths: list[int]  # of its conversations


class ConversationEncoder:
    """Encodes examples with the tokenizer and the chat template in a folder."""

    fast = True  # by itself: other processes are worth their start

    def __init__(self, folder: Path, eos: int, dtype: str, train_on: str):
        need("fastapi")  # without it the server's own module of templates has no one-line error
        templates: Any = need("tinymamba.chat_template")
        self.arguments = folder, eos, dtype, train_on
        self.eos, self.dtype, self.train_on = eos, dtype, train_on
        self.template = templates.ChatTemplate(SimpleTokenizer(folder / TOKENIZER))
        if problem := self.template.problem:
            raise UserError("--chat_template", problem, "correct it, or pass another one")

    def __reduce__(self) -> tuple:
        """Another process reads the tokenizer itself."""
        return ConversationEncoder, self.arguments

    def chunks(self, texts: Iterable[Text]) -> Iterator[Example]:
        """The examples, each as a whole."""
        for text in texts:
            yield Example(text.side, text.place, "".join(text.parts))

    def __call__(self, batch: list[Example]) -> list[EncodedExample]:
        """The ids of examples."""
        return [self.encoded(example) for example in batch]

    def encoded(self, example: Example) -> EncodedExample:
        """The ids of an example."""
        conversations = json.loads(example.text)
        last_only = len(conversations) == 2
        remedy = "leave it out: of preferences the last answer counts"
        require(self.train_on != "all" or not last_only, "--train_on", "is for chats", remedy)
        both = [self.encode(example.place, each, last_only) for each in conversations]
        ids = np.concatenate([np.array(ids, self.dtype) for ids, _ in both])
        mask = np.concatenate([mask for _, mask in both])
        size = sum(len(content.encode()) for content in contents(example.text))
        lengths = [len(ids) for ids, _ in both]
        return EncodedExample(example.side, ids.tobytes(), size, True, mask.tobytes(), lengths)

    def encode(
        self, place: str, messages: Messages, last_only: bool
    ) -> tuple[list[int], np.ndarray]:
        """The ids of a conversation, the end-of-text id included, and which are targets.

        Where the template ends a turn with no token, the end-of-text id ends the last answer.
        """
        from tinymamba.openai_api import ApiError, Message

        try:
            ids, spans = self.template.encode_answers(list(map(Message.model_validate, messages)))
        except ApiError as error:
            problem, _, remedy = error.detail.removeprefix("messages: ").partition("; ")
            remedy = remedy or "correct the row, or pass another --chat_template"
            raise UserError(place, problem, remedy) from None
        require(spans, place, "the chat template marks no answer", "pass another template")
        if ids[-1] != self.eos:
            ids.append(self.eos)
        mask = np.zeros(len(ids), bool)
        for begin, end in spans[-1:] if last_only else spans:
            mask[begin:end] = True
        if self.template.turn_end is None and messages[-1]["role"] == "assistant":
            mask[spans[-1][1] :] = True
        if self.train_on == "all":
            mask[1:] = True
        return ids, mask


# -------------------------------------------------------------------------------------- files


class Marks:
    """The mask and the index of a side, from where the progress is."""

    def __init__(self, folder: Path, side: str, progress: Progress):
        self.side, self.progress = side, progress
        tokens, count = progress.tokens[side], progress.conversations[side]
        self.mask = open_at(folder / f"{side}.mask.bin", -(-tokens // 8))
        self.bits = self.begun_byte(tokens % 8)
        self.index = open_at(folder / f"{side}.index.bin", 8 * (count + 1) if count else 0)
        if not count:
            self.index.write(np.int64(0).tobytes())

    def begun_byte(self, bits: int) -> np.ndarray:
        """The bits of the last byte, which is written again."""
        if not bits:
            return np.zeros(0, np.uint8)
        self.mask.seek(-1, 2)
        byte = np.frombuffer(self.mask.read(1), np.uint8)
        self.mask.seek(-1, 2)
        return np.unpackbits(byte, bitorder="little")[:bits]

    def add(self, example: EncodedExample) -> None:
        """Write what belongs to an example, before the progress counts its tokens."""
        mask = np.frombuffer(example.mask, np.uint8)
        bits = np.concatenate([self.bits, mask])
        whole = len(bits) // 8 * 8
        self.mask.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self.bits = bits[whole:]
        ends = self.progress.tokens[self.side] + np.cumsum(example.lengths, dtype=np.int64)
        self.index.write(ends.tobytes())
        self.progress.conversations[self.side] += len(example.lengths)
        self.progress.counted[self.side] += int(mask.sum())

    def sync(self) -> None:
        """See to it that all is on disk, the begun byte too."""
        self.mask.write(np.packbits(self.bits, bitorder="little").tobytes())
        sync(self.mask)
        self.mask.seek(-(len(self.bits) > 0), 1)
        sync(self.index)

    def close(self) -> None:
        """Close both files."""
        self.mask.close()
        self.index.close()
