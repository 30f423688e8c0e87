"""The command as a whole: every verb explains itself."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from cli.app import app


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for child, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {child}")
    if not hasattr(command, "commands"):
        yield name, command


VERBS = dict(commands(typer.main.get_command(app), "vilseg"))


@pytest.mark.parametrize("name", sorted(VERBS))
def test_every_verb_s_help_has_an_example(name: str) -> None:
    assert "Example: " in (VERBS[name].help or "")
    assert name in VERBS[name].help.partition("Example: ")[2].replace(
        "submit --address http://head:8265 --", "submit run"
    )


def test_no_verb_is_lost() -> None:
    verbs = {name.split()[1] for name in VERBS}
    assert verbs == {
        *("demo", "ingest", "train", "tune", "evaluate", "segment", "serve", "key", "export", "doctor"),
        *("store", "cluster", "submit"),
    }
