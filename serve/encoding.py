"""Encoding of a segmentation as response body: JSON, label map (PNG), overlay (PNG), or data for the page's viewer."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from serve.request_types import SegmentRequest
from vilseg.api_schema import ImageResult
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.visualization import BACKGROUND, class_colours, rgb

_VIEWER_SIDE = 1024
"""Maximum height and width in pixels of the images that the viewer gets."""
_NO_CLASS = 255
"""Value of pixels without a class in the viewer's map of classes."""


def encode(result: Segmentation, request: SegmentRequest) -> tuple[bytes, str]:
    """Encode a segmentation in the format of the request.

    The format ``viewer`` ignores the threshold of the request, because the viewer applies it in the browser.

    Returns:
        Response body and media type.
    """
    if request.format == "viewer":
        return json.dumps(viewer_data(result)).encode(), "application/json"
    result = result.above(request.threshold)
    if request.format == "png":
        return result.to_png_bytes(), "image/png"
    if request.format == "overlay":
        return _png(result.overlay()), "image/png"
    answer = ImageResult.from_segmentation(
        result, request_id=request.request_id, model=request.model, with_polygons=request.polygons
    )
    return answer.to_json(), "application/json"


def viewer_data(result: Segmentation) -> dict[str, Any]:
    """Collect the data with which the browser draws classes, clusters and scores and applies a threshold.

    Returns:
        JSON-serialisable dictionary. ``image`` (WebP) and ``maps`` (PNG) are data URLs of at most 1024 x 1024 pixels;
        ``width`` and ``height`` are those of the original image; ``classes`` has name and colour of each class present;
        ``background`` is the name of the class background, or None. In ``maps``, red is the index into ``classes`` (255 = no
        class), green the score x 255, and blue the cluster index.
    """
    height, width = result.labels.shape
    factor = min(1.0, _VIEWER_SIDE / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    areas = np.bincount(result.labels.ravel(), minlength=len(result.classes))[: len(result.classes)]
    # A byte can represent 255 classes; if there are more, the smallest are left out.
    present = np.argsort(-areas, kind="stable")[:_NO_CLASS]
    present = present[areas[present] > 0]
    if BACKGROUND in result.classes and (background := result.classes.index(BACKGROUND)) not in present:
        present = np.append(present[: _NO_CLASS - 1], background)  # a threshold may assign pixels to it
    index = np.full(np.iinfo(result.labels.dtype).max + 1, _NO_CLASS, np.uint8)
    index[present] = np.arange(len(present))
    clusters = np.zeros_like(result.labels) if result.clusters is None else result.clusters
    layers = (index[result.labels], np.rint(result.scores * 255).astype(np.uint8), clusters.astype(np.uint8))
    maps = Image.merge("RGB", [Image.fromarray(layer).resize(size, Image.Resampling.NEAREST) for layer in layers])
    assert result.image is not None
    image = Image.fromarray(result.image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    colours = class_colours(result.classes)
    return {
        "width": width,
        "height": height,
        "image": _data_url(image, "WEBP", quality=85, method=0),
        "maps": _data_url(maps, "PNG", compress_level=1),
        "classes": [{"name": result.classes[number], "colour": rgb(colours[number])} for number in present],
        "background": BACKGROUND if BACKGROUND in result.classes else None,
    }


def _data_url(image: Image.Image, format: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
