"""Photos per second of `vilseg segment`, a bare loop, Daft and a torch DataLoader, with the same photos, model and output.

2,000 photos at their own sizes are in the S3 store; photos of the shared data are repeated under other names to reach this
number. Each of the four systems reads, decodes and segments photos, and writes one indexed PNG per photo and result rows with
run lengths. Its rate is measured in the steady state: the photos finished between the first 10 % and the last 5 % of all, divided
by the time in which they were finished. This leaves out the start of processes and the end, when only some workers are busy,
which weigh no more in a long job than in a short one.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.shared import embedded_store, shared_data
from cli import console
from vilseg import storage
from vilseg.bulk.results_table import SCHEMA
from vilseg.config import RunConfig
from vilseg.data.image_decoding import decode_image
from vilseg.data.synthetic import scenes
from vilseg.model import ViLSeg
from vilseg.segmentation.segmenter import Segmenter

_ROOT = "s3://vilseg/bulk"
_MODEL = f"{_ROOT}/model"
_PHOTOS = 2000
_ROUNDS = 2
_STEADY = (0.1, 0.95)
"""Shares of the photos between which a way is in steady state."""
CLASSES = tuple(scene.name for scene in scenes.CLASSES)


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        out: folder for the object store; replaced if it exists.

    Returns:
        ``ratio`` (photos/s of `vilseg segment` over photos/s of the bare loop, medians of the rounds), ``ratio_daft`` and
        ``ratio_dataloader`` (the same over the other two systems), and the rates and total seconds of every system and round.
    """
    shutil.rmtree(out, ignore_errors=True)
    with embedded_store(out.absolute() / "store"):
        os.environ["OMP_NUM_THREADS"] = "1"
        names = _upload()
        save_model(_MODEL)
        ways: dict[str, Callable[[str, list[str]], list[float]]] = {
            "vilseg": _vilseg,
            "bare_loop": _bare_loop,
            "daft": _daft,
            "dataloader": _data_loader,
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        whole: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(_ROUNDS):
            for way, segment in ways.items():
                place = f"{_ROOT}/{way}-{number}"
                started = time.time()
                finished = segment(place, names)
                whole[way].append(round(time.time() - started, 1))
                rates[way].append(round(steady(finished), 2))
                console.log(f"{way}: {rates[way][-1]} photos/s, {whole[way][-1]} s with its start")
                _check(place, names)
    rate = {way: median(found) for way, found in rates.items()}
    return {
        "benchmark": "bulk",
        "ratio": round(rate["vilseg"] / rate["bare_loop"], 4),
        "ratio_daft": round(rate["vilseg"] / rate["daft"], 4),
        "ratio_dataloader": round(rate["vilseg"] / rate["dataloader"], 4),
        "photos_per_second": rates,
        "seconds_with_start": whole,
        "photos": _PHOTOS,
        "cpus": os.cpu_count(),
    }


def photo_files() -> list[Path]:
    """Return the paths of the photos of the shared data."""
    data = shared_data("flickr8k_full/images", "coco_mini_dev/images")
    files = sorted((data / "flickr8k_full" / "images").glob("*.jpg"))
    return files + sorted((data / "coco_mini_dev" / "images").glob("*.jpg"))


def _upload() -> list[str]:
    files = photo_files()
    names = [f"{number // len(files)}/{files[number % len(files)].name}" for number in range(_PHOTOS)]

    def send(number: int) -> None:
        storage.write_bytes(f"{_ROOT}/photos/{names[number]}", files[number % len(files)].read_bytes())

    with ThreadPoolExecutor(storage.TRANSFERS_AT_ONCE) as pool:
        list(pool.map(send, range(_PHOTOS)))
    return names


def save_model(uri: str) -> None:
    """Save the demo's model, untrained and with an input size of 128 pixels, twice the demo's.

    Training would not change its speed.
    """
    config = RunConfig.load(
        str(Path(__file__).parent.parent / "configs" / "demo.yaml"), ["segmentation.input_size=128"]
    )
    captions = [caption for pair in scenes.pairs(200, 0, 32) for caption in pair.captions]
    torch.manual_seed(0)
    ViLSeg.from_config(config.model, captions, segmentation=config.segmentation).save_pretrained(uri)


def steady(finished: Sequence[float]) -> float:
    """Return the photos per second in the steady state.

    Args:
        finished: time in seconds at which each photo was finished; photos of a block have the same time.
    """
    times = sorted(finished)
    begin, end = (times[round(share * len(times))] for share in _STEADY)
    return (bisect_right(times, end) - bisect_right(times, begin)) / (end - begin)


def _check(place: str, names: Sequence[str]) -> None:
    masks = {entry.relative for entry in storage.list_files(f"{place}/masks")}
    assert masks == {f"{name}.png" for name in names}, f"{len(masks)} masks at {place}"


# ------------------------------------------------------------------------------------------------------------ ways


def _vilseg(place: str, names: list[str]) -> list[float]:
    # In a process of its own, as a user runs it; only here one can see when each block was done.
    return _in_process(f"from benchmarks.bulk import run_vilseg; run_vilseg({place!r})")


def run_vilseg(place: str) -> None:
    """Segment the photos by `vilseg segment` into ``place``, and print the time at which each was finished, as a JSON list."""
    from cluster.ray_session import ray_session
    from jobs.segment import segment_job
    from jobs.segment.plan import plan
    from vilseg.text.vocabulary import Vocabulary

    moments: list[float] = []

    def note(progress: segment_job.Progress) -> None:
        moments.extend([time.time()] * (progress.done - len(moments)))

    with ray_session() as session:
        job = plan([f"{_ROOT}/photos"], _MODEL, Vocabulary.of(CLASSES), place, formats=["png"])
        segment_job.main(job, session, progress=note)
    print(json.dumps(moments))


def _in_process(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class OnePhoto:
    """Processing of one photo (decode, segment, write the outputs), which is the same in all compared systems but vilseg."""

    def __init__(self, place: str) -> None:
        torch.set_num_threads(1)
        self._segmenter = Segmenter(ViLSeg.from_pretrained(_MODEL), CLASSES, keep_clusters=False)
        self._place = place

    def read(self, name: str) -> tuple[dict[str, Any], Any]:
        data = storage.read_bytes(f"{_ROOT}/photos/{name}")
        return self.decode(name, data)

    @staticmethod
    def decode(name: str, data: bytes) -> tuple[dict[str, Any], Any]:
        return {"path": name, "status": "ok", "sha256": hashlib.sha256(data).hexdigest()}, decode_image(data)

    def finish(self, row: dict[str, Any], image: Any) -> dict[str, Any]:
        result = self._segmenter(image)
        storage.write_bytes(f"{self._place}/masks/{row['path']}.png", result.to_png_bytes())
        row["height"], row["width"] = image.shape[:2]
        row["classes"] = [region.class_name for region in result.regions]
        row["areas"] = [region.area for region in result.regions]
        row["scores"] = [region.score for region in result.regions]
        row["rle"] = [region.rle["counts"] for region in result.regions]
        return row


def _write_rows(place: str, name: str, rows: list[dict[str, Any]]) -> None:
    with storage.open_atomic(f"{place}/{name}.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)


def _bare_loop(place: str, names: list[str]) -> list[float]:
    """One process a core, each with its fraction of the photos."""
    workers = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    queue: Any = context.Queue()
    processes = [
        context.Process(target=_bare_worker, args=(place, names[rank::workers], rank, barrier, queue))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    moments = [moment for _ in processes for moment in queue.get()]
    for process in processes:
        process.join()
    return moments


def _bare_worker(place: str, names: list[str], rank: int, barrier: Any, queue: Any) -> None:
    photo = OnePhoto(place)
    barrier.wait()
    rows, moments = [], []
    for name in names:
        rows.append(photo.finish(*photo.read(name)))
        moments.append(time.time())
    _write_rows(place, f"rows-{rank}", rows)
    queue.put(moments)


def _daft(place: str, names: list[str]) -> list[float]:
    return _in_process(f"from benchmarks.bulk import run_daft; run_daft({place!r}, {names!r})")


def run_daft(place: str, names: list[str]) -> None:
    """Segment the photos by Daft, and print the time at which each was finished, as a JSON list.

    Daft downloads the photos, and a pool of instances of a class decodes, segments and writes.
    """
    import daft
    from daft.io import IOConfig, S3Config

    @daft.cls(use_process=True, max_concurrency=os.cpu_count())
    class Segment:
        def __init__(self) -> None:
            self._photo = OnePhoto(place)

        @daft.method.batch(return_dtype=daft.DataType.float64(), batch_size=16)
        def segment(self, names: daft.Series, photos: daft.Series) -> list[float]:
            rows, moments = [], []
            for name, data in zip(names.to_pylist(), photos.to_pylist(), strict=True):
                rows.append(self._photo.finish(*OnePhoto.decode(name, data)))
                moments.append(time.time())
            _write_rows(place, hashlib.sha256(rows[0]["path"].encode()).hexdigest()[:16], rows)
            return moments

    s3 = S3Config(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        key_id=os.environ["AWS_ACCESS_KEY_ID"],
        access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
        use_ssl=False,
    )
    table = daft.from_pydict({"name": names, "uri": [f"{_ROOT}/photos/{name}" for name in names]})
    table = table.with_column("photo", table["uri"].download(io_config=IOConfig(s3=s3)))
    worker = Segment()
    found = table.select(worker.segment(table["name"], table["photo"]).alias("moment")).to_pydict()
    print(json.dumps(found["moment"]))


def _data_loader(place: str, names: list[str]) -> list[float]:
    return _in_process(f"from benchmarks.bulk import run_data_loader; run_data_loader({place!r}, {names!r})")


class _Photos(torch.utils.data.Dataset):
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], Any]:
        name = self._names[number]
        return OnePhoto.decode(name, storage.read_bytes(f"{_ROOT}/photos/{name}"))


def run_data_loader(place: str, names: list[str]) -> None:
    """Segment the photos by a torch DataLoader, and print the time at which each was finished, as a JSON list.

    Its worker processes read and decode; this process segments and writes.
    """
    photo = OnePhoto(place)
    torch.set_num_threads(os.cpu_count() or 1)  # or the model would have one core alone
    loader = torch.utils.data.DataLoader(
        _Photos(names), batch_size=None, num_workers=os.cpu_count() or 1, multiprocessing_context="spawn"
    )
    rows, moments = [], []
    for row, image in loader:
        rows.append(photo.finish(row, image.numpy()))
        moments.append(time.time())
    _write_rows(place, "rows", rows)
    print(json.dumps(moments))
