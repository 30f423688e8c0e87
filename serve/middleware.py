"""What every request passes before any route sees it: who asks, how much comes, how long it may take.

An ASGI middleware, so that it also holds for the page and sees a body before it is parsed.
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
"""Routes of Gradio that fetch the address they are given."""
_FORM_MARGIN = 64 << 10
"""Bytes of a form beside its pictures: names, class lists, boundaries."""


class RequestMiddleware:
    """Gives requests an id, checks keys and sizes, bounds the time, counts, logs one line, and turns refusals into answers.

    Args:
        app: what is guarded.
        keys: None answers this machine alone.
        limits: of bodies and time.
        metrics: to count in.
        is_full: whether pictures would be refused at the moment.
        origins: web pages of other origins that may call.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: ApiKeys | None,
        limits: Limits,
        metrics: Metrics,
        is_full: Callable[[], bool],
        origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._is_full = is_full
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = get_route_path(scope)  # below whatever prefix the application has
        request = _Exchange(scope, receive, send, path, self._body_limit(path))
        try:
            if _FETCHES.match(path):
                raise HttpError(403, "not_fetched", "Nothing is fetched from addresses that callers send.")
            self._admit(scope)
            await self._keys_fresh()
            scope["vilseg.holder"] = self._holder(scope, path)
            request.check_length()
            if scope["method"] == "POST" and path.startswith("/v1/segment") and self._is_full():
                raise overloaded_error()
            await self._serve(request)
            request.check_length()
        except HttpError as refusal:
            await request.refuse(refusal)
            self._metrics.rejected.labels(refusal.code).inc()
        except Exception:
            log.exception("request %s failed", request.id)
            await request.refuse(internal_error())
        finally:
            self._note(request)

    async def _serve(self, request: _Exchange) -> None:
        served = self._app(request.scope, request.receive, request.send)
        if not request.path.startswith("/v1/") or request.path.startswith("/v1/videos"):
            await served  # the page's streams last as long as it is open, films as long as the line needs
            return
        try:
            await asyncio.wait_for(served, self._limits.seconds)
        except TimeoutError:
            sentence = (
                f"There was no answer within {self._limits.seconds:g} s; try again later or send a smaller picture."
            )
            raise HttpError(503, "timeout", sentence, retry_after=5) from None

    def _admit(self, scope: Scope) -> None:
        """Without keys: this machine, under its own name, so that no web page gets in by a name that leads here."""
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

    async def _keys_fresh(self) -> None:
        if self._keys is not None and self._keys.is_stale():
            try:
                await asyncio.to_thread(self._keys.refresh)
            except ConfigError as error:
                log.warning("%s", error)

    def _holder(self, scope: Scope, path: str) -> str | None:
        """Whose key came with the request.

        Raises:
            HttpError: the route wants a key and there is none, or a wrong one.
        """
        if self._keys is None or not (path.startswith("/v1/") or path == "/metrics"):
            return None  # the page asks for a key itself
        if scope["method"] == "OPTIONS" and _header(scope, b"origin"):
            return None  # a browser asks whether a page of another origin may call; it sends no key then
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        holder = self._keys.holder(key.strip()) if scheme.lower() == "bearer" else None
        if holder is None:
            raise HttpError(401, "unauthorized", "Send an API key that is valid here, as 'Authorization: Bearer KEY'.")
        return holder

    def _body_limit(self, path: str) -> int:
        films = path.startswith(("/v1/videos", "/gradio_api/upload"))
        return (self._limits.video_bytes if films else self._limits.body_bytes) + _FORM_MARGIN

    def _note(self, request: _Exchange) -> None:
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
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Any, send: Any, path: str, limit: int) -> None:
        given = _header(scope, b"x-request-id")
        self.id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.scope, self.path = scope, path
        self.begun = time.perf_counter()
        self.status = 499  # the client went away before there was an answer
        self._receive, self._send = receive, send
        self._limit, self._received = limit, 0
        self._answered = self._refused = False
        scope["vilseg.request_id"] = self.id

    async def receive(self) -> Message:
        """The next part of the body, as long as the whole is within the limit."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self.check_length()
        return message

    def check_length(self) -> None:
        """Refuse a body that is, or says that it is, over the limit."""
        stated = _header(self.scope, b"content-length")
        if self._received > self._limit or (stated.isdigit() and int(stated) > self._limit):
            raise HttpError(
                413, "body_too_large", f"The request has more than {self._limit:,} bytes, the most that is taken."
            )

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on, with the request's id."""
        if self._received > self._limit and not self._refused:
            return  # whoever read the body takes the refusal for a broken form, and says so
        if message["type"] == "http.response.start":
            self.status, self._answered = message["status"], True
            headers = [pair for pair in message.get("headers", []) if pair[0].lower() != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", self.id.encode())]}
        await self._send(message)

    async def refuse(self, refusal: HttpError) -> None:
        """SegmentResponse with a refusal, unless an answer has begun."""
        if self._answered:
            return
        self._refused = True
        body = refusal.body(self.id)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refusal.retry_after is not None:
            headers.append((b"retry-after", str(refusal.retry_after).encode()))
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), "")


def is_loopback(address: str) -> bool:
    """Whether an IP address is this machine's own."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
