"""Points of the trials to run: the unfinished points of a random or grid search, or Optuna's search algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from ray.tune.search.optuna import OptunaSearch

from tune.search_space import Parameter, Point, SearchSpace, point_key
from tune.trial_records import TrialRecord

_STUDY = "vilseg"


def unfinished_points(space: SearchSpace, records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Return the points of a random or grid search whose trials have not ended; empty for Optuna.

    Returns:
        For each point, a dict of the trial's ``number`` and its ``values`` by configuration key.
    """
    if space.search == "optuna":
        return []
    points = dict(enumerate(space.points())) | {record.number: record.point for record in records}
    ended = {record.number for record in records if record.ended}
    return [{"number": number, "values": point} for number, point in points.items() if number not in ended]


def make_optuna_search(space: SearchSpace, records: Sequence[TrialRecord]) -> OptunaSearch:
    """Return Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) for Ray Tune.

    It is fitted to the ended trials of ``records``, and suggests the points of the unfinished trials of ``records`` first.
    """
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
        # The seed differs after each resume; with the same one it would draw the same points again.
        sampler=optuna.samplers.TPESampler(seed=space.seed + len(ended), constant_liar=True),
        storage=storage,
        study_name=_STUDY,
        points_to_evaluate=[to_optuna_params(space, record.point) for record in records if not record.ended],
    )


class _NumberedPoints:
    """Function from an Optuna trial to a numbered point; a class and not a closure, because Tune pickles it."""

    def __init__(self, space: SearchSpace, records: Sequence[TrialRecord]) -> None:
        self._space = space
        self._waiting = {point_key(record.point): record.number for record in records if not record.ended}
        self._next = max((record.number for record in records), default=-1) + 1

    def __call__(self, trial: Any) -> dict[str, Any]:
        point = self._space.build_point(lambda key, parameter: parameter.suggest(key, trial))
        number = self._waiting.pop(point_key(point), None)
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
    """Return a point as Optuna stores it, with a value of ``choice`` replaced by its index."""
    return {
        key: value if space.parameters[key].choice is None else (space.parameters[key].choice or []).index(value)
        for key, value in point.items()
    }


def optuna_distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """Return Optuna's distribution of a parameter, which matches `Parameter.suggest`."""
    if parameter.uniform:
        return optuna.distributions.FloatDistribution(*parameter.uniform)
    if parameter.loguniform:
        return optuna.distributions.FloatDistribution(*parameter.loguniform, log=True)
    if parameter.int:
        return optuna.distributions.IntDistribution(*parameter.int)
    return optuna.distributions.CategoricalDistribution(range(len(parameter.choice or [])))
