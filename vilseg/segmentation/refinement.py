"""Class scores that follow the edges of the picture: pixel-adaptive mask refinement (Araslanov & Roth 2020, section 3.3).

Patches are coarse and see past the outline of what they show. So each pixel's scores become, some times over, the mean of
its neighbours' scores, weighted by how much these look like it:

    s_x <- sum_n w_xn s_n,    w_xn = softmax_n( -mean_c |I_xc - I_nc| / (tolerance sigma_xc) )

over the eight neighbours n at every dilation, with sigma_xc the standard deviation of colour channel c over x and its
neighbours. Only scores of classes that win somewhere are worth the work; see :func:`refine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.config import RefinementConfig

_EPS = 1e-8


class RefinedScores(NamedTuple):
    """Scores of the classes that are best at some patch of an image."""

    classes_W: Tensor
    """(W,) their indices, ascending."""
    scores_WHW: Tensor


def refine(scores_Chw: Tensor, image_3HW: Tensor, config: RefinementConfig) -> RefinedScores:
    """Bring the scores of an image's winning classes to the size of the image and along its edges.

    Args:
        scores_Chw: one score for each class and patch. Shape: (C, h, w).
        image_3HW: the picture, floats of any range. Shape: (3, H, W).
        config: iterations, dilations and tolerance.
    """
    classes_W = scores_Chw.argmax(0).unique()
    size = (image_3HW.shape[1], image_3HW.shape[2])
    scores_WHW = F.interpolate(scores_Chw[classes_W].unsqueeze(0), size=size, mode="bilinear", align_corners=False)[0]
    if len(classes_W) > 1:  # one class alone wins whatever its scores
        weights_NHW = _weights(image_3HW, config)
        for _ in range(config.iterations):
            total_WHW = torch.zeros_like(scores_WHW)
            for weight_HW, neighbour_WHW in zip(weights_NHW, _neighbours(scores_WHW, config.dilations), strict=True):
                total_WHW.addcmul_(neighbour_WHW, weight_HW)
            scores_WHW = total_WHW
    return RefinedScores(classes_W, scores_WHW)


def _weights(image_3HW: Tensor, config: RefinementConfig) -> Tensor:
    """Weights of the neighbours, summing to 1. Shape: (3, H, W) -> (8 x dilations, H, W)."""
    neighbours_N3HW = torch.stack(list(_neighbours(image_3HW, config.dilations)))
    deviation_3HW = torch.cat([neighbours_N3HW, image_3HW.unsqueeze(0)]).std(0)
    difference_N3HW = (neighbours_N3HW - image_3HW).abs() / (config.tolerance * deviation_3HW + _EPS)
    return (-difference_N3HW.mean(1)).softmax(0)


def _neighbours(map_CHW: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The map shifted to every neighbour, the border repeated."""
    height, width = map_CHW.shape[1:]
    for dilation in dilations:
        padded = F.pad(map_CHW.unsqueeze(0), (dilation,) * 4, mode="replicate")[0]
        for y in (0, dilation, 2 * dilation):
            for x in (0, dilation, 2 * dilation):
                if (y, x) != (dilation, dilation):
                    yield padded[:, y : y + height, x : x + width]
