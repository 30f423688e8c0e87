"""Running a segmenter over images with masks."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vilseg.errors import DataError
from vilseg.evaluation.confusion import ConfusionMatrix
from vilseg.evaluation.datasets import MaskedDataset, MaskedImage
from vilseg.segmentation.result import Segmentation
from vilseg.text.vocabulary import Vocabulary


class BatchSegmenter(Protocol):
    """The part of a segmenter that evaluation needs."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels."""

    def batch(self, images: list[np.ndarray], /) -> Sequence[Segmentation]:
        """One segmentation for each image, (H, W, 3) uint8 RGB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One image with what is true and what was predicted."""

    truth: MaskedImage
    segmentation: Segmentation


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """How well a segmenter did on a dataset."""

    confusion: ConfusionMatrix
    images: int
    """Number of images measured."""
    vocabulary: str = ""
    """`Vocabulary.digest` of what the segmenter chose from: figures of other vocabularies are not to be compared with these."""
    examples: tuple[Example, ...] = ()
    """The first images of the dataset, as many as were asked for."""

    @property
    def miou(self) -> float:
        """Mean IoU over the classes present in the truth, in 0..1."""
        return self.confusion.miou

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels with the right class, in 0..1."""
        return self.confusion.pixel_accuracy

    @property
    def per_class(self) -> dict[str, float]:
        """IoU of every class in 0..1; nan for a class that is in neither truth nor prediction."""
        return dict(zip(self.confusion.classes, self.confusion.iou().tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The figures ready for JSON, without the examples; nan becomes None.

        `confusion` has one row for each true class; its last column counts pixels predicted as no class.
        """
        return {
            "miou": _none_if_nan(self.miou),
            "pixel_accuracy": _none_if_nan(self.pixel_accuracy),
            "images": self.images,
            "vocabulary": self.vocabulary,
            "per_class": {name: _none_if_nan(iou) for name, iou in self.per_class.items()},
            "confusion": self.confusion.counts.tolist(),
        }


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def evaluate(
    segmenter: BatchSegmenter,
    dataset: MaskedDataset,
    *,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 8,
    keep: int = 0,
) -> Evaluation:
    """Segment every image of the dataset and count right and wrong pixels.

    Args:
        segmenter: its classes must be those of the dataset, in the same order.
        dataset: images with masks.
        progress: called after each batch with the images done and the images there are.
        batch_size: images given to the segmenter at once.
        keep: how many of the first images to keep as `Evaluation.examples`, with truth and segmentation.

    Raises:
        DataError: the classes differ, or the dataset is wrong (see there).
    """
    _check_classes(segmenter.classes, dataset.classes)
    confusion = ConfusionMatrix(dataset.classes)
    examples: list[Example] = []
    done = 0
    items = iter(dataset)
    while batch := list(itertools.islice(items, batch_size)):
        for item, segmentation in zip(batch, segmenter.batch([item.image for item in batch]), strict=True):
            confusion.update(segmentation.labels, item.mask, ignore=item.ignore)
            if len(examples) < keep:
                examples.append(Example(truth=item, segmentation=segmentation))
        done += len(batch)
        if progress is not None:
            progress(done, len(dataset))
    # What is no `Segmenter` of ours may have nothing but names.
    vocabulary = getattr(segmenter, "vocabulary", None) or Vocabulary(tuple(segmenter.classes))
    return Evaluation(confusion=confusion, images=done, vocabulary=vocabulary.digest, examples=tuple(examples))


def _check_classes(ours: Sequence[str], theirs: Sequence[str]) -> None:
    for index, (our, their) in enumerate(itertools.zip_longest(ours, theirs, fillvalue="(none)")):
        if our != their:
            raise DataError(
                f"class {index} is {our!r} for the segmenter but {their!r} for the dataset: "
                f"give the segmenter the dataset's {len(theirs)} classes in their order"
            )
