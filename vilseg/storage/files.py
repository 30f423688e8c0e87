"""The one place that turns a URI into a filesystem: list, read, write and copy files, local or on S3.

A URI is a plain path, ``file:///path`` or ``s3://bucket/key``; results are plain paths or ``s3://`` URIs. S3 is taken
from the environment: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION`` (or
``AWS_DEFAULT_REGION``), ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL`` (http or https), ``AWS_CA_BUNDLE``; without
keys, from the default credential chain (profiles, instance roles).

On S3 there are no folders, only keys: a "folder" is a prefix under which at least one object lies. What a function here
cannot do is a `StorageError` of one sentence; only a stream that was handed out raises plain ``OSError`` later.
"""

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_to_bytes

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from vilseg.errors import DiskFullError, StorageError
from vilseg.storage import local, s3

# Small files are bound by latency, so several travel at once.
TRANSFERS_AT_ONCE = 8

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class FileEntry:
    """One file of `list_files`: its URI, its path below the listed folder ("/" between parts), its size in bytes."""

    uri: str
    relative: str
    size: int
    modified_ns: int | None = None
    """When it was last written, in nanoseconds since 1970; None where the store does not say, and of `stream_files`."""


# ---------------------------------------------------------------------------------------------------------- URIs


def _split(uri: str) -> tuple[str, str]:
    """``("file", path as given)`` or ``("s3", "bucket/key")``."""
    match = _SCHEME.match(uri)
    if match is None:
        if not uri:
            raise StorageError("an empty text is not a path or URI: give a path, file:///path or s3://bucket/key")
        return "file", uri
    scheme, rest = match.group(1).lower(), uri[match.end() :]
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise StorageError(f"{uri}: a file URI has three slashes and an absolute path, as in file:///data/pairs")
        return "file", os.fsdecode(unquote_to_bytes(slash + path))
    if scheme != "s3":
        raise StorageError(f"{uri}: {scheme}:// is not supported; give a plain path, file:///path or s3://bucket/key")
    path = rest.strip("/")
    if not path or "//" in path:
        problem = "has an empty part" if path else "names no bucket"
        raise StorageError(f"{uri} {problem}: an object's URI reads s3://bucket/key")
    return "s3", path


def filesystem(uri: str) -> tuple[FileSystem, str]:
    """The filesystem of ``uri`` and the path on it, fit for pyarrow, Parquet and Ray.

    Upload to S3 through `open_atomic` or `upload_folder` rather than `pyarrow.fs.copy_files`: that one does not report
    an error that appears while the upload is completed.
    """
    scheme, path = _split(uri)
    return (s3.connect(s3.read_settings()), path) if scheme == "s3" else (LocalFileSystem(), absolute(path))


def is_local(uri: str) -> bool:
    """Whether ``uri`` is a path on this machine."""
    return _split(uri)[0] == "file"


def absolute(uri: str) -> str:
    """``uri`` so that it means the same in another process: local paths absolute and with ``~`` expanded."""
    scheme, path = _split(uri)
    return f"s3://{path}" if scheme == "s3" else os.path.abspath(os.path.expanduser(path))


def join(uri: str, *parts: str) -> str:
    """The URI of ``parts`` below ``uri``; a leading slash of a part does not lead out of it."""
    scheme, path = _split(uri)
    below = [part.strip("/") for part in parts if part.strip("/")]
    return "/".join([f"s3://{path}", *below]) if scheme == "s3" else os.path.join(path, *below)


def name(uri: str) -> str:
    """The last part of ``uri``: ``"demo"`` of ``runs/demo/``."""
    return os.path.basename(absolute(uri))


def parent(uri: str) -> str:
    """``uri`` without its last part; a bucket and the root are their own parents."""
    full = absolute(uri)
    return full if full.startswith("s3://") and full.count("/") == 2 else os.path.dirname(full)


def overlap(one: str, other: str) -> bool:
    """Whether two URIs are the same or one lies below the other; links are not followed."""
    one, other = (f"{absolute(uri).rstrip('/')}/" for uri in (one, other))
    return one.startswith(other) or other.startswith(one)


# --------------------------------------------------------------------------------------------------------- errors


def _failure(uri: str, action: str, error: Exception) -> StorageError:
    """``error`` as one sentence; ``action`` is the verb for what was tried on ``uri``: "read", "write", ..."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = "" if is_local(uri) else " for its temporary copy (TMPDIR chooses another folder)"
        return DiskFullError(f"cannot {action} {uri}: no space is left on the disk{where}")
    if is_local(uri):
        return StorageError(local.sentence(uri, absolute(uri), action, error))
    return s3.failure(uri, _split(uri)[1], action, error)


@contextmanager
def _errors(uri: str, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failure(uri, action, error) from error


def _ask_boto(uri: str, question: Callable[[Any], Any]) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError  # as slow as boto3, and needed by few

    try:
        return question(s3.boto_client(s3.read_settings()))
    except (BotoCoreError, ClientError) as error:
        raise _failure(uri, "reach", error) from error


def require_bucket(uri: str) -> None:
    """Raise `StorageError` now, not hours into a job, if the bucket of ``uri`` is missing, refused or unreachable."""
    scheme, path = _split(uri)
    if scheme == "s3":
        _ask_boto(uri, lambda client: client.head_bucket(Bucket=path.partition("/")[0]))


# -------------------------------------------------------------------------------------------------------- reading


def _info(uri: str) -> FileInfo:
    fs, path = filesystem(uri)
    with _errors(uri, "read"):
        return fs.get_file_info(path)


def _kind(uri: str) -> FileType:
    """What is there; an S3 prefix under which no object lies counts as nothing."""
    kind = _info(uri).type
    bucket, _, key = _split(uri)[1].partition("/")
    if kind != FileType.Directory or is_local(uri) or not key:
        return kind
    # Keys that end in "/" mark folders; pyarrow leaves them where it deletes, and SeaweedFS shows its own.
    page = _ask_boto(uri, lambda client: client.list_objects_v2(Bucket=bucket, Prefix=f"{key}/", MaxKeys=50))
    holds_something = any(not found["Key"].endswith("/") for found in page.get("Contents", []))
    return FileType.Directory if holds_something else FileType.NotFound


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    return _kind(uri) != FileType.NotFound


def is_folder(uri: str) -> bool:
    """Whether ``uri`` is a folder; on S3 a bucket, or a prefix under which at least one object lies."""
    return _kind(uri) == FileType.Directory


def _walk(uri: str) -> list[FileEntry]:
    """Every file under ``uri``, or the file itself; sorted by relative path."""
    fs, path = filesystem(uri)
    info = _info(uri)
    if info.type == FileType.File:
        return [FileEntry(absolute(uri), name(uri), info.size, info.mtime_ns)]
    root = absolute(uri)
    start = len(path.rstrip("/")) + 1
    with _errors(uri, "list"):
        if info.type == FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", uri)
        found = fs.get_file_info(FileSelector(path, recursive=True))
        files = [(entry.path[start:], entry.size, entry.mtime_ns) for entry in found if entry.type == FileType.File]
        if not files and not is_local(uri) and "/" in path:
            raise FileNotFoundError(errno.ENOENT, "no object lies under this prefix", uri)
    return [
        FileEntry(join(root, relative), relative, size, modified_ns) for relative, size, modified_ns in sorted(files)
    ]


def list_files(uri: str, suffixes: Collection[str] | None = None) -> list[FileEntry]:
    """Every file under the folder ``uri``, sorted by relative path; of a file, that file alone whatever its suffix.

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
    """Every file under the folder ``uri``, hidden ones too, while it is being listed; of a file, that file alone.

    The order is the store's own and the same each time: ``after``, the relative path of the last file seen, goes on with
    a listing that broke. A folder without files gives none; one that cannot be listed is a `StorageError`. ``prefix``
    keeps the relative paths that begin so. ``enter`` is asked for the relative paths of local folders. The URI of a local
    name that is not UTF-8 is a ``file://`` URI.
    """
    info, root = _info(uri), absolute(uri)
    if info.type == FileType.File:
        yield FileEntry(root, name(uri), info.size)
        return
    try:
        found = local.walk(root, after, enter) if is_local(uri) else s3.list_keys(uri, root[5:], after, prefix)
        for relative, size in found:
            if relative.startswith(prefix):
                yield FileEntry(local.portable(f"{root.rstrip('/')}/{relative}"), relative, size)
    except OSError as error:
        raise _failure(error.filename or uri, "list", error) from error


def open_input(uri: str) -> pa.NativeFile:
    """A seekable binary file; close it, or use it in a ``with`` statement."""
    fs, path = filesystem(uri)
    with _errors(uri, "read"):
        return fs.open_input_file(os.fsencode(path))  # names on disk are bytes, and not always UTF-8


@contextmanager
def reading(uri: str) -> Iterator[pa.NativeFile]:
    """`open_input`, with what fails on the way as a `StorageError` too."""
    with _errors(uri, "read"), open_input(uri) as file:
        yield file


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    if is_local(uri):  # of a small file pyarrow's streams would take several times as long
        with _errors(uri, "read"), open(os.fsencode(absolute(uri)), "rb") as local:
            return local.read()
    with reading(uri) as file:
        return file.read()


def read_text(uri: str) -> str:
    """The whole file as UTF-8 text, without the byte order mark that some editors put at its start."""
    try:
        return read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StorageError(f"{uri} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


# -------------------------------------------------------------------------------------------------------- writing


def _upload(content: bytes | memoryview | pa.Buffer, path: str) -> None:
    """Put an object at ``path`` ("bucket/key") on S3; it appears whole or not at all.

    pyarrow's streams cannot be aborted: closed or forgotten, they publish what was written so far. So the bytes go
    over in a single call, which fails as a whole.
    """
    with s3.connect(s3.read_settings(), for_upload=True).open_output_stream(path) as stream:
        stream.write(content)


def _upload_file(file: Path, path: str) -> None:
    with pa.memory_map(str(file)) as source:
        _upload(source.read_buffer(), path)


def _require_key(uri: str, path: str) -> None:
    if "/" not in path:
        raise StorageError(f"cannot write {uri}: it names a bucket and no key; an object's URI reads s3://bucket/key")


@contextmanager
def open_atomic(uri: str) -> Iterator[IO[bytes]]:
    """A binary file to write that appears under its name, whole, only if the block ends without an exception.

    Parent folders are made. An object for S3 is collected in a temporary file and sent when the block ends.
    """
    scheme, path = _split(uri)
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
            with _errors(uri, "write"):
                if scheme == "s3":
                    _upload_file(partial, path)
                else:
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
    scheme, path = _split(uri)
    if scheme == "s3":  # no temporary file: of a small object it would take as long as sending it
        _require_key(uri, path)
        with _errors(uri, "write"):
            _upload(data, path)
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
    try:
        with _errors(uri, "delete"):
            if is_local(uri) and os.path.islink(path):
                os.unlink(path)
            elif kind == FileType.File:
                fs.delete_file(path)
            elif kind == FileType.Directory:
                fs.delete_dir(path)
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
            with _errors(target, "write"):
                _upload_file(Path(entry.uri), _split(target)[1])

    _for_each(send, _walk(str(local)))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A path with the content of the file or folder ``uri``: itself if local, else a copy that ends with the block."""
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
    with ThreadPoolExecutor(TRANSFERS_AT_ONCE) as pool:
        transfers = [pool.submit(work, entry) for entry in files]
        try:
            for transfer in transfers:
                transfer.result()
        except BaseException:  # an interrupt as well: what has not begun would fail as slowly, file by file
            pool.shutdown(cancel_futures=True)
            raise
