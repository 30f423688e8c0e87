"""What a running training tells its driver: metrics, pairs that could not be read, and the wish to stop."""

from __future__ import annotations

from dataclasses import dataclass, field

import ray

_MIN_PAIRS = 500
"""A share of bad pairs means little before so many were read."""


@dataclass
class ProgressUpdate:
    """What happened since the last look."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    read: int = 0
    bad_total: int = 0
    failure: Exception | None = None
    """A user's mistake that a worker met; the run is over."""


@dataclass(frozen=True)
class ReportReply:
    """To a report."""

    stop: bool
    """Whether the run shall stop."""
    counts: dict[str, float]
    """What else is known of the run so far, for the report."""


class BadPairCounter:
    """How many pairs were read, how many of them could not be, and whether these are too many."""

    def __init__(self, max_bad_share: float) -> None:
        self.read = self.bad = 0
        self._max_bad_share = max_bad_share

    def add(self, read: int, bad: list[tuple[str, str]]) -> str | None:
        """Count pairs, the bad ones with key and reason; returns a sentence when too many were bad."""
        self.read += read
        self.bad += len(bad)
        if not bad or self.bad <= self._max_bad_share * max(self.read, _MIN_PAIRS):
            return None
        return (
            f"{self.bad} of the first {max(self.read, self.bad)} pairs could not be read, more than "
            f"data.max_bad_share={self._max_bad_share} allows; the last was {bad[-1][0]}: {bad[-1][1]}"
        )


@ray.remote(num_cpus=0, max_restarts=0)
class TrainingMonitor:
    """One a run; workers and data tasks write to it, the driver reads."""

    def __init__(self, max_bad_share: float) -> None:
        self._pairs = BadPairCounter(max_bad_share)
        self._filtered = 0
        self._new = ProgressUpdate()
        self._known: set[str] = set()
        self._stop = False
        self._failure: Exception | None = None

    def add_pairs(self, read: int, bad: list[tuple[str, str]], filtered: int = 0) -> str | None:
        """Count pairs; returns a sentence when too many were bad. Each bad key is passed on once."""
        self._filtered += filtered
        for key, reason in bad:
            if key not in self._known:
                self._known.add(key)
                self._new.bad.append((key, reason))
        return self._pairs.add(read, bad)

    def report(self, metrics: dict[str, float]) -> ReportReply:
        """Pass on a report of rank 0."""
        counts = {"bad_pairs": float(self._pairs.bad), "filtered_pairs": float(self._filtered)}
        self._new.metrics.append({**metrics, **counts})
        return ReportReply(self._stop, counts)

    def clear_stop(self) -> None:
        """Training begins (anew): nobody has asked it to stop."""
        self._stop = False

    def stop(self) -> None:
        """Ask the run to stop at its next report."""
        self._stop = True

    def fail(self, failure: Exception) -> None:
        """Tell of a user's mistake, which no restart mends."""
        self._failure = self._failure or failure

    def failed(self) -> bool:
        """Whether a mistake was told of."""
        return self._failure is not None

    def poll(self) -> ProgressUpdate:
        """What is new since the last call."""
        new, self._new = self._new, ProgressUpdate()
        new.read, new.bad_total, new.failure = self._pairs.read, self._pairs.bad, self._failure
        return new
