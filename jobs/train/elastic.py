"""A number of training workers that follows the cluster: fewer where a machine is lost, more where one comes.

A step's pairs are shared evenly, so the numbers taken are those that divide the batch. Whatever the number, the pairs of a
step and the loss are the same.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from cluster.ray_session import Session, current_session
from vilseg.config import TrainerConfig
from vilseg.errors import ConfigError

_log = logging.getLogger("vilseg.jobs.train")
_CHECK_INTERVAL_S = 30.0
"""Between two looks at the cluster for room for more workers: one that begins anew costs a run as much."""
_PLACEMENT_TIMEOUT_S = 20.0
"""What a lost worker held is free again, or a lost machine known to be, after so long; tried again until it is."""
_FULL_SIZE_TIMEOUT_S = 60.0
"""After so long without room for as many as the cluster has in all, others hold a part of it, and fewer will do."""
_CAPACITY_TIMEOUT_S = 1800.0
"""Without room for the fewest workers so long, the run fails."""


def most_workers_that_fit(trainer: TrainerConfig, session: Session) -> int:
    """Workers that share a step evenly and have a place on the cluster, at most as many as are wished for."""
    return trainer.max_even_workers(session.gpus or session.cpus)


def wait_for_workers(trainer: TrainerConfig) -> tuple[int, Session]:
    """The most workers that there is room for now, which must be free, and the cluster as it is.

    As many as the cluster has in all are waited for a while, since a lost worker's room is not free at once; then fewer will do.

    Raises:
        ConfigError: for half an hour there was no room for the fewest.
    """
    begun = time.monotonic()
    told = False
    while time.monotonic() < begun + _CAPACITY_TIMEOUT_S:
        session = current_session()
        for workers in _worker_counts(trainer, session):
            if _can_place(session, workers):
                return workers, session
            if time.monotonic() < begun + _FULL_SIZE_TIMEOUT_S:
                break
        if not told:
            told = True
            most = max(most_workers_that_fit(trainer, session), trainer.min_workers)
            _log.info(f"waiting for room for {most} workers; there are {session.cpus} CPUs, {session.gpus} GPUs")
        time.sleep(1)
    raise ConfigError(
        f"for {_CAPACITY_TIMEOUT_S / 60:.0f} minutes the cluster had no room for trainer.workers={trainer.min_workers}, "
        "the fewest; ask for fewer, or go on with --resume when there are more machines"
    )


class ScaleUpTrigger:
    """Whether there has come free room for more workers than a run has now; asked often, it looks seldom.

    Args:
        trainer: its settings.
        workers: that the run has.
        session: the cluster when they were placed.
    """

    def __init__(self, trainer: TrainerConfig, workers: int, session: Session) -> None:
        self._trainer, self._workers = trainer, workers
        self._held = _total_resources(session, workers)
        self._next = time.monotonic() + _CHECK_INTERVAL_S

    def __call__(self) -> bool:
        """Look, if it is time to."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _CHECK_INTERVAL_S
        session = current_session()
        wished = [workers for workers in _worker_counts(self._trainer, session) if workers > self._workers]
        free = _unreserved_resources() if wished else {}

        def has_room(workers: int) -> bool:
            needed = _total_resources(session, workers)
            return all(amount <= self._held.get(name, 0) + free[name] + 1e-6 for name, amount in needed.items())

        return any(has_room(workers) for workers in wished)


def _worker_counts(trainer: TrainerConfig, session: Session) -> Iterator[int]:
    """Numbers of workers that the cluster has room for in all, the most first."""
    workers = most_workers_that_fit(trainer, session)
    while workers >= trainer.min_workers:
        yield workers
        workers = trainer.max_even_workers(workers - 1)


def _total_resources(session: Session, workers: int) -> dict[str, float]:
    return {name: amount * workers for name, amount in session.worker_resources(workers).items()}


def _unreserved_resources() -> dict[str, float]:
    """CPUs and GPUs that no one holds for long."""
    # Reading, the run's own too, takes whatever CPUs are idle, for moments: what is held for good are groups of places.
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    held = sum(bundle.get("CPU", 0) for group in groups for bundle in group["bundles"].values())
    return {"CPU": ray.cluster_resources().get("CPU", 0) - held, "GPU": ray.available_resources().get("GPU", 0)}


def _can_place(session: Session, workers: int) -> bool:
    """Whether there is room for ``workers``, which shows only by taking it: a lost machine is counted for up to a minute more."""
    each, places, strategy = session.worker_resources(workers), workers, "PACK"
    if "GPU" not in each:
        # Shares of CPUs are so small that the other machines may have room for those of a lost one too, and would be
        # crowded; so every machine is asked for its part.
        places, strategy = min(session.nodes, workers), "STRICT_SPREAD"
        each = {name: amount * math.ceil(workers / places) for name, amount in each.items()}
    group = placement_group([each] * places, strategy=strategy)
    try:
        return group.wait(_PLACEMENT_TIMEOUT_S)
    finally:
        remove_placement_group(group)
