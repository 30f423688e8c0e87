"""Rollout of models: bounded attempts, and the model before stays where the new one cannot be loaded."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from serve import rollout
from tests.unit.serve.fake_replicas import FakeReplicas


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "_PAUSE", 0)


def roll_out(handle: Any, current: dict[str, str], wanted: dict[str, str]) -> dict[str, str]:
    return asyncio.run(asyncio.wait_for(rollout.roll_out(handle, current, wanted), 20))


def test_a_model_that_ends_every_replica_is_given_up_and_the_one_before_stays(caplog: pytest.LogCaptureFixture) -> None:
    handle = FakeReplicas(lambda uri: uri == "/fatal")
    with caplog.at_level(logging.ERROR, "ray.serve"):
        settled = roll_out(handle, {"day": "/old"}, {"day": "/fatal", "night": "/new"})
    assert settled == {"day": "/old", "night": "/new"}
    assert handle.generation == 3
    [message] = [record.getMessage() for record in caplog.records]
    assert "'day' at /fatal is not rolled out" in message
    assert "3 replicas ended while they loaded it" in message
    assert rollout.LOG_DIRECTORY in message
    assert "\n" not in message


def test_one_lost_replica_does_not_end_a_rollout() -> None:
    lost: list[Any] = []
    handle = FakeReplicas(lambda uri: not lost and not lost.append(uri))
    assert roll_out(handle, {"day": "/old"}, {"day": "/new"}) == {"day": "/new"}


def test_if_nothing_can_be_loaded_all_stays_as_it_is() -> None:
    current = {"day": "/old"}
    assert roll_out(FakeReplicas(lambda uri: True), current, {"other": "/fatal"}) == current
