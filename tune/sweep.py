"""A sweep: trials under Ray Tune, their records, and what is made of them: ``best.yaml`` and ``report.html``.

The folder of a sweep:

    config.yaml, space.yaml   what it was begun with
    records/NNNN.json         a trial: its point, how it ended, every evaluation
    trials/NNNN/              the trial's run, as `vilseg train` leaves it
    best.yaml                 configuration of the best point, for `vilseg train --config`
    sweep.json, report.html   the figures, and a page to look at

Tune schedules, prunes and searches; what is known of a trial is kept here and not in Tune's own pickled state. So a sweep
that was killed goes on from the records: what ended is not done again, what was on its way goes on from its last checkpoint.
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
from tune.searcher import make_optuna_search, scheduler, unfinished_points
from tune.search_space import SearchSpace, config_at_point
from tune.trial import Trial, TrialResources, function_trainable, ray_train_trainable
from tune.trial_records import PointResult, TrialRecord, TrialRecords, groups, trial_name
from vilseg import storage
from vilseg.config import RunConfig, absolute_places, list_places
from vilseg.errors import ConfigError, StorageError, UserError
from vilseg.evaluation.datasets import open_dataset
from vilseg.training.run_dir import new_run_name
from vilseg.training.run_setup import preflight

_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours does not lose what Tune has not written yet
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files of its own that nobody reads
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one greets whatever it is told
}
_ALONE = 0.01
"""CPUs of a trial's own process where workers of Ray Train do its work: it waits, and evaluates now and then. What it held
would be missing where pairs are read."""


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended."""

    folder: str
    best: PointResult | None
    """None where no trial has a score."""
    records: tuple[TrialRecord, ...]
    interrupted: bool

    @property
    def best_config(self) -> str:
        """URI of the best point's configuration."""
        return storage.join(self.folder, "best.yaml")

    @property
    def report(self) -> str:
        """URI of the page."""
        return storage.join(self.folder, "report.html")


def check(config: RunConfig, space: SearchSpace, *, resume: bool) -> None:
    """What can be said against a sweep before anything is started.

    Raises:
        ConfigError, DataError, StorageError: see there.
    """
    config = absolute_places(config)
    space = absolute_choices(config, space)
    space.check(config)
    preflight(config.replace(name=None), resume=False)
    if config.data.held_out:
        storage.require_bucket(config.data.held_out)
    if space.dataset:
        open_dataset(space.dataset)
    if config.name:
        _check_folder(config, space, resume=resume)


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
    """Run the trials and leave the best configuration and the report in ``{trainer.storage}/{name}``.

    Args:
        config: what every trial has but for the point's values; a name is made where it has none.
        space: what varies.
        session: the cluster.
        resume: go on with the sweep of that name.
        time_budget: seconds after which no trial goes on.
        show: told of all trials so far, and the objective, whenever one of them has news.
        command: shown in the report.

    Raises:
        UserError: what is wrong with the configuration, the space, the pairs or the storage.
    """
    config = config if config.name else config.replace(name=new_run_name())
    config = absolute_places(config)
    space = absolute_choices(config, space)
    check(config, space, resume=resume)
    folder = _folder(config)
    cache = (
        feature_cache.main(config, session, progress=train_job.log_cache_progress).uri
        if config.data.feature_cache
        else None
    )
    kept = storage.join(folder, "records")
    records = TrialRecords(kept)
    layout = plan_trials(config, session)
    trial = Trial(config, space, storage.join(folder, "trials"), kept, layout, cache)
    watch = TrialCallback(records, config.trainer.steps, lambda: show(list(records), space.objective_name))
    _run(trial, watch, records, time_budget)
    best = next(iter(groups(list(records), space.objective_name)), None)
    done = SweepResult(folder, best, tuple(records), bool(watch.interrupts))
    _write(done, config, space, command)
    if best is None and not done.interrupted:
        raise _no_score_error(done, space)
    return done


def absolute_choices(config: RunConfig, space: SearchSpace) -> SearchSpace:
    """Return ``space`` with the places among its choices made absolute, as those of the configuration are."""
    parameters = dict(space.parameters)
    for key, parameter in parameters.items():
        if parameter.choice is None or not all(isinstance(value, str) for value in parameter.choice):
            continue
        points = [absolute_places(config_at_point(config, {key: value})) for value in parameter.choice]
        places = [{place.key: place.value for place in list_places(point)} for point in points]
        choice = [found.get(key, value) for found, value in zip(places, parameter.choice, strict=True)]
        parameters[key] = parameter.replace(choice=choice)
    return absolute_places(space.replace(parameters=parameters))


def plan_trials(config: RunConfig, session: Session) -> TrialResources:
    """How many trials run at a time, and what each takes.

    A trial of one worker holds a CPU (and a GPU, where there are some) and reads its own pairs. A trial of several is a
    process that mostly waits and workers of Ray Train beside it; these and the tasks that read for them share what the
    trials that run at a time leave to each, so that nobody waits for a CPU that another trial will not give back.

    Raises:
        ConfigError: more workers than CPUs.
    """
    workers = config.trainer.workers
    if not isinstance(workers, int):
        raise ConfigError(
            f"trainer.workers is {list(workers)}, but a sweep lays its trials out before they begin; give one number"
        )
    session.worker_resources(workers)  # refuses what cannot run
    if workers == 1:
        concurrent = min(session.cpus, session.gpus or session.cpus)
        return TrialResources(concurrent, 1, 1 if session.gpus else 0, nested=False)
    by_gpus = session.gpus // workers if session.gpus else session.cpus
    concurrent = max(1, min(session.cpus // (workers + 1), by_gpus))
    return TrialResources(concurrent, session.cpus // concurrent, session.gpus // concurrent, nested=True)


def _folder(config: RunConfig) -> str:
    return storage.join(config.trainer.storage, str(config.name))


def _check_folder(config: RunConfig, space: SearchSpace, *, resume: bool) -> None:
    """Refuse a folder that belongs to another sweep, or to none where one is to go on."""
    folder = _folder(config)
    written = storage.join(folder, "space.yaml")
    if not resume:
        if storage.exists(folder):
            raise StorageError(f"{folder} exists already; go on with its sweep by --resume or choose another --name")
        return
    if not storage.exists(written):
        raise ConfigError(f"there is no sweep to resume at {folder}")
    for name, now in (("config.yaml", config), ("space.yaml", space)):
        before = type(now).load(storage.join(folder, name))
        if _fixed_settings(before) != _fixed_settings(now):
            raise ConfigError(
                f"cannot resume the sweep {folder}: its {name} is another; give what it was begun with, or another --name"
            )


def _fixed_settings(tree: RunConfig | SearchSpace) -> dict[str, Any]:
    """What must not change from one part of a sweep to the next; more trials are welcome."""
    values = tree.model_dump(mode="json")
    values.pop("trials", None)
    return values


def _run(trial: Trial, watch: TrialCallback, records: TrialRecords, time_budget: float | None) -> None:
    """Let Tune run what is not done yet."""
    space = trial.space
    sweep = storage.parent(trial.folder)
    storage.write_text(storage.join(sweep, "config.yaml"), trial.config.to_yaml())
    storage.write_text(storage.join(sweep, "space.yaml"), space.to_yaml())
    search = make_optuna_search(space, list(records)) if space.search == "optuna" else None
    left = unfinished_points(space, list(records))
    count = space.trials - sum(record.ended for record in records) if search else len(left)
    if count <= 0:
        return
    filesystem, path = storage.filesystem(storage.join(sweep, "tune"))
    layout = trial.layout
    resources = {"cpu": _ALONE if layout.nested else layout.cpus, "gpu": 0 if layout.nested else layout.gpus}
    tuner = tune.Tuner(
        tune.with_resources((ray_train_trainable if layout.nested else function_trainable)(trial), resources),
        param_space={} if search else {"trial": tune.grid_search(left)},
        tune_config=tune.TuneConfig(
            metric=space.objective_name,
            mode="max",
            scheduler=scheduler(space, trial.config.trainer.steps),
            search_alg=search,
            num_samples=count if search else 1,
            # A population takes turns on what there is; all others come when there is room.
            max_concurrent_trials=None if space.scheduler == "pbt" else layout.concurrent,
            time_budget_s=time_budget,
            # What has workers of Ray Train beside it is ended with them; only a trial alone is begun anew in its process.
            reuse_actors=not layout.nested,
            # Population based training copies configurations from trial to trial; names stay.
            trial_name_creator=lambda made: trial_name(made.config["trial"]["number"]),
            trial_dirname_creator=lambda made: trial_name(made.config["trial"]["number"]),
        ),
        run_config=tune.RunConfig(
            name="state",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[watch],
            stop=watch.stopper(),
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    os.environ.update(_TUNE_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with collect_signals() as watch.interrupts:
        tuner.fit()
    storage.delete(storage.join(sweep, "tune"))


def _write(done: SweepResult, config: RunConfig, space: SearchSpace, command: str) -> None:
    """``best.yaml``, ``sweep.json`` and the report."""
    if done.best:
        # The name is that of the sweep; a run is given its own.
        best = config_at_point(config, done.best.point).replace(name=None)
        storage.write_text(done.best_config, best.to_yaml())
    tree = {
        "objective": space.objective_name,
        "best": {"point": done.best.point, "score": done.best.score} if done.best else None,
        "trials": [asdict(record) for record in done.records],
    }
    commands = [*([command] if command else ()), f"vilseg train --config {done.best_config} --name best"]
    storage.write_text(storage.join(done.folder, "sweep.json"), json.dumps(tree, indent=1))
    storage.write_text(done.report, render(str(config.name), config, space, done.records, done.best, commands))


def _no_score_error(done: SweepResult, space: SearchSpace) -> UserError:
    failed = [record for record in done.records if record.status == "failed"]
    if not failed:
        return UserError(
            "no trial was evaluated before the time was over; give more than --time-budget, or fewer steps"
        )
    return UserError(
        f"all {len(failed)} trials failed; the first, {trial_name(failed[0].number)}, because {failed[0].error} "
        f"(all in {storage.join(done.folder, 'records')})"
    )
