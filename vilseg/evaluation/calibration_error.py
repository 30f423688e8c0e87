"""Calibration error of scores: of the pixels with score s, a fraction s should be right (Guo et al. 2017).

The expected calibration error (their eq. 3) sorts pixels into M bins of equal width by score and takes

    ECE = sum_m |B_m| / n |acc(B_m) - conf(B_m)|

with the fraction of correct pixels acc and the mean score conf of a bin. Temperature scaling (their section 4.2) divides the
logits, here the cosines of the classes, by the t that maximises the likelihood of the true classes; labels do not change.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.errors import DataError
from vilseg.evaluation.confusion_matrix import known_pixels
from vilseg.evaluation.datasets import MaskedDataset

if TYPE_CHECKING:
    from vilseg.segmentation.segmenter import Segmenter

BINS = 15
"""Number of bins, as in the paper."""
_STEPS = 1 << 16
"""Scores are quantised to this many steps, so that sums are integers and independent of the order of the images."""
_PIXELS = 256
"""Pixels sampled from each image for the fit; more pixels of one image are redundant."""
_TEMPERATURES = (1e-4, 10.0)


class CalibrationCounts:
    """Pixels by score: how many there are and how many are right, summed over images.

    Args:
        classes: number of classes.
    """

    counts: np.ndarray
    """(3, BINS) int64: pixels, right pixels, and the sum of scores in parts of 1/65,536."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self.counts = np.zeros((3, BINS), np.int64)

    def update(self, prediction: np.ndarray, scores: np.ndarray, truth: np.ndarray, *, ignore: int) -> None:
        """Count one image; pixels without a predicted class are ignored.

        Args:
            prediction: (H, W) integers >= 0; values of at least the number of classes mean no class.
            scores: (H, W) in 0..1.
            truth: (H, W) integers, a class or the ignored value.
            ignore: that value.

        Raises:
            ValueError: the shapes differ, or a value is neither a class nor to be ignored.
        """
        known = known_pixels(prediction, truth, ignore, self._classes) & (prediction < self._classes)
        right, sure = (prediction == truth)[known], np.rint(scores[known].astype(np.float64) * _STEPS).astype(np.int64)
        bins = np.minimum(sure * BINS // _STEPS, BINS - 1)
        # Sums of whole numbers below 2^53 are exact in the doubles of `weights`.
        for row, weights in enumerate((None, right, sure)):
            self.counts[row] += np.bincount(bins, weights, BINS).astype(np.int64)

    def merge(self, other: CalibrationCounts) -> None:
        """Add the counts of another part of the images."""
        self.counts += other.counts

    @property
    def error(self) -> float:
        """Expected calibration error in 0..1; nan where nothing was counted."""
        pixels, right, sure = self.counts
        if not pixels.sum():
            return math.nan
        return float(np.abs(right - sure / _STEPS).sum() / pixels.sum())


@torch.inference_mode()
def fit_temperature(segmenter: Segmenter, dataset: MaskedDataset, *, images: int = 100) -> float:
    """Fit `SegmentationConfig.temperature` by maximum likelihood of the true classes of pixels.

    Args:
        segmenter: has the classes of the dataset.
        dataset: a small one is enough; measure the calibration error on another one.
        images: number of images to use, from the first.

    Returns:
        The minimum, between 0.0001 and 10, of the mean negative log-likelihood over 256 pixels of each image.

    Raises:
        DataError: no pixel of these images has a class.
    """
    chosen = np.random.default_rng(0)
    logits: list[Tensor] = []
    truths: list[Tensor] = []
    for item in itertools.islice(dataset, images):
        rows, columns = np.nonzero(item.mask != item.ignore)
        if not len(rows):
            continue
        taken = chosen.choice(len(rows), min(_PIXELS, len(rows)), replace=False)
        rows, columns = rows[taken], columns[taken]
        # Bilinear, as scores are enlarged; a place is its pixel's centre.
        places = np.stack([(columns + 0.5) / item.mask.shape[1], (rows + 0.5) / item.mask.shape[0]], 1) * 2 - 1
        scores_Chw = segmenter.class_scores(item.image).cpu()
        grid = torch.from_numpy(places).float()[None, None]
        sampled_CX = F.grid_sample(scores_Chw[None], grid, padding_mode="border", align_corners=False)[0, :, 0]
        logits.append(sampled_CX.T.double())
        truths.append(torch.from_numpy(item.mask[rows, columns].astype(np.int64)))
    if not logits:
        raise DataError("no pixel of the dataset has a class: there is nothing to fit a temperature by")
    logits_XC, truth_X = torch.cat(logits), torch.cat(truths)

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits_XC / math.exp(log_temperature), truth_X))

    # The likelihood has one maximum over 1 / t (it is convex there), so thirds can be cut away.
    low, high = map(math.log, _TEMPERATURES)
    while high - low > 1e-4:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp((low + high) / 2)
