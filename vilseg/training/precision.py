"""Autocast of the networks."""

from __future__ import annotations

import torch


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which networks run in ``dtype``; it changes nothing for float32."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)
