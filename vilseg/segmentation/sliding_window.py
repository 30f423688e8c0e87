"""Blend the class scores of overlapping windows without visible seams, for an image that is too large for one pass.

Along each side all windows have the same size and overlap by at least o pixels. At x pixels from an end of a window that is not
an end of the image, the window has the blending weight

    r(x) = sin^2(pi/2 clip(2 x / o - 1/2, 0, 1)).

The weights of two neighbouring windows sum to 1: r(x) + r(o - x) = 1. The outer quarter of the overlap has weight 0: it serves
as context only, because the network's features are distorted at a border that the image does not have. The last window is moved
back to end with the image and may overlap by more than o, so the weights are divided by their sum. Bilinear upsampling is
separable, so the blended scores are sums of matrix products,

    S_Cyx = sum_ij A^i_yh M^ij_Chw A^j_xw,

where M^ij are the scores of the window in row i and column j, and the matrices A contain bilinear interpolation along one side
times the weights.
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
"""Maximum size of the cached window scores, in bytes. If a row of windows needs more, windows are computed again when needed."""

_CACHED_WINDOWS = 9
"""Minimum number of cached windows, whatever their size, because up to 3 x 3 windows may overlap one block."""


@dataclass(frozen=True)
class WindowAxis:
    """Overlapping windows along one side of an image; all positions and lengths are in pixels (or patches).

    Example:
        >>> axis = WindowAxis.cover(length=100, window=40, overlap=20)
        >>> axis.starts, axis.overlapping(0, 10), axis.overlapping(30, 50)
        ((0, 20, 40, 60), range(0, 1), range(0, 3))
        >>> sum(axis.weights(index, 30, 32) for index in range(4)).tolist()
        [1.0, 1.0]
    """

    length: int
    """Length of the side."""
    window: int
    """Length of each window."""
    overlap: int
    """Minimum overlap of two neighbouring windows."""
    starts: tuple[int, ...]
    """First pixel of each window."""

    @classmethod
    def cover(cls, length: int, window: int, overlap: int) -> "WindowAxis":
        """Cover a side with the smallest number of windows.

        Windows start ``window - overlap`` pixels apart, and the last one ends with the side. A side shorter than ``window`` gets
        one window of its own length.

        Args:
            length: length of the side.
            window: length of a window.
            overlap: minimum overlap of neighbouring windows; at most half a window.
        """
        last = max(0, length - window)
        return cls(length, min(window, length), overlap, (*range(0, last, window - overlap), last))

    def overlapping(self, start: int, stop: int) -> range:
        """Return the indices of the windows that contain a pixel of the range from ``start`` to ``stop`` (excluded)."""
        return range(bisect_right(self.starts, start - self.window), bisect_left(self.starts, stop))

    def weights(self, index: int, start: int, stop: int) -> Float[np.ndarray, " length"]:
        """Return the blending weights of window ``index`` at the pixels from ``start`` to ``stop`` (excluded).

        At each pixel the weights of all windows sum to 1. Shape: (stop - start,).
        """
        total = sum(self._ramp(other, start, stop) for other in self.overlapping(start, stop))
        return self._ramp(index, start, stop) / total

    def _ramp(self, index: int, start: int, stop: int) -> np.ndarray:
        """Compute r of the module's docstring at both ends of a window, before the division by the sum."""
        inside = np.arange(start, stop) + 0.5 - self.starts[index]
        # Without an overlap the ramp is a step; at the ends of the image there is none.
        rise = inside / max(self.overlap, 1e-9) if index > 0 else np.inf
        fall = (self.window - inside) / max(self.overlap, 1e-9) if index < len(self.starts) - 1 else np.inf
        return np.sin(np.pi / 2 * np.clip(2 * np.minimum(rise, fall) - 0.5, 0, 1)) ** 2 * np.ones(len(inside))

    def upsampling_matrix(self, index: int, start: int, stop: int, cells: int) -> Float[Tensor, "length cells"]:
        """Return the matrix that upsamples a window's scores bilinearly along the side and multiplies them by `weights`.

        Args:
            index: index of the window in `starts`.
            start: first pixel of the side to upsample to.
            stop: last such pixel plus 1.
            cells: number of grid cells of the window's scores along this side; their centres are as in
                ``torch.nn.functional.interpolate(align_corners=False)``.

        Returns:
            Shape: (stop - start, cells), float32.
        """
        inside = np.arange(start, stop) + 0.5 - self.starts[index]
        position = np.clip(inside * cells / self.window - 0.5, 0, cells - 1)
        distance = np.abs(position[:, None] - np.arange(cells))
        matrix = np.maximum(1 - distance, 0) * self.weights(index, start, stop)[:, None]
        return torch.from_numpy(matrix.astype(np.float32))


class SlidingWindowScores:
    """Class scores at any pixels of a large image; the windows they are blended from are computed on demand and cached.

    Args:
        rows: windows along the vertical side, from top to bottom.
        columns: windows along the horizontal side, from left to right.
        score_window: function that takes (top, bottom, left, right) of a window in pixels and returns its class scores on a grid
            coarser than the pixels. Shape: (C, h, w).

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
        """Compute the class scores of the pixels of a block. Shape: -> (C, bottom - top, right - left)."""
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
        """Return the scores of one window, from the cache of recently used windows or computed."""
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
    """Return start and stop (excluded) of those pixels of a range that are in a window."""
    return max(start, axis.starts[index]), min(stop, axis.starts[index] + axis.window)
