"""Form fields of the API, and the parser that turns their values into models and class lists within the limits."""

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
    """Parser of model names and class lists.

    Args:
        config: Returns the present configuration.

    Example:
        >>> config = ServeConfig(models={"day": "runs/day/model"})
        >>> parser = FormParser(lambda: config)
        >>> parser.model(None), parser.vocabulary("sky|clouds, sea", background="true").classes
        ('day', ('sky', 'sea', 'background'))
    """

    def __init__(self, config: Callable[[], ServeConfig]) -> None:
        self._config = config

    def model(self, name: str | None) -> str:
        """Return the name of a served model; the default if ``name`` is None or empty.

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
        """Return the class list.

        Args:
            classes: Names with commas, a JSON array, or the names themselves.
            background: ``true``, ``false``, or words with commas that say what it is made of.

        Raises:
            HttpError: The list is empty, too long, or repeats a name.
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
    """Return the strings of a JSON array; None if ``text`` is no such array."""
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
