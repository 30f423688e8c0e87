"""Routing of requests from the ingress to replicas: overload is reported immediately, a request on a lost replica is retried."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.http_errors import HttpError, overloaded_error, unavailable_error
from serve.metrics import Metrics
from serve.request_types import SegmentRequest, SegmentResponse

log = logging.getLogger("ray.serve")
_OVERLOAD_S = 1.0
"""Seconds for which the replicas count as overloaded after an image was refused because the queue was full."""
_ATTEMPTS = 3
"""Maximum number of attempts per request; only the loss of a replica leads to another one. Last attempts run one at a time."""


async def await_or_cancel(response: Any) -> Any:
    """Await the response of a replica; if the caller is cancelled, cancel the call on the replica too."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


class Router:
    """Sender of requests to replicas; Ray prefers a replica that has loaded the model.

    Args:
        handle: Handle of the deployment of `serve.deployment.ModelReplica`.
        models: Models that requests may name. Name -> URI.
        metrics: Metrics to update.
    """

    def __init__(self, handle: Any, models: Mapping[str, str], metrics: Metrics) -> None:
        self._handle = handle
        self._metrics = metrics
        self.models = dict(models)
        self._in_progress = 0
        self._overloaded_from: int | None = None
        self._overloaded_until = 0.0
        self._isolation = asyncio.Lock()

    def is_overloaded(self) -> bool:
        """Return True if an image was refused within the last second, and as many images as then, or more, are in progress now.

        Call this before a request's body is read, because under overload most time is spent on bodies of refused requests.
        """
        return (
            self._overloaded_from is not None
            and self._in_progress >= self._overloaded_from
            and time.monotonic() < self._overloaded_until
        )

    async def segment(self, request: SegmentRequest) -> SegmentResponse:
        """Send a request to a replica and return its response.

        Raises:
            HttpError: The replica returned an error, the queue is full, no replica is available, or the image crashes
                every replica that segments it.
        """
        uri = self.models.get(request.model)
        if uri is None:  # the model was removed after the request was parsed
            raise HttpError(404, "unknown_model", f"The model '{request.model}' is not served any more.")
        handle = self._handle.options(multiplexed_model_id=uri)
        self._in_progress += 1
        self._metrics.waiting.set(self._in_progress)
        try:
            response = await self._segment_with_retry(handle, request, uri)
        finally:
            self._in_progress -= 1
            self._metrics.waiting.set(self._in_progress)
        if response.status != 200:
            retry_after = 5 if response.status == 503 else None
            raise HttpError(response.status, response.code, response.message, retry_after=retry_after)
        self._metrics.count_image(response.seconds, response.batch)
        return response

    async def _segment_with_retry(self, handle: Any, request: SegmentRequest, uri: str) -> SegmentResponse:
        lost: set[str] = set()
        for _ in range(_ATTEMPTS - 1):
            response = await self._attempt(handle, request, lost)
            if response is not None:
                return response
        # Requests that lost their replicas are suspect and run one at a time from here on, so that those that merely shared
        # a replica with a crashing image succeed. Checks before and after the attempt distinguish a crashing image from a
        # cluster that loses its replicas for another reason.
        async with self._isolation:
            if not await self._is_available(handle, uri):
                raise unavailable_error()
            response = await self._attempt(handle, request, lost)
            if response is not None:
                return response
            # A replica that is unreachable several times counts once, because its process may still be running.
            if len(lost) < _ATTEMPTS or not await self._is_available(handle, uri):
                raise unavailable_error()
        log.error("request %s ended %d replicas; its image is refused", request.request_id, _ATTEMPTS)
        raise HttpError(
            422, "fatal_picture", f"This image ended {_ATTEMPTS} processes that worked on it; it is not tried again."
        )

    async def _attempt(self, handle: Any, request: SegmentRequest, lost: set[str]) -> SegmentResponse | None:
        """Send the request once; if the replica is lost before it responds, add its actor id to ``lost`` and return None."""
        try:
            response: SegmentResponse = await await_or_cancel(handle.segment.remote(request))
        except BackPressureError:
            # The number of replicas may change, so the limit is valid for a second only.
            self._overloaded_from = self._in_progress - 1
            self._overloaded_until = time.monotonic() + _OVERLOAD_S
            raise overloaded_error() from None
        except DeploymentUnavailableError:
            raise unavailable_error() from None
        except RayActorError as error:
            self._metrics.retries.inc()
            lost.add(str(error.actor_id))
            return None
        return response

    async def _is_available(self, handle: Any, uri: str) -> bool:
        """Return True if a replica responds that it has the model, which it loads if necessary."""
        try:
            return await await_or_cancel(handle.load.remote(uri)) is None
        except (BackPressureError, DeploymentUnavailableError, RayActorError):
            return False
