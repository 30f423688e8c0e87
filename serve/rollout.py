"""Rollout of models without interruption: an old model is served until a replica has loaded its replacement."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

log = logging.getLogger("ray.serve")
_PAUSE = 1.0
"""Seconds between two attempts to load a model."""
_MAX_LOST = 3
"""Number of replicas lost while loading a model after which it is given up; one or two may be a coincidence."""
LOG_DIRECTORY = str(Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "session_latest", "logs"))
"""Directory of Ray's logs if the cluster was started without ``--temp-dir``; logs of Serve are in its ``serve/``."""


async def load_model(handle: Any, uri: str) -> str | None:
    """Load a model on a replica; retry if the replicas are busy or one is lost.

    Args:
        handle: Handle of the deployment of `serve.deployment.ModelReplica`.
        uri: URI of the model.

    Returns:
        None if a replica has loaded the model; otherwise the reason of the failure, as a clause.
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
    """Load new models on the replicas and return the models to serve from then on.

    If a model cannot be loaded, the reason is logged, and the old model of that name is kept.

    Args:
        handle: Handle of the deployment of `serve.deployment.ModelReplica`.
        current: Models that are served now. Name -> URI.
        wanted: Models to serve instead. Name -> URI.

    Returns:
        Models that can be served. Name -> URI; ``current`` if none of ``wanted`` can be loaded.
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
