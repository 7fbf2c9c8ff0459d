"""The chat template of a model: messages to token ids, as `apply_chat_template` of transformers.

template = ChatTemplate(SimpleTokenizer("model/tokenizer.json"))
ids = template.encode([Message(role="user", content="Hello")])
ids, spans = template.encode_answers(messages)  # where in the ids the assistant's answers are
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tinymamba.cli import need
from tinymamba.openai_api import ApiError, Message
from tinymamba.tokenizer import SimpleTokenizer, copy_tokenizer, find_turn_end

STAND_INS, SIGNS = 0xF0000, 0x100000  # private use: for the characters of messages, and for tokens
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TOOL_ROLES = ("tool", "function")
NO_TEMPLATE, UNSUPPORTED = "the model has no chat template", "unsupported_parameter"
CALL_KEYS = ("id", "type", "index", "function", "name", "arguments")  # of tool calls
TOOL_KEYS = ("description", "parameters", "strict")  # of tools, beside those of calls


class Chat(NamedTuple):
    """What a template writes. With `reply`, the beginning of an answer follows."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None  # as the client sent them
    reply: bool = True


class Rendered(NamedTuple):
    """The text of a chat, and the same with stand-ins for special tokens of clients."""

    text: str
    marked: str  # as long as the text
    back: dict[int, int]  # turns the stand-ins back

    def between(self, begin: int, end: int) -> Rendered:
        """A part of it."""
        return self._replace(text=self.text[begin:end], marked=self.marked[begin:end])


def either(texts: Iterable[str]) -> re.Pattern:
    """What finds any of these texts, the longest first."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) finds nothing


def one_line(error: Exception) -> str:
    """What an error says, without line ends."""
    return " ".join(str(error).split())


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Tools, or a part of them or of a message, with every text of the client changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    kept = (*CALL_KEYS, *TOOL_KEYS)
    return {n if n in kept else change(n): map_texts(v, change) for n, v in value.items()}


def map_chat(chat: Chat, change: Callable[[str], str]) -> Chat:
    """A chat with every text of the client changed; the role of a message is none."""
    messages = [
        {n: v if n == "role" else map_texts(v, change) for n, v in message.items()}
        for message in chat.messages
    ]
    return chat._replace(messages=messages, tools=map_texts(chat.tools, change))


def not_written(index: int, field: str, problem: str) -> ApiError:
    """The error of a field of a message that would be missing in the prompt."""
    param = f"messages.{index}.{field}"
    return ApiError(400, f"{param}: {problem}; leave it out", param, UNSUPPORTED)


def require_content(messages: list[Message]) -> None:
    """Only an assistant's message may have no content, as OpenAI's own with tool calls."""
    for i, m in enumerate(messages):
        if m.content is None and m.role not in ("assistant", "function"):
            param = f"messages.{i}.content"
            raise ApiError(400, f"{param}: Field required", param)


def mark_special(tokenizer: SimpleTokenizer) -> dict[str, int]:
    """The ids of the special tokens; those that tokenizer_config.json names become special too."""
    library = tokenizer.library
    if library is None:
        return tokenizer.special
    added = library.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    named = {*tokenizer.special_tokens.values()} - special
    library.add_special_tokens([t for t in named if library.token_to_id(t) is not None])
    added = library.get_added_tokens_decoder().items()
    return {t.content: i for i, t in added if t.special and t.content.strip()}


def unknown_ids(tokenizer: SimpleTokenizer) -> set[int | None]:
    """The id that stands for text which the tokenizer has no token for."""
    if tokenizer.library is None:
        return set()
    model = json.loads(tokenizer.content)["model"]
    return {model.get("unk_id"), tokenizer.library.token_to_id(model.get("unk_token") or "")}


class GuardedTokenizer:
    """Reads special tokens as plain text; instead, a sign of its own stands for each of them."""

    def __init__(self, tokenizer: SimpleTokenizer):
        self.tokenizer = copy_tokenizer(tokenizer)
        special, library = mark_special(self.tokenizer), self.tokenizer.library
        self.signs = {token: chr(SIGNS + i) for i, token in enumerate(special)}
        self.original: dict[int, int] = {}  # by the id of a sign
        if library is None:
            self.tokenizer.special = {self.signs[token]: i for token, i in special.items()}
            return
        from tokenizers import AddedToken

        known, names = library.get_added_tokens_decoder(), ("lstrip", "rstrip", "normalized")
        for token, i in special.items():
            settings = {name: getattr(known[i], name) for name in (*names, "single_word")}
            library.add_tokens([AddedToken(self.signs[token], **settings)])
            self.original[library.token_to_id(self.signs[token])] = i

    def encode(self, text: str) -> list[int]:
        """The ids of a text with signs."""
        ids = self.tokenizer.encode(text, allow_special=self.tokenizer.library is None)
        return [self.original.get(i, i) for i in ids]


class ChatTemplate:
    """Turns the messages of a chat into the token ids of a prompt.

    The library `transformers` renders the template, and the text is encoded as a whole. A special
    token that comes from a message is told apart by rendering again with other characters in its
    place. It is encoded as plain text; a request where that is impossible is rejected.
    """

    USER = "\n\nuser:"  # ends the answers of a model without a template
    MAX_SYSTEMS = 16  # system messages remembered by `with_other_user`

    def __init__(self, tokenizer: Any):
        """Nothing else may use `tokenizer`: encoding special tokens changes its settings."""
        self.tokenizer = tokenizer
        self.systems: collections.OrderedDict[str, list[int]] = collections.OrderedDict()
        self.template: str | None = None
        self.problem: str | None = None  # why the template cannot be used
        if text := isinstance(tokenizer, SimpleTokenizer) and tokenizer.chat_template:
            self.load(text)

    def load(self, text: str) -> None:
        """Use this template; one that cannot be read is noted as `problem`."""
        self.library = need("transformers.utils.chat_template_utils")
        try:
            self.library.render_jinja_template([], chat_template=text)
        except Exception as e:  # compiling may raise anything, even a RecursionError
            self.problem = f"the model's chat template cannot be read ({one_line(e)})"
            return
        self.template, self.special = text, mark_special(self.tokenizer)
        self.reserved = {*self.special.values()} - unknown_ids(self.tokenizer)
        self.tokens = either(self.special)
        self.letters = {c for token in self.special for c in token}
        visible = [c for c in self.letters if not c.isspace()]
        signs = [c for c in visible if not c.isalnum()]
        self.patterns = [either(visible), either([*self.special, *signs]), self.tokens]

    @functools.cached_property
    def guarded(self) -> GuardedTokenizer:
        """Only made if a message has a special token: it takes as long as reading a tokenizer."""
        return GuardedTokenizer(self.tokenizer)

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return [] if self.template else [self.USER]

    @functools.cached_property
    def turn_end(self) -> int | None:
        """The id of the special token that ends an answer, beside the end of the text."""

        def write(messages: list[dict[str, str]]) -> str:
            return self.fill(Chat(messages, reply=False))

        with contextlib.suppress(ApiError):  # a template may reject such a chat
            return find_turn_end(write, self.special) if self.template else None
        return None

    def encode(
        self, messages: list[Message], reply: bool = True, tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """The token ids of the messages, and unless `reply` is false, of what begins an answer."""
        if self.problem:
            raise ApiError(400, f"messages: {self.problem}", "messages")
        require_content(messages)
        if not self.template:
            self.require_known(tools)
            self.require_plain(messages)
            lines = [*map(self.line, messages), *["assistant:"] * reply]
            return self.tokenizer.encode("\n\n".join(lines))
        chat = Chat([m.for_template() for m in messages], tools, reply)
        try:
            rendered = self.render(chat)
        except RecursionError:
            problem = "messages: tool_calls or tools are nested too deeply; send flat ones"
            raise ApiError(400, problem, "messages") from None
        self.require_written(chat, rendered.text)
        return self.ids_of(rendered)

    def ids_of(self, rendered: Rendered) -> list[int]:
        """The ids of a text, in which special tokens of clients are plain text."""
        text, marked, back = rendered
        written = self.tokens.findall(marked)  # by the template, not by a message
        ids = self.tokenizer.encode(text, allow_special=True)
        if self.tokens.findall(text) != written or self.has_more(ids, written):
            signs = self.guarded.signs
            signed = self.tokens.sub(lambda found: signs[found[0]], marked)
            ids = self.guarded.encode(signed.translate(back))
        if self.has_more(ids, written):
            problem = "messages: the tokenizer reads a special token in them; leave it out"
            raise ApiError(400, problem, "messages")
        return ids

    # ------------------------------------------------------------------- answers, to learn from

    def encode_answers(self, messages: list[Message]) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode(messages, reply=False)`, and where in the ids the answers begin and end.

        An answer is all that the model itself writes: what follows the prompt of the server, up to
        the token that ends the turn. A template with {% generation %} says where it begins. The
        ids up to either end must be those that they have alone: so the server feeds them.
        """
        if not self.template:
            problem = self.problem or NO_TEMPLATE
            raise ApiError(400, f"messages: {problem}; pass another template", "messages")
        chat = Chat([m.for_template() for m in messages], reply=False)
        rendered = self.render(chat)
        contents = self.find_contents(chat, rendered.text)
        if GENERATION.search(self.template):
            spans = [self.to_turn_end(rendered, *span) for span in self.fill_spans(chat)]
        else:
            spans = [
                self.to_turn_end(rendered, self.prompt_length(chat, i, rendered.text), end)
                for i, (_, end) in enumerate(contents)
                if chat.messages[i]["role"] == "assistant"
            ]
        ids = self.ids_of(rendered)
        count = self.id_counter(rendered, ids)
        return ids, [(count(begin), count(end)) for begin, end in spans]

    def find_contents(self, chat: Chat, text: str) -> list[tuple[int, int]]:
        """Where in the text each content is; an ApiError if the template changes one.

        The template writes them once more, between two characters that no message has.
        """
        contents = [m["content"] for m in chat.messages]
        used = {*text}.union(*contents)
        free = (c for c in map(chr, range(SIGNS, SIGNS + 0xFFFE)) if c not in used)
        begin, end = itertools.islice(free, 2)
        between = [{**m, "content": begin + m["content"] + end} for m in chat.messages]
        parts = re.split(f"([{begin}{end}])", self.fill(chat._replace(messages=between)))
        whole = "".join(parts[::2]) == text
        places = list(itertools.accumulate(map(len, parts[::2])))  # of the characters between
        spans = list(zip(places[0:-1:2], places[1:-1:2], strict=False))
        found = [text[a:b] for a, b in spans]
        if not whole or found != contents or parts[1::2] != [begin, end] * len(contents):
            same = [a == b for a, b in itertools.zip_longest(contents, found)]
            i = min([*same, False].index(False), len(contents) - 1)
            field = f"messages.{i}.content"
            problem = "the chat template cuts or changes it"
            raise ApiError(400, f"{field}: {problem}; strip it or pass another template", field)
        return spans

    def prompt_length(self, chat: Chat, answer: int, text: str) -> int:
        """The length of the prompt before an answer, with which the text must begin."""
        prompt = self.fill(Chat(chat.messages[:answer]))
        if not text.startswith(prompt):
            problem = f"the chat template writes the prompt of messages.{answer} in another way"
            remedy = "pass a template with {% generation %}"
            raise ApiError(400, f"messages: {problem} than the same turns later; {remedy}")
        return len(prompt)

    def fill_spans(self, chat: Chat) -> list[tuple[int, int]]:
        """What a template puts between {% generation %} and {% endgeneration %}."""
        names: dict[str, Any] = {**self.tokenizer.special_tokens, "chat_template": self.template}
        names |= {"tools": None, "return_assistant_tokens_mask": True}
        return self.library.render_jinja_template([chat.messages], **names)[1][0]

    def to_turn_end(self, rendered: Rendered, begin: int, end: int) -> tuple[int, int]:
        """An answer in the text, from its beginning to the token that ends the turn, if any.

        That is in it, or follows it, perhaps after white space.
        """
        names = [re.escape(name) for name, i in self.special.items() if i == self.turn_end]
        token = "|".join(names) or "(?!)"
        inside = re.compile(token).search(rendered.marked, begin, end)
        found = inside or re.compile(rf"\s*(?:{token})").match(rendered.marked, end)
        return begin, found.end() if found else end

    def id_counter(self, rendered: Rendered, ids: list[int]) -> Callable[[int], int]:
        """What gives the number of ids up to a place in the text.

        It raises an ApiError if the text up to there has other ids alone. That is seen from the
        last special token on: what is before such a token does not change what is behind.
        """
        found = self.tokens.finditer(rendered.marked)
        places = [each.start() for each in found if self.special[each[0]] in self.reserved]
        indices = [i for i, each in enumerate(ids) if each in self.reserved]
        if len(places) != len(indices):  # one that the tokenizer has read as text
            places, indices = [], []

        def count(end: int) -> int:
            nearest = bisect.bisect_left(places, end) - 1
            begin, first = (places[nearest], indices[nearest]) if nearest >= 0 else (0, 0)
            alone = self.ids_of(rendered.between(begin, end))
            if ids[first : first + len(alone)] != alone:
                both = f"{rendered.text[:end][-12:]!r} and {rendered.text[end:][:12]!r}"
                problem = f"the tokenizer joins {both}, where an answer begins or ends"
                remedy = "strip the answer, or pass a template with a special token there"
                raise ApiError(400, f"messages: {problem}; {remedy}", "messages")
            return first + len(alone)

        return count

    # ----------------------------------------------------------------------------- the prompt

    @staticmethod
    def line(message: Message) -> str:
        """A message without a template. An answer may begin with the space after "assistant:"."""
        text = message.text()
        return f"{message.role}:{'' if text[:1] == ' ' else ' '}{text}"

    def with_other_user(
        self, system: Message, tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """The ids of a chat of this system message and some user; none if that is rejected.

        What a prompt has in common with them is the part that system message and tools decide.
        """
        key = json.dumps([system.for_template(), tools])
        if key not in self.systems:
            ids: list[int] = []
            with contextlib.suppress(ApiError):
                ids = self.encode([system, Message(role="user", content="0")], tools=tools)
            self.systems[key] = ids
            if len(self.systems) > self.MAX_SYSTEMS:
                self.systems.popitem(last=False)
        return self.systems[key]

    def require_known(self, tools: list | None) -> None:
        """Reject tools if there is no template."""
        if tools and not self.template:
            raise ApiError(400, f"tools: {NO_TEMPLATE}; leave it out", "tools", UNSUPPORTED)

    def require_plain(self, messages: list[Message]) -> None:
        """Reject what a prompt without a template has no place for."""
        for i, m in enumerate(messages):
            given = {"role": m.role in TOOL_ROLES, "name": m.name, "tool_calls": m.tool_calls}
            for field in (field for field, value in given.items() if value):
                raise not_written(i, field, NO_TEMPLATE)

    def require_written(self, chat: Chat, text: str) -> None:
        """Reject tools, and messages with more than content, that `text` does not have.

        The template writes a field if the text differs without it.
        """
        if chat.tools and self.fill(chat._replace(tools=None)) == text:
            problem = "tools: the chat template leaves them out; use a model that knows tools"
            raise ApiError(400, problem, "tools", UNSUPPORTED)
        messages = chat.messages

        def blank(message: dict) -> dict:
            return {**message, "content": ""} if message["role"] in TOOL_ROLES else message

        def without(name: str) -> list[dict]:
            return [{n: value for n, value in m.items() if n != name} for m in messages]

        others = {"name": without("name"), "tool_calls": without("tool_calls")}
        for field, other in {"role": [blank(m) for m in messages], **others}.items():
            changed = [i for i, m in enumerate(messages) if m != other[i]]
            if changed and self.fill(chat._replace(messages=other)) == text:
                raise not_written(changed[0], field, "the chat template leaves it out")

    def has_more(self, ids: list[int], written: list[str]) -> bool:
        """Whether there are special tokens in `ids` that the template has not written."""
        counts = collections.Counter(i for i in ids if i in self.reserved)
        return not counts <= collections.Counter(self.special[token] for token in written)

    def render(self, chat: Chat) -> Rendered:
        """The prompt, with stand-ins for special tokens of clients.

        A template may join parts to a token, so all characters of tokens have stand-ins. If it
        looks for them and so writes another text, only those like < have, or else whole tokens.
        """
        used = set(map(ord, json.dumps(chat, ensure_ascii=False)))
        free = (i for i in range(STAND_INS, SIGNS) if i not in used)
        stand_ins = dict(zip(map(ord, self.letters), free, strict=False))
        back = {new: old for old, new in stand_ins.items()}
        for pattern in self.patterns:
            replace = functools.partial(pattern.sub, lambda m: m[0].translate(stand_ins))
            changed = map_chat(chat, replace)
            text = self.fill(chat)  # anew: it may have the time
            with contextlib.suppress(ApiError):  # the template may reject what stands in
                marked = text if changed == chat else self.fill(changed)
                if marked.translate(back) == text:
                    return Rendered(text, marked, back)
        problem = "messages: the chat template looks for a special token in them; leave it out"
        raise ApiError(400, problem, "messages")

    def fill(self, chat: Chat) -> str:
        """The text that the template makes of a chat."""
        names: dict[str, Any] = {"tools": chat.tools, "add_generation_prompt": chat.reply}
        try:
            names = {**self.tokenizer.special_tokens, "chat_template": self.template, **names}
            return self.library.render_jinja_template([chat.messages], **names)[0][0]
        except Exception as e:  # a template may raise anything, for example on roles it rejects
            them = "them or the tools" if chat.tools else "them"
            problem = f"messages: the chat template rejects {them} ({one_line(e)})"
            raise ApiError(400, problem, "messages") from None
