"""Fixture of the tests of losses."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def without_annotation_checks() -> Iterator[None]:
    """Turn the checks of annotations off, as they are outside of the tests, so that a loss checks shapes by itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
