"""The HTTP API of serve.py as data: request bodies, response bodies, and errors in OpenAI's form.

Request bodies are pydantic models. A field of OpenAI's API that this server does not support is
listed only if it has a value without effect, such as `presence_penalty: 0`; no other value is
accepted. Unknown fields are rejected. Every error has the form

    {"error": {"message": "...", "type": "...", "param": FIELD or null, "code": CODE or null}}

It needs fastapi: pip install fastapi
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from tinymamba.cli import UserError, require

# ---------------------------------------------------------------------------------- requests

PLAIN_NAME = r"^[A-Za-z0-9_-]{1,64}$"
Name = Annotated[str, Field(pattern=PLAIN_NAME)]
SessionId = Annotated[str, Path(pattern=PLAIN_NAME)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1024)]  # the largest limit a float64 can represent
StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=4)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Choices = Annotated[int, Field(ge=1, le=128)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
Zero = Annotated[float, Field(ge=0, le=0)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[BiasKey, Bias], Field(max_length=300)]

NO_EFFECT = "accepted; it has no effect"
UNSUPPORTED = "not supported: only the value without effect is accepted"


class Body(BaseModel):
    """A request body. Unknown fields are rejected: ignoring one could change the result."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    """The schema of an answer, as OpenAI's clients send it."""

    name: Annotated[str, Field(max_length=256)]
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(default=None, description="the schema is always followed")


class ResponseFormat(Body):
    """What an answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """What an answer follows: one of these, as in vLLM."""

    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(default=None, description="in the notation of Lark or GBNF")


class Generation(Body):
    """The fields of every route that generates text; None stands for the default."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Count | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: Any = Field(default=None, description=NO_EFFECT)
    metadata: Any = Field(default=None, description=NO_EFFECT)
    store: Any = Field(default=None, description=NO_EFFECT)
    service_tier: Any = Field(default=None, description=NO_EFFECT)
    safety_identifier: Any = Field(default=None, description=NO_EFFECT)
    prompt_cache_key: Any = Field(default=None, description=NO_EFFECT)
    presence_penalty: Zero | None = Field(default=None, description=UNSUPPORTED)
    frequency_penalty: Zero | None = Field(default=None, description=UNSUPPORTED)

    def form(self) -> tuple[dict[str, Any], str] | None:
        """The form of the answer, as GrammarCompiler.compile takes it, and the field's name."""
        asked, field = self.response_format, "response_format"
        kind = asked.type if asked else "text"
        if self.structured_outputs:
            problem, remedy = "cannot be sent with structured_outputs", "send one of them"
            require(kind == "text", field, problem, remedy)
            return self.structured_outputs.model_dump(by_alias=True), "structured_outputs"
        schema = asked.json_schema if asked else None
        same = (schema is not None) == (kind == "json_schema")
        require(same, f"{field}.json_schema", "belongs to the type json_schema", "send both")
        if schema:
            return {"json": schema.json_schema}, f"{field}.json_schema.schema"
        return ({"json_object": True}, field) if kind == "json_object" else None

    def alternatives(self) -> int | None:
        """How many likely alternatives to report per token; None reports no logprobs."""
        raise NotImplementedError


class CompletionBody(Generation):
    """The body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    n: Choices | None = None
    best_of: Choices | None = Field(default=None, description="the same as n, or left out")
    echo: bool | None = None
    logprobs: Alternatives | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = Field(
        default=None, description=UNSUPPORTED
    )

    def alternatives(self) -> int | None:
        """`logprobs` itself."""
        return self.logprobs


class Part(Body):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a chat. The last five fields may be there because clients send answers back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    n: Choices | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(
        default=None, description=UNSUPPORTED
    )
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None

    def alternatives(self) -> int | None:
        """`top_logprobs`, if `logprobs` is set."""
        return (self.top_logprobs or 0) if self.logprobs else None


class SessionCompletionBody(Generation):
    """The body of /v1/sessions/ID/completions."""

    prompt: str | list[TokenId] = ""
    logprobs: Alternatives | None = None
    gates: bool | None = Field(
        default=None, description="list every token with its gate in each layer"
    )

    def alternatives(self) -> int | None:
        """`logprobs` itself."""
        return self.logprobs


class SessionBody(Body):
    """The id and seed of a new session; both are chosen by the server if left out."""

    id: Name | None = None
    seed: Seed | None = None


class NewSessionBody(SessionBody):
    """The body of POST /v1/sessions."""

    load: Name | None = Field(
        default=None, description="continue the session saved under this name"
    )


class SaveBody(Body):
    """The body of /v1/sessions/ID/save."""

    name: Name
    overwrite: bool | None = Field(default=None, description="replace a saved session of this name")


# --------------------------------------------------------------------------------- responses


class ErrorInfo(BaseModel):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorOut(BaseModel):
    """The body of every error response."""

    error: ErrorInfo


class SessionOut(BaseModel):
    """A session."""

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
    """All sessions."""

    object: Literal["list"]
    data: list[SessionOut]


class Choice(BaseModel):
    """One of the answers to a request; its text is in a field that depends on the route."""

    model_config = ConfigDict(extra="allow")
    index: int
    finish_reason: Literal["stop", "length"]


class PromptDetails(BaseModel):
    """Numbers of tokens of the prompt."""

    cached_tokens: int  # that the prefix cache had


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class AnswerOut(BaseModel):
    """A whole answer."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["text_completion", "chat.completion", "session.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


# ------------------------------------------------------------------------------------- errors

ERROR_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
FIELD_NAMES = {"max_new_tokens": "max_tokens"}
UNSUPPORTED_FIELDS = {
    name
    for body in (CompletionBody, ChatBody)
    for name, field in body.model_fields.items()
    if field.description == UNSUPPORTED
}


class ApiError(HTTPException):
    """An error in OpenAI's form: `param` is the field that is wrong, `code` a short fixed name."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        kind = ERROR_TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """The error as an HTTP response."""
        return json_response(self.body, self.status_code, self.headers)

    @staticmethod
    def of(error: BaseException) -> ApiError:
        """Any exception as an ApiError; only a UserError's text is shown to the client."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, UserError):
            field, problem, remedy = error.args
            param = FIELD_NAMES.get(field, field)
            return ApiError(400, f"{param}: {problem}; {remedy}", param)
        return ApiError(500, "internal error; the server's log has the details")


def json_response(value: Any, status: int = 200, headers: Any = None) -> Response:
    """A response whose body is `value` as JSON."""
    return Response(json.dumps(value), status, headers, "application/json")


def add_error_handlers(app: FastAPI) -> None:
    """Make the app answer every error in OpenAI's form. `app.state.routes` must be its routes."""
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(StarletteHTTPException, http_error)
    app.add_exception_handler(UserError, other_error)
    app.add_exception_handler(Exception, other_error)


def validation_error(request: Request, error: Any) -> Response:
    """Report the first error of an invalid body or path, with the field's name."""
    errors = error.errors()  # of a union, one per branch; those about types say the least
    first = next((e for e in errors if not e["type"].endswith("_type")), errors[0])
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON").response()
    sent = error.body if first["loc"][0] == "body" else {first["loc"][-1]: None}
    path = field_path(first, sent)
    param = ".".join(map(str, path)) or None
    message: str = first["msg"]
    code: str | None = None
    if first["type"] == "extra_forbidden" or (path and path[0] in UNSUPPORTED_FIELDS):
        message, code = "is not supported by this server; leave it out", "unsupported_parameter"
    return ApiError(400, f"{param}: {message}" if param else message, param, code).response()


def field_path(error: dict, sent: Any) -> list[str | int]:
    """The keys that lead to the invalid field; pydantic's own path names union branches, too."""
    path: list[str | int] = []
    here = sent
    for key in error["loc"][1:]:
        indices = range(len(here)) if isinstance(here, list) else ()
        if key in (here if isinstance(here, dict) else indices):
            path.append(key)
            here = here[key]
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    while path and isinstance(path[-1], int):
        path.pop()
    return path[:1] if path[:1] == ["logit_bias"] else path


def http_error(request: Request, error: Any) -> Response:
    """Report an error that Starlette or a route raised."""
    if isinstance(error, ApiError):
        return error.response()
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    headers: dict[str, str] = {}
    if error.status_code == 405:  # Starlette lists the methods of the first route only
        path, routes = request.url.path, request.app.state.routes
        allowed = {m for r in routes if r.path_regex.match(path) for m in r.methods}
        headers["Allow"] = ", ".join(sorted(allowed))
    return ApiError(error.status_code, str(error.detail), None, code, headers).response()


def other_error(request: Request, error: Exception) -> Response:
    """Report any other exception."""
    return ApiError.of(error).response()
