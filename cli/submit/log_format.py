"""Marks of the result lines in a job's log.

Ray writes a job's stdout and stderr into one log, so every line of stdout (the results) starts with a mark, by which the two are
separated again.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

RESULT = "\x1e"
"""Mark at the start of every result line in a job's log: ASCII's record separator, which terminals do not show."""


class MarkedLines:
    """Text stream that writes to another stream, with `RESULT` before every line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._at_start = True

    def write(self, text: str) -> int:
        """Write text with marks, and return the number of characters of ``text``."""
        # Not `splitlines`, which also splits at characters such as U+2028, which JSON text may contain.
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            self._stream.write((RESULT if self._at_start else "") + line)
            self._at_start = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # such as `encoding` and `isatty`
