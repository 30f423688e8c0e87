"""Reasons of a deployment that does not start, each as one sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from serve.launch import failure_reason

RAISED = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
\x1b[36mray::ServeReplica:vilseg:models.initialize_and_get_metadata()\x1b[39m (pid=1)
  File "serve/deployment.py", line 1, in __init__
vilseg.errors.ModelError: /m is no model"""
KILLED = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
The actor died unexpectedly before finishing this task.
\tclass_name: ServeReplica:vilseg:models
Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file."""


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (RAISED, "/m is no model"),
        (KILLED, "the processes of 'models' ended while they started; the reason is in /tmp/ray/session_latest/logs"),
        ("", ""),
    ],
)
def test_a_deployment_that_does_not_start_has_one_sentence(message: str, reason: str) -> None:
    deployments = {"ingress": SimpleNamespace(message=""), "models": SimpleNamespace(message=message)}
    status: Any = SimpleNamespace(message="", deployments=deployments)
    assert failure_reason(status) == reason
