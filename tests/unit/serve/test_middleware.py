"""Connections other than HTTP requests, which need a key as well."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from serve.api_keys import ApiKeys, add_key
from serve.config import Limits
from serve.metrics import Metrics
from serve.middleware import RequestMiddleware


def connect(keys: ApiKeys | None, address: str = "127.0.0.1", scope_type: str = "websocket", **headers: str) -> Any:
    """Messages that the client gets; None if the connection reached the application."""
    reached: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    middleware = RequestMiddleware(
        app, keys=keys, limits=Limits(), metrics=Metrics(), is_overloaded=lambda: False, origins=()
    )
    pairs = [(name.encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()]
    scope = {"type": scope_type, "path": "/any", "client": (address, 1), "headers": pairs}
    asyncio.run(middleware(scope, receive, send))
    return None if reached else sent


def test_a_websocket_without_a_key_is_closed(tmp_path: Path) -> None:
    key = add_key(str(tmp_path / "keys.txt"), "anna")
    keys = ApiKeys(str(tmp_path / "keys.txt"))
    for headers in ({}, {"authorization": f"Bearer {key}x"}):
        assert connect(keys, **headers) == [{"type": "websocket.close", "code": 1008, "reason": "unauthorized"}]
    assert connect(keys, authorization=f"Bearer {key}") is None


def test_without_keys_websockets_of_other_machines_and_pages_are_closed() -> None:
    refused = [{"type": "websocket.close", "code": 1008, "reason": "this_machine_only"}]
    assert connect(None, "192.0.2.7") == refused
    assert connect(None, origin="https://evil.example") == refused
    assert connect(None) is None


def test_lifespan_events_reach_the_application_and_unknown_connections_do_not(tmp_path: Path) -> None:
    add_key(str(tmp_path / "keys.txt"), "anna")
    keys = ApiKeys(str(tmp_path / "keys.txt"))
    assert connect(keys, scope_type="lifespan") is None
    with pytest.raises(ValueError, match="'unheard-of'"):
        connect(keys, scope_type="unheard-of")
