"""Stream of training batches from storage to the training workers, by Ray Data."""

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
"""Maximum number of pairs, and of bytes of images, in a dataset row that holds batches of several successive steps."""
READ_CPUS, _NUMBERING_CPUS = 0.45, 0.05
"""CPUs requested from Ray by a reading task, and by the task that numbers the read tasks.

Reading waits for storage about half of the time, so two reading tasks and one numbering task fit on one CPU.
"""


def stream_batches(sampler: PairSampler, reader: BatchReader, first_step: int, last_step: int) -> ray.data.Dataset:
    """Return a dataset of the batches of all workers, in the order of the steps.

    A row holds batches of one worker, and consecutive rows belong to workers 0, 1, …, W - 1, 0, … Every row is a Ray Data block
    of its own, so that splitting the dataset over W workers gives worker w the rows w, w + W, … Small batches of successive
    steps share a row, because every block costs Ray some milliseconds. Memory holds only the tasks being read and the rows that
    wait for their worker.

    Args:
        sampler: sampler of the run's pairs.
        reader: reader of the run's pairs.
        first_step: first step to read.
        last_step: step before which to end.
    """
    tasks = list(sampler.read_tasks(first_step, last_step))

    # Both functions have readable names because Ray's dashboard shows them.
    def number_tasks(_: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        # A generator task, because Ray would create all blocks of a data source before it reads the first.
        for task in range(len(tasks)):
            yield {"id": np.array([task])}

    def read_pairs(rows: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        yield from _pack_rows(reader.read(tasks[rows["id"][0]]), reader.workers)

    dataset = ray.data.from_items([{"id": 0}], override_num_blocks=1)
    dataset.context.target_max_block_size = 1  # in bytes: closes a block after every row
    numbered = dataset.map_batches(number_tasks, num_cpus=_NUMBERING_CPUS)
    return numbered.map_batches(read_pairs, batch_size=1, num_cpus=READ_CPUS)


def _pack_rows(batches: Iterator[WorkerBatch], workers: int) -> Iterator[dict[str, np.ndarray]]:
    """Pack batches into rows, one per worker in turn. All rows hold equally many steps, except that the last may hold fewer."""
    for first in batches:
        steps = max(1, min(_ROW_PAIRS // len(first.keys), _ROW_BYTES // first.images.nbytes))
        group = [first, *itertools.islice(batches, steps * workers - 1)]
        for worker in range(workers):
            yield pack(group[worker::workers])


def batches_from_last_checkpoint(
    config: RunConfig,
    run_dir: RunDirectory,
    prepared: PreparedRun,
    monitor: Any,
) -> ray.data.Dataset:
    """Return the batches after the last checkpoint. Ray calls this whenever the run's workers start or restart."""
    done = run_dir.last_step
    return batches_of_steps(config, prepared, monitor, done, max(config.trainer.steps, done + 1))


def batches_of_steps(config: RunConfig, prepared: PreparedRun, monitor: Any, first: int, last: int) -> ray.data.Dataset:
    """Return the batches of steps ``first`` to ``last - 1``."""
    return stream_batches(
        make_sampler(config, prepared), make_batch_reader(config, prepared, make_pair_reporter(monitor)), first, last
    )


def make_sampler(config: RunConfig, prepared: PreparedRun) -> PairSampler:
    """Return the sampler of a run's pairs."""
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
    """Return the batch reader of a run's pairs; for ``report`` see :class:`BatchReader`."""
    return BatchReader(
        batch_size=config.trainer.batch_size,
        workers=config.trainer.max_workers,
        seed=config.trainer.seed,
        decode=_decoder(config, prepared),
        tokenize=prepared.tokenizer,
        nouns=prepared.nouns,
        columns=ColumnsConfig()
        if config.data.feature_cache
        else config.data.columns,  # a feature cache has fixed names
        selector=TextSelector(config.data.text, config.data.filters),
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
    """Yield the batches of a run with one worker from step ``first`` on, read in this process without Ray."""
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
    """Return Ray Data options that preserve the order of rows, independent of the order in which tasks end."""
    options = ExecutionOptions()
    options.preserve_order = True
    return options


def worker_batches(shard: ray.data.DataIterator) -> Iterator[WorkerBatch]:
    """Yield the batches of one training worker from its ``shard``, the worker's split of the dataset of `stream_batches`."""
    # batch_size=None yields each block as one batch; Ray documents it, but its type annotation lacks it.
    for columns in shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):  # type: ignore[arg-type]
        yield from unpack(columns)


def make_pair_reporter(monitor: Any) -> Callable[[int, list[BadPair]], None]:
    """Return a function that reports pairs read to the training monitor and raises DataError when too many are bad."""

    def report(read: int, missing: list[BadPair]) -> None:
        bad = [pair for pair in missing if not pair.filtered]
        verdict_ref = monitor.add_pairs.remote(read, bad, len(missing) - len(bad))
        if bad and (verdict := ray.get(verdict_ref)):
            raise DataError(verdict)

    return report


def count_in_parallel(uris: list[str]) -> list[int]:
    """Return the number of pairs in each shard, counted in parallel tasks."""
    # SPREAD, because by default the tasks of a sweep's trial would wait for resources of the trial's own placement group.
    count = ray.remote(num_cpus=READ_CPUS, scheduling_strategy="SPREAD")(count_pairs)
    return ray.get([count.remote(uri) for uri in uris])
