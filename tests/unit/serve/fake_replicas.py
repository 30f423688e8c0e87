"""A stand-in for the handle of a deployment, with replicas that end as Ray reports it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorUnavailableError

from serve.request_types import SegmentRequest, SegmentResponse


class FakeReplicas:
    """One replica at a time; a new one takes the place of each that ends.

    Args:
        ends: Returns whether a call, a request or the URI of a model to load, ends the process.
        is_new_process: False if the same process is unreachable each time.
    """

    def __init__(self, ends: Callable[[Any], bool], *, is_new_process: bool = True) -> None:
        self._ends = ends
        self._is_new_process = is_new_process
        self._ended = asyncio.Event()
        self.generation = 0
        self.calls: list[Any] = []
        self.segment = self.load = self

    def options(self, *, multiplexed_model_id: str) -> FakeReplicas:
        return self

    def remote(self, call: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._run(call))

    async def _run(self, call: Any) -> Any:
        self.calls.append(call)
        generation, ended = self.generation, self._ended
        await asyncio.sleep(0)
        if self._ends(call) and not ended.is_set():
            ended.set()  # all calls of this replica are lost
            self._ended = asyncio.Event()
            self.generation += 1
        try:
            await asyncio.wait_for(ended.wait(), 0.01)
        except TimeoutError:
            return SegmentResponse(body=b"done") if isinstance(call, SegmentRequest) else None
        actor = (generation if self._is_new_process else 0).to_bytes(16, "big")
        raise ActorUnavailableError("the connection was lost", actor)
