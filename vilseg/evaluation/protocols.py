"""Evaluation protocols: the classes of a dataset that the segmenter is asked for, and those that metrics are averaged over.

Metrics of different protocols must not be compared. On VOC, the mIoU over 21 classes with background, over 20 classes
without it, and over the 5 unseen classes are three different metrics.
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
    """Protocol of an evaluation. Requested classes are given to the segmenter; measured classes are averaged over."""

    ALL = "all"
    """All classes are requested and measured, including the background if the dataset has one."""
    NO_BACKGROUND = "no-background"
    """The class background is not requested, and pixels whose ground truth is background are ignored."""
    UNSEEN = "unseen"
    """All classes are requested, and the unseen classes of the ViL-Seg paper (arXiv 2207.08455) are measured. It is not known
    whether the paper requested all classes or only the unseen ones; requesting all is harder."""


def under(dataset: MaskedDataset, protocol: EvaluationProtocol) -> tuple[MaskedDataset, tuple[int, ...]]:
    """Apply a protocol to a dataset.

    Returns:
        Dataset with the requested classes, and the indices of the measured classes in it.

    Raises:
        DataError: the protocol needs a background or unseen classes, and the dataset has none.
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
    """Dataset without its class background: pixels of that class are ignored, and indices of later classes decrease by one."""

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
