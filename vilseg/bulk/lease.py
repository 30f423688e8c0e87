"""A lease on an output folder, so that one job at a time writes there and a dead one does not block it for ever.

The folder holds ``lock.json`` with a token and an expiry, which the holder pushes on while it lives. Object stores
agree on no conditional write, so a taker writes its token, waits, and reads back whose token stands; a holder that finds
another's token has lost. A holder that died on this machine is known to be dead and not waited for.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vilseg import storage
from vilseg.errors import StorageError, StoreUnavailable

LOCK = "lock.json"
EXPIRY_S = 180.0
"""Longer than a store may be down, or a machine asleep, without another job taking over."""
_RENEW_S = 20.0
_RELEASE_S = 60.0
"""How long the end waits for a store that is away; the lock expires by itself."""
_SETTLE_S = 1.0
"""Between writing a token and reading it back: longer than two takers need from looking to writing."""


@dataclass(frozen=True)
class _Holder:
    token: str
    host: str
    process: str
    """Process id and the moment of its start, since ids are used again."""
    since: float
    expires: float
    """Seconds since the epoch."""


class Lease:
    """A lease held; made by :func:`lease`."""

    def __init__(self, uri: str, expiry: float, renew: float) -> None:
        self._uri = storage.join(uri, LOCK)
        self._expiry, self._renew = expiry, renew
        now = time.time()
        self._holder = _Holder(secrets.token_hex(16), _host(), _process(os.getpid()), now, now + expiry)
        self._over = threading.Event()
        self._lost: StorageError | None = None
        self._thread = threading.Thread(target=self._keep, name="vilseg-lease", daemon=True)

    def check(self) -> None:
        """Raise StorageError if another job took the output over."""
        if self._lost:
            raise self._lost

    def _take(self) -> None:
        _require_free(self._uri)
        self._write()
        time.sleep(_SETTLE_S)
        now = _read(self._uri)
        if now is None or now.token != self._holder.token:
            raise StorageError(f"another job began to write to {storage.parent(self._uri)} at the same moment")
        self._thread.start()

    def _keep(self) -> None:
        while not self._over.wait(self._renew):
            try:
                now = _read(self._uri)
                if now is not None and now.token != self._holder.token:
                    self._lost = StorageError(_taken(self._uri, now))
                    return
                self._write()
            except StoreUnavailable:
                continue  # the expiry gives it time; if another job could write meanwhile, its token will be found
            except Exception as error:  # noqa: BLE001  (told by check; the thread must not die in silence)
                self._lost = error if isinstance(error, StorageError) else StorageError(f"{self._uri}: {error}")
                return

    def _write(self) -> None:
        self._holder = replace(self._holder, expires=time.time() + self._expiry)
        storage.write_text(self._uri, json.dumps(asdict(self._holder)))

    def _end(self) -> None:
        self._over.set()
        self._thread.join()
        if self._lost is None:
            with storage.retrying(_RELEASE_S):
                self._release()

    def _release(self) -> None:
        now = _read(self._uri)
        if now is not None and now.token == self._holder.token:
            storage.delete(self._uri)


@contextmanager
def lease(uri: str, *, expiry: float = EXPIRY_S, renew: float = _RENEW_S) -> Iterator[Lease]:
    """Hold the folder ``uri`` as long as the block lasts.

    Args:
        uri: of a folder; it need not exist.
        expiry: seconds after which a holder that says nothing counts as dead.
        renew: seconds between two signs of life.

    Raises:
        StorageError: another job holds it.
    """
    held = Lease(storage.absolute(uri), expiry, renew)
    held._take()
    try:
        yield held
    finally:
        held._end()


def require_free(uri: str) -> None:
    """Raise StorageError if a job that is not known to be dead holds the folder ``uri``."""
    _require_free(storage.join(storage.absolute(uri), LOCK))


def _require_free(uri: str) -> None:
    holder = _read(uri)
    if holder and not _is_dead(holder):
        raise StorageError(_taken(uri, holder))


def _read(uri: str) -> _Holder | None:
    if not storage.exists(uri):
        return None
    try:
        return _Holder(**json.loads(storage.read_text(uri)))
    except (ValueError, TypeError) as error:
        raise StorageError(f"{uri} is not a lock of vilseg; delete it if no job writes there") from error


def _is_dead(holder: _Holder) -> bool:
    if holder.expires < time.time():
        return True
    if holder.host != _host():
        return False
    return _process(int(holder.process.partition(" ")[0])) != holder.process


def _host() -> str:
    """Identifier of the process id namespace: containers may share a machine's name, but not its processes."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process(pid: int) -> str:
    """Names a process for as long as this machine is up; only the id where the system does not tell its start."""
    try:
        # proc(5): the fields after the command, which is in brackets, begin with the third; the start is the 22nd.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{pid} {fields[19]}"
    except FileNotFoundError:
        return f"{pid} gone" if Path("/proc/self").exists() else str(pid)


def _taken(uri: str, holder: _Holder) -> str:
    since, until = (time.strftime("%H:%M:%S", time.localtime(moment)) for moment in (holder.since, holder.expires))
    return (
        f"another job (process {holder.process.partition(' ')[0]} on {holder.host.partition(' ')[0]}, since {since}) writes to "
        f"{storage.parent(uri)}; wait for it, or, if it is dead, until its lock expires at {until}"
    )
