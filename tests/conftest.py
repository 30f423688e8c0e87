"""Shared fixtures; the marker of a test follows from its folder."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by the first folder below tests/: unit, integration or e2e."""
    here = Path(__file__).parent
    for item in items:
        kind = item.path.relative_to(here).parts[0]
        item.add_marker(getattr(pytest.mark, kind))
