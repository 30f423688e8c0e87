"""Fixtures of the end-to-end tests: the command as a user runs it, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.object_store import ObjectStore

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def vilseg() -> Run:
    """Run ``vilseg ARGUMENTS`` and return what it said."""

    def run(*arguments: str, timeout: float = 500, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cli.app", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A store of its own, since a test stops it on the way."""
    store = ObjectStore.start(tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in store.environment().items():
            patch.setenv(variable, value)
        yield store
    ObjectStore.start(store.directory).stop(timeout=0)
