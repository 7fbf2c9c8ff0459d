"""tinymamba/structured.py: answers that follow a schema, a regex, a grammar or a choice."""

import functools
import itertools
import json
import random
import re
import sys

import jsonschema_rs
import numpy as np
import pytest
from helpers import free_copy, wide

from streaming import StreamingConfig, StreamingServer
from tinymamba import structured
from tinymamba.cli import UserError
from tinymamba.structured import GrammarCompiler, token_bytes
from tinymamba.tokenizer import SimpleTokenizer

VOCAB = 320
KINDS = ["bytes", "gpt2", "words", "byte tokens", "json"]
BYTES = SimpleTokenizer()


@pytest.fixture(scope="module")
def server_of(tokenizers):
    """The server of an untrained model, by the kind of its tokenizer."""
    model = free_copy(wide(vocab_size=VOCAB))
    return functools.cache(lambda kind: StreamingServer(model, tokenizer=tokenizers[kind]))


@pytest.fixture
def server(server_of):
    return server_of("bytes")


def fixed(*properties: str, **fields) -> dict:
    """The schema of an object with these fields only, of which `properties` are required."""
    names = {"properties": fields, "required": list(properties)}
    return {"type": "object", **names, "additionalProperties": False}


SCHEMAS = [
    fixed(
        "where",
        where=fixed("x", x={"type": "integer", "minimum": -5, "maximum": 40}, y={"type": "null"}),
        kind={"enum": ["small", "größer", 3, None]},
    ),
    {"type": "string", "minLength": 3, "maxLength": 12},
    {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 2, "maxItems": 3},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.05},
    {"anyOf": [{"const": "日本 🍣"}, {"type": "boolean"}]},
    fixed("d", d={"type": "string", "format": "date"}, p={"type": "string", "pattern": "^[a-f]+$"}),
    {"$ref": "#/$defs/tree", "$defs": {"tree": fixed(left={"$ref": "#/$defs/tree"})}},
]
REGEXES = [
    r"(the|é|日本)+x?[0-9]{2}",
    r"[a-c]+@[0-9A-Z]{2,3}",
    r"(?i)yes|no",
    r"[^\x00-\x7f]{3}",
    r"([a-z]{0,3} ?){9}",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_has_the_form(server_of, kind):
    """Of an untrained model, at temperature 0 or above, all in one batch."""
    server = server_of(kind)
    forms = [{"json": schema} for schema in SCHEMAS] + [{"regex": regex} for regex in REGEXES]
    settings = {"top_k": 0, "max_new_tokens": 120, "seed": 5}
    answers = [
        (form, server.answer("Say: ", structured_outputs=form, temperature=t, **settings))
        for form, t in zip(forms, itertools.cycle((0.0, 1.0, 1.0)))
    ]
    complete = 0
    for form, answer in answers:
        text = "".join(chunk.text for chunk in answer)
        if answer.finish_reason == "length":
            continue
        complete += 1
        if "json" in form:
            assert jsonschema_rs.is_valid(form["json"], json.loads(text)), (form, text)
        else:
            assert re.fullmatch(form["regex"], text), (form, text)
    assert complete > 0.8 * len(answers)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_equal_those_of_brute_force(tokenizers, kind):
    """A token can be next if the text with it begins a text of the regex."""
    tokenizer = tokenizers[kind]
    language = ["".join(t) for t in itertools.product(("the", "é", "日本"), ("", "m", "mé"), "12")]
    assert all(re.fullmatch("(the|é|日本)(mé?)?[12]", text) for text in language)
    whole = {text.encode() for text in language}
    prefixes = {text[:n] for text in whole for n in range(len(text) + 1)}
    words, end = token_bytes(tokenizer, VOCAB), 300
    compiled = GrammarCompiler(tokenizer, VOCAB).compile({"regex": "(the|é|日本)(mé?)?[12]"})
    chance, ends = random.Random(0), set()
    for _ in range(12):
        matcher, text = compiled.start([end, -1]), b""
        while not matcher.finished:
            want = [i for i, word in enumerate(words) if word and text + word in prefixes]
            assert np.flatnonzero(matcher.next).tolist() == sorted(want + [end] * (text in whole))
            token = chance.choice(want)
            text += words[token]
            matcher.accept(token)
        ends.add(text)
        assert text in whole
    assert len(ends) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_are_those_of_their_text(tokenizers, kind):
    tokenizer, text = tokenizers[kind], "the theme, für Köln 日本🍣\n\0"
    words = token_bytes(tokenizer, VOCAB)
    assert b"".join(words[i] for i in tokenizer.encode(text)) == text.encode()
    assert words[tokenizer.eos_token_id] == b"" and not any(words[len(tokenizer) :])
    # Bytes that are not a character can only be shown by the tokenizer's decode after others.
    assert sum(map(bool, words)) >= 256


def test_tokens_with_spaces_and_bytes_of_other_libraries(tmp_path):
    """Llama's notation: the first space of a text is not shown, <0xC3> is a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁a": 3, "b": 4, "▁": 5}
    library = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = SimpleTokenizer(tmp_path / "tokenizer.json")
    assert token_bytes(tokenizer, 7)[1:] == [b"\xc3", b"\xa9", b" a", b"b", b" ", b""]


def test_white_space_has_an_end(server):
    """A model that likes white space would never end its answer."""
    grammar = server.grammars.compile({"json_object": True})
    matcher, count = grammar.start([]), 0
    for b in b'{"a":\n':
        matcher.accept(b)
    while matcher.next[ord(" ")] and count < 99:
        matcher.accept(ord(" "))
        count += 1
    assert count == 32 and matcher.next[ord("1")] and not matcher.next[ord("\n")]


def run(server, form, **settings) -> tuple[str, str]:
    """The finish reason and the text of an answer."""
    answer = server.answer("x", structured_outputs=form, **{"temperature": 0.0, **settings})
    text = "".join(chunk.text for chunk in answer)
    return answer.finish_reason, text


def test_an_answer_ends_where_its_form_does(server):
    def ends(regex: str, **settings) -> tuple[str, int]:
        reason, text = run(server, {"regex": regex}, **settings)
        return reason, len(text)

    assert ends("[ab]{8}", max_new_tokens=5) == ("length", 5)
    assert ends("[ab]{8}", max_new_tokens=8) == ends("[ab]{8}") == ("stop", 8)
    assert ends("[ab]{8}", eos_token_id=-1) == ("stop", 8)  # no token need end it
    assert ends("a*", eos_token_id=-1, max_new_tokens=9) == ("length", 9)
    assert ends("a*", logit_bias={256: 99.0}) == ends("", eos_token_id=-1) == ("stop", 0)
    assert ends("[ab]{8}", stop=["aab", "b"])[1] < 8


def test_what_ends_an_answer_cannot_come_too_early(server):
    """Not eos, nor any of stop_ids, however likely: else the text would not be complete."""
    ids = {256: 99.0, ord("a"): 99.0}
    for settings in ({}, {"temperature": 1.0}, {"stop_ids": [ord("a"), ord("z")]}):
        _, text = run(server, {"regex": "[ab]{8}"}, logit_bias=ids, **settings)
        assert len(text) == 8 and ("a" in text) == ("stop_ids" not in settings)
    assert run(server, {"regex": "b[ab]*"}, logit_bias=ids, stop_ids=[ord("a")]) == ("stop", "b")


def test_a_character_cut_by_the_limit_is_left_out(server):
    for count in range(1, 7):
        reason, text = run(server, {"choice": ["日本"]}, max_new_tokens=count)
        assert (reason, text) == ("stop" if count == 6 else "length", "日本"[: count // 3])


def test_answers_of_one_batch_do_not_touch_each_other(server):
    """Of one grammar, of others and of none: each has the text that it has alone."""
    forms = [{"regex": "[a-z]{3,30}"}] * 3 + [{"json": SCHEMAS[0]}, {"choice": ["x", "yz"]}, None]
    asked = [{"seed": i, "structured_outputs": form} for i, form in enumerate(forms)]
    plain = {"top_k": 0, "max_new_tokens": 60}
    alone = [server.generate_text("One", **plain, **settings) for settings in asked]
    answers = [server.answer("One", **plain, **settings) for settings in asked]
    server.decoder.step()
    server.decoder.step()
    assert len(server.decoder.batch) > 3
    assert ["".join(chunk.text for chunk in answer) for answer in answers] == alone
    assert len({*alone[:3]}) == 3


def test_the_form_of_a_session_is_that_of_each_answer(server, tmp_path):
    form = {"regex": "[0-9]{4}"}
    session = server.create_session(config=StreamingConfig(structured_outputs=form), seed=1)
    first = server.generate_text("In ", session)
    assert re.fullmatch(form["regex"], first)
    fork = server.fork_session(session)
    stream = server.generate_stream(" and ", session)
    assert len(next(stream)) == 1
    stream.close()
    assert server.get_session_info(session)["position"] == len(f"In {first} and ") + 1
    server.rollback(session)
    server.save_session(session, tmp_path / "talk.safetensors")
    loaded = server.load_session(tmp_path / "talk.safetensors")
    texts = {server.generate_text(" and ", each) for each in (session, fork, loaded)}
    assert len(texts) == 1 and re.fullmatch(form["regex"], texts.pop())
    other = server.generate_text(" or ", session, structured_outputs={"choice": ["A", "B"]})
    assert other in ("A", "B")
    free = server.generate_text("!", session, structured_outputs=None, max_new_tokens=9)
    assert not re.fullmatch(form["regex"], free)


def test_logprobs_are_the_models_own(server):
    """As without a form: the likelihood of a text does not depend on what was allowed."""
    (free,) = server.answer([65], as_ids=True, max_new_tokens=1, logprobs=3)
    asked = {"structured_outputs": {"choice": ["q"]}, "max_new_tokens": 1, "logprobs": VOCAB}
    (forced,) = server.answer([65], as_ids=True, **asked)
    assert forced.tokens[0].id == ord("q")
    assert forced.tokens[0].top[:3] == free.tokens[0].top
    assert forced.tokens[0].logprob == dict(forced.tokens[0].top)[ord("q")] < -0.1


@pytest.mark.parametrize(
    ("form", "field", "problem"),
    [
        ({}, "structured_outputs", "is empty"),
        ({"json_object": False, "regex": None}, "structured_outputs", "is empty"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs", "has regex and choice"),
        ({"xml": "a"}, "structured_outputs.xml", "is not supported"),
        ({"regex": 7}, "structured_outputs.regex", "cannot be of type int"),
        ({"choice": []}, "structured_outputs.choice", "not a list of texts"),
        ({"choice": ["a", None]}, "structured_outputs.choice", "not a list of texts"),
        ({"choice": ["\ud800"]}, "structured_outputs.choice", "hex escape"),
        ({"regex": "\ud800"}, "structured_outputs.regex", "surrogates"),
        ({"regex": "(a"}, "structured_outputs.regex", "unclosed group"),
        ({"regex": "a(?=b)"}, "structured_outputs.regex", "look-around"),
        ({"regex": "[^\\x00-\\x{10FFFF}]"}, "structured_outputs.regex", "no token can"),
        ({"regex": "a" * 70_000}, "structured_outputs.regex", "has 70000 characters"),
        ({"json": "{"}, "structured_outputs.json", "Expecting"),
        ({"json": '{"items":' * 5000}, "structured_outputs.json", "nested too deeply"),
        ({"json": {"multipleOf": 99_999_989}}, "structured_outputs.json", "over 50,000"),
        (
            {"json": {"allOf": [{"multipleOf": 0.007}, {"multipleOf": 99}]}},
            "structured_outputs.json",
            "over 50,000",
        ),
        ({"grammar": 'start: %json {"type": "null"}'}, "structured_outputs.grammar", "%json"),
        ({"json": {"type": "strin"}}, "structured_outputs.json", "Invalid type: strin"),
        ({"json": {"not": {}}}, "structured_outputs.json", "not"),
        ({"json": {"enum": []}}, "structured_outputs.json", "Unsatisfiable"),
        ({"json": {"$ref": "http://x/y"}}, "structured_outputs.json", "not present"),
        ({"json": {"a": float("nan")}}, "structured_outputs.json", "expected value"),
        ({"grammar": "root ::= ("}, "structured_outputs.grammar", "Expected"),
        ({"grammar": "root ::= " + "(" * 9000}, "structured_outputs.grammar", "recursion"),
        ({"grammar": "start: other"}, "structured_outputs.grammar", 'unknown name: "other"'),
        ({"grammar": "start: start"}, "structured_outputs.grammar", "no token can"),
    ],
)
def test_an_invalid_form_is_an_error_of_one_line(server, form, field, problem):
    with pytest.raises(UserError) as caught:
        server.answer("a", structured_outputs=form)
    text = str(caught.value)
    assert text.startswith(f"{field}: ") and problem in text and "; " in text
    assert "\n" not in text and len(text) < 400
    assert not server.decoder.answers


@pytest.mark.parametrize(
    ("pattern", "text", "other"),
    [
        ('^[^"]{2}$', "a\\\\", '\\"a'),
        (r"^[^\\]*$", '\\"é', "a\\\\"),
        ('^[^]"]$', "[", '\\"'),
        ("^[^-a]$", "A", "-"),
        (r"^\[^x$", None, "["),
        (r"^\\[^\\]$", "\\\\b", "\\\\\\\\"),
    ],
)
def test_patterns_allow_no_escape_of_what_they_exclude(server, pattern, text, other):
    """`text` and `other` are as JSON has them."""
    field = {
        "pattern": {"type": "string", "pattern": pattern},
        "const": {"const": {"pattern": "[^"}},
    }
    schema = {"type": "array", "prefixItems": [fixed("pattern", "const", **field)]}
    if text is None:
        with pytest.raises(UserError):
            server.grammars.compile({"json": schema})
        return
    grammar = server.grammars.compile({"json": schema})
    for value, valid in ((text, True), (other, False)):
        assert bool(re.search(pattern, json.loads(f'"{value}"'))) == valid
        whole = f'[{{"pattern":"{value}","const":{{"pattern":"[^"}}}}]'
        assert follows(grammar, whole) == valid


def follows(grammar, text: str) -> bool:
    """Whether a whole text follows a grammar, byte by byte."""
    matcher = grammar.start([])
    for byte in text.encode():
        if not matcher.next[byte]:
            return False
        matcher.accept(byte)
    return matcher.finished


@pytest.mark.parametrize("grammar", ['root ::= "a" | "b" root', 'start: "a" | "b" start'])
def test_grammars_in_both_notations(server, grammar):
    _, text = run(server, {"grammar": grammar}, temperature=1.0, seed=1)
    assert re.fullmatch("b*a", text)


def test_a_tokenizer_that_cannot_write_it_is_named(tmp_path):
    from tokenizers import Tokenizer, models

    library = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = SimpleTokenizer(tmp_path / "tokenizer.json")
    compiler = GrammarCompiler(tokenizer, 2)
    with pytest.raises(UserError, match="structured_outputs.regex: no token can be next"):
        compiler.compile({"regex": "é"})
    matcher = compiler.compile({"regex": " aé| b"}).start([1])  # b is only there to end an answer
    with pytest.raises(UserError, match="structured_outputs.regex: no token can be next"):
        matcher.accept(0)
    matcher = compiler.compile({"regex": " b"}).start([1])
    with pytest.raises(UserError, match="structured_outputs.regex: no token can be next"):
        matcher.mask(np.zeros(2, np.float32))


@pytest.mark.parametrize("costs", ["memory", "time"])
def test_a_grammar_that_costs_too_much_ends_its_answer_only(server, monkeypatch, costs):
    want = server.generate_text("One", seed=1, max_new_tokens=80)
    if costs == "time":
        monkeypatch.setattr(structured, "SECONDS", -1.0)
    else:
        monkeypatch.setitem(structured.LIMITS, "max_lexer_states", 300)
    form = {"regex": f".*[a-p].{{300}}{costs}"}
    heavy = server.answer("x", structured_outputs=form, top_k=0, seed=1)
    other = server.answer("One", seed=1, max_new_tokens=80)
    assert "".join(chunk.text for chunk in other) == want
    problem = "too many states" if costs == "memory" else "takes too long"
    with pytest.raises(UserError, match=f"structured_outputs.regex: .*{problem}"):
        list(heavy)
    assert not server.decoder.answers


@pytest.mark.usefixtures("elsewhere")
def test_the_library_is_needed_for_forms_only(tokenizers, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    server = StreamingServer(free_copy(wide()), tokenizer=BYTES)
    assert server.generate_text("a", seed=1, max_new_tokens=30)
    with pytest.raises(UserError, match="regex: needs a package.*; pip install llguidance"):
        server.answer("a", structured_outputs={"regex": "a"})
    idle = StreamingServer(free_copy(wide()))
    with pytest.raises(UserError, match="tokenizer: none was found"):
        idle.answer([1], as_ids=True, structured_outputs={"regex": "a"})
