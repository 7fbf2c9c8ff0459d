"""Streaming: sessions of constant size that can be continued, saved, forked and rolled back.

    python streaming.py --checkpoint ./tinymamba_model_latest.pt --prompt "Once upon a time" \\
        --max_tokens 100 --streaming
    python streaming.py --checkpoint ./tinymamba_model_latest.pt --interactive --gates --stats
    python streaming.py --checkpoint ... --prompt "..." --save_session talk.safetensors
    python streaming.py --checkpoint ... --prompt "..." --load_session talk.safetensors

As a library:

    server = StreamingServer(model_path="./tinymamba_model_latest.pt")
    session = server.create_session()
    for text in server.generate_stream("Once upon a time", session_id=session, max_new_tokens=50):
        print(text, end="", flush=True)

A session has read exactly the prompts that it was given and the text that it gave out: if a stream
is closed early, the session stands where the reader stopped, and a stop string is not part of it.
Its state never grows, so that a step costs the same after 10 tokens or a million, and a fork or a
rollback costs nothing. Answers that are asked for at the same time, from any threads, are decoded
as one batch.
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
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from testv2 import ModelState, TinyMambaModel, load_model
from tinymamba.checkpoint import read_tensors, write_tensors
from tinymamba.cli import (
    DTYPES,
    CliParser,
    UserError,
    add_flags,
    check_fields,
    given_fields,
    has_type,
    require,
    require_plain_name,
    run_cli,
)
from tinymamba.runtime import pick_device, why_no_compile
from tinymamba.tokenizer import open_tokenizer

REMEMBERED = 512  # last tokens that a session knows by name, for the repetition penalty
PIECE, SMALL_PIECE = 4096, 512  # tokens of a prompt that are read at once
REBASE = 1024  # tokens of an answer after which its first state is given up

# ------------------------------------------------------------------------------------ config


@dataclass
class StreamingConfig:
    """How to generate. Every method that generates takes any of these as keywords, too."""

    max_new_tokens: int = 100  # tokens of an answer; 0 reads the prompt only
    temperature: float = 0.8  # 0 takes the likeliest token every time
    top_k: int = 50  # draw among so many of the likeliest tokens; 0 is all
    top_p: float = 1.0  # draw among the fewest tokens that have this much probability together
    min_p: float = 0.0  # leave out what has less than this share of the likeliest's probability
    repetition_penalty: float = 1.0  # above 1, tokens of the window become less likely
    repetition_window: int = 64  # tokens, of prompt and answer, that the penalty looks back on
    logit_bias: dict[int, float] | None = None  # added to the logits of these ids; -inf bans one
    stop: list[str] | None = None  # strings that end an answer, and are not part of it
    stop_ids: list[int] | None = None  # ids that do, besides eos_token_id
    seed: int | None = None  # of the draws; None takes the session's own
    logprobs: int | None = None  # name so many likeliest alternatives with every token
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt: Answer.scores
    adapter: str | None = None  # which of the server's adapters answers; None is the model itself
    reset_on_eos: bool = False  # an answer that ends with eos ends its session's memory as well
    eos_token_id: int | None = None  # None takes the model's or tokenizer's, -1 none
    bos_token_id: int | None = None  # begins every session; None begins only those without a prompt
    pad_token_id: int | None = None  # is never drawn
    batch_size: int = 64  # answers that are decoded together at most; the server's, for all
    state_buffer_size: int = 8  # tokens of an answer that are made ahead of a slow reader
    optimize_memory: bool = False  # read prompts 512 tokens at a time, not 4096

    LIMITS: ClassVar = {
        **dict.fromkeys(("max_new_tokens", "temperature", "top_k"), (0, math.inf)),
        **dict.fromkeys(("batch_size", "state_buffer_size"), (1, math.inf)),
        **dict.fromkeys(("top_p", "min_p"), (0, 1)),
        "repetition_penalty": (1e-3, 1e3),
        "repetition_window": (0, REMEMBERED),
        "seed": (0, 2**63 - 1),
    }

    def validate(self, vocab_size: int) -> StreamingConfig:
        """Reject ill-typed and impossible values with a UserError; return self."""
        limits = dict.fromkeys(("logprobs", "prompt_logprobs"), (0, vocab_size))
        limits |= dict.fromkeys(("bos_token_id", "pad_token_id"), (0, vocab_size - 1))
        limits |= {"eos_token_id": (-1, vocab_size - 1)}
        empty = [name for name in ("stop", "stop_ids") if getattr(self, name) == []]
        check_fields(dataclasses.replace(self, **dict.fromkeys(empty)), limits)
        require("" not in (self.stop or []), "stop", "has an empty string", "leave it out")
        bias = self.logit_bias or {}
        numbers = all(has_type(b, float) or b == -math.inf for b in bias.values())
        remedy = "pass {id: number}, -inf for a token never drawn"
        require(numbers, "logit_bias", f"{bias!r} is invalid", remedy)
        for name, ids in (("stop_ids", self.stop_ids or []), ("logit_bias", bias)):
            known = all(type(i) is int and 0 <= i < vocab_size for i in ids)
            remedy = f"they must be from 0 to {vocab_size - 1}"
            require(known, name, f"{[*ids]} are not all ids", remedy)
        return self


# ------------------------------------------------------------------------------------ sampling


def probabilities(logits: np.ndarray, recent, config: StreamingConfig) -> np.ndarray:
    """What the next token is drawn from: logits (v,) -> float64 (v,) of sum 1.

    In this order, as in transformers: bias, penalty of what is `recent` (Keskar et al., arXiv
    1909.05858, section 4.1), temperature, top-k, top-p (Holtzman et al., arXiv 1904.09751), min-p
    (Nguyen et al., arXiv 2407.01082).
    """
    x = logits.astype(np.float64)
    for i, bias in (config.logit_bias or {}).items():
        x[i] += bias
    if config.pad_token_id is not None:
        x[config.pad_token_id] = -np.inf
    if config.repetition_penalty != 1.0 and recent:
        seen = np.unique(recent)
        x[seen] = np.where(
            x[seen] > 0, x[seen] / config.repetition_penalty, x[seen] * config.repetition_penalty
        )
    best = int(x.argmax())
    require(x[best] < np.inf, "logits", "are not finite", "use another checkpoint")
    require(x[best] > -np.inf, "logit_bias", "every token is banned", "leave at least one")
    if config.temperature == 0 or config.top_k == 1:
        return np.eye(1, len(x), best)[0]
    x = (x - x[best]) / config.temperature
    if 0 < config.top_k < len(x):
        x[x < np.partition(x, -config.top_k)[-config.top_k]] = -np.inf
    p = np.exp(x)
    p /= p.sum()
    if config.top_p < 1.0:
        alive = p.nonzero()[0]
        order = alive[np.argsort(-p[alive], kind="stable")]
        before = np.cumsum(p[order]) - p[order]  # probability of all likelier tokens
        p[order[1:][before[1:] >= config.top_p]] = 0.0
    p[p < config.min_p * p[best]] = 0.0
    return p / p.sum()


def draw(p: np.ndarray, seed: int, position: int) -> int:
    """An id by probabilities (v,): a pure function of them, the seed and the place in the text."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    share = (int.from_bytes(digest, "big") >> 11) / 2**53  # uniform in [0, 1)
    total = np.cumsum(p)
    return min(
        int(np.searchsorted(total, share * total[-1], side="right")), int(p.nonzero()[0][-1])
    )


# ------------------------------------------------------------------------------------ text

MARK = "\ufffd"  # what a tokenizer gives for bytes that are no character


class TextStream:
    """Ids in, text out: in whole characters, and nothing of what may become a stop string."""

    def __init__(self, tokenizer, context: list[int], stops: list[str]):
        """`context`: ids before, which some tokenizers need to know what the next ones read as."""
        self.tokenizer, self.context, self.stops = tokenizer, context, stops
        self.held, self.shown = [], ""  # ids up to an unfinished character; the text before it
        self.waiting, self.stopped = "", False  # text that may become a stop string

    def holds(self) -> bool:
        return bool(self.held or self.waiting)

    def push(self, token: int) -> str:
        """The text that is certain once `token` is known. `stopped` says if a stop ended it."""
        self.held.append(token)
        known = self.tokenizer.decode(self.context)
        text = self.tokenizer.decode(self.context + self.held)[len(known) :]
        certain = text.rstrip(MARK)
        self.waiting += certain[len(self.shown) :].replace(MARK, "")
        self.shown = certain
        if not text.endswith(MARK) or len(self.held) == 8:  # more than any character needs
            kept = self.held[-3:] if text.endswith(MARK) else []
            while kept and self.tokenizer.decode(kept).strip(MARK):
                kept = kept[1:]
            done = self.held[: len(self.held) - len(kept)]
            self.context = done if text else self.context + done  # hidden tokens have no text
            self.held, self.shown = kept, ""
        return self.release()

    def release(self) -> str:
        """What of the waiting text can no longer become a stop string."""
        found = [at for stop in self.stops if (at := self.waiting.find(stop)) >= 0]
        if found:
            text, self.waiting, self.stopped = self.waiting[: min(found)], "", True
            return text
        longest = len(self.waiting)
        sizes = [
            n
            for stop in self.stops
            for n in range(1, min(len(stop), longest + 1))
            if self.waiting.endswith(stop[:n])
        ]
        certain = len(self.waiting) - max(sizes, default=0)
        text, self.waiting = self.waiting[:certain], self.waiting[certain:]
        return text

    def finish(self) -> str:
        """The text still held back, at the end of an answer; part of a character is left out."""
        text, self.waiting = self.waiting, ""
        return text


def extend(tokenizer, ids: list[int], text: str) -> list[int]:
    """The ids, and those of a text that goes on where they end."""
    if not text:
        return ids
    before = tokenizer.decode(ids[-8:])
    alone, both = tokenizer.encode(before), tokenizer.encode(before + text)
    same = next(
        (n for n, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b),
        min(len(alone), len(both)),
    )
    changed = alone[same:]  # tokens that the text makes longer
    if ids[len(ids) - len(changed) :] == changed:
        return ids[: len(ids) - len(changed)] + both[same:]
    return ids + tokenizer.encode(text)


# ------------------------------------------------------------------------------------ decoding


class Snapshot(NamedTuple):
    """A session at one instant. It is never changed, so that as many may share it as like."""

    state: ModelState  # of one row
    logits: np.ndarray | None  # (v,) float32, of the token after the state; None before any token
    recent: tuple[int, ...]  # the last REMEMBERED tokens
    unread: tuple[int, ...]  # tokens that the state has yet to read

    @property
    def position(self) -> int:
        """Tokens of the session so far."""
        return int(self.state.position[0]) + len(self.unread)

    def followed_by(self, ids) -> Snapshot:
        if not ids:
            return self
        recent = (*self.recent, *ids)[-REMEMBERED:]
        return self._replace(logits=None, recent=recent, unread=(*self.unread, *ids))


class Token(NamedTuple):
    """A token that was drawn, or one of a prompt."""

    id: int
    logprob: float | None  # in nats, by the model alone; None unless `logprobs` asks for it
    top: list[tuple[int, float]]  # the likeliest ids and their logprobs, as many as it asks for
    gates: np.ndarray | None  # (n_layer, 3) weights of SSM, attention, MLP where it was predicted


class Chunk(NamedTuple):
    """Text that is certain, and the tokens drawn since the last chunk."""

    text: str
    tokens: list[Token]


NOTHING = Chunk("", [])  # there is no more without another step


class Decoder:
    """Reads prompts and draws tokens for all open answers, as one batch.

    There is no thread of its own: of those that wait for a token, one takes a `step`, which goes on
    with every answer that has room. Answers join and leave between any two steps. The lock is held
    only between computations, which never change what they are given.
    """

    def __init__(self, model: TinyMambaModel, batch_size: int, compiled: bool = False):
        self.model, self.condition = model.requires_grad_(False).eval(), threading.Condition()
        self.batch_size, self.reading = batch_size, threading.Lock()
        self.device, self.busy = model.embedding.weight.device, False
        self.one_token = torch.compile(model.run) if compiled else model.run
        self.answers: list[Answer] = []  # open ones
        self.members: list[Answer] = []  # those that have the rows of `state`
        self.state: ModelState | None = None

    @torch.inference_mode()
    def read(
        self,
        ids: list[list[int]],
        state: ModelState,
        adapters: list[str | None],
        asked: tuple[list[int], int] | None = None,
    ):
        """ids (b, l) -> logits (b, v) of the last column, its gates (n_layer, b, 3), new state.

        `adapters`: the one of each row. `asked`: ids (at most l) that follow the first, second, ...
        of a single row, and how many alternatives to name with each; they come last, as tokens.
        """
        run = self.one_token if len(ids[0]) == 1 else self.model.run
        with self.reading:
            self.let_serve(adapters)
            hidden, state, gates = run(torch.tensor(ids, device=self.device), state)
        logits = self.model.head(hidden[:, -1]).float()  # (b, v)
        if len(ids[0]) > 1:
            state = state.clone()  # of a long piece, it is a small view
        scores = self.score(hidden[0], *asked) if asked else []
        return logits.cpu().numpy(), gates[:, :, -1].float().cpu().numpy(), state, scores

    def score(self, hidden: Tensor, ids: list[int], count: int) -> list[Token]:
        """What the model makes of ids after each of hidden (l, d), in parts: v may be large."""
        scores = []
        for at in range(0, len(ids), 64):
            part = ids[at : at + 64]
            logits = self.model.head(hidden[at : at + len(part)]).float().cpu().numpy()  # (64, v)
            scores += [
                Token(i, *likelihoods(row, i, count), None)
                for row, i in zip(logits, part, strict=True)
            ]
        return scores

    def let_serve(self, adapters: list[str | None]) -> None:
        if hasattr(self.model, "adapter_state"):
            from peft import set_adapter

            alike = len(set(adapters)) == 1
            set_adapter(self.model, adapters[0] if alike else adapters)

    def settle(self, moment: Snapshot, adapter: str | None) -> Snapshot:
        """The same moment with nothing left to read."""
        state, logits, unread = moment.state, moment.logits, list(moment.unread)
        for at in range(0, len(unread), SMALL_PIECE):
            piece = unread[at : at + SMALL_PIECE]
            (logits,), _, state, _ = self.read([piece], state, [adapter])
        return moment._replace(state=state, logits=logits, unread=())

    def wait(self, answer: Answer) -> None:
        """Until it has a token or is over, see that steps are taken."""
        while answer.hungry():
            lead = False
            try:
                with self.condition:
                    while answer.hungry() and self.busy:
                        self.condition.wait()
                    if answer.hungry():
                        lead = self.busy = True
                if lead:
                    self.step()
            finally:
                if lead:
                    with self.condition:
                        self.busy = False
                        self.condition.notify_all()

    def step(self) -> None:
        """Read on in the prompts, up to a piece, and draw a token of every answer with room."""
        with self.condition:
            prompts, ready = self.pieces(), self.gather(self.ready())
            tokens, state = [[a.last] for a in ready], self.state
        for answer, piece in prompts:
            read = self.read(
                [piece], answer.state, [answer.config.adapter], answer.asked(len(piece))
            )
            with self.condition:
                answer.has_read(len(piece), *read)
        if ready:
            logits, gates, state, _ = self.read(tokens, state, [a.config.adapter for a in ready])
            with self.condition:
                self.hand_out(ready, logits, gates, state)

    def pieces(self) -> list[tuple[Answer, list[int]]]:
        """What of which prompts to read next: little, where others wait for it.

        To equal shares, but to none of less than 128 tokens, as a pass over a few costs as much:
        the one that has waited longest comes first, then the shortest.
        """
        left, pieces = SMALL_PIECE if len(self.answers) > 1 else PIECE, []
        waiting = [a for a in self.answers if a.to_read and not a.over]
        waiting = waiting[:1] + sorted(waiting[1:], key=lambda a: len(a.to_read))
        chosen = sorted(waiting[: left // 128], key=lambda a: len(a.to_read))
        for number, answer in enumerate(chosen):
            share = left // (len(chosen) - number)
            piece = answer.to_read[
                : min(share, SMALL_PIECE) if answer.config.optimize_memory else share
            ]
            pieces += [(answer, piece)] if piece else []
            left -= len(piece)
        return pieces

    def ready(self) -> list[Answer]:
        """The answers of the next step: members as long as they have room, then others."""
        inside = [a for a in self.members if a.has_room(a.config.state_buffer_size)]
        known = set(map(id, inside))
        others = (
            a
            for a in self.answers
            if id(a) not in known and a.has_room((a.config.state_buffer_size + 1) // 2)
        )
        return [*inside, *others][: self.batch_size]

    def gather(self, ready: list[Answer]) -> list[Answer]:
        """Make `state` the rows of these answers."""
        if ready and ready != self.members:
            chosen, row_of = set(map(id, ready)), {}
            for row, answer in enumerate(self.members):
                if answer.state is None and id(answer) in chosen:
                    row_of[id(answer)] = row
                elif answer.state is None:
                    answer.state = self.state_of(answer)
            stay = [a for a in ready if id(a) in row_of]  # their rows are copied at once
            join = [a for a in ready if id(a) not in row_of]
            parts = [self.state.select([row_of[id(a)] for a in stay])] if stay else []
            self.state = ModelState.join([*parts, *(a.state for a in join)])
            self.members = ready = [*stay, *join]
            for answer in ready:
                answer.state = None
        return ready

    def hand_out(
        self, ready: list[Answer], logits: np.ndarray, gates: np.ndarray, state: ModelState
    ) -> None:
        if self.members:  # or all were closed meanwhile
            self.state = state
        for row, answer in enumerate(ready):
            if answer.open:
                answer.draw(logits[row], gates[:, row])

    def state_of(self, answer: Answer) -> ModelState:
        if answer.state is not None:
            return answer.state
        return self.state.select([self.members.index(answer)])

    def leave(self, answer: Answer) -> ModelState:
        """Close an answer; its state."""
        answer.state = self.state_of(answer)
        self.answers.remove(answer)
        if not self.answers:
            self.members, self.state = [], None
        return answer.state


class Answer:
    """One answer of a session, as it is made: an iterator of Chunk; close it, or read to the end.

    After that `moment` is where the session stands, and `finish_reason` is "stop", "length", or
    None if it was closed early.
    """

    def __init__(
        self,
        decoder: Decoder,
        moment: Snapshot,
        prompt: list[int],
        config: StreamingConfig,
        ends: set[int],
        tokenizer=None,
        done=None,
    ):
        """`ends`: ids that end it. Without a tokenizer, chunks have tokens and no text.

        `done` is called with the answer when it is over.
        """
        self.decoder, self.config, self.ends, self.done = decoder, config, ends, done
        self.origin, self.prompt_tokens = moment, len(prompt)
        self.moment = self.start = moment.followed_by(prompt)  # `start` will have read the prompt
        self.state, self.to_read, self.logits = moment.state, list(self.moment.unread), None
        self.recent, self.position = self.moment.recent, self.moment.position
        self.ids, self.queue, self.last = [], deque(), None  # drawn since `start`; not given out
        self.given = self.clean = 0  # of the ids: given out; given out with all of their text
        self.since, self.milestone = "", None  # text given out after the clean ones; see `rebase`
        self.drawn, self.over, self.open = 0, False, True
        self.waits, self.undone = True, False  # see `ready_chunks` and `abandon`
        self.closing: Token | None = None  # the one of `ends` that ended it; it is not given out
        self.scored: list[Token] = []
        if self.to_read and config.prompt_logprobs is not None:
            first, logits = self.to_read[0], moment.logits
            known = (
                (None, []) if logits is None else likelihoods(logits, first, config.prompt_logprobs)
            )
            self.scored.append(Token(first, *known, None))
        self.error = self.finish_reason = self.ended_by = None
        self.tokenizer, self.chunks = tokenizer, self.make_chunks()
        self.stream = TextStream(tokenizer, list(self.recent[-8:]), config.stop or [])
        if not self.to_read:
            self.begin(moment.logits, None)
        decoder.answers.append(self)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self.chunks)

    @property
    def scores(self) -> list[Token]:
        """The prompt's tokens, once it is read, each with what the model made of it.

        The first of a text has no logprob. There are none unless `prompt_logprobs` asks for them.
        """
        return self.scored[len(self.scored) - self.prompt_tokens :]

    def asked(self, count: int) -> tuple[list[int], int] | None:
        """Of the tokens that follow the next `count`, see Decoder.read."""
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
        """So many more tokens of the prompt."""
        if not self.open:
            return
        self.scored += scores
        self.state, self.to_read = state, self.to_read[count:]
        if not self.to_read:
            self.begin(logits[0], gates[:, 0])

    def begin(self, logits: np.ndarray, gates: np.ndarray | None) -> None:
        """The prompt is read: logits (v,) are of the first token."""
        self.start = self.start._replace(state=self.state, logits=logits, unread=())
        self.logits = logits
        if self.config.max_new_tokens == 0:
            self.end("length")
        else:
            self.draw(logits, gates)

    def draw(self, logits: np.ndarray, gates: np.ndarray | None) -> None:
        """Take the next token by its logits (v,)."""
        c = self.config
        window = self.recent[len(self.recent) - min(len(self.recent), c.repetition_window) :]
        self.logits, self.last = logits, None
        if self.over:  # stopped meanwhile
            return
        try:
            token = draw(probabilities(logits, window, c), c.seed, self.position)
        except Exception as e:  # of this answer alone: its reader is to hear of it, no other
            self.error = e
            self.end(None)
            return
        if token in self.ends:
            self.ended_by = token
            self.closing = Token(token, *likelihoods(logits, token, c.logprobs), None)
            self.end("stop")
            return
        self.last, self.position, self.drawn = token, self.position + 1, self.drawn + 1
        self.recent = (*self.recent, token)[-REMEMBERED:]
        self.ids.append(token)
        gates = None if gates is None else gates.copy()
        self.queue.append(Token(token, *likelihoods(logits, token, c.logprobs), gates))
        if self.milestone is None and len(self.ids) >= REBASE:
            self.milestone = len(self.ids), self.live(self.decoder.state_of(self))
        if self.drawn == c.max_new_tokens:
            self.end("length")

    def end(self, reason: str | None) -> None:
        self.finish_reason, self.over = reason, True

    def has_room(self, most: int) -> bool:
        return self.open and not self.over and self.last is not None and len(self.queue) < most

    def hungry(self) -> bool:
        return self.open and not self.over and not self.queue

    def stop(self) -> None:
        """End it here, from another thread than the one that reads it."""
        with self.decoder.condition:
            self.over = True
            self.queue.clear()
            self.decoder.condition.notify_all()

    def next_token(self) -> Token | None:
        """The next token, or None at the end; makes it if no other thread has."""
        self.decoder.wait(self)
        with self.decoder.condition:
            if self.queue:
                self.given += 1
                return self.queue.popleft()
        if self.error:
            raise self.error
        return None

    def ready_chunks(self) -> Iterator[Chunk]:
        """The chunks that need no further step: for who takes the steps, and reads this answer."""
        self.waits = False
        for chunk in self.chunks:
            if chunk is NOTHING:
                return
            yield chunk

    def make_chunks(self) -> Iterator[Chunk]:
        tokens, text = [], ""
        try:
            while True:
                while not self.waits and self.hungry():
                    yield NOTHING
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
                    self.rebase()
            if not self.stream.stopped:
                text, self.since = self.stream.finish(), self.stream.shown.replace(MARK, "")
                self.clean = self.given - len(self.stream.held)
            if text or tokens:
                yield Chunk(text, tokens)
        finally:
            self.settle()

    def text_after(self, token: int) -> str:
        text = self.stream.push(token) if self.tokenizer else ""
        if self.stream.holds() or self.stream.stopped:
            self.since += text
        else:
            self.clean, self.since = self.given, ""
        return text

    def rebase(self) -> None:
        """Give up the first part of a long answer once its reader has all of it."""
        with self.decoder.condition:
            if self.milestone and self.clean >= self.milestone[0]:
                count, self.start = self.milestone
                del self.ids[:count]
                self.given, self.clean = self.given - count, self.clean - count
                self.milestone = None

    def live(self, state: ModelState) -> Snapshot:
        """After all that was drawn."""
        if self.last is None:
            return Snapshot(state, self.logits.copy(), self.recent, ())
        return Snapshot(state, None, self.recent, (self.last,))

    def close(self) -> None:
        """End it here: the session stands after what was given out."""
        try:
            self.chunks.close()
        except ValueError:  # another thread is waiting for its next chunk, and will settle it
            self.stop()
        else:
            self.settle()

    def abandon(self) -> None:
        """End it as if it had never been asked for: the session stands where it stood before."""
        with self.decoder.condition:
            self.undone = True
        self.close()

    def settle(self) -> None:
        with self.decoder.condition:
            if not self.open:
                return
            self.open = False
            state = self.decoder.leave(self)
            try:
                if self.given < len(self.ids):  # made ahead, and never given out
                    self.ended_by = None
                    self.finish_reason = "stop" if self.stream.stopped else None
                if self.error or self.undone:
                    self.moment = self.origin
                elif not self.to_read and self.clean == len(self.ids) and not self.since:
                    self.moment = self.live(state)
                elif not self.to_read:
                    read = extend(self.tokenizer, self.ids[: self.clean], self.since)
                    self.moment = self.start.followed_by(read)
            finally:
                if self.done:
                    self.done(self)


def likelihoods(logits: np.ndarray, token: int, count: int | None):
    """The logprob of a token and the `count` likeliest ids with theirs, from logits (v,)."""
    if count is None:
        return None, []
    x = logits.astype(np.float64)
    x -= x.max()
    x -= math.log(np.exp(x).sum())
    least = np.partition(x, -count)[-count] if count else np.inf
    best = np.flatnonzero(x >= least)
    top = best[np.argsort(-x[best], kind="stable")][:count]
    return float(x[token]), [(int(i), float(x[i])) for i in top]


# ------------------------------------------------------------------------------------ sessions


@dataclass
class Session:
    """One conversation. `before` is where it stood at the start of its last turn."""

    id: str
    now: Snapshot
    config: StreamingConfig
    seed: int  # of its draws
    before: Snapshot | None = None
    answer: Answer | None = None  # the one in hand
    turns: int = 0
    created: float = dataclasses.field(default_factory=time.time)
    used: float = dataclasses.field(default_factory=time.time)


class StreamingServer:
    """Sessions of one model, for any number of threads.

    `model_path`: a checkpoint, or a model, which is moved, put into eval mode and frozen.
    `config`: defaults of every session. `tokenizer`: a tokenizer.json or vocab.txt, or an object
    with encode and decode; None looks beside the checkpoint and beside its training data. `dtype`:
    of weights and activations; states stay float32. `compiled`: compile the step of one token,
    which takes a while and makes it faster. `adapters`: folders of peft.py by name, of which every
    session and answer may choose one; they are decoded in one batch.

    Prompts are text or lists of ids. What is wrong raises a UserError, and changes nothing. Part of
    a character at the end of an answer is neither given out nor read.
    """

    def __init__(
        self,
        model_path,
        device: str = "auto",
        config: StreamingConfig | None = None,
        tokenizer=None,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        adapters: dict[str, str | Path] | None = None,
    ):
        device, config = usable_device(str(device)), config or StreamingConfig()
        problem = why_no_compile(device) if compiled else None
        require(not problem, "compile", f"{problem}", "leave it out")
        if isinstance(model_path, TinyMambaModel):
            self.model, beside = model_path, []
        else:
            self.model, beside = load_model(model_path, device), [model_path]
        self.adapters = self.load_adapters(adapters or {}, compiled)
        self.model = self.model.to(device, dtype)
        column_major_weights(self.model)
        self.tokenizer = tokenizer = open_tokenizer(tokenizer, self.model, beside)
        self.vocab_size = self.model.config.vocab_size
        self.config = self.checked(config)
        self.decoder = Decoder(self.model, config.batch_size, compiled)
        self.condition, self.sessions = self.decoder.condition, {}
        self.beginnings = {name: self.begin(name) for name in (None, *self.adapters)}
        known = getattr(tokenizer, "__len__", lambda: 0)()
        require(
            known <= self.vocab_size,
            "tokenizer",
            f"has {known} ids, the model {self.vocab_size}",
            "pass the one that the model was trained with",
        )

    def load_adapters(self, folders: dict[str, str | Path], compiled: bool) -> list[str]:
        """Give them to the model; their names."""
        require(
            not compiled or len(folders) <= 1,
            "compile",
            "every mix of adapters would be compiled anew",
            "load one, or merge it",
        )
        if folders:
            from peft import load_adapter

            for name, folder in folders.items():
                load_adapter(self.model, folder, name)
        return list(folders)

    @functools.cached_property
    def fingerprint(self) -> str:
        return self.model.fingerprint()

    def create_session(
        self,
        session_id: str | None = None,
        seed: int | None = None,
        config: StreamingConfig | None = None,
    ) -> str:
        """A new session, of a name of its own if none is given; its id.

        With a `seed`, the same prompts give the same answers again.
        """
        config = self.checked(self.config if config is None else config)
        seed = config.seed if seed is None else seed
        seed = secrets.randbits(63) if seed is None else seed
        return self.add(session_id, self.nothing(config), config, seed).id

    def checked(self, config: StreamingConfig) -> StreamingConfig:
        require(
            isinstance(config, StreamingConfig),
            "config",
            f"is a {type(config).__name__}",
            "pass a StreamingConfig",
        )
        config.validate(self.vocab_size)
        require(
            config.adapter is None or config.adapter in self.adapters,
            "adapter",
            f"there is no {config.adapter!r}",
            f"there are {', '.join(self.adapters) or 'none'}",
        )
        return config

    def nothing(self, config: StreamingConfig) -> Snapshot:
        """Before the first token."""
        return self.beginnings[config.adapter]

    def begin(self, adapter: str | None) -> Snapshot:
        """What a session begins with: an adapter may have a first state of its own."""
        self.decoder.let_serve([adapter])
        return Snapshot(self.model.init_state(1), None, (), ())

    def add(
        self,
        session_id: str | None,
        now: Snapshot,
        config: StreamingConfig,
        seed: int,
        turns: int = 0,
    ) -> Session:
        name = uuid.uuid4().hex if session_id is None else session_id
        require_plain_name(name, "session_id")
        require(
            has_type(seed, int) and 0 <= seed < 2**63,
            "seed",
            f"{seed!r} is not legal",
            "it must be from 0 to 2^63 - 1",
        )
        with self.condition:
            require(name not in self.sessions, "session_id", f"{name} is taken", "use another")
            self.sessions[name] = Session(name, now, config, seed, turns=turns)
            return self.sessions[name]

    def find(self, session_id: str, idle: bool = True) -> Session:
        session = self.sessions.get(session_id) if isinstance(session_id, str) else None
        require(session, "session_id", f"there is no session {session_id!r}", "create it first")
        require(
            not idle or not session.answer,
            "session_id",
            f"{session_id} is answering",
            "wait until it has, or close its stream",
        )
        return session

    def answer(
        self,
        prompt: str | list[int],
        session_id: str | None = None,
        *,
        as_ids: bool = False,
        **settings,
    ) -> Answer:
        """Begin an answer; see Answer. `settings` are fields of StreamingConfig.

        Without a session it is made in one of its own, which ends with it. `as_ids` needs no
        tokenizer: chunks have tokens, no text, and every token counts as given out.
        """
        require(as_ids or self.tokenizer, "tokenizer", "none was found", "pass one, or ids")
        ids = self.encode(prompt)
        with self.condition:
            session = self.find(session_id) if session_id is not None else None
            config = self.configured(session.config if session else self.config, settings)
            if settings.get("seed") is None and session:
                config.seed = session.seed
            elif config.seed is None:
                config.seed = secrets.randbits(63)
            now = session.now if session else self.nothing(config)
            answer = Answer(
                self.decoder,
                now,
                self.begun(ids, now, config),
                config,
                self.ends(config),
                None if as_ids else self.tokenizer,
                functools.partial(self.settle, session) if session else None,
            )
            if session:
                session.answer = answer
            return answer

    def configured(self, config: StreamingConfig, settings: dict) -> StreamingConfig:
        fields = {field.name for field in dataclasses.fields(StreamingConfig)}
        for name in settings:
            require(name in fields, name, "is no setting", f"use {', '.join(sorted(fields))}")
        require(
            "batch_size" not in settings,
            "batch_size",
            "is the server's, for all answers",
            "set it in the server's config",
        )
        return self.checked(dataclasses.replace(config, **settings))

    def encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            require(self.tokenizer, "tokenizer", "none was found", "pass one, or a prompt of ids")
            prompt = self.tokenizer.encode(prompt)
        ids = prompt.tolist() if isinstance(prompt, np.ndarray | Tensor) else prompt
        require(
            isinstance(ids, list | tuple) and all(type(i) is int for i in ids),
            "prompt",
            f"of {type(prompt).__name__} is neither text nor ids",
            "pass one of them",
        )
        require(
            min(ids, default=0) >= 0 and max(ids, default=0) < self.vocab_size,
            "prompt",
            "has ids out of the vocabulary",
            f"they must be from 0 to {self.vocab_size - 1}",
        )
        return list(ids)

    def begun(self, ids: list[int], now: Snapshot, config: StreamingConfig) -> list[int]:
        """The ids of a prompt, with what comes before the first of a session."""
        begin = config.bos_token_id
        if now.position > 0:
            return ids
        if begin is None and not ids:
            begin = self.eos_of(config)
            require(
                begin >= 0,
                "prompt",
                "is empty, and no token begins a text",
                "say something, or set bos_token_id",
            )
        return ids if begin is None else [begin, *ids]

    def eos_of(self, config: StreamingConfig) -> int:
        """The id that ends a text, or -1."""
        if config.eos_token_id is not None:
            return config.eos_token_id
        if self.model.config.eos_id >= 0:
            return self.model.config.eos_id
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return -1 if eos is None else eos

    def ends(self, config: StreamingConfig) -> set[int]:
        return {self.eos_of(config), *(config.stop_ids or ())}

    def settle(self, session: Session, answer: Answer) -> None:
        """An answer of the session is over."""
        session.now, session.answer, session.used = answer.moment, None, time.time()
        if answer.error or answer.undone:
            return
        session.before, session.turns = answer.origin, session.turns + 1
        if answer.config.reset_on_eos and answer.ended_by == self.eos_of(answer.config):
            session.now = self.nothing(session.config)

    def generate_stream(
        self, prompt: str | list[int], session_id: str | None = None, **settings
    ) -> Iterator[str]:
        """Text as it is made; closed early, the session stands after what was given out.

        What is wrong with the arguments is said when the first text is asked for.
        """
        with contextlib.closing(self.answer(prompt, session_id, **settings)) as answer:
            for chunk in answer:
                if chunk.text:
                    yield chunk.text

    def generate_text(
        self, prompt: str | list[int], session_id: str | None = None, **settings
    ) -> str:
        return "".join(self.generate_stream(prompt, session_id, **settings))

    def get_session_info(self, session_id: str) -> dict:
        """Plain values: tokens read, turns, bytes of the state, and more."""
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
            }

    def reset_session(self, session_id: str) -> None:
        """Forget everything but the name and the seed."""
        with self.condition:
            session = self.find(session_id)
            session.now, session.before = self.nothing(session.config), None
            session.turns, session.used = 0, time.time()

    def rollback(self, session_id: str) -> None:
        """Undo the last turn: its prompt and its answer."""
        with self.condition:
            session = self.find(session_id)
            require(
                session.before,
                "session_id",
                f"{session_id} has no turn to undo",
                "one turn can be undone, once",
            )
            session.now, session.before = session.before, None
            session.turns -= 1

    def fork_session(
        self, session_id: str, new_id: str | None = None, seed: int | None = None
    ) -> str:
        """A second session that stands where this one does; its id. Nothing is copied."""
        with self.condition:
            old = self.find(session_id)
            seed = old.seed if seed is None else seed
            fork = self.add(new_id, old.now, old.config, seed, old.turns)
            fork.before = old.before
            return fork.id

    def delete_session(self, session_id: str) -> None:
        """Forget it, and end its answer."""
        with self.condition:
            session = self.find(session_id, idle=False)
            del self.sessions[session_id]
            if session.answer:
                session.answer.stop()

    def cleanup_old_sessions(self, max_age_seconds: float = 3600) -> int:
        """Delete the sessions that were not used for so long, but for those that are answering."""
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

    def tensors(self, moment: Snapshot) -> dict[str, Tensor]:
        """All of a settled moment, in tensors of one row whose sizes never change."""
        logits = np.zeros(self.vocab_size, np.float32) if moment.logits is None else moment.logits
        blank = (-1,) * (REMEMBERED - len(moment.recent))
        return {
            **moment.state.tensors(),
            "logits": torch.from_numpy(logits)[None],
            "recent": torch.tensor([[*blank, *moment.recent]]),
        }

    def save_session(self, session_id: str, path: str | Path) -> None:
        """Write a safetensors file; its size does not depend on how much the session has read.

        It may take the place of an older session, and of nothing else.
        """
        require(
            not os.path.lexists(path) or is_session(path),
            str(path),
            "is there, and no session",
            "name another file",
        )
        with self.condition:
            session = self.find(session_id)
            session.now = now = self.decoder.settle(session.now, session.config.adapter)
            about = {
                "seed": session.seed,
                "turns": session.turns,
                "config": dataclasses.asdict(session.config),
            }
            notes = {"model": self.fingerprint, "session": json.dumps(about)}
        write_tensors(path, self.tensors(now), notes)

    def load_session(self, path: str | Path, session_id: str | None = None) -> str:
        """A new session from a file that this very model has saved; its id."""
        fresh = Snapshot(self.model.init_state(1), None, (), ())
        tensors, notes = read_tensors(path, self.tensors(fresh), {"model": self.fingerprint}, 1)
        logits, recent = tensors.pop("logits")[0].numpy(), tensors.pop("recent")[0].tolist()
        state, recent = fresh.state.fill(tensors), tuple(i for i in recent if i >= 0)
        position, start = (int(t[0]) for t in (state.position, state.document_start))
        try:
            about = json.loads(notes["session"])
            bias = about["config"].pop("logit_bias")
            config = StreamingConfig(**about["config"])
            config.logit_bias = bias and {int(i): b for i, b in bias.items()}
            self.checked(config)
            seed, turns = about["seed"], about["turns"]
            sound = (
                max(recent, default=0) < self.vocab_size
                and has_type(turns, int)
                and len(recent) <= position < 2**62
                and 0 <= start <= position
                and turns >= 0
                and np.isfinite(logits).all()
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise UserError(str(path), f"is no session ({e})", "save it anew") from None
        require(sound, str(path), "is no session", "save it anew")
        now = Snapshot(state, logits if position else None, recent, ())
        return self.add(session_id, now, config, seed, turns).id


def is_session(path: str | Path) -> bool:
    """Whether a file looks like one that save_session wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "session" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def usable_device(name: str) -> torch.device:
    """As pick_device; but a script written for a GPU runs, with a warning, where there is none."""
    if re.fullmatch(r"cuda(:\d+)?", name) and not torch.cuda.is_available():
        warnings.warn(f"device: {name} is not here; using the cpu", stacklevel=3)
        name = "cpu"
    return pick_device(name)


@torch.no_grad()
def column_major_weights(model: TinyMambaModel) -> None:
    """Lay wide float32 matrices out by columns, where it is a CPU that multiplies them.

    The product with the vector of one token reads them up to twice as fast so. A head that is the
    embedding's, too, gets a copy, as rows of the embedding are read one by one.
    """
    if model.embedding.weight.device.type != "cpu" or model.embedding.weight.dtype != torch.float32:
        return
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m.out_features > m.in_features:
            m.weight = torch.nn.Parameter(m.weight.t().contiguous().t())


class StreamingInference:
    """One session of a model. The arguments are those of StreamingServer."""

    def __init__(self, model_path, **arguments):
        self.server = StreamingServer(model_path, **arguments)
        self.session = self.server.create_session()

    def reset_state(self) -> None:
        """Forget all text."""
        self.server.reset_session(self.session)

    def generate_next_token(self, token: int | list[int] | None = None, **settings) -> int | None:
        """Read a token, or several, or none, and draw the next; None if that ends the text."""
        prompt = [] if token is None else token
        if not isinstance(prompt, list | tuple):
            prompt = np.atleast_1d(prompt).tolist()
        with contextlib.closing(
            self.server.answer(
                prompt, self.session, as_ids=True, **{**settings, "max_new_tokens": 1}
            )
        ) as answer:
            return next((token.id for chunk in answer for token in chunk.tokens), None)

    def generate_stream(self, prompt: str | list[int], **settings) -> Iterator[str]:
        """As StreamingServer.generate_stream."""
        return self.server.generate_stream(prompt, self.session, **settings)

    def generate_text(self, prompt: str | list[int], **settings) -> str:
        return self.server.generate_text(prompt, self.session, **settings)

    def get_state_info(self) -> dict:
        """As StreamingServer.get_session_info."""
        return self.server.get_session_info(self.session)


# ------------------------------------------------------------------------------- command line

COLORS = {"attention": 0, "MLP": 1, "SSM": 2}  # red, green and blue, mixed by the gate
ORDER = [1, 2, 0]  # of the gate's weights: attention, MLP, SSM


def legend() -> str:
    return "  ".join(painted(name, np.eye(3)[place]) for name, place in COLORS.items())


def painted(text: str, mix: np.ndarray) -> str:
    """Text in the color of three weights, the largest at full strength."""
    code = ";".join(str(int(round(255 * part))) for part in mix / mix.max())
    return f"\033[38;2;{code}m{text}\033[0m"


def colored(chunk: Chunk) -> str:
    """The text in the colors of the branches that carried it, over all layers."""
    gates = [token.gates.mean(0) for token in chunk.tokens if token.gates is not None]
    return painted(chunk.text, np.mean(gates, axis=0)[ORDER]) if gates else chunk.text


class Console:
    """Answers on a terminal, to one prompt or to many."""

    HELP = (
        "/save FILE, /load FILE, /fork [NAME], /use NAME, /sessions, /undo, /reset, /gates, "
        "/stats, /help; Ctrl-C stops an answer, Ctrl-D ends"
    )

    def __init__(self, server: StreamingServer, args: Options, settings: dict):
        self.server, self.interactive = server, args.interactive
        self.streaming = args.streaming or args.interactive
        self.gates, self.stats, self.settings = args.gates, args.stats, settings
        config = server.configured(server.config, settings)
        self.session = (
            server.load_session(args.load_session)
            if args.load_session
            else server.create_session(config=config)
        )

    def say(self, prompt: str) -> None:
        """Print the answer to a prompt."""
        begin, first, count, shown = time.perf_counter(), None, 0, []
        if self.gates:
            print(legend())
        answer = self.server.answer(prompt, self.session, **self.settings)
        with self.on_ctrl_c(answer.stop), contextlib.closing(answer):
            for chunk in answer:
                first = first or time.perf_counter() - begin
                count += len(chunk.tokens)
                shown.append(colored(chunk) if self.gates else chunk.text)
                if self.streaming:
                    print(shown[-1], end="", flush=True)
        print("" if self.streaming else "".join(shown))
        if self.stats:
            seconds, info = time.perf_counter() - begin, self.server.get_session_info(self.session)
            rate = (count - 1) / (seconds - first) if count > 1 else 0.0
            print(
                f"{first or seconds:.3f} s to the first text, {rate:,.1f} tokens/s; "
                f"{info['position']:,} tokens in {info['state_bytes']:,} bytes",
                file=sys.stderr,
            )

    @contextlib.contextmanager
    def on_ctrl_c(self, stop) -> Iterator[None]:
        """Turn after turn, Ctrl-C stops the answer, not the program."""
        if not self.interactive:
            yield
            return
        before = signal.signal(signal.SIGINT, lambda *_: stop())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def interact(self) -> None:
        print(self.HELP)
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D ends)")
                continue
            try:
                if line.startswith("/"):
                    self.command(*line[1:].split())
                else:
                    self.say(line)
            except UserError as e:
                print(f"error: {e}", file=sys.stderr)

    def command(self, name: str = "help", *words: str) -> None:
        server, most = self.server, {"save": 1, "load": 1, "use": 1, "fork": 1}.get(name, 0)
        least = 0 if name == "fork" else most
        require(least <= len(words) <= most, f"/{name}", f"takes {most} words", self.HELP)
        if name == "save":
            server.save_session(self.session, words[0])
            print(f"saved {words[0]}")
        elif name == "load":
            self.session = server.load_session(words[0])
        elif name == "fork":
            self.session = server.fork_session(self.session, *words)
            print(f"now in {self.session}")
        elif name == "use":
            server.get_session_info(words[0])
            self.session = words[0]
        elif name == "sessions":
            for session in server.sessions:
                print(session, "<- here" if session == self.session else "")
        elif name == "undo":
            server.rollback(self.session)
        elif name == "reset":
            server.reset_session(self.session)
        elif name == "gates":
            self.gates = not self.gates
        elif name == "stats":
            self.stats = not self.stats
        else:
            require(name == "help", f"/{name}", "is no command", self.HELP)
            print(self.HELP)


@dataclass
class Options:
    """The command line, besides the fields of StreamingConfig in SETTINGS."""

    checkpoint: str = "tinymamba_model_latest.pt"  # a checkpoint of testv2.py, or a folder
    tokenizer: str | None = None  # tokenizer.json or vocab.txt; else beside the training data
    adapter: str | None = None  # folder of an adapter that peft.py made
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: torch.dtype = torch.float32  # dtype of the weights
    prompt: str = ""  # what to continue; empty begins a new text
    load_session: str | None = None  # continue the session in this file, with its settings
    save_session: str | None = None  # write the session to this file afterwards
    streaming: bool = False  # print text as it is generated
    interactive: bool = False  # read prompts line by line, with commands: /help lists them
    gates: bool = False  # color text by the branch that carried it: SSM, attention or MLP
    stats: bool = False  # time to the first text, tokens/s, size of the state
    compile: bool = False  # compile the step of one token: a minute first, faster after
    force: bool = False  # let --save_session replace a file

    CHOICES: ClassVar = {"dtype": tuple(DTYPES.values())}


SETTINGS = {"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
SETTINGS |= {"seed", "stop"}


def parse(argv: list[str] | None) -> tuple[Options, dict]:
    """The command line: Options, and the fields of StreamingConfig that were given."""
    usage = "python streaming.py --checkpoint FILE [--FLAG VALUE ...]"
    parser = CliParser(usage=usage, description=str(__doc__).split("As a library")[0])
    add_flags(parser, Options)
    others = {field.name for field in dataclasses.fields(StreamingConfig)} - SETTINGS
    add_flags(parser, StreamingConfig, None, others, {"max_new_tokens": ("max_tokens",)})
    args = parser.parse_args(argv)
    options = Options(**given_fields(Options, args))
    check_fields(options, dashes="--")
    settings = given_fields(StreamingConfig, args)
    if options.adapter:  # the folder's path, where StreamingConfig wants a name
        settings["adapter"] = "default"
    pick_device(options.device)
    there = options.save_session and os.path.lexists(options.save_session)
    problem, remedy = f"{options.save_session} exists", "pass --force or choose another"
    require(options.force or not there, "--save_session", problem, remedy)
    return options, settings


def main(argv: list[str] | None = None) -> int:
    args, settings = parse(argv)
    sys.stdout.reconfigure(errors="replace")  # a terminal need not know every character
    adapters = {"default": args.adapter} if args.adapter else {}
    server = StreamingServer(
        args.checkpoint, args.device, None, args.tokenizer, args.dtype, args.compile, adapters
    )
    console = Console(server, args, settings)
    if args.prompt or not args.interactive:
        console.say(args.prompt)
    if args.interactive:
        console.interact()
    if args.save_session:
        server.save_session(console.session, args.save_session)
        print(f"saved {args.save_session}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_cli(main)
