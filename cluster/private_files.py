"""Private files of local services: state and keys that only one user can read, and that one command at a time changes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vilseg.errors import UserError


@contextmanager
def exclusive_lock(folder: Path, lock: str, error: type[UserError], what: str) -> Iterator[None]:
    """Hold an exclusive lock on a file in ``folder`` within the ``with`` block; other processes that request it wait.

    Args:
        folder: folder of the lock file; created if it does not exist.
        lock: name of the lock file.
        error: type of the error raised if the folder or the file cannot be created.
        what: start of the error message, for example "the cluster cannot keep its state".
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (folder / lock).open("w")
    except OSError as reason:
        raise error(f"{what} in {folder} ({reason.strerror}): choose another with --dir") from reason
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_private(path: Path, text: str) -> None:
    """Write ``text`` to a file atomically; only this user can read the file (mode 0600)."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    os.replace(partial, path)
