"""Inputs of bulk segmentation: single images and videos, and containers (tar and Parquet files) with many of them."""

from __future__ import annotations

import io
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from posixpath import splitext
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vilseg import storage
from vilseg.bulk.file_types import is_tried, is_video
from vilseg.config.data import ColumnsConfig
from vilseg.data.shards import PARQUET, TAR
from vilseg.errors import DataError, StoreUnavailable
from vilseg.ingest.caption_files import split_image
from vilseg.ingest.image_files import resolve

_BUFFER = 4 << 20
_BLOCK = tarfile.BLOCKSIZE
_ROWS = 4
"""Number of rows of a Parquet file in memory at a time; an image may have many megabytes."""
_MAX_MEMBER = 1 << 30
"""Maximum bytes of a tar member, because members are read into memory."""
_NAMELESS = "_"
_INSTEAD_OF_ZERO = 0x9E37_79B9_7F4A_7C15
"""Replacement for the hash 0, which marks a free slot."""


@dataclass(frozen=True, slots=True)
class Input:
    """One image or video to be segmented."""

    name: str
    """Path relative to the listed folder, made safe by `safe_name`. The mask is written to ``masks/<name>.png``."""
    uri: str
    """URI of the file; for a member of a container, URI of the container."""
    size: int | None = None
    """Size in bytes; None if unknown."""
    data: bytes | None = field(default=None, repr=False)
    """Content of a member of a container; None for a file of its own."""
    problem: str | None = None
    """Reason why the input cannot be read; None if no problem is known yet."""

    @property
    def kind(self) -> Literal["image", "video"]:
        """Kind according to the suffix; everything except videos is decoded as an image."""
        return "video" if is_video(self.name if self.data is not None else self.uri) else "image"

    def read(self) -> bytes:
        """Read the whole file.

        Raises:
            DataError: the input has a `problem`.
            StorageError: the file cannot be read.
        """
        if self.problem is not None:
            raise DataError(self.problem)
        return storage.read_bytes(self.uri) if self.data is None else self.data


@dataclass(frozen=True, slots=True)
class Container:
    """Tar or Parquet file with many inputs."""

    name: str
    """Path relative to the listed folder; prefix of the names of the members."""
    uri: str
    size: int | None = None
    """Size in bytes; None if unknown."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Names of the columns of a Parquet file."""

    def inputs(self) -> Iterator[Input]:
        """Yield the members of a tar or the rows of a Parquet file in stored order, reading the file once.

        Memory holds one member of a tar, or a few rows of a Parquet file with their pages.

        The name of a tar member is ``<name>/<member>``; that of a row ``<name>/<key>``, or ``<name>/<8-digit row number>`` if
        there is no key. The second and later inputs of the same name get the number of their member or row appended.

        Raises:
            DataError: the file is damaged (raised after the inputs before the damage), or has no column of images.
            StorageError: the file cannot be read, or the connection broke.
        """
        taken = Hashes()
        members = _parquet_rows(self) if self.uri.lower().endswith(PARQUET) else _tar_members(self)
        for number, member in enumerate(members):
            name = f"{self.name}/{safe_name(member.name)}"
            stem, suffix = splitext(name)
            while not taken.add(hash(name)):
                name = stem = f"{stem}-{number:08d}"
                name += suffix
            yield replace(member, name=name)


class Hashes:
    """Set of 64-bit hashes in a hash table of 16 to 40 bytes per element, a fifth of the memory of a ``set``."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 10))
        self._count = 0

    def add(self, value: int) -> bool:
        """Add ``value`` (its lowest 64 bits) and return whether it was new."""
        if not self._place((value & 0xFFFF_FFFF_FFFF_FFFF) or _INSTEAD_OF_ZERO):
            return False
        self._count += 1
        if 2 * self._count > len(self._slots):
            values, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for known in values:
                if known:
                    self._place(known)
        return True

    def _place(self, value: int) -> bool:
        slots, mask = self._slots, len(self._slots) - 1
        slot = value & mask
        while slots[slot]:
            if slots[slot] == value:
                return False
            slot = (slot + 1) & mask
        slots[slot] = value
        return True


def safe_name(text: str) -> str:
    """Return ``text`` as a relative path that stays inside its folder, with invalid parts percent-encoded.

    Encoded are "." and ".." as path components, a slash at the start or end or after another slash, NUL, and bytes that are
    not UTF-8 (surrogates in Python strings). Everything else is unchanged.
    """
    while text.startswith("./"):  # `tar c .` writes all names with this prefix
        text = text[2:]
    text = re.sub(r"[\0\udc80-\udcff]", lambda match: f"%{ord(match.group()) & 0xFF:02X}", text)
    text = re.sub(r"(?:^|(?<=/))/|/\Z", "%2F", text)
    return re.sub(r"(?:^|(?<=/))\.{1,2}(?=/|\Z)", lambda match: "%2E" * len(match.group()), text) or _NAMELESS


def _tar_members(container: Container) -> Iterator[Input]:
    uri, last = container.uri, ""
    try:
        with (
            storage.open_input(uri) as file,
            tarfile.open(fileobj=io.BufferedReader(file, _BUFFER), mode="r|") as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise every header stays in memory
                if member.isfile() and is_tried(member.name) and not member.name.lower().endswith((TAR, PARQUET)):
                    if member.size > _MAX_MEMBER:
                        problem = f"it has {member.size:,} bytes inside {uri}, more than the limit of {_MAX_MEMBER:,}: unpack it"
                        yield Input(member.name, uri, member.size, problem=problem)
                    else:
                        data = tar.extractfile(member)
                        assert data is not None
                        yield Input(member.name, uri, member.size, data.read())
                last = member.name
            # tarfile treats an unreadable header and the end of a truncated file as the end of the archive, so check both.
            file.seek(tar.offset)
            end = file.read(_BLOCK)
            if len(end) < _BLOCK or any(end):
                raise tarfile.ReadError(
                    "it ends without the mark that ends a tar file" if not end else "no header follows"
                )
    except StoreUnavailable as error:
        raise _broken_off(uri, f"after {safe_name(last)}" if last else "at its start", error) from error
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise _damage(uri, f"after {safe_name(last)}" if last else "at its start", error) from error


def _parquet_rows(container: Container) -> Iterator[Input]:
    uri, columns, row = container.uri, container.columns, 0
    try:
        # With these settings pages are read when they are needed, not a whole row group at once.
        with storage.open_input(uri) as source, pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False) as file:
            names = file.schema_arrow.names
            image_column = split_image({name: name for name in names}, columns)[0]
            if image_column is None:
                raise DataError(
                    f"{uri} has no column of pictures or of their paths, only {', '.join(names)}; "
                    f"name it {columns.image} or {columns.path}"
                )
            wanted = [name for name in (image_column, columns.path, columns.key) if name in names]
            for batch in file.iter_batches(batch_size=_ROWS, columns=list(dict.fromkeys(wanted))):
                for index in range(batch.num_rows):  # not to_pylist, which would copy all rows at once
                    values = {name: batch[name][index].as_py() for name in batch.schema.names}
                    yield _of_row(uri, row, values.get(columns.key), values[image_column] or values.get(columns.path))
                    row += 1
    except StoreUnavailable as error:
        raise _broken_off(uri, f"from row {row} on", error) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damage(uri, f"from row {row} on", error) from error


def _of_row(uri: str, row: int, key: Any, image: Any) -> Input:
    name = f"{row:08d}" if key in (None, "") else str(key)
    if isinstance(image, dict):  # format of Hugging Face datasets
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return Input(name, uri, len(image), image)
    if isinstance(image, str) and image:
        absolute = "://" in image or image.startswith("/")
        return Input(name, image if absolute else resolve(storage.parent(uri), image))
    return Input(name, uri, problem=f"row {row} of {uri} has no picture")


def _broken_off(uri: str, where: str, error: StoreUnavailable) -> StoreUnavailable:
    return StoreUnavailable(f"the connection broke while {uri} was read ({where}): {error}")


def _damage(uri: str, where: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{uri} is damaged and cannot be read {where}: {reason}")
