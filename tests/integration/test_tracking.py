"""A run is told to a real MLflow, with the database that it makes for itself."""

from pathlib import Path

import pytest

from vilseg.config import RunConfig
from vilseg.training.metrics_log import MetricsFile
from vilseg.training.run_dir import RunDirectory


def test_mlflow_is_told_and_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'vilseg[tracking]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "run").mkdir()
    folder = RunDirectory(str(tmp_path / "run"))
    config = RunConfig.load(None, ["name=shop", "trainer.tracking=mlflow", "trainer.mlflow_experiment=tests"])
    for start, steps in ((0, (1, 2)), (2, (3,))):
        file = MetricsFile(folder, config, start)
        for step in steps:
            file.add({"step": step, "loss": 1 / step})
        file.sync()
    file.end()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["trainer.batch_size"] == "256"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
