"""Files of what runs on this machine: state and keys that one user has, and that one command at a time changes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vilseg.errors import UserError


@contextmanager
def exclusive_lock(folder: Path, lock: str, error: type[UserError], what: str) -> Iterator[None]:
    """Make ``folder`` and keep other commands that ask for the same lock in it waiting.

    Args:
        folder: may exist.
        lock: name of a file in it.
        error: raised where it cannot be made.
        what: who keeps what there, for the sentence: "the cluster cannot keep its state".
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
    """Replace a file as a whole; only this user can read it."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    os.replace(partial, path)
