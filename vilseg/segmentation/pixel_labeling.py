"""Upsample class scores to the original image size, in strips of rows, and label every pixel with its best class."""

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
"""Maximum number of class scores held at full resolution at once (16 MB). It bounds the memory for large images and many classes;
a larger strip would be slower because it exceeds the CPU cache."""


class ClassLogits(NamedTuple):
    """Class logits of one image, on grids coarser than its pixels; only candidate classes can win a pixel."""

    candidates_Ahw: Tensor
    """Logits of the candidate classes. Shape: (A, h, w)."""
    classes_A: Tensor
    """Indices of the candidate classes; the index after the last class means "no class". Shape: (A,)."""
    rest_1hw: Tensor | None
    """Log-sum-exp of the logits of all other classes, on the patch grid. Shape: (1, h, w); None if there are no others."""
    num_rest: int
    """Number of classes that are no candidates."""


def class_logits(
    scores_Rhw: Float[Tensor, "R h w"],
    rows_R: Int[Tensor, " R"],
    candidates_A: Int[Tensor, " A"],
    candidate_scores_AHW: Float[Tensor, "A H W"],
    temperature: float,
) -> ClassLogits:
    """Divide scores by the temperature, and combine the logits of the classes that cannot win by log-sum-exp.

    Args:
        scores_Rhw: scores of all classes that are kept, on the patch grid. Shape: (R, h, w).
        rows_R: class index of each row of ``scores_Rhw``. Shape: (R,).
        candidates_A: indices into ``rows_R`` of the candidate classes, which may win a pixel. Shape: (A,).
        candidate_scores_AHW: scores of the candidate classes, on a grid of any size. Shape: (A, H, W).
        temperature: temperature of the soft-max.
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
    """Upsample logits to the original image size, and assign every pixel its best class and the probability of that class.

    Args:
        image: the image. Shape: (H, W, 3), uint8 RGB.
        logits: result of `class_logits`.
        classes: class names, in index order.
        threshold: minimum probability in 0..1. Pixels below it are labelled ``background``, or "no class" if there is no such
            class.
        clusters_Khw: soft cluster assignments; if given, every pixel also gets its best cluster. Shape: (K, h, w).
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
    """Return index and probability of the best class at the pixels of a strip of rows. Shape: -> (rows, W), (rows, W)."""
    strip_AHW = _upsample(logits.candidates_Ahw, size, top, bottom)
    best_HW, winner_HW = strip_AHW.max(0)
    # Only the soft-max of the best class is computed, which saves writing and reading those of all classes.
    total_HW = (strip_AHW - best_HW).exp_().sum(0)
    if logits.rest_1hw is not None:
        rest_HW = _upsample(logits.rest_1hw, size, top, bottom)[0] - best_HW
        # Other classes cannot beat the best one, even if refinement has lowered its score: each term of the sum is at most 1.
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
