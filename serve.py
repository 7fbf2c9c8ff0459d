"""OpenAI-compatible HTTP server over StreamingServer; its page at / shows the gate of every token.

    pip install fastapi uvicorn prometheus-client
    python serve.py --checkpoint ./tinymamba_model_latest.pt --port 8000
    TINYMAMBA_API_KEY=secret python serve.py --host 0.0.0.0 --session_store ./sessions

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "import os", "max_tokens": 40, "stream": true}'

/v1/completions, /v1/chat/completions, /v1/responses, /v1/embeddings, /v1/models: as in OpenAI's
    API; its clients work. /tokenize, /detokenize: as in vLLM's. Answers can follow a
    JSON schema, a regex or a grammar, and those of chats call tools (pip install llguidance).
/v1/sessions: texts that the server remembers, each in a state of constant size: create, continue,
    fork, roll back, reset, save and load (by plain name, or as a file), delete. With
    --session_store they are kept in a folder or in Redis, and any of several servers continues any
    of them.
/health, /ready, /metrics (Prometheus), /openapi.json, and the page.

A request is completed or changes nothing: if its client disconnects or the server stops, its slot
is free before the next step, and its session is as it was before. To end an answer and keep its
text, use /v1/sessions/ID/stop. One thread decodes all answers as one batch; an answer may join or
leave it at any step. A special token in a client's text is read as plain text. Fields of OpenAI's
API that this server does not support are rejected by name. Unknown fields are ignored, and listed
in the header X-Ignored-Fields; with --strict they are rejected.

Chat: the template of the checkpoint or folder is used; see docs/serving.md.
Without one, the prompt is "role: content" for every message, separated by blank lines, and then
"assistant:"; the answer ends where the model would write "user:".
"""

from __future__ import annotations

import asyncio
import codecs
import collections
import contextlib
import functools
import importlib.util
import json
import logging
import math
import os
import queue
import re
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import numpy as np
import torch

from streaming import Session, StreamingConfig, StreamingServer, Token
from tinymamba.checkpoint import name_of, require_writable
from tinymamba.cli import DTYPES, UserError, need, parse_flags, require, require_plain_name, run_cli
from tinymamba.onnx_engine import ENGINES
from tinymamba.prefix_cache import count_equal
from tinymamba.session_store import open_store
from tinymamba.tokenizer import SimpleTokenizer, copy_tokenizer, why_no_tokenizer
from tinymamba.web_site import hashes

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def require_packages() -> None:
    """Name the first missing package, before its import fails with a traceback."""
    for name in PACKAGES:
        need(name)


if __name__ == "__main__" and not all(map(importlib.util.find_spec, PACKAGES)):
    run_cli(require_packages)

import prometheus_client as prometheus  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import APIRouter, Depends, FastAPI, Request  # noqa: E402
from fastapi.responses import Response  # noqa: E402
from fastapi.security import HTTPBearer  # noqa: E402
from starlette.middleware.cors import CORSMiddleware  # noqa: E402
from starlette.requests import ClientDisconnect  # noqa: E402

from tinymamba.chat_template import ChatTemplate  # noqa: E402
from tinymamba.middleware import LOOPBACK, PUBLIC_PATHS, SESSION_FILES, Middleware  # noqa: E402
from tinymamba.openai_api import (  # noqa: E402
    BINARY,
    AnswerOut,
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    EmbeddingsOut,
    ErrorOut,
    Generation,
    Message,
    NewId,
    NewSessionBody,
    SaveBody,
    SessionBody,
    SessionCompletionBody,
    SessionId,
    SessionOut,
    SessionsOut,
    TextOut,
    TokenizeBody,
    TokensOut,
    TurnKey,
    add_error_handlers,
    describe_strict,
    embedding_out,
    json_response,
    report_unknown,
    shutting_down,
)
from tinymamba.openai_responses import ResponseBody, ResponseOut, ResponseWriter  # noqa: E402
from tinymamba.shared_sessions import (  # noqa: E402
    SharedSessions,
    find_reply,
    no_session,
    record_reply,
    session_busy,
    too_many,
)
from tinymamba.structured import Grammar, decoder_of, library_bytes  # noqa: E402
from tinymamba.tool_calls import (  # noqa: E402
    CallForm,
    CallParser,
    ToolRequest,
    compile_calls,
    find_form,
    read_tools,
)

# ------------------------------------------------------------------------------------ options


@dataclass
class Options:
    """The command line."""

    # Model
    checkpoint: str = "tinymamba_model_latest.pt"  # a checkpoint of testv2.py, or a folder
    tokenizer: str | None = None  # tokenizer.json or vocab.txt; else the checkpoint's
    adapter: str | None = None  # folder of an adapter made by peft.py; it answers by default
    force: bool = False  # let --adapter be one of another base model
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: torch.dtype = torch.float32  # dtype of the weights
    compile: bool = False  # compile the one-token step, for a GPU; on a CPU it is slower
    engine: str = "torch"  # what runs the model; onnx is faster on a CPU
    onnx_folder: str = ""  # keeps what --engine onnx exports; empty takes ~/.cache/tinymamba/onnx
    model_name: str = ""  # name of the model for clients; empty takes the checkpoint's name

    # Network
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is all addresses of this machine
    port: int = 8000  # port to listen on; 0 takes a free one and prints it
    api_key: str = ""  # key required by all paths but /, /health, /ready; or set TINYMAMBA_API_KEY
    allow_origin: str = ""  # pages of these origins may call the server, as a,b; * allows all
    allow_host: str = ""  # host names by which a proxy or DNS leads to this server, as a,b
    keep_alive: int = 5  # seconds that an idle connection stays open
    strict: bool = False  # refuse unknown fields; else they are ignored, and listed in a header

    # Limits
    batch_size: int = 64  # answers decoded together
    prefix_cache: int = 512  # memory in MiB for states after prefixes of prompts; 0 keeps none
    max_queue: int = 256  # answers that may wait for a slot; further requests get status 429
    max_body: int = 2**20  # bytes of a request
    max_prompt: int = 32768  # tokens of a prompt
    max_tokens: int = 4096  # tokens of an answer
    max_choices: int = 128  # answers of one request: prompts times n
    max_stops: int = 64  # stop strings of a request
    body_timeout: int = 30  # seconds in which a request must arrive
    grace: int = 10  # seconds that running answers may take to end when the server is stopped

    # Sessions
    session_store: str = ""  # keeps sessions at every turn: a folder, or redis://HOST:PORT/DB
    session_dir: str = ""  # folder of saved sessions only, unless --keep_sessions
    keep_sessions: bool = False  # keep all sessions in --session_dir, as --session_store does
    session_lease: float = 10.0  # seconds until others take the sessions of a server that has died
    max_sessions: int = 1024  # maximum number of open sessions, and of saved ones
    session_timeout: int = 86400  # seconds after which an unused session is deleted

    CHOICES: ClassVar = {"dtype": tuple(DTYPES.values()), "engine": ENGINES}
    LIMITS: ClassVar = {
        "port": (0, 65535),
        **dict.fromkeys(("max_queue", "grace", "keep_alive", "max_stops"), (0, math.inf)),
        "prefix_cache": (0, math.inf),
        **dict.fromkeys(("batch_size", "max_body", "max_prompt", "max_tokens"), (1, math.inf)),
        **dict.fromkeys(("max_choices", "body_timeout"), (1, math.inf)),
        **dict.fromkeys(("max_sessions", "session_timeout"), (1, math.inf)),
        "session_lease": (0.1, 3600),
    }

    @property
    def origins(self) -> list[str]:
        """The origins in `allow_origin`."""
        return self.allow_origin.lower().replace(",", " ").split()

    @property
    def hosts(self) -> list[str]:
        """The names in `allow_host`."""
        return self.allow_host.lower().replace(",", " ").split()


def parse(argv: list[str] | None) -> Options:
    """Parse and check the command line; fill in an empty API key and model name."""
    usage = "python serve.py --checkpoint FILE [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, str(__doc__).split("Chat: the")[0])
    field, remedy = "--session_store", "leave one of them out"
    one = not (options.session_store and options.session_dir)
    require(one, field, "names a place for sessions, as --session_dir does", remedy)
    has_folder = options.session_dir or options.session_store or not options.keep_sessions
    require(has_folder, "--keep_sessions", "needs a folder", "pass --session_dir")
    options.api_key = options.api_key or os.environ.get("TINYMAMBA_API_KEY", "")
    options.model_name = options.model_name or name_of(options.checkpoint)
    for origin in options.origins:
        valid = origin in ("*", "null") or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@]+", origin)
        remedy = "pass SCHEME://HOST[:PORT] without a path, or *"
        require(valid, "--allow_origin", f"{origin!r} is not an origin", remedy)
    for host in options.hosts:
        valid = re.fullmatch(r"[^/:\s]+", host)
        problem, remedy = f"{host!r} is not a host", "pass a name without scheme and port"
        require(valid, "--allow_host", problem, remedy)
    return options


class Metrics:
    """The metrics at /metrics."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        self.requests = prometheus.Counter(
            "tinymamba_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.tokens = prometheus.Counter(
            "tinymamba_tokens",
            "Tokens of prompts, those of them that the prefix cache had, and generated ones.",
            ["kind"],
            registry=self.registry,
        )
        self.first_token = prometheus.Histogram(
            "tinymamba_first_token_seconds",
            "Time from request to first text.",
            registry=self.registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self.store_seconds = prometheus.Histogram(
            "tinymamba_store_seconds",
            "Time that the session store takes.",
            ["operation"],
            registry=self.registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
        )
        self.store_failures = prometheus.Counter(
            "tinymamba_store_failures",
            "Requests for sessions that failed: unavailable, refused, busy or unusable.",
            ["kind"],
            registry=self.registry,
        )
        self.session_loads = prometheus.Counter(
            "tinymamba_session_loads",
            "Sessions that were loaded from the store.",
            registry=self.registry,
        )
        self.repeated_turns = prometheus.Counter(
            "tinymamba_repeated_turns",
            "Turns that were answered again by their Idempotency-Key.",
            registry=self.registry,
        )

    def add_gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that calls `value` when the metrics are read."""
        gauge = prometheus.Gauge(f"tinymamba_{name}", text, registry=self.registry)
        gauge.set_function(value)


# ------------------------------------------------------------------------------------- engine


class Event(NamedTuple):
    """A message from the engine to a handler about one of its answers.

    kind          value
    started       numbers of prompt tokens, and of those that the prefix cache had
    prompt        prompt tokens with their logprobs, once the prompt is read; none unless asked for
    chunk         a Chunk
    done          finish reason, list with the end-of-text token if there was one, session fields
    failed        an ApiError
    disconnected  nothing: the client closed the connection or does not read
    """

    choice: int  # index of the answer in its request
    kind: str
    value: Any = None


class Mailbox(asyncio.Queue):
    """Events for one handler, on the handler's event loop."""

    MAX_UNREAD = 256  # events per answer before the client counts as disconnected

    def __init__(self, answers: int):
        super().__init__()
        self.limit = self.MAX_UNREAD * answers

    async def get_all(self) -> list[Event]:
        """All events so far; waits for the first."""
        return [await self.get(), *(self.get_nowait() for _ in range(self.qsize()))]


@dataclass(eq=False)
class Job:
    """One requested answer; its events go to the mailbox."""

    prompt: list[int]
    settings: dict
    mailbox: Mailbox
    index: int = 0
    session_id: str | None = None
    keep_at: Sequence[int] = ()  # see StreamingServer.answer
    answer: Any = None  # the Answer, while it runs
    prompt_read: bool = False
    stopped: bool = False  # by /stop
    requested_at: float = field(default_factory=time.perf_counter)
    first_text_at: float | None = None


class Engine(threading.Thread):
    """The only thread that steps the decoder. Between steps it runs the commands of handlers."""

    def __init__(
        self,
        server: StreamingServer,
        options: Options,
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
    ):
        super().__init__(name="engine", daemon=True)
        self.server, self.options, self.metrics, self.loop = server, options, metrics, loop
        self.commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.waiting: collections.deque[Job] = collections.deque()
        self.running: list[Job] = []
        self.outbox: list[tuple[Callable, tuple]] = []  # calls to make on the event loop
        self.last_cleanup = time.monotonic()
        self.accepting, self.lock = True, threading.Lock()  # commands; the lock protects the flag

    def run(self) -> None:
        """The thread's loop."""
        try:
            while self.accepting:
                self.handle_commands()
                self.start_waiting()
                if self.running:
                    self.step()
                self.flush()
        finally:
            self.shut_down()

    # Called by handlers ----------------------------------------------------------------------

    def enqueue(self, command: Callable[[], object]) -> None:
        """Run a command in the engine's thread before the next step."""
        with self.lock:
            if not self.accepting:
                raise shutting_down()
            self.commands.put(command)

    def submit(self, jobs: list[Job]) -> None:
        """Start these jobs as soon as there are slots."""
        self.enqueue(lambda: self.admit(jobs))

    def cancel(self, jobs: list[Job]) -> None:
        """Undo these jobs before the next step."""
        with contextlib.suppress(ApiError):  # a shutdown undoes all jobs anyway
            self.enqueue(lambda: self.drop(jobs))

    async def call(self, function: Callable, *arguments: Any) -> Any:
        """Run a function in the engine's thread and return its result."""
        future = self.loop.create_future()

        def run() -> None:
            try:
                result, error = function(*arguments), None
            except Exception as e:
                result, error = None, e
            self.outbox.append((self.resolve, (future, result, error)))

        self.enqueue(run)
        return await future

    @staticmethod
    def resolve(future: asyncio.Future, result: Any, error: Exception | None) -> None:
        """Set the future's result, unless its handler is gone."""
        if not future.done():
            future.set_exception(error) if error else future.set_result(result)

    def end(self) -> None:
        """Undo the jobs that are left, tell their clients, and end the thread."""
        with contextlib.suppress(ApiError):
            self.enqueue(self.shut_down)

    # In the thread ---------------------------------------------------------------------------

    def handle_commands(self) -> None:
        """Run the queued commands; with no answers to decode, wait for one."""
        with contextlib.suppress(queue.Empty):
            if not self.running and not self.waiting:
                self.commands.get(timeout=60)()
            while True:
                self.commands.get_nowait()()
        if time.monotonic() - self.last_cleanup > 60:
            self.last_cleanup = time.monotonic()
            self.server.cleanup_old_sessions(self.options.session_timeout)

    def admit(self, jobs: list[Job]) -> None:
        """Put jobs into the queue, unless their session is busy."""
        for job in jobs:
            try:
                if job.session_id is not None:
                    self.find_idle(job.session_id)
                self.waiting.append(job)
            except ApiError as e:
                self.fail(job, e)

    def start_waiting(self) -> None:
        """Start waiting jobs while there are free slots."""
        while self.waiting and len(self.running) < self.options.batch_size:
            job = self.waiting.popleft()
            try:
                if job.session_id is not None:
                    self.find(job.session_id)
                job.answer = self.server.answer(
                    job.prompt, job.session_id, keep_at=job.keep_at, **job.settings
                )
            except Exception as e:
                self.fail(job, e)
            else:
                self.running.append(job)
                counts = job.answer.prompt_tokens, job.answer.cached_tokens
                self.send(job, "started", counts)

    def step(self) -> None:
        """Decode a token of every running answer, and report what is new."""
        try:
            self.server.decoder.step()
        except Exception as e:  # which answer caused it is unknown, so all of them fail
            failed = self.running
            self.drop(failed)
            for job in failed:
                self.fail(job, e)
        for job in [*self.running]:
            self.collect(job)
        for job in self.running:
            if job.answer and not job.answer.open:
                job.answer = None  # frees its states now
        self.running = [job for job in self.running if job.answer]

    def collect(self, job: Job) -> None:
        """Report what is new of one answer."""
        answer = job.answer
        if not job.prompt_read and not answer.to_read:
            job.prompt_read = True
            self.send(job, "prompt", answer.scores)
        try:
            for chunk in answer.ready_chunks():
                if job.first_text_at is None:
                    job.first_text_at = time.perf_counter()
                    self.metrics.first_token.observe(job.first_text_at - job.requested_at)
                self.metrics.tokens.labels("completion").inc(len(chunk.tokens))
                self.send(job, "chunk", chunk)
        except Exception as e:
            self.fail(job, e)
            return
        if not answer.open:
            self.complete(job)
        elif job.mailbox.qsize() > job.mailbox.limit:
            self.drop([job])
            self.send(job, "disconnected")

    def complete(self, job: Job) -> None:
        """Report the end of an answer.

        The end-of-text token is included for requests with logprobs: lm-eval expects at least one
        token after the prompt.
        """
        answer = job.answer
        reason = answer.finish_reason or ("stop" if job.stopped else None)
        if not reason or (job.session_id and job.session_id not in self.server.sessions):
            self.fail(job, ApiError(409, "the session was deleted", "session_id"))
            return
        self.metrics.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.metrics.tokens.labels("cached").inc(answer.cached_tokens)
        end_tokens = [answer.closing] if answer.ended_by is not None else []
        fields = {"session": self.session_info(job.session_id)} if job.session_id else {}
        self.send(job, "done", (reason, end_tokens, fields))

    def drop(self, jobs: list[Job]) -> None:
        """Undo jobs: their sessions are as they were before."""
        for job in jobs:
            if job.answer:
                job.answer.abandon()
                job.answer = None
        dropped = set(jobs)
        self.running = [job for job in self.running if job not in dropped]
        self.waiting = collections.deque(job for job in self.waiting if job not in dropped)

    def shut_down(self) -> None:
        """Accept no more commands, run those in the queue, and undo all jobs."""
        with self.lock:
            self.accepting = False
        with contextlib.suppress(queue.Empty):
            while True:
                self.commands.get_nowait()()
        unfinished = [*self.running, *self.waiting]
        self.drop(unfinished)
        for job in unfinished:
            self.fail(job, shutting_down())
        self.flush()

    def send(self, job: Job, kind: str, value: Any = None) -> None:
        """Put an event for the job's handler into the outbox."""
        self.outbox.append((job.mailbox.put_nowait, (Event(job.index, kind, value),)))

    def fail(self, job: Job, error: Exception) -> None:
        """Report an error, and log it unless it is the client's."""
        if not isinstance(error, ApiError | UserError):
            logging.getLogger("serve").error("an answer failed", exc_info=error)
        self.send(job, "failed", ApiError.of(error))

    def flush(self) -> None:
        """Deliver everything in the outbox; the event loop is woken only once."""
        if self.outbox:
            calls, self.outbox = self.outbox, []
            self.loop.call_soon_threadsafe(call_all, calls)

    # Sessions, in the thread -----------------------------------------------------------------

    def find(self, session_id: str) -> Session:
        """The session of this id, or an error 404."""
        session = self.server.sessions.get(session_id)
        if session is None:
            raise no_session(session_id)
        return session

    def find_idle(self, session_id: str) -> Session:
        """The session of this id, or an error if it is answering or about to."""
        session = self.find(session_id)
        if session.answer or any(job.session_id == session_id for job in self.waiting):
            raise session_busy(session_id)
        return session

    def check_new(self, session_id: str | None) -> None:
        """Reject an existing id, or a session beyond max_sessions."""
        if session_id in self.server.sessions:
            raise SharedSessions.taken(str(session_id))
        if len(self.server.sessions) >= self.options.max_sessions:
            raise too_many(f"{self.options.max_sessions} sessions")

    def session_info(self, session_id: str) -> dict:
        """The fields of SessionOut."""
        self.find(session_id)
        return self.session_out(self.server.get_session_info(session_id))

    @staticmethod
    def session_out(info: dict) -> dict:
        """What StreamingServer.get_session_info gives, as the fields of SessionOut."""
        return {
            "id": info["session_id"],
            "object": "session",
            "created": int(info["created"]),
            "last_used": int(info["last_used"]),
            "tokens": info["position"],
            "turns": info["turns"],
            "seed": info["seed"],
            "state_bytes": info["state_bytes"],
            "answering": info["answering"],
            "undo": info.get("undo", min(info["turns"], 1)),  # stored by an earlier version
        }

    def stop(self, session_id: str) -> None:
        """End the session's answer, if there is one, and keep its text."""
        self.find(session_id)
        for job in self.running:
            if job.session_id == session_id:
                job.stopped = True
                job.answer.stop()
        for job in [job for job in self.waiting if job.session_id == session_id]:
            self.drop([job])
            self.fail(job, ApiError(409, "the answer was stopped before it began", "session_id"))


def call_all(calls: list[tuple[Callable, tuple]]) -> None:
    """Make these calls."""
    for function, arguments in calls:
        function(*arguments)


# -------------------------------------------------------------------------------- text formats


class Vocabulary:
    """The bytes and the text of single tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.cache: dict[int, bytes] = {}
        self.decoder = decoder_of(tokenizer)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token."""
        if token not in self.cache:
            self.cache[token] = self.read_bytes(token)
        return self.cache[token]

    def read_bytes(self, token: int) -> bytes:
        """The bytes of a token, by what the kind of tokenizer offers."""
        t = self.tokenizer
        if not isinstance(t, SimpleTokenizer):
            return t.decode([token]).encode()
        if t.library is None:
            return t.pieces[token] if token < len(t.pieces) else b""
        special = t.decode([token], skip_special_tokens=False)
        return library_bytes(t, token, self.decoder) or special.encode()

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones included."""
        if isinstance(self.tokenizer, SimpleTokenizer):
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        return self.tokenizer.decode(ids)

    def text_of(self, token: int) -> str:
        """The token as OpenAI shows it: part of a character by its bytes."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


class Writer:
    """Writes the choices of one answer in the format of its route, whole or as deltas."""

    def __init__(self, kind: str, vocabulary: Vocabulary, index: int, logprobs: bool, gates: bool):
        """`kind`: "text", "chat" or "session". `logprobs`, `gates`: whether to write them."""
        self.kind, self.vocabulary, self.index = kind, vocabulary, index
        self.logprobs, self.gates = logprobs, gates
        self.decoder, self.offset = codecs.getincrementaldecoder("utf-8")("replace"), 0
        self.parser: CallParser | None = None  # of an answer that may call tools
        self.calls_or_text = False  # whether its deltas had some

    def choice(self, text: str, tokens: list[Token], finish: str | None, delta: bool) -> dict:
        """A choice with this text and these tokens."""
        choice: dict[str, Any] = {"index": self.index, "finish_reason": finish, "logprobs": None}
        if self.kind != "chat":
            choice["text"] = text
        elif delta:
            choice["delta"] = {"content": text} if text else {}
        else:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        if self.logprobs and (tokens or not delta):
            write = self.chat_logprobs if self.kind == "chat" else self.text_logprobs
            choice["logprobs"] = write(tokens)
        if self.gates:
            choice["tokens"] = [self.token_with_state(t) for t in tokens]
        return choice

    def message(self, text: str, tokens: list[Token], finish: str) -> dict:
        """The choice of a whole answer."""
        if self.parser is None:
            return self.choice(text, tokens, finish, False)
        text, calls = self.parser.feed(text)
        text += self.parser.finish()
        choice = self.choice(text, tokens, self.reason(finish), False)
        if calls:
            choice["message"]["tool_calls"] = [call.out() for call in calls]
        if not text and (calls or not self.parser.free):
            choice["message"]["content"] = None
        return choice

    def deltas(self, text: str, tokens: list[Token], finish: str | None) -> list[dict]:
        """The choices of one piece of an answer; with `finish`, it is the last."""
        if self.parser is None:
            return [self.choice(text, tokens, finish, True)]
        first = self.parser.count
        text, calls = self.parser.feed(text)
        if finish:
            text += self.parser.finish()
        choice = self.choice(text, tokens, self.reason(finish), True)
        self.calls_or_text |= bool(text or calls)
        if finish and self.parser.free and not self.calls_or_text:
            choice["delta"] = {"content": ""}
        parts = [part for i, call in enumerate(calls, first) for part in call.deltas(i)]
        has_any = choice["delta"] or choice["logprobs"] or choice.get("tokens")
        shown = [choice] if has_any or finish else []
        return shown + [{**self.choice("", [], None, True), "delta": part} for part in parts]

    def reason(self, finish: str | None) -> str | None:
        """The finish reason of an answer, which is another one if it ends with calls."""
        called = self.parser is not None and self.parser.count > 0
        return "tool_calls" if finish == "stop" and called else finish

    def role(self) -> dict:
        """The first delta of a chat."""
        delta = {"role": "assistant", "content": None if self.parser else "", "refusal": None}
        return {**self.choice("", [], None, True), "delta": delta}

    def token_with_state(self, token: Token) -> dict:
        """A token, with its gate's weights and the norms of the state's heads in each layer."""
        gates, norms = token.gates, [[float(f"{x:.4g}") for x in row] for row in token.norms or ()]
        return {
            "id": token.id,
            "text": self.vocabulary.text_of(token.id),
            "gates": None if gates is None else gates.astype(float).round(3).tolist(),
            "norms": norms or None,
        }

    def text_logprobs(self, tokens: list[Token]) -> dict:
        """Logprobs as /v1/completions has them."""
        offsets, text_of = [], self.vocabulary.text_of
        for t in tokens:
            offsets.append(self.offset)
            self.offset += len(self.decoder.decode(self.vocabulary.bytes_of(t.id)))
        return {
            "tokens": [text_of(t.id) for t in tokens],
            "text_offset": offsets,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [
                None if t.logprob is None else {text_of(i): p for i, p in reversed(t.top)}
                for t in tokens
            ],
        }

    def chat_logprobs(self, tokens: list[Token]) -> dict:
        """Logprobs as /v1/chat/completions has them."""

        def entry(token: int, logprob: float | None) -> dict:
            text, data = self.vocabulary.text_of(token), self.vocabulary.bytes_of(token)
            return {"token": text, "logprob": logprob, "bytes": list(data)}

        content = [
            {**entry(t.id, t.logprob), "top_logprobs": [entry(*pair) for pair in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


# ---------------------------------------------------------------------------------------- HTTP

PAGE = Path(__file__).resolve().parent / "page.html"


class EventStream(Response):
    """Sends the server-sent events of a call, and closes the call in any case."""

    def __init__(self, call: Call, parts: AsyncIterator[bytes]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.call, self.parts = call, parts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all parts; stops if the client does not read them in time."""
        with contextlib.closing(self.call), contextlib.suppress(TimeoutError):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self.parts:
                async with asyncio.timeout(self.call.api.options.body_timeout):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def sse(value: Any, name: str = "") -> bytes:
    """A server-sent event."""
    first = f"event: {name}\n" if name else ""
    return f"{first}data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


MakeParser = Callable[[], CallParser]


class ClientDisconnected(Exception):
    """The client closed the connection, or does not read its answer."""


def for_nobody(request: Request, error: Exception) -> Response:
    """The response to a client that has gone; only the metrics see it."""
    return Response(status_code=499)


class Written(NamedTuple):
    """One complete answer."""

    text: str
    tokens: list[Token]
    finish: str


class Call:
    """One request for answers, from its place in the queue to its response."""

    ID_PREFIXES: ClassVar = {"text": "cmpl-", "chat": "chatcmpl-", "session": "scmpl-"}
    OBJECTS: ClassVar = {
        "text": "text_completion",
        "chat": "chat.completion",
        "session": "session.completion",
    }

    def __init__(self, api: Api, request: Request, kind: str, body: Generation, count: int):
        self.api, self.request, self.kind, self.body = api, request, kind, body
        self.model, _ = api.find_model(body.model)
        self.id, self.created = self.ID_PREFIXES[kind] + uuid.uuid4().hex, int(time.time())
        self.jobs: list[Job] = []
        self.mailbox = Mailbox(count)
        self.watcher: asyncio.Future | None = None
        self.first_events: list[Event] = []
        self.prompt_tokens: dict[int, tuple[int, int]] = {}  # and cached, by index of the answer
        self.completion_tokens = 0
        self.session_fields: dict = {}
        self.unfinished, self.places = count, 0
        if kind != "session":  # a turn waits for its session first
            self.enter()

    def enter(self) -> None:
        """Take a place in the queue for each answer."""
        self.api.require_room(self.unfinished)
        self.places = self.unfinished
        self.api.pending += self.places

    def leave(self) -> None:
        """Free the places in the queue."""
        self.api.pending -= self.places
        self.places = 0

    def close(self) -> None:
        """Leave the queue; answers that are not finished are undone."""
        self.leave()
        if self.unfinished and self.jobs:
            self.api.engine.cancel(self.jobs)
        self.unfinished = 0
        if self.watcher:
            self.watcher.cancel()
            self.watcher = None  # the task refers to this call: a cycle would keep its states

    @contextlib.contextmanager
    def close_on_error(self) -> Iterator[None]:
        """Close the call if the body of the `with` fails."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    async def watch_client(self) -> None:
        """Cancel the jobs once the client disconnects."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        if self.unfinished:
            self.api.engine.cancel(self.jobs)
        self.mailbox.put_nowait(Event(0, "disconnected"))

    async def start(self, jobs: list[Job]) -> None:
        """Submit the jobs, and wait for the first result: an earlier error sets the status."""
        self.jobs = jobs
        self.watcher = asyncio.ensure_future(self.watch_client())
        self.api.engine.submit(jobs)
        while not self.first_events:
            self.first_events = [e async for e in self.new_events() if e.kind != "started"]

    async def new_events(self) -> AsyncIterator[Event]:
        """The events in the mailbox; waits for the first."""
        for event in await self.mailbox.get_all():
            if event.kind == "disconnected":
                raise ClientDisconnected
            if event.kind == "failed":
                raise event.value
            if event.kind == "started":
                self.prompt_tokens[event.choice] = event.value
            elif event.kind == "chunk":
                self.completion_tokens += len(event.value.tokens)
            elif event.kind == "done":
                self.unfinished -= 1
            await self.note(event)
            yield event

    async def note(self, event: Event) -> None:
        """Take notice of an event before the client does."""

    async def batches(self) -> AsyncIterator[list[Event]]:
        """All events, in lists that arrived together."""
        yield self.first_events
        while self.unfinished:
            yield [event async for event in self.new_events()]

    def usage(self) -> dict:
        """The number of tokens so far; a prompt with several answers counts once."""
        n = getattr(self.body, "n", None) or 1
        counts = [counts for index, counts in self.prompt_tokens.items() if index % n == 0]
        prompt, cached = (sum(column) for column in zip((0, 0), *counts, strict=True))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def envelope(self, object_name: str, choices: list[dict], **more: Any) -> dict:
        """A response, or an event of a stream, with these choices."""
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.api.fingerprint,
            **more,
        }

    async def collect(self, writers: list[Writer], echoes: list[str]) -> list[Written]:
        """The complete answers."""
        texts, reasons = echoes, {}
        tokens: list[list[Token]] = [[] for _ in writers]
        async for batch in self.batches():
            for index, kind, value in batch:
                if kind == "chunk":
                    texts[index] += value.text
                    tokens[index] += value.tokens
                elif kind == "prompt":
                    tokens[index] += value
                elif kind == "done":
                    reasons[index], end_tokens, self.session_fields = value
                    tokens[index] += end_tokens if writers[index].logprobs else []
        return [Written(text, tokens[i], reasons[i]) for i, text in enumerate(texts)]

    async def whole(self, writers: list[Writer], echoes: list[str]) -> Response:
        """The answer as one JSON object."""
        answers = await self.collect(writers, echoes)
        choices = [w.message(*a) for w, a in zip(writers, answers, strict=True)]
        more = {"usage": self.usage(), **self.session_fields}
        return json_response(self.envelope(self.OBJECTS[self.kind], choices, **more))

    async def stream(self, writers: list[Writer], echoes: list[str]) -> AsyncIterator[bytes]:
        """The answer as server-sent events; an error is the last of them."""
        options = self.body.stream_options
        with_usage = bool(options and options.include_usage)
        name = self.OBJECTS[self.kind] + ("" if self.kind == "text" else ".chunk")
        common = {"usage": None} if with_usage else {}

        def event(choices: list[dict], **more: Any) -> bytes:
            return sse(self.envelope(name, choices, **{**common, **more}))

        try:
            if self.kind == "chat":
                yield b"".join(event([writer.role()]) for writer in writers)
            async for batch in self.batches():
                deltas = [self.deltas(writers[e.choice], echoes[e.choice], e) for e in batch]
                yield b"".join(event([delta]) for part in deltas for delta in part)
            if with_usage or self.kind == "session":
                yield event([], usage=self.usage(), **self.session_fields)
            yield b"data: [DONE]\n\n"
        except ClientDisconnected:
            return
        except ApiError as error:
            yield sse(error.body)

    def deltas(self, writer: Writer, echo: str, event: Event) -> list[dict]:
        """An event as deltas of its choice, if it has anything to show."""
        if event.kind == "chunk":
            return writer.deltas(event.value.text, event.value.tokens, None)
        if event.kind == "prompt" and (event.value or echo):
            return writer.deltas(echo, event.value, None)
        if event.kind == "done":
            reason, end_tokens, self.session_fields = event.value
            return writer.deltas("", end_tokens if writer.logprobs else [], reason)
        return []


class SessionCall(Call):
    """A turn of a session, which is stored before its client hears that it is complete.

    While it waits for the store, it has no place in the queue.
    """

    def __init__(self, api: Api, request: Request, body: SessionCompletionBody, key: str):
        """`key`: that of the turn, or empty; see `find_reply`."""
        asked = body.model_dump(exclude={"stream", "stream_options"}) if key else {}
        self.asked = json.dumps(asked)  # ASCII: schemas may have half a surrogate pair
        super().__init__(api, request, "session", body, 1)
        self.key, self.gates = key, bool(body.gates)
        self.held: Any = None  # a Held, once the session is this turn's
        self.answer, self.turns = Written("", [], ""), 0

    async def hold(self, session_id: str) -> dict | None:
        """Let nobody else change the session; the answer, if this turn has been stored before."""
        self.held = await self.api.sessions.hold(session_id)
        self.held.on_lost = self.lose
        session = self.api.server.sessions.get(session_id)
        self.turns = session.turns if session else 0
        return find_reply(session, self.key, self.asked) if session and self.key else None

    def lose(self) -> None:
        """End the answer: another server has continued the session."""
        self.api.engine.cancel(self.jobs)
        problem = "another server has continued this session, or deleted it"
        self.mailbox.put_nowait(
            Event(0, "failed", ApiError(409, problem, "session_id", "session_lost"))
        )

    def close(self) -> None:
        """As of a Call; the session is as it was, unless it is stored, and free for others."""
        super().close()
        if self.held and self.held.open:
            with contextlib.suppress(ApiError):  # the server ends
                self.api.engine.enqueue(self.undo)
            self.held.release()

    def undo(self) -> None:
        """Take back a turn that was complete just as its client left, in the engine's thread."""
        session = self.api.server.sessions.get(self.held.session_id)
        if session and session.before and not session.answer and session.turns > self.turns:
            self.api.server.rollback(session.id)

    async def note(self, event: Event) -> None:
        """Collect the answer, and store the session once it is complete."""
        text, tokens, _ = self.answer
        if event.kind == "chunk" and self.key:
            self.answer = Written(text + event.value.text, tokens + event.value.tokens, "")
        if event.kind != "done" or not self.held:
            return
        self.leave()
        finish, end_tokens, fields = event.value
        session = self.api.server.sessions.get(self.held.session_id)
        if self.key and session:
            logprobs = self.body.alternatives() is not None
            writer = Writer("session", self.api.vocabulary, 0, logprobs, self.gates)
            choice = writer.message(text, tokens + (end_tokens if logprobs else []), finish)
            reply = self.envelope(self.OBJECTS["session"], [choice], usage=self.usage(), **fields)
            record_reply(session, self.key, self.asked, reply)
        await self.held.commit()

    def again(self, reply: dict) -> Response:
        """The response to a turn that has been stored before."""
        self.api.metrics.repeated_turns.inc()
        stream = self.body.stream
        response = EventStream(self, self.events(reply)) if stream else json_response(reply)
        response.headers["Idempotency-Replayed"] = "true"
        if not stream:
            self.close()
        return response

    async def events(self, reply: dict) -> AsyncIterator[bytes]:
        """Such an answer as server-sent events."""
        options, chunk = self.body.stream_options, {**reply, "object": f"{reply['object']}.chunk"}
        ending = {name: chunk.pop(name) for name in ("usage", "session")}
        common = {"usage": None} if options and options.include_usage else {}
        yield sse({**chunk, **common})
        yield sse({**chunk, "choices": [], **ending})
        yield b"data: [DONE]\n\n"


class ResponseCall(Call):
    """A request of the Responses API, whose only choice is written in its own format."""

    def __init__(self, api: Api, request: Request, body: ResponseBody, settings: dict):
        super().__init__(api, request, "chat", body, 1)
        self.writer = ResponseWriter(body, self.model, settings)

    @staticmethod
    def logprobs(writer: Writer, tokens: list[Token]) -> list[dict]:
        """The logprobs of these tokens, if they were asked for."""
        return writer.chat_logprobs(tokens)["content"] if writer.logprobs else []

    async def whole(self, writers: list[Writer], echoes: list[str]) -> Response:
        """The answer as one JSON object."""
        (answer,) = await self.collect(writers, echoes)
        logprobs = self.logprobs(writers[0], answer.tokens)
        text, finish, usage = answer.text, answer.finish, self.usage()
        return json_response(self.writer.whole(text, logprobs, finish, usage))

    async def stream(self, writers: list[Writer], echoes: list[str]) -> AsyncIterator[bytes]:
        """The answer as server-sent events; an error is the last of them."""
        write, text = self.writer, ""
        logprobs: list[dict] = []

        def event(value: dict) -> bytes:
            return sse(value, value["type"])

        try:
            yield b"".join(map(event, write.opening()))
            async for batch in self.batches():
                for _, kind, value in batch:
                    if kind == "chunk":
                        more = self.logprobs(writers[0], value.tokens)
                        text, logprobs = text + value.text, logprobs + more
                        yield event(write.delta(value.text, more))
                    elif kind == "done":
                        finish, end_tokens, _ = value
                        logprobs = logprobs + self.logprobs(writers[0], end_tokens)
            closing = write.closing(text, logprobs, finish, self.usage())
            yield b"".join(map(event, closing))
        except ClientDisconnected:
            return
        except ApiError as error:
            yield event(write.error(error.body["error"]))


def page_policy(page: str) -> str:
    """A Content-Security-Policy under which only the page's own script and style run."""
    return (
        f"default-src 'none'; script-src {hashes(page, 'script')}; "
        f"style-src {hashes(page, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def drawn(seed: int | None) -> int | None:
    """The seed itself; in place of -1, a random one."""
    return secrets.randbits(62) if seed == -1 else seed


class Api:
    """The routes and what they share. Nothing else may use `server` while it runs."""

    OPENAI_DEFAULTS: ClassVar = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }

    def __init__(self, server: StreamingServer, options: Options):
        problem = why_no_tokenizer(server.model)
        require(server.tokenizer, "tokenizer", problem, "pass --tokenizer")
        self.server, self.options, self.metrics = server, options, Metrics()
        self.engine: Any = None  # the Engine, once the app has started
        self.pending = 0  # answers admitted and not done
        self.draining, self.closed = False, False
        self.vocabulary = Vocabulary(server.tokenizer)
        self.tokenizer = copy_tokenizer(server.tokenizer)
        self.template = ChatTemplate(copy_tokenizer(server.tokenizer))
        self.tokenizer_lock, self.grammar_lock = asyncio.Lock(), asyncio.Lock()
        self.embedding_lock = asyncio.Lock()  # one thread at a time takes part in the model
        self.fingerprint = "fp_" + server.fingerprint[:16]
        self.started, base = int(time.time()), options.model_name
        self.models = {base: None, **{f"{base}:{adapter}": adapter for adapter in server.adapters}}
        state = sum(t.nbytes for t in server.tensors(server.blank()).values())
        self.max_file = 2 * state + options.max_body  # a stored session has two states
        self.store = self.open_store()
        keeps = options.session_store or options.keep_sessions
        self.sessions = SharedSessions(server, self.store if keeps else None, options, self.metrics)
        self.add_gauges()

    def open_store(self) -> Any:
        """The SessionStore that the options name, or None."""
        options = self.options
        place = options.session_store or options.session_dir
        if not place:
            return None
        if "://" not in place:
            field = "--session_store" if options.session_store else "--session_dir"
            require_writable(Path(place), field)
        return open_store(place, options.session_timeout, options.session_lease)

    def add_gauges(self) -> None:
        """The metrics that are read from the server when they are asked for."""
        add = self.metrics.add_gauge
        add("running_answers", "Answers in the batch.", lambda: len(self.engine.running))
        add("pending_answers", "Answers admitted and not done.", lambda: self.pending)
        add("sessions", "Sessions in memory.", lambda: len(self.server.sessions))
        prefixes = self.server.decoder.prefixes
        add("prefix_cache_states", "States in the prefix cache.", lambda: len(prefixes))
        add("prefix_cache_bytes", "Bytes of the prefix cache.", lambda: prefixes.nbytes)

    # What the routes share -------------------------------------------------------------------

    def require_room(self, count: int) -> None:
        """Reject more answers than there is room for, and all during shutdown."""
        if self.draining:
            raise shutting_down()
        if self.pending + count > self.options.batch_size + self.options.max_queue:
            problem, headers = "the server is full; try again", {"Retry-After": "1"}
            raise ApiError(429, problem, None, "queue_full", headers)

    def check_choices(self, count: int) -> None:
        """Reject a request for more answers than can ever run."""
        o = self.options
        most = min(o.max_choices, o.batch_size + o.max_queue)
        require(count <= most, "n", f"{count} answers are too many", f"ask for up to {most}")

    def find_model(self, name: str | None) -> tuple[str, str | None]:
        """The name of the model, and its adapter; the last one is the default."""
        name = name or list(self.models)[-1]
        if name not in self.models:
            problem = f"model: there is no {name}; use one of {', '.join(self.models)}"
            raise ApiError(404, problem, "model", "model_not_found")
        return name, self.models[name]

    def settings(self, body: Generation, max_tokens: int, chat: bool = False) -> dict:
        """The body's fields as fields of StreamingConfig, checked.

        `max_tokens` is the default. Answers of a `chat` end where the template ends a turn, too.
        """
        stops, turn_end = (self.template.stops, self.template.turn_end) if chat else ([], None)
        limit, most = self.options.max_tokens, self.options.max_stops
        names = ("max_completion_tokens", "max_output_tokens", "max_tokens")
        given = {n: value for n in names if (value := getattr(body, n, None)) is not None}
        name, count = next(iter(given.items()), ("max_tokens", min(max_tokens, limit)))
        problem = f"{count} is more than this server generates"
        require(count <= limit, name, problem, f"ask for up to {limit}")
        streams = body.stream or not any(dict(body.stream_options or {}).values())
        require(streams, "stream_options", "there is no stream", "set stream")
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        problem = f"{len(stop)} strings are more than this server looks for"
        require(len(stop) <= most, "stop", problem, f"send up to {most}")
        fields = {name: getattr(body, name) for name in self.OPENAI_DEFAULTS}
        fields["top_k"] = None if body.top_k == -1 else body.top_k
        settings = {
            **self.OPENAI_DEFAULTS,
            **{name: value for name, value in fields.items() if value is not None},
            "max_new_tokens": count,
            "seed": drawn(body.seed),
            "logit_bias": {int(i): b for i, b in (body.logit_bias or {}).items()} or None,
            "stop": [*stop, *(() if body.form() else stops)],  # a form ends by itself
            "stop_ids": None if turn_end is None else [turn_end],
            "structured_outputs": None,  # see compile_form
            "prompt_logprobs": None,  # else those of a session's file would be computed
            "logprobs": body.alternatives(),
            "adapter": self.find_model(body.model)[1],
        }
        self.server.configured(self.server.config, settings)
        return settings

    async def compile_form(self, call: Call, jobs: list[Job]) -> None:
        """Make the answers have the form that their request asks for, if it does."""
        if not (asked := call.body.form()):
            return
        grammar = await self.compile(call.request, self.server.grammars.compile, *asked)
        for job in jobs:
            job.settings["grammar"] = grammar

    async def compile(self, request: Request, make: Callable, *arguments: Any) -> Any:
        """What `make` makes of a grammar, unless the client has gone.

        It is called in another thread, one at a time: the engine and other requests do not wait.
        """
        async with self.grammar_lock:
            if await request.is_disconnected():
                raise ClientDisconnected
            return await asyncio.to_thread(make, *arguments)

    async def encode(
        self, prompt: Any, encode: Callable | None = None, field_name: str = "prompt"
    ) -> list[int]:
        """The ids of a prompt; text is encoded in another thread, to keep the loop free.

        Errors name the field `field_name`.
        """
        if isinstance(prompt, list) and encode is None:
            size = self.server.vocab_size
            remedy = f"ids are from 0 to {size - 1}"
            known = max(prompt, default=0) < size  # none is below 0, by the schema
            require(known, field_name, "has ids outside the vocabulary", remedy)
            ids = prompt
        else:
            async with self.tokenizer_lock:
                ids = await asyncio.to_thread(encode or self.tokenizer.encode, prompt)
        if len(ids) > self.options.max_prompt:
            problem = f"{field_name}: has {len(ids)} tokens; send up to {self.options.max_prompt}"
            raise ApiError(400, problem, field_name, "context_length_exceeded")
        return ids

    @functools.cached_property
    def call_form(self) -> CallForm | None:
        """How the chat template writes calls of tools; None if not as JSON."""
        return find_form(self.template)

    def read_tools(self, body: ChatBody) -> ToolRequest | None:
        """The tools of a chat, checked; None if there are none."""
        choice = body.tool_choice
        if not body.tools:
            problem, remedy = "needs tools", "send tools"
            require(choice in (None, "none", "auto"), "tool_choice", problem, remedy)
            return None
        self.template.require_known(body.tools)
        several = body.parallel_tool_calls is not False
        request, form = read_tools(body.tools, choice, several), body.form()
        alone = form is None or request.mode == "none"
        field, problem = form[1] if form else "", "cannot be sent with tools that may be called"
        require(alone, field, problem, 'send a tool_choice of "none"')
        return request

    async def compile_tools(
        self, request: Request, tools: ToolRequest
    ) -> tuple[Grammar, MakeParser]:
        """The grammar of an answer that may call tools, or has to, and what makes its parser."""

        def make() -> tuple[CallForm, Grammar]:
            form = self.call_form
            if form is None:
                problem = "the chat template does not write calls as JSON of name and arguments"
                raise UserError("tool_choice", problem, 'send "none"')
            return form, compile_calls(self.server.grammars, self.template, form, tools)

        form, grammar = await self.compile(request, make)
        return grammar, functools.partial(CallParser, form, tools.free)

    async def system_end(
        self, messages: list[Message], ids: list[int], tools: list[dict] | None = None
    ) -> list[int]:
        """The number of ids of the system message, if chats begin with one: others may, too."""
        if not self.options.prefix_cache or messages[0].role not in ("system", "developer"):
            return []
        async with self.tokenizer_lock:
            other = await asyncio.to_thread(self.template.with_other_user, messages[0], tools)
        return [count_equal(np.array(ids), np.array(other))]

    def make_jobs(
        self,
        call: Call,
        ids: list[int],
        settings: dict,
        n: int,
        first_index: int = 0,
        keep_at: Sequence[int] = (),
    ) -> list[Job]:
        """The jobs of n answers to one prompt; answer i draws with the seed plus i."""
        seed = secrets.randbits(62) if settings["seed"] is None else settings["seed"]
        seeds = [(seed + i) % 2**63 for i in range(n)]
        return [
            Job(ids, {**settings, "seed": seed}, call.mailbox, first_index + i, keep_at=keep_at)
            for i, seed in enumerate(seeds)
        ]

    async def respond(
        self,
        call: Call,
        jobs: list[Job],
        gates: bool = False,
        echoes: list[str] | None = None,
        make_parser: MakeParser | None = None,
    ) -> Response:
        """Run the jobs, and answer as a whole or as a stream.

        `gates`: tokens come with gates and norms. `make_parser`: for answers that may call tools.
        """
        logprobs, streaming = call.body.alternatives() is not None, False
        writers = [Writer(call.kind, self.vocabulary, j.index, logprobs, gates) for j in jobs]
        if make_parser:
            for writer in writers:
                writer.parser = make_parser()
        echoes = echoes or [""] * len(jobs)
        try:
            await self.compile_form(call, jobs)
            for job in jobs:
                job.settings["norms"] = gates
            await call.start(jobs)
            if call.body.stream:
                streaming = True  # EventStream closes the call
                return EventStream(call, call.stream(writers, echoes))
            return await call.whole(writers, echoes)
        finally:
            if not streaming:
                call.close()

    # OpenAI's routes -------------------------------------------------------------------------

    async def create_completion(self, request: Request, body: CompletionBody) -> Response:
        """Continue one or several prompts, text or token ids, n times each."""
        several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
        prompts, n = body.prompt if several else [body.prompt], body.n or 1
        if body.best_of not in (None, n):
            problem = "best_of: is not supported; leave it out"
            raise ApiError(400, problem, "best_of", "unsupported_parameter")
        settings = self.settings(body, 16)
        if body.echo and body.logprobs is not None:
            settings["prompt_logprobs"] = body.logprobs
        self.check_choices(len(prompts) * n)
        call = Call(self, request, "text", body, len(prompts) * n)
        jobs: list[Job] = []
        echoes: list[str] = []
        with call.close_on_error():
            for prompt in prompts:
                ids = await self.encode(prompt)
                text = prompt if body.echo else ""
                if not isinstance(text, str):
                    text = self.server.tokenizer.decode(ids)
                echoes += [text] * n
                jobs += self.make_jobs(call, ids, settings, n, len(jobs))
        return await self.respond(call, jobs, echoes=echoes)

    async def create_chat_completion(self, request: Request, body: ChatBody) -> Response:
        """Answer a chat; see the head of serve.py for how it becomes a prompt."""
        settings, n = self.settings(body, 256, chat=True), body.n or 1
        allowed = body.logprobs or not body.top_logprobs
        require(allowed, "top_logprobs", "needs logprobs", "set logprobs")
        self.check_choices(n)
        tools = self.read_tools(body)
        call = Call(self, request, "chat", body, n)
        with call.close_on_error():
            encode = functools.partial(self.template.encode, tools=body.tools)
            ids = await self.encode(body.messages, encode)
            parser = None
            if tools and tools.mode != "none":
                settings["grammar"], parser = await self.compile_tools(request, tools)
            keep_at = await self.system_end(body.messages, ids, body.tools)
            jobs = self.make_jobs(call, ids, settings, n, keep_at=keep_at)
        return await self.respond(call, jobs, bool(body.gates), make_parser=parser)

    async def create_response(self, request: Request, body: ResponseBody) -> Response:
        """Answer instructions and messages: the Responses API with text only."""
        settings = self.settings(body, 256, chat=True)
        call = ResponseCall(self, request, body, settings)
        with call.close_on_error():
            messages = body.messages()
            ids = await self.encode(messages, self.template.encode)
            keep_at = await self.system_end(messages, ids)
            jobs = self.make_jobs(call, ids, settings, 1, keep_at=keep_at)
        return await self.respond(call, jobs)

    async def create_embeddings(self, request: Request, body: EmbeddingBody) -> Response:
        """The mean of the last hidden states of each input, scaled to length 1 as OpenAI's are."""
        name, adapter = self.find_model(body.model)
        size = self.server.model.config.d_model
        problem = f"the model's embeddings have {size} numbers, and cannot be cut"
        require(body.dimensions in (None, size), "dimensions", problem, "leave it out")
        several = isinstance(body.input, list) and not isinstance(body.input[0], int)
        data: list[dict] = []
        tokens = 0
        self.require_room(1)
        self.pending += 1
        try:
            for prompt in body.input if several else [body.input]:
                if await request.is_disconnected():
                    raise ClientDisconnected
                ids = await self.encode(prompt, field_name="input")
                require(ids, "input", "has an empty text", "send at least one token")
                async with self.embedding_lock:
                    vector = await asyncio.to_thread(self.server.embed, ids, adapter)
                data.append(embedding_out(len(data), vector, body.encoding_format))
                tokens += len(ids)
        finally:
            self.pending -= 1
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": name, "usage": usage})

    # vLLM's routes ---------------------------------------------------------------------------

    async def tokenize(self, body: TokenizeBody) -> Response:
        """The ids of a prompt or of messages, as the routes that generate read them."""
        self.find_model(body.model)
        one = (body.prompt is None) != (body.messages is None)
        require(one, "prompt", "is needed, or else messages", "send one of them")
        if body.messages is None:
            ids = await self.encode(body.prompt)
        else:
            reply, tools = body.add_generation_prompt is not False, body.tools
            if tools:
                self.template.require_known(tools)
                read_tools(tools, "none", False)
            encode = functools.partial(self.template.encode, reply=reply, tools=tools)
            ids = await self.encode(body.messages, encode)
        text_of = self.vocabulary.text_of
        answer = {"count": len(ids), "max_model_len": self.options.max_prompt, "tokens": ids}
        answer["token_strs"] = [text_of(i) for i in ids] if body.return_token_strs else None
        return json_response(answer)

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """The text of token ids; special tokens are written out."""
        self.find_model(body.model)
        ids = await self.encode(body.tokens, field_name="tokens")
        return json_response({"prompt": await asyncio.to_thread(self.vocabulary.decode, ids)})

    async def list_models(self) -> Response:
        """The model, alone and with each adapter."""
        models = [self.model_info(name) for name in self.models]
        return json_response({"object": "list", "data": models})

    async def get_model(self, model: str) -> Response:
        """One model."""
        return json_response(self.model_info(self.find_model(model)[0]))

    def model_info(self, name: str) -> dict:
        """A model as OpenAI describes it."""
        info = {"id": name, "object": "model", "created": self.started, "owned_by": "tinymamba"}
        first = self.server.initial[self.models[name]].state
        memories = [layer.memory for layer in first.layers if layer.memory is not None]
        return {
            **info,
            "chat_template": self.template.template is not None,
            "layers": len(first.layers),
            "heads": [first.layers[0].ssm.shape[1], memories[0].shape[1] if memories else 0],
            "state_bytes": first.nbytes,
        }

    async def get_health(self) -> Response:
        """Whether the server accepts requests."""
        ok = self.engine.accepting and not self.draining
        return json_response({"status": "ok" if ok else "ending"}, 200 if ok else 503)

    async def get_ready(self) -> Response:
        """Whether requests should be sent to this server: it accepts them, and has its store."""
        ready, sessions = self.engine.accepting and not self.draining, self.sessions
        status = "ok" if ready else "ending"
        if ready and sessions.store:
            try:
                await sessions.ping()
            except ApiError:
                status = "no session store"
        return json_response({"status": status}, 200 if status == "ok" else 503)

    async def get_metrics(self) -> Response:
        """Metrics in Prometheus' text format."""
        text = prometheus.generate_latest(self.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def get_page(self) -> Response:
        """The page."""
        text = PAGE.read_text(encoding="utf-8")
        headers = {
            "Content-Security-Policy": page_policy(text),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(text, media_type="text/html", headers=headers)

    # Sessions --------------------------------------------------------------------------------

    async def change_session(
        self, session_id: str, work: Callable[[], object], status: int = 200, new: bool = False
    ) -> Response:
        """Run `work` in the engine's thread, store the session, and respond with it."""
        async with self.sessions.holding(session_id, new) as held:

            def act() -> dict:
                if new:
                    self.sessions.make_room()
                    self.engine.check_new(session_id)
                else:
                    self.engine.find_idle(session_id)
                work()
                return self.engine.session_info(session_id)

            info = await self.engine.call(act)
            await held.commit()
        return json_response(info, status)

    async def list_sessions(self) -> Response:
        """All open sessions."""
        return json_response({"object": "list", "data": await self.sessions.list()})

    async def get_session(self, session_id: SessionId) -> Response:
        """One session."""
        return json_response(await self.sessions.info(session_id))

    async def create_session(self, body: NewSessionBody | None = None) -> Response:
        """Create a session, empty or from a saved one."""
        body = body or NewSessionBody()
        name = body.id or uuid.uuid4().hex
        if body.load is not None:
            return await self.load_session(body.load, name, body)

        def work() -> None:
            config = StreamingConfig(adapter=self.find_model(None)[1])
            self.server.create_session(name, drawn(body.seed), config)

        return await self.change_session(name, work, 201, new=True)

    async def load_session(self, saved: str, name: str, body: NewSessionBody) -> Response:
        """Create a session from a saved one."""
        store = self.store_of(saved, "load")
        require(body.seed is None, "seed", "a saved session has its own", "leave it out")
        data = await self.sessions.ask("load", store.load, saved)
        if data is None:
            raise ApiError(404, f"load: no session is saved as {saved}", "load", "not_found")
        with self.naming(saved, "load"):
            session = await asyncio.to_thread(self.server.unpack_session, data, saved, name)
        return await self.change_session(name, lambda: self.server.insert(session), 201, new=True)

    async def continue_session(
        self,
        request: Request,
        session_id: SessionId,
        body: SessionCompletionBody,
        key: TurnKey = None,
    ) -> Response:
        """Read a prompt in a session and answer; `gates` adds weights and norms to its tokens."""
        settings = self.settings(body, 256)
        if body.model is None:
            del settings["adapter"]  # the session has its own
        call = SessionCall(self, request, body, key or "")
        with call.close_on_error():
            ids = await self.encode(body.prompt)
            if reply := await call.hold(session_id):
                return call.again(reply)
            call.enter()
            jobs = [Job(ids, settings, call.mailbox, session_id=session_id)]
        return await self.respond(call, jobs, call.gates)

    async def stop_session(self, session_id: SessionId) -> Response:
        """End the session's running answer; the session keeps the text that was sent."""
        await self.sessions.stop(session_id)
        return json_response(await self.sessions.info(session_id))

    async def fork_session(
        self, session_id: SessionId, body: SessionBody | None = None
    ) -> Response:
        """Copy a session."""
        body = body or SessionBody()
        name = body.id or uuid.uuid4().hex

        def work() -> None:
            self.server.fork_session(session_id, name, drawn(body.seed))

        if name == session_id:
            raise self.sessions.taken(name)
        async with self.sessions.holding(session_id):
            await self.engine.call(self.engine.find_idle, session_id)
            return await self.change_session(name, work, 201, new=True)

    async def roll_back_session(self, session_id: SessionId) -> Response:
        """Undo the last turn."""

        def work() -> None:
            if not self.engine.find(session_id).before:
                problem = f"{session_id} has no turn to undo; only the last one can be undone"
                raise ApiError(409, problem, "session_id", "nothing_to_undo")
            self.server.rollback(session_id)

        return await self.change_session(session_id, work)

    async def reset_session(self, session_id: SessionId) -> Response:
        """Forget all text; keep the id and the seed."""
        return await self.change_session(session_id, lambda: self.server.reset_session(session_id))

    async def delete_session(self, session_id: SessionId) -> Response:
        """Delete the session, and end its answer."""
        if not await self.sessions.delete(session_id):
            raise no_session(session_id)
        return json_response({"id": session_id, "object": "session", "deleted": True})

    async def save_session(self, session_id: SessionId, body: SaveBody) -> Response:
        """Keep a copy of the session under a name of its own."""
        store, most = self.store_of(body.name, "name"), self.options.max_sessions
        async with self.sessions.holding(session_id):
            info = await self.engine.call(self.idle_info, session_id)
            data = await asyncio.to_thread(self.server.pack_session, session_id)
            with self.naming(body.name, "name"):
                overwrite = bool(body.overwrite)
                await self.sessions.ask("save", store.save, body.name, data, overwrite, most)
        return json_response(info)

    async def get_session_file(self, session_id: SessionId) -> Response:
        """The session as the bytes of a file of streaming.py's --save_session."""
        async with self.sessions.holding(session_id):
            await self.engine.call(self.engine.find_idle, session_id)
            data = await asyncio.to_thread(self.server.pack_session, session_id)
        name = f'attachment; filename="{session_id}.safetensors"'
        headers = {"Content-Disposition": name, "Cache-Control": "no-store"}
        return Response(data, media_type=BINARY, headers=headers)

    async def open_session_file(self, request: Request, new_id: NewId = None) -> Response:
        """Create a session from the bytes of such a file."""
        name = new_id or uuid.uuid4().hex
        try:
            data = await request.body()
        except ClientDisconnect:
            raise ClientDisconnected from None
        session = await asyncio.to_thread(self.server.unpack_session, data, "file", name)
        session.keys, session.reply = {}, None  # its turns are not those of this server's clients
        session.created = session.used = time.time()
        return await self.change_session(name, lambda: self.server.insert(session), 201, new=True)

    def idle_info(self, session_id: str) -> dict:
        """The fields of SessionOut of a session that must not be answering."""
        self.engine.find_idle(session_id)
        return self.engine.session_info(session_id)

    def store_of(self, name: str, param: str) -> Any:
        """The store of saved sessions; `param` is the field that has the name of one."""
        if not self.store:
            problem = f"{param}: this server has no --session_dir and no --session_store"
            raise ApiError(400, problem, param, "no_session_dir")
        require_plain_name(name, param)
        return self.store

    @staticmethod
    @contextlib.contextmanager
    def naming(saved: str, param: str) -> Iterator[None]:
        """Errors about the saved session name the field that has its name."""
        try:
            yield
        except UserError as e:
            name, problem, remedy = e.args
            if name != saved:
                raise
            raise ApiError(400, f"{param}: {saved} {problem}; {remedy}", param) from None

    # Start and end ---------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the engine as long as the app."""
        self.engine = Engine(self.server, self.options, self.metrics, asyncio.get_running_loop())
        self.sessions.engine = self.engine
        self.engine.start()
        yield
        await asyncio.to_thread(self.close)

    def drain(self) -> None:
        """Accept no more requests; undo what still runs after the grace time."""
        self.draining = True
        self.engine.loop.call_later(self.options.grace, self.engine.end)

    def close(self) -> None:
        """End the engine and free the sessions; only the first call has an effect.

        It is called twice, as uvicorn skips the end of the lifespan when it is forced to exit.
        """
        if self.engine is None or self.closed:
            return
        self.closed = True
        self.engine.end()
        self.engine.join()
        self.sessions.close()

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(
            title="TinyMamba", version="1", docs_url=None, redoc_url=None, lifespan=self.lifespan
        )
        router = self.router()
        app.include_router(router)
        app.state.routes = router.routes
        add_error_handlers(app)
        app.add_exception_handler(ClientDisconnected, for_nobody)
        app.add_middleware(Middleware, api=self)
        if self.options.strict:
            describe_strict(app.openapi()["components"]["schemas"])
        return app

    def router(self) -> APIRouter:
        """All routes."""
        router = APIRouter(responses={"4XX": {"model": ErrorOut}, "5XX": {"model": ErrorOut}})
        key = [Depends(HTTPBearer(scheme_name="key", auto_error=False))]
        key = key if self.options.api_key else []

        def add(
            method: str,
            path: str,
            handler: Callable,
            ok: Any = None,
            status: int = 200,
            **more: Any,
        ) -> None:
            """Add a route; `ok` describes the success response in /openapi.json."""
            router.add_api_route(
                path,
                report_unknown(handler, self.options.strict),
                methods=[method],
                status_code=status,
                responses={status: ok or {}},
                response_model=None,
                dependencies=[] if path in PUBLIC_PATHS else key,
                **more,
            )

        text: dict = {"content": {"text/plain": {}}}
        answer = {"model": AnswerOut, "content": {"text/event-stream": {}}}
        session = {"model": SessionOut}
        add("GET", "/", self.get_page, include_in_schema=False)
        add("HEAD", "/", self.get_page, include_in_schema=False)
        add("GET", "/health", self.get_health)
        add("HEAD", "/health", self.get_health, include_in_schema=False)
        add("GET", "/ready", self.get_ready)
        add("GET", "/metrics", self.get_metrics, text, response_class=Response)
        add("GET", "/v1/models", self.list_models)
        add("GET", "/v1/models/{model:path}", self.get_model)
        add("POST", "/v1/completions", self.create_completion, answer)
        add("POST", "/v1/chat/completions", self.create_chat_completion, answer)
        response = {"model": ResponseOut, "content": {"text/event-stream": {}}}
        add("POST", "/v1/responses", self.create_response, response)
        add("POST", "/v1/embeddings", self.create_embeddings, {"model": EmbeddingsOut})
        add("POST", "/tokenize", self.tokenize, {"model": TokensOut})
        add("POST", "/detokenize", self.detokenize, {"model": TextOut})
        add("GET", "/v1/sessions", self.list_sessions, {"model": SessionsOut})
        add("POST", "/v1/sessions", self.create_session, session, 201)
        file: dict = {"content": {BINARY: {"schema": {"type": "string", "format": "binary"}}}}
        body = {"requestBody": {**file, "required": True}}
        add("POST", SESSION_FILES, self.open_session_file, session, 201, openapi_extra=body)
        one = "/v1/sessions/{session_id}"
        add("GET", one, self.get_session, session)
        add("DELETE", one, self.delete_session)
        add("GET", f"{one}/file", self.get_session_file, file, response_class=Response)
        add("POST", f"{one}/completions", self.continue_session, answer)
        add("POST", f"{one}/fork", self.fork_session, session, 201)
        add("POST", f"{one}/save", self.save_session, session)
        add("POST", f"{one}/stop", self.stop_session, session)
        add("POST", f"{one}/rollback", self.roll_back_session, session)
        add("POST", f"{one}/reset", self.reset_session, session)
        return router


# -------------------------------------------------------------------------------- command line


class HttpServer(uvicorn.Server):
    """uvicorn, which on shutdown first gives the running answers the grace time."""

    # What pages of others may read.
    EXPOSED: ClassVar = ("Retry-After", "X-Ignored-Fields", "Idempotency-Replayed")

    def __init__(self, api: Api, **config: Any):
        app: Any = api.app()
        if api.options.origins:  # around the app, so that all of its errors have headers, too
            app = CORSMiddleware(
                app,
                allow_origins=api.options.origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=self.EXPOSED,
            )
        super().__init__(
            uvicorn.Config(
                app,
                timeout_keep_alive=api.options.keep_alive,
                log_level="warning",
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=api.options.grace + 5,
                **config,
            )
        )
        self.api = api

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then do what uvicorn does."""
        self.api.drain()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this address."""
    try:
        return socket.create_server((host, port))
    except OSError as e:
        problem = f"cannot bind {host}:{port} ({e.strerror})"
        remedy = "choose another port or stop the process using it"
        raise UserError("--port", problem, remedy) from None


def warn(api: Api) -> None:
    """Say who can use the server, and what it cannot do."""
    options = api.options
    if not options.api_key and options.host not in LOOPBACK:
        warning = "no --api_key: everyone who can reach this machine can use the server"
        print(warning, file=sys.stderr)
    if problem := api.template.problem:
        remedy = "pass a --tokenizer with a good chat_template.jinja beside it"
        print(f"no chat: {problem}; {remedy}", file=sys.stderr)


def open_api(options: Options) -> Api:
    """Load the model, and warn of what the server cannot do."""
    server = StreamingServer(
        options.checkpoint,
        options.device,
        StreamingConfig(batch_size=options.batch_size),
        options.tokenizer,
        options.dtype,
        options.compile,
        {"adapter": options.adapter} if options.adapter else {},
        force=options.force,
        cache_bytes=options.prefix_cache * 2**20,
        engine=options.engine,
        onnx_folder=options.onnx_folder,
    )
    api = Api(server, options)
    warn(api)
    return api


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM."""
    options = parse(argv)
    with listen(options.host, options.port) as listener:
        api = open_api(options)
        port = listener.getsockname()[1]
        print(f"serving {options.model_name} at http://{options.host}:{port}", flush=True)
        try:
            HttpServer(api).run(sockets=[listener])
        finally:
            api.close()
    return 0


if __name__ == "__main__":
    run_cli(main)
