"""Copying of batches to the device ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from vilseg.data.batch_reader import WorkerBatch
from vilseg.training.prefetch import copy_to_device


def numbered(count: int, read: list[int]) -> Iterator[WorkerBatch]:
    for number in range(count):
        read.append(number)
        images = np.full((2, 4, 4, 3), number, np.uint8)
        images.flags.writeable = False  # as shared memory is
        yield WorkerBatch(
            images,
            np.full((2, 5), number, np.int32),
            np.full((2, 32), -1, np.int32),
            np.arange(2, dtype=np.int64),
            (f"{number}a", f"{number}b"),
        )


def test_on_the_cpu_batches_come_one_by_one_and_own_their_memory() -> None:
    read: list[int] = []
    seen = 0
    for number, batch in enumerate(copy_to_device(numbered(3, read), torch.device("cpu"))):
        assert read == list(range(number + 1)), "nothing is read ahead"
        assert batch.images.dtype == torch.uint8
        assert batch.tokens.dtype == batch.phrases.dtype == torch.int64
        assert batch.keys == (f"{number}a", f"{number}b")
        assert bool((batch.images == number).all())
        batch.images.add_(1)
        seen += 1
    assert seen == 3
