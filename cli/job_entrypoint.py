"""Main program of a job of ``vilseg submit`` on the cluster: ``python -m cli.job_entrypoint [--folder DIR] -- COMMAND …``.

It runs a subcommand of ``vilseg`` in the folder DIR, with marks before the lines that it prints on stdout.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import redirect_stdout

from cli import app
from cli.submit.log_format import MarkedLines


def main() -> None:
    """Run the subcommand of the job, and exit with its exit code."""
    before, verb = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    # SIGINT stops a job. It may be ignored here, since shells let background processes ignore it, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before:
        os.chdir(before[1])
        sys.path.append(os.getcwd())  # after the packages sent with the job, which are the ones that workers import
    sys.argv = ["vilseg", *verb]
    with redirect_stdout(MarkedLines(sys.stdout)):  # type: ignore[type-var]
        code = app.run(verb, log=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
