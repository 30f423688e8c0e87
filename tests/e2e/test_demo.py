"""`vilseg demo --quick`: every part of the main job, by the command."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.object_store import ObjectStore
from vilseg import storage

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def finished(vilseg: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, vilseg("demo", "--quick", "--out", str(out), "--json")


def test_demo_ends_well_and_prints_its_summary(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, process = finished
    assert process.returncode == 0, process.stderr[-3000:]
    printed = json.loads(process.stdout)
    assert printed == json.loads((out / "summary.json").read_text())
    assert 0 <= printed["miou_untrained"] <= 0.2
    assert set(printed["seconds"]) == {"store", "scenes", "train", "segment", "evaluate"}
    assert "images/s" in process.stderr


def test_report_is_one_file_with_everything(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    page = (finished[0] / "report.html").read_text()
    assert page.count("data:image") >= 3 * 12
    assert f"vilseg demo --out {finished[0]} --quick" in page
    assert "vilseg train --config configs/demo.yaml" in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_results_lie_on_the_store(
    finished: tuple[Path, subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    store = ObjectStore.start(out / "store")
    try:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        assert all(summary[name].startswith("s3://") for name in ("pairs_uri", "model_uri", "results_uri"))
        assert storage.list_files(summary["pairs_uri"], {".tar"})
        run = storage.parent(summary["model_uri"])
        names = {entry.relative.split("/")[0] for entry in storage.list_files(run)}
        assert {"config.yaml", "metrics.jsonl", "checkpoints", "model", "tensorboard"} <= names
        with storage.open_input(storage.join(summary["results_uri"], "results.parquet")) as file:
            rows = pq.read_table(file).to_pylist()
        masks = storage.list_files(storage.join(summary["results_uri"], "masks"), {".png"})
        assert len(rows) == len(masks) > 0
        assert {row["status"] for row in rows} == {"ok"}
    finally:
        store.stop(timeout=0)
