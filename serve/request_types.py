"""Messages between ingress and replicas: a request to segment one image, and its response."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vilseg.text.vocabulary import Vocabulary

Format = Literal["json", "png", "overlay", "viewer"]
"""Format of the response body. ``viewer`` is the format of the page's viewer; see `serve.encoding.viewer_data`."""


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """Dense features of an image, which the page stores so that segmenting other classes needs no second encoder pass."""

    pixels_3HW: np.ndarray
    patches_ND: np.ndarray
    assignments_NK: np.ndarray
    grid: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SegmentRequest:
    """Request to segment one image into given classes."""

    request_id: str
    model: str
    """Name of the model, returned in the response."""
    image: bytes
    """Encoded image: JPEG, PNG, ..."""
    vocabulary: Vocabulary
    """Class list."""
    background_bias: float | None = None
    """Value added to the score of the class background; None takes the one in the model's configuration."""
    threshold: float = 0.0
    """Pixels with a lower score are labelled background, or no class if there is no class background."""
    format: Format = "json"
    polygons: bool = False
    """Add the outlines of the regions to the JSON."""
    encoded: EncodedImage | None = None
    """Features of ``image`` from an earlier response of the same model, which make the encoder pass unnecessary."""


@dataclass(frozen=True, kw_only=True)
class SegmentResponse:
    """Response to a `SegmentRequest`: a body, or an error if ``status`` is not 200."""

    status: int = 200
    """HTTP status."""
    code: str = ""
    """Machine-readable error code; empty if there is no error."""
    message: str = ""
    """Error as a sentence for people; empty if there is no error."""
    body: bytes = b""
    """Segmentation in the format of the request; empty if there is an error."""
    media_type: str = "application/json"
    """Media type of the body."""
    encoded: EncodedImage | None = None
    """Features of the image; None if the format is not ``viewer``."""
    batch: int = 0
    """Number of images in the same forward pass of the model."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration in seconds of each stage: decode, wait (for the model), model, encode."""


SegmentFunction = Callable[[SegmentRequest], Awaitable[SegmentResponse]]
"""Function that sends a request to a replica; raises `serve.http_errors.HttpError` if the request fails."""
