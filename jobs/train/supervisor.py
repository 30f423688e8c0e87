"""Supervisor of a training on the driver: runs Ray's trainer in a thread, polls the training monitor and handles Ctrl-C."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchTrainer

from cluster.ray_session import find_user_error
from jobs.train.monitor import BadPairId, ProgressUpdate
from vilseg import storage
from vilseg.errors import StoreUnavailable
from vilseg.training.run_dir import RunDirectory

_log = logging.getLogger("vilseg.jobs.train")
_POLL_SECONDS = 0.3
_END_TIMEOUT_S = 30.0
"""Seconds to wait for Ray's trainer to end after an error; its restarted workers return at once."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training."""

    run_dir: RunDirectory
    metrics: dict[str, float]
    """Metrics of the last report."""
    stopped: bool
    """The run stopped before its last step, with a checkpoint."""


class TrainingSupervisor:
    """Supervisor of a run, which may consist of several of Ray's trainers, one after another.

    Args:
        monitor: handle of the run's `TrainingMonitor` actor.
        run_dir: directory of the run.
        steps: number of steps of the whole run.
        progress: function called a few times per second with the `ProgressUpdate` that polling the monitor returned.
        should_stop: function called as often as ``progress``; once it returns True, the run stops with a checkpoint.
    """

    def __init__(
        self,
        monitor: Any,
        run_dir: RunDirectory,
        steps: int,
        progress: Callable[[ProgressUpdate], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._monitor, self._run_dir, self._steps = monitor, run_dir, steps
        self._progress, self._should_stop = progress, should_stop
        self._last_metrics: dict[str, float] = {}
        self.asked_to_stop = False
        """Ctrl-C, SIGTERM or ``should_stop`` requested the run to stop; False if it stops only to continue with more workers."""

    def run(self, trainer: TorchTrainer, pause: Callable[[], bool] = lambda: False) -> TrainingResult:
        """Run a trainer to its end.

        Args:
            trainer: trainer that is not started yet.
            pause: function called a few times per second; once it returns True, the trainer stops with a checkpoint, from which
                another trainer can continue.

        Raises:
            UserError: a worker or reader found an error in the user's input.
            KeyboardInterrupt: Ctrl-C or SIGTERM was received for the second time.
        """
        ray.get(self._monitor.clear_stop.remote())
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # noqa: BLE001  (handed to the caller below)
                failure.append(error)
            finally:
                ended.set()

        # Not Thread.join, which may return while the thread still runs if Ctrl-C interrupts it (Python 3.11).
        ended = threading.Event()
        threading.Thread(target=fit, name="vilseg-train", daemon=True).start()
        stopping = announced = False
        with _wait_for_end_on_error(ended), collect_signals() as signals:
            while True:
                is_over = ended.wait(_POLL_SECONDS)
                self._poll()
                if is_over:
                    break
                if len(signals) > 1:
                    raise KeyboardInterrupt
                if signals and not announced:
                    announced = True
                    _log.info("stopping after the next report with a checkpoint; Ctrl-C again stops without one")
                # Also checked while the run stops to continue with more workers: then no other trainer may follow.
                self.asked_to_stop = self.asked_to_stop or bool(signals) or self._should_stop()
                if not stopping and (self.asked_to_stop or pause()):
                    stopping = True
                    self._monitor.request_stop.remote()
            self.asked_to_stop = self.asked_to_stop or bool(signals)  # signals received since the last poll
        if failure:
            raise find_user_error(failure[0]) or failure[0]
        finished = self._last_metrics.get("step", 0) >= self._steps
        return TrainingResult(self._run_dir, self._last_metrics, stopping and not finished)

    def _poll(self) -> None:
        update = ray.get(self._monitor.poll.remote())
        self._last_metrics = update.metrics[-1] if update.metrics else self._last_metrics
        self._progress(update)
        if update.failure:
            raise update.failure  # not waiting for Ray, which restarts the workers up to its limit; they return at once


@contextmanager
def _wait_for_end_on_error(ended: threading.Event) -> Iterator[None]:
    """On an error, wait until the trainer's thread has ended, at most `_END_TIMEOUT_S` seconds, and raise the error again.

    The caller shuts Ray down after an error; a thread that is inside one of Ray's calls could then crash the process.
    """
    try:
        yield
    except BaseException:
        ended.wait(_END_TIMEOUT_S)
        raise


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Append the number of each signal (Ctrl-C, SIGTERM) in the ``with`` block to the yielded list, and raise no exception.

    An exception raised inside one of Ray's calls could get lost. Outside the main thread the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread receives signals
        return
    before = {number: signal.signal(number, lambda got, frame: received.append(got)) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM as on Ctrl-C, except inside :func:`collect_signals`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class QuarantineFile:
    """``quarantine.jsonl`` of a run: the pairs that could not be read, each once, with ``key``, ``reason`` and ``shard``."""

    def __init__(self, run_dir: RunDirectory) -> None:
        self._uri = run_dir.quarantine
        self._lines: dict[BadPairId, str] = {}
        if storage.exists(self._uri):
            for line in storage.read_text(self._uri).splitlines():
                entry = json.loads(line)
                self._lines[entry["key"], entry.get("shard", "")] = line  # earlier versions wrote no shard
        self._written = len(self._lines)

    def add(self, bad: dict[BadPairId, str]) -> None:
        """Add pairs with their reasons, and write the file; if the store does not answer, a later call writes it."""
        for (key, shard), reason in bad.items():
            entry = {"key": key, "reason": reason, "shard": shard}
            self._lines.setdefault((key, shard), json.dumps(entry, ensure_ascii=False))
        try:
            self._write()
        except StoreUnavailable:
            return  # written by the next call, or by `write` at the end

    def write(self) -> None:
        """Write the pairs that are not written yet; retry while the store does not answer."""
        with storage.retrying():
            self._write()

    def _write(self) -> None:
        if len(self._lines) > self._written:
            storage.write_text(self._uri, "".join(f"{line}\n" for line in self._lines.values()))
            self._written = len(self._lines)
