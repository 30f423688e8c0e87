"""One trial: the training of `vilseg train` at a point of the space, evaluated on its way, reporting to Ray Tune.

With one worker a trial trains in its own process: starting Ray Train for it would take longer than many a trial. The pairs,
their order, the steps and the loop are the same. With more workers it is `jobs.train`, inside the trial.
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
"""Function of a dictionary of metrics, and of further keyword arguments of `ray.tune.report`."""
_SHUTDOWN_TIMEOUT_S = 120.0
"""Seconds that workers have to write a checkpoint and end."""
_STATE_POINTER = "state.json"
"""File of Tune's checkpoint that holds the URI of the trial's own checkpoint."""


@dataclass(frozen=True)
class TrialResources:
    """Resources of every trial of a sweep."""

    concurrent: int
    """Number of trials that run at a time."""
    cpus: float
    gpus: float
    """CPUs and GPUs of each trial, including its workers and readers."""
    on_ray_workers: bool
    """The trial is trained by workers of Ray Train, which hold the CPUs and GPUs in place of the trial's process."""


@dataclass(frozen=True)
class TrialRunner:
    """Trains the trials of a sweep; pickled and sent to each.

    Attributes hold what all trials share.
    """

    config: RunConfig
    space: SearchSpace
    runs_uri: str
    """Directory of the trials' run directories."""
    records_uri: str
    """Directory of their records."""
    resources: TrialResources
    feature_cache: str | None = None
    """URI of the cached features that all trials train on."""

    def trial_config(self, number: int, point: Point) -> RunConfig:
        """Return the configuration of the run of trial ``number``."""
        config = config_at_point(self.config, point)
        trainer = config.trainer.replace(
            storage=self.runs_uri,
            checkpoint_every=-(-config.trainer.steps // self.space.evaluations),
            keep_checkpoints=None if self.space.scheduler == "pbt" else 2,
        )
        return config.replace(name=trial_name(number), trainer=trainer)

    def train(self, number: int, point: Point, report: Report, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Train trial ``number``.

        Args:
            number: of the trial.
            point: its values.
            report: called with every evaluation.
            should_stop: called a few times a second where Ray Train has workers; True stops the trial.
        """
        started = time.time()

        def report_metrics(metrics: dict[str, float], model: ViLSeg, **more: Any) -> None:
            report({**metrics, **_evaluate(config, self.space, model), "seconds": time.time() - started}, **more)

        try:
            config = self.trial_config(number, point)
            if self.resources.on_ray_workers:
                _train_on_ray_workers(config, self.resources, report_metrics, should_stop)
            else:
                with storage.retrying():
                    _train_in_process(config, self, report_metrics)
        except Exception as error:
            sentence = str(find_user_error(error) or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            storage.write_text(error_uri(self.records_uri, number), f"{sentence}\n\n{traceback.format_exc()}")
            raise


def function_trainable(runner: TrialRunner) -> Callable[[dict[str, Any]], None]:
    """Return the function that Tune runs for each trial, in a process of its own."""

    def vilseg(config: dict[str, Any]) -> None:
        runner.train(int(tune.get_context().get_trial_name() or 0), config["trial"]["values"], tune.report)

    return vilseg


class RayTrainTrainable(tune.Trainable):
    """Class that Tune runs for each trial trained by workers of Ray Train.

    The workers have to end before the trial does: otherwise they would keep their resources of the cluster.
    """

    runner: TrialRunner
    """Set by the subclass that `ray_train_trainable` makes."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start to train, in a thread."""
        self._evaluations: queue.Queue[dict[str, float] | BaseException] = queue.Queue()
        self._ended = threading.Event()

        def run() -> None:
            try:
                self.runner.train(
                    int(self.trial_name), config["trial"]["values"], self._evaluations.put, self._ended.is_set
                )
            except BaseException as error:  # noqa: BLE001  (raised again by `step`)
                self._evaluations.put(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, float]:
        """Return the next evaluation."""
        evaluation = self._evaluations.get()
        if isinstance(evaluation, BaseException):
            raise evaluation
        return {**evaluation, DONE: evaluation["step"] >= self.runner.config.trainer.steps}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write nothing: the run has checkpoints of its own."""

    def cleanup(self) -> None:
        """Stop the training; its last checkpoint stays."""
        self._ended.set()
        self._thread.join(_SHUTDOWN_TIMEOUT_S)


def ray_train_trainable(runner: TrialRunner) -> type[RayTrainTrainable]:
    """Return the subclass of `RayTrainTrainable` for the trials of one sweep."""
    return type("vilseg", (RayTrainTrainable,), {"runner": runner})


def _train_in_process(config: RunConfig, runner: TrialRunner, report_metrics: Report) -> None:
    """Train with one worker, in this process."""
    run_dir = RunDirectory(storage.join(config.trainer.storage, str(config.name)))
    exploited = tune.get_checkpoint()  # of another trial, whose weights this one continues from: see PBT
    prepared = _prepare(config, runner, run_dir, exploits=exploited is not None)
    device = torch.device("cuda" if runner.resources.gpus else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(runner.resources.cpus)))
    trainer = run_setup.make_trainer(config, run_dir, prepared, device)
    if exploited:
        with exploited.as_directory() as local:
            state = json.loads((Path(local) / _STATE_POINTER).read_text())["uri"]
        trainer.load_state_dict(read_state(state))
    elif run_dir.last_step:
        trainer.load_state_dict(read_checkpoint(run_dir, run_dir.last_step))
    metrics_file = MetricsFile(run_dir, config, trainer.step)
    last: dict[str, float] = {}

    def on_report(metrics: dict[str, float]) -> None:
        last.update(metrics)
        metrics_file.add(metrics)

    def on_checkpoint() -> None:
        writer.write(trainer.state_dict(), last, also=metrics_file.sync)
        writer.wait()  # after its report the trial may be stopped, or its checkpoint copied by another
        with tempfile.TemporaryDirectory() as local:
            (Path(local) / _STATE_POINTER).write_text(json.dumps({"uri": run_dir.state(trainer.step)}))
            if trainer.step == config.trainer.steps:
                run_setup.save_trained_model(trainer.objective.model, config, run_dir, last)
            checkpoint = tune.Checkpoint.from_directory(local) if runner.space.scheduler == "pbt" else None
            report_metrics(last, trainer.objective.model, checkpoint=checkpoint)

    with (
        run_setup.record_nonfinite(run_dir),
        CheckpointWriter(run_dir, config.trainer.keep_checkpoints, config.trainer.best_by) as writer,
    ):
        trainer.train(_batches(config, prepared, trainer.step), on_report=on_report, on_checkpoint=on_checkpoint)
    if not last:  # it was killed after its last step, before the report
        report_metrics({"step": trainer.step}, trainer.objective.model)


def _prepare(config: RunConfig, runner: TrialRunner, run_dir: RunDirectory, *, exploits: bool) -> PreparedRun:
    """Prepare the run directory of a trial: new, of a killed trial, or with new values and the weights of another trial."""
    if exploits:
        prepared = PreparedRun.from_json(storage.read_text(run_dir.prepared))
        storage.write_text(run_dir.config, config.to_yaml())
        return prepared
    if storage.exists(run_dir.config):
        return run_setup.resume(config, run_dir)
    return run_setup.prepare(config, run_dir, cache=runner.feature_cache)


def _batches(config: RunConfig, prepared: PreparedRun, first_step: int) -> Iterator[WorkerBatch]:
    """Yield the batches from ``first_step`` on; raise DataError when too many pairs are bad."""
    count = BadPairCounter(config.data.max_bad_share)

    def report(read: int, bad: list[BadPair]) -> None:
        verdict = count.add(read, [pair for pair in bad if not pair.filtered])
        if verdict:
            raise DataError(verdict)

    return read_batches_locally(config, prepared, first_step, report=report)


def _train_on_ray_workers(
    config: RunConfig, resources: TrialResources, report_metrics: Report, should_stop: Callable[[], bool]
) -> None:
    """Train by workers of Ray Train; evaluate each checkpoint as it appears."""
    run_dir = RunDirectory(storage.join(config.trainer.storage, str(config.name)))
    due: list[dict[str, float]] = []

    def progress(update: ProgressUpdate) -> None:
        due.extend(metrics for metrics in update.metrics if metrics["step"] % config.trainer.checkpoint_every == 0)
        # A checkpoint is complete a moment after its report, and may be deleted again during a slow evaluation. The model of the
        # last step is evaluated once the workers have ended.
        while due and due[0]["step"] < config.trainer.steps:
            kept = run_dir.checkpoint_steps()
            if due[0]["step"] > max(kept, default=0):
                return
            metrics = due.pop(0)
            if int(metrics["step"]) in kept:
                report_metrics(metrics, run_setup.load_model_at_step(run_dir, int(metrics["step"])))

    session = Session(int(resources.cpus), int(resources.gpus))
    resume = storage.exists(run_dir.config)
    result = train_job.main(config, session, resume=resume, progress=progress, should_stop=should_stop)
    if not result.stopped:
        report_metrics(
            result.metrics or {"step": config.trainer.steps},
            run_setup.load_model_at_step(run_dir, config.trainer.steps),
        )


def _evaluate(config: RunConfig, space: SearchSpace, model: ViLSeg) -> dict[str, float]:
    """Return mIoU where there are masks, and the proxy metrics where there are held-out pairs."""
    metrics: dict[str, float] = {}
    training = model.training
    if space.dataset:
        dataset = _first_images(space.dataset, space.images)
        metrics["miou"] = evaluate(Segmenter(model, dataset.classes, device=model.device), dataset).miou
    if config.data.held_out:
        side = config.segmentation.input_size
        columns = config.data.columns.model_dump_json()
        metrics |= measure(model, _held_out(config.data.held_out, side, space.images, columns))
    model.train(training)
    if space.objective_name not in metrics:
        raise ConfigError(
            f"the objective {space.objective_name} cannot be told from the pairs at {config.data.held_out}: no noun phrase is in "
            "five of their captions and missing in others; hold out more pairs or choose another objective"
        )
    return metrics


@functools.lru_cache(maxsize=2)
def _first_images(dataset: str, count: int) -> FirstImages:
    """Return the first images of a dataset; read once by each process, which runs one trial after another."""
    return FirstImages(open_dataset(dataset), count)


@functools.lru_cache(maxsize=2)
def _held_out(source: str, side: int, count: int, columns: str) -> HeldOut:
    return HeldOut.load(source, side=side, limit=count, columns=ColumnsConfig.model_validate_json(columns))
