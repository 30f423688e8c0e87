"""Types that travel between ingress and replicas: a request to segment one image, and its response."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vilseg.text.vocabulary import Vocabulary

Format = Literal["json", "png", "overlay", "viewer"]
"""``viewer`` is for the page: see `serve.encoding.viewer_data`."""


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """Dense features of an image, kept by the page so that other classes need no second pass through the encoder."""

    pixels_3HW: np.ndarray
    patches_ND: np.ndarray
    assignments_NK: np.ndarray
    grid: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SegmentRequest:
    """One image and the classes to look for in it."""

    request_id: str
    model: str
    """Name of the model, repeated in the response."""
    image: bytes
    """Encoded: JPEG, PNG, ..."""
    vocabulary: Vocabulary
    background_bias: float | None = None
    """Added to the score of the class background; None takes the model's own."""
    threshold: float = 0.0
    """Pixels of lower scores are given to the background, or to no class where there is none."""
    format: Format = "json"
    polygons: bool = False
    """Add outlines to the JSON."""
    encoded: EncodedImage | None = None
    """Features of ``image`` from an earlier response of the same model; they replace the encoder's pass."""


@dataclass(frozen=True, kw_only=True)
class SegmentResponse:
    """A response body, or the error in its place."""

    status: int = 200
    """HTTP status."""
    code: str = ""
    """Error code for programs; empty if there is no error."""
    message: str = ""
    """Error as a sentence."""
    body: bytes = b""
    media_type: str = "application/json"
    encoded: EncodedImage | None = None
    """Set for the format ``viewer``."""
    batch: int = 0
    """Number of images in the same pass through the model."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each stage: decode, wait (for the model), model, encode."""


SegmentFunction = Callable[[SegmentRequest], Awaitable[SegmentResponse]]
"""Sends a request to a replica; raises `serve.http_errors.HttpError`."""
