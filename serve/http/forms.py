"""Form fields of the API, and the parser that checks their values and converts them to model names and class lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Form, Path, Request

from serve.config import ServeConfig
from serve.http_errors import HttpError
from vilseg.errors import DataError
from vilseg.text.vocabulary import Vocabulary

_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off", ""}

Classes = Annotated[
    str,
    Form(
        description="Names with commas, synonyms after '|'; or a JSON array of such names, which may hold commas.",
        examples=["sky, sofa|couch, cat"],
    ),
]
Background = Annotated[
    str,
    Form(
        description="'true' adds the class background; words with commas say what it is made of. By default it is "
        "there only if classes has it.",
        examples=["true"],
    ),
]
Threshold = Annotated[
    float, Form(ge=0, le=1, description="Pixels of lower scores are background, or no class without one.")
]
Bias = Annotated[
    float | None, Form(ge=-1, le=1, description="Added to the score of the class background; more gives it more.")
]
ModelName = Annotated[str | None, Form(description="One of GET /v1/models; the first of them without it.")]
VideoId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", examples=["0123456789abcdef0123456789abcdef"])]


def _request_id(request: Request) -> str:
    return str(request.scope["vilseg.request_id"])


RequestId = Annotated[str, Depends(_request_id)]


class FormParser:
    """Parser of the form fields for the model and the class list.

    Args:
        config: Function that returns the current configuration, with the models and the limits.

    Example:
        >>> config = ServeConfig(models={"day": "runs/day/model"})
        >>> parser = FormParser(lambda: config)
        >>> parser.model(None), parser.vocabulary("sky|clouds, sea", background="true").classes
        ('day', ('sky', 'sea', 'background'))
    """

    def __init__(self, config: Callable[[], ServeConfig]) -> None:
        self._config = config

    def model(self, name: str | None) -> str:
        """Return ``name`` if a model of that name is served; the default model if ``name`` is None or empty.

        Raises:
            HttpError: There is no model of that name.
        """
        models = self._config().models
        if name in (None, ""):
            return next(iter(models))
        if name not in models:
            raise HttpError(404, "unknown_model", f"There is no such model here; the models are: {', '.join(models)}.")
        return str(name)

    def vocabulary(self, classes: str | list[str], background: str = "false") -> Vocabulary:
        """Parse a class list and check it against the limits.

        Args:
            classes: Class names, as text separated by commas, as text with a JSON array, or as a list.
            background: ``true`` adds the class background, ``false`` does not. Any other text is a list of words, separated by
                commas, that describe the background, which is then added.

        Raises:
            HttpError: The list is empty or too long, a name is too long, or a name occurs twice.
        """
        limits = self._config().limits
        names = _names(classes) if isinstance(classes, str) else classes
        switch = background.strip().lower()
        words = [] if switch in _TRUE | _FALSE else _split(background)
        every = [part for entry in [*names, *words] for part in entry.split("|")]
        if len(every) > limits.classes:
            raise HttpError(
                422, "too_many_classes", f"There are {len(every):,} names; at most {limits.classes:,} are taken."
            )
        if any("\ud800" <= letter <= "\udfff" for name in every for letter in name):
            raise HttpError(422, "bad_classes", "A class name holds half a letter (a lone surrogate).")
        if any(len(name) > limits.text_length for name in every):
            raise HttpError(422, "name_too_long", f"A class name is longer than {limits.text_length} letters.")
        try:
            vocabulary = Vocabulary.of(names)
            if words or switch in _TRUE:
                vocabulary = vocabulary.with_background(words)
        except DataError as error:
            raise HttpError(422, "bad_classes", f"{str(error)[:1].upper()}{str(error)[1:]}.") from error
        return vocabulary


def json_names(text: str) -> list[str] | None:
    """Decode a JSON array of strings; return None if ``text`` is anything else."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _names(text: str) -> list[str]:
    if text.lstrip().startswith("["):
        names = json_names(text)
        if names is None:
            raise HttpError(422, "bad_classes", "The class list begins like JSON, but is no array of strings.")
        return names
    return _split(text)


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
