"""A segmentation as an answer: JSON, PNG, overlay, and what the page draws from."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from serve.request_types import SegmentRequest
from vilseg.segmentation.polygons import polygons
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.visualization import BACKGROUND, class_colours, rgb

_VIEW_SIDE = 1024
"""px: the page shows nothing larger."""
_NOTHING = 255
"""In a view's map: no class."""


def encode(result: Segmentation, question: SegmentRequest) -> tuple[bytes, str]:
    """The document that was asked for and its media type.

    ``view`` holds the pixels of all scores, whatever the threshold of the question: the page applies it itself.
    """
    if question.format == "view":
        return json.dumps(view(result)).encode(), "application/json"
    result = result.above(question.threshold)
    if question.format == "png":
        return result.to_png_bytes(), "image/png"
    if question.format == "overlay":
        return _png(result.overlay()), "image/png"
    return json.dumps(document(result, question)).encode(), "application/json"


def document(result: Segmentation, question: SegmentRequest) -> dict[str, Any]:
    """The JSON of one picture: classes, and a region for each class that is present."""
    height, width = result.labels.shape
    index = {name: number for number, name in enumerate(result.classes)}
    regions = []
    for region in result.regions:
        found: dict[str, Any] = {
            "class": region.class_name,
            "class_index": index[region.class_name],
            "score": round(region.score, 4),
            "area": region.area,
            "bbox_xywh": list(region.bbox_xywh),
            "rle": dict(region.rle),
        }
        if question.polygons:
            found["polygons"] = polygons(region.rle)
        regions.append(found)
    return {
        "request_id": question.request_id,
        "model": question.model,
        "width": width,
        "height": height,
        "classes": list(result.classes),
        "regions": regions,
    }


def view(result: Segmentation) -> dict[str, Any]:
    """What a browser needs to draw all views itself and to apply a threshold at once.

    Returns:
        ``image`` (a WebP) and ``maps`` (a PNG) as data URLs of at most 1024 px a side, ``width`` and ``height`` of the
        picture itself, and ``classes``: name and colour of those present. In ``maps`` red is the index into ``classes``
        (255 = none), green the score x 255, blue the cluster.
    """
    height, width = result.labels.shape
    factor = min(1.0, _VIEW_SIDE / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    areas = np.bincount(result.labels.ravel(), minlength=len(result.classes))[: len(result.classes)]
    # One byte has room for so many; of more, the smallest are left out.
    present = np.argsort(-areas, kind="stable")[:_NOTHING]
    present = present[areas[present] > 0]
    if BACKGROUND in result.classes and (rest := result.classes.index(BACKGROUND)) not in present:
        present = np.append(present[: _NOTHING - 1], rest)  # a threshold may give it pixels
    index = np.full(np.iinfo(result.labels.dtype).max + 1, _NOTHING, np.uint8)
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
