"""From the ingress to the replicas: overload is told at once, what a dying replica had in hand is asked again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.metrics import Metrics
from serve.question import Answer, Question
from serve.refusal import Refusal, overloaded

_TRIES = 3
"""A picture that took so many replicas with it is not given another."""


class Dispatcher:
    """Sends questions to the replicas that hold, or will load, the model asked for.

    Args:
        handle: of the deployment of `serve.app.ModelReplica`.
        models: name and URI of each.
        metrics: to count in.
    """

    def __init__(self, handle: Any, models: Mapping[str, str], metrics: Metrics) -> None:
        self._handle = handle
        self._metrics = metrics
        self.models = dict(models)

    async def ask(self, question: Question) -> Answer:
        """The answer to one question.

        Raises:
            Refusal: what the replica refused, too many wait, or the picture ends every process that works on it.
        """
        handle = self._handle.options(multiplexed_model_id=self.models[question.model])
        with self._metrics.waiting.track_inprogress():
            answer = await self._ask(handle, question)
        if answer.status != 200:
            raise Refusal(answer.status, answer.code, answer.message)
        self._metrics.picture(answer.seconds, answer.batch)
        return answer

    async def _ask(self, handle: Any, question: Question) -> Answer:
        for _ in range(_TRIES):
            try:
                return await handle.answer.remote(question)
            except BackPressureError:
                raise overloaded() from None
            except DeploymentUnavailableError:
                raise Refusal(
                    503, "unavailable", "The model is not available at the moment; try again later.", retry_after=10
                ) from None
            except (RayActorError, ActorUnavailableError):
                self._metrics.retries.inc()
        raise Refusal(
            422, "fatal_picture", f"This picture ended {_TRIES} processes that worked on it; it is not tried again."
        )
