"""What clients of OpenAI's API send to serve.py and read from it, with OpenAI's own client."""

import base64
import contextlib
import http.client
import json
import math
import re
import typing

import numpy as np
import openai
import pydantic
import pytest
import torch
from helpers import assert_refused, run_main, wide
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from serve_helpers import (
    BYTES,
    CHAT,
    COMPLETIONS,
    HELLO,
    NAME,
    assert_error,
    running,
    session,
    wait_until,
)

import serve
from tinymamba.openai_api import field_list
from tinymamba.tokenizer import SimpleTokenizer

RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"


@pytest.fixture(scope="module")
def server():
    """A server whose chat template writes tools' messages, and names of users only."""
    template = (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'user' and m.name %} {{ m.name }}"
        "{% endif %}: {{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name }}({{ call.function.arguments.x }}){% endfor %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = SimpleTokenizer.from_dict({**BYTES.to_dict(), "chat_template": template})
    with running(tokenizer=tokenizer, max_prompt=2000) as server:
        yield server


@pytest.fixture(scope="module")
def plain():
    """A server without a template that refuses unknown fields, for pages of one other site."""
    sites = {"allow_origin": "https://a.example", "allow_host": "b.example"}
    with running(strict=True, max_tokens=2, **sites) as server:
        yield server


@pytest.fixture(scope="module")
def ai(server):
    """OpenAI's client; an answer that does not fit its types is an error."""
    url = server.url + "/v1"
    with openai.OpenAI(
        base_url=url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as ai:
        yield ai


# ------------------------------------------------------------------------- fields of the schema


def optional_fields(params) -> list[str]:
    """The fields of a TypedDict of OpenAI's client that may be left out."""
    hints = typing.get_type_hints(params, include_extras=True)
    return [n for n, hint in hints.items() if typing.get_origin(hint) is not typing.Required]


def without_ids(answer) -> str:
    """The text of an answer without what differs in each."""
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers
    return re.sub(r'"(id|created\w*|completed_at)": [^,}]+', "", answer.text)


SCHEMAS = {
    COMPLETIONS: (completion_create_params.CompletionCreateParamsNonStreaming, {"prompt": "ab"}),
    CHAT: (chat_create_params.CompletionCreateParamsNonStreaming, HELLO),
    RESPONSES: (response_create_params.ResponseCreateParamsNonStreaming, {"input": "hi"}),
    EMBEDDINGS: (embedding_create_params.EmbeddingCreateParams, {"input": "ab"}),
}


@pytest.mark.parametrize("path", SCHEMAS)
def test_every_optional_field_may_be_null_or_empty(plain, path):
    params, required = SCHEMAS[path]
    body = required if path == EMBEDDINGS else {**required, "temperature": 0}
    fields = [*optional_fields(params), "model", "extra_body"]
    assert len(fields) > 3
    want = without_ids(plain.http.post(path, json=body))
    for field in fields:
        assert without_ids(plain.http.post(path, json={field: None, **body})) == want, field
    for empty in ("", [], {}):
        other = {**dict.fromkeys(fields, empty), **body}
        assert without_ids(plain.http.post(path, json=other)) == want, empty


def test_every_optional_field_of_a_message_may_be_null_or_empty(plain):
    kinds = typing.get_args(chat_create_params.ChatCompletionMessageParam)
    for kind in kinds:
        (role,) = typing.get_args(typing.get_type_hints(kind)["role"])
        if role in ("tool", "function"):
            continue
        fields = {*optional_fields(kind), "tool_calls", "tool_call_id"} - {"content"}
        message = {"role": role, "content": "x"}
        want = plain.http.post("/tokenize", json={"messages": [message]}).json()
        for empty in (None, "", [], {}):
            other = {**dict.fromkeys(fields, empty), **message}
            assert plain.http.post("/tokenize", json={"messages": [other]}).json() == want


def tokens_of(server, *messages, **more) -> str:
    """The prompt that the server makes of messages."""
    got = server.post("/tokenize", messages=list(messages), **more)
    assert got["count"] == len(got["tokens"])
    return server.post("/detokenize", tokens=got["tokens"])["prompt"]


def test_an_assistant_may_have_no_content(server):
    for message in ({}, {"content": None}, {"content": ""}, {"content": []}):
        assert tokens_of(server, {"role": "assistant", **message}) == "assistant: \nassistant:"
    answer = server.http.post(CHAT, json={"messages": [{"role": "user", "content": None}]})
    assert_error(answer, 400, "messages.0.content")


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "1"}'}}


def test_messages_of_tools_reach_a_template_that_writes_them(server, plain):
    chat = [
        {"role": "user", "content": "a", "name": "Bob"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
        {"role": "function", "name": "", "content": "3"},
    ]
    want = "user Bob: a\nassistant: f(1)\ntool: 2\nfunction: 3\n"
    assert tokens_of(server, *chat, add_generation_prompt=False) == want
    assert tokens_of(server, *chat) == want + "assistant:"
    named = {"role": "system", "content": "a", "name": "Eve"}  # the template leaves it out
    answer = server.http.post("/tokenize", json={"messages": [chat[0], named]})
    assert tokens_of(server, named | {"name": None}) and answer.status_code == 200
    answer = server.http.post("/tokenize", json={"messages": [named]})
    assert "leaves it out" in assert_error(answer, 400, "messages.0.name")["message"]
    deep = json.dumps({"x": json.loads("[" * 600 + "]" * 600)})
    function = {"name": "f", "arguments": deep}
    chat[1]["tool_calls"] = [{**CALL, "function": function}]
    assert_error(server.http.post(CHAT, json={"messages": chat}), 400, "messages")
    odd = {"role": "system", "content": "a", "tool_calls": [CALL | {"id": "\ud800"}]}
    body = json.dumps({"messages": [odd, chat[0]], "max_tokens": 1})  # a lone surrogate, escaped
    assert server.http.post(CHAT, content=body).status_code in (200, 400)
    for i, field in enumerate(("name", "tool_calls", "role", "role")):
        hello = HELLO["messages"] * i
        answer = plain.http.post(CHAT, json={"messages": [*hello, chat[i]]})
        error = assert_error(answer, 400, f"messages.{i}.{field}")
        assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"function_call": {"name": "f"}}, "function_call"),
        (CHAT, {"audio": {"voice": "alloy"}}, "audio"),
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
        (CHAT, {"verbosity": "low"}, "verbosity"),
        (CHAT, {"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        (CHAT, {"moderation": {"model": "m"}}, "moderation"),
        (CHAT, {"extra_body": {"top_k": 5}}, "extra_body"),
        (COMPLETIONS, {"suffix": "b"}, "suffix"),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"background": True}, "background"),
        (RESPONSES, {"background": 0}, "background"),
        (RESPONSES, {"reasoning": {"effort": "high"}}, "reasoning.effort"),
        (RESPONSES, {"text": {"verbosity": "low"}}, "text.verbosity"),
        (RESPONSES, {"input": [{"type": "item_reference", "role": "user"}]}, "input.0.type"),
        (EMBEDDINGS, {"dimensions": 3}, "dimensions"),
        (EMBEDDINGS, {"encoding_format": "int8"}, "encoding_format"),
        (EMBEDDINGS, {"input": ["a", ""]}, "input"),
        (EMBEDDINGS, {"input": [[1], [257]]}, "input"),
        (EMBEDDINGS, {"input": "a" * 2001}, "input"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", **HELLO}, "prompt"),
        ("/tokenize", {"prompt": "a", "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {**HELLO, "continue_final_message": True}, "continue_final_message"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
    ],
)
def test_what_cannot_be_honored_is_an_error(server, path, more, param):
    _, body = SCHEMAS.get(path, (None, {}))
    assert_error(server.http.post(path, json={**body, **more}), 400, param)
    assert server.api.pending == 0


def test_values_without_effect_are_taken(server):
    harmless = {
        "prediction": {"type": "content", "content": "x"},
        "reasoning_effort": "none",
        "verbosity": "medium",
        "function_call": "auto",
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "stream_options": {"include_usage": False},
    }
    body = {**HELLO, "temperature": 0, "max_tokens": 3}
    want, got = (without_ids(server.http.post(CHAT, json=b)) for b in (body, body | harmless))
    assert got == want


def test_whole_numbers_may_be_floats(server):
    numbers = {"max_tokens": 3, "seed": 1, "top_k": 5, "n": 2, "logprobs": 1}
    floats = {name: float(value) for name, value in numbers.items()}
    want, got = (server.post(COMPLETIONS, prompt="a", **b)["choices"] for b in (numbers, floats))
    assert got == want
    answer = server.http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2.5})
    assert_error(answer, 400, "max_tokens")


def test_unknown_fields_are_ignored_and_listed(server, plain):
    body = {"prompt": "a", "max_tokens": 1, "min_tokens": 2, "é\n": 1}
    answer = server.http.post(COMPLETIONS, json=body)
    assert answer.headers["x-ignored-fields"] == r"min_tokens, '\xe9\n'"
    message = {"role": "user", "content": [{"type": "text", "text": "a", "x": 1}], "y": 2}
    for stream in (False, True):
        body = {"messages": [*HELLO["messages"], message], "max_tokens": 1, "stream": stream}
        answer = server.http.post(CHAT, json=body)
        assert answer.headers["x-ignored-fields"] == "messages.1.y, messages.1.content.0.x"
    error = assert_error(plain.http.post(CHAT, json=body), 400, "messages.1.y")
    assert error["code"] == "unsupported_parameter"
    assert len(field_list(["x" * 100] * 100)) < 1100
    others = {"max_output_tokens": "x", "max_completion_tokens": "x", "n": "x", "model_extra": "x"}
    server.post("/v1/sessions", id="unknown")
    for path in (COMPLETIONS, "/v1/sessions/unknown/completions"):  # fields of other routes
        body = {"prompt": "a", "max_tokens": 1, **others, "_unknown": "x", "alternatives": "x"}
        body |= {"n": 1} if path == COMPLETIONS else {}
        assert server.http.post(path, json=body).status_code == 200
    assert_error(server.http.post("/v1/sessions", json={"ids": "x"}), 400, "ids")


# ------------------------------------------------------------------------------------- sampling


LETTERS = range(32, 127)  # whole characters, so that the text shows every id
ONLY_LETTERS = {"logit_bias": {str(i): -100 for i in {*range(257)} - {*LETTERS}}}


def greedy(prompt: list[int], count: int, presence: float, frequency: float) -> list[int]:
    """The most likely ids by OpenAI's formula: l - n * frequency - (n > 0) * presence."""
    made: list[int] = []
    for _ in range(count):
        logits = wide()(torch.tensor([prompt + made]))[0, -1].tolist()
        for i in set(made):
            logits[i] -= made.count(i) * frequency + presence
        made.append(max(LETTERS, key=logits.__getitem__))
    return made


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-0.5, 2.0)])
def test_penalties_follow_openais_formula(server, presence, frequency):
    prompt, session_id = BYTES.encode("aaa b"), f"penalty{abs(presence):.0f}{frequency:.0f}"
    settings = {
        "max_tokens": 24,
        "temperature": 0,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        **ONLY_LETTERS,
    }
    want = greedy(prompt, 24, presence, frequency)
    assert want != greedy(prompt, 24, 0, 0)
    got = server.post(COMPLETIONS, prompt=prompt, **settings)
    assert got["choices"][0]["text"] == BYTES.decode(want)
    server.post("/v1/sessions", id=session_id)
    assert session(server, session_id, prompt, **settings) == BYTES.decode(want)


def test_minus_one_is_a_random_seed_and_no_top_k(server):
    asked = {"prompt": "a", "max_tokens": 30, "logit_bias": {"256": -100}}
    texts = {server.post(COMPLETIONS, seed=-1, **asked)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3
    for name in ("first", "second"):
        server.post("/v1/sessions", id=name, seed=5)
    texts = {session(server, name, seed=-1, **asked) for name in ("first", "second")}
    made = {server.post("/v1/sessions", seed=-1)["seed"] for _ in range(2)}
    assert len(texts) == len(made) == 2 and min(made) >= 0
    all_tokens = (server.post(COMPLETIONS, seed=1, top_k=k, **asked)["choices"] for k in (-1, 0))
    assert next(all_tokens) == next(all_tokens)


def test_many_stop_strings_are_taken(server):
    asked = {"prompt": "a", "max_tokens": 40, "seed": 3, **ONLY_LETTERS}
    whole = server.post(COMPLETIONS, **asked)["choices"][0]["text"]
    stops = [f"{i}no" for i in range(9)] + [whole[10]]
    got = server.post(COMPLETIONS, stop=stops, **asked)["choices"][0]
    assert (got["text"], got["finish_reason"]) == (whole[: whole.index(whole[10])], "stop")
    answer = server.http.post(COMPLETIONS, json={"prompt": "a", "stop": ["x"] * 65})
    assert "up to 64" in assert_error(answer, 400, "stop")["message"]


# --------------------------------------------------------------------------- pages, hosts, paths


def test_pages_of_allowed_origins_may_call(plain):
    asks = {"Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,x-stainless-os"
    for origin, status in (("https://a.example", 200), ("https://c.example", 400)):
        answer = plain.http.options(COMPLETIONS, headers={"Origin": origin, **asks})
        assert answer.status_code == status
        allowed = {n: v for n, v in answer.headers.items() if "allow-origin" in n}
        assert allowed == ({"access-control-allow-origin": origin} if status == 200 else {})
    answer = plain.http.options(COMPLETIONS, headers={"Origin": "https://a.example", **asks})
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    for body, status in (({"prompt": "a", "max_tokens": 1}, 200), ({}, 400)):
        answer = plain.http.post(COMPLETIONS, json=body, headers={"Origin": "https://a.example"})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        shown = answer.headers["access-control-expose-headers"]
        assert "X-Ignored-Fields" in shown and "Idempotency-Replayed" in shown
        assert "Origin" in answer.headers["vary"]
    answer = plain.http.post(COMPLETIONS, json={}, headers={"Origin": "https://c.example"})
    assert "--allow_origin" in assert_error(answer, 403)["message"]
    assert "access-control-allow-origin" not in answer.headers


def test_every_origin_may_be_allowed_and_preflights_need_no_key(monkeypatch):
    with running(allow_origin="*", api_key="k") as server:
        asks = {"Origin": "null", "Access-Control-Request-Method": "DELETE"}
        answer = server.http.options("/v1/sessions/x", headers=asks)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "*"
        monkeypatch.setattr(server.api, "model_info", lambda name: 1 / 0)
        good = {"Origin": "null", "Authorization": "Bearer k"}
        for headers, status in (({"Origin": "null"}, 401), (good, 500)):
            answer = server.http.get("/v1/models", headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("https://b.example", "127.0.0.1:8000", 200),  # a proxy that sends its own Host
        ("https://b.example:8443", "b.example:8443", 200),  # and one that passes it on
        ("http://localhost:9", "localhost:9", 200),
        ("http://[::1]:9", "[::1]:9", 200),
        ("http://localhost:9", "localhost:8", 403),
        ("http://evil.example:8000", "evil.example:8000", 403),  # DNS rebinding
        ("https://b.example.evil", "127.0.0.1:8000", 403),
    ],
)
def test_the_servers_own_page_is_known_by_its_host(plain, origin, host, status):
    answer = plain.http.get("/v1/sessions", headers={"Origin": origin, "Host": host})
    assert answer.status_code == status
    if "evil.example:8000" in host:
        assert "--allow_host" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("path", "status"), [("/v1/sessions", 403), ("/health", 200)])
def test_a_page_may_not_read_under_a_name_that_is_not_known(plain, path, status):
    """It has the server's own origin, so that its browser sends none."""
    answer = plain.http.get(path, headers={"Host": "evil.example:8000"})
    assert answer.status_code == status
    assert plain.http.get(path, headers={"Host": "b.example"}).status_code == 200


def test_addresses_may_have_more_slashes_and_head_has_no_body(server):
    for path in ("/v1/models/", "//v1/models", "/v1//models//"):
        assert server.http.get(server.url + path).json() == server.http.get("/v1/models").json()
    answer = server.http.post(
        server.url + "//v1/completions/", json={"prompt": "a", "max_tokens": 1}
    )
    assert answer.status_code == 200
    for path in ("/", "/health"):
        head, get = server.http.head(path), server.http.get(path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == get.headers["content-length"]


def test_a_body_of_no_type_is_json(server):
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert server.http.post(COMPLETIONS, content=body).status_code == 200
    for kind, status in (
        ("application/json; charset=utf-8", 200),
        ("application/problem+json", 200),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
    ):
        answer = server.http.post(COMPLETIONS, content=body, headers={"Content-Type": kind})
        assert answer.status_code == status
        if status == 415:
            assert "send Content-Type: application/json" in assert_error(answer, 415)["message"]


def test_an_idle_connection_is_closed_after_keep_alive(server):
    with running(keep_alive=0) as other:
        for each in (server, other):
            line = http.client.HTTPConnection(each.url.removeprefix("http://"), timeout=4)
            with contextlib.closing(line):
                line.request("GET", "/health")
                line.getresponse().read()
                used = line.sock
                if each is other:
                    assert used.recv(1) == b""  # sooner than after the default of 5 seconds
                    continue
                line.request("GET", "/health")
                assert line.getresponse().status == 200 and line.sock is used


def test_a_model_keeps_the_dots_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "model-v1.5").mkdir()
    for words, name in (
        (["--checkpoint", str(tmp_path / "model-v1.5")], "model-v1.5"),
        (["--checkpoint", "model-v1.5.pt"], "model-v1.5"),
        (["--checkpoint", "model-v1.5", "--model_name", "x.y"], "x.y"),
    ):
        assert serve.parse(words).model_name == name
    monkeypatch.chdir(tmp_path / "model-v1.5")
    assert serve.parse(["--checkpoint", "."]).model_name == "model-v1.5"


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--allow_origin", "https://a.example/"], "--allow_origin: 'https://a.example/'"),
        (["--allow_origin", "*, a.example"], "--allow_origin: 'a.example'"),
        (["--allow_host", "http://a.example"], "--allow_host: 'http://a.example'"),
        (["--keep_alive", "-1"], "--keep_alive"),
    ],
)
def test_a_wrong_flag_is_rejected(tmp_path, words, fragment):
    assert_refused(run_main(serve.main, *words, cwd=tmp_path), fragment)


# ------------------------------------------------------------------------------------ embeddings


def mean_hidden(ids: list[int]) -> np.ndarray:
    """The mean of the last hidden states, scaled to length 1, from one pass over all ids."""
    hidden, _, _ = wide().run(torch.tensor([ids]))  # (1, l, d)
    mean = hidden[0].double().mean(0).detach().numpy()
    return mean / np.linalg.norm(mean)


def test_embeddings_are_means_of_the_last_hidden_states(server, ai):
    long = "the quick brown fox " * 60  # longer than one read of a prompt
    for texts in (["ab", "c", long], "ab", BYTES.encode("ab"), [BYTES.encode(long), [7]]):
        got = server.ai.embeddings.create(model=NAME, input=texts)  # asks for base64
        alone = isinstance(texts, str) or isinstance(texts[0], int)
        prompts = [texts] if alone else texts
        prompts = [BYTES.encode(p) if isinstance(p, str) else p for p in prompts]
        assert [e.index for e in got.data] == [*range(len(prompts))]
        assert got.usage.prompt_tokens == got.usage.total_tokens == sum(map(len, prompts))
        for one, prompt in zip(got.data, prompts, strict=True):
            np.testing.assert_allclose(one.embedding, mean_hidden(prompt), atol=2e-5)
    asked = {"model": NAME, "input": "ab", "dimensions": 32}
    floats = ai.embeddings.create(encoding_format="float", **asked).data[0].embedding
    packed = server.post(EMBEDDINGS, input="ab", encoding_format="base64")["data"][0]["embedding"]
    values = np.frombuffer(base64.b64decode(packed), "<f4")
    assert values.tolist() == floats
    assert math.isclose(np.linalg.norm(values), 1, abs_tol=1e-6) and len(values) == 32


# ------------------------------------------------------------------------------------- responses


def test_a_response_is_the_answer_of_a_chat(server, ai):
    settings = {"temperature": 0.7, "top_p": 0.9, "extra_body": {"seed": 2}}
    kind = "Be kind. " * 30
    chat = [{"role": "system", "content": kind}, {"role": "user", "content": "hi"}]
    want = server.ai.chat.completions.create(
        model=NAME, messages=chat, max_tokens=20, logprobs=True, top_logprobs=2, **settings
    )
    asked = {"model": NAME, "instructions": kind, "input": "hi", "max_output_tokens": 20}
    got = ai.responses.create(top_logprobs=2, metadata={"a": "b"}, **asked, **settings)
    assert got.output_text == want.choices[0].message.content
    said = [p.model_dump() for p in want.choices[0].logprobs.content]
    assert [p.model_dump() for p in got.output[0].content[0].logprobs] == said
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (got.temperature, got.top_p, got.metadata) == (0.7, 0.9, {"a": "b"})
    assert got.usage.input_tokens == want.usage.prompt_tokens
    assert got.usage.output_tokens == want.usage.completion_tokens
    again = [{"role": "user", "content": "hi"}, *got.output]
    again.append({"role": "user", "content": [{"type": "input_text", "text": "more"}]})
    second = ai.responses.create(**{**asked, "input": again, "max_output_tokens": 1})
    prompt = f"system: {kind}\nuser: hi\nassistant: {got.output_text}\nuser: more\nassistant:"
    assert second.usage.input_tokens == len(BYTES.encode(prompt))
    assert second.usage.input_tokens_details.cached_tokens > len(kind)  # of the prefix cache


def test_the_events_of_a_response(server, ai):
    more = {"seed": 2, **ONLY_LETTERS}
    asked = {"model": NAME, "input": "hi", "max_output_tokens": 20, "extra_body": more}
    whole = ai.responses.create(**asked)
    events = list(ai.responses.create(stream=True, **asked))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    opening = ["created", "in_progress", "output_item.added", "content_part.added"]
    closing = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds == [*opening, *["output_text.delta"] * len(deltas), *closing]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert "".join(deltas) == events[-4].text == whole.output_text and len(deltas) == 20
    assert events[-1].response.usage == whole.usage
    text = whole.output_text[:9]
    more["stop"] = whole.output_text[9:]
    with ai.responses.stream(**asked) as stream:  # the client puts the parts together itself
        assert "".join(e.delta for e in stream if e.type.endswith("text.delta")) == text
        assert stream.get_final_response().output_text == text


def test_a_response_follows_the_schema_of_the_clients_type(ai, server):
    class Age(pydantic.BaseModel):
        model_config = {"extra": "forbid"}
        age: typing.Literal[1, 20]

    asked = {"model": NAME, "input": "hi", "max_output_tokens": 99}
    got = ai.responses.parse(text_format=Age, **asked)
    assert got.status == "completed" and got.output_parsed.age in (1, 20)
    assert got.text.format.type == "json_schema"
    for form, param in (
        ({"type": "json_schema", "name": "x"}, "text.format.schema"),
        ({"type": "json_schema", "name": "x", "schema": {"type": "in"}}, "text.format.schema"),
        ({"type": "xml"}, "text.format.type"),
    ):
        answer = server.http.post(RESPONSES, json={"input": "hi", "text": {"format": form}})
        assert_error(answer, 400, param)
    form, digits = {"format": {"type": "json_object"}}, {"regex": "[0-9]+"}
    for more, param in (
        ({"text": form, "structured_outputs": digits}, "text.format"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ):
        assert_error(server.http.post(RESPONSES, json={"input": "hi", **more}), 400, param)


def test_an_error_within_a_response_is_its_last_event(server, monkeypatch):
    decoder = server.api.server.decoder
    real, count = decoder.read, iter(range(100))
    monkeypatch.setattr(decoder, "read", lambda *w: real(*w) if next(count) < 4 else 1 / 0)
    body = {"model": NAME, "input": "hi", "extra_body": {"logit_bias": {"97": 100}}}
    events = list(server.ai.responses.create(stream=True, **body))
    assert events[-1].type == "error" and events[-1].message.startswith("internal error")
    assert events[-1].sequence_number == len(events) - 1 > 4
    wait_until(lambda: server.api.pending == 0)


# -------------------------------------------------------------------------------------- tokenize


def test_tokenize_is_what_the_server_reads(server):
    got = server.post("/tokenize", model=NAME, prompt="aé", return_token_strs=True)
    assert got == {
        "count": 3,
        "max_model_len": 2000,
        "tokens": BYTES.encode("aé"),
        "token_strs": ["a", "bytes:\\xc3", "bytes:\\xa9"],
    }
    assert server.post("/tokenize", prompt="")["tokens"] == []
    chat = server.post("/tokenize", **HELLO)
    used = server.post(CHAT, **HELLO, max_tokens=1)["usage"]["prompt_tokens"]
    assert chat["count"] == used and chat["token_strs"] is None
    assert server.post("/detokenize", tokens=[*got["tokens"], 256])["prompt"] == "aé<|endoftext|>"
