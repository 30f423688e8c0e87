"""Real photos: train on Flickr8k captions, measure mIoU on COCO masks, segment an archive of photos in bulk.

All of it on the embedded object store and a local Ray cluster, through the jobs that the ``vilseg`` command calls. Two
baselines come from the same run: the same model before its first step, and the class that has most pixels everywhere.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encoders import minilm_folder
from cluster.store import ObjectStore
from jobs import console
from jobs.session import Session, ray_session
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.errors import DataError
from vilseg.evaluation.confusion import ConfusionMatrix
from vilseg.evaluation.datasets import FolderDataset
from vilseg.text.vocabulary import Vocabulary

CONFIG = Path(__file__).parent.parent / "configs" / "real_photos.yaml"
DATA_VARIABLE = "VILSEG_SHARED_DATA"
TASKS = ("things", "things_background", "panoptic")
_ROOT = "s3://vilseg/real_photos"


def main(out: Path) -> dict[str, Any]:
    """Run everything; ``out`` keeps the object store with the model and the masks.

    Args:
        out: replaced if an earlier run left it.

    Returns:
        ``miou`` (things) and, for every task, trained, untrained and largest class; seconds by stage; the bulk summary.

    Raises:
        DataError: the photos are not where ``VILSEG_SHARED_DATA`` says.
    """
    data, out = _data(), out.absolute()
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    for left in ("store", "coco"):
        shutil.rmtree(out / left, ignore_errors=True)
    datasets = {task: _link_dataset(data / "coco_mini_dev", task, out / "coco" / task) for task in TASKS}
    store = ObjectStore.start(out / "store")
    try:
        os.environ.update(store.environment())
        with _stage("upload", seconds):
            _upload(data)
        with ray_session() as session:
            initial, trained = _train(session, seconds)
            with _stage("segment", seconds):
                bulk = _segment(session, trained, datasets["things_background"])
        # Ray is gone by now: evaluation has the cores for itself.
        with _stage("evaluate", seconds):
            figures = _evaluate({"trained": trained, "untrained": initial}, datasets)
        with _stage("largest_class", seconds):
            for task in TASKS:
                figures[task]["largest_class"] = _largest_class(FolderDataset(datasets[task]))
    finally:
        store.stop()
    seconds["total"] = time.perf_counter() - started
    return {
        "benchmark": "real_photos",
        "miou": figures["things"]["trained"]["miou"],
        **{f"miou_{task}": figures[task]["trained"]["miou"] for task in TASKS},
        "baselines": {
            "untrained": {task: figures[task]["untrained"]["miou"] for task in TASKS},
            "largest_class": {task: figures[task]["largest_class"]["miou"] for task in TASKS},
        },
        "pixel_accuracy": {task: figures[task]["trained"]["pixel_accuracy"] for task in TASKS},
        "images": {task: figures[task]["trained"]["images"] for task in TASKS},
        "bulk": bulk,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "cpus": os.cpu_count(),
        "store": str(out / "store"),
    }


def _data() -> Path:
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise DataError(
            f"{DATA_VARIABLE} is not set; it names the folder with flickr8k_224, flickr8k_full and coco_mini_dev"
        )
    for name in ("flickr8k_224/shards", "flickr8k_full/images", "coco_mini_dev/things"):
        if not (Path(folder) / name).is_dir():
            raise DataError(f"there is no {name} in {folder}, which {DATA_VARIABLE} names")
    return Path(folder)


def _link_dataset(coco: Path, task: str, target: Path) -> str:
    """The ``folder`` layout for one task: its masks, its classes, and those of the common images that it masks."""
    (target / "images").mkdir(parents=True)
    (target / "masks").symlink_to((coco / task / "masks").resolve())
    (target / "classes.txt").symlink_to((coco / task / "classes.txt").resolve())
    for mask in sorted((coco / task / "masks").glob("*.png")):
        image = coco / "images" / f"{mask.stem}.jpg"
        (target / "images" / image.name).symlink_to(image.resolve())
    return str(target)


def _upload(data: Path) -> None:
    """Put the training pairs and the archive to segment on the store."""
    for shard in sorted((data / "flickr8k_224" / "shards").glob("train-*.tar")):
        storage.write_bytes(storage.join(_ROOT, "pairs", shard.name), shard.read_bytes())
    storage.upload_folder(data / "flickr8k_full" / "images", storage.join(_ROOT, "photos"))


def _train(session: Session, seconds: dict[str, float]) -> tuple[str, str]:
    """URIs of the model before and after training."""
    from jobs import cache_features, train

    config = RunConfig.load(
        str(CONFIG),
        [
            "name=flickr8k",
            f"data.source={_ROOT}/pairs",
            f"data.feature_cache={_ROOT}/features",
            f"trainer.storage={_ROOT}/runs",
            f"model.text_encoder.checkpoint={minilm_folder()}",
        ],
    )
    with _stage("cache", seconds):  # training would do it by itself; apart, its time is seen
        cache_features.main(config, session, progress=train.say_cached)
    with _stage("train", seconds):
        outcome = train.main(config, session, progress=console.TrainingProgress(config.trainer.steps))
    return outcome.folder.initial, outcome.folder.model


def _segment(session: Session, model: str, dataset: str) -> dict[str, Any]:
    from jobs import segment

    classes = Vocabulary.of(FolderDataset(dataset).classes)
    done = segment.main([f"{_ROOT}/photos"], model, classes, f"{_ROOT}/segmented", session)
    return {
        "images": done.images,
        "ok": done.ok,
        "rejected": done.rejected,
        "images_per_second": done.images_per_second,
        "uri": done.uri,
    }


def _evaluate(models: dict[str, str], datasets: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Figures by task and model, a process for each core."""
    jobs = [(task, name) for task in TASKS for name in models]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1)), mp_context=context) as pool:
        running = {(task, name): pool.submit(_measure, models[name], datasets[task]) for task, name in jobs}
        figures: dict[str, dict[str, Any]] = {task: {} for task in TASKS}
        for (task, name), future in running.items():
            figures[task][name] = future.result()
            console.say(f"{task}, {name}: mIoU {figures[task][name]['miou']:.4f}")
    return figures


def _measure(model: str, dataset: str) -> dict[str, Any]:
    """mIoU of one model on one dataset; runs in a process of its own."""
    import torch

    from vilseg.evaluation.evaluate import evaluate
    from vilseg.model import ViLSeg
    from vilseg.segmentation.segmenter import Segmenter

    torch.set_num_threads(1)
    images = FolderDataset(dataset)
    found = evaluate(Segmenter(ViLSeg.from_pretrained(model), images.classes), images, batch_size=4)
    return {"miou": round(found.miou, 4), "pixel_accuracy": round(found.pixel_accuracy, 4), "images": found.images}


def _largest_class(dataset: FolderDataset) -> dict[str, Any]:
    """Figures of a prediction that names every pixel after the class with most pixels in the truth."""
    counts = np.zeros(len(dataset.classes) + 1, np.int64)
    for item in dataset:
        known = item.mask[item.mask != item.ignore]
        counts[: len(dataset.classes)] += np.bincount(known, minlength=len(dataset.classes))
    matrix = ConfusionMatrix(dataset.classes)
    matrix.counts[:, int(counts.argmax())] = counts[: len(dataset.classes)]
    return {"miou": round(matrix.miou, 4), "class": dataset.classes[int(counts.argmax())]}


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    console.say(f"[{name}]")
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
