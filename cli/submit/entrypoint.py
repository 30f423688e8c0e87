"""What ``vilseg submit`` runs on the cluster, inside a Ray job: ``python -m cli.submit.entrypoint [--folder DIR] -- VERB …``.

Ray writes what a job prints on stdout and on stderr into one log, so every line of stdout gets a mark by which the two can
be told apart again.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import redirect_stdout
from typing import Any, TextIO

from cli import app

RESULT = "\x1e"
"""Begins every line of a job's log that is a result: ASCII's record separator, which terminals do not show."""


class MarkedLines:
    """A stdout that puts `RESULT` before every line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._at_start = True

    def write(self, text: str) -> int:
        """As of a file."""
        # Not by `splitlines`, which knows other ends of lines as well, such as U+2028, and JSON may hold them.
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            self._stream.write((RESULT if self._at_start else "") + line)
            self._at_start = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # its encoding, whether it is a terminal


def main() -> None:
    """Entry point of the job; its exit code is the verb's."""
    before, verb = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    # The machine that runs the cluster may have been told to ignore it, as shells do for what runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before:
        os.chdir(before[1])
        sys.path.append(os.getcwd())  # behind the packages that came with the job: workers have no others
    sys.argv = ["vilseg", *verb]
    with redirect_stdout(MarkedLines(sys.stdout)):  # type: ignore[type-var]
        code = app.run(verb, log=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
