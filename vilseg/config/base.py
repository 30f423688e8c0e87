"""Base classes of configurations, which validate YAML and ``key.sub=value`` overrides and report each error in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Self, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vilseg import storage
from vilseg.errors import ConfigError, UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


def _in_order(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"the first, {ends[0]}, is more than the second, {ends[1]}")
    return ends


FractionRange = Annotated[tuple[PositiveFraction, PositiveFraction], AfterValidator(_in_order)]
"""Pair of the smallest and the largest fraction, both above 0 and at most 1."""


class ConfigPart(BaseModel):
    """Base class of every configuration section: immutable, unknown keys are errors, docstrings become field descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def replace(self, **values: Any) -> Self:
        """Return a validated copy with some values replaced; keys may be dotted.

        Args:
            values: new values by key, for example ``replace(**{"trainer.workers": 2})``; a value may also be a whole section.

        Raises:
            ConfigError: a key is unknown (the message suggests the closest valid one) or a value is not allowed.

        Example:
            >>> from vilseg.config import RunConfig, TrainerConfig
            >>> config = RunConfig().replace(name="first", **{"trainer.workers": 2})
            >>> config.name, config.trainer.workers
            ('first', 2)
            >>> config.replace(trainer=TrainerConfig(steps=5)).trainer.steps
            5
        """
        return self._replace(values.items())

    def with_overrides(self, overrides: Iterable[str]) -> Self:
        """Return a validated copy with ``key.sub=value`` overrides applied in order; values are YAML.

        Raises:
            ConfigError: as for :meth:`replace`, or because an override cannot be parsed.
        """
        return self._replace(map(_parse_override, overrides))

    def _replace(self, values: Iterable[tuple[str, Any]]) -> Self:
        tree = self.model_dump()
        for key, value in values:
            _set(tree, key, value)
        return self._validate_tree(tree)

    @classmethod
    def _validate_tree(cls, tree: dict[str, Any], uri: str | None = None) -> Self:
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(_sentence(cls, error, uri)) from error


class ConfigTree(ConfigPart):
    """Base class of a complete configuration, which is stored in one YAML file."""

    @classmethod
    def load(cls, uri: str | None = None, overrides: Iterable[str] = ()) -> Self:
        """Read the YAML file at ``uri`` (if None, use the defaults) and apply ``key.sub=value`` overrides, whose values are YAML.

        Raises:
            ConfigError: the file is missing or is not a YAML mapping, a key is unknown (the message suggests the closest valid
                one), or a value is not allowed.
        """
        tree: dict[str, Any] = {}
        if uri is not None:
            try:
                tree = yaml.safe_load(storage.read_text(uri)) or {}
            except UserError as error:
                raise ConfigError(f"cannot read the configuration: {error}") from error
            except yaml.YAMLError as error:
                raise ConfigError(f"{uri} is not valid YAML: {' '.join(str(error).split())}") from error
            if not isinstance(tree, dict):
                raise ConfigError(f"{uri} must hold a mapping of keys to values, not {type(tree).__name__}")
        for override in overrides:
            _set(tree, *_parse_override(override))
        return cls._validate_tree(tree, uri)

    def to_yaml(self) -> str:
        """Return the configuration as YAML with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by dotted key; an empty mapping counts as a value.

    Example:
        >>> flatten({"trainer": {"steps": 5, "workers": 1}, "sizes": {}})
        {'trainer.steps': 5, 'trainer.workers': 1, 'sizes': {}}
    """
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return values


def _parse_override(override: str) -> tuple[str, Any]:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"'{override}' is not an override; write key.sub=value, for example trainer.steps=100")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key} is not valid YAML: {value!r}") from error


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key of nested mappings, creating the mappings that are missing."""
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        elif not isinstance(child, dict):
            raise ConfigError(f"{key}: '{parent}' holds a value, not further keys")
        node = child
    node[last] = value.model_dump() if isinstance(value, ConfigPart) else value


def _sentence(root: type[ConfigPart], error: ValidationError, uri: str | None) -> str:
    """Describe the most helpful of pydantic's errors in one sentence."""
    # A misspelt key often leaves a required key missing as well; the misspelling is the error to report.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    path = [str(step) for step in first["loc"]]
    where = f" in {uri}" if uri else ""
    if first["type"] == "extra_forbidden":
        key = ".".join(path)
        nearest = difflib.get_close_matches(key, list(_keys(root)), n=1, cutoff=0)
        return f"unknown configuration key '{key}'{where}; did you mean '{nearest[0]}'?"
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    shown = "" if isinstance(value, (dict, BaseModel)) else f" (it is {value!r})"
    return f"configuration key '{'.'.join(path) or 'top level'}'{where}: {message[0].lower()}{message[1:]}{shown}"


def _keys(part: type[ConfigPart], prefix: str = "") -> Iterator[str]:
    for name, field in part.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if get_origin(kind) is Union:
            kind = next(k for k in get_args(kind) if k is not type(None))
        if get_origin(kind) is list:
            (kind,) = get_args(kind)
            name = f"{name}.0"
        if isinstance(kind, type) and issubclass(kind, ConfigPart):
            yield from _keys(kind, f"{prefix}{name}.")
