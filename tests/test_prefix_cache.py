"""The prefix cache: its tree against a plain list, and answers with it against answers without."""

import contextlib
import random

import numpy as np
import pytest
import torch
from helpers import adapted, close, examples, free_copy, some_ids, wide
from hypothesis import given
from hypothesis import strategies as st

import streaming
from peft import AdapterConfig, save_adapter
from streaming import Answer, StreamingConfig, StreamingServer
from tinymamba.prefix_cache import PrefixCache

MIB = 2**20


pytestmark = pytest.mark.usefixtures("elsewhere")


class PlainCache:
    """What PrefixCache should do, by comparing with every stored prefix."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.stored: dict[tuple, tuple] = {}  # (root, ids) -> (value, nbytes); oldest first

    def find(self, root, ids) -> tuple:
        common = [common_length(other, ids) for name, other in self.stored if name == root]
        whole = [k for k in self.stored if k[0] == root and ids[: len(k[1])] == k[1]]
        if not whole:
            return 0, None, max(common, default=0)
        best = max(whole, key=lambda k: len(k[1]))
        self.stored[best] = self.stored.pop(best)
        return len(best[1]), self.stored[best][0], max(common)

    def store(self, root, ids, value, nbytes) -> None:
        if nbytes + 4 * len(ids) > self.max_bytes:
            return
        self.stored.pop((root, ids), None)
        self.stored[root, ids] = value, nbytes
        while self.nbytes > self.max_bytes:
            del self.stored[next(iter(self.stored))]

    def drop_early(self, root, ids) -> None:
        if (root, ids) in self.stored:
            first = self.stored.pop((root, ids))
            self.stored = {(root, ids): first, **self.stored}

    @property
    def nbytes(self) -> int:
        """Bytes of the values, and of every different prefix's last id."""
        prefixes = {(root, ids[:n]) for root, ids in self.stored for n in range(1, len(ids) + 1)}
        return 4 * len(prefixes) + sum(nbytes for _, nbytes in self.stored.values())


def common_length(a, b) -> int:
    size = min(len(a), len(b))
    return next((n for n in range(size) if a[n] != b[n]), size)


CALL = st.tuples(
    st.sampled_from(["find", "store", "store", "drop_early"]),
    st.sampled_from(["base", "adapter"]),
    st.lists(st.integers(0, 2), min_size=1, max_size=7),
    st.integers(0, 60),
)


@examples(300)
@given(st.integers(0, 250), st.lists(CALL, max_size=40))
def test_the_tree_keeps_and_drops_what_a_plain_list_does(max_bytes, calls):
    cache, plain = PrefixCache(max_bytes), PlainCache(max_bytes)
    for number, (name, root, ids, nbytes) in enumerate(calls):
        value = (number, nbytes) if name == "store" else ()
        got = getattr(cache, name)(root, np.array(ids, np.int32), *value)
        want = getattr(plain, name)(root, tuple(ids), *value)
        assert got == want
        assert cache.nbytes == plain.nbytes <= max_bytes and len(cache) == len(plain.stored)


# ------------------------------------------------------------------------------------ answers


def serve(cache_bytes: int = 64 * MIB, adapters=None, tokenizer=None, **fields) -> StreamingServer:
    config = StreamingConfig(**{"temperature": 0.0, "max_new_tokens": 4, **fields})
    model = free_copy(wide())
    return StreamingServer(
        model, config=config, adapters=adapters, tokenizer=tokenizer, cache_bytes=cache_bytes
    )


@pytest.fixture
def counted(monkeypatch):
    """The numbers of tokens in all calls that read prompts."""
    counts, read = [], streaming.Decoder.read

    def counting(self, ids, *arguments):
        if len(ids) == 1 and len(ids[0]) > 1:
            counts.append(len(ids[0]))
        return read(self, ids, *arguments)

    monkeypatch.setattr(streaming.Decoder, "read", counting)
    return counts


def tokens_of(answer: Answer) -> list:
    return [token for chunk in answer for token in chunk.tokens]


def ids_of(count: int, seed: int = 0) -> list[int]:
    return some_ids(1, count, seed=seed)[0].tolist()


def ask(server: StreamingServer, prompt: list[int], session: str | None = None, **settings):
    """The ids of an answer, and how many tokens of its prompt the cache had."""
    answer = server.answer(prompt, session, as_ids=True, **settings)
    return [token.id for token in tokens_of(answer)], answer.cached_tokens


def test_a_prefix_is_read_once_and_the_answer_is_the_same(counted):
    settings = {"repetition_penalty": 1.5, "repetition_window": 400}  # it knows the prefix, too
    server, plain = serve(**settings), serve(cache_bytes=0, **settings)
    shared, ends = ids_of(300), [ids_of(20, seed) for seed in range(1, 4)]
    for end, cached in zip(ends, (0, 0, 300), strict=True):  # the second parts from the first
        want, _ = ask(plain, [*shared, *end])
        del counted[:]
        assert ask(server, [*shared, *end]) == (want, cached)
        assert sum(counted) == 320 - cached
    del counted[:]
    assert ask(server, [*shared, *ends[0]]) == (ask(plain, [*shared, *ends[0]])[0], 320)
    assert sum(counted) == 320, "only the server without a cache has read the prompt"


def test_the_end_of_a_system_message_is_kept_for_the_second_chat(counted):
    server = serve()
    shared = ids_of(200)
    ask(server, [*shared, *ids_of(20, 1)], keep_at=[200])
    assert ask(server, [*shared, *ids_of(20, 2)])[1] == 200
    assert counted == [200, 20, 20]


def test_the_next_turn_of_a_chat_begins_after_the_answer():
    server, prompt = serve(max_new_tokens=70), ids_of(100)
    answer, _ = ask(server, prompt)
    again = [*prompt, *answer, *ids_of(10, 1)]
    got, cached = ask(server, again)
    assert cached == 100 + len(answer) - 1  # the state has not read the last token
    assert got == ask(serve(0, max_new_tokens=70), again)[0]


class FourLetters:
    """A tokenizer whose ids from 4 on stand for the same letters as the first four."""

    def encode(self, text: str) -> list[int]:
        return ["abcd".index(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join("abcd"[i % 4] for i in ids)


@pytest.mark.parametrize("first", [0, 4])
def test_an_answer_is_kept_if_its_text_has_the_same_ids(first):
    server = serve(max_new_tokens=70, temperature=1.0, tokenizer=FourLetters())
    others = set(range(server.vocab_size)) - set(range(first, first + 4))
    prompt, bias = "abcd" * 20, dict.fromkeys(others, -float("inf"))
    text = server.generate_text(prompt, logit_bias=bias)
    assert len(text) == 70
    cached = server.answer(prompt + text + "a").cached_tokens
    assert cached == (80 if first else 149)


def test_the_prompt_of_an_answer_is_dropped_before_the_answer_unless_it_is_used_again():
    server, prompts = serve(max_new_tokens=70), [ids_of(100, seed) for seed in range(2)]
    for prompt in (prompts[0], prompts[1], prompts[1]):
        ask(server, prompt)
    prefixes = server.decoder.prefixes
    assert len(prefixes) == 4
    prefixes.max_bytes = prefixes.nbytes
    ask(server, ids_of(100, 2), max_new_tokens=0)
    assert [ask(server, prompt)[1] for prompt in prompts[::-1]] == [100, 0]


def test_short_prefixes_are_not_kept():
    server = serve()
    for _ in range(3):
        assert ask(server, ids_of(streaming.MIN_PREFIX - 5))[1] == 0
    assert len(server.decoder.prefixes) == 0


@pytest.mark.parametrize("cache_bytes", [0, 64 * MIB])
def test_answers_of_one_prompt_read_it_once(counted, cache_bytes):
    server, prompt = serve(cache_bytes, temperature=1.0), ids_of(600)
    want = [ask(serve(0), prompt, temperature=1.0, seed=n)[0] for n in range(5)]
    del counted[:]
    answers = [server.answer(prompt, as_ids=True, seed=n) for n in range(5)]
    assert [[t.id for t in tokens_of(a)] for a in answers] == want
    assert sum(counted) == 600


def test_prompts_that_part_are_read_together_up_to_there(counted):
    server, shared = serve(0), ids_of(700)
    prompts = [[*shared, *ids_of(n, n)] for n in (1, 30, 200)] + [shared[:400], ids_of(40, 9)]
    want = [ask(serve(0), prompt)[0] for prompt in prompts]
    del counted[:]
    answers = [server.answer(prompt, as_ids=True) for prompt in prompts]
    assert [[t.id for t in tokens_of(a)] for a in answers] == want
    assert sum(counted) + 1 == 700 + 1 + 30 + 200 + 40  # a read of one token is not counted


def test_logprobs_of_prompts_do_not_depend_on_the_cache_or_on_others():
    server, prompt = serve(prompt_logprobs=2), ids_of(150)
    alone = server.answer(prompt, as_ids=True)
    tokens_of(alone)
    both = [server.answer([*prompt, 7], as_ids=True), server.answer([*prompt, 8], as_ids=True)]
    for answer, last in zip(both, (7, 8), strict=True):
        tokens_of(answer)
        assert [t.id for t in answer.scores] == [*prompt, last] and answer.cached_tokens == 0
        close(
            torch.tensor([t.logprob for t in answer.scores[1:-1]]),
            torch.tensor([t.logprob for t in alone.scores[1:]]),
            1e-4,
        )


def test_gates_and_logprobs_of_a_cached_prompt_are_those_of_a_read_one():
    server, prompt = serve(logprobs=2), ids_of(100)
    cold, warm = (tokens_of(server.answer(prompt, as_ids=True)) for _ in range(2))
    assert [t.top for t in cold] == [t.top for t in warm]
    for a, b in zip(cold, warm, strict=True):
        np.testing.assert_array_equal(a.gates, b.gates)


def test_every_adapter_has_prefixes_of_its_own(tmp_path):
    save_adapter(adapted(AdapterConfig()), tmp_path / "a")
    server, prompt = serve(adapters={"a": tmp_path / "a"}), ids_of(100)
    for adapter in (None, "a"):
        for cached in (0, 100):
            assert ask(server, prompt, adapter=adapter)[1] == cached


def test_an_empty_session_begins_as_the_adapter_of_the_answer_does(tmp_path):
    """An adapter of the kind `prefix` has an initial state of its own."""
    save_adapter(adapted(AdapterConfig("prefix", prefix_length=4)), tmp_path / "a")
    prompt, adapters = ids_of(100), {"a": tmp_path / "a"}
    server, plain = serve(adapters=adapters), serve(0, adapters=adapters)

    def first_logprob(server, session=None, adapter=None) -> float:
        settings = {"adapter": adapter, "logprobs": 0, "max_new_tokens": 1, "temperature": 0.0}
        [token] = tokens_of(server.answer(prompt, session, as_ids=True, **settings))
        return token.logprob

    want = pytest.approx(first_logprob(plain), abs=1e-5)
    assert first_logprob(plain, adapter="a") != want
    session = server.create_session(config=StreamingConfig(adapter="a"))
    assert first_logprob(server, session) == want, "the session chose another adapter"
    assert first_logprob(server) == want, "what the session has read is in the cache"
    assert ask(server, prompt, adapter=None)[1] == 100


@pytest.mark.parametrize("cache_bytes", [100_000, 64 * MIB])
def test_random_texts_are_continued_as_without_a_cache(monkeypatch, cache_bytes):
    """Texts that part anywhere, answers closed or undone anywhere, states dropped at any time."""
    monkeypatch.setattr(streaming, "MIN_PREFIX", 1)
    rng, server, texts = random.Random(0), serve(cache_bytes, top_k=40), [[]]
    hits = 0
    for number in range(40):
        old = rng.choice(texts)
        prompt = [*old[: rng.randint(0, len(old))], *ids_of(rng.randint(1, 30), number)]
        session = rng.choice([None, server.create_session()])
        settings = {"max_new_tokens": rng.randint(0, 20), "temperature": rng.choice([0.0, 1.0])}
        answer = server.answer(prompt, session, as_ids=True, seed=number, **settings)
        hits += answer.cached_tokens > 0
        ids = list(prompt)
        with contextlib.closing(answer):
            for chunk in answer:
                ids += [token.id for token in chunk.tokens]
                if rng.random() < 0.05:
                    break
                if rng.random() < 0.02:
                    answer.abandon()
                    ids = []
                    break
        assert answer.final.position == len(ids)
        if ids:
            got = torch.from_numpy(server.decoder.read_unread(answer.final, None).logits)
            close(got, server.model(torch.tensor([ids]))[0, -1], 1e-4)
            texts.append(ids)
        assert server.decoder.prefixes.nbytes <= cache_bytes
    assert hits > (15 if cache_bytes > MIB else 2)


def test_conversations_fill_the_memory_that_is_given_and_no_more():
    """As many as there is room for: the newest are those that are found again."""
    server = serve(max_new_tokens=1)
    room = 50 * (server.initial[None].nbytes + 4 * (server.vocab_size + 100))
    server.decoder.prefixes.max_bytes = room
    prompts = [ids_of(70, seed) for seed in range(70)]
    for prompt in prompts:
        ask(server, prompt)
        assert server.decoder.prefixes.nbytes <= room
    found = [ask(server, [*prompt, 1])[1] == 70 for prompt in prompts[::-1]]
    assert found[:45] == [True] * 45 and not any(found[-10:])
