"""Weights sharded over the workers (FSDP2: fully sharded data parallelism, Zhao et al. 2023), and full state dicts.

Every function also takes tensors that are not sharded and returns them as they are, so that both cases share one code path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vilseg.distributed import rank, world_size

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def apply_fsdp(module: nn.Module) -> nn.Module:
    """Shard weights, gradients and optimiser states evenly over the workers, in place; return the module.

    The weights of each transformer layer are gathered while that layer computes, all other weights for a whole step. Scalars
    cannot be sharded: every worker keeps them and their gradients are averaged. Losses and gradients equal those of training
    without sharding.
    """
    if world_size() == 1:
        return module
    from torch.distributed.device_mesh import DeviceMesh  # imported here because it takes seconds
    from torch.distributed.fsdp import fully_shard

    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP shards contiguous tensors only
    scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(_average_gradient)
    world = dist.group.WORLD
    assert world is not None
    mesh = DeviceMesh.from_group(world, device.type)  # reuse the open connections; opening new ones may fail
    for layer in _layers(module):
        fully_shard(layer, mesh=mesh, ignored_params=scalars)
    fully_shard(module, mesh=mesh, ignored_params=scalars)
    return module


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= world_size()


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost module lists, in which transformers keep their layers."""
    if isinstance(module, nn.ModuleList):
        yield from module
        return
    for child in module.children():
        yield from _layers(child)


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Return True for a ``DTensor``. It is recognised by an attribute because importing the class takes seconds."""
    return isinstance(value, Tensor) and hasattr(value, "placements")


def local_shard(tensor: Tensor) -> Tensor:
    """Return this worker's shard of a sharded tensor, as a view; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_state(state: Any) -> Any:
    """Gather the sharded tensors of a state dict on the CPU of rank 0. Collective: call it on every rank.

    On the other ranks sharded tensors are replaced by None. Everything that is not sharded is returned unchanged.
    """
    if isinstance(state, dict):
        return {name: full_state(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(full_state(value) for value in state)
    if not is_sharded(state):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if rank() == 0 else None


def shard_like(value: Tensor, pattern: Tensor) -> Tensor:
    """Shard a full tensor in the same way as ``pattern``; every worker must pass the same tensor.

    ``value`` is returned unchanged if ``pattern`` is not sharded.
    """
    if not is_sharded(pattern):
        return value
    from torch.distributed.tensor import distribute_tensor

    here = value.to(pattern.device)
    return distribute_tensor(here, pattern.device_mesh, pattern.placements, src_data_rank=None)


def clip_gradient_norm(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Clip gradients by their total norm like ``torch.nn.utils.clip_grad_norm_``, even if only some of them are sharded.

    Args:
        parameters: parameters whose gradients are clipped in place.
        largest: maximum norm.

    Returns:
        Norm before clipping, the same on every worker, a scalar.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(is_sharded(gradient) for gradient in gradients):
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    square = torch.nn.utils.get_total_norm([local_shard(g) for g in gradients if is_sharded(g)]).square()
    dist.all_reduce(square)
    kept = torch.nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)])
    norm = (square + kept.to(square.device).square()).sqrt()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)  # torch adds the same 1e-6
    torch._foreach_mul_([local_shard(gradient) for gradient in gradients], factor)
    return norm
