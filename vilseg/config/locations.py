"""Types of configuration keys whose value is a location (URI, model or dataset), and functions that visit all such keys.

:func:`map_locations` finds every key of type :data:`Uri`, :data:`ModelRef` or :data:`DatasetUri` at any depth of a configuration.
Code that lists locations or makes them absolute therefore needs no list of keys.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from vilseg import storage
from vilseg.config.base import ConfigPart


class LocationKind(enum.Enum):
    """Syntax of the value of a location key."""

    URI = "uri"
    """Local path or ``s3://`` URI."""
    MODEL = "model"
    """Path or URI of a model or run directory, or the id of a model on the Hugging Face hub."""
    DATASET = "dataset"
    """``KIND:URI``, for example ``folder:s3://bucket/val``."""


Uri = Annotated[str, LocationKind.URI]
ModelRef = Annotated[str, LocationKind.MODEL]
DatasetUri = Annotated[str, LocationKind.DATASET]

Config = TypeVar("Config", bound=ConfigPart)
Change = Callable[[str, str, LocationKind], str]


class Location(NamedTuple):
    """Configuration key whose value is a location."""

    key: str
    """Dotted key, with the indices of list items: ``data.mix.0.source``."""
    value: str
    kind: LocationKind

    @property
    def uri(self) -> str:
        """Value without the prefix ``KIND:`` of a dataset."""
        return self.value.partition(":")[2] if self.kind is LocationKind.DATASET else self.value


def map_locations(config: Config, change: Change) -> Config:
    """Return ``config`` with every location replaced by ``change(key, value, kind)``; keys without a value are skipped."""
    return _map_part(config, "", change)


def list_locations(config: ConfigPart) -> list[Location]:
    """Return the locations that are set in ``config``, in the order of its keys.

    Example:
        >>> from vilseg.config import RunConfig
        >>> config = RunConfig.load(None, ["data.source=s3://bucket/pairs"])
        >>> [(location.key, location.uri) for location in list_locations(config)]
        [('data.source', 's3://bucket/pairs'), ('trainer.storage', 'runs')]
    """
    found: list[Location] = []

    def note(key: str, value: str, kind: LocationKind) -> str:
        found.append(Location(key, value, kind))
        return value

    map_locations(config, note)
    return found


def absolute_locations(config: Config) -> Config:
    """Return ``config`` with all paths made absolute, so that it is valid in any working directory; hub ids are unchanged."""

    def absolute(key: str, value: str, kind: LocationKind) -> str:
        if kind is LocationKind.DATASET:
            dataset_kind, _, uri = value.partition(":")
            return f"{dataset_kind}:{storage.absolute(uri)}"
        return value if kind is LocationKind.MODEL and is_hub_id(value) else storage.absolute(value)

    return map_locations(config, absolute)


def is_hub_id(reference: str) -> bool:
    """Return True for a Hugging Face hub id (``gpt2``, ``openai/clip-vit-base-patch16``) and False for a path or URI.

    A relative path that exists counts as a path, even if it has the form of an id.
    """
    return (
        reference.count("/") <= 1
        and not reference.startswith((".", "/", "~"))
        and storage.is_local(reference)
        and not storage.exists(reference)
    )


def _map_part(part: Config, prefix: str, change: Change) -> Config:
    changed = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        mapped = _map_value(value, field.annotation, field.metadata, prefix + name, change)
        if mapped != value:
            changed[name] = mapped
    return part.replace(**changed) if changed else part


def _map_value(value: Any, annotation: Any, metadata: Sequence[Any], key: str, change: Change) -> Any:
    """Map one value of type ``annotation``; ``metadata`` are the arguments that ``Annotated`` adds to the type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(value, ConfigPart):
        return _map_part(value, f"{key}.", change)
    if origin is Annotated:
        return _map_value(value, arguments[0], [*metadata, *arguments[1:]], key, change)
    if origin in (Union, UnionType):
        if value is None:
            return value
        for argument in arguments:
            value = _map_value(value, argument, metadata, key, change)
        return value
    if isinstance(value, str):
        kind = next((mark for mark in metadata if isinstance(mark, LocationKind)), None)
        return value if kind is None else change(key, value, kind)
    if origin is list and isinstance(value, list):
        return [_map_value(one, arguments[0], (), f"{key}.{number}", change) for number, one in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _map_value(one, arguments[1], (), f"{key}.{name}", change) for name, one in value.items()}
    return value
