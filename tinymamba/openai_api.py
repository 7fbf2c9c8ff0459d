"""The HTTP API of serve.py as data: request bodies, response bodies, and errors in OpenAI's form.

Request bodies are pydantic models that list every field of OpenAI's schema. Null or empty stands
for a field that is left out. A field that this server does not support takes only values without
effect, such as `verbosity: "medium"`. Unknown fields are reported by `unknown_fields`. Every error
has the form

    {"error": {"message": "...", "type": "...", "param": FIELD or null, "code": CODE or null}}

It needs fastapi: pip install fastapi
"""

from __future__ import annotations

import base64
import functools
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from fastapi import FastAPI, Header, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException as StarletteHTTPException

from tinymamba.cli import UserError, require

# ---------------------------------------------------------------------------------- requests

JSON, BINARY = "application/json", "application/octet-stream"  # types of bodies
PLAIN_NAME = r"^[A-Za-z0-9_-]{1,64}$"
Name = Annotated[str, Field(pattern=PLAIN_NAME)]
SessionId = Annotated[str, Path(pattern=PLAIN_NAME)]
NewId = Annotated[str | None, Query(alias="id", pattern=PLAIN_NAME)]
TurnKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=255,
        description="a turn that is sent again with its key is answered again, and not doubled",
    ),
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Seed = Annotated[int, Field(ge=-1, le=2**63 - 1024)]  # the largest limit a float64 can represent
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
CountOrOff = Annotated[int, Field(ge=-1)]
Choices = Annotated[int, Field(ge=1, le=128)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[BiasKey, Bias], Field(max_length=300)]

NO_EFFECT = "accepted; it has no effect"
GATES = "list every token with its gate, and with the norms of the state's heads, in each layer"
UNSUPPORTED = "not supported: only the value without effect is accepted"
EMPTY: tuple = (None, "", [], {})  # what stands for a field that is left out


def reject_on(value: bool) -> bool:
    """Reject a switch that is on; Literal[False] would take 0, too."""
    if value:
        raise PydanticCustomError("unsupported", "is not supported")
    return value


Off = Annotated[bool, AfterValidator(reject_on), Field(json_schema_extra={"const": False})]


class Body(BaseModel):
    """A request body. Unknown fields are rejected: ignoring one could change the result."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def describe_empty(schema: dict) -> None:
    """Add the values in EMPTY to the optional fields of a JSON schema."""
    for name, field in schema["properties"].items():
        if name in schema.get("required", ()) or not {"anyOf", "type"} & field.keys():
            continue
        if "type" in field:
            field["anyOf"] = [{"type": field.pop("type")}]
        field["anyOf"].append({"enum": [*EMPTY]})


class OpenAIBody(Body):
    """A body, or a part of one, as in OpenAI's API: empty values and unknown fields are accepted.

    An optional field whose value is in EMPTY counts as left out, unless KEPT names it. As in JSON
    Schema, 16.0 is a whole number, too.
    """

    KEPT: ClassVar[tuple[str, ...]] = ()
    model_config = ConfigDict(extra="ignore", json_schema_extra=describe_empty)
    _unknown: list[str] = []

    @model_validator(mode="wrap")
    @classmethod
    def normalize(cls, sent: Any, validate: Callable) -> Any:
        """The body without the fields that count as left out, with a list of unknown ones."""
        if not isinstance(sent, dict):
            return validate(sent)
        fields = cls.model_fields
        optional = {n for n in {*fields} - {*cls.KEPT} if not fields[n].is_required()}
        given = {n: value for n, value in sent.items() if n not in optional or value not in EMPTY}
        whole = {n: int(v) for n, v in given.items() if isinstance(v, float) and v.is_integer()}
        body = validate({**given, **whole})
        body._unknown = [name for name in sent if name not in fields]
        return body


def unknown_fields(body: Any, path: str = "") -> list[str]:
    """The paths of all fields in a body that its model does not list, such as messages.0.x."""
    found = [path + name for name in getattr(body, "_unknown", ())]
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, Body):
            found += unknown_fields(value, f"{path}{name}.")
        elif isinstance(value, list):
            parts = [(i, part) for i, part in enumerate(value) if isinstance(part, Body)]
            found += [x for i, part in parts for x in unknown_fields(part, f"{path}{name}.{i}.")]
    return found


def describe_strict(schemas: dict[str, dict], cls: type[Body] = OpenAIBody) -> None:
    """Say in the schemas of a document that bodies have no unknown fields."""
    if cls.__name__ in schemas:
        schemas[cls.__name__]["additionalProperties"] = False
    for sub in cls.__subclasses__():
        describe_strict(schemas, sub)


class StreamOptions(OpenAIBody):
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


class Generation(OpenAIBody):
    """The fields of every route that generates text; None stands for the default."""

    KEPT: ClassVar = ("structured_outputs",)  # an empty one is a mistake
    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: CountOrOff | None = Field(default=None, description="0 and -1 mean all")
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = Field(default=None, description="-1 means a random one")
    stop: StopString | list[StopString] | None = None
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
    prompt_cache_options: Any = Field(default=None, description=NO_EFFECT)
    prompt_cache_retention: Any = Field(default=None, description=NO_EFFECT)
    moderation: None = Field(default=None, description=UNSUPPORTED)
    extra_body: None = Field(default=None, description=UNSUPPORTED)

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
    suffix: None = Field(default=None, description=UNSUPPORTED)
    gates: None = Field(default=None, description=UNSUPPORTED)

    def alternatives(self) -> int | None:
        """`logprobs` itself."""
        return self.logprobs


class Part(OpenAIBody):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = Field(default=None, description=NO_EFFECT)


class Message(OpenAIBody):
    """A message of a chat, as clients write it and as they send an answer back."""

    KEPT: ClassVar = ("content",)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = Field(default=None, description=UNSUPPORTED)
    function_call: None = Field(default=None, description=UNSUPPORTED)

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: arguments of tool calls are values."""
        known: dict[str, Any] = {"role": self.role, "content": self.text()}
        for name in ("name", "tool_call_id"):
            if value := getattr(self, name):
                known[name] = value
        if self.tool_calls:
            known["tool_calls"] = [parse_arguments(call) for call in self.tool_calls]
        return known


def parse_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are a value instead of JSON, if they are valid JSON or empty."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class ChatBody(Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    n: Choices | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: list[dict[str, Any]] | None = Field(
        default=None, description="functions that the answer may call; see tinymamba/tool_calls.py"
    )
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: None = Field(default=None, description=UNSUPPORTED)
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = Field(default=None, description=UNSUPPORTED)
    prediction: Any = Field(default=None, description=NO_EFFECT)
    reasoning_effort: Literal["none"] | None = Field(default=None, description=UNSUPPORTED)
    verbosity: Literal["medium"] | None = Field(default=None, description=UNSUPPORTED)
    web_search_options: None = Field(default=None, description=UNSUPPORTED)
    gates: bool | None = Field(default=None, description=GATES)

    def alternatives(self) -> int | None:
        """`top_logprobs`, if `logprobs` is set."""
        return (self.top_logprobs or 0) if self.logprobs else None


class SessionCompletionBody(Generation):
    """The body of /v1/sessions/ID/completions."""

    prompt: str | list[TokenId] = ""
    logprobs: Alternatives | None = None
    gates: bool | None = Field(default=None, description=GATES)

    def alternatives(self) -> int | None:
        """`logprobs` itself."""
        return self.logprobs


class EmbeddingBody(OpenAIBody):
    """The body of /v1/embeddings."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    )
    model: str | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="the number of dimensions that the model has, or left out"
    )
    encoding_format: Literal["float", "base64"] | None = None
    user: Any = Field(default=None, description=NO_EFFECT)
    extra_body: None = Field(default=None, description=UNSUPPORTED)


class TokenizeBody(OpenAIBody):
    """The body of /tokenize, as in vLLM: it has a prompt or messages."""

    KEPT: ClassVar = ("prompt",)
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="no effect: none are added to a prompt"
    )
    continue_final_message: Off | None = Field(default=None, description=UNSUPPORTED)
    chat_template: None = Field(default=None, description=UNSUPPORTED)
    chat_template_kwargs: None = Field(default=None, description=UNSUPPORTED)
    mm_processor_kwargs: None = Field(default=None, description=UNSUPPORTED)
    tools: list[dict[str, Any]] | None = None


class DetokenizeBody(OpenAIBody):
    """The body of /detokenize, as in vLLM."""

    tokens: list[TokenId]
    model: str | None = None


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
    undo: int  # turns that can be undone


class SessionsOut(BaseModel):
    """All sessions."""

    object: Literal["list"]
    data: list[SessionOut]


class Choice(BaseModel):
    """One of the answers to a request; its text is in a field that depends on the route."""

    model_config = ConfigDict(extra="allow")
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]


class PromptDetails(BaseModel):
    """Numbers of tokens of the prompt."""

    cached_tokens: int  # that the prefix cache had


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class EmbeddingsOut(BaseModel):
    """The embeddings of all inputs; one is a list of floats, or float32 in base64."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]


class TokensOut(BaseModel):
    """The ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TextOut(BaseModel):
    """The text of token ids."""

    prompt: str


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
NOT_SUPPORTED = "is not supported by this server; leave it out"


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

    def as_user_error(self, where: str, remedy: str) -> UserError:
        """The error of a command; `remedy` is what to do if it does not say that itself."""
        problem, _, own = self.detail.removeprefix("messages: ").partition("; ")
        return UserError(where, problem, own or remedy)


def embedding_out(index: int, vector: np.ndarray, encoding: str | None) -> dict[str, Any]:
    """An embedding, float32 (d,), as OpenAI writes it: a list, or its little-endian bytes."""
    data: Any = vector.tolist()
    if encoding == "base64":
        data = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return {"object": "embedding", "index": index, "embedding": data}


def not_supported(field: str) -> ApiError:
    """The error of a field that this server does not support."""
    return ApiError(400, f"{field}: {NOT_SUPPORTED}", field, "unsupported_parameter")


def field_list(fields: list[str], limit: int = 1000) -> str:
    """The names of fields in a header: ASCII, and cut to about `limit` characters."""
    text = ", ".join(
        name if name.isascii() and name.isprintable() else ascii(name) for name in fields
    )
    return text if len(text) <= limit else text[:limit] + "..."


def report_unknown(handler: Callable, strict: bool) -> Callable:
    """The handler of a route; unknown fields of its body are listed in a header, or refused."""

    @functools.wraps(handler)
    async def checked(**arguments: Any) -> Response:
        body = arguments.get("body")
        unknown = unknown_fields(body) if body else []
        if unknown and strict:
            raise not_supported(unknown[0])
        response = await handler(**arguments)
        if unknown:
            response.headers["X-Ignored-Fields"] = field_list(unknown)
        return response

    # FastAPI would look up the names of types in this module instead of the handler's.
    checked.__signature__ = inspect.signature(handler, eval_str=True)  # type: ignore[attr-defined]
    return checked


def shutting_down() -> ApiError:
    """The error of a request that the server can no longer serve."""
    problem, headers = "the server is shutting down", {"Retry-After": "5"}
    return ApiError(503, problem, None, "shutting_down", headers)


def json_response(value: Any, status: int = 200, headers: Any = None) -> Response:
    """A response whose body is `value` as JSON."""
    return Response(json.dumps(value), status, headers, JSON)


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
    if first["type"] in ("extra_forbidden", "none_required", "unsupported"):
        message, code = NOT_SUPPORTED, "unsupported_parameter"
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
        found = [r for r in routes if r.path_regex.match(path)]
        # In OpenAPI, a path that a route spells out is not one of those with parameters.
        found = [r for r in found if r.path == path] or found
        allowed = {m for r in found for m in r.methods}
        headers["Allow"] = ", ".join(sorted(allowed))
    return ApiError(error.status_code, str(error.detail), None, code, headers).response()


def other_error(request: Request, error: Exception) -> Response:
    """Report any other exception."""
    return ApiError.of(error).response()
