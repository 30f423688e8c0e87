"""What the first training worker tells: reports, pictures, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
import torch

from vilseg.config import RunConfig
from vilseg.data.batch_reader import WorkerBatch
from vilseg.data.sampler import PairSampler
from vilseg.evaluation.proxy_metrics import HeldOut, measure
from vilseg.segmentation.visualization import palette
from vilseg.training import run_setup
from vilseg.training.checkpoints import CheckpointWriter, require_metric
from vilseg.training.loop import Trainer
from vilseg.training.metrics_log import MetricsFile, read_metrics
from vilseg.training.run_dir import RunDirectory

_HELD_OUT_PAIRS = 500
_EXAMPLES = 6
"""Pictures whose clusters are shown."""


class TrainingReporter:
    """What a run leaves behind while it trains; use it in a ``with`` statement, whose end waits for what is being written.

    Args:
        config: of the run.
        folder: of the run.
        trainer: as it stands when training begins or goes on.
        monitor: tells the driver.
        order: says which epoch it is.
    """

    def __init__(
        self, config: RunConfig, folder: RunDirectory, trainer: Trainer, monitor: Any, order: PairSampler
    ) -> None:
        self._config, self._folder, self._trainer, self._monitor, self._order = config, folder, trainer, monitor, order
        self._metrics = MetricsFile(folder, config, trainer.step)
        self._last = (read_metrics(folder) or [{}])[-1] if trainer.step else {}
        self._examples: np.ndarray | None = None
        settings = config.trainer
        self._writer = CheckpointWriter(folder, settings.keep_checkpoints, settings.best_by)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if error is None:
            self._metrics.end()  # what it has to tell went out with the last checkpoint

    def keep_examples(self, batches: Iterator[WorkerBatch]) -> Iterator[WorkerBatch]:
        """The batches as they are; pictures of the first are shown later."""
        for batch in batches:
            if self._examples is None and batch.images.dtype == np.uint8:  # cached features are no pictures
                self._examples = np.array(batch.images[:_EXAMPLES])
            yield batch

    def report(self, metrics: dict[str, float]) -> bool:
        """Pass a report on; answers whether the run shall stop.

        Raises:
            StorageError: the last checkpoint could not be written.
        """
        self._writer.check()  # not only when the next is due, which may be hours away
        step, before = int(metrics["step"]), int(self._last.get("step", 0))
        every = self._config.trainer.examples_every
        metrics["epoch"] = metrics["samples"] / self._order.pairs
        if self._config.data.mix:
            epochs = self._order.epochs(int(metrics["samples"]))
            metrics |= {f"epoch/{name}": epoch for name, epoch in epochs.items()}
        alone = self._config.trainer.sharding == "none"  # sharded weights compute only where all workers do
        if alone and self._config.data.held_out and self._is_checkpoint_step(step):
            found = measure(self._trainer.objective.model, self._held_out)
            metrics |= {f"held_out/{name}": value for name, value in found.items()}
        if self._is_checkpoint_step(step):
            require_metric(self._config.trainer.best_by, metrics)
        answer = ray.get(self._monitor.report.remote(metrics))
        metrics |= answer.counts
        self._metrics.add(metrics)
        self._last = metrics
        if alone and every and step // every > before // every:  # reports need not come at its multiples
            self._add_examples(step)
        return answer.stop

    def checkpoint(self) -> None:
        """Begin to write a checkpoint with the reports so far."""
        self._writer.write(self._trainer.state_dict(), self._last, also=self._metrics.sync)

    def save_model(self) -> None:
        """Write the trained model."""
        weights = self._trainer.model_weights()
        run_setup.save_trained_model(self._trainer.objective.model, self._config, self._folder, self._last, weights)

    def _is_checkpoint_step(self, step: int) -> bool:
        return step % self._config.trainer.checkpoint_every == 0 or step == self._config.trainer.steps

    @cached_property
    def _held_out(self) -> HeldOut:
        assert self._config.data.held_out is not None
        side, columns = self._config.segmentation.input_size, self._config.data.columns
        return HeldOut.load(self._config.data.held_out, side=side, columns=columns, limit=_HELD_OUT_PAIRS)

    @torch.no_grad()
    def _add_examples(self, step: int) -> None:
        if self._examples is None:
            return
        model = self._trainer.objective.model
        training = model.training
        images_B3HW = torch.from_numpy(self._examples).to(model.device).permute(0, 3, 1, 2).float() / 255
        assignments_BKhw = model.eval().assignments(images_B3HW)
        model.train(training)
        self._metrics.add_image("clusters", _image_grid(self._examples, assignments_BKhw.cpu()), step)


def _image_grid(images_BHW3: np.ndarray, assignments_BKhw: torch.Tensor) -> np.ndarray:
    """Pictures in a row, and below them their patches in the colours of their clusters. Shape: -> (2 H, B W, 3) uint8."""
    height, width = images_BHW3.shape[1:3]
    clusters_Bhw = assignments_BKhw.argmax(1)
    large_BHW = torch.nn.functional.interpolate(clusters_Bhw[:, None].float(), (height, width), mode="nearest")[:, 0]
    colours = palette(assignments_BKhw.shape[1])[large_BHW.long().numpy()]
    return np.concatenate([np.concatenate(list(images_BHW3), 1), np.concatenate(list(colours), 1)])
