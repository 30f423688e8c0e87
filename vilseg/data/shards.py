"""Pair shards on storage: WebDataset tars and Parquet, read as users already have them, and written by ``ingest``.

A tar holds ``KEY.jpg|jpeg|png|webp`` with ``KEY.txt`` and/or ``KEY.json`` beside it (img2dataset writes such tars); a
Parquet file has one pair a row. A pair that cannot be read is a :class:`BadPair` in its place, so that the positions of the
others in the shard do not change.
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
"""Beside the shards of a feature cache: what they hold."""
CAPTION_FEATURES = "caption_features"
"""Column of a feature cache's shards."""
_BUFFER = 4 << 20
_TEXT_FIELDS = ("captions", "caption", "alt", "tags")
"""Keys of a pair's JSON that hold texts."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An encoded image with its captions."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    """Its usable texts, cleaned; alt-text and hashtags among them where the text selector takes them."""
    caption_features: bytes | None = None
    """From a feature cache: one row of float16 for each caption, as the text encoder gave it."""
    probabilities: tuple[float, ...] = ()
    """Probability of each caption to be the text of an epoch; all equal where empty."""


@dataclass(frozen=True, slots=True)
class BadPair:
    """A pair that could not be read, with the reason."""

    key: str
    reason: str
    filtered: bool = False
    """Left out by the filters; nothing is wrong with it."""
    shard: str = ""
    """URI of its file, which tells pairs of equal keys apart; empty where it is not known."""


@dataclass(frozen=True)
class Shard:
    """A file of pairs, with their number, readable or not."""

    uri: str
    pairs: int
    source: str = ""
    """Name of its source in a mix."""


def list_shards(source: str, *, without: str | None = None) -> list[storage.FileEntry]:
    """List the tar and Parquet files at ``source``, a folder or one file, without the tables that img2dataset leaves beside tars.

    Args:
        source: URI.
        without: URI of shards to leave out, which may lie within ``source``.

    Raises:
        DataError: there is none.
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
    """Yield every pair of a shard in stored order; a file that breaks off ends in a :class:`BadPair`.

    Args:
        uri: of the shard.
        columns: names of the columns of Parquet shards.
        selector: chooses the texts; captions, or alt-text and hashtags where there is none, if None.

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
    """Return the number of pairs in a shard, readable or not: as many as :func:`read_shard` yields.

    Raises:
        StorageError: the file cannot be read; ``StoreUnavailable`` where the object store does not answer.
    """
    if not uri.endswith(PARQUET):
        return sum(1 for _ in tar_groups(uri))
    with storage.reading(uri) as file:
        try:
            return pq.read_metadata(file).num_rows
        except pa.ArrowInvalid:
            return 1  # the BadPair that stands for a file that is no Parquet
        except OSError as error:
            if error.errno is not None:
                raise  # the disk failed; pyarrow's own errors about the content have no number
            return 1


def write_tar(uri: str, pairs: Iterable[tuple[str, bytes, str, dict[str, Any]]]) -> int:
    """Write (key, image bytes, suffix, metadata) as a WebDataset tar and return how many; equal pairs give equal bytes."""
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
    """Write ``index.json``, the number of pairs by file name, so that they need not be counted again."""
    storage.write_text(storage.join(folder, INDEX), json.dumps({"shards": dict(shards)}, indent=1))


def read_index(folder: str) -> dict[str, int]:
    """Return the number of pairs by file name as :func:`write_index` wrote it; empty where there is no index.

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
    """Yield (key, members by lower-case suffix) for each run of members with one key; (name, reason) last if it breaks off."""
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
        # The pair at the break is the one that is lost; those before it are whole.
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
    """Return the texts among a pair's fields by kind (``caption`` with ``captions``, ``alt``, ``tags``), without empty kinds."""
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
        raise  # the pairs are not damaged
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
    if values.get(CAPTION_FEATURES):  # of a cache: its captions are clean, and each has its features
        return Pair(key, image, tuple(texts["caption"]), values[CAPTION_FEATURES])
    return _pair(key, image, texts, selector)


def _columns_to_read(columns: ColumnsConfig) -> tuple[str, ...]:
    return (columns.key, columns.image, columns.caption, columns.captions, CAPTION_FEATURES, "alt", "tags")
