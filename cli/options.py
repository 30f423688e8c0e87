"""Options that several commands share, so that a name has the same meaning everywhere."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated, TextIO

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster: auto or ray://…; a local one is started without it.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Configuration keys as key.sub=value.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an earlier call left.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def stdout_to_stderr() -> redirect_stdout[TextIO]:
    """Redirect stdout to stderr within a ``with`` block, so that Ray's messages about dead workers do not mix with the result."""
    return redirect_stdout(sys.stderr)


CLASSES = (
    'text file with a name a line, YAML, "a,b|synonym,c", or a built-in voc, context, coco, coco-panoptic, '
    "coco-stuff, ade20k (a file of that name goes before)"
)
"""Help text of options that accept classes."""
