"""Lease on an output folder: one job at a time writes there, and a dead job does not block it forever.

The folder contains ``lock.json`` with a token and an expiry time, which the holder renews while it runs. Not all object
stores have a conditional write, so a new holder writes its token, waits, and reads back which token won. A holder that finds
another token has lost the lease. A holder whose process on the same machine has ended counts as dead before the expiry.
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
"""Seconds without renewal after which another job may take over; longer than a short outage of the store."""
_RENEW_S = 20.0
_RELEASE_S = 60.0
"""Seconds for which the release is retried if the store does not respond; after that the lock expires by itself."""
_SETTLE_S = 1.0
"""Seconds between writing a token and reading it back; longer than a competing job needs between its check and its write."""


@dataclass(frozen=True)
class _Holder:
    token: str
    host: str
    process: str
    """Process id and start time, because ids are reused."""
    since: float
    """Time of the first write, in seconds since the epoch."""
    expires: float
    """Expiry time, in seconds since the epoch."""


class Lease:
    """Lease on an output folder, held by this process and renewed in a background thread; created by :func:`lease`."""

    def __init__(self, uri: str, expiry: float, renew: float) -> None:
        self._uri = storage.join(uri, LOCK)
        self._expiry, self._renew = expiry, renew
        now = time.time()
        self._holder = _Holder(secrets.token_hex(16), _host(), _process(os.getpid()), now, now + expiry)
        self._over = threading.Event()
        self._lost: StorageError | None = None
        self._thread = threading.Thread(target=self._keep, name="vilseg-lease", daemon=True)

    def check(self) -> None:
        """Raise StorageError if another job has taken over the folder, or if the lease could not be renewed."""
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
                continue  # tolerated until the expiry; if another job wrote meanwhile, its token will be found
            except Exception as error:  # noqa: BLE001  (raised again by check; the thread must not die silently)
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
    """Hold the lease on an output folder for the duration of the ``with`` block.

    Args:
        uri: URI of the folder, which need not exist.
        expiry: seconds without renewal after which the holder counts as dead.
        renew: seconds between renewals.

    Raises:
        StorageError: another job holds the lease.
    """
    held = Lease(storage.absolute(uri), expiry, renew)
    held._take()
    try:
        yield held
    finally:
        held._end()


def require_free(uri: str) -> None:
    """Raise StorageError if a job that is not known to be dead holds the lease on the folder ``uri``."""
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
    """Return an identifier of the process id namespace, because containers may share a host name but not processes."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process(pid: int) -> str:
    """Return process id and start time; the id alone if the system has no /proc, and "<id> gone" if the process has ended."""
    try:
        # proc(5): the fields after the command, which is in parentheses, begin with the third; the start time is the 22nd.
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
