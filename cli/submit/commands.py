"""Subcommands of ``vilseg submit``: start, show, follow, stop and list jobs on a Ray cluster."""

from __future__ import annotations

import json as encoding
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cli.options import Json
from vilseg.errors import UserError

if TYPE_CHECKING:
    from cli.submit.job_server import JobServer

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_ADDRESS")
"""Environment variables from which Ray's own commands read the job server's address; the first ``http`` URL is used, because
``RAY_ADDRESS`` may name a cluster instead."""


class _RunByDefault(TyperGroup):
    """Command group that runs ``submit … -- VERB`` as ``submit run … -- VERB``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


submit_app = typer.Typer(
    cls=_RunByDefault,
    help="Any verb as a job of a Ray cluster: vilseg submit [OPTIONS of run] -- VERB …",
    no_args_is_help=True,
)

Address = Annotated[
    str | None,
    typer.Option(help="The cluster's job server, http://HEAD:8265; RAY_API_SERVER_ADDRESS without it."),
]
Name = Annotated[str, typer.Argument(metavar="ID", help="Of the job.")]


@submit_app.command(context_settings={"allow_interspersed_args": False})
def run(
    context: typer.Context,
    verb: Annotated[list[str], typer.Argument(metavar="VERB …", help="The verb with its arguments, after '--'.")],
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end, or print its id.")] = True,
    id: Annotated[str | None, typer.Option("--id", "--name", help="Name of the job; made up without it.")] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="Folder of own modules and small files that the job finds where it runs.")
    ] = None,
    image_code: Annotated[
        bool, typer.Option("--image-code", help="Use the vilseg that the cluster has, instead of this one.")
    ] = False,
    credentials: Annotated[
        bool,
        typer.Option("--credentials/--no-credentials", help="Give the job the AWS_*, HF_* and VILSEG_* variables."),
    ] = True,
    cpus: Annotated[float | None, typer.Option(help="CPUs of the verb's own process.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of the verb's own process, for evaluate.")] = None,
    json: Json = False,
) -> int:
    """Run a command as a job (the word 'run' can be omitted); exits with the exit code of the command.

    Example: vilseg submit --address http://head:8265 -- train --config run.yaml --name first
    """
    if id is not None and not _NAME.fullmatch(id):
        raise UserError(f"'{id}' is no id for a job; use up to 64 letters, digits, '.', '_' and '-'")
    from cli import console
    from cli.submit.packaging import check, fit, variables

    checked = check(context.find_root().command, verb)
    server = _connect(address)
    here = server.is_here()
    job = fit(checked, here=here)
    carried: dict[str, str] = {}
    if credentials and job.verb != "demo":  # the demo starts its own object store
        carried, notes = variables(here=here)
        job.notes.extend(notes)
    if here and not image_code:
        carried["PYTHONPATH"] = os.getcwd()  # modules in the working folder can be imported, as without a cluster
    name = server.send(job, carried, name=id, code=not image_code, own=working_dir, cpus=cpus, gpus=gpus)
    for note in job.notes:
        console.log(note)
    if not wait:
        console.log(f"to see it: vilseg submit logs {name} --follow; to end it: vilseg submit stop {name}")
        console.print_result({"id": name, "address": server.url}, as_json=json, text=name)
        return 0
    console.log(f"job {name} at {server.url}")
    return _follow(server, name, json=json)


@submit_app.command()
def status(name: Name, address: Address = None, json: Json = False) -> None:
    """Show the status of a job.

    Example: vilseg submit status train-20260101-120000-ab12
    """
    from cli import console
    from cli.submit.job_server import summary

    told = summary(_connect(address).details(_checked(name)))
    text = "\n".join(f"{key:9} {value}" for key, value in told.items() if value not in (None, ""))
    console.print_result(told, as_json=json, text=text.replace("exit_code", "exit code"))


@submit_app.command()
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends; exits with its exit code.")] = False,
    address: Address = None,
) -> int:
    """Show the log of a job: results on stdout, other output on stderr.

    Example: vilseg submit logs train-20260101-120000-ab12 --follow
    """
    from cli.submit.job_server import LogPrinter

    server = _connect(address)
    server.details(_checked(name))
    if follow:
        return _follow(server, name)
    lines = LogPrinter()
    lines(server.get_job_logs(name))
    lines.end()
    return 0


@submit_app.command()
def stop(name: Name, address: Address = None, json: Json = False) -> None:
    """Stop a job as by Ctrl-C, and wait until it has ended.

    Example: vilseg submit stop train-20260101-120000-ab12
    """
    from cli import console
    from cli.submit.job_server import summary

    server = _connect(address)
    running = not server.details(_checked(name)).status.is_terminal()
    if running:
        server.stop_job(name)
    told = summary(server.wait(name))
    console.print_result(told, as_json=json, text=f"{name} {'is' if running else 'was already'} {told['status']}")


@submit_app.command(name="list")
def list_(address: Address = None, json: Json = False) -> None:
    """List the jobs that were submitted to a cluster, oldest first.

    Example: vilseg submit list --address http://head:8265
    """
    from cli import console
    from cli.submit.job_server import summary

    jobs = [summary(job) for job in _connect(address).all()]
    lines = [f"{job['id']:36} {job['status']:10} {job['started'] or '':25} {job['command']}" for job in jobs]
    console.print_result({"jobs": jobs}, as_json=json, text="\n".join(lines) or "no jobs")


def _connect(address: str | None) -> JobServer:
    if address is None:
        named = [os.environ.get(name, "") for name in _VARIABLES]
        address = next((value for value in named if value.startswith("http")), None)
        if address is None:
            raise UserError(
                "which cluster? give --address http://HEAD:8265, the address of its dashboard, or set "
                "RAY_API_SERVER_ADDRESS to it"
            )
    if "@" in address:
        raise UserError("the address holds a user name or password; give http://HEAD:8265 and set RAY_AUTH_TOKEN")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{address} is no address of a job server; give the dashboard's, as in http://HEAD:8265")
    from cli.submit.job_server import JobServer

    return JobServer(address.rstrip("/"))


def _checked(name: str) -> str:
    """Check that ``name``, which becomes part of a URL, is a valid job id, and return it."""
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name}' is no id of a job; 'vilseg submit list' shows those there are")
    return name


def _follow(server: JobServer, name: str, *, json: bool = False) -> int:
    """Show the log of a job until it ends, and return its exit code.

    On Ctrl-C the user is asked to stop, follow or leave the job; without a terminal the job is left running.
    """
    from cli import console
    from cli.submit.job_server import LogPrinter, Unreachable, exit_code, summary

    lines = LogPrinter(keep=json)
    interrupted = False
    while True:
        try:  # includes the question, because Ctrl-C may arrive at any time
            if interrupted and not _keep_following(server, name):
                return 130
            job = server.follow(name, lines)
            break
        except Unreachable as error:  # not an error of the user: exit code 1
            console.log(f"vilseg: {error}")
            return 1
        except KeyboardInterrupt:
            interrupted = True
    lines.end()
    told = summary(job)
    code = exit_code(job)
    if code == 130:
        console.log(f"vilseg: the job {name} was stopped")
    elif code and job.driver_exit_code is None:  # a command that ran has printed its own error
        console.log(f"vilseg: the job {name} failed: {told['message']}")
    if json:
        console.print_result({**told, "result": _value("\n".join(lines.results))}, as_json=True, text="")
    return code


def _keep_following(server: JobServer, name: str) -> bool:
    """Ask what to do with the job after Ctrl-C; return True to keep following it, also if it is to be stopped."""
    from cli import console

    if sys.stdin.isatty() and sys.stderr.isatty():
        console.log("\ns stops the job, Enter follows it on, anything else (Ctrl-C as well) leaves it running:")
        try:
            answer = sys.stdin.readline()
        except KeyboardInterrupt:
            answer = ""
        if answer == "\n":
            console.log("following on")
            return True
        if answer.strip().lower() == "s":
            server.stop_job(name)
            console.log("stopping; Ctrl-C again asks again")
            return True
    console.log(
        f"the job goes on; to see it: vilseg submit logs {name} --follow --address {server.url}; "
        f"to end it: vilseg submit stop {name} --address {server.url}"
    )
    return False


def _value(text: str) -> Any:
    """Parse the output of a command as JSON; return it unchanged if it is not JSON."""
    try:
        return encoding.loads(text)
    except ValueError:
        return text
