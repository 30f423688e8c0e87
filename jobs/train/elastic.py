"""Elastic number of training workers: fewer after a machine is lost, more after one is added.

The pairs of a step are split evenly, so only worker counts that divide the batch size are used. The pairs of a step and the loss
do not depend on the worker count.
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
"""Seconds between two checks for free resources for more workers; about the time that a restart of the workers takes."""
_PLACEMENT_TIMEOUT_S = 20.0
"""Timeout of one placement attempt in seconds. By then Ray has freed a lost worker's resources or noticed a lost machine."""
_FULL_SIZE_TIMEOUT_S = 60.0
"""Seconds to wait for resources for the largest worker count. After them other jobs are assumed to hold the resources, and fewer
workers are accepted."""
_CAPACITY_TIMEOUT_S = 1800.0
"""Seconds to wait for resources for the smallest worker count before the run fails."""


def most_workers_that_fit(trainer: TrainerConfig, session: Session, on_gpus: bool = False) -> int:
    """Return the largest worker count up to the configured maximum that divides the batch and fits on the whole, idle cluster.

    Args:
        trainer: settings of the trainer.
        session: the cluster.
        on_gpus: count GPUs even if the cluster has none now, because the run has used GPUs and has to wait for lost ones.
            Otherwise GPUs are counted if there are any, else CPUs.
    """
    return trainer.max_even_workers(session.gpus if on_gpus or session.gpus else session.cpus)


def wait_for_workers(trainer: TrainerConfig, *, on_gpus: bool = False) -> tuple[int, Session]:
    """Wait for free resources, and return the largest number of workers that fits in them, and the `Session` at that time.

    For `_FULL_SIZE_TIMEOUT_S` seconds only the number that fits on the whole cluster is accepted, because the resources of a lost
    worker are not free at once. After that smaller numbers are accepted too.

    Args:
        trainer: settings of the trainer.
        on_gpus: True if the run has used GPUs; if they are lost, it then waits for GPUs and does not continue on CPUs.

    Raises:
        ConfigError: for `_CAPACITY_TIMEOUT_S` seconds there were no resources for the smallest number of workers.
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
    """Function that returns True once the cluster has free resources for at least one worker more than a run has.

    It may be called often, because it queries the cluster only every `_CHECK_INTERVAL_S` seconds.

    Args:
        trainer: settings of the trainer.
        workers: current number of workers of the run.
        session: CPUs and GPUs of the cluster when these workers were placed; they give the resources that each one holds.
    """

    def __init__(self, trainer: TrainerConfig, workers: int, session: Session) -> None:
        self._trainer, self._workers = trainer, workers
        self._held = _total_resources(session, workers)
        self._on_gpus = "GPU" in self._held
        self._next = time.monotonic() + _CHECK_INTERVAL_S

    def __call__(self) -> bool:
        """Query the cluster if a check is due; return False otherwise."""
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
    """Yield the worker counts that fit on the whole, idle cluster, largest first."""
    workers = most_workers_that_fit(trainer, session, on_gpus)
    while workers >= trainer.min_workers:
        yield workers
        workers = trainer.max_even_workers(workers - 1)


def _total_resources(session: Session, workers: int) -> dict[str, float]:
    return {name: amount * workers for name, amount in session.worker_resources(workers).items()}


def _unreserved_resources() -> dict[str, float]:
    """Return the number of CPUs and GPUs that no placement group has reserved."""
    # CPUs in use by tasks count as free, since reader tasks (also the run's own) hold them only for moments.
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    held = sum(bundle.get("CPU", 0) for group in groups for bundle in group["bundles"].values())
    return {"CPU": ray.cluster_resources().get("CPU", 0) - held, "GPU": ray.available_resources().get("GPU", 0)}


def _can_place(session: Session, workers: int) -> bool:
    """Return True if Ray can reserve the resources of ``workers`` now.

    The reservation is made and released, because Ray's resource counts may include a lost machine for up to a minute.
    """
    each, places, strategy = session.worker_resources(workers), workers, "PACK"
    if "GPU" not in each:
        # CPU workers reserve less than they use, so the workers of a lost machine would fit on the others and overload them.
        # So the resources are reserved on each machine separately.
        places, strategy = min(session.nodes, workers), "STRICT_SPREAD"
        each = {name: amount * session.workers_per_node(workers) for name, amount in each.items()}
    group = placement_group([each] * places, strategy=strategy)
    try:
        return group.wait(_PLACEMENT_TIMEOUT_S)
    finally:
        remove_placement_group(group)
