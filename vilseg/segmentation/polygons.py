"""Outlines of regions as polygons, for programs that draw them or cannot read run-length codes."""

import itertools
from collections.abc import Mapping
from typing import Any

import contourpy
import numpy as np
from pycocotools import mask as coco_mask

Polygon = list[list[tuple[float, float]]]
"""Closed rings of (x, y) in pixels, the outline first and then its holes; the last point is the first one again. (0, 0) is the
upper left corner of the image."""


def polygons(rle: Mapping[str, Any]) -> list[Polygon]:
    """Trace the outlines of a mask, each connected part a polygon, as GeoJSON orders rings (RFC 7946, section 3.1.6).

    Lines run half-way between the middles of pixels inside and outside, so corners are cut by half a pixel.

    Args:
        rle: COCO's compressed run-length code, as in `Region.rle`.

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
        # The padding moved everything by one pixel, and a pixel's middle is half a pixel from its corner.
        [_ring(part[begin:end] - 0.5) for begin, end in itertools.pairwise(ends)]
        for part, ends in zip(points, offsets, strict=True)
    ]


def _ring(points: np.ndarray) -> list[tuple[float, float]]:
    """Drop the points of a ring that lie on the line between their neighbours."""
    opened = points[:-1]
    before, after = np.roll(opened, 1, axis=0), np.roll(opened, -1, axis=0)
    ahead, behind = after - opened, opened - before
    corner = ahead[:, 0] * behind[:, 1] != ahead[:, 1] * behind[:, 0]
    kept = opened[corner]
    return [(float(x), float(y)) for x, y in np.vstack([kept, kept[:1]])]
