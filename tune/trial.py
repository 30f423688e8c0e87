"""Trial: the training of `vilseg train` at a point of the search space, with evaluations that are reported to Ray Tune.

With one worker a trial trains in its own process, because starting Ray Train would take longer than many trials. The pairs, their
order, the steps and the training loop are the same as in `vilseg train`. With several workers the trial runs `jobs.train`.
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
from vilseg.training import run_results, run_setup
from vilseg.training.checkpoints import CheckpointWriter, read_checkpoint, read_state
from vilseg.training.metrics_log import MetricsFile
from vilseg.training.run_dir import PreparedRun, RunDirectory

Report = Callable[..., None]
"""Type of functions that report an evaluation: a dict of metrics, and further keyword arguments of `ray.tune.report`."""
_SHUTDOWN_TIMEOUT_S = 120.0
"""Seconds to wait until the workers have written a checkpoint and ended."""
_STATE_POINTER = "state.json"
"""Name of the only file in a Tune checkpoint; it holds the URI of the state in the run directory."""


@dataclass(frozen=True)
class TrialResources:
    """Resources of every trial of a sweep."""

    concurrent: int
    """Number of trials that run at the same time."""
    cpus: float
    gpus: float
    """CPUs and GPUs of each trial, including its workers and readers."""
    on_ray_workers: bool
    """Ray Train workers train the trial, and they hold the CPUs and GPUs instead of the trial's process."""


@dataclass(frozen=True)
class TrialRunner:
    """Runner of the trials of a sweep; it holds the settings that all trials share, and is pickled and sent to each."""

    config: RunConfig
    space: SearchSpace
    runs_uri: str
    """URI of the folder of the trials' run directories."""
    records_uri: str
    """URI of the folder of the trial records."""
    resources: TrialResources
    feature_cache: str | None = None
    """URI of the cached features that all trials train on."""

    def trial_config(self, number: int, point: Point) -> RunConfig:
        """Return the configuration of trial ``number`` at ``point``."""
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
            number: number of the trial.
            point: values of the trial by configuration key.
            report: function called with the metrics of every evaluation.
            should_stop: function called a few times per second if Ray Train workers train; once it returns True, the trial stops.
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
    """Return the function that Tune runs for each trial with one worker, in a Tune process."""

    def vilseg(config: dict[str, Any]) -> None:
        runner.train(int(tune.get_context().get_trial_name() or 0), config["trial"]["values"], tune.report)

    return vilseg


class RayTrainTrainable(tune.Trainable):
    """Tune trainable of a trial that Ray Train workers train.

    The workers have to end before the trial does, otherwise they would keep their resources of the cluster.
    """

    runner: TrialRunner
    """Runner of the sweep, a class attribute set by `ray_train_trainable`."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the training in a thread."""
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
        """Wait for the next evaluation and return its metrics; raise the error of the training if it failed."""
        evaluation = self._evaluations.get()
        if isinstance(evaluation, BaseException):
            raise evaluation
        return {**evaluation, DONE: evaluation["step"] >= self.runner.config.trainer.steps}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write nothing, because the run writes its own checkpoints."""

    def cleanup(self) -> None:
        """Stop the training and wait until it has ended; its last checkpoint is kept."""
        self._ended.set()
        self._thread.join(_SHUTDOWN_TIMEOUT_S)


def ray_train_trainable(runner: TrialRunner) -> type[RayTrainTrainable]:
    """Return the subclass of `RayTrainTrainable` for the trials of one sweep."""
    return type("vilseg", (RayTrainTrainable,), {"runner": runner})


def _train_in_process(config: RunConfig, runner: TrialRunner, report_metrics: Report) -> None:
    """Train with one worker in this process, without Ray Train."""
    run_dir = RunDirectory(storage.join(config.trainer.storage, str(config.name)))
    exploited = tune.get_checkpoint()  # with PBT, the checkpoint of another trial from whose weights this one continues
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
        writer.wait()  # complete before the report, after which Tune may stop the trial or give its checkpoint to another
        with tempfile.TemporaryDirectory() as local:
            (Path(local) / _STATE_POINTER).write_text(json.dumps({"uri": run_dir.state(trainer.step)}))
            if trainer.step == config.trainer.steps:
                run_results.save_trained_model(trainer.objective.model, config, run_dir, last)
            checkpoint = tune.Checkpoint.from_directory(local) if runner.space.scheduler == "pbt" else None
            report_metrics(last, trainer.objective.model, checkpoint=checkpoint)

    with (
        run_results.record_nonfinite(run_dir),
        CheckpointWriter(run_dir, config.trainer.keep_checkpoints, config.trainer.best_by) as writer,
    ):
        trainer.train(_batches(config, prepared, trainer.step), on_report=on_report, on_checkpoint=on_checkpoint)
    if not last:  # an earlier process was killed after the last step, before the report
        report_metrics({"step": trainer.step}, trainer.objective.model)


def _prepare(config: RunConfig, runner: TrialRunner, run_dir: RunDirectory, *, exploits: bool) -> PreparedRun:
    """Prepare the run directory of a trial.

    Args:
        config: configuration of the trial.
        runner: runner of the sweep.
        run_dir: run directory, which is new or left by a killed process.
        exploits: the trial continues with the weights of another trial and new values (PBT).
    """
    if exploits:
        prepared = PreparedRun.from_json(storage.read_text(run_dir.prepared))
        storage.write_text(run_dir.config, config.to_yaml())
        return prepared
    if storage.exists(run_dir.config):
        return run_setup.resume(config, run_dir)
    return run_setup.prepare(config, run_dir, cache=runner.feature_cache)


def _batches(config: RunConfig, prepared: PreparedRun, first_step: int) -> Iterator[WorkerBatch]:
    """Return an iterator over the batches from ``first_step`` on, which raises DataError if too many pairs are bad."""
    count = BadPairCounter(config.data.max_bad_share)

    def report(read: int, bad: list[BadPair]) -> None:
        verdict = count.add(read, [pair for pair in bad if not pair.filtered])
        if verdict:
            raise DataError(verdict)

    return read_batches_locally(config, prepared, first_step, report=report)


def _train_on_ray_workers(
    config: RunConfig, resources: TrialResources, report_metrics: Report, should_stop: Callable[[], bool]
) -> None:
    """Train with Ray Train workers, and evaluate each checkpoint when it is complete."""
    run_dir = RunDirectory(storage.join(config.trainer.storage, str(config.name)))
    due: list[dict[str, float]] = []

    def progress(update: ProgressUpdate) -> None:
        due.extend(metrics for metrics in update.metrics if metrics["step"] % config.trainer.checkpoint_every == 0)
        # A checkpoint is complete some time after its report, and newer ones may replace it during a slow evaluation. The model
        # of the last step is evaluated after the workers have ended.
        while due and due[0]["step"] < config.trainer.steps:
            kept = run_dir.checkpoint_steps()
            if due[0]["step"] > max(kept, default=0):
                return
            metrics = due.pop(0)
            if int(metrics["step"]) in kept:
                report_metrics(metrics, run_results.load_model_at_step(run_dir, int(metrics["step"])))

    session = Session(int(resources.cpus), int(resources.gpus))
    resume = storage.exists(run_dir.config)
    result = train_job.main(config, session, resume=resume, progress=progress, should_stop=should_stop)
    if not result.stopped:
        report_metrics(
            result.metrics or {"step": config.trainer.steps},
            run_results.load_model_at_step(run_dir, config.trainer.steps),
        )


def _evaluate(config: RunConfig, space: SearchSpace, model: ViLSeg) -> dict[str, float]:
    """Return mIoU if there is a dataset with masks, and the proxy metrics if there are held-out pairs."""
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
    """Return the first ``count`` images of a dataset, cached because one process runs several trials."""
    return FirstImages(open_dataset(dataset), count)


@functools.lru_cache(maxsize=2)
def _held_out(source: str, side: int, count: int, columns: str) -> HeldOut:
    return HeldOut.load(source, side=side, limit=count, columns=ColumnsConfig.model_validate_json(columns))
