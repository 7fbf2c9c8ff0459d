"""OpenAI's Responses API as data: the body of /v1/responses, its answer, the events of a stream.

Text in, text out: instructions and messages become a chat, and the answer is one message. Nothing
is stored, so `previous_response_id` is not supported. What this route does not do (tools, images,
reasoning) takes only values without effect, as in `openai_api.py`.

It needs fastapi: pip install fastapi
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from tinymamba.cli import require
from tinymamba.openai_api import (
    NO_EFFECT,
    UNSUPPORTED,
    Alternatives,
    Body,
    Count,
    Generation,
    Message,
    Off,
    OpenAIBody,
    Part,
)

LOGPROBS = "message.output_text.logprobs"

# ---------------------------------------------------------------------------------- requests


class InputPart(OpenAIBody):
    """A part of a message: written by the client, or by this server before."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Any = Field(default=None, description=NO_EFFECT)
    logprobs: Any = Field(default=None, description=NO_EFFECT)
    prompt_cache_breakpoint: Any = Field(default=None, description=NO_EFFECT)


class InputMessage(OpenAIBody):
    """A message; `id` and `status` are there because clients send answers back."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: Any = Field(default=None, description=NO_EFFECT)
    status: Any = Field(default=None, description=NO_EFFECT)
    phase: Any = Field(default=None, description=NO_EFFECT)

    def as_chat(self) -> Message:
        """The same message as /v1/chat/completions takes it."""
        if isinstance(self.content, str):
            return Message(role=self.role, content=self.content)
        parts = [Part(type="text", text=part.text) for part in self.content]
        return Message(role=self.role, content=parts)


class Reasoning(OpenAIBody):
    """How to reason: not at all, so that there is nothing to summarize."""

    effort: Literal["none"] | None = None
    summary: Any = Field(default=None, description=NO_EFFECT)
    generate_summary: Any = Field(default=None, description=NO_EFFECT)
    context: Any = Field(default=None, description=NO_EFFECT)
    mode: Literal["standard"] | None = None


class TextFormat(Body):
    """The form of the answer; unlike in a chat, the schema is a field of its own."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = Field(default=None, description="the schema is always followed")


class TextConfig(OpenAIBody):
    """What the answer looks like."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseBody(Generation):
    """The body of /v1/responses."""

    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Alternatives | None = None
    include: list[str] | None = Field(
        default=None, description=f"{LOGPROBS}; others name what an answer here never has"
    )
    text: TextConfig | None = None
    response_format: None = Field(default=None, description=UNSUPPORTED)  # `text.format` here
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = Field(default=None, description=UNSUPPORTED)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Any = Field(default=None, description=NO_EFFECT)
    tools: None = Field(default=None, description=UNSUPPORTED)
    background: Off | None = Field(default=None, description=UNSUPPORTED)
    background_options: None = Field(default=None, description=UNSUPPORTED)
    access_programs: None = Field(default=None, description=UNSUPPORTED)
    context_management: None = Field(default=None, description=UNSUPPORTED)
    conversation: None = Field(default=None, description=UNSUPPORTED)
    image: None = Field(default=None, description=UNSUPPORTED)
    previous_response_id: None = Field(default=None, description=UNSUPPORTED)
    prompt: None = Field(default=None, description=UNSUPPORTED)

    def alternatives(self) -> int | None:
        """`top_logprobs`, or none of them if only `include` asks for logprobs."""
        if self.top_logprobs is None and LOGPROBS in (self.include or []):
            return 0
        return self.top_logprobs

    def form(self) -> tuple[dict[str, Any], str] | None:
        """The form of the answer, and the field's name: that of `text`, if it has one."""
        other, field = super().form(), "text.format"
        asked = self.text.format if self.text else None
        schema = asked.json_schema if asked else None
        same = (schema is not None) == bool(asked and asked.type == "json_schema")
        require(same, f"{field}.schema", "belongs to the type json_schema", "send both")
        if not asked or asked.type == "text":
            return other
        require(other is None, field, "cannot be sent with structured_outputs", "send one of them")
        return ({"json": schema}, f"{field}.schema") if schema else ({"json_object": True}, field)

    def messages(self) -> list[Message]:
        """The instructions and the input as a chat."""
        first = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, Message(role="user", content=self.input)]
        return [*first, *(message.as_chat() for message in self.input)]


# --------------------------------------------------------------------------------- responses


class ResponseOut(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class ResponseWriter:
    """Writes one answer, as a whole or as the events of a stream, numbered in their order."""

    def __init__(self, body: ResponseBody, model: str, settings: dict[str, Any]):
        """`settings`: those that the answer is generated with, defaults included."""
        self.body, self.model, self.settings = body, model, settings
        self.id, self.item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created, self.number = int(time.time()), 0

    def response(self, status: str, output: list[dict], usage: dict | None = None) -> dict:
        """The response object."""
        body, settings = self.body, self.settings
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": reason,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata if isinstance(body.metadata, dict) else {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": settings["temperature"],
            "text": {"format": self.format()},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": settings["top_p"],
            "truncation": "disabled",
            "usage": usage and usage_of(usage),
            "user": body.user if isinstance(body.user, str) else None,
        }

    def format(self) -> dict:
        """The form of the answer, as it was asked for."""
        asked = self.body.text.format if self.body.text else None
        return asked.model_dump(by_alias=True, exclude_none=True) if asked else {"type": "text"}

    def part(self, text: str, logprobs: list[dict]) -> dict:
        """The text as a part of the message."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def item(self, status: str, content: list[dict]) -> dict:
        """The message."""
        about = {"id": self.item_id, "type": "message", "role": "assistant"}
        return {**about, "status": status, "content": content}

    def whole(self, text: str, logprobs: list[dict], finish: str, usage: dict) -> dict:
        """The response with the complete answer; `finish` is "stop" or "length"."""
        status = "completed" if finish == "stop" else "incomplete"
        return self.response(status, [self.item(status, [self.part(text, logprobs)])], usage)

    def event(self, kind: str, **fields: Any) -> dict:
        """An event of this kind with the next number."""
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **fields}

    def opening(self) -> Iterator[dict]:
        """The events before the text."""
        for kind in ("response.created", "response.in_progress"):
            yield self.event(kind, response=self.response("in_progress", []))
        item = self.item("in_progress", [])
        yield self.event("response.output_item.added", output_index=0, item=item)
        yield self.in_part("content_part.added", part=self.part("", []))

    def in_part(self, kind: str, **fields: Any) -> dict:
        """An event about the only part of the only message."""
        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        return self.event(f"response.{kind}", **place, **fields)

    def delta(self, text: str, logprobs: list[dict]) -> dict:
        """The event of more text."""
        return self.in_part("output_text.delta", delta=text, logprobs=logprobs)

    def closing(self, text: str, logprobs: list[dict], finish: str, usage: dict) -> Iterator[dict]:
        """The events after the text; the last one has the whole response."""
        response = self.whole(text, logprobs, finish, usage)
        (item,) = response["output"]
        yield self.in_part("output_text.done", text=text, logprobs=logprobs)
        yield self.in_part("content_part.done", part=item["content"][0])
        yield self.event("response.output_item.done", output_index=0, item=item)
        yield self.event(f"response.{response['status']}", response=response)

    def error(self, error: dict) -> dict:
        """The last event of a stream that failed; `error` is in OpenAI's form."""
        return self.event("error", **{n: error[n] for n in ("message", "code", "param")})


def usage_of(usage: dict) -> dict:
    """The usage of a chat as the Responses API names it."""
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
