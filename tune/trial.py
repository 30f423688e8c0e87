"""One trial: the training of `vilseg train` at a point of the space, evaluated on its way, reporting to Ray Tune.

With one worker a trial trains in its own process: starting Ray Train for it would take longer than many a trial. The pairs,
their order, the steps and the loop are the same. With more workers it is `jobs.train` itself, inside the trial.
"""

from __future__ import annotations

import functools
import json
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.result import DONE

from cluster.ray_session import Session, find_user_error
from jobs.train import train_job
from jobs.train.monitor import BadPairCounter, ProgressUpdate
from jobs.train.ray_data import read_batches_locally
from tune.search_space import Point, SearchSpace, config_at_point
from tune.trial_records import error_uri, trial_name
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.config.data import ColumnsConfig
from vilseg.data.batch_reader import WorkerBatch
from vilseg.data.shards import BadPair
from vilseg.errors import ConfigError, DataError
from vilseg.evaluation.datasets import FirstImages, open_dataset
from vilseg.evaluation.evaluate import evaluate
from vilseg.evaluation.proxy_metrics import HeldOut, measure
from vilseg.model import ViLSeg
from vilseg.segmentation.segmenter import Segmenter
from vilseg.training import run_setup
from vilseg.training.checkpoints import CheckpointWriter, read_checkpoint, read_state
from vilseg.training.metrics_log import MetricsFile
from vilseg.training.run_dir import PreparedRun, RunDirectory

Report = Callable[..., None]
"""Takes figures, and what else there is to pass on."""
_SHUTDOWN_TIMEOUT_S = 120.0
"""Seconds that workers have to leave a checkpoint and end."""
_STATE_POINTER = "state.json"
"""In Tune's checkpoint: where the trial's own one lies."""


@dataclass(frozen=True)
class TrialResources:
    """What every trial has of the cluster."""

    concurrent: int
    """Trials at a time."""
    cpus: float
    gpus: float
    """Of each trial, with all that works for it."""
    nested: bool
    """Whether a trial has workers of Ray Train, which take the CPUs and GPUs in its place."""


@dataclass(frozen=True)
class Trial:
    """What all trials of a sweep share; sent to each."""

    config: RunConfig
    space: SearchSpace
    folder: str
    """Of all the trials' runs."""
    records: str
    """Of their records."""
    layout: TrialResources
    cache: str | None = None
    """Cached features that all train on."""

    def config_at(self, number: int, point: Point) -> RunConfig:
        """The configuration of a trial's run."""
        config = config_at_point(self.config, point)
        trainer = config.trainer.replace(
            storage=self.folder,
            checkpoint_every=-(-config.trainer.steps // self.space.evaluations),
            keep_checkpoints=None if self.space.scheduler == "pbt" else 2,
        )
        return config.replace(name=trial_name(number), trainer=trainer)

    def train(self, number: int, point: Point, report: Report, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Train trial ``number``; ``report`` is told of every evaluation, and ``should_stop`` asked with workers only."""
        started = time.time()

        def tell(metrics: dict[str, float], model: ViLSeg, **more: Any) -> None:
            report({**metrics, **_figures(config, self.space, model), "seconds": time.time() - started}, **more)

        try:
            config = self.config_at(number, point)
            if self.layout.nested:
                _train_on_ray_workers(config, self.layout, tell, should_stop)
            else:
                with storage.retrying():
                    _train_in_process(config, self, tell)
        except Exception as error:
            sentence = str(find_user_error(error) or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            storage.write_text(error_uri(self.records, number), f"{sentence}\n\n{traceback.format_exc()}")
            raise


def function_trainable(trial: Trial) -> Callable[[dict[str, Any]], None]:
    """What Tune runs for a trial in a process of its own."""

    def vilseg(config: dict[str, Any]) -> None:
        trial.train(int(tune.get_context().get_trial_name() or 0), config["trial"]["values"], tune.report)

    return vilseg


class RayTrainTrainable(tune.Trainable):
    """What Tune runs for a trial with workers of Ray Train.

    These have to be ended before the trial is: what they hold of the cluster would stay theirs otherwise.
    """

    trial: Trial
    """Of a subclass; see `ray_train_trainable`."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin to train."""
        self._news: queue.Queue[dict[str, float] | BaseException] = queue.Queue()
        self._ended = threading.Event()

        def train_all() -> None:
            try:
                self.trial.train(int(self.trial_name), config["trial"]["values"], self._news.put, self._ended.is_set)
            except BaseException as error:  # noqa: BLE001  (raised again where Tune sees it)
                self._news.put(error)

        self._thread = threading.Thread(target=train_all, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, float]:
        """The next evaluation."""
        news = self._news.get()
        if isinstance(news, BaseException):
            raise news
        return {**news, DONE: news["step"] >= self.trial.config.trainer.steps}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run keeps its own."""

    def cleanup(self) -> None:
        """End the training; its last checkpoint stays."""
        self._ended.set()
        self._thread.join(_SHUTDOWN_TIMEOUT_S)


def ray_train_trainable(trial: Trial) -> type[RayTrainTrainable]:
    """`RayTrainTrainable` of one sweep's trials."""
    return type("vilseg", (RayTrainTrainable,), {"trial": trial})


def _train_in_process(config: RunConfig, trial: Trial, tell: Report) -> None:
    folder = RunDirectory(storage.join(config.trainer.storage, str(config.name)))
    handed_over = tune.get_checkpoint()
    if handed_over:  # of another trial: its weights, with this one's values
        prepared = PreparedRun.from_json(storage.read_text(folder.prepared))
        storage.write_text(folder.config, config.to_yaml())
    elif storage.exists(folder.config):
        prepared = run_setup.resume(config, folder)
    else:
        prepared = run_setup.prepare(config, folder, cache=trial.cache)
    device = torch.device("cuda" if trial.layout.gpus else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(trial.layout.cpus)))
    trainer = run_setup.make_trainer(config, folder, prepared, device)
    if handed_over:
        with handed_over.as_directory() as local:
            state = json.loads((Path(local) / _STATE_POINTER).read_text())["uri"]
        trainer.load_state_dict(read_state(state))
    elif folder.last_step:
        trainer.load_state_dict(read_checkpoint(folder, folder.last_step))
    metrics_file = MetricsFile(folder, config, trainer.step)
    last: dict[str, float] = {}

    def on_report(metrics: dict[str, float]) -> None:
        last.update(metrics)
        metrics_file.add(metrics)

    def on_checkpoint() -> None:
        writer.write(trainer.state_dict(), last, also=metrics_file.sync)
        writer.wait()  # a trial that has told of a checkpoint may be ended, or its checkpoint handed over
        with tempfile.TemporaryDirectory() as local:
            (Path(local) / _STATE_POINTER).write_text(json.dumps({"uri": folder.state(trainer.step)}))
            if trainer.step == config.trainer.steps:
                run_setup.save_trained_model(trainer.objective.model, config, folder, last)
            checkpoint = tune.Checkpoint.from_directory(local) if trial.space.scheduler == "pbt" else None
            tell(last, trainer.objective.model, checkpoint=checkpoint)

    with (
        run_setup.record_nonfinite(folder),
        CheckpointWriter(folder, config.trainer.keep_checkpoints, config.trainer.best_by) as writer,
    ):
        trainer.train(_batches(config, prepared, trainer.step), on_report=on_report, on_checkpoint=on_checkpoint)
    if not last:  # it was killed after its last step, before it had told of it
        tell({"step": trainer.step}, trainer.objective.model)


def _batches(config: RunConfig, prepared: PreparedRun, done: int) -> Iterator[WorkerBatch]:
    count = BadPairCounter(config.data.max_bad_share)

    def report(read: int, bad: list[BadPair]) -> None:
        verdict = count.add(read, [pair for pair in bad if not pair.filtered])
        if verdict:
            raise DataError(verdict)

    return read_batches_locally(config, prepared, done, report=report)


def _train_on_ray_workers(
    config: RunConfig, layout: TrialResources, tell: Report, should_stop: Callable[[], bool]
) -> None:
    folder = RunDirectory(storage.join(config.trainer.storage, str(config.name)))
    due: list[dict[str, float]] = []

    def progress(snapshot: ProgressUpdate) -> None:
        due.extend(metrics for metrics in snapshot.metrics if metrics["step"] % config.trainer.checkpoint_every == 0)
        # A checkpoint follows its report by a moment; a slow evaluation finds it gone. The last one waits for the workers' end.
        while due and due[0]["step"] < config.trainer.steps:
            kept = folder.checkpoint_steps()
            if due[0]["step"] > max(kept, default=0):
                return
            metrics = due.pop(0)
            if int(metrics["step"]) in kept:
                tell(metrics, run_setup.load_model_at_step(folder, int(metrics["step"])))

    session = Session(int(layout.cpus), int(layout.gpus))
    resume = storage.exists(folder.config)
    done = train_job.main(config, session, resume=resume, progress=progress, should_stop=should_stop)
    if not done.stopped:
        tell(done.metrics or {"step": config.trainer.steps}, run_setup.load_model_at_step(folder, config.trainer.steps))


def _figures(config: RunConfig, space: SearchSpace, model: ViLSeg) -> dict[str, float]:
    """mIoU where there are masks, and what can be told without."""
    figures: dict[str, float] = {}
    training = model.training
    if space.dataset:
        dataset = _first_images(space.dataset, space.images)
        figures["miou"] = evaluate(Segmenter(model, dataset.classes, device=model.device), dataset).miou
    if config.data.held_out:
        side = config.segmentation.input_size
        columns = config.data.columns.model_dump_json()
        figures |= measure(model, _held_out(config.data.held_out, side, space.images, columns))
    model.train(training)
    if space.objective_name not in figures:
        raise ConfigError(
            f"the objective {space.objective_name} cannot be told from the pairs at {config.data.held_out}: no noun phrase is in "
            "five of their captions and missing in others; hold out more pairs or choose another objective"
        )
    return figures


@functools.lru_cache(maxsize=2)
def _first_images(dataset: str, count: int) -> FirstImages:
    """Read once by each process, which makes one trial after the other."""
    return FirstImages(open_dataset(dataset), count)


@functools.lru_cache(maxsize=2)
def _held_out(source: str, side: int, count: int, columns: str) -> HeldOut:
    return HeldOut.load(source, side=side, limit=count, columns=ColumnsConfig.model_validate_json(columns))
