"""What serve.py checks of a request before its body is parsed: key, origin, type, size and time.

It needs fastapi: pip install fastapi
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Callable
from typing import Any

from tinymamba.openai_api import BINARY, JSON, ApiError

PUBLIC_PATHS = ("/", "/health", "/ready")  # need no key: the page has no data, and its calls do
GENERATING = ("/completions", "/responses", "/embeddings")  # how their paths end
SESSION_FILES = "/v1/sessions/file"  # takes the bytes of a file; all other paths take JSON
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def clean(scope: Any) -> None:
    """Drop slashes that a base URL left over, and read a body of no type as what the path takes."""
    scope["path"] = "/" + "/".join(filter(None, scope["path"].split("/")))
    if not any(name == b"content-type" for name, _ in scope["headers"]):
        kind = BINARY if scope["path"] == SESSION_FILES else JSON
        scope["headers"] = [*scope["headers"], (b"content-type", kind.encode())]


def is_ip(host: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


class LimitedBody:
    """What receives the body of a request: with an error if it is too large or too slow."""

    def __init__(self, receive: Callable, most: int, seconds: float):
        """`most`: bytes."""
        self.receive, self.most = receive, most
        self.deadline = asyncio.get_running_loop().time() + seconds
        self.size, self.complete, self.refused = 0, False, False

    async def __call__(self) -> dict:
        """The next message."""
        if self.complete:  # only a disconnect can follow, and it has no deadline
            return await self.receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive()
        except TimeoutError:
            problem, headers = "the body did not arrive in time", {"Connection": "close"}
            raise ApiError(408, problem, None, "timeout", headers) from None
        self.size += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        self.check(self.size)
        return message

    def check(self, size: int) -> None:
        """Reject a body of more bytes than the limit."""
        if size > self.most:
            self.refused = True
            problem, headers = f"the body is larger than {self.most} bytes", {"Connection": "close"}
            raise ApiError(413, problem, None, "body_too_large", headers)

    def is_coming(self, headers: dict[bytes, bytes]) -> bool:
        """Whether it was refused before its end; who waits for a 100 Continue sends nothing."""
        waits = self.size == 0 and b"expect" in headers
        return self.refused and not (self.complete or waits)

    async def discard(self) -> None:
        """Read the rest of the body until the deadline, and drop it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self.deadline):
                while (await self.receive()).get("more_body", False):
                    pass


class Middleware:
    """Checks a request before its body is parsed, and counts its response."""

    def __init__(self, app: Any, api: Any):
        self.app, self.api = app, api

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on if it is acceptable."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        clean(scope)
        started, path, headers = False, scope["path"], dict(scope["headers"])
        most = self.api.max_file if path == SESSION_FILES else self.api.options.max_body
        body = LimitedBody(receive, most, self.api.options.body_timeout)

        async def counted_send(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                route = getattr(scope.get("route"), "path", "none")
                self.api.metrics.requests.labels(route, message["status"]).inc()
            elif body.is_coming(headers):
                # Who is still sending would lose the answer if the connection were closed now.
                await send({**message, "more_body": True})
                await body.discard()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            self.check(path, headers)
            self.check_body(path, scope["method"], headers, body)
        except ApiError as error:
            await error.response()(scope, receive, counted_send)
            return
        try:
            await self.app(scope, body, counted_send)
        except Exception as error:
            if started:
                raise
            # Left to Starlette, the server would close the connection without a word.
            logging.getLogger("serve").error("a request failed", exc_info=error)
            await ApiError.of(error).response()(scope, receive, counted_send)

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Check the API key and the origin."""
        expected = self.api.options.api_key.encode()
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        known = scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), expected)
        if expected and path not in PUBLIC_PATHS and not known:
            problem = "the API key is missing or wrong; send Authorization: Bearer KEY"
            raise ApiError(401, problem, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        origin, host = (headers.get(n, b"").decode("latin-1") for n in (b"origin", b"host"))
        # A browser sends no origin to read from where the page comes from.
        site = origin or (f"http://{host}" if host and path not in PUBLIC_PATHS else "")
        if site and not self.may_call(site, host):
            problem = f"pages of {origin} may not call this server; start it with --allow_origin"
            if site.partition("//")[2] == host:
                problem = f"this server is not known as {host}; start it with --allow_host"
            raise ApiError(403, problem, None, "origin")

    def may_call(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may call the server, to which it says `host`.

        It may if the server sent it. The name of a server that listens on this machine only, and
        has no key, must be known: another site's name may be made to lead here (DNS rebinding).
        """
        options, address = self.api.options, origin.partition("//")[2]
        name = address.rpartition(":")[0] if re.search(r":\d+$", address) else address
        if {"*", origin} & {*options.origins} or name in options.hosts:
            return True
        public = options.api_key or options.host not in LOOPBACK
        return address == host and bool(public or name in LOOPBACK or is_ip(name))

    def check_body(
        self, path: str, method: str, headers: dict[bytes, bytes], body: LimitedBody
    ) -> None:
        """Check the type and the size of the body, and the room in the queue."""
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        size = headers.get(b"content-length", b"0")
        has_body = size != b"0" or b"transfer-encoding" in headers
        takes_file = path == SESSION_FILES
        pattern = re.escape(BINARY) if takes_file else r"application/(.*\+)?json"
        if has_body and kind and not re.fullmatch(pattern, kind):
            problem = f"the body is {kind}; send Content-Type: {BINARY if takes_file else JSON}"
            raise ApiError(415, problem, None, "unsupported_media_type")
        if size.isdigit():
            body.check(int(size))
        if method == "POST" and path.endswith(GENERATING):
            self.api.require_room(1)
