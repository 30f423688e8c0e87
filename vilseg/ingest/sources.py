"""Sources of image-caption pairs: folders of images with caption files or sidecars, img2dataset output, pair shards.

:func:`find_pairs` lists a source, without reading images, and splits it into :class:`SourcePart` s, each the work of one task.
:func:`read_part` reads one of them in any process. The bytes of images are kept; formats that pair shards do not support are
converted to PNG.
"""

from __future__ import annotations

import io
import itertools
import json
import posixpath
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vilseg import storage
from vilseg.config.data import ColumnsConfig
from vilseg.data.image_decoding import decode_image
from vilseg.data.shards import INDEX, PARQUET, TAR, BadPair, tar_groups, texts_from_metadata
from vilseg.errors import DataError, StorageError
from vilseg.ingest.caption_files import (
    CSV_SUFFIXES,
    JSON_LINES_SUFFIXES,
    JSON_SUFFIX,
    merge,
    normalise,
    read_rows,
    split_image,
)
from vilseg.ingest.image_files import (
    IMAGE_SUFFIXES,
    ImageFinder,
    clean_key,
    key_of,
    relative,
    resolve,
    unique_key,
    with_suffix,
)

PART_PAIRS = 1000
_CHECK_SIDE = 32
"""Minimum side in pixels at which JPEGs are decoded to check them. All bytes are still read, so that damage is found, in a
third of the time of decoding at full size."""
_CAPTION_SUFFIXES = (*CSV_SUFFIXES, *JSON_LINES_SUFFIXES, JSON_SUFFIX)
_SIDECAR_SUFFIXES = (".txt", ".json")


@dataclass(frozen=True, slots=True)
class Record:
    """Image file with its key and metadata (captions and other fields)."""

    key: str
    image: str
    metadata: dict[str, Any]
    sidecars: tuple[str, ...] = ()
    """URIs of ``.txt`` and ``.json`` files from which the metadata are read; if empty, ``metadata`` is complete."""


@dataclass(frozen=True)
class SourcePart:
    """Pairs that one task reads: either some records, or one shard."""

    records: tuple[Record | BadPair, ...] = ()
    shard: str | None = None
    """URI of a tar or Parquet file; None if the pairs are in ``records``."""
    prefix: str = ""
    """Prefix of the keys of the shard's pairs."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)


@dataclass(frozen=True)
class Listing:
    """Content of a source."""

    parts: list[SourcePart]
    passed_over: list[str]
    """Reason, in a sentence, for each possible caption file that was skipped because it has no captions."""


@dataclass(frozen=True, slots=True)
class SourcePair:
    """Pair with its metadata; the fields are those of the pairs that `vilseg.data.shards.write_tar` takes."""

    key: str
    image: bytes
    suffix: str
    metadata: dict[str, Any]


def find_pairs(
    source: str, columns: ColumnsConfig | None = None, *, part_pairs: int = PART_PAIRS, prefix: str = ""
) -> Listing:
    """List the pairs at ``source``; the result depends only on its content.

    Args:
        source: a folder, or a CSV, JSONL, JSON, Parquet or tar file. Paths of images in a caption file may be relative to the
            folder of that file or to ``source``, or be the end of the path of exactly one file under ``source``.
        columns: names of columns, which take precedence over common names.
        part_pairs: maximum number of records in a `SourcePart`; a shard is one `SourcePart` of any size.
        prefix: prefix of every key, to distinguish sources.

    Raises:
        DataError: there are no pairs in the source.
        StorageError: the URI cannot be read.
    """
    columns = columns or ColumnsConfig()
    source = storage.absolute(source)
    files = storage.list_files(source)
    records: dict[str, Record | BadPair] = {}
    passed_over: list[str] = []
    if storage.is_folder(source):
        images = ImageFinder(source, files)
        for uri in _caption_files(files, images):
            try:
                _add_caption_file(uri, columns, images, records)
            except DataError as error:
                passed_over.append(str(error))
        _add_sidecars(files, images, records)
        shards = _shards(files)
    else:
        images = ImageFinder(storage.parent(source))
        shards = with_suffix(files, (TAR, PARQUET))
        if with_suffix(files, _CAPTION_SUFFIXES):
            _add_caption_file(source, columns, images, records)
    parts = [SourcePart(tuple(batch)) for batch in _batched(_with_unique_keys(records.values(), prefix), part_pairs)]
    for uri in shards:
        folder = posixpath.dirname(relative(uri, images.root))
        parts.append(SourcePart(shard=uri, prefix=posixpath.join(prefix, folder), columns=columns))
    if not parts:
        expected = (
            "images with captions (CSV, JSONL, COCO JSON, or .txt beside each image) or pair shards (.tar, .parquet)"
        )
        raise DataError(f"no pairs at {source}: expected {'; '.join([expected, *passed_over[:1]])}")
    return Listing(parts, passed_over)


def read_part(part: SourcePart, *, check: bool = True, max_pixels: int | None = None) -> Iterator[SourcePair | BadPair]:
    """Yield the pairs of a `SourcePart` in order; yield a :class:`BadPair` for an unusable one.

    Args:
        part: result of :func:`find_pairs`.
        check: decode every image to verify it; if False, decode only images that must be converted.
        max_pixels: maximum width x height in an image's header; None means 100 million.

    Raises:
        DataError: a Parquet file has no image column.
        StorageError: the shard cannot be read.
    """
    taken: set[str] = set()
    for pair in _read_records(part.records) if part.shard is None else _read_shard(part.shard, part.columns):
        if isinstance(pair, BadPair):
            yield BadPair(posixpath.join(part.prefix, pair.key), pair.reason)
            continue
        key, image, metadata = pair
        if part.shard is not None:
            key = unique_key(clean_key(posixpath.join(part.prefix, key)), taken)
        yield _finish(key, image, metadata, check, max_pixels)


# -------------------------------------------------------------------------------------------------------- listing


def _caption_files(files: list[storage.FileEntry], images: ImageFinder) -> list[str]:
    """Return the URIs of the files of a folder that may contain the captions of many images."""
    stems = {posixpath.splitext(uri)[0] for uri in images.uris}
    return [
        uri
        for uri in with_suffix(files, _CAPTION_SUFFIXES)
        if not (uri.endswith(_SIDECAR_SUFFIXES) and posixpath.splitext(uri)[0] in stems)
        and not uri.endswith((f"/{INDEX}", "_stats.json", "/bad.jsonl"))  # written with pair shards and by img2dataset
        and (not uri.lower().endswith(".txt") or storage.name(uri).lower().startswith("captions"))
    ]


def _add_caption_file(
    uri: str, columns: ColumnsConfig, images: ImageFinder, records: dict[str, Record | BadPair]
) -> None:
    """Add the rows of a caption file to ``records``, whose keys are image URIs; merge several rows of one image."""
    rows = list(read_rows(uri, columns))
    unusable = [row for row in rows if isinstance(row, BadPair)]
    if unusable and len(unusable) == len(rows):
        raise DataError(f"{uri} makes no pairs; at {unusable[0].key}: {unusable[0].reason}")
    if not any(texts_from_metadata(row.metadata) for row in rows if not isinstance(row, BadPair)):
        raise DataError(f"{uri} has no captions; name the column caption, captions, text, alt or tags")
    folder = storage.parent(uri)
    for row in rows:
        if isinstance(row, BadPair):
            records[f"{uri}#{row.key}"] = row
            continue
        try:
            image = images.find(folder, row.image)
        except DataError as error:
            records[f"{uri}#{row.where}"] = BadPair(row.where, str(error))
            continue
        known = records.get(image)
        metadata = merge(known.metadata, row.metadata) if isinstance(known, Record) else row.metadata
        records[image] = Record(key_of(image, images.root), image, metadata)


def _add_sidecars(files: list[storage.FileEntry], images: ImageFinder, records: dict[str, Record | BadPair]) -> None:
    """Add the images that have a ``.txt`` or ``.json`` sidecar to ``records``.

    If there is no caption file, all other images are added as bad pairs.
    """
    beside = set(with_suffix(files, _SIDECAR_SUFFIXES))
    caption_file_seen = bool(records)
    silent: dict[str, BadPair] = {}
    for image in images.uris:
        if image in records:
            continue
        stem = posixpath.splitext(image)[0]
        key = key_of(image, images.root)
        if sidecars := tuple(stem + suffix for suffix in _SIDECAR_SUFFIXES if stem + suffix in beside):
            records[image] = Record(key, image, {}, sidecars)
        else:
            silent[image] = BadPair(key, f"no caption: there is no caption file and no {storage.name(stem)}.txt")
    if records and not caption_file_seen:
        records.update(silent)


def _shards(files: list[storage.FileEntry]) -> list[str]:
    """Return the URIs of tar and Parquet files, without the Parquet metadata that img2dataset writes for a tar or folder."""
    tars = with_suffix(files, (TAR,))
    described = {uri[: -len(TAR)] for uri in tars} | {storage.parent(file.uri) for file in files}
    tables = with_suffix(files, (PARQUET,))
    return sorted([*tars, *(uri for uri in tables if uri[: -len(PARQUET)] not in described)])


def _with_unique_keys(records: Iterable[Record | BadPair], prefix: str) -> Iterator[Record | BadPair]:
    taken: set[str] = set()
    for record in records:
        key = posixpath.join(prefix, record.key)
        if isinstance(record, BadPair):
            yield BadPair(key, record.reason)
        else:
            yield Record(unique_key(clean_key(key), taken), record.image, record.metadata, record.sidecars)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


# -------------------------------------------------------------------------------------------------------- reading

_Raw = tuple[str, bytes, dict[str, Any]]
"""Key, image bytes and metadata of a pair before its image is checked."""


def _read_records(records: Iterable[Record | BadPair]) -> Iterator[_Raw | BadPair]:
    waiting: deque[Future[_Raw | BadPair]] = deque()
    # Some files are fetched in advance, because reads of small files are bound by latency.
    with ThreadPoolExecutor(storage.TRANSFERS_AT_ONCE) as pool:
        try:
            for record in records:
                waiting.append(pool.submit(_read_record, record))
                if len(waiting) > storage.TRANSFERS_AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read_record(record: Record | BadPair) -> _Raw | BadPair:
    if isinstance(record, BadPair):
        return record
    try:
        metadata = record.metadata
        if record.sidecars:
            members = {uri.rpartition(".")[2].lower(): storage.read_bytes(uri) for uri in record.sidecars}
            metadata = _metadata_of(members)
        return record.key, storage.read_bytes(record.image), metadata
    except (StorageError, DataError) as error:
        return BadPair(record.key, str(error))


def _read_shard(uri: str, columns: ColumnsConfig) -> Iterator[_Raw | BadPair]:
    return _read_parquet(uri, columns) if uri.lower().endswith(PARQUET) else _read_tar(uri)


def _read_tar(uri: str) -> Iterator[_Raw | BadPair]:
    for key, members in tar_groups(uri):
        if isinstance(members, str):
            yield BadPair(key, members)
            continue
        image = next((members[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in members), None)
        if image is None:
            yield BadPair(key, f"no image beside it ({', '.join(IMAGE_SUFFIXES)})")
            continue
        try:
            yield key, image, _metadata_of(members)
        except DataError as error:
            yield BadPair(key, str(error))


def _metadata_of(members: dict[str, bytes]) -> dict[str, Any]:
    """Read metadata from the ``json`` and ``txt`` members of an image; the caption in ``txt`` comes first."""
    try:
        metadata = json.loads(members.get("json", b"{}"))
        text = members.get("txt", b"").decode("utf-8-sig").strip()
    except (ValueError, RecursionError) as error:
        raise DataError(f"its text cannot be read: {error}") from error
    if not isinstance(metadata, dict):
        raise DataError("its text cannot be read: the JSON is not an object")
    metadata = normalise(metadata, ColumnsConfig())
    return merge({"captions": [text]}, metadata) if text else metadata


def _read_parquet(uri: str, columns: ColumnsConfig) -> Iterator[_Raw | BadPair]:
    row = 0
    stem = storage.name(uri)[: -len(PARQUET)]
    try:
        with storage.open_input(uri) as source:
            file = pq.ParquetFile(source)
            names = file.schema_arrow.names
            if split_image(dict.fromkeys(names, "there"), columns)[0] is None:
                raise DataError(
                    f"{uri} has no column of images or of their paths, only {', '.join(names)}; "
                    "name it by data.columns.image=..."
                )
            for batch in file.iter_batches(batch_size=64):
                for values in batch.to_pylist():
                    yield from _pair_of_row(storage.parent(uri), f"{stem}/{row:08d}", values, columns)
                    row += 1
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        yield BadPair(f"{stem}/{row:08d}", f"the Parquet file cannot be read from here on: {error}")


def _pair_of_row(folder: str, key: str, values: dict[str, Any], columns: ColumnsConfig) -> Iterator[_Raw | BadPair]:
    """Yield the pair of a row; yield nothing if img2dataset recorded a failed download in it."""
    image, rest = split_image(values, columns)
    path = image.get("path") if isinstance(image, dict) else image
    data = image.get("bytes") if isinstance(image, dict) else image
    if rest.get(columns.key):
        key = str(rest[columns.key])
    elif isinstance(path, str) and path:
        key = posixpath.splitext(path.partition("://")[2] or path)[0]
    try:
        if not isinstance(data, bytes) and isinstance(path, str) and path:
            data = storage.read_bytes(path if "://" in path or path.startswith("/") else resolve(folder, path))
    except StorageError as error:
        yield BadPair(key, str(error))
        return
    if isinstance(data, bytes):
        yield key, data, normalise(rest, columns)
    elif values.get("status") in (None, "success"):
        yield BadPair(key, "no image")


def _finish(
    key: str, image: bytes, metadata: dict[str, Any], check: bool, max_pixels: int | None
) -> SourcePair | BadPair:
    if not texts_from_metadata(metadata):
        return BadPair(key, "no caption")
    suffix = _suffix_of(image)
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
        if suffix is None:
            buffer = io.BytesIO()
            Image.fromarray(decode_image(image, max_pixels=max_pixels)).save(buffer, format="PNG")
            image, suffix = buffer.getvalue(), "png"
        elif check:
            decode_image(image, max_pixels=max_pixels, min_side=_CHECK_SIDE)
    except UnicodeEncodeError as error:
        return BadPair(key, f"its text is not valid Unicode: {error.reason}")
    except DataError as error:
        return BadPair(key, str(error))
    return SourcePair(key, image, suffix, metadata)


def _suffix_of(image: bytes) -> str | None:
    """Return "jpg", "png" or "webp" by the content of an image, because names may be wrong; None for any other format."""
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else None
