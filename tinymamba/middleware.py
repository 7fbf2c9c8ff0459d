"""What serve.py checks of a request before its body is parsed: key, origin, type, size and time.

It needs fastapi: pip install fastapi
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
from collections.abc import Callable
from typing import Any

from tinymamba.openai_api import ApiError

PUBLIC_PATHS = ("/", "/health", "/ready")  # need no key: the page has no data, and its calls do
GENERATING = ("/completions", "/responses", "/embeddings")  # how their paths end
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def clean(scope: Any) -> None:
    """Drop slashes that a base URL left over, and read a body of no type as JSON."""
    scope["path"] = "/" + "/".join(filter(None, scope["path"].split("/")))
    if not any(name == b"content-type" for name, _ in scope["headers"]):
        scope["headers"] = [*scope["headers"], (b"content-type", b"application/json")]


def is_ip(host: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


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
        started = False

        async def counted_send(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                route = getattr(scope.get("route"), "path", "none")
                self.api.metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        try:
            self.check(scope["path"], headers)
            self.check_body(scope["path"], scope["method"], headers)
        except ApiError as error:
            await error.response()(scope, receive, counted_send)
            return
        try:
            await self.app(scope, self.limit_body(receive), counted_send)
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

    def check_body(self, path: str, method: str, headers: dict[bytes, bytes]) -> None:
        """Check the type and the size of the body, and the room in the queue."""
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        size = headers.get(b"content-length", b"0")
        has_body = size != b"0" or b"transfer-encoding" in headers
        if has_body and kind and not re.fullmatch(r"application/(.*\+)?json", kind):
            problem = f"the body is {kind}; send Content-Type: application/json"
            raise ApiError(415, problem, None, "unsupported_media_type")
        if size.isdigit() and int(size) > self.api.options.max_body:
            raise self.too_large()
        if method == "POST" and path.endswith(GENERATING):
            self.api.require_room(1)

    def too_large(self) -> ApiError:
        """The error of a body over the limit."""
        problem = f"the body is larger than {self.api.options.max_body} bytes"
        return ApiError(413, problem, None, "body_too_large", {"Connection": "close"})

    def limit_body(self, receive: Callable) -> Callable:
        """`receive`, with an error if the body is too large or too slow."""
        size, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.api.options.body_timeout

        async def limited_receive() -> dict:
            nonlocal size, complete
            if complete:  # only a disconnect can follow, and it has no deadline
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                problem, headers = "the body did not arrive in time", {"Connection": "close"}
                raise ApiError(408, problem, None, "timeout", headers) from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.api.options.max_body:
                raise self.too_large()
            return message

        return limited_receive
