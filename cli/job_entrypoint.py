"""Process of a job of ``vilseg submit`` on the cluster: ``python -m cli.job_entrypoint [--folder DIR] -- VERB …``."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import redirect_stdout

from cli import app
from cli.submit.log_format import MarkedLines


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
