"""Records of a sweep: one JSON file per trial, from which a killed sweep is resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from tune.search_space import SEED, Point, point_key
from vilseg import storage

Status = Literal["running", "done", "stopped", "failed"]


@dataclass
class TrialRecord:
    """Record of a trial: its point, state and evaluations."""

    number: int
    point: Point
    """Values of the trial by configuration key; population based training may change them, then the last ones."""
    status: Status = "running"
    """``done`` after the last step, ``stopped`` by the scheduler or the time budget, ``failed`` by `error`."""
    error: str = ""
    """Reason in one sentence if the trial failed."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Values of every evaluation: ``step``, ``seconds`` since the trial's start, metrics and losses."""

    @property
    def ended(self) -> bool:
        """True if the trial is done, stopped or failed."""
        return self.status != "running"

    @property
    def step(self) -> int:
        """Step of the last evaluation; 0 if there was none."""
        return int(self.curve[-1]["step"]) if self.curve else 0

    def score(self, objective: str) -> float:
        """Return the objective at the last evaluation; nan if there was none."""
        return float(self.curve[-1].get(objective, math.nan)) if self.curve else math.nan


class TrialRecords:
    """Records of a sweep, stored in the folder ``uri``; iteration yields them in the order of their numbers."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.trials: dict[int, TrialRecord] = {}
        if storage.exists(uri):
            for entry in storage.list_files(uri, suffixes=(".json",)):
                record = TrialRecord(**json.loads(storage.read_text(entry.uri)))
                self.trials[record.number] = record

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(sorted(self.trials.values(), key=lambda record: record.number))

    def read_error(self, number: int) -> str:
        """Return the error of a failed trial in one sentence."""
        uri = error_uri(self._uri, number)
        return storage.read_text(uri).partition("\n")[0] if storage.exists(uri) else "its process died"

    def save(self, record: TrialRecord) -> None:
        """Write the record of a trial to storage."""
        self.trials[record.number] = record
        storage.write_text(
            storage.join(self._uri, f"{trial_name(record.number)}.json"), json.dumps(asdict(record), indent=1)
        )


def trial_name(number: int) -> str:
    """Return the name of a trial, which is also that of its run and its record.

    Example:
        >>> trial_name(7)
        '0007'
    """
    return f"{number:04d}"


def error_uri(records: str, number: int) -> str:
    """Return the URI of the file to which a failing trial writes its error: one sentence, then the traceback."""
    return storage.join(records, f"{trial_name(number)}-error.txt")


@dataclass(frozen=True)
class PointResult:
    """Result of a point: its trials, which differ only in their seed, and their mean score."""

    point: Point
    """Values without the seed."""
    trials: tuple[TrialRecord, ...]
    score: float
    """Mean of the objective over the trials."""


def rank_points(records: Sequence[TrialRecord], objective: str) -> list[PointResult]:
    """Group trials that differ only in their seed, and return the points with their mean scores, best first.

    Points trained for more steps come before points trained for fewer, since scores at different steps are not comparable. The
    number of steps of a point is that of its shortest trial. Failed trials and trials without a score are left out.
    """
    by_point: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.status != "failed" and math.isfinite(record.score(objective)):
            by_point.setdefault(point_key(_without_seed(record.point)), []).append(record)
    points = [
        PointResult(_without_seed(same[0].point), tuple(same), fmean(record.score(objective) for record in same))
        for same in by_point.values()
    ]
    return sorted(points, key=lambda point: (-min(trial.step for trial in point.trials), -point.score))


def _without_seed(point: Point) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key != SEED}
