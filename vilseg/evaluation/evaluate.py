"""Evaluation of a segmenter on images with masks."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from vilseg.errors import DataError
from vilseg.evaluation.boundary_iou import WIDTH, BoundaryCounts
from vilseg.evaluation.calibration_error import CalibrationCounts
from vilseg.evaluation.confusion_matrix import ConfusionMatrix
from vilseg.evaluation.datasets import MaskedDataset
from vilseg.evaluation.image_and_mask import MaskedImage
from vilseg.evaluation.protocols import EvaluationProtocol, under
from vilseg.segmentation.result import Segmentation
from vilseg.text.vocabulary import Vocabulary

BATCH = 8
"""Default number of images per call of the segmenter."""


class BatchSegmenter(Protocol):
    """Interface of a segmenter that evaluation needs."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i of a segmentation means the class with index i."""

    def batch(self, images: list[np.ndarray], /) -> Sequence[Segmentation]:
        """Return one segmentation for each image; images are (H, W, 3) uint8 RGB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One image with its ground truth and prediction."""

    truth: MaskedImage
    segmentation: Segmentation
    miou: float = math.nan
    """Mean IoU of this image alone, over the measured classes present in it; nan if none is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Result of evaluating a segmenter on a dataset."""

    confusion: ConfusionMatrix
    images: int
    """Number of images measured."""
    vocabulary: str = ""
    """`Vocabulary.digest` of the requested classes, because metrics of different vocabularies must not be compared."""
    boundary: BoundaryCounts | None = None
    """Counts for the boundary IoU; None if not measured."""
    calibration: CalibrationCounts | None = None
    """Counts for the calibration error; None if the segmenter returns no scores."""
    temperature: float | None = None
    """Temperature fitted by `vilseg.evaluation.calibration_error.fit_temperature`; None if not requested."""
    measured: tuple[int, ...] | None = None
    """Indices of the classes that metrics are averaged over; None averages over all."""
    protocol: EvaluationProtocol = EvaluationProtocol.ALL
    examples: tuple[Example, ...] = ()
    """First images of the dataset; `evaluate(keep=...)` sets their number."""
    worst: tuple[Example, ...] = ()
    """Images with the lowest mIoU, in ascending order; `evaluate(keep_worst=...)` sets their number."""

    @property
    def miou(self) -> float:
        """Mean IoU over the measured classes that are present in the ground truth, in 0..1; nan if none is."""
        return self.confusion.mean_iou(self.measured)

    @property
    def boundary_iou(self) -> float:
        """Mean boundary IoU over the classes that `miou` averages over, in 0..1; nan if there are none or `boundary` is None."""
        return math.nan if self.boundary is None else self.boundary.mean_iou(self.measured)

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of the pixels of measured classes with the right label, in 0..1; nan if there are no such pixels."""
        return self.confusion.accuracy(self.measured)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the scores over the pixels of all classes, in 0..1; nan if there are no scores."""
        return math.nan if self.calibration is None else self.calibration.error

    @property
    def measured_classes(self) -> tuple[str, ...]:
        """Names of the classes that metrics are averaged over."""
        names = self.confusion.classes
        return names if self.measured is None else tuple(names[index] for index in self.measured)

    @property
    def per_class(self) -> dict[str, float]:
        """IoU in 0..1 by class name; nan for a class that is in neither ground truth nor prediction."""
        return dict(zip(self.confusion.classes, self.confusion.iou().tolist(), strict=True))

    @property
    def boundary_per_class(self) -> dict[str, float]:
        """Boundary IoU in 0..1 by class name; nan for the same classes as in `per_class`; empty if `boundary` is None."""
        if self.boundary is None:
            return {}
        return dict(zip(self.boundary.classes, self.boundary.iou().tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as a JSON-serialisable dictionary, without the examples; nan becomes None.

        `confusion` has one row for each true class; its last column counts pixels predicted as "no class". `measured` lists
        the names of the classes that metrics are averaged over.
        """
        return {
            "miou": _none_if_nan(self.miou),
            "boundary_iou": _none_if_nan(self.boundary_iou),
            "pixel_accuracy": _none_if_nan(self.pixel_accuracy),
            "calibration_error": _none_if_nan(self.calibration_error),
            "fitted_temperature": self.temperature,
            "images": self.images,
            "vocabulary": self.vocabulary,
            "protocol": str(self.protocol),
            "measured": list(self.measured_classes),
            "boundary_width": self.boundary.width if self.boundary else None,
            "per_class": {name: _none_if_nan(iou) for name, iou in self.per_class.items()},
            "boundary_per_class": {name: _none_if_nan(iou) for name, iou in self.boundary_per_class.items()},
            "confusion": self.confusion.counts.tolist(),
        }


def merged(parts: Iterable[Evaluation], *, keep: int = 0, keep_worst: int = 0) -> Evaluation:
    """Merge the evaluations of consecutive ranges of a dataset, such as those of several workers.

    Counts are integers, so the metrics equal those of one evaluation of the whole dataset to the last digit.

    Args:
        parts: at least one evaluation, in the order of the dataset, all with the same classes and protocol.
        keep: number of `Evaluation.examples` to keep, from those that the evaluations hold.
        keep_worst: number of `Evaluation.worst` to keep, from those that the evaluations hold.
    """
    parts = iter(parts)
    first = next(parts)
    examples, worst, images = list(first.examples), _Worst(keep_worst), first.images
    for example in first.worst:
        worst.add(example)
    for part in parts:
        first.confusion.merge(part.confusion)
        if first.boundary is not None and part.boundary is not None:
            first.boundary.merge(part.boundary)
        if first.calibration is not None and part.calibration is not None:
            first.calibration.merge(part.calibration)
        images += part.images
        examples += part.examples[: max(0, keep - len(examples))]
        for example in part.worst:
            worst.add(example)
    return replace(first, images=images, examples=tuple(examples), worst=worst.examples)


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def evaluate(
    segmenter: BatchSegmenter,
    dataset: MaskedDataset,
    *,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = BATCH,
    keep: int = 0,
    keep_worst: int = 0,
    protocol: EvaluationProtocol = EvaluationProtocol.ALL,
    names: Sequence[str] | None = None,
    boundary_width: float = WIDTH,
) -> Evaluation:
    """Segment every image of a dataset and compute metrics against the ground truth.

    Args:
        segmenter: segmenter whose classes are those of the dataset under the protocol, in the same order.
        dataset: images with masks.
        progress: called after each batch with the number of finished images and the number of all images.
        batch_size: maximum number of images per call of the segmenter.
        keep: number of images at the start of the dataset to keep as `Evaluation.examples`.
        keep_worst: number of images with the lowest mIoU to keep as `Evaluation.worst`.
        protocol: protocol that selects the requested and the measured classes.
        names: names that the segmenter has for the dataset's classes under the protocol, in the same order; metrics get
            these names too. None takes the dataset's own names.
        boundary_width: width of the band along contours as a fraction of the image diagonal.

    Raises:
        DataError: the classes differ, the dataset does not fit the protocol, or the dataset is damaged.
    """
    dataset, measured = under(dataset, protocol)
    classes = dataset.classes if names is None else tuple(names)
    if len(classes) != len(dataset.classes):
        raise DataError(f"there are {len(classes)} names for {len(dataset.classes)} classes of the dataset")
    _check_classes(segmenter.classes, classes)
    confusion, boundary = ConfusionMatrix(classes), BoundaryCounts(classes, width=boundary_width)
    calibration: CalibrationCounts | None = None
    examples: list[Example] = []
    worst = _Worst(keep_worst)
    done = 0
    items = iter(dataset)
    while batch := list(itertools.islice(items, batch_size)):
        for item, segmentation in zip(batch, segmenter.batch([item.image for item in batch]), strict=True):
            own = ConfusionMatrix(classes)
            own.update(segmentation.labels, item.mask, ignore=item.ignore)
            confusion.merge(own)
            boundary.update(segmentation.labels, item.mask, ignore=item.ignore)
            scores = getattr(segmentation, "scores", None)  # other implementations than `Segmenter` may have none
            if scores is not None:
                calibration = calibration or CalibrationCounts(len(classes))
                calibration.update(segmentation.labels, scores, item.mask, ignore=item.ignore)
            example = Example(truth=item, segmentation=segmentation, miou=own.mean_iou(measured))
            if len(examples) < keep:
                examples.append(example)
            worst.add(example)
        done += len(batch)
        if progress is not None:
            progress(done, len(dataset))
    vocabulary = getattr(segmenter, "vocabulary", None) or Vocabulary(tuple(segmenter.classes))
    return Evaluation(
        confusion=confusion,
        images=done,
        vocabulary=vocabulary.digest,
        boundary=boundary,
        calibration=calibration,
        measured=measured,
        protocol=protocol,
        examples=tuple(examples),
        worst=worst.examples,
    )


class _Worst:
    """Collection of the `count` added examples with the lowest mIoU; of examples with equal mIoU, those added first are kept."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[float, int, Example]] = []
        self._order = itertools.count()

    def add(self, example: Example) -> None:
        if math.isnan(example.miou):
            return
        heapq.heappush(self._heap, (-example.miou, -next(self._order), example))
        if len(self._heap) > self._count:
            heapq.heappop(self._heap)

    @property
    def examples(self) -> tuple[Example, ...]:
        return tuple(example for *_, example in sorted(self._heap, key=lambda entry: entry[:2], reverse=True))


def _check_classes(ours: Sequence[str], theirs: Sequence[str]) -> None:
    for index, (our, their) in enumerate(itertools.zip_longest(ours, theirs, fillvalue="(none)")):
        if our != their:
            raise DataError(
                f"class {index} is {our!r} for the segmenter but {their!r} for the dataset: "
                f"give the segmenter the dataset's {len(theirs)} classes in their order"
            )
