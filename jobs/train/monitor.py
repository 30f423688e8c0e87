"""The actor between driver, workers and readers of a run: metrics, unreadable pairs, user errors, and the request to stop."""

from __future__ import annotations

from dataclasses import dataclass, field

import ray

_MIN_PAIRS = 500
"""Smallest denominator of the fraction of bad pairs: a few bad ones among the first do not end a run."""


@dataclass
class ProgressUpdate:
    """News since the last poll."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    read: int = 0
    bad_total: int = 0
    failure: Exception | None = None
    """User error that a worker met; the run is over."""


@dataclass(frozen=True)
class ReportReply:
    """Reply to a report of rank 0."""

    stop: bool
    """The run is asked to stop."""
    counts: dict[str, float]
    """Metrics that the monitor adds to the report."""


class BadPairCounter:
    """Counts the pairs read and the unreadable ones among them, and says when these are too many."""

    def __init__(self, max_bad_share: float) -> None:
        self.read = self.bad = 0
        self._max_bad_share = max_bad_share

    def add(self, read: int, bad: list[tuple[str, str]]) -> str | None:
        """Count pairs, the bad ones with key and reason; return a sentence when too many were bad, else None."""
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
    """One for each run: workers and readers write to it, the driver polls it."""

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
        """Keep a report of rank 0 for the driver."""
        counts = {"bad_pairs": float(self._pairs.bad), "filtered_pairs": float(self._filtered)}
        self._new.metrics.append({**metrics, **counts})
        return ReportReply(self._stop, counts)

    def clear_stop(self) -> None:
        """Withdraw the request to stop; called before each trainer starts."""
        self._stop = False

    def request_stop(self) -> None:
        """Ask the run to stop at its next report."""
        self._stop = True

    def fail(self, failure: Exception) -> None:
        """Keep the first user error: a restart cannot correct it."""
        self._failure = self._failure or failure

    def has_failed(self) -> bool:
        """Return True once a user error was passed to `fail`."""
        return self._failure is not None

    def poll(self) -> ProgressUpdate:
        """Return the news since the last call, with the totals."""
        new, self._new = self._new, ProgressUpdate()
        new.read, new.bad_total, new.failure = self._pairs.read, self._pairs.bad, self._failure
        return new
