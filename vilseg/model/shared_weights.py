"""What holds a model taken apart into a skeleton and plain arrays, so that processes of a machine can share its weights.

Arrays in shared memory are mapped, not copied: ten workers hold the weights once.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_AS_INTEGERS = {torch.bfloat16: torch.int16}
"""Types that numpy lacks, by others of their size."""


@dataclass(frozen=True)
class SplitObject:
    """An object without its tensors, and these; what :func:`join_weights` takes."""

    skeleton: bytes
    """Pickle of our own making, with numbers in the place of tensors; never read from a file."""
    arrays: list[np.ndarray]
    layouts: list[tuple[torch.dtype, list[int]]]
    """Type and order of dimensions in memory, the slowest first: channels may come last there."""

    def digest(self) -> str:
        """Of the tensors' values; hexadecimal."""
        total = hashlib.blake2b(digest_size=16)
        for array in self.arrays:
            total.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        return total.hexdigest()


def split_weights(whole: Any) -> SplitObject:
    """The parts of a model, or of what holds one; the arrays are views of its weights where these are on a CPU."""
    arrays: list[np.ndarray] = []
    layouts: list[tuple[torch.dtype, list[int]]] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, torch.Tensor):
                return None
            tensor = value.detach().cpu()
            order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
            array = tensor.permute(order).contiguous().view(_AS_INTEGERS.get(tensor.dtype, tensor.dtype)).numpy()
            arrays.append(array)
            layouts.append((tensor.dtype, order))
            return -len(arrays) if isinstance(value, torch.nn.Parameter) else len(arrays)

    buffer = io.BytesIO()
    Pickler(buffer, protocol=5).dump(whole)
    return SplitObject(buffer.getvalue(), arrays, layouts)


def join_weights(parts: SplitObject) -> Any:
    """The whole again, for inference alone: its weights are the arrays themselves, which may be read-only."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> torch.Tensor:
            place = abs(number) - 1
            dtype, order = parts.layouts[place]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of arrays that must not be written; nobody does
                tensor = torch.from_numpy(parts.arrays[place]).view(dtype)
            tensor = tensor.permute([order.index(axis) for axis in range(len(order))])
            return torch.nn.Parameter(tensor, requires_grad=False) if number < 0 else tensor

    return Unpickler(io.BytesIO(parts.skeleton)).load()
