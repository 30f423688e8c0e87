"""Blend the class scores of overlapping windows, for an image that is too large for one pass, so that no seam is left.

Along each side the windows have one size and overlap by o pixels or more. At x pixels from an end that is not the image's,
a window has the weight

    r(x) = sin^2(pi/2 clip(2 x / o - 1/2, 0, 1)),

which complements that of the window beyond that end: r(x) + r(o - x) = 1. The outer quarter of the overlap has no weight:
it is context, as a network sees a border there that the image does not have. Where the last window, moved back to end with
the image, overlaps by more, the weights are divided by their sum. Bilinear upsampling is separable, so the blended scores
are sums of matrix products,

    S_Cyx = sum_ij A^i_yh M^ij_Chw A^j_xw,

with the scores M^ij of window i, j, and in A its interpolation along one side times the weights.
"""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_CACHE_BYTES = 256 << 20
"""Scores of windows that are kept for the rows still to come; windows of wider images are computed once more instead."""

_CACHED_WINDOWS = 9
"""Kept whatever their size, as three windows a side may reach into one block."""


@dataclass(frozen=True)
class WindowAxis:
    """Overlapping windows along one side of an image; all numbers are pixels.

    Example:
        >>> axis = WindowAxis.cover(length=100, window=40, overlap=20)
        >>> axis.starts, axis.overlapping(0, 10), axis.overlapping(30, 50)
        ((0, 20, 40, 60), range(0, 1), range(0, 3))
        >>> sum(axis.weights(index, 30, 32) for index in range(4)).tolist()
        [1.0, 1.0]
    """

    length: int
    """Of the side."""
    window: int
    """Of each window."""
    overlap: int
    """Smallest overlap of two neighbours."""
    starts: tuple[int, ...]
    """First pixel of each window."""

    @classmethod
    def cover(cls, length: int, window: int, overlap: int) -> "WindowAxis":
        """Place the fewest windows: each ``window - overlap`` after the one before, the last ends with the side.

        A side shorter than a window is one window. ``overlap`` is at most half a window.
        """
        last = max(0, length - window)
        return cls(length, min(window, length), overlap, (*range(0, last, window - overlap), last))

    def overlapping(self, start: int, stop: int) -> range:
        """Indices of the windows that hold a pixel of start..stop."""
        return range(bisect_right(self.starts, start - self.window), bisect_left(self.starts, stop))

    def weights(self, index: int, start: int, stop: int) -> Float[np.ndarray, " length"]:
        """Weights of a window at pixels start..stop; over all windows the sum is 1. Shape: (stop - start,)."""
        total = sum(self._ramp(other, start, stop) for other in self.overlapping(start, stop))
        return self._ramp(index, start, stop) / total

    def _ramp(self, index: int, start: int, stop: int) -> np.ndarray:
        """r of the module at both ends of a window, before the division by the sum."""
        inside = np.arange(start, stop) + 0.5 - self.starts[index]
        # Without an overlap the ramp is a step; at the ends of the image there is none.
        rise = inside / max(self.overlap, 1e-9) if index > 0 else np.inf
        fall = (self.window - inside) / max(self.overlap, 1e-9) if index < len(self.starts) - 1 else np.inf
        return np.sin(np.pi / 2 * np.clip(2 * np.minimum(rise, fall) - 0.5, 0, 1)) ** 2 * np.ones(len(inside))

    def upsampling_matrix(self, index: int, start: int, stop: int, cells: int) -> Float[Tensor, "length cells"]:
        """Matrix that interpolates a window's ``cells`` bilinearly at pixels start..stop, times the weights.

        Cell centres lie as in ``interpolate(align_corners=False)``. Shape: (stop - start, cells), float32.
        """
        inside = np.arange(start, stop) + 0.5 - self.starts[index]
        position = np.clip(inside * cells / self.window - 0.5, 0, cells - 1)
        distance = np.abs(position[:, None] - np.arange(cells))
        matrix = np.maximum(1 - distance, 0) * self.weights(index, start, stop)[:, None]
        return torch.from_numpy(matrix.astype(np.float32))


class SlidingWindowScores:
    """Class scores at any pixels of an image, from windows that are computed when they are first needed.

    Args:
        rows: windows from top to bottom.
        columns: windows from left to right.
        score_window: function of (top, bottom, left, right) of a window in pixels, which returns its class scores on a coarser
            grid. Shape: (C, h, w).

    Example:
        >>> import torch
        >>> rows, columns = WindowAxis.cover(30, 40, 20), WindowAxis.cover(100, 40, 20)
        >>> scores = SlidingWindowScores(rows, columns, lambda top, bottom, left, right: torch.full((2, 3, 4), float(left)))
        >>> block = scores(0, 10, 0, 100)
        >>> block.shape, block[0, 0, [0, 30, 99]].round().tolist()  # windows begin at 0, 20, 40 and 60
        (torch.Size([2, 10, 100]), [0.0, 12.0, 60.0])
    """

    def __init__(
        self, rows: WindowAxis, columns: WindowAxis, score_window: Callable[[int, int, int, int], Tensor]
    ) -> None:
        self.rows = rows
        self.columns = columns
        self._score_window = score_window
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, top: int, bottom: int, left: int, right: int) -> Float[Tensor, "C H W"]:
        """Compute the scores of the pixels of a block. Shape: (C, bottom - top, right - left)."""
        total_CHW: Tensor | None = None
        for row in self.rows.overlapping(top, bottom):
            for column in self.columns.overlapping(left, right):
                scores_Chw = self._window_scores(row, column)
                device = scores_Chw.device
                if total_CHW is None:
                    total_CHW = torch.zeros((len(scores_Chw), bottom - top, right - left), device=device)
                ys, xs = _intersection(self.rows, row, top, bottom), _intersection(self.columns, column, left, right)
                rows_Hh = self.rows.upsampling_matrix(row, *ys, scores_Chw.shape[1]).to(device)
                columns_Ww = self.columns.upsampling_matrix(column, *xs, scores_Chw.shape[2]).to(device)
                part_CHW = rows_Hh @ scores_Chw @ columns_Ww.T
                total_CHW[:, ys[0] - top : ys[1] - top, xs[0] - left : xs[1] - left] += part_CHW
        assert total_CHW is not None, "windows cover every pixel"
        return total_CHW

    def _window_scores(self, row: int, column: int) -> Tensor:
        """Scores of one window, computed or from the cache of those used last."""
        key = (row, column)
        if key not in self._cache:
            top, left = self.rows.starts[row], self.columns.starts[column]
            scores_Chw = self._score_window(top, top + self.rows.window, left, left + self.columns.window)
            self._cache[key] = scores_Chw
            if len(self._cache) > max(_CACHED_WINDOWS, _CACHE_BYTES // scores_Chw.nbytes):
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]


def _intersection(axis: WindowAxis, index: int, start: int, stop: int) -> tuple[int, int]:
    """First and last of the pixels of start..stop that lie in a window."""
    return max(start, axis.starts[index]), min(stop, axis.starts[index] + axis.window)
