"""A file on S3 open for reading, whose connection is renewed where it broke; used by `vilseg.storage` alone."""

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
    """A seekable binary file that waits for its store as the `retrying` says that encloses its opening.

    A failed request raises `StorageError` here, while ``OSError`` is left to whoever decodes the bytes: a store that is away is
    not taken for a damaged file.

    Args:
        connect: opens the file at its start.
        failure: turns an ``OSError`` of the connection into the error to raise.

    Raises:
        StorageError: it cannot be opened.
    """

    def __init__(self, connect: Callable[[], pa.NativeFile], failure: Callable[[OSError], StorageError]) -> None:
        self._connect, self._failure = connect, failure
        self._seconds = retry.retry_seconds()  # decoders read in threads of their own
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
        """Return up to ``size`` bytes from the present position on; all that follow where it is negative or None."""
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._request(lambda connection: connection.read_at(wanted, self._position)) if wanted else b""
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to ``offset`` from the start, the present position or the end; return the new position."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the present position."""
        return self._position

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        super().close()
