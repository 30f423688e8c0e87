"""Checkpoints of a run: written in the background, the newest and the best are kept, an incomplete one is never read.

A checkpoint is a folder ``step-NNNNNNNN`` with ``state.pt`` and ``manifest.json``. The manifest is written last and has the size
of the state in bytes. A checkpoint without a manifest, or with a state of another size, is ignored as incomplete (see
:meth:`~vilseg.training.run_dir.RunDirectory.checkpoint_steps`).
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map_only

from vilseg import storage
from vilseg.errors import ConfigError
from vilseg.training.run_dir import Manifest, RunDirectory


class CheckpointWriter:
    """Writer of checkpoints in a background thread, one at a time, while training continues.

    Use it in a ``with`` statement: the end of the block waits until the last checkpoint is written.

    Args:
        run_dir: directory of the run.
        keep: number of newest checkpoints to keep; None keeps all.
        best_by: name of the metric that chooses the best checkpoint, which is kept too; see ``TrainerConfig.best_by``.
    """

    def __init__(self, run_dir: RunDirectory, keep: int | None, best_by: str) -> None:
        self._run_dir, self._keep, self._best_by = run_dir, keep, best_by
        self._thread = storage.ThreadPool(1, thread_name_prefix="vilseg-checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)

    def write(
        self, state: dict[str, Any], metrics: dict[str, float], *, also: Callable[[], None] = lambda: None
    ) -> None:
        """Start to write a checkpoint in the background thread; first wait until the previous one is written.

        Args:
            state: state that training resumes from, with its ``step``. Its tensors are copied before this returns.
            metrics: metrics of the last report, from which the value of ``best_by`` is stored with the checkpoint.
            also: function that writes other files; called in the background thread, before the checkpoint is written.

        Raises:
            StorageError: the previous checkpoint could not be written; this one is not started.
        """
        # One at a time: if storage is slower than training, training waits, and memory holds at most one copy.
        self.wait()
        copied = tree_map_only(torch.Tensor, _copy, state)
        metric_value = metrics.get(self._best_by, math.nan)
        self._writing = self._thread.submit(self._write, copied, metric_value, also)

    def check(self) -> None:
        """Raise the error of a failed write, without waiting for one that is still running.

        Raises:
            StorageError: the last checkpoint could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            StorageError: the last checkpoint could not be written; earlier checkpoints are intact.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, state: dict[str, Any], metric_value: float, also: Callable[[], None]) -> None:
        also()
        write_checkpoint(self._run_dir, state, metric_value=metric_value if math.isfinite(metric_value) else None)
        self._prune()

    def _prune(self) -> None:
        if self._keep is None:
            return
        kept = self._run_dir.manifests()
        best = best_step(kept, lower_is_better=self._best_by.startswith("loss"))
        for step in sorted(kept)[: -self._keep]:
            if step != best:
                delete_checkpoint(self._run_dir, step)


def write_checkpoint(run_dir: RunDirectory, state: dict[str, Any], *, metric_value: float | None = None) -> None:
    """Write a checkpoint; requests are repeated while the object store does not answer.

    Args:
        run_dir: directory of the run.
        state: state that training resumes from, with its ``step``.
        metric_value: value of the metric that chooses the best checkpoint; None if there is none.

    Raises:
        StorageError: the checkpoint cannot be written; ``DiskFullError`` and ``StoreUnavailable`` are subclasses.
    """
    step = int(state["step"])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()  # no second copy of what may be gigabytes
    storage.write_bytes(run_dir.state(step), data)
    manifest = Manifest(step, len(data), metric_value)
    storage.write_text(run_dir.manifest(step), manifest.to_json())


def delete_checkpoint(run_dir: RunDirectory, step: int) -> None:
    """Delete a checkpoint, its manifest first, so that an interrupted deletion leaves an incomplete checkpoint."""
    storage.delete(run_dir.manifest(step))
    storage.delete(run_dir.checkpoint(step))


def require_metric(name: str, metrics: Mapping[str, float]) -> None:
    """Check that reports have the metric ``name``, which chooses the best checkpoint.

    Raises:
        ConfigError: ``metrics`` has no such name; the message suggests the most similar one.
    """
    if name in metrics:
        return
    near = difflib.get_close_matches(name, metrics, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(metrics))}"
    raise ConfigError(f"trainer.best_by={name} is no figure of this run's reports; {hint}")


def best_step(kept: Mapping[int, Manifest], *, lower_is_better: bool) -> int | None:
    """Return the step of the checkpoint with the best metric value; None if no checkpoint has a value.

    Args:
        kept: manifests of the checkpoints, by step. Of checkpoints with equal values the latest is chosen.
        lower_is_better: True if the smallest value is the best.
    """
    sign = -1 if lower_is_better else 1
    rated = [
        (sign * manifest.metric_value, step) for step, manifest in kept.items() if manifest.metric_value is not None
    ]
    return max(rated)[1] if rated else None


def read_checkpoint(run_dir: RunDirectory, step: int) -> dict[str, Any]:
    """Read a checkpoint that :func:`write_checkpoint` wrote; only tensors and plain Python values are unpickled."""
    return read_state(run_dir.state(step))


def read_state(uri: str) -> dict[str, Any]:
    """Read the state file of a checkpoint at ``uri``, as :func:`read_checkpoint` does."""
    data = storage.read_bytes(uri)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
