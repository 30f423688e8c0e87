"""Results table of a bulk segmentation: small part files while the job runs, one ``results.parquet`` at its end.

An actor writes finished rows as a part file, ``parts/<hash>.parquet``, atomically. An image may be processed twice, because
an actor died or because one that was presumed dead continued. Two part files then have the same row, and the merge keeps one.

A duplicate is an input with the same bytes as another one, its original, which is segmented in its place.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vilseg import storage

RESULTS, PARTS = "results.parquet", "parts"
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("classes", pa.list_(pa.string())),
        ("areas", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
        ("rle", pa.list_(pa.string())),
        ("duplicate_of", pa.string()),
    ]
)
"""Schema of the results table. ``status`` is ``ok`` or ``rejected``; a rejected row has the reason in ``error``. ``rle`` has
one COCO run-length code per class. ``duplicate_of`` is the path of the original of a duplicate, which has the same result."""
_OPEN_FILES = 64
"""Maximum number of files that a merge reads at once."""
_GROUP = 1024
"""Number of rows per row group; a row has some kilobytes of run lengths."""


class Names:
    """Compact set of input names (paths): sorted 120-bit hashes of 16 bytes each. Two names collide with probability 2^-120.

    Args:
        digests: hashes of the names; `Names.of` takes the names themselves.
    """

    def __init__(self, digests: Iterable[bytes]) -> None:
        self._sorted = np.sort(np.fromiter(digests, "S16"))

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Return a set that contains all of ``names``, which are paths of inputs."""
        return cls(_digest(name) for name in names)

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, name: str) -> bool:
        digest = np.bytes_(_digest(name))
        place = int(np.searchsorted(self._sorted, digest))
        return place < len(self._sorted) and self._sorted[place] == digest


def _digest(name: str) -> bytes:
    # numpy strips trailing zero bytes of byte strings, so the last byte must not be zero.
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=15).digest() + b"\1"


def write_part(out: str, rows: list[dict[str, Any]]) -> None:
    """Write rows as a part file in the output folder ``out``; rows with the same paths always have the same file name."""
    rows = sorted(rows, key=lambda row: row["path"])
    name = hashlib.sha256("\0".join(row["path"] for row in rows).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    with storage.open_atomic(storage.join(out, PARTS, f"{name}.parquet")) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)


def names_done(out: str) -> Names:
    """Return the set of paths that need no further work: all that have a row, except duplicates whose original has none.

    Rows are those in ``results.parquet`` and the part files of the output folder ``out``.
    """
    orphans = {path for path, _ in _orphans(out)}

    def digests(uri: str) -> list[bytes]:
        return [_digest(row["path"]) for row in _read_rows(uri, ["path"]) if row["path"] not in orphans]

    with storage.ThreadPool(storage.TRANSFERS_AT_ONCE) as pool:
        return Names(itertools.chain.from_iterable(pool.map(digests, _files(out))))


def _files(out: str) -> list[str]:
    results, parts = storage.join(out, RESULTS), storage.join(out, PARTS)
    found = [results] if storage.exists(results) else []
    if storage.exists(parts):
        found += [entry.uri for entry in storage.list_files(parts, {".parquet"})]
    return found


def claims(out: str) -> dict[str, str]:
    """Return a dictionary from SHA-256 to path of the inputs that have a row in the folder ``out`` and are no duplicates."""
    found: dict[str, str] = {}
    for uri in _files(out):
        for row in _read_rows(uri, ["path", "sha256", "duplicate_of"]):
            if row["sha256"] and not row["duplicate_of"]:
                found[row["sha256"]] = row["path"]
    return found


def duplicates(out: str) -> Iterator[tuple[str, str]]:
    """Yield (path, path of its original) for every duplicate in the part files of ``out``."""

    def look(uri: str) -> list[tuple[str, str]]:
        rows = _read_rows(uri, ["path", "duplicate_of"]) if storage.name(uri) != RESULTS else iter(())
        return [(row["path"], row["duplicate_of"]) for row in rows if row["duplicate_of"]]

    with storage.ThreadPool(storage.TRANSFERS_AT_ONCE) as pool:
        for found in pool.map(look, _files(out)):
            yield from found


def _orphans(out: str) -> list[tuple[str, str]]:
    """Return (path, path of its original) of duplicates whose original has no row because its actor died before writing."""
    pairs = list(duplicates(out))
    firsts = {first for _, first in pairs}
    if firsts:
        for uri in _files(out):
            firsts.difference_update(
                row["path"] for row in _read_rows(uri, ["path", "duplicate_of"]) if not row["duplicate_of"]
            )
    return [pair for pair in pairs if pair[1] in firsts]


def merge(out: str) -> int:
    """Merge the part files into ``results.parquet``, sorted by path, each path once; return the number of rows.

    A merge sort: a file is open only while its range of paths overlaps the current position. A block of inputs is a range
    of neighbouring paths, so few files are open at once. Memory holds a batch of rows of each open file, and the rows of the
    originals of duplicates. If the listing was not sorted, all ranges overlap; files are then first merged in groups into
    longer ones.
    """
    files = _files(out)
    results = storage.join(out, RESULTS)
    if files == [results]:
        with storage.reading(results) as source:
            return pq.ParquetFile(source).metadata.num_rows
    wanted = {first for _, first in duplicates(out)}
    firsts = {
        row["path"]: row
        for uri in files
        if wanted
        for row in _read_rows(uri)
        if row["path"] in wanted and not row["duplicate_of"]
    }
    with tempfile.TemporaryDirectory(prefix="vilseg-") as scratch:
        number = itertools.count()
        bounds = _bounds(files)
        while _most_at_once(bounds) > _OPEN_FILES:
            groups = [bounds[start : start + _OPEN_FILES] for start in range(0, len(bounds), _OPEN_FILES)]
            longer = [str(Path(scratch) / f"{next(number)}.parquet") for _ in groups]
            for group, uri in zip(groups, longer, strict=True):
                _write(uri, _in_order(group), firsts)
            bounds = _bounds(longer)
        count = _write(results, _in_order(bounds), firsts)
    storage.delete(storage.join(out, PARTS))
    return count


def _write(uri: str, rows: Iterable[dict[str, Any]], firsts: Mapping[str, dict[str, Any]]) -> int:
    count = 0
    unique = _each_once(rows, firsts)
    with storage.open_atomic(uri) as target, pq.ParquetWriter(target, SCHEMA) as writer:
        while group := list(itertools.islice(unique, _GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
            count += len(group)
    return count


def _each_once(rows: Iterable[dict[str, Any]], firsts: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one row per path; a duplicate, whose row in a part file has no result, gets the result of its original.

    Args:
        rows: rows sorted by path.
        firsts: path of each original -> its row.
    """
    for path, same in itertools.groupby(rows, lambda row: row["path"]):
        best = None
        for row in same:
            if not row["duplicate_of"] or row["classes"] is not None or row["status"] == "rejected":
                best = row
                break
            if first := firsts.get(row["duplicate_of"]):
                best = {**first, "path": path, "duplicate_of": row["duplicate_of"]}
        # Omitted if the original has no row; the next run of the job segments this path itself.
        if best is not None:
            yield best


class _Bounds(NamedTuple):
    first: str
    last: str
    uri: str


def _bounds(files: Sequence[str]) -> list[_Bounds]:
    """Return the first and last path of every file that has rows, sorted by first path."""

    def look(uri: str) -> _Bounds | None:
        paths = _ends(uri)
        return _Bounds(paths[0], paths[-1], uri) if paths else None

    with storage.ThreadPool(storage.TRANSFERS_AT_ONCE) as pool:
        return sorted(found for found in pool.map(look, files) if found)


def _ends(uri: str) -> list[str]:
    """Return all paths in the first and in the last row group of a file, in the order of the file; empty if it has no rows."""
    with storage.reading(uri) as file:
        table = pq.ParquetFile(file)
        groups = sorted({0, table.num_row_groups - 1} if table.num_row_groups else [])
        return [path for group in groups for path in table.read_row_group(group, ["path"]).column(0).to_pylist()]


def _most_at_once(bounds: Sequence[_Bounds]) -> int:
    """Return the maximum number of files whose ranges of paths overlap, which a merge must open at once."""
    lasts: list[str] = []
    most = 0
    for found in bounds:
        while lasts and lasts[0] < found.first:
            heapq.heappop(lasts)
        heapq.heappush(lasts, found.last)
        most = max(most, len(lasts))
    return most


def _in_order(bounds: Sequence[_Bounds]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all files sorted by path; a file is opened when its first path is next, and read in batches."""
    waiting = list(reversed(bounds))
    # (path, tie-breaker, row, iterator over the remaining rows of the file)
    heap: list[tuple[str, int, dict[str, Any], Iterator[dict[str, Any]]]] = []
    number = itertools.count()
    while waiting or heap:
        while waiting and (not heap or waiting[-1].first <= heap[0][0]):
            further = _read_rows(waiting.pop().uri)
            row = next(further)
            heapq.heappush(heap, (row["path"], next(number), row, further))
        _, _, row, further = heapq.heappop(heap)
        yield row
        following = next(further, None)
        if following is not None:
            heapq.heappush(heap, (following["path"], next(number), following, further))


def _read_rows(uri: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    with storage.reading(uri) as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_GROUP, columns=columns):
            yield from batch.to_pylist()


def read_results(out: str, columns: list[str] | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of ``results.parquet``."""
    yield from _read_rows(storage.join(out, RESULTS), columns)
