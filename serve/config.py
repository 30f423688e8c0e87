"""What a deployment is made of; ``serve/config.yaml`` holds it as the application's ``args``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import field_validator

from vilseg import storage
from vilseg.config.base import ConfigPart, ConfigTree, NonNegative, Positive, PositiveInt
from vilseg.errors import ConfigError

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_BATCH_IMAGES = 16
"""Most pictures that one call of ``POST /v1/segment/batch`` takes."""


class Limits(ConfigPart):
    """What one request may ask for; whatever passes a limit is refused with a sentence."""

    body_bytes: PositiveInt = 32 << 20
    """Of a picture or of all pictures of a batch, encoded (413)."""
    pixels: PositiveInt = 50_000_000
    """Width x height that a picture's header may announce (413)."""
    classes: PositiveInt = 1000
    """Names in a class list, synonyms and background words included (422)."""
    text_length: PositiveInt = 100
    """Letters in one name (422)."""
    seconds: Positive = 60
    """After so long an answer is given up (503)."""
    video_bytes: PositiveInt = 512 << 20
    video_pixels: PositiveInt = 9_000_000
    """Width x height of a film's frames."""
    video_seconds: Positive = 600
    """A longer film is refused."""


class Replicas(ConfigPart):
    """Processes that hold models. More of them are started while more than ``target_ongoing`` requests wait for each."""

    minimum: PositiveInt = 1
    maximum: PositiveInt = 4
    target_ongoing: Positive = 4
    upscale_delay: NonNegative = 5
    downscale_delay: NonNegative = 120
    """Seconds that the load has to last before replicas are added or taken away."""
    cpus: NonNegative = 1
    gpus: NonNegative = 0
    """Of each replica; a share such as 0.25 puts four on one."""
    models: PositiveInt = 3
    """Models held by a replica at once; the one used longest ago makes room."""
    batch: PositiveInt = 8
    """Most pictures that share a pass through the model."""
    ongoing: PositiveInt = 40
    """Requests that a replica takes in, all but one of them to wait for its model."""
    queue: PositiveInt = 16
    """Requests that wait outside for the first replica that takes them in, or for a new one where one has died; what
    comes on top is refused (503). Ray asks the replicas again and again for those, so it is the dearer place to wait."""


class Videos(ConfigPart):
    """The processes that segment films, one at a time each."""

    replicas: PositiveInt = 1
    cpus: NonNegative = 0
    """0 shares the machine with the pictures; give it a whole one where films matter."""
    gpus: NonNegative = 0
    queue: PositiveInt = 8
    """VideoJobs that wait; what comes on top is refused (503)."""
    storage: str = "runs/serve/videos"
    """Folder or URI that films and their results are kept under; one that all machines reach."""
    keep_hours: Positive = 24
    """After so long a film and its results are deleted."""


class ServeConfig(ConfigTree):
    """The whole deployment."""

    models: dict[str, str] = {}
    """Name and URI of every model. A new version wants a new URI: it is loaded beside the old one, which answers meanwhile."""
    keys: str | None = None
    """URI of the file that ``vilseg key`` writes. Without it only this machine is answered."""
    cors_origins: list[str] = []
    """Web pages of other origins that may call the API; none by default."""
    page: bool = True
    """False leaves the API alone."""
    examples: str | None = None
    """Folder of pictures for the page, with ``classes.txt`` in it; three synthetic scenes without it."""
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
        """A file's configuration with the options of the command on top of it.

        Args:
            uri: of the file; defaults alone where None.
            models: ``URI`` or ``NAME=URI`` each; they take the place of the file's.
            keys: URI of the file of keys.
            overrides: ``key.sub=value``.

        Raises:
            ConfigError: as `load`; or there is no model, or two of one name.
        """
        config = cls.load(uri, overrides)
        if models:
            named = [_named(model) for model in models]
            names = [name for name, _ in named]
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"two models are called '{name}'; give names: --model NAME=URI")
            config = config.with_values(models=dict(named))
        if not config.models:
            raise ConfigError("there is no model to serve; give --model URI")
        return config.with_values(keys=keys) if keys else config

    @property
    def default_model(self) -> str:
        """Name of the model that is asked where a request names none: the first."""
        return next(iter(self.models))


def _named(model: str) -> tuple[str, str]:
    """Name and URI of ``URI`` or ``NAME=URI``; without a name, that of the run whose ``model`` it is."""
    name, separator, uri = model.partition("=")
    if separator and MODEL_NAME.fullmatch(name):
        return name, uri
    last = storage.name(model)
    run = storage.name(storage.parent(model)) if last == "model" else last
    return re.sub(r"[^A-Za-z0-9._-]", "-", run).strip("-._") or "default", model
