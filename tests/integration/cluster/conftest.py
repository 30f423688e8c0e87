"""Kustomizations rendered by kubectl itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

KUBERNETES = Path(__file__).parents[3] / "cluster" / "kubernetes"
Render = Callable[..., list[dict[str, Any]]]


def program(name: str) -> str:
    """A program of the development packages, or whichever is on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is missing: `make setup` installs it"
    return found


@cache
def _rendered(folder: Path) -> str:
    done = subprocess.run([program("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def render() -> Render:
    """``render("gpu/train")``: the objects that ``kubectl apply -k`` would send, anew each time so that they can be changed."""

    def objects(place: str | Path) -> list[dict[str, Any]]:
        return [one for one in yaml.load_all(_rendered(KUBERNETES / place), yaml.CSafeLoader) if one]

    return objects
