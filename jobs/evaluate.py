"""Evaluation of a model on images with masks: mIoU, pixel accuracy, per-class IoU, and an HTML report."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.ray_session import Session
from vilseg import storage
from vilseg.config import SegmentationConfig
from vilseg.errors import ConfigError, DataError, StorageError, UserError
from vilseg.evaluation.boundary_iou import WIDTH
from vilseg.evaluation.calibration_error import fit_temperature
from vilseg.evaluation.datasets import open_dataset
from vilseg.evaluation.evaluate import BATCH, Evaluation, evaluate, merged
from vilseg.evaluation.protocols import EvaluationProtocol, under
from vilseg.evaluation.report import render_evaluation
from vilseg.model import ViLSeg
from vilseg.segmentation.segmenter import Segmenter
from vilseg.text.vocabulary import Vocabulary

_EXAMPLES, _WORST = 24, 12
_FIGURES, _PAGE = "evaluation.json", "report.html"
_PART = 4 * BATCH
"""Number of images per task. A multiple of the batch size, so that every image is in the same batch as in a single process."""


def main(
    model: str,
    dataset: str,
    *,
    classes: Vocabulary | None = None,
    protocol: str = EvaluationProtocol.ALL,
    boundary_width: float = WIDTH,
    fit: bool = False,
    out: str | None = None,
    overwrite: bool = False,
    settings: Callable[[SegmentationConfig], SegmentationConfig] = lambda settings: settings,
    progress: Callable[[int, int], None] | None = None,
    command: str = "",
    session: Session | None = None,
) -> Evaluation:
    """Evaluate ``model`` on ``dataset``.

    Args:
        model: URI of a model folder.
        dataset: ``KIND:URI``.
        classes: names to use in place of the dataset's own for the requested classes, in the dataset's order.
        protocol: one of `EvaluationProtocol`; selects the requested and the measured classes.
        boundary_width: width of the band along contours for boundary IoU, as a fraction of the image diagonal.
        fit: also fit the temperature of the class scores to the first 100 images and masks.
        out: folder or URI for ``evaluation.json`` and ``report.html``; nothing is written if None.
        overwrite: replace an earlier result at ``out``.
        settings: function that changes the inference settings stored with the model.
        progress: function called with the number of evaluated images and the number of all images.
        command: command line to show in the report.
        session: cluster over which the images are distributed. If None, this process evaluates them; the metrics
            are the same in both cases.

    Raises:
        ConfigError: ``protocol`` is unknown, or ``boundary_width`` is not in (0, 1].
        DataError: the dataset is damaged or does not fit the protocol, or ``classes`` has a wrong number of names.
        ModelError: ``model`` is not a model folder.
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
    asked_for = under(data, protocol)[0]
    asked = asked_for.classes
    if classes is not None and len(classes.classes) != len(asked):
        raise DataError(
            f"--classes has {len(classes.classes)} names, but the protocol {protocol} asks for {len(asked)} classes of "
            f"{dataset}, from {asked[0]} to {asked[-1]}"
        )
    loaded = ViLSeg.from_pretrained(model)
    loaded.segmentation = settings(loaded.segmentation)
    options: dict[str, Any] = {
        "keep": _EXAMPLES if out else 0,
        "keep_worst": _WORST if out else 0,
        "protocol": protocol,
        "names": classes.classes if classes is not None else None,
        "boundary_width": boundary_width,
    }
    vocabulary = classes or Vocabulary.of(asked)
    if session is None:
        result = evaluate(Segmenter(loaded, vocabulary), data, progress=progress, **options)
    else:
        told = progress or (lambda done, total: None)
        parts = _on_cluster(session, len(data), told, (model, loaded.segmentation, vocabulary, dataset, options))
        result = merged(parts, keep=options["keep"], keep_worst=options["keep_worst"])
    if fit:
        result = replace(result, temperature=fit_temperature(Segmenter(loaded, vocabulary), asked_for))
    if out:
        page = render_evaluation(result, f"{storage.name(model)} on {storage.name(uri)}", [command] if command else [])
        storage.write_text(storage.join(out, _PAGE), page)
        storage.write_text(storage.join(out, _FIGURES), json.dumps(result.to_dict(), indent=2))
    return result


class _Part:
    """Actor that evaluates ranges of `_PART` consecutive images.

    Args:
        threads: number of torch threads.
        model: URI of the model folder.
        segmentation: inference settings.
        vocabulary: requested classes.
        dataset: ``KIND:URI``.
        options: further keyword arguments of :func:`evaluate`.
    """

    def __init__(
        self,
        threads: int,
        model: str,
        segmentation: SegmentationConfig,
        vocabulary: Vocabulary,
        dataset: str,
        options: dict[str, Any],
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        loaded = ViLSeg.from_pretrained(model)
        loaded.segmentation = segmentation
        self._segmenter = Segmenter(loaded, vocabulary)
        self._dataset = open_dataset(dataset)
        self._options = options

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        start = int(rows["start"][0])
        options = {**self._options, "keep": max(0, self._options["keep"] - start)}
        found: Evaluation | UserError
        try:
            found = evaluate(self._segmenter, self._dataset.part(start, start + _PART), **options)
        except UserError as error:  # returned, not raised: Ray's wrapper would show only a traceback
            found = error
        return {"found": np.array([pickle.dumps(found)], dtype=object)}


def _on_cluster(
    session: Session, images: int, progress: Callable[[int, int], None], arguments: tuple[Any, ...]
) -> Iterator[Evaluation]:
    """Evaluate ranges of `_PART` images on a pool of actors, and yield the results in the order of the dataset."""
    import ray.data

    starts = [{"start": start} for start in range(0, images, _PART)]
    actors = max(1, min(len(starts), session.gpus or session.cpus))
    places = ray.data.from_items(starts, override_num_blocks=len(starts))
    places.context.execution_options.preserve_order = True
    parts = places.map_batches(
        _Part,
        fn_constructor_args=(max(1, session.cpus // actors), *arguments),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.9 * session.cpus_per_actor(actors),
        num_gpus=1 if session.gpus else 0,
    )
    done = 0
    progress(done, images)
    for row in parts.iter_rows():
        found: Evaluation | UserError = pickle.loads(row["found"])
        if isinstance(found, UserError):
            raise found
        done += found.images
        progress(done, images)
        yield found
