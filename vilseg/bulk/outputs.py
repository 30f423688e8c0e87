"""Outputs and acceptance rules of a bulk segmentation; light to import, for processes without a model."""

from __future__ import annotations

from dataclasses import dataclass, field

MASKS, OVERLAYS = "masks", "overlays"
"""Folders below the output."""


@dataclass(frozen=True)
class Outputs:
    """Files written in addition to the results table, and their location."""

    out: str
    png: bool = True
    overlay: bool = False
    gallery: bool = False
    geotiff: bool = False


@dataclass(frozen=True)
class Rules:
    """Rules applied to an input before inference."""

    max_pixels: int = 100_000_000
    min_side: int = 1
    key_every: int = 6
    """Distance of the key frames of a video, which pass through the model."""


@dataclass
class BlockResult:
    """Result of one block."""

    images: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Names and reasons of rejected inputs."""
