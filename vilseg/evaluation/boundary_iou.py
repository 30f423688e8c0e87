"""Boundary IoU: intersection over union of the pixels near contours, independent of object size.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation" (CVPR 2021): of a class's mask only
the pixels that lie within a distance of its own contour count, in ground truth and in prediction, and the metric is the
intersection over union of these two bands. As in the authors' code (bowenc0221/boundary-iou-api, `mask_to_boundary`) the
distance is the larger of the horizontal and the vertical one, a fraction of the image diagonal, and the image border
is a contour. Summed over images as the confusion matrix is, and averaged over classes as mIoU is.
"""

import math
from collections.abc import Sequence

import numpy as np

from vilseg.evaluation.confusion_matrix import known_pixels, mean_over

WIDTH = 0.02
"""Width of the band on each side of a contour as a fraction of the diagonal: the authors' choice for COCO (section 5.2)."""


class BoundaryCounts:
    """Pixels near the contours of each class, summed over images.

    An ignored area has the same contour in ground truth and prediction, whatever was predicted there: a prediction that is
    right wherever the ground truth is known scores 1.

    Args:
        classes: names of the C classes, in index order.
        ignore: ground-truth value that is ignored, unless `update` gets another one.
        width: width of the band as a fraction of the image diagonal; at least one pixel.

    Raises:
        ValueError: the width is not positive.
    """

    counts: np.ndarray
    """(C, 3) int64: pixels of the class that lie in both bands, in that of the truth, in that of the prediction."""

    def __init__(self, classes: Sequence[str], ignore: int = 255, *, width: float = WIDTH) -> None:
        if not width > 0:
            raise ValueError(f"the width of the band along contours must be positive, not {width}")
        self.classes = tuple(classes)
        self.ignore = ignore
        self.width = width
        self.counts = np.zeros((len(self.classes), 3), dtype=np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray, *, ignore: int | None = None) -> None:
        """Count one image; arguments and errors as those of `ConfusionMatrix.update`."""
        count = len(self.classes)
        known = known_pixels(prediction, truth, self.ignore if ignore is None else ignore, count)
        true = np.where(known, truth, count + 1).astype(np.int32)
        predicted = np.where(known, np.minimum(prediction, count), count + 1).astype(np.int32)
        distance = max(1, round(self.width * math.hypot(*truth.shape)))
        true_band, predicted_band = near_contours(true, distance), near_contours(predicted, distance)
        both = true_band & predicted_band & (true == predicted)
        for column, (labels, band) in enumerate(((true, both), (true, true_band), (predicted, predicted_band))):
            # The last two bins, pixels without a class and ignored ones, belong to no class.
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
        """Boundary IoU of every class, (C,) float64 in 0..1; nan for one in neither truth nor prediction."""
        both, true, predicted = self.counts.T
        union = true + predicted - both
        return np.divide(both, union, out=np.full(len(self.classes), np.nan), where=union > 0)

    def mean_iou(self, measured: Sequence[int] | None = None) -> float:
        """Mean of `iou` over the classes that are present in the ground truth, in 0..1; nan if none is.

        Args:
            measured: indices of the classes to average over; all if None.
        """
        return mean_over(self.iou(), self.counts[:, 1] > 0, measured)


def near_contours(labels: np.ndarray, distance: int) -> np.ndarray:
    """Mask of the pixels within `distance` >= 1 rows and columns of another label or of the image border.

    Args:
        labels: (H, W) integers.
        distance: pixels.

    Returns:
        Shape: (H, W), bool.
    """
    height, width = labels.shape
    side = 2 * distance + 1
    band = np.ones(labels.shape, dtype=bool)
    if height < side or width < side:
        return band
    # A window has one label only if no two neighbours in it differ: two sums over windows serve all classes at once.
    across = _window_sums(labels[:, 1:] != labels[:, :-1], side, side - 1)
    down = _window_sums(labels[1:] != labels[:-1], side - 1, side)
    band[distance : height - distance, distance : width - distance] = (across > 0) | (down > 0)
    return band


def _window_sums(marks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sums of (H, W) bool over all windows that lie within: (H - height + 1, W - width + 1) int32."""
    sums = np.zeros((marks.shape[0] + 1, marks.shape[1] + 1), dtype=np.int32)
    np.cumsum(marks, axis=0, out=sums[1:, 1:])
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
