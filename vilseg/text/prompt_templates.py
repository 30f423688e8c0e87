"""Prompt templates, which are sentences with ``{}`` in the position of the class name, and the sets included in the package."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_SETS = Path(__file__).parent / "prompts"


@cache
def prompt_sets() -> tuple[str, ...]:
    """Return the names of the template sets in ``vilseg/text/prompts``: ``clip`` and ``short``."""
    return tuple(sorted(path.stem for path in _SETS.glob("*.txt")))


def resolve_templates(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return the templates given by the name of a set, one template, or a list of templates.

    >>> resolve_templates("a photo of a {}")
    ('a photo of a {}',)

    Raises:
        ValueError: there is no set of that name, the list is empty, or a template does not contain ``{}`` exactly once.
    """
    if isinstance(given, str):
        if "{" not in given:
            return _read(given)
        given = [given]
    if not given:
        raise ValueError("there is no prompt; give templates with {} in the place of the class name")
    for prompt in given:
        if prompt.count("{}") != 1 or prompt.count("{") != 1 or prompt.count("}") != 1:
            raise ValueError(f"the prompt '{prompt}' must hold {{}} once, in the place of the class name")
    return tuple(given)


def _read(name: str) -> tuple[str, ...]:
    if name not in prompt_sets():
        near = difflib.get_close_matches(name, prompt_sets(), 1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {' and '.join(prompt_sets())}"
        raise ValueError(f"there is no set of prompts '{name}'; {hint}, or give templates with {{}} in them")
    lines = (_SETS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))
