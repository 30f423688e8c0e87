"""Results table of a bulk segmentation: small part files while it runs, one ``results.parquet`` at its end.

An actor writes finished rows as a part, atomically. An image processed twice, because an actor died or a presumed dead
one lived on, is in two parts with the same result; the merge keeps one row.
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
"""``status`` is ``ok`` or ``rejected``, then with a sentence in ``error``; ``rle`` is COCO's, one per class. A file with
the same bytes as another may be a ``duplicate_of`` it, and then has the same result."""
_OPEN_FILES = 64
_GROUP = 1024
"""Rows per row group; a row holds some kilobytes of run lengths."""


class Names:
    """Compact set of names in 15 bytes each, with a false positive rate of 2^-120."""

    def __init__(self, digests: Iterable[bytes]) -> None:
        self._sorted = np.sort(np.fromiter(digests, "S16"))

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Make the set of ``names``."""
        return cls(_digest(name) for name in names)

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, name: str) -> bool:
        digest = np.bytes_(_digest(name))
        place = int(np.searchsorted(self._sorted, digest))
        return place < len(self._sorted) and self._sorted[place] == digest


def _digest(name: str) -> bytes:
    # numpy strips trailing zero bytes of its strings, so none may be at the end.
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=15).digest() + b"\1"


def write_part(out: str, rows: list[dict[str, Any]]) -> None:
    """Write rows as a part below ``out``; the same rows always make the same file."""
    rows = sorted(rows, key=lambda row: row["path"])
    name = hashlib.sha256("\0".join(row["path"] for row in rows).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    with storage.open_atomic(storage.join(out, PARTS, f"{name}.parquet")) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)


def names_done(out: str) -> Names:
    """Return the paths of all rows below ``out``, merged or in parts, except duplicates of inputs without a row."""
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
    """SHA-256 of every input that has a row of its own below ``out``, with its path."""
    found: dict[str, str] = {}
    for uri in _files(out):
        for row in _read_rows(uri, ["path", "sha256", "duplicate_of"]):
            if row["sha256"] and not row["duplicate_of"]:
                found[row["sha256"]] = row["path"]
    return found


def duplicates(out: str) -> Iterator[tuple[str, str]]:
    """Yield the duplicates in the parts below ``out``, each with the path that was segmented in its place."""

    def look(uri: str) -> list[tuple[str, str]]:
        rows = _read_rows(uri, ["path", "duplicate_of"]) if storage.name(uri) != RESULTS else iter(())
        return [(row["path"], row["duplicate_of"]) for row in rows if row["duplicate_of"]]

    with storage.ThreadPool(storage.TRANSFERS_AT_ONCE) as pool:
        for found in pool.map(look, _files(out)):
            yield from found


def _orphans(out: str) -> list[tuple[str, str]]:
    """Duplicates in the parts whose first input was claimed by an actor that died before writing its row."""
    pairs = list(duplicates(out))
    firsts = {first for _, first in pairs}
    if firsts:
        for uri in _files(out):
            firsts.difference_update(
                row["path"] for row in _read_rows(uri, ["path", "duplicate_of"]) if not row["duplicate_of"]
            )
    return [pair for pair in pairs if pair[1] in firsts]


def merge(out: str) -> int:
    """Merge the parts into ``results.parquet``, sorted by path, each path once; return the number of rows.

    Memory holds the rows of the few parts that overlap, since an actor's block is a range of neighbours, and the rows
    with duplicates. If a listing was not sorted, all parts overlap, and are merged into longer ones first.
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
    """Yield one row per path; a duplicate, stored without a result in a part, gets that of the first input."""
    for path, same in itertools.groupby(rows, lambda row: row["path"]):
        best = None
        for row in same:
            if not row["duplicate_of"] or row["classes"] is not None or row["status"] == "rejected":
                best = row
                break
            if first := firsts.get(row["duplicate_of"]):
                best = {**first, "path": path, "duplicate_of": row["duplicate_of"]}
        # Without a result, as the first input is gone: the next call processes the path itself.
        if best is not None:
            yield best


class _Bounds(NamedTuple):
    first: str
    last: str
    uri: str


def _bounds(files: Sequence[str]) -> list[_Bounds]:
    """First and last path of every file with rows, sorted by the first."""

    def look(uri: str) -> _Bounds | None:
        paths = _ends(uri)
        return _Bounds(paths[0], paths[-1], uri) if paths else None

    with storage.ThreadPool(storage.TRANSFERS_AT_ONCE) as pool:
        return sorted(found for found in pool.map(look, files) if found)


def _ends(uri: str) -> list[str]:
    """Paths of a file including its first and last; those in between may be left out."""
    with storage.reading(uri) as file:
        table = pq.ParquetFile(file)
        groups = sorted({0, table.num_row_groups - 1} if table.num_row_groups else [])
        return [path for group in groups for path in table.read_row_group(group, ["path"]).column(0).to_pylist()]


def _most_at_once(bounds: Sequence[_Bounds]) -> int:
    """Number of files that must be open at the same time."""
    lasts: list[str] = []
    most = 0
    for found in bounds:
        while lasts and lasts[0] < found.first:
            heapq.heappop(lasts)
        heapq.heappush(lasts, found.last)
        most = max(most, len(lasts))
    return most


def _in_order(bounds: Sequence[_Bounds]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all files by path; a file is opened when its first path is due and read in batches."""
    waiting = list(reversed(bounds))
    # (path, tie-breaker, row, the file's further rows)
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
