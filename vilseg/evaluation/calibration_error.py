"""Calibration error of scores: of the pixels with score s, a fraction s should be right (Guo et al. 2017).

The expected calibration error (their eq. 3) sorts the n pixels by score into M bins B_m of equal width and computes

    ECE = sum_m |B_m| / n |acc(B_m) - conf(B_m)|

with the fraction of correct pixels acc and the mean score conf of a bin. Temperature scaling (their section 4.2) divides the
logits, here the cosine similarities to the classes, by the temperature that maximises the likelihood of the true classes.
Labels do not change.
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
"""Number of steps that scores are quantised to, so that sums are integers and independent of the order of the images."""
_PIXELS = 256
"""Maximum number of pixels sampled per image for the temperature fit; more pixels of one image are redundant."""
_TEMPERATURES = (1e-4, 10.0)


class CalibrationCounts:
    """Numbers of all and of correct pixels in each bin of scores, summed over images.

    Args:
        classes: number of classes.
    """

    counts: np.ndarray
    """(3, BINS) int64: per bin the number of pixels, the number of correct pixels, and the sum of scores times 65,536."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self.counts = np.zeros((3, BINS), np.int64)

    def update(self, prediction: np.ndarray, scores: np.ndarray, truth: np.ndarray, *, ignore: int) -> None:
        """Add the counts of one image; pixels without a predicted class are ignored.

        Args:
            prediction: (H, W) integers >= 0; a value equal to the number of classes or larger means "no class".
            scores: (H, W) scores of the predicted classes, in 0..1.
            truth: (H, W) integers, class indices or `ignore`.
            ignore: ground-truth value of ignored pixels.

        Raises:
            ValueError: the shapes differ, or a ground-truth value is neither a class nor `ignore`.
        """
        known = known_pixels(prediction, truth, ignore, self._classes) & (prediction < self._classes)
        right, sure = (prediction == truth)[known], np.rint(scores[known].astype(np.float64) * _STEPS).astype(np.int64)
        bins = np.minimum(sure * BINS // _STEPS, BINS - 1)
        # bincount adds `weights` as doubles, which is exact for integers below 2^53.
        for row, weights in enumerate((None, right, sure)):
            self.counts[row] += np.bincount(bins, weights, BINS).astype(np.int64)

    def merge(self, other: CalibrationCounts) -> None:
        """Add the counts of another instance, for example of another worker."""
        self.counts += other.counts

    @property
    def error(self) -> float:
        """Expected calibration error in 0..1; nan if no pixel was counted."""
        pixels, right, sure = self.counts
        if not pixels.sum():
            return math.nan
        return float(np.abs(right - sure / _STEPS).sum() / pixels.sum())


@torch.inference_mode()
def fit_temperature(segmenter: Segmenter, dataset: MaskedDataset, *, images: int = 100) -> float:
    """Fit `SegmentationConfig.temperature` by maximum likelihood of the true classes of pixels.

    Args:
        segmenter: segmenter for the classes of the dataset.
        dataset: images with masks. A small dataset is enough, but measure the calibration error on a different one.
        images: maximum number of images to use, from the start of the dataset.

    Returns:
        Temperature between 0.0001 and 10 that minimises the mean negative log-likelihood over up to 256 random pixels of
        each image.

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
        # Bilinear, as in the upsampling of class scores. Coordinates are pixel centres in -1..1.
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

    # The loss is convex in 1 / temperature, so it has one minimum and a ternary search finds it.
    low, high = map(math.log, _TEMPERATURES)
    while high - low > 1e-4:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp((low + high) / 2)
