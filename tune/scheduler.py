"""Scheduler of trials: Ray Tune's ASHA, population based training, or none (all trials run to their end)."""

from __future__ import annotations

import random
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from tune.search_space import Parameter, SearchSpace


def make_scheduler(space: SearchSpace, steps: int) -> TrialScheduler:
    """Return Ray Tune's scheduler of the space.

    Args:
        space: search space with the name of the scheduler and its settings.
        steps: number of training steps of a full trial.
    """
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
    """Return the Tune domain, or the list of values, from which population based training draws a new value of a parameter."""
    if parameter.uniform:
        return tune.uniform(*parameter.uniform)
    if parameter.loguniform:
        return tune.loguniform(*parameter.loguniform)
    return parameter.values


def _clip_to_bounds(space: SearchSpace, config: dict[str, Any]) -> dict[str, Any]:
    """Clip the values of a trial to the bounds of their parameters, because PBT multiplies values by a factor."""
    values = config["trial"]["values"]
    for key, parameter in space.parameters.items():
        bounds = parameter.uniform or parameter.loguniform
        if bounds:
            values[key] = min(max(values[key], bounds[0]), bounds[1])
    return config
