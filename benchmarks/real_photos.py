"""Training on Flickr8k captions, mIoU on COCO masks, and bulk segmentation of an archive of photos.

All stages use the embedded object store and a local Ray cluster, and the jobs that the ``vilseg`` command calls. Two baselines
are evaluated with the trained model: the same model before its first step, and the constant prediction of the class that has
most pixels in the masks.
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
    """Run all stages.

    Args:
        out: folder for the model, the masks and the object store; those of an earlier run are replaced.

    Returns:
        ``miou`` (task things), for the trained and the untrained model and the largest class the mIoU and pixel accuracy of every
        task, ``seconds`` by stage, ``bulk`` (the summary of the bulk segmentation), ``pairs_per_second`` with and without cached
        features, and their ratio ``epoch_cheaper_by_cache``.

    Raises:
        DataError: the photos are not in the folder that ``VILSEG_SHARED_DATA`` names.
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
    """Link the COCO images and masks of every task in the ``folder`` layout of datasets, and return the folders by task.

    Each folder gets only the images that have a mask for the task.
    """
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
    """Return COCO's class names with synonyms by task, in the order of the values in the masks."""
    things, panoptic = Vocabulary.built_in("coco"), Vocabulary.built_in("coco-panoptic")
    behind = Vocabulary((BACKGROUND, *things.classes), ((), *things.synonyms))
    return dict(zip(TASKS, (things, behind, panoptic), strict=True))


def upload(data: Path) -> None:
    """Copy the training pairs and the archive to segment from the shared data to the object store."""
    for shard in sorted((data / "flickr8k_224" / "shards").glob("train-*.tar")):
        storage.write_bytes(storage.join(_ROOT, "pairs", shard.name), shard.read_bytes())
    storage.upload_folder(data / "flickr8k_full" / "images", storage.join(_ROOT, "photos"))


def train(session: Session, seconds: dict[str, float]) -> TrainingResult:
    """Train with cached features on the pairs that `upload` copied to the store, and return the result.

    Args:
        session: the cluster.
        seconds: gets the wall times of the stages ``cache`` and ``train``.
    """
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
