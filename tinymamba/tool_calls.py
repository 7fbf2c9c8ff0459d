"""Tool calls in chats: how a model's template writes them, their grammar, and their parser.

form = find_form(template)  # None if its calls are not JSON of a name and arguments
request = read_tools(body.tools, body.tool_choice, several=True)
grammar = compile_calls(compiler, template, form, request)
parser = CallParser(form, request.free)  # of one answer
content, calls = parser.feed(text)  # for each piece of its text

A form is found by what the template makes of a call whose parts are known, not by the model's name.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any, NamedTuple

from tinymamba.chat_template import Chat, ChatTemplate
from tinymamba.cli import UserError, require
from tinymamba.openai_api import ApiError
from tinymamba.structured import Grammar, GrammarCompiler
from tinymamba.tokenizer import begun_length

TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # OpenAI's rule, and dots, which MCP's tools have
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}

# ---------------------------------------------------------------------------------- requests


class ToolRequest(NamedTuple):
    """What a request says of tools."""

    schemas: dict[str, dict[str, Any]]  # of the arguments, by the names that may be called
    fields: dict[str, str]  # where the request has these schemas
    mode: str  # none: only text; auto: text or calls; required: calls
    several: bool  # an answer may have more than one call

    @property
    def free(self) -> bool:
        """Whether an answer may be text."""
        return self.mode != "required"


def read_tools(tools: list[dict[str, Any]], choice: Any, several: bool) -> ToolRequest:
    """The checked tools of a request; `choice` is its tool_choice."""
    schemas: dict[str, dict[str, Any]] = {}
    fields: dict[str, str] = {}
    for i, tool in enumerate(tools):
        path = f"tools.{i}"
        known = tool.get("type") == "function"
        require(known, f"{path}.type", "is not supported", 'send "function"')
        function: Any = tool.get("function")
        require(isinstance(function, dict), f"{path}.function", "is not an object", "send one")
        name = function.get("name")
        valid = isinstance(name, str) and TOOL_NAME.fullmatch(name) is not None
        remedy = "use 1 to 128 letters, digits, _, - or ."
        require(valid, f"{path}.function.name", "is not a name", remedy)
        problem = f"{name} is the name of two tools"
        require(name not in schemas, f"{path}.function.name", problem, "rename one")
        fields[name] = f"{path}.function.parameters"
        schemas[name] = read_parameters(function, f"{path}.function")
    if not isinstance(choice, dict):
        return ToolRequest(schemas, fields, choice or "auto", several)
    named: Any = choice.get("function") if choice.get("type") == "function" else None
    remedy = 'send none, auto, required or {"type": "function", "function": {"name": ...}}'
    require(isinstance(named, dict), "tool_choice", "is not supported", remedy)
    name = named.get("name")
    known = isinstance(name, str) and name in schemas
    remedy = f"use one of {', '.join(schemas)}"
    require(known, "tool_choice.function.name", "is the name of no tool", remedy)
    return ToolRequest({name: schemas[name]}, fields, "required", False)


def read_parameters(function: dict[str, Any], path: str) -> dict[str, Any]:
    """The schema of a function's arguments, which are always an object."""
    for field, kind in (("description", str), ("strict", bool), ("parameters", dict)):
        value = function.get(field)
        problem = f"cannot be of type {type(value).__name__}"
        valid = value is None or isinstance(value, kind)
        require(valid, f"{path}.{field}", problem, "leave it out")
    parameters = function.get("parameters") or NO_PARAMETERS
    is_object = parameters.get("type", "object") == "object"
    require(is_object, f"{path}.parameters.type", "is not object", 'send "object"')
    return {"type": "object", **parameters}


# -------------------------------------------------------------------------------------- forms


class CallForm(NamedTuple):
    """How calls are written: prefix, call, and for each further one separator, call; suffix.

    A call is a JSON object: opening, name, middle, arguments, closing.
    """

    prefix: str
    opening: str
    middle: str
    closing: str
    separator: str | None  # None: only one call can be written
    suffix: str
    short_ids: bool  # ids of calls have 9 letters and digits, as Mistral's templates want them

    @property
    def tag(self) -> str:
        """What begins calls anywhere in a text, such as <tool_call>; empty if there is none."""
        found = re.search(r"[<\[][^\s<>\[\]]*\w[^\s<>\[\]]*[>\]]", self.prefix)
        return found[0] if found else ""

    @property
    def trigger(self) -> str:
        """What makes a text a call: the tag, or at its very beginning all before the name."""
        return self.tag or self.prefix + self.opening

    def new_id(self) -> str:
        """A random id of a call."""
        digits = uuid.uuid4().hex
        return digits[:9] if self.short_ids else f"call_{digits[:24]}"


NAME, ARGUMENTS, WORDS = "stand_in_name", {"stand_in_key": "stand_in_value"}, "stand-in words"
IDS = (
    ("call_0123456789abcdef01234567", "call_0123456789abcdef01234568"),
    ("a1b2c3d4e", "a1b2c3d4f"),
)
SCHEMA = {"type": "object", "properties": {"stand_in_key": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": NAME, "description": WORDS, "parameters": SCHEMA}}


class Parts(NamedTuple):
    """A text around its first call, and the call's own parts."""

    before: str
    opening: str
    middle: str
    closing: str
    after: str


def find_form(template: ChatTemplate) -> CallForm | None:
    """How the template writes calls; None if not as JSON objects of a name and arguments."""
    for short, ids in enumerate(IDS):  # a template may reject ids that are too long
        text = write_answer(template, ids[:1])
        if not (parts := split_call(text, ids) if text else None):
            continue
        plain = write_answer(template, ()) or ""
        lead, _, end = plain.partition(WORDS)  # what text has around it, too
        suffix = parts.after.removesuffix(end)
        if (found := template.tokens.search(suffix)) and suffix == parts.after:
            suffix = suffix[: found.start()]  # calls end in another way
        separator = find_separator(write_answer(template, ids), parts, ids)
        prefix = parts.before.removeprefix(lead)
        return CallForm(prefix, *parts[1:4], separator, suffix, bool(short))
    return None


def write_answer(template: ChatTemplate, ids: tuple[str, ...]) -> str | None:
    """What a model would write to make calls of these ids, or to say words; None if rejected."""
    call = {"type": "function", "function": {"name": NAME, "arguments": ARGUMENTS}}
    answer: dict[str, Any] = {"role": "assistant", "content": "" if ids else WORDS}
    if ids:
        answer["tool_calls"] = [{"id": each, **call} for each in ids]
    chat = Chat([{"role": "user", "content": WORDS}], [TOOL])
    try:
        begin = template.fill(chat)
        text = template.fill(Chat([*chat.messages, answer], [TOOL], reply=False))
    except ApiError:
        return None
    return text[len(begin) :] if text.startswith(begin) else None


def split_call(text: str, ids: tuple[str, ...]) -> Parts | None:
    """The parts of the first call in a text, if it is a JSON object; its id is left out."""
    name = text.find(NAME)
    begin, arguments = text.rfind("{", 0, name), text.find("{", name)
    if min(name, begin, arguments) < 0:
        return None
    decoder = json.JSONDecoder()
    try:
        _, end = decoder.raw_decode(text, begin)
        value, arguments_end = decoder.raw_decode(text, arguments)
    except ValueError:
        return None
    opening, middle, closing = (
        re.sub(rf',\s*"\w+":\s*"{ids[0]}"|"\w+":\s*"{ids[0]}",\s*', "", part)
        for part in (text[begin:name], text[name + len(NAME) : arguments], text[arguments_end:end])
    )
    try:
        made = json.loads(opening + NAME + middle + json.dumps(ARGUMENTS) + closing)
    except ValueError:
        return None
    values = [*made.values()]
    complete = value == ARGUMENTS and values.count(NAME) == 1 and values.count(ARGUMENTS) == 1
    if not complete or ids[0] in values:
        return None
    return Parts(text[:begin], opening, middle, closing, text[end:])


def find_separator(text: str | None, one: Parts, ids: tuple[str, ...]) -> str | None:
    """What stands between the two calls of a text, of which `one` has the first only."""
    first = text and split_call(text, ids)
    if not first or first[:4] != one[:4]:
        return None
    second = split_call(first.after, ids[1:])
    same = second and second[1:] == one[1:]
    return second.before if second and same else None


# ------------------------------------------------------------------------------------ grammar


def compile_calls(
    compiler: GrammarCompiler, template: ChatTemplate, form: CallForm, request: ToolRequest
) -> Grammar:
    """The grammar of an answer to a request: a UserError names the schema that is invalid."""
    schemas = {f"tool_{i}": schema for i, schema in enumerate(request.schemas.values())}
    rules = write_rules(template, form, request)
    try:
        return compiler.compile_lark(rules, schemas, "tools")
    except UserError as error:
        if not isinstance(error.__context__, ImportError):
            for name, schema in request.schemas.items():
                compiler.compile({"json": schema}, request.fields[name])
        raise


def write_rules(template: ChatTemplate, form: CallForm, request: ToolRequest) -> str:
    """The rules of an answer in llguidance's Lark; the schema of the i-th tool is @tool_i."""

    def write(text: str) -> str:
        """A text, in which special tokens are single ids."""
        parts = re.split(f"({template.tokens.pattern})", text)
        ids = template.special
        return " ".join(f"<[{ids[p]}]>" if p in ids else json.dumps(p) for p in parts if p)

    names = enumerate(request.schemas)
    chosen = " | ".join(f"{json.dumps(name)} {write(form.middle)} @tool_{i}" for i, name in names)
    rules = [f"rest: ({chosen}) {write(form.closing)}"]  # of a call, from the name on
    more = ""
    if request.several and form.separator is not None:
        more = f"({write(form.separator + form.opening)} rest)*"
    rules += [f"calls: rest {more} {write(form.suffix)}"]
    begin = write(form.prefix + form.opening)
    if not request.free:
        return "\n".join([f"start: {begin} calls", *rules])
    # Text may be of any length, so what begins a call has to be a terminal that ends it.
    trigger = match_exactly(form.trigger)
    before = "(?s:.*)" if form.tag else ""
    rules += [f"TEXT: /(?s:.*)/ & ~/{before}{trigger}(?s:.*)/"]
    if form.tag:
        rest = write((form.prefix + form.opening).partition(form.tag)[2])
        if form.tag in template.special:
            begin = f"TEXT? {write(form.tag)} {rest}"
        else:
            begin, rules = f"begin {rest}", [*rules, f"begin[lazy]: /(?s:.*){trigger}/"]
    return "\n".join([f"start: TEXT? | {begin} calls", *rules])


def match_exactly(text: str) -> str:
    """A regex of this text, in which only letters and digits stand for themselves."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


# ------------------------------------------------------------------------------------- parser


class ToolCall(NamedTuple):
    """A complete call; the arguments are JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str

    def out(self) -> dict[str, Any]:
        """The call in OpenAI's form."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    def deltas(self, index: int) -> list[dict[str, Any]]:
        """The call as OpenAI streams it: first its name, then its arguments."""
        first = self._replace(arguments="").out()
        rest = {"function": {"arguments": self.arguments}}
        return [{"tool_calls": [{"index": index, **part}]} for part in (first, rest)]


BRACES = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}]', re.S)  # of JSON: strings hide theirs


def object_end(text: str) -> int | None:
    """Where the JSON object ends that a text begins with; None if it does not yet."""
    depth = 0
    for found in BRACES.finditer(text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    return None


class CallParser:
    """Separates the text of an answer from its calls, as the pieces come.

    A call is given out once it is complete; one that is cut is left out.

    state   begin: nothing is given out; text: so far there is no call; calls: no more text follows
    count   calls so far
    """

    def __init__(self, form: CallForm, free: bool):
        """`free`: the answer may be text."""
        self.form, self.free, self.count = form, free, 0
        self.state = "begin" if free else "calls"
        self.held = ""  # text that may be the beginning of a call, or is one
        self.expected = form.prefix + form.opening

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text and the calls that are certain after one more piece."""
        self.held += text
        content = "" if self.state == "calls" else self.release()
        calls: list[ToolCall] = []
        while self.state == "calls" and "}" in text and (call := self.take_call()):
            calls.append(call)
        self.count += len(calls)
        return content, calls

    def finish(self) -> str:
        """The text that is left at the end of the answer."""
        text = "" if self.state == "calls" else self.held
        self.held = ""
        return text

    def release(self) -> str:
        """The held text that cannot be the beginning of a call any more."""
        trigger, held = self.form.trigger, self.held
        if self.form.tag:
            at = held.find(trigger)
            certain = len(held) - begun_length(held, [trigger])
            text = held[: at if at >= 0 else certain].rstrip()
        elif self.state == "begin" and trigger.startswith(held[: len(trigger)]):
            at, text = (0 if len(held) >= len(trigger) else -1), ""
        else:
            at, text = -1, held
        self.held = held[at if at >= 0 else len(text) :]
        if at >= 0:
            self.state = "calls"
            self.expected = self.expected[self.expected.index(trigger) :]
        elif text:
            self.state = "text"
        return text

    def take_call(self) -> ToolCall | None:
        """The call that the held text begins with, if it is complete."""
        form = self.form
        if not self.held.startswith(self.expected):
            return None
        name, found, rest = self.held[len(self.expected) :].partition(form.middle)
        end = object_end(rest) if found else None
        if end is None or not rest.startswith(form.closing, end):
            return None
        self.held = rest[end + len(form.closing) :]
        self.expected = (form.separator or "") + form.opening
        return ToolCall(form.new_id(), name, rest[:end])
