"""Ingest job: convert sources of captioned images to shards of image-caption pairs.

Every source is split into parts (`SourcePart`: some records, or one existing shard). One Ray task reads a part and writes its
pairs as one or more new shards.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cluster.ray_session import Session, find_user_error
from vilseg import storage
from vilseg.config.data import ColumnsConfig
from vilseg.data.shards import INDEX, BadPair, write_index, write_tar
from vilseg.errors import ConfigError, DataError, StorageError, StoreUnavailable
from vilseg.ingest.image_files import clean_key, unique_key
from vilseg.ingest.sources import SourcePair, SourcePart, find_pairs, read_part

BAD_PAIRS = "bad.jsonl"
_SHARD_NAME = re.compile(r"pairs-\d{6,}-\d{3,}\.tar")
_TASKS_PER_CPU = 2
"""Number of submitted tasks per CPU: one runs, one is queued. More would only keep more records in memory."""
_MIN_READ = 20
"""Number of pairs read from which on the fraction of bad ones is checked at the end of the job."""
_MIN_READ_TO_STOP = 5000
"""Number of pairs read from which on the fraction of bad ones is checked during the job."""


@dataclass(frozen=True)
class IngestResult:
    """Result of an ingest job."""

    uri: str
    pairs: int
    bad: int
    """Number of rejected pairs; ``bad.jsonl`` at ``uri`` lists them with the reasons."""
    shards: int
    passed_over: tuple[str, ...] = ()
    """One sentence for each file that looked like a caption file but holds no captions."""


@dataclass
class _Written:
    """Shards written and pairs rejected, of one source part or of all parts so far."""

    shards: list[tuple[str, int]] = field(default_factory=list)
    """File name and number of pairs of each shard."""
    bad: list[BadPair] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        return sum(pairs for _, pairs in self.shards)

    @property
    def read(self) -> int:
        return self.pairs + len(self.bad)


def main(
    sources: Sequence[str],
    dest: str,
    session: Session,
    *,
    shard_pairs: int = 1000,
    overwrite: bool = False,
    max_bad_share: float = 0.05,
    check: bool = True,
    limit: int | None = None,
    columns: ColumnsConfig | None = None,
    progress: Callable[[int, int, int], None] = lambda done, total, bad: None,
) -> IngestResult:
    """Write the pairs of all sources as shards with an index.

    Args:
        sources: folders or files, see `vilseg.ingest.sources.find_pairs`. If there are several, the name of its source is
            prefixed to every key.
        dest: folder to write. It must be empty or missing, unless ``overwrite`` is set.
        session: the cluster.
        shard_pairs: maximum number of pairs per shard.
        overwrite: replace the shards of an earlier ingest at ``dest``.
        max_bad_share: maximum fraction of bad pairs. If it is exceeded, all shards are deleted and only the list of bad pairs
            is kept.
        check: decode every image to verify it.
        limit: maximum number of pairs to write; None writes all. With a limit, parts are written one after another.
        columns: names of columns in tables, tried before the common names.
        progress: function called after every part with the numbers of finished parts, of all parts, and of bad pairs so far.

    Raises:
        DataError: no pair is readable, or too many are bad.
        StorageError: ``dest`` is not empty or overlaps a source, or a file cannot be read or written.
        ConfigError: ``shard_pairs`` or ``limit`` is less than 1.
    """
    for name, value in (("shard_pairs", shard_pairs), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, but it must be at least 1")
    sources, dest = [storage.absolute(source) for source in sources], storage.absolute(dest)
    parts, passed_over = _find(sources, columns, shard_pairs)
    _clear(dest, sources, overwrite)
    # A task is retried after a broken connection; it then writes the same files again.
    task: Any = ray.remote(num_cpus=1)(write_part).options(max_retries=3, retry_exceptions=[OSError, StoreUnavailable])
    done = _write_parts(
        parts,
        partial(task.remote, dest, shard_pairs, check),
        at_once=max(1, _TASKS_PER_CPU * session.cpus),
        limit=limit,
        give_up=lambda written: _too_many(written, max_bad_share, _MIN_READ_TO_STOP),
        progress=progress,
    )
    done.shards.sort()
    if done.bad:
        lines = (json.dumps({"key": bad.key, "reason": bad.reason}) for bad in done.bad)
        storage.write_text(storage.join(dest, BAD_PAIRS), "".join(f"{line}\n" for line in lines))
    if not done.pairs or _too_many(done, max_bad_share, _MIN_READ):
        _delete_shards(dest)
        raise DataError(_refusal(sources, dest, done, max_bad_share))
    write_index(dest, done.shards)
    return IngestResult(dest, done.pairs, len(done.bad), len(done.shards), tuple(passed_over))


# ---------------------------------------------------------------------------------------------------------- tasks


def _write_parts(
    parts: list[SourcePart],
    write: Callable[[SourcePart, int, int | None], Any],
    *,
    at_once: int,
    limit: int | None,
    give_up: Callable[[_Written], bool],
    progress: Callable[[int, int, int], None],
) -> _Written:
    """Run one task per part, until ``limit`` pairs are written or ``give_up`` returns True.

    Args:
        parts: parts in the order of their shards.
        write: function that submits the task of a part. Its arguments are the part, the part's index, and the maximum number
            of pairs to write (None writes all).
        at_once: maximum number of tasks that are submitted and not finished.
        limit: maximum number of pairs in total; None writes all.
        give_up: function of the total so far that returns True to stop; called only if ``limit`` is None.
        progress: see `main`.
    """
    waiting = iter(enumerate(parts))
    running: dict[Any, int] = {}
    bad: dict[int, list[BadPair]] = {}
    total = _Written()
    try:
        while True:
            enough = total.pairs >= limit if limit is not None else give_up(total)
            # With a limit, the number of pairs to write from a part is known only when the previous parts are done.
            room = 0 if enough else (at_once if limit is None else 1) - len(running)
            for index, part in itertools.islice(waiting, room):
                running[write(part, index, None if limit is None else limit - total.pairs)] = index
            if not running:
                total.bad = [pair for index in sorted(bad) for pair in bad[index]]
                return total
            (ready,), _ = ray.wait(list(running))
            written = ray.get(ready)
            total.shards += written.shards
            total.bad += written.bad
            bad[running.pop(ready)] = written.bad
            progress(len(bad), len(parts), len(total.bad))
    except RayTaskError as error:
        # Ray's wrapper is an instance of its cause, but its text is a traceback.
        raise find_user_error(error.cause) or error from error
    finally:
        for task in running:
            ray.cancel(task)


def write_part(
    dest: str, shard_pairs: int, check: bool, part: SourcePart, index: int, most: int | None = None
) -> _Written:
    """Write the first ``most`` usable pairs of a part (None writes all) as shards whose names start with the part's index."""
    written = _Written()

    def readable() -> Iterator[SourcePair]:
        for pair in read_part(part, check=check):
            if isinstance(pair, BadPair):
                written.bad.append(pair)
            else:
                yield pair

    pairs = itertools.islice(readable(), most)
    while (first := next(pairs, None)) is not None:
        name = f"pairs-{index:06d}-{len(written.shards):03d}.tar"
        shard = itertools.chain([first], itertools.islice(pairs, shard_pairs - 1))
        count = write_tar(storage.join(dest, name), ((p.key, p.image, p.suffix, p.metadata) for p in shard))
        written.shards.append((name, count))
    return written


# ------------------------------------------------------------------------------------------ sources and destination


def _find(sources: list[str], columns: ColumnsConfig | None, shard_pairs: int) -> tuple[list[SourcePart], list[str]]:
    if not sources:
        raise DataError("no source is given: name a folder of images with captions, a caption file or pair shards")
    parts: list[SourcePart] = []
    passed_over: list[str] = []
    taken: set[str] = set()
    for source in sources:
        prefix = unique_key(clean_key(storage.name(source)), taken) if len(sources) > 1 else ""
        listing = find_pairs(source, columns, part_pairs=shard_pairs, prefix=prefix)
        parts += listing.parts
        passed_over += listing.passed_over
    return parts, passed_over


def _clear(dest: str, sources: list[str], overwrite: bool) -> None:
    """Check that ``dest`` can be written to, and delete the shards of an earlier ingest if ``overwrite`` is set."""
    for source in sources:
        if storage.overlap(source, dest):
            raise StorageError(f"cannot write pairs to {dest}: it and the source {source} overlap; name a folder apart")
    storage.require_bucket(dest)
    if not storage.exists(dest):
        return
    if not storage.is_folder(dest):
        raise StorageError(f"cannot write pairs to {dest}: it is a file; name a folder")
    found = {entry.relative for entry in storage.list_files(dest)} - {BAD_PAIRS}
    foreign = sorted(name for name in found if name != INDEX and not _SHARD_NAME.fullmatch(name))
    if foreign:
        raise StorageError(f"cannot write pairs to {dest}: it holds other files ({foreign[0]}); name an empty folder")
    if found and not overwrite:
        state = "it holds pair shards" if INDEX in found else "an earlier ingest there did not end (no index.json)"
        raise StorageError(f"cannot write pairs to {dest}: {state}; give --overwrite or another folder")
    storage.delete(storage.join(dest, INDEX))  # the index first: shards without an index count as incomplete
    storage.delete(storage.join(dest, BAD_PAIRS))
    _delete_shards(dest)


def _delete_shards(dest: str) -> None:
    if storage.exists(dest):
        for entry in storage.list_files(dest):
            if _SHARD_NAME.fullmatch(entry.relative):
                storage.delete(entry.uri)


# ------------------------------------------------------------------------------------------------------- bad pairs


def _too_many(written: _Written, max_bad_share: float, min_read: int) -> bool:
    return written.read >= min_read and len(written.bad) > max_bad_share * written.read


def _refusal(sources: list[str], dest: str, done: _Written, max_bad_share: float) -> str:
    if not done.bad:
        return f"no pair in {', '.join(sources)}"
    first = f"the first is {done.bad[0].key}: {done.bad[0].reason}"
    listed = f"all are in {storage.join(dest, BAD_PAIRS)}"
    if not done.pairs:
        return f"no readable pair in {', '.join(sources)}; {first} ({listed})"
    return (
        f"{len(done.bad)} of {done.read} pairs cannot be used, more than --max-bad-share {max_bad_share} allows, so no "
        f"shards are left in {dest}; {first} ({listed})"
    )
