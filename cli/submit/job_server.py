"""Client of a cluster's job server: start, follow and stop jobs. Ray's variables, such as ``RAY_AUTH_TOKEN``, hold the token."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from cli import console
from cli.submit.log_format import RESULT
from cli.submit.packaging import Job, stage
from vilseg.errors import UserError

_TIMEOUT_S = (5.0, 60.0)
"""Seconds to connect, and to wait for an answer; storing a package of code may take a while."""
_HEARTBEAT_S = 15.0
"""Seconds between the heartbeats of the connection that streams a log."""
_RECONNECT_S = 60.0
"""Seconds for which a lost connection is retried."""
_STOP_S = 60
"""Seconds from SIGINT until Ray kills a stopped job; training uses them to write a checkpoint."""

for _name in (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
):
    logging.getLogger(_name).setLevel(logging.WARNING)  # these loggers report every upload


class Unreachable(UserError):  # noqa: N818  (a state that may pass)
    """Raised if nothing answers at the address of the job server."""


class JobServer(JobSubmissionClient):
    """Client of the job server at an ``http://`` or ``https://`` address.

    Args:
        address: URL of the job server, without a slash at the end.
        timeout: seconds to connect and to wait for an answer.

    Raises:
        Unreachable: nothing answers.
        UserError: the token is wrong or missing, or the server that answers is not a Ray job server.
    """

    def __init__(self, address: str, timeout: tuple[float, float] = _TIMEOUT_S) -> None:
        self.url = address
        self._timeout = timeout
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers this variable to the argument
        try:
            super().__init__(address, verify=os.environ.get("REQUESTS_CA_BUNDLE") or True)
        except (ValueError, KeyError, RuntimeError, requests.RequestException) as error:
            raise UserError(
                f"what answers at {address} is no job server of Ray; give its address, as in http://HEAD:8265"
            ) from error

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        try:
            return super()._do_request(method, endpoint, timeout=self._timeout, **options)
        except AuthenticationError as error:
            problem = "wants a token" if "required" in str(error) else "does not accept the token"
            raise UserError(
                f"the job server at {self.url} {problem}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the "
                "cluster's token, or RAY_AUTH_TOKEN_PATH to a file that holds it"
            ) from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Unreachable(
                f"no job server answers at {self.url}; is the cluster up, and is that the address of its dashboard?"
            ) from error

    def _raise_error(self, response: requests.Response) -> None:
        # The text is a traceback, perhaps with nested ones; show the message of the last error.
        reasons = re.findall(r"^\S*(?:Error|Exception): (.+)$", response.text, re.MULTILINE) or [response.text.strip()]
        raise UserError(f"the job server at {self.url} refused: {reasons[-1]}")

    def versions(self) -> tuple[str, str]:
        """Return the versions of the cluster's Ray and Python."""
        answer = self._do_request("GET", "/api/v0/cluster_metadata")
        if not answer.ok:
            self._raise_error(answer)
        return answer.json()["data"]["rayVersion"], answer.json()["data"]["pythonVersion"]

    def is_here(self) -> bool:
        """Return True if the cluster consists of this machine only, so that paths are valid for its jobs too."""
        answer = self._do_request("GET", "/nodes?view=hostnamelist")
        if not answer.ok:
            return False
        return set(answer.json()["data"]["hostNameList"]) == {os.uname().nodename}

    def send(
        self,
        job: Job,
        variables: dict[str, str],
        *,
        name: str | None = None,
        code: bool = True,
        own: Path | None = None,
        cpus: float | None = None,
        gpus: float | None = None,
    ) -> str:
        """Start a job and return its id.

        Args:
            job: job to start.
            variables: environment variables of the job and its workers. They may hold credentials and are not printed.
            name: id of the job; if None, one is made from the command and the time.
            code: see `packaging.stage`.
            own: see `packaging.stage`.
            cpus: number of CPUs reserved for the command's own process. If ``cpus`` and ``gpus`` are None, it runs on the head.
            gpus: number of GPUs reserved for the command's own process.
        """
        name = name or f"{job.verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        stopping = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}
        environment: dict[str, Any] = {"env_vars": {**variables, **stopping}}
        with tempfile.TemporaryDirectory(prefix="vilseg-") as folder:
            stage(Path(folder), job.files, code=code, own=own)
            if any(Path(folder).iterdir()):
                environment["working_dir"] = folder
            return self.submit_job(
                entrypoint=job.entrypoint,
                submission_id=name,
                runtime_env=environment,
                metadata={"command": job.command},
                entrypoint_num_cpus=cpus,
                entrypoint_num_gpus=gpus,
            )

    def details(self, name: str) -> JobDetails:
        """Return the details of a job.

        Raises:
            UserError: no job has this id.
        """
        answer = self._do_request("GET", f"/api/jobs/{name}")
        if answer.status_code == 404:
            raise UserError(f"there is no job '{name}' at {self.url}; 'vilseg submit list' shows those there are")
        if not answer.ok:
            self._raise_error(answer)
        return JobDetails(**answer.json())

    def all(self) -> list[JobDetails]:
        """Return the details of all submitted jobs, oldest first."""
        jobs = [job for job in self.list_jobs() if job.type is JobType.SUBMISSION]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def follow(self, name: str, lines: LogPrinter) -> JobDetails:
        """Pass a job's log to ``lines`` until the job ends, and return its details. A lost connection is retried.

        Raises:
            Unreachable: nothing answered for `_RECONNECT_S` seconds; the job continues.
        """
        lost_at: float | None = None
        while True:
            try:
                asyncio.run(self._stream(name, lines))
                job = self.details(name)
                if job.status.is_terminal():
                    return job
                lost_at = None
            except asyncio.CancelledError as error:  # asyncio turns Ctrl-C during a connection attempt into this
                raise KeyboardInterrupt from error
            except (aiohttp.ClientError, OSError, Unreachable) as error:
                if lost_at is None:
                    lost_at = time.monotonic()
                    console.log(f"lost the connection to {self.url}; trying again for {_RECONNECT_S:.0f} s")
                elif time.monotonic() > lost_at + _RECONNECT_S:
                    raise Unreachable(
                        f"the connection to {self.url} is lost, and the job goes on; to see it again: "
                        f"vilseg submit logs {name} --follow --address {self.url}"
                    ) from error
            time.sleep(1)

    def wait(self, name: str) -> JobDetails:
        """Wait until a job has ended, and return its details."""
        while not (job := self.details(name)).status.is_terminal():
            time.sleep(0.5)
        return job

    async def _stream(self, name: str, lines: LogPrinter) -> None:
        url = f"{self._address}/api/jobs/{name}/logs/tail"
        skip = lines.seen  # the server sends the log from its start each time
        async with (
            aiohttp.ClientSession(headers=self._headers, cookies=self._cookies) as session,
            session.ws_connect(url, ssl=self._ssl_context or True, heartbeat=_HEARTBEAT_S, max_msg_size=0) as socket,
        ):
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    lines(message.data[skip:])
                    skip = max(0, skip - len(message.data))


class LogPrinter:
    """Printer of a job's log: results on stdout, other lines on stderr.

    Args:
        keep: collect the lines of results in `results` instead of printing them.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.results: list[str] = []
        self.seen = 0
        """Number of characters received so far."""
        self._keep = keep
        self._rest = ""

    def __call__(self, text: str) -> None:
        """Add text of the log, and print the lines that are complete."""
        self.seen += len(text)
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self._show(line)

    def end(self) -> None:
        """Print the last line of the log if it has no line break."""
        if self._rest:
            self._show(self._rest)
        self._rest = ""

    def _show(self, line: str) -> None:
        if not line.startswith(RESULT):
            if not line.startswith(
                "Running entrypoint for job "
            ):  # Ray's line with the job's shell command, which users did not type
                console.log(line)
        elif self._keep:
            self.results.append(line.removeprefix(RESULT))
        else:
            sys.stdout.write(line.removeprefix(RESULT) + "\n")
            sys.stdout.flush()


def exit_code(job: JobDetails) -> int:
    """Return the exit code of the command that ran as a job; 130 if it was stopped, 1 if it did not start or was lost."""
    if job.status is JobStatus.STOPPED:
        return 130
    if job.driver_exit_code is None:
        return 0 if job.status is JobStatus.SUCCEEDED else 1
    return job.driver_exit_code if job.driver_exit_code >= 0 else 128 - job.driver_exit_code


def summary(job: JobDetails) -> dict[str, Any]:
    """Return the properties of a job to show, without its environment variables, which may hold credentials."""
    ended = job.status.is_terminal()
    return {
        "id": job.submission_id,
        "status": job.status.value.lower(),
        "command": (job.metadata or {}).get("command") or job.entrypoint,
        "started": _moment(job.start_time),
        "ended": _moment(job.end_time) if ended else None,
        "exit_code": exit_code(job) if ended else None,
        # Only the first line; the rest of the message is the end of the log.
        "message": (job.message or "")
        .partition("\n")[0]
        .removesuffix(", last available logs (truncated to 20,000 chars):"),
    }


def _moment(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(milliseconds / 1000))
