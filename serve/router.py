"""From the ingress to the replicas: overload is told at once, what a dying replica had in hand is asked again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.http_errors import HttpError, overloaded_error
from serve.metrics import Metrics
from serve.request_types import SegmentRequest, SegmentResponse

_FULL_S = 1.0
_TRIES = 3
"""A picture that took so many replicas with it is not given another."""


async def cancelling(response: Any) -> Any:
    """Wait for a replica; who stops waiting has the work ended as well, however Ray carries the call."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


class Router:
    """Sends questions to the replicas that hold, or will load, the model asked for.

    Args:
        handle: of the deployment of `serve.deployment.ModelReplica`.
        models: name and URI of each.
        metrics: to count in.
    """

    def __init__(self, handle: Any, models: Mapping[str, str], metrics: Metrics) -> None:
        self._handle = handle
        self._metrics = metrics
        self.models = dict(models)
        self._in_work = 0
        self._full_at: int | None = None
        self._full_until = 0.0

    def is_full(self) -> bool:
        """Whether as many pictures are in work as were when one was last refused, a moment ago.

        To be asked before a request's body is read: under overload it is reading what is then refused that costs most.
        """
        return self._full_at is not None and self._in_work >= self._full_at and time.monotonic() < self._full_until

    async def ask(self, question: SegmentRequest) -> SegmentResponse:
        """The answer to one question.

        Raises:
            HttpError: what the replica refused, too many wait, or the picture ends every process that works on it.
        """
        uri = self.models.get(question.model)
        if uri is None:  # it was taken away since the request was read
            raise HttpError(404, "unknown_model", f"The model '{question.model}' is not served any more.")
        handle = self._handle.options(multiplexed_model_id=uri)
        self._in_work += 1
        self._metrics.waiting.set(self._in_work)
        try:
            answer = await self._ask(handle, question)
        finally:
            self._in_work -= 1
            self._metrics.waiting.set(self._in_work)
        if answer.status != 200:
            raise HttpError(answer.status, answer.code, answer.message, retry_after=5 if answer.status == 503 else None)
        self._metrics.picture(answer.seconds, answer.batch)
        return answer

    async def _ask(self, handle: Any, question: SegmentRequest) -> SegmentResponse:
        for _ in range(_TRIES):
            try:
                return await cancelling(handle.answer.remote(question))
            except BackPressureError:
                # Replicas may come and go, so what was full a second ago is tried again.
                self._full_at, self._full_until = self._in_work - 1, time.monotonic() + _FULL_S
                raise overloaded_error() from None
            except DeploymentUnavailableError:
                raise HttpError(
                    503, "unavailable", "The model is not available at the moment; try again later.", retry_after=10
                ) from None
            except (RayActorError, ActorUnavailableError):
                self._metrics.retries.inc()
        raise HttpError(
            422, "fatal_picture", f"This picture ended {_TRIES} processes that worked on it; it is not tried again."
        )
