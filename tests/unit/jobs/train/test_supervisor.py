"""Ctrl-C and SIGTERM around a training, without Ray."""

import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.train import supervisor
from jobs.train.monitor import ProgressUpdate
from jobs.train.supervisor import TrainingSupervisor, sigterm_as_ctrl_c
from vilseg.training.run_dir import RunDirectory


class FakeMonitor:
    """Answers at once; a stop ends the trainer some polls later."""

    def __init__(self) -> None:
        self.stopped, self.end, self.polls = 0, threading.Event(), 0
        names = ("clear_stop", "request_stop", "poll")
        self.clear_stop, self.request_stop, self.poll = (
            SimpleNamespace(remote=getattr(self, f"_{name}")) for name in names
        )

    def _clear_stop(self) -> None:
        return None

    def _request_stop(self) -> None:
        self.stopped += 1

    def _poll(self) -> ProgressUpdate:
        self.polls += 1
        if self.polls == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # after the pause was begun
        if self.polls == 6:
            self.end.set()
        return ProgressUpdate()


def test_a_signal_while_a_run_stops_for_more_workers_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(supervisor.ray, "get", lambda answer: answer)
    monitor = FakeMonitor()
    trainer: Any = SimpleNamespace(fit=lambda: monitor.end.wait(10))
    supervised = TrainingSupervisor(monitor, RunDirectory("run"), 10, lambda update: None, lambda: False)
    result = supervised.run(trainer, pause=lambda: True)
    assert result.stopped
    assert supervised.asked_to_stop
    assert monitor.stopped == 1


def test_sigterm_interrupts_what_goes_on_around_a_training() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
