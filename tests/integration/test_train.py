"""Training for real: pairs on an S3 server, Ray Data, Ray Train, checkpoints back on S3."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from cluster.ray_session import Session
from jobs.ingest import synthetic_scenes
from jobs.train import train_job
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.shards import write_tar
from vilseg.errors import DataError, StorageError
from vilseg.model import ViLSeg
from vilseg.training import run_results
from vilseg.training.metrics_log import read_metrics
from vilseg.training.run_dir import RunDirectory

ROOT = "s3://vilseg/test-train"
SIZE = 32
BASE = (
    f"data.canvas={SIZE}",
    f"views.global_size={SIZE}",
    "views.local_size=16",
    "model.image_encoder.sizes={width: 32, depth: 1}",
    "model.text_encoder.sizes={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}",
    "model.text_encoder.max_tokens=24",
    "model.embedding_dim=32",
    "model.clusters=8",
    "loss.nouns.min_count=2",
    "loss.vision.prototypes=32",
    "loss.vision.hidden_dim=32",
    "optimizer.warmup_steps=2",
    "trainer.precision=float32",
    "trainer.batch_size=64",
    "trainer.log_every=1",
    "trainer.keep_checkpoints=null",
    f"trainer.storage={ROOT}/runs",
)


@pytest.fixture(scope="module")
def pairs(ray_cluster: Session) -> Iterator[str]:
    uri = f"{ROOT}/pairs"
    synthetic_scenes.main(uri, f"{ROOT}/unseen", pairs=700, unseen=4, size=SIZE, seed=3)
    yield uri
    storage.delete(ROOT)


def config(*overrides: str) -> RunConfig:
    return RunConfig.load(None, [*BASE, *overrides])


@pytest.fixture(scope="module")
def whole(ray_cluster: Session, pairs: str) -> train_job.TrainingResult:
    """A run of eight steps by two workers; to begin one takes far longer than its steps, so tests share it."""
    return train_job.main(eight_steps(pairs, "whole"), ray_cluster)


def eight_steps(pairs: str, name: str, *overrides: str) -> RunConfig:
    settings = (f"data.source={pairs}", "trainer.steps=8", "trainer.checkpoint_every=4", "trainer.workers=2")
    return config(*settings, f"name={name}", *overrides)


def test_two_workers_see_the_losses_of_one(
    ray_cluster: Session, pairs: str, whole: train_job.TrainingResult, tmp_path: Path
) -> None:
    here = f"trainer.storage={tmp_path}"  # a folder instead of S3, as on a laptop
    alone = train_job.main(eight_steps(pairs, "alone", "trainer.workers=1", here), ray_cluster)
    assert (tmp_path / "alone" / "model" / "model.safetensors").exists()
    names = {"loss", "loss/cross_modal", "loss/nouns", "loss/vision", "loss/mutual_information"}
    for one, two in zip(read_metrics(alone.run_dir)[:5], read_metrics(whole.run_dir)[:5], strict=True):
        assert names == {name for name in one if name.startswith("loss")}
        for name in names:
            assert one[name] == pytest.approx(two[name], abs=1e-4), (one["step"], name)


def test_resumed_run_goes_on_as_if_it_had_not_stopped(
    ray_cluster: Session, pairs: str, whole: train_job.TrainingResult
) -> None:
    settings = eight_steps(pairs, "broken")
    folder = RunDirectory(f"{ROOT}/runs/broken")
    # As if all had died while step 8 was written, before Ray took note of step 4.
    for entry in storage.list_files(whole.run_dir.uri):
        if not entry.relative.startswith("model/") and not entry.relative.endswith("snapshot.json"):
            storage.write_bytes(storage.join(folder.uri, entry.relative), storage.read_bytes(entry.uri))
    storage.write_bytes(folder.state(8), storage.read_bytes(folder.state(8))[:1000])
    with pytest.raises(StorageError, match="--resume"):
        train_job.main(settings, ray_cluster)
    train_job.main(settings, ray_cluster, resume=True)
    expected, found = read_metrics(whole.run_dir), read_metrics(folder)
    assert [line["step"] for line in found] == list(range(1, 9))
    for want, got in zip(expected, found, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-3)
    assert storage.exists(folder.model)


def test_self_training_goes_on_from_a_run(ray_cluster: Session, pairs: str, whole: train_job.TrainingResult) -> None:
    stage = ("stage=self-train", f"init={whole.run_dir.uri}", "loss.self_training.confidence=0", "trainer.steps=3")
    done = train_job.main(eight_steps(pairs, "self-trained", *stage), ray_cluster)
    begun, ended = ViLSeg.from_pretrained(done.run_dir.initial), ViLSeg.from_pretrained(whole.run_dir.model)
    for name, value in ended.state_dict().items():
        assert torch.equal(begun.state_dict()[name], value), name
    lines = read_metrics(done.run_dir)
    assert all(line["loss/self_training"] > 0 for line in lines)
    assert set(ViLSeg.from_pretrained(done.run_dir.model).state_dict()) == set(ended.state_dict())


def test_run_folder_holds_what_the_documentation_names(pairs: str, whole: train_job.TrainingResult) -> None:
    folder = whole.run_dir
    assert folder.checkpoint_steps() == [4, 8]
    assert RunConfig.load(folder.config) == eight_steps(pairs, "whole")
    lines = [json.loads(line) for line in storage.read_text(folder.metrics).splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"step", "epoch", "loss", "images_per_second", "data_wait", "learning_rate", "temperature"} <= set(lines[-1])
    names = {entry.relative for entry in storage.list_files(folder.model)}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert any("events" in entry.relative for entry in storage.list_files(storage.join(folder.uri, "tensorboard")))
    trained = ViLSeg.from_pretrained(folder.model)
    kept = run_results.load_model_at_step(folder, 8)
    images = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(trained.encode_image(images).patches, kept.encode_image(images).patches)


def test_bad_pairs_are_skipped_and_counted(ray_cluster: Session, pairs: str) -> None:
    uri = f"{ROOT}/some-bad"
    _write(uri, good=150, bad=3)
    seen: list[tuple[str, str]] = []
    settings = config(f"data.source={uri}", "name=some-bad", "trainer.steps=4")
    outcome = train_job.main(settings, ray_cluster, progress=lambda snapshot: seen.extend(snapshot.bad))
    assert outcome.metrics["bad_pairs"] >= 3
    assert {key for key, _ in seen} == {"bad0", "bad1", "bad2"}


def test_too_many_bad_pairs_stop_the_run_with_a_sentence(ray_cluster: Session, pairs: str) -> None:
    uri = f"{ROOT}/mostly-bad"
    _write(uri, good=40, bad=100)
    settings = config(f"data.source={uri}", "name=mostly-bad", "trainer.steps=4")
    with pytest.raises(DataError, match="max_bad_share"):
        train_job.main(settings, ray_cluster)


def test_no_readable_pair_is_said_before_training(ray_cluster: Session, pairs: str) -> None:
    uri = f"{ROOT}/no-text"
    members = ((f"k{i}", _png(i), "png", {"nothing": "here"}) for i in range(5))
    write_tar(f"{uri}/0.tar", members)
    with pytest.raises(DataError, match="no readable pair"):
        train_job.main(config(f"data.source={uri}", "name=no-text"), ray_cluster)


def _write(uri: str, *, good: int, bad: int) -> None:
    members = [(f"good{i}", _png(i), "png", {"caption": f"a {'red' if i % 2 else 'blue'} square"}) for i in range(good)]
    members += [(f"bad{i}", b"this is no image", "png", {"caption": "a lie"}) for i in range(bad)]
    write_tar(f"{uri}/0.tar", iter(members))


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (255, 0, number % 256) if number % 2 else (0, number % 256, 255)).save(buffer, "png")
    return buffer.getvalue()
