"""Training speed with batches from Ray Data, compared with the same steps on batches in memory.

Both are timed in the same Ray Train workers with the same model, in blocks of steps that alternate. Each block fed by Ray Data
has its own stream, which is read from the object store and decoded beside the workers and ends with the block. So nothing is read
while steps on batches in memory are timed, and all reading for a fed block is timed except that before its first batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import ray.train
import torch
from ray.train import DataConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.shared import embedded_store
from cli import console
from cluster.ray_session import Session, ray_session
from jobs.ingest import synthetic_scenes
from jobs.train.monitor import TrainingMonitor
from jobs.train.ray_data import batches_of_steps, count_in_parallel, execution_options, worker_batches
from jobs.train.worker import make_trainer
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.batch_reader import WorkerBatch, pack, unpack
from vilseg.training import run_setup
from vilseg.training.run_dir import PreparedRun, RunDirectory

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
_ROOT = "s3://vilseg/train_input"
_PAIRS = 4_000
_FED_STEPS, _MEMORY_STEPS = 1000, 250
"""A block of each kind. A new stream starts processes, some seconds of CPU that a real run spends once; so fed blocks are
long, and what is read before their first batch is little beside the rest."""
_KEPT = 100
"""Batches that a worker keeps in memory."""
_ROUNDS = 2
"""Blocks of each kind."""
_WARM_UP = 20


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        out: folder for the object store.

    Returns:
        ``ratio`` (images/s fed by Ray Data over images/s from memory, medians over blocks), and the rates of all blocks.
    """
    with embedded_store(out.absolute() / "store"), ray_session() as session:
        return _measure(session)


def _measure(session: Session) -> dict[str, Any]:
    overrides = [f"data.source={_ROOT}/pairs", f"trainer.storage={_ROOT}/runs", "name=input"]
    config = RunConfig.load(
        str(CONFIG), [*overrides, f"trainer.steps={_WARM_UP + _ROUNDS * (_FED_STEPS + _MEMORY_STEPS) + 1}"]
    )
    console.log("[scenes]")
    synthetic_scenes.main(f"{_ROOT}/pairs", f"{_ROOT}/unseen", pairs=_PAIRS, unseen=1, size=config.data.canvas, seed=0)
    folder = run_setup.open_run_directory(config, resume=False)
    prepared = run_setup.prepare(config, folder, count=count_in_parallel)
    monitor = TrainingMonitor.remote(config.data.max_bad_share)
    console.log("[steps]")
    streams = {
        f"block-{number}": partial(
            batches_of_steps, config, prepared, monitor, number * _FED_STEPS, (number + 1) * _FED_STEPS
        )
        for number in range(_ROUNDS)
    }
    filesystem, path = storage.filesystem(folder.uri)
    result = storage.join(folder.uri, "seconds.json")
    TorchTrainer(
        partial(_worker, config=config, folder=folder, prepared=prepared, result=result),
        scaling_config=ScalingConfig(
            num_workers=config.trainer.workers,
            resources_per_worker=session.worker_resources(config.trainer.workers),
            use_gpu=session.gpus >= config.trainer.workers,
        ),
        datasets=streams,
        dataset_config=DataConfig(execution_options=execution_options()),
        run_config=ray.train.RunConfig(name="checkpoints", storage_path=path, storage_filesystem=filesystem),
    ).fit()
    seconds = json.loads(storage.read_text(result))
    # The first fed step has no reading in its clock, so it is left out of both kinds of blocks.
    steps = {"fed": _FED_STEPS - 1, "memory": _MEMORY_STEPS - 1}
    images = {kind: count * config.trainer.batch_size for kind, count in steps.items()}
    rates = {kind: [round(images[kind] / taken, 1) for taken in blocks] for kind, blocks in seconds.items()}
    fed, memory = median(rates["fed"]), median(rates["memory"])
    return {
        "benchmark": "train_input",
        "ratio": round(fed / memory, 4),
        "images_per_second_fed": fed,
        "images_per_second_memory": memory,
        "blocks": rates,
        "steps_per_block": {"fed": _FED_STEPS, "memory": _MEMORY_STEPS},
        "batch_size": config.trainer.batch_size,
        "workers": config.trainer.workers,
        "cpus": session.cpus,
    }


def _worker(config: RunConfig, folder: RunDirectory, prepared: PreparedRun, result: str) -> None:
    """Run the product's own training loop in a Ray Train worker, on batches whose arrival is timed."""
    trainer = make_trainer(config, folder, prepared)
    seconds: dict[str, list[float]] = {"fed": [], "memory": []}
    trainer.train(_alternate(seconds, trainer.device), on_report=lambda metrics: None, on_checkpoint=lambda: None)
    if ray.train.get_context().get_world_rank() == 0:
        storage.write_text(result, json.dumps(seconds))


def _alternate(seconds: dict[str, list[float]], device: torch.device) -> Iterator[WorkerBatch]:
    """Fed and remembered batches by turns; notes the seconds of each block from its second step on."""
    kept: list[WorkerBatch] = []
    for number in range(_ROUNDS):
        fed = worker_batches(ray.train.get_dataset_shard(f"block-{number}"))
        first = next(fed)
        if not kept:
            yield from [first] * _WARM_UP  # of the networks; the stream waits meanwhile with a few batches in hand
        yield first
        started = _now(device)
        for batch in fed:
            if len(kept) < _KEPT:
                kept.append(_copied(batch))
            yield batch
        seconds["fed"].append(_now(device) - started)
        yield kept[0]
        started = _now(device)
        for step in range(1, _MEMORY_STEPS):
            yield kept[step % len(kept)]
        seconds["memory"].append(_now(device) - started)
    yield kept[0]  # the trainer asks for it after its last timed step, and so ends the last block


def _copied(batch: WorkerBatch) -> WorkerBatch:
    """A batch in the worker's own memory: the stream's arrays are views of the object store."""
    return next(unpack(pack([batch])))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
