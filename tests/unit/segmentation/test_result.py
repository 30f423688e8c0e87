import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.visualization import class_colours

CLASSES = ("background", "cat", "sofa", "lamp")


@pytest.fixture
def segmentation() -> Segmentation:
    """Blocky random labels with areas that have no class; "lamp" is absent."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 255], size=(5, 7)).repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
    return Segmentation(
        labels=labels,
        classes=CLASSES,
        scores=rng.random(labels.shape, dtype=np.float32),
        clusters=labels.astype(np.int64) % 5,
        image=rng.integers(0, 256, (*labels.shape, 3), dtype=np.uint8),
    )


def many_classes(count: int) -> Segmentation:
    labels = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) % count
    labels[0, 0] = 65535
    return Segmentation(
        labels=labels,
        classes=tuple(f"class {index}" for index in range(count)),
        scores=np.ones(labels.shape, np.float32),
    )


def test_regions_agree_with_a_pixel_by_pixel_count(segmentation: Segmentation) -> None:
    assert [region.class_name for region in segmentation.regions] == ["background", "cat", "sofa"]
    for region in segmentation.regions:
        index = CLASSES.index(region.class_name)
        pixels = [(y, x) for y in range(40) for x in range(56) if segmentation.labels[y, x] == index]
        ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
        assert region.area == len(pixels)
        assert region.score == pytest.approx(sum(float(segmentation.scores[pixel]) for pixel in pixels) / len(pixels))
        assert region.bbox_xywh == (min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1)


def test_regions_hold_plain_python_values(segmentation: Segmentation) -> None:
    region = segmentation.regions[0]
    assert (type(region.area), type(region.score)) == (int, float)
    assert {type(side) for side in region.bbox_xywh} == {int}
    assert json.loads(json.dumps(region.rle)) == region.rle


def test_regions_do_not_depend_on_how_many_pixels_are_counted_at_once(
    segmentation: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = segmentation.regions
    monkeypatch.setattr("vilseg.segmentation.result._BLOCK_PIXELS", 100)
    again = Segmentation(labels=segmentation.labels, classes=CLASSES, scores=segmentation.scores).regions
    assert [region.area for region in again] == [region.area for region in whole]
    assert [region.score for region in again] == pytest.approx([region.score for region in whole])


def test_rle_decodes_to_the_mask_of_the_class(segmentation: Segmentation) -> None:
    for region in segmentation.regions:
        expected = segmentation.labels == CLASSES.index(region.class_name)
        np.testing.assert_array_equal(coco_mask.decode(region.rle).astype(bool), expected)


def test_an_image_without_any_class_has_no_regions() -> None:
    nothing = Segmentation(labels=np.full((4, 6), 255, np.uint8), classes=("cat",), scores=np.zeros((4, 6), np.float32))
    assert nothing.regions == []
    assert nothing.to_coco()["annotations"] == []
    assert nothing.overlay().size >= (6, 4)


def test_coco_file_is_read_by_pycocotools(segmentation: Segmentation, tmp_path) -> None:
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps({"info": {}, **segmentation.to_coco(image_id=7)}))
    coco = COCO(str(file))

    assert coco.imgs[7]["width"] == 56
    assert coco.imgs[7]["height"] == 40
    assert [coco.cats[number]["name"] for number in sorted(coco.cats)] == list(CLASSES)
    rebuilt = np.full((40, 56), 255, np.uint8)
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=7)):
        mask = coco.annToMask(annotation)
        assert annotation["area"] == mask.sum()
        rebuilt[mask == 1] = annotation["category_id"] - 1
    np.testing.assert_array_equal(rebuilt, segmentation.labels)


def test_png_keeps_labels_and_colours(segmentation: Segmentation, tmp_path) -> None:
    segmentation.to_png(str(tmp_path / "masks" / "a.png"))
    with Image.open(tmp_path / "masks" / "a.png") as rendered:
        assert rendered.mode == "P"
        np.testing.assert_array_equal(np.array(rendered), segmentation.labels)
        coloured = np.array(rendered.convert("RGB"))
    expected = np.vstack([class_colours(CLASSES), np.zeros((252, 3), np.uint8)])[segmentation.labels]
    np.testing.assert_array_equal(coloured, expected)


@pytest.mark.parametrize(("count", "mode"), [(255, "I;16"), (600, "I;16")])
def test_png_of_many_classes_has_16_bit(count: int, mode: str) -> None:
    segmentation = many_classes(count)
    with Image.open(io.BytesIO(segmentation.to_png_bytes())) as rendered:
        assert rendered.mode == mode
        np.testing.assert_array_equal(np.array(rendered), segmentation.labels)


def test_overlay_without_legend_has_the_size_of_the_image(segmentation: Segmentation) -> None:
    assert segmentation.overlay(legend=False).size == (56, 40)


def test_overlay_with_legend_is_enlarged_by_a_whole_factor(segmentation: Segmentation) -> None:
    width, height = segmentation.overlay().size
    assert width == 56 * 7
    assert height > 40 * 7


def test_full_opacity_shows_class_colours_and_leaves_no_class_as_it_was(segmentation: Segmentation) -> None:
    rendered = np.array(segmentation.overlay(opacity=1, legend=False))
    nothing = segmentation.labels == 255
    assert segmentation.image is not None
    np.testing.assert_array_equal(rendered[nothing], segmentation.image[nothing])
    np.testing.assert_array_equal(rendered[~nothing], class_colours(CLASSES)[segmentation.labels[~nothing]])


def test_overlay_of_many_classes_without_an_image() -> None:
    assert many_classes(600).overlay(legend=False).size == (30, 20)


def test_arrays_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores of shape \(4, 5\)"):
        Segmentation(labels=np.zeros((4, 6), np.uint8), classes=("cat",), scores=np.zeros((4, 5), np.float32))


def test_labels_that_cannot_hold_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="labels of 255 classes must be"):
        Segmentation(labels=np.zeros((4, 6), np.uint8), classes=("cat",) * 255, scores=np.zeros((4, 6), np.float32))


def test_a_threshold_gives_unsure_pixels_to_the_background_or_to_none() -> None:
    labels = np.array([[0, 1], [1, 0]], np.uint8)
    scores = np.array([[0.9, 0.2], [0.5, 0.1]], np.float32)
    for classes, rest in ((("a", "b"), 255), (("a", "background"), 1)):
        result = Segmentation(labels=labels, classes=classes, scores=scores)
        np.testing.assert_array_equal(result.above(0.3).labels, [[0, rest], [1, rest]])
        assert result.above(0) is result
    many = Segmentation(labels=labels.astype(np.uint16), classes=tuple(map(str, range(300))), scores=scores)
    assert many.above(0.3).labels.max() == 65535
