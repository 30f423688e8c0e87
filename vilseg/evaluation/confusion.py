"""Counting which class was predicted where which one is true, and the figures that follow from the counts."""

from collections.abc import Sequence

import numpy as np


class ConfusionMatrix:
    """Pixels by true and predicted class, summed over images.

    Args:
        classes: names of the C classes, in index order.
        ignore: truth value that is left out of every figure, unless `update` is told another one.
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
        if prediction.shape != truth.shape:
            raise ValueError(f"prediction of shape {prediction.shape} does not fit truth of shape {truth.shape}")
        known = truth != (self.ignore if ignore is None else ignore)
        true, predicted = truth[known].astype(np.int64), prediction[known].astype(np.int64)
        if true.size == 0:
            return
        count = len(self.classes)
        if true.min() < 0 or true.max() >= count:
            raise ValueError(f"truth values {true.min()}..{true.max()} do not lie in 0..{count - 1}")
        if predicted.min() < 0:
            raise ValueError(f"prediction has the negative value {predicted.min()}")
        cells = true * (count + 1) + np.minimum(predicted, count)
        self.counts += np.bincount(cells, minlength=self.counts.size).reshape(self.counts.shape)

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add the counts of another matrix, as of another worker.

        Raises:
            ValueError: its classes are others.
        """
        if other.classes != self.classes:
            raise ValueError(f"cannot merge the counts of classes {other.classes} into those of {self.classes}")
        self.counts += other.counts

    def iou(self) -> np.ndarray:
        """Intersection over union of every class, (C,) float64 in 0..1; nan for one in neither truth nor prediction.

        Predictions on ignored pixels count for nothing.
        """
        right = np.diagonal(self.counts)
        union = self.counts.sum(axis=1) + self.counts[:, :-1].sum(axis=0) - right
        return np.divide(right, union, out=np.full(len(self.classes), np.nan), where=union > 0)

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that are present in the truth, in 0..1; nan if none is.

        A class that is only predicted lowers the IoU of those it was taken for, but is no term of the mean itself:
        otherwise the figure would depend on which absent classes happened to be predicted once.
        """
        present = self.counts.any(axis=1)
        return float(self.iou()[present].mean()) if present.any() else float("nan")

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels with a true class whose prediction is that class, in 0..1; nan if there are none."""
        total = self.counts.sum()
        return float(np.trace(self.counts) / total) if total else float("nan")
