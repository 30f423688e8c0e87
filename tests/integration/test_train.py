"""Training for real: pairs on an S3 server, Ray Data, Ray Train, checkpoints back on S3."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from jobs import ingest_scenes, train
from jobs.session import Session
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.pairs import write_tar
from vilseg.errors import DataError, StorageError
from vilseg.model import ViLSeg
from vilseg.training import run

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
    ingest_scenes.main(uri, f"{ROOT}/unseen", pairs=700, unseen=4, size=SIZE, seed=3)
    yield uri
    storage.delete(ROOT)


def config(*overrides: str) -> RunConfig:
    return RunConfig.load(None, [*BASE, *overrides])


def test_two_workers_see_the_losses_of_one(ray_cluster: Session, pairs: str) -> None:
    losses = []
    for workers in (1, 2):
        settings = config(
            f"data.source={pairs}", f"name=workers{workers}", f"trainer.workers={workers}", "trainer.steps=5"
        )
        outcome = train.main(settings, ray_cluster)
        losses.append(run.read_metrics(outcome.folder))
    for one, two in zip(*losses, strict=True):
        names = [name for name in one if name.startswith("loss")]
        assert {"loss", "loss/cross_modal", "loss/nouns", "loss/vision", "loss/mutual_information"} == set(names)
        for name in names:
            assert one[name] == pytest.approx(two[name], abs=1e-4), (one["step"], name)


def test_resumed_run_goes_on_as_if_it_had_not_stopped(ray_cluster: Session, pairs: str) -> None:
    common = (f"data.source={pairs}", "trainer.steps=8", "trainer.checkpoint_every=4", "trainer.workers=2")
    whole = train.main(config(*common, "name=whole"), ray_cluster)
    first = train.main(config(*common, "name=broken"), ray_cluster)
    folder = first.folder
    # As if all had died while step 8 was written, before Ray took note of step 4.
    torn = folder.state(8)
    storage.write_bytes(torn, storage.read_bytes(torn)[:1000])
    storage.delete(storage.join(folder.checkpoints, "checkpoint_manager_snapshot.json"))
    storage.delete(folder.model)
    with pytest.raises(StorageError, match="--resume"):
        train.main(config(*common, "name=broken"), ray_cluster)
    train.main(config(*common, "name=broken"), ray_cluster, resume=True)
    expected, found = run.read_metrics(whole.folder), run.read_metrics(folder)
    assert [line["step"] for line in found] == list(range(1, 9))
    for want, got in zip(expected, found, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-3)


def test_run_folder_holds_what_the_documentation_names(ray_cluster: Session, pairs: str) -> None:
    settings = config(f"data.source={pairs}", "name=folder", "trainer.steps=3", "trainer.checkpoint_every=2")
    folder = train.main(settings, ray_cluster).folder
    assert folder.checkpoint_steps() == [2, 3]
    assert RunConfig.load(folder.config) == settings
    line = run.read_metrics(folder)[-1]
    assert {"step", "epoch", "loss", "images_per_second", "data_wait", "learning_rate", "temperature"} <= set(line)
    names = {entry.relative for entry in storage.list_files(folder.model)}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert any("events" in entry.relative for entry in storage.list_files(storage.join(folder.uri, "tensorboard")))
    trained = ViLSeg.from_pretrained(folder.model)
    kept = run.model_at(folder, 3)
    pictures = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(trained.encode_image(pictures).patches, kept.encode_image(pictures).patches)


def test_bad_pairs_are_skipped_and_counted(ray_cluster: Session, pairs: str) -> None:
    uri = f"{ROOT}/some-bad"
    _write(uri, good=150, bad=3)
    seen: list[tuple[str, str]] = []
    settings = config(f"data.source={uri}", "name=some-bad", "trainer.steps=4")
    outcome = train.main(settings, ray_cluster, progress=lambda snapshot: seen.extend(snapshot.bad))
    assert outcome.metrics["bad_pairs"] >= 3
    assert {key for key, _ in seen} == {"bad0", "bad1", "bad2"}


def test_too_many_bad_pairs_stop_the_run_with_a_sentence(ray_cluster: Session, pairs: str) -> None:
    uri = f"{ROOT}/mostly-bad"
    _write(uri, good=40, bad=100)
    settings = config(f"data.source={uri}", "name=mostly-bad", "trainer.steps=4")
    with pytest.raises(DataError, match="max_bad_share"):
        train.main(settings, ray_cluster)


def test_no_readable_pair_is_said_before_training(ray_cluster: Session, pairs: str) -> None:
    uri = f"{ROOT}/no-text"
    members = ((f"k{i}", _png(i), "png", {"nothing": "here"}) for i in range(5))
    write_tar(f"{uri}/0.tar", members)
    with pytest.raises(DataError, match="no readable pair"):
        train.main(config(f"data.source={uri}", "name=no-text"), ray_cluster)


def _write(uri: str, *, good: int, bad: int) -> None:
    members = [(f"good{i}", _png(i), "png", {"caption": f"a {'red' if i % 2 else 'blue'} square"}) for i in range(good)]
    members += [(f"bad{i}", b"this is no picture", "png", {"caption": "a lie"}) for i in range(bad)]
    write_tar(f"{uri}/0.tar", iter(members))


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (255, 0, number % 256) if number % 2 else (0, number % 256, 255)).save(buffer, "png")
    return buffer.getvalue()


def test_metrics_are_json_lines(ray_cluster: Session, pairs: str, tmp_path: Path) -> None:
    settings = config(f"data.source={pairs}", "name=local", "trainer.steps=2", f"trainer.storage={tmp_path}")
    train.main(settings, ray_cluster)
    lines = (tmp_path / "local" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
