"""File on S3 open for reading, which renews a broken connection; used only inside `vilseg.storage`."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from vilseg.errors import StorageError
from vilseg.storage import retry

T = TypeVar("T")


class RemoteFile(io.RawIOBase):
    """Seekable binary file on S3 whose requests are repeated as set by the `retrying` block in which the file was opened.

    A failed request raises `StorageError` and not ``OSError``, so that callers who treat an ``OSError`` of a decoder as a damaged
    file do not take an unavailable store for one.

    Args:
        connect: function that opens a connection to the file.
        failure: function that converts an ``OSError`` of the connection to the error to raise.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, connect: Callable[[], pa.NativeFile], failure: Callable[[OSError], StorageError]) -> None:
        self._connect, self._failure = connect, failure
        self._seconds = retry.retry_seconds()  # stored here, because decoders read in other threads
        self._connection: pa.NativeFile | None = None
        self._position = 0
        self._size = self._request(lambda connection: connection.size())

    def _request(self, action: Callable[[pa.NativeFile], T]) -> T:
        def once() -> T:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                return action(self._connection)
            except OSError as error:
                self._connection = None
                raise self._failure(error) from error

        return retry.call(once, self._seconds)

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to ``size`` bytes from the current position on; all remaining bytes if ``size`` is negative or None."""
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._request(lambda connection: connection.read_at(wanted, self._position)) if wanted else b""
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to ``offset``, counted from the start, the current position or the end (``whence``); return the new position."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the current position in bytes."""
        return self._position

    def readable(self) -> bool:
        """Return True, because the file can be read."""
        return True

    def seekable(self) -> bool:
        """Return True, because the position can be changed."""
        return True

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        super().close()
