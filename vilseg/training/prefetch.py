"""Copying of batches to the device ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from vilseg.data.batch_reader import WorkerBatch
from vilseg.training.batch import TensorBatch


def copy_to_device(batches: Iterable[WorkerBatch], device: torch.device) -> Iterator[TensorBatch]:
    """Yield batches on the device. On a GPU the next batch is copied by a separate stream while the current one is processed."""
    if device.type != "cuda":
        for batch in batches:
            yield TensorBatch.of(batch, device)
        return
    copying = torch.cuda.Stream(device)
    ahead: TensorBatch | None = None
    for batch in batches:
        ready = ahead
        with torch.cuda.stream(copying):
            ahead = TensorBatch.of(batch, device)
        if ready is not None:
            yield ready
        _hand_over(ahead, copying, device)
    if ahead is not None:
        yield ahead


def _hand_over(batch: TensorBatch, copying: torch.cuda.Stream, device: torch.device) -> None:
    """Make the current stream wait for the copy, and keep the batch's memory until the current stream no longer uses it."""
    computing = torch.cuda.current_stream(device)
    computing.wait_stream(copying)
    for tensor in (batch.images, batch.tokens, batch.phrases, batch.seeds):
        tensor.record_stream(computing)
