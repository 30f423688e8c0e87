"""Real photos: train on Flickr8k captions, measure mIoU on COCO masks, segment an archive of photos in bulk.

All of it on the embedded object store and a local Ray cluster, through the jobs that the ``vilseg`` command calls. Two
baselines come from the same run: the same model before its first step, and the class that has most pixels everywhere.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.encoders import minilm_folder
from benchmarks.shared import embedded_store, shared_data
from cli import console
from cluster.ray_session import Session, ray_session
from jobs.train import train_job
from jobs.train.supervisor import TrainingResult
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.evaluation.confusion_matrix import ConfusionMatrix
from vilseg.model import ViLSeg
from vilseg.text.vocabulary import BACKGROUND, Vocabulary
from vilseg.training.metrics_log import read_metrics

CONFIG = Path(__file__).parent.parent / "configs" / "real_photos.yaml"
TASKS = ("things", "things_background", "panoptic")
MODEL = "model"
"""Folder in ``out`` that keeps the trained model, for ``benchmarks quality`` too."""
_ROOT = "s3://vilseg/real_photos"


def main(out: Path) -> dict[str, Any]:
    """Run everything; ``out`` keeps the object store with the model and the masks.

    Args:
        out: replaced if an earlier run left it.

    Returns:
        ``miou`` (things) and, for every task, trained, untrained and largest class; seconds by stage; the bulk summary; and how
        much cheaper an epoch is for the cached features.

    Raises:
        DataError: the photos are not where ``VILSEG_SHARED_DATA`` says.
    """
    data = shared_data("flickr8k_224/shards", "flickr8k_full/images", "coco_mini_dev/things")
    out = out.absolute()
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    shutil.rmtree(out / "coco", ignore_errors=True)
    shutil.rmtree(out / MODEL, ignore_errors=True)
    datasets = link_datasets(data / "coco_mini_dev", out / "coco")
    with embedded_store(out / "store"):
        with console.timed_stage("upload", seconds):
            upload(data)
        with ray_session() as session:
            outcome = train(session, seconds)
            uncached = _train_uncached(session, seconds)
            trained = outcome.run_dir.model
            ViLSeg.from_pretrained(trained).save_pretrained(str(out / MODEL))
            with console.timed_stage("segment", seconds):
                bulk = _segment(session, trained, data)
        # Ray is gone by now: evaluation has the cores for itself.
        with console.timed_stage("evaluate", seconds):
            figures = _evaluate({"trained": trained, "untrained": outcome.run_dir.initial}, datasets)
        # The last report: by then everything runs.
        rates = {
            name: round(read_metrics(run.run_dir)[-1]["images_per_second"], 1)
            for name, run in (("cached", outcome), ("not cached", uncached))
        }
    seconds["total"] = time.perf_counter() - started
    return {
        "benchmark": "real_photos",
        "miou": figures["trained"]["miou"]["things"],
        **figures,
        "bulk": bulk,
        "pairs_per_second": rates,
        "epoch_cheaper_by_cache": round(rates["cached"] / rates["not cached"], 1),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "cpus": os.cpu_count(),
        "store": str(out / "store"),
    }


def link_datasets(coco: Path, target: Path) -> dict[str, str]:
    """Every task in the ``folder`` layout: masks, classes, and the common images that belong to the masks."""
    folders = {task: target / task for task in TASKS}
    for task, folder in folders.items():
        (folder / "images").mkdir(parents=True)
        (folder / "classes.txt").symlink_to((coco / task / "classes.txt").resolve())
        (folder / "masks").symlink_to((coco / task / "masks").resolve())
        for mask in (coco / task / "masks").glob("*.png"):
            image = coco / "images" / f"{mask.stem}.jpg"
            (folder / "images" / image.name).symlink_to(image.resolve())
    return {task: str(folder) for task, folder in folders.items()}


def vocabularies() -> dict[str, Vocabulary]:
    """The built-in names of COCO's classes by task, with their synonyms, in the order of the masks."""
    things, panoptic = Vocabulary.built_in("coco"), Vocabulary.built_in("coco-panoptic")
    behind = Vocabulary((BACKGROUND, *things.classes), ((), *things.synonyms))
    return dict(zip(TASKS, (things, behind, panoptic), strict=True))


def upload(data: Path) -> None:
    """Put the training pairs and the archive to segment on the store."""
    for shard in sorted((data / "flickr8k_224" / "shards").glob("train-*.tar")):
        storage.write_bytes(storage.join(_ROOT, "pairs", shard.name), shard.read_bytes())
    storage.upload_folder(data / "flickr8k_full" / "images", storage.join(_ROOT, "photos"))


def train(session: Session, seconds: dict[str, float]) -> TrainingResult:
    """Train on the pairs that `upload` put on the store, with cached features."""
    from jobs.train import feature_cache

    config = _config("flickr8k", f"data.feature_cache={_ROOT}/features")
    with console.timed_stage("cache", seconds):  # training would do it by itself; apart, its time is seen
        feature_cache.main(config, session, progress=train_job.log_cache_progress)
    with console.timed_stage("train", seconds), console.TrainingProgress(config.trainer.steps) as shown:
        return train_job.main(config, session, progress=shown)


def _train_uncached(session: Session, seconds: dict[str, float]) -> TrainingResult:
    """A few steps without the cache, to see what it saves."""
    steps = ("trainer.steps=16", "trainer.checkpoint_every=16", "trainer.log_every=8")
    config = _config("uncached", "trainer.batch_size=128", *steps)
    with console.timed_stage("train without cache", seconds):
        return train_job.main(config, session)


def _config(name: str, *overrides: str) -> RunConfig:
    places = [f"data.source={_ROOT}/pairs", f"trainer.storage={_ROOT}/runs"]
    encoder = f"model.text_encoder.checkpoint={minilm_folder()}"
    return RunConfig.load(str(CONFIG), [*places, encoder, f"name={name}", *overrides])


def _segment(session: Session, model: str, data: Path) -> dict[str, Any]:
    from jobs.segment import segment_job
    from jobs.segment.plan import plan

    classes = Vocabulary.parse(str(data / "coco_mini_dev" / "things_background" / "classes.txt"))
    done = segment_job.main(plan([f"{_ROOT}/photos"], model, classes, f"{_ROOT}/segmented"), session)
    return {**done.to_dict(), "uri": done.uri}


def _evaluate(models: dict[str, str], datasets: dict[str, str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by model, kind and task, as `vilseg evaluate` has them."""
    from jobs import evaluate

    counted: dict[tuple[str, str], ConfusionMatrix] = {}
    classes = vocabularies()
    for task, folder in datasets.items():
        for name, uri in models.items():
            found = evaluate.main(uri, f"folder:{folder}", classes=classes[task])
            counted[name, task] = found.confusion
            console.log(f"{name}, {task}, {found.images} images: mIoU {found.miou:.4f}")
        counted["largest_class", task] = _largest_class(counted["trained", task])
    return {
        name: {
            "miou": {task: round(counted[name, task].miou, 4) for task in TASKS},
            "pixel_accuracy": {task: round(counted[name, task].pixel_accuracy, 4) for task in TASKS},
        }
        for name in (*models, "largest_class")
    }


def _largest_class(matrix: ConfusionMatrix) -> ConfusionMatrix:
    """The counts of a prediction that names every pixel after the class with most pixels in the truth."""
    truth = matrix.counts.sum(axis=1)
    constant = ConfusionMatrix(matrix.classes)
    constant.counts[:, int(truth.argmax())] = truth
    return constant
