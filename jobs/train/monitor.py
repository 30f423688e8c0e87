"""The actor between driver, workers and readers of a run: metrics, unreadable pairs, user errors, and the request to stop."""

from __future__ import annotations

from dataclasses import dataclass, field

import ray

from vilseg.data.shards import BadPair

_MIN_PAIRS = 500
"""Smallest denominator of the fraction of bad pairs: a few bad ones among the first do not end a run."""


BadPairId = tuple[str, str]
"""Key of a pair and URI of its shard; two shards may have a pair of the same key."""


@dataclass
class ProgressUpdate:
    """News since the last poll."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    bad: dict[BadPairId, str] = field(default_factory=dict)
    """Reasons of pairs that could not be read, each pair once a run."""
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
        self._known: set[BadPairId] = set()
        self._new: dict[BadPairId, str] = {}

    def add(self, read: int, bad: list[BadPair]) -> str | None:
        """Count pairs read and those among them that could not be used; return a sentence when these are too many."""
        self.read += read
        self.bad += len(bad)
        for pair in bad:
            identity = pair.key, pair.shard
            if identity not in self._known:
                self._known.add(identity)
                self._new[identity] = pair.reason
        if not bad or self.bad <= self._max_bad_share * max(self.read, _MIN_PAIRS):
            return None
        return (
            f"{self.bad} of the first {max(self.read, self.bad)} pairs could not be read, more than "
            f"data.max_bad_share={self._max_bad_share} allows; the last was {bad[-1].key}: {bad[-1].reason}"
        )

    def take_new(self) -> dict[BadPairId, str]:
        """Return the reasons of bad pairs that the calls before did not return; each pair comes once, not once an epoch."""
        new, self._new = self._new, {}
        return new


@ray.remote(num_cpus=0, max_restarts=0)
class TrainingMonitor:
    """One for each run: workers and readers write to it, the driver polls it."""

    def __init__(self, max_bad_share: float) -> None:
        self._pairs = BadPairCounter(max_bad_share)
        self._filtered = 0
        self._new = ProgressUpdate()
        self._stop = False
        self._failure: Exception | None = None

    def add_pairs(self, read: int, bad: list[BadPair], filtered: int = 0) -> str | None:
        """Count pairs; return a sentence when too many were bad."""
        self._filtered += filtered
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
        new.bad = self._pairs.take_new()
        new.read, new.bad_total, new.failure = self._pairs.read, self._pairs.bad, self._failure
        return new
