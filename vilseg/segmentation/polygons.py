"""Outlines of regions as polygons, for programs that draw them or cannot read run-length encoding."""

import itertools
from collections.abc import Mapping
from typing import Any

import contourpy
import numpy as np
from pycocotools import mask as coco_mask

Polygon = list[list[tuple[float, float]]]
"""List of closed rings of (x, y) points in pixels: first the outline, then its holes. The last point of a ring repeats the first.
(0, 0) is the upper left corner of the image."""


def polygons(rle: Mapping[str, Any]) -> list[Polygon]:
    """Return one polygon for each connected component of a mask, with rings ordered as in GeoJSON (RFC 7946, section 3.1.6).

    Lines run half-way between the centres of inner and outer pixels, so corners are cut by half a pixel.

    Args:
        rle: COCO's compressed run-length encoding, as in `Region.rle`.

    Example:
        >>> from pycocotools import mask
        >>> square = np.zeros((4, 6), np.uint8, order="F")
        >>> square[1:3, 2:4] = 1
        >>> polygons(mask.encode(square))
        [[[(2.0, 1.5), (2.5, 1.0), (3.5, 1.0), (4.0, 1.5), (4.0, 2.5), (3.5, 3.0), (2.5, 3.0), (2.0, 2.5), (2.0, 1.5)]]]
    """
    mask = np.pad(coco_mask.decode(rle), 1)
    generator = contourpy.contour_generator(z=mask, fill_type=contourpy.FillType.OuterOffset)
    points, offsets = generator.filled(0.5, np.inf)  # type: ignore[misc]  # two with this fill type
    return [
        # Padding shifted coordinates by one pixel, and the centre of a pixel is half a pixel from its corner: -1 + 0.5.
        [_ring(part[begin:end] - 0.5) for begin, end in itertools.pairwise(ends)]
        for part, ends in zip(points, offsets, strict=True)
    ]


def _ring(points: np.ndarray) -> list[tuple[float, float]]:
    """Convert a ring to a list, without points on the straight line between their neighbours."""
    opened = points[:-1]
    before, after = np.roll(opened, 1, axis=0), np.roll(opened, -1, axis=0)
    ahead, behind = after - opened, opened - before
    corner = ahead[:, 0] * behind[:, 1] != ahead[:, 1] * behind[:, 0]
    kept = opened[corner]
    return [(float(x), float(y)) for x, y in np.vstack([kept, kept[:1]])]
