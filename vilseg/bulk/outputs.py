"""Outputs and input limits of a bulk segmentation; imports neither torch nor other heavy packages."""

from __future__ import annotations

from dataclasses import dataclass, field

MASKS, OVERLAYS = "masks", "overlays"
"""Names of the folders of masks and overlays in the output folder."""


@dataclass(frozen=True)
class Outputs:
    """Output folder, and the kinds of files to write in addition to the results table."""

    out: str
    """URI of the output folder."""
    png: bool = True
    """Write label maps as PNG."""
    overlay: bool = False
    """Write images and videos with overlaid classes."""
    gallery: bool = False
    """Write thumbnails for the gallery."""
    geotiff: bool = False
    """Segment georeferenced TIFFs as a whole, with a GeoTIFF as mask."""


@dataclass(frozen=True)
class Rules:
    """Limits on inputs, and options that depend on their type."""

    max_pixels: int = 100_000_000
    """Maximum number of pixels of an image; larger images are rejected."""
    min_side: int = 1
    """Minimum height and width of an image in pixels; smaller images are rejected."""
    key_every: int = 6
    """Interval in frames between the key frames of a video. Only key frames pass through the model."""


@dataclass
class BlockResult:
    """Counts of one block of inputs."""

    images: int = 0
    """Number of processed inputs, rejected ones included."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each rejected input."""
