"""Connection to Ray: one cluster for all stages of a command, and its resources."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vilseg.errors import ConfigError, UserError

_CARRIED = ("AWS_", "VILSEG_", "HF_")
"""Environment variables that workers on other machines need as well."""
_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable that Ray's job server sets for the process of a job; it holds the job's runtime environment."""


def forwarded_environment() -> dict[str, str]:
    """Return the variables of this process that workers on other machines need as well."""
    return {name: value for name, value in os.environ.items() if name.startswith(_CARRIED)}


@dataclass(frozen=True)
class Session:
    """Resources of the Ray cluster that this process is connected to.

    Example:
        >>> Session(cpus=8, gpus=2).worker_resources(2)
        {'CPU': 1.0, 'GPU': 1.0}
        >>> Session(cpus=8, gpus=0, node_cpus=4, nodes=2).worker_resources(2)
        {'CPU': 0.5}
    """

    cpus: int
    gpus: int
    node_cpus: int | None = None
    """CPUs of the smallest machine (of the smallest with a GPU, if there are any); None for `cpus`."""
    nodes: int = 1
    """Number of machines that work is given to."""

    def worker_resources(self, workers: int) -> dict[str, float]:
        """Return the resources of each training worker; some CPU is always left for reading, or training would hang.

        Raises:
            ConfigError: fewer than one worker, or more workers than CPUs or, on a cluster with GPUs, than GPUs.
        """
        check_workers(workers, self.cpus, self.gpus)
        here, cpus = self.workers_per_node(workers), self.node_cpus or self.cpus
        share = min(1.0, max(cpus - 1, 0.5 * cpus) / here)
        return {"CPU": self.reserved_cpus(share), **({"GPU": 1.0} if self.gpus else {})}

    def workers_per_node(self, workers: int) -> int:
        """Return the largest number of workers on one machine when ``workers`` are spread evenly."""
        return math.ceil(workers / self.nodes)

    def cpus_per_actor(self, actors: int) -> float:
        """Return the CPUs of each of ``actors``, at most those of one machine: Ray would wait forever for more."""
        return min(self.cpus / actors, self.node_cpus or self.cpus)

    def reserved_cpus(self, cpus: float) -> float:
        """Return the CPUs to request from Ray for a process that uses ``cpus``.

        On several machines half is requested, so that the others have room for the processes of a machine that is lost.
        """
        return cpus / 2 if self.nodes > 1 else cpus


def check_workers(workers: int, cpus: int, gpus: int = 0) -> None:
    """Refuse a number of training workers that the cluster has no room for.

    Args:
        workers: number of workers.
        cpus: CPUs of the cluster.
        gpus: GPUs of the cluster; each worker takes one if there are any, as training on CPUs beside them is never meant.

    Raises:
        ConfigError: no worker, more workers than CPUs, or more workers than GPUs.
    """
    if workers < 1:
        raise ConfigError(f"trainer.workers is {workers}, but training needs at least 1")
    if workers > cpus:
        raise ConfigError(f"trainer.workers is {workers}, but there are {cpus} CPUs; ask for at most {cpus}")
    if gpus and workers > gpus:
        raise ConfigError(
            f"trainer.workers is {workers}, but there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'} and each worker takes "
            f"one; set trainer.workers={gpus}, or hide the GPUs from Ray to train on CPUs (CUDA_VISIBLE_DEVICES= where it is "
            "started)"
        )


@contextmanager
def ray_session(address: str | None = None, variables: Mapping[str, str] | None = None) -> Iterator[Session]:
    """Use the cluster at ``address``, the one this process is connected to already, or a local one for as long as this lasts.

    Args:
        address: ``auto`` or ``ray://…``; a Ray job without one uses the cluster that it runs on.
        variables: what workers need in their environment beside what this process was started with.

    Raises:
        UserError: no cluster answers at ``address``.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield current_session()
        return
    options: dict = {"logging_level": logging.ERROR, "log_to_driver": False}
    in_a_job = _IN_A_JOB in os.environ
    try:
        if address is None and not in_a_job:
            _start_local(options)
        else:
            if in_a_job:
                # Ray gives the job's own variables to its workers; they are not to be said twice, nor to win.
                os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
            needed = {**({} if in_a_job else forwarded_environment()), **(variables or {})}
            ray.init(address=address or "auto", runtime_env={"env_vars": needed}, **options)
    except (ConnectionError, TimeoutError, ValueError) as error:
        if address is None:
            raise
        raise UserError(f"no Ray cluster answers at {address}: {str(error).strip().splitlines()[0]}") from error
    try:
        from ray.data import DataContext

        DataContext.get_current().enable_progress_bars = False
        # Otherwise every task has a thread that measures its memory for metrics that are not used.
        DataContext.get_current().memory_usage_poll_interval_s = None
        # What Ray tells of its plans is in its log folder; ours is told by the jobs.
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", "The minimum number of concurrent actors", UserWarning)
        yield current_session()
    finally:
        ray.shutdown()


def _start_local(options: dict) -> None:
    import ray

    for attempts_left in (2, 1, 0):
        try:
            # Said outright, or Ray would look for a cluster in RAY_ADDRESS and in what an earlier one left in /tmp.
            ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, **options)
            return
        except Exception as error:
            # All that Ray says of a machine too busy to bring its node up within 30 s.
            if "timed out during startup" not in str(error) or not attempts_left:
                raise
            ray.shutdown()


def current_session() -> Session:
    """Return the current resources of the cluster that this process is connected to."""
    import ray

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = [int(node.get("CPU", 0)) for node in nodes if node.get("GPU", 0) or not gpus]
    sizes = [size for size in sizes if size]
    return Session(int(resources.get("CPU", 0)), gpus, min(sizes, default=None), max(1, len(sizes)))


def node_cpu_count() -> int:
    """Return the CPUs that Ray counts on the machine of this task or actor; in a container not all that the machine has."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    counted = next(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, min(int(counted), os.cpu_count() or 1))


def driver_node_affinity() -> Any:
    """Return a ``scheduling_strategy`` for the driver's machine; if that is lost the job ends anyway."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Soft ones end up elsewhere where a process is to be had sooner.
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def find_user_error(error: BaseException | None, depth: int = 8) -> UserError | None:
    """Return the UserError inside an error that Ray wrapped, or None."""
    if error is None or depth == 0:
        return None
    cause = getattr(error, "cause", None)
    # Ray's wrapper of a task's error passes for an instance of it, but its text is a traceback.
    if isinstance(error, UserError) and cause is None:
        return error
    inner = [cause, error.__cause__, error.__context__]
    inner += list((getattr(error, "worker_failures", None) or {}).values())
    return next(
        (found for one in inner if isinstance(one, BaseException) if (found := find_user_error(one, depth - 1))), None
    )
