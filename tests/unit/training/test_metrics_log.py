"""Reports of a run in metrics.jsonl, TensorBoard and MLflow, which a resumed run continues."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vilseg.config import RunConfig
from vilseg.errors import ConfigError, UserError
from vilseg.training.metrics_log import MetricsFile, read_metrics
from vilseg.training.run_dir import RunDirectory


def line(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, "temperature": 0.07}


@pytest.fixture
def folder(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(str(tmp_path / "run"))


def test_lines_and_events(folder: RunDirectory) -> None:
    file = MetricsFile(folder, RunConfig(), 0)
    for step in (1, 2):
        file.add(line(step))
    file.add_image("clusters", np.full((4, 6, 3), 200, np.uint8), 2)
    file.sync()
    assert read_metrics(folder) == [line(1), line(2)]
    events = EventAccumulator(folder.tensorboard).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([1, 0.5])
    (image,) = events.Images("clusters")
    assert (image.width, image.height) == (6, 4)


def test_a_resumed_run_drops_what_came_after_its_checkpoint(folder: RunDirectory) -> None:
    first = MetricsFile(folder, RunConfig(), 0)
    for step in (1, 2, 3):
        first.add(line(step))
    first.sync()
    second = MetricsFile(folder, RunConfig(), 2)
    second.add(line(3))
    second.add(line(4))
    second.sync()
    assert [found["step"] for found in read_metrics(folder)] == [1, 2, 3, 4]


def test_a_run_without_reports_says_so(folder: RunDirectory) -> None:
    with pytest.raises(UserError, match="no metrics yet"):
        read_metrics(folder)


def test_an_mlflow_server_that_does_not_answer_is_said(folder: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'vilseg[tracking]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = RunConfig.load(None, ["trainer.tracking=mlflow"])
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        MetricsFile(folder, config, 0)


def test_what_mlflow_could_not_be_told_is_told_later(folder: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'vilseg[tracking]'")
    away, sent = [True], []

    class Client:
        def set_terminated(self, run: str, status: str = "FINISHED") -> None:
            if away:
                raise mlflow.MlflowException("away")

        def log_batch(self, run: str, metrics: list[Any]) -> None:
            self.set_terminated(run)
            sent.extend((metric.key, metric.step) for metric in metrics)

    def tell_two() -> MetricsFile:
        file = MetricsFile(folder, RunConfig.load(None, ["trainer.tracking=mlflow"]), 0)
        file.add({"step": 1})
        file.add({"step": 2})
        return file

    monkeypatch.setattr(mlflow, "MlflowClient", Client)
    Path(folder.uri, "mlflow_run.txt").write_text("7")
    with pytest.warns(UserWarning, match="training goes on: away") as warned:
        file = tell_two()
    assert len(warned) == 1
    assert not sent
    away.clear()
    file.add({"step": 3})
    assert sent == [("step", 1), ("step", 2), ("step", 3)]
