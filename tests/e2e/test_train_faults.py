"""Whatever dies on the way: a training goes on, or resumes, with the losses that it would have had."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.object_store import ObjectStore
from tests.e2e.processes import end, family, kill, title
from vilseg import storage
from vilseg.data.shards import write_tar
from vilseg.data.synthetic import scenes
from vilseg.training.metrics_log import read_metrics
from vilseg.training.run_dir import RunDirectory

ROOT = Path(__file__).parents[2]
SIZE = 32
STEPS, EVERY = 60, 10
STORAGE = "s3://vilseg/runs"
PROMPTLY_S = 150
MODEL = """
data: {canvas: 32}
views: {global_size: 32, local_size: 16}
model:
  image_encoder: {factory: "slow_encoder:SlowEncoder", factory_options: {width: 16, depth: 1}}
  text_encoder: {sizes: {hidden_size: 16, num_hidden_layers: 0, num_attention_heads: 1}, max_tokens: 16}
  embedding_dim: 16
loss: {vision: {weight: 0}, nouns: {min_count: 2}}
optimizer: {warmup_steps: 2}
"""
ENCODER = """
import os, time
from vilseg.model.image_encoder import LocalConvEncoder

class SlowEncoder(LocalConvEncoder):
    '''So that there is time to kill something.'''

    def forward(self, images):
        if self.training:
            time.sleep(float(os.environ.get("VILSEG_TEST_SECONDS_A_STEP", 0)) / 2)
        return super().forward(images)
"""


@pytest.fixture(scope="module")
def pairs(store: ObjectStore) -> str:
    """Four shards of scenes, more than one of which is in memory at a time."""
    for shard in range(4):
        drawn = scenes.pairs(100, shard, SIZE)
        write_tar(
            f"s3://vilseg/pairs/{shard}.tar",
            ((f"{shard}-{pair.key}", pair.image, "jpg", {"captions": pair.captions}) for pair in drawn),
        )
    return "s3://vilseg/pairs"


@dataclass
class Running:
    """`vilseg train` in a process of its own."""

    process: subprocess.Popen[str]
    folder: RunDirectory

    def wait_for_checkpoint(self, step: int) -> None:
        deadline = time.monotonic() + PROMPTLY_S
        while self.folder.last_step < step:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def workers(self) -> list[int]:
        return [pid for pid in family(self.process.pid) if "RayTrainWorker" in title(pid)]

    def end(self, code: int = 0) -> str:
        """Wait for the end; returns what was said."""
        said = self.process.communicate(timeout=400)[1]
        assert self.process.returncode == code, said
        return said


Start = Callable[..., Running]


def begin(place: Path, name: str, *options: str, seconds_a_step: float = 0.3) -> Running:
    """`vilseg train` in the folder ``place``."""
    (place / "slow_encoder.py").write_text(ENCODER)
    (place / "run.yaml").write_text(MODEL)
    fixed = [
        f"trainer.steps={STEPS}",
        f"trainer.checkpoint_every={EVERY}",
        "trainer.batch_size=8",
        "trainer.log_every=1",
        "trainer.precision=float32",
        "trainer.keep_checkpoints=null",
        f"trainer.storage={STORAGE}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.app", "train", "--config", "run.yaml", "--name", name, *fixed, *options],
        cwd=place,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{place}",
            "VILSEG_TEST_SECONDS_A_STEP": str(seconds_a_step),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    where = next((o.partition("=")[2] for o in options if o.startswith("trainer.storage")), STORAGE)
    return Running(process, RunDirectory(f"{where}/{name}"))


@pytest.fixture
def start(store: ObjectStore, tmp_path: Path) -> Iterator[Start]:
    begun: list[Running] = []

    def run(name: str, *options: str, seconds_a_step: float = 0.3) -> Running:
        begun.append(begin(tmp_path, name, *options, seconds_a_step=seconds_a_step))
        return begun[-1]

    yield run
    for running in begun:
        end(running.process)


@pytest.fixture(scope="module")
def unbroken(store: ObjectStore, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses by step of a run that nothing happens to."""
    place = tmp_path_factory.mktemp("unbroken")
    running = begin(place, "unbroken", f"data.source={pairs}", seconds_a_step=0)
    running.end()
    return losses(running.folder)


def losses(folder: RunDirectory) -> list[float]:
    """By step; every step once."""
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def check(folder: RunDirectory, expected: list[float]) -> None:
    """The run is whole, and as if nothing had happened."""
    assert losses(folder) == pytest.approx(expected, abs=1e-3)
    assert folder.last_step == STEPS
    assert storage.exists(storage.join(folder.model, "model.safetensors"))


@pytest.mark.slow
def test_worker_killed(start: Start, pairs: str, unbroken: list[float]) -> None:
    running = start("worker", f"data.source={pairs}", "trainer.workers=2")
    running.wait_for_checkpoint(EVERY)
    workers = running.workers()
    assert len(workers) == 2
    kill(workers[:1])
    running.end()
    check(running.folder, unbroken)


@pytest.mark.slow
def test_driver_killed_and_resumed(start: Start, pairs: str, unbroken: list[float]) -> None:
    first = start("driver", f"data.source={pairs}")
    first.wait_for_checkpoint(2 * EVERY)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    time.sleep(5)  # its workers find out and end
    kept = first.folder.last_step
    assert kept >= 2 * EVERY
    done = read_metrics(first.folder)[-1]["step"]
    assert done - kept <= EVERY
    start("driver", f"data.source={pairs}", "--resume", seconds_a_step=0).end()
    check(first.folder, unbroken)


@pytest.mark.slow
def test_terminated_with_a_checkpoint(start: Start, pairs: str, unbroken: list[float]) -> None:
    first = start("terminated", f"data.source={pairs}")
    first.wait_for_checkpoint(EVERY)
    first.process.terminate()
    said = first.end(code=130)
    assert "--resume" in said
    assert EVERY < first.folder.last_step < STEPS
    start("terminated", f"data.source={pairs}", "--resume", seconds_a_step=0).end()
    check(first.folder, unbroken)


@pytest.mark.slow
def test_store_away_for_half_a_minute(start: Start, pairs: str, unbroken: list[float], store: ObjectStore) -> None:
    running = start("store", f"data.source={pairs}", "trainer.workers=2")
    running.wait_for_checkpoint(EVERY)
    store.stop()
    time.sleep(30)
    ObjectStore.start(store.directory)
    running.end()
    check(running.folder, unbroken)


def test_broken_shards_are_quarantined(start: Start, pairs: str) -> None:
    broken = "s3://vilseg/broken"
    for number in range(3):
        storage.write_bytes(f"{broken}/{number}.tar", storage.read_bytes(f"{pairs}/{number}.tar"))
    whole = storage.read_bytes(f"{pairs}/3.tar")
    storage.write_bytes(f"{broken}/half.tar", whole[: len(whole) // 2])
    storage.write_bytes(f"{broken}/nothing.tar", b"")
    members = ((f"text{number}", b"this is no picture", "jpg", {"caption": "a lie"}) for number in range(3))
    write_tar(f"{broken}/text.tar", members)
    running = start("broken", f"data.source={broken}", seconds_a_step=0)
    running.end()
    lines = storage.read_text(running.folder.quarantine).splitlines()
    found = {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}
    assert {"text0", "text1", "text2"} <= found.keys()
    assert any("breaks off" in reason for reason in found.values()), found
    assert len(found) == len(lines)
    last = read_metrics(running.folder)[-1]
    assert last["step"] == STEPS
    assert last["bad_pairs"] >= len(found)


@pytest.mark.slow
def test_no_space_for_a_checkpoint(start: Start, pairs: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system to fill")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        running = start("full", f"data.source={pairs}", f"trainer.storage={disk}")
        running.wait_for_checkpoint(EVERY)
        free = os.statvfs(disk)
        (disk / "other").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 1024))
        said = running.end(code=2)
        assert "no space is left" in said
        assert "Traceback" not in said
        kept = running.folder.last_step
        assert kept >= EVERY
        (disk / "other").unlink()
        start("full", f"data.source={pairs}", f"trainer.storage={disk}", "--resume", seconds_a_step=0).end()
        assert running.folder.last_step == STEPS
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_bucket_gone_at_a_checkpoint(start: Start, pairs: str, store: ObjectStore) -> None:
    store_client = store._client()
    store_client.create_bucket(Bucket="passing")
    running = start("gone", f"data.source={pairs}", "trainer.storage=s3://passing/runs")
    running.wait_for_checkpoint(EVERY)
    storage.delete("s3://passing/runs")
    store_client.delete_bucket(Bucket="passing")
    said = running.end(code=2)
    assert "passing" in said
    assert "bucket" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run_with_its_pairs_named(start: Start, pairs: str) -> None:
    wild = ["optimizer.learning_rate=1e18", "optimizer.gradient_clip=0", "optimizer.warmup_steps=0"]
    running = start("nan", f"data.source={pairs}", "trainer.workers=2", *wild, seconds_a_step=0)
    said = running.end(code=2)
    assert "nonfinite.json" in said
    found = json.loads(storage.read_text(running.folder.nonfinite))
    assert len(set(found["keys"])) == 8
    assert found["step"] >= 1
    assert not running.folder.checkpoint_steps()


@pytest.mark.slow
def test_elastic_run_loses_a_worker_and_goes_on(start: Start, pairs: str, unbroken: list[float]) -> None:
    running = start("elastic", f"data.source={pairs}", "trainer.workers=[1, 4]")
    running.wait_for_checkpoint(EVERY)
    workers = running.workers()
    assert len(workers) == os.cpu_count() or len(workers) == 4
    kill(workers[-1:])
    said = running.end()
    assert "going on from step" in said
    check(running.folder, unbroken)
