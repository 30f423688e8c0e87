"""Class scores of a picture that is too large for one pass: overlapping windows, blended so that no seam is left.

Along each side the windows have one size and overlap by o pixels or more. At x pixels from an end that is not the
picture's, a window weighs

    r(x) = sin^2(pi/2 clip(2 x / o - 1/2, 0, 1)),

which is what the window beyond that end leaves free: r(x) + r(o - x) = 1. The outer quarter of the overlap weighs nothing:
it is context, for a network sees a border there that the picture has not. Where the last window, moved back to end with
the picture, overlaps by more, the weights are divided by their sum. Bilinear enlargement is separable, so the blended
scores are sums of matrix products,

    S_Cyx = sum_ij A^i_yh M^ij_Chw A^j_xw,

with the map M^ij of window i, j, and in A its interpolation along one side times the weights.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_KEPT_BYTES = 256 << 20
"""Maps kept for the rows of windows still to come; windows of wider pictures are computed once more instead."""

_KEPT_LEAST = 9
"""Three windows a side may reach into one block."""


@dataclass(frozen=True)
class WindowAxis:
    """Overlapping windows along one side of a picture; all numbers are pixels."""

    length: int
    window: int
    overlap: int
    starts: tuple[int, ...]

    @classmethod
    def cover(cls, length: int, window: int, overlap: int) -> WindowAxis:
        """The fewest windows for a side: each ``window - overlap`` after the one before, the last ends with the side.

        A side shorter than a window is one window. ``overlap`` is at most half a window.
        """
        last = max(0, length - window)
        return cls(length, min(window, length), overlap, (*range(0, last, window - overlap), last))

    def overlapping(self, start: int, stop: int) -> range:
        """The windows that hold a pixel of start..stop."""
        return range(bisect_right(self.starts, start - self.window), bisect_left(self.starts, stop))

    def weights(self, index: int, start: int, stop: int) -> np.ndarray:
        """How much a window counts at pixels start..stop; over all windows the sum is 1. Shape: (stop - start,)."""
        total = sum(self._ramp(other, start, stop) for other in self.overlapping(start, stop))
        return self._ramp(index, start, stop) / total

    def _ramp(self, index: int, start: int, stop: int) -> np.ndarray:
        inside = np.arange(start, stop) + 0.5 - self.starts[index]
        # Without an overlap the ramp is a step; at the ends of the picture there is none.
        rise = inside / max(self.overlap, 1e-9) if index > 0 else np.inf
        fall = (self.window - inside) / max(self.overlap, 1e-9) if index < len(self.starts) - 1 else np.inf
        return np.sin(np.pi / 2 * np.clip(2 * np.minimum(rise, fall) - 0.5, 0, 1)) ** 2 * np.ones(len(inside))

    def upsampling_matrix(self, index: int, start: int, stop: int, cells: int) -> Tensor:
        """Bilinear interpolation of a window's ``cells`` at pixels start..stop, times the weights.

        Cell centres lie as in ``interpolate(align_corners=False)``. Shape: (stop - start, cells), float32.
        """
        inside = np.arange(start, stop) + 0.5 - self.starts[index]
        place = np.clip(inside * cells / self.window - 0.5, 0, cells - 1)
        distance = np.abs(place[:, None] - np.arange(cells))
        matrix = np.maximum(1 - distance, 0) * self.weights(index, start, stop)[:, None]
        return torch.from_numpy(matrix.astype(np.float32))


class SlidingWindowScores:
    """Class scores at any pixels of a picture, from windows that are computed when they are first needed.

    Args:
        rows: windows from top to bottom.
        columns: windows from left to right.
        scores_of: (top, bottom, left, right) of a window in pixels -> its class scores on a coarser grid, (C, h, w).
    """

    def __init__(
        self, rows: WindowAxis, columns: WindowAxis, scores_of: Callable[[int, int, int, int], Tensor]
    ) -> None:
        self.rows = rows
        self.columns = columns
        self._scores_of = scores_of
        self._maps: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Scores of the pixels of a block. Shape: (C, bottom - top, right - left)."""
        total_CHW: Tensor | None = None
        for row in self.rows.overlapping(top, bottom):
            for column in self.columns.overlapping(left, right):
                map_Chw = self._map(row, column)
                device = map_Chw.device
                if total_CHW is None:
                    total_CHW = torch.zeros((len(map_Chw), bottom - top, right - left), device=device)
                ys, xs = _part(self.rows, row, top, bottom), _part(self.columns, column, left, right)
                rows_Hh = self.rows.upsampling_matrix(row, *ys, map_Chw.shape[1]).to(device)
                columns_Ww = self.columns.upsampling_matrix(column, *xs, map_Chw.shape[2]).to(device)
                part_CHW = rows_Hh @ map_Chw @ columns_Ww.T
                total_CHW[:, ys[0] - top : ys[1] - top, xs[0] - left : xs[1] - left] += part_CHW
        assert total_CHW is not None, "windows cover every pixel"
        return total_CHW

    def _map(self, row: int, column: int) -> Tensor:
        """The scores of one window; of all, those used last are kept."""
        place = (row, column)
        if place not in self._maps:
            top, left = self.rows.starts[row], self.columns.starts[column]
            map_Chw = self._scores_of(top, top + self.rows.window, left, left + self.columns.window)
            self._maps[place] = map_Chw
            if len(self._maps) > max(_KEPT_LEAST, _KEPT_BYTES // map_Chw.nbytes):
                self._maps.popitem(last=False)
        self._maps.move_to_end(place)
        return self._maps[place]


def _part(axis: WindowAxis, index: int, start: int, stop: int) -> tuple[int, int]:
    """The pixels of start..stop that lie in a window."""
    return max(start, axis.starts[index]), min(stop, axis.starts[index] + axis.window)
