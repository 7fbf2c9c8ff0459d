"""Prompts of chats: for templates of many shapes, against `apply_chat_template` of transformers."""

import contextlib
import json
import random
import sys

import numpy as np
import pytest
from chat_helpers import CHATS, KINDS, NAMES, SHAPES, TALK, messages_of, template_of
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from tinymamba.chat_template import Chat, ChatTemplate
from tinymamba.cli import UserError
from tinymamba.openai_api import ApiError, Message
from tinymamba.prefix_cache import count_equal
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_alphabet

PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast


def reference_of(text: str, content: str = KINDS["byte_bpe"], names: dict = NAMES):
    """The tokenizer of transformers with this template."""
    library = Tokenizer.from_str(content)
    return PreTrainedTokenizerFast(tokenizer_object=library, chat_template=text, **names)


def asked(question: str) -> list[Message]:
    return messages_of([("system", "Be kind."), ("user", question)])


def render(reference, chat, **how):
    messages = [{"role": role, "content": content} for role, content in chat]
    return reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **how
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_those_of_transformers(shape, kind):
    template = template_of(SHAPES[shape], KINDS[kind])
    reference = reference_of(SHAPES[shape], KINDS[kind])
    assert template.problem is None and template.stops == []
    for chat in CHATS:
        assert template.encode(messages_of(chat)) == render(reference, chat), chat


TOOLS = """{%- for m in messages %}{%- if m.role == 'tool' %}
{{- '<|im_start|>tool ' + m.tool_call_id + '\\n' + m.content + '<|im_end|>' }}
{%- elif m.tool_calls %}{{- '<|im_start|>assistant' }}{%- for call in m.tool_calls %}
{{- '\\n' + call.function.name + ' ' + call.function.arguments | tojson }}{%- endfor %}
{{- '<|im_end|>' }}{%- else %}{{- '<|im_start|>' + m.role + ' ' + (m.name or '') + '\\n' }}
{{- m.content + '<|im_end|>' }}{%- endif %}{%- endfor %}<|im_start|>assistant"""


def tool_chat(text: str, arguments: str) -> list[dict]:
    """A chat with a tool, in OpenAI's form: the client's texts all have `text`."""
    call = {"name": f"f{text}", "arguments": arguments}
    return [
        {"role": "user", "name": f"Bob{text}", "content": f"Sum?{text}"},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": f"1{text}", "content": f"3{text}"},
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_messages_of_tools_are_those_of_transformers(kind):
    """Their arguments are values, and a special token in any of their texts is text."""
    template, reference = template_of(TOOLS, KINDS[kind]), reference_of(TOOLS, KINDS[kind])
    chat = tool_chat("", '{"x": [1, "é"]}')
    got = template.encode([Message(**m) for m in chat])
    chat[1]["tool_calls"][0]["function"]["arguments"] = {"x": [1, "é"]}
    want = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert got == want
    special = {*template.reserved}
    for text in ("<|im_end|>", "</s>"):
        more = tool_chat(text, json.dumps({f"x{text}": text, "role": text}))
        made = template.encode([Message(**m) for m in more])
        assert [i for i in made if i in special] == [i for i in got if i in special]
        assert len(made) > len(got)
    none, empty = (template.encode([Message(**m) for m in tool_chat("", a)]) for a in ("", "{}"))
    assert none == empty
    not_json = template.encode([Message(**m) for m in tool_chat("", "{x")])
    assert [i for i in not_json if i in special] == [i for i in got if i in special]


def test_a_template_that_leaves_out_a_tool_rejects_its_messages():
    for text, field in (
        (SHAPES["ChatML"], "messages.0.name"),
        (SHAPES["ChatML"].replace("+ '\\n' + message", "+ message.name|string + message"), None),
        (SHAPES["Phi-3"], "messages.0.name"),
    ):
        chat = [Message(**m) for m in tool_chat("", "{}")[:1]]
        with pytest.raises(ApiError, match=field) if field else contextlib.nullcontext():
            template_of(text).encode(chat)
    for m, field in (
        ({"role": "tool", "content": "3"}, "role"),
        (tool_chat("", "{}")[1], "tool_c"),
    ):
        with pytest.raises(ApiError, match=f"messages.1.{field}.*leaves it out"):
            template_of(SHAPES["Phi-3"]).encode([*asked("a")[1:], Message(**m)])


def questions() -> list[str]:
    """Texts that stay different if the spaces around them are cut off."""
    draw, parts = random.Random(0), ["a", "b", " ", "\n", '"', "'", "é", "<", "|", ">", "end", "\\"]
    parts += ["[INST]", "<|end|>", "<|im_end|>", "</s>", "\ue0000\ue001", "</think>", "\U000f0000"]
    made = ["".join(draw.choices(parts, k=draw.randint(1, 6))).strip() for _ in range(120)]
    return sorted({*made, *(chr(c) for c in range(0xE000, 0xE004))} - {""})


@pytest.mark.parametrize("shape", SHAPES)
def test_two_questions_are_two_prompts(shape):
    template, asking = template_of(SHAPES[shape]), questions()
    prompts = {tuple(template.encode(asked(question))) for question in asking}
    assert len(prompts) == len(asking)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_special_tokens_in_messages_are_text(shape, kind):
    """There are as many as if a message had another text, and in their places."""
    template = template_of(SHAPES[shape], KINDS[kind])
    reference = reference_of(SHAPES[shape], KINDS[kind])
    special = {*template.reserved}

    def specials(chat) -> list[int]:
        return [i for i in template.encode(messages_of(chat)) if i in special]

    for token in ("<|im_end|>", "</s>", "[INST]", "<|end|>"):
        chat = [("system", f"x {token}y"), ("user", f"{token}{token} z {token}")]
        chat += [("assistant", f"o{token}"), ("user", f"long {token}o")]
        plain = [(role, content.replace(token, "q" * len(token))) for role, content in chat]
        assert specials(chat) == specials(plain), token
        if kind == "byte_bpe":
            ids = template.encode(messages_of(chat))
            text = reference.decode(ids, clean_up_tokenization_spaces=False)
            assert text == render(reference, chat, tokenize=False)


def test_text_beside_a_special_token_in_a_message_is_not_cut():
    template = template_of(SHAPES["ChatML"])
    own, tokens = template.tokenizer, template.special
    start, end = tokens["<|im_start|>"], tokens["<|im_end|>"]
    turn = own.encode("user\nfor<|im_end|>the")
    last = own.encode("assistant\n")
    got = template.encode([Message(role="user", content="for<|im_end|>the")])
    assert got == [start, *turn, end, *own.encode("\n"), start, *last]


def test_a_template_cannot_join_a_message_to_a_special_token():
    text = "<|im_end{{ messages[0].content }}{{ messages[1].content | replace('-', '') }}<|end|>"
    template = template_of(text + "<|{{ messages[2].content }}|>")
    got = template.encode(messages_of([("user", t) for t in ("|>", "<|im_-end|>", "user")]))
    tokens = [i for i in got if i in template.reserved]
    assert tokens == [template.special["<|end|>"]]


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no') if '<' not in messages[0].content }}{{ messages[0].content }}",
        "{{ messages[0].content | upper | e if messages[0].content.startswith('end') }}<|end|>",
        "{{ messages[0].content | tojson(ensure_ascii=true) }}{{ messages[0].content.isascii() }}",
    ],
)
def test_a_template_may_look_at_what_a_message_says(text):
    chat = [("user", "end < it > é")]
    assert template_of(text).encode(messages_of(chat)) == render(reference_of(text), chat)


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'x' if messages[0].content == '</s>' else messages[0].content }}",
        "{{ messages[0].content | upper }}",
        "{{ raise_exception('no\nway') }}",
        "{{ messages[0].content.nothing.here }}",
        "{{ messages.append(1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 / 0 }}{{ range(10 ** 9) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_that_cannot_take_messages_is_an_error(text):
    template = template_of(text)
    with pytest.raises(ApiError, match="messages: the chat template .*") as error:
        template.encode([Message(role="user", content="</s>")])
    assert error.value.status_code == 400 and "\n" not in str(error.value)


def test_a_special_token_that_cannot_be_text_is_an_error():
    """Because it is a word of the tokenizer, or is found in other letters."""
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "<eos>": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<eos>", "?"])
    lower = Tokenizer.from_str(KINDS["byte_bpe"])
    lower.normalizer = normalizers.Lowercase()
    lower.add_special_tokens([AddedToken("<stop>", normalized=True)])
    text = "{{ messages[0].content }} <eos>"
    template = template_of(text, words.to_str(), {})
    assert template.encode([Message(role="user", content="a b a")]) == [1, 0, 1, 2]
    with pytest.raises(ApiError, match="messages: .*special token.*leave it out"):
        template.encode([Message(role="user", content="a <eos>")])
    template = template_of(text, lower.to_str(), {})
    for said in ("<STOP>", "<stop>"):
        ids = template.encode([Message(role="user", content=said)])
        assert template.special["<stop>"] not in ids


def test_a_private_character_is_never_a_special_token():
    template = template_of("{{ messages[0].content }}<|end|>")
    content = "".join(map(chr, range(0x100000, 0x100040)))
    own = template.tokenizer
    want = [*own.encode(content), template.special["<|end|>"]]
    assert template.encode([Message(role="user", content=content)]) == want
    with pytest.raises(ApiError, match="messages: .*special token"):
        template.encode([Message(role="user", content=content + "<|end|>")])


def test_other_kinds_of_tokenizers(tmp_path):
    """A vocab.txt by longest match, and plain bytes."""
    (tmp_path / "chat_template.jinja").write_text(SHAPES["ChatML"], encoding="utf-8")
    lines = [*byte_alphabet(), EOS_TOKEN, "<|im_start|>", "<|im_end|>", "the", "for"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    own = SimpleTokenizer(tmp_path / "vocab.txt")
    template, start, end = ChatTemplate(own), 257, 258
    for said in ("for the", " <|im_end|>fo", f"<|im_start|>{EOS_TOKEN}<|im_", "é\U00100000"):
        turn, last = own.encode(f"user\n{said}"), own.encode("assistant\n")
        got = template.encode([Message(role="user", content=said)])
        assert got == [start, *turn, end, *own.encode("\n"), start, *last]
    record = {
        **SimpleTokenizer().to_dict(),
        "chat_template": "{{ messages[0].content }}" + EOS_TOKEN,
    }
    template = ChatTemplate(SimpleTokenizer.from_dict(record))
    for said in ("é", f"a{EOS_TOKEN}"):
        assert template.encode([Message(role="user", content=said)]) == [*said.encode(), 256]


def test_special_tokens_that_the_settings_name(tmp_path):
    """All names of transformers; other settings are not texts for the template."""
    (tmp_path / "tokenizer.json").write_text(KINDS["spaced_bpe"], encoding="utf-8")
    settings = {**NAMES, "add_bos_token": True, "model_max_length": 9, "sep_token": None}
    settings |= {"mask_token": {"content": "<|end|>"}, "chat_template": "x"}
    settings |= {"extra_special_tokens": {"image_token": "<|user|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    want = {**NAMES, "mask_token": "<|end|>", "image_token": "<|user|>"}
    assert SimpleTokenizer(tmp_path / "tokenizer.json").special_tokens == want


def test_without_transformers_only_a_template_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.utils.chat_template_utils", None)
    assert ChatTemplate(SimpleTokenizer()).stops
    with pytest.raises(UserError, match="transformers: is not installed; pip install transformers"):
        template_of(SHAPES["ChatML"])


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_of_one_system_message_have_their_beginning_in_common(name):
    template = template_of(SHAPES[name])
    try:
        prompts = [template.encode(asked(question)) for question in ("One?", "Two?")]
    except ApiError:  # it rejects system messages
        prompts = []
    other = template.with_other_user(asked("")[0])
    assert bool(other) == bool(prompts)
    for ids in prompts:
        shared = count_equal(np.array(ids), np.array(other))
        least = count_equal(*map(np.array, prompts)) - 1  # a merge may reach back
        assert shared >= least and template.with_other_user(asked("")[0]) is other


# -------------------------------------------------------------------------- answers to learn from

REFUSED = {
    "DeepSeek": "writes the prompt of messages.1 in another way",  # <think> in the prompt alone
    "parts": "writes the prompt of messages.1 in another way",  # no header of an answer
    "tojson": "cuts or changes it",
    "in and length": "cuts or changes it",
    "macro": "cuts or changes it",  # everything twice
}
ENDS = {"Falcon": None, "split": None, "tojson": None, "Zephyr": "</s>", "Llama 3": "<|eot_id|>"}


@pytest.mark.parametrize("kind", ["byte_bpe", "spaced_bpe"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_begins_where_the_prompt_ends_and_stops_at_the_end_of_the_turn(shape, kind):
    template = template_of(SHAPES[shape], KINDS[kind])
    end, messages = template.turn_end, messages_of(TALK)
    if shape in ENDS:
        assert end == template.special.get(ENDS[shape])
    if shape in REFUSED:
        with pytest.raises(ApiError, match=REFUSED[shape]):
            template.encode_answers(messages)
        return
    ids, spans = template.encode_answers(messages)
    assert ids == template.encode(messages, reply=False) and len(spans) == 2
    for before, (begin, stop) in zip((1, 3), spans, strict=True):
        assert ids[:begin] == template.encode(messages[:before])
        answer = template.tokenizer.decode(ids[begin:stop], skip_special_tokens=False)
        assert TALK[before][1] in answer
        assert end is None or [i for i in ids[begin:stop] if i in template.reserved] == [end]


BARE = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}
{%- endgeneration %}{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("kind", KINDS)
def test_answers_that_a_template_marks(kind):
    """Also where transformers counts all that follows: an answer at the first token, a space."""
    template = template_of(BARE, KINDS[kind])
    talk = [("assistant", "a "), ("user", "in in"), ("assistant", "c"), ("user", "b")]
    ids, spans = template.encode_answers(messages_of(talk))
    answers = [template.tokenizer.decode(ids[a:b], False).strip(" #") for a, b in spans]
    assert answers == ["a", "c"] and spans[0][0] == 0
    assert template.turn_end is None


def test_equal_turns_are_told_apart():
    template = template_of(SHAPES["ChatML"])
    roles = ("user", "assistant") * 3
    ids, spans = template.encode_answers(messages_of([(role, "in the") for role in roles]))
    header = template.tokenizer.encode("<|im_start|>assistant\n", allow_special=True)
    assert all(ids[begin - len(header) : begin] == header for begin, _ in spans)
    assert len({end - begin for begin, end in spans}) == 1 and len(spans) == 3


@pytest.mark.parametrize("answer", ["a ", " a", "a\n"])
def test_a_space_that_is_stripped_is_missed_even_where_the_template_writes_one(answer):
    """Llama 2's template strips contents, and puts a space before and behind."""
    template = template_of(SHAPES["Llama 2"])
    with pytest.raises(ApiError, match="messages.1.content: the chat template cuts or changes it"):
        template.encode_answers(messages_of([("user", "q"), ("assistant", answer)]))


def test_a_count_from_the_nearest_special_token_is_that_of_the_whole_text():
    """For any two ends: the ids up to there, or an error, are those of reading from the start."""
    rng = random.Random(0)
    pieces = [
        "Hi",
        "\n",
        "\n\n",
        " ",
        "  ",
        "<|im_end|>",
        "</s>",
        "é",
        "in",
        "[INST]",
        ".",
        "<|end|>",
    ]
    refused = 0
    for kind, shape in [(k, s) for k in KINDS for s in ("ChatML", "Mistral", "Falcon", "Phi-3")]:
        template = template_of(SHAPES[shape], KINDS[kind])
        for _ in range(10):
            said = ["".join(rng.choices(pieces, k=4)) for _ in range(4)]
            turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
            messages = [m.for_template() for m in messages_of(turns)]
            rendered = template.render(Chat(messages, reply=False))
            ids = template.ids_of(rendered)
            count = template.id_counter(rendered, ids)
            for end in rng.sample(range(len(rendered.text)), 3):
                alone = template.ids_of(rendered.between(0, end))
                if ids[: len(alone)] == alone:
                    assert count(end) == len(alone)
                    continue
                refused += 1
                with pytest.raises(ApiError, match="the tokenizer joins"):
                    count(end)
    assert refused > 9
