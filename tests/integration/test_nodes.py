"""Two nodes, of which one loses its power in the middle of the work: training, bulk segmentation and serving go on.

Each node is a host of its own where this machine allows it: a network namespace with an address, behind a bridge. Else both
are processes side by side. What they share is a folder, as a network file system would be. The head, with the driver
beside it, is not the one that dies.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cluster.local_cluster import Host, LocalCluster
from vilseg import storage
from vilseg.bulk import results_table
from vilseg.config import RunConfig
from vilseg.data.batch_reader import BatchReader, decode_to_canvas
from vilseg.data.sampler import PairSampler
from vilseg.data.shards import write_index, write_tar
from vilseg.data.synthetic import scenes
from vilseg.training import run_setup
from vilseg.training.metrics_log import read_metrics
from vilseg.training.run_dir import PreparedRun, RunDirectory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0
WORKERS = {"train": "RayTrainWorker", "segment": "MapWorker", "serve": "ServeReplica:vilseg:models"}


# --------------------------------------------------------------------------------------------------------- the nodes


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[Sequence[Host]]:
    """This machine's side of a bridge for the head, and a namespace behind it."""
    name = f"vs{os.getpid()}"
    network = f"10.{random.randrange(200, 250)}.{random.randrange(250)}"
    with ExitStack() as undo:
        ip("link", "add", name, "type", "bridge")
        undo.callback(ip, "link", "del", name)
        ip("addr", "add", f"{network}.1/24", "dev", name)
        ip("link", "set", name, "up")
        ip("netns", "add", name)
        undo.callback(ip, "netns", "del", name)
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", f"{name}a", "master", name, "up")
        ip("-n", name, "addr", "add", f"{network}.2/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", name, "link", "set", device, "up")
        yield [Host(f"{network}.1"), Host(f"{network}.2", ("ip", "netns", "exec", name))]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Sequence[Host]]:
    if os.getuid() or not shutil.which("ip"):
        yield []
        return
    with ExitStack() as stack:
        try:
            made: Sequence[Host] = stack.enter_context(two_hosts())
        except subprocess.CalledProcessError:
            made = []  # a container without the right to
        yield made


@pytest.fixture(scope="module")
def folder(hosts: Sequence[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Session on the cluster; it ends with the module."""
    folder = tmp_path_factory.mktemp("cluster")
    yield folder
    if running := LocalCluster.attach(folder):
        running.stop()


@pytest.fixture
def cluster(folder: Path, hosts: Sequence[Host], monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    """Two nodes of one CPU; one that an earlier test killed is replaced."""
    # By Ray's 15 its workers would come last beside what else this machine does; by 0 they would keep a node from coming up,
    # whose agents have 15 s to start.
    monkeypatch.setenv("RAY_worker_niceness", "5")
    return LocalCluster.start(folder, nodes=2, cpus=1, hosts=hosts)


def entitled(cluster: LocalCluster, index: int, title: str) -> list[Path]:
    """Folders in /proc of the processes of a node that call themselves so."""
    found = []
    for place in (Path(f"/proc/{pid}") for pid in cluster.processes(index)):
        try:
            if title in (place / "cmdline").read_text():
                found.append(place)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return found


def on_both(cluster: LocalCluster, title: str) -> bool:
    return all(entitled(cluster, index, title) for index in (0, 1))


def seconds_of_work(cluster: LocalCluster, index: int, title: str) -> float:
    """Processor time (proc(5)) that those processes have taken."""
    stats = [(place / "stat").read_text().rpartition(")")[2].split() for place in entitled(cluster, index, title)]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        time.sleep(0.1)


class Verb:
    """`vilseg VERB --address …` in a process of its own."""

    def __init__(self, cluster: LocalCluster, said: IO[str], *arguments: str) -> None:
        self._said = said
        command = [sys.executable, "-m", "cli.app", *arguments, "--address", cluster.address, "--json"]
        environment = {**os.environ, **cluster.environment()}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said, text=True)

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def goes_on(self) -> None:
        assert self.process.poll() is None, self.said()

    def end(self) -> None:
        """Wait for a good end."""
        self.process.wait(PATIENCE)
        assert self.process.returncode == 0, self.said()


Start = Callable[..., Verb]


@pytest.fixture
def start(cluster: LocalCluster, tmp_path: Path) -> Iterator[Start]:
    with (tmp_path / "said.txt").open("w+") as said:
        begun: list[Verb] = []

        def begin(*arguments: str) -> Verb:
            begun.append(Verb(cluster, said, *arguments))
            return begun[-1]

        yield begin
        for verb in begun:
            if verb.process.poll() is None:
                verb.process.kill()
                verb.process.wait()


# ------------------------------------------------------------------------------------------------------------- bulk

PICTURES = 400


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[[str, int], str]) -> str:
    # Large for images of this size, so that there is time to kill something.
    return save_tiny_model(str(tmp_path_factory.mktemp("model") / "model"), 192)


def test_bulk_segmentation_ends_with_every_image_once(
    cluster: LocalCluster, start: Start, model: str, tmp_path: Path
) -> None:
    photos, out = tmp_path / "photos", str(tmp_path / "out")
    photos.mkdir()
    drawn = [Image.fromarray(scenes.render_scene(5, number, 64).image) for number in range(5)]
    for number in range(PICTURES):
        drawn[number % 5].save(photos / f"{number:03d}.png")
    verb = start("segment", str(photos), "--model", model, "--classes", "sky,grass,boat", "--out", out)
    parts = Path(out) / results_table.PARTS

    def written() -> bool:
        verb.goes_on()
        return parts.exists() and len(list(parts.iterdir())) >= 3

    until(written, "parts")
    assert on_both(cluster, WORKERS["segment"])
    cluster.kill_node(1)
    verb.goes_on()
    verb.end()
    table = pq.read_table(f"{out}/{results_table.RESULTS}")
    assert table.column("path").to_pylist() == [f"{number:03d}.png" for number in range(PICTURES)]
    assert set(table.column("status").to_pylist()) == {"ok"}
    masks = [np.asarray(Image.open(f"{out}/masks/{number:03d}.png.png")) for number in range(PICTURES)]
    assert all(np.array_equal(mask, masks[number % 5]) for number, mask in enumerate(masks))


# ------------------------------------------------------------------------------------------------------------ serve


class Load:
    """Clients that ask again and again until they are told to stop; what they got is in ``answers``."""

    def __init__(self, url: str, image: bytes, clients: int) -> None:
        self.answers: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, image)) for _ in range(clients)]

    def _ask(self, url: str, image: bytes) -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            while not self._stop.is_set():
                try:
                    files = {"image": ("image", image)}
                    answer = client.post(f"{url}/v1/segment", files=files, data={"classes": "sky,grass,boat"})
                    self.answers.append("ok" if answer.status_code == 200 else f"{answer.status_code} {answer.text}")
                except httpx.HTTPError as error:
                    self.answers.append(repr(error))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_serving_loses_no_request(cluster: LocalCluster, start: Start, model: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ["replicas.minimum=2", "replicas.maximum=2", "page=false", f"videos.storage={tmp_path}"]
    verb = start("serve", "--model", model, "--port", str(port), *settings)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        verb.goes_on()
        return url in verb.said()

    until(ready, "the server")
    until(lambda: on_both(cluster, WORKERS["serve"]), "a replica on each node")
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (15, 20, 3))
    Image.fromarray(np.kron(pixels, np.ones((50, 50, 1))).astype(np.uint8)).save(buffer, "JPEG")
    before = seconds_of_work(cluster, 1, WORKERS["serve"])
    with Load(url, buffer.getvalue(), 8) as load:
        until(lambda: len(load.answers) >= 40, "answers")
        assert seconds_of_work(cluster, 1, WORKERS["serve"]) > before, "both nodes have a share"
        cluster.kill_node(1)
        count = len(load.answers)
        until(lambda: len(load.answers) >= count + 24, "answers after the kill")
    assert set(load.answers) == {"ok"}
    verb.process.send_signal(signal.SIGINT)
    verb.end()


# ------------------------------------------------------------------------------------------------------------ train

STEPS, EVERY = 60, 6


def write_pairs(folder: Path, size: int) -> str:
    members = (
        (pair.key, pair.image, "jpg", {"captions": list(pair.captions)}) for pair in scenes.pairs(700, 3, size, start=0)
    )
    count = write_tar(f"{folder}/pairs/0.tar", members)
    write_index(f"{folder}/pairs", [("0.tar", count)])
    return f"{folder}/pairs"


def unbroken(folder: RunDirectory) -> list[dict[str, float]]:
    """The reports of the same run, made by one process without an interruption."""
    config = RunConfig.load(folder.config)
    prepared = PreparedRun.from_json(storage.read_text(folder.prepared))
    trainer = run_setup.make_trainer(config, folder, prepared, torch.device("cpu"))
    reader = BatchReader(
        batch_size=config.trainer.batch_size,
        workers=1,
        seed=config.trainer.seed,
        decode=partial(decode_to_canvas, canvas=config.data.canvas, max_pixels=config.data.max_pixels),
        tokenize=prepared.tokenizer,
        nouns=prepared.nouns,
    )
    chunks = PairSampler(prepared.shards, config.trainer.batch_size, config.trainer.seed).read_tasks(0, STEPS)
    reports: list[dict[str, float]] = []
    batches = itertools.chain.from_iterable(map(reader.read, chunks))
    trainer.train(batches, on_report=reports.append, on_checkpoint=lambda: None)
    return reports


def training(folder: Path, *overrides: str) -> list[str]:
    """Arguments of a training of small images; its run is at ``folder/run``."""
    (folder / "config.yaml").write_text("{}")
    settings = [
        f"data.source={write_pairs(folder, 32)}",
        *("data.canvas=32", "views.global_size=32", "views.local_size=16", "model.embedding_dim=32"),
        "model.image_encoder.sizes={width: 32, depth: 1}",
        "model.text_encoder.sizes={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}",
        *("model.text_encoder.max_tokens=24", "model.clusters=8", "loss.nouns.min_count=2"),
        *("loss.vision.prototypes=32", "loss.vision.hidden_dim=32", "optimizer.warmup_steps=2"),
        *("trainer.precision=float32", "trainer.batch_size=64", f"trainer.storage={folder}"),
    ]
    return ["train", "--config", str(folder / "config.yaml"), "--name", "run", *settings, *overrides]


def test_elastic_training_follows_the_nodes(
    cluster: LocalCluster, hosts: Sequence[Host], start: Start, tmp_path: Path
) -> None:
    long = ["trainer.steps=20000", "trainer.checkpoint_every=20", "trainer.log_every=5"]
    verb = start(*training(tmp_path, "trainer.workers=[1, 2]", *long))
    folder = RunDirectory(str(tmp_path / "run"))

    def saw(*words: str) -> bool:
        verb.goes_on()
        said, place = verb.said(), 0
        for word in words:
            place = said.find(word, place) + len(word)
            if place < len(word):
                return False
        return True

    def goes_beyond(step: int) -> bool:
        verb.goes_on()
        return folder.last_step > step

    until(partial(saw, "training by 2 workers"), "two workers")
    until(partial(goes_beyond, 20), "a checkpoint")
    cluster.kill_node(1)
    until(partial(saw, "training by 2 workers", "a worker was lost", "training by 1 workers"), "one worker")
    until(partial(goes_beyond, folder.last_step + 20), "a checkpoint by one worker")
    LocalCluster.start(cluster.directory, nodes=2, cpus=1, hosts=hosts)
    until(partial(saw, "training by 1 workers", "room for more workers", "training by 2 workers"), "two workers again")
    until(partial(goes_beyond, folder.last_step + 20), "a checkpoint by two workers")
    verb.process.send_signal(signal.SIGTERM)
    verb.process.wait(PATIENCE)
    assert verb.process.returncode == 130, verb.said()
    steps = [report["step"] for report in read_metrics(folder)]
    assert steps == sorted(set(steps)), "every report once"
    assert set(range(5, int(steps[-1]), 5)) <= set(steps)


def test_training_goes_on_from_its_last_checkpoint(cluster: LocalCluster, start: Start, tmp_path: Path) -> None:
    settings = [
        "trainer.log_every=1",
        "trainer.workers=2",
        f"trainer.steps={STEPS}",
        f"trainer.checkpoint_every={EVERY}",
    ]
    verb = start(*training(tmp_path, *settings))
    folder = RunDirectory(str(tmp_path / "run"))

    def has_checkpoint() -> bool:
        verb.goes_on()
        return folder.last_step >= EVERY

    until(has_checkpoint, "a checkpoint")
    assert on_both(cluster, WORKERS["train"])
    cluster.kill_node(1)
    assert folder.last_step < STEPS, "it was killed on the way"
    verb.goes_on()
    verb.end()
    reports = read_metrics(folder)
    assert [report["step"] for report in reports] == list(range(1, STEPS + 1))
    for found, wanted in zip(reports, unbroken(folder), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=0.02), found["step"]
    assert storage.exists(folder.model)
    told = json.loads(verb.said().splitlines()[-1])
    assert told["step"] == STEPS
