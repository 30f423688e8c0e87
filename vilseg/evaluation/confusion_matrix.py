"""Confusion matrix of true and predicted classes, and the metrics derived from it."""

from collections.abc import Sequence

import numpy as np


class ConfusionMatrix:
    """Pixels by true and predicted class, summed over images.

    Args:
        classes: names of the C classes, in index order.
        ignore: ground-truth value excluded from every metric, unless `update` gets another one.
    """

    counts: np.ndarray
    """(C, C + 1) int64: row = true class, column = predicted class, the last column = predicted "no class"."""

    def __init__(self, classes: Sequence[str], ignore: int = 255) -> None:
        self.classes = tuple(classes)
        self.ignore = ignore
        self.counts = np.zeros((len(self.classes), len(self.classes) + 1), dtype=np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray, *, ignore: int | None = None) -> None:
        """Count one image.

        Args:
            prediction: (H, W) integers >= 0; C or more means "no class", which is an error like any other wrong class.
            truth: (H, W) integers, 0..C-1 or the value to ignore.
            ignore: this image's value to ignore, where it is not that of the matrix (masks of 8 and of 16 bit).

        Raises:
            ValueError: the shapes differ, or a value is neither a class nor to be ignored.
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
        """Intersection over union of every class, (C,) float64 in 0..1; nan for one in neither truth nor prediction.

        Predictions on ignored pixels are not counted.
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
        """Mean of `iou` over the classes that are present in the ground truth, in 0..1; nan if none is.

        A class that is only predicted lowers the IoU of the classes it was confused with, but is no term of the mean itself:
        otherwise the metric would depend on which absent classes happened to be predicted once.

        Args:
            measured: indices of the classes to average over; all if None.
        """
        return mean_over(self.iou(), self.present, measured)

    @property
    def pixel_accuracy(self) -> float:
        """`accuracy` over all classes."""
        return self.accuracy()

    def accuracy(self, measured: Sequence[int] | None = None) -> float:
        """Fraction of the pixels with a true class whose prediction is that class, in 0..1; nan if there are none.

        Args:
            measured: indices of the true classes whose pixels count; all if None.
        """
        rows = range(len(self.classes)) if measured is None else list(measured)
        total = self.counts[rows].sum()
        return float(np.diagonal(self.counts)[rows].sum() / total) if total else float("nan")


def known_pixels(prediction: np.ndarray, truth: np.ndarray, ignore: int, count: int) -> np.ndarray:
    """(H, W) bool: which pixels have a true class.

    Raises:
        ValueError: the shapes differ, or a value of such a pixel is no class: not in 0..count-1 in truth, or negative.
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
    """Mean of the (C,) values of the classes that are `present` and, where it is given, `measured`; nan if none is."""
    chosen = present.copy()
    if measured is not None:
        chosen[:] = False
        chosen[list(measured)] = present[list(measured)]
    return float(values[chosen].mean()) if chosen.any() else float("nan")
