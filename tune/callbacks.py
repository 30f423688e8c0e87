"""Callback of Ray Tune that writes the state and the evaluations of each trial to its record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune import Callback, Stopper

from tune.trial_records import TrialRecord, TrialRecords


class TrialCallback(Callback):
    """Writer of the record of every trial.

    Args:
        records: records of the sweep.
        steps: number of training steps of a full trial.
        on_change: function called after a record has changed.
    """

    def __init__(self, records: TrialRecords, steps: int, on_change: Callable[[], None]) -> None:
        self.interrupts: list[int] = []
        """Signals received. After the first one trials end with the status ``running``, so that ``--resume`` continues them."""
        self._records = records
        self._steps = steps
        self._on_change = on_change

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: Tune pickles its callbacks for its own resume feature, which is not used."""
        return {}

    def stopper(self) -> Stopper:
        """Return a Tune stopper that ends all trials after Ctrl-C or SIGTERM."""
        return _StopOnInterrupt(self)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Mark a trial as running; it starts, or continues with the weights of another trial."""
        record = self._record(trial)
        record.status = "running"
        self._save(record)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Add an evaluation to the record of its trial."""
        record = self._record(trial)
        metrics = {name: float(value) for name, value in result.items() if _is_metric(name, value)}
        # A trial resumed after a kill may repeat an evaluation.
        record.curve = [before for before in record.curve if before["step"] < metrics["step"]] + [metrics]
        self._save(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the end of a trial.

        Its status is ``done`` after its last step, or ``stopped`` by the scheduler or the time budget. It stays ``running`` after
        Ctrl-C.
        """
        record = self._record(trial)
        if record.step >= self._steps:
            record.status = "done"
        elif not self.interrupts:
            record.status = "stopped"
        self._save(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the error of a trial; the other trials continue."""
        record = self._record(trial)
        record.error = self._records.read_error(record.number)
        record.status = "failed"
        self._save(record)

    def _record(self, trial: Any) -> TrialRecord:
        number, point = int(str(trial)), dict(trial.config["trial"]["values"])
        record = self._records.trials.get(number) or TrialRecord(number, point)
        record.point = point
        return record

    def _save(self, record: TrialRecord) -> None:
        self._records.save(record)
        self._on_change()


class _StopOnInterrupt(Stopper):
    """Stopper that ends all trials after the first Ctrl-C or SIGTERM and raises KeyboardInterrupt after the second."""

    def __init__(self, callback: TrialCallback) -> None:
        self._callback = callback

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if len(self._callback.interrupts) > 1:
            raise KeyboardInterrupt
        return bool(self._callback.interrupts)


def _is_metric(name: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and name != "pid"
