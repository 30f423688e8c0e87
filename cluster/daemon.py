"""Background processes that outlive the command that starts them: nodes of a local cluster and the object store."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def start_daemon(
    command: Sequence[str], directory: Path, environment: Mapping[str, str], log: Path, *, append: bool
) -> subprocess.Popen:
    """Start ``command`` in a new session, so that neither Ctrl-C nor closing the terminal ends it.

    Args:
        command: program and arguments.
        directory: working directory.
        environment: all environment variables of the process.
        log: file for stdout and stderr.
        append: append to the log instead of replacing it.
    """
    with log.open("ab" if append else "wb") as file:
        return subprocess.Popen(
            command,
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until ``condition`` returns True; return False if it does not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def process_start(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot (proc(5)); None if it has ended."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def session_processes(pid: int, start: int) -> set[int]:
    """Return the ids of the processes in the session that process ``pid`` started, and of their descendants.

    Args:
        pid: process id of the session leader.
        start: start time of the leader in clock ticks since boot, to distinguish it from a later process with the same id.
    """
    if process_start(pid) not in (None, start):
        return set()  # another process has this id; the system reuses it only after the whole session has ended
    known = {int(place.name): fields for place in Path("/proc").glob("[0-9]*") if (fields := _stat(int(place.name)))}
    family = {other for other, fields in known.items() if int(fields[3]) == pid and int(fields[19]) >= start}
    while more := {other for other, fields in known.items() if int(fields[1]) in family} - family:
        family |= more  # drivers of submitted jobs start their own sessions
    return family


def send_signal(pids: set[int], number: signal.Signals) -> None:
    """Send a signal to all processes that still exist."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _stat(pid: int) -> list[str] | None:
    """Return the fields of ``/proc/PID/stat`` (proc(5)) from the state on; None if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields
