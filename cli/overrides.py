"""Configuration overrides among the arguments of a command: ``key.sub=value``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vilseg.config import RunConfig, SegmentationConfig
from vilseg.config.data import ColumnsConfig
from vilseg.errors import ConfigError

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")
"""Pattern of the start of an override; paths and URIs are unlikely to match it."""


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into paths or URIs and ``key.sub=value`` overrides.

    Example:
        >>> split_overrides(["photos", "s3://bucket/pairs", "data.columns.image=img"])
        (['photos', 's3://bucket/pairs'], ['data.columns.image=img'])
    """
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    return [argument for argument in arguments if not _OVERRIDE.match(argument)], overrides


def columns_from_overrides(overrides: Sequence[str]) -> ColumnsConfig:
    """Return the default ``data.columns`` configuration with ``data.columns.key=value`` overrides applied.

    Raises:
        ConfigError: a key is unknown (the error names the most similar key) or is not in ``data.columns``, or a value is invalid.
    """
    columns = RunConfig.load(None, overrides).data.columns
    for override in overrides:
        if not override.startswith("data.columns."):
            raise ConfigError(f"'{override}' cannot be set here; ingest takes data.columns.key=value only")
    return columns


def segmentation_overrides(overrides: Sequence[str] | None) -> Callable[[SegmentationConfig], SegmentationConfig]:
    """Return a function that applies ``segmentation.key=value`` overrides to the inference settings stored with a model.

    Raises:
        ConfigError: an override is not in ``segmentation``; the returned function raises it for an unknown key or invalid value.
    """
    for override in overrides or []:
        if not override.startswith("segmentation."):
            raise ConfigError(f"'{override}' cannot be set here; a trained model takes segmentation.key=value only")

    def apply(settings: SegmentationConfig) -> SegmentationConfig:
        return RunConfig(segmentation=settings).with_overrides(overrides or []).segmentation

    return apply
