"""Rank, world size and differentiable collectives. Without a process group every function acts as for a single worker.

Gradients are exact for any number of workers by this convention. Each worker computes the loss of its own pairs, or the same
loss of the whole batch, from gathered tensors. The backward pass of a gather sums the gradients of all workers, and data-parallel
training averages the gradients of the parameters. The mean of the workers' losses is then the loss of the whole batch, and the
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
    """Return the number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this worker's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Copy first: autograd may pass the same tensor to other nodes, which must not get the sum over workers.
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
    """Concatenate the rows of all workers in rank order; backward sums the gradients of all workers for these rows.

    Shape: (B, ...) -> (workers x B, ...).
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


def mean_over_workers(value: Tensor) -> Tensor:
    """Return the elementwise mean of the workers' tensors, differentiable: backward averages the gradients of all workers."""
    if world_size() == 1:
        return value
    return _SumOverWorkers.apply(value) / world_size()


def gather_objects(value: T) -> list[T]:
    """Return the values of all workers in rank order; each is pickled, so they should be small."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients by their means over the workers, as data-parallel training does after its backward pass.

    A parameter that has no gradient on any worker keeps none. If only some workers lack its gradient, theirs count as zero.
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
