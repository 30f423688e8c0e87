"""Records of a sweep: one JSON file for each trial, by which a killed sweep is resumed."""

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
    """A trial, its state and its evaluations."""

    number: int
    point: Point
    """Values of the trial; the last ones where population based training changed them."""
    status: Status = "running"
    """``stopped``: by the scheduler or the time budget; ``failed``: see `error`."""
    error: str = ""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Every evaluation: ``step``, ``seconds`` since the trial's start, metrics and losses."""

    @property
    def ended(self) -> bool:
        """True unless the trial is running."""
        return self.status != "running"

    @property
    def step(self) -> int:
        """Step of the last evaluation; 0 where there was none."""
        return int(self.curve[-1]["step"]) if self.curve else 0

    def score(self, objective: str) -> float:
        """Return the objective at the last evaluation; nan where there was none."""
        return float(self.curve[-1].get(objective, math.nan)) if self.curve else math.nan


class TrialRecords:
    """The records of a sweep, on storage below ``uri``; iterating yields them by number."""

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
        """Return the reason that a failed trial left."""
        uri = error_uri(self._uri, number)
        return storage.read_text(uri).partition("\n")[0] if storage.exists(uri) else "its process died"

    def save(self, record: TrialRecord) -> None:
        """Write the record of a trial."""
        self.trials[record.number] = record
        storage.write_text(
            storage.join(self._uri, f"{trial_name(record.number)}.json"), json.dumps(asdict(record), indent=1)
        )


def trial_name(number: int) -> str:
    """Return the name of a trial, its run and its record.

    Example:
        >>> trial_name(7)
        '0007'
    """
    return f"{number:04d}"


def error_uri(records: str, number: int) -> str:
    """Return the URI of the file in which a failing trial leaves its error: a sentence, and below it the traceback."""
    return storage.join(records, f"{trial_name(number)}-error.txt")


@dataclass(frozen=True)
class PointResult:
    """Trials that differ in their seed alone, with their mean score."""

    point: Point
    """Values without the seed."""
    trials: tuple[TrialRecord, ...]
    score: float
    """Mean of the objective over the trials."""


def rank_points(records: Sequence[TrialRecord], objective: str) -> list[PointResult]:
    """Return the points with their trials, the best first.

    Points trained for more steps come before the others, since scores at different steps are not comparable. The steps of a
    point are those of its shortest trial. Failed trials and trials without a score are left out.
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
