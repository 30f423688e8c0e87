"""The driver's side of a training: Ray's trainer in a thread, progress and Ctrl-C in this one."""

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
from jobs.train.monitor import ProgressUpdate
from vilseg import storage
from vilseg.errors import StoreUnavailable
from vilseg.training.run_dir import RunDirectory

_log = logging.getLogger("vilseg.jobs.train")
_POLL_SECONDS = 0.3
_END_TIMEOUT_S = 30.0
"""How long a trainer may take to end once its run is over: its workers are started anew and find nothing to do."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended."""

    folder: RunDirectory
    metrics: dict[str, float]
    """The last report."""
    stopped: bool
    """Asked to stop before the last step; a checkpoint was left."""


class TrainingSupervisor:
    """Watches a run, which may be of several trainers after one another.

    Args:
        monitor: what workers and readers tell.
        folder: of the run.
        steps: of the whole run.
        progress: told a few times a second what is new.
        should_stop: asked as often; a stop leaves a checkpoint.
    """

    def __init__(
        self,
        monitor: Any,
        folder: RunDirectory,
        steps: int,
        progress: Callable[[ProgressUpdate], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._monitor, self._folder, self._steps = monitor, folder, steps
        self._progress, self._should_stop = progress, should_stop
        self._last: dict[str, float] = {}
        self.asked_to_stop = False
        """By the user, not by a need for other workers."""

    def run(self, trainer: TorchTrainer, pause: Callable[[], bool] = lambda: False) -> TrainingResult:
        """Run a trainer.

        Args:
            trainer: not begun yet.
            pause: asked now and then; where it says yes, the trainer stops with a checkpoint to be followed by another.

        Raises:
            UserError: what a worker or reader found wrong with the user's input.
            KeyboardInterrupt: Ctrl-C for the second time.
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

        # Not Thread.join: interrupted by Ctrl-C, it takes a thread that still runs for one that has ended (Python 3.11).
        ended = threading.Event()
        threading.Thread(target=fit, name="vilseg-train", daemon=True).start()
        stopping = told = False
        with _wait_for_end_on_error(ended), collect_signals() as noted:
            while True:
                over = ended.wait(_POLL_SECONDS)
                self._poll()
                if over:
                    break
                if len(noted) > 1:
                    raise KeyboardInterrupt
                if noted and not told:
                    told = True
                    _log.info("stopping after the next report with a checkpoint; Ctrl-C again stops without one")
                # Asked while it stops for other workers, too: no other trainer is to follow then.
                self.asked_to_stop = self.asked_to_stop or bool(noted) or self._should_stop()
                if not stopping and (self.asked_to_stop or pause()):
                    stopping = True
                    self._monitor.stop.remote()
            self.asked_to_stop = self.asked_to_stop or bool(noted)  # since the last look
        if failure:
            raise find_user_error(failure[0]) or failure[0]
        return TrainingResult(self._folder, self._last, stopping and self._last.get("step", 0) < self._steps)

    def _poll(self) -> None:
        snapshot = ray.get(self._monitor.poll.remote())
        self._last = snapshot.metrics[-1] if snapshot.metrics else self._last
        self._progress(snapshot)
        if snapshot.failure:
            raise snapshot.failure  # the trainer goes on restarting its workers, which find nothing to do


@contextmanager
def _wait_for_end_on_error(ended: threading.Event) -> Iterator[None]:
    """Errors go on once a trainer has ended, or seems not to: Ray is shut down after them, and a thread that is inside one of
    its calls then may take the process with it."""
    try:
        yield
    except BaseException:
        ended.wait(_END_TIMEOUT_S)
        raise


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Every Ctrl-C and SIGTERM while this lasts, noted instead of raised: as an exception inside Ray's calls it may get lost."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted  # signals come to the main thread alone
        return
    before = {number: signal.signal(number, lambda got, frame: noted.append(got)) for number in _SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """A SIGTERM while this lasts raises KeyboardInterrupt as Ctrl-C does, but where :func:`collect_signals` notes both."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class QuarantineFile:
    """``quarantine.jsonl`` of a run: the pairs that could not be read, by key, with the reason; each once."""

    def __init__(self, folder: RunDirectory) -> None:
        self._uri = folder.quarantine
        self._lines: dict[str, str] = {}
        if storage.exists(self._uri):
            self._lines = {json.loads(line)["key"]: line for line in storage.read_text(self._uri).splitlines()}
        self._written = len(self._lines)

    def add(self, bad: list[tuple[str, str]]) -> None:
        """Note more pairs, and write them."""
        for key, reason in bad:
            self._lines.setdefault(key, json.dumps({"key": key, "reason": reason}, ensure_ascii=False))
        try:
            self._write()
        except StoreUnavailable:
            return  # the next call, or `write` at the end, tries again

    def write(self) -> None:
        """Write what is not written yet, waiting for a store that does not answer."""
        with storage.retrying():
            self._write()

    def _write(self) -> None:
        if len(self._lines) > self._written:
            storage.write_text(self._uri, "".join(f"{line}\n" for line in self._lines.values()))
            self._written = len(self._lines)
