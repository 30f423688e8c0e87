"""Evaluate a model on images with masks: mIoU, pixel accuracy, per-class IoU, and a page to look at."""

from __future__ import annotations

import json
from collections.abc import Callable

from vilseg import storage
from vilseg.config import SegmentationConfig
from vilseg.errors import ConfigError, DataError, StorageError
from vilseg.evaluation.boundary import WIDTH
from vilseg.evaluation.datasets import open_dataset
from vilseg.evaluation.evaluate import Evaluation, evaluate
from vilseg.evaluation.protocols import EvaluationProtocol, under
from vilseg.evaluation.report import render_evaluation
from vilseg.model import ViLSeg
from vilseg.segmentation.segmenter import Segmenter
from vilseg.text.vocabulary import Vocabulary

_EXAMPLES, _WORST = 24, 12
_FIGURES, _PAGE = "evaluation.json", "report.html"


def main(
    model: str,
    dataset: str,
    *,
    classes: Vocabulary | None = None,
    protocol: str = EvaluationProtocol.ALL,
    boundary_width: float = WIDTH,
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
        classes: other names for the classes that the protocol asks for, in the dataset's order.
        protocol: one of `EvaluationProtocol`: which classes are asked for and measured.
        boundary_width: of the band along contours for boundary IoU, as a share of the image's diagonal.
        out: folder or URI for ``evaluation.json`` and ``report.html``.
        overwrite: replace what is at ``out``.
        settings: changes the inference settings that the model carries.
        progress: told (done, total).
        command: shown in the report.

    Raises:
        ConfigError: ``protocol`` or ``boundary_width`` is wrong.
        DataError: the dataset is wrong or not one for the protocol, or ``classes`` has another number of names.
        ModelError: no model folder.
        StorageError: a URI cannot be reached, or ``out`` exists.
    """
    if protocol not in list(EvaluationProtocol):
        raise ConfigError(f"--protocol {protocol} is none of {', '.join(EvaluationProtocol)}")
    if not 0 < boundary_width <= 1:
        raise ConfigError(f"--boundary-width {boundary_width} is no share of the diagonal; give a number in 0..1")
    protocol = EvaluationProtocol(protocol)
    uri = dataset.partition(":")[2]
    for place in filter(None, (model, uri, out)):
        storage.require_bucket(place)
    if out and not overwrite:
        for name in (_FIGURES, _PAGE):
            if storage.exists(storage.join(out, name)):
                raise StorageError(f"{out} holds {name} already; replace it by --overwrite or choose another --out")
    data = open_dataset(dataset)
    asked = under(data, protocol)[0].classes
    if classes is not None and len(classes.classes) != len(asked):
        raise DataError(
            f"--classes has {len(classes.classes)} names, but the protocol {protocol} asks for {len(asked)} classes of "
            f"{dataset}, from {asked[0]} to {asked[-1]}"
        )
    loaded = ViLSeg.from_pretrained(model)
    loaded.segmentation = settings(loaded.segmentation)
    result = evaluate(
        Segmenter(loaded, classes or asked),
        data,
        progress=progress,
        keep=_EXAMPLES if out else 0,
        keep_worst=_WORST if out else 0,
        protocol=protocol,
        names=classes.classes if classes is not None else None,
        boundary_width=boundary_width,
    )
    if out:
        page = render_evaluation(result, f"{storage.name(model)} on {storage.name(uri)}", [command] if command else [])
        storage.write_text(storage.join(out, _PAGE), page)
        storage.write_text(storage.join(out, _FIGURES), json.dumps(result.to_dict(), indent=2))
    return result
