"""Evaluation protocols: the requested and the measured classes of a dataset.

Metrics of different protocols must not be compared: VOC with its background (21 classes), without it (20) and
on unseen classes only (5) are three different metrics.
"""

from collections.abc import Iterator
from enum import StrEnum

import numpy as np

from vilseg.errors import DataError
from vilseg.evaluation.benchmark_datasets import LAYOUTS, PublishedDataset
from vilseg.evaluation.datasets import MaskedDataset
from vilseg.evaluation.image_and_mask import MaskedImage
from vilseg.text.vocabulary import BACKGROUND


class EvaluationProtocol(StrEnum):
    """Protocol of an evaluation."""

    ALL = "all"
    """All classes are requested and measured, including the background if the dataset has one."""
    NO_BACKGROUND = "no-background"
    """The class background is not requested, and pixels whose ground truth is background are ignored."""
    UNSEEN = "unseen"
    """All classes are requested, the means are over the dataset's unseen ones, which the paper reports. It is not established
    whether the paper requested all classes or the unseen ones alone; this is the harder reading."""


def under(dataset: MaskedDataset, protocol: EvaluationProtocol) -> tuple[MaskedDataset, tuple[int, ...]]:
    """Apply a protocol: return the dataset, and the indices of the classes that the means are over.

    Raises:
        DataError: the dataset has no background, or no unseen classes.
    """
    if protocol is EvaluationProtocol.UNSEEN:
        unseen = dataset.unseen if isinstance(dataset, PublishedDataset) else ()
        if not unseen:
            known = ", ".join(layout.kind for layout in LAYOUTS if layout.unseen)
            raise DataError(
                f"the protocol unseen needs a dataset with a list of unseen classes, which are {known}; "
                "use the protocol all or no-background"
            )
        return dataset, tuple(dataset.classes.index(name) for name in unseen)
    if protocol is EvaluationProtocol.NO_BACKGROUND:
        if BACKGROUND not in dataset.classes:
            raise DataError(
                f"the protocol no-background needs a dataset with a class {BACKGROUND}, and none of the "
                f"{len(dataset.classes)} classes is called so; use the protocol all"
            )
        dataset = WithoutBackground(dataset)
    return dataset, tuple(range(len(dataset.classes)))


class WithoutBackground:
    """Dataset with an ignored background; the indices of later classes decrease by one."""

    def __init__(self, dataset: MaskedDataset) -> None:
        self._dataset = dataset
        self._background = dataset.classes.index(BACKGROUND)
        self.classes = tuple(name for name in dataset.classes if name != BACKGROUND)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[MaskedImage]:
        for item in self._dataset:
            new_values = np.arange(np.iinfo(item.mask.dtype).max + 1)
            new_values[self._background + 1 :] -= 1
            new_values[[self._background, item.ignore]] = item.ignore
            mask = new_values.astype(item.mask.dtype)[item.mask]
            yield MaskedImage(name=item.name, image=item.image, mask=mask, ignore=item.ignore)
