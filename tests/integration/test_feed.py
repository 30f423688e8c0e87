"""The stream of training batches through Ray Data, beside what it feeds: how far ahead it goes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import ray

from jobs.feed import execution_options, stream_batches, worker_batches
from jobs.monitor import Monitor
from jobs.session import Session
from vilseg.data.order import Chunk, PairOrder
from vilseg.data.pairs import Shard
from vilseg.data.stream import WorkerBatch

PAIRS, BATCH = 64, 8
CHUNKS = 5_000


@dataclass(frozen=True)
class CountedOrder(PairOrder):
    """Writes down how many chunks were asked for."""

    count: Path = Path()

    def chunks(self, first_step: int, last_step: int) -> Iterator[Chunk]:
        for number, chunk in enumerate(super().chunks(first_step, last_step), 1):
            self.count.write_text(str(number))
            yield chunk


class Reader:
    """Reads nothing, and tells of it as one that does."""

    workers, batch_size = 1, BATCH

    def __init__(self, monitor: ray.actor.ActorHandle) -> None:
        self._monitor = monitor

    def read(self, chunk: Chunk) -> Iterator[WorkerBatch]:
        for step in range(chunk.first_step, chunk.first_step + chunk.steps):
            images, ones = np.zeros((BATCH, 8, 8, 3), np.uint8), np.ones((BATCH, 4), np.int32)
            yield WorkerBatch(images, ones, ones, np.full(BATCH, step), ("key",) * BATCH)
        self._monitor.add_pairs.remote(chunk.steps * BATCH, [])


def test_the_order_of_a_long_run_is_made_as_it_is_wanted(ray_cluster: Session, tmp_path: Path) -> None:
    monitor = Monitor.remote(0.0)
    order = CountedOrder((Shard("pairs.tar", PAIRS),), BATCH, 0, count=tmp_path / "count")
    steps = CHUNKS * PAIRS // BATCH
    read = partial(_pairs_read, monitor)
    dataset = stream_batches(order, Reader(monitor), 0, steps, read)  # type: ignore[arg-type]
    dataset.context.execution_options = execution_options()
    batches = worker_batches(dataset.iterator())
    seen = [int(batch.seeds[0]) for batch in itertools.islice(batches, 400)]
    assert seen == list(range(400)), "steps come in their order"
    assert int((tmp_path / "count").read_text()) < CHUNKS // 2
    ray.kill(monitor)


def _pairs_read(monitor: ray.actor.ActorHandle) -> int:
    return ray.get(monitor.pairs_read.remote())
