"""Examples in docstrings run and print what they say."""

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest

import vilseg
import vilseg.losses

ROOT = Path(__file__).parents[2]
WITH_EXAMPLES = [
    file.relative_to(ROOT)
    for package in ("vilseg", "jobs", "serve", "tune", "cluster", "cli")
    for file in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("file", WITH_EXAMPLES, ids=str)
def test_examples_print_what_they_say(file: Path) -> None:
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0, "see the captured output"


PUBLIC = [getattr(package, name) for package in (vilseg, vilseg.losses) for name in package.__all__]


@pytest.mark.parametrize("public", PUBLIC, ids=[f"{public.__module__}.{public.__name__}" for public in PUBLIC])
def test_public_classes_and_losses_have_an_example(public: Any) -> None:
    assert any(test.examples for test in doctest.DocTestFinder(recurse=False).find(public))
