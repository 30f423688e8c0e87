"""Checkpoints: written in the background, the newest and the best are kept, an incomplete one is never read."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from vilseg import storage
from vilseg.errors import ConfigError, StorageError
from vilseg.training.checkpoints import (
    CheckpointWriter,
    best_step,
    read_checkpoint,
    require_metric,
    write_checkpoint,
)
from vilseg.training.run_dir import RunDirectory


def state(step: int) -> dict:
    return {"step": step, "objective": {"weight": torch.full((3, 2), float(step))}, "optimizer": {"lr": 0.1}}


@pytest.fixture
def folder(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "run"))


def test_what_was_written_is_read(folder: RunDirectory) -> None:
    with CheckpointWriter(folder, None, "loss") as writer:
        writer.write(state(7), {"loss": 1.5})
    found = read_checkpoint(folder, 7)
    assert found["step"] == 7
    assert torch.equal(found["objective"]["weight"], torch.full((3, 2), 7.0))
    assert folder.manifests()[7].metric_value == 1.5


def test_an_unknown_metric_raises() -> None:
    metrics = {"loss": 1.0, "held_out/retrieval": 0.5}
    require_metric("held_out/retrieval", metrics)
    with pytest.raises(ConfigError, match=r"^trainer.best_by=held_out/retreival is .*mean 'held_out/retrieval'\?$"):
        require_metric("held_out/retreival", metrics)
    with pytest.raises(ConfigError, match=r"there are held_out/retrieval, loss$"):
        require_metric("accuracy", metrics)


def test_training_may_change_its_tensors_as_soon_as_writing_has_begun(
    folder: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    write = storage.write_bytes

    def slow(uri: str, data: bytes) -> None:
        assert may_write.wait(30)
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", slow)
    tensors = state(1)
    with CheckpointWriter(folder, None, "loss") as writer:
        writer.write(tensors, {})
        assert folder.last_step == 0, "it returned before anything was written"
        tensors["objective"]["weight"].zero_()
        may_write.set()
    assert torch.equal(read_checkpoint(folder, 1)["objective"]["weight"], torch.ones(3, 2))


def test_the_newest_and_the_best_are_kept(folder: RunDirectory) -> None:
    with CheckpointWriter(folder, 2, "loss") as writer:
        for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.2], 1):
            writer.write(state(step), {"loss": loss})
    assert folder.checkpoint_steps() == [2, 4, 5]
    assert best_step(folder.manifests(), lower_is_better=True) == 2
    names = {path.name for path in (Path(folder.checkpoints)).iterdir()}
    assert names == {"step-00000002", "step-00000004", "step-00000005"}


def test_the_highest_value_of_other_metrics_is_the_best(folder: RunDirectory) -> None:
    with CheckpointWriter(folder, 1, "held_out/nouns") as writer:
        for step, score in enumerate([0.1, 0.9, float("nan"), 0.5], 1):
            writer.write(state(step), {"held_out/nouns": score, "loss": -step})
    assert folder.checkpoint_steps() == [2, 4]


def test_without_a_metric_only_the_newest_are_kept(folder: RunDirectory) -> None:
    with CheckpointWriter(folder, 1, "no/such") as writer:
        for step in (1, 2, 3):
            writer.write(state(step), {"loss": 0.0})
    assert folder.checkpoint_steps() == [3]


@pytest.mark.parametrize("damage", ["cut", "no manifest", "longer"])
def test_a_half_written_one_is_not_counted(folder: RunDirectory, damage: str) -> None:
    for step in (10, 20):
        write_checkpoint(folder, state(step))
    path = Path(folder.state(20))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        Path(folder.manifest(20)).unlink()
    assert folder.last_step == 10


def test_the_manifest_comes_last(folder: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = storage.write_bytes

    def note(uri: str, data: bytes) -> None:
        written.append(uri)
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", note)
    monkeypatch.setattr(storage.files, "write_bytes", note)  # of what is written as text, too
    with CheckpointWriter(folder, None, "loss") as writer:
        writer.write(state(3), {}, also=lambda: storage.write_text(folder.metrics, json.dumps({"step": 3})))
    assert written == [folder.metrics, folder.state(3), folder.manifest(3)]


def test_what_cannot_be_written_is_said_and_leaves_the_one_before(
    folder: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(uri: str, data: bytes) -> None:
        raise StorageError(f"cannot write {uri}: no space is left on the disk")

    with CheckpointWriter(folder, 1, "loss") as writer:
        writer.write(state(1), {"loss": 1.0})
        writer.wait()
        monkeypatch.setattr(storage, "write_bytes", full)
        writer.write(state(2), {"loss": 0.5})
        with pytest.raises(StorageError, match="no space is left"):
            writer.write(state(3), {"loss": 0.2})
    assert folder.checkpoint_steps() == [1]


def test_a_failure_is_seen_without_waiting_for_the_next(folder: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def gone(uri: str, data: bytes) -> None:
        begun.set()
        raise StorageError(f"cannot write {uri}: there is no bucket")

    monkeypatch.setattr(storage, "write_bytes", gone)
    with CheckpointWriter(folder, 1, "loss") as writer:
        writer.write(state(1), {})
        assert begun.wait(30)
        deadline = time.monotonic() + 30
        with pytest.raises(StorageError, match="no bucket"):
            _check_until(writer, deadline)


def _check_until(writer: CheckpointWriter, deadline: float) -> None:
    while time.monotonic() < deadline:
        writer.check()
        time.sleep(0.01)
