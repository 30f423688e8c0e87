"""Reports of a run: ``metrics.jsonl``, TensorBoard events, and MLflow if configured."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vilseg import storage
from vilseg.config import RunConfig
from vilseg.config.base import flatten
from vilseg.errors import ConfigError, UserError
from vilseg.training.run_dir import RunDirectory

_MLFLOW_RUN = "mlflow_run.txt"
"""File in the run directory with the id of the MLflow run, which a resumed run continues."""
_MLFLOW_BATCH = 1000
"""Maximum number of metrics that an MLflow server accepts in one request."""


class MetricsFile:
    """Writer of ``metrics.jsonl`` and TensorBoard events: collected locally, copied to the run directory by :meth:`sync`.

    Args:
        run_dir: directory of the run.
        config: configuration of the run; with ``trainer.tracking=mlflow`` every report is sent to MLflow too.
        from_step: step that training continues from; reports of later steps, left by an interrupted run, are dropped.

    Raises:
        ConfigError: ``trainer.tracking`` is mlflow, but it is not installed or its server does not answer.
    """

    def __init__(self, run_dir: RunDirectory, config: RunConfig, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run_dir = run_dir
        self._local = tempfile.TemporaryDirectory(prefix="vilseg-events-")
        self._events = SummaryWriter(self._local.name, purge_step=from_step)
        self._mlflow = _Mlflow(run_dir, config) if config.trainer.tracking == "mlflow" else None
        self._lines: list[str] = []
        if from_step:
            lines = (_text(run_dir.metrics) or "").splitlines()
            self._lines = [line for line in lines if json.loads(line)["step"] <= from_step]

    def add(self, metrics: dict[str, float]) -> None:
        """Add one report: metrics by name, ``step`` among them."""
        step = int(metrics["step"])
        self._lines.append(json.dumps(metrics))
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        if self._mlflow is not None:
            self._mlflow.log(metrics, step)

    def add_image(self, name: str, image_HW3: np.ndarray, step: int) -> None:
        """Add an image, uint8 RGB (H, W, 3), to the TensorBoard events."""
        self._events.add_image(name, image_HW3, step, dataformats="HWC")

    def sync(self) -> None:
        """Copy ``metrics.jsonl`` and the TensorBoard files to the run directory.

        Requests are repeated while the object store does not answer.
        """
        self._events.flush()
        text = "".join(f"{line}\n" for line in list(self._lines))
        storage.write_text(self._run_dir.metrics, text)
        storage.upload_folder(Path(self._local.name), self._run_dir.tensorboard)

    def end(self) -> None:
        """Mark the MLflow run, if there is one, as finished."""
        if self._mlflow is not None:
            self._mlflow.end()


def read_metrics(run_dir: RunDirectory) -> list[dict[str, float]]:
    """Read the reports of a run, oldest first; requests are repeated while the object store does not answer.

    Raises:
        UserError: the run has no reports yet.
    """
    text = _text(run_dir.metrics)
    if text is None:
        raise UserError(f"the run {run_dir.uri} has no metrics yet")
    return [json.loads(line) for line in text.splitlines()]


def _text(uri: str) -> str | None:
    """Read a text file; None if there is none. Restarted workers call it, so requests are repeated until the store answers."""
    with storage.retrying():
        return storage.read_text(uri) if storage.exists(uri) else None


class _Mlflow:
    """A run on the MLflow server at ``MLFLOW_TRACKING_URI``."""

    def __init__(self, run_dir: RunDirectory, config: RunConfig) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise ConfigError(
                "trainer.tracking is mlflow, which is not installed here; pip install 'vilseg[tracking]'"
            ) from error
        self._client = mlflow.MlflowClient()
        self._unsent: list[Any] = []
        self._warned = False
        known = storage.join(run_dir.uri, _MLFLOW_RUN)
        begun = _text(known)
        try:
            if begun is not None:
                self._run = begun.strip()
                self._tell(lambda: self._client.set_terminated(self._run, "RUNNING"))
                return
            name = config.trainer.mlflow_experiment
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            made = self._client.create_run(number, run_name=config.name, tags={"vilseg.folder": run_dir.uri})
            self._run = made.info.run_id
            for key, value in flatten(config.model_dump()).items():
                self._client.log_param(self._run, key, str(value)[:500])
        except mlflow.MlflowException as error:
            raise ConfigError(
                f"MLflow at {mlflow.get_tracking_uri()} cannot be told of the run: {str(error).splitlines()[0]}; "
                "set MLFLOW_TRACKING_URI, or trainer.tracking=none"
            ) from error
        storage.write_text(known, self._run)

    def log(self, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._unsent += [Metric(name, value, now, step) for name, value in metrics.items()]
        self._send()

    def end(self) -> None:
        self._send()
        self._tell(lambda: self._client.set_terminated(self._run))

    def _send(self) -> None:
        while self._unsent:
            some = self._unsent[:_MLFLOW_BATCH]
            if not self._tell(partial(self._client.log_batch, self._run, metrics=some)):
                return  # the next call tries again
            del self._unsent[: len(some)]

    def _tell(self, action: Callable[[], object]) -> bool:
        """Call ``action``, a request to MLflow, and return True; return False if it fails, as training continues without it.

        Only the first failure warns.
        """
        from mlflow.exceptions import MlflowException

        try:
            action()
        except MlflowException as error:
            if not self._warned:
                self._warned = True
                said = str(error).splitlines()[0]
                warnings.warn(f"MLflow cannot be told of the run now, training goes on: {said}", stacklevel=2)
            return False
        return True
