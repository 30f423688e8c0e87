"""Pair shards, which are WebDataset tars or Parquet files, from other tools or written by ``vilseg ingest``.

For each pair, a tar contains ``KEY.jpg|jpeg|png|webp`` and ``KEY.txt`` or ``KEY.json`` or both (img2dataset writes such tars). A
Parquet file has one pair per row. Readers return a :class:`BadPair` for an unreadable pair, so that the positions of the other
pairs in the shard do not change.
"""

from __future__ import annotations

import io
import json
import operator
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vilseg import storage
from vilseg.config.data import ColumnsConfig, FiltersConfig
from vilseg.data.text_selection import TextSelector
from vilseg.errors import DataError, StorageError, StoreUnavailable, UserError

TAR, PARQUET = ".tar", ".parquet"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
INDEX = "index.json"
MANIFEST = "manifest.json"
"""Name of the file with the description of a feature cache, in the folder of its shards."""
CAPTION_FEATURES = "caption_features"
"""Column of the caption features in the shards of a feature cache."""
_BUFFER = 4 << 20
_TEXT_FIELDS = ("captions", "caption", "alt", "tags")
"""Keys of the texts in a pair's JSON."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Encoded image with its captions."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    """Usable texts of the pair, cleaned; they include alt-text and hashtags if the text selector selects them."""
    caption_features: bytes | None = None
    """Features of each caption from the text encoder, as the bytes of a float16 array with a row per caption; None if the pair is
    not from a feature cache, or the cache has no caption features."""
    probabilities: tuple[float, ...] = ()
    """Probability with which each caption is drawn in an epoch; if empty, all are equally likely."""


@dataclass(frozen=True, slots=True)
class BadPair:
    """Pair that could not be read or was filtered out, with the reason."""

    key: str
    reason: str
    filtered: bool = False
    """True if the pair is valid and was left out by the filters."""
    shard: str = ""
    """URI of the shard, which distinguishes pairs with equal keys; empty if it is not known."""


@dataclass(frozen=True)
class Shard:
    """File of pairs, with the number of pairs in it, including unreadable ones."""

    uri: str
    pairs: int
    source: str = ""
    """Name of the shard's source in a mix."""


def list_shards(source: str, *, without: str | None = None) -> list[storage.FileEntry]:
    """List the tar and Parquet files at ``source``, without the Parquet metadata that img2dataset writes for each tar.

    Args:
        source: URI of a folder or a shard.
        without: URI of shards to leave out, which may be within ``source``; None leaves out none.

    Raises:
        DataError: there are no shards, or all are left out.
        StorageError: the URI cannot be read.
    """
    entries = storage.list_files(source, suffixes={TAR, PARQUET})
    if not entries:
        raise DataError(f"no pair shards at {source}: expected .tar or .parquet files (see `vilseg ingest --help`)")
    tars = {entry.uri[: -len(TAR)] for entry in entries if entry.uri.lower().endswith(TAR)}
    shards = [e for e in entries if e.uri.lower().endswith(TAR) or e.uri[: -len(PARQUET)] not in tars]
    if without is None:
        return shards
    held_out = {storage.absolute(entry.uri) for entry in list_shards(without)}
    left = [entry for entry in shards if storage.absolute(entry.uri) not in held_out]
    if not left:
        raise DataError(
            f"{without} holds out every pair shard of {source}; hold out fewer, so that some are trained on"
        )
    return left


def read_shard(
    uri: str, columns: ColumnsConfig | None = None, selector: TextSelector | None = None
) -> Iterator[Pair | BadPair]:
    """Yield the pairs of a shard in stored order; if the file is truncated, yield a :class:`BadPair` last.

    Args:
        uri: URI of the shard.
        columns: names of the columns of Parquet shards; None takes the default names.
        selector: selector of texts; None selects captions, or alt-text or tags if there are no captions.

    Raises:
        StoreUnavailable: the object store does not answer.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     number = write_tar(f"{folder}/0.tar", [("7", b"JPEG bytes", "jpg", {"caption": "a dog"})])
        ...     (pair,) = read_shard(f"{folder}/0.tar")
        >>> pair.key, pair.captions
        ('7', ('a dog',))
    """
    if uri.endswith(PARQUET):
        yield from _read_parquet(uri, columns or ColumnsConfig(), selector or TextSelector())
    else:
        yield from _read_tar(uri, selector or TextSelector())


def count_pairs(uri: str) -> int:
    """Return the number of pairs and bad pairs that :func:`read_shard` yields for a shard.

    Raises:
        StorageError: the file cannot be read (``StoreUnavailable`` if the object store does not answer).
    """
    if not uri.endswith(PARQUET):
        return sum(1 for _ in tar_groups(uri))
    with storage.reading(uri) as file:
        try:
            return pq.read_metadata(file).num_rows
        except pa.ArrowInvalid:
            return 1  # the BadPair that is yielded if the file is not valid Parquet
        except OSError as error:
            if error.errno is not None:
                raise  # the disk failed, because pyarrow's errors about the content have no errno
            return 1


def write_tar(uri: str, pairs: Iterable[tuple[str, bytes, str, dict[str, Any]]]) -> int:
    """Write pairs to a WebDataset tar and return their number; equal pairs give equal bytes.

    Args:
        uri: URI of the tar.
        pairs: key, image bytes, suffix of the image (such as "jpg") and metadata of each pair.
    """
    count = 0
    with storage.open_atomic(uri) as target, tarfile.open(fileobj=target, mode="w") as tar:
        for key, image, suffix, metadata in pairs:
            for name, data in (
                (f"{key}.{suffix}", image),
                (f"{key}.json", json.dumps(metadata, ensure_ascii=False).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            count += 1
    return count


def write_index(folder: str, shards: Iterable[tuple[str, int]]) -> None:
    """Write the file ``index.json`` with the number of pairs in each shard, so that they need not be counted again.

    Args:
        folder: URI of the folder of the shards.
        shards: file name and number of pairs of each shard.
    """
    storage.write_text(storage.join(folder, INDEX), json.dumps({"shards": dict(shards)}, indent=1))


def read_index(folder: str) -> dict[str, int]:
    """Return the number of pairs by file name from :func:`write_index`; empty if there is no index.

    Raises:
        DataError: the index is damaged.
    """
    uri = storage.join(folder, INDEX)
    if not storage.is_folder(folder) or not storage.exists(uri):
        return {}
    try:
        shards = json.loads(storage.read_text(uri)).get("shards", {})
        return {name: operator.index(pairs) for name, pairs in shards.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{uri} is damaged; delete it, and the pairs are counted anew") from error


def _read_tar(uri: str, selector: TextSelector) -> Iterator[Pair | BadPair]:
    for key, members in tar_groups(uri):
        if isinstance(members, str):
            yield BadPair(key, members)
            continue
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if image is None:
            yield BadPair(key, f"no image beside it ({', '.join(IMAGE_SUFFIXES)})")
            continue
        try:
            texts = _texts_of(members)
        except ValueError as error:
            yield BadPair(key, f"its text cannot be read: {error}")
            continue
        yield _pair(key, image, texts, selector)


def _pair(key: str, image: bytes, texts: dict[str, list[str]], selector: TextSelector) -> Pair | BadPair:
    probabilities = selector.probabilities(texts)
    if probabilities:
        alike = len(set(probabilities.values())) == 1
        return Pair(key, image, tuple(probabilities), probabilities=() if alike else tuple(probabilities.values()))
    if not any(texts.values()):
        return BadPair(key, "no caption")
    if selector.filters == FiltersConfig():
        return BadPair(key, "nothing is left of its texts when they are cleaned")
    return BadPair(key, "no text passes the filters", filtered=True)


def tar_groups(uri: str) -> Iterator[tuple[str, dict[str, bytes] | str]]:
    """Yield (key, content of its members by lower-case suffix) for each key of a tar.

    The members of a key must follow each other. If the tar is truncated, the last item is (name, reason).
    """
    key, members = "", dict[str, bytes]()
    try:
        with storage.reading(uri) as file, tarfile.open(fileobj=io.BufferedReader(file, _BUFFER), mode="r|") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                this = f"{folder}/{stem}" if folder else stem
                if this != key and members:
                    yield key, members
                    members = {}
                key = this
                data = tar.extractfile(member)
                assert data is not None
                members[suffix.lower()] = data.read()
    except (tarfile.TarError, EOFError) as error:
        # Only the pair at the truncation is lost; those before it are complete.
        yield (f"{storage.name(uri)}:{key}" if key else storage.name(uri)), f"the tar file breaks off: {error}"
        return
    if members:
        yield key, members


def _texts_of(members: dict[str, bytes]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    if "json" in members:
        metadata = json.loads(members["json"])
        if not isinstance(metadata, dict):
            raise ValueError("the JSON is not an object")
        texts = texts_from_metadata(metadata)
    if "txt" in members:
        caption = members["txt"].decode("utf-8").strip()
        captions = texts.setdefault("caption", [])
        if caption and caption not in captions:
            captions.insert(0, caption)
    return texts


def texts_from_metadata(metadata: dict[str, Any]) -> dict[str, list[str]]:
    """Return the texts in a pair's metadata by kind (``caption``, ``alt``, ``tags``), without empty kinds.

    The fields ``caption`` and ``captions`` are combined.
    """
    found: dict[str, list[str]] = {}
    for name in _TEXT_FIELDS:
        value = metadata.get(name)
        texts = found.setdefault("caption" if name == "captions" else name, [])
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.strip() and text.strip() not in texts:
                texts.append(text.strip())
    return {kind: texts for kind, texts in found.items() if texts}


def _read_parquet(uri: str, columns: ColumnsConfig, selector: TextSelector) -> Iterator[Pair | BadPair]:
    try:
        with storage.reading(uri) as source:
            file = pq.ParquetFile(source)
            names = set(file.schema_arrow.names)
            wanted = [n for n in _columns_to_read(columns) if n in names]
            if columns.image not in names:
                wanted += [columns.path] if columns.path in names else []
            if columns.image not in wanted and columns.path not in wanted:
                raise DataError(
                    f"{uri} has neither a column '{columns.image}' nor '{columns.path}'; name it by data.columns.image=..."
                )
            row = 0
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                for values in batch.to_pylist():
                    yield _pair_of_row(uri, row, values, columns, selector)
                    row += 1
    except StoreUnavailable:
        raise  # not a damaged file
    except (pa.ArrowInvalid, StorageError) as error:
        yield BadPair(storage.name(uri), f"the Parquet file cannot be read: {error}")


def _pair_of_row(
    uri: str, row: int, values: dict[str, Any], columns: ColumnsConfig, selector: TextSelector
) -> Pair | BadPair:
    key = str(values.get(columns.key) or f"{storage.name(uri)}:{row}")
    fields = {"caption": values.get(columns.caption), "captions": values.get(columns.captions)}
    texts = texts_from_metadata({**values, **fields})
    if not texts:
        return BadPair(key, "no caption")
    image = values.get(columns.image)
    if isinstance(image, dict):
        image = image.get("bytes")
    if image is None and values.get(columns.path):
        path = str(values[columns.path])
        absolute = "://" in path or path.startswith("/")
        try:
            image = storage.read_bytes(path if absolute else storage.join(storage.parent(uri), path))
        except StoreUnavailable:
            raise
        except UserError as error:
            return BadPair(key, str(error))
    if not image:
        return BadPair(key, "no image")
    if values.get(CAPTION_FEATURES):  # from a feature cache, whose captions are already cleaned and have features
        return Pair(key, image, tuple(texts["caption"]), values[CAPTION_FEATURES])
    return _pair(key, image, texts, selector)


def _columns_to_read(columns: ColumnsConfig) -> tuple[str, ...]:
    return (columns.key, columns.image, columns.caption, columns.captions, CAPTION_FEATURES, "alt", "tags")
