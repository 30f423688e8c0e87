"""Output of rank 0 during training: metrics, example images, checkpoints and the model."""

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
from vilseg.training import run_results
from vilseg.training.checkpoints import CheckpointWriter, require_metric
from vilseg.training.loop import Trainer
from vilseg.training.metrics_log import MetricsFile, read_metrics
from vilseg.training.run_dir import RunDirectory

_HELD_OUT_PAIRS = 500
"""Maximum number of held-out pairs for the proxy metrics."""
_EXAMPLES = 6
"""Number of images whose cluster assignments are shown in TensorBoard."""


class TrainingReporter:
    """Writer of a run's metrics, example images, checkpoints and model.

    A context manager; its exit waits until a checkpoint that is being written is complete.

    Args:
        config: configuration of the run.
        run_dir: directory of the run.
        trainer: trainer in the state from which training starts or continues.
        monitor: handle of the run's `TrainingMonitor` actor, which passes reports to the driver.
        sampler: sampler of the run, to compute the epoch of a step.
    """

    def __init__(
        self, config: RunConfig, run_dir: RunDirectory, trainer: Trainer, monitor: Any, sampler: PairSampler
    ) -> None:
        self._config, self._run_dir, self._trainer, self._monitor, self._sampler = (
            config,
            run_dir,
            trainer,
            monitor,
            sampler,
        )
        self._metrics = MetricsFile(run_dir, config, trainer.step)
        self._last_metrics = (read_metrics(run_dir) or [{}])[-1] if trainer.step else {}
        self._examples: np.ndarray | None = None
        settings = config.trainer
        self._writer = CheckpointWriter(run_dir, settings.keep_checkpoints, settings.best_by)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if error is None:
            self._metrics.end()  # only after success: the metrics were synced with the last checkpoint

    def keep_examples(self, batches: Iterator[WorkerBatch]) -> Iterator[WorkerBatch]:
        """Yield the batches unchanged, and keep the first images of the first batch to show their clusters later."""
        for batch in batches:
            if self._examples is None and batch.images.dtype == np.uint8:  # not cached features
                self._examples = np.array(batch.images[:_EXAMPLES])
            yield batch

    def report(self, metrics: dict[str, float]) -> bool:
        """Write metrics and pass them to the driver; return True if the driver requests the run to stop.

        Adds the epoch, the proxy metrics of held-out pairs (at checkpoints) and the monitor's counts to ``metrics``.

        Raises:
            StorageError: the last checkpoint could not be written.
        """
        self._writer.check()  # raise a write error now, since the next checkpoint may be hours away
        step, before = int(metrics["step"]), int(self._last_metrics.get("step", 0))
        every = self._config.trainer.examples_every
        metrics["epoch"] = metrics["samples"] / self._sampler.pairs
        if self._config.data.mix:
            epochs = self._sampler.epochs(int(metrics["samples"]))
            metrics |= {f"epoch/{name}": epoch for name, epoch in epochs.items()}
        unsharded = self._config.trainer.sharding == "none"  # a model sharded by FSDP needs all workers to compute
        if unsharded and self._config.data.held_out and self._is_checkpoint_step(step):
            proxy_metrics = measure(self._trainer.objective.model, self._held_out)
            metrics |= {f"held_out/{name}": value for name, value in proxy_metrics.items()}
        if self._is_checkpoint_step(step):
            require_metric(self._config.trainer.best_by, metrics)
        reply = ray.get(self._monitor.report.remote(metrics))
        metrics |= reply.counts
        self._metrics.add(metrics)
        self._last_metrics = metrics
        if unsharded and every and step // every > before // every:  # a report need not fall on a multiple of it
            self._add_examples(step)
        return reply.stop

    def checkpoint(self) -> None:
        """Start to write a checkpoint, with the metrics of the last report, in the background."""
        self._writer.write(self._trainer.state_dict(), self._last_metrics, also=self._metrics.sync)

    def save_model(self) -> None:
        """Write the trained model to the run directory.

        With FSDP the weights are gathered from all ranks, so every other rank has to call `Trainer.model_weights` at the same
        time.
        """
        weights = self._trainer.model_weights()
        run_results.save_trained_model(
            self._trainer.objective.model, self._config, self._run_dir, self._last_metrics, weights
        )

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
    """Return an image whose upper row holds the images and whose lower row their patches, colored by cluster.

    Args:
        images_BHW3: images, uint8.
        assignments_BKhw: cluster scores per patch.

    Returns:
        Image of shape (2 H, B W, 3), uint8.
    """
    height, width = images_BHW3.shape[1:3]
    clusters_Bhw = assignments_BKhw.argmax(1)
    large_BHW = torch.nn.functional.interpolate(clusters_Bhw[:, None].float(), (height, width), mode="nearest")[:, 0]
    colours = palette(assignments_BKhw.shape[1])[large_BHW.long().numpy()]
    return np.concatenate([np.concatenate(list(images_BHW3), 1), np.concatenate(list(colours), 1)])
