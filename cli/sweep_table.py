"""Progress of ``vilseg tune``: a live table of trials if stderr is a terminal, otherwise one line per evaluation."""

from __future__ import annotations

import math
import time

from rich.live import Live
from rich.table import Table

from cli import console
from tune.search_space import format_value
from tune.trial_records import TrialRecord, trial_name


class SweepTable:
    """Progress of a sweep: a live table of all trials if stderr is a terminal, otherwise one line per evaluation.

    Args:
        steps: number of training steps of a full trial.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._live = Live(console=console.stderr, auto_refresh=False, transient=False)
        self._started = time.monotonic()
        self._printed: dict[int, tuple[str, int]] = {}

    def __enter__(self) -> SweepTable:
        if console.stderr.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, records: list[TrialRecord], objective: str) -> None:
        """Show the current state of all trials."""
        if console.stderr.is_terminal:
            self._live.update(self._table(records, objective), refresh=True)
            return
        for record in records:
            now = (record.status, record.step)
            if now != self._printed.get(record.number, ("running", 0)):
                self._printed[record.number] = now
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
