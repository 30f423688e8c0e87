"""Functions that list, read, write and copy files on local disks and in S3 buckets.

S3 is configured by the environment variables ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``,
``AWS_REGION`` (or ``AWS_DEFAULT_REGION``), ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL`` (http or https), and
``AWS_CA_BUNDLE``. If no access key is set, credentials come from the default chain (profiles, instance roles).

S3 has keys and no folders: here, a "folder" on S3 is a prefix with at least one object under it. A function that fails raises
`StorageError` with one sentence as its message. A request to a store that does not answer raises `StoreUnavailable`; inside
`vilseg.storage.retrying`, the request is repeated before that.
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
"""Number of files copied in parallel, because copies of small files are bound by latency."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """File in a listing: its URI, its path relative to the listed folder (separated by "/"), and its size in bytes."""

    uri: str
    relative: str
    size: int
    modified_ns: int | None = None
    """Time of the last change in nanoseconds since 1970; None if the store does not report it, and always for `stream_files`."""


def filesystem(uri: str) -> tuple[FileSystem, str]:
    """Return the pyarrow filesystem of ``uri`` and the path on it, as pyarrow, Parquet and Ray expect them.

    Upload to S3 with `open_atomic` or `upload_folder`, not with `pyarrow.fs.copy_files`, because that function does not report an
    error that occurs when the upload is completed.
    """
    scheme, path = split(uri)
    return (s3.connect(s3.read_settings()), path) if scheme == "s3" else (LocalFileSystem(), absolute(path))


# --------------------------------------------------------------------------------------------------------- errors


def _failure(uri: str, action: str, error: Exception) -> StorageError:
    """Convert ``error`` to a `StorageError` of one sentence; ``action`` ("read", "write", ...) failed on ``uri``."""
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
    """Return the result of ``request``; raise its ``OSError`` as a `StorageError`, and inside `retrying` repeat it first."""

    def once() -> T:
        with _errors(uri, action):
            return request()

    return retry.call(once)


def _ask_boto(uri: str, request: Callable[[Any], Any]) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError  # here, because the import is slow and seldom needed

    def once() -> Any:
        try:
            return request(s3.boto_client(s3.read_settings()))
        except (BotoCoreError, ClientError) as error:
            raise _failure(uri, "reach", error) from error

    return retry.call(once)


def require_bucket(uri: str) -> None:
    """Raise `StorageError` if the bucket of ``uri`` is missing, refused or unreachable.

    Long jobs call this at the start, so that the error does not appear hours later.
    """
    scheme, path = split(uri)
    if scheme == "s3":
        _ask_boto(uri, lambda client: client.head_bucket(Bucket=path.partition("/")[0]))


# -------------------------------------------------------------------------------------------------------- reading


def _info(uri: str) -> FileInfo:
    fs, path = filesystem(uri)
    return _attempt(uri, "read", lambda: fs.get_file_info(path))


def _kind(uri: str) -> FileType:
    """Return the file type at ``uri``; an S3 prefix without objects under it counts as not found."""
    kind = _info(uri).type
    bucket, _, key = split(uri)[1].partition("/")
    if kind != FileType.Directory or is_local(uri) or not key:
        return kind
    # Keys that end in "/" mark folders: pyarrow leaves them behind when it deletes, and SeaweedFS lists its own.
    page = _ask_boto(uri, lambda client: client.list_objects_v2(Bucket=bucket, Prefix=f"{key}/", MaxKeys=50))
    holds_something = any(not found["Key"].endswith("/") for found in page.get("Contents", []))
    return FileType.Directory if holds_something else FileType.NotFound


def exists(uri: str) -> bool:
    """Return True if there is a file or folder at ``uri``."""
    return _kind(uri) != FileType.NotFound


def is_folder(uri: str) -> bool:
    """Return True if ``uri`` is a folder; on S3, a bucket or a prefix with at least one object under it."""
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
    """Return every file under the folder ``uri``, sorted by relative path; if ``uri`` is a file, return it whatever its suffix.

    Hidden files are skipped, that is, those with "." or "_temporary" at the start of a component of the relative path.

    Args:
        uri: URI of a folder or a file.
        suffixes: endings of the file names to return, for example ``{".jpg"}``, ignoring case; None returns all files.

    Raises:
        StorageError: there is no such folder or file, or it cannot be listed.
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
    """Yield every file under the folder ``uri``, also hidden ones, while the listing is in progress; if it is a file, yield it.

    The order is that of the store, and two listings of the same files have the same order. Inside `retrying`, a listing that
    fails because the store does not answer continues after the last file that was yielded.

    Args:
        uri: URI of a folder, which may be empty, or of a file. Local files whose names are not UTF-8 get ``file://`` URIs.
        after: relative path after which the listing starts; "" lists all files.
        prefix: prefix of the relative paths to list; "" lists all files.
        enter: function called with the relative path of each local folder; the folder is skipped if it returns False.

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

    An error while an object on S3 is read is a `StorageError`; inside `retrying`, a broken connection is first renewed at the
    same position. An error while a local file is read is an ``OSError``; see `reading`.
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
    """Open a file as `open_input` does; raise an ``OSError`` inside the block as a `StorageError`."""
    with _errors(uri, "read"), open_input(uri) as file:
        yield file


def read_bytes(uri: str) -> bytes:
    """Return the content of the file at ``uri``."""
    if is_local(uri):  # for a small file, pyarrow's streams take several times as long
        with _errors(uri, "read"), open(os.fsencode(absolute(uri)), "rb") as file:
            return file.read()
    with _open_remote(uri) as remote:  # not through pyarrow, which would copy the data, possibly gigabytes
        return remote.read()


def read_text(uri: str) -> str:
    """Return the content of the file at ``uri``, decoded as UTF-8, without a byte order mark at its start."""
    try:
        return read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StorageError(f"{uri} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


# -------------------------------------------------------------------------------------------------------- writing


def _upload(uri: str, content: bytes | memoryview | pa.Buffer) -> None:
    """Upload an object to ``uri``; it appears complete or not at all.

    pyarrow's streams cannot be aborted, because closing or dropping one publishes the bytes written so far. Therefore all bytes
    are sent in a single call, which succeeds or fails as a whole.
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
    """Open a binary file for writing; it appears at ``uri`` only when the block ends without an exception, and then complete.

    Parent folders are created. An object for S3 is written to a temporary file and uploaded when the block ends.
    """
    scheme, path = split(uri)
    if scheme == "s3":
        _require_key(uri, path)
    with tempfile.TemporaryDirectory(prefix="vilseg-") if scheme == "s3" else _folder_of(uri) as folder:
        # The name starts with a dot, so that listings skip the incomplete file.
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
    """Write ``data`` to the file at ``uri``, atomically as `open_atomic` does."""
    scheme, path = split(uri)
    if scheme == "s3":  # no temporary file, because writing it would take as long as the upload
        _require_key(uri, path)
        _upload(uri, data)
        return
    with open_atomic(uri) as file:
        file.write(data)


def write_text(uri: str, text: str) -> None:
    """Write ``text`` as UTF-8 to the file at ``uri``, atomically as `open_atomic` does."""
    write_bytes(uri, text.encode())


def delete(uri: str) -> None:
    """Delete a file, or a folder with its content; do nothing if it does not exist.

    Raises:
        StorageError: ``uri`` is a whole bucket, or cannot be deleted.
    """
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
        if not isinstance(error.__cause__, FileNotFoundError):  # another process deleted it first
            raise


# ------------------------------------------------------------------------------------------------- copies of files


def upload_folder(local: Path, uri: str) -> None:
    """Copy every file under the folder ``local`` to the same relative path under ``uri``; each appears complete or not at all."""
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
    """Yield a local path with the content of the file or folder ``uri``; a temporary copy is deleted when the block ends."""
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
        except BaseException:  # interrupts too: cancel transfers that have not begun
            pool.shutdown(cancel_futures=True)
            raise
