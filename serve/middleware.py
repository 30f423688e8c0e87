"""ASGI middleware before all routes: request ids, API keys, size limits, timeouts, metrics and one log line per request.

It is at the ASGI level, so that it also applies to the page, and to request bodies before they are parsed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from starlette._utils import get_route_path

from serve.api_keys import ApiKeys
from serve.config import Limits
from serve.http_errors import HttpError, internal_error, overloaded_error
from serve.metrics import Metrics
from vilseg.errors import ConfigError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

log = logging.getLogger("ray.serve")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}
_FETCHES = re.compile(r"/gradio_api/(proxy=|.*https?:/)", re.IGNORECASE | re.DOTALL)
"""Routes of Gradio that would make the server fetch a URL from the request."""
_FORM_MARGIN = 64 << 10
"""Maximum bytes of a form in addition to its files: names, class lists, boundaries."""
_POLICY_VIOLATION = 1008
"""Close code of a WebSocket for a policy violation (RFC 6455, section 7.4.1)."""


class RequestMiddleware:
    """Middleware that assigns request ids, enforces keys, size and time limits, records metrics and logs, and reports errors.

    Args:
        app: Application that handles the admitted requests.
        keys: API keys; if None, requests from other machines are refused.
        limits: Limits on body size and response time.
        metrics: Metrics to update.
        is_overloaded: Function that returns True if the replicas would currently refuse an image.
        origins: Origins of other web pages that may send requests if there are no keys.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: ApiKeys | None,
        limits: Limits,
        metrics: Metrics,
        is_overloaded: Callable[[], bool],
        origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._is_overloaded = is_overloaded
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            await self._handle_http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._handle_websocket(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:
            raise ValueError(f"connections of the type '{scope['type']}' are not served")

    async def _handle_websocket(self, scope: Scope, receive: Any, send: Any) -> None:
        """Close a WebSocket connection without a valid key. API and page use no WebSockets, so no path is exempt."""
        try:
            self._check_local(scope)
            await self._refresh_keys()
            if self._keys is not None:
                scope["vilseg.holder"] = self._authenticate(scope)
        except HttpError as error:
            await receive()  # websocket.connect
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": error.code})
            self._metrics.rejected.labels(error.code).inc()
        else:
            await self._app(scope, receive, send)

    async def _handle_http(self, scope: Scope, receive: Any, send: Any) -> None:
        path = get_route_path(scope)  # path without the prefix under which the application is mounted
        request = _Exchange(scope, receive, send, path, self._body_limit(path))
        try:
            if _FETCHES.match(path):
                raise HttpError(403, "not_fetched", "Nothing is fetched from addresses that callers send.")
            self._check_local(scope)
            await self._refresh_keys()
            scope["vilseg.holder"] = self._holder(scope, path)
            request.check_length()
            if scope["method"] == "POST" and path.startswith("/v1/segment") and self._is_overloaded():
                raise overloaded_error()
            await self._serve(request)
            request.check_length()
        except HttpError as error:
            await request.refuse(error)
            self._metrics.rejected.labels(error.code).inc()
        except Exception:
            log.exception("request %s failed", request.id)
            await request.refuse(internal_error())
        finally:
            self._record(request)

    async def _serve(self, request: _Exchange) -> None:
        served = self._app(request.scope, request.receive, request.send)
        if not request.path.startswith("/v1/") or request.path.startswith("/v1/videos"):
            await served  # no limit: a stream of the page lasts while it is open, an upload as long as it takes
            return
        try:
            await asyncio.wait_for(served, self._limits.seconds)
        except TimeoutError:
            sentence = (
                f"There was no answer within {self._limits.seconds:g} s; try again later or send a smaller image."
            )
            raise HttpError(503, "timeout", sentence, retry_after=5) from None

    def _check_local(self, scope: Scope) -> None:
        """Refuse requests from other machines if the server has no keys.

        Besides the client's address, the Host header must be a loopback name and the Origin header a loopback name or allowed,
        because a malicious web page can reach this machine by a host name that resolves to it (DNS rebinding).

        Raises:
            HttpError: The request is refused.
        """
        if self._keys is not None:
            return
        client = (scope.get("client") or ("", 0))[0]
        host = _header(scope, b"host")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        origin = _header(scope, b"origin")
        at_home = not origin or origin in self._origins or origin.split("://")[-1].rsplit(":", 1)[0] in _LOOPBACK_NAMES
        if not is_loopback(client) or name not in _LOOPBACK_NAMES or not at_home:
            raise HttpError(
                403,
                "this_machine_only",
                "This server has no API keys, so it answers requests from its own machine only.",
            )

    async def _refresh_keys(self) -> None:
        if self._keys is not None and self._keys.is_stale():
            try:
                await asyncio.to_thread(self._keys.refresh)
            except ConfigError as error:
                log.warning("%s", error)

    def _holder(self, scope: Scope, path: str) -> str | None:
        """Return the name of the key's holder; None if the route needs no key.

        Raises:
            HttpError: The route needs a key, and the request has none or an invalid one.
        """
        if self._keys is None or not (path.startswith("/v1/") or path == "/metrics"):
            return None  # the page has its own login
        if scope["method"] == "OPTIONS" and _header(scope, b"origin"):
            return None  # a CORS preflight request has no key
        return self._authenticate(scope)

    def _authenticate(self, scope: Scope) -> str:
        """Return the name of the key's holder.

        Raises:
            HttpError: The request has no key or an invalid one.
        """
        assert self._keys is not None
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        holder = self._keys.holder(key.strip()) if scheme.lower() == "bearer" else None
        if holder is None:
            raise HttpError(401, "unauthorized", "Send an API key that is valid here, as 'Authorization: Bearer KEY'.")
        return holder

    def _body_limit(self, path: str) -> int:
        is_video = path.startswith(("/v1/videos", "/gradio_api/upload"))
        return (self._limits.video_bytes if is_video else self._limits.body_bytes) + _FORM_MARGIN

    def _record(self, request: _Exchange) -> None:
        route = getattr(request.scope.get("route"), "path", None)
        if route is None or not route.startswith(("/v1/", "/metrics", "/healthz")):
            route = "page" if request.status < 400 else "other"
        seconds = time.perf_counter() - request.begun
        self._metrics.requests.labels(route, str(request.status)).inc()
        self._metrics.latency.labels(route).observe(seconds)
        if request.path.startswith("/v1/"):
            log.info(
                "request %s %s %s -> %d in %.0f ms, key %s",
                *(request.id, request.scope["method"], route, request.status, 1000 * seconds),
                request.scope.get("vilseg.holder") or "-",
            )


class _Exchange:
    """One HTTP request and its response."""

    def __init__(self, scope: Scope, receive: Any, send: Any, path: str, limit: int) -> None:
        given = _header(scope, b"x-request-id")
        self.id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.scope, self.path = scope, path
        self.begun = time.perf_counter()
        self.status = 499  # recorded if the client disconnects before the response
        self._receive, self._send = receive, send
        self._limit, self._received = limit, 0
        self._answered = self._refused = False
        scope["vilseg.request_id"] = self.id

    async def receive(self) -> Message:
        """Return the next ASGI message of the request; raise HttpError if the body exceeds the limit."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self.check_length()
        return message

    def check_length(self) -> None:
        """Raise HttpError if the body received so far, or the Content-Length of the request, exceeds the limit."""
        stated = _header(self.scope, b"content-length")
        if self._received > self._limit or (stated.isdigit() and int(stated) > self._limit):
            raise HttpError(
                413, "body_too_large", f"The request has more than {self._limit:,} bytes, the most that is taken."
            )

    async def send(self, message: Message) -> None:
        """Send an ASGI message of the response, with the request id as a header."""
        if self._received > self._limit and not self._refused:
            return  # drop the form parser's response to the truncated body, because `refuse` sends a 413
        if message["type"] == "http.response.start":
            self.status, self._answered = message["status"], True
            headers = [pair for pair in message.get("headers", []) if pair[0].lower() != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", self.id.encode())]}
        await self._send(message)

    async def refuse(self, error: HttpError) -> None:
        """Send an error response, unless a response has already started."""
        if self._answered:
            return
        self._refused = True
        body = error.body(self.id)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if error.retry_after is not None:
            headers.append((b"retry-after", str(error.retry_after).encode()))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), "")


def is_loopback(address: str) -> bool:
    """Return True if ``address`` is a loopback IP address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
