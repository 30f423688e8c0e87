"""Trees of configuration: YAML plus ``key.sub=value`` overrides in, checked parts out, one sentence for what is wrong."""

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
"""From the least to the most of what is left of something."""


class ConfigPart(BaseModel):
    """Base of every part: unknown keys are refused, values are checked on assignment, docstrings become descriptions."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class ConfigTree(ConfigPart):
    """Base of a whole configuration, which a file holds."""

    @classmethod
    def load(cls, uri: str | None = None, overrides: Iterable[str] = ()) -> Self:
        """Read YAML at ``uri`` (defaults alone where None) and apply ``key.sub=value`` overrides; values are YAML.

        Raises:
            ConfigError: file missing, not a mapping, unknown key (the nearest right one is named) or bad value.
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
        return cls._of(tree, overrides, uri)

    def with_overrides(self, overrides: Iterable[str]) -> Self:
        """This configuration with ``key.sub=value`` overrides applied; raises as :meth:`load`."""
        return self._of(self.model_dump(), overrides, None)

    def with_values(self, **values: Any) -> Self:
        """This configuration with other values of top-level keys, checked; raises as :meth:`load`."""
        return self._of({**self.model_dump(), **values}, (), None)

    @classmethod
    def _of(cls, tree: dict[str, Any], overrides: Iterable[str], uri: str | None) -> Self:
        for override in overrides:
            _apply(tree, override)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(_sentence(cls, error, uri)) from error

    def to_yaml(self) -> str:
        """The resolved tree, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a nested mapping by their dotted keys; an empty mapping counts as a value."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return values


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"'{override}' is not an override; write key.sub=value, for example trainer.steps=100")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key} is not valid YAML: {value!r}") from error
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        elif not isinstance(child, dict):
            raise ConfigError(f"{key}: '{parent}' holds a value, not further keys")
        node = child
    node[last] = parsed


def _sentence(root: type[ConfigPart], error: ValidationError, uri: str | None) -> str:
    """One of pydantic's complaints as one sentence."""
    # A key that is misspelt is missing too; the former is the better thing to say.
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
