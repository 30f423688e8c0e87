"""Boundary IoU: intersection over union of the pixels near contours, independent of object size.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation" (CVPR 2021): the mask of a class, in
ground truth and in prediction, is reduced to a band, its pixels within a given distance of its own contour. The metric is
the intersection over union of these two bands. As in the authors' code (bowenc0221/boundary-iou-api, `mask_to_boundary`),
the distance is the maximum of the horizontal and the vertical distance, its limit is a fraction of the image diagonal, and
the image border is a contour. Counts are summed over images as in a confusion matrix, and averaged over classes as in mIoU.
"""

import math
from collections.abc import Sequence

import numpy as np

from vilseg.evaluation.confusion_matrix import known_pixels, mean_over

WIDTH = 0.02
"""Default width of a band as a fraction of the image diagonal: the authors' choice for COCO (section 5.2)."""


class BoundaryCounts:
    """Numbers of pixels in the bands along the contours of each class, summed over images.

    Predictions on ignored pixels are discarded, so an ignored area has the same contour in ground truth and prediction. A
    prediction that is right on all other pixels therefore has boundary IoU 1.

    Args:
        classes: names of the C classes, in index order.
        ignore: default ground-truth value of ignored pixels; `update` can override it.
        width: width of a band as a fraction of the image diagonal, rounded to pixels and at least one pixel.

    Raises:
        ValueError: the width is not positive.
    """

    counts: np.ndarray
    """(C, 3) int64: numbers of pixels in both bands of the class, in the ground-truth band, in the predicted band."""

    def __init__(self, classes: Sequence[str], ignore: int = 255, *, width: float = WIDTH) -> None:
        if not width > 0:
            raise ValueError(f"the width of the band along contours must be positive, not {width}")
        self.classes = tuple(classes)
        self.ignore = ignore
        self.width = width
        self.counts = np.zeros((len(self.classes), 3), dtype=np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray, *, ignore: int | None = None) -> None:
        """Add the counts of one image; arguments and errors are those of `ConfusionMatrix.update`."""
        count = len(self.classes)
        known = known_pixels(prediction, truth, self.ignore if ignore is None else ignore, count)
        true = np.where(known, truth, count + 1).astype(np.int32)
        predicted = np.where(known, np.minimum(prediction, count), count + 1).astype(np.int32)
        distance = max(1, round(self.width * math.hypot(*truth.shape)))
        true_band, predicted_band = near_contours(true, distance), near_contours(predicted, distance)
        both = true_band & predicted_band & (true == predicted)
        for column, (labels, band) in enumerate(((true, both), (true, true_band), (predicted, predicted_band))):
            # The last two bins hold pixels without a predicted class and ignored pixels; both are dropped.
            self.counts[:, column] += np.bincount(labels[band], minlength=count + 2)[:count]

    def merge(self, other: "BoundaryCounts") -> None:
        """Add the counts of another instance, for example of another worker.

        Raises:
            ValueError: its classes or width differ.
        """
        if (other.classes, other.width) != (self.classes, self.width):
            raise ValueError("cannot merge counts along contours of other classes or of another width")
        self.counts += other.counts

    def iou(self) -> np.ndarray:
        """Compute the boundary IoU of every class, (C,) float64 in 0..1; nan if neither truth nor prediction has the class."""
        both, true, predicted = self.counts.T
        union = true + predicted - both
        return np.divide(both, union, out=np.full(len(self.classes), np.nan), where=union > 0)

    def mean_iou(self, measured: Sequence[int] | None = None) -> float:
        """Compute the mean of `iou` over the classes that are present in the ground truth, in 0..1; nan if none is.

        Args:
            measured: indices of the classes to which the mean is restricted further; None adds no restriction.
        """
        return mean_over(self.iou(), self.counts[:, 1] > 0, measured)


def near_contours(labels: np.ndarray, distance: int) -> np.ndarray:
    """Find the pixels that are near a pixel with a different label, or near the image border.

    Args:
        labels: (H, W) integers.
        distance: maximum distance in rows and in columns, at least 1 pixel.

    Returns:
        Mask of these pixels. Shape: (H, W), bool.
    """
    height, width = labels.shape
    side = 2 * distance + 1
    band = np.ones(labels.shape, dtype=bool)
    if height < side or width < side:
        return band
    # A window is uniform if no two adjacent pixels in it differ, so two window sums handle all classes at once.
    across = _window_sums(labels[:, 1:] != labels[:, :-1], side, side - 1)
    down = _window_sums(labels[1:] != labels[:-1], side - 1, side)
    band[distance : height - distance, distance : width - distance] = (across > 0) | (down > 0)
    return band


def _window_sums(marks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sum (H, W) bool over every window that fits inside: (H - height + 1, W - width + 1) int32."""
    sums = np.zeros((marks.shape[0] + 1, marks.shape[1] + 1), dtype=np.int32)
    np.cumsum(marks, axis=0, out=sums[1:, 1:])
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
