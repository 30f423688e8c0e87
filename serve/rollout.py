"""Rollout of models: each new one is loaded beside the one before, which is served until a replica holds the new one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

log = logging.getLogger("ray.serve")
_PAUSE = 1.0
"""Seconds before loading is tried again."""
_MAX_LOST = 3
"""Replicas that end while they load a model before it is given up: one or two may be a coincidence."""
LOG_DIRECTORY = "/tmp/ray/session_latest/logs"
"""Ray's logs, where the cluster was started without ``--temp-dir``; those of Serve are in ``serve/`` below it."""


async def load_model(handle: Any, uri: str) -> str | None:
    """Load a model on a replica.

    Args:
        handle: Handle of the deployment of `serve.deployment.ModelReplica`.
        uri: URI of the model.

    Returns:
        What is wrong with the model, as a clause; None if a replica holds it now.
    """
    lost = 0
    while True:
        try:
            error: str | None = await handle.options(multiplexed_model_id=uri).load.remote(uri)
        except BackPressureError:
            log.warning("the replicas are busy; loading %s is tried again", uri)
        except RayActorError as loss:
            lost += 1
            if lost == _MAX_LOST:
                return (
                    f"{lost} replicas ended while they loaded it; the reason is in Ray's logs on the machine of the "
                    f"last, actor {loss.actor_id}: {LOG_DIRECTORY}"
                )
            log.warning("a replica was lost while it loaded %s; another one tries", uri)
        else:
            return error
        await asyncio.sleep(_PAUSE)


async def roll_out(handle: Any, current: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Load the models that are new and return name and URI of those to serve from now on.

    A model that cannot be loaded is logged with its reason, and the one of that name before stays.

    Args:
        handle: Handle of the deployment of `serve.deployment.ModelReplica`.
        current: Models served at present. Name -> URI.
        wanted: Models to serve. Name -> URI.

    Returns:
        Models to serve; ``current`` if none of ``wanted`` can be loaded.
    """
    settled: dict[str, str] = {}
    for name, uri in wanted.items():
        if current.get(name) == uri:
            settled[name] = uri
            continue
        try:
            reason = await load_model(handle, uri)
        except Exception as error:
            log.exception("loading the model '%s' failed", name)
            reason = type(error).__name__
        if reason is None:
            settled[name] = uri
            continue
        log.error("the model '%s' at %s is not rolled out: %s", name, uri, reason)
        if name in current:
            settled[name] = current[name]
    return settled or dict(current)
