"""A worker's batch of image-caption pairs as tensors on its device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vilseg.data.batch_reader import WorkerBatch


@dataclass(frozen=True)
class TensorBatch:
    """A worker's batch of pairs as tensors on its device; :class:`WorkerBatch` documents the fields and their shapes."""

    images: Tensor
    tokens: Tensor
    phrases: Tensor
    seeds: Tensor
    keys: tuple[str, ...]

    @classmethod
    def of(cls, batch: WorkerBatch, device: torch.device) -> TensorBatch:
        """Copy a batch to the device. A copy to a GPU is asynchronous, from pinned memory."""
        images, tokens, phrases, seeds = (
            _owned(array, pinned=device.type == "cuda").to(device, non_blocking=True)
            for array in (batch.images, batch.tokens, batch.phrases, batch.seeds)
        )
        return cls(images, tokens if tokens.is_floating_point() else tokens.long(), phrases.long(), seeds, batch.keys)

    def __len__(self) -> int:
        return len(self.seeds)

    def split(self, size: int) -> list[TensorBatch]:
        """Split the batch into chunks of ``size`` pairs; the last may be smaller."""
        starts = range(0, len(self), size)
        parts = zip(*(x.split(size) for x in (self.images, self.tokens, self.phrases, self.seeds)), starts, strict=True)
        return [
            TensorBatch(images, tokens, phrases, seeds, self.keys[start : start + size])
            for images, tokens, phrases, seeds, start in parts
        ]


def _owned(array: np.ndarray, *, pinned: bool) -> Tensor:
    """Copy an array into a tensor. A copy is needed because the array may be a read-only view of shared memory."""
    if not pinned:
        return torch.tensor(array)
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    tensor = torch.empty(array.shape, dtype=dtype, pin_memory=True)
    tensor.numpy()[...] = array
    return tensor
