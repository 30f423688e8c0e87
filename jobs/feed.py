"""Ray Data: the stream of training batches from storage to the training workers."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ExecutionOptions

from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.order import PairOrder
from vilseg.data.pairs import MANIFEST, BadPair, count_pairs
from vilseg.data.stream import BatchReader, WorkerBatch, decode_features, decode_to_canvas, pack, unpack
from vilseg.data.texts import TextRules
from vilseg.errors import DataError
from vilseg.training.folder import Prepared, RunFolder

_ROW_PAIRS = 128
"""Pairs that a row holds at least, where batches are smaller."""
READ_CPUS, _ORDER_CPUS = 0.45, 0.05
"""Reading waits for storage half of its time. Two tasks that read and one that orders chunks share a CPU."""
_AHEAD = 4
"""Chunks that are ordered for each task that can read, before the first of them has been read."""
_PATIENCE_S, _POLL_S = 15.0, 0.2
"""How long the order is held back while nothing is read, and how often that is looked at."""


def stream_batches(
    order: PairOrder, reader: BatchReader, first_step: int, last_step: int, pairs_read: Callable[[], int]
) -> ray.data.Dataset:
    """A dataset whose rows are batches of one worker, one after the other for every worker, in the order of steps.

    Every row is a block of its own, so that splitting the dataset over W workers deals them out like cards: worker w gets
    rows w, w + W, … Small batches of successive steps share a row, because every block costs Ray some milliseconds.
    Nothing is held but the chunks being read, those that come next, and the rows waiting for their worker.

    Args:
        order: of all pairs.
        reader: of a chunk.
        first_step: of the dataset.
        last_step: the first that is not in it.
        pairs_read: how many pairs readers have told of; only what comes from now on counts.
    """
    before = pairs_read()

    # The dashboard shows the names of both.
    def order_chunks(_: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        # By one task as they are wanted: a source of so many blocks would be made whole before the first is read.
        # Nor does Ray hold back what is made of so few bytes: it would take the order of a long run whole at its start, at a
        # millisecond of a core a chunk, and keep it.
        most = math.ceil(_AHEAD * ray.cluster_resources().get("CPU", 1) / READ_CPUS)
        ends: deque[int] = deque()  # pairs up to the end of each of the last chunks
        given, hold = before, True
        for chunk in order.chunks(first_step, last_step):
            if len(ends) == most:
                wanted = ends.popleft()
                # Machines of one CPU have less than a whole one for Ray Data, which then begins to read when this has ended.
                hold = hold and _comes_to(wanted, pairs_read)
            yield {"chunk": np.array([pickle.dumps(chunk)], dtype=object)}
            given += (chunk.steps - chunk.skip) * order.batch_size
            ends.append(given)

    def read_pairs(rows: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        steps = max(1, _ROW_PAIRS * reader.workers // reader.batch_size)
        yield from _rows(reader.read(pickle.loads(rows["chunk"][0])), reader.workers, steps)

    dataset = ray.data.from_items([{"run": 0}], override_num_blocks=1)
    dataset.context.target_max_block_size = 1  # byte: a block is closed after every row
    ordered = dataset.map_batches(order_chunks, num_cpus=_ORDER_CPUS)
    return ordered.map_batches(read_pairs, batch_size=1, num_cpus=READ_CPUS)


def _comes_to(wanted: int, count: Callable[[], int]) -> bool:
    """Wait until a growing count is at ``wanted``; False if it stood still for too long."""
    last, since = count(), time.monotonic()
    while last < wanted:
        if time.monotonic() - since > _PATIENCE_S:
            return False
        time.sleep(_POLL_S)
        before, last = last, count()
        if last != before:
            since = time.monotonic()
    return True


def _rows(batches: Iterator[WorkerBatch], workers: int, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows of ``steps`` steps each (the last ones may have fewer), worker by worker."""
    while group := list(itertools.islice(batches, steps * workers)):
        for worker in range(workers):
            yield pack(group[worker::workers])


def pairs_from_last_checkpoint(
    config: RunConfig,
    folder: RunFolder,
    prepared: Prepared,
    monitor: Any,
) -> ray.data.Dataset:
    """The batches that a run still needs; called whenever its workers (re)start."""
    done = folder.last_step
    return pairs_of_steps(config, prepared, monitor, done, max(config.trainer.steps, done + 1))


def pairs_of_steps(config: RunConfig, prepared: Prepared, monitor: Any, first: int, last: int) -> ray.data.Dataset:
    """The batches of steps ``first`` up to, not including, ``last``."""
    reader = batch_reader(config, prepared, reporter(monitor))
    return stream_batches(
        pair_order(config, prepared), reader, first, last, lambda: ray.get(monitor.pairs_read.remote())
    )


def pair_order(config: RunConfig, prepared: Prepared) -> PairOrder:
    """The order of a run's pairs."""
    return PairOrder(
        prepared.shards,
        config.trainer.batch_size,
        config.trainer.seed,
        config.data.shuffle_shards,
        {name: part.weight for name, part in config.data.sources.items()},
    )


def batch_reader(
    config: RunConfig, prepared: Prepared, report: Callable[[int, list[BadPair]], None] | None
) -> BatchReader:
    """What reads a run's pairs; see :class:`BatchReader` for ``report``."""
    return BatchReader(
        batch_size=config.trainer.batch_size,
        workers=config.trainer.most_workers,
        seed=config.trainer.seed,
        decode=_decoder(config, prepared),
        tokenize=prepared.tokenizer,
        nouns=prepared.nouns,
        columns=config.data.columns,
        rules=TextRules(config.data.text, config.data.filters),
        report=report,
    )


def read_here(
    config: RunConfig, prepared: Prepared, first: int = 0, *, report: Callable[[int, list[BadPair]], None] | None = None
) -> Iterator[WorkerBatch]:
    """The batches of one worker from step ``first`` on, read in this process without Ray."""
    reader = batch_reader(config, prepared, report)
    for chunk in pair_order(config, prepared).chunks(first, config.trainer.steps):
        yield from reader.read(chunk)


def _decoder(config: RunConfig, prepared: Prepared) -> Callable[[bytes, int], np.ndarray]:
    if not config.data.feature_cache:
        data = config.data
        return partial(decode_to_canvas, canvas=data.canvas, max_pixels=data.max_pixels, filters=data.filters)
    manifest = json.loads(storage.read_text(storage.join(storage.parent(prepared.shards[0].uri), MANIFEST)))
    return partial(decode_features, patches=manifest["patches"], features=manifest["features"])


def execution_options() -> ExecutionOptions:
    """Rows in order, whichever chunk is read first."""
    options = ExecutionOptions()
    options.preserve_order = True
    return options


def worker_batches(shard: ray.data.DataIterator) -> Iterator[WorkerBatch]:
    """The batches of one training worker."""
    # A batch is a block is a row; Ray documents None for that, its annotation does not.
    for columns in shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):  # type: ignore[arg-type]
        yield from unpack(columns)


def reporter(monitor: Any) -> Callable[[int, list[BadPair]], None]:
    """Tells the monitor of pairs read; raises DataError when it has had enough."""

    def report(read: int, missing: list[BadPair]) -> None:
        bad = [(pair.key, pair.reason) for pair in missing if not pair.filtered]
        told = monitor.add_pairs.remote(read, bad, len(missing) - len(bad))
        if bad and (verdict := ray.get(told)):
            raise DataError(verdict)

    return report


def count_in_parallel(uris: list[str]) -> list[int]:
    """Pairs in each shard, counted by as many tasks as there are CPUs."""
    # Named outright, or tasks of a sweep's trial would wait for room in what the trial itself has.
    count = ray.remote(num_cpus=READ_CPUS, scheduling_strategy="SPREAD")(count_pairs)
    return ray.get([count.remote(uri) for uri in uris])
