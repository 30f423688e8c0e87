"""Confusion matrix of true and predicted classes, and the metrics derived from it."""

from collections.abc import Sequence

import numpy as np


class ConfusionMatrix:
    """Number of pixels for each pair of true and predicted class, summed over images.

    Args:
        classes: names of the C classes, in index order.
        ignore: default ground-truth value of pixels excluded from all metrics; `update` can override it.
    """

    counts: np.ndarray
    """(C, C + 1) int64: row = true class, column = predicted class; the last column counts predictions of "no class"."""

    def __init__(self, classes: Sequence[str], ignore: int = 255) -> None:
        self.classes = tuple(classes)
        self.ignore = ignore
        self.counts = np.zeros((len(self.classes), len(self.classes) + 1), dtype=np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray, *, ignore: int | None = None) -> None:
        """Add the counts of one image.

        Args:
            prediction: (H, W) integers >= 0; C or more means "no class", which counts as a wrong prediction.
            truth: (H, W) integers, class indices 0..C-1 or the ignored value.
            ignore: ignored value of this image, because 8-bit and 16-bit masks differ in it; None takes that of the matrix.

        Raises:
            ValueError: the shapes differ, a ground-truth value is neither a class nor ignored, or a prediction is negative.
        """
        count = len(self.classes)
        known = known_pixels(prediction, truth, self.ignore if ignore is None else ignore, count)
        true, predicted = truth[known].astype(np.int64), prediction[known].astype(np.int64)
        cells = true * (count + 1) + np.minimum(predicted, count)
        self.counts += np.bincount(cells, minlength=self.counts.size).reshape(self.counts.shape)

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add the counts of another matrix, for example of another worker.

        Raises:
            ValueError: its classes differ.
        """
        if other.classes != self.classes:
            raise ValueError(f"cannot merge the counts of classes {other.classes} into those of {self.classes}")
        self.counts += other.counts

    def iou(self) -> np.ndarray:
        """Compute the intersection over union of every class, (C,) float64 in 0..1.

        A class that is in neither ground truth nor prediction has nan. Predictions on ignored pixels are not counted.
        """
        right = np.diagonal(self.counts)
        union = self.counts.sum(axis=1) + self.counts[:, :-1].sum(axis=0) - right
        return np.divide(right, union, out=np.full(len(self.classes), np.nan), where=union > 0)

    @property
    def present(self) -> np.ndarray:
        """Mask of the classes present in the ground truth, (C,) bool."""
        return self.counts.sum(axis=1) > 0

    @property
    def miou(self) -> float:
        """`mean_iou` over all classes."""
        return self.mean_iou()

    def mean_iou(self, measured: Sequence[int] | None = None) -> float:
        """Compute the mean of `iou` over the classes that are present in the ground truth, in 0..1; nan if none is.

        A class that is predicted but absent from the ground truth lowers the IoU of the classes it was confused with. It is
        not averaged itself, because then the metric would depend on which absent classes happened to be predicted once.

        Args:
            measured: indices of the classes to which the mean is restricted further; None adds no restriction.
        """
        return mean_over(self.iou(), self.present, measured)

    @property
    def pixel_accuracy(self) -> float:
        """`accuracy` over all classes."""
        return self.accuracy()

    def accuracy(self, measured: Sequence[int] | None = None) -> float:
        """Compute the fraction of pixels with the right prediction, among those not ignored, in 0..1; nan if none counts.

        Args:
            measured: indices of the true classes whose pixels count; None counts all.
        """
        rows = range(len(self.classes)) if measured is None else list(measured)
        total = self.counts[rows].sum()
        return float(np.diagonal(self.counts)[rows].sum() / total) if total else float("nan")


def known_pixels(prediction: np.ndarray, truth: np.ndarray, ignore: int, count: int) -> np.ndarray:
    """Compute the mask of the pixels that are not ignored, and check truth and prediction at these pixels.

    Args:
        prediction: (H, W) integers.
        truth: (H, W) integers.
        ignore: ground-truth value of ignored pixels.
        count: number of classes.

    Returns:
        Shape: (H, W), bool.

    Raises:
        ValueError: the shapes differ; or, outside ignored pixels, a ground-truth value is not in 0..count-1 or a prediction
            is negative.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction of shape {prediction.shape} does not fit truth of shape {truth.shape}")
    known: np.ndarray = truth != ignore
    if known.any():
        lowest, highest = truth[known].min(), truth[known].max()
        if lowest < 0 or highest >= count:
            raise ValueError(f"truth values {lowest}..{highest} do not lie in 0..{count - 1}")
        if (lowest := prediction[known].min()) < 0:
            raise ValueError(f"prediction has the negative value {lowest}")
    return known


def mean_over(values: np.ndarray, present: np.ndarray, measured: Sequence[int] | None = None) -> float:
    """Compute the mean of values over classes; nan if no class qualifies.

    Args:
        values: value of each class. Shape: (C,).
        present: mask of the classes to average over. Shape: (C,), bool.
        measured: indices of the classes to average over, in addition to the mask; None adds no restriction.
    """
    chosen = present.copy()
    if measured is not None:
        chosen[:] = False
        chosen[list(measured)] = present[list(measured)]
    return float(values[chosen].mean()) if chosen.any() else float("nan")
