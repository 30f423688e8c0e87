"""What a bulk segmentation writes and what it accepts; light to import, for processes that compute nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

MASKS, OVERLAYS = "masks", "overlays"
"""Folders below the output."""


@dataclass(frozen=True)
class Outputs:
    """What is written beside the rows, and where."""

    out: str
    png: bool = True
    overlay: bool = False
    gallery: bool = False
    geotiff: bool = False


@dataclass(frozen=True)
class Rules:
    """What is done with an input before the model sees it."""

    max_pixels: int = 100_000_000
    min_side: int = 1
    key_every: int = 6
    """Of a video, every so many frames the model looks at one."""


@dataclass
class BlockResult:
    """What came of a block."""

    images: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Names and reasons."""
