"""Response bodies: JSON, PNG and the data of the page's viewer."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from serve.encoding import encode, viewer_data
from serve.request_types import SegmentRequest
from vilseg.api_schema import ImageResult
from vilseg.segmentation.result import Segmentation
from vilseg.text.vocabulary import Vocabulary


def made(height: int, width: int, classes: tuple[str, ...]) -> Segmentation:
    rng = np.random.default_rng(0)
    dtype = np.uint8 if len(classes) <= 254 else np.uint16
    return Segmentation(
        labels=rng.integers(0, len(classes), (height, width)).astype(dtype),
        classes=classes,
        scores=rng.random((height, width), np.float32),
        clusters=rng.integers(0, 7, (height, width)).astype(np.int16),
        image=rng.integers(0, 255, (height, width, 3), dtype=np.uint8),
    )


def request(**parts: Any) -> SegmentRequest:
    return SegmentRequest(request_id="r", model="m", image=b"", vocabulary=Vocabulary(("a",)), **parts)


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_the_json_holds_every_pixel_and_the_threshold_takes_some_away() -> None:
    result = made(30, 50, ("sky", "sea", "boat"))
    body, media_type = encode(result, request(threshold=0.4))
    assert media_type == "application/json"
    document = json.loads(body)
    kept = np.where(result.scores < 0.4, 255, result.labels)
    np.testing.assert_array_equal(ImageResult.model_validate(document).to_segmentation().labels, kept)
    for region in document["regions"]:
        mask = kept == region["class_index"]
        assert region["area"] == mask.sum() == coco_mask.area(region["rle"])
        assert region["score"] == pytest.approx(result.scores[mask].mean(), abs=1e-4)
        assert "polygons" not in region


def test_below_the_threshold_is_background_where_there_is_one() -> None:
    result = made(30, 50, ("sky", "background", "boat"))
    document = json.loads(encode(result, request(threshold=0.4))[0])
    np.testing.assert_array_equal(
        ImageResult.model_validate(document).to_segmentation().labels, np.where(result.scores < 0.4, 1, result.labels)
    )


def test_polygons_enclose_what_the_run_lengths_hold() -> None:
    labels = np.full((40, 60), 1, np.uint8)
    labels[5:25, 10:40] = 0
    labels[10:15, 20:30] = 1  # a hole
    labels[30:38, 2:9] = 0
    result = Segmentation(labels=labels, classes=("a", "b"), scores=np.ones((40, 60), np.float32))
    regions = json.loads(encode(result, request(polygons=True))[0])["regions"]
    [region] = [region for region in regions if region["class"] == "a"]
    drawn = np.zeros((40, 60), int)
    for outline, *holes in region["polygons"]:
        assert outline[0] == outline[-1]
        for ring, sign in ((outline, 1), *((hole, -1) for hole in holes)):
            drawn += sign * coco_mask.decode(coco_mask.frPyObjects([np.ravel(ring).tolist()], 40, 60))[:, :, 0].astype(
                int
            )
    mask = labels == 0
    assert (drawn.astype(bool) & mask).sum() / (drawn.astype(bool) | mask).sum() > 0.97
    assert [len(polygon) for polygon in region["polygons"]] == [2, 1]


def test_viewer_data_hold_labels_scores_and_clusters_of_every_pixel() -> None:
    result = made(30, 50, tuple(f"class {number}" for number in range(6)))
    found = viewer_data(result)
    maps = pixels(found["maps"])
    names = [found["classes"][index]["name"] for index in maps[:, :, 0].ravel()]
    assert names == [result.classes[index] for index in result.labels.ravel()]
    np.testing.assert_allclose(maps[:, :, 1] / 255, result.scores, atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(maps[:, :, 2], result.clusters)
    assert pixels(found["image"]).shape == (30, 50, 3)


def test_viewer_data_of_many_classes_and_of_a_large_image() -> None:
    result = made(1500, 2000, tuple(f"class {number}" for number in range(300)))
    found = viewer_data(result)
    assert pixels(found["maps"]).shape == (768, 1024, 3)
    assert (found["width"], found["height"]) == (2000, 1500)
    assert len(found["classes"]) == 255, "a byte holds no more; the smallest are left out"
