"""Training with a checkpoint on S3 every 100 steps against the same steps without: images/s of one worker.

The demo's model on batches in memory, one thread for its networks; blocks of both kinds alternate. The checkpoints go to the
embedded object store, which runs on the same machine, as does the thread that writes them.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.shared import embedded_store
from jobs import console
from jobs.feed import batch_reader, pair_order
from vilseg.config import RunConfig
from vilseg.data import scenes
from vilseg.data.pairs import write_tar
from vilseg.data.stream import WorkerBatch
from vilseg.training import run
from vilseg.training.checkpoints import CheckpointWriter
from vilseg.training.folder import RunFolder
from vilseg.training.loop import Trainer

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
_ROOT = "s3://vilseg/checkpoints"
_PAIRS = 2_000
_EVERY = 100
_STEPS = 200
"""A block; two checkpoints fall into one that has any, and the block waits for the last of them."""
_ROUNDS = 4


def main(out: Path) -> dict[str, Any]:
    """Run the measurement; ``out`` keeps the object store.

    Returns:
        ``ratio`` (images/s with checkpoints over those without, median of the rounds) and the raw figures.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with embedded_store(out.absolute() / "store"):
            return _measure()
    finally:
        torch.set_num_threads(threads)


def _measure() -> dict[str, Any]:
    steps = 2 * _ROUNDS * _STEPS + _EVERY
    overrides = [f"data.source={_ROOT}/pairs", f"trainer.storage={_ROOT}/runs", "name=kept", "trainer.workers=1"]
    config = RunConfig.load(str(CONFIG), [*overrides, f"trainer.steps={steps}", f"trainer.checkpoint_every={_EVERY}"])
    drawn = scenes.pairs(_PAIRS, 0, config.data.canvas)
    write_tar(f"{_ROOT}/pairs/0.tar", ((p.key, p.image, "jpg", {"captions": list(p.captions)}) for p in drawn))
    folder = run.open_folder(config, resume=False)
    prepared = run.prepare(config, folder)
    reader = batch_reader(config, prepared, lambda read, bad: None)
    chunk = next(pair_order(config, prepared).chunks(0, _PAIRS // config.trainer.batch_size))
    batches = list(reader.read(chunk))
    trainer = run.make_trainer(config, folder, prepared, torch.device("cpu"))
    _block(trainer, folder, batches, _EVERY, kept=False)  # warm-up
    rates: dict[bool, list[float]] = {False: [], True: []}
    for number, kept in itertools.product(range(_ROUNDS), (False, True)):
        seconds = _block(trainer, folder, batches, _STEPS, kept=kept)
        rates[kept].append(_STEPS * config.trainer.batch_size / seconds)
        console.say(f"round {number}, {'with' if kept else 'without'} checkpoints: {rates[kept][-1]:.1f} images/s")
    ratios = [with_ / without for without, with_ in zip(rates[False], rates[True], strict=True)]
    return {
        "benchmark": "checkpoints",
        "ratio": round(median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "images_per_second": {
            "with": [round(r, 1) for r in rates[True]],
            "without": [round(r, 1) for r in rates[False]],
        },
        "megabytes": round(folder.manifests()[folder.last_step].bytes / 1e6, 1),
        "every": _EVERY,
    }


def _block(trainer: Trainer, folder: RunFolder, batches: list[WorkerBatch], steps: int, *, kept: bool) -> float:
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
