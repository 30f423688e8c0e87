"""Overlapping windows that blend without a seam."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vilseg.segmentation import sliding_window
from vilseg.segmentation.sliding_window import SlidingWindowScores, WindowAxis

SIDES = [(100, 30, 10), (100, 30, 15), (101, 30, 0), (100, 30, 1), (31, 30, 15), (30, 30, 7), (12, 30, 7), (1, 2, 1)]


@pytest.mark.parametrize(("length", "window", "overlap"), SIDES)
def test_windows_cover_a_side_and_overlap_as_asked(length: int, window: int, overlap: int) -> None:
    axis = WindowAxis.cover(length, window, overlap)
    assert axis.starts[0] == 0
    assert axis.starts[-1] + axis.window == length
    assert axis.window == min(window, length)
    for one, following in zip(axis.starts, axis.starts[1:], strict=False):
        assert one < following <= one + window - overlap


@pytest.mark.parametrize(("length", "window", "overlap"), SIDES)
def test_weights_sum_to_one_and_lie_within_the_window(length: int, window: int, overlap: int) -> None:
    axis = WindowAxis.cover(length, window, overlap)
    weights = np.array([axis.weights(index, 0, length) for index in range(len(axis.starts))])
    np.testing.assert_allclose(weights.sum(0), 1)
    for start, row in zip(axis.starts, weights, strict=True):
        inside = np.zeros(length, bool)
        inside[start : start + axis.window] = True
        assert (row[~inside] == 0).all()
        assert row[inside].max() > 0


def test_the_outer_quarter_of_an_overlap_is_context_alone() -> None:
    axis = WindowAxis.cover(100, 40, 20)  # windows from 0, 20, 40 and 60
    weights = axis.weights(1, 20, 60)
    assert (weights[:5] == 0).all()
    assert (weights[-5:] == 0).all()
    assert (weights[5:35] > 0).all()
    np.testing.assert_allclose(weights, weights[::-1])
    assert (axis.weights(0, 0, 25) == 1).all(), "a border of the image is no seam"


def ramp(inside: float, window: int, overlap: int, first: bool, last: bool) -> float:
    """The weight of a window `inside` pixels from its beginning, from the formula."""
    nearest = min(math.inf if first else inside, math.inf if last else window - inside)
    return math.sin(math.pi / 2 * min(max(2 * nearest / overlap - 0.5, 0), 1)) ** 2


def naive(maps: dict[tuple[int, int], Tensor], rows: WindowAxis, columns: WindowAxis) -> np.ndarray:
    """Every window enlarged as a whole, weighted pixel by pixel and divided by the sum of weights."""
    count = len(next(iter(maps.values())))
    total, weights = np.zeros((count, rows.length, columns.length)), np.zeros((rows.length, columns.length))
    for (top, left), map_Chw in maps.items():
        i, j = rows.starts.index(top), columns.starts.index(left)
        size = (rows.window, columns.window)
        large = interpolate(map_Chw[None].double(), size=size, mode="bilinear", align_corners=False)[0].numpy()
        for y in range(rows.window):
            wy = ramp(y + 0.5, rows.window, rows.overlap, i == 0, i == len(rows.starts) - 1)
            for x in range(columns.window):
                w = wy * ramp(x + 0.5, columns.window, columns.overlap, j == 0, j == len(columns.starts) - 1)
                total[:, top + y, left + x] += w * large[:, y, x]
                weights[top + y, left + x] += w
    return total / weights


class Windows:
    """Random scores for every window, and how often they were asked for."""

    def __init__(self) -> None:
        self.maps: dict[tuple[int, int], Tensor] = {}
        self.calls = 0

    def __call__(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(1000 * top + left)
        self.maps[top, left] = torch.randn(3, 5, 4, generator=generator)
        return self.maps[top, left]


ROWS, COLUMNS = WindowAxis.cover(47, 20, 6), WindowAxis.cover(50, 24, 12)


def whole(blended: SlidingWindowScores, side: int) -> np.ndarray:
    """The image from blocks of `side` pixels."""
    scores = np.empty((3, blended.rows.length, blended.columns.length))
    for y in range(0, blended.rows.length, side):
        for x in range(0, blended.columns.length, side):
            bottom, right = min(y + side, blended.rows.length), min(x + side, blended.columns.length)
            scores[:, y:bottom, x:right] = blended(y, bottom, x, right).numpy()
    return scores


@pytest.mark.parametrize("side", [7, 16, 50])
def test_blocks_of_any_size_are_the_weighted_mean_of_enlarged_windows(side: int) -> None:
    windows = Windows()
    scores = whole(SlidingWindowScores(ROWS, COLUMNS, windows), side)
    assert len(windows.maps) == len(ROWS.starts) * len(COLUMNS.starts) == windows.calls, "each window is computed once"
    np.testing.assert_allclose(scores, naive(windows.maps, ROWS, COLUMNS), atol=1e-5)


def test_few_maps_are_kept_and_the_scores_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = WindowAxis.cover(400, 20, 6)
    expected = whole(SlidingWindowScores(ROWS, columns, Windows()), 16)
    monkeypatch.setattr(sliding_window, "_CACHE_BYTES", 0)
    windows = Windows()
    blended = SlidingWindowScores(ROWS, columns, windows)
    np.testing.assert_array_equal(whole(blended, 16), expected)
    assert len(blended._cache) == sliding_window._CACHED_WINDOWS < len(columns.starts)
    assert windows.calls > len(windows.maps)
