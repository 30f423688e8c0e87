"""Propagate class scores from frame to frame by similarity of colours, without optical flow.

Each position x of a frame takes the mean of the scores that the neighbouring frame has in a small window around x, weighted
by the similarity of the colours around both positions:

    d_xo = mean_p |I(x + p) - I'(x + o + p)|,   w_xo = softmax_o(-d_xo / tolerance),   s(x) = sum_o w_xo s'(x + o)

over the offsets o of a disc and the positions p of a 3 x 3 patch. This is the label propagation of Jabri et al. 2020
("Space-time correspondence as a contrastive random walk", section 4) with the colour patches of non-local means (Buades
et al. 2005) in the place of learnt features. Going from frame to frame keeps the window small, however far the scores go.

O are the offsets, row by row; A the classes that are propagated; h w the grid of the scores. Colours are grey levels, 0..255.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_RADIUS = 2
"""Positions that something may move between two frames along an axis, a twenty-fourth of the image on the usual grids. A
radius of 3 costs a third more and gains nothing up to that speed, and 0.001 mIoU at twice it."""

_OFFSETS = [
    (y, x)
    for y in range(-_RADIUS, _RADIUS + 1)
    for x in range(-_RADIUS, _RADIUS + 1)
    if y * y + x * x <= 5  # all but the corners
]
"""21 of them; the one opposite to number o is number -1 - o."""

_TOLERANCE = 1.5
"""Increase of a patch's distance, in grey levels, that divides its weight by e. From 0.7 to 3 little changes."""

_CONFIDENCE_SCALE = 30.0
"""Distance of the best match, in grey levels, that divides the confidence by e; noise and texture stay well below."""

_NO_MATCH = (3.0, 15.0)
"""Bounds, in grey levels, of the distance that is no match any more: half the standard deviation of the frame."""


class PropagatedScores(NamedTuple):
    """Class scores at a frame, from another frame."""

    scores_Ahw: Tensor
    """Of the classes that are propagated. Shape: (A, h, w)."""
    confidence_1hw: Tensor
    """Quality of the matches on the way, in 0..1. Shape: (1, h, w)."""


def initial_scores(scores_Ahw: Float[Tensor, "A h w"]) -> PropagatedScores:
    """Return scores at the frame that they were computed for, with confidence 1.

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
    """Compute d of the module: from every position to the positions around it in the other frame, the border repeated.

    Shape: (3, h, w), (3, h, w) -> (O, h, w), grey levels.
    """
    height, width = frame_3hw.shape[1:]
    single_Ohw = frame_3hw.new_empty(len(_OFFSETS), height, width)
    for single_hw, shifted_3hw in zip(single_Ohw, _shifted(other_3hw), strict=True):
        torch.sum((shifted_3hw - frame_3hw).abs_(), 0, out=single_hw)
    # Sums of three along each axis: several times faster than avg_pool2d on a CPU.
    padded = F.pad(single_Ohw.unsqueeze(0), (1,) * 4, mode="replicate")[0]
    rows = (padded[:, :-2] + padded[:, 1:-1]).add_(padded[:, 2:])
    return (rows[:, :, :-2] + rows[:, :, 1:-1]).add_(rows[:, :, 2:]).div_(27)


def reverse_distances(distances_Ohw: Float[Tensor, "O h w"]) -> Float[Tensor, "O h w"]:
    """Turn the `patch_distances` of a frame to another into those of the other to it: the same numbers at other positions.

    Offsets that lead out of the frame have an infinite distance. Shape: (O, h, w) -> (O, h, w).
    """
    height, width = distances_Ohw.shape[1:]
    padded = F.pad(distances_Ohw, (_RADIUS,) * 4, value=torch.inf)
    result = torch.empty_like(distances_Ohw)
    for offset, (y, x) in enumerate(_OFFSETS):
        result[-1 - offset] = padded[offset, _RADIUS - y :, _RADIUS - x :][:height, :width]
    return result


def propagate(scores: PropagatedScores, distances_Ohw: Float[Tensor, "O h w"]) -> PropagatedScores:
    """Move scores to the next frame.

    Args:
        scores: at one frame.
        distances_Ohw: `patch_distances` of the next frame to that frame. Shape: (O, h, w).
    """
    best_hw = distances_Ohw.amin(0)
    # The soft-max, normalised at the end: there are more offsets than classes.
    weights_Ohw = (best_hw - distances_Ohw).div_(_TOLERANCE).exp_()
    maps = torch.cat(scores)
    total = torch.zeros_like(maps)
    for weight_hw, shifted in zip(weights_Ohw, _shifted(maps), strict=True):
        total.addcmul_(shifted, weight_hw)
    total /= weights_Ohw.sum(0)
    return PropagatedScores(total[:-1], total[-1:] * (best_hw / -_CONFIDENCE_SCALE).exp_())


def interpolate(before: PropagatedScores, after: PropagatedScores, position: float) -> Float[Tensor, "A h w"]:
    """Mix scores from both sides in time, weighted by confidence and nearness in time.

    Args:
        before: scores from the keyframe before.
        after: scores from the keyframe after.
        position: in time; 0 at the keyframe before, 1 at the one after.

    Returns:
        Shape: (A, h, w).
    """
    first, second = before.confidence_1hw * (1 - position), after.confidence_1hw * position
    # Confidence may have fallen to nothing on both sides; then time alone decides.
    fraction_1hw = torch.where(first + second > 0, second / (first + second), position)
    return torch.lerp(before.scores_Ahw, after.scores_Ahw, fraction_1hw)


def unmatched_fraction(distances_Ohw: Float[Tensor, "O h w"], frame_3hw: Float[Tensor, "3 h w"]) -> float:
    """Fraction of the positions of a frame, in 0..1, that match nothing around them in the other frame."""
    limit = (frame_3hw.std() / 2).clamp(*_NO_MATCH)
    return float((distances_Ohw.amin(0) > limit).float().mean())


def _shifted(map_Chw: Tensor) -> Iterator[Tensor]:
    """Yield the map moved by every offset, the border repeated: the value at x is that of x + o. Shape: O times (C, h, w)."""
    height, width = map_Chw.shape[1:]
    padded = F.pad(map_Chw.unsqueeze(0), (_RADIUS,) * 4, mode="replicate")[0]
    for y, x in _OFFSETS:
        yield padded[:, _RADIUS + y :, _RADIUS + x :][:, :height, :width]
