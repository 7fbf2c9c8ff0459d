"""Structured output: answers that follow a JSON schema, a regex, a grammar or a list of choices.

compiler = GrammarCompiler(tokenizer, vocab_size)
grammar = compiler.compile({"regex": "[0-9]{4}"})  # any number of answers may share it
matcher = grammar.start(end_ids)  # of one answer
logits = matcher.mask(logits)  # then sample a token
matcher.accept(token)

The library `llguidance` reads grammars and tells which tokens can be next. It is only needed here:
pip install llguidance
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
import threading
import time
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import numpy as np

from tinymamba.cli import UserError, require
from tinymamba.tokenizer import SimpleTokenizer, byte_alphabet

FIELD = "structured_outputs"
KINDS = ("json", "json_object", "regex", "choice", "grammar")
MAX_LENGTH = 2**16  # characters of a schema, regex, grammar or list of choices
LONGEST_TOKEN = 1000  # bytes; llguidance panics above about 1,024
MAX_MULTIPLE = 50_000  # llguidance has no limit: a million takes 8 s and 400 MB, more takes more
# Without a limit, a model may write white space until the answer is full.
WHITE_SPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,32}"
LIMITS = {
    "initial_lexer_fuel": 100_000,
    "max_grammar_size": 100_000,
    "max_items_in_row": 10_000,
    "max_lexer_states": 50_000,
}
SECONDS, SECONDS_PER_TOKEN = 1.0, 0.005  # of CPU time that an answer may take of its batch
NO_TOKEN = "no token can be next", "allow other text"
NO_FORCING = '%llguidance {"no_forcing": true}\n'  # else it must encode text itself

# ---------------------------------------------------------------------------------- requests


def read_form(form: Any, field: str = FIELD) -> tuple[str, Any]:
    """The one kind that a form such as {"regex": "[0-9]+"} asks for, and its value.

    Null and a `json_object` of false count as left out. `field` names the form in errors.
    """
    remedy = f"pass one of {', '.join(KINDS)}"
    require(isinstance(form, dict), field, "is not an object", remedy)
    unknown = next((name for name in form if name not in KINDS), None)
    require(unknown is None, f"{field}.{unknown}", "is not supported", remedy)
    left_out = (("json_object", False), *((name, None) for name in KINDS))
    given = {name: value for name, value in form.items() if (name, value) not in left_out}
    problem = f"has {' and '.join(given)}" if given else "is empty"
    require(len(given) == 1, field, problem, remedy)
    (kind, value), = given.items()  # fmt: skip
    types = {"json": dict | str, "json_object": bool, "choice": list}
    name = f"{field}.{kind}"
    valid = isinstance(value, types.get(kind, str))
    problem = f"cannot be of type {type(value).__name__}"
    require(valid, name, problem, "docs/serving.md has examples")
    if kind == "choice":
        texts = value and all(isinstance(text, str) for text in value)
        require(texts, name, "is not a list of texts", "pass at least one text")
    return kind, value


def reason(error: object) -> str:
    """The line of an error that says what is wrong; a parser quotes its source around it."""
    text = str(error)
    found = re.search(r"^error: (.+)", text, re.M)
    line = found[1] if found else text.partition("\n")[0]
    return line if len(line) <= 200 else line[:200] + "..."


# --------------------------------------------------------------------------------- vocabulary


def token_bytes(tokenizer: Any, size: int) -> list[bytes]:
    """The bytes that each of `size` ids adds to a text; b"" for none, and if they are unknown."""
    known = range(min(size, len(tokenizer)) if hasattr(tokenizer, "__len__") else size)
    if not isinstance(tokenizer, SimpleTokenizer):
        found = [added_text(tokenizer, i) for i in known]
    elif tokenizer.library is None:
        hidden = {*tokenizer.special.values()}
        found = [b"" if i in hidden else tokenizer.pieces[i] for i in known]
    else:
        decoder = decoder_of(tokenizer)
        found = [library_bytes(tokenizer, i, decoder) for i in known]
    found = [data if len(data) <= LONGEST_TOKEN else b"" for data in found]
    return found + [b""] * (size - len(found))


def decoder_of(tokenizer: Any) -> str:
    """The decoder of a tokenizer.json, as JSON; of other tokenizers, null."""
    library = getattr(tokenizer, "library", None)
    return json.dumps(json.loads(library.to_str())["decoder"] if library else None)


def library_bytes(tokenizer: Any, token: int, decoder: str) -> bytes:
    """The bytes that a token of a tokenizer.json adds to a text; b"" for none. See decoder_of."""
    raw = tokenizer.library.id_to_token(token) or ""
    if "ByteFallback" in decoder and (escaped := re.fullmatch(r"<0x([0-9A-F]{2})>", raw)):
        return bytes([int(escaped[1], 16)])
    if "ByteLevel" not in decoder:
        return added_text(tokenizer, token)
    byte_of = byte_values()
    data = bytes(byte_of[c] for c in raw) if set(raw) <= set(byte_of) else raw.encode()
    return data if data.decode(errors="replace") == tokenizer.decode([token]) else b""


@functools.cache
def byte_values() -> dict[str, int]:
    """The byte of each character of GPT-2's notation."""
    return {c: b for b, c in enumerate(byte_alphabet())}


def added_text(tokenizer: Any, token: int) -> bytes:
    """What a token adds to the text of another; b"" for a part of a character."""
    before, after = tokenizer.decode([token]), tokenizer.decode([token, token])
    added = after[len(before) :] if after.startswith(before) else ""
    return b"" if "\ufffd" in added else added.encode()


class Words:
    """A vocabulary as llguidance asks for it; one more id than the model has ends an answer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]):
        self.tokens, self.eos_token_id = [*tokens, b"<end>"], len(tokens)
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        """Encode a text: never called, as all grammars have `no_forcing`."""
        raise NotImplementedError


# ----------------------------------------------------------------------------------- grammars


class GrammarCompiler:
    """Compiles forms for one tokenizer; for any number of threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, no_tokenizer: str = "none was found"):
        """`no_tokenizer`: the problem to report if `tokenizer` is None."""
        self.tokenizer, self.vocab_size, self.no_tokenizer = tokenizer, vocab_size, no_tokenizer
        self.lock = threading.Lock()
        self.cached = functools.lru_cache(maxsize=16)(self.compile_text)

    @functools.cached_property
    def words(self) -> Any:
        """The vocabulary of llguidance: a moment's work, for the first form only."""
        words = Words(token_bytes(self.tokenizer, self.vocab_size))
        library = importlib.import_module("llguidance")
        return library.LLTokenizer(library.TokenizerWrapper(words), len(words.tokens))

    def compile(self, form: dict[str, Any], field: str = FIELD) -> Grammar:
        """The grammar of a form, which `field` names in errors: a UserError if it is invalid."""
        kind, value = read_form(form, field)
        return self.build(kind, value, f"{field}.{kind}" if field == FIELD else field)

    def compile_lark(self, rules: str, schemas: dict[str, Any], field: str) -> Grammar:
        """The grammar of rules in Lark's notation, in which @name stands for a schema."""
        return self.build("lark", {"rules": rules, "schemas": schemas}, field)

    def build(self, kind: str, value: Any, name: str) -> Grammar:
        """The grammar of a kind and its value, which `name` names in errors."""
        require(self.tokenizer is not None, "tokenizer", self.no_tokenizer, "pass one")
        try:
            text = value if isinstance(value, str) else json.dumps(value)
            problem, remedy = f"has {len(text)} characters", f"use up to {MAX_LENGTH}"
            require(len(text) <= MAX_LENGTH, name, problem, remedy)
            grammar = Grammar(self.cached(kind, text), self.vocab_size, name, kind == "lark")
        except ImportError:
            problem = "needs a package that is not installed here"
            raise UserError(name, problem, "pip install llguidance") from None
        except RecursionError:
            raise UserError(name, "is nested too deeply", "use fewer levels") from None
        except ValueError as e:
            raise UserError(name, reason(e), "docs/serving.md says what is supported") from None
        grammar.start([])  # the first step may be too complex, or impossible
        return grammar

    def compile_text(self, kind: str, text: str) -> Any:
        """The matcher of llguidance for a kind and its value as text; a ValueError if invalid."""
        with self.lock:  # a client that sends many large ones takes one core
            library = importlib.import_module("llguidance")
            rules = make_rules(library, kind, text)
            limits = library.LLParserLimits(verbose_errors=False, **LIMITS)
            source = json.dumps({"grammars": rules})
            state = library.LLMatcher(self.words, source, limits=limits, log_level=0)
            if state.is_error():
                raise ValueError(state.get_error())
            return state


def make_rules(library: Any, kind: str, text: str) -> list[dict[str, Any]]:
    """The grammars of llguidance for a kind and its value as text, the first one to start with."""
    if kind == "lark":
        value = json.loads(text)
        rules, parts = value["rules"], value["schemas"].items()
        named = {name: make_rule(library, "json", json.dumps(part)) for name, part in parts}
    else:
        rules, named = "start: @rule", {"rule": make_rule(library, kind, text)}
    others = [{**rule, "name": name} for name, rule in named.items()]
    return [{"lark_grammar": NO_FORCING + rules}, *others]


def make_rule(library: Any, kind: str, text: str) -> dict[str, Any]:
    """A grammar as a rule of llguidance."""
    if kind == "choice":
        texts = " | ".join(map(json.dumps, json.loads(text)))
        return {"lark_grammar": f"start: TEXT\nTEXT: {texts}"}
    if kind == "grammar":
        if "%json" in text:
            raise ValueError("has a schema (%json), which only `json` can have")
        return {"lark_grammar": library.grammar_from(kind, text)}
    if kind == "regex":
        made = library.LLMatcher.grammar_from_regex(text)
    else:
        schema = {"type": "object"} if kind == "json_object" else read_schema(text)
        spacing = {"whitespace_pattern": WHITE_SPACE}
        made = library.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=spacing)
    return json.loads(made)["grammars"][0]


def read_schema(text: str) -> Any:
    """A schema as JSON -> the schema as make_rule passes it on."""
    multiples: list[Any] = []

    def note(fields: dict) -> dict:
        multiples.append(fields.get("multipleOf"))
        return fields

    schema = narrow_schema(json.loads(text, object_hook=note))
    if least_common_multiple(multiples) > MAX_MULTIPLE:
        raise ValueError(f"multipleOf: the least common multiple of all is over {MAX_MULTIPLE:,}")
    return schema


def least_common_multiple(values: list[Any]) -> int:
    """The least common multiple of decimal numbers, in units of their last decimal place."""
    numbers = [v for v in values if type(v) in (int, float) and 0 < abs(v) < math.inf]
    decimals = [Decimal(str(v)).normalize() for v in numbers]
    places = max((-int(d.as_tuple().exponent) for d in decimals), default=0)
    return math.lcm(*(int(d.scaleb(max(places, 0))) for d in decimals))


DATA = ("const", "enum", "default", "examples")  # keywords whose values are no schemas
NAMED = ("properties", "patternProperties", "$defs", "definitions")  # those with schemas by name


def narrow_schema(schema: Any) -> Any:
    """A schema whose patterns never match U+0000 by a negated class.

    For a class with all control characters, llguidance (1.9.1) allows the escapes of quotation mark
    and backslash, whether the class has these or not.
    """
    if isinstance(schema, list):
        return [narrow_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for word, value in schema.items():
        if word in NAMED and isinstance(value, dict):
            change = narrow_pattern if word == "patternProperties" else str
            made[word] = {change(name): narrow_schema(each) for name, each in value.items()}
        elif word == "pattern" and isinstance(value, str):
            made[word] = narrow_pattern(value)
        else:
            made[word] = value if word in DATA else narrow_schema(value)
    return made


def narrow_pattern(pattern: str) -> str:
    """A regex whose negated classes also exclude U+0000."""

    def narrow(found: re.Match) -> str:
        if found[0][0] == "\\":
            return found[0]
        first = f"\\{found[1]}" if found[1] else ""  # at the head of a class it is itself
        return rf"[^\x00{first}"

    return re.sub(r"\\.|\[\^([\]-])?", narrow, pattern, flags=re.S)


class Grammar:
    """A compiled grammar; it never changes."""

    def __init__(self, state: Any, vocab_size: int, field: str, shows_special: bool = False):
        """`state`: a matcher of llguidance. `field` asked for the grammar.

        `shows_special`: the text of an answer has its special tokens, too.
        """
        self.state, self.vocab_size, self.field = state, vocab_size, field
        self.shows_special = shows_special

    def start(self, end_ids: Iterable[int]) -> Matcher:
        """The matcher of a new answer, which any of `end_ids` may end; negative ones are none."""
        return Matcher(self, [i for i in end_ids if i >= 0])


class Matcher:
    """How far one answer is in its grammar.

    finished   the answer is complete, and nothing can follow
    """

    def __init__(self, grammar: Grammar, end_ids: list[int]):
        self.state, self.end_ids = grammar.state.deep_copy(), end_ids
        self.vocab_size, self.field = grammar.vocab_size, grammar.field
        self.shows_special = grammar.shows_special
        self.seconds_left = SECONDS
        self.look_ahead()

    def look_ahead(self) -> None:
        """Find out which ids can be next, and whether the answer may end here."""
        bits = np.frombuffer(self.state.compute_bitmask(), np.uint8)
        if self.state.is_error():
            problem = reason(self.state.get_error())
            if "NoExtension" not in problem:
                raise UserError(self.field, f"cannot go on ({problem})", "use a simpler one")
            raise UserError(self.field, *NO_TOKEN)
        flags = np.unpackbits(bits, count=self.vocab_size + 1, bitorder="little").view(bool)
        self.next, may_end = flags[:-1], flags[-1]  # next: (v,)
        self.finished = bool(may_end and not self.next.any())
        self.next[self.end_ids] = may_end

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """Logits (v,) -> the same, and -inf for ids that cannot be next.

        The `end_ids` can be next where the answer may end, and only there.
        """
        require(self.next.any(), self.field, *NO_TOKEN)
        return np.where(self.next, logits, -np.inf)

    def accept(self, token: int) -> None:
        """Go on after a token that can be next, and is not one of `end_ids`."""
        begin = time.thread_time()
        self.state.consume_token(token)
        self.look_ahead()
        self.seconds_left += SECONDS_PER_TOKEN - (time.thread_time() - begin)
        problem, remedy = "takes too long for each token", "use one that is less ambiguous"
        require(self.seconds_left > 0, self.field, problem, remedy)
