"""Train: Ray Data streams pairs into Ray Train workers; checkpoints and the model go to the run's storage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import DataConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.ray_session import Session, check_workers, driver_node_affinity, find_user_error, node_cpu_count
from jobs.train import feature_cache
from jobs.train.elastic import ScaleUpTrigger, wait_for_workers
from jobs.train.monitor import ProgressUpdate, TrainingMonitor
from jobs.train.process_group import MultiNodeTorchConfig
from jobs.train.ray_data import (
    batches_from_last_checkpoint,
    count_in_parallel,
    execution_options,
    make_sampler,
    worker_batches,
)
from jobs.train.reporting import TrainingReporter
from jobs.train.supervisor import QuarantineFile, TrainingResult, TrainingSupervisor, sigterm_as_ctrl_c
from vilseg import distributed, storage
from vilseg.config import RunConfig
from vilseg.training import run_setup
from vilseg.training.checkpoints import read_checkpoint
from vilseg.training.fsdp import apply_fsdp
from vilseg.training.loop import NonFiniteLossError, Trainer
from vilseg.training.run_dir import PreparedRun, RunDirectory, new_run_name

_log = logging.getLogger("vilseg.jobs.train")


@sigterm_as_ctrl_c()  # while pairs are counted, features cached and machines waited for, too
def main(
    config: RunConfig,
    session: Session,
    *,
    resume: bool = False,
    progress: Callable[[ProgressUpdate], None] = lambda snapshot: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train as ``config`` says on the connected cluster.

    Args:
        config: of the run; a name is made where it has none. On ``resume`` the steps and workers may differ from before.
        session: the cluster.
        resume: go on from the last checkpoint of the run of that name.
        progress: told a few times a second what is new.
        should_stop: asked as often; a stop leaves a checkpoint.

    Raises:
        UserError: anything in the configuration, the pairs or the storage that is wrong.
        KeyboardInterrupt: Ctrl-C, after the last checkpoint was written; a second one does not wait for it.
    """
    check_workers(config.trainer.min_workers, session.cpus)
    config.trainer.check_even_split()
    config = config if config.name else config.model_copy(update={"name": new_run_name()})
    folder = run_setup.open_run_directory(config, resume=resume)
    if resume:
        prepared = run_setup.resume(config, folder)
    else:
        cache = None
        if config.data.feature_cache:
            cache = feature_cache.main(config, session, progress=log_cache_progress).uri
        prepared = run_setup.prepare(config, folder, count=count_in_parallel, cache=cache)
    monitor = TrainingMonitor.options(  # type: ignore[attr-defined]  # ray.remote hides the class it wraps
        scheduling_strategy=driver_node_affinity()
    ).remote(config.data.max_bad_share)
    quarantine = QuarantineFile(folder)

    def told(snapshot: ProgressUpdate) -> None:
        quarantine.add(snapshot.bad)
        progress(snapshot)

    watch = TrainingSupervisor(monitor, folder, config.trainer.steps, told, should_stop)
    try:
        if isinstance(config.trainer.workers, int):
            return watch.run(_ray_trainer(config, config.trainer.workers, session, folder, prepared, monitor))
        return _train_elastic(config, watch, folder, prepared, monitor)
    finally:
        quarantine.write()


def _train_elastic(
    config: RunConfig, watch: TrainingSupervisor, folder: RunDirectory, prepared: PreparedRun, monitor: Any
) -> TrainingResult:
    """One trainer after the other, each with as many workers as there is room for."""
    failures = 0
    while True:
        workers, session = wait_for_workers(config.trainer)
        _log.info(f"training by {workers} workers")
        trainer = _ray_trainer(config, workers, session, folder, prepared, monitor)
        try:
            outcome = watch.run(trainer, ScaleUpTrigger(config.trainer, workers, session))
        except TrainingFailedError as error:
            failures += 1
            if find_user_error(error) or failures > config.trainer.max_failures:
                raise
            _log.info(f"a worker was lost; going on from step {folder.last_step}")
            continue
        if outcome.stopped and not watch.asked_to_stop:
            _log.info(f"room for more workers; going on from step {folder.last_step}")
            continue
        return outcome


def _ray_trainer(
    config: RunConfig, workers: int, session: Session, folder: RunDirectory, prepared: PreparedRun, monitor: Any
) -> TorchTrainer:
    resources = session.worker_resources(workers)
    elastic = not isinstance(config.trainer.workers, int)
    trainer_config = config.trainer.model_copy(update={"workers": workers})
    config = config.model_copy(update={"trainer": trainer_config})
    filesystem, path = storage.filesystem(storage.parent(folder.uri))
    return TorchTrainer(
        partial(train_worker, config=config, folder=folder, prepared=prepared, monitor=monitor),
        torch_config=MultiNodeTorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            # Workers with a GPU each fill machines by themselves, and talk the faster the nearer they are.
            placement_strategy="PACK" if "GPU" in resources else "SPREAD",
        ),
        datasets={"pairs": partial(batches_from_last_checkpoint, config, folder, prepared, monitor)},
        dataset_config=DataConfig(execution_options=execution_options()),
        # Checkpoints are ours, not Ray's (vilseg.training.checkpoints): written beside the training, and retried while the store
        # is away.
        run_config=ray.train.RunConfig(
            name=storage.name(folder.uri),  # as the dashboard shows it
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0 if elastic else config.trainer.max_failures),
        ),
    )


def log_cache_progress(done: int, total: int) -> None:
    """Log how many shards of the feature cache are written."""
    _log.info(f"features of {done} of {total} shards cached")


def train_worker(config: RunConfig, folder: RunDirectory, prepared: PreparedRun, monitor: Any) -> None:
    """What every Ray Train worker runs."""
    if ray.get(monitor.failed.remote()):
        return
    try:
        with storage.retrying():
            _train(config, folder, prepared, monitor)
    except Exception as error:
        mistake = find_user_error(error)
        if mistake:
            ray.get(monitor.fail.remote(mistake))
        raise


def _train(config: RunConfig, folder: RunDirectory, prepared: PreparedRun, monitor: Any) -> None:
    trainer = make_trainer(config, folder, prepared)
    done = folder.last_step  # the stream of pairs begins after the same one: see batches_from_last_checkpoint
    if done:
        trainer.load_state_dict(read_checkpoint(folder, done))
    batches = worker_batches(ray.train.get_dataset_shard("pairs"))
    stop = False

    def agree(wish: bool) -> None:
        nonlocal stop  # all stop at the same step, or some would wait for the others
        stop = bool(distributed.mean_over_workers(torch.tensor(float(wish), device=trainer.device)) > 0)

    if ray.train.get_context().get_world_rank():
        with suppress(NonFiniteLossError):  # the first worker tells of it, once it has kept what the others saw
            trainer.train(
                batches,
                on_report=lambda _: agree(False),
                # Where weights are sharded, the first worker can have them whole only if all ask.
                on_checkpoint=trainer.state_dict,
                should_stop=lambda: stop,
            )
            if trainer.step == config.trainer.steps:
                trainer.model_weights()
        return
    order = make_sampler(config, prepared)
    with run_setup.record_nonfinite(folder), TrainingReporter(config, folder, trainer, monitor, order) as log:
        trainer.train(
            log.keep_examples(batches),
            on_report=lambda metrics: agree(log.report(metrics)),
            on_checkpoint=log.checkpoint,
            should_stop=lambda: stop,
        )
        if trainer.step == config.trainer.steps:
            log.save_model()


def make_trainer(config: RunConfig, folder: RunDirectory, prepared: PreparedRun) -> Trainer:
    """A Ray Train worker's trainer of the run's initial model, data-parallel over all workers, its weights whole or sharded."""
    device = ray.train.torch.get_device()
    _limit_threads(device)
    wrap = apply_fsdp if config.trainer.sharding == "fsdp" else _data_parallel
    return run_setup.make_trainer(config, folder, prepared, device, wrap=wrap)


def _limit_threads(device: torch.device) -> None:
    """Threads beyond the CPUs that a worker holds would fight with its neighbours and with reading."""
    if device.type == "cpu":
        workers_here = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, node_cpu_count() // workers_here))


def _data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its gradients averaged over the workers."""
    # Encoders of others may hold weights that no loss reaches (a class token's last layer, say).
    options = {"find_unused_parameters": True, "broadcast_buffers": False}
    return ray.train.torch.prepare_model(module, parallel_strategy_kwargs=options)
