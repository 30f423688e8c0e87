"""Checkpoints of a run: written beside the training, the newest and the best kept, a half-written one never read.

A checkpoint is a folder ``step-NNNNNNNN`` with ``state.pt`` and ``manifest.json``. The manifest is written last and says how
many bytes the state has: without it, or with another size, the checkpoint does not count (see
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
    """Writes one checkpoint after the other in a thread of its own, so that training goes on meanwhile.

    Use it in a ``with`` statement: its end waits for the last one.

    Args:
        run_dir: of the run.
        keep: the newest so many are kept; None keeps all.
        best_by: figure of a report by which one more is kept, the best so far; see ``TrainerConfig.best_by``.
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
        """Begin to write what training resumes from, as it is now.

        Args:
            state: with the ``step``; its tensors are copied before this returns.
            metrics: of the last report.
            also: what else is written, in the same thread, before the checkpoint counts.

        Raises:
            StorageError: the checkpoint before this one could not be written.
        """
        # One at a time: where storage is slower than training, training waits, and memory holds one copy at most.
        self.wait()
        copied = tree_map_only(torch.Tensor, _copy, state)
        metric_value = metrics.get(self._best_by, math.nan)
        self._writing = self._thread.submit(self._write, copied, metric_value, also)

    def check(self) -> None:
        """Do not wait, but say so if writing failed.

        Raises:
            StorageError: it did.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when all is written.

        Raises:
            StorageError: it could not be; the checkpoints before are intact.
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
    """Write a checkpoint, waiting for a store that does not answer.

    Raises:
        StorageError: it cannot be written; ``DiskFullError`` and ``StoreUnavailable`` are such.
    """
    step = int(state["step"])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()  # no second copy of what may be gigabytes
    storage.write_bytes(run_dir.state(step), data)
    manifest = Manifest(step, len(data), metric_value)
    storage.write_text(run_dir.manifest(step), manifest.to_json())


def delete_checkpoint(run_dir: RunDirectory, step: int) -> None:
    """Delete a checkpoint; cut off in the middle it no longer counts."""
    storage.delete(run_dir.manifest(step))
    storage.delete(run_dir.checkpoint(step))


def require_metric(name: str, metrics: Mapping[str, float]) -> None:
    """Check that reports have the metric ``name``, by which the best checkpoint is chosen.

    Raises:
        ConfigError: the report of a checkpoint has no such figure; the nearest is named.
    """
    if name in metrics:
        return
    near = difflib.get_close_matches(name, metrics, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(metrics))}"
    raise ConfigError(f"trainer.best_by={name} is no figure of this run's reports; {hint}")


def best_step(kept: Mapping[int, Manifest], *, lower_is_better: bool) -> int | None:
    """Step of the checkpoint with the best figure, the later one of equals; None where none has a figure."""
    sign = -1 if lower_is_better else 1
    rated = [
        (sign * manifest.metric_value, step) for step, manifest in kept.items() if manifest.metric_value is not None
    ]
    return max(rated)[1] if rated else None


def read_checkpoint(run_dir: RunDirectory, step: int) -> dict[str, Any]:
    """Read a checkpoint of :func:`write_checkpoint`; tensors and plain numbers only, nothing else is unpickled."""
    return read_state(run_dir.state(step))


def read_state(uri: str) -> dict[str, Any]:
    """As `read_checkpoint`, of the file at ``uri``."""
    data = storage.read_bytes(uri)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
