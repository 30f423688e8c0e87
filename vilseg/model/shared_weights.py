"""Split a model into a pickle without tensors and the arrays of its tensors, so that processes of one machine share the weights.

Arrays in shared memory are mapped, not copied: ten worker processes on a machine need the memory of one copy of the weights.
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
"""Integer dtype of the same size for each torch dtype that numpy lacks."""


@dataclass(frozen=True)
class SplitObject:
    """An object split into a pickle and the arrays of its tensors; argument of :func:`join_weights`."""

    skeleton: bytes
    """Pickle of the object with numbers in place of tensors; always made by this program, never read from a file."""
    arrays: list[np.ndarray]
    """Values of the tensors, contiguous, with the dimensions in the order of ``layouts``."""
    layouts: list[tuple[torch.dtype, list[int]]]
    """For each tensor its dtype and the order of its dimensions in memory, slowest first (weights may be channels-last)."""

    def digest(self) -> str:
        """Return a hash of the tensors' values, in hexadecimal."""
        total = hashlib.blake2b(digest_size=16)
        for array in self.arrays:
            total.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        return total.hexdigest()


def split_weights(obj: Any) -> SplitObject:
    """Split a model, or an object that contains one, into a pickle and arrays.

    Arrays of contiguous tensors on the CPU share memory with them.

    Example:
        >>> import torch
        >>> parts = split_weights(torch.nn.Linear(3, 2))
        >>> [array.shape for array in parts.arrays]
        [(2, 3), (2,)]
        >>> join_weights(parts)
        Linear(in_features=3, out_features=2, bias=True)
    """
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
    Pickler(buffer, protocol=5).dump(obj)
    return SplitObject(buffer.getvalue(), arrays, layouts)


def join_weights(parts: SplitObject) -> Any:
    """Rebuild the object for inference only: its weights share memory with the arrays, which may be read-only."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> torch.Tensor:
            index = abs(number) - 1
            dtype, order = parts.layouts[index]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about read-only arrays; nothing writes to them
                tensor = torch.from_numpy(parts.arrays[index]).view(dtype)
            tensor = tensor.permute([order.index(axis) for axis in range(len(order))])
            return torch.nn.Parameter(tensor, requires_grad=False) if number < 0 else tensor

    return Unpickler(io.BytesIO(parts.skeleton)).load()
