"""Training function that every Ray Train worker runs."""

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
from vilseg.training import run_results, run_setup
from vilseg.training.checkpoints import read_checkpoint
from vilseg.training.fsdp import apply_fsdp
from vilseg.training.loop import NonFiniteLossError, Trainer
from vilseg.training.run_dir import PreparedRun, RunDirectory


def train_worker(config: RunConfig, run_dir: RunDirectory, prepared: PreparedRun, monitor: Any) -> None:
    """Train from the last checkpoint to the last step, or until the driver requests to stop.

    A user error is passed to the training monitor. Ray restarts the workers after any exception, and restarted workers return at
    once if the monitor holds an error.
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
    last_step = run_dir.last_step  # batches_from_last_checkpoint starts the batches after the same step
    if last_step:
        trainer.load_state_dict(read_checkpoint(run_dir, last_step))
    batches = worker_batches(ray.train.get_dataset_shard("pairs"))
    stop = False

    def agree_to_stop(wanted: bool) -> None:
        nonlocal stop  # all workers have to stop at the same step, otherwise collective operations would hang
        stop = bool(distributed.mean_over_workers(torch.tensor(float(wanted), device=trainer.device)) > 0)

    if ray.train.get_context().get_world_rank():
        with suppress(
            NonFiniteLossError
        ):  # rank 0 raises the same error, after it has written the details of all workers
            trainer.train(
                batches,
                on_report=lambda _: agree_to_stop(False),
                # Collective: sharded weights are gathered on rank 0 only if every rank makes the same call.
                on_checkpoint=trainer.state_dict,
                should_stop=lambda: stop,
            )
            if trainer.step == config.trainer.steps:
                trainer.model_weights()
        return
    sampler = make_sampler(config, prepared)
    with (
        run_results.record_nonfinite(run_dir),
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
    """Return the trainer of a Ray Train worker, with the run's initial model wrapped by DDP or FSDP over all workers."""
    device = ray.train.torch.get_device()
    _limit_threads(device)
    wrap = apply_fsdp if config.trainer.sharding == "fsdp" else _data_parallel
    return run_setup.make_trainer(config, run_dir, prepared, device, wrap=wrap)


def _limit_threads(device: torch.device) -> None:
    """Without GPUs, set torch's threads to the machine's CPUs divided by its workers; more would compete with the readers."""
    if device.type == "cpu":
        workers_here = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, node_cpu_count() // workers_here))


def _data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    """Wrap a module in DDP, which averages its gradients over the workers."""
    # Pretrained encoders may hold weights without a gradient, for example the last layer's class token.
    options = {"find_unused_parameters": True, "broadcast_buffers": False}
    return ray.train.torch.prepare_model(module, parallel_strategy_kwargs=options)
