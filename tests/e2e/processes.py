"""Processes of a running command, found and killed by their ids (proc(5))."""

import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path


def family(pid: int) -> list[int]:
    """Ids of the descendants of a process, the youngest generation first."""
    generations = [[pid]]
    while generations[-1]:
        generations.append([child for child, parent in _processes() if parent in generations[-1]])
    return [child for generation in reversed(generations[1:]) for child in generation]


def title(pid: int) -> str:
    """Name of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill(processes: Iterable[int]) -> None:
    """``kill -9``; those that have ended are fine."""
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended with its parent


def end(process: subprocess.Popen[str]) -> None:
    """``kill -9`` of a command that still runs, with all that it started."""
    if process.poll() is None:
        kill([*family(process.pid), process.pid])
        process.wait()


def _processes() -> Iterator[tuple[int, int]]:
    """Id and parent's id of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
