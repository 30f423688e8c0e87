"""Training monitor: the actor through which the workers and readers of a run communicate with the driver.

It collects metrics, unreadable pairs and user errors for the driver, and holds the driver's request to stop.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ray

from vilseg.data.shards import BadPair

_MIN_PAIRS = 500
"""Minimum denominator of the fraction of bad pairs, so that a few bad pairs at the start do not end a run."""


BadPairId = tuple[str, str]
"""Key of a pair and URI of its shard; two shards may have a pair of the same key."""


@dataclass
class ProgressUpdate:
    """Metrics and unreadable pairs since the last poll of the training monitor, and the totals."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    bad: dict[BadPairId, str] = field(default_factory=dict)
    """Reasons why pairs could not be read, by pair; every pair is reported once per run."""
    read: int = 0
    """Number of pairs taken from shards since the monitor was started, including unreadable and filtered ones."""
    bad_total: int = 0
    """Number of unreadable pairs since the monitor was started; a pair counts again in every epoch."""
    failure: Exception | None = None
    """User error that a worker raised; the run cannot continue."""


@dataclass(frozen=True)
class ReportReply:
    """Reply of the training monitor to a report of rank 0."""

    stop: bool
    """The driver requests the run to stop."""
    counts: dict[str, float]
    """Metrics to add to the report: the numbers of bad and of filtered pairs."""


class BadPairCounter:
    """Counter of pairs read and of unreadable pairs, which checks the fraction of unreadable ones.

    Args:
        max_bad_share: maximum fraction of unreadable pairs.
    """

    def __init__(self, max_bad_share: float) -> None:
        self.read = self.bad = 0
        self._max_bad_share = max_bad_share
        self._known: set[BadPairId] = set()
        self._new: dict[BadPairId, str] = {}

    def add(self, read: int, bad: list[BadPair]) -> str | None:
        """Count pairs, and return an error message if too many could not be read, else None.

        Args:
            read: number of pairs newly taken from shards, including unreadable and filtered ones.
            bad: pairs newly found unreadable. If an image could not be decoded, an earlier call may have counted the pair in
                ``read``.
        """
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
        """Return the reasons of bad pairs that no earlier call returned; a pair is returned once, not once per epoch."""
        new, self._new = self._new, {}
        return new


@ray.remote(num_cpus=0, max_restarts=0)
class TrainingMonitor:
    """Training monitor actor, one per run: workers and readers write to it, and the driver polls it.

    Args:
        max_bad_share: maximum fraction of unreadable pairs.
    """

    def __init__(self, max_bad_share: float) -> None:
        self._pairs = BadPairCounter(max_bad_share)
        self._filtered = 0
        self._new = ProgressUpdate()
        self._stop = False
        self._failure: Exception | None = None

    def add_pairs(self, read: int, bad: list[BadPair], filtered: int = 0) -> str | None:
        """Count pairs, and return an error message if too many could not be read, else None. Readers call this.

        Args:
            read: number of pairs that the reader has taken from shards since its last call, including unreadable and filtered
                ones.
            bad: pairs that the reader found unreadable since its last call. Those whose image could not be decoded may have been
                counted in ``read`` of an earlier call.
            filtered: number of pairs that the configured filters left out since the reader's last call. They may have been
                counted in ``read`` of an earlier call too, and are not in ``bad``.
        """
        self._filtered += filtered
        return self._pairs.add(read, bad)

    def report(self, metrics: dict[str, float]) -> ReportReply:
        """Store metrics that rank 0 reports, until the driver calls `poll`, and return the reply to rank 0."""
        counts = {"bad_pairs": float(self._pairs.bad), "filtered_pairs": float(self._filtered)}
        self._new.metrics.append({**metrics, **counts})
        return ReportReply(self._stop, counts)

    def clear_stop(self) -> None:
        """Withdraw the request to stop. The supervisor calls this before it starts a trainer."""
        self._stop = False

    def request_stop(self) -> None:
        """Request the run to stop: from now on every reply to a report of rank 0 says so."""
        self._stop = True

    def fail(self, failure: Exception) -> None:
        """Store a user error, which a restart of the workers cannot correct; only the first one is kept."""
        self._failure = self._failure or failure

    def has_failed(self) -> bool:
        """Return True once a user error was passed to `fail`."""
        return self._failure is not None

    def poll(self) -> ProgressUpdate:
        """Return the metrics and bad pairs that no earlier call returned, the totals, and the user error if there is one."""
        new, self._new = self._new, ProgressUpdate()
        new.bad = self._pairs.take_new()
        new.read, new.bad_total, new.failure = self._pairs.read, self._pairs.bad, self._failure
        return new
