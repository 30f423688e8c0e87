"""Driver of a training run: Ray Data streams pairs to Ray Train workers. ``jobs/train/__init__.py`` describes the design."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import ray.train
from ray.train import DataConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.ray_session import Session, check_workers, driver_node_affinity, find_user_error
from jobs.train import feature_cache
from jobs.train.elastic import ScaleUpTrigger, wait_for_workers
from jobs.train.monitor import ProgressUpdate, TrainingMonitor
from jobs.train.process_group import MultiNodeTorchConfig
from jobs.train.ray_data import batches_from_last_checkpoint, count_in_parallel, execution_options
from jobs.train.supervisor import QuarantineFile, TrainingResult, TrainingSupervisor, sigterm_as_ctrl_c
from jobs.train.worker import train_worker
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.training import run_setup
from vilseg.training.run_dir import PreparedRun, RunDirectory, new_run_name

_log = logging.getLogger("vilseg.jobs.train")


@sigterm_as_ctrl_c()  # for the whole function: SIGTERM must also work before training starts
def main(
    config: RunConfig,
    session: Session,
    *,
    resume: bool = False,
    progress: Callable[[ProgressUpdate], None] = lambda update: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train a model on the connected cluster.

    The first Ctrl-C or SIGTERM during training stops the run with a checkpoint; the result then has ``stopped`` set.

    Args:
        config: configuration of the run. If it has no name, one is generated. On ``resume`` the numbers of steps and of workers
            may differ from those of the earlier call.
        session: the cluster.
        resume: continue from the last checkpoint of the run of that name.
        progress: function called a few times per second with the updates of the training monitor.
        should_stop: function called as often as ``progress``; once it returns True, the run stops with a checkpoint.

    Raises:
        UserError: the configuration, the pairs or the storage has an error that the user can correct.
        KeyboardInterrupt: Ctrl-C or SIGTERM before training started, or a second one during training.
    """
    check_workers(config.trainer.min_workers, session.cpus, session.gpus)
    config.trainer.check_even_split()
    config = config if config.name else config.replace(name=new_run_name())
    run_dir = run_setup.open_run_directory(config, resume=resume)
    if resume:
        prepared = run_setup.resume(config, run_dir)
    else:
        cache = None
        if config.data.feature_cache:
            cache = feature_cache.main(config, session, progress=log_cache_progress).uri
        prepared = run_setup.prepare(config, run_dir, count=count_in_parallel, cache=cache)
    monitor = TrainingMonitor.options(  # type: ignore[attr-defined]  # ray.remote hides the class it wraps
        scheduling_strategy=driver_node_affinity()
    ).remote(config.data.max_bad_share)
    quarantine = QuarantineFile(run_dir)

    def handle_update(update: ProgressUpdate) -> None:
        quarantine.add(update.bad)
        progress(update)

    supervisor = TrainingSupervisor(monitor, run_dir, config.trainer.steps, handle_update, should_stop)
    try:
        if isinstance(config.trainer.workers, int):
            return supervisor.run(_ray_trainer(config, config.trainer.workers, session, run_dir, prepared, monitor))
        return _train_elastic(config, session, supervisor, run_dir, prepared, monitor)
    finally:
        quarantine.write()


def _train_elastic(
    config: RunConfig,
    session: Session,
    supervisor: TrainingSupervisor,
    run_dir: RunDirectory,
    prepared: PreparedRun,
    monitor: Any,
) -> TrainingResult:
    """Run one trainer after another, each with the largest number of workers that fits on the cluster at its start."""
    failures, on_gpus = 0, session.gpus > 0
    while True:
        workers, session = wait_for_workers(config.trainer, on_gpus=on_gpus)
        on_gpus = on_gpus or session.gpus > 0
        _log.info(f"training by {workers} workers")
        trainer = _ray_trainer(config, workers, session, run_dir, prepared, monitor)
        try:
            result = supervisor.run(trainer, ScaleUpTrigger(config.trainer, workers, session))
        except TrainingFailedError as error:
            failures += 1
            if find_user_error(error) or failures > config.trainer.max_failures:
                raise
            _log.info(f"a worker was lost; going on from step {run_dir.last_step}")
            continue
        if result.stopped and not supervisor.asked_to_stop:
            _log.info(f"room for more workers; going on from step {run_dir.last_step}")
            continue
        return result


def _ray_trainer(
    config: RunConfig, workers: int, session: Session, run_dir: RunDirectory, prepared: PreparedRun, monitor: Any
) -> TorchTrainer:
    """Return Ray's trainer of the run with ``workers`` workers. It starts from the run's last checkpoint, if there is one."""
    resources = session.worker_resources(workers)
    elastic = not isinstance(config.trainer.workers, int)
    config = config.replace(**{"trainer.workers": workers})
    filesystem, path = storage.filesystem(storage.parent(run_dir.uri))
    return TorchTrainer(
        partial(train_worker, config=config, run_dir=run_dir, prepared=prepared, monitor=monitor),
        torch_config=MultiNodeTorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            # PACK fills one machine after another, because GPU workers communicate faster on the same machine.
            placement_strategy="PACK" if "GPU" in resources else "SPREAD",
        ),
        datasets={"pairs": partial(batches_from_last_checkpoint, config, run_dir, prepared, monitor)},
        dataset_config=DataConfig(execution_options=execution_options()),
        # Checkpoints are written by vilseg.training.checkpoints and not by Ray: in the background and with retries.
        run_config=ray.train.RunConfig(
            name=storage.name(run_dir.uri),  # shown in Ray's dashboard
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0 if elastic else config.trainer.max_failures),
        ),
    )


def log_cache_progress(done: int, total: int) -> None:
    """Log the number of shards of the feature cache that are written."""
    _log.info(f"features of {done} of {total} shards cached")
