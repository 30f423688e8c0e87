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
    """Cut weights, gradients and optimiser states evenly among the workers, in place; returns the module.

    The layers of transformers are put together one by one while they compute, all that lies outside of them for a whole
    step. A scalar cannot be cut: every worker keeps it, and its gradient is averaged. Losses and gradients are those of
    whole copies.
    """
    if world_size() == 1:
        return module
    from torch.distributed.device_mesh import DeviceMesh  # only sharding needs them, and they take seconds
    from torch.distributed.fsdp import fully_shard

    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # only rows that lie together can be cut
    scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(_average_gradient)
    world = dist.group.WORLD
    assert world is not None
    mesh = DeviceMesh.from_group(world, device.type)  # of the connections that there are: new ones may fail
    for layer in _layers(module):
        fully_shard(layer, mesh=mesh, ignored_params=scalars)
    fully_shard(module, mesh=mesh, ignored_params=scalars)
    return module


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= world_size()


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of module lists, which is where transformers keep their layers."""
    if isinstance(module, nn.ModuleList):
        yield from module
        return
    for child in module.children():
        yield from _layers(child)


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """True for a ``DTensor``, known by its attribute: importing the class takes seconds."""
    return isinstance(value, Tensor) and hasattr(value, "placements")


def local_shard(tensor: Tensor) -> Tensor:
    """Return this worker's part of a sharded tensor, as a view; a tensor that is not sharded as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_state(state: Any) -> Any:
    """Gather full tensors on the CPU of rank 0. Collective: call it on every rank.

    On the other ranks None stands for sharded tensors. A state without sharded tensors is returned as it is.
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
    """Shard a full tensor in the way ``pattern`` is sharded; every worker must pass the same tensor."""
    if not is_sharded(pattern):
        return value
    from torch.distributed.tensor import distribute_tensor

    here = value.to(pattern.device)
    return distribute_tensor(here, pattern.device_mesh, pattern.placements, src_data_rank=None)


def clip_gradient_norm(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` where some gradients are cut and some are not; the norm before, shape ()."""
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(is_sharded(gradient) for gradient in gradients):
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    square = torch.nn.utils.get_total_norm([local_shard(g) for g in gradients if is_sharded(g)]).square()
    dist.all_reduce(square)
    kept = torch.nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)])
    norm = (square + kept.to(square.device).square()).sqrt()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)  # the summand is torch's
    torch._foreach_mul_([local_shard(gradient) for gradient in gradients], factor)
    return norm
