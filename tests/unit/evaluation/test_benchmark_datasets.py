import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.unit import benchmark_dataset_trees as trees
from vilseg.errors import DataError
from vilseg.evaluation.benchmark_datasets import LAYOUTS, Layout
from vilseg.evaluation.datasets import open_dataset
from vilseg.text.vocabulary import Vocabulary

WRITERS: dict[str, Callable[[Path], None]] = {
    "voc": trees.voc,
    "context": trees.context,
    "coco-stuff": trees.coco_stuff,
    "ade20k": trees.ade20k,
}


def names_across(dataset: str, uri: Path) -> list[list[str]]:
    """True classes from left to right in each image, "-" for ignored."""
    opened = open_dataset(f"{dataset}:{uri}")
    items = list(opened)
    assert len(opened) == len(items)
    found = []
    for item in items:
        assert item.image.shape == (*trees.SIZE, 3)
        row = item.mask[0]
        values = row[np.flatnonzero(np.diff(row, prepend=-1))]
        found.append(["-" if value == item.ignore else opened.classes[value] for value in values])
    return found


def test_voc_ignores_borders(tmp_path: Path) -> None:
    trees.voc(tmp_path)
    assert names_across("voc", tmp_path) == [
        ["background", "-", "person", "-"],
        ["background", "train", "potted plant", "tv monitor"],
    ]


def test_context_is_in_the_order_of_its_converter(tmp_path: Path) -> None:
    # The converter's values 0, 55 and 58 in 2008_000002.png (open-mmlab/mmsegmentation, issue 1940), where VOC has a monitor.
    trees.context(tmp_path)
    assert names_across("context", tmp_path) == [["background", "tv monitor", "window", "cow"]]
    assert len(open_dataset(f"context:{tmp_path}").classes) == 60


def test_coco_stuff_in_both_numberings(tmp_path: Path) -> None:
    trees.coco_stuff(tmp_path / "published")
    trees.coco_stuff(tmp_path / "renumbered", renumbered=True)
    expected = [["person", "toaster", "wood", "-"]]
    assert names_across("coco-stuff", tmp_path / "published") == expected
    assert names_across("coco-stuff", tmp_path / "renumbered") == expected
    trees.coco_stuff(tmp_path / "published", renumbered=True)  # as the converter leaves them: side by side
    assert names_across("coco-stuff", tmp_path / "published") == expected


def test_ade20k_ignores_other_objects(tmp_path: Path) -> None:
    trees.ade20k(tmp_path)
    assert names_across("ade20k", tmp_path) == [["-", "wall", "person", "flag"]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_folders_above_will_do(layout: Layout, tmp_path: Path) -> None:
    for number, folder in enumerate(("", *layout.within)):
        above = tmp_path / str(number)
        WRITERS[layout.kind](above / folder)
        assert len(open_dataset(f"{layout.kind}:{above}")) >= 1


@pytest.mark.parametrize(
    ("kind", "count", "first", "last"),
    [
        ("voc", 21, "background", "tv monitor"),
        ("context", 60, "background", "wood"),
        ("coco-stuff", 171, "person", "wood"),
        ("ade20k", 150, "wall", "flag"),
    ],
)
def test_class_lists(kind: str, count: int, first: str, last: str) -> None:
    (layout,) = (layout for layout in LAYOUTS if layout.kind == kind)
    assert Vocabulary(layout.classes).classes == layout.classes  # no name is empty or there twice
    assert (len(layout.classes), layout.classes[0], layout.classes[-1]) == (count, first, last)
    assert set(layout.unseen) <= set(layout.classes)
    for values in layout.suffixes.values():
        assert len(values) == count


def test_unseen_classes_are_those_of_the_paper() -> None:
    assert {layout.kind: len(layout.unseen) for layout in LAYOUTS} == {
        "voc": 5,
        "context": 4,
        "coco-stuff": 15,
        "ade20k": 0,
    }


def assert_refused(kind: str, root: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        list(open_dataset(f"{kind}:{root}"))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", WRITERS)
def test_another_folder_names_what_must_be_there(kind: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (layout,) = (layout for layout in LAYOUTS if layout.kind == kind)
    assert_refused(kind, tmp_path, str(tmp_path), layout.title, f"{layout.images}/NAME.jpg", f"{layout.masks}/NAME")


def test_context_as_downloaded_says_where_masks_are_from(tmp_path: Path) -> None:
    trees.write(tmp_path, {"JPEGImages/2008_000002.jpg": trees.jpeg(), "33_context_labels/2008_000002.mat": b"MATLAB"})
    assert_refused("context", tmp_path, "SegmentationClassContext", "mmsegmentation", "pascal_context.py")


def test_missing_parts(tmp_path: Path) -> None:
    trees.voc(tmp_path)
    mask = tmp_path / "SegmentationClass" / "2007_000042.png"
    content = mask.read_bytes()
    mask.unlink()
    assert_refused("voc", tmp_path, "2007_000042.jpg has no mask in", "SegmentationClass")
    mask.write_bytes(content)
    (tmp_path / "JPEGImages" / "2007_000033.jpg").unlink()
    assert_refused("voc", tmp_path, "2007_000033.jpg is missing", "val.txt")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("\n")
    assert_refused("voc", tmp_path, "no image of PASCAL VOC 2012")
    (tmp_path / "ImageSets/Segmentation/val.txt").unlink()
    assert_refused("voc", tmp_path, "holds no ImageSets/Segmentation/val.txt")


@pytest.mark.parametrize(
    ("kind", "mask", "value"),
    [
        ("voc", "SegmentationClass/2007_000042.png", 21),
        ("context", "SegmentationClassContext/2008_000002.png", 60),
        ("coco-stuff", "annotations/val2017/000000000139.png", 11),  # street sign, which nobody drew
        ("ade20k", "annotations/validation/ADE_val_00000001.png", 151),
    ],
)
def test_values_that_are_no_class(kind: str, mask: str, value: int, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path)
    (tmp_path / mask).write_bytes(trees.png(trees.stripes(1, value)))
    assert_refused(kind, tmp_path, str(tmp_path / mask), f"has the value {value}, which is no class of")


def test_masks_of_16_bit_or_another_size(tmp_path: Path) -> None:
    trees.ade20k(tmp_path)
    mask = tmp_path / "annotations/validation/ADE_val_00000001.png"
    mask.write_bytes(trees.png(np.full(trees.SIZE, 1000, np.uint16)))
    assert_refused("ade20k", tmp_path, str(mask), "has the value 1000")
    mask.write_bytes(trees.png(trees.stripes(1)[:5]))
    assert_refused("ade20k", tmp_path, str(mask), "is 16 x 5 pixels but its image is 16 x 12")


def test_kinds_are_listed_where_one_is_wrong() -> None:
    with pytest.raises(DataError, match=re.escape("folder, voc, context, coco-stuff, ade20k")):
        open_dataset("pascal:/data")
