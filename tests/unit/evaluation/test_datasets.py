import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vilseg.errors import DataError
from vilseg.evaluation.datasets import FolderDataset, open_dataset
from vilseg.segmentation.result import Segmentation

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
MASK = np.array([[0, 1, 2, 255] * 2] * 6, np.uint8)


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    picture = Image.fromarray(array)
    if mode == "P":
        picture = Image.frombytes("P", picture.size, array.tobytes())
        picture.putpalette(bytes(range(256)) * 3)
    elif mode is not None:
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("background\ncat\nsofa\n\n")
    for name in ("b", "a"):
        (tmp_path / "images" / f"{name}.png").write_bytes(png(IMAGE))
        (tmp_path / "masks" / f"{name}.png").write_bytes(png(MASK))
    return tmp_path


def test_images_come_in_order_with_their_masks(folder: Path) -> None:
    dataset = open_dataset(f"folder:{folder}")
    items = list(dataset)
    assert dataset.classes == ("background", "cat", "sofa")
    assert len(dataset) == 2
    assert [item.name for item in items] == ["a", "b"]
    np.testing.assert_array_equal(items[0].image, IMAGE)
    np.testing.assert_array_equal(items[0].mask, MASK)
    assert items[0].ignore == 255


def test_a_dataset_can_be_read_twice(folder: Path) -> None:
    dataset = FolderDataset(str(folder))
    assert [item.name for item in dataset] == [item.name for item in dataset]


def test_folders_within_and_other_image_formats(folder: Path) -> None:
    (folder / "images" / "deep").mkdir()
    (folder / "masks" / "deep").mkdir()
    Image.fromarray(IMAGE).save(folder / "images" / "deep" / "c.v2.JPG", format="JPEG")
    (folder / "masks" / "deep" / "c.v2.png").write_bytes(png(MASK))
    assert [item.name for item in FolderDataset(str(folder))] == ["a", "b", "deep/c.v2"]


def test_16_bit_masks_ignore_65535(folder: Path) -> None:
    wide = np.where(MASK == 255, np.uint16(65535), MASK)
    (folder / "masks" / "a.png").write_bytes(png(wide))
    item = next(iter(FolderDataset(str(folder))))
    assert item.ignore == 65535
    np.testing.assert_array_equal(item.mask, wide)


def test_masks_with_a_palette_are_read_by_index(folder: Path) -> None:
    (folder / "masks" / "a.png").write_bytes(png(MASK, "P"))
    np.testing.assert_array_equal(next(iter(FolderDataset(str(folder)))).mask, MASK)


def test_what_segmentation_writes_is_a_mask(folder: Path) -> None:
    result = Segmentation(labels=MASK, classes=("background", "cat", "sofa"), scores=np.ones(MASK.shape, np.float32))
    result.to_png(str(folder / "masks" / "a.png"))
    np.testing.assert_array_equal(next(iter(FolderDataset(str(folder)))).mask, MASK)


def assert_one_sentence(error: DataError, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def test_missing_classes_file(folder: Path) -> None:
    (folder / "classes.txt").unlink()
    with pytest.raises(DataError) as caught:
        FolderDataset(str(folder))
    assert_one_sentence(caught.value, "classes.txt is missing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n", "is empty"),
        ("cat\n\nsofa\n", "no name in line 2"),
        ("cat\nsofa\ncat\n", "names 'cat' twice, for mask values 0 and 2"),
    ],
)
def test_wrong_classes_file(folder: Path, text: str, message: str) -> None:
    (folder / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        FolderDataset(str(folder))


def test_no_images(folder: Path) -> None:
    for file in (folder / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError) as caught:
        FolderDataset(str(folder))
    assert_one_sentence(caught.value, "no images in", str(folder / "images"))


def test_image_without_mask(folder: Path) -> None:
    (folder / "masks" / "b.png").unlink()
    with pytest.raises(DataError) as caught:
        FolderDataset(str(folder))
    assert_one_sentence(caught.value, str(folder / "images" / "b.png"), "has no mask")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (png(MASK[:5]), "is 8 x 5 pixels but its image is 8 x 6"),
        (png(np.full((6, 8), 7, np.uint8)), "has the value 7, which is no class: classes.txt names 0 to 2"),
        (png(np.full((6, 8), 255, np.uint16)), "has the value 255"),
        (png(IMAGE), "neither a grey PNG"),
        (png(MASK, "1"), "neither a grey PNG"),
        (b"no picture at all", "is no PNG"),
        (png(MASK)[:50], "is damaged"),
    ],
    ids=["size", "value", "value of 16 bit", "colour", "1 bit", "no image", "cut off"],
)
def test_wrong_masks_name_file_and_reason(folder: Path, mask: bytes, message: str) -> None:
    (folder / "masks" / "a.png").write_bytes(mask)
    with pytest.raises(DataError) as caught:
        list(FolderDataset(str(folder)))
    assert_one_sentence(caught.value, str(folder / "masks" / "a.png"), message)


def test_broken_image_is_named(folder: Path) -> None:
    (folder / "images" / "a.png").write_bytes(b"no picture at all")
    with pytest.raises(DataError) as caught:
        list(FolderDataset(str(folder)))
    assert_one_sentence(caught.value, str(folder / "images" / "a.png"))


@pytest.mark.parametrize("spec", ["voc2099:/data", "folder", "folder:", "/data/scenes"])
def test_unknown_kinds_list_those_that_exist(spec: str) -> None:
    with pytest.raises(DataError, match="KIND one of folder"):
        open_dataset(spec)
