"""Trainings of the demo's model on synthetic scenes in this process, without Ray, for benchmarks that need many of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from cli import console
from jobs.train.ray_data import read_batches_locally
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.shards import write_index, write_tar
from vilseg.data.synthetic import scenes
from vilseg.model import ViLSeg
from vilseg.training import run_setup

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
UNSEEN = 200
"""Scenes with masks, none of which is among the pairs."""
_PAIRS, _SHARD = 24_000, 2_000


def draw(out: Path) -> None:
    """Write training pairs and unseen scenes with masks to ``out``, unless an earlier run has written them."""
    size = config(out).data.canvas
    if (out / "unseen" / "classes.txt").exists():
        return
    console.log("[scenes]")
    write_pairs(f"{out}/pairs", _PAIRS, _SHARD, size)
    scenes.write_masked_dataset(f"{out}/unseen", UNSEEN, 0, size)


def write_pairs(folder: str, pairs: int, shard: int, size: int) -> None:
    """Write pairs of synthetic scenes as shards with an index.

    Args:
        folder: folder for the shards.
        pairs: number of pairs in total.
        shard: number of pairs per shard.
        size: side of the square images in pixels.
    """
    shards = []
    for start in range(0, pairs, shard):
        drawn = scenes.pairs(shard, 0, size, start=start)
        members = ((pair.key, pair.image, "jpg", {"captions": list(pair.captions)}) for pair in drawn)
        name = f"{start // shard:02d}.tar"
        shards.append((name, write_tar(f"{folder}/{name}", members)))
    write_index(folder, shards)


def config(out: Path, *overrides: str) -> RunConfig:
    """Return the demo's configuration with the pairs in ``out``, one worker and further overrides."""
    fixed = [f"data.source={out}/pairs", f"trainer.storage={out}/runs", "trainer.workers=1"]
    return RunConfig.load(str(CONFIG), [*fixed, *overrides])


def train(config: RunConfig, on_checkpoint: Callable[[ViLSeg, int], None] = lambda model, step: None) -> ViLSeg:
    """Train a model in this process and return it; the run directory is deleted.

    Args:
        config: configuration with a name.
        on_checkpoint: function called at every checkpoint step with the model and the number of steps done; it may set the
            model to evaluation mode.
    """
    storage.delete(f"{config.trainer.storage}/{config.name}")  # what was left of it when the benchmark was interrupted
    folder = run_setup.open_run_directory(config, resume=False)
    prepared = run_setup.prepare(config, folder)
    trainer = run_setup.make_trainer(config, folder, prepared, torch.device("cpu"))
    model = trainer.objective.model

    def measure() -> None:
        on_checkpoint(model, trainer.step)
        model.train()

    trainer.train(read_batches_locally(config, prepared), on_report=lambda metrics: None, on_checkpoint=measure)
    storage.delete(folder.uri)
    return model
