"""What is kept of a sweep: one JSON file a trial, so that a sweep that was killed knows what is done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from tune.search_space import SEED, Point, identity
from vilseg import storage

Status = Literal["running", "done", "stopped", "failed"]


@dataclass
class TrialRecord:
    """A trial and what came of it."""

    number: int
    point: Point
    """The last one, where population based training changed it on the way."""
    status: Status = "running"
    """``stopped`` by the scheduler or the end of the time; ``failed`` with an `error`."""
    error: str = ""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Every evaluation: ``step``, ``seconds`` of the trial, the figures, losses."""

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come."""
        return self.status != "running"

    @property
    def step(self) -> int:
        """Step of the last evaluation."""
        return int(self.curve[-1]["step"]) if self.curve else 0

    def score(self, objective: str) -> float:
        """The objective at the last evaluation; nan where there was none."""
        return float(self.curve[-1].get(objective, math.nan)) if self.curve else math.nan


class TrialRecords:
    """The trials of a sweep, on storage below ``uri``."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.trials: dict[int, TrialRecord] = {}
        if storage.exists(uri):
            for entry in storage.list_files(uri, suffixes=(".json",)):
                record = TrialRecord(**json.loads(storage.read_text(entry.uri)))
                self.trials[record.number] = record

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(sorted(self.trials.values(), key=lambda record: record.number))

    def error(self, number: int) -> str:
        """Why a trial failed, as far as it could tell."""
        uri = error_uri(self._uri, number)
        return storage.read_text(uri).partition("\n")[0] if storage.exists(uri) else "its process died"

    def keep(self, record: TrialRecord) -> None:
        """Write a trial as it stands."""
        self.trials[record.number] = record
        storage.write_text(
            storage.join(self._uri, f"{trial_name(record.number)}.json"), json.dumps(asdict(record), indent=1)
        )


def trial_name(number: int) -> str:
    """Name of a trial, of its run and of its record."""
    return f"{number:04d}"


def error_uri(records: str, number: int) -> str:
    """Where a trial that fails leaves its error: a sentence, and below it the traceback."""
    return storage.join(records, f"{trial_name(number)}-error.txt")


@dataclass(frozen=True)
class PointResult:
    """Trials that differ in their seed alone."""

    point: Point
    """Without the seed."""
    trials: tuple[TrialRecord, ...]
    score: float
    """Mean of the objective."""


def groups(records: Sequence[TrialRecord], objective: str) -> list[PointResult]:
    """Trials by point, the best first: those that made most steps before the others, as scores of different steps say little.

    Trials without a score are left out; a point counts as far trained as the one of its repeats that made fewest steps.
    """
    by_point: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.status != "failed" and math.isfinite(record.score(objective)):
            by_point.setdefault(identity(_without_seed(record.point)), []).append(record)
    found = [
        PointResult(_without_seed(same[0].point), tuple(same), fmean(record.score(objective) for record in same))
        for same in by_point.values()
    ]
    return sorted(found, key=lambda group: (-min(trial.step for trial in group.trials), -group.score))


def _without_seed(point: Point) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key != SEED}
