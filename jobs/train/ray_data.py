"""Ray Data: the stream of training batches from storage to the training workers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ExecutionOptions

from vilseg import storage
from vilseg.config import RunConfig
from vilseg.config.data import ColumnsConfig
from vilseg.data.batch_reader import BatchReader, WorkerBatch, decode_features, decode_to_canvas, pack, unpack
from vilseg.data.sampler import PairSampler
from vilseg.data.shards import MANIFEST, BadPair, count_pairs
from vilseg.data.text_selection import TextSelector
from vilseg.errors import DataError
from vilseg.training.run_dir import PreparedRun, RunDirectory

_ROW_PAIRS, _ROW_BYTES = 512, 64 << 20
"""Batches of successive steps share a row up to so many pairs and bytes of images."""
READ_CPUS, _NUMBERING_CPUS = 0.45, 0.05
"""Reading waits for storage half of its time. Two tasks that read and one that numbers tasks share a CPU."""


def stream_batches(order: PairSampler, reader: BatchReader, first_step: int, last_step: int) -> ray.data.Dataset:
    """A dataset whose rows are batches of one worker, one after the other for every worker, in the order of steps.

    Every row is a block of its own, so that splitting the dataset over W workers deals them out like cards: worker w gets
    rows w, w + W, … Small batches of successive steps share a row, because every block costs Ray some milliseconds.
    Nothing is held but the tasks being read and the rows waiting for their worker.
    """
    tasks = list(order.read_tasks(first_step, last_step))

    # The dashboard shows the names of both.
    def number_tasks(_: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        # By one task as they are wanted: a source of so many blocks would be made whole before the first is read.
        for task in range(len(tasks)):
            yield {"id": np.array([task])}

    def read_pairs(rows: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        yield from _pack_rows(reader.read(tasks[rows["id"][0]]), reader.workers)

    dataset = ray.data.from_items([{"id": 0}], override_num_blocks=1)
    dataset.context.target_max_block_size = 1  # byte: a block is closed after every row
    numbered = dataset.map_batches(number_tasks, num_cpus=_NUMBERING_CPUS)
    return numbered.map_batches(read_pairs, batch_size=1, num_cpus=READ_CPUS)


def _pack_rows(batches: Iterator[WorkerBatch], workers: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows of as many steps each (the last ones may have fewer), worker by worker."""
    for first in batches:
        steps = max(1, min(_ROW_PAIRS // len(first.keys), _ROW_BYTES // first.images.nbytes))
        group = [first, *itertools.islice(batches, steps * workers - 1)]
        for worker in range(workers):
            yield pack(group[worker::workers])


def batches_from_last_checkpoint(
    config: RunConfig,
    folder: RunDirectory,
    prepared: PreparedRun,
    monitor: Any,
) -> ray.data.Dataset:
    """The batches that a run still needs; called whenever its workers (re)start."""
    done = folder.last_step
    return batches_of_steps(config, prepared, monitor, done, max(config.trainer.steps, done + 1))


def batches_of_steps(config: RunConfig, prepared: PreparedRun, monitor: Any, first: int, last: int) -> ray.data.Dataset:
    """The batches of steps ``first`` up to, not including, ``last``."""
    return stream_batches(
        make_sampler(config, prepared), make_batch_reader(config, prepared, make_pair_reporter(monitor)), first, last
    )


def make_sampler(config: RunConfig, prepared: PreparedRun) -> PairSampler:
    """The order of a run's pairs."""
    return PairSampler(
        prepared.shards,
        config.trainer.batch_size,
        config.trainer.seed,
        config.data.shuffle_shards,
        {name: part.weight for name, part in config.data.sources.items()},
    )


def make_batch_reader(
    config: RunConfig, prepared: PreparedRun, report: Callable[[int, list[BadPair]], None] | None
) -> BatchReader:
    """What reads a run's pairs; see :class:`BatchReader` for ``report``."""
    return BatchReader(
        batch_size=config.trainer.batch_size,
        workers=config.trainer.max_workers,
        seed=config.trainer.seed,
        decode=_decoder(config, prepared),
        tokenize=prepared.tokenizer,
        nouns=prepared.nouns,
        columns=ColumnsConfig() if config.data.feature_cache else config.data.columns,  # of a cache, the names are ours
        rules=TextSelector(config.data.text, config.data.filters),
        variants=config.data.cache_variants,
        report=report,
    )


def read_batches_locally(
    config: RunConfig,
    prepared: PreparedRun,
    first: int = 0,
    *,
    report: Callable[[int, list[BadPair]], None] | None = None,
) -> Iterator[WorkerBatch]:
    """The batches of one worker from step ``first`` on, read in this process without Ray."""
    reader = make_batch_reader(config, prepared, report)
    for task in make_sampler(config, prepared).read_tasks(first, config.trainer.steps):
        yield from reader.read(task)


def _decoder(config: RunConfig, prepared: PreparedRun) -> Callable[[bytes, int], np.ndarray]:
    if not config.data.feature_cache:
        data = config.data
        return partial(decode_to_canvas, canvas=data.canvas, max_pixels=data.max_pixels, filters=data.filters)
    uri = storage.join(storage.parent(prepared.shards[0].uri), MANIFEST)
    with storage.retrying():
        manifest = json.loads(storage.read_text(uri))
    return partial(decode_features, patches=manifest["patches"], features=manifest["features"])


def execution_options() -> ExecutionOptions:
    """Rows in order, whichever task is read first."""
    options = ExecutionOptions()
    options.preserve_order = True
    return options


def worker_batches(shard: ray.data.DataIterator) -> Iterator[WorkerBatch]:
    """The batches of one training worker."""
    # A batch is a block is a row; Ray documents None for that, its annotation does not.
    for columns in shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):  # type: ignore[arg-type]
        yield from unpack(columns)


def make_pair_reporter(monitor: Any) -> Callable[[int, list[BadPair]], None]:
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
