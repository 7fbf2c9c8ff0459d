"""serve.py over HTTP: against the library without HTTP, and with OpenAI's own client."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import httpx
import openai
import pydantic
import pytest
import safetensors.torch
import torch
from helpers import ROOT, adapted, assert_refused, close, free_copy, run_main, run_script, wide
from serve_helpers import (
    BYTES,
    CHAT,
    COMPLETIONS,
    HELLO,
    NAME,
    PLAIN,
    UPLOAD,
    assert_error,
    events_of,
    running,
    session,
    wait_until,
)
from tokenizers import Tokenizer, decoders, models

import serve
import streaming
from peft import AdapterConfig, save_adapter
from serve import ChatTemplate, Options, Vocabulary
from streaming import Answer, StreamingConfig, StreamingServer
from testv2 import save_folder
from tinymamba import structured
from tinymamba.checkpoint import pack_tensors, read_notes
from tinymamba.cli import UserError
from tinymamba.openai_api import ApiError, Message
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_alphabet


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def shared(files):
    with running(session_dir=str(files)) as server:
        yield server


@pytest.fixture(scope="module")
def strict():
    """A server with low limits, which refuses unknown fields."""
    limits = {"max_prompt": 4999, "max_choices": 16, "max_body": 20_000, "max_stops": 4}
    with running(strict=True, **limits) as server:
        yield server


@pytest.fixture(scope="module")
def alone() -> StreamingServer:
    """The same model, without HTTP."""
    return StreamingServer(free_copy(wide()), tokenizer=BYTES)


# --------------------------------------------------------------------------------- completions


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.5, "top_p": 0.7},
        {"stop": "e"},
        {"stop": ["zz", "t", "a"], "logit_bias": {"101": -100, "97": 2.5}},
    ],
)
def test_text_equals_the_librarys(shared, alone, settings):
    want = alone.generate_text(
        "Once upon",
        seed=3,
        max_new_tokens=40,
        **{
            **PLAIN,
            **settings,
            "stop": [*settings.get("stop", [])] or None,
            "logit_bias": {int(i): b for i, b in settings.get("logit_bias", {}).items()} or None,
        },
    )
    asked = {"model": NAME, "prompt": "Once upon", "max_tokens": 40, "seed": 3, **settings}
    whole = shared.ai.completions.create(**asked)
    parts = list(shared.ai.completions.create(stream=True, **asked))
    assert whole.choices[0].text == want
    assert "".join(part.choices[0].text for part in parts) == want
    assert whole.choices[0].finish_reason == parts[-1].choices[0].finish_reason
    assert whole.model == NAME and whole.object == "text_completion"


def test_extensions_reach_the_sampler(shared, alone):
    settings = {"top_k": 5, "min_p": 0.02, "repetition_penalty": 1.3}
    want = alone.generate_text("One", seed=1, max_new_tokens=30, temperature=1.0, **settings)
    got = shared.ai.completions.create(
        model=NAME, prompt="One", seed=1, max_tokens=30, extra_body=settings
    )
    assert got.choices[0].text == want


def test_usage_counts_and_choices(shared, alone):
    asked = {"model": NAME, "prompt": ["ab", "cde"], "n": 3, "max_tokens": 7, "seed": 5}
    whole = shared.ai.completions.create(**asked)
    assert [c.index for c in whole.choices] == list(range(6))
    want = [
        alone.generate_text(p, seed=5 + i, max_new_tokens=7, **PLAIN)
        for p in ("ab", "cde")
        for i in range(3)
    ]
    assert [c.text for c in whole.choices] == want
    drawn = sum(
        len(chunk.tokens)
        for p in ("ab", "cde")
        for i in range(3)
        for chunk in alone.answer(p, seed=5 + i, max_new_tokens=7, as_ids=True, **PLAIN)
    )
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, drawn)
    assert whole.usage.total_tokens == 5 + drawn
    texts, usage = [""] * 6, None
    for part in shared.ai.completions.create(
        stream=True, stream_options={"include_usage": True}, **asked
    ):
        for c in part.choices:
            texts[c.index] += c.text
        usage = part.usage or usage
    assert texts == want and usage == whole.usage


def test_a_common_system_message_is_read_once():
    def chat(user):
        system = {"role": "system", "content": "Be brief. " * 30}
        return [system, {"role": "user", "content": user}]

    with running() as server:
        asked = {"model": NAME, "max_tokens": 5, "seed": 1}
        counts, texts = [], []
        for user in ("One?", "Two?", "Two?"):
            got = server.ai.chat.completions.create(messages=chat(user), n=2, **asked)
            counts.append((got.usage.prompt_tokens, got.usage.prompt_tokens_details.cached_tokens))
            texts.append([c.message.content for c in got.choices])
        metrics = server.http.get("/metrics").text
    length = len(BYTES.encode("system: " + "Be brief. " * 30 + "\n\nuser: "))
    rest = len(BYTES.encode("One?\n\nassistant:"))
    assert counts == [(length + rest, cached) for cached in (0, length, length)]
    with running(prefix_cache=0) as server:
        got = server.ai.chat.completions.create(messages=chat("Two?"), n=2, **asked)
    assert texts[1] == texts[2] == [c.message.content for c in got.choices]
    assert got.usage.prompt_tokens_details.cached_tokens == 0
    assert f'tinymamba_tokens_total{{kind="cached"}} {4.0 * length}' in metrics
    assert "tinymamba_prefix_cache_states 1.0" in metrics


@pytest.mark.parametrize("letter", ["a", " "])
def test_the_next_turn_of_a_chat_is_read_after_the_answer(shared, letter):
    asked = {"model": NAME, "max_tokens": 70, "logit_bias": {str(ord(letter)): 100}}
    messages = [{"role": "user", "content": "Say something." + letter}]
    first = shared.ai.chat.completions.create(messages=messages, **asked)
    assert first.choices[0].message.content == letter * 70
    turn = [{"role": "assistant", "content": letter * 70}, {"role": "user", "content": "More."}]
    second = shared.ai.chat.completions.create(messages=messages + turn, **asked)
    cached = second.usage.prompt_tokens_details.cached_tokens
    # A space follows "assistant:" in the second prompt: only the model's own is where it was.
    assert cached == (first.usage.prompt_tokens + 69 if letter == " " else 0)


def test_ids_and_text_are_the_same_prompt(shared):
    asked = {"model": NAME, "max_tokens": 9, "seed": 2}
    ids = BYTES.encode("hello")
    texts = {
        shared.ai.completions.create(prompt=p, **asked).choices[0].text
        for p in ("hello", ["hello"], ids, [ids])
    }
    assert len(texts) == 1


def log_softmax(ids: list[int]) -> torch.Tensor:
    """The model's log-probabilities after each token: (l, v)."""
    return wide()(torch.tensor([ids]))[0].double().log_softmax(-1)


def test_logprobs_are_the_models_own(shared):
    got = shared.ai.completions.create(
        model=NAME,
        prompt="abc",
        max_tokens=12,
        logprobs=4,
        seed=1,
        temperature=0.5,
        logit_bias={"101": 3},
    )
    said = got.choices[0].logprobs
    prompt = BYTES.encode("abc")
    drawn = [next(i for i in range(257) if name(i) == t) for t in said.tokens]
    true = log_softmax([*prompt, *drawn])[len(prompt) - 1 : -1]
    assert said.token_logprobs == pytest.approx(
        [float(row[i]) for row, i in zip(true, drawn, strict=True)], abs=1e-4
    )
    for row, top in zip(true, said.top_logprobs, strict=True):
        best = row.topk(4)
        assert top == pytest.approx(
            {name(i): p for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)},
            abs=1e-4,
        )


def name(token: int) -> str:
    return Vocabulary(BYTES).text_of(token)


def test_a_token_of_one_byte_is_that_byte():
    """As Llama's tokenizer has them: bytes as a last resort, and words with the space before."""
    words = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁a": 257}
    library = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    record = {"name": "tokenizer.json", "content": library.to_str(), "chat_template": None}
    vocabulary = Vocabulary(SimpleTokenizer.from_dict({**record, "special_tokens": {}}))
    assert [vocabulary.bytes_of(i) for i in (0xE2 + 1, 257)] == [b"\xe2", b" a"]
    assert vocabulary.text_of(0xE2 + 1) == "bytes:\\xe2"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_likelihood_of_the_prompt(shared, stream):
    ids = BYTES.encode("the quick brown fox " * 40)  # longer than one read of a prompt
    got = shared.ai.completions.create(
        model=NAME, prompt=[ids], max_tokens=0, logprobs=1, echo=True, stream=stream
    )
    choice = next(iter(got)).choices[0] if stream else got.choices[0]
    true = log_softmax(ids)
    assert choice.text == "the quick brown fox " * 40
    said = choice.logprobs
    assert said.token_logprobs[0] is None and said.top_logprobs[0] is None
    assert said.tokens == [name(i) for i in ids] and said.text_offset == list(range(len(ids)))
    want = [float(true[t, i]) for t, i in enumerate(ids[1:])]
    assert said.token_logprobs[1:] == pytest.approx(want, abs=1e-4)
    best = [name(int(i)) for i in true[:-1].argmax(-1)]
    assert [next(iter(top)) for top in said.top_logprobs[1:]] == best
    if not stream:
        assert got.usage.completion_tokens == 0 and choice.finish_reason == "length"


def test_logprobs_include_the_end_of_text(shared):
    """eos is not in the text, but in the logprobs: lm-eval drops the last token of each answer."""
    asked = {
        "model": NAME,
        "prompt": "abc",
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "logit_bias": {"256": 100},
    }
    choice = shared.ai.completions.create(**asked).choices[0]
    assert choice.text == "abc" and choice.finish_reason == "stop"
    assert choice.logprobs.tokens == [*"abc", EOS_TOKEN]
    want = float(log_softmax(BYTES.encode("abc"))[-1, 256])
    assert choice.logprobs.token_logprobs[-1] == pytest.approx(want, abs=1e-4)
    parts = [c for part in shared.ai.completions.create(stream=True, **asked) for c in part.choices]
    assert parts[-1].logprobs.tokens == [EOS_TOKEN] and parts[-1].text == ""


def test_echo_and_one_more_token_as_lm_eval_requests(shared):
    ids = BYTES.encode("some words")
    got = shared.ai.completions.create(
        model=NAME,
        prompt=[ids, ids[:4]],
        max_tokens=1,
        logprobs=1,
        echo=True,
        temperature=0,
        seed=1234,
    )
    assert [len(c.logprobs.tokens) for c in got.choices] == [11, 5]
    assert got.choices[1].text.startswith("some")


def test_characters_of_several_tokens_are_whole(shared):
    """Tokens that are part of a character are shown as bytes; a stream has whole characters."""
    bias = {str(b): 100 for b in "é".encode()}
    asked = {"model": NAME, "prompt": "x", "max_tokens": 20, "logit_bias": bias, "seed": 0}
    texts = [c.choices[0].text for c in shared.ai.completions.create(stream=True, **asked)]
    whole = shared.ai.completions.create(logprobs=1, **asked).choices[0]
    assert "".join(texts) == whole.text and "é" in whole.text
    assert {"bytes:\\xc3", "bytes:\\xa9"} >= set(whole.logprobs.tokens)


def test_special_tokens_in_text_are_text(shared):
    for text in (EOS_TOKEN, f"a{EOS_TOKEN}b"):
        got = shared.ai.completions.create(
            model=NAME, prompt=text, max_tokens=0, echo=True, logprobs=0
        )
        assert got.usage.prompt_tokens == len(text) and got.choices[0].text == text
        chat = shared.ai.chat.completions.create(
            model=NAME, max_tokens=0, messages=[{"role": "user", "content": text}]
        )
        assert chat.usage.prompt_tokens == len(f"user: {text}\n\nassistant:")


# ---------------------------------------------------------------------------------------- chat


def test_chat(shared, alone):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    prompt = "system: Be kind.\n\nuser: Hello\n\nassistant:"
    want = alone.generate_text(prompt, seed=4, max_new_tokens=20, stop=["\n\nuser:"], **PLAIN)
    asked = {
        "model": NAME,
        "messages": messages,
        "seed": 4,
        "max_completion_tokens": 20,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 2,
    }
    whole = shared.ai.chat.completions.create(**asked)
    assert whole.choices[0].message.content == want
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len(prompt)
    again = [*messages, whole.choices[0].message, {"role": "user", "content": "And now?"}]
    for turns in (again, [m.model_dump() if hasattr(m, "model_dump") else m for m in again]):
        second = shared.ai.chat.completions.create(model=NAME, messages=turns, max_tokens=2)
        assert second.usage.prompt_tokens > whole.usage.prompt_tokens
    said = whole.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in said).decode(errors="ignore") == want
    assert all(len(t.top_logprobs) == 2 for t in said)
    texts, roles = ["", ""], set()
    for part in shared.ai.chat.completions.create(stream=True, **asked):
        for c in part.choices:
            texts[c.index] += c.delta.content or ""
            roles.add(c.delta.role)
    assert texts == [c.message.content for c in whole.choices] and roles == {"assistant", None}


def test_a_template_beside_the_tokenizer_is_used(tmp_path):
    """Its special tokens are encoded as such; those in a message are plain text."""
    text = "{% for m in messages %}<|endoftext|>{{ m.role }}|{{ m.content }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(text + "{{ raise() if messages[3] }}")
    (tmp_path / "vocab.txt").write_text("\n".join([*byte_alphabet(), EOS_TOKEN]) + "\n")
    template = ChatTemplate(SimpleTokenizer(tmp_path / "vocab.txt"))
    said = [Message(role="user", content=EOS_TOKEN), Message(role="user", content="b")]
    assert template.encode(said) == [
        256,
        *BYTES.encode(f"user|{EOS_TOKEN}\n"),
        256,
        *BYTES.encode("user|b\n"),
    ]
    assert template.stops == []
    (tmp_path / "chat_template.jinja").unlink()
    about = {
        "chat_template": [{"name": "default", "template": "{{ eos_token }}{{ bos_token }}"}],
        "eos_token": {"content": EOS_TOKEN},
        "bos_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    other = ChatTemplate(SimpleTokenizer(tmp_path / "vocab.txt"))
    assert other.encode(said) == [256]
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ApiError, match="chat template cannot be read"):
        ChatTemplate(SimpleTokenizer(tmp_path / "vocab.txt")).encode(said)
    with pytest.raises(ApiError, match="template"):
        template.encode([*said, *said])


TEMPLATES = {
    "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}": (200, 2),
    "{% generation %}{{ messages | length }}{% endgeneration %}": (200, 1),
    "{{ messages[0].content | tojson }}{{ strftime_now('%Y') }}": (200, 8),
    "{{ raise_exception('no') }}": (400, "messages: the chat template rejects them (no)"),
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": (400, "messages: the chat template rejects"),
    "{% break": (400, "messages: the model's chat template cannot be read"),
}


@pytest.mark.parametrize("text", TEMPLATES)
def test_no_template_ends_the_server(text):
    status, want = TEMPLATES[text]
    tokenizer = SimpleTokenizer.from_dict({**BYTES.to_dict(), "chat_template": text})
    with running(tokenizer=tokenizer) as server:
        answer = server.http.post(CHAT, json={**HELLO, "max_tokens": 1})
        assert answer.status_code == status
        if status == 200:
            assert answer.json()["usage"]["prompt_tokens"] == want
        else:
            assert assert_error(answer, 400, "messages")["message"].startswith(want)
        assert server.post(COMPLETIONS, prompt="a", max_tokens=1)["usage"]["prompt_tokens"] == 1


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": 3}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [257]}, "prompt"),
        (COMPLETIONS, {"prompt": "a" * 5000}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "9"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 10**6}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "temperature": 3}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": 1.5}, "top_p"),
        (COMPLETIONS, {"prompt": "a", "seed": -2}, "seed"),
        (COMPLETIONS, {"prompt": "a", "top_k": -2}, "top_k"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
        (COMPLETIONS, {"prompt": "a", "n": 17}, "n"),
        (COMPLETIONS, {"prompt": "a", "stop": list("abcde")}, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": [""]}, "stop"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"257": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
        (COMPLETIONS, {"prompt": "a", "presence_penalty": 2.5}, "presence_penalty"),
        (COMPLETIONS, {"prompt": "a", "frequency_penalty": -2.5}, "frequency_penalty"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"prompt": "a", "guided_json": "{}"}, "guided_json"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "boss", "content": ""}]}, "messages.0.role"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "", "name": "x"}]}, "messages.0.name"),
        (
            CHAT,
            {
                "messages": [
                    *HELLO["messages"],
                    {"role": "assistant", "content": "", "refusal": "no"},
                ]
            },
            "messages.1.refusal",
        ),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"seed": 1}}, "logit_bias"),
        (
            COMPLETIONS,
            {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(301)), 1)},
            "logit_bias",
        ),
        (CHAT, {**HELLO, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {**HELLO, "tools": [{"type": "function"}]}, "tools"),
        (CHAT, {**HELLO, "response_format": {"type": "xml"}}, "response_format.type"),
        ("/v1/sessions", {"id": "../x"}, "id"),
        ("/v1/sessions", {"load": "a/b"}, "load"),
    ],
)
def test_errors_name_the_field(strict, path, body, param):
    error = assert_error(strict.http.post(path, json=body), 400, param)
    assert error["type"] == "invalid_request_error" and param.split(".")[0] in error["message"]
    assert strict.api.pending == 0


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b'"a"',
        b"\xff",
        b"[" * 9000,
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
    ],
)
def test_a_malformed_body_is_rejected(strict, body):
    answer = strict.http.post(
        COMPLETIONS, content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_lone_surrogate_gets_a_json_answer(strict):
    for body in (rb'{"prompt": "\ud800", "max_tokens": 1}', rb'{"prompt": "a", "\ud800": 1}'):
        answer = strict.http.post(
            COMPLETIONS, content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in (200, 400) and answer.json()


def test_the_openai_client_raises_its_own_errors(shared):
    with pytest.raises(openai.BadRequestError) as caught:
        shared.ai.completions.create(model=NAME, prompt="a", presence_penalty=3.0)
    assert caught.value.param == "presence_penalty"
    with pytest.raises(openai.NotFoundError) as caught:
        shared.ai.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_harmless_fields_change_nothing(shared):
    asked = {"prompt": "a", "max_tokens": 5, "seed": 1}
    more = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "suffix": None,
        "best_of": 1,
        "stop": None,
    }
    plain, other = (shared.post(COMPLETIONS, **b)["choices"] for b in (asked, {**asked, **more}))
    assert plain == other


def test_unknown_routes(shared):
    assert_error(shared.http.get("/v1/nothing"), 404)
    assert assert_error(shared.http.get(COMPLETIONS), 405)["code"] == "method_not_allowed"
    for path, methods in ((UPLOAD, "POST"), ("/v1/sessions/other", "DELETE, GET")):
        assert shared.http.put(path).headers["allow"] == methods
    assert_error(shared.http.get("/v1/models/gpt-4"), 404, "model")
    assert shared.ai.models.list().data[0].id == NAME
    assert shared.ai.models.retrieve(NAME).owned_by == "tinymamba"


@pytest.mark.parametrize(("memory", "heads"), [(True, [8, 2]), (False, [8, 0])])
def test_a_model_has_the_sizes_of_its_state(memory, heads):
    library = StreamingServer(free_copy(wide(memory=memory)), tokenizer=BYTES)
    with running(library=library) as server:
        (model,) = server.http.get("/v1/models").json()["data"]
        assert (model["layers"], model["heads"]) == (2, heads)
        assert model["state_bytes"] == server.post("/v1/sessions")["state_bytes"]
        body = {**HELLO, "max_tokens": 1, "gates": True, "logit_bias": {"256": -100}}
        (token,) = server.post(CHAT, **body)["choices"][0]["tokens"]
        assert len(token["norms"]) == 2 and {*map(len, token["norms"])} <= {8, sum(heads)}
        assert len(token["norms"][-1]) == sum(heads)


def test_a_body_that_is_too_large(strict):
    large = json.dumps({"prompt": "a" * 30_000}).encode()
    assert_error(strict.http.post(COMPLETIONS, content=large), 413)
    pieces = (
        large[i : i + 1000] for i in range(0, len(large), 1000)
    )  # sent without Content-Length
    assert_error(
        strict.http.post(COMPLETIONS, content=pieces, headers={"Content-Type": "application/json"}),
        413,
    )
    assert strict.post(COMPLETIONS, prompt="a", max_tokens=1)


@pytest.mark.parametrize("framing", ["Content-Length: 99999999", "Transfer-Encoding: chunked"])
def test_a_client_that_asks_before_it_sends_hears_at_once_that_it_is_too_much(strict, framing):
    """One that has leave to send may send all, and loses nothing of the answer."""
    chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
    with socket.create_connection(strict.socket.getsockname(), timeout=20) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n"
        client.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
        said = client.recv(4096)
        if said.startswith(b"HTTP/1.1 100 "):
            client.sendall(128 * chunk + b"0\r\n\r\n")
            said = b""
        while more := client.recv(4096):
            said += more
    assert said.startswith(b"HTTP/1.1 413 ") and b'"body_too_large"' in said


def test_a_slow_body_times_out():
    with (
        running(body_timeout=1) as server,
        socket.create_connection(
            ("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=0.25
        ) as lazy,
    ):
        lazy.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        answer, end = b"", time.monotonic() + 20
        while not answer and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                lazy.sendall(b" ")
                answer = lazy.recv(4096)
        assert b" 408 " in answer.split(b"\r\n")[0] and b"connection: close" in answer.lower()


def test_a_page_of_another_site_is_rejected(shared):
    for origin, status in ((None, 200), (shared.url, 200), ("http://evil.example", 403)):
        headers = {"Origin": origin} if origin else {}
        assert shared.http.get("/v1/sessions", headers=headers).status_code == status


def test_an_error_of_the_server_is_counted_and_logged(shared, monkeypatch, caplog):
    monkeypatch.setattr(shared.api, "model_info", lambda name: 1 / 0)
    with httpx.Client(base_url=shared.url) as client:  # its connection stays open
        for _ in range(20):
            assert_error(client.get("/v1/models"), 500)
    assert "ZeroDivisionError" in caplog.text
    counted = 'tinymamba_requests_total{route="/v1/models",status="500"} 20.0'
    assert counted in shared.http.get("/metrics").text


def test_an_error_in_one_answer_affects_no_other(shared, alone, monkeypatch):
    want = alone.generate_text("Once", seed=1, max_new_tokens=60, **PLAIN)
    usual = streaming.probabilities
    monkeypatch.setattr(
        streaming,
        "probabilities",
        lambda logits, recent, config, *more: (
            1 / 0 if config.top_p == 0.666 else usual(logits, recent, config, *more)
        ),
    )
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        good = [
            pool.submit(shared.post, COMPLETIONS, prompt="Once", seed=1, max_tokens=60)
            for _ in range(6)
        ]
        broken = [
            pool.submit(shared.http.post, COMPLETIONS, json={"prompt": "a", "top_p": 0.666})
            for _ in range(6)
        ]
        assert {g.result()["choices"][0]["text"] for g in good} == {want}
        for b in broken:
            assert_error(b.result(), 500)


def test_a_failing_step_fails_its_answers_and_no_later_one(shared, monkeypatch):
    decoder = shared.api.server.decoder
    shared.post("/v1/sessions", id="steady", seed=0)
    shared.post("/v1/sessions/steady/completions", prompt="abc", max_tokens=3)
    before = shared.http.get("/v1/sessions/steady").json()["tokens"]
    real, count = decoder.read, iter(range(100))

    def breaks(*words):
        if next(count) == 3:
            raise RuntimeError("out of memory at 0x7f")
        return real(*words)

    monkeypatch.setattr(decoder, "read", breaks)
    answer = shared.http.post(
        "/v1/sessions/steady/completions", json={"prompt": "x", "max_tokens": 50}
    )
    error = assert_error(answer, 500)
    assert error["type"] == "server_error" and "0x7f" not in error["message"]
    monkeypatch.setattr(decoder, "read", real)
    after = shared.http.get("/v1/sessions/steady").json()
    assert after["tokens"] == before and after["turns"] == 1 and not after["answering"]
    assert shared.post("/v1/sessions/steady/completions", prompt="x", max_tokens=3)


# ------------------------------------------------------------------------ keys, queue, clients


def test_keys():
    with running(api_key="säcret") as server:
        good = {"Authorization": "Bearer säcret".encode()}
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/").status_code == 200
        paths = [
            "/metrics",
            "/openapi.json",
            "/v1/models",
            "/v1/sessions",
            "/nowhere",
            "/v1/sessions/x",
        ]
        for path in paths:
            assert assert_error(server.http.get(path), 401)["code"] == "invalid_api_key"
            assert server.http.get(path, headers=good).status_code in (200, 404)
        for scheme in ("bearer", "BEARER"):
            spelled = {"Authorization": f"{scheme} säcret".encode()}
            assert server.http.get("/v1/models", headers=spelled).status_code == 200
        for bad in ("", "Bearer", "Bearer secre", "bearer secret", "Basic säcret"):
            answer = server.http.post(COMPLETIONS, json={}, headers={"Authorization": bad.encode()})
            assert_error(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
        schemes = server.http.get("/openapi.json", headers=good).json()
        assert schemes["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]


def test_a_full_queue_rejects_before_the_body_is_read(monkeypatch):
    with running(batch_size=2, max_queue=1) as server:
        asked = {"model": NAME, "prompt": "a", "max_tokens": 4096, "logit_bias": {"256": -100}}
        streams = [server.ai.completions.create(stream=True, **asked) for _ in range(2)]
        with pytest.raises(openai.RateLimitError):
            server.ai.completions.create(n=2, **asked)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            third = pool.submit(server.ai.completions.create, **{**asked, "max_tokens": 2})
            wait_until(lambda: server.api.pending == 3)
            monkeypatch.setattr(server.api.tokenizer, "encode", None)
            for body in (b"{", json.dumps({"prompt": "a"}).encode()):
                answer = server.http.post(COMPLETIONS, content=body)
                assert assert_error(answer, 429)["code"] == "queue_full"
                assert int(answer.headers["retry-after"]) > 0
            assert server.http.get("/health").status_code == 200
            monkeypatch.undo()
            for stream in streams:
                stream.close()
            assert third.result().usage.completion_tokens == 2
        wait_until(lambda: server.api.pending == 0)
        assert server.busy() == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_the_slot_before_the_next_step(shared, stream, monkeypatch):
    decoder, steps, gone = shared.api.server.decoder, [], threading.Event()
    real, engine = decoder.step, shared.api.engine
    drop = engine.drop

    def counted():
        real()
        if gone.is_set() and decoder.answers:
            steps.append(1)

    def dropping(jobs):
        if {*jobs} & {*engine.running, *engine.waiting}:  # else an earlier test's, dropped again
            gone.set()
        drop(jobs)

    monkeypatch.setattr(decoder, "step", counted)
    monkeypatch.setattr(engine, "drop", dropping)
    client = httpx.Client(base_url=shared.url)
    body = {"prompt": "a", "max_tokens": 4096, "stream": stream, "logit_bias": {"256": -100}}
    if stream:
        with client.stream("POST", COMPLETIONS, json=body) as answer:
            lines = answer.iter_lines()  # freeing it closes the connection
            assert next(lines).startswith("data: {")
            assert shared.busy() == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post(COMPLETIONS, json=body, timeout=0.2)
    client.close()
    wait_until(gone.is_set)
    wait_until(lambda: shared.busy() == 0 and shared.api.pending == 0)
    assert steps == []


def test_concurrent_answers_equal_single_ones(alone):
    chance = random.Random(0)
    bodies = [
        {
            "prompt": "word " * chance.randrange(1, 60),
            "max_tokens": chance.randrange(1, 50),
            "seed": i,
            "temperature": chance.choice([0, 0.7, 1]),
            "stream": bool(i % 2),
        }
        for i in range(24)
    ]
    want = [
        alone.generate_text(
            b["prompt"],
            max_new_tokens=b["max_tokens"],
            seed=b["seed"],
            temperature=b["temperature"],
            top_k=0,
        )
        for b in bodies
    ]
    with running(batch_size=16) as server:

        def ask(body: dict) -> str:
            if not body["stream"]:
                return server.post(COMPLETIONS, **body)["choices"][0]["text"]
            parts = server.ai.completions.create(model=NAME, **body)
            return "".join(c.text for part in parts for c in part.choices)

        with concurrent.futures.ThreadPoolExecutor(30) as pool:
            assert list(pool.map(ask, bodies)) == want
        wait_until(lambda: server.api.pending == 0 and server.busy() == 0)
        metrics = server.http.get("/metrics").text
        route = 'tinymamba_requests_total{route="/v1/completions",status="200"} 24.0'
        assert route in metrics and "process_resident_memory_bytes" in metrics


def test_finished_answers_are_freed_without_the_garbage_collector(shared):
    """A state is half a megabyte: hundreds waiting for the collector would be a leak."""

    def answers() -> int:
        return sum(type(o) is Answer for o in gc.get_objects())

    gc.collect()
    before = answers()
    gc.disable()
    try:
        for stream in (False, True, False, True):
            got = shared.ai.completions.create(model=NAME, prompt="ab", max_tokens=5, stream=stream)
            list(got) if stream else None
        with shared.http.stream(
            "POST", COMPLETIONS, json={"prompt": "a", "stream": True, "max_tokens": 4096}
        ) as answer:
            assert answer.status_code == 200
        shared.http.post(COMPLETIONS, json={"prompt": "a", "model": "none"})
        wait_until(lambda: shared.busy() == 0 and shared.api.pending == 0)
        wait_until(lambda: answers() <= before)
    finally:
        gc.enable()


def test_a_slow_reader_does_not_block_others(shared):
    slow = shared.ai.completions.create(
        model=NAME, prompt="a", max_tokens=750, stream=True, logprobs=20, logit_bias={"256": -100}
    )
    quick = shared.ai.completions.create(model=NAME, prompt="b", max_tokens=5)
    assert quick.usage.completion_tokens <= 5
    assert sum(bool(part.choices[0].text) for part in slow) > 300


# ------------------------------------------------------------------------------------ sessions


def test_a_session_equals_the_librarys(shared, alone):
    made = shared.post("/v1/sessions", id="one", seed=7)
    assert (made["tokens"], made["turns"], made["seed"], made["answering"]) == (0, 0, 7, False)
    assert made["undo"] == 0
    twin = alone.create_session(seed=7)
    for prompt in ("Once upon", " a time", BYTES.encode(" there"), ""):
        want = alone.generate_text(prompt, twin, max_new_tokens=15, **PLAIN)
        assert session(shared, "one", prompt, max_tokens=15) == want
    info = shared.http.get("/v1/sessions/one").json()
    true = alone.get_session_info(twin)
    assert info["tokens"] == true["position"] and info["turns"] == 4 and info["undo"] == 1
    stored_before = {name: value for name, value in true.items() if name != "undo"}
    assert serve.Engine.session_out(stored_before)["undo"] == 1, "as of an earlier version"
    assert info["state_bytes"] == true["state_bytes"]
    assert "one" in [s["id"] for s in shared.http.get("/v1/sessions").json()["data"]]


def test_fork_rollback_reset_delete(shared):
    path = "/v1/sessions/two"
    shared.post("/v1/sessions", id="two", seed=1)
    session(shared, "two", "abc", max_tokens=5)
    fork = shared.post(path + "/fork", id="three")
    other = shared.post(path + "/fork", seed=2)
    assert fork["tokens"] == other["tokens"] and other["seed"] == 2
    texts = [session(shared, name, "x", max_tokens=20) for name in ("two", "three", other["id"])]
    assert texts[0] == texts[1] != texts[2]
    back = shared.post(path + "/rollback")
    assert (back["tokens"], back["turns"], back["undo"]) == (fork["tokens"], 1, 0)
    assert_error(shared.http.post(path + "/rollback"), 409, "session_id")
    assert session(shared, "two", "x", max_tokens=20) == texts[0]
    assert shared.post(path + "/reset")["tokens"] == 0
    assert_error(shared.http.post("/v1/sessions", json={"id": "two"}), 409, "id")
    assert_error(shared.http.post(path + "/fork", json={"id": "three"}), 409, "id")
    assert shared.http.delete(path).json()["deleted"]
    for method, route in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/fork"),
        ("POST", "/reset"),
        ("POST", "/rollback"),
        ("POST", "/stop"),
    ):
        assert_error(shared.http.request(method, path + route), 404, "session_id")
    assert_error(shared.http.post(path + "/completions", json={"prompt": "a"}), 404, "session_id")
    assert_error(shared.http.post(path + "/save", json={"name": "x"}), 404, "session_id")


def test_save_and_load(shared, files):
    shared.post("/v1/sessions", id="four", seed=3)
    session(shared, "four", "abc", max_tokens=5)
    shared.post("/v1/sessions/four/save", name="talk")
    assert (files / "talk.safetensors").is_file()
    assert_error(shared.http.post("/v1/sessions/four/save", json={"name": "talk"}), 409, "name")
    want = session(shared, "four", "x", max_tokens=20)
    shared.post("/v1/sessions", load="talk", id="five")
    assert session(shared, "five", "x", max_tokens=20) == want
    assert shared.post("/v1/sessions/four/save", name="talk", overwrite=True)["turns"] == 2
    assert_error(shared.http.post("/v1/sessions", json={"load": "talk", "id": "five"}), 409, "id")
    assert_error(shared.http.post("/v1/sessions", json={"load": "talk", "seed": 1}), 400, "seed")
    assert_error(shared.http.post("/v1/sessions", json={"load": "nothing"}), 404, "load")
    for bad in ("../talk", "/etc/passwd", "", "a.b", "x" * 65, "a\n"):
        assert_error(shared.http.post("/v1/sessions", json={"load": bad}), 400, "load")
        assert_error(shared.http.post("/v1/sessions/four/save", json={"name": bad}), 400, "name")
    (files / "broken.safetensors").write_bytes(b"no session")
    for path, body, param in (
        ("", {"load": "broken"}, "load"),
        ("/four/save", {"name": "broken", "overwrite": True}, "name"),
    ):
        error = assert_error(shared.http.post(f"/v1/sessions{path}", json=body), 400, param)
        assert str(files) not in error["message"]
    assert (files / "broken.safetensors").read_bytes() == b"no session"
    with running() as bare:
        bare.post("/v1/sessions", id="a")
        assert_error(bare.http.post("/v1/sessions/a/save", json={"name": "x"}), 400, "name")
        assert_error(bare.http.post("/v1/sessions", json={"load": "x"}), 400, "load")


ENDLESS = {"max_tokens": 4096, "logit_bias": {"256": -100}}


def test_a_session_answers_one_at_a_time_and_can_be_stopped(shared, alone):
    path, letters = "/v1/sessions/six", {"97": 100, "98": 100}
    shared.post("/v1/sessions", id="six", seed=3)
    with shared.http.stream(
        "POST",
        path + "/completions",
        json={"prompt": "abc", "stream": True, **ENDLESS, "logit_bias": letters},
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert shared.http.get(path).json()["answering"]
        for route, body in (
            ("completions", {"prompt": "x"}),
            ("fork", {}),
            ("reset", {}),
            ("rollback", {}),
            ("save", {"name": "six"}),
        ):
            error = assert_error(shared.http.post(f"{path}/{route}", json=body), 409, "session_id")
            assert error["code"] == "session_busy"
        error = assert_error(shared.http.get(path + "/file"), 409, "session_id")
        assert error["code"] == "session_busy"
        shared.post(path + "/stop")
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    info = events[-1]["session"]
    assert info["tokens"] == 3 + events[-1]["usage"]["completion_tokens"] and info["turns"] == 1
    twin = alone.create_session(seed=3)
    alone.generate_text(
        "abc", twin, max_new_tokens=info["tokens"] - 3, logit_bias={97: 100.0, 98: 100.0}, **PLAIN
    )
    assert session(shared, "six", "x", max_tokens=9) == alone.generate_text(
        "x", twin, max_new_tokens=9, **PLAIN
    )


def test_a_session_that_waits_for_a_slot_is_busy_and_can_be_stopped():
    with (
        running(batch_size=1) as server,
        server.http.stream(
            "POST", COMPLETIONS, json={"prompt": "a", "stream": True, **ENDLESS}
        ) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        server.post("/v1/sessions", id="late")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            path = "/v1/sessions/late"
            queued = pool.submit(server.http.post, f"{path}/completions", json={"prompt": "b"})
            wait_until(lambda: server.api.engine.waiting)
            assert_error(
                server.http.post(f"{path}/completions", json={"prompt": "c"}), 409, "session_id"
            )
            assert_error(server.http.post(f"{path}/reset"), 409, "session_id")
            server.post(f"{path}/stop")
            assert_error(queued.result(), 409, "session_id")
        assert server.http.get(path).json()["tokens"] == 0


def test_of_concurrent_saves_under_one_name_one_succeeds(tmp_path):
    with running(session_dir=str(tmp_path), max_sessions=2) as server:
        for name in ("one", "two"):
            server.post("/v1/sessions", id=name)
            session(server, name, "a", max_tokens=1)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [
                *pool.map(
                    lambda i: server.http.post(
                        f"/v1/sessions/{('one', 'two')[i % 2]}/save", json={"name": "x"}
                    ),
                    range(8),
                )
            ]
        assert sorted(a.status_code for a in answers) == [200, *[409] * 7]


def test_a_client_that_does_not_read_is_dropped(shared, monkeypatch):
    monkeypatch.setattr(serve.Mailbox, "MAX_UNREAD", 2)
    monkeypatch.setattr(serve.EventStream, "__call__", hold := DelayedStream())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            shared.http.post, COMPLETIONS, json={"prompt": "a", "stream": True, **ENDLESS}
        )
        wait_until(lambda: hold.reached and not shared.busy())
        hold.released.set()
        asked.exception()
    wait_until(lambda: shared.api.pending == 0)


class DelayedStream:
    """Replaces EventStream.__call__: the stream is sent once `released` is set."""

    def __init__(self):
        self.usual, self.reached = serve.EventStream.__call__, False
        self.released = threading.Event()

    def __get__(self, stream, kind):
        async def send_late(scope, receive, send):
            self.reached = True
            await asyncio.to_thread(self.released.wait)
            await self.usual(stream, scope, receive, send)

        return send_late


def test_a_disconnect_leaves_the_session_unchanged(shared):
    shared.post("/v1/sessions", id="seven", seed=3)
    session(shared, "seven", "abc", max_tokens=9)
    before = shared.http.get("/v1/sessions/seven").json()
    shared.post("/v1/sessions/seven/fork", id="eight")
    chance = random.Random(0)
    for _ in range(20):
        with shared.http.stream(
            "POST",
            "/v1/sessions/seven/completions",
            json={"prompt": "some more", "stream": True, **ENDLESS},
        ) as answer:
            lines = answer.iter_lines()
            for _ in range(chance.randrange(12)):
                next(lines)
        wait_until(lambda: shared.busy() == 0)
    now = shared.http.get("/v1/sessions/seven").json()
    assert {**now, "last_used": 0} == {**before, "last_used": 0}
    assert session(shared, "seven", "x", max_tokens=20) == session(
        shared, "eight", "x", max_tokens=20
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_engine_reports_an_error_to_all():
    with running() as server:
        with server.http.stream(
            "POST", COMPLETIONS, json={"prompt": "a", "stream": True, **ENDLESS}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.api.engine.enqueue(lambda: 1 / 0)
            error = json.loads([line for line in lines if line][-1][6:])["error"]
        assert error["code"] == "shutting_down" and server.busy() == 0
        assert server.http.get("/health").status_code == 503
        assert_error(server.http.get("/v1/sessions"), 503)
        assert_error(server.http.post(COMPLETIONS, json={"prompt": "a"}), 503)
        assert server.api.pending == 0


def test_deleting_a_session_ends_its_answer(shared):
    shared.post("/v1/sessions", id="nine")
    with shared.http.stream(
        "POST", "/v1/sessions/nine/completions", json={"prompt": "abc", "stream": True, **ENDLESS}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        shared.http.delete("/v1/sessions/nine")
        error = json.loads([line for line in lines if line][-1][6:])["error"]
    assert "deleted" in error["message"]
    wait_until(lambda: shared.busy() == 0)


def test_gates_are_sent_only_on_request(shared, alone):
    shared.post("/v1/sessions", id="ten", seed=1)
    body = {"prompt": "abc", "max_tokens": 6, "logit_bias": {"256": -100, "97": 100}}
    got = shared.post("/v1/sessions/ten/completions", gates=True, **body)["choices"][0]
    bias = {256: -100.0, 97: 100.0}
    want = alone.answer("abc", seed=1, max_new_tokens=6, logit_bias=bias, norms=True, **PLAIN)
    true = [t for chunk in want for t in chunk.tokens]
    assert [t["id"] for t in got["tokens"]] == [t.id for t in true] == [97] * 6
    for mine, its in zip(got["tokens"], true, strict=True):
        close(torch.tensor(mine["gates"]), torch.from_numpy(its.gates), 1e-3, scale=1.0)
        assert torch.tensor(mine["gates"]).sum(-1).tolist() == pytest.approx([1, 1], abs=2e-3)
        for got, norms in zip(mine["norms"], its.norms, strict=True):
            assert got == pytest.approx(norms.tolist(), rel=6e-4)
            assert all(len(f"{norm:g}".replace(".", "").strip("0")) <= 4 for norm in got)
    assert "tokens" not in shared.post("/v1/sessions/ten/completions", **body)["choices"][0]
    more = {"prompt": "a", "gates": True}
    assert_error(shared.http.post(COMPLETIONS, json=more), 400, "gates")


def test_chats_have_gates_too(shared, strict):
    body = {**HELLO, "max_tokens": 9, "seed": 3, "n": 2}
    plain = shared.post(CHAT, **body)["choices"]
    for server in (shared, strict):  # a field that the server knows
        whole = server.post(CHAT, **body, gates=True)["choices"]
        texts, tokens = ["", ""], [[], []]
        for event in events_of(server, CHAT, **body, gates=True):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
                tokens[choice["index"]] += choice["tokens"]
        assert tokens == [choice["tokens"] for choice in whole]
        assert texts == [choice["message"]["content"] for choice in whole]
        assert texts == [choice["message"]["content"] for choice in plain]
        assert all(token["gates"] and token["norms"] for each in tokens for token in each)
    assert "tokens" not in plain[0] and sum(map(len, tokens)) > 9
    assert_error(shared.http.post(CHAT, json={**body, "gates": "yes"}), 400, "gates")


# ------------------------------------------------------------------------------- session files


def sessions_of(server) -> set[str]:
    return {each["id"] for each in server.http.get("/v1/sessions").json()["data"]}


def state_of(data: bytes) -> bytes:
    """The tensors of a session file, without its notes."""
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_a_session_is_a_file_for_the_console_and_back(folder, tmp_path):
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    with running(library=StreamingServer(folder / "tiny")) as server:
        server.post("/v1/sessions", id="file", seed=3)
        session(server, "file", "abc \N{SNOWMAN}", max_tokens=5)
        answer = server.http.get("/v1/sessions/file/file")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"] == 'attachment; filename="file.safetensors"'
        first.write_bytes(answer.content)
        words = ["--checkpoint", folder / "tiny", "--load_session", first, "--save_session", again]
        done = run_main(streaming.main, *words, "--max_tokens", 0)
        assert done.returncode == 0, done.stderr
        opened = server.http.post(UPLOAD, content=again.read_bytes(), params={"id": "again"})
        assert opened.status_code == 201 and opened.json()["id"] == "again"
        assert opened.json()["turns"] == 2, "an empty one, of the console"
        assert opened.json()["undo"] == 0, "the file has one state"
        kept = server.http.get("/v1/sessions/again/file").content
        assert state_of(kept) == state_of(answer.content)
        same = server.http.post(UPLOAD, content=answer.content).json()
        kept = server.http.get(f"/v1/sessions/{same['id']}/file").content
        assert kept == answer.content
        texts = [session(server, n, "x", max_tokens=20) for n in ("file", "again", same["id"])]
        assert texts[0] == texts[1] == texts[2]
        taken = server.http.post(UPLOAD, content=kept, params={"id": "again"})
        assert_error(taken, 409, "id")
        assert_error(server.http.post(UPLOAD, content=kept, params={"id": "a/b"}), 400, "id")
        server.post("/v1/sessions", id="empty", seed=3)
        empty = server.http.get("/v1/sessions/empty/file").content
        assert_error(server.http.post(UPLOAD, content=empty, params={"id": "again"}), 409, "id")
        opened = server.http.post(UPLOAD, content=empty).json()
        assert (opened["tokens"], opened["turns"], opened["seed"]) == (0, 0, 3)
        for prompt in ("abc", "x"):
            texts = [session(server, n, prompt, max_tokens=9) for n in ("empty", opened["id"])]
            assert texts[0] == texts[1]
        assert_error(server.http.get("/v1/sessions/none/file"), 404, "session_id")


def test_a_file_that_is_no_session_of_this_model_is_refused(shared, tmp_path):
    shared.post("/v1/sessions", id="whole", seed=3)
    session(shared, "whole", "abc", max_tokens=5)
    data, before = shared.http.get("/v1/sessions/whole/file").content, sessions_of(shared)
    stranger = StreamingServer(free_copy(wide(d_state=4)), tokenizer=BYTES)
    backwards = [*byte_alphabet()][::-1]
    (tmp_path / "vocab.txt").write_text("\n".join([*backwards, EOS_TOKEN]) + "\n")
    other = StreamingServer(free_copy(wide()), tokenizer=tmp_path / "vocab.txt")
    bad = {b"": "read", b"no file": "read", data[:-1]: "read", data[:999]: "read"}
    bad[stranger.pack_session(stranger.create_session())] = "of this model"
    bad[other.pack_session(other.create_session())] = "another tokenizer"
    bad[data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]] = "damaged"
    for content, problem in bad.items():
        message = assert_error(shared.http.post(UPLOAD, content=content), 400, "file")["message"]
        assert message.startswith("file: ") and problem in message and "\n" not in message
    for kind in ("application/json", "text/plain", "multipart/form-data; boundary=x"):
        answer = shared.http.post(UPLOAD, content=data, headers={"Content-Type": kind})
        assert "octet-stream" in assert_error(answer, 415)["message"]
    binary = {"Content-Type": "application/octet-stream"}
    assert_error(shared.http.post(CHAT, content=json.dumps(HELLO), headers=binary), 415)
    assert sessions_of(shared) == before


def test_a_flipped_bit_of_a_file_is_an_error_of_one_line(alone):
    data = alone.pack_session(alone.create_session(seed=1))
    head = 8 + int.from_bytes(data[:8], "little")
    random.seed(0)
    places = [*range(8), *random.sample(range(head), 100), *random.sample(range(len(data)), 100)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << random.randrange(8)
        with pytest.raises(UserError, match="^file: [^\n]*$"):
            alone.unpack_session(bytes(damaged), "file")


FORGED = ("created", "used", "turns", "seed", "chat")


@pytest.mark.parametrize(
    "about",
    [
        {"created": 1e999},
        {"used": float("nan")},
        {"created": 10**400},
        {"turns": -1},
        {"seed": 2**63},
        {"config": {"top_p": 2.0}},
        {"config": {"adapter": "none"}},
        {"chat": {"messages": [], "ids": [10**30, *[97] * 512]}},
        {"tensors": "nan"},
    ],
)
def test_a_forged_file_is_an_error_of_one_line(alone, about):
    """Its checksum is right: anybody can compute it."""
    data = alone.pack_session(alone.create_session(seed=1))
    tensors, notes = safetensors.torch.load(data), read_notes(data)
    del notes["checksum"]
    held = json.loads(notes["session"])
    held["config"] |= about.get("config", {})
    notes["session"] = json.dumps({**held, **{n: v for n, v in about.items() if n in FORGED}})
    if "tensors" in about:
        next(t for name, t in tensors.items() if "ssm" in name)[:] = math.nan
    if "chat" in about:
        tensors["position"][:], tensors["recent"][:] = 513, 97
    with pytest.raises(UserError) as caught:
        alone.unpack_session(pack_tensors(tensors, notes), "file")
    assert "\n" not in str(caught.value)


def test_a_file_gives_nothing_but_the_text(shared, alone):
    """Not the turns of a store, whose answers it has, nor a setting that a request would not."""
    alone.create_session("from", seed=1, config=StreamingConfig(prompt_logprobs=3))
    alone.generate_text("abc", "from", max_new_tokens=3)
    made = alone.find("from")
    made.keys, made.reply, made.created = {"a": "b"}, {"choices": []}, 1.0
    kept = shared.http.post(UPLOAD, content=alone.pack_session("from", "stamp")).json()
    del alone.sessions["from"]
    assert kept["created"] > 1e9
    opened = shared.api.server.find(kept["id"])
    assert (opened.keys, opened.reply) == ({}, None) and opened.before
    body = {"prompt": "ab", "max_tokens": 2, "gates": True, "logit_bias": {"256": -100}}
    answer = shared.post(f"/v1/sessions/{kept['id']}/completions", **body)
    assert len(answer["choices"][0]["tokens"]) == 2
    assert shared.post(f"/v1/sessions/{kept['id']}/rollback")["turns"] == 1


def test_files_need_the_key_and_room_and_have_a_limit():
    key = {"Authorization": "Bearer key"}
    with running(api_key="key", max_sessions=3, max_body=100, strict=True) as server:
        server.http.headers.update(key)
        server.post("/v1/sessions", id="one", seed=1)
        data = server.http.get("/v1/sessions/one/file").content
        assert len(data) > 100 and server.api.max_file > len(data)
        for large in (bytes(server.api.max_file + 1), bytes(2**24)):
            for content in (large, (large[i : i + 2**16] for i in range(0, len(large), 2**16))):
                error = assert_error(server.http.post(UPLOAD, content=content), 413)
                assert str(server.api.max_file) in error["message"]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            made = list(pool.map(lambda _: server.http.post(UPLOAD, content=data), range(6)))
        assert sorted(answer.status_code for answer in made) == [201, 201, 429, 429, 429, 429]
        for name in sessions_of(server):
            got = server.http.get(f"/v1/sessions/{name}/file").content
            assert got == data
        bare = {"Authorization": "Bearer other"}
        assert_error(server.http.get("/v1/sessions/one/file", headers=bare), 401)
        assert_error(server.http.post(UPLOAD, content=data, headers=bare), 401)


def test_the_number_of_sessions_is_limited():
    with running(max_sessions=2) as server:
        for _ in range(2):
            server.post("/v1/sessions")
        for path in ("/v1/sessions", f"/v1/sessions/{list(server.api.server.sessions)[0]}/fork"):
            assert assert_error(server.http.post(path), 429)["code"] == "too_many_sessions"


# ------------------------------------------------------------------------ start, end, the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model on disk, with its tokenizer."""
    place = tmp_path_factory.mktemp("model")
    (place / "tiny").mkdir()
    save_folder(place / "tiny", free_copy(wide()))
    (place / "tiny" / "vocab.txt").write_text("\n".join([*byte_alphabet(), EOS_TOKEN]) + "\n")
    return place


@contextlib.contextmanager
def process(folder: Path, *words):
    """serve.py as a user runs it; gives the process and its address."""
    command = [sys.executable, str(ROOT / "serve.py"), "--checkpoint", "tiny", "--port", "0"]
    command += words
    child = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        said = child.stdout.readline()
        assert said.startswith("serving tiny at http://127.0.0.1:"), child.stderr.read()
        yield child, said.split()[-1]
    finally:
        child.kill()
        child.communicate()


def test_sigterm_finishes_what_it_can_and_undoes_the_rest(folder):
    words = ("--session_dir", "kept", "--keep_sessions", "--grace", "1")
    with process(folder, *words) as (child, url), httpx.Client(base_url=url, timeout=30) as http:
        for name in ("short", "long"):
            http.post("/v1/sessions", json={"id": name, "seed": 1})
            http.post(f"/v1/sessions/{name}/completions", json={"prompt": "ab", "max_tokens": 3})
        before = http.get("/v1/sessions/long").json()["tokens"]
        with (
            http.stream(
                "POST",
                "/v1/sessions/long/completions",
                json={"prompt": "c", "stream": True, **ENDLESS},
            ) as endless,
            http.stream(
                "POST",
                "/v1/sessions/short/completions",
                json={"prompt": "c", "stream": True, **ENDLESS, "max_tokens": 40},
            ) as brief,
        ):
            lines, others = endless.iter_lines(), brief.iter_lines()
            next(lines), next(others)
            child.send_signal(signal.SIGTERM)
            assert [line for line in others if line][-1] == "data: [DONE]"
            error = json.loads([line for line in lines if line][-1][6:])["error"]
            assert error["code"] == "shutting_down"
        with pytest.raises(httpx.TransportError):
            httpx.get(url + "/health")
        assert child.wait(20) == -signal.SIGTERM
        assert child.stderr.read() == ""
    with process(folder, *words) as (child, url), httpx.Client(base_url=url, timeout=30) as http:
        held = {s["id"]: s["tokens"] for s in http.get("/v1/sessions").json()["data"]}
        assert held["long"] == before and held["short"] > before
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130


def test_the_grace_time_is_for_running_answers_only():
    with (
        running(grace=20) as server,
        server.http.stream(
            "POST", COMPLETIONS, json={"prompt": "a", "stream": True, **ENDLESS, "max_tokens": 400}
        ) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        server.api.draining = True  # the first effect of a shutdown
        for method, path in (("GET", "/health"), ("POST", COMPLETIONS)):
            assert httpx.request(method, server.url + path).status_code == 503
        server.server.should_exit = True
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--port", "70000"], "--port"),
        (["--max_queue", "-1"], "--max_queue"),
        (["--keep_sessions"], "--session_dir"),
        (["--checkpoint", "nothing.pt"], "nothing.pt"),
        (["--dtype", "int3"], "--dtype"),
        (["--prot", "1"], "--port"),
        (["--checkpoint", "tiny", "--session_dir", "tiny/vocab.txt"], "--session_dir"),
    ],
)
def test_a_wrong_command_is_rejected(folder, words, fragment):
    assert_refused(run_main(serve.main, *words, cwd=folder), fragment)


def test_every_flag_is_explained(folder):
    done = run_main(serve.main, "--help", cwd=folder)
    assert done.returncode == 0 and done.stderr == ""
    said = done.stdout.partition("options:")[2]
    for option in (field.name for field in dataclasses.fields(Options)):
        assert re.search(rf"--{option} \[?[A-Z]+\]? +[a-z]", said), option


def test_a_port_in_use(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_main(serve.main, "--checkpoint", "tiny", "--port", port, cwd=folder)
        assert_refused(done, "--port", str(port))


def test_a_missing_package_is_named(folder, tmp_path):
    for name in serve.PACKAGES:
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nreal = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, p=None: None if n == 'fastapi' else real(n, p)\n"
    )
    done = run_script("serve.py", cwd=folder, env={"PYTHONPATH": str(tmp_path)})
    assert_refused(done, "fastapi: is not installed; pip install fastapi")


def test_an_adapter_is_a_model_of_its_own(tmp_path):
    save_adapter(adapted(AdapterConfig()), tmp_path / "lora")
    with running(adapters={"adapter": tmp_path / "lora"}) as server:
        names = [card.id for card in server.ai.models.list()]
        assert names == [NAME, f"{NAME}:adapter"]
        got = {
            name: server.ai.completions.create(model=name, prompt="ab", seed=1, max_tokens=20)
            for name in names
        }
        assert got[names[0]].choices[0].text != got[names[1]].choices[0].text
        usual = server.post(COMPLETIONS, prompt="ab", seed=1, max_tokens=20)
        assert usual["model"] == names[1]
        assert usual["choices"][0]["text"] == got[names[1]].choices[0].text
        library = server.api.server
        for name, adapter in zip(names, (None, "adapter"), strict=True):
            assert got[name].choices[0].text == library.generate_text(
                "ab", seed=1, max_new_tokens=20, adapter=adapter, **PLAIN
            )
        embed = functools.partial(server.ai.embeddings.create, input="ab")
        vectors = {name: embed(model=name).data[0].embedding for name in names}
        assert vectors[names[0]] != vectors[names[1]]
        assert vectors[names[1]] == library.embed("ab", "adapter").tolist()
        answer = server.ai.completions.create(
            model=names[0], prompt="ab", seed=1, max_tokens=20, stream=True
        )
        text = ""
        for part in answer:  # an embedding between two steps leaves the answer's adapter alone
            text += part.choices[0].text
            assert embed(model=names[1]).data[0].embedding == vectors[names[1]]
        assert text == got[names[0]].choices[0].text


PAGE = (ROOT / "page.html").read_text(encoding="utf-8")


def test_the_page_runs_no_script_but_its_own(shared):
    answer = shared.http.get("/")
    assert answer.text == PAGE and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_openapi_describes_the_routes(shared, strict):
    document = shared.http.get("/openapi.json").json()
    routes = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert ("POST", COMPLETIONS) in routes and ("POST", "/v1/sessions/{session_id}/fork") in routes
    assert "422" not in json.dumps(document["paths"])
    upload = document["paths"]["/v1/sessions/file"]["post"]
    download = document["paths"]["/v1/sessions/{session_id}/file"]["get"]
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    assert upload["requestBody"] == {"content": binary, "required": True}
    assert download["responses"]["200"]["content"] == binary
    assert [p["name"] for p in upload["parameters"]] == ["id"] and "201" in upload["responses"]
    documents = (document, strict.http.get("/openapi.json").json())
    for described, unknown in zip(documents, (True, False), strict=True):
        body = described["components"]["schemas"]["CompletionBody"]
        assert body["required"] == ["prompt"] and body.get("additionalProperties", True) is unknown
        assert described["components"]["schemas"]["SaveBody"]["additionalProperties"] is False


# -------------------------------------------------------------------------- structured output

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"enum": [1, 20, 300]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Person(pydantic.BaseModel):
    """The same for the client, which makes the schema and reads the answer."""

    model_config = {"extra": "forbid"}
    name: str = pydantic.Field(max_length=5)
    age: typing.Literal[1, 20, 300]


def as_schema(schema: dict) -> dict:
    """The response format of a schema."""
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_openai_client_parses_its_own_types(shared, temperature):
    asked = {"model": NAME, "temperature": temperature, "seed": 1, "max_tokens": 300}
    got = shared.ai.chat.completions.parse(response_format=Person, n=2, **asked, **HELLO)
    assert all(isinstance(choice.message.parsed, Person) for choice in got.choices)
    assert {choice.finish_reason for choice in got.choices} == {"stop"}


def test_streamed_forms_equal_whole_ones(shared):
    """With stop strings, biases, logprobs and several answers; eos ends none too early."""
    bias = {"256": 50, "34": 4, "125": 3}  # eos, and what ends strings and objects
    asked = {"n": 3, "seed": 2, "max_tokens": 90, "logit_bias": bias, "stop": ["\0"], "logprobs": 1}
    for more in (
        {"response_format": as_schema(PERSON)},
        {"response_format": {"type": "json_object"}},
    ):
        whole = shared.post(COMPLETIONS, prompt="x", **asked, **more)["choices"]
        stream = {"model": NAME, "prompt": "x", "stream": True, "extra_body": more, **asked}
        texts = [""] * 3
        for part in shared.ai.completions.create(**stream):
            for choice in part.choices:
                texts[choice.index] += choice.text
        assert texts == [choice["text"] for choice in whole] and len({*texts}) > 1
        for choice in whole:
            assert choice["finish_reason"] == "stop" and isinstance(
                json.loads(choice["text"]), dict
            )
            assert len(choice["logprobs"]["tokens"]) >= len(choice["text"])  # a byte each


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]+z"}, "[0-9]{3}-[a-f]+z"),
        ({"choice": ["yes", "no", "user: ?"]}, r"yes|no|user: \?"),
        ({"grammar": 'root ::= "a" | "b" root', "regex": None}, "b*a"),
        ({"json": json.dumps({"const": [1]})}, r"\[\s*1\s*\]"),
    ],
)
def test_forms_as_vllm_names_them(shared, form, pattern):
    shared.post("/v1/sessions", id="formed")
    paths = [(COMPLETIONS, {"prompt": "x"}), (CHAT, HELLO)]
    paths.append(("/v1/sessions/formed/completions", {"prompt": "x"}))
    for path, body in paths:
        got = shared.post(path, **body, structured_outputs=form, max_tokens=200)["choices"][0]
        text = got["message"]["content"] if path == CHAT else got["text"]
        assert got["finish_reason"] == "stop" and re.fullmatch(pattern, text)
    free = shared.post("/v1/sessions/formed/completions", prompt="y", max_tokens=30)["choices"][0]
    assert not re.fullmatch(pattern, free["text"])
    shared.http.delete("/v1/sessions/formed")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": as_schema({"type": "strin"})}, "response_format.json_schema.schema"),
        (
            {"response_format": as_schema({"pattern": "(?=a)"})},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
    ],
)
def test_an_invalid_form_starts_nothing(shared, more, param):
    """Nor does it change a session."""
    before = shared.post("/v1/sessions", id="kept")
    session = "/v1/sessions/kept/completions"
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, HELLO), (session, {"prompt": "a"})):
        error = assert_error(shared.http.post(path, json={**body, **more}), 400, param)
        assert param in error["message"] and "\n" not in error["message"]
    assert shared.api.pending == 0
    after = shared.http.get("/v1/sessions/kept").json()
    assert after["tokens"] == before["tokens"] == 0
    shared.http.delete("/v1/sessions/kept")


def test_others_are_answered_while_a_grammar_is_compiled(shared, monkeypatch):
    compiling, go_on = threading.Event(), threading.Event()
    usual = structured.make_rule

    def slow(*arguments):
        compiling.set()
        assert go_on.wait(30)
        return usual(*arguments)

    monkeypatch.setattr(structured, "make_rule", slow)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a", "structured_outputs": {"regex": "slow[0-9]"}}
        formed = pool.submit(shared.post, COMPLETIONS, **body)
        assert compiling.wait(30)
        assert shared.post(COMPLETIONS, prompt="b", max_tokens=3)["choices"]
        assert not formed.done()
        go_on.set()
        assert re.fullmatch("slow[0-9]", formed.result()["choices"][0]["text"])


def test_requests_that_wait_for_a_grammar_are_in_the_queue(monkeypatch):
    compiling, go_on, made = threading.Event(), threading.Event(), []

    def slow(library, kind, text):
        made.append(text)
        compiling.set()
        assert go_on.wait(30)
        return usual(library, kind, text)

    usual = structured.make_rule
    monkeypatch.setattr(structured, "make_rule", slow)
    bodies = [{"prompt": "a", "structured_outputs": {"regex": f"{n}[0-9]"}} for n in range(3)]
    with (
        running(batch_size=1, max_queue=1) as server,
        httpx.Client(base_url=server.url) as gone,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(server.post, COMPLETIONS, **bodies[0])
        assert compiling.wait(30)
        with pytest.raises(httpx.ReadTimeout):
            gone.post(COMPLETIONS, json=bodies[1], timeout=httpx.Timeout(30, read=0.05))
        assert_error(server.http.post(COMPLETIONS, json=bodies[2]), 429)
        gone.close()
        go_on.set()
        assert first.result()["choices"][0]["finish_reason"] == "stop"
        wait_until(lambda: server.api.pending == 0)
    assert made == ["0[0-9]"], "nothing is compiled for a client that has gone"


def test_a_server_without_the_library_says_what_to_install(shared, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"prompt": "a", "response_format": as_schema({"const": "not compiled before"})}
    error = assert_error(
        shared.http.post(COMPLETIONS, json=body), 400, "response_format.json_schema.schema"
    )
    assert "pip install llguidance" in error["message"]
    assert shared.post(COMPLETIONS, prompt="b", max_tokens=3)["choices"]


# ------------------------------------------------------------------------------- other clients


@pytest.mark.parametrize("phase", ["fuzzing", pytest.param("coverage", marks=pytest.mark.slow)])
def test_schemathesis_finds_no_error(phase, tmp_path):
    """Random requests, valid and invalid, get the responses that /openapi.json describes.

    Left out is that all that fits the document is taken: ids beyond the vocabulary are not, nor
    best_of without n.
    """
    with running(max_tokens=4, api_key="key", session_dir=str(tmp_path)) as server:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from schemathesis.cli import schemathesis; schemathesis()",
                "run",
                server.url + "/openapi.json",
                "--header",
                "Authorization: Bearer key",
                "--max-examples",
                "6",
                "--phases",
                phase,
                "--generation-deterministic",
                "--exclude-checks",
                "positive_data_acceptance",
                "--no-color",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        wait_until(lambda: server.api.pending == 0 and server.busy() == 0)


def test_lm_eval_gets_the_models_likelihoods(shared, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from hf_integration import TinyMambaHFTokenizer

    chance, pairs = random.Random(0), []
    for _ in range(24):
        text = "".join(chance.choices("etaoin shrdlu\n", k=chance.randrange(2, 80)))
        cut = chance.randrange(1, len(text))
        context = text[:cut].rstrip() or "x"  # lm-eval moves spaces to the continuation
        pairs.append((context, text[cut:]))
    ids = BYTES.encode("abc")  # one continuation that is the model's first choice
    pairs.append(("abc", BYTES.decode([int(wide()(torch.tensor([ids]))[0, -1].argmax())])))
    TinyMambaHFTokenizer.of(BYTES).save_pretrained(tmp_path)
    model = LocalCompletionsAPI(
        base_url=shared.url + COMPLETIONS,
        model=NAME,
        batch_size=4,
        tokenizer=str(tmp_path),
        max_retries=1,
        tokenizer_backend="huggingface",
    )
    got = model.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    for (context, rest), (logprob, greedy) in zip(pairs, got, strict=True):
        before, after = BYTES.encode(context), BYTES.encode(rest)
        true = log_softmax([*before, *after])[len(before) - 1 : -1]
        assert logprob == pytest.approx(
            float(true.gather(1, torch.tensor(after)[:, None]).sum()), abs=1e-3
        )
        assert greedy == (true.argmax(-1).tolist() == after)
