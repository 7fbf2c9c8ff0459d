"""tinymamba/tool_calls.py: calls of tools, in the forms of several kinds of models."""

import collections
import contextlib
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path

import jsonschema_rs
import pytest
from helpers import ROOT, train_bpe
from openai.lib.streaming.chat import ChatCompletionStreamState
from serve_helpers import CHAT, HELLO, NAME, assert_error, events_of, running
from tokenizers import Tokenizer

from tinymamba.chat_template import ChatTemplate
from tinymamba.openai_api import ApiError, Message
from tinymamba.structured import GrammarCompiler
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer
from tinymamba.tool_calls import CallParser, compile_calls, find_form, object_end, read_tools

PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast

TEMPLATES = {
    "Hermes": """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant' }}
{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
{%- for call in m.tool_calls or [] %}{%- set call = call.function or call %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments | tojson + '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}{%- elif m.role != 'system' or not tools %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "Llama 3.1": """{%- macro head(role) %}{{- '<|start_header_id|>' + role }}
{{- '<|end_header_id|>\\n\\n' }}{%- endmacro %}{{- bos_token }}
{%- for m in messages %}{%- if m.role == 'tool' %}{{- head('ipython') }}
{{- m.content | tojson + '<|eot_id|>' }}{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}
{%- set call = m.tool_calls[0].function %}{{- head('assistant') }}
{{- '{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}{%- else %}{{- head(m.role) }}
{%- if loop.first and tools is not none %}{{- 'Answer with one of these functions.\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}{%- endif %}
{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}""",
    "Mistral": """{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}
{%- if loop.first and tools is not none %}{{- '[AVAILABLE_TOOLS][' }}{%- for tool in tools %}
{{- '{"type": "function", "function": {' }}{%- for key, value in tool.function.items() %}
{{- '"' + key + '": ' + value | tojson }}{{- ', ' if not loop.last }}{%- endfor %}{{- '}}' }}
{{- ', ' if not loop.last }}{%- endfor %}{{- '][/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST] ' + m.content + '[/INST]' }}{%- elif m.tool_calls is defined %}
{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}{%- set out = call.function | tojson %}
{{- out[:-1] }}{%- if call.id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif %}{{- ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last }}{%- endfor %}
{{- ']' + eos_token }}{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + ', "call_id": "' }}
{{- m.tool_call_id + '"}[/TOOL_RESULTS]' }}{%- else %}{{- ' ' + m.content + eos_token }}
{%- endif %}{%- endfor %}""",
    "thinking": """{%- if tools %}{{- '# Tools ' + tools | tojson }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- m.content }}
{%- if m.tool_calls %}{{- '```json\\n[' }}{%- for call in m.tool_calls %}
{{- {'arguments': 0, 'type': 'function'} | tojson if false }}
{{- {'type': 'function', 'name': call.function.name, 'args': call.function.arguments} | tojson }}
{{- ',\\n' if not loop.last }}{%- endfor %}{{- ']\\n```' }}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
}
TRIGGERS = {"Hermes": "<tool_call>", "Llama 3.1": '{"name": "', "Mistral": "[TOOL_CALLS]"}
SPECIAL = [EOS_TOKEN, "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "[TOOL_CALLS]"]
SPECIAL += ["[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
VOCAB = 320


@functools.cache
def content() -> str:
    """A tokenizer in which what begins a call is one token, special only for Mistral."""
    bpe = train_bpe(*SPECIAL)
    bpe.add_tokens([TRIGGERS["Hermes"], TRIGGERS["Llama 3.1"]])
    return bpe.to_str()


def tokenizer_of(text: str) -> SimpleTokenizer:
    record = {"name": "tokenizer.json", "content": content(), "special_tokens": NAMES}
    return SimpleTokenizer.from_dict({**record, "chat_template": text})


def template_of(shape: str) -> ChatTemplate:
    return ChatTemplate(tokenizer_of(TEMPLATES[shape]))


def tool(name: str, parameters: dict | None = None, **more) -> dict:
    function = {"name": name, "description": f"Does {name}.", **more}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Köln", 'a "b" {c}']},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
SWITCH = {**WEATHER, "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
LEVEL = {"properties": {"on": {"$ref": "#/$defs/on"}}, "$defs": {"on": {"enum": [1, 2]}}}
TREE = {**SWITCH, "properties": {**SWITCH["properties"], "then": {"$ref": "#/$defs/tree"}}}
LATER = {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}}
TOOLS = [tool("weather", WEATHER), tool("switch.on", SWITCH, strict=True), tool("now")]
TOOLS += [tool("now_on", LEVEL), tool("now_on.later", LATER)]  # one name begins another
SCHEMAS = {"weather": WEATHER, "switch.on": SWITCH, "now": {"const": {}}}
SCHEMAS |= {"now_on": LEVEL, "now_on.later": LATER}
ASK = {**HELLO, "tools": TOOLS[:3]}


@pytest.fixture(scope="module")
def server_of():
    """The server of an untrained model, by the shape of its template."""
    started = {}
    with contextlib.ExitStack() as stack:

        def start(shape: str):
            if shape not in started:
                tokenizer = tokenizer_of(TEMPLATES[shape])
                options = {"tokenizer": tokenizer, "vocab_size": VOCAB}
                started[shape] = stack.enter_context(running(**options))
            return started[shape]

        yield start


# --------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("shape", TEMPLATES)
def test_prompts_with_tools_are_those_of_transformers(shape):
    """Beside a round of calls and results, too; special tokens of clients are text."""
    template, library = template_of(shape), Tokenizer.from_str(content())
    reference = PreTrainedTokenizerFast(
        tokenizer_object=library, chat_template=TEMPLATES[shape], **NAMES
    )
    new_id = find_form(template).new_id()
    function = {"name": "weather", "arguments": {"city": "Köln", "days": 1}}
    chat = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": new_id, "type": "function"}]},
        {"role": "tool", "tool_call_id": new_id, "content": '{"rain": true}'},
    ]
    for size in (1, 3):
        messages = json.loads(json.dumps(chat[:size]))
        if size > 1:
            messages[1]["tool_calls"][0]["function"] = function
        want = reference.apply_chat_template(
            messages, tools=TOOLS, add_generation_prompt=True, return_dict=False
        )
        if size > 1:
            as_text = {**function, "arguments": json.dumps(function["arguments"])}
            messages[1]["tool_calls"][0]["function"] = as_text
        got = template.encode([Message(**m) for m in messages], tools=TOOLS)
        assert got == want
    special = {*template.reserved}
    names = {"<|im_end|>": {"enum": ["</s>"]}, "role": {"description": "<s>"}}
    odd = [tool("f", {"properties": names}, description="[INST]")]
    chat = [Message(role="user", content="Rain?")]
    made, plain = (template.encode(chat, tools=t) for t in (odd, TOOLS))
    assert [i for i in made if i in special] == [i for i in plain if i in special]


def test_tools_belong_to_the_beginning_that_chats_share():
    template, system = template_of("Hermes"), Message(role="system", content="Be kind.")
    ids = template.encode([system, Message(role="user", content="Rain?")], tools=TOOLS)
    with_tools, without = (template.with_other_user(system, t) for t in (TOOLS, None))
    end = template.special["<|im_end|>"]
    assert ids[: ids.index(end)] == with_tools[: ids.index(end)]
    assert ids[: ids.index(end)] != without[: ids.index(end)]


def test_tools_are_read_once_for_all_chats_of_a_system_message(server_of):
    body = {"tools": TOOLS[:1], "tool_choice": "none", "max_tokens": 1}
    system, cached = {"role": "system", "content": "Be kind."}, []
    for text in ("Rain?", "Sun?"):
        messages = [system, {"role": "user", "content": text}]
        usage = server_of("Hermes").post(CHAT, messages=messages, **body)["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0 and cached[1] > 100


def test_a_template_that_leaves_out_tools_rejects_them():
    template = ChatTemplate(tokenizer_of("{% for m in messages %}{{ m.content }}{% endfor %}"))
    with pytest.raises(ApiError, match="^400: tools: the chat template leaves them out") as caught:
        template.encode([Message(role="user", content="Rain?")], tools=TOOLS)
    assert caught.value.body["error"]["param"] == "tools"


# ----------------------------------------------------------------------------------------- forms

FORMS = {
    "Hermes": (
        "<tool_call>\n",
        '{"name": "',
        '", "arguments": ',
        "}",
        "\n</tool_call>\n<tool_call>\n",
        "\n</tool_call>",
        False,
    ),
    "Llama 3.1": ("", '{"name": "', '", "parameters": ', "}", None, "", False),
    "Mistral": ("[TOOL_CALLS] [", '{"name": "', '", "arguments": ', "}", ", ", "]", True),
    "thinking": (
        "```json\n[",
        '{"type": "function", "name": "',
        '", "args": ',
        "}",
        ",\n",
        "]\n```",
        False,
    ),
}


@pytest.mark.parametrize("shape", TEMPLATES)
def test_the_form_of_a_call_is_found_from_the_template(shape):
    form = find_form(template_of(shape))
    assert tuple(form) == FORMS[shape]
    assert form.trigger == TRIGGERS.get(shape, "".join(FORMS[shape][:2]))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qwen2_5", "Hermes"),
        ("qwen3", "Hermes"),
        ("qwen3_instruct_2507", "Hermes"),
        ("llama3_1", "Llama 3.1"),
        ("llama3_2", "Llama 3.1"),
        ("qwen3_6", None),
        ("gptoss", None),
        ("glm4moe", None),
    ],
)
def test_the_forms_of_models_own_templates(name, shape):
    """The templates that the library trl has."""
    found = importlib.util.find_spec("trl")
    if not found:
        pytest.skip("needs trl")
    file = Path(found.origin).parent / "chat_templates" / f"{name}.jinja"
    template = ChatTemplate(tokenizer_of(file.read_text()))
    assert find_form(template) == (FORMS[shape] if shape else None)
    assert template.encode([Message(role="user", content="Rain?")], tools=TOOLS)


@pytest.mark.parametrize(
    "call",
    [
        "<function={{ f.name }}>{{ f.arguments | tojson }}</function>",
        "<invoke><name>{{ f.name }}</name></invoke>",
        "{{ f.name }}({{ f.arguments.stand_in_key }})",
        '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson | tojson }}}',
        "{'name': '{{ f.name }}', 'arguments': {{ f.arguments | tojson }}}",
        '{{ f.arguments | tojson }} {"name": "{{ f.name }}"}',
        "{{ raise_exception('no calls') }}",
        "",
    ],
)
def test_a_form_that_is_not_json_is_none(call):
    text = "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
    text += "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + call + "{% endfor %}"
    text += "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    assert find_form(ChatTemplate(tokenizer_of(text))) is None


# --------------------------------------------------------------------------------------- grammar


def calls_text(shape: str, *calls: tuple[str, str]) -> str:
    """What a model writes to make these calls."""
    prefix, opening, middle, closing, separator, suffix, _ = FORMS[shape]
    each = (opening + name + middle + arguments + closing for name, arguments in calls)
    return prefix + (separator or "?").join(each) + suffix


ONE = ("weather", '{"city": "Köln", "days": 3}')
TWO = ("now", "{}")


@functools.cache
def grammar_of(shape: str, choice, several: bool):
    template = template_of(shape)
    compiler = GrammarCompiler(template.tokenizer, VOCAB)
    named = {"type": "function", "function": {"name": choice}} if choice in SCHEMAS else choice
    request = read_tools(TOOLS, named, several)
    return compile_calls(compiler, template, find_form(template), request)


def follows(shape: str, text: str, choice="auto", several=True, special=True) -> bool:
    """Whether the grammar allows this whole text, with its special tokens as such or as text."""
    tokenizer = tokenizer_of(TEMPLATES[shape])
    end = tokenizer.eos_token_id
    matcher = grammar_of(shape, choice, several).start([end])
    for token in tokenizer.encode(text, allow_special=special):
        if not matcher.next[token] or token == end:
            return False
        matcher.accept(token)
    return bool(matcher.next[end])


@pytest.mark.parametrize("shape", TEMPLATES)
def test_answers_are_calls_or_text_as_the_choice_says(shape):
    one, two, both = (calls_text(shape, *calls) for calls in ([ONE], [TWO], [ONE, TWO]))
    many = FORMS[shape][4] is not None
    tagged = shape in ("Hermes", "Mistral")
    for choice, text, ones, boths in (
        ("auto", True, True, many),
        ("required", False, True, many),
        ("weather", False, True, False),
    ):
        assert follows(shape, "It rains, {ok} <b>.", choice) == text
        assert follows(shape, "", choice) == text
        assert follows(shape, one, choice) == ones
        assert follows(shape, both, choice) == boths
        assert follows(shape, two, choice) == (choice != "weather")
        assert not follows(shape, both, choice, several=False)
        for wrong in (one[:-1], one + "x", one.replace("3", "10"), one.replace("weather", "wea")):
            assert not follows(shape, wrong, choice), wrong
        if tagged:
            assert follows(shape, "Let me see. \n" + one, choice) == text
    assert not follows(shape, one, special=False) or shape != "Mistral"


@pytest.mark.parametrize("shape", TEMPLATES)
def test_arguments_follow_the_schema_of_their_own_tool(shape):
    for name, arguments, valid in (
        ("now", "{}", True),
        ("now", '{"on": true}', False),
        ("now_on", '{"on": 2}', True),
        ("now_on", '{"on": true}', False),
        ("now_on", "3", False),
        ("now_on.later", '{"on": true, "then": {"on": false}}', True),
        ("now_on.later", "{}", False),
        ("now_on.l", "{}", False),
        ("weather", "[]", False),
    ):
        text = calls_text(shape, (name, arguments))
        assert all(follows(shape, text, choice) == valid for choice in ("auto", "required"))


# ---------------------------------------------------------------------------------------- parser


def read(form, pieces: list[str], free: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls of an answer in pieces."""
    parser, content, calls = CallParser(form, free), "", []
    for piece in pieces:
        text, made = parser.feed(piece)
        assert not (text and calls)
        content, calls = content + text, calls + made
    assert parser.count == len(calls) == len({call.id for call in calls})
    return content + parser.finish(), [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("shape", TEMPLATES)
def test_the_parser_reads_any_pieces_and_drops_a_call_that_is_cut(shape):
    form = find_form(template_of(shape))
    odd = ("weather", r'{"city": "a \"} {\\", "days": 3}')
    calls = [odd, TWO] if form.separator else [odd]
    text = calls_text(shape, *calls)
    trigger = text.index(form.trigger) + len(form.trigger)
    for begin in ("", "A <b> [c] \n")[: 1 + bool(form.tag)]:
        whole = begin + text
        for size in (1, 2, 3, 7, len(whole)):
            pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
            assert read(form, pieces) == (begin.rstrip(), calls)
        for cut in range(len(whole)):
            content, some = read(form, [*whole[:cut]])
            assert some == calls[: len(some)]
            in_call = cut >= len(begin) + trigger
            assert content == (begin.rstrip() if in_call else whole[:cut])
        assert read(form, [*text], free=False) == ("", calls)
    for plain in ("", "x", "A  b \n", " {}", '{"name', "<tool", "[TOOL", "``"):
        assert read(form, [*plain]) == (plain, [])


def test_where_an_object_ends():
    for text in ("{}", '{"a": {"}": [1, "\\"}"]}}', '{"\\\\": "{"}'):
        assert object_end(text + "}x") == len(text)
        assert all(object_end(text[:n]) is None for n in range(len(text)))


# ---------------------------------------------------------------------------------------- server


def checked(choice) -> list[tuple[str, str]]:
    """The calls of a choice; they fit their tools."""
    message = choice.message
    assert message.role == "assistant" and choice.finish_reason == "tool_calls"
    for call in message.tool_calls:
        schema, arguments = SCHEMAS[call.function.name], json.loads(call.function.arguments)
        assert call.type == "function" and jsonschema_rs.is_valid(schema, arguments)
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)
    return [(call.function.name, call.function.arguments) for call in message.tool_calls]


def streamed(ai, **body) -> list:
    """The choices of a streamed answer, as OpenAI's client puts them together."""
    state, counts = ChatCompletionStreamState(), collections.Counter()
    for chunk in ai.chat.completions.create(model=NAME, stream=True, **body):
        state.handle_chunk(chunk)
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or []:
                if call.id:  # the first part of a call
                    assert call.index == counts[choice.index] and call.type == "function"
                    assert call.function.name and call.function.arguments == ""
                    counts[choice.index] += 1
                assert call.index == counts[choice.index] - 1
    return sorted(state.current_completion_snapshot.choices, key=lambda choice: choice.index)


def summary(choices: list) -> list[tuple]:
    """What two answers to one request have in common."""
    return [
        (
            c.finish_reason,
            c.message.content,
            [(t.function.name, t.function.arguments) for t in c.message.tool_calls or []],
        )
        for c in choices
    ]


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("shape", TRIGGERS)
def test_calls_that_must_be_made_fit_their_tools(server_of, shape, choice):
    ai = server_of(shape).ai
    body = {**ASK, "tool_choice": choice, "n": 2, "seed": 1, "max_tokens": 200}
    body |= {"parallel_tool_calls": False, "logprobs": True}
    answer = ai.chat.completions.create(model=NAME, **body)
    calls = [checked(each) for each in answer.choices]
    assert all(len(each) == 1 for each in calls)
    assert all(each.message.content is None for each in answer.choices)
    assert {name for ((name, _),) in calls} <= ({"weather"} if choice == NAMED else {*SCHEMAS})
    assert answer.usage.completion_tokens >= sum(len(c.logprobs.content) for c in answer.choices)
    got = streamed(ai, **body)
    assert summary(got) == summary(answer.choices)
    logprobs = [[[t.token for t in c.logprobs.content] for c in cs] for cs in (got, answer.choices)]
    assert logprobs[0] == logprobs[1]


@pytest.mark.parametrize("shape", TRIGGERS)
def test_an_answer_that_begins_a_call_completes_it(server_of, shape):
    server = server_of(shape)
    (trigger,) = server.api.tokenizer.encode(TRIGGERS[shape], allow_special=True)
    ends = [server.api.tokenizer.eos_token_id, *server.api.tokenizer.encode("]")]
    body = {**ASK, "seed": 2, "n": 2, "max_tokens": 200, "temperature": 0.8}
    for several in (True, False):
        bias = {str(trigger): 100, **dict.fromkeys(map(str, ends), 50)}
        made = {**body, "logit_bias": bias, "parallel_tool_calls": several}
        answer = server.ai.chat.completions.create(model=NAME, **made)
        assert all(len(checked(each)) == 1 for each in answer.choices)
        assert summary(streamed(server.ai, **made)) == summary(answer.choices)
    body["logit_bias"] = {str(trigger): -100}
    answer = server.ai.chat.completions.create(model=NAME, **{**body, "max_tokens": 20})
    for each in answer.choices:
        assert each.message.tool_calls is None and each.message.content
    assert summary(streamed(server.ai, **{**body, "max_tokens": 20})) == summary(answer.choices)


def test_the_request_of_the_documentation(server_of):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (request,) = re.findall(r"```json\n(.*?)```", page.partition("## Tools")[2], re.S)
    assert server_of("Hermes").post(CHAT, **json.loads(request), max_tokens=1)["choices"]


def test_the_tokens_of_calls_have_gates_if_asked(server_of):
    body = {**ASK, "tool_choice": NAMED, "seed": 1, "max_tokens": 200, "gates": True}
    answer, tokens = server_of("Hermes").post(CHAT, **body), []
    for event in events_of(server_of("Hermes"), CHAT, **body):
        tokens += [token for choice in event["choices"] for token in choice["tokens"]]
    (choice,) = answer["choices"]
    assert choice["message"]["tool_calls"] and tokens == choice["tokens"]
    assert len(tokens) == answer["usage"]["completion_tokens"] > 9


def test_several_calls_in_one_answer(server_of):
    server = server_of("Mistral")
    (comma,) = server.api.tokenizer.encode(",")
    body = {**ASK, "tool_choice": "required", "seed": 3, "max_tokens": 150}
    body["logit_bias"] = {str(comma): 100}
    answer = server.ai.chat.completions.create(model=NAME, **body)
    (choice,) = answer.choices
    assert choice.finish_reason == "length" and len(choice.message.tool_calls) > 1
    assert summary(streamed(server.ai, **body)) == summary(answer.choices)


@pytest.mark.parametrize("shape", TRIGGERS)
def test_a_call_that_is_cut_is_left_out(server_of, shape):
    server = server_of(shape)
    for count in (0, 1, 20):
        body = {**ASK, "tool_choice": NAMED, "seed": 1, "max_tokens": count}
        answer = server.ai.chat.completions.create(model=NAME, **body)
        assert summary(answer.choices) == [("length", None, [])]
        assert summary(streamed(server.ai, **body)) == summary(answer.choices)
    for more, want in (
        ({"stop": '"days"', "max_tokens": 200}, ("stop", None, [])),
        ({"tool_choice": "auto", "max_tokens": 0}, ("length", "", [])),
    ):
        answer = server.ai.chat.completions.create(model=NAME, **{**body, **more})
        assert summary(answer.choices) == [want]
        assert summary(streamed(server.ai, **{**body, **more})) == [want]


@pytest.mark.parametrize("shape", TRIGGERS)
def test_the_next_request_may_have_the_calls_and_their_results(server_of, shape):
    server = server_of(shape)
    create = functools.partial(server.ai.chat.completions.create, model=NAME, tools=TOOLS[:3])
    messages = [*HELLO["messages"]]
    answer = create(messages=messages, tool_choice="required", seed=1, max_tokens=200)
    (choice,) = answer.choices
    for call in choice.message.tool_calls:
        result = {"role": "tool", "tool_call_id": call.id, "content": '"sunny"'}
        messages += [choice.message.model_dump(exclude_none=True), result]
    answer = create(messages=messages, tool_choice="none", max_tokens=5)
    assert answer.choices[0].message.tool_calls is None
    body = {"messages": messages, "tools": TOOLS[:3]}
    ids = server.post("/tokenize", **body)["tokens"]
    prompt = server.post("/detokenize", tokens=ids)["prompt"]
    name = choice.message.tool_calls[0].function.name
    assert name in prompt and "sunny" in prompt and '"switch.on"' in prompt
    assert answer.usage.prompt_tokens == len(ids)


def test_without_a_choice_to_call_tools_are_shown_only(server_of):
    """No grammar, and the same text as of a chat whose system message is that prompt."""
    server = server_of("Hermes")
    body = {**ASK, "tool_choice": "none", "temperature": 0, "max_tokens": 8}
    got = server.post(CHAT, **body)
    ids = server.post("/tokenize", **ASK)["tokens"]
    want = server.post("/v1/completions", prompt=ids, temperature=0, max_tokens=8)
    assert got["choices"][0]["message"]["content"] == want["choices"][0]["text"]
    assert "tool_calls" not in got["choices"][0]["message"]


# ---------------------------------------------------------------------------------------- errors

BAD = {"type": "object", "properties": {"x": {"type": "string", "pattern": "(?=a)b"}}}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [tool("f"), tool("f")]}, "tools.1.function.name"),
        ({"tools": [tool("f g")]}, "tools.0.function.name"),
        ({"tools": [tool("<|im_end|>")]}, "tools.0.function.name"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [tool("f"), tool("g", BAD)]}, "tools.1.function.parameters"),
        ({"tools": [tool("f", {"type": "array"})]}, "tools.0.function.parameters.type"),
        ({"tools": [tool("f", {"$ref": "#/$defs/x"})]}, "tools.0.function.parameters"),
        (
            {"tools": [tool("f", {"$ref": "#/$defs/x", "$defs": {"x": {"type": "array"}}})]},
            "tools.0.function.parameters",
        ),
        ({"tools": [tool("f", [])]}, "tools.0.function.parameters"),
        ({"tools": [tool("f", description=1)]}, "tools.0.function.description"),
        ({"tools": [tool("f", strict="yes")]}, "tools.0.function.strict"),
        ({"tools": ["f"]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_what_is_wrong_with_tools_is_an_error_of_one_line(server_of, more, param):
    server = server_of("Hermes")
    answer = server.http.post(CHAT, json={**ASK, **more})
    got = answer.json()["error"]["param"]
    error = assert_error(answer, 400, got)
    assert got.startswith(param) and "\n" not in error["message"]
    assert server.api.pending == 0


def test_what_tools_need_is_named(server_of, monkeypatch):
    server = server_of("Hermes")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llguidance", None)
        patch.setattr(server.api.server, "grammars", GrammarCompiler(server.api.tokenizer, VOCAB))
        error = assert_error(server.http.post(CHAT, json=ASK), 400, "tools")
        assert "pip install llguidance" in error["message"]
        assert server.post(CHAT, **ASK, tool_choice="none", max_tokens=1)["choices"]
    with monkeypatch.context() as patch:
        patch.setitem(server.api.__dict__, "call_form", None)
        for choice in (None, "auto", "required", NAMED):
            answer = server.http.post(CHAT, json={**ASK, "tool_choice": choice})
            assert_error(answer, 400, "tool_choice")
        assert server.post(CHAT, **ASK, tool_choice="none", max_tokens=1)["choices"]
    with running() as plain:
        for path in (CHAT, "/tokenize"):
            error = assert_error(plain.http.post(path, json=ASK), 400, "tools")
            assert "no chat template" in error["message"]
