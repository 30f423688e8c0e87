"""Callbacks of Ray Tune: write what happens to each trial into its record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune import Callback, Stopper

from tune.trial_records import TrialRecord, TrialRecords


class TrialCallback(Callback):
    """Keeps the record of every trial.

    Args:
        records: of the sweep.
        steps: that a trial makes.
        news: called when any record has changed.
    """

    def __init__(self, records: TrialRecords, steps: int, news: Callable[[], None]) -> None:
        self.interrupts: list[int] = []
        """Every Ctrl-C; the first lets trials leave as they stand, for --resume."""
        self._records = records
        self._steps = steps
        self._news = news

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles all it is given, for a way of resuming that is not used here."""
        return {}

    def stopper(self) -> Stopper:
        """Ends all trials after Ctrl-C."""
        return _Interrupted(self)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins, or goes on with what another has handed over."""
        record = self._record(trial)
        record.status = "running"
        self._keep(record)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluation."""
        record = self._record(trial)
        figures = {name: float(value) for name, value in result.items() if _is_figure(name, value)}
        # A trial that goes on after a kill may make an evaluation once more.
        record.curve = [before for before in record.curve if before["step"] < figures["step"]] + [figures]
        self._keep(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The last step, the scheduler's verdict, the end of the time, or Ctrl-C."""
        record = self._record(trial)
        if record.step >= self._steps:
            record.status = "done"
        elif not self.interrupts:
            record.status = "stopped"
        self._keep(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; the others go on."""
        record = self._record(trial)
        record.error = self._records.error(record.number)
        record.status = "failed"
        self._keep(record)

    def _record(self, trial: Any) -> TrialRecord:
        number, point = int(str(trial)), dict(trial.config["trial"]["values"])
        record = self._records.trials.get(number) or TrialRecord(number, point)
        record.point = point
        return record

    def _keep(self, record: TrialRecord) -> None:
        self._records.keep(record)
        self._news()


class _Interrupted(Stopper):
    def __init__(self, watch: TrialCallback) -> None:
        self._watch = watch

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if len(self._watch.interrupts) > 1:
            raise KeyboardInterrupt
        return bool(self._watch.interrupts)


def _is_figure(name: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and name != "pid"
