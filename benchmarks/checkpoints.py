"""Cost of a checkpoint on S3 every 100 steps: images/s of one worker with checkpoints over images/s without.

The demo's model trains on batches in memory, with one torch thread. The embedded object store and the thread that writes
checkpoints run on the same machine. The time of a checkpoint does not depend on the steps around it, but the speed of a machine
drifts by more than that time within 100 steps. So short blocks of steps with and without a checkpoint alternate many times. The
median difference of their times is the cost of a checkpoint, and is compared with the time of 100 steps.
"""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from statistics import NormalDist, median, quantiles
from typing import Any

import torch

from benchmarks.shared import embedded_store
from cli import console
from jobs.train.ray_data import make_batch_reader, make_sampler
from vilseg.config import RunConfig
from vilseg.data.batch_reader import WorkerBatch
from vilseg.data.shards import write_tar
from vilseg.data.synthetic import scenes
from vilseg.training import run_setup
from vilseg.training.checkpoints import CheckpointWriter
from vilseg.training.loop import Trainer
from vilseg.training.run_dir import RunDirectory

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
_ROOT = "s3://vilseg/checkpoints"
_PAIRS = 2_000
_EVERY = 100
_STEPS = 10
"""A block; if it has a checkpoint, that is in its middle, and the block waits until it is written."""
_ROUNDS = 64
_SAID_EVERY = 16


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        out: folder for the object store.

    Returns:
        ``ratio`` (images/s with checkpoints over images/s without), ``error`` (standard error of ``ratio``),
        ``seconds_per_checkpoint`` (median over rounds), and ``seconds_of_blocks`` with and without a checkpoint.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with embedded_store(out.absolute() / "store"):
            return _measure()
    finally:
        torch.set_num_threads(threads)


def _measure() -> dict[str, Any]:
    warm_up = _EVERY + _STEPS // 2  # so that the checkpoint of a block lies in its middle
    overrides = [f"data.source={_ROOT}/pairs", f"trainer.storage={_ROOT}/runs", "name=kept", "trainer.workers=1"]
    lengths = [f"trainer.steps={warm_up + 2 * _ROUNDS * _STEPS + 1}", f"trainer.checkpoint_every={_STEPS}"]
    config = RunConfig.load(str(CONFIG), [*overrides, *lengths])
    drawn = scenes.pairs(_PAIRS, 0, config.data.canvas)
    write_tar(f"{_ROOT}/pairs/0.tar", ((p.key, p.image, "jpg", {"captions": list(p.captions)}) for p in drawn))
    folder = run_setup.open_run_directory(config, resume=False)
    prepared = run_setup.prepare(config, folder)
    reader = make_batch_reader(config, prepared, lambda read, bad: None)
    task = next(make_sampler(config, prepared).read_tasks(0, _PAIRS // config.trainer.batch_size))
    batches = list(reader.read(task))
    trainer = run_setup.make_trainer(config, folder, prepared, torch.device("cpu"))
    _block(trainer, folder, batches, warm_up, kept=True)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(1, _ROUNDS + 1):
        for kept in (False, True) if number % 2 else (True, False):  # a steady drift favours neither
            seconds[kept].append(_block(trainer, folder, batches, _STEPS, kept=kept))
        if number % _SAID_EVERY == 0:
            console.log(f"round {number} of {_ROUNDS}: {_cost(seconds)[0]:.3f} s a checkpoint")
    cost, error = _cost(seconds)
    hundred = median(seconds[False]) * _EVERY / _STEPS
    return {
        "benchmark": "checkpoints",
        "ratio": round(hundred / (hundred + cost), 4),
        "error": round(error / hundred, 4),
        "seconds_per_checkpoint": round(cost, 4),
        "seconds_per_100_steps": round(hundred, 2),
        "seconds_of_blocks": {
            "with": [round(s, 3) for s in seconds[True]],
            "without": [round(s, 3) for s in seconds[False]],
        },
        "megabytes": round(folder.manifests()[folder.last_step].bytes / 1e6, 1),
        "every": _EVERY,
    }


def _cost(seconds: dict[bool, list[float]]) -> tuple[float, float]:
    """By how many seconds a block with a checkpoint takes longer than the one beside it: the median, and its standard error
    from the quartiles, as if the middle of the differences were normal."""
    longer = [with_ - without for without, with_ in zip(seconds[False], seconds[True], strict=True)]
    low, middle, high = quantiles(longer, n=4)
    deviation = (high - low) / (2 * NormalDist().inv_cdf(0.75))
    return middle, deviation * math.sqrt(math.pi / 2 / len(longer))


def _block(trainer: Trainer, folder: RunDirectory, batches: list[WorkerBatch], steps: int, *, kept: bool) -> float:
    """Seconds of so many steps, and of what is still being written at their end."""
    end = trainer.step + steps
    started = time.perf_counter()
    with CheckpointWriter(folder, 2, "loss") as writer:
        trainer.train(
            itertools.cycle(batches),
            on_report=lambda metrics: None,
            on_checkpoint=lambda: writer.write(trainer.state_dict(), {}) if kept else None,
            should_stop=lambda: trainer.step >= end,
        )
    return time.perf_counter() - started
