"""Streaming: sessions of constant size that can be continued, saved, forked and rolled back.

    python streaming.py --checkpoint ./tinymamba_model_latest.pt --prompt "Once upon a time" \\
        --max_tokens 100 --streaming
    python streaming.py --checkpoint ./tinymamba_model_latest.pt --interactive --gates --stats
    python streaming.py --checkpoint ... --chat --system "You are kind."  # with a chat template
    python streaming.py --checkpoint ... --prompt "..." --save_session talk.safetensors
    python streaming.py --checkpoint ... --prompt "..." --load_session talk.safetensors
    python streaming.py --checkpoint ... --prompt "..." --engine onnx  # faster on a CPU

As a library:

    server = StreamingServer(model_path="./tinymamba_model_latest.pt")
    session = server.create_session()
    for text in server.generate_stream("Once upon a time", session_id=session, max_new_tokens=50):
        print(text, end="", flush=True)

A session contains exactly the prompts it was given and the text it returned. If a stream is closed
early, the session ends where the reader stopped; a stop string is never part of it. The state of a
session has a constant size: a step costs the same after 10 tokens as after a million, and a fork
or a rollback copies nothing. Answers requested at the same time, from any threads, are decoded as
one batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import secrets
import signal
import sys
import threading
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import numpy as np
import torch
from torch import Tensor

from testv2 import ModelState, TinyMambaModel, load_model
from tinymamba.chat_session import ChatHistory, ChatSessions, Turn
from tinymamba.checkpoint import pack_tensors, read_tensors, unpack_tensors, write_bytes
from tinymamba.cli import (
    DTYPES,
    CliParser,
    UserError,
    add_flags,
    given_fields,
    has_type,
    make_options,
    require,
    require_plain_name,
    run_cli,
)
from tinymamba.live import LiveBatch, LiveModel, matrix_norms, why_not_live
from tinymamba.onnx_engine import (
    ENGINES,
    OnnxEngine,
    check_engine,
    default_cache,
    reject_onnx_folder,
)
from tinymamba.prefix_cache import PrefixCache
from tinymamba.runtime import pick_device, why_no_compile
from tinymamba.streaming_config import RECENT, StreamingConfig
from tinymamba.structured import Grammar, GrammarCompiler, Matcher
from tinymamba.tokenizer import begun_length, open_tokenizer, why_no_tokenizer

CONTEXT = 8  # last tokens a tokenizer may need to decode the next ones
PREFILL = 4096  # prompt tokens read in one step
SMALL_PREFILL = 512  # the same while other answers wait for the step
MIN_SHARE = 128  # minimum prompt tokens per read; fewer take as long
MAX_REPLAY = 1024  # after this many tokens of an answer, `start` moves forward
MIN_PREFIX = 64  # the prefix cache keeps a state if it saves reading as many tokens

# ------------------------------------------------------------------------------------ sampling


def probabilities(
    logits: np.ndarray,
    recent: Sequence[int],
    config: StreamingConfig,
    counts: Mapping[int, int] | None = None,
) -> np.ndarray:
    """Logits (v,) -> float64 probabilities (v,) of the next token, after all settings.

    Applied in the order of transformers: bias, penalty on the `recent` ids (Keskar et al., arXiv
    1909.05858, section 4.1), temperature, top-k, top-p (Holtzman et al., arXiv 1904.09751), min-p
    (Nguyen et al., arXiv 2407.01082). OpenAI's penalties come before the temperature, as in vLLM;
    `counts` says how often the answer has each of its ids.
    """
    x = adjusted(logits, recent, config, counts)
    best = int(x.argmax())
    if config.is_greedy():
        return np.eye(1, len(x), best)[0]
    x = (x - x[best]) / config.temperature
    if 0 < config.top_k < len(x):
        x[x < np.partition(x, -config.top_k)[-config.top_k]] = -np.inf
    p = np.exp(x)
    p /= p.sum()
    if config.top_p < 1.0:
        alive = p.nonzero()[0]
        order = alive[np.argsort(-p[alive], kind="stable")]
        before = np.cumsum(p[order]) - p[order]  # total probability of all more likely tokens
        p[order[1:][before[1:] >= config.top_p]] = 0.0
    p[p < config.min_p * p[best]] = 0.0
    return p / p.sum()


def adjusted(
    logits: np.ndarray,
    recent: Sequence[int],
    config: StreamingConfig,
    counts: Mapping[int, int] | None,
) -> np.ndarray:
    """The logits (v,) in float64 after bias and penalties, of which at least one is finite."""
    x = logits.astype(np.float64)
    for i, bias in (config.logit_bias or {}).items():
        x[i] += bias
    if config.pad_token_id is not None:
        x[config.pad_token_id] = -np.inf
    if config.repetition_penalty != 1.0 and recent:
        seen = np.unique(recent)
        penalty = config.repetition_penalty
        x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    if counts and (config.presence_penalty or config.frequency_penalty):
        times = np.array([*counts.values()])
        x[[*counts]] -= config.presence_penalty + config.frequency_penalty * times
    best = int(x.argmax())
    require(x[best] < np.inf, "logits", "are not finite", "use another checkpoint")
    require(x[best] > -np.inf, "logit_bias", "every token is banned", "allow at least one")
    return x


def choose(
    logits: np.ndarray,
    recent: Sequence[int],
    config: StreamingConfig,
    counts: Mapping[int, int],
    position: int,
) -> int:
    """The next token: the most likely one, or one drawn from `probabilities`."""
    if config.is_greedy():
        return int(adjusted(logits, recent, config, counts).argmax())
    assert config.seed is not None, "StreamingServer.answer sets one"
    return draw(probabilities(logits, recent, config, counts), config.seed, position)


def draw(p: np.ndarray, seed: int, position: int) -> int:
    """Sample an id from probabilities (v,): a pure function of them, the seed and the position."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") >> 11) / 2**53  # in [0, 1)
    total = np.cumsum(p)
    sampled = int(np.searchsorted(total, uniform * total[-1], side="right"))
    return min(sampled, int(p.nonzero()[0][-1]))


def top_logprobs(
    logits: np.ndarray, token: int, count: int | None
) -> tuple[float | None, list[tuple[int, float]]]:
    """The log-probability of a token, and the `count` most likely ids with theirs.

    Logits are (v,). A `count` of None asks for neither. Equally likely ids are sorted by id.
    """
    if count is None:
        return None, []
    x = logits.astype(np.float64)
    x -= x.max()
    x -= math.log(np.exp(x).sum())
    least = np.partition(x, -count)[-count] if count else np.inf
    best = np.flatnonzero(x >= least)
    top = best[np.argsort(-x[best], kind="stable")][:count]
    return float(x[token]), [(int(i), float(x[i])) for i in top]


# ------------------------------------------------------------------------------------ text

MARK = "\ufffd"  # U+FFFD, which tokenizers return for bytes that are not a character


class TextStream:
    """Decodes ids one by one: returns whole characters only, and no part of a stop string."""

    def __init__(self, tokenizer: Any, context: list[int], stops: list[str]):
        """`context`: the ids before; some tokenizers decode an id differently after other ids."""
        self.tokenizer, self.context, self.stops = tokenizer, context, stops
        self.pending: list[int] = []  # ids since the last one that ended with a whole character
        self.pending_text = ""  # the whole characters in `pending`
        self.held, self.stopped = "", False  # `held`: text that may be the start of a stop string

    def push(self, token: int) -> str:
        """The text that is certain after one more id; `stopped` says if a stop string ended it."""
        self.pending.append(token)
        before = self.tokenizer.decode(self.context)
        text = self.tokenizer.decode(self.context + self.pending)[len(before) :]
        certain = text.rstrip(MARK)
        self.held += certain[len(self.pending_text) :].replace(MARK, "")
        self.pending_text = certain
        if not text.endswith(MARK) or len(self.pending) == 8:  # no character needs so many ids
            self.drop_pending(text)
        return self.release()

    def drop_pending(self, text: str) -> None:
        """Move the pending ids to the context, except the last ones if they begin a character."""
        kept = self.pending[-3:] if text.endswith(MARK) else []
        while kept and self.tokenizer.decode(kept).strip(MARK):
            kept = kept[1:]
        done = self.pending[: len(self.pending) - len(kept)]
        self.context = done if text else self.context + done  # special tokens have no text
        self.pending, self.pending_text = kept, ""

    def release(self) -> str:
        """The part of the held text that cannot become a stop string any more."""
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            text, self.held, self.stopped = self.held[: min(found)], "", True
            return text
        certain = len(self.held) - begun_length(self.held, self.stops)
        text, self.held = self.held[:certain], self.held[certain:]
        return text

    def finish(self) -> str:
        """The held text, at the end of an answer; an incomplete character is left out."""
        text, self.held = self.held, ""
        return text

    def is_clean(self) -> bool:
        """Is all text of all ids returned?"""
        return not (self.pending or self.held or self.stopped)


class WithSpecial:
    """Decodes special tokens, too: an answer's text has those that its grammar asks for."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def append_text(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """`ids` and then the ids of `text`, encoded as a continuation of theirs."""
    if not text:
        return ids
    before = tokenizer.decode(ids[-CONTEXT:])
    alone, both = tokenizer.encode(before), tokenizer.encode(before + text)
    pairs = enumerate(zip(alone, both, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(alone), len(both)))
    merged = alone[same:]  # last ids of `before`, which the text changes
    if ids[len(ids) - len(merged) :] == merged:
        return ids[: len(ids) - len(merged)] + both[same:]
    return ids + tokenizer.encode(text)


# ------------------------------------------------------------------------------------ decoding


class Snapshot(NamedTuple):
    """Immutable snapshot of a session; any number of sessions may share it."""

    state: ModelState  # of one row
    logits: np.ndarray | None  # (v,) float32 after all tokens; None if the state has not read them
    recent: tuple[int, ...]  # the last RECENT tokens
    unread: tuple[int, ...]  # tokens that the state has not read yet

    @property
    def position(self) -> int:
        """Number of tokens, unread ones included."""
        return int(self.state.position[0]) + len(self.unread)

    @property
    def nbytes(self) -> int:
        """Bytes of the state and the logits."""
        return self.state.nbytes + (0 if self.logits is None else self.logits.nbytes)

    def followed_by(self, ids: list[int]) -> Snapshot:
        """The snapshot after more tokens, which the state has not read yet."""
        if not ids:
            return self
        recent = (*self.recent, *ids)[-RECENT:]
        return self._replace(logits=None, recent=recent, unread=(*self.unread, *ids))


class Token(NamedTuple):
    """A generated token, or a token of a prompt."""

    id: int
    logprob: float | None  # natural log, from the model's own logits; None unless asked for
    top: list[tuple[int, float]]  # the most likely ids with their logprobs, as many as asked for
    gates: np.ndarray | None  # (n_layer, 3) weights of SSM, attention, MLP when it was predicted
    norms: list[np.ndarray] | None = None  # of the state then, see `head_norms`; if asked for


class Chunk(NamedTuple):
    """Text that is certain, and the tokens generated since the last chunk."""

    text: str
    tokens: list[Token]


NOT_READY = Chunk("", [])  # the next chunk needs another step


@torch.inference_mode()
def head_norms(state: ModelState | LiveBatch, rows: list[int]) -> list[list[np.ndarray]]:
    """For each of some rows, the L2 norms of the state's heads in each layer, float32.

    A layer has h numbers, of the heads of its SSM, and then a, of those of its memory, if it has
    one. A LiveBatch has to be between a step and its `commit`.
    """
    if not rows:
        return []
    if isinstance(state, LiveBatch):
        layers = state.norms(rows)
    else:
        kinds = [(layer.ssm, layer.memory) for layer in state.layers]
        layers = [[matrix_norms(t[rows]) for t in pair if t is not None] for pair in kinds]
    norms = [torch.cat(parts, dim=1) for parts in layers]  # (rows, h + a) each
    ends = np.cumsum([t.shape[1] for t in norms])[:-1]
    return [np.split(row.copy(), ends) for row in torch.cat(norms, dim=1).cpu().numpy()]


class Decoder:
    """Reads prompts and generates tokens for all open answers, as one batch.

    It has no thread of its own: one of the threads that wait for a token runs `step`, which
    advances every answer that has room. Answers join and leave between any two steps. A step does
    not hold the lock of `condition` while the model runs, which never changes its inputs: a
    LiveBatch, which has the states of a plain model on a CPU, keeps them until `commit`.

    Answers that are to read the same tokens after the same state read them once. `prefixes` keeps
    states for prompts to come, of texts that begin with their prompt.
    """

    def __init__(
        self,
        model: TinyMambaModel,
        batch_size: int,
        compiled: bool = False,
        cache_bytes: int = 0,
        engine: OnnxEngine | None = None,
    ):
        self.model, self.batch_size = model.requires_grad_(False).eval(), batch_size
        self.engine = engine  # runs the model; None for PyTorch
        self.prefixes = PrefixCache(cache_bytes)
        self.device = model.embedding.weight.device
        self.run_one_token = torch.compile(model.run) if compiled else model.run
        self.may_be_live = not compiled and engine is None
        self.live: LiveModel | None = None  # the model for a LiveBatch
        self.condition, self.model_lock = threading.Condition(), threading.Lock()
        self.stepping = False  # whether a thread is in `step`
        self.answers: list[Answer] = []  # all open ones
        self.batch: list[Answer] = []  # those whose states are the rows of `batch_state`
        self.batch_state: Any = None  # a LiveBatch or ModelState, unless `batch` is empty

    def wait(self, answer: Answer) -> None:
        """Wait until the answer has a token or is over; take steps unless another thread does."""
        while answer.needs_token():
            leads = False
            try:
                with self.condition:
                    while answer.needs_token() and self.stepping:
                        self.condition.wait()
                    if answer.needs_token():
                        leads = self.stepping = True
                if leads:
                    self.step()
            finally:
                if leads:
                    with self.condition:
                        self.stepping = False
                        self.condition.notify_all()

    def step(self) -> None:
        """Read the next part of the prompts, then generate a token of every answer with room."""
        with self.condition:
            prompts, batch = self.plan_prompts(), self.form_batch(self.choose_batch())
            tokens, state = [[a.last] for a in batch], self.batch_state
        for readers, ids in prompts:
            first = readers[0]
            adapters, scored = [first.config.adapter], first.to_score(len(ids))
            read = self.read([ids], first.state, adapters, scored)
            with self.condition:
                for answer in readers:
                    answer.has_read(len(ids), *read)
        if batch:
            logits, gates, state, _ = self.read(tokens, state, [a.config.adapter for a in batch])
            rows = [row for row, answer in enumerate(batch) if answer.wants_norms]
            norms = dict(zip(rows, head_norms(state, rows), strict=True))
            with self.condition:
                self.draw_tokens(batch, (logits, gates, norms), state)

    # Which answers take part -----------------------------------------------------------------

    def plan_prompts(self) -> list[tuple[list[Answer], list[int]]]:
        """The ids to read next, each list with the answers whose prompts go on with it.

        They share the tokens of a step equally, but only as many take part as can have MIN_SHARE
        tokens each: the one that has waited longest, then those with the fewest tokens left.
        """
        left = SMALL_PREFILL if len(self.answers) > 1 else PREFILL
        parts = []
        waiting = self.group_readers()
        waiting = waiting[:1] + sorted(waiting[1:], key=lambda group: len(group[0].to_read))
        chosen = sorted(waiting[: left // MIN_SHARE], key=lambda group: len(group[0].to_read))
        for number, readers in enumerate(chosen):
            share = left // (len(chosen) - number)
            small = any(a.config.optimize_memory for a in readers)
            ids = common_ids(readers, min(share, SMALL_PREFILL) if small else share)
            parts.append((readers, ids))
            left -= len(ids)
        return parts

    def group_readers(self) -> list[list[Answer]]:
        """The answers whose prompts are not read yet; those that go on alike are in one group."""
        groups: dict[Any, list[Answer]] = {}
        for a in self.answers:
            if a.to_read and not a.over:
                alike = a.to_read[:MIN_SHARE] if a.config.prompt_logprobs is None else a.to_read
                key = id(a.state), a.config.adapter, a.config.prompt_logprobs, tuple(alike)
                groups.setdefault(key, []).append(a)
        return [*groups.values()]

    def choose_batch(self) -> list[Answer]:
        """The answers of the next step.

        First those in the batch, until their buffers are full; then others whose buffers are less
        than half full.
        """
        inside = [a for a in self.batch if a.has_room(a.config.state_buffer_size)]
        known = set(map(id, inside))
        others = (
            a
            for a in self.answers
            if id(a) not in known and a.has_room((a.config.state_buffer_size + 1) // 2)
        )
        return [*inside, *others][: self.batch_size]

    def form_batch(self, chosen: list[Answer]) -> list[Answer]:
        """Make these answers the batch, and their states the rows of `batch_state`; in row order.

        An answer that leaves takes its state with it.
        """
        if not chosen or chosen == self.batch:
            return chosen
        ids = set(map(id, chosen))
        stay = []  # rows
        for row, answer in enumerate(self.batch):
            if answer.state is None and id(answer) in ids:
                stay.append(row)
            elif answer.state is None:
                answer.state = self.state_of(answer)
        order, join = fill_gaps(stay), [a for a in chosen if a.state is not None]
        if len(order) < len(self.batch):  # first, so that an interrupt leaves no row in two places
            self.batch_state = self.regroup(order, []) if order else None
            self.batch = [self.batch[row] for row in order]
        if join:
            self.batch_state = self.regroup([*range(len(order))], [a.state for a in join])
            self.batch = [*self.batch, *join]
        for answer in self.batch:
            answer.state = None
        return self.batch

    def regroup(self, order: list[int], states: list[ModelState]) -> ModelState | LiveBatch:
        """The state of some rows of the batch, in this order, and of further states."""
        live, now = self.find_live(), self.batch_state
        if isinstance(now, LiveBatch):
            if live is now.live:
                return now.regroup(order, states)
            now = now.select([*range(len(now.positions))])  # the model has changed
        if live is not None:
            return LiveBatch(live).regroup([], [*(now.select([row]) for row in order), *states])
        return ModelState.join([*([now.select(order)] if order else []), *states])

    def find_live(self) -> LiveModel | None:
        """The model for a LiveBatch, with its present weights; None if it has to run as it is."""
        if not self.may_be_live or why_not_live(self.model):
            return None
        if self.live is None or not self.live.holds():
            self.live = LiveModel(self.model)
        return self.live

    def draw_tokens(
        self, batch: list[Answer], results: tuple[np.ndarray, np.ndarray, dict], state: Any
    ) -> None:
        """Give each answer its row of the results of a step: logits, gates, and norms by row."""
        logits, gates, norms = results
        if isinstance(state, LiveBatch):
            state.commit()
        elif self.batch:  # otherwise all answers were closed during the step
            self.batch_state = state
        for row, answer in enumerate(batch):
            if answer.open:
                answer.draw(logits[row], gates[:, row], norms.get(row))

    def state_of(self, answer: Answer) -> ModelState:
        """The state of one answer, in the batch or not."""
        if answer.state is not None:
            return answer.state
        return self.batch_state.select([self.batch.index(answer)])

    def remove(self, answer: Answer) -> ModelState:
        """Remove an answer that is closed; returns its state."""
        answer.state = self.state_of(answer)
        self.answers.remove(answer)
        if not self.answers:
            self.batch, self.batch_state = [], None
        return answer.state

    # Model calls -----------------------------------------------------------------------------

    @torch.inference_mode()
    def read(
        self,
        ids: list[list[int]],
        state: Any,
        adapters: list[str | None],
        scored: tuple[list[int], int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, Any, list[Token]]:
        """ids (b, l) -> logits (b, v) and gates (n_layer, b, 3) of the last column, new state.

        `adapters`: one for each row. `scored`: for a single row, the ids (at most l) that follow
        its first, second, ... id, and a number of alternatives; returned last, as tokens.
        """
        with self.model_lock:
            self.select_adapters(adapters)
            hidden, logits, gates, state = self.run(torch.tensor(ids, device=self.device), state)
            scores = self.score(hidden[0], *scored) if scored else []
        if len(ids[0]) > 1:
            state = state.clone()  # it is a small view of tensors of length l
        return logits.cpu().numpy(), gates[:, :, -1].float().cpu().numpy(), state, scores

    def run(self, ids: Tensor, state: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
        """ids (b, l) -> hidden (b, l, d), last logits (b, v), gates, new state.

        The gates are (n_layer, b, l, 3), or (n_layer, b, 1, 3) with the last column only. A
        LiveBatch takes ids (b, 1), and is returned itself.
        """
        if isinstance(state, LiveBatch):
            return state.step(ids[:, 0])
        if self.engine:
            return self.engine.run(ids, state)
        run = self.run_one_token if ids.shape[1] == 1 else self.model.run
        hidden, state, gates = run(ids, state)
        return hidden, self.model.head(hidden[:, -1]).float(), gates, state

    def score(self, hidden: Tensor, ids: list[int], count: int) -> list[Token]:
        """The ids with their logprobs after each of hidden (l, d); 64 at a time, as v is large."""
        scores = []
        for at in range(0, len(ids), 64):
            part = ids[at : at + 64]
            logits = self.model.head(hidden[at : at + len(part)]).float().cpu().numpy()  # (64, v)
            scores += [
                Token(i, *top_logprobs(row, i, count), None)
                for row, i in zip(logits, part, strict=True)
            ]
        return scores

    @torch.inference_mode()
    def mean_hidden(self, ids: list[int], state: ModelState, adapter: str | None) -> np.ndarray:
        """The mean over ids (l,) of the hidden states after the last norm: (d,) float64.

        Read in small pieces, so that the answers of other threads go on between them.
        """
        total = np.zeros(self.model.config.d_model)
        for at in range(0, len(ids), SMALL_PREFILL):
            piece = torch.tensor([ids[at : at + SMALL_PREFILL]], device=self.device)  # (1, l)
            with self.model_lock:
                self.select_adapters([adapter])
                hidden, *_, state = self.run(piece, state)  # (1, l, d)
            total += hidden[0].float().sum(0).cpu().numpy()
        return total / len(ids)

    def select_adapters(self, adapters: list[str | None]) -> None:
        """Use the adapter of each row in the next run of the model."""
        if hasattr(self.model, "adapter_state"):
            from peft import set_adapter

            same = len(set(adapters)) == 1
            set_adapter(self.model, adapters[0] if same else adapters)

    def read_unread(self, snapshot: Snapshot, adapter: str | None) -> Snapshot:
        """The same snapshot after its state has read all tokens."""
        state, logits, unread = snapshot.state, snapshot.logits, list(snapshot.unread)
        for at in range(0, len(unread), SMALL_PREFILL):
            ids = unread[at : at + SMALL_PREFILL]
            (logits,), _, state, _ = self.read([ids], state, [adapter])
        return snapshot._replace(state=state, logits=logits, unread=())


def fill_gaps(stay: list[int]) -> list[int]:
    """An order of rows in which the last ones take the places of those that do not stay."""
    count = len(stay)
    gaps = sorted({*range(count)} - {*stay})
    order = {row: row for row in stay if row < count}
    order |= dict(zip(gaps, (row for row in stay if row >= count), strict=True))
    return [order[row] for row in range(count)]


def common_ids(readers: list[Answer], most: int) -> list[int]:
    """Up to `most` ids that all of these answers read next, up to a state that one must keep."""
    most = min(most, *(a.until_kept() for a in readers))
    ids = readers[0].to_read[:most]
    for other in readers[1:]:
        theirs = other.to_read[: len(ids)]
        if ids[: len(theirs)] != theirs:
            pairs = enumerate(zip(ids, theirs, strict=False))
            theirs = theirs[: next(n for n, (a, b) in pairs if a != b)]
        ids = theirs
    return ids


class Answer:
    """One answer while it is generated: an iterator of Chunk. Read it to the end, or close it.

    Then `final` is the snapshot that the session continues from, and `finish_reason` is "stop",
    "length", or None if the answer was closed early.
    """

    def __init__(
        self,
        decoder: Decoder,
        origin: Snapshot,
        prompt: list[int],
        config: StreamingConfig,
        end_ids: set[int],
        tokenizer: Any = None,
        on_end: Callable[[Answer], None] | None = None,
        keep_at: Sequence[int] = (),
        matcher: Matcher | None = None,
        norms: bool = False,
    ):
        """Answer a prompt that follows `origin`. `on_end` is called when the answer is over.

        `end_ids` end the answer. Without a tokenizer, chunks have tokens and no text. `keep_at`:
        numbers of tokens of the prompt after which other prompts may go on differently. A
        `matcher`, of this answer only, says which tokens may be next. `norms`: give each token its.
        """
        self.decoder, self.config, self.end_ids, self.on_end = decoder, config, end_ids, on_end
        self.matcher, self.wants_norms = matcher, norms
        self.origin, self.prompt_tokens = origin, len(prompt)
        # The prefix cache: all ids of the text; which prefixes' states to keep; the last one kept.
        caching = decoder.prefixes.max_bytes > 0 and origin.position == 0
        self.text_ids: Any = [*prompt] if caching else None
        self.keep_at: list[int] = []
        self.cached_tokens = self.kept = 0
        self.gates: Any = None  # (n_layer, 3) that go with `logits`
        cached = self.find_prefix(keep_at) if self.text_ids is not None else origin
        self.start = cached.followed_by(prompt[self.cached_tokens :])  # what `ids` follow
        self.final = self.start
        # Generation: what the decoder reads and draws.
        self.state: Any = cached.state  # a ModelState, or None while it is a row of the batch
        self.to_read = list(self.start.unread)
        self.logits: Any = cached.logits  # (v,) after all tokens that the state has read
        self.recent, self.position = self.start.recent, self.start.position
        self.ids: list[int] = []  # all tokens drawn since `start`
        self.queue: deque[Token] = deque()  # those that are not given out yet
        self.last: int | None = None  # the last one, which the state has not read
        self.drawn, self.over, self.open = 0, False, True  # `over`: no more tokens are drawn
        self.counts: Counter[int] = Counter()  # how often each id was drawn
        self.next_start: tuple[int, Snapshot] | None = None  # see `move_start`
        self.closing: Token | None = None  # the token of `end_ids` that ended it; not given out
        self.scored = self.score_first(origin.logits)
        self.error: Exception | None = None
        self.finish_reason: str | None = None
        # Reading: what the reader has.
        self.given = 0  # tokens of `ids` that are given out
        self.clean = 0  # those of them whose text is complete and given out
        self.partial_text = ""  # text given out after the clean ones
        self.blocking, self.abandoned = True, False  # see `ready_chunks` and `abandon`
        self.tokenizer, self.chunks = tokenizer, self.make_chunks()
        shown = WithSpecial(tokenizer) if matcher and matcher.shows_special else tokenizer
        self.stream = TextStream(shown, list(self.recent[-CONTEXT:]), config.stop or [])
        if not self.to_read:
            self.begin(self.logits, self.gates)
        decoder.answers.append(self)

    def find_prefix(self, keep_at: Sequence[int]) -> Snapshot:
        """The snapshot after the longest prefix of the prompt that is kept, or `origin`.

        Also decides after which of its tokens to keep a state: where others may go on differently
        (`keep_at`), where another did, and at the end; but only if it saves enough reading.
        """
        ids, scored = np.array(self.text_ids, np.int32), self.config.prompt_logprobs is not None
        found = self.decoder.prefixes.find(self.config.adapter, ids)
        snapshot = self.origin
        if found.value is not None and not scored:
            self.cached_tokens = self.kept = found.length
            snapshot, self.gates = found.value
        last = self.kept
        for position in sorted({*keep_at, found.common, len(ids)}):
            if last + MIN_PREFIX <= position <= len(ids):
                self.keep_at.append(position)
                last = position
        return snapshot

    def until_kept(self) -> int:
        """Tokens of the prompt up to its end, or to one after which the state is kept."""
        left = len(self.to_read)
        return left - len(self.text_ids) + self.keep_at[0] if self.keep_at else left

    def keep(self, position: int, state: ModelState, logits: np.ndarray, gates: Any) -> None:
        """Put what follows after this many tokens of the text into the prefix cache."""
        prefixes, adapter = self.decoder.prefixes, self.config.adapter
        ids = np.array(self.text_ids[:position], np.int32)
        recent = tuple(self.text_ids[:position][-RECENT:])
        snapshot = Snapshot(state, logits.copy(), recent, ())
        prefixes.store(adapter, ids, (snapshot, gates), snapshot.nbytes)
        self.kept = position

    def keep_end(self, state: ModelState) -> None:
        """Put the state after the answer into the prefix cache, for the next turn of a chat.

        Its prompt has the answer as text. If that has other ids than were drawn, no prompt can
        begin with them. Otherwise nothing but the same prompt again needs the state before it.
        """
        end = 0 if self.text_ids is None else len(self.text_ids) - len(self.final.unread)
        if end < self.kept + MIN_PREFIX:
            return
        prompt, answer = self.text_ids[: self.prompt_tokens], self.text_ids[self.prompt_tokens :]
        if self.tokenizer and self.tokenizer.encode(self.tokenizer.decode(answer)) != answer:
            return
        if self.cached_tokens < self.kept == self.prompt_tokens:  # the prompt is new
            prefixes = self.decoder.prefixes
            prefixes.drop_early(self.config.adapter, np.array(prompt, np.int32))
        self.keep(end, state, self.logits, self.gates)

    def score_first(self, logits: np.ndarray | None) -> list[Token]:
        """The prompt's first token with its logprob, if asked for: no later read returns it."""
        count = self.config.prompt_logprobs
        if not self.to_read or count is None:
            return []
        first = self.to_read[0]
        known = (None, []) if logits is None else top_logprobs(logits, first, count)
        return [Token(first, *known, None)]

    @property
    def scores(self) -> list[Token]:
        """The prompt's tokens with their logprobs, once they are read, if `prompt_logprobs` is set.

        The first token of a session has no logprob.
        """
        return self.scored[len(self.scored) - self.prompt_tokens :]

    @property
    def ended_by(self) -> int | None:
        """The id that ended the answer, if one did."""
        return self.closing.id if self.closing else None

    # Read by its user ------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self.chunks)

    def ready_chunks(self) -> Iterator[Chunk]:
        """The chunks that need no further step: for a user who calls `Decoder.step` itself."""
        self.blocking = False
        for chunk in self.chunks:
            if chunk is NOT_READY:
                return
            yield chunk

    def make_chunks(self) -> Generator[Chunk, None, None]:
        """The generator behind the iterator; at its end the answer is closed."""
        tokens: list[Token] = []
        text = ""
        try:
            while True:
                while not self.blocking and self.needs_token():
                    yield NOT_READY
                token = self.next_token()
                if token is None:
                    break
                tokens.append(token)
                text = self.text_after(token.id)
                if self.stream.stopped:
                    self.finish_reason = "stop"
                    break
                if text or not self.tokenizer:
                    yield Chunk(text, tokens)
                    tokens, text = [], ""
                    self.move_start()
            if not self.stream.stopped:
                text = self.stream.finish()
                self.partial_text = self.stream.pending_text.replace(MARK, "")
                self.clean = self.given - len(self.stream.pending)
            if text or tokens:
                yield Chunk(text, tokens)
        finally:
            self.finalize()

    def next_token(self) -> Token | None:
        """Wait for the next token; None at the end."""
        self.decoder.wait(self)
        with self.decoder.condition:
            if self.queue:
                self.given += 1
                return self.queue.popleft()
        if self.error:
            raise self.error
        return None

    def text_after(self, token: int) -> str:
        """The text that is certain after one more token."""
        text = self.stream.push(token) if self.tokenizer else ""
        if self.stream.is_clean():
            self.clean, self.partial_text = self.given, ""
        else:
            self.partial_text += text
        return text

    def move_start(self) -> None:
        """Drop the first part of a long answer once its reader has all of it.

        So `ids` stays short, and closing the answer reads few tokens again.
        """
        with self.decoder.condition:
            if self.next_start and self.clean >= self.next_start[0]:
                count, self.start = self.next_start
                del self.ids[:count]
                self.given, self.clean = self.given - count, self.clean - count
                self.next_start = None

    # Ended by its user -----------------------------------------------------------------------

    def stop(self) -> None:
        """End the answer from any thread; its reader gets no more tokens."""
        with self.decoder.condition:
            self.over = True
            self.queue.clear()
            self.decoder.condition.notify_all()

    def close(self) -> None:
        """End the answer: the session continues after what was given out."""
        try:
            self.chunks.close()
        except ValueError:  # another thread waits inside the generator, and will finalize
            self.stop()
        else:
            self.finalize()

    def abandon(self) -> None:
        """End the answer and undo it: the session stays as it was before the prompt."""
        with self.decoder.condition:
            self.abandoned = True
        self.close()

    def finalize(self) -> None:
        """Leave the decoder, set `final`, and call `on_end`; a second call does nothing."""
        with self.decoder.condition:
            if not self.open:
                return
            self.open = False
            state = self.decoder.remove(self)
            try:
                if self.given < len(self.ids):  # some were generated ahead and never given out
                    self.closing = None
                    self.finish_reason = "stop" if self.stream.stopped else None
                if self.error or self.abandoned:
                    self.final = self.origin
                elif not self.to_read and self.clean == len(self.ids) and not self.partial_text:
                    self.final = self.snapshot(state)
                    self.keep_end(state)
                elif not self.to_read:
                    ids = append_text(self.tokenizer, self.ids[: self.clean], self.partial_text)
                    self.final = self.start.followed_by(ids)
            finally:
                if self.on_end:
                    self.on_end(self)

    # Called by the decoder -------------------------------------------------------------------

    def needs_token(self) -> bool:
        """Would a reader have to wait?"""
        return self.open and not self.over and not self.queue

    def has_room(self, most: int) -> bool:
        """May another token be drawn, with fewer than `most` in the queue?"""
        return self.open and not self.over and self.last is not None and len(self.queue) < most

    def to_score(self, count: int) -> tuple[list[int], int] | None:
        """The `scored` argument of Decoder.read for the next `count` tokens of the prompt."""
        alternatives = self.config.prompt_logprobs
        return None if alternatives is None else (self.to_read[1 : count + 1], alternatives)

    def has_read(
        self,
        count: int,
        logits: np.ndarray,
        gates: np.ndarray,
        state: ModelState,
        scores: list[Token],
    ) -> None:
        """Take the results of reading `count` more tokens of the prompt."""
        if not self.open:
            return
        self.scored += scores
        keeps = self.keep_at and self.until_kept() == count
        self.state, self.to_read = state, self.to_read[count:]
        if keeps:
            self.keep(self.keep_at.pop(0), state, logits[0], gates[:, 0])
        if not self.to_read:
            self.begin(logits[0], gates[:, 0])

    def begin(self, logits: Any, gates: np.ndarray | None) -> None:
        """Draw the first token by logits (v,), now that the prompt is read."""
        self.start = self.start._replace(state=self.state, logits=logits, unread=())
        self.logits = logits
        if self.config.max_new_tokens == 0:
            self.end("length")
        elif self.matcher and self.matcher.finished:  # nothing may be written
            self.end("stop")
        else:
            rows = [0] if self.wants_norms else []
            self.draw(logits, gates, *head_norms(self.state, rows))

    def draw(
        self, logits: np.ndarray, gates: np.ndarray | None, norms: list[np.ndarray] | None = None
    ) -> None:
        """Draw the next token by logits (v,); it takes the gates and norms with it."""
        c = self.config
        window = self.recent[len(self.recent) - min(len(self.recent), c.repetition_window) :]
        self.logits, self.gates, self.last = logits, None if gates is None else gates.copy(), None
        if self.over:  # it was stopped during the step
            return
        try:
            allowed = self.matcher.mask(logits) if self.matcher else logits
            token = choose(allowed, window, c, self.counts, self.position)
            if self.matcher and token not in self.end_ids:
                self.matcher.accept(token)
        except Exception as e:  # raised in this answer's reader only, not in the thread that steps
            self.error = e
            self.end(None)
            return
        if token in self.end_ids:
            self.closing = Token(token, *top_logprobs(logits, token, c.logprobs), None)
            self.end("stop")
            return
        self.last, self.position, self.drawn = token, self.position + 1, self.drawn + 1
        self.counts[token] += 1
        self.recent = (*self.recent, token)[-RECENT:]
        self.ids.append(token)
        if self.text_ids is not None:
            self.text_ids.append(token)
        known = top_logprobs(logits, token, c.logprobs)
        self.queue.append(Token(token, *known, self.gates, norms))
        if self.next_start is None and len(self.ids) >= MAX_REPLAY:
            self.next_start = len(self.ids), self.snapshot(self.decoder.state_of(self))
        if self.matcher and self.matcher.finished:
            self.end("stop")
        elif self.drawn == c.max_new_tokens:
            self.end("length")

    def end(self, reason: str | None) -> None:
        """Draw no more tokens."""
        self.finish_reason, self.over = reason, True

    def snapshot(self, state: ModelState) -> Snapshot:
        """The snapshot after all tokens drawn so far, of which `state` may lack the last."""
        if self.last is None:
            return Snapshot(state, self.logits.copy(), self.recent, ())
        return Snapshot(state, None, self.recent, (self.last,))


# ------------------------------------------------------------------------------------ sessions


@dataclass
class Session:
    """One conversation: its snapshot now, and the one before its last turn."""

    id: str
    now: Snapshot
    config: StreamingConfig
    seed: int  # random seed of its answers
    before: Snapshot | None = None  # what a rollback returns to
    chat: ChatHistory | None = None  # its messages, if all of its text is theirs
    chat_before: ChatHistory | None = None
    answer: Answer | None = None  # the one that is being generated
    turns: int = 0
    # Of servers with a store; see tinymamba/shared_sessions.py:
    stamp: str = ""  # of what the store has, if that is the same
    keys: dict[str, str] = dataclasses.field(default_factory=dict)  # of turns
    reply: dict[str, Any] | None = None  # to the last turn, if that had a key; {} if not kept
    created: float = dataclasses.field(default_factory=time.time)
    used: float = dataclasses.field(default_factory=time.time)


class StreamingServer:
    """Sessions of one model, for any number of threads.

    model_path   a checkpoint, or a model, which is moved, set to eval mode and frozen
    config       defaults of every session
    tokenizer    tokenizer.json, vocab.txt, or an object with encode and decode; None takes the
                 model's own, or for an old checkpoint the one beside it or its training data
    dtype        of weights and activations; states are always float32
    compiled     compile the model for one token, for a GPU; on a CPU it is slower
    adapters     folders written by peft.py, by name; each session and answer may choose one, and
                 all are decoded in one batch
    force        load adapters of another base model, too, with a warning
    engine       "torch", or "onnx" for ONNX Runtime, which is faster on a CPU
    onnx_folder  keeps what "onnx" exports at a model's first start, which takes minutes; None takes
                 ~/.cache/tinymamba/onnx
    cache_bytes  memory of the prefix cache, on the device: a text that begins like an earlier one
                 is read from where they part, if their states are kept there

    Prompts are text or lists of ids. Invalid arguments raise a UserError and change nothing. An
    incomplete character at the end of an answer is left out of its text and of the session.
    """

    def __init__(
        self,
        model_path: str | Path | TinyMambaModel,
        device: str = "auto",
        config: StreamingConfig | None = None,
        tokenizer: Any = None,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        adapters: dict[str, str | Path] | None = None,
        force: bool = False,
        cache_bytes: int = 0,
        engine: str = "torch",
        onnx_folder: str | Path | None = None,
    ):
        device = "cpu" if (engine, str(device)) == ("onnx", "auto") else str(device)
        target, config = usable_device(device), config or StreamingConfig()
        attached = hasattr(model_path, "adapter_state")
        check_engine(engine, target, dtype, compiled, adapters or attached)
        problem = why_no_compile(target) if compiled else None
        require(not problem, "compile", f"{problem}", "leave it out")
        if isinstance(model_path, TinyMambaModel):
            self.model, beside = model_path, []
        else:
            reject_onnx_folder(model_path)
            self.model, beside = load_model(model_path, target), [model_path]
        self.tokenizer = open_tokenizer(tokenizer, self.model, beside)
        self.adapters = self.load_adapters(adapters or {}, compiled, force)
        self.model = self.model.to(target, dtype)
        runtime = self.open_engine(onnx_folder) if engine == "onnx" else None
        column_major_weights(self.model)
        self.vocab_size = self.model.config.vocab_size
        problem = why_no_tokenizer(self.model)
        self.grammars = GrammarCompiler(self.tokenizer, self.vocab_size, problem)
        self.config = self.checked(config)
        self.decoder = Decoder(self.model, config.batch_size, compiled, cache_bytes, runtime)
        self.condition = self.decoder.condition
        self.sessions: dict[str, Session] = {}
        self.initial = {name: self.make_initial(name) for name in (None, *self.adapters)}
        known = getattr(self.tokenizer, "__len__", lambda: 0)()
        problem = f"has {known} ids, but the model {self.vocab_size}"
        remedy = "pass the tokenizer that the model was trained with"
        require(known <= self.vocab_size, "tokenizer", problem, remedy)

    def load_adapters(
        self, folders: dict[str, str | Path], compiled: bool, force: bool
    ) -> list[str]:
        """Attach the adapters to the model; returns their names."""
        problem, remedy = "each mix of adapters would be compiled again", "load one, or merge it"
        require(not compiled or len(folders) <= 1, "compile", problem, remedy)
        if folders:
            from peft import load_adapter

            for name, folder in folders.items():
                load_adapter(self.model, folder, name, force)
        return list(folders)

    def open_engine(self, folder: str | Path | None) -> OnnxEngine:
        """ONNX Runtime for the model, from the graphs in a folder."""
        from export_model import open_engine

        return open_engine(self.model.requires_grad_(False).eval(), Path(folder or default_cache()))

    @functools.cached_property
    def fingerprint(self) -> str:
        """The hash that ties saved sessions to this model."""
        return self.model.fingerprint()

    # Generation ------------------------------------------------------------------------------

    def generate_text(
        self, prompt: str | list[int], session_id: str | None = None, **settings: Any
    ) -> str:
        """The whole answer to a prompt, as text."""
        return "".join(self.generate_stream(prompt, session_id, **settings))

    def generate_stream(
        self, prompt: str | list[int], session_id: str | None = None, **settings: Any
    ) -> Iterator[str]:
        """The answer to a prompt, text by text.

        If it is closed early, the session continues after the text that was given out. Invalid
        arguments raise when the first text is requested.
        """
        with contextlib.closing(self.answer(prompt, session_id, **settings)) as answer:
            for chunk in answer:
                if chunk.text:
                    yield chunk.text

    def answer(
        self,
        prompt: str | list[int],
        session_id: str | None = None,
        *,
        as_ids: bool = False,
        keep_at: Sequence[int] = (),
        grammar: Grammar | None = None,
        norms: bool = False,
        **settings: Any,
    ) -> Answer:
        """Start an answer; `settings` are fields of StreamingConfig.

        Without a session, it is generated in a temporary one. `as_ids` needs no tokenizer: chunks
        have tokens and no text, and every token counts as given out. `keep_at`: numbers of tokens
        of the prompt after which other prompts may go on differently, for the prefix cache.
        `grammar` takes the place of `structured_outputs`: it is already compiled. `norms`: each
        token has the norms of the heads of the state from which it was drawn.
        """
        problem = why_no_tokenizer(self.model)
        require(as_ids or self.tokenizer, "tokenizer", problem, "pass one, or ids")
        ids = self.encode(prompt)
        with self.condition:
            session = self.find(session_id) if session_id is not None else None
        config = self.configured(session.config if session else self.config, settings)
        if grammar is None and config.structured_outputs is not None:
            grammar = self.grammars.compile(config.structured_outputs)  # others answer meanwhile
        with self.condition:
            session = self.find(session_id) if session_id is not None else None
            if settings.get("seed") is None and session:
                config.seed = session.seed
            elif config.seed is None:
                config.seed = secrets.randbits(63)
            begun = session is not None and session.now.position > 0
            now = session.now if session and begun else self.initial[config.adapter]
            end_ids = {self.eos_id(config), *(config.stop_ids or ())}
            answer = Answer(
                self.decoder,
                now,
                self.with_first_token(ids, now, config),
                config,
                end_ids,
                None if as_ids else self.tokenizer,
                functools.partial(self.end_turn, session) if session else None,
                keep_at,
                grammar.start(end_ids) if grammar else None,
                norms,
            )
            if session:
                session.answer = answer
            return answer

    def embed(self, prompt: str | list[int], adapter: str | None = None) -> np.ndarray:
        """The embedding of a prompt: (d,) float32 of length 1.

        It has the direction of the mean of the last hidden states over the tokens. It may be
        called from any thread, while answers are generated in others.
        """
        config = self.configured(self.config, {"adapter": adapter})
        ids, initial = self.encode(prompt), self.initial[adapter]
        require(ids, "prompt", "is empty", "pass some text, or at least one id")
        ids = self.with_first_token(ids, initial, config)
        mean = self.decoder.mean_hidden(ids, initial.state, adapter)
        return (mean / np.linalg.norm(mean)).astype(np.float32)

    def end_turn(self, session: Session, answer: Answer) -> None:
        """Continue the session from the end of its answer."""
        session.now, session.answer, session.used = answer.final, None, time.time()
        if answer.error or answer.abandoned:
            return
        session.before, session.turns, session.reply = answer.origin, session.turns + 1, None
        session.chat, session.chat_before = None, session.chat  # ChatSessions sets the new one
        if answer.config.reset_on_eos and answer.ended_by == self.eos_id(answer.config):
            session.now = self.initial[session.config.adapter]

    def encode(self, prompt: str | Sequence[int] | np.ndarray | Tensor) -> list[int]:
        """The ids of a prompt; anything but text or valid ids is a UserError."""
        if isinstance(prompt, str):
            problem = why_no_tokenizer(self.model)
            require(self.tokenizer, "tokenizer", problem, "pass one, or a prompt of ids")
            prompt = self.tokenizer.encode(prompt)
        ids = prompt.tolist() if isinstance(prompt, np.ndarray | Tensor) else prompt
        valid = isinstance(ids, list | tuple) and {int}.issuperset(map(type, ids))
        problem = "is neither text nor a list of ids, which are whole numbers"
        require(valid, "prompt", problem, "pass one of them")
        valid = min(ids, default=0) >= 0 and max(ids, default=0) < self.vocab_size
        remedy = f"ids are from 0 to {self.vocab_size - 1}"
        require(valid, "prompt", "has ids outside the vocabulary", remedy)
        return list(ids)

    def with_first_token(self, ids: list[int], now: Snapshot, config: StreamingConfig) -> list[int]:
        """The ids of a prompt; in a new session, after the token that begins it."""
        if now.position > 0:
            return ids
        first = config.bos_token_id
        if first is None and not ids:
            first = self.eos_id(config)
            problem = "is empty, and the model has no bos or eos to begin with"
            require(first >= 0, "prompt", problem, "pass some text, or set bos_token_id")
        return ids if first is None else [first, *ids]

    def eos_id(self, config: StreamingConfig) -> int:
        """The id that ends a text, or -1."""
        if config.eos_token_id is not None:
            return config.eos_token_id
        if self.model.config.eos_id >= 0:
            return self.model.config.eos_id
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return -1 if eos is None else eos

    def configured(self, config: StreamingConfig, settings: dict[str, Any]) -> StreamingConfig:
        """A copy of the config with these settings; an invalid one is a UserError."""
        fields = sorted(field.name for field in dataclasses.fields(StreamingConfig))
        for name in settings:
            require(name in fields, name, "is not a setting", f"use {', '.join(fields)}")
        problem, remedy = "applies to all answers of a server", "set it in the server's config"
        require("batch_size" not in settings, "batch_size", problem, remedy)
        return self.checked(dataclasses.replace(config, **settings))

    def checked(self, config: StreamingConfig) -> StreamingConfig:
        """The config itself; an invalid one is a UserError."""
        problem = f"is a {type(config).__name__}"
        require(isinstance(config, StreamingConfig), "config", problem, "pass a StreamingConfig")
        config.validate(self.vocab_size)
        known = config.adapter is None or config.adapter in self.adapters
        remedy = f"there are {', '.join(self.adapters) or 'none'}"
        require(known, "adapter", f"there is no {config.adapter!r}", remedy)
        return config

    # Sessions --------------------------------------------------------------------------------

    def create_session(
        self,
        session_id: str | None = None,
        seed: int | None = None,
        config: StreamingConfig | None = None,
    ) -> str:
        """Create a session, under a random name if none is given; returns its id.

        With a `seed`, the same prompts give the same answers again.
        """
        config = self.checked(self.config if config is None else config)
        seed = config.seed if seed is None else seed
        seed = secrets.randbits(63) if seed is None else seed
        now = self.initial[config.adapter]
        return self.insert(self.new_session(session_id, now, config, seed)).id

    def make_initial(self, adapter: str | None) -> Snapshot:
        """The snapshot before any token; an adapter may bring its own initial state."""
        self.decoder.select_adapters([adapter])
        return Snapshot(self.model.init_state(1), None, (), ())

    def new_session(
        self,
        session_id: str | None,
        now: Snapshot,
        config: StreamingConfig,
        seed: int,
        turns: int = 0,
    ) -> Session:
        """A session that the server does not have yet."""
        name = uuid.uuid4().hex if session_id is None else session_id
        require_plain_name(name, "session_id")
        valid = has_type(seed, int) and 0 <= seed < 2**63
        require(valid, "seed", f"{seed!r} is invalid", "it must be from 0 to 2^63 - 1")
        return Session(name, now, config, seed, turns=turns)

    def insert(self, session: Session, replace: bool = False) -> Session:
        """Put a session among those of the server, in place of another one only if `replace`."""
        with self.condition:
            free = replace or session.id not in self.sessions
            require(free, "session_id", f"{session.id} is taken", "use another")
            self.sessions[session.id] = session
            return session

    def find(self, session_id: str, idle: bool = True) -> Session:
        """The session of this id, which must not be answering if `idle`."""
        session = self.sessions.get(session_id) if isinstance(session_id, str) else None
        if session is None:
            problem = f"there is no session {session_id!r}"
            raise UserError("session_id", problem, "create it first")
        problem, remedy = f"{session_id} is answering", "wait until it is done, or close its stream"
        require(not idle or not session.answer, "session_id", problem, remedy)
        return session

    def get_session_info(self, session_id: str) -> dict[str, Any]:
        """Plain values: number of tokens and turns, bytes of the state, and more."""
        with self.condition:
            s = self.find(session_id, idle=False)
            return {
                "session_id": s.id,
                "position": s.now.position,
                "turns": s.turns,
                "state_bytes": s.now.state.nbytes,
                "seed": s.seed,
                "created": s.created,
                "last_used": s.used,
                "answering": s.answer is not None,
                "undo": int(s.before is not None),
            }

    def fork_session(
        self, session_id: str, new_id: str | None = None, seed: int | None = None
    ) -> str:
        """Create a session that continues from the same snapshot; returns its id.

        Nothing is copied.
        """
        with self.condition:
            old = self.find(session_id)
            seed = old.seed if seed is None else seed
            fork = self.insert(self.new_session(new_id, old.now, old.config, seed, old.turns))
            fork.before, fork.chat, fork.chat_before = old.before, old.chat, old.chat_before
            return fork.id

    def rollback(self, session_id: str) -> None:
        """Undo the last turn: its prompt and its answer."""
        with self.condition:
            session = self.find(session_id)
            if session.before is None:
                problem = f"{session_id} has no turn to undo"
                raise UserError("session_id", problem, "only the last turn can be undone, once")
            session.now, session.before = session.before, None
            session.chat = session.chat_before
            session.turns -= 1
            if session.reply is not None:
                session.keys.popitem()
            session.reply = None

    def reset_session(self, session_id: str) -> None:
        """Forget everything but the name, the settings and the seed."""
        with self.condition:
            session = self.find(session_id)
            session.now, session.before = self.initial[session.config.adapter], None
            session.turns, session.chat, session.used = 0, None, time.time()
            session.keys, session.reply = {}, None

    def delete_session(self, session_id: str) -> None:
        """Delete the session, and stop its answer."""
        with self.condition:
            session = self.find(session_id, idle=False)
            del self.sessions[session_id]
            if session.answer:
                session.answer.stop()

    def cleanup_old_sessions(self, max_age_seconds: float = 3600) -> int:
        """Delete sessions unused for longer than this, unless they are answering; their number."""
        with self.condition:
            old = [
                s.id
                for s in self.sessions.values()
                if not s.answer and time.time() - s.used > max_age_seconds
            ]
            for session_id in old:
                del self.sessions[session_id]
            return len(old)

    # Files -----------------------------------------------------------------------------------

    def tensors(self, now: Snapshot) -> dict[str, Tensor]:
        """A snapshot without unread tokens as tensors of one row, whose sizes never change."""
        logits = np.zeros(self.vocab_size, np.float32) if now.logits is None else now.logits
        blank = (-1,) * (RECENT - len(now.recent))
        return {
            **now.state.tensors(),
            "logits": torch.from_numpy(logits)[None],
            "recent": torch.tensor([[*blank, *now.recent]]),
        }

    def save_session(self, session_id: str, path: str | Path) -> None:
        """Write the session to a safetensors file, whose size does not depend on its length.

        Only that of a chat does: it has the messages.
        The file may replace a saved session, but no other file.
        """
        replaceable = not os.path.lexists(path) or is_session_file(path)
        problem, remedy = "exists, and is not a saved session", "choose another file"
        require(replaceable, str(path), problem, remedy)
        write_bytes(path, self.pack_session(session_id))

    def pack_session(self, session_id: str, stamp: str | None = None) -> bytes:
        """The session as the bytes of such a file.

        One with a `stamp` is for a store: it also has the snapshot that a rollback returns to, as a
        second row, the turns that may be repeated, and what a list of sessions shows.
        """
        with self.condition:
            session = self.find(session_id)
            adapter = session.config.adapter
            session.now = self.decoder.read_unread(session.now, adapter)
            about: dict[str, Any] = {"seed": session.seed, "turns": session.turns}
            about["config"] = dataclasses.asdict(session.config)
            about["tokenizer"] = getattr(self.tokenizer, "sha256", None)
            about["chat"] = session.chat and session.chat._asdict()
            snapshots = [session.now]
            if stamp is not None:
                if session.before:
                    session.before = self.decoder.read_unread(session.before, adapter)
                    snapshots.append(session.before)
                about["chat_before"] = session.chat_before and session.chat_before._asdict()
                about |= {"keys": session.keys, "reply": session.reply}
                about |= {"created": session.created, "used": session.used}
            notes = {"model": self.fingerprint, "session": json.dumps(about)}
            if stamp is not None:
                notes |= {"stamp": stamp, "info": json.dumps(self.get_session_info(session_id))}
        rows = [self.tensors(snapshot) for snapshot in snapshots]
        return pack_tensors(
            {name: torch.cat([row[name] for row in rows]) for name in rows[0]}, notes
        )

    def load_session(self, path: str | Path, session_id: str | None = None) -> str:
        """Create a session from a file that was saved with the same model; returns its id."""
        found = read_tensors(path, self.tensors(self.blank()), {"model": self.fingerprint}, 2)
        return self.insert(self.restore(*found, str(path), session_id)).id

    def unpack_session(self, data: bytes, name: str, session_id: str | None = None) -> Session:
        """The session of such bytes, which errors call `name`; the server does not have it yet."""
        like, notes = self.tensors(self.blank()), {"model": self.fingerprint}
        return self.restore(*unpack_tensors(data, name, like, notes, 2), name, session_id)

    def blank(self) -> Snapshot:
        """The snapshot before any token and any adapter."""
        return Snapshot(self.model.init_state(1), None, (), ())

    def restore(
        self, tensors: dict[str, Tensor], notes: dict[str, str], name: str, session_id: str | None
    ) -> Session:
        """The session with these tensors (1 or 2 rows) and notes; errors name its file."""
        rows = [
            {n: t[i : i + 1] for n, t in tensors.items()} for i in range(len(tensors["recent"]))
        ]
        snapshots = [self.snapshot(row) for row in rows]
        try:
            about = json.loads(notes["session"])
            bias = about["config"].pop("logit_bias")
            config = StreamingConfig(**about["config"])
            config.logit_bias = bias and {int(i): b for i, b in bias.items()}
            self.checked(config)
            seed, turns, made_with = about["seed"], about["turns"], about.get("tokenizer")
            chats = [
                about.get(field) and ChatHistory.from_dict(about[field], s.recent, s.position)
                for field, s in zip(("chat", "chat_before"), snapshots, strict=False)
            ]
            keys, reply = dict(about.get("keys", {})), about.get("reply")
            times = [about.get(n, time.time()) for n in ("created", "used")]
            valid = (
                (len(rows) == 1 or "stamp" in notes)
                and has_type(turns, int)
                and turns >= 0
                and all(has_type(t, float) for t in times)
                and all(bool(t.isfinite().all()) for t in tensors.values())
                and all(map(self.is_sound, snapshots))
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise UserError(name, f"is not a valid session ({e})", "save it again") from None
        require(valid, name, "is not a valid session", "save it again")
        own = getattr(self.tokenizer, "sha256", None)
        problem = f"was saved with another tokenizer ({made_with!s:.12}) than this ({own!s:.12})"
        same = own == made_with or None in (own, made_with)
        require(same, name, problem, "start with the tokenizer of the session")
        session = self.new_session(session_id, snapshots[0], config, seed, turns)
        session.before = snapshots[1] if len(snapshots) > 1 else None
        session.keys, session.reply = keys, reply
        session.chat, session.chat_before = [*chats, None][:2]
        session.created, session.used = times
        return session

    def snapshot(self, row: dict[str, Tensor]) -> Snapshot:
        """The snapshot whose `tensors` these are."""
        recent = tuple(i for i in row["recent"][0].tolist() if i >= 0)
        own = {name: t for name, t in row.items() if name not in ("logits", "recent")}
        state = self.model.init_state(1).fill(own)
        logits = row["logits"][0].numpy() if int(state.position[0]) else None
        return Snapshot(state, logits, recent, ())

    def is_sound(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot from a file can be one of this model."""
        position, start = snapshot.position, int(snapshot.state.document_start[0])
        return (
            max(snapshot.recent, default=0) < self.vocab_size
            and len(snapshot.recent) <= position < 2**62
            and 0 <= start <= position
        )


def is_session_file(path: str | Path) -> bool:
    """Does the file look like one that save_session wrote?"""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "session" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def usable_device(name: str) -> torch.device:
    """Like pick_device, but without a GPU "cuda" warns and takes the CPU.

    So code written for a GPU runs everywhere.
    """
    if re.fullmatch(r"cuda(:\d+)?", name) and not torch.cuda.is_available():
        warnings.warn(f"device: {name} is not available; using the CPU", stacklevel=3)
        name = "cpu"
    return pick_device(name)


@torch.no_grad()
def column_major_weights(model: TinyMambaModel) -> None:
    """Store float32 matrices with more outputs than inputs in column-major order, on a CPU.

    This makes one-token products up to twice as fast. A head that shares its matrix with the
    embedding gets a copy, as the embedding is read row by row.
    """
    weight = model.embedding.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m.out_features > m.in_features:
            m.weight = torch.nn.Parameter(m.weight.t().contiguous().t())


class StreamingInference:
    """One session of a model. The arguments are those of StreamingServer."""

    def __init__(self, model_path: str | Path | TinyMambaModel, **arguments: Any):
        self.server = StreamingServer(model_path, **arguments)
        self.session = self.server.create_session()

    def reset_state(self) -> None:
        """Forget all text."""
        self.server.reset_session(self.session)

    def generate_next_token(self, token: Any = None, **settings: Any) -> int | None:
        """Read an id, several, or none, and return the next one; None if the text ends there."""
        ids: Any = [] if token is None else token
        if not isinstance(ids, list | tuple):
            ids = np.atleast_1d(ids).tolist()
        settings["max_new_tokens"] = 1
        answer = self.server.answer(ids, self.session, as_ids=True, **settings)
        with contextlib.closing(answer):
            return next((token.id for chunk in answer for token in chunk.tokens), None)

    def generate_stream(self, prompt: str | list[int], **settings: Any) -> Iterator[str]:
        """Like StreamingServer.generate_stream."""
        return self.server.generate_stream(prompt, self.session, **settings)

    def generate_text(self, prompt: str | list[int], **settings: Any) -> str:
        """Like StreamingServer.generate_text."""
        return self.server.generate_text(prompt, self.session, **settings)

    def get_state_info(self) -> dict[str, Any]:
        """Like StreamingServer.get_session_info."""
        return self.server.get_session_info(self.session)


# ------------------------------------------------------------------------------- command line

BRANCHES = ("attention", "MLP", "SSM")  # shown in red, green and blue, mixed by the gates
GATE_ORDER = [1, 2, 0]  # where the weights of BRANCHES are in Token.gates


def paint(text: str, mix: np.ndarray) -> str:
    """The text in the color of three weights, scaled so that the largest has full strength."""
    code = ";".join(str(int(round(255 * part))) for part in mix / mix.max())
    return f"\033[38;2;{code}m{text}\033[0m"


def paint_chunk(chunk: Chunk) -> str:
    """The text in the color of its gates, averaged over layers and tokens."""
    gates = [token.gates.mean(0) for token in chunk.tokens if token.gates is not None]
    return paint(chunk.text, np.mean(gates, axis=0)[GATE_ORDER]) if gates else chunk.text


def describe_commands(commands: Mapping[str, str]) -> str:
    """One line about the commands of a console and their arguments."""
    listed = ", ".join(f"/{name} {argument}".strip() for name, argument in commands.items())
    return f"{listed}; Ctrl-C stops an answer, Ctrl-D quits"


class Console:
    """Answers prompts on a terminal: one, or many with commands between them."""

    COMMANDS: ClassVar = {  # and their arguments
        "save": "FILE",
        "load": "FILE",
        "fork": "[NAME]",
        "use": "NAME",
        **dict.fromkeys(("sessions", "undo", "reset", "gates", "stats", "help"), ""),
    }
    HELP: ClassVar = describe_commands(COMMANDS)

    def __init__(self, server: StreamingServer, options: Options, settings: dict[str, Any]):
        self.server, self.interactive = server, options.interactive or options.chat
        self.streaming = options.streaming or self.interactive
        self.gates, self.stats, self.settings = options.gates, options.stats, settings
        config = server.configured(server.config, settings)
        if options.load_session:
            self.session = server.load_session(options.load_session)
        else:
            self.session = server.create_session(config=config)

    def say(self, prompt: str) -> None:
        """Print the answer to a prompt."""
        begin, first, count, shown = time.perf_counter(), 0.0, 0, []
        if self.gates:
            print("  ".join(map(paint, BRANCHES, np.eye(3))))
        answer = self.start(prompt)
        with self.on_ctrl_c(answer.stop), contextlib.closing(answer):
            for chunk in answer:
                first = first or time.perf_counter() - begin
                count += len(chunk.tokens)
                shown.append(paint_chunk(chunk) if self.gates else chunk.text)
                if self.streaming:
                    print(shown[-1], end="", flush=True)
        print("" if self.streaming else "".join(shown))
        if self.stats:
            self.print_stats(time.perf_counter() - begin, first, count)

    def start(self, prompt: str) -> Answer | Turn:
        """Begin to answer a prompt."""
        return self.server.answer(prompt, self.session, **self.settings)

    def print_stats(self, seconds: float, first: float, count: int) -> None:
        """Print the speed of an answer of `count` tokens, and the size of the session."""
        info = self.server.get_session_info(self.session)
        rate = (count - 1) / (seconds - first) if count > 1 else 0.0
        print(
            f"{first or seconds:.3f} s to the first text, {rate:,.1f} tokens/s; "
            f"{info['position']:,} tokens in {info['state_bytes']:,} bytes",
            file=sys.stderr,
        )

    @contextlib.contextmanager
    def on_ctrl_c(self, stop: Callable[[], None]) -> Iterator[None]:
        """In interactive use, let Ctrl-C call `stop` instead of ending the program."""
        if not self.interactive:
            yield
            return
        before = signal.signal(signal.SIGINT, lambda *_: stop())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def interact(self) -> None:
        """Read prompts and commands, line by line, until the input ends."""
        print(self.HELP)
        self.read_lines("> ")
        print()

    def read_lines(self, sign: str) -> None:
        """Answer all lines of the input; `sign` asks for each."""
        while True:
            try:
                line = input(sign)
            except EOFError:
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D quits)")
                continue
            try:
                self.obey(line)
            except UserError as e:
                print(f"error: {e}", file=sys.stderr)

    def obey(self, line: str) -> None:
        """Run a command, or answer a prompt."""
        if not line.startswith("/"):
            self.say(line)
            return
        name = line[1:].split(maxsplit=1)[:1]
        takes_text = name and self.COMMANDS.get(name[0]) == "[TEXT]"
        self.run_command(*line[1:].split(maxsplit=1 if takes_text else -1))

    def run_command(self, name: str = "help", *words: str) -> None:
        """Run the method of a command."""
        require(name in self.COMMANDS, f"/{name}", "is not a command", self.HELP)
        argument = self.COMMANDS[name]
        most = 1 if argument else 0
        least = 0 if argument.startswith("[") else most
        problem = f"takes {argument or 'no argument'}"
        require(least <= len(words) <= most, f"/{name}", problem, self.HELP)
        getattr(self, f"do_{name}")(*words)

    def do_save(self, file: str) -> None:
        """Save the session."""
        self.server.save_session(self.session, file)
        print(f"saved {file}")

    def do_load(self, file: str) -> None:
        """Continue a saved session."""
        self.session = self.server.load_session(file)

    def do_fork(self, name: str | None = None) -> None:
        """Fork the session, and continue in the fork."""
        self.session = self.server.fork_session(self.session, name)
        print(f"now in {self.session}")

    def do_use(self, name: str) -> None:
        """Continue another session."""
        self.server.get_session_info(name)  # raises for an unknown name
        self.session = name

    def do_sessions(self) -> None:
        """List the sessions."""
        for session in self.server.sessions:
            print(session, "<- here" if session == self.session else "")

    def do_undo(self) -> None:
        """Undo the last turn."""
        self.server.rollback(self.session)

    def do_reset(self) -> None:
        """Forget all text."""
        self.server.reset_session(self.session)

    def do_gates(self) -> None:
        """Turn colors on or off."""
        self.gates = not self.gates

    def do_stats(self) -> None:
        """Turn statistics on or off."""
        self.stats = not self.stats

    def do_help(self) -> None:
        """List the commands."""
        print(self.HELP)


class ChatConsole(Console):
    """Answers the turns of a chat. Input that is no terminal has one turn in each line."""

    COMMANDS: ClassVar = {"system": "[TEXT]", **Console.COMMANDS}
    HELP: ClassVar = describe_commands(COMMANDS)

    def __init__(self, server: StreamingServer, options: Options, settings: dict[str, Any]):
        settings = {"max_new_tokens": CHAT_TOKENS, **settings}
        self.chats, self.noted = ChatSessions(server, settings), False
        super().__init__(server, options, settings)
        self.chats.history(self.session)  # rejects a loaded session without one
        if options.system is not None:
            self.do_system(options.system)

    def interact(self) -> None:
        """Read turns and commands until the input ends."""
        if sys.stdin.isatty():
            super().interact()
            return
        for line in sys.stdin:  # a turn that failed would change what the next ones mean
            if line.strip():
                self.obey(line.rstrip("\r\n"))

    def start(self, prompt: str) -> Turn:
        """Begin the turn of a user."""
        turn = self.chats.ask(self.session, prompt.strip())
        if turn.repeated and not self.noted:
            note = f"the last {turn.repeated} tokens of the chat are different now, and read again"
            print(f"note: {note} (said once)", file=sys.stderr)
            self.noted = True
        return turn

    def do_load(self, file: str) -> None:
        """Continue a saved chat."""
        loaded = self.server.load_session(file)
        self.chats.history(loaded)
        self.session = loaded

    def do_system(self, text: str = "") -> None:
        """Set the system message, or remove it."""
        self.chats.set_system(self.session, text.strip())

    def do_undo(self) -> None:
        """Take back the last message of the user and its answer."""
        self.chats.undo(self.session)

    def do_reset(self) -> None:
        """Forget all but the system message."""
        self.chats.reset(self.session)


@dataclass
class Options:
    """The command line, besides the fields of StreamingConfig in SAMPLING."""

    checkpoint: str = "tinymamba_model_latest.pt"  # a checkpoint of testv2.py, or a model folder
    tokenizer: str | None = None  # tokenizer.json or vocab.txt; else the checkpoint's
    adapter: str | None = None  # folder of an adapter that peft.py made
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: torch.dtype = torch.float32  # dtype of the weights
    prompt: str = ""  # text to continue; empty starts a new text
    load_session: str | None = None  # continue the session in this file, with its settings
    save_session: str | None = None  # write the session to this file at the end
    streaming: bool = False  # print text as it is generated
    interactive: bool = False  # read prompts line by line, with commands: /help lists them
    chat: bool = False  # the same for the turns of a chat, by the model's chat template
    system: str | None = None  # system message of --chat
    gates: bool = False  # color text by the gates of the branches: SSM, attention, MLP
    stats: bool = False  # print the time to the first text, tokens/s and the size of the state
    compile: bool = False  # compile the model for one token, for a GPU; on a CPU it is slower
    engine: str = "torch"  # what runs the model; onnx is faster on a CPU
    onnx_folder: str = ""  # keeps what --engine onnx exports; empty takes ~/.cache/tinymamba/onnx
    force: bool = False  # replace the file of --save_session; take an --adapter of another base

    CHOICES: ClassVar = {"dtype": tuple(DTYPES.values()), "engine": ENGINES}


SAMPLING = {"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
SAMPLING |= {"presence_penalty", "frequency_penalty", "seed", "stop"}
ADAPTER = "default"  # the name of --adapter in the server
CHAT_TOKENS = 512  # --max_tokens of --chat, if it is not given


def parse(argv: list[str] | None) -> tuple[Options, dict[str, Any]]:
    """The command line: Options, and the fields of StreamingConfig that were given."""
    usage = "python streaming.py --checkpoint FILE [--FLAG VALUE ...]"
    parser = CliParser(usage=usage, description=str(__doc__).partition("As a library")[0])
    add_flags(parser, Options)
    others = {field.name for field in dataclasses.fields(StreamingConfig)} - SAMPLING
    spelling: dict[str, tuple[str, ...]] = {"max_new_tokens": ("max_tokens",)}
    add_flags(parser, StreamingConfig, leave_out=others, spelling=spelling)
    args = parser.parse_args(argv)
    options = make_options(Options, args)
    given = given_fields(StreamingConfig, args)
    settings = {name: value for name, value in given.items() if name in SAMPLING}
    if options.adapter:
        settings["adapter"] = ADAPTER
    pick_device(options.device)
    require(options.chat or options.system is None, "--system", "needs a chat", "pass --chat")
    exists = options.save_session and os.path.lexists(options.save_session)
    problem, remedy = f"{options.save_session} exists", "pass --force or choose another"
    require(options.force or not exists, "--save_session", problem, remedy)
    return options, settings


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    options, settings = parse(argv)
    server = StreamingServer(
        options.checkpoint,
        options.device,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        compiled=options.compile,
        adapters={ADAPTER: options.adapter} if options.adapter else {},
        force=options.force,
        engine=options.engine,
        onnx_folder=options.onnx_folder,
    )
    problem = why_no_tokenizer(server.model)
    require(server.tokenizer, "tokenizer", problem, "pass --tokenizer")
    console = (ChatConsole if options.chat else Console)(server, options, settings)
    if options.prompt or not console.interactive:
        console.say(options.prompt)
    if console.interactive:
        console.interact()
    if options.save_session:
        server.save_session(console.session, options.save_session)
        print(f"saved {options.save_session}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_cli(main)
