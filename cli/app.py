"""The ``vilseg`` command with its subcommands and exit codes. Subcommands import heavy packages only when they run."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import TextIO

import typer

from cli import console
from cli.cluster import cluster_app
from cli.demo import demo
from cli.doctor import doctor
from cli.evaluate import evaluate
from cli.export import export
from cli.ingest import ingest
from cli.key import key
from cli.segment import segment
from cli.serve import serve
from cli.store import store_app
from cli.submit.commands import submit_app
from cli.train import train
from cli.tune import tune

app = typer.Typer(
    help="Open-vocabulary segmentation trained from image-caption pairs.", no_args_is_help=True, add_completion=False
)
for verb in (demo, ingest, train, tune, evaluate, segment, serve, key, export, doctor):
    app.command()(verb)
app.add_typer(store_app, name="store")
app.add_typer(cluster_app, name="cluster")
app.add_typer(submit_app, name="submit")


def main() -> None:
    """Run the command line and exit with its code.

    Codes: 0 success, 1 the run failed, 2 the user's input is wrong, 130 interrupted. Errors are printed as a sentence, without a
    traceback.
    """
    # As `python -m` does, and Ray for its workers: a user's modules in the working folder can be imported.
    sys.path.insert(0, os.getcwd())
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], *, log: TextIO | None = None) -> int:
    """Run a subcommand and return its exit code.

    Args:
        arguments: the subcommand's name and its arguments.
        log: stream for the traceback of a failed run; if None, it is written to a new temporary file.
    """
    try:
        with console.logging_to_stderr():
            outcome = app(list(arguments), standalone_mode=False, prog_name="vilseg")
        return outcome if isinstance(outcome, int) else 0
    except typer.Exit as error:
        return error.exit_code
    except typer.TyperException as error:  # arguments that the subcommand does not accept
        context = getattr(error, "ctx", None)
        said = error.format_message().rstrip(".")
        if context is not None and said:
            print(f"vilseg: {said}; see '{context.command_path} --help'", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("vilseg: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001  (shown as a sentence; the traceback goes to a log)
        return _failed(error, log)


def _failed(error: Exception, log: TextIO | None) -> int:
    from cluster.ray_session import find_user_error

    mistake = find_user_error(error)
    if mistake is not None:
        print(f"vilseg: {mistake}", file=sys.stderr)
        return 2
    if log is None:
        with tempfile.NamedTemporaryFile("w", prefix="vilseg-", suffix=".log", delete=False) as file:
            traceback.print_exception(error, file=file)
        where = f"the log is {file.name}"
    else:
        traceback.print_exception(error, file=log)
        where = "its traceback is above"
    last = str(error).strip().splitlines()[-1:] or [""]
    print(f"vilseg: the run failed: {type(error).__name__}: {last[0]}; {where}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
