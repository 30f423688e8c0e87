"""Train: Ray Data streams pairs into Ray Train workers; checkpoints and the model go to the run's storage."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointConfig, DataConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs import cache_features, console
from jobs.feed import count_in_parallel, execution_options, pairs_from_last_checkpoint, worker_batches
from jobs.monitor import Monitor, Snapshot
from jobs.process_group import NodesTorchConfig
from jobs.session import Session, beside_driver, cpus_here, user_error_in
from vilseg import distributed, storage
from vilseg.config import RunConfig
from vilseg.training import run
from vilseg.training.folder import Prepared, RunFolder, checkpoint_name, new_name
from vilseg.training.loop import Trainer
from vilseg.training.sharding import shard

_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    folder: RunFolder
    metrics: dict[str, float]
    """The last report."""
    stopped: bool
    """Asked to stop before the last step; a checkpoint was left."""


def main(
    config: RunConfig,
    session: Session,
    *,
    resume: bool = False,
    progress: Callable[[Snapshot], None] = lambda snapshot: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
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
    resources = session.worker_resources(config.trainer.workers)
    config.trainer.check_shares()
    config = config if config.name else config.model_copy(update={"name": new_name()})
    folder = run.open_folder(config, resume=resume)
    if resume:
        prepared = run.resume(config, folder)
    else:
        cache = None
        if config.data.feature_cache:
            cache = cache_features.main(config, session, progress=say_cached).uri
        prepared = run.prepare(config, folder, count=count_in_parallel, cache=cache)
    monitor = Monitor.options(  # type: ignore[attr-defined]  # ray.remote hides the class it wraps
        scheduling_strategy=beside_driver()
    ).remote(config.data.max_bad_share)
    filesystem, path = storage.filesystem(folder.uri)
    trainer = TorchTrainer(
        partial(train_worker, config=config, folder=folder, prepared=prepared, monitor=monitor),
        torch_config=NodesTorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=config.trainer.workers,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            # Workers with a GPU each fill machines by themselves, and talk the faster the nearer they are.
            placement_strategy="PACK" if "GPU" in resources else "SPREAD",
        ),
        datasets={"pairs": partial(pairs_from_last_checkpoint, config, folder, prepared, monitor)},
        dataset_config=DataConfig(execution_options=execution_options()),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.trainer.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.trainer.keep_checkpoints),
        ),
    )
    return _watch(trainer, monitor, folder, config.trainer.steps, progress, should_stop)


def say_cached(done: int, total: int) -> None:
    """A line of progress."""
    console.say(f"features of {done} of {total} shards cached")


def _watch(
    trainer: TorchTrainer,
    monitor: Any,
    folder: RunFolder,
    steps: int,
    progress: Callable[[Snapshot], None],
    should_stop: Callable[[], bool],
) -> Outcome:
    """Run the trainer in a thread; show progress and take Ctrl-C in this one."""
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  (handed to the caller below)
            failure.append(error)
        finally:
            ended.set()

    # Not Thread.join: interrupted by Ctrl-C, it takes a thread that still runs for one that has ended (Python 3.11).
    ended = threading.Event()
    threading.Thread(target=fit, name="vilseg-train", daemon=True).start()
    last: dict[str, float] = {}
    stopping = False
    with interrupts() as noted:
        while True:
            over = ended.wait(_POLL_SECONDS)
            snapshot = ray.get(monitor.poll.remote())
            last = snapshot.metrics[-1] if snapshot.metrics else last
            progress(snapshot)
            if snapshot.failure:
                raise snapshot.failure  # the trainer goes on restarting its workers, which find nothing to do
            if over:
                break
            if len(noted) > 1:
                raise KeyboardInterrupt
            if noted and not stopping:
                stopping = True
                monitor.stop.remote()
                console.say("stopping after the next report with a checkpoint; Ctrl-C again stops without one")
            elif should_stop() and not stopping:
                stopping = True
                monitor.stop.remote()
    if failure:
        raise user_error_in(failure[0]) or failure[0]
    return Outcome(folder, last, stopping and last.get("step", 0) < steps)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Every Ctrl-C while this lasts, noted instead of raised: as an exception inside Ray's calls it may get lost."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted  # signals come to the main thread alone
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def train_worker(config: RunConfig, folder: RunFolder, prepared: Prepared, monitor: Any) -> None:
    """What every Ray Train worker runs."""
    if ray.get(monitor.failed.remote()):
        return
    try:
        _train(config, folder, prepared, monitor)
    except Exception as error:
        mistake = user_error_in(error)
        if mistake:
            ray.get(monitor.fail.remote(mistake))
        raise


def _train(config: RunConfig, folder: RunFolder, prepared: Prepared, monitor: Any) -> None:
    trainer = make_trainer(config, folder, prepared)
    done = folder.last_step  # the stream of pairs begins after the same one: see pairs_from_last_checkpoint
    if done:
        trainer.load_state_dict(run.load_checkpoint(folder, done))
    first = ray.train.get_context().get_world_rank() == 0
    metrics_file = run.MetricsFile(folder, trainer.step) if first else None
    last = (run.read_metrics(folder) or [{}])[-1] if done else {}
    stop = False

    def on_report(metrics: dict[str, float]) -> None:
        nonlocal stop
        metrics["epoch"] = metrics["samples"] / sum(shard.pairs for shard in prepared.shards)
        last.update(metrics)
        wish = torch.zeros(1, device=trainer.device)
        if metrics_file:
            metrics_file.add(metrics)
            wish += float(ray.get(monitor.report.remote(metrics)))
        stop = bool(distributed.mean_over_workers(wish) > 0)

    def on_checkpoint() -> None:
        state = trainer.state_dict()  # of every worker, or none gets what they share
        if metrics_file is None:
            ray.train.report(last, checkpoint_dir_name=checkpoint_name(trainer.step))
            return
        metrics_file.sync()
        with tempfile.TemporaryDirectory() as local:
            run.save_checkpoint(Path(local), state)
            ray.train.report(
                last,
                checkpoint=ray.train.Checkpoint.from_directory(local),
                checkpoint_dir_name=checkpoint_name(trainer.step),
            )

    batches = worker_batches(ray.train.get_dataset_shard("pairs"))
    trainer.train(batches, on_report=on_report, on_checkpoint=on_checkpoint, should_stop=lambda: stop)
    if trainer.step == config.trainer.steps:
        weights = trainer.model_weights()
        if first:
            run.save_model(trainer.objective.model, config, folder, last, weights)


def make_trainer(config: RunConfig, folder: RunFolder, prepared: Prepared) -> Trainer:
    """A Ray Train worker's trainer of the run's initial model, data-parallel over all workers, its weights whole or sharded."""
    device = ray.train.torch.get_device()
    _limit_threads(device)
    wrap = shard if config.trainer.sharding == "fsdp" else _data_parallel
    return run.make_trainer(config, folder, prepared, device, wrap=wrap)


def _limit_threads(device: torch.device) -> None:
    """Threads beyond the CPUs that a worker holds would fight with its neighbours and with reading."""
    if device.type == "cpu":
        workers_here = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, cpus_here() // workers_here))


def _data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its gradients averaged over the workers."""
    # Encoders of others may hold weights that no loss reaches (a class token's last layer, say).
    options = {"find_unused_parameters": True, "broadcast_buffers": False}
    return ray.train.torch.prepare_model(module, parallel_strategy_kwargs=options)
