"""Conversations for training: messages to token ids, with a mask of what is learned.

Rows become conversations in `tinymamba/chat_rows.py`: one, or two of a preference. As JSON they are
divided into sides like documents, then encoded by the chat template (`ConversationEncoder`).
`Marks` are the files beside a .bin that plain text has not:

    train.mask.bin     a bit for each token, the lowest of a byte first: 1 is a target
    train.index.bin    int64: where each conversation begins, and the number of all tokens
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from data.sides import Text
from data.unfinished import TOKENIZER, Progress, open_at, sync
from tinymamba.chat_rows import Messages, contents
from tinymamba.cli import UserError, need, require
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
            remedy = "correct the row, or pass another --chat_template"
            raise error.as_user_error(place, remedy) from None
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
