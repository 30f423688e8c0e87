"""Class scores carried from frame to frame by likeness of colours, without optical flow.

Each place x of a frame takes the mean of the scores that the frame next to it has in a small window around x, weighted
by how alike the colours are around both places:

    d_xo = mean_p |I(x + p) - I'(x + o + p)|,   w_xo = softmax_o(-d_xo / tolerance),   s(x) = sum_o w_xo s'(x + o)

over the offsets o of a disc and the places p of a 3 x 3 patch. This is the label propagation of Jabri et al. 2020
("Space-time correspondence as a contrastive random walk", section 4) with the colour patches of non-local means (Buades
et al. 2005) in the place of learnt features. Going from frame to frame keeps the window small, however far the scores go.

O is the number of offsets, row by row; h w is the grid of the scores; colours are grey levels, 0..255.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_RADIUS = 2
"""Places that something may move between two frames along an axis, a twenty-fourth of the picture on the usual grids. A
radius of 3 costs a third more and gains nothing up to that speed, and 0.001 mIoU at twice it."""

_OFFSETS = [
    (y, x)
    for y in range(-_RADIUS, _RADIUS + 1)
    for x in range(-_RADIUS, _RADIUS + 1)
    if y * y + x * x <= 5  # all but the corners
]
"""21 of them; the one opposite to number o is number -1 - o."""

_TOLERANCE = 1.5
"""Grey levels that a patch may differ more than another until it weighs e times less. From 0.7 to 3 little changes."""

_DOUBT = 30.0
"""Grey levels by which even the best match differs when a place counts e times less; noise and texture stay well below."""

_NO_MATCH = (3.0, 15.0)
"""Grey levels between which the difference lies that is no match any more: half the standard deviation of the frame."""


class PropagatedScores(NamedTuple):
    """Scores on their way through the film."""

    scores_Whw: Tensor
    """(W, h, w) of the classes that are carried."""
    confidence_1hw: Tensor
    """(1, h, w) in 0..1: how well the matches fitted on the way."""


def initial_scores(scores_Whw: Tensor) -> PropagatedScores:
    """Scores at the frame that they were computed for."""
    return PropagatedScores(scores_Whw, torch.ones_like(scores_Whw[:1]))


def patch_distances(frame_3hw: Tensor, other_3hw: Tensor) -> Tensor:
    """d of the module's formula: of every place to the places around it in the other frame, the border repeated.

    Shape: (3, h, w), (3, h, w) -> (O, h, w).
    """
    height, width = frame_3hw.shape[1:]
    single_Ohw = frame_3hw.new_empty(len(_OFFSETS), height, width)
    for single_hw, shifted_3hw in zip(single_Ohw, _shifted(other_3hw), strict=True):
        torch.sum((shifted_3hw - frame_3hw).abs_(), 0, out=single_hw)
    # Sums of three along each axis: several times faster than avg_pool2d on a CPU.
    padded = F.pad(single_Ohw.unsqueeze(0), (1,) * 4, mode="replicate")[0]
    rows = (padded[:, :-2] + padded[:, 1:-1]).add_(padded[:, 2:])
    return (rows[:, :, :-2] + rows[:, :, 1:-1]).add_(rows[:, :, 2:]).div_(27)


def reverse_distances(distances_Ohw: Tensor) -> Tensor:
    """From `patch_distances` of a frame to another, those of the other to it: the same numbers at other places.

    What leads out of the frame is infinitely different. Shape: (O, h, w) -> (O, h, w).
    """
    height, width = distances_Ohw.shape[1:]
    padded = F.pad(distances_Ohw, (_RADIUS,) * 4, value=torch.inf)
    result = torch.empty_like(distances_Ohw)
    for offset, (y, x) in enumerate(_OFFSETS):
        result[-1 - offset] = padded[offset, _RADIUS - y :, _RADIUS - x :][:height, :width]
    return result


def propagate(carried: PropagatedScores, distances_Ohw: Tensor) -> PropagatedScores:
    """One frame further; the differences are of the next frame to the one where the scores are."""
    best_hw = distances_Ohw.amin(0)
    # The soft-max, normalised at the end: there are more offsets than classes.
    weights_Ohw = (best_hw - distances_Ohw).div_(_TOLERANCE).exp_()
    maps = torch.cat(carried)
    total = torch.zeros_like(maps)
    for weight_hw, shifted in zip(weights_Ohw, _shifted(maps), strict=True):
        total.addcmul_(shifted, weight_hw)
    total /= weights_Ohw.sum(0)
    return PropagatedScores(total[:-1], total[-1:] * (best_hw / -_DOUBT).exp_())


def interpolate(before: PropagatedScores, after: PropagatedScores, position: float) -> Tensor:
    """Scores from both sides, weighted by trust and nearness in time; ``position`` 0 is at ``before``, 1 at ``after``.

    Shape: (W, h, w).
    """
    first, second = before.confidence_1hw * (1 - position), after.confidence_1hw * position
    # Trust may have fallen to nothing on both sides; then time alone decides.
    share_1hw = torch.where(first + second > 0, second / (first + second), position)
    return torch.lerp(before.scores_Whw, after.scores_Whw, share_1hw)


def unmatched_fraction(distances_Ohw: Tensor, frame_3hw: Tensor) -> float:
    """Share of the places of a frame, in 0..1, that look like nothing around them in the other frame."""
    limit = (frame_3hw.std() / 2).clamp(*_NO_MATCH)
    return float((distances_Ohw.amin(0) > limit).float().mean())


def _shifted(map_Chw: Tensor) -> Iterator[Tensor]:
    """The map moved by every offset, the border repeated: the value at x is that of x + o. Shape: O times (C, h, w)."""
    height, width = map_Chw.shape[1:]
    padded = F.pad(map_Chw.unsqueeze(0), (_RADIUS,) * 4, mode="replicate")[0]
    for y, x in _OFFSETS:
        yield padded[:, _RADIUS + y :, _RADIUS + x :][:, :height, :width]
