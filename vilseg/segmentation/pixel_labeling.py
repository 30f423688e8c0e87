"""Upsample class scores to the image's own size, strip by strip, and label every pixel with its best class."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vilseg.segmentation.result import Segmentation, label_dtype, to_labels

_STRIP_VALUES = 1 << 22
"""Class scores held at full resolution at once; bounds the memory for large images and many classes (16 MB), and stays
in the cache, which makes it quicker than more would be."""


class ClassLogits(NamedTuple):
    """Logits that compete at the pixels of one image, on grids coarser than its pixels."""

    candidates_Ahw: Tensor
    """Logits of the candidate classes. Shape: (A, h, w)."""
    classes_A: Tensor
    """Indices of the candidate classes; the index after the last class is that of no class. Shape: (A,)."""
    rest_1hw: Tensor | None
    """Log of the summed exponentials of the other logits, on the patch grid. Shape: (1, h, w); None where there are none."""
    num_rest: int
    """Number of other logits."""


def class_logits(
    scores_Rhw: Float[Tensor, "R h w"],
    rows_R: Int[Tensor, " R"],
    candidates_A: Int[Tensor, " A"],
    candidate_scores_AHW: Float[Tensor, "A H W"],
    temperature: float,
) -> ClassLogits:
    """Divide scores by the temperature and sum up those that cannot win.

    Args:
        scores_Rhw: of all rows, on the patch grid. Shape: (R, h, w).
        rows_R: class index of each row. Shape: (R,).
        candidates_A: positions in ``rows_R`` of the classes that may win. Shape: (A,).
        candidate_scores_AHW: their scores, on a grid of any size. Shape: (A, H, W).
        temperature: of the soft-max.
    """
    is_rest_R = torch.ones(len(rows_R), dtype=torch.bool, device=scores_Rhw.device)
    is_rest_R[candidates_A] = False
    num_rest = len(rows_R) - len(candidates_A)
    rest_1hw = (scores_Rhw[is_rest_R] / temperature).logsumexp(0, keepdim=True) if num_rest else None
    return ClassLogits(candidate_scores_AHW / temperature, rows_R[candidates_A], rest_1hw, num_rest)


@torch.inference_mode()
def label_pixels(
    image: np.ndarray,
    logits: ClassLogits,
    classes: Sequence[str],
    threshold: float = 0.0,
    clusters_Khw: Float[Tensor, "K h w"] | None = None,
) -> Segmentation:
    """Upsample logits to the image's own size and label every pixel with the best class and its soft-max.

    Args:
        image: Shape: (H, W, 3), uint8 RGB.
        logits: from `class_logits`.
        classes: names, in index order.
        threshold: pixels of lower scores are labelled ``background``, or no class where there is no such class.
        clusters_Khw: soft assignments, labelled alike where given. Shape: (K, h, w).
    """
    height, width = image.shape[:2]
    labels = np.empty((height, width), label_dtype(len(classes)))
    scores = np.empty((height, width), np.float32)
    clusters = None if clusters_Khw is None else np.empty((height, width), label_dtype(len(clusters_Khw)))
    maps = max(len(logits.classes_A), 0 if clusters_Khw is None else len(clusters_Khw))
    rows = max(1, _STRIP_VALUES // (width * maps))
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        best_classes, scores[top:bottom] = _best_of_strip(logits, (height, width), top, bottom)
        labels[top:bottom] = to_labels(best_classes, scores[top:bottom], classes, threshold)
        if clusters is not None and clusters_Khw is not None:
            clusters[top:bottom] = _upsample(clusters_Khw, (height, width), top, bottom).max(0).indices.cpu().numpy()
    return Segmentation(labels=labels, classes=tuple(classes), scores=scores, clusters=clusters, image=image)


def _best_of_strip(logits: ClassLogits, size: tuple[int, int], top: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
    """Class index and soft-max of the best class at the pixels of some rows. Shape: -> (rows, W), (rows, W)."""
    strip_AHW = _upsample(logits.candidates_Ahw, size, top, bottom)
    best_HW, winner_HW = strip_AHW.max(0)
    # The soft-max of the best class alone: all of them would be written and read once more for nothing.
    total_HW = (strip_AHW - best_HW).exp_().sum(0)
    if logits.rest_1hw is not None:
        rest_HW = _upsample(logits.rest_1hw, size, top, bottom)[0] - best_HW
        # None of them is better than the best, though refinement may have lowered it.
        total_HW += rest_HW.clamp(max=math.log(logits.num_rest)).exp()
    return logits.classes_A[winner_HW].cpu().numpy(), total_HW.reciprocal().cpu().numpy()


@torch.inference_mode()
def _upsample(map_Chw: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Upsample bilinearly to ``size``, rows ``top`` to ``bottom`` only. Shape: (C, h, w) -> (C, bottom - top, W)."""
    if map_Chw.shape[1:] == size:
        return map_Chw[:, top:bottom]
    height, width = size
    device = map_Chw.device
    y = (torch.arange(top, bottom, device=device) + 0.5) / height * 2 - 1
    x = (torch.arange(width, device=device) + 0.5) / width * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).unsqueeze(0)
    return F.grid_sample(map_Chw.unsqueeze(0), grid, padding_mode="border", align_corners=False)[0]
