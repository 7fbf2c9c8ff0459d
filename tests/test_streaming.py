"""Streaming: sampling, text, sessions of constant size, many answers at once, files, console."""

import contextlib
import functools
import inspect
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    DOCUMENTS,
    POSIX,
    ROOT,
    adapted,
    assert_refused,
    close,
    examples,
    free_copy,
    most_memory,
    run_main,
    run_script,
    some_ids,
    tiny_config,
    wide,
)
from hypothesis import given
from hypothesis import strategies as st

import streaming
from peft import AdapterConfig
from quantize import quantize_model
from streaming import (
    MARK,
    Answer,
    StreamingConfig,
    StreamingInference,
    StreamingServer,
    TextStream,
    choose,
    draw,
    probabilities,
)
from testv2 import TinyMambaModel
from tinymamba.checkpoint import STATE_FORMAT, digest, save_checkpoint, write_tensors
from tinymamba.cli import UserError, run_cli
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_alphabet

GREEDY = {"temperature": 0.0}
BYTES = SimpleTokenizer()


def serve(model=None, **fields) -> StreamingServer:
    """A server of a small model over bytes, greedy unless told otherwise."""
    config = StreamingConfig(**{"temperature": 0.0, "max_new_tokens": 12, **fields})
    return StreamingServer(free_copy(model or wide()), config=config, tokenizer=BYTES)


def tokens_of(answer: Answer) -> list[int]:
    return [token.id for chunk in answer for token in chunk.tokens]


def next_logits(server: StreamingServer, session: str) -> torch.Tensor:
    """Logits (v,) of the next token of a session."""
    return torch.from_numpy(server.decoder.read_unread(server.find(session).now, None).logits)


def assert_has_read(server: StreamingServer, session: str, ids: list[int]) -> None:
    """The session is what a full pass over these ids gives."""
    info = server.get_session_info(session)
    assert info["position"] == len(ids)
    close(next_logits(server, session), server.model(torch.tensor([ids]))[0, -1], 1e-4)


# ------------------------------------------------------------------------------------ sampling


def by_transformers(logits, recent, c) -> np.ndarray:
    from transformers import generation as g

    x, ids = torch.from_numpy(logits)[None], torch.tensor([recent], dtype=torch.int64)
    steps = [g.TemperatureLogitsWarper(c.temperature)]
    if c.repetition_penalty != 1.0 and recent:
        steps.insert(0, g.RepetitionPenaltyLogitsProcessor(c.repetition_penalty))
    if c.top_k:
        steps.append(g.TopKLogitsWarper(c.top_k))
    if c.top_p < 1:
        steps.append(g.TopPLogitsWarper(c.top_p))
    if c.min_p:
        steps.append(g.MinPLogitsWarper(c.min_p))
    for step in steps:
        x = step(ids, x)
    return x.softmax(-1)[0].numpy()


@examples(300)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 40),
    temperature=st.floats(0.05, 4),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.5, 3),
    recent=st.lists(st.integers(0, 1), max_size=4),
)
def test_probabilities_equal_those_of_transformers(
    seed, size, temperature, top_k, top_p, min_p, penalty, recent
):
    c = StreamingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    logits = np.random.default_rng(seed).normal(0, 3, size)
    p = probabilities(logits, recent, c)
    assert p.sum() == pytest.approx(1.0) and (p >= 0).all()
    np.testing.assert_allclose(p, by_transformers(logits, recent, c), atol=1e-9)


@examples(100)
@given(
    seed=st.integers(0, 10**6),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    made=st.lists(st.integers(0, 7), max_size=12),
)
def test_penalties_are_openais(seed, presence, frequency, made):
    """By the formula of their documentation, one id after the other, before the temperature."""
    c = StreamingConfig(
        temperature=0.7, top_k=0, presence_penalty=presence, frequency_penalty=frequency
    )
    logits = np.random.default_rng(seed).normal(0, 3, 8)
    want = logits.copy()
    for i in range(8):
        want[i] -= made.count(i) * frequency + float(made.count(i) > 0) * presence
    p = probabilities(logits, (), c, Counter(made))
    np.testing.assert_allclose(p, by_transformers(want, (), c), atol=1e-9)
    assert np.array_equal(probabilities(logits, (), c), probabilities(logits, (), c, {}))


def test_penalties_count_the_answer_alone_and_travel_with_a_session(tmp_path, monkeypatch):
    """Not the prompt, as the repetition penalty does; a long answer is counted to its end."""
    monkeypatch.setattr(streaming, "MAX_REPLAY", 16)
    server = serve(temperature=0.0, top_k=0, presence_penalty=2.0, logit_bias={5: 9.0})
    prompt, session = some_ids(1, 30).tolist()[0], server.create_session()
    for _ in range(2):
        answer = server.answer(prompt, session, as_ids=True, max_new_tokens=40)
        ids = [token.id for chunk in answer for token in chunk.tokens]
        assert answer.counts == Counter(ids) and len(answer.ids) < 40
    server.save_session(session, tmp_path / "s.safetensors")
    again = server.load_session(tmp_path / "s.safetensors")
    assert server.find(again).config.presence_penalty == 2.0
    _, settings = streaming.parse(["--presence_penalty", "1", "--frequency_penalty", "-0.5"])
    assert settings == {"presence_penalty": 1.0, "frequency_penalty": -0.5}


LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0], np.float32)


@pytest.mark.parametrize(
    ("words", "alive"),
    [
        ({"temperature": 0.0}, {1}),
        ({"top_k": 1}, {1}),
        ({"top_p": 0.0}, {1}),
        ({"min_p": 1.0}, {1}),
        ({"temperature": 1e-300}, {1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"logit_bias": dict.fromkeys((0, 1, 3, 4), -math.inf)}, {2}),
        ({"pad_token_id": 1}, {0, 2, 3, 4}),
        ({"logit_bias": {2: 100.0}, "temperature": 0.0}, {2}),
        ({"logit_bias": {1: -math.inf}, "temperature": 0.0}, {3}),
    ],
)
def test_extreme_settings_of_sampling(words, alive):
    p = probabilities(LOGITS, (), StreamingConfig(**{"temperature": 1.0, "top_k": 0, **words}))
    assert set(p.nonzero()[0]) == alive and p.sum() == pytest.approx(1.0)


def test_banning_every_token_and_logits_of_nan_are_rejected():
    nothing = StreamingConfig(logit_bias=dict.fromkeys(range(5), -math.inf))
    with pytest.raises(UserError, match="every token is banned"):
        probabilities(LOGITS, (), nothing)
    with pytest.raises(UserError, match="not finite"):
        probabilities(LOGITS * np.nan, (), StreamingConfig())


def test_draws_follow_their_probabilities_and_are_a_pure_function():
    p = np.array([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = [draw(p, 7, position) for position in range(20_000)]
    assert drawn == [draw(p, 7, position) for position in range(20_000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=6) / 20_000, p, atol=0.015)
    assert drawn != [draw(p, 8, position) for position in range(20_000)]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1.0}])
def test_the_chosen_token_is_a_draw_by_the_probabilities(settings):
    logits = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    config, counts = StreamingConfig(**settings, repetition_penalty=1.5, seed=3), Counter([2, 5])
    for position, row in enumerate(logits):
        p = probabilities(row, [1, 2], config, counts)
        assert choose(row, [1, 2], config, counts, position) == draw(p, 3, position)


def test_the_penalty_applies_to_the_window_only():
    server = serve(repetition_penalty=1000.0, repetition_window=3)
    ids = tokens_of(server.answer(list(range(1, 20)), as_ids=True, max_new_tokens=40))
    assert all(i not in ids[max(0, n - 3) : n] for n, i in enumerate(ids))
    assert len(set(ids)) < len(ids), "outside the window, a token is allowed again"
    assert max(ids.count(i) for i in ids) > 1
    plain = serve(repetition_penalty=1000.0, repetition_window=0)
    assert tokens_of(plain.answer([5, 6], as_ids=True)) == tokens_of(
        serve().answer([5, 6], as_ids=True)
    )


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_window", 10**6),
        ("max_new_tokens", -1),
        ("max_new_tokens", 2.5),
        ("stop", [""]),
        ("stop", "abc"),
        ("stop_ids", [257]),
        ("logit_bias", {400: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("seed", -1),
        ("logprobs", 300),
        ("batch_size", 0),
        ("logit_bias", {1: 10**400}),
        ("logit_bias", [1]),
        ("stop_ids", 0),
        ("temperature", 10**400),
        ("batch_size", 2),
        ("state_buffer_size", 0),
        ("eos_token_id", 257),
        ("pad_token_id", -1),
        ("topk", 3),
    ],
)
def test_bad_settings_are_rejected_by_name_and_change_nothing(field, value):
    server = serve(eos_token_id=-1)
    session = server.create_session()
    with pytest.raises(UserError, match=field):
        server.generate_text("a", session, **{field: value})
    assert server.get_session_info(session)["position"] == 0
    assert len(tokens_of(server.answer("a", session, as_ids=True))) == 12


# ------------------------------------------------------------------------------------ text


class Vocabulary:
    """Ids of any byte strings, as a tokenizer."""

    eos_token_id = None

    def __init__(self, *tokens: bytes):
        self.tokens = tokens

    def decode(self, ids) -> str:
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")

    def encode(self, text: str) -> list[int]:
        ids, data = [], text.encode()
        while data:
            ids.append(next(i for i, token in enumerate(self.tokens) if data.startswith(token)))
            data = data[len(self.tokens[ids[-1]]) :]
        return ids


def streamed(tokenizer, ids, stops=()) -> tuple[list[str], bool]:
    stream, texts = TextStream(tokenizer, [], list(stops)), []
    for i in ids:
        texts.append(stream.push(i))
        if stream.stopped:
            return texts, True
    return [*texts, stream.finish()], False


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "words", "byte tokens", "json"])
@examples(40)
@given(text=st.text(max_size=30) | st.sampled_from(["日本語🙂", "e\u0301 שלום", "a\ufffdb"]))
def test_streamed_text_is_the_text_in_whole_characters(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    texts, _ = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(texts) == text.replace(MARK, "")
    assert not any(MARK in part for part in texts)


@examples(200)
@given(data=st.binary(max_size=24), cut=st.integers(1, 3))
def test_bytes_that_are_not_a_character_are_left_out(data, cut):
    tokens = [data[i : i + cut] for i in range(0, len(data), cut)]
    texts, _ = streamed(Vocabulary(*tokens), range(len(tokens)))
    want = data.decode(errors="ignore")
    assert "".join(texts) == want


@examples(300)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cut=st.integers(1, 4),
)
def test_stop_strings_end_the_text_and_are_never_part_of_it(text, stops, cut):
    tokens = [text[i : i + cut].encode() for i in range(0, len(text), cut)]
    texts, stopped = streamed(Vocabulary(*tokens), range(len(tokens)), stops)
    got, seen = "".join(texts), ""
    for part in texts:
        seen += part
        assert not any(stop in seen for stop in stops)
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert stopped == bool(found)
    assert text.startswith(got) and (found or got == text)
    if stopped:  # it ends where a stop begins, the first one that was complete
        assert any(text.startswith(stop, len(got)) for stop in stops)


# ------------------------------------------------------------------------------------ sessions


@pytest.mark.parametrize("seed, sessions", [(0, 30), pytest.param(1, 300, marks=pytest.mark.slow)])
def test_random_sessions_equal_a_full_pass(seed, sessions):
    """Random prompts, and answers closed at random places."""
    rng, server = random.Random(seed), serve(state_buffer_size=3)
    for number in range(sessions):
        session, ids = server.create_session(), []
        for _ in range(rng.randint(1, 4)):
            prompt = some_ids(1, rng.randint(0 if ids else 1, 30), seed=rng.random()).tolist()[0]
            settings = {
                "max_new_tokens": rng.randint(0, 20),
                "top_k": 40,
                "seed": number,
                "temperature": rng.choice([0.0, 1.0]),
            }
            ids += prompt
            with contextlib.closing(
                server.answer(prompt, session, as_ids=True, **settings)
            ) as answer:
                for chunk in answer:
                    ids += [token.id for token in chunk.tokens]
                    if rng.random() < 0.1:
                        break
        assert_has_read(server, session, ids)


def test_a_session_ends_where_its_reader_closed_the_stream():
    for taken in range(8):
        server = serve(temperature=1.0, seed=3, top_k=0)
        session = server.create_session()
        stream = server.generate_stream("Hello", session, max_new_tokens=30)
        assert inspect.isgenerator(stream)
        text = "".join(next(stream) for _ in range(taken))
        stream.close()
        if taken == 0:  # it never began
            assert server.get_session_info(session)["position"] == 0
            continue
        read = server.find(session).now.recent
        assert BYTES.decode(read).replace(MARK, "") == "Hello" + text
        assert_has_read(server, session, list(read))


def test_a_stop_string_is_neither_returned_nor_read():
    server = serve(temperature=1.0, top_k=0, seed=5)
    whole = server.generate_text("Hello", max_new_tokens=60)
    for size in (1, 2, 3, 5):
        stop, session = whole[10 : 10 + size], server.create_session(seed=5)
        answer = server.answer("Hello", session, max_new_tokens=60, stop=[stop, "never there"])
        text = "".join(chunk.text for chunk in answer)
        assert answer.finish_reason == "stop"
        assert text == whole[: whole.index(stop)]
        read = server.find(session).now.recent
        assert BYTES.decode(read).replace(MARK, "") == "Hello" + text
        assert_has_read(server, session, list(read))


def test_text_before_a_stop_string_inside_a_token_is_kept():
    tokenizer = Vocabulary(b"ab<", b"!>c", *(bytes([b]) for b in range(255)))
    server = StreamingServer(
        free_copy(wide()),
        tokenizer=tokenizer,
        config=StreamingConfig(
            temperature=0.0, stop=["<!>"], max_new_tokens=2, logit_bias={0: 1000.0}
        ),
    )
    session = server.create_session()
    answer = server.answer("x", session)
    first = next(answer)
    assert (first.text, answer.partial_text) == ("ab", "ab")
    answer.config.logit_bias = {1: 1000.0}
    assert "".join(chunk.text for chunk in answer) == "" and answer.finish_reason == "stop"
    read = server.find(session).now.recent
    assert tokenizer.decode(read) == "xab"
    assert_has_read(server, session, list(read))


def test_text_before_an_incomplete_character_is_read_as_it_was_returned():
    tokenizer = Vocabulary(b"ab\xc3", *(bytes([b]) for b in range(256)))
    server = StreamingServer(
        free_copy(wide()),
        tokenizer=tokenizer,
        config=StreamingConfig(temperature=0.0, max_new_tokens=1, logit_bias={0: 1000.0}),
    )
    session = server.create_session()
    assert server.generate_text("x", session) == "ab"
    assert tokenizer.decode(server.find(session).now.recent) == "xab"


def test_words_are_encoded_and_decoded_in_context(tmp_path):
    """A tokenizer that begins every text with a space, and has special tokens without text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {
        word: i
        for i, word in enumerate(
            ["<unk>", "\u2581hello", "\u2581a", "\u2581ac", "c", "\u2581", "<s>", "\u2581b"]
        )
    }
    library = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.add_special_tokens(["<s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = SimpleTokenizer(tmp_path / "tokenizer.json")
    ids = [words["\u2581hello"], words["\u2581a"]]
    assert tokenizer.decode(streaming.append_text(tokenizer, ids, "c")) == "hello ac"
    assert streaming.append_text(tokenizer, ids, "") == ids
    texts, _ = streamed(tokenizer, [words["\u2581b"], words["<s>"], words["\u2581hello"]])
    assert "".join(texts) == tokenizer.decode([words["\u2581b"], words["\u2581hello"]])


def test_text_held_for_a_stop_string_is_returned_at_the_end():
    server = serve()
    text = server.generate_text("Hello", max_new_tokens=20)
    assert server.generate_text("Hello", max_new_tokens=20, stop=[text[-1] + "zzz"]) == text


def test_a_long_answer_keeps_only_its_last_part(monkeypatch):
    monkeypatch.setattr(streaming, "MAX_REPLAY", 16)
    server = serve(temperature=1.0, top_k=0, eos_token_id=-1)
    session, ids = server.create_session(seed=1), []
    with contextlib.closing(server.answer([7], session, as_ids=True, max_new_tokens=200)) as answer:
        for chunk in answer:
            ids += [token.id for token in chunk.tokens]
            assert len(answer.ids) <= 17
            if len(ids) == 150:
                break
    assert_has_read(server, session, [7, *ids])
    alone = server.answer([7], as_ids=True, max_new_tokens=200, seed=1)
    assert tokens_of(alone)[:150] == ids
    other = server.answer([9], as_ids=True, max_new_tokens=100)
    again = server.answer([7], server.create_session("a", seed=1), as_ids=True, max_new_tokens=100)
    for _ in range(90):  # in turns, so that there are always tokens made ahead
        next(other), next(again)
        assert len(again.ids) <= 16 + 17
    again.close()
    assert_has_read(server, "a", [7, *ids[:90]])


def test_eos_ends_an_answer_and_reset_on_eos_clears_the_session():
    first = tokens_of(serve().answer("Hello", as_ids=True))[4]
    for reset in (False, True):
        server = serve(eos_token_id=first, reset_on_eos=reset)
        session = server.create_session()
        answer = server.answer("Hello", session, as_ids=True)
        ids = tokens_of(answer)
        assert answer.finish_reason == "stop" and first not in ids
        if reset:
            assert server.get_session_info(session)["position"] == 0
        else:
            assert_has_read(server, session, [*BYTES.encode("Hello"), *ids])
    assert tokens_of(serve(stop_ids=[first]).answer("Hello")) == ids
    assert tokens_of(serve(eos_token_id=-1).answer("Hello", as_ids=True))[4] == first


def test_the_first_token_of_a_session():
    server = serve(bos_token_id=9)
    session = server.create_session()
    server.generate_text("ab", session, max_new_tokens=0)
    server.generate_text("cd", session, max_new_tokens=0)
    assert_has_read(server, session, [9, *BYTES.encode("abcd")])
    plain = serve()
    empty = plain.create_session()
    plain.generate_text("", empty, max_new_tokens=0)
    assert_has_read(plain, empty, [BYTES.eos_token_id])
    with pytest.raises(UserError, match="prompt: is empty"):
        serve(eos_token_id=-1).generate_text("")
    assert serve().generate_text(BYTES.encode("Hello")) == serve().generate_text("Hello")


def test_logprobs_are_the_models_own():
    server = serve(temperature=2.0, top_k=3, seed=1, logit_bias={5: 9.0})
    answer = server.answer("Hello", as_ids=True, logprobs=4, max_new_tokens=5)
    ids = BYTES.encode("Hello")
    for chunk in answer:
        (token,) = chunk.tokens
        want = server.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(want[token.id].item(), abs=1e-4)
        assert [i for i, _ in token.top] == want.topk(4).indices.tolist()
        np.testing.assert_allclose([p for _, p in token.top], want.topk(4).values, atol=1e-4)
        ids.append(token.id)
    assert all(t.logprob is None for c in server.answer("a", as_ids=True) for t in c.tokens)


def test_gates_are_those_of_the_token_that_predicts():
    server, ids = serve(), BYTES.encode("Hello")
    for chunk in server.answer("Hello", as_ids=True, max_new_tokens=5):
        (token,) = chunk.tokens
        _, gates = server.model(torch.tensor([ids]), return_gates=True)
        np.testing.assert_allclose(token.gates, gates[:, 0, -1], atol=1e-5)
        ids.append(token.id)


@torch.no_grad()
def assert_norms(model, ids: list[int], tokens: list) -> None:
    """Each of the tokens after these ids has the norms of the state from which it was drawn."""
    state = model.init_state(1)
    for token in tokens:
        _, state = model.advance(torch.tensor([ids]), state)
        assert len(token.norms) == len(state.layers)
        for got, layer in zip(token.norms, state.layers, strict=True):
            heads = [*layer.ssm[0], *(() if layer.memory is None else layer.memory[0])]
            want = [h.double().square().sum().sqrt().item() for h in heads]
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
        ids = [token.id]


NORMS = {
    "live": lambda: wide(n_layer=3),
    "documents": lambda: wide(**DOCUMENTS),
    "sparse gates and no memory": lambda: wide(gate="top_k", memory=False),
    "adapter": lambda: adapted(AdapterConfig()),
    "quantized": lambda: quantize_model(wide(), 8, "weight_only", 16),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_those_of_the_state_that_predicts(kind):
    """Alone and in a batch with answers that do not ask, after a prompt and after a session."""
    server = serve(NORMS[kind](), eos_token_id=-1)
    prompts, asking = ["Hello", "and a second text", "no", "Hel"], [True, False, True, True]
    endings = {"logit_bias": {0: 100.0}}  # 0 ends a document, if one does

    def answer(i: int, count: int, norms: bool) -> Answer:
        more = endings if i == 3 else {}
        return server.answer(prompts[i], as_ids=True, max_new_tokens=count, norms=norms, **more)

    for i, prompt in enumerate(prompts):
        tokens = [t for chunk in answer(i, 2, True) for t in chunk.tokens]
        assert_norms(server.model, BYTES.encode(prompt), tokens)
    answers = [answer(i, 3 + i, asked) for i, asked in enumerate(asking)]
    for i, asked in enumerate(asking):
        tokens = [t for chunk in answers[i] for t in chunk.tokens]
        assert len(tokens) == 3 + i and all((t.norms is not None) == asked for t in tokens)
        if asked:
            assert_norms(server.model, BYTES.encode(prompts[i]), tokens)


def test_norms_belong_to_a_session_a_known_prefix_and_an_empty_prompt():
    model, text = free_copy(wide()), "a long beginning " * 8
    server = StreamingServer(model, tokenizer=BYTES, cache_bytes=2**24)
    session, read = server.create_session(seed=1), []
    for prompt in (text, "more", ""):
        read += BYTES.encode(prompt)
        answer = server.answer(prompt, session, as_ids=True, max_new_tokens=3, norms=True)
        tokens = [t for chunk in answer for t in chunk.tokens]
        assert_norms(server.model, read, tokens)
        read += [t.id for t in tokens]
    answer = server.answer(text, as_ids=True, max_new_tokens=3, norms=True)
    assert answer.cached_tokens == len(text)
    assert_norms(server.model, BYTES.encode(text), [t for c in answer for t in c.tokens])


def test_norms_are_computed_for_those_who_ask_only(monkeypatch):
    server, rows = serve(), []
    real = streaming.matrix_norms, streaming.LiveBatch.norms

    def noted(batch, chosen):
        rows.append(chosen)
        return real[1](batch, chosen)

    monkeypatch.setattr(streaming.LiveBatch, "norms", noted)
    monkeypatch.setattr(streaming, "matrix_norms", lambda heads: 1 / 0)
    assert len(tokens_of(server.answer("Hello", as_ids=True))) == 12 and rows == []
    monkeypatch.setattr(streaming, "matrix_norms", real[0])
    answers = [server.answer("Hello", as_ids=True, norms=n) for n in (False, True, False)]
    for answer in answers:
        tokens_of(answer)
    assert [len(chosen) for chosen in rows] == [1] * 11


def test_the_same_seed_gives_the_same_text():
    server = serve(temperature=1.0, top_k=0)
    texts = [server.generate_text("Hello", seed=s, max_new_tokens=40) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    sessions = [server.create_session(seed=4) for _ in range(2)]
    both = [[server.generate_text(p, s) for p in ("Hello", "and", "")] for s in sessions]
    assert both[0] == both[1]
    free = {server.generate_text("Hello", server.create_session()) for _ in range(5)}
    assert len(free) > 1


def test_sessions_are_independent():
    server = serve()
    alone = [serve().generate_text(p) for p in ("Hello, my name is", "The weather")]
    one, two = server.create_session(), server.create_session()
    assert [
        server.generate_text("Hello, my name is", one),
        server.generate_text("The weather", two),
    ] == alone
    before = next_logits(server, two)
    server.reset_session(one)
    server.delete_session(one)
    assert torch.equal(next_logits(server, two), before)
    with pytest.raises(UserError, match="no session"):
        server.generate_text("a", one)


def test_a_session_answers_one_at_a_time():
    server = serve()
    session = server.create_session()
    answer = server.answer("Hello", session)
    next(answer)
    for act in (server.answer, functools.partial(server.generate_text, "a")):
        with pytest.raises(UserError, match="is answering"):
            act("b", session) if act == server.answer else act(session)
    for act in (server.fork_session, server.rollback, server.reset_session):
        with pytest.raises(UserError, match="is answering"):
            act(session)
    assert server.get_session_info(session)["answering"]
    server.delete_session(session)
    assert list(answer) == []
    assert not server.decoder.answers and server.decoder.batch_state is None


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "x" * 65, "é", 7, "a\n", 0, []])
def test_session_ids_are_plain_names(name):
    server = serve()
    for act in (server.create_session, server.get_session_info):
        with pytest.raises(UserError, match="session_id"):
            act(name)
    assert not server.sessions


def test_cleanup_deletes_old_sessions_unless_they_are_answering():
    server = serve()
    old, young, busy = (server.create_session(name) for name in ("old", "young", "busy"))
    answer = server.answer("Hello", busy)
    next(answer)
    for name in (old, busy):
        server.sessions[name].used -= 100
    assert server.cleanup_old_sessions(50) == 1
    assert set(server.sessions) == {young, busy}
    with pytest.raises(UserError, match="is taken"):
        server.create_session("young")


@pytest.mark.usefixtures("elsewhere")
def test_next_tokens_one_at_a_time():
    model = StreamingInference(free_copy(wide()), config=StreamingConfig(temperature=0.0))
    ids = [model.generate_next_token(BYTES.encode("Hello"))]
    ids += [model.generate_next_token() for _ in range(9)]
    assert ids == tokens_of(serve().answer("Hello", as_ids=True, max_new_tokens=10))
    assert model.get_state_info()["position"] == 15
    model.reset_state()
    first = model.generate_next_token(65)
    for eos, token in ((first, None), (first ^ 1, first)):
        model.reset_state()
        assert model.generate_next_token(65, eos_token_id=eos) == token
    model.reset_state()
    assert model.get_state_info()["position"] == 0
    with pytest.raises(UserError, match="tokenizer: none was found"):
        model.generate_text("Hello")


# --------------------------------------------------------------------------- forks and rollbacks


def test_forks_and_rollbacks_share_a_snapshot_and_then_differ():
    server = serve()
    trunk, ids = server.create_session(), some_ids(1, 50).tolist()[0]
    server.generate_text(ids, trunk, max_new_tokens=0)
    tree, rng = {trunk: ids}, random.Random(1)
    for number in range(30):
        parent = rng.choice(sorted(tree))
        fork = server.fork_session(parent, f"fork{number}")
        assert server.find(fork).now is server.find(parent).now, "nothing is copied"
        more = some_ids(1, 3, seed=number).tolist()[0]
        answer = server.answer(more, fork, as_ids=True, max_new_tokens=4)
        tree[fork] = tree[parent] + more + tokens_of(answer)
        if rng.random() < 0.3:
            server.rollback(fork)
            tree[fork] = tree[parent]
            with pytest.raises(UserError, match="no turn to undo"):
                server.rollback(fork)
    for session, read in tree.items():
        assert_has_read(server, session, read)


def test_a_fork_answers_exactly_like_its_origin():
    server = serve(temperature=1.0, top_k=0)
    one = server.create_session(seed=3)
    server.generate_text("Hello", one)
    two, other = server.fork_session(one), server.fork_session(one, seed=99)
    assert torch.equal(next_logits(server, one), next_logits(server, two))
    texts = [server.generate_text("and", s, max_new_tokens=30) for s in (one, two, other)]
    assert texts[0] == texts[1] != texts[2]


# ---------------------------------------------------------------------------- many at one time


def test_batching_at_any_step_does_not_change_an_answer():
    server = serve(temperature=1.0, top_k=20, batch_size=4, state_buffer_size=3)
    rng, open_, done, sizes = random.Random(0), {}, {}, set()
    step = server.decoder.draw_tokens

    def counted(ready, *rest):
        sizes.add(len(ready))
        step(ready, *rest)

    server.decoder.draw_tokens = counted
    for number in range(40):
        settings = {"seed": number, "max_new_tokens": rng.randint(1, 20)}
        prompt = "x" * rng.randint(1, 20) + str(number)
        answer = server.answer(prompt, as_ids=True, **settings)
        open_[number] = (answer, prompt, settings, [])
        for _ in range(rng.randint(0, 8)):
            key = rng.choice(sorted(open_))
            chunk = next(open_[key][0], None)
            if chunk:
                open_[key][3].extend(token.id for token in chunk.tokens)
            else:
                done[key] = open_.pop(key)
    for key, (answer, _, _, ids) in sorted(open_.items()):
        ids.extend(tokens_of(answer))
        done[key] = open_[key]
    assert len(done) == 40 and max(sizes) == 4
    alone = serve(temperature=1.0, top_k=20)
    for _, prompt, settings, ids in done.values():
        assert ids == tokens_of(alone.answer(prompt, as_ids=True, **settings))
    assert not server.decoder.answers and server.decoder.batch_state is None


def test_64_threads_use_one_server():
    server = serve(temperature=1.0, top_k=20, max_new_tokens=8)
    shared, results, errors = server.create_session("shared", seed=1), {}, []
    old = sys.getswitchinterval()

    def work(number: int) -> None:
        rng = random.Random(number)
        try:
            session = server.create_session(seed=number)
            texts = [server.generate_text(f"I am {number}", session)]
            fork = server.fork_session(session)
            if rng.random() < 0.5:
                stream = server.generate_stream("?", session)
                next(stream, None)
                stream.close()
                server.rollback(session)
            with contextlib.suppress(UserError):  # it may be answering another
                server.generate_text("all of us", shared, max_new_tokens=2)
            results[number] = [*texts, server.generate_text("and", fork)]
            server.delete_session(session)
        except Exception as e:
            errors.append(e)

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(old)
    assert not errors, errors[0]
    quiet = serve(temperature=1.0, top_k=20, max_new_tokens=8)
    for number in range(64):
        session = quiet.create_session(seed=number)
        want = [quiet.generate_text(f"I am {number}", session), quiet.generate_text("and", session)]
        assert results[number] == want
    assert not server.decoder.answers and len(server.sessions) == 65


def test_others_get_tokens_while_a_long_prompt_is_read():
    server = serve(max_new_tokens=30, eos_token_id=-1)
    short = server.answer("Hello", as_ids=True)
    next(short)
    read, shapes = server.decoder.read, []

    def noted(ids, *others):
        shapes.append((len(ids), len(ids[0])))
        return read(ids, *others)

    server.decoder.read = noted
    long = server.answer([5] * 3000, as_ids=True, max_new_tokens=1)
    tokens_of(long)
    assert max(length for _, length in shapes) == streaming.SMALL_PREFILL
    assert shapes.count((1, 1)) == 6, "a step of the other with every part of the prompt"
    assert len(tokens_of(short)) == 29


def test_one_bad_answer_does_not_disturb_the_others():
    server = serve(max_new_tokens=10)
    good = server.answer("Hello", as_ids=True)
    bad = server.answer("Hello", as_ids=True, logit_bias=dict.fromkeys(range(257), -math.inf))
    first = next(good).tokens
    with pytest.raises(UserError, match="every token is banned"):
        next(bad)
    session = server.create_session()
    with pytest.raises(UserError, match="every token is banned"):
        server.generate_text("Hello", session, logit_bias=dict.fromkeys(range(257), -math.inf))
    assert server.get_session_info(session)["position"] == 0
    assert [t.id for t in first] + tokens_of(good) == tokens_of(
        serve(max_new_tokens=10).answer("Hello", as_ids=True)
    )
    assert not server.decoder.answers


def test_closed_answers_leave_the_batch_at_once():
    server = serve(batch_size=2, max_new_tokens=50, eos_token_id=-1)
    live = server.answer("Hello", as_ids=True)
    rows, step = [], server.decoder.draw_tokens
    server.decoder.draw_tokens = lambda ready, *rest: (rows.append(len(ready)), step(ready, *rest))
    for number in range(6):
        with contextlib.closing(server.answer([number], as_ids=True)) as short:
            next(short)
            next(short)
            next(live)
    rows.clear()
    next(live)
    assert set(rows) <= {1} and len(server.decoder.answers) == 1
    assert len(tokens_of(live)) == 50 - 7


def test_closing_undoes_tokens_generated_ahead():
    """The steps of another answer generate this one to its end."""
    whole = tokens_of(serve().answer("abc", as_ids=True))
    assert whole.index(whole[4]) == 4
    server = serve(reset_on_eos=True, eos_token_id=whole[4])
    session = server.create_session()
    ahead = server.answer("abc", session, as_ids=True)
    given = [token.id for token in next(ahead).tokens]
    tokens_of(server.answer("x", as_ids=True, eos_token_id=-1))
    assert ahead.over
    ahead.close()
    assert ahead.finish_reason is None
    assert_has_read(server, session, [*BYTES.encode("abc"), *given])


def test_an_answer_may_be_closed_while_another_thread_waits_for_it(monkeypatch):
    server, within, go_on = serve(max_new_tokens=50), threading.Event(), threading.Event()
    session = server.create_session()
    answer, read = server.answer("Hello", session, as_ids=True), server.decoder.read

    def slow(*args):
        within.set()
        assert go_on.wait(60)
        return read(*args)

    monkeypatch.setattr(server.decoder, "read", slow)
    got = []
    reader = threading.Thread(target=lambda: got.extend(tokens_of(answer)))
    reader.start()
    assert within.wait(60)
    answer.close()
    go_on.set()
    reader.join(60)
    assert not reader.is_alive() and got == [] and not server.decoder.answers
    monkeypatch.undo()
    server.find(session)
    assert_has_read(server, session, BYTES.encode("Hello"))


def test_an_interrupted_step_does_not_block_later_ones(monkeypatch):
    server = serve()
    answer = server.answer("Hello", as_ids=True)
    read = server.decoder.read

    def interrupted(*args):
        monkeypatch.setattr(server.decoder, "read", read)
        raise KeyboardInterrupt

    monkeypatch.setattr(server.decoder, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    assert tokens_of(server.answer("Hello", as_ids=True)) == tokens_of(
        serve().answer("Hello", as_ids=True)
    )


def test_a_short_prompt_does_not_wait_for_a_long_one():
    server, steps = serve(max_new_tokens=2), []
    long = server.answer([5] * 20_000, as_ids=True)
    short = server.answer("Hi", as_ids=True)
    step = server.decoder.step
    server.decoder.step = lambda: (steps.append(1), step())
    assert next(short) and len(steps) == 1 and long.to_read
    assert next(long) and not long.to_read
    long.close()


@pytest.mark.parametrize(
    "prompt", [None, 5, b"abc", {1: 2}, {3}, [1.5], [True], [[1]], [257], [-1]]
)
def test_prompts_are_text_or_ids(prompt):
    with pytest.raises(UserError, match="prompt"):
        serve().answer(prompt)


@pytest.mark.usefixtures("elsewhere")
def test_arrays_and_tensors_are_ids_too():
    ids = BYTES.encode("Hello")
    outs = [
        serve().generate_text(form)
        for form in (ids, tuple(ids), np.array(ids), torch.tensor(ids), "Hello")
    ]
    assert len(set(outs)) == 1
    model = StreamingInference(free_copy(wide()), config=StreamingConfig(**GREEDY))
    firsts = set()
    for one in (65, np.int64(65), torch.tensor(65), [65]):
        model.reset_state()
        firsts.add(model.generate_next_token(one))
    assert len(firsts) == 1


# ------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_saved_session_continues_exactly(tmp_path, document_mask):
    eos = {"document_mask": True, "eos_id": 0} if document_mask else {}
    server = serve(
        wide(**eos),
        temperature=1.0,
        top_k=0,
        repetition_penalty=1.3,
        logit_bias={65: 1.5},
        stop=["zq"],
    )
    session = server.create_session(seed=11)
    for prompt in ("Hello", "", "World"):
        server.generate_text(prompt, session)
        server.save_session(session, tmp_path / "s.safetensors")
        again = server.load_session(tmp_path / "s.safetensors")
        old, new = server.find(session), server.find(again)
        assert torch.equal(next_logits(server, session), next_logits(server, again))
        assert (new.now.recent, new.seed, new.turns, new.config) == (
            old.now.recent,
            old.seed,
            old.turns,
            old.config,
        )
        other = StreamingServer(server.model, tokenizer=BYTES)
        fresh = other.load_session(tmp_path / "s.safetensors", "mine")
        texts = [
            place.generate_text("more", name, max_new_tokens=20)
            for place, name in (
                (server, server.fork_session(session)),
                (server, again),
                (other, fresh),
            )
        ]
        assert texts[0] == texts[1] == texts[2]


def test_a_session_without_text_can_be_saved(tmp_path):
    server = serve()
    server.save_session(server.create_session(), tmp_path / "s")
    again = server.load_session(tmp_path / "s")
    assert server.generate_text("Hello", again) == serve().generate_text("Hello")


def test_the_size_of_a_file_does_not_depend_on_the_number_of_tokens(tmp_path):
    server, sizes = serve(wide(n_layer=1)), set()
    session = server.create_session("s", seed=1)
    for count in (0, 10, 100, 99_890):
        server.generate_text([7] * count or [1], session, max_new_tokens=0)
        server.save_session(session, tmp_path / "s")
        sizes.add((tmp_path / "s").stat().st_size // 64)
        assert server.get_session_info(session)["state_bytes"] == server.model.init_state(1).nbytes
    assert len(sizes) == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    server = serve()
    session = server.create_session(seed=1)
    server.generate_text("Hello", session)
    path = tmp_path_factory.mktemp("saved") / "s.safetensors"
    server.save_session(session, path)
    return server, path.read_bytes()


def test_damaged_files_are_rejected_and_leave_no_session(tmp_path, saved):
    server, good = saved
    path, rng, before = tmp_path / "s", random.Random(0), set(server.sessions)
    header = 8 + int.from_bytes(good[:8], "little")
    spots = [*range(0, header, 5), *(rng.randrange(header, len(good)) for _ in range(200))]
    damaged = [good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :] for at in spots]
    damaged += [good[:size] for size in (0, 7, 8, header, len(good) // 2, len(good) - 1)]
    damaged += [good + b"x", b"", os.urandom(1000), good[:8] + b"{" * 1000]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(str(path))):
            server.load_session(path)
    assert set(server.sessions) == before
    path.write_bytes(good)
    server.load_session(path)


def hostile(change) -> bytes:
    """A file with a correct checksum and wrong contents."""
    from safetensors.torch import save

    server = serve()
    tensors = {n: t.clone() for n, t in server.tensors(server.initial[None]).items()}
    about = {"seed": 1, "turns": 0, "config": {"logit_bias": None}}
    notes = {"format": STATE_FORMAT, "model": server.fingerprint, "session": about}
    change(tensors, notes)
    notes["session"] = json.dumps(notes["session"])
    return save(tensors, {**notes, "checksum": digest([tensors, notes])})


@pytest.mark.parametrize(
    "change",
    [
        lambda t, n: t.update(extra=torch.zeros(1)),
        lambda t, n: t.pop("recent"),
        lambda t, n: t.update(logits=torch.zeros(1, 10**7)),
        lambda t, n: t.update(logits=t["logits"].double()),
        lambda t, n: t.update(recent=t["recent"] + 258, position=t["position"] + 10**4),
        lambda t, n: t.update(position=t["position"] - 5),
        lambda t, n: t.update({k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in t.items()}),
        lambda t, n: n.update(model="0" * 64),
        lambda t, n: n.update(session={"seed": -1, "turns": 0, "config": {"logit_bias": None}}),
        lambda t, n: n.update(
            session={"seed": 1, "turns": 0, "config": {"logit_bias": None, "x": 1}}
        ),
        lambda t, n: n.update(session={"seed": 1, "turns": 0, "config": {"logit_bias": {"a": 1}}}),
        lambda t, n: n.update(
            session={"seed": 1, "turns": 0, "config": {"logit_bias": None, "temperature": -1}}
        ),
        lambda t, n: n.update(session=[1, 2]),
        lambda t, n: n.update(session={"seed": 1, "turns": -1, "config": {"logit_bias": None}}),
        lambda t, n: n.update(
            session={"seed": 1, "turns": 0, "config": {"logit_bias": None, "temperature": 10**400}}
        ),
        lambda t, n: t.update(logits=t["logits"] * math.nan),
        lambda t, n: t.update(position=t["position"] + 2**62),
        lambda t, n: n.update(format="tinymamba-state-1"),
    ],
)
def test_hostile_files_are_rejected(tmp_path, change):
    (tmp_path / "s").write_bytes(hostile(change))
    server = serve()
    with pytest.raises(UserError):
        server.load_session(tmp_path / "s")
    assert not server.sessions


def test_a_huge_tensor_in_a_file_is_rejected_before_it_is_read(tmp_path):
    """A sparse file with a valid header: its 8 GB must not be allocated."""
    path = tmp_path / "s"
    header = json.dumps(
        {"logits": {"dtype": "F32", "shape": [1, 2 * 10**9], "data_offsets": [0, 8 * 10**9]}}
    ).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 8 * 10**9)
    server, before = serve(), most_memory()
    with pytest.raises(UserError):
        server.load_session(path)
    assert most_memory() - before < 100_000_000


def test_deep_json_is_rejected(tmp_path):
    (tmp_path / "s").write_bytes(hostile(lambda t, n: None))
    server = serve()
    assert server.load_session(tmp_path / "s")
    notes = {"model": server.fingerprint, "session": "[" * 100_000}
    write_tensors(tmp_path / "deep", server.tensors(server.initial[None]), notes)
    with pytest.raises(UserError, match="deep"):
        server.load_session(tmp_path / "deep")


def test_a_saved_session_replaces_an_older_one_and_no_other_file(tmp_path):
    server = serve()
    session = server.create_session()
    for _ in range(2):
        server.save_session(session, tmp_path / "s")
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path / "notes.txt", tmp_path, "/dev/null", "a\0b"):
        with pytest.raises(UserError):
            server.save_session(session, path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_threads_may_save_to_one_file(tmp_path):
    server, errors = serve(), []
    sessions = [server.create_session() for _ in range(4)]

    def work(session: str) -> None:
        try:
            for _ in range(10):
                server.save_session(session, tmp_path / "s")
                server.delete_session(server.load_session(tmp_path / "s"))
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


def test_the_session_of_another_model_is_rejected(tmp_path, saved):
    (tmp_path / "s").write_bytes(saved[1])
    other = free_copy(wide())
    other.head.weight.data[0, 0] += 1e-3
    with pytest.raises(UserError, match="not a state of this model"):
        serve(other).load_session(tmp_path / "s")


@POSIX
def test_kill_9_while_saving_never_damages_the_session(tmp_path):
    script = textwrap.dedent("""
        import os, random, sys, time
        sys.path[:0] = sys.argv[1:3]
        from test_streaming import serve
        server, rng, path = serve(), random.Random(0), "s.safetensors"
        session = server.create_session("s", seed=1)
        server.generate_text("Hello", session, max_new_tokens=1)  # imports what a child needs
        server.save_session(session, path)
        for _ in range(8):
            saved = os.stat(path).st_mtime_ns
            child = os.fork()
            while not child:
                server.generate_text("Hello", session, max_new_tokens=1)
                server.save_session(session, path)
            while os.stat(path).st_mtime_ns == saved:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(child, 9)
            os.waitpid(child, 0)
            assert server.generate_text("a", server.load_session(path))
        """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(ROOT / "tests")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a checkpoint and its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = TinyMambaModel(tiny_config(d_model=64, num_heads=2, tie_embeddings=False))
    with torch.no_grad():
        model.head.weight[128:] = 0.0  # so that the likeliest is always a character
    save_checkpoint(
        folder / "tinymamba_model_latest.pt",
        {"model": model.state_dict(), "config": model.config.to_dict()},
    )
    vocabulary = "\n".join([*byte_alphabet(), EOS_TOKEN])
    (folder / "vocab.txt").write_text(vocabulary + "\n", encoding="utf-8")
    return folder


CHECKPOINT = ("--checkpoint", "tinymamba_model_latest.pt")


def run(folder: Path, *words, input: str = "") -> subprocess.CompletedProcess:
    return run_main(streaming.main, *words, cwd=folder, input=input)


def test_the_command_of_the_readme(folder):
    words = ["--checkpoint", "./tinymamba_model_latest.pt", "--prompt", "Once upon a time"]
    words += ["--max_tokens", "100", "--seed", "1"]
    process = run_script("streaming.py", *words, "--streaming", cwd=folder)
    for done in (process, run(folder, *words)):
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert done.stdout == process.stdout and len(done.stdout) > 10


def test_the_snippet_of_the_documentation(folder):
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))]
    snippet = "".join(texts).split("## Multi-Session Support")[1]
    code = re.search(r"```python\n(.*?)```", snippet, re.S)[1]
    assert 'device="cuda"' in code
    names = {}
    with contextlib.chdir(folder), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(code, names)
    assert len(names["text1_continued"]) > 0
    told = any("cuda is not available; using the CPU" in str(w.message) for w in caught)
    assert told != torch.cuda.is_available()


def test_a_conversation_on_the_console(folder):
    lines = """
        Hello
        /stats
        World
        /save talk.safetensors
        /fork twin
        /sessions
        /gates
        again
        /undo
        /reset
        /load talk.safetensors
        /use twin
        /what
        /save
        /use nobody
        /help
        """
    words = [*CHECKPOINT, "--interactive", "--max_tokens", 8]
    done = run(folder, *words, input=textwrap.dedent(lines).lstrip())
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "/what" in errors[0] and "/save: takes FILE" in errors[1]
    assert "nobody" in errors[2]
    assert "tokens/s" in done.stderr and "saved talk.safetensors" in done.stdout
    assert "now in twin" in done.stdout and "twin <- here" in done.stdout
    assert "\033[38;2;" in done.stdout and "attention" in done.stdout
    assert done.stdout.count("/help; Ctrl-C stops an answer") == 2
    assert (folder / "talk.safetensors").exists()


def test_a_session_continues_from_a_file(folder):
    words = [*CHECKPOINT, "--temperature", 0, "--max_tokens"]
    whole = run(folder, *words, 12, "--prompt", "abc").stdout
    first = run(folder, *words, 6, "--prompt", "abc", "--save_session", "s")
    assert first.returncode == 0 and "saved s" in first.stderr
    server = StreamingServer(folder / "tinymamba_model_latest.pt")
    session = server.load_session(folder / "s")
    rest = server.generate_text("", session, max_new_tokens=6)
    rest = rest.replace("\r", "\n")  # as in the text of a process
    assert (first.stdout.removesuffix("\n") + rest) == whole.removesuffix("\n")
    again = run(folder, *words, 3, "--load_session", "s", "--save_session", "s", "--force")
    assert again.returncode == 0 and rest.startswith(again.stdout.removesuffix("\n"))
    assert len(again.stdout.removesuffix("\n")) == 3, "flags override the settings of the file"


@POSIX
def test_a_closed_pipe_is_no_error(folder):
    command = f"{sys.executable} {ROOT / 'streaming.py'} --max_tokens 3000 --streaming | head -c 9"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_characters_missing_in_the_encoding_are_replaced(folder, monkeypatch):
    words = ["--max_tokens", "300", "--seed", "3", "--top_k", "0"]
    want = run_main(streaming.main, *words, cwd=folder).stdout
    assert not want.isascii()
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: streaming.main(words))
    output.flush()
    assert ended.value.code == 0
    got = output.buffer.getvalue().replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # as run_main
    assert got == want.encode("ascii", "replace")


@POSIX
def test_ctrl_c_stops_the_answer_and_not_the_program(folder):
    command = [sys.executable, "-u", str(ROOT / "streaming.py"), *CHECKPOINT]
    command += ["--interactive", "--max_tokens", "100000000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=folder, **pipes)
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    process.stdout.readline()
    assert process.stdout.read(40), "an answer has started"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(b"/reset\n/stats\n/help\n", timeout=60)
    assert process.returncode == 0, err
    assert b"Ctrl-D quits" in out and err == b""


@pytest.mark.parametrize(
    "words, fragments",
    [
        (["--checkpoint", "nowhere.pt"], ["nowhere.pt", "no such checkpoint"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--tokenizer", "nowhere.json"], ["nowhere.json"]),
        (["--device", "cuda:77"], ["device"]),
        (["--dtype", "float8"], ["--dtype"]),
        (["--load_session", "vocab.txt"], ["vocab.txt"]),
        (["--max_token", "3"], ["--max_token", "did you mean --max_tokens"]),
        (["--prompt", "x", "--save_session", "/proc/nowhere/s"], ["/proc/nowhere/s"]),
        (["--prompt", "x", "--save_session", "vocab.txt"], ["vocab.txt", "--force"]),
    ],
)
def test_bad_commands_are_rejected_in_one_line(folder, words, fragments):
    assert_refused(run(folder, *words), *fragments)


@pytest.mark.usefixtures("elsewhere")
def test_a_checkpoint_without_a_tokenizer_takes_ids_only(tmp_path, folder):
    checkpoint = tmp_path / "model.pt"
    checkpoint.write_bytes((folder / "tinymamba_model_latest.pt").read_bytes())
    assert_refused(run(tmp_path, "--checkpoint", "model.pt", "--prompt", "x"), "tokenizer")
    server = StreamingServer(checkpoint)
    assert len(tokens_of(server.answer([1, 2], as_ids=True, max_new_tokens=5))) == 5
    (tmp_path / "vocab.txt").write_text("\n".join(map(str, range(1000))))
    with pytest.raises(UserError, match="tokenizer: has"):
        StreamingServer(checkpoint)


# ------------------------------------------------------------------------------------ size


@pytest.mark.slow
def test_a_prompt_of_a_million_tokens_takes_constant_memory():
    server = serve(wide(n_layer=1))
    server.generate_text([7] * 20_000, max_new_tokens=0)
    before = most_memory()
    session = server.create_session()
    answer = server.answer([7] * 1_000_000, session, as_ids=True, max_new_tokens=3)
    assert len(tokens_of(answer)) == 3
    assert server.get_session_info(session)["position"] == 1_000_003
    assert most_memory() - before < 60_000_000  # the ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_state_in_float32(dtype):
    server = StreamingServer(
        free_copy(wide()), tokenizer=BYTES, dtype=dtype, config=StreamingConfig(temperature=0.0)
    )
    session = server.create_session()
    server.generate_text("Hello", session, max_new_tokens=20)
    now = server.decoder.read_unread(server.find(session).now, None)
    assert now.state.layers[0].ssm.dtype == now.state.layers[0].phase.dtype == torch.float32
    ids = torch.tensor([list(now.recent)])
    close(torch.from_numpy(now.logits), wide()(ids)[0, -1], 0.15)


@pytest.mark.parametrize("tokens", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_a_compiled_step_gives_the_same_text(tokens, monkeypatch):
    """Two tokens need one step, which compiles once; the second step compiles again."""
    if tokens == 2:  # to try out which vector instructions work takes as long as the rest
        monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", lambda: [])
        monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)  # caches know it: no vectors
    answers = []
    for compiled in (False, True):
        server = StreamingServer(free_copy(wide(n_layer=1)), tokenizer=BYTES, compiled=compiled)
        answer = server.answer("Hello", as_ids=True, norms=True, max_new_tokens=tokens, **GREEDY)
        drawn = [token for chunk in answer for token in chunk.tokens]
        assert_norms(server.model, BYTES.encode("Hello"), drawn[:3])
        answers.append([token.id for token in drawn])
    assert answers[0] == answers[1] and len(answers[0]) > 1


# ---------------------------------------------------------------- for callers of Decoder.step


@pytest.mark.parametrize("optimize", [False, True])
def test_scores_of_a_prompt_are_those_of_a_full_pass(optimize):
    """Also between two parts of a long prompt, and when a session continues."""
    server = serve(optimize_memory=optimize)
    session, ids = server.create_session(), some_ids(1, 1300)[0].tolist()
    true = server.model(torch.tensor([ids]))[0].double().log_softmax(-1)
    at = 0
    for count in (1, 700, 599):
        part = ids[at : at + count]
        answer = server.answer(part, session, prompt_logprobs=2, max_new_tokens=0)
        assert list(answer) == []
        assert [t.id for t in answer.scores] == part
        for place, token in enumerate(answer.scores, at):
            if place == 0:
                assert token.logprob is None and token.top == []
                continue
            assert token.logprob == pytest.approx(float(true[place - 1, token.id]), abs=1e-4)
            best = true[place - 1].topk(2)
            assert [i for i, _ in token.top] == best.indices.tolist()
        at += count
    answer = server.answer([], session, prompt_logprobs=2, max_new_tokens=1)
    list(answer)
    assert answer.scores == [] == server.answer(ids[:3], max_new_tokens=0).scores


def test_calling_step_directly_does_not_change_an_answer():
    server, prompts = serve(), [some_ids(1, n, seed=n)[0].tolist() for n in (3, 40, 200, 9)]
    want = [server.generate_text(p, seed=n, temperature=1.0) for n, p in enumerate(prompts)]
    answers = [server.answer(p, seed=n, temperature=1.0) for n, p in enumerate(prompts)]
    texts = [""] * len(answers)
    for _ in range(100):
        for number, answer in enumerate(answers):
            texts[number] += "".join(chunk.text for chunk in answer.ready_chunks())
        if not any(answer.open for answer in answers):
            break
        server.decoder.step()
    assert texts == want


def test_no_step_is_taken_for_chunks_that_are_ready(monkeypatch):
    server = serve()
    answer = server.answer([1, 2, 3], logit_bias={0xC3: 100.0, 0: -100.0}, max_new_tokens=5)
    monkeypatch.setattr(
        server.decoder,
        "wait",
        lambda answer: pytest.fail("waits") if answer.needs_token() else None,
    )
    assert list(answer.ready_chunks()) == []
    for _ in range(4):  # half of a character each time
        server.decoder.step()
        list(answer.ready_chunks())
        assert answer.open
    server.decoder.step()
    list(answer.ready_chunks())
    assert not answer.open and answer.finish_reason == "length"


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_an_abandoned_answer_is_undone(steps):
    server = serve()
    session = server.create_session(seed=1)
    server.generate_text("abc", session)
    twin = server.fork_session(session)
    before = server.get_session_info(session)
    answer = server.answer("more", session, max_new_tokens=50)
    for _ in range(steps):
        server.decoder.step()
        list(answer.ready_chunks())
    answer.abandon()
    answer.abandon()
    assert server.decoder.answers == []
    after = server.get_session_info(session)
    assert {**after, "last_used": 0} == {**before, "last_used": 0}
    assert server.generate_text("x", session) == server.generate_text("x", twin)
    server.rollback(session)
    assert server.get_session_info(session)["position"] == before["position"]


def test_the_token_that_ends_an_answer_is_known():
    server = serve()
    answer = server.answer("abc", logit_bias={256: 100.0}, logprobs=1)
    assert list(answer) == [] and answer.finish_reason == "stop"
    true = server.model(torch.tensor([BYTES.encode("abc")]))[0, -1].double().log_softmax(-1)
    assert answer.closing.id == 256
    assert answer.closing.logprob == pytest.approx(float(true[256]), abs=1e-4)


def test_equally_likely_alternatives_are_sorted_by_id():
    logits = np.array([1.0, 3.0, 3.0, 0.0, 3.0, 2.0], np.float32)
    for count in range(7):
        _, top = streaming.top_logprobs(logits, 0, count)
        assert [i for i, _ in top] == [1, 2, 4, 5, 0, 3][:count]


def test_many_short_prompts_are_read_a_few_at_a_time(monkeypatch):
    """Reading eight tokens costs as much as reading a hundred; no prompt waits forever."""
    server = serve()
    answers = [server.answer(some_ids(1, 2000)[0].tolist(), max_new_tokens=1)]
    answers += [
        server.answer(some_ids(1, 100, seed=n)[0].tolist(), max_new_tokens=1) for n in range(30)
    ]
    plan, steps = server.decoder.plan_prompts, 0
    while any(a.to_read for a in answers):
        now = plan()
        assert len(now) <= 4 and sum(len(ids) for _, ids in now) <= 512
        assert answers[0] in [a for group, _ in now for a in group] or not answers[0].to_read
        server.decoder.step()
        steps += 1
    assert steps <= 30


def test_no_other_call_selects_an_adapter_before_the_head_has_run():
    """A LoRA of the head reads the selection when the head runs."""
    server = serve(prompt_logprobs=1)
    decoder = server.decoder
    decoder.model.head.register_forward_pre_hook(
        lambda *_: held.append(decoder.model_lock.locked())
    )
    held: list[bool] = []
    tokens_of(server.answer("abc", max_new_tokens=3))
    assert held == [True] * 4
