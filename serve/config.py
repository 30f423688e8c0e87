"""Configuration of a deployment: the keys of ``args`` in ``serve/config.yaml``."""

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
"""Maximum number of images in one call of ``POST /v1/segment/batch``."""


class Limits(ConfigPart):
    """Limits on one request. A request that exceeds a limit gets an error response with the HTTP status in parentheses."""

    body_bytes: PositiveInt = 32 << 20
    """Maximum encoded size in bytes of an image, or of all images of a batch (413)."""
    pixels: PositiveInt = 50_000_000
    """Maximum width x height of an image, checked by its header (413)."""
    classes: PositiveInt = 1000
    """Maximum number of names in a class list, including synonyms and background words (422)."""
    text_length: PositiveInt = 100
    """Maximum length of one name in characters (422)."""
    seconds: Positive = 60
    """Maximum time for a response to an image request in seconds (503)."""
    video_bytes: PositiveInt = 512 << 20
    """Maximum encoded size of a video in bytes (413)."""
    video_pixels: PositiveInt = 9_000_000
    """Maximum width x height of the frames of a video; the job of a larger video fails."""
    video_seconds: Positive = 600
    """Maximum duration of a video in seconds; the job of a longer video fails."""


class Replicas(ConfigPart):
    """Replicas: the processes that load models and segment images. Ray Serve scales their number with the load."""

    minimum: PositiveInt = 1
    """Minimum number of replicas."""
    maximum: PositiveInt = 4
    """Maximum number of replicas."""
    target_ongoing: Positive = 4
    """Mean number of requests in progress per replica above which replicas are added."""
    upscale_delay: NonNegative = 5
    """Seconds of higher load before replicas are added."""
    downscale_delay: NonNegative = 120
    """Seconds of lower load before replicas are removed."""
    cpus: NonNegative = 1
    """CPUs of each replica."""
    gpus: NonNegative = 0
    """GPUs of each replica; with a fraction such as 0.25, four replicas share a GPU."""
    models: PositiveInt = 3
    """Maximum number of models loaded in a replica; the least recently used model is evicted."""
    batch: PositiveInt = 8
    """Maximum number of images per forward pass on a GPU; a replica on a CPU takes one."""
    ongoing: PositiveInt = 40
    """Maximum number of requests that a replica accepts at once; those beyond the current batch wait for its model."""
    queue: PositiveInt = 16
    """Maximum number of requests that wait outside the replicas, until one accepts them or a lost one is replaced. Further
    requests are refused (503). Ray polls the replicas meanwhile, so waiting here costs more than waiting in a replica."""


class Videos(ConfigPart):
    """Video replicas: the processes that segment videos, each one video at a time."""

    replicas: PositiveInt = 1
    """Number of video replicas."""
    cpus: NonNegative = 0
    """CPUs reserved for each video replica; with 0 they share the CPUs of the image replicas."""
    gpus: NonNegative = 0
    """GPUs of each video replica."""
    queue: PositiveInt = 8
    """Maximum number of videos that wait for a video replica; further videos are refused (503)."""
    storage: Uri = "runs/serve/videos"
    """Path or URI of the directory for videos and their results, which all machines must be able to access."""
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
    """Name -> URI of every model. A new version needs a new URI; the old version is served until the new one is loaded."""
    keys: Uri | None = None
    """URI of the key file that ``vilseg key`` writes. If None, requests from other machines are refused."""
    cors_origins: list[str] = []
    """Origins of other web pages that may call the API (CORS), such as ``https://example.org``."""
    page: bool = True
    """Serve the web page in addition to the API."""
    examples: Uri | None = None
    """URI of a directory with example images for the page and ``classes.txt``. If None, three synthetic scenes are used."""
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
        """Load a configuration file and apply the options of ``vilseg serve`` to it.

        Args:
            uri: URI of the configuration file; None takes the default values.
            models: Models, each as ``URI`` or ``NAME=URI``. If not empty, they replace the models of the file.
            keys: URI of the key file; None keeps that of the configuration file.
            overrides: Values for single keys, each as ``key.sub=value``.

        Raises:
            ConfigError: The file or an override is invalid (see `load`), there is no model, or two models have one name.
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
        """Name of the model for requests that name no model: the first one."""
        return next(iter(self.models))


def _named(model: str) -> tuple[str, str]:
    """Split ``NAME=URI`` into name and URI. For ``URI`` alone, the name is that of the model's run directory."""
    name, separator, uri = model.partition("=")
    if separator and MODEL_NAME.fullmatch(name):
        return name, uri
    last = storage.name(model)
    run = storage.name(storage.parent(model)) if last == "model" else last
    return re.sub(r"[^A-Za-z0-9._-]", "-", run).strip("-._") or "default", model
