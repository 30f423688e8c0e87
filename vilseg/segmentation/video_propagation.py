"""Propagate class scores from frame to frame by similarity of colours, without optical flow.

Each position x of a frame takes the mean of the scores that the neighbouring frame has in a small window around x, weighted
by the similarity of the colours around both positions:

    d_xo = mean_p |I(x + p) - I'(x + o + p)|,   w_xo = softmax_o(-d_xo / tolerance),   s(x) = sum_o w_xo s'(x + o)

over the offsets o in a disc and the positions p of a 3 x 3 patch, where I and s are the colours and scores of the frame, and I'
and s' those of the neighbouring frame. This is the label propagation of Jabri et al. 2020 ("Space-time correspondence as a
contrastive random walk", section 4), with the colour patches of non-local means (Buades et al. 2005) instead of learnt features.
Propagation goes from each frame to the next, so the window can be small even if an object moves far over many frames.

Axes: O offsets, in row-major order; A classes that are propagated; h, w the grid of the scores. Colours are in 0..255.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_RADIUS = 2
"""Maximum motion between two frames along an axis, in grid positions; 1/24 of the shorter image side on the usual grids. A radius
of 3 costs a third more time and gains nothing up to that speed, and 0.001 mIoU at twice that speed."""

_OFFSETS = [
    (y, x)
    for y in range(-_RADIUS, _RADIUS + 1)
    for x in range(-_RADIUS, _RADIUS + 1)
    if y * y + x * x <= 5  # all but the corners
]
"""The 21 offsets (y, x) in a disc. The offset with index -1 - o is the opposite of that with index o."""

_TOLERANCE = 1.5
"""Increase of the patch distance, in grey levels, that divides a weight by e. Results differ little from 0.7 to 3."""

_CONFIDENCE_SCALE = 30.0
"""Patch distance of the best match, in grey levels, that divides the confidence by e; noise and texture are well below it."""

_NO_MATCH = (3.0, 15.0)
"""Minimum and maximum, in grey levels, of the patch distance above which two positions do not match. The distance itself is half
the standard deviation of the frame."""


class PropagatedScores(NamedTuple):
    """Class scores at a frame that were propagated from another frame."""

    scores_Ahw: Tensor
    """Scores of the classes that are propagated. Shape: (A, h, w)."""
    confidence_1hw: Tensor
    """Product of the quality of the matches in all steps from that frame, in 0..1. Shape: (1, h, w)."""


def initial_scores(scores_Ahw: Float[Tensor, "A h w"]) -> PropagatedScores:
    """Return the scores of a keyframe with confidence 1, as the start of a propagation.

    Example:
        >>> import torch
        >>> frame = torch.arange(0.0, 200.0, 10.0).expand(3, 20, 20)  # brighter to the right
        >>> scores = initial_scores((frame[:1] > 95).float())
        >>> moved = propagate(scores, patch_distances(frame.roll(1, dims=2), frame))  # one column to the right
        >>> scores.scores_Ahw[0, 10].round().int().tolist()
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
        >>> moved.scores_Ahw[0, 10, 2:].round().int().tolist()
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    return PropagatedScores(scores_Ahw, torch.ones_like(scores_Ahw[:1]))


def patch_distances(frame_3hw: Float[Tensor, "3 h w"], other_3hw: Float[Tensor, "3 h w"]) -> Float[Tensor, "O h w"]:
    """Compute d of the module's docstring: distances from every position to those around it in the other frame.

    Beyond the border of the other frame its outermost pixels are repeated.

    Shape: (3, h, w), (3, h, w) -> (O, h, w), grey levels.
    """
    height, width = frame_3hw.shape[1:]
    single_Ohw = frame_3hw.new_empty(len(_OFFSETS), height, width)
    for single_hw, shifted_3hw in zip(single_Ohw, _shifted(other_3hw), strict=True):
        torch.sum((shifted_3hw - frame_3hw).abs_(), 0, out=single_hw)
    # Sums of three neighbours along each axis are several times faster than avg_pool2d on a CPU.
    padded = F.pad(single_Ohw.unsqueeze(0), (1,) * 4, mode="replicate")[0]
    rows = (padded[:, :-2] + padded[:, 1:-1]).add_(padded[:, 2:])
    return (rows[:, :, :-2] + rows[:, :, 1:-1]).add_(rows[:, :, 2:]).div_(27)


def reverse_distances(distances_Ohw: Float[Tensor, "O h w"]) -> Float[Tensor, "O h w"]:
    """Convert the `patch_distances` from frame A to frame B to those from B to A: the same values at shifted positions.

    Offsets that lead outside the frame have an infinite distance. Shape: (O, h, w) -> (O, h, w).
    """
    height, width = distances_Ohw.shape[1:]
    padded = F.pad(distances_Ohw, (_RADIUS,) * 4, value=torch.inf)
    result = torch.empty_like(distances_Ohw)
    for offset, (y, x) in enumerate(_OFFSETS):
        result[-1 - offset] = padded[offset, _RADIUS - y :, _RADIUS - x :][:height, :width]
    return result


def propagate(scores: PropagatedScores, distances_Ohw: Float[Tensor, "O h w"]) -> PropagatedScores:
    """Propagate scores from one frame to the next.

    Args:
        scores: scores at the first of the two frames.
        distances_Ohw: `patch_distances` from the second frame to the first. Shape: (O, h, w).
    """
    best_hw = distances_Ohw.amin(0)
    # The soft-max is normalised after the sum, because there are more offsets than classes.
    weights_Ohw = (best_hw - distances_Ohw).div_(_TOLERANCE).exp_()
    maps = torch.cat(scores)
    total = torch.zeros_like(maps)
    for weight_hw, shifted in zip(weights_Ohw, _shifted(maps), strict=True):
        total.addcmul_(shifted, weight_hw)
    total /= weights_Ohw.sum(0)
    return PropagatedScores(total[:-1], total[-1:] * (best_hw / -_CONFIDENCE_SCALE).exp_())


def interpolate(before: PropagatedScores, after: PropagatedScores, position: float) -> Float[Tensor, "A h w"]:
    """Compute the mean of the scores from the previous and the next keyframe, weighted by confidence and nearness in time.

    Args:
        before: scores propagated from the previous keyframe.
        after: scores propagated from the next keyframe.
        position: time of the frame, from 0 (previous keyframe) to 1 (next keyframe).

    Returns:
        The mean scores. Shape: (A, h, w).
    """
    first, second = before.confidence_1hw * (1 - position), after.confidence_1hw * position
    # If both confidences have underflowed to zero, only the time is used.
    fraction_1hw = torch.where(first + second > 0, second / (first + second), position)
    return torch.lerp(before.scores_Ahw, after.scores_Ahw, fraction_1hw)


def unmatched_fraction(distances_Ohw: Float[Tensor, "O h w"], frame_3hw: Float[Tensor, "3 h w"]) -> float:
    """Return the fraction, in 0..1, of positions of a frame that match no position around them in the other frame."""
    limit = (frame_3hw.std() / 2).clamp(*_NO_MATCH)
    return float((distances_Ohw.amin(0) > limit).float().mean())


def _shifted(map_Chw: Tensor) -> Iterator[Tensor]:
    """Yield, for each of the O offsets o, the map with the value of x + o at every x; borders are repeated. Shape: (C, h, w)."""
    height, width = map_Chw.shape[1:]
    padded = F.pad(map_Chw.unsqueeze(0), (_RADIUS,) * 4, mode="replicate")[0]
    for y, x in _OFFSETS:
        yield padded[:, _RADIUS + y :, _RADIUS + x :][:, :height, :width]
