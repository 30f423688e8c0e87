"""Files on local disks and in S3 buckets behind one set of functions: list, read, write, copy.

S3 is taken from the environment: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION`` (or
``AWS_DEFAULT_REGION``), ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL`` (http or https), ``AWS_CA_BUNDLE``; without keys, from
the default credential chain (profiles, instance roles).

On S3 there are no folders, only keys: a "folder" is a prefix under which at least one object lies. A function that fails raises
`StorageError` with one sentence. A request to a store that does not answer raises `StoreUnavailable`; inside
`vilseg.storage.retrying` it is repeated first.
"""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from vilseg.errors import DiskFullError, StorageError
from vilseg.storage import local, retry, s3
from vilseg.storage.remote_file import RemoteFile
from vilseg.storage.uri import absolute, is_local, join, name, split

TRANSFERS_AT_ONCE = 8
"""Files copied at the same time: small ones are bound by latency."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """One file of `list_files`: its URI, its path below the listed folder ("/" between parts), its size in bytes."""

    uri: str
    relative: str
    size: int
    modified_ns: int | None = None
    """When it was last written, in nanoseconds since 1970; None where the store does not say, and of `stream_files`."""


def filesystem(uri: str) -> tuple[FileSystem, str]:
    """Return the filesystem of ``uri`` and the path on it, fit for pyarrow, Parquet and Ray.

    Upload to S3 through `open_atomic` or `upload_folder` rather than `pyarrow.fs.copy_files`: that one does not report
    an error that appears while the upload is completed.
    """
    scheme, path = split(uri)
    return (s3.connect(s3.read_settings()), path) if scheme == "s3" else (LocalFileSystem(), absolute(path))


# --------------------------------------------------------------------------------------------------------- errors


def _failure(uri: str, action: str, error: Exception) -> StorageError:
    """Return ``error`` as one sentence; ``action`` is the verb for what was tried on ``uri``: "read", "write", ..."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = "" if is_local(uri) else " for its temporary copy (TMPDIR chooses another folder)"
        return DiskFullError(f"cannot {action} {uri}: no space is left on the disk{where}")
    if is_local(uri):
        return StorageError(local.sentence(uri, absolute(uri), action, error))
    return s3.failure(uri, split(uri)[1], action, error)


@contextmanager
def _errors(uri: str, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failure(uri, action, error) from error


def _attempt(uri: str, action: str, request: Callable[[], T]) -> T:
    """Return the result of ``request``, with its ``OSError`` as a `StorageError`; inside `retrying`, repeat it while the store is
    away."""

    def once() -> T:
        with _errors(uri, action):
            return request()

    return retry.call(once)


def _ask_boto(uri: str, request: Callable[[Any], Any]) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError  # as slow as boto3, and needed by few

    def once() -> Any:
        try:
            return request(s3.boto_client(s3.read_settings()))
        except (BotoCoreError, ClientError) as error:
            raise _failure(uri, "reach", error) from error

    return retry.call(once)


def require_bucket(uri: str) -> None:
    """Raise `StorageError` now, not hours into a job, if the bucket of ``uri`` is missing, refused or unreachable."""
    scheme, path = split(uri)
    if scheme == "s3":
        _ask_boto(uri, lambda client: client.head_bucket(Bucket=path.partition("/")[0]))


# -------------------------------------------------------------------------------------------------------- reading


def _info(uri: str) -> FileInfo:
    fs, path = filesystem(uri)
    return _attempt(uri, "read", lambda: fs.get_file_info(path))


def _kind(uri: str) -> FileType:
    """Return the kind of what is there; an S3 prefix under which no object lies counts as nothing."""
    kind = _info(uri).type
    bucket, _, key = split(uri)[1].partition("/")
    if kind != FileType.Directory or is_local(uri) or not key:
        return kind
    # Keys that end in "/" mark folders; pyarrow leaves them where it deletes, and SeaweedFS shows its own.
    page = _ask_boto(uri, lambda client: client.list_objects_v2(Bucket=bucket, Prefix=f"{key}/", MaxKeys=50))
    holds_something = any(not found["Key"].endswith("/") for found in page.get("Contents", []))
    return FileType.Directory if holds_something else FileType.NotFound


def exists(uri: str) -> bool:
    """Return True if a file or folder is there."""
    return _kind(uri) != FileType.NotFound


def is_folder(uri: str) -> bool:
    """Return True if ``uri`` is a folder; on S3 a bucket, or a prefix under which at least one object lies."""
    return _kind(uri) == FileType.Directory


def _walk(uri: str) -> list[FileEntry]:
    """Return every file under ``uri``, or the file itself; sorted by relative path."""
    fs, path = filesystem(uri)
    info = _info(uri)
    if info.type == FileType.File:
        return [FileEntry(absolute(uri), name(uri), info.size, info.mtime_ns)]
    root = absolute(uri)
    start = len(path.rstrip("/")) + 1
    with _errors(uri, "list"):
        if info.type == FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", uri)
        found = _attempt(uri, "list", lambda: fs.get_file_info(FileSelector(path, recursive=True)))
        files = [(entry.path[start:], entry.size, entry.mtime_ns) for entry in found if entry.type == FileType.File]
        if not files and not is_local(uri) and "/" in path:
            raise FileNotFoundError(errno.ENOENT, "no object lies under this prefix", uri)
    return [
        FileEntry(join(root, relative), relative, size, modified_ns) for relative, size, modified_ns in sorted(files)
    ]


def list_files(uri: str, suffixes: Collection[str] | None = None) -> list[FileEntry]:
    """Return every file under the folder ``uri``, sorted by relative path; for a file, that file alone whatever its suffix.

    Hidden files are skipped: a part of the relative path starts with "." or "_temporary". ``suffixes`` (``{".jpg"}``)
    match the end of the name, upper or lower case. A folder that is not there is a `StorageError`.
    """
    files = _walk(uri)
    if len(files) == 1 and files[0].uri == absolute(uri):
        return files
    endings = None if suffixes is None else tuple(suffix.lower() for suffix in suffixes)
    return [
        entry
        for entry in files
        if not any(part.startswith((".", "_temporary")) for part in entry.relative.split("/"))
        and (endings is None or entry.relative.lower().endswith(endings))
    ]


def stream_files(
    uri: str, *, after: str = "", prefix: str = "", enter: Callable[[str], bool] = lambda folder: True
) -> Iterator[FileEntry]:
    """Yield every file under the folder ``uri``, hidden ones too, while it is being listed; for a file, that file alone.

    The order is the store's own and the same each time. A listing that breaks because the store does not answer goes on after the
    last file given, inside `retrying`.

    Args:
        uri: of a folder, which may be empty, or of a file. The URI of a local name that is not UTF-8 is a ``file://`` URI.
        after: only files that come after this relative path.
        prefix: only files whose relative path begins so.
        enter: called with the relative path of each local folder; False skips it.

    Raises:
        StorageError: a folder cannot be listed.
    """
    info, root = _info(uri), absolute(uri)
    if info.type == FileType.File:
        yield FileEntry(root, name(uri), info.size)
        return

    def begin(last: FileEntry | None) -> Iterator[FileEntry]:
        start = last.relative if last else after
        try:
            found = local.walk(root, start, enter) if is_local(uri) else s3.list_keys(uri, root[5:], start, prefix)
            for relative, size in found:
                if relative.startswith(prefix):
                    yield FileEntry(local.portable(f"{root.rstrip('/')}/{relative}"), relative, size)
        except OSError as error:
            raise _failure(error.filename or uri, "list", error) from error

    yield from retry.resume(begin)


def open_input(uri: str) -> pa.NativeFile:
    """Open a file for reading; close it, or use it in a ``with`` statement.

    What fails while an object on S3 is read is a `StorageError`; inside `retrying` its connection is renewed where it broke. For
    a local file it is an ``OSError``, see `reading`.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        return _attempt(
            uri, "read", lambda: fs.open_input_file(os.fsencode(path))
        )  # names on disk are bytes, not always UTF-8
    return pa.PythonFile(_open_remote(uri), mode="r")


def _open_remote(uri: str) -> RemoteFile:
    fs, path = filesystem(uri)
    return RemoteFile(lambda: fs.open_input_file(path), lambda error: _failure(uri, "read", error))


@contextmanager
def reading(uri: str) -> Iterator[pa.NativeFile]:
    """Open a file as `open_input` does; whatever fails while it is read or decoded in the block is a `StorageError`."""
    with _errors(uri, "read"), open_input(uri) as file:
        yield file


def read_bytes(uri: str) -> bytes:
    """Return the whole file."""
    if is_local(uri):  # of a small file pyarrow's streams would take several times as long
        with _errors(uri, "read"), open(os.fsencode(absolute(uri)), "rb") as file:
            return file.read()
    with _open_remote(uri) as remote:  # not through pyarrow, which would copy what may be gigabytes
        return remote.read()


def read_text(uri: str) -> str:
    """Return the whole file as UTF-8 text, without the byte order mark that some editors put at its start."""
    try:
        return read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StorageError(f"{uri} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


# -------------------------------------------------------------------------------------------------------- writing


def _upload(uri: str, content: bytes | memoryview | pa.Buffer) -> None:
    """Put an object at ``uri``; it appears whole or not at all.

    pyarrow's streams cannot be aborted: closed or forgotten, they publish what was written so far. So the bytes go over in a
    single call, which fails as a whole.
    """
    path = split(uri)[1]

    def put() -> None:
        with s3.connect(s3.read_settings(), for_upload=True).open_output_stream(path) as stream:
            stream.write(content)

    _attempt(uri, "write", put)


def _upload_file(uri: str, file: Path) -> None:
    with _errors(uri, "write"), pa.memory_map(str(file)) as source:
        _upload(uri, source.read_buffer())


def _require_key(uri: str, path: str) -> None:
    if "/" not in path:
        raise StorageError(f"cannot write {uri}: it names a bucket and no key; an object's URI reads s3://bucket/key")


@contextmanager
def open_atomic(uri: str) -> Iterator[IO[bytes]]:
    """Open a binary file to write that appears under its name, whole, only if the block ends without an exception.

    Parent folders are made. An object for S3 is collected in a temporary file and sent when the block ends.
    """
    scheme, path = split(uri)
    if scheme == "s3":
        _require_key(uri, path)
    with tempfile.TemporaryDirectory(prefix="vilseg-") if scheme == "s3" else _folder_of(uri) as folder:
        # The name starts with a dot, so that a listing does not show a file half written.
        partial = Path(folder) / f".{secrets.token_hex(8)}.partial"
        try:
            with _errors(uri, "write"):
                stream = partial.open("xb")
            with stream:
                try:
                    yield stream
                except OSError as error:
                    if error.errno in _DISK_FULL:
                        raise _failure(uri, "write", error) from error
                    raise
                with _errors(uri, "write"):
                    stream.flush()
                    if scheme == "file":
                        os.fsync(stream.fileno())
            if scheme == "s3":
                _upload_file(uri, partial)
            else:
                with _errors(uri, "write"):
                    os.replace(partial, absolute(uri))
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _folder_of(uri: str) -> Iterator[str]:
    folder = os.path.dirname(absolute(uri))
    with _errors(uri, "write"):
        os.makedirs(folder, exist_ok=True)
    yield folder


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write the whole file, atomically as `open_atomic` does."""
    scheme, path = split(uri)
    if scheme == "s3":  # no temporary file: of a small object it would take as long as sending it
        _require_key(uri, path)
        _upload(uri, data)
        return
    with open_atomic(uri) as file:
        file.write(data)


def write_text(uri: str, text: str) -> None:
    """Write the whole file as UTF-8, atomically as `open_atomic` does."""
    write_bytes(uri, text.encode())


def delete(uri: str) -> None:
    """Delete a file, or a folder with all it holds; what is missing is fine. A bucket is never deleted."""
    fs, path = filesystem(uri)
    if not is_local(uri) and "/" not in path:
        raise StorageError(f"cannot delete {uri}: it is a whole bucket; name a key in it")
    kind = _info(uri).type

    def remove() -> None:
        if is_local(uri) and os.path.islink(path):
            os.unlink(path)
        elif kind == FileType.File:
            fs.delete_file(path)
        elif kind == FileType.Directory:
            fs.delete_dir(path)

    try:
        _attempt(uri, "delete", remove)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):  # another process was faster
            raise


# ------------------------------------------------------------------------------------------------- copies of files


def upload_folder(local: Path, uri: str) -> None:
    """Copy every file under the folder ``local`` to the same place below ``uri``; each appears whole or not at all."""
    if not local.is_dir():
        raise StorageError(f"cannot upload {local}: it is not a folder")

    def send(entry: FileEntry) -> None:
        target = join(uri, entry.relative)
        if is_local(uri):
            with open_input(entry.uri) as source, open_atomic(target) as stream:
                shutil.copyfileobj(source, stream, 1 << 20)
        else:
            _upload_file(target, Path(entry.uri))

    _for_each(send, _walk(str(local)))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Give a path with the content of the file or folder ``uri``: itself if local, else a copy that ends with the block."""
    if is_local(uri):
        if not exists(uri):
            raise StorageError(f"{uri} does not exist")
        yield Path(absolute(uri))
        return
    files = _walk(uri)
    single = [entry.uri for entry in files] == [absolute(uri)]
    with tempfile.TemporaryDirectory(prefix="vilseg-") as folder:
        root = Path(folder) / name(uri)

        def fetch(entry: FileEntry) -> None:
            if ".." in entry.relative.split("/"):
                raise StorageError(f"cannot copy {entry.uri}: '..' in its key would lead out of the folder")
            target = root if single else root / entry.relative
            with _errors(entry.uri, "read"), open_input(entry.uri) as source:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as stream:
                    shutil.copyfileobj(source, stream, 4 << 20)

        _for_each(fetch, files)
        yield root


def _for_each(work: Callable[[FileEntry], None], files: list[FileEntry]) -> None:
    with retry.ThreadPool(TRANSFERS_AT_ONCE) as pool:
        transfers = [pool.submit(work, entry) for entry in files]
        try:
            for transfer in transfers:
                transfer.result()
        except BaseException:  # an interrupt as well: what has not begun would fail as slowly, file by file
            pool.shutdown(cancel_futures=True)
            raise
