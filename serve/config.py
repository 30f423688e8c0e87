"""Configuration of a deployment; ``serve/config.yaml`` holds it as the application's ``args``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import field_validator

from vilseg import storage
from vilseg.config.base import ConfigPart, ConfigTree, NonNegative, Positive, PositiveInt
from vilseg.config.locations import ModelRef, Uri
from vilseg.errors import ConfigError

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_BATCH_IMAGES = 16
"""Largest number of images in one call of ``POST /v1/segment/batch``."""


class Limits(ConfigPart):
    """Limits of one request; a request above a limit gets an error response."""

    body_bytes: PositiveInt = 32 << 20
    """Encoded size of an image, or of all images of a batch (413)."""
    pixels: PositiveInt = 50_000_000
    """Width x height of an image, by its header (413)."""
    classes: PositiveInt = 1000
    """Number of names in a class list, synonyms and background words included (422)."""
    text_length: PositiveInt = 100
    """Length of one name in characters (422)."""
    seconds: Positive = 60
    """Time until a request is given up (503)."""
    video_bytes: PositiveInt = 512 << 20
    video_pixels: PositiveInt = 9_000_000
    """Width x height of a video's frames."""
    video_seconds: Positive = 600
    """Duration of a video; a longer one fails."""


class Replicas(ConfigPart):
    """Processes that hold models. More of them are started while more than ``target_ongoing`` requests wait for each."""

    minimum: PositiveInt = 1
    maximum: PositiveInt = 4
    target_ongoing: Positive = 4
    upscale_delay: NonNegative = 5
    downscale_delay: NonNegative = 120
    """Seconds that the load has to last before replicas are added (upscale) or removed (downscale)."""
    cpus: NonNegative = 1
    gpus: NonNegative = 0
    """GPUs of each replica; a fraction such as 0.25 puts four on one."""
    models: PositiveInt = 3
    """Models held by a replica at once; the least recently used one is evicted."""
    batch: PositiveInt = 8
    """Largest number of images in a pass through the model on a GPU."""
    ongoing: PositiveInt = 40
    """Requests that a replica accepts; all but one batch wait for its model."""
    queue: PositiveInt = 16
    """Requests that wait in the router for a replica to accept them, or for a new replica where one was lost; further
    ones are refused (503). Ray polls the replicas for those, so waiting here costs more than in a replica."""


class Videos(ConfigPart):
    """Processes that segment videos, one at a time each."""

    replicas: PositiveInt = 1
    cpus: NonNegative = 0
    """CPUs reserved for each; 0 shares those of the image replicas."""
    gpus: NonNegative = 0
    queue: PositiveInt = 8
    """Videos that wait; further ones are refused (503)."""
    storage: Uri = "runs/serve/videos"
    """Directory or URI for videos and their results; all machines must reach it."""
    keep_hours: Positive = 24
    """Hours after which a video and its results are deleted."""


class ServeConfig(ConfigTree):
    """Configuration of the whole deployment.

    Example:
        >>> config = ServeConfig.of(None, ["day=runs/day/model"], None, ["replicas.maximum=2"])
        >>> config.default_model, config.replicas.maximum
        ('day', 2)
    """

    models: dict[str, ModelRef] = {}
    """Name and URI of every model. A new version needs a new URI: it is loaded beside the old one, which is served meanwhile."""
    keys: Uri | None = None
    """URI of the file that ``vilseg key`` writes. Without it only this machine is answered."""
    cors_origins: list[str] = []
    """Web pages of other origins that may call the API; none by default."""
    page: bool = True
    """False serves the API only."""
    examples: Uri | None = None
    """Directory of images for the page, with ``classes.txt`` in it; three synthetic scenes without it."""
    limits: Limits = Limits()
    replicas: Replicas = Replicas()
    videos: Videos = Videos()

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, str]) -> dict[str, str]:
        for name in models:
            if not MODEL_NAME.fullmatch(name):
                raise ValueError(f"'{name}' is no name of a model; use up to 64 letters, digits, '.', '_' and '-'")
        return models

    @classmethod
    def of(cls, uri: str | None, models: Sequence[str], keys: str | None, overrides: Sequence[str]) -> ServeConfig:
        """Load a configuration file and apply the options of the command to it.

        Args:
            uri: Configuration file; None for the defaults.
            models: ``URI`` or ``NAME=URI`` each; they replace those of the file.
            keys: URI of the file of API keys.
            overrides: ``key.sub=value`` each.

        Raises:
            ConfigError: As `load`; or there is no model, or two have the same name.
        """
        config = cls.load(uri, overrides)
        if models:
            named = [_named(model) for model in models]
            names = [name for name, _ in named]
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"two models are called '{name}'; give names: --model NAME=URI")
            config = config.replace(models=dict(named))
        if not config.models:
            raise ConfigError("there is no model to serve; give --model URI")
        return config.replace(keys=keys) if keys else config

    @property
    def default_model(self) -> str:
        """Name of the model for requests that name none: the first."""
        return next(iter(self.models))


def _named(model: str) -> tuple[str, str]:
    """Return name and URI of ``URI`` or ``NAME=URI``; without a name, the name of the model's run directory."""
    name, separator, uri = model.partition("=")
    if separator and MODEL_NAME.fullmatch(name):
        return name, uri
    last = storage.name(model)
    run = storage.name(storage.parent(model)) if last == "model" else last
    return re.sub(r"[^A-Za-z0-9._-]", "-", run).strip("-._") or "default", model
