"""Align class scores with the edges of the image, by one of two methods.

Patches are coarse, and the score of a patch near an outline depends on pixels beyond it. Pixel-adaptive mask refinement (PAMR,
Araslanov & Roth 2020, section 3.3) replaces each pixel's scores, in several iterations, by the mean of its neighbours' scores
weighted by similarity of colour:

    s_x <- sum_n w_xn s_n,    w_xn = softmax_n( -mean_c |I_xc - I_nc| / (tolerance sigma_xc) )

over the eight neighbours n at every dilation, where sigma_xc is the standard deviation of colour channel c over x and its
neighbours. The other method is a guided filter, see :mod:`vilseg.segmentation.guided_filter`. To save time, both run on an
enlarged patch grid instead of the image's own pixels, and only for the candidate classes: those with the highest score at some
patch, which are few even among thousands of classes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vilseg.config import RefinementConfig
from vilseg.segmentation.guided_filter import guided_filter

_EPS = 1e-8


class RefinedScores(NamedTuple):
    """Refined scores of an image's candidate classes, those with the highest score at some patch."""

    classes_A: Tensor
    """Indices of the candidate classes, in ascending order. Shape: (A,)."""
    scores_AHW: Tensor
    """Their scores. Shape: (A, H, W), where H is the smaller of upscale x h and the image's height; likewise W."""


def best_classes(scores_Chw: Float[Tensor, "C h w"]) -> Int[Tensor, " A"]:
    """Return the ascending indices of the classes with the highest score at some position. Shape: (C, h, w) -> (A,).

    Example:
        >>> import torch
        >>> best_classes(torch.tensor([[[0.1, 0.9]], [[0.2, 0.3]], [[0.5, 0.1]]])).tolist()
        [0, 2]
    """
    # `argmax` over the first axis takes ten times as long as `max` on a CPU.
    return scores_Chw.max(0).indices.unique()


def refine(
    scores_Chw: Float[Tensor, "C h w"], image_3HW: Float[Tensor, "3 H W"], config: RefinementConfig
) -> RefinedScores:
    """Upsample the scores of an image's candidate classes to a finer grid and align them with the image's edges.

    Args:
        scores_Chw: one score for each class and patch. Shape: (C, h, w).
        image_3HW: the image, floats of any range. Shape: (3, H, W).
        config: settings of the refinement: method, number of iterations, upscale factor and parameters of the method.

    Example:
        >>> import torch
        >>> from vilseg.config import RefinementConfig
        >>> scores = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]], [[0.0, 0.0]]])
        >>> image = torch.cat([torch.zeros(3, 8, 5), torch.ones(3, 8, 11)], dim=2)  # an edge at column 5, not at 8
        >>> refined = refine(scores, image, RefinementConfig(iterations=10, upscale=8))
        >>> refined.classes_A.tolist(), refined.scores_AHW.shape
        ([0, 1], torch.Size([2, 8, 16]))
        >>> refined.scores_AHW[:, 4].argmax(0).tolist()
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    classes_A = best_classes(scores_Chw)
    patches, pixels = scores_Chw.shape[1:], image_3HW.shape[1:]
    size = tuple(min(config.upscale * p, pixel) for p, pixel in zip(patches, pixels, strict=True))
    candidates_Ahw = scores_Chw[classes_A]
    if len(classes_A) == 1 or not config.iterations:  # a single class is best everywhere, whatever its scores
        return RefinedScores(classes_A, _resize(candidates_Ahw, size, "bilinear"))
    image_3hw = _resize(image_3HW, size, "area")
    if config.method == "guided":
        small_3hw = _resize(image_3HW, patches, "area")
        for _ in range(config.iterations - 1):
            candidates_Ahw = guided_filter(candidates_Ahw, small_3hw, small_3hw, config.radius, config.tolerance)
        scores_AHW = guided_filter(candidates_Ahw, small_3hw, image_3hw, config.radius, config.tolerance)
    else:
        scores_AHW = _resize(candidates_Ahw, size, "bilinear")
        weights_OHW = _weights(image_3hw, config)
        for _ in range(config.iterations):
            total_AHW = torch.zeros_like(scores_AHW)
            for weight_HW, neighbour_AHW in zip(weights_OHW, _neighbours(scores_AHW, config.dilations), strict=True):
                total_AHW.addcmul_(neighbour_AHW, weight_HW)
            scores_AHW = total_AHW
    return RefinedScores(classes_A, scores_AHW)


def _resize(map_Chw: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    if map_Chw.shape[1:] == size:
        return map_Chw
    return F.interpolate(map_Chw.unsqueeze(0), size=size, mode=mode)[0]


def _weights(image_3hw: Tensor, config: RefinementConfig) -> Tensor:
    """Compute the neighbours' weights w_xn, which sum to 1. Shape: (3, h, w) -> (O, h, w) with O = 8 x number of dilations."""
    neighbours_O3hw = torch.stack(list(_neighbours(image_3hw, config.dilations)))
    scale_3hw = -1 / (3 * (config.tolerance * _deviation(neighbours_O3hw, image_3hw) + _EPS))
    return neighbours_O3hw.sub_(image_3hw).abs_().mul_(scale_3hw).sum(1).softmax(0)


def _deviation(neighbours_O3hw: Tensor, image_3hw: Tensor) -> Tensor:
    """Compute the standard deviation over every pixel and its neighbours, by sums because `std` takes ten times as long.

    Shape: (O, 3, h, w), (3, h, w) -> (3, h, w).
    """
    count = len(neighbours_O3hw) + 1
    mean_3hw = (neighbours_O3hw.sum(0) + image_3hw) / count
    total_3hw = (image_3hw - mean_3hw).square_()
    for neighbour_3hw in neighbours_O3hw:
        total_3hw += (neighbour_3hw - mean_3hw).square_()
    return (total_3hw / (count - 1)).sqrt_()


def _neighbours(map_Chw: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Yield, for each of the O neighbours, the map with every position's value replaced by the neighbour's. Shape: (C, h, w)."""
    height, width = map_Chw.shape[1:]
    for dilation in dilations:
        padded = F.pad(map_Chw.unsqueeze(0), (dilation,) * 4, mode="replicate")[0]
        for y in (0, dilation, 2 * dilation):
            for x in (0, dilation, 2 * dilation):
                if (y, x) != (dilation, dilation):
                    yield padded[:, y : y + height, x : x + width]
