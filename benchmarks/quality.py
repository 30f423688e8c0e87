"""Effect of each inference setting: mIoU, boundary IoU and time, with one setting changed at a time.

The datasets are unseen synthetic scenes, for the demo's model, and photos, for the model of ``benchmarks real_photos``. Both
models are trained first unless an earlier run has left them. The dense features of an image are kept for all rows that compute
them in the same way, so the time of a row is that of classifying pixels.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import real_photos, scene_runs
from benchmarks.shared import embedded_store, shared_data
from benchmarks.tables import replace_section
from cli import console
from cli.overrides import segmentation_overrides
from cluster.ray_session import ray_session
from vilseg.data.synthetic import scenes
from vilseg.evaluation.datasets import FolderDataset
from vilseg.evaluation.evaluate import evaluate
from vilseg.model import ViLSeg
from vilseg.segmentation.dense_features import DenseFeatures
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.segmenter import Segmenter
from vilseg.segmentation.visualization import class_colours
from vilseg.text.vocabulary import Vocabulary

SCENES = ("scenes",)
PHOTOS = real_photos.TASKS
_LARGE = 512
"""Side of the images that refinement is timed on."""
_ROUNDS = 9
_DRAWN = 5

Change = Callable[[Vocabulary], Vocabulary]


@dataclass(frozen=True)
class Row:
    """Row of the results: overrides of the inference settings of the model, a change of the vocabulary, and the datasets."""

    axis: str
    name: str
    overrides: tuple[str, ...] = ()
    datasets: tuple[str, ...] = (*SCENES, *PHOTOS)
    vocabulary: Change = lambda vocabulary: vocabulary


def _without_synonyms(vocabulary: Vocabulary) -> Vocabulary:
    return Vocabulary(vocabulary.classes)


_NONE, _PAMR = (
    "segmentation.refinement.iterations=0",
    "segmentation.refinement={method: pamr, iterations: 10, tolerance: 0.2}",
)
_GUIDED = "segmentation.refinement={method: guided, iterations: 1, radius: 3, tolerance: 0.1, upscale: 2}"
_MODES = {"region": ("segmentation.region_weight=1",), "patch": ("segmentation.region_weight=0",), "blend": ()}
_REFINEMENTS = {"none": (_NONE,), "PAMR": (_PAMR,), "guided": (_GUIDED,)}
ROWS = (
    Row("", "default"),
    *(
        Row("mode x refinement", f"{mode}, {refinement}", (*mode_keys, *keys))
        for mode, mode_keys in _MODES.items()
        for refinement, keys in _REFINEMENTS.items()
    ),
    Row("synonyms", "names alone", (), PHOTOS, _without_synonyms),
    Row("synonyms", "mean", ("segmentation.synonyms=mean",), PHOTOS),
    Row("synonyms", "logsumexp", ("segmentation.synonyms=logsumexp",), PHOTOS),
    Row("gate", "none", ("segmentation.gate=null",)),
    *(Row("gate", f"{count} classes", (f"segmentation.gate={count}",)) for count in (5, 8, 20)),
    Row("background", "its name alone", ("segmentation.background_words=[]",), ("things_background",)),
    Row("background", "its words, no bias", ("segmentation.background_bias=0",), ("things_background",)),
    Row("background", "its words, no objectness", ("segmentation.objectness=0",), ("things_background",)),
    Row(
        "background",
        "its words, no bias, no objectness",
        ("segmentation.background_bias=0", "segmentation.objectness=0"),
        ("things_background",),
    ),
    Row("background", "by threshold 0.3", ("segmentation.threshold=0.3",), ("things_background",)),
    Row("size", "half", ("segmentation.input_size=224",), PHOTOS),
    Row("size", "half more", ("segmentation.input_size=672",), PHOTOS),
    Row("size", "half more, windows of 448", ("segmentation.input_size=672", "segmentation.window=448"), PHOTOS),
    Row("size", "double", ("segmentation.input_size=128",), SCENES),
    Row("size", "double, windows of 64", ("segmentation.input_size=128", "segmentation.window=64"), SCENES),
)


def main(out: Path) -> dict[str, Any]:
    """Measure every row.

    Args:
        out: folder for the scenes and their model, which a later run uses again. The model for photos is kept in the folder of
            ``benchmarks real_photos`` beside it.

    Returns:
        ``rows``, a list with the metrics of each row and dataset; ``ratio``, the boundary IoU of scenes with the default
        refinement over that without refinement; ``refinement_share``, the fraction of the time of a 512-pixel image that
        refinement takes.

    Raises:
        DataError: the photos are not in the folder that ``VILSEG_SHARED_DATA`` names.
    """
    out = out.absolute()
    data = shared_data("flickr8k_224/shards", "coco_mini_dev/things")
    models = {"scenes": _scene_model(out), "photos": _photo_model(out, data)}
    rows: list[dict[str, Any]] = []
    for name, dataset, vocabulary in _datasets(out, data):
        model = models["scenes" if name in SCENES else "photos"]
        rows += _measure(name, dataset, vocabulary, model)
    shares = _time_large(models["scenes"], out)
    boundary = {row["name"]: row["boundary_iou"] for row in rows if row["dataset"] == "scenes"}
    _draw(models["scenes"], out, Path(__file__).parent / "quality.png")
    replace_section(Path(__file__).parent / "RESULTS.md", "quality", _table(rows, shares))
    return {
        "benchmark": "quality",
        "ratio": round(boundary["default"] / boundary["blend, none"], 3),
        "refinement_share": shares,
        "rows": rows,
    }


def _scene_model(out: Path) -> str:
    place = out / "scenes_model"
    if not (place / "config.json").exists():
        scene_runs.draw(out / "scenes")
        with console.timed_stage("train on scenes", {}):
            scene_runs.train(scene_runs.config(out / "scenes", "name=quality")).save_pretrained(str(place))
    return str(place)


def _photo_model(out: Path, data: Path) -> str:
    place = out.parent / "real_photos" / real_photos.MODEL
    if not (place / "config.json").exists():
        with embedded_store(out / "store"), ray_session() as session:
            real_photos.upload(data)
            trained = real_photos.train(session, {}).run_dir.model
            ViLSeg.from_pretrained(trained).save_pretrained(str(place))
    return str(place)


def _datasets(out: Path, data: Path) -> list[tuple[str, FolderDataset, Vocabulary]]:
    scenes_of = FolderDataset(str(out / "scenes" / "unseen"))
    found = [("scenes", scenes_of, Vocabulary(scenes_of.classes))]
    shutil.rmtree(out / "coco", ignore_errors=True)
    folders = real_photos.link_datasets(data / "coco_mini_dev", out / "coco")
    for task, vocabulary in real_photos.vocabularies().items():
        found.append((task, FolderDataset(folders[task]), vocabulary))
    return found


class _Kept:
    """A segmenter that has looked at a dataset's images already; they come in their order."""

    def __init__(self, segmenter: Segmenter, looks: Sequence[DenseFeatures]) -> None:
        self._segmenter, self._looks = segmenter, iter(looks)
        self.classes, self.vocabulary = segmenter.classes, segmenter.vocabulary
        self.seconds = 0.0

    def batch(self, images: list[np.ndarray], /) -> list[Segmentation]:
        begun = time.perf_counter()
        named = [self._segmenter.classify(next(self._looks), image) for image in images]
        self.seconds += time.perf_counter() - begun
        return named


def _measure(name: str, dataset: FolderDataset, vocabulary: Vocabulary, uri: str) -> list[dict[str, Any]]:
    looks: dict[tuple[Any, ...], tuple[list[DenseFeatures], float]] = {}
    found = []
    for row in ROWS:
        if name not in row.datasets:
            continue
        segmenter = _segmenter(uri, row.vocabulary(vocabulary), row.overrides)
        settings = segmenter.config
        seen = (settings.input_size, settings.window, settings.overlap, settings.attention)
        if seen not in looks:
            looks.clear()  # rows that see alike stand together
            begun = time.perf_counter()
            looks[seen] = [segmenter.encode([item.image])[0] for item in dataset], time.perf_counter() - begun
        kept = _Kept(segmenter, looks[seen][0])
        measured = evaluate(kept, dataset)
        seconds = (looks[seen][1] + kept.seconds) / measured.images
        found.append(
            {
                "dataset": name,
                "axis": row.axis,
                "name": row.name,
                "miou": round(measured.miou, 4),
                "boundary_iou": round(measured.boundary_iou, 4),
                "milliseconds": round(1000 * seconds, 1),
                "vocabulary": measured.vocabulary,
            }
        )
        console.log(f"{name}, {row.axis} {row.name}: mIoU {measured.miou:.4f}, boundary {measured.boundary_iou:.4f}")
    return found


def _segmenter(uri: str, vocabulary: Vocabulary, overrides: Sequence[str]) -> Segmenter:
    model = ViLSeg.from_pretrained(uri)
    model.segmentation = segmentation_overrides(overrides)(model.segmentation)
    return Segmenter(model, vocabulary, device="cpu", keep_clusters=False)


def _time_large(uri: str, out: Path) -> dict[str, float]:
    """By method, the fraction of refinement in the time of a 512-pixel scene, seen at 512 pixels and at the model's own size."""
    classes = FolderDataset(str(out / "scenes" / "unseen")).classes
    pictures = [scenes.render_scene(0, index, _LARGE, split="eval").image for index in range(3)]
    shares: dict[str, float] = {}
    for size in (_LARGE, None):
        keys = [f"segmentation.input_size={size}"] if size else []
        made = {
            name: _segmenter(uri, Vocabulary(classes), [*keys, *refinement])
            for name, refinement in _REFINEMENTS.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(_ROUNDS):  # in turns, so that whatever else the machine does falls on all of them
            for name, segmenter in made.items():
                begun = time.process_time()
                segmenter.batch(pictures)
                seconds[name].append(time.process_time() - begun)
        middle = {name: float(np.median(values)) for name, values in seconds.items()}
        for name in ("PAMR", "guided"):
            shares[f"{name}, seen at {size or 'the model size'}"] = round(1 - middle["none"] / middle[name], 3)
    return shares


def _draw(uri: str, out: Path, path: Path) -> None:
    """Scenes with what each mode and each refinement makes of them, and the truth."""
    from matplotlib.figure import Figure

    dataset = FolderDataset(str(out / "scenes" / "unseen"))
    vocabulary = Vocabulary(dataset.classes)
    shown = {
        "regions": (*_MODES["region"], _NONE),
        "patches": (*_MODES["patch"], _NONE),
        "both": (*_MODES["blend"], _NONE),
        "both, guided filter": (_GUIDED,),
        "both, PAMR": (_PAMR,),
    }
    items = list(itertools.islice(dataset, 0, 5 * _DRAWN, 5))
    figure = Figure(figsize=(2 * (len(shown) + 2), 2.05 * len(items)), layout="constrained")
    axes = figure.subplots(len(items), len(shown) + 2)
    colours = np.vstack([class_colours(dataset.classes), np.zeros((1, 3), np.uint8)])
    columns: dict[str, list[np.ndarray]] = {"picture": [item.image for item in items]}
    for name, overrides in shown.items():
        found = _segmenter(uri, vocabulary, overrides).batch([item.image for item in items])
        columns[name] = [colours[one.labels] for one in found]
    columns["truth"] = [colours[np.minimum(item.mask, len(dataset.classes))] for item in items]
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="nearest")
            axes[row, column].axis("off")
    figure.savefig(path, dpi=80)


def _table(rows: Sequence[dict[str, Any]], shares: dict[str, float]) -> str:
    lines = []
    for name in (*SCENES, *PHOTOS):
        own = [row for row in rows if row["dataset"] == name]
        lines += [f"**{name}**, vocabulary {own[0]['vocabulary']}", ""]
        lines += ["| choice | | mIoU | boundary IoU | ms a picture |", "|---|---|---|---|---|"]
        for row in own:
            digest = "" if row["vocabulary"] == own[0]["vocabulary"] else f" ({row['vocabulary']})"
            figures = f"{row['miou']:.4f} | {row['boundary_iou']:.4f} | {row['milliseconds']:.0f}"
            lines.append(f"| {row['axis']} | {row['name']}{digest} | {figures} |")
        lines.append("")
    lines.append("Share of refinement in the time of a scene of 512 px: ")
    lines[-1] += ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + "."
    return "\n".join(lines)
