"""What Ray Tune is given: the points or the searcher, and the scheduler."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from tune.search_space import Parameter, Point, SearchSpace, identity
from tune.trial_records import TrialRecord

_STUDY = "vilseg"


def unfinished_points(space: SearchSpace, records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """``number`` and ``values`` of the points of a random or grid search that have not ended."""
    if space.search == "optuna":
        return []
    points = dict(enumerate(space.points())) | {record.number: record.point for record in records}
    ended = {record.number for record in records if record.ended}
    return [{"number": number, "values": point} for number, point in points.items() if number not in ended]


def make_optuna_search(space: SearchSpace, records: Sequence[TrialRecord]) -> OptunaSearch:
    """A tree-structured Parzen estimator that knows the trials which have ended, and begins with those that have not."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name=_STUDY, direction="maximize")
    ended = [record for record in records if record.ended]
    for record in ended:
        study.add_trial(_optuna_trial(space, record))
    return OptunaSearch(
        space=_NumberedPoints(space, records),
        metric=space.objective_name,
        mode="max",
        # A resumed search must not draw again what it drew before.
        sampler=optuna.samplers.TPESampler(seed=space.seed + len(ended), constant_liar=True),
        storage=storage,
        study_name=_STUDY,
        points_to_evaluate=[to_optuna_params(space, record.point) for record in records if not record.ended],
    )


class _NumberedPoints:
    """Makes points of what an Optuna trial suggests, and numbers them. A class, as Tune pickles it."""

    def __init__(self, space: SearchSpace, records: Sequence[TrialRecord]) -> None:
        self._space = space
        self._waiting = {identity(record.point): record.number for record in records if not record.ended}
        self._next = max((record.number for record in records), default=-1) + 1

    def __call__(self, trial: Any) -> dict[str, Any]:
        point = self._space.complete(lambda key, parameter: parameter.suggest(key, trial))
        number = self._waiting.pop(identity(point), None)
        if number is None:
            number, self._next = self._next, self._next + 1
        return {"trial": {"number": number, "values": point}}


def _optuna_trial(space: SearchSpace, record: TrialRecord) -> optuna.trial.FrozenTrial:
    score = record.score(space.objective_name)
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.COMPLETE if score == score else optuna.trial.TrialState.FAIL,
        value=score if score == score else None,
        params=to_optuna_params(space, record.point),
        distributions={key: optuna_distribution(space.parameters[key]) for key in record.point},
    )


def to_optuna_params(space: SearchSpace, point: Point) -> Point:
    """A point as Optuna keeps it: choices by position."""
    return {
        key: value if space.parameters[key].choice is None else (space.parameters[key].choice or []).index(value)
        for key, value in point.items()
    }


def optuna_distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """How Optuna sees a parameter; see `Parameter.suggest`."""
    if parameter.uniform:
        return optuna.distributions.FloatDistribution(*parameter.uniform)
    if parameter.loguniform:
        return optuna.distributions.FloatDistribution(*parameter.loguniform, log=True)
    if parameter.int:
        return optuna.distributions.IntDistribution(*parameter.int)
    return optuna.distributions.CategoricalDistribution(range(len(parameter.choice or [])))


def scheduler(space: SearchSpace, steps: int) -> TrialScheduler:
    """What decides which trials go on."""
    if space.scheduler == "asha":
        return ASHAScheduler(
            time_attr="step",
            max_t=steps,
            grace_period=max(1, round(space.asha.grace * steps)),
            reduction_factor=space.asha.reduction,
        )
    if space.scheduler == "pbt":
        random.seed(space.seed)
        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=max(1, round(space.pbt.interval * steps)),
            quantile_fraction=space.pbt.quantile,
            hyperparam_mutations={"trial": {"values": {k: _mutation_domain(p) for k, p in space.parameters.items()}}},
            custom_explore_fn=lambda config: _clip_to_bounds(space, config),
        )
    return FIFOScheduler()


def _mutation_domain(parameter: Parameter) -> Any:
    if parameter.uniform:
        return tune.uniform(*parameter.uniform)
    if parameter.loguniform:
        return tune.loguniform(*parameter.loguniform)
    return parameter.values


def _clip_to_bounds(space: SearchSpace, config: dict[str, Any]) -> dict[str, Any]:
    """Values that a factor has led out of their bounds are brought back."""
    values = config["trial"]["values"]
    for key, parameter in space.parameters.items():
        bounds = parameter.uniform or parameter.loguniform
        if bounds:
            values[key] = min(max(values[key], bounds[0]), bounds[1])
    return config
