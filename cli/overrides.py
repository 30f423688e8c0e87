"""Configuration keys among the arguments of a verb: ``key.sub=value``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vilseg.config import RunConfig, SegmentationConfig
from vilseg.config.data import ColumnsConfig
from vilseg.errors import ConfigError

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")
"""Start of an override; no path or URI is likely to match."""


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of a verb that takes both into places and ``key.sub=value`` overrides.

    Example:
        >>> split_overrides(["photos", "s3://bucket/pairs", "data.columns.image=img"])
        (['photos', 's3://bucket/pairs'], ['data.columns.image=img'])
    """
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    return [argument for argument in arguments if not _OVERRIDE.match(argument)], overrides


def columns_from_overrides(overrides: Sequence[str]) -> ColumnsConfig:
    """Return ``data.columns`` with ``data.columns.key=value`` overrides applied.

    Raises:
        ConfigError: an unknown key (the nearest right one is named), a bad value, or a key of something else.
    """
    columns = RunConfig.load(None, overrides).data.columns
    for override in overrides:
        if not override.startswith("data.columns."):
            raise ConfigError(f"'{override}' cannot be set here; ingest takes data.columns.key=value only")
    return columns


def segmentation_overrides(overrides: Sequence[str] | None) -> Callable[[SegmentationConfig], SegmentationConfig]:
    """Return a function that applies ``segmentation.key=value`` overrides to the settings that a model carries."""
    for override in overrides or []:
        if not override.startswith("segmentation."):
            raise ConfigError(f"'{override}' cannot be set here; a trained model takes segmentation.key=value only")

    def apply(settings: SegmentationConfig) -> SegmentationConfig:
        return RunConfig(segmentation=settings).with_overrides(overrides or []).segmentation

    return apply
