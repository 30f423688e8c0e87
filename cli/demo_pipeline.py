"""Pipeline of ``vilseg demo``: synthetic captioned scenes on the embedded S3 store, training, bulk segmentation of unseen images,
evaluation, and an HTML report. Only the evaluation reads masks.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from cli import console
from cluster.object_store import ObjectStore
from cluster.ray_session import Session, ray_session
from jobs.ingest import synthetic_scenes
from jobs.segment import segment_job
from jobs.segment.plan import plan
from jobs.train import train_job
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.synthetic import scenes
from vilseg.errors import StorageError, UserError
from vilseg.evaluation.datasets import FirstImages, FolderDataset
from vilseg.evaluation.evaluate import Evaluation, evaluate
from vilseg.evaluation.report import RunReport, render_report
from vilseg.model import ViLSeg
from vilseg.segmentation.segmenter import Segmenter
from vilseg.text.vocabulary import Vocabulary
from vilseg.training import run_results
from vilseg.training.metrics_log import read_metrics
from vilseg.training.run_dir import RunDirectory

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
_ROOT = "s3://vilseg/demo"
_EXAMPLES = 16
_PAIRS, _UNSEEN, _CURVE = 24_000, 400, 200
"""Numbers of training pairs, of unseen images for the evaluation, and of those used for the curve of mIoU over the steps."""
_QUICK = ("trainer.steps=24", "trainer.checkpoint_every=12", "trainer.log_every=4", "loss.nouns.min_count=3")
_QUICK_PAIRS, _QUICK_UNSEEN = 400, 24
"""Numbers of training pairs and of unseen images with ``--quick``."""


def main(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Run the demo and write ``report.html`` and ``summary.json`` to ``out``.

    Args:
        out: folder for the results and the store; created if it does not exist. An earlier demo there is replaced.
        quick: use few pairs and steps, which shows that every stage runs but not that the model learns.

    Returns:
        The summary: ``miou``, ``miou_untrained``, ``seconds`` by stage, ``pairs_uri``, ``model_uri``, ``results_uri``.

    Raises:
        StorageError: ``out`` is not a folder, or holds files that no demo wrote.
    """
    seconds: dict[str, float] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{out} cannot be the demo's folder ({error.strerror}); give another one by --out"
        ) from error
    if any(out.iterdir()) and not (out / "store").is_dir():
        raise StorageError(f"{out} holds other things; give the demo a folder of its own by --out")
    with console.timed_stage("store", seconds):
        store = ObjectStore.start(out / "store")
    try:
        variables = store.environment()
        with _environment(variables), ray_session(variables=variables) as session:
            _require_one_machine()
            summary = _run(session, out, seconds, quick=quick)
    finally:
        store.stop()
    console.log(f"the report is {out / 'report.html'}; `vilseg store up --dir {out / 'store'}` brings the store back")
    return summary


def _require_one_machine() -> None:
    """Raise UserError on a cluster of several machines, since the store of the demo is reachable only from this machine."""
    names = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if len(names) > 1:
        raise UserError(
            f"the demo keeps its data on one machine, and this cluster has {len(names)}; "
            "run 'vilseg demo' without a cluster, or ingest, train and segment with s3:// URIs"
        )


def _run(session: Session, out: Path, seconds: dict[str, float], *, quick: bool) -> dict[str, Any]:
    storage.delete(_ROOT)
    pairs, unseen, results = (storage.join(_ROOT, name) for name in ("pairs", "unseen", "segmented"))
    workers = min(2, session.gpus or session.cpus)
    overrides = [f"data.source={pairs}", f"trainer.storage={_ROOT}/runs", f"trainer.workers={workers}"]
    overrides += _QUICK if quick else ()
    config = RunConfig.load(str(CONFIG), [*overrides, "name=scenes"])
    with console.timed_stage("scenes", seconds):
        count, held_out = (_QUICK_PAIRS, _QUICK_UNSEEN) if quick else (_PAIRS, _UNSEEN)
        synthetic_scenes.main(
            pairs, unseen, pairs=count, unseen=held_out, size=config.data.canvas, seed=config.trainer.seed
        )
    with console.timed_stage("train", seconds), console.TrainingProgress(config.trainer.steps) as shown:
        outcome = train_job.main(config, session, progress=shown)
        if outcome.stopped:
            raise KeyboardInterrupt
    folder = outcome.run_dir
    names = Vocabulary.of(scene.name for scene in scenes.CLASSES)
    with console.timed_stage("segment", seconds), console.SegmentationProgress() as progress:
        job = plan([storage.join(unseen, "images")], folder.model, names, results)
        segment_job.main(job, session, progress=progress)
    with console.timed_stage("evaluate", seconds):
        dataset = FolderDataset(unseen)
        trained = _measure(ViLSeg.from_pretrained(folder.model), dataset, keep=_EXAMPLES)
        untrained = _measure(ViLSeg.from_pretrained(folder.initial), dataset)
        curve = _curve(folder, dataset)
    summary = {
        "miou": trained.miou,
        "miou_untrained": untrained.miou,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "pairs_uri": pairs,
        "model_uri": folder.model,
        "results_uri": results,
        "miou_curve": curve,
    }
    report = RunReport(
        title="vilseg on synthetic scenes",
        summary=(
            f"Trained from {count:,} captioned images without a mask, measured on {len(dataset)} unseen scenes "
            f"with {len(names.classes)} classes, background stuff and objects all counted."
        ),
        trained=trained,
        untrained=untrained,
        seconds=seconds,
        metrics=read_metrics(folder),
        miou_curve=curve,
        commands=_commands(out, overrides, folder, results, unseen, quick=quick),
        configuration=config.to_yaml(),
        facts={"pairs": pairs, "checkpoints": folder.checkpoints, "model": folder.model, "masks": results},
    )
    storage.write_text(str(out / "report.html"), render_report(report))
    storage.write_text(str(out / "summary.json"), json.dumps(summary, indent=2))
    return summary


def _measure(model: ViLSeg, dataset: FolderDataset, *, keep: int = 0) -> Evaluation:
    return evaluate(Segmenter(model, dataset.classes), dataset, keep=keep, batch_size=16)


def _curve(folder: RunDirectory, dataset: FolderDataset) -> list[tuple[int, float]]:
    """Return step and mIoU of the initial model and of every checkpoint, on the first `_CURVE` unseen scenes."""
    some = FirstImages(dataset, _CURVE)
    steps = folder.checkpoint_steps()
    points = [
        (0, ViLSeg.from_pretrained(folder.initial)),
        *((step, run_results.load_model_at_step(folder, step)) for step in steps),
    ]
    return [(step, evaluate(Segmenter(model, dataset.classes), some, batch_size=16).miou) for step, model in points]


def _commands(
    out: Path, overrides: list[str], folder: RunDirectory, results: str, unseen: str, *, quick: bool
) -> list[str]:
    """Return the command line of the demo, then the command lines that run its stages one by one, for the report."""
    names = ",".join(scene.name for scene in scenes.CLASSES)
    demo = f"vilseg demo --out {shlex.quote(str(out))}"
    settings = shlex.join(overrides)
    return [
        f"{demo} --quick" if quick else demo,
        f'eval "$(vilseg store up --dir {shlex.quote(str(out / "store"))})"',
        f"vilseg train --config configs/demo.yaml --name scenes {settings}",
        f'vilseg segment {unseen}/images --model {folder.model} --classes "{names}" --out {results}',
        f"vilseg evaluate --model {folder.model} --dataset folder:{unseen}",
    ]


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Within the ``with`` block, replace the user's ``AWS_*`` environment variables, which may conflict, by ``variables``."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
