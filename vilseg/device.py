"""Choice of the device and the floating-point precision for computation."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from vilseg.errors import ConfigError


def best_device() -> torch.device:
    """Return the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of network computations on ``device``.

    Args:
        precision: ``bfloat16``, ``float32``, or ``auto``: bfloat16 if the device has matrix units for it, otherwise float32.
        device: device of the network.
    """
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16_units(device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def has_bfloat16_units(device: torch.device) -> bool:
    """Return True if bfloat16 is faster than float32 on ``device``: GPUs from Ampere on, CPUs with AMX or AVX-512 BF16.

    On other CPUs bfloat16 is slower than float32. With AVX-512 BF16 (AMD EPYC of 2024) a ViT-B/16 takes 0.53 times as long in
    bfloat16 as in float32, and the demo's encoder 0.70 times as long.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(u) for u in ("amx_bf16", "avx512_bf16"))


def require_compiler(device: torch.device) -> None:
    """Raise ConfigError if a compiler that ``torch.compile`` needs for ``device`` is not installed."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"trainer.compile needs a C++ compiler, and there is no {compiler} here; install one, name it by the "
            "environment variable CXX, or set trainer.compile=false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("trainer.compile needs triton for a GPU; install it, or set trainer.compile=false")
