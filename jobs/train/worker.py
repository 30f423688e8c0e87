"""The function that every Ray Train worker runs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from cluster.ray_session import find_user_error, node_cpu_count
from jobs.train.ray_data import make_sampler, worker_batches
from jobs.train.reporting import TrainingReporter
from vilseg import distributed, storage
from vilseg.config import RunConfig
from vilseg.training import run_setup
from vilseg.training.checkpoints import read_checkpoint
from vilseg.training.fsdp import apply_fsdp
from vilseg.training.loop import NonFiniteLossError, Trainer
from vilseg.training.run_dir import PreparedRun, RunDirectory


def train_worker(config: RunConfig, run_dir: RunDirectory, prepared: PreparedRun, monitor: Any) -> None:
    """Train from the last checkpoint to the last step, or until the driver asks to stop.

    A user error is passed to the monitor: Ray restarts the workers after any exception, and they return at once where the
    monitor has an error.
    """
    if ray.get(monitor.has_failed.remote()):
        return
    try:
        with storage.retrying():
            _train(config, run_dir, prepared, monitor)
    except Exception as error:
        user_error = find_user_error(error)
        if user_error:
            ray.get(monitor.fail.remote(user_error))
        raise


def _train(config: RunConfig, run_dir: RunDirectory, prepared: PreparedRun, monitor: Any) -> None:
    trainer = make_trainer(config, run_dir, prepared)
    last_step = run_dir.last_step  # the batches begin after the same step: see batches_from_last_checkpoint
    if last_step:
        trainer.load_state_dict(read_checkpoint(run_dir, last_step))
    batches = worker_batches(ray.train.get_dataset_shard("pairs"))
    stop = False

    def agree_to_stop(wanted: bool) -> None:
        nonlocal stop  # all workers stop at the same step; otherwise some would wait for the others
        stop = bool(distributed.mean_over_workers(torch.tensor(float(wanted), device=trainer.device)) > 0)

    if ray.train.get_context().get_world_rank():
        with suppress(NonFiniteLossError):  # rank 0 raises it, after it has written what every worker saw
            trainer.train(
                batches,
                on_report=lambda _: agree_to_stop(False),
                # Collective: sharded weights are gathered on rank 0 only if every rank asks for them.
                on_checkpoint=trainer.state_dict,
                should_stop=lambda: stop,
            )
            if trainer.step == config.trainer.steps:
                trainer.model_weights()
        return
    sampler = make_sampler(config, prepared)
    with (
        run_setup.record_nonfinite(run_dir),
        TrainingReporter(config, run_dir, trainer, monitor, sampler) as reporter,
    ):
        trainer.train(
            reporter.keep_examples(batches),
            on_report=lambda metrics: agree_to_stop(reporter.report(metrics)),
            on_checkpoint=reporter.checkpoint,
            should_stop=lambda: stop,
        )
        if trainer.step == config.trainer.steps:
            reporter.save_model()


def make_trainer(config: RunConfig, run_dir: RunDirectory, prepared: PreparedRun) -> Trainer:
    """Return the trainer of a Ray Train worker: the run's initial model, wrapped by DDP or FSDP over all workers."""
    device = ray.train.torch.get_device()
    _limit_threads(device)
    wrap = apply_fsdp if config.trainer.sharding == "fsdp" else _data_parallel
    return run_setup.make_trainer(config, run_dir, prepared, device, wrap=wrap)


def _limit_threads(device: torch.device) -> None:
    """Give each worker on a machine without GPUs its part of the CPUs: more threads compete with other workers and readers."""
    if device.type == "cpu":
        workers_here = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, node_cpu_count() // workers_here))


def _data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    """Wrap a module so that its gradients are averaged over the workers."""
    # Pretrained encoders may hold weights that no loss reaches, for example the last layer's class token.
    options = {"find_unused_parameters": True, "broadcast_buffers": False}
    return ray.train.torch.prepare_model(module, parallel_strategy_kwargs=options)
