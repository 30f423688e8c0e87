"""What is asked of a model about one picture, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vilseg.text.vocabulary import Vocabulary

Format = Literal["json", "png", "overlay", "view"]
"""``view`` is what the page draws: see `serve.encoding.view`."""


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """What the encoder made of a picture, kept by the page so that other classes need no second pass; see `DenseFeatures`."""

    pixels_3HW: np.ndarray
    patches_ND: np.ndarray
    assignments_NK: np.ndarray
    grid: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SegmentRequest:
    """One picture and what to look for in it."""

    request_id: str
    model: str
    """Name of the model, to be repeated in the answer."""
    image: bytes
    vocabulary: Vocabulary
    background_bias: float | None = None
    threshold: float = 0.0
    """Pixels of lower scores are given to the background, or to no class where there is none."""
    format: Format = "json"
    polygons: bool = False
    seen: EncodedImage | None = None


@dataclass(frozen=True, kw_only=True)
class SegmentResponse:
    """A document, or why there is none."""

    status: int = 200
    """As in HTTP."""
    code: str = ""
    """What is wrong, for programs; empty where nothing is."""
    message: str = ""
    """What is wrong, as a sentence."""
    body: bytes = b""
    media_type: str = "application/json"
    seen: EncodedImage | None = None
    """Of the format ``view``."""
    batch: int = 0
    """Pictures that shared the pass through the model."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each stage took: decode, wait (for the model), model, encode."""
