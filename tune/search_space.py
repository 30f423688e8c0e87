"""Search spaces: a YAML file of the configuration keys that vary, how they are searched, and the objective.

    parameters:
      loss.cross_modal.temperature: {loguniform: [0.02, 0.3]}
      model.clusters: {choice: [5, 15, 25, 35]}
      loss.vision.weight: {choice: [0, 0.1]}
      loss.vision.student_temperature: {loguniform: [0.05, 0.2], when: {loss.vision.weight: [0.1]}}
    search: random
    scheduler: asha

A point of the space is a value for each parameter whose condition holds; the others keep what the configuration says.
Repeats are a parameter too, ``trainer.seed: {choice: [0, 1, 2]}``: points that differ in it alone count as one.
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
"""Points that differ in this key alone are repeats of each other."""

Point = dict[str, Any]
"""Values by configuration key."""

_SHARED_KEYS = (
    "name",
    "data.source",
    "data.mix",
    "data.held_out",
    "trainer.storage",
    "trainer.workers",
    "trainer.steps",
)
"""Keys that all trials share."""
_CACHED_KEYS = ("init", "data.", "model.init", "model.image_encoder.", "model.text_encoder.")
"""Keys, or prefixes of keys, that cached features depend on."""
_CACHED_VIEW_KEYS = tuple(f"views.{key}" for key in VIEW_KEYS)
"""Further keys that they depend on where images have variants."""
_TRIES = 1000
"""Smallest number of draws after which a random search gives up on finding another point."""


_Bounds = tuple[int, int]
"""Outside of `Parameter`, where ``int`` is a field."""


class Parameter(ConfigPart):
    """A configuration key that varies: one of ``choice``, ``uniform``, ``loguniform`` and ``int``.

    Example:
        >>> Parameter(int=(2, 4)).values
        [2, 3, 4]
        >>> Parameter(loguniform=(0.01, 1.0)).values is None
        True
    """

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """Values, as the configuration would have them."""
    uniform: tuple[float, float] | None = None
    """Lowest and highest value."""
    loguniform: tuple[float, float] | None = None
    """Lowest and highest value; the logarithm is uniform."""
    int: _Bounds | None = None
    """Lowest and highest value, both included."""
    when: dict[str, list[Any]] = {}
    """Vary only where each of these parameters, named before, has one of these values."""

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
        """All values in order; None for a continuous range."""
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
        # By position: a choice may be a list, which Optuna cannot store.
        return self.choice[trial.suggest_categorical(name, list(range(len(self.choice))))]


class AshaConfig(ConfigPart):
    """Settings of asynchronous successive halving (Li et al. 2020): at every rung only the best fraction goes on."""

    grace: Annotated[float, Field(gt=0, lt=1)] = 0.125
    """Fraction of the steps that every trial makes."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """One in ``reduction`` trials goes on from a rung; each rung has ``reduction`` times the steps of the one before."""


class PbtConfig(ConfigPart):
    """Settings of population based training (Jaderberg et al. 2017): the worst copy the weights of the best."""

    interval: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the steps between two comparisons."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Fraction of the population that counts as the best, and as the worst."""


class SearchSpace(ConfigTree):
    """The keys that vary, how they are searched, and the objective.

    Example:
        >>> space = SearchSpace(parameters={"model.clusters": Parameter(choice=[5, 15])}, search="grid")
        >>> space.points()
        [{'model.clusters': 5}, {'model.clusters': 15}]
    """

    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    """By configuration key."""
    search: Literal["random", "grid", "optuna"] = "random"
    """``optuna`` is its tree-structured Parzen estimator (Bergstra et al. 2011); ``grid`` tries all combinations."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """Rule by which trials are stopped early; ``none`` lets all of them end."""
    asha: AshaConfig = AshaConfig()
    pbt: PbtConfig = PbtConfig()
    trials: PositiveInt = 16
    """Largest number of points; ``--trials`` takes precedence."""
    objective: Literal["miou", "retrieval", "nouns", "mutual_information", "agreement"] | None = None
    """Metric to maximize. mIoU where there is a ``dataset``, else ``nouns``; see docs/tuning.md."""
    dataset: DatasetUri | None = None
    """Images with masks, ``KIND:URI``; ``--dataset`` takes precedence."""
    images: PositiveInt = 200
    """Largest number of images of the dataset, and of the held-out pairs, at each evaluation."""
    evaluations: PositiveInt = 6
    """Number of evaluations of each trial, evenly over its steps, the last one at the end."""
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
        """Raise an error where the space does not fit a configuration.

        Raises:
            ConfigError: a parameter is no key of the configuration, or may not vary; the objective lacks what it needs.
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
        """Refuse parameters that the weights of a trial are made for: PBT hands weights from trial to trial."""
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
            baked = "loss.vision.weight from 0"  # without it there is no teacher to hand over
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
        """Build a point: a value of ``suggest`` for each parameter whose condition holds, in order."""
        point: Point = {}
        for key, parameter in self.parameters.items():
            if all(point.get(other) in values for other, values in parameter.when.items()):
                point[key] = suggest(key, parameter)
        return point

    def points(self) -> list[Point]:
        """Return the points of a random or grid search: each once, the same ones every time, at most ``trials``."""
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
    """Return a string that equal points share."""
    return json.dumps(point, sort_keys=True)


def format_value(value: Any) -> str:
    """Return a value of a point as text for people: four significant digits of a float.

    Example:
        >>> format_value(0.123456), format_value(25)
        ('0.1235', '25')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def config_at_point(config: RunConfig, point: Point) -> RunConfig:
    """Return the configuration at a point of the space.

    Raises:
        ConfigError: the configuration does not accept a value.
    """
    try:
        return config.with_overrides(f"{key}={json.dumps(value)}" for key, value in point.items())
    except UserError as error:
        raise ConfigError(f"the space does not fit the configuration: {error}") from error
