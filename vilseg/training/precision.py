"""Autocast context of the networks."""

from __future__ import annotations

import torch


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the autocast context for networks that run in ``dtype``; for float32 a context without effect."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)
