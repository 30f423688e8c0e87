"""Rank, world size and collectives with gradient; every function is harmless without a process group.

The convention that keeps gradients exact for any number of workers: each worker computes its share of a loss (or the same
whole loss) from gathered tensors, backward through a gather sums the gradients of all workers, and data-parallel training
averages parameter gradients. The mean over workers of the values returned is then the loss of the whole batch, and the
averaged gradient is its gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this worker from 0; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A copy: autograd may give the same tensor to others, and the sum over workers must not reach them.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


class _SumOverWorkers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all workers in rank order, with gradient. Shape: (B, ...) -> (workers x B, ...)."""
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


def mean_over_workers(value: Tensor) -> Tensor:
    """Mean of a tensor over the workers, with gradient; each worker's gradient is that of the mean over workers of losses."""
    if world_size() == 1:
        return value
    return _SumOverWorkers.apply(value) / world_size()


def gather_objects(value: T) -> list[T]:
    """Gather small picklable values of all workers, in rank order."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients by their means over the workers, as data-parallel training does after its backward pass.

    A parameter that no worker has a gradient of keeps none.
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    holders = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=trained[0].device)
    dist.all_reduce(holders)
    for parameter, count in zip(trained, holders.tolist(), strict=True):
        if count:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()
