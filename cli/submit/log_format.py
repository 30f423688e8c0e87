"""Marks in a job's log that tell results from all else.

Ray writes what a job prints on stdout and on stderr into one log, so every line of stdout gets a mark by which the two are
told apart again.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

RESULT = "\x1e"
"""Begins every line of a job's log that is a result: ASCII's record separator, which terminals do not show."""


class MarkedLines:
    """A stdout that puts `RESULT` before every line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._at_start = True

    def write(self, text: str) -> int:
        """Write text and return its length, as a file does."""
        # Not by `splitlines`, which knows other ends of lines as well, such as U+2028, and JSON may hold them.
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            self._stream.write((RESULT if self._at_start else "") + line)
            self._at_start = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # its encoding, whether it is a terminal
