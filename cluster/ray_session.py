"""Connection to a Ray cluster, and its resources."""

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
"""Prefixes of environment variables that are passed to workers, which may run on other machines."""
_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray's job server sets for the process of a job; it holds the job's runtime environment."""


def forwarded_environment() -> dict[str, str]:
    """Return the environment variables of this process that are passed to workers: ``AWS_*``, ``VILSEG_*`` and ``HF_*``."""
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
    """CPUs of the smallest machine, or of the smallest machine with a GPU if there are GPUs; `cpus` if None."""
    nodes: int = 1
    """Number of machines that run workers: those with GPUs if there are any, else those with CPUs."""

    def worker_resources(self, workers: int) -> dict[str, float]:
        """Return the resources of each training worker. CPUs are left over for the readers, otherwise training would hang.

        Raises:
            ConfigError: ``workers`` is less than 1 or more than the CPUs, or, if there are GPUs, more than the GPUs.
        """
        check_workers(workers, self.cpus, self.gpus)
        here, cpus = self.workers_per_node(workers), self.node_cpus or self.cpus
        share = min(1.0, max(cpus - 1, 0.5 * cpus) / here)
        return {"CPU": self.reserved_cpus(share), **({"GPU": 1.0} if self.gpus else {})}

    def workers_per_node(self, workers: int) -> int:
        """Return the maximum number of workers per machine if ``workers`` are spread evenly over the machines."""
        return math.ceil(workers / self.nodes)

    def cpus_per_actor(self, actors: int) -> float:
        """Return the number of CPUs per actor for ``actors`` actors.

        It is at most the number of CPUs of the smallest machine, because Ray would wait forever for more.
        """
        return min(self.cpus / actors, self.node_cpus or self.cpus)

    def reserved_cpus(self, cpus: float) -> float:
        """Return the number of CPUs to request from Ray for a process that uses ``cpus`` CPUs.

        On several machines only half is requested, so that the processes of a lost machine fit on the remaining ones.
        """
        return cpus / 2 if self.nodes > 1 else cpus


def check_workers(workers: int, cpus: int, gpus: int = 0) -> None:
    """Check that the cluster has enough CPUs and GPUs for a number of training workers.

    Args:
        workers: number of workers.
        cpus: number of CPUs of the cluster.
        gpus: number of GPUs of the cluster. If there are any, each worker takes one; workers on CPUs are then not supported.

    Raises:
        ConfigError: ``workers`` is less than 1 or more than ``cpus``, or, if there are GPUs, more than ``gpus``.
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
    """Connect to a Ray cluster for the duration of the ``with`` block.

    If this process is connected already, that connection is used and kept.

    Args:
        address: ``auto`` or ``ray://…``. If None, a process that runs as a Ray job uses the cluster of the job, and any other
            process starts a local Ray node, which ends with the block.
        variables: environment variables of the workers, in addition to those of `forwarded_environment`.

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
                # Ray passes the job's own variables to its workers, so they are not repeated here; `variables` override them.
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
        # Otherwise every task has a thread that measures its memory, for metrics that are not used.
        DataContext.get_current().memory_usage_poll_interval_s = None
        # Ray's messages are in its log folder; on the terminal the jobs report their own progress.
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
            # Explicitly local, otherwise Ray would connect to a cluster from RAY_ADDRESS or from files in /tmp.
            ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, **options)
            return
        except Exception as error:
            # Part of Ray's message if the machine is too busy to start the node within 30 s; then try again.
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
    """Return the number of CPUs of this task's or actor's machine as Ray counts them, in a container only the container's."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    counted = next(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, min(int(counted), os.cpu_count() or 1))


def driver_node_affinity() -> Any:
    """Return a ``scheduling_strategy`` that places an actor on the driver's machine.

    An actor there adds no point of failure, since the job ends anyway if that machine is lost.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Not soft: Ray would place the actor elsewhere if a process is available there sooner.
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def find_user_error(error: BaseException | None, depth: int = 8) -> UserError | None:
    """Return the UserError inside an error that Ray wrapped; None if there is none.

    Args:
        error: error to search, with its causes, contexts and the failures of workers.
        depth: maximum depth of nested errors to search.
    """
    if error is None or depth == 0:
        return None
    cause = getattr(error, "cause", None)
    # Ray's wrapper is an instance of the wrapped error's class too, but its text is a traceback.
    if isinstance(error, UserError) and cause is None:
        return error
    inner = [cause, error.__cause__, error.__context__]
    inner += list((getattr(error, "worker_failures", None) or {}).values())
    return next(
        (found for one in inner if isinstance(one, BaseException) if (found := find_user_error(one, depth - 1))), None
    )
