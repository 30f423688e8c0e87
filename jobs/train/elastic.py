"""Choose the number of training workers by the room on the cluster: fewer after a machine is lost, more after one is added.

The pairs of a step are split evenly, so only numbers that divide the batch are used. The pairs of a step and the loss do not
depend on the number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from cluster.ray_session import Session, current_session
from vilseg.config import TrainerConfig
from vilseg.errors import ConfigError

_log = logging.getLogger("vilseg.jobs.train")
_CHECK_INTERVAL_S = 30.0
"""Seconds between two checks for room for more workers: about what restarting the workers costs a run."""
_PLACEMENT_TIMEOUT_S = 20.0
"""Seconds that one placement is tried for: after them a lost worker's resources are free, or a lost machine is known."""
_FULL_SIZE_TIMEOUT_S = 60.0
"""Seconds to wait for room for the largest number; after them other jobs must hold a part of the cluster, and fewer will do."""
_CAPACITY_TIMEOUT_S = 1800.0
"""Seconds without room for the smallest number of workers after which the run fails."""


def most_workers_that_fit(trainer: TrainerConfig, session: Session, on_gpus: bool = False) -> int:
    """Return the largest number of workers, up to the one configured, that divides a batch and fits on the whole cluster.

    Each worker takes a GPU if the cluster has any, or if the run is ``on_gpus``: it waits for GPUs that were lost.
    """
    return trainer.max_even_workers(session.gpus if on_gpus or session.gpus else session.cpus)


def wait_for_workers(trainer: TrainerConfig, *, on_gpus: bool = False) -> tuple[int, Session]:
    """Return the largest number of workers that there is free room for now, and the cluster as it is.

    Room for as many as fit on the whole cluster is waited for during `_FULL_SIZE_TIMEOUT_S`, since the resources of a lost worker
    are not free at once; then fewer will do.

    Args:
        trainer: settings of the trainer.
        on_gpus: the run has used GPUs, so that it does not go on on CPUs when they are lost.

    Raises:
        ConfigError: for half an hour there was no room for the smallest number.
    """
    started = time.monotonic()
    announced = False
    while time.monotonic() < started + _CAPACITY_TIMEOUT_S:
        session = current_session()
        for workers in _worker_counts(trainer, session, on_gpus):
            if _can_place(session, workers):
                return workers, session
            if time.monotonic() < started + _FULL_SIZE_TIMEOUT_S:
                break
        if not announced:
            announced = True
            most = max(most_workers_that_fit(trainer, session, on_gpus), trainer.min_workers)
            _log.info(f"waiting for room for {most} workers; there are {session.cpus} CPUs, {session.gpus} GPUs")
        time.sleep(1)
    raise ConfigError(
        f"for {_CAPACITY_TIMEOUT_S / 60:.0f} minutes the cluster had no room for trainer.workers={trainer.min_workers}, "
        "the fewest; ask for fewer, or go on with --resume when there are more machines"
    )


class ScaleUpTrigger:
    """Returns True once there is free room for more workers than a run has now.

    It may be called often: the cluster is checked every `_CHECK_INTERVAL_S` seconds.

    Args:
        trainer: settings of the trainer.
        workers: number of workers that the run has.
        session: the cluster when they were placed.
    """

    def __init__(self, trainer: TrainerConfig, workers: int, session: Session) -> None:
        self._trainer, self._workers = trainer, workers
        self._held = _total_resources(session, workers)
        self._on_gpus = "GPU" in self._held
        self._next = time.monotonic() + _CHECK_INTERVAL_S

    def __call__(self) -> bool:
        """Check the cluster if a check is due; False between the checks."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _CHECK_INTERVAL_S
        session = current_session()
        counts = _worker_counts(self._trainer, session, self._on_gpus)
        larger = [workers for workers in counts if workers > self._workers]
        free = _unreserved_resources() if larger else {}

        def has_room(workers: int) -> bool:
            needed = _total_resources(session, workers)
            return all(amount <= self._held.get(name, 0) + free[name] + 1e-6 for name, amount in needed.items())

        return any(has_room(workers) for workers in larger)


def _worker_counts(trainer: TrainerConfig, session: Session, on_gpus: bool) -> Iterator[int]:
    """Yield the numbers of workers that fit on the whole cluster, the largest first."""
    workers = most_workers_that_fit(trainer, session, on_gpus)
    while workers >= trainer.min_workers:
        yield workers
        workers = trainer.max_even_workers(workers - 1)


def _total_resources(session: Session, workers: int) -> dict[str, float]:
    return {name: amount * workers for name, amount in session.worker_resources(workers).items()}


def _unreserved_resources() -> dict[str, float]:
    """Return the CPUs and GPUs outside of all placement groups."""
    # Reader tasks, the run's own too, take idle CPUs for moments only. Placement groups hold theirs for the length of a job.
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    held = sum(bundle.get("CPU", 0) for group in groups for bundle in group["bundles"].values())
    return {"CPU": ray.cluster_resources().get("CPU", 0) - held, "GPU": ray.available_resources().get("GPU", 0)}


def _can_place(session: Session, workers: int) -> bool:
    """Return True if ``workers`` can be placed, found by placing them: Ray counts a lost machine for up to a minute."""
    each, places, strategy = session.worker_resources(workers), workers, "PACK"
    if "GPU" not in each:
        # Workers take fractions of a CPU, so the other machines may have room for those of a lost one too, and would be
        # overloaded. So every machine is asked for its part.
        places, strategy = min(session.nodes, workers), "STRICT_SPREAD"
        each = {name: amount * session.workers_per_node(workers) for name, amount in each.items()}
    group = placement_group([each] * places, strategy=strategy)
    try:
        return group.wait(_PLACEMENT_TIMEOUT_S)
    finally:
        remove_placement_group(group)
