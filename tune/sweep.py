"""Sweep: runs trials under Ray Tune, keeps their records, and writes the best configuration and a report.

The directory of a sweep:

    config.yaml, space.yaml   configuration and search space that the sweep was started with
    records/NNNN.json         record of a trial: its point, its status, every evaluation
    trials/NNNN/              run directory of the trial, as `vilseg train` writes it
    best.yaml                 configuration of the best point, for `vilseg train --config`
    sweep.json, report.html   metrics of all trials, and the report

Tune schedules, stops and searches. The state of a trial is kept in its record and not in Tune's own pickled state. A killed sweep
is resumed from the records: ended trials are not repeated, and running ones continue from their last checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ray import tune

from cluster.ray_session import Session
from jobs.train import feature_cache, train_job
from jobs.train.supervisor import collect_signals
from tune.callbacks import TrialCallback
from tune.report import render
from tune.scheduler import make_scheduler
from tune.search_space import SearchSpace, config_at_point
from tune.searcher import make_optuna_search, unfinished_points
from tune.trial import TrialResources, TrialRunner, function_trainable, ray_train_trainable
from tune.trial_records import PointResult, TrialRecord, TrialRecords, rank_points, trial_name
from vilseg import storage
from vilseg.config import RunConfig, absolute_locations, list_locations
from vilseg.errors import ConfigError, StorageError, UserError
from vilseg.evaluation.datasets import open_dataset
from vilseg.training.run_dir import new_run_name
from vilseg.training.run_setup import preflight

_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # collect_signals handles Ctrl-C without losing results that Tune has not written yet
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # Tune writes no result files of its own
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner at any verbosity
}
_WAITING_TRIAL_CPUS = 0.01
"""CPUs reserved by the process of a trial that Ray Train workers train; it mostly waits, and the readers need the CPUs."""


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep."""

    uri: str
    """Directory of the sweep."""
    best: PointResult | None
    """Best point; None if no trial has a score."""
    records: tuple[TrialRecord, ...]
    interrupted: bool
    """Ctrl-C or SIGTERM ended the sweep."""

    @property
    def best_config(self) -> str:
        """URI of the best point's configuration."""
        return storage.join(self.uri, "best.yaml")

    @property
    def report(self) -> str:
        """URI of the HTML report."""
        return storage.join(self.uri, "report.html")


def check(config: RunConfig, space: SearchSpace, *, resume: bool) -> None:
    """Check a sweep before Ray is started.

    Raises:
        ConfigError: the space does not fit the configuration, or the sweep to resume has another configuration or space.
        DataError: the dataset or the pairs cannot be read.
        StorageError: a bucket is missing, or the sweep's directory exists and ``resume`` is not set.
    """
    config = absolute_locations(config)
    space = absolute_choices(config, space)
    space.check(config)
    preflight(config.replace(name=None), resume=False)
    if config.data.held_out:
        storage.require_bucket(config.data.held_out)
    if space.dataset:
        open_dataset(space.dataset)
    if config.name:
        _check_directory(config, space, resume=resume)


def main(
    config: RunConfig,
    space: SearchSpace,
    session: Session,
    *,
    resume: bool = False,
    time_budget: float | None = None,
    show: Callable[[list[TrialRecord], str], None] = lambda records, objective: None,
    command: str = "",
) -> SweepResult:
    """Run a sweep, and write the best configuration and the report to ``{trainer.storage}/{name}``.

    Args:
        config: configuration of every trial, except for the values of its point. If it has no name, one is generated.
        space: search space.
        session: the cluster.
        resume: continue the sweep of that name.
        time_budget: seconds after which all trials are stopped; None sets no limit.
        show: function called with the records of all trials so far and the name of the objective, whenever a trial changes.
        command: command line to show in the report.

    Raises:
        UserError: the configuration, the space, the pairs or the storage has an error that the user can correct, or no trial has
            a score.
    """
    config = config if config.name else config.replace(name=new_run_name())
    config = absolute_locations(config)
    space = absolute_choices(config, space)
    check(config, space, resume=resume)
    uri = _sweep_uri(config)
    cache = (
        feature_cache.main(config, session, progress=train_job.log_cache_progress).uri
        if config.data.feature_cache
        else None
    )
    records_uri = storage.join(uri, "records")
    records = TrialRecords(records_uri)
    resources = plan_trials(config, session)
    runner = TrialRunner(config, space, storage.join(uri, "trials"), records_uri, resources, cache)
    callback = TrialCallback(records, config.trainer.steps, lambda: show(list(records), space.objective_name))
    _run_tuner(runner, callback, records, time_budget)
    best = next(iter(rank_points(list(records), space.objective_name)), None)
    result = SweepResult(uri, best, tuple(records), bool(callback.interrupts))
    _write_results(result, config, space, command)
    if best is None and not result.interrupted:
        raise _no_score_error(result, space)
    return result


def absolute_choices(config: RunConfig, space: SearchSpace) -> SearchSpace:
    """Return ``space`` with all paths, in its choices and its other fields, made absolute, as in the configuration."""
    parameters = dict(space.parameters)
    for key, parameter in parameters.items():
        if parameter.choice is None or not all(isinstance(value, str) for value in parameter.choice):
            continue
        points = [absolute_locations(config_at_point(config, {key: value})) for value in parameter.choice]
        locations = [{location.key: location.value for location in list_locations(point)} for point in points]
        choice = [found.get(key, value) for found, value in zip(locations, parameter.choice, strict=True)]
        parameters[key] = parameter.replace(choice=choice)
    return absolute_locations(space.replace(parameters=parameters))


def plan_trials(config: RunConfig, session: Session) -> TrialResources:
    """Return the number of trials that run at the same time, and the resources of each.

    A trial with one worker uses one CPU (and one GPU, if there are any) and reads its own pairs. A trial with several workers is
    a process that mostly waits, plus Ray Train workers and their readers. Every trial gets an equal fraction of the cluster for
    them, so that no trial waits for a CPU that another trial holds until its end.

    Raises:
        ConfigError: there are more workers than CPUs or GPUs, or ``trainer.workers`` is a range.
    """
    workers = config.trainer.workers
    if not isinstance(workers, int):
        raise ConfigError(
            f"trainer.workers is {list(workers)}, but a sweep lays its trials out before they begin; give one number"
        )
    session.worker_resources(workers)  # raises ConfigError if there are too few CPUs or GPUs
    if workers == 1:
        concurrent = min(session.cpus, session.gpus or session.cpus)
        return TrialResources(concurrent, 1, 1 if session.gpus else 0, on_ray_workers=False)
    by_gpus = session.gpus // workers if session.gpus else session.cpus
    concurrent = max(1, min(session.cpus // (workers + 1), by_gpus))
    return TrialResources(concurrent, session.cpus // concurrent, session.gpus // concurrent, on_ray_workers=True)


def _sweep_uri(config: RunConfig) -> str:
    return storage.join(config.trainer.storage, str(config.name))


def _check_directory(config: RunConfig, space: SearchSpace, *, resume: bool) -> None:
    """Raise an error if the directory exists, or, on ``resume``, if it holds no sweep or one with other settings."""
    uri = _sweep_uri(config)
    written = storage.join(uri, "space.yaml")
    if not resume:
        if storage.exists(uri):
            raise StorageError(f"{uri} exists already; go on with its sweep by --resume or choose another --name")
        return
    if not storage.exists(written):
        raise ConfigError(f"there is no sweep to resume at {uri}")
    for name, now in (("config.yaml", config), ("space.yaml", space)):
        before = type(now).load(storage.join(uri, name))
        if _fixed_settings(before) != _fixed_settings(now):
            raise ConfigError(
                f"cannot resume the sweep {uri}: its {name} is another; give what it was begun with, or another --name"
            )


def _fixed_settings(tree: RunConfig | SearchSpace) -> dict[str, Any]:
    """Return the values that must be unchanged on ``--resume``: all except the number of trials."""
    values = tree.model_dump(mode="json")
    values.pop("trials", None)
    return values


def _run_tuner(runner: TrialRunner, callback: TrialCallback, records: TrialRecords, time_budget: float | None) -> None:
    """Run the trials that have not ended under Ray Tune."""
    space = runner.space
    sweep_uri = storage.parent(runner.runs_uri)
    storage.write_text(storage.join(sweep_uri, "config.yaml"), runner.config.to_yaml())
    storage.write_text(storage.join(sweep_uri, "space.yaml"), space.to_yaml())
    tune_uri = storage.join(sweep_uri, "tune")
    tuner = _make_tuner(runner, callback, list(records), time_budget, tune_uri)
    if tuner is None:
        return
    os.environ.update(_TUNE_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with collect_signals() as callback.interrupts:
        tuner.fit()
    storage.delete(tune_uri)


def _make_tuner(
    runner: TrialRunner, callback: TrialCallback, records: list[TrialRecord], time_budget: float | None, tune_uri: str
) -> tune.Tuner | None:
    """Return Ray Tune's tuner of the trials that have not ended; None if all have ended.

    Args:
        runner: runner of the trials.
        callback: writer of their records.
        records: records of the trials so far.
        time_budget: seconds after which all trials are stopped; None sets no limit.
        tune_uri: URI of the directory for Tune's own state.
    """
    space, resources = runner.space, runner.resources
    search = make_optuna_search(space, records) if space.search == "optuna" else None
    points = unfinished_points(space, records)
    count = space.trials - sum(record.ended for record in records) if search else len(points)
    if count <= 0:
        return None
    filesystem, path = storage.filesystem(tune_uri)
    on_workers = resources.on_ray_workers
    held = {"cpu": _WAITING_TRIAL_CPUS, "gpu": 0} if on_workers else {"cpu": resources.cpus, "gpu": resources.gpus}
    return tune.Tuner(
        tune.with_resources((ray_train_trainable if on_workers else function_trainable)(runner), held),
        param_space={} if search else {"trial": tune.grid_search(points)},
        tune_config=tune.TuneConfig(
            metric=space.objective_name,
            mode="max",
            scheduler=make_scheduler(space, runner.config.trainer.steps),
            search_alg=search,
            num_samples=count if search else 1,
            # PBT needs its whole population: its trials take turns on the resources. Other trials start when resources are free.
            max_concurrent_trials=None if space.scheduler == "pbt" else resources.concurrent,
            time_budget_s=time_budget,
            # A process that trains by Ray Train workers ends with its trial; others run one trial after another.
            reuse_actors=not on_workers,
            # PBT copies configurations from trial to trial, but a trial keeps the name made at its start.
            trial_name_creator=lambda made: trial_name(made.config["trial"]["number"]),
            trial_dirname_creator=lambda made: trial_name(made.config["trial"]["number"]),
        ),
        run_config=tune.RunConfig(
            name="state",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[callback],
            stop=callback.stopper(),
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )


def _write_results(result: SweepResult, config: RunConfig, space: SearchSpace, command: str) -> None:
    """Write ``best.yaml``, ``sweep.json`` and the report."""
    if result.best:
        # Without the name, which is that of the sweep.
        best = config_at_point(config, result.best.point).replace(name=None)
        storage.write_text(result.best_config, best.to_yaml())
    tree = {
        "objective": space.objective_name,
        "best": {"point": result.best.point, "score": result.best.score} if result.best else None,
        "trials": [asdict(record) for record in result.records],
    }
    commands = [*([command] if command else ()), f"vilseg train --config {result.best_config} --name best"]
    storage.write_text(storage.join(result.uri, "sweep.json"), json.dumps(tree, indent=1))
    storage.write_text(result.report, render(str(config.name), config, space, result.records, result.best, commands))


def _no_score_error(result: SweepResult, space: SearchSpace) -> UserError:
    failed = [record for record in result.records if record.status == "failed"]
    if not failed:
        return UserError(
            "no trial was evaluated before the time was over; give more than --time-budget, or fewer steps"
        )
    return UserError(
        f"all {len(failed)} trials failed; the first, {trial_name(failed[0].number)}, because {failed[0].error} "
        f"(all in {storage.join(result.uri, 'records')})"
    )
