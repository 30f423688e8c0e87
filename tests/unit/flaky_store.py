"""An S3 store made of a local folder, which can be away for some requests; stands in for connections of `vilseg.storage.s3`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
from botocore.exceptions import EndpointConnectionError
from pyarrow.fs import FileInfo, FileSelector, LocalFileSystem, SubTreeFileSystem

_AWAY = "When reading: AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7, Couldn't connect to server"


class FlakyStore:
    """A filesystem as `vilseg.storage` uses it; buckets are folders below ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = SubTreeFileSystem(str(root), LocalFileSystem())
        self._away = 0
        self.opened: list[str] = []
        """Paths of files opened for reading, in order."""

    def away(self, requests: int) -> None:
        """Let the next ``requests`` requests fail as those to a server that is down."""
        assert not self._away, "the failures asked for before were not met"
        self._away = requests

    def request(self) -> None:
        """Fail if the store is away."""
        if self._away:
            self._away -= 1
            raise OSError(_AWAY)

    def get_file_info(self, what: str | FileSelector) -> FileInfo | list[FileInfo]:
        self.request()
        return self._files.get_file_info(what)

    def open_input_file(self, path: str) -> _FlakyFile:
        self.request()
        self.opened.append(path)
        return _FlakyFile(self, self._files.open_input_file(path))

    def open_output_stream(self, path: str) -> pa.NativeFile:
        self.request()
        os.makedirs(self._root / os.path.dirname(path), exist_ok=True)
        return self._files.open_output_stream(path)

    def list_objects_v2(self, *, Bucket: str, Prefix: str, MaxKeys: int) -> dict[str, Any]:
        """Answer as boto3's client does, in one page."""
        if self._away:
            self._away -= 1
            raise EndpointConnectionError(endpoint_url="http://store")
        bucket = self._root / Bucket
        keys = sorted(path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file())
        return {"Contents": [{"Key": key} for key in keys if key.startswith(Prefix)][:MaxKeys]}

    def delete_file(self, path: str) -> None:
        self.request()
        self._files.delete_file(path)


class _FlakyFile:
    def __init__(self, store: FlakyStore, file: pa.NativeFile) -> None:
        self._store, self._file = store, file

    def read_at(self, size: int, offset: int) -> bytes:
        self._store.request()
        return self._file.read_at(size, offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
