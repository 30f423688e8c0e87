"""Evaluate a model on images with masks: mIoU, pixel accuracy, per-class IoU, and a page to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vilseg import storage
from vilseg.config import SegmentationConfig
from vilseg.errors import DataError, StorageError
from vilseg.evaluation.datasets import MaskedDataset, MaskedImage, open_dataset
from vilseg.evaluation.evaluate import Evaluation, evaluate
from vilseg.evaluation.report import render_evaluation
from vilseg.model import ViLSeg
from vilseg.segmentation.segmenter import Segmenter
from vilseg.text.vocabulary import Vocabulary

_EXAMPLES = 24
_FIGURES, _PAGE = "evaluation.json", "report.html"


def main(
    model: str,
    dataset: str,
    *,
    classes: Vocabulary | None = None,
    out: str | None = None,
    overwrite: bool = False,
    settings: Callable[[SegmentationConfig], SegmentationConfig] = lambda settings: settings,
    progress: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Evaluation:
    """Measure ``model`` on ``dataset``.

    Args:
        model: URI of a model folder.
        dataset: ``KIND:URI``.
        classes: other names for the dataset's classes, in its order.
        out: folder or URI for ``evaluation.json`` and ``report.html``.
        overwrite: replace what is at ``out``.
        settings: changes the inference settings that the model carries.
        progress: told (done, total).
        command: shown in the report.

    Raises:
        DataError: the dataset is wrong, or ``classes`` has another number of names.
        ModelError: no model folder.
        StorageError: a URI cannot be reached, or ``out`` exists.
    """
    uri = dataset.partition(":")[2]
    for place in filter(None, (model, uri, out)):
        storage.require_bucket(place)
    if out and not overwrite:
        for name in (_FIGURES, _PAGE):
            if storage.exists(storage.join(out, name)):
                raise StorageError(f"{out} holds {name} already; replace it by --overwrite or choose another --out")
    data: MaskedDataset = open_dataset(dataset)
    if classes is not None:
        if len(classes.classes) != len(data.classes):
            raise DataError(
                f"--classes has {len(classes.classes)} names, but {dataset} has {len(data.classes)} classes"
            )
        data = _Renamed(data, classes.classes)
    loaded = ViLSeg.from_pretrained(model)
    loaded.segmentation = settings(loaded.segmentation)
    result = evaluate(Segmenter(loaded, classes or data.classes), data, progress=progress, keep=_EXAMPLES if out else 0)
    if out:
        page = render_evaluation(result, f"{storage.name(model)} on {storage.name(uri)}", [command] if command else [])
        storage.write_text(storage.join(out, _PAGE), page)
        storage.write_text(storage.join(out, _FIGURES), json.dumps(result.to_dict(), indent=2))
    return result


@dataclass(frozen=True)
class _Renamed:
    """A dataset whose classes go by other names."""

    dataset: MaskedDataset
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[MaskedImage]:
        return iter(self.dataset)
