"""Whatever dies on the way: every input ends in one row and one whole mask, and finished work is not done again."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.object_store import ObjectStore
from tests.e2e.processes import end, family, kill, title
from vilseg import storage
from vilseg.bulk import results_table
from vilseg.data.synthetic import scenes

ROOT = Path(__file__).parents[2]
PICTURES = 600
SIZE = 64
PROMPTLY_S = 120


@pytest.fixture(scope="module")
def archive(store: ObjectStore) -> list[str]:
    """Names of pictures at s3://vilseg/archive; five drawings under many names."""
    drawings = []
    for number in range(5):
        buffer = io.BytesIO()
        Image.fromarray(scenes.render_scene(5, number, SIZE).image).save(buffer, "png")
        drawings.append(buffer.getvalue())
    names = [f"{number % 7}/picture {number}.png" for number in range(PICTURES)]
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda it: storage.write_bytes(f"s3://vilseg/archive/{it[1]}", drawings[it[0] % 5]), enumerate(names)
            )
        )
    return names


@pytest.fixture(scope="module")
def model(store: ObjectStore, save_tiny_model: Callable[[str, int], str]) -> str:
    # Large for pictures of this size, so that there is time to kill something.
    return save_tiny_model("s3://vilseg/model", 192)


@dataclass
class Running:
    """`vilseg segment` in a process of its own."""

    process: subprocess.Popen[str]
    out: str

    def parts(self) -> set[str]:
        """Parts that are written."""
        place = f"{self.out}/{results_table.PARTS}"
        return {entry.relative for entry in storage.list_files(place)} if storage.exists(place) else set()

    def wait_for_parts(self, count: int) -> None:
        deadline = time.monotonic() + PROMPTLY_S
        while len(self.parts()) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def end(self) -> str:
        """Wait for a good end; returns what was said."""
        said = self.process.communicate(timeout=300)[1]
        assert self.process.returncode == 0, said
        return said


Start = Callable[..., Running]


@pytest.fixture
def start(archive: list[str], model: str, request: pytest.FixtureRequest) -> Iterator[Start]:
    begun: list[Running] = []
    out = f"s3://vilseg/{request.node.name}"

    def run(*options: str) -> Running:
        arguments = ["segment", "s3://vilseg/archive", "--model", model, "--classes", "sky,grass,boat", "--out", out]
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.app", *arguments, *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(Running(process, out))
        return begun[-1]

    yield run
    for running in begun:
        end(running.process)


def finished(out: str) -> dict[str, bytes]:
    """Masks of the pictures whose rows are in parts, with a mark put into each: whoever does one again removes it."""
    marked = {}
    for entry in storage.list_files(f"{out}/{results_table.PARTS}"):
        for name in pq.read_table(io.BytesIO(storage.read_bytes(entry.uri))).column("path").to_pylist():
            mask = f"{out}/masks/{name}.png"
            marked[name] = storage.read_bytes(mask) + b"after the end of the picture"
            storage.write_bytes(mask, marked[name])
    return marked


def check(out: str, archive: list[str], marked: dict[str, bytes]) -> None:
    """One row and one whole mask for every input; ``marked`` ones untouched."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"{out}/{results_table.RESULTS}")))
    assert table.column("path").to_pylist() == sorted(archive)
    assert set(table.column("status").to_pylist()) == {"ok"}
    masks = {entry.relative: entry.uri for entry in storage.list_files(f"{out}/masks")}
    assert sorted(masks) == sorted(f"{name}.png" for name in archive)

    def read(name: str) -> bytes:
        data = storage.read_bytes(masks[f"{name}.png"])
        assert np.asarray(Image.open(io.BytesIO(data))).shape == (SIZE, SIZE)
        return data

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(archive, pool.map(read, archive), strict=True))
    assert {name: found[name] for name in marked} == marked
    assert not storage.exists(f"{out}/{results_table.PARTS}")
    assert not storage.exists(f"{out}/lock.json")
    assert json.loads(storage.read_text(f"{out}/summary.json"))["images"] == len(archive)
    assert len(json.loads(storage.read_text(f"{out}/annotations.json"))["images"]) == len(archive)


@pytest.mark.slow
def test_driver_killed(start: Start, archive: list[str]) -> None:
    first = start()
    first.wait_for_parts(3)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    time.sleep(5)  # its actors find out and end, perhaps after one more block
    marked = finished(first.out)
    assert 0 < len(marked) < PICTURES
    start("--resume").end()
    check(first.out, archive, marked)


@pytest.mark.slow
def test_whole_cluster_killed(start: Start, archive: list[str]) -> None:
    first = start()
    first.wait_for_parts(3)
    kill([first.process.pid, *family(first.process.pid)])
    first.process.wait()
    marked = finished(first.out)
    assert 0 < len(marked) < PICTURES
    start("--resume").end()
    check(first.out, archive, marked)


def test_actor_killed_and_second_job_refused(start: Start, archive: list[str]) -> None:
    running = start()
    running.wait_for_parts(2)
    second = start("--resume")
    actors = [pid for pid in family(running.process.pid) if "MapWorker" in title(pid)]
    assert actors
    kill(actors[:1])
    said = second.process.communicate(timeout=PROMPTLY_S)[1]
    assert second.process.returncode == 2, said
    assert "another job" in said
    running.end()
    check(running.out, archive, {})


@pytest.mark.slow
def test_store_away_for_a_minute(start: Start, archive: list[str], store: ObjectStore) -> None:
    running = start()
    running.wait_for_parts(2)
    store.stop()
    time.sleep(60)
    ObjectStore.start(store.directory)
    running.end()
    check(running.out, archive, {})


@pytest.mark.slow
def test_input_that_kills_its_process_is_rejected(store: ObjectStore, model: str, tmp_path: Path) -> None:
    # As a fault in a native decoder would: a user's own encoder, which lies in the working folder.
    (tmp_path / "killer.py").write_text(
        "import os\n"
        "from vilseg.model.image_encoder import LocalConvEncoder\n"
        "class Killer(LocalConvEncoder):\n"
        "    def forward(self, images):\n"
        "        if images[:, 0].mean() > 0.99 and images[:, 1].mean() < 0.01:\n"
        "            os._exit(9)\n"
        "        return super().forward(images)\n"
    )
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(scenes.render_scene(5, number, SIZE).image).save(folder / f"{number:02d}.png")
    Image.new("RGB", (SIZE, SIZE), "red").save(folder / "05 kills.png")
    with storage.local_copy(model) as path:
        shutil.copytree(path, tmp_path / "model")
    tree = json.loads((tmp_path / "model" / "config.json").read_text())
    tree["model"]["image_encoder"] = {"factory": "killer:Killer", "factory_options": {"width": 16, "depth": 1}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(tree))
    arguments = ["in", "--model", "model", "--classes", "sky,grass", "--out", "out", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "cli.app", "segment", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rejected"] == 1
    assert "dies" in done.stderr
    table = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert len(table) == 13
    assert [row["path"] for row in table if row["status"] == "rejected"] == ["05 kills.png"]
