"""Search space: a YAML file with the configuration keys that vary, the search method, the scheduler and the objective.

    parameters:
      loss.cross_modal.temperature: {loguniform: [0.02, 0.3]}
      model.clusters: {choice: [5, 15, 25, 35]}
      loss.vision.weight: {choice: [0, 0.1]}
      loss.vision.student_temperature: {loguniform: [0.05, 0.2], when: {loss.vision.weight: [0.1]}}
    search: random
    scheduler: asha

A point of the space has a value for each parameter whose condition (``when``) holds; the other keys keep their values in the
configuration. Repetitions with different seeds are written as a parameter, ``trainer.seed: {choice: [0, 1, 2]}``. Points that
differ only in the seed are treated as repetitions of one point, and their scores are averaged.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vilseg.config import RunConfig
from vilseg.config.base import ConfigPart, ConfigTree, PositiveInt
from vilseg.config.locations import DatasetUri
from vilseg.data.cached_views import VIEW_KEYS
from vilseg.errors import ConfigError, UserError
from vilseg.evaluation.proxy_metrics import MEASURES

SEED = "trainer.seed"
"""Configuration key of the seed. Points that differ only in it are repetitions of one point."""

Point = dict[str, Any]
"""A point of a search space: values by configuration key."""

_SHARED_KEYS = (
    "name",
    "data.source",
    "data.mix",
    "data.held_out",
    "trainer.storage",
    "trainer.workers",
    "trainer.steps",
)
"""Keys that must not vary, because all trials share them."""
_CACHED_KEYS = ("init", "data.", "model.init", "model.image_encoder.", "model.text_encoder.")
"""Keys, or prefixes of keys, on which the features of a feature cache depend."""
_CACHED_VIEW_KEYS = tuple(f"views.{key}" for key in VIEW_KEYS)
"""Further keys on which they depend if the cache holds augmented variants of every image."""
_TRIES = 1000
"""Minimum number of random draws after which a random search ends, even if it has found fewer distinct points than requested."""


_Bounds = tuple[int, int]
"""Defined outside of `Parameter`, because inside that class ``int`` is a field and hides the type."""


class Parameter(ConfigPart):
    """Values of a configuration key that varies: exactly one of ``choice``, ``uniform``, ``loguniform`` and ``int`` is set.

    Example:
        >>> Parameter(int=(2, 4)).values
        [2, 3, 4]
        >>> Parameter(loguniform=(0.01, 1.0)).values is None
        True
    """

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """Values of the configuration key."""
    uniform: tuple[float, float] | None = None
    """Lowest and highest value of a uniform distribution."""
    loguniform: tuple[float, float] | None = None
    """Lowest and highest value of a distribution whose logarithm is uniform."""
    int: _Bounds | None = None
    """Lowest and highest integer, both included."""
    when: dict[str, list[Any]] = {}
    """Condition, as lists of values by configuration key: the parameter varies only if each of these parameters, which must
    precede it in the space, has one of the listed values."""

    @model_validator(mode="after")
    def _require_one_kind(self) -> Self:
        given = [kind for kind in ("choice", "uniform", "loguniform", "int") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError("give one of choice, uniform, loguniform and int")
        for kind in ("uniform", "loguniform", "int"):
            bounds = getattr(self, kind)
            if bounds is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"{kind} goes from {bounds[0]} to {bounds[1]}; the first must be the smaller")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform begins at {self.loguniform[0]}, but only what is above 0 has a logarithm")
        return self

    @property
    def values(self) -> list[Any] | None:
        """All values in order; None if the range is continuous."""
        if self.int is not None:
            return list(range(self.int[0], self.int[1] + 1))
        return self.choice

    def sample(self, rng: random.Random) -> Any:
        """Return a random value."""
        if self.uniform:
            return rng.uniform(*self.uniform)
        if self.loguniform:
            low, high = map(math.log, self.loguniform)
            return math.exp(rng.uniform(low, high))
        assert self.values is not None
        return rng.choice(self.values)

    def suggest(self, name: str, trial: Any) -> Any:
        """Return the value that an Optuna trial suggests."""
        if self.uniform:
            return trial.suggest_float(name, *self.uniform)
        if self.loguniform:
            return trial.suggest_float(name, *self.loguniform, log=True)
        if self.int:
            return trial.suggest_int(name, *self.int)
        assert self.choice is not None
        # Optuna chooses the index, because a value may be a list, which it cannot store.
        return self.choice[trial.suggest_categorical(name, list(range(len(self.choice))))]


class AshaConfig(ConfigPart):
    """Settings of asynchronous successive halving (ASHA, Li et al. 2020).

    At certain numbers of steps, the rungs, trials are compared, and only the best fraction of them continues.
    """

    grace: Annotated[float, Field(gt=0, lt=1)] = 0.125
    """First rung: fraction of the steps that every trial makes."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """At a rung the best 1 / ``reduction`` of the trials continue. A rung has ``reduction`` times the steps of the one before."""


class PbtConfig(ConfigPart):
    """Settings of population based training (PBT, Jaderberg et al. 2017): the worst trials copy the weights of the best ones."""

    interval: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Distance of two comparisons of the trials, as a fraction of the steps."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Fraction of the trials that count as the best, and likewise as the worst."""


class SearchSpace(ConfigTree):
    """Search space of a sweep: the configuration keys that vary, the search method, the scheduler and the objective.

    Example:
        >>> space = SearchSpace(parameters={"model.clusters": Parameter(choice=[5, 15])}, search="grid")
        >>> space.points()
        [{'model.clusters': 5}, {'model.clusters': 15}]
    """

    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    """Parameters by configuration key."""
    search: Literal["random", "grid", "optuna"] = "random"
    """Search method: ``random`` draws points, ``grid`` tries all combinations, ``optuna`` uses Optuna's tree-structured Parzen
    estimator (Bergstra et al. 2011)."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """Rule by which trials are stopped early; with ``none`` all trials run to their end."""
    asha: AshaConfig = AshaConfig()
    pbt: PbtConfig = PbtConfig()
    trials: PositiveInt = 16
    """Maximum number of points; ``--trials`` takes precedence."""
    objective: Literal["miou", "retrieval", "nouns", "mutual_information", "agreement"] | None = None
    """Metric to maximize, see docs/tuning.md. If None, ``miou`` if there is a ``dataset``, else ``nouns``."""
    dataset: DatasetUri | None = None
    """Dataset of images with masks, ``KIND:URI``, for mIoU; ``--dataset`` takes precedence."""
    images: PositiveInt = 200
    """Maximum number of images of the dataset, and of held-out pairs, per evaluation."""
    evaluations: PositiveInt = 6
    """Number of evaluations of each trial, evenly spaced over its steps; the last one is at the last step."""
    seed: int = 0
    """Random seed of the search."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        before: list[str] = []
        for key, parameter in self.parameters.items():
            unknown = next((other for other in parameter.when if other not in before), None)
            if unknown is not None:
                raise ValueError(f"{key} varies when {unknown} has some value, but no such parameter comes before it")
            before.append(key)
        if self.search == "grid":
            endless = next((key for key, parameter in self.parameters.items() if parameter.values is None), None)
            if endless is not None:
                raise ValueError(f"search is grid, but {endless} has no end of values; give it a choice or an int")
        if self.scheduler == "pbt":
            if any(parameter.when for parameter in self.parameters.values()):
                raise ValueError("scheduler is pbt, which knows no conditions; leave 'when' away")
            if self.search == "optuna":
                raise ValueError("scheduler is pbt, which searches by itself; set search to random or grid")
        return self

    def check(self, config: RunConfig) -> None:
        """Check that the space fits a configuration.

        Raises:
            ConfigError: a parameter is not a key of the configuration, a value is invalid, a key must not vary, or the dataset or
                held-out pairs that the objective needs are missing.
        """
        cached: tuple[str, ...] = ()
        if config.data.feature_cache:
            cached = (*_CACHED_KEYS, *(_CACHED_VIEW_KEYS if config.data.cache_variants > 1 else ()))
        for key, parameter in self.parameters.items():
            if key in _SHARED_KEYS:
                raise ConfigError(f"the space varies {key}, but all trials of a sweep share it; leave it away")
            if key.startswith(cached):
                raise ConfigError(
                    f"the space varies {key}, but the features in data.feature_cache are made for one value"
                )
            values = parameter.values or list(parameter.uniform or parameter.loguniform or ())
            for value in values:
                config_at_point(config, {key: value})
        if self.scheduler == "pbt":
            self._check_pbt(config)
        if self.objective_name == "miou" and not self.dataset:
            raise ConfigError(
                "the objective miou needs images with masks; give --dataset KIND:URI, or another objective: "
                + ", ".join(MEASURES)
            )
        if self.objective_name != "miou" and not config.data.held_out:
            raise ConfigError(
                f"the objective {self.objective_name} needs pairs that are not trained on; give data.held_out=URI, a shard of "
                "data.source say"
            )

    def _check_pbt(self, config: RunConfig) -> None:
        """Raise ConfigError if a parameter must not vary under PBT, which copies weights from trial to trial."""
        fixed = (
            "model.",
            "data.",
            "loss.cross_modal.temperature",
            "loss.nouns.max_phrases",
            "trainer.",
            "views.global",
        )
        parameters = self.parameters.items()
        baked = next((key for key, _ in parameters if key.startswith(fixed)), None)
        if baked is None and 0 in (self.parameters.get("loss.vision.weight", Parameter(choice=[1])).values or ()):
            baked = "loss.vision.weight from 0"  # with weight 0 there is no EMA teacher whose weights could be copied
        if baked is not None:
            raise ConfigError(
                f"the space varies {baked}, but pbt hands weights from trial to trial, and they are made for one value "
                "of it; use asha, or vary loss weights, the learning rate and the like"
            )
        if config.trainer.max_workers > 1:
            raise ConfigError(
                f"trainer.workers is {config.trainer.workers}, but pbt trains each trial in one process; "
                "set trainer.workers=1"
            )

    @property
    def objective_name(self) -> str:
        """Name of the metric to maximize."""
        return self.objective or ("miou" if self.dataset else "nouns")

    def build_point(self, suggest: Callable[[str, Parameter], Any]) -> Point:
        """Build a point with the value that ``suggest`` returns for each parameter whose condition holds, in order."""
        point: Point = {}
        for key, parameter in self.parameters.items():
            if all(point.get(other) in values for other, values in parameter.when.items()):
                point[key] = suggest(key, parameter)
        return point

    def points(self) -> list[Point]:
        """Return the distinct points of a random or grid search, at most ``trials``; deterministic."""
        found: dict[str, Point] = {}
        candidates = self._grid_points() if self.search == "grid" else self._random_points()
        for point in candidates:
            found.setdefault(point_key(point), point)
            if len(found) == self.trials:
                break
        return list(found.values())

    def _grid_points(self) -> Iterator[Point]:
        values = {key: parameter.values or [] for key, parameter in self.parameters.items()}
        for combination in itertools.product(*values.values()):
            chosen = dict(zip(values, combination, strict=True))
            yield self.build_point(lambda key, _, chosen=chosen: chosen[key])  # type: ignore[misc]

    def _random_points(self) -> Iterator[Point]:
        rng = random.Random(self.seed)
        for _ in range(max(_TRIES, 10 * self.trials)):
            yield self.build_point(lambda _, parameter: parameter.sample(rng))


def point_key(point: Point) -> str:
    """Return a string that is the same for equal points, and different for others."""
    return json.dumps(point, sort_keys=True)


def format_value(value: Any) -> str:
    """Return a value of a point as text; floats have four significant digits.

    Example:
        >>> format_value(0.123456), format_value(25)
        ('0.1235', '25')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def config_at_point(config: RunConfig, point: Point) -> RunConfig:
    """Return ``config`` with the values of a point of the space.

    Raises:
        ConfigError: a key of the point is unknown, or its value is invalid.
    """
    try:
        return config.with_overrides(f"{key}={json.dumps(value)}" for key, value in point.items())
    except UserError as error:
        raise ConfigError(f"the space does not fit the configuration: {error}") from error
