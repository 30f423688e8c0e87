"""Ray Tune's news, written into the records; and the table of trials that is shown while a sweep runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback, Stopper
from rich.live import Live
from rich.table import Table

from cli import console
from tune.trial_records import TrialRecord, TrialRecords, trial_name


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


class SweepTable:
    """Shows a sweep: a table of all trials on a terminal, a line for each evaluation elsewhere."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._live = Live(console=console.stderr, auto_refresh=False, transient=False)
        self._started = time.monotonic()
        self._said: dict[int, tuple[str, int]] = {}

    def __enter__(self) -> SweepTable:
        if console.stderr.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, records: list[TrialRecord], objective: str) -> None:
        """Show what is new."""
        if console.stderr.is_terminal:
            self._live.update(self._table(records, objective), refresh=True)
            return
        for record in records:
            now = (record.status, record.step)
            if now != self._said.get(record.number, ("running", 0)):
                self._said[record.number] = now
                console.log(self._line(record, objective))

    def _line(self, record: TrialRecord, objective: str) -> str:
        values = "  ".join(f"{key}={format_value(value)}" for key, value in record.point.items())
        text = f"trial {trial_name(record.number)}  {values}"
        if record.status == "failed":
            return f"{text}  failed: {record.error}"
        score = record.score(objective)
        measured = f"  {objective} {score:.4f}" if math.isfinite(score) else ""
        ended = "" if record.status == "running" else f"  {record.status}"
        return f"{text}  step {record.step}/{self._steps}{measured}{ended}"

    def _table(self, records: list[TrialRecord], objective: str) -> Table:
        keys = list(dict.fromkeys(key for record in records for key in record.point))
        ended = sum(record.ended for record in records)
        title = f"{ended} of {len(records)} trials begun have ended, {console.format_duration(time.monotonic() - self._started)}"
        table = Table(title=title, title_justify="left")
        for name in ("trial", *keys, "step", objective, ""):
            table.add_column(name, justify="left" if name == "" else "right")
        best = max((r.score(objective) for r in records if r.status != "failed" and r.curve), default=math.nan)
        for record in records:
            score = record.score(objective)
            style = "bold green" if score == best else "dim" if record.status in ("stopped", "failed") else None
            table.add_row(
                trial_name(record.number),
                *(format_value(record.point.get(key, "")) for key in keys),
                f"{record.step}/{self._steps}",
                f"{score:.4f}" if math.isfinite(score) else "",
                record.error if record.status == "failed" else record.status,
                style=style,
            )
        return table


def format_value(value: Any) -> str:
    """A value of a point, for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
