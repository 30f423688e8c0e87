"""Photos/s of reading training batches from the object store, by Ray Data and by a torch DataLoader with webdataset.

Both read the same shards from the same store in two processes; they decode, crop, choose and tokenize a caption, find its noun
phrases and shuffle, and pass batches to one consumer that does nothing with them. webdataset reads by URL and decodes with
Pillow, as its documentation shows. A third variant, webdataset with this project's image decoder, shows how much of the
difference is due to decoding. The clock starts with the first batch, so that the start of processes is left out.
"""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import boto3
import numpy as np
import ray
import torch
import webdataset as wds
from PIL import Image

from benchmarks.shared import embedded_store, shared_data
from cli import console
from jobs.train.monitor import TrainingMonitor
from jobs.train.ray_data import batches_of_steps, count_in_parallel, execution_options, worker_batches
from vilseg.config import RunConfig
from vilseg.data.batch_reader import MAX_PHRASES_PER_PAIR, decode_to_canvas
from vilseg.data.image_decoding import crop_to_square
from vilseg.training import run_setup
from vilseg.training.run_dir import PreparedRun

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
_BUCKET, _PREFIX = "vilseg", "input_path/pairs"
_PROCESSES = 2
_CANVAS = 192
"""Smaller than the photos, as it is in training on photos of the web."""
_BATCH = 64
_STEPS = 250
_ROUNDS = 3
_SHUFFLED = 1000
"""Pairs that webdataset shuffles among."""


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        out: folder for the object store.

    Returns:
        ``ratio`` (photos/s of Ray Data over photos/s of the DataLoader with webdataset and Pillow, median of the rounds), and the
        rates of all variants and rounds.

    Raises:
        DataError: the photos are not in the folder that ``VILSEG_SHARED_DATA`` names.
    """
    photos = shared_data("flickr8k_224/shards") / "flickr8k_224" / "shards"
    with embedded_store(out.absolute() / "store"):
        shards = sorted(photos.glob("train-*.tar"))
        for shard in shards:
            _client().upload_file(str(shard), _BUCKET, f"{_PREFIX}/{shard.name}")
        # One CPU is room for two tasks that read, see jobs.train.ray_data.
        ray.init(address="local", num_cpus=_PROCESSES // 2, include_dashboard=False, logging_level=logging.ERROR)
        try:
            return _measure([shard.name for shard in shards])
        finally:
            ray.shutdown()


def _client() -> Any:
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def _measure(names: Sequence[str]) -> dict[str, Any]:
    overrides = [
        f"data.source=s3://{_BUCKET}/{_PREFIX}",
        f"data.canvas={_CANVAS}",
        f"views.global_size={_CANVAS}",
        f"trainer.storage=s3://{_BUCKET}/input_path/runs",
        f"trainer.batch_size={_BATCH}",
        f"trainer.steps={_STEPS}",
        "trainer.workers=1",
        "name=input",
    ]
    config = RunConfig.load(str(CONFIG), overrides)
    prepared = run_setup.prepare(config, run_setup.open_run_directory(config, resume=False), count=count_in_parallel)
    urls = [
        _client().generate_presigned_url("get_object", {"Bucket": _BUCKET, "Key": f"{_PREFIX}/{name}"})
        for name in names
    ]
    ways: dict[str, Callable[[], Iterator[int]]] = {
        "ray": partial(_by_ray, config, prepared),
        "webdataset": partial(_by_webdataset, urls, prepared, _decode_with_pillow),
        "webdataset, our decoder": partial(_by_webdataset, urls, prepared, _decode_with_ours),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(_ROUNDS):
        for name, read in ways.items():
            rates[name].append(round(_rate(read()), 1))
            console.log(f"round {number}, {name}: {rates[name][-1]} photos/s")

    def ratio(other: str) -> float:
        return round(median(ours / theirs for ours, theirs in zip(rates["ray"], rates[other], strict=True)), 4)

    return {
        "benchmark": "input_path",
        "ratio": ratio("webdataset"),
        "ratio_with_our_decoder": ratio("webdataset, our decoder"),
        "photos_per_second": rates,
        "photos": _STEPS * _BATCH,
        "processes": _PROCESSES,
        "canvas": _CANVAS,
    }


def _rate(counts: Iterator[int]) -> float:
    """Photos per second from the first batch on."""
    next(counts)
    started = time.perf_counter()
    read = sum(counts)
    return read / (time.perf_counter() - started)


def _by_ray(config: RunConfig, prepared: PreparedRun) -> Iterator[int]:
    monitor = TrainingMonitor.remote(config.data.max_bad_share)
    dataset = batches_of_steps(config, prepared, monitor, 0, _STEPS)
    dataset.context.execution_options = execution_options()
    for batch in worker_batches(dataset.iterator()):
        yield len(batch.keys)
    ray.kill(monitor)


def _by_webdataset(urls: list[str], prepared: PreparedRun, decode: Callable[[bytes], np.ndarray]) -> Iterator[int]:
    pairs = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=None, resampled=True)
        .shuffle(_SHUFFLED)
        .map(partial(_pair, decode=decode, prepared=prepared))
        .batched(_BATCH, collation_fn=partial(_collated, prepared=prepared))
    )
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=None, num_workers=_PROCESSES, multiprocessing_context="spawn", prefetch_factor=4
    )
    for step, (images, *_) in enumerate(loader, 1):
        yield len(images)
        if step == _STEPS:
            return


def _pair(
    sample: dict[str, Any], decode: Callable[[bytes], np.ndarray], prepared: PreparedRun
) -> tuple[np.ndarray, str, list[int]]:
    captions = json.loads(sample["json"])["captions"] if "json" in sample else [sample["txt"].decode()]
    chosen = captions[np.random.randint(len(captions))]
    return decode(sample["jpg"]), chosen, prepared.nouns.find(captions)[:MAX_PHRASES_PER_PAIR]


def _collated(
    samples: list[tuple[np.ndarray, str, list[int]]], prepared: PreparedRun
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, captions, found = zip(*samples, strict=True)
    phrases = np.full((len(samples), MAX_PHRASES_PER_PAIR), -1, np.int32)
    for row, indices in enumerate(found):
        phrases[row, : len(indices)] = indices
    return np.stack(images), prepared.tokenizer(captions), phrases


def _decode_with_pillow(data: bytes) -> np.ndarray:
    return crop_to_square(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), _CANVAS, np.random.random())


def _decode_with_ours(data: bytes) -> np.ndarray:
    return decode_to_canvas(data, np.random.randint(1 << 16), canvas=_CANVAS, max_pixels=10**7)
