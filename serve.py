"""An OpenAI-compatible server over StreamingServer, and a page at / that shows what the gate does.

    pip install fastapi uvicorn prometheus-client
    python serve.py --checkpoint ./tinymamba_model_latest.pt --port 8000
    TINYMAMBA_API_KEY=secret python serve.py --host 0.0.0.0 --session_dir ./sessions --keep_sessions

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "import os", "max_tokens": 40, "stream": true}'

/v1/completions, /v1/chat/completions, /v1/models: as OpenAI's, for its client and others.
/v1/sessions: texts that the server remembers at constant size: create, go on, fork, roll back,
    reset, save and load (by plain name, in --session_dir), delete.
/health, /metrics (Prometheus), /openapi.json, and the page.

A request is done whole or not at all: if its client goes away, or the server has to stop, its slot
is free before the next step, and its session stands where it stood before. To stop and keep what
was given out there is /v1/sessions/ID/stop. All answers, of all requests, are decoded as one batch
by one thread, and they join and leave it at any step. What a client sends is text: no special token
is ever read out of it. Fields that this server cannot honor are refused by name.

Chat: if chat_template.jinja, or a tokenizer_config.json with a template, lies beside the tokenizer,
it is used. If not, the model is a plain one: it is given "role: content" for every message, parted
by blank lines, then "assistant:", and it stops where it would speak for the user.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import collections
import contextlib
import hashlib
import hmac
import importlib.util
import inspect
import json
import logging
import os
import queue
import re
import secrets
import socket
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Annotated, Any, Literal

from streaming import MARK, Answer, StreamingConfig, StreamingServer, Token
from tinymamba.checkpoint import require_writable
from tinymamba.cli import DTYPES, CliParser, UserError, need, require, require_plain_name, run_cli
from tinymamba.tokenizer import SimpleTokenizer, byte_alphabet

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
if __name__ == "__main__" and not all(map(importlib.util.find_spec, PACKAGES)):
    run_cli(lambda: [need(name) for name in PACKAGES])

import prometheus_client as prometheus  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Request  # noqa: E402
from fastapi.exceptions import RequestValidationError  # noqa: E402
from fastapi.responses import Response  # noqa: E402
from fastapi.security import HTTPBearer  # noqa: E402
from pydantic import BaseModel, ConfigDict, Field  # noqa: E402
from starlette.exceptions import HTTPException as AnyHTTPException  # noqa: E402

# ---------------------------------------------------------------------------------- requests

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1024)]  # the last that the document's floats can say
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
UNSUPPORTED = "not supported: only the value that changes nothing is taken"


class Body(BaseModel):
    """What no field is for is refused, as it might have changed the result."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(Body):
    """What all three ways to generate have in common; None is the default everywhere."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    logit_bias: (
        Annotated[dict[BiasKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Any = Field(None, description="taken, and without effect")
    metadata: Any = Field(None, description="taken, and without effect")
    store: Any = Field(None, description="taken, and without effect")
    service_tier: Any = Field(None, description="taken, and without effect")
    safety_identifier: Any = Field(None, description="taken, and without effect")
    prompt_cache_key: Any = Field(None, description="taken, and without effect")
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(
        None, description=UNSUPPORTED
    )
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(
        None, description=UNSUPPORTED
    )

    def alternatives(self) -> int | None:
        """How many likeliest tokens to name with each; None leaves out logprobs."""
        return self.logprobs


class CompletionBody(Generation):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1)]
    )
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="n, or nothing")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = Field(None, description=UNSUPPORTED)


class Part(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    refusal: None = None  # these as an answer has them, which is sent back in the next turn
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class TextFormat(Body):
    type: Literal["text"]


class ChatBody(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description=UNSUPPORTED)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class SessionCompletionBody(Generation):
    prompt: str | list[Annotated[int, Field(ge=0, lt=2**31)]] = ""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    gates: bool | None = Field(None, description="name every token, with its gate in each layer")


class SessionBody(Body):
    id: Name | None = None
    seed: Seed | None = None


class SaveBody(Body):
    name: Name
    overwrite: bool | None = Field(None, description="take the place of a session of that name")


class NewSessionBody(SessionBody):
    load: Name | None = Field(None, description="begin with what was saved by this name")


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorOut(BaseModel):
    error: ErrorInfo


class SessionOut(BaseModel):
    id: str
    object: Literal["session"]
    created: int
    last_used: int
    tokens: int
    turns: int
    seed: int
    state_bytes: int
    answering: bool


class SessionsOut(BaseModel):
    object: Literal["list"]
    data: list[SessionOut]


class Choice(BaseModel):
    model_config = ConfigDict(extra="allow")
    index: int
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerOut(BaseModel):
    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["text_completion", "chat.completion", "session.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


# ------------------------------------------------------------------------------------- errors

TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
FIELDS = {"max_new_tokens": "max_tokens", "stop_ids, logit_bias": "logit_bias"}
REFUSED_FIELDS = {
    name
    for model in (CompletionBody, ChatBody)
    for name, f in model.model_fields.items()
    if f.description == UNSUPPORTED
}


class Refusal(HTTPException):
    """An error in OpenAI's form: its status, and the field that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict | None = None,
    ):
        super().__init__(status, message, headers)
        self.body = {
            "error": {
                "message": message,
                "type": TYPES.get(status, "invalid_request_error"),
                "param": param,
                "code": code,
            }
        }

    def response(self) -> Response:
        return json_response(self.body, self.status_code, self.headers)

    @staticmethod
    def of(error: BaseException) -> Refusal:
        if isinstance(error, Refusal):
            return error
        if isinstance(error, UserError):
            name = FIELDS.get(error.args[0], error.args[0])
            _, problem, remedy = error.args
            return Refusal(400, f"{name}: {problem}; {remedy}", name)
        return Refusal(500, "the server failed at this request; its log says why")


def json_response(value, status: int = 200, headers: dict | None = None) -> Response:
    return Response(json.dumps(value), status, headers, "application/json")


def invalid(request: Request, error: RequestValidationError) -> Response:
    """The first mistake of a body or path, with the field's name."""
    errors = error.errors()  # of a union, every branch has its own: those of type say the least
    first = next((e for e in errors if not e["type"].endswith("_type")), errors[0])
    place, here = [], error.body if first["loc"][0] == "body" else {first["loc"][-1]: None}
    for part in first["loc"][1:]:  # a union's branches have names in it, too
        if (
            isinstance(here, dict)
            and part in here
            or isinstance(here, list)
            and part in range(len(here))
        ):
            place, here = [*place, part], here[part]
    if first["type"] == "missing":
        place.append(first["loc"][-1])
    while place and isinstance(place[-1], int):
        place.pop()
    place = place[:1] if place[:1] == ["logit_bias"] else place
    unknown = first["type"] == "extra_forbidden" or place[:1] and place[0] in REFUSED_FIELDS
    name = ".".join(map(str, place)) or None
    message = "is not supported by this server; leave it out" if unknown else first["msg"]
    if first["type"] == "json_invalid":
        name, message = None, "the body is not JSON"
    return Refusal(
        400,
        f"{name}: {message}" if name else message,
        name,
        "unsupported_parameter" if unknown else None,
    ).response()


def http_error(request: Request, error: AnyHTTPException) -> Response:
    if isinstance(error, Refusal):
        return error.response()
    code, headers = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code), {}
    if error.status_code == 405:  # Starlette names the methods of the first route only
        headers["Allow"] = ", ".join(
            sorted(
                method
                for route in request.app.state.routes
                if route.path_regex.match(request.url.path)
                for method in route.methods
            )
        )
    return Refusal(error.status_code, str(error.detail), None, code, headers).response()


# ------------------------------------------------------------------------------------- engine


class Mailbox(asyncio.Queue):
    """What the engine tells a handler, on the handler's event loop."""

    LAG = 256  # letters for each answer that may lie here before its reader counts as gone

    def __init__(self, answers: int):
        super().__init__()
        self.most = self.LAG * answers

    async def take(self) -> list:
        """All that has come, once something has."""
        return [await self.get(), *(self.get_nowait() for _ in range(self.qsize()))]


@dataclass(eq=False)
class Job:
    """One answer that was asked for. Its mailbox gets (index, kind, value), see Engine.tell."""

    prompt: list[int]
    settings: dict
    mailbox: Mailbox
    index: int = 0
    session: str | None = None
    answer: Answer | None = None
    read: bool = False  # the prompt, to its end
    stopped: bool = False  # by /stop
    asked: float = field(default_factory=time.perf_counter)
    first: float | None = None


def ending() -> Refusal:
    return Refusal(503, "the server is shutting down", None, "shutting_down", {"Retry-After": "5"})


class Engine(threading.Thread):
    """The one thread that steps the decoder. Between two steps it does what handlers ask for."""

    def __init__(
        self,
        server: StreamingServer,
        options: Options,
        meters: Metrics,
        loop: asyncio.AbstractEventLoop,
    ):
        super().__init__(name="engine", daemon=True)
        self.server, self.options, self.meters, self.loop = server, options, meters, loop
        self.commands, self.waiting, self.running = queue.SimpleQueue(), collections.deque(), []
        self.letters, self.cleaned = [], time.monotonic()
        self.open, self.door = True, threading.Lock()  # nothing is ordered once it is shut

    def run(self) -> None:
        try:
            while self.open:
                self.handle_command()
                self.begin()
                if self.running:
                    self.step()
                self.post()
        finally:
            self.finish()

    # Called by handlers ----------------------------------------------------------------------

    def order(self, command) -> None:
        with self.door:
            if not self.open:
                raise ending()
            self.commands.put(command)

    def submit(self, jobs: list[Job]) -> None:
        self.order(lambda: self.admit(jobs))

    def abandon(self, jobs: list[Job]) -> None:
        with contextlib.suppress(Refusal):  # at its end it abandons all
            self.order(lambda: self.drop(jobs))

    async def call(self, function, *arguments):
        """The result of a function that the engine's thread runs between two steps."""
        future = self.loop.create_future()

        def run() -> None:
            try:
                result, error = function(*arguments), None
            except Exception as e:
                result, error = None, e
            self.letters.append((self.resolve, (future, result, error)))

        self.order(run)
        return await future

    @staticmethod
    def resolve(future: asyncio.Future, result, error) -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(result)

    def end(self) -> None:
        """Roll back what is left, tell its clients, and end the thread."""
        with contextlib.suppress(Refusal):
            self.order(self.finish)

    # In the thread ---------------------------------------------------------------------------

    def handle_command(self) -> None:
        """Do what was asked; with nothing else to do, wait for it."""
        idle = not self.running and not self.waiting
        with contextlib.suppress(queue.Empty):
            if idle:
                self.commands.get(timeout=60)()
            while True:
                self.commands.get_nowait()()
        if time.monotonic() - self.cleaned > 60:
            self.cleaned = time.monotonic()
            self.server.cleanup_old_sessions(self.options.session_timeout)

    def admit(self, jobs: list[Job]) -> None:
        for job in jobs:
            try:
                if job.session is not None:
                    self.idle(job.session)
                self.waiting.append(job)
            except Refusal as e:
                self.fail(job, e)

    def begin(self) -> None:
        """Start what waits, as far as there are slots."""
        while self.waiting and len(self.running) < self.options.batch_size:
            job = self.waiting.popleft()
            try:
                if job.session is not None:
                    self.known(job.session)
                job.answer = self.server.answer(job.prompt, job.session, **job.settings)
            except Exception as e:
                self.fail(job, e)
            else:
                self.running.append(job)
                self.tell(job, "begun", job.answer.prompt_tokens)

    def step(self) -> None:
        try:
            self.server.decoder.step()
        except Exception as e:  # nobody knows whose it is; every handler is to hear of it
            failed = self.running
            self.drop(failed)
            for job in failed:
                self.fail(job, e)
        for job in [*self.running]:
            self.collect(job)
        for job in self.running:
            if job.answer and not job.answer.open:
                job.answer = None  # nobody needs its states any more
        self.running = [job for job in self.running if job.answer]

    def collect(self, job: Job) -> None:
        """Tell of what is new."""
        answer = job.answer
        if not job.read and not answer.to_read:
            job.read = True
            self.tell(job, "read", answer.scores)
        try:
            for chunk in answer.ready_chunks():
                if job.first is None:
                    job.first = time.perf_counter()
                    self.meters.first.observe(job.first - job.asked)
                self.meters.tokens.labels("completion").inc(len(chunk.tokens))
                self.tell(job, "chunk", chunk)
        except Exception as e:
            self.fail(job, e)
            return
        if not answer.open:
            self.conclude(job)
        elif job.mailbox.qsize() > job.mailbox.most:
            self.drop([job])
            self.tell(job, "gone", None)

    def conclude(self, job: Job) -> None:
        reason = job.answer.finish_reason or ("stop" if job.stopped else None)
        if not reason or (job.session and job.session not in self.server.sessions):
            self.fail(job, Refusal(409, "the session was deleted", "session_id"))
            return
        self.meters.tokens.labels("prompt").inc(job.answer.prompt_tokens)
        closing = [job.answer.closing] if job.answer.ended_by is not None else []
        about = {"session": self.info(job.session)} if job.session else {}
        self.tell(job, "done", (reason, closing, about))

    def drop(self, jobs: list[Job]) -> None:
        """Forget jobs, as if they had never been asked for."""
        for job in jobs:
            if job.answer:
                job.answer.abandon()
                job.answer = None
        gone = set(map(id, jobs))
        self.running = [job for job in self.running if id(job) not in gone]
        self.waiting = collections.deque(job for job in self.waiting if id(job) not in gone)

    def finish(self) -> None:
        with self.door:
            self.open = False
        with contextlib.suppress(queue.Empty):
            while True:
                self.commands.get_nowait()()
        left = [*self.running, *self.waiting]
        self.drop(left)
        for job in left:
            self.fail(job, ending())
        self.post()

    def tell(self, job: Job, kind: str, value) -> None:
        """begun: tokens of the prompt; read: its scores; chunk: a Chunk; done: why, eos, session.

        Who asks for logprobs gets that of eos, too; lm-eval counts on a token after the prompt.
        """
        self.letters.append((job.mailbox.put_nowait, ((job.index, kind, value),)))

    def fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, Refusal | UserError):
            logging.getLogger("serve").error("an answer failed", exc_info=error)
        self.tell(job, "failed", Refusal.of(error))

    def post(self) -> None:
        """Hand all letters over, at the cost of waking the loop once."""
        if self.letters:
            letters, self.letters = self.letters, []
            self.loop.call_soon_threadsafe(deliver, letters)

    # Sessions, in the thread -----------------------------------------------------------------

    def known(self, session_id: str):
        session = self.server.sessions.get(session_id)
        if session is None:
            raise Refusal(404, f"there is no session {session_id}", "session_id", "not_found")
        return session

    def idle(self, session_id: str):
        session = self.known(session_id)
        if session.answer or any(job.session == session_id for job in self.waiting):
            raise Refusal(
                409,
                f"session {session_id} is answering; wait, or stop it",
                "session_id",
                "session_busy",
            )
        return session

    def make_room(self, new_id: str | None) -> None:
        if new_id in self.server.sessions:
            raise Refusal(409, f"id: {new_id} is taken; use another", "id", "id_taken")
        if len(self.server.sessions) >= self.options.max_sessions:
            raise Refusal(
                429,
                f"there are {self.options.max_sessions} sessions already; delete some",
                None,
                "too_many_sessions",
                {"Retry-After": "60"},
            )

    def info(self, session_id: str) -> dict:
        self.known(session_id)
        s = self.server.get_session_info(session_id)
        return {
            "id": s["session_id"],
            "object": "session",
            "created": int(s["created"]),
            "last_used": int(s["last_used"]),
            "tokens": s["position"],
            "turns": s["turns"],
            "seed": s["seed"],
            "state_bytes": s["state_bytes"],
            "answering": s["answering"],
        }

    def stop(self, session_id: str) -> None:
        """End the session's answer, if there is one, where it is."""
        self.known(session_id)
        for job in self.running:
            if job.session == session_id:
                job.stopped = True
                job.answer.stop()
        for job in [job for job in self.waiting if job.session == session_id]:
            self.drop([job])
            self.fail(job, Refusal(409, "the answer was stopped before it began", "session_id"))


def deliver(letters: list) -> None:
    for function, arguments in letters:
        function(*arguments)


# ---------------------------------------------------------------------------------- text forms


class Vocabulary:
    """What single tokens read as."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}
        self.byte_of = {c: bytes([b]) for b, c in enumerate(byte_alphabet())}

    def bytes_of(self, token: int) -> bytes:
        if token not in self.known:
            self.known[token] = self.read(token)
        return self.known[token]

    def read(self, token: int) -> bytes:
        t = self.tokenizer
        if not isinstance(t, SimpleTokenizer):
            return t.decode([token]).encode()
        if t.library is None:
            return t.pieces[token] if token < len(t.pieces) else b""
        raw, text = t.library.id_to_token(token) or "", t.decode([token], skip_special_tokens=False)
        if MARK in text and set(raw) <= set(self.byte_of):
            return b"".join(map(self.byte_of.get, raw))
        return text.encode()

    def text_of(self, token: int) -> str:
        """As OpenAI writes it: a part of a character by its bytes."""
        piece = self.bytes_of(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)


class Writer:
    """Writes the choices of one answer in the form of its route, as a whole or bit by bit."""

    def __init__(self, kind: str, vocabulary: Vocabulary, index: int, shown: dict):
        """`shown`: what was asked for, of "logprobs" and "gates"."""
        self.kind, self.vocabulary, self.index, self.shown = kind, vocabulary, index, shown
        self.decoder, self.offset = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def choice(self, text: str, tokens: list[Token], finish: str | None, delta: bool) -> dict:
        choice = {"index": self.index, "finish_reason": finish, "logprobs": None}
        if self.kind == "chat":
            said = (
                {"content": text}
                if delta
                else {"role": "assistant", "content": text, "refusal": None}
            )
            choice["delta" if delta else "message"] = said if text or not delta else {}
        else:
            choice["text"] = text
        if self.shown["logprobs"] and (tokens or not delta):
            choice["logprobs"] = (
                self.chat_logprobs(tokens) if self.kind == "chat" else self.plain_logprobs(tokens)
            )
        if self.shown["gates"]:
            choice["tokens"] = [
                {
                    "id": t.id,
                    "text": self.vocabulary.text_of(t.id),
                    "gates": None if t.gates is None else t.gates.round(3).tolist(),
                }
                for t in tokens
            ]
        return choice

    def plain_logprobs(self, tokens: list[Token]) -> dict:
        offsets, name = [], self.vocabulary.text_of
        for t in tokens:
            offsets.append(self.offset)
            self.offset += len(self.decoder.decode(self.vocabulary.bytes_of(t.id)))
        return {
            "tokens": [name(t.id) for t in tokens],
            "text_offset": offsets,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [
                None if t.logprob is None else {name(i): p for i, p in reversed(t.top)}
                for t in tokens
            ],
        }

    def chat_logprobs(self, tokens: list[Token]) -> dict:
        def entry(token: int, logprob: float) -> dict:
            return {
                "token": self.vocabulary.text_of(token),
                "logprob": logprob,
                "bytes": list(self.vocabulary.bytes_of(token)),
            }

        return {
            "content": [
                {**entry(t.id, t.logprob), "top_logprobs": [entry(*a) for a in t.top]}
                for t in tokens
            ],
            "refusal": None,
        }


class Template:
    """A chat as the text of a prompt."""

    TURN = "\n\nuser:"  # where a plain model would speak for the user

    def __init__(self, tokenizer):
        """It keeps the tokenizer to itself: one that reads special tokens is no other's."""
        self.tokenizer, self.template, self.names = tokenizer, None, {}
        if getattr(tokenizer, "path", None):
            self.look_into(File(tokenizer.path).parent)

    def look_into(self, folder: File) -> None:
        file, config, about = folder / "chat_template.jinja", folder / "tokenizer_config.json", {}
        try:
            if config.is_file():
                about = json.loads(config.read_text(encoding="utf-8"))
            text = (
                file.read_text(encoding="utf-8") if file.is_file() else about.get("chat_template")
            )
            if isinstance(text, list):  # several, by name
                text = {each["name"]: each["template"] for each in text}["default"]
            if text is None:
                return
            sandbox = need("jinja2.sandbox").ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True
            )
            self.template = sandbox.from_string(text)
        except (ValueError, KeyError, TypeError, AttributeError, need("jinja2").TemplateError) as e:
            raise UserError(
                str(folder), f"its chat template cannot be read ({e})", "mend it, or take it away"
            ) from None
        for name in ("bos_token", "eos_token"):
            token = about.get(name) or ""
            self.names[name] = token.get("content", "") if isinstance(token, dict) else token

    @property
    def stops(self) -> list[str]:
        return [] if self.template else [self.TURN]

    def encode(self, messages: list[Message]) -> list[int]:
        said = [
            m.content if isinstance(m.content, str) else "".join(p.text for p in m.content)
            for m in messages
        ]
        if not self.template:
            turns = [f"{m.role}: {text}" for m, text in zip(messages, said, strict=True)]
            return self.tokenizer.encode("\n\n".join([*turns, "assistant:"]))
        marks = [{"role": m.role, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        try:
            text = self.template.render(messages=marks, add_generation_prompt=True, **self.names)
        except Exception as e:  # a template may raise anything, and does so for roles it forbids
            raise Refusal(
                400, f"messages: the chat template refuses them ({e})", "messages"
            ) from None
        ids = []  # the template's own text may hold special tokens, and what was said none
        for part in re.split("(\ue000[0-9]+\ue001)", text):
            if re.fullmatch("\ue000[0-9]+\ue001", part):
                ids += self.tokenizer.encode(said[int(part[1:-1])])
            elif part:
                ids += self.tokenizer.encode(part, allow_special=True)
        return ids


# ---------------------------------------------------------------------------------------- HTTP


@dataclass
class Options:
    """Limits and places of a server; each is a flag."""

    api_key: str = ""  # that all but / and /health must bear; also TINYMAMBA_API_KEY
    model_name: str = ""  # as clients call the model; else the checkpoint's name
    batch_size: int = 64  # answers that are decoded together
    max_queue: int = 256  # answers that may wait for a slot; more are told to try again (429)
    max_body: int = 2**20  # bytes of a request
    max_prompt: int = 32768  # tokens of a prompt
    max_tokens: int = 4096  # tokens of an answer
    max_choices: int = 128  # answers of one request: prompts times n
    session_dir: str = ""  # folder of saved sessions; without, none can be saved or loaded
    keep_sessions: bool = False  # save all sessions when told to end, load them at the start
    max_sessions: int = 1024  # that are open at one time, and that are saved
    session_timeout: int = 86400  # seconds after which an unused session is deleted
    body_timeout: int = 30  # seconds in which a request has to arrive
    grace: int = 10  # seconds that running answers get to end when the server is stopped


class Metrics:
    """What /metrics tells."""

    def __init__(self):
        p, self.registry = prometheus, prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        self.requests = p.Counter(
            "tinymamba_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.tokens = p.Counter(
            "tinymamba_tokens", "Tokens read and drawn.", ["kind"], registry=self.registry
        )
        self.first = p.Histogram(
            "tinymamba_first_token_seconds",
            "From request to first text.",
            registry=self.registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )

    def gauge(self, name: str, text: str, value) -> None:
        prometheus.Gauge(f"tinymamba_{name}", text, registry=self.registry).set_function(value)


class Middleware:
    """What is asked before a request is read: its key, its size, and if there is room for it."""

    def __init__(self, app, api: Api):
        self.app, self.api = app, api

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        def count(status: int) -> None:
            route = getattr(scope.get("route"), "path", "none")
            self.api.meters.requests.labels(route, status).inc()

        async def sent(message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            self.check(scope["path"], scope["method"], dict(scope["headers"]))
        except Refusal as refusal:
            await refusal.response()(scope, receive, sent)
        else:
            try:
                await self.app(scope, self.limited(receive), sent)
            except Exception:  # it is answered, and logged, outside of this
                count(500)
                raise

    def check(self, path: str, method: str, headers: dict[bytes, bytes]) -> None:
        options, key = self.api.options, headers.get(b"authorization", b"")
        wanted = b"Bearer " + options.api_key.encode()
        if options.api_key and path not in OPEN and not hmac.compare_digest(key, wanted):
            raise Refusal(
                401,
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                None,
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )
        origin = headers.get(b"origin")
        if origin and origin.partition(b"//")[2] != headers.get(b"host"):
            raise Refusal(403, "another site's page may not call this server", None, "origin")
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size) > options.max_body:
            raise self.too_large()
        if method == "POST" and path.endswith("/completions"):
            self.api.require_room(1)

    def too_large(self) -> Refusal:
        return Refusal(
            413,
            f"the body is larger than {self.api.options.max_body} bytes",
            None,
            "body_too_large",
            {"Connection": "close"},
        )

    def limited(self, receive):
        """The same, as long as the body is neither too large nor too slow."""
        count, complete = 0, False
        end = asyncio.get_running_loop().time() + self.api.options.body_timeout

        async def next_message():
            nonlocal count, complete
            if complete:  # what still comes is that the client goes away
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise Refusal(
                    408, "the body did not arrive in time", None, "timeout", {"Connection": "close"}
                ) from None
            count += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if count > self.api.options.max_body:
                raise self.too_large()
            return message

        return next_message


class EventStream(Response):
    """Server-sent events of a call, which is closed whatever happens."""

    def __init__(self, call: Call, parts):
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self.call, self.parts = call, parts

    async def __call__(self, scope, receive, send) -> None:
        with contextlib.closing(self.call), contextlib.suppress(TimeoutError):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self.parts:
                async with asyncio.timeout(self.call.api.options.body_timeout):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientDisconnected(Exception):
    """The client went away."""


class Call:
    """The answers of one request, from its admission to its end."""

    def __init__(self, api: Api, request: Request, kind: str, body: Generation, count: int):
        self.api, self.request, self.kind, self.body = api, request, kind, body
        api.require_room(count)
        self.count, self.jobs, self.mailbox, self.watch = count, [], Mailbox(count), None
        api.pending += count
        self.id = {"text": "cmpl-", "chat": "chatcmpl-", "session": "scmpl-"}[kind]
        self.id, self.created = self.id + uuid.uuid4().hex, int(time.time())
        self.left, self.prompt_tokens, self.drawn, self.first = count, {}, 0, []
        self.about = {}  # of the session
        self.model, _ = api.model_of(body.model)

    def close(self) -> None:
        """Give the room back; what has not come to its end is undone."""
        self.api.pending -= self.count
        if self.left and self.jobs:
            self.api.engine.abandon(self.jobs)
        self.left = self.count = 0
        if self.watch:
            self.watch.cancel()
            self.watch = None  # it holds this call, which would wait for the garbage collector

    async def watch_client(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        if self.left:
            self.api.engine.abandon(self.jobs)
        self.mailbox.put_nowait((0, "gone", None))

    async def start(self, jobs: list[Job]) -> None:
        """Hand jobs over, and wait for the first news that could still be an error."""
        self.jobs = jobs
        self.watch = asyncio.ensure_future(self.watch_client())
        self.api.engine.submit(jobs)
        while not self.first:
            self.first = [item async for item in self.news() if item[1] != "begun"]

    async def news(self):
        """What the mailbox holds, as soon as it holds something."""
        for item in await self.mailbox.take():
            index, kind, value = item
            if kind == "gone":
                raise ClientDisconnected
            if kind == "failed":
                raise value
            if kind == "begun":
                self.prompt_tokens[index] = value
            elif kind == "chunk":
                self.drawn += len(value.tokens)
            elif kind == "done":
                self.left -= 1
            yield item

    async def batches(self):
        """Lists of what happens, to the end."""
        yield self.first
        while self.left:
            yield [item async for item in self.news()]

    def usage(self) -> dict:
        each = getattr(self.body, "n", None) or 1
        read = sum(count for index, count in self.prompt_tokens.items() if index % each == 0)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.drawn,
            "total_tokens": read + self.drawn,
        }

    def envelope(self, object_name: str, choices: list, **more) -> dict:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.api.fingerprint,
            **more,
        }

    async def whole(self, writers: list[Writer], echoes: list[str]) -> Response:
        """The answer as one JSON object."""
        texts, tokens, reasons = echoes, [[] for _ in writers], {}
        async for batch in self.batches():
            for index, kind, value in batch:
                if kind == "chunk":
                    texts[index] += value.text
                    tokens[index] += value.tokens
                elif kind == "read":
                    tokens[index] += value
                elif kind == "done":
                    reasons[index], closing, self.about = value
                    tokens[index] += closing if self.body.alternatives() is not None else []
        choices = [w.choice(texts[i], tokens[i], reasons[i], False) for i, w in enumerate(writers)]
        name = {
            "text": "text_completion",
            "chat": "chat.completion",
            "session": "session.completion",
        }[self.kind]
        return json_response(self.envelope(name, choices, usage=self.usage(), **self.about))

    async def events(self, writers: list[Writer], echoes: list[str]):
        """The answer as server-sent events; an error among them is the last."""
        usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        name = {
            "text": "text_completion",
            "chat": "chat.completion.chunk",
            "session": "session.completion.chunk",
        }[self.kind]
        spare = {"usage": None} if usage else {}

        def event(choices: list, **more) -> bytes:
            return sse(self.envelope(name, choices, **{**spare, **more}))

        try:
            if self.kind == "chat":
                yield b"".join(
                    event(
                        [
                            {
                                **w.choice("", [], None, True),
                                "delta": {"role": "assistant", "content": "", "refusal": None},
                            }
                        ]
                    )
                    for w in writers
                )
            async for batch in self.batches():
                parts = []
                for index, kind, value in batch:
                    write = writers[index].choice
                    if kind == "chunk":
                        parts.append(event([write(value.text, value.tokens, None, True)]))
                    elif kind == "read" and (value or echoes[index]):
                        parts.append(event([write(echoes[index], value, None, True)]))
                    elif kind == "done":
                        reason, closing, self.about = value
                        logprobs = self.body.alternatives() is not None
                        parts.append(event([write("", closing if logprobs else [], reason, True)]))
                yield b"".join(parts)
            if usage or self.kind == "session":
                yield event([], usage=self.usage(), **self.about)
            yield b"data: [DONE]\n\n"
        except ClientDisconnected:
            return
        except Refusal as refusal:
            yield sse(refusal.body)


def sse(value) -> bytes:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


OPEN = ("/", "/health")  # the page itself holds nothing; what it calls needs the key
PAGE = File(__file__).resolve().parent / "page.html"


def page_policy(page: str) -> str:
    """A Content-Security-Policy that lets a page's own script and style run, and nothing else."""
    script, style = (
        "'sha256-"
        + base64.b64encode(
            hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1].encode()).digest()
        ).decode()
        + "'"
        for tag in ("script", "style")
    )
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


SessionId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Api:
    """The routes, and what they share. `server` belongs to it alone from here on."""

    def __init__(self, server: StreamingServer, options: Options):
        require(server.tokenizer, "tokenizer", "none was found", "pass --tokenizer")
        self.server, self.options, self.meters = server, options, Metrics()
        self.pending, self.draining, self.closed, self.engine = 0, False, False, None
        self.vocabulary = Vocabulary(server.tokenizer)
        path = getattr(server.tokenizer, "path", None)
        self.tokenizer = SimpleTokenizer(path) if path else server.tokenizer
        self.template = Template(SimpleTokenizer(path) if path else server.tokenizer)
        self.encoding, self.filing = asyncio.Lock(), asyncio.Lock()
        self.fingerprint = "fp_" + server.fingerprint[:16]
        self.started, base = int(time.time()), options.model_name
        self.names = {base: None, **{f"{base}:{adapter}": adapter for adapter in server.adapters}}
        self.folder = File(options.session_dir) if options.session_dir else None
        for place in (self.folder, self.kept if options.keep_sessions else None):
            if place:
                require_writable(place, "--session_dir")
        if options.keep_sessions:
            for file in sorted(self.kept.glob("*.safetensors")):
                try:
                    server.load_session(file, file.stem)
                except UserError as e:
                    raise UserError(str(file), e.args[1], "move it away") from None
        self.meters.gauge(
            "running_answers", "Answers in the batch.", lambda: len(self.engine.running)
        )
        self.meters.gauge("pending_answers", "Answers admitted and not done.", lambda: self.pending)
        self.meters.gauge("sessions", "Open sessions.", lambda: len(server.sessions))

    # What the routes share -------------------------------------------------------------------

    def require_room(self, count: int) -> None:
        if self.draining:
            raise ending()
        if self.pending + count > self.options.batch_size + self.options.max_queue:
            raise Refusal(
                429, "the server is full; try again", None, "queue_full", {"Retry-After": "1"}
            )

    def model_of(self, name: str | None) -> tuple[str, str | None]:
        """The name of the model that answers, and its adapter."""
        name = name or list(self.names)[-1]
        if name not in self.names:
            raise Refusal(
                404,
                f"model: there is no {name}; there are {', '.join(self.names)}",
                "model",
                "model_not_found",
            )
        return name, self.names[name]

    def settings(self, body: Generation, default_tokens: int, stops: list[str] = []) -> dict:  # noqa: B006
        """The body's fields as those of StreamingConfig, checked."""
        given = getattr(body, "max_completion_tokens", None)
        most = next(
            (n for n in (given, body.max_tokens) if n is not None),
            min(default_tokens, self.options.max_tokens),
        )
        if most > self.options.max_tokens:
            raise Refusal(
                400,
                f"max_tokens: {most} is more than this server makes; ask for up to "
                f"{self.options.max_tokens}",
                "max_tokens",
            )
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if body.stream_options and not body.stream:
            raise Refusal(400, "stream_options: there is no stream; set stream", "stream_options")
        bias = {int(i): b for i, b in (body.logit_bias or {}).items()}

        def or_else(value, default):
            return default if value is None else value

        settings = {
            "max_new_tokens": most,
            "temperature": or_else(body.temperature, 1.0),
            "top_p": or_else(body.top_p, 1.0),
            "top_k": body.top_k or 0,
            "min_p": body.min_p or 0.0,
            "seed": body.seed,
            "logit_bias": bias or None,
            "repetition_penalty": or_else(body.repetition_penalty, 1.0),
            "stop": [*stop, *stops],
            "logprobs": body.alternatives(),
            "adapter": self.model_of(body.model)[1],
        }
        self.server.configured(self.server.config, settings)
        return settings

    async def encode(self, prompt, encode=None) -> list[int]:
        """The ids of a prompt, in a thread beside the loop."""
        if isinstance(prompt, list) and encode is None:
            ids = self.server.encode(prompt)
        else:
            async with self.encoding:
                ids = await asyncio.to_thread(encode or self.tokenizer.encode, prompt)
        if len(ids) > self.options.max_prompt:
            raise Refusal(
                400,
                f"prompt: has {len(ids)} tokens; send up to {self.options.max_prompt}",
                "prompt",
                "context_length_exceeded",
            )
        return ids

    async def respond(self, call: Call, jobs: list[Job], gates=False, echoes=None) -> Response:
        body, handed_over = call.body, False
        shown = {"logprobs": body.alternatives() is not None, "gates": gates}
        writers = [Writer(call.kind, self.vocabulary, job.index, shown) for job in jobs]
        echoes = echoes or [""] * len(jobs)
        try:
            await call.start(jobs)
            if body.stream:
                handed_over = True
                return EventStream(call, call.events(writers, echoes))
            return await call.whole(writers, echoes)
        except ClientDisconnected:
            return Response(status_code=499)  # nobody reads it
        finally:
            if not handed_over:
                call.close()

    # OpenAI's routes -------------------------------------------------------------------------

    async def completions(self, request: Request, body: CompletionBody) -> Response:
        """Continue one prompt or several, of text or of ids, n times each."""
        several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
        prompts, n = body.prompt if several else [body.prompt], body.n or 1
        if body.best_of not in (None, n):
            raise Refusal(
                400, "best_of: is not supported; leave it out", "best_of", "unsupported_parameter"
            )
        settings = self.settings(body, 16)
        if body.echo and body.logprobs is not None:
            settings["prompt_logprobs"] = body.logprobs
        self.require_few(len(prompts) * n)
        call = Call(self, request, "text", body, len(prompts) * n)
        try:
            jobs, echoes = [], []
            for prompt in prompts:
                ids = await self.encode(prompt)
                text = prompt if body.echo else ""
                if not isinstance(text, str):
                    text = self.server.tokenizer.decode(ids)
                echoes += [text] * n
                jobs += self.jobs(call, ids, settings, n, len(jobs))
        except BaseException:
            call.close()
            raise
        return await self.respond(call, jobs, echoes=echoes)

    def require_few(self, count: int) -> None:
        o = self.options
        if count > (most := min(o.max_choices, o.batch_size + o.max_queue)):
            raise Refusal(400, f"n: {count} answers are more than {most}", "n")

    def jobs(self, call: Call, ids: list[int], settings: dict, n: int, at: int) -> list[Job]:
        """Choice i of a prompt draws by the seed plus i."""
        seed = secrets.randbits(62) if settings["seed"] is None else settings["seed"]
        return [
            Job(ids, {**settings, "seed": (seed + i) % 2**63}, call.mailbox, at + i)
            for i in range(n)
        ]

    async def chat(self, request: Request, body: ChatBody) -> Response:
        """Answer a chat; see the head of serve.py for how it is put to the model."""
        settings, n = self.settings(body, 256, self.template.stops), body.n or 1
        if body.top_logprobs and not body.logprobs:
            raise Refusal(400, "top_logprobs: wants logprobs; set it", "top_logprobs")
        self.require_few(n)
        call = Call(self, request, "chat", body, n)
        try:
            ids = await self.encode(body.messages, self.template.encode)
            jobs = self.jobs(call, ids, settings, n, 0)
        except BaseException:
            call.close()
            raise
        return await self.respond(call, jobs)

    async def models(self) -> Response:
        """The model, and the adapters that it may wear."""
        return json_response({"object": "list", "data": [*map(self.card, self.names)]})

    async def model(self, model: str) -> Response:
        return json_response(self.card(self.model_of(model)[0]))

    def card(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "tinymamba"}

    async def health(self) -> Response:
        """Whether the server takes requests."""
        well = self.engine.open and not self.draining
        return json_response({"status": "ok" if well else "ending"}, 200 if well else 503)

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        return Response(
            prometheus.generate_latest(self.meters.registry),
            media_type="text/plain; version=0.0.4; charset=utf-8",
        )

    async def page(self) -> Response:
        text = PAGE.read_text(encoding="utf-8")
        return Response(
            text,
            media_type="text/html",
            headers={
                "Content-Security-Policy": page_policy(text),
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
            },
        )

    # Sessions --------------------------------------------------------------------------------

    async def sessions(self) -> Response:
        """All open sessions."""
        told = await self.engine.call(lambda: [*map(self.engine.info, self.server.sessions)])
        return json_response({"object": "list", "data": told})

    async def do(self, work, status: int = 200) -> Response:
        """Run in the engine's thread what gives a session's id; the session."""
        return json_response(await self.engine.call(lambda: self.engine.info(work())), status)

    async def create(self, body: NewSessionBody | None = None) -> Response:
        """A new session, which has read nothing, or what a saved one had read."""
        body = body or NewSessionBody()
        if body.load is not None:
            return await self.load(body)

        def work() -> str:
            self.engine.make_room(body.id)
            config = StreamingConfig(adapter=self.model_of(None)[1])
            return self.server.create_session(body.id, body.seed, config)

        return await self.do(work, 201)

    async def load(self, body: NewSessionBody) -> Response:
        file = self.file(body.load, "load")
        if body.seed is not None:
            raise Refusal(400, "seed: a saved session has its own; leave it out", "seed")
        async with self.filing:
            if not file.is_file():
                raise Refusal(404, f"load: no session {body.load} was saved", "load", "not_found")
            await self.engine.call(self.engine.make_room, body.id)
            made = await self.files(lambda: self.server.load_session(file, body.id), "load", file)
            return await self.do(lambda: made, 201)

    async def session(self, session_id: SessionId) -> Response:
        """One session."""
        return await self.do(lambda: session_id)

    async def go_on(
        self, request: Request, session_id: SessionId, body: SessionCompletionBody
    ) -> Response:
        """Read a prompt in a session, and answer; with `gates`, every token's branch weights."""
        settings = self.settings(body, 256)
        if body.model is None:
            del settings["adapter"]  # the session has its own
        call = Call(self, request, "session", body, 1)
        try:
            ids = await self.encode(body.prompt)
            jobs = [Job(ids, settings, call.mailbox, session=session_id)]
        except BaseException:
            call.close()
            raise
        return await self.respond(call, jobs, bool(body.gates))

    async def stop(self, session_id: SessionId) -> Response:
        """End the answer in hand; the session keeps what was given out."""
        return await self.do(lambda: self.engine.stop(session_id) or session_id)

    async def fork(self, session_id: SessionId, body: SessionBody | None = None) -> Response:
        """A second session that stands where this one does."""
        body = body or SessionBody()

        def work() -> str:
            self.engine.idle(session_id)
            self.engine.make_room(body.id)
            return self.server.fork_session(session_id, body.id, body.seed)

        return await self.do(work, 201)

    async def rollback(self, session_id: SessionId) -> Response:
        """Undo the last turn."""

        def work() -> str:
            if not self.engine.idle(session_id).before:
                raise Refusal(
                    409,
                    f"{session_id} has no turn to undo; one can be undone, once",
                    "session_id",
                    "nothing_to_undo",
                )
            self.server.rollback(session_id)
            return session_id

        return await self.do(work)

    async def reset(self, session_id: SessionId) -> Response:
        """Forget all text, and keep the name and the seed."""
        return await self.do(
            lambda: (
                self.engine.idle(session_id) and self.server.reset_session(session_id) or session_id
            )
        )

    async def delete(self, session_id: SessionId) -> Response:
        """Forget the session, and end its answer."""
        await self.engine.call(
            lambda: self.engine.known(session_id) and self.server.delete_session(session_id)
        )
        return json_response({"id": session_id, "object": "session", "deleted": True})

    def file(self, name: str, param: str) -> File:
        if not self.folder:
            raise Refusal(
                400, f"{param}: this server has no --session_dir", param, "no_session_dir"
            )
        require_plain_name(name, param)
        return self.folder / f"{name}.safetensors"

    async def files(self, work, param: str, file: File):
        """Work on a file in a thread of its own; what is wrong is told without its place."""
        try:
            return await asyncio.to_thread(work)
        except UserError as e:
            what, problem, remedy = e.args
            if what != str(file):
                raise
            raise Refusal(400, f"{param}: {file.stem} {problem}; {remedy}", param) from None

    async def save(self, session_id: SessionId, body: SaveBody) -> Response:
        """Write the session to a file in --session_dir."""
        file = self.file(body.name, "name")
        async with self.filing:
            await self.engine.call(self.engine.idle, session_id)
            if os.path.lexists(file):
                if not body.overwrite:
                    raise Refusal(
                        409,
                        f"name: {body.name} is there; set overwrite, or use another",
                        "name",
                        "name_taken",
                    )
            elif sum(1 for _ in self.folder.glob("*.safetensors")) >= self.options.max_sessions:
                raise Refusal(
                    429,
                    "there are too many saved sessions",
                    None,
                    "too_many_sessions",
                    {"Retry-After": "60"},
                )
            await self.files(lambda: self.server.save_session(session_id, file), "name", file)
            return await self.do(lambda: session_id)

    # Beginning and end -----------------------------------------------------------------------

    @property
    def kept(self) -> File:
        return self.folder / "kept"

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI):
        self.engine = Engine(self.server, self.options, self.meters, asyncio.get_running_loop())
        self.engine.start()
        yield
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End the engine and keep the sessions, once; also where uvicorn was forced to end."""
        if self.engine is None or self.closed:
            return
        self.closed = True
        self.engine.end()
        self.engine.join()
        if self.options.keep_sessions:
            for file in self.kept.glob("*.safetensors"):
                if file.stem not in self.server.sessions:
                    file.unlink()
            for name in self.server.sessions:
                self.server.save_session(name, self.kept / f"{name}.safetensors")

    def drain(self) -> None:
        """Take nothing new; what is left after the grace time is rolled back."""
        self.draining = True
        self.engine.loop.call_later(self.options.grace, self.engine.end)

    def app(self) -> FastAPI:
        app = FastAPI(
            title="TinyMamba", version="1", docs_url=None, redoc_url=None, lifespan=self.lifespan
        )
        router = self.router()
        app.include_router(router)
        app.state.routes = router.routes
        app.add_exception_handler(RequestValidationError, invalid)
        app.add_exception_handler(AnyHTTPException, http_error)
        app.add_exception_handler(UserError, lambda _, e: Refusal.of(e).response())
        app.add_exception_handler(Exception, lambda _, e: Refusal.of(e).response())
        app.add_middleware(Middleware, api=self)
        return app

    def router(self) -> APIRouter:
        router = APIRouter(responses={"4XX": {"model": ErrorOut}, "5XX": {"model": ErrorOut}})
        streamed = {"model": AnswerOut, "content": {"text/event-stream": {}}}

        key = [Depends(HTTPBearer(scheme_name="key", auto_error=False))]
        key = key if self.options.api_key else []

        def add(method: str, path: str, handler, model=None, status: int = 200, **more) -> None:
            ok = more.pop("ok", {"model": model} if model else {})
            router.add_api_route(
                path,
                handler,
                methods=[method],
                status_code=status,
                responses={status: ok},
                response_model=None,
                dependencies=[] if path in OPEN else key,
                **more,
            )

        add("GET", "/", self.page, include_in_schema=False)
        add("GET", "/health", self.health)
        add(
            "GET",
            "/metrics",
            self.metrics,
            ok={"content": {"text/plain": {}}},
            response_class=Response,
        )
        add("GET", "/v1/models", self.models)
        add("GET", "/v1/models/{model:path}", self.model)
        add("POST", "/v1/completions", self.completions, ok=streamed)
        add("POST", "/v1/chat/completions", self.chat, ok=streamed)
        add("GET", "/v1/sessions", self.sessions, SessionsOut)
        add("POST", "/v1/sessions", self.create, SessionOut, 201)
        one = "/v1/sessions/{session_id}"
        add("GET", one, self.session, SessionOut)
        add("DELETE", one, self.delete)
        add("POST", one + "/completions", self.go_on, ok=streamed)
        add("POST", one + "/fork", self.fork, SessionOut, 201)
        add("POST", one + "/save", self.save, SessionOut)
        for name, handler in (
            ("stop", self.stop),
            ("rollback", self.rollback),
            ("reset", self.reset),
        ):
            add("POST", f"{one}/{name}", handler, SessionOut)
        return router


# -------------------------------------------------------------------------------- command line


class HttpServer(uvicorn.Server):
    """uvicorn, which ends the answers that run over time before it waits for them."""

    def __init__(self, api: Api, **config):
        super().__init__(
            uvicorn.Config(
                api.app(),
                log_level="warning",
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=api.options.grace + 5,
                **config,
            )
        )
        self.api = api

    async def shutdown(self, sockets=None) -> None:
        self.api.drain()
        await super().shutdown(sockets)


def parse(argv: list[str] | None):
    parser = CliParser(
        usage="python serve.py --checkpoint FILE [--FLAG VALUE ...]",
        description=__doc__.split("Chat: if")[0],
    )
    flags = [
        ("--checkpoint", str, "tinymamba_model_latest.pt", "checkpoint of testv2.py, or folder"),
        ("--tokenizer", str, None, "tokenizer.json or vocab.txt; else beside the training data"),
        ("--adapter", str, None, "folder of an adapter that peft.py made; it answers by default"),
        ("--device", str, "auto", "auto, cpu, cuda, cuda:1 or mps"),
        ("--dtype", str, "float32", "of the weights: float32, bfloat16 or float16"),
        ("--host", str, "127.0.0.1", "address to listen at; 0.0.0.0 is all of this machine's"),
        ("--port", int, 8000, "port to listen at; 0 takes a free one, and says which"),
    ]
    source = inspect.getsource(Options)
    for name, f in Options.__dataclass_fields__.items():
        text = re.search(f"^    {name}: .*  # (.*)$", source, re.MULTILINE)[1]
        if f.default is False:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            flags.append((f"--{name}", type(f.default), f.default, text))
    for flag, kind, default, text in flags:
        parser.add_argument(
            flag,
            type=kind,
            default=default,
            metavar=kind.__name__.upper(),
            help=text + (f" [{default}]" if default not in (None, "") else ""),
        )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the step of one token: a minute first, faster after",
    )
    args = parser.parse_args(argv)
    require(args.dtype in DTYPES, "--dtype", f"{args.dtype} is unknown", f"use {', '.join(DTYPES)}")
    require(0 <= args.port < 65536, "--port", f"{args.port} is none", "use 0 to 65535")
    for name, f in Options.__dataclass_fields__.items():
        least = 0 if name in ("max_queue", "grace") else 1
        require(
            type(f.default) is not int or getattr(args, name) >= least,
            f"--{name}",
            f"{getattr(args, name)} is not legal",
            f"it must be at least {least}",
        )
    require(
        not args.keep_sessions or args.session_dir,
        "--keep_sessions",
        "has no place for them",
        "pass --session_dir",
    )
    args.api_key = args.api_key or os.environ.get("TINYMAMBA_API_KEY", "")
    args.model_name = args.model_name or File(args.checkpoint).stem
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    options = Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})
    try:
        listener = socket.create_server((args.host, args.port))
    except OSError as e:
        raise UserError(
            "--port",
            f"{args.host}:{args.port} cannot be had ({e.strerror})",
            "use another, or end who has it",
        ) from None
    with listener:
        server = StreamingServer(
            args.checkpoint,
            args.device,
            StreamingConfig(batch_size=options.batch_size),
            args.tokenizer,
            DTYPES[args.dtype],
            args.compile,
            {"adapter": args.adapter} if args.adapter else {},
        )
        api = Api(server, options)
        if not options.api_key and args.host not in ("127.0.0.1", "::1", "localhost"):
            print("there is no --api_key: whoever reaches this machine may use it", file=sys.stderr)
        port = listener.getsockname()[1]
        print(f"serving {options.model_name} at http://{args.host}:{port}", flush=True)
        try:
            HttpServer(api).run(sockets=[listener])
        finally:
            api.close()
    return 0


if __name__ == "__main__":
    run_cli(main)
