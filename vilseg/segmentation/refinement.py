"""Class scores that follow the edges of the picture, by one of two methods.

Patches are coarse and see past the outline of what they show. So under pixel-adaptive mask refinement (Araslanov & Roth 2020,
section 3.3) each pixel's scores become, some times over, the mean of its neighbours' scores, weighted by how much these look
like it:

    s_x <- sum_n w_xn s_n,    w_xn = softmax_n( -mean_c |I_xc - I_nc| / (tolerance sigma_xc) )

over the eight neighbours n at every dilation, with sigma_xc the standard deviation of colour channel c over x and its
neighbours. The other method is a guided filter, see :mod:`vilseg.segmentation.guided_filter`. Either happens on an enlarged patch
grid rather than on the picture's own pixels, and for the classes alone that are best at some patch: of thousands asked for, a
picture holds a few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.config import RefinementConfig
from vilseg.segmentation.guided_filter import guided_filter

_EPS = 1e-8


class RefinedScores(NamedTuple):
    """Scores of the classes that are best at some patch of an image."""

    classes_W: Tensor
    """(W,) their indices, ascending."""
    scores_Whw: Tensor
    """(W, upscale h, upscale w) unless the image is smaller."""


def best_classes(scores_Chw: Tensor) -> Tensor:
    """Indices, ascending, of the classes that are best at some place. Shape: (C, h, w) -> (W,)."""
    # `argmax` over the first axis takes ten times as long as `max` on a CPU.
    return scores_Chw.max(0).indices.unique()


def refine(scores_Chw: Tensor, image_3HW: Tensor, config: RefinementConfig) -> RefinedScores:
    """Bring the scores of an image's best classes onto a finer grid and along the image's edges.

    Args:
        scores_Chw: one score for each class and patch. Shape: (C, h, w).
        image_3HW: the picture, floats of any range. Shape: (3, H, W).
        config: method, iterations and what the method takes.
    """
    classes_W = best_classes(scores_Chw)
    patches, pixels = scores_Chw.shape[1:], image_3HW.shape[1:]
    size = tuple(min(config.upscale * p, pixel) for p, pixel in zip(patches, pixels, strict=True))
    few_Whw = scores_Chw[classes_W]
    if len(classes_W) == 1 or not config.iterations:  # one class alone is best whatever its scores
        return RefinedScores(classes_W, _resize(few_Whw, size, "bilinear"))
    image_3hw = _resize(image_3HW, size, "area")
    if config.method == "guided":
        small_3hw = _resize(image_3HW, patches, "area")
        for _ in range(config.iterations - 1):
            few_Whw = guided_filter(few_Whw, small_3hw, small_3hw, config.radius, config.tolerance)
        scores_Whw = guided_filter(few_Whw, small_3hw, image_3hw, config.radius, config.tolerance)
    else:
        scores_Whw = _resize(few_Whw, size, "bilinear")
        weights_Nhw = _weights(image_3hw, config)
        for _ in range(config.iterations):
            total_Whw = torch.zeros_like(scores_Whw)
            for weight_hw, neighbour_Whw in zip(weights_Nhw, _neighbours(scores_Whw, config.dilations), strict=True):
                total_Whw.addcmul_(neighbour_Whw, weight_hw)
            scores_Whw = total_Whw
    return RefinedScores(classes_W, scores_Whw)


def _resize(map_Chw: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    if map_Chw.shape[1:] == size:
        return map_Chw
    return F.interpolate(map_Chw.unsqueeze(0), size=size, mode=mode)[0]


def _weights(image_3hw: Tensor, config: RefinementConfig) -> Tensor:
    """Weights of the neighbours, summing to 1. Shape: (3, h, w) -> (8 x dilations, h, w)."""
    neighbours_N3hw = torch.stack(list(_neighbours(image_3hw, config.dilations)))
    scale_3hw = -1 / (3 * (config.tolerance * _deviation(neighbours_N3hw, image_3hw) + _EPS))
    return neighbours_N3hw.sub_(image_3hw).abs_().mul_(scale_3hw).sum(1).softmax(0)


def _deviation(neighbours_N3hw: Tensor, image_3hw: Tensor) -> Tensor:
    """Standard deviation over every pixel and its neighbours; as two passes of sums, since `std` takes ten times as long."""
    count = len(neighbours_N3hw) + 1
    mean_3hw = (neighbours_N3hw.sum(0) + image_3hw) / count
    total_3hw = (image_3hw - mean_3hw).square_()
    for neighbour_3hw in neighbours_N3hw:
        total_3hw += (neighbour_3hw - mean_3hw).square_()
    return (total_3hw / (count - 1)).sqrt_()


def _neighbours(map_Chw: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The map shifted to every neighbour, the border repeated."""
    height, width = map_Chw.shape[1:]
    for dilation in dilations:
        padded = F.pad(map_Chw.unsqueeze(0), (dilation,) * 4, mode="replicate")[0]
        for y in (0, dilation, 2 * dilation):
            for x in (0, dilation, 2 * dilation):
                if (y, x) != (dilation, dilation):
                    yield padded[:, y : y + height, x : x + width]
