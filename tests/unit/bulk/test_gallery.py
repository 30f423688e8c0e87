import io
import json
import re
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vilseg.bulk.gallery import thumbnail, write_gallery
from vilseg.errors import DataError
from vilseg.segmentation.visualization import class_colours, draw_overlay

CLASSES = ("sky", "grass", "cat")


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), 0 * x + 90], -1).astype(np.uint8)


def halves(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "WEBP"
        pair = np.asarray(image.convert("RGB")).astype(int)
    return pair[:, : pair.shape[1] // 2], pair[:, pair.shape[1] // 2 :]


@pytest.mark.parametrize(
    ("size", "half"),
    [
        ((600, 800), (192, 256)),
        ((800, 600), (256, 192)),
        ((256, 256), (256, 256)),
        ((100, 50), (200, 100)),  # enlarged by a whole factor
        ((3000, 2), (256, 1)),
        ((1, 1), (256, 256)),
    ],
)
def test_thumbnail_has_the_shape_of_the_picture(size: tuple[int, int], half: tuple[int, int]) -> None:
    plain, tinted = halves(thumbnail(picture(*size), np.zeros(size, np.uint8), CLASSES))
    assert plain.shape == tinted.shape == (*half, 3)


def test_thumbnail_shows_the_picture_beside_its_regions() -> None:
    image = picture(400, 640)
    labels = np.full((400, 640), 255, np.uint8)
    labels[:, :320] = 2
    plain, tinted = halves(thumbnail(image, labels, CLASSES))
    small = np.asarray(Image.fromarray(image).resize((256, 160), Image.Resampling.BOX)).astype(int)
    assert np.abs(plain - small).mean() < 6
    whole = np.asarray(draw_overlay(image, labels, CLASSES).resize((256, 160), Image.Resampling.BOX)).astype(int)
    assert np.abs(tinted - whole).mean() < 6
    assert np.abs(tinted[:, 140:] - plain[:, 140:]).mean() < 6  # what is no class keeps its colours
    assert np.abs(tinted[:, :120] - plain[:, :120]).mean() > 20


def test_small_regions_of_small_pictures_keep_their_places() -> None:
    labels = np.arange(4, dtype=np.uint16).reshape(2, 2) % 3
    _, tinted = halves(thumbnail(np.full((2, 2, 3), 128, np.uint8), labels, CLASSES, side=200))
    colours = class_colours(CLASSES).astype(int)
    for y, x in np.ndindex(2, 2):
        seen = tinted[y * 100 + 20 : y * 100 + 80, x * 100 + 20 : x * 100 + 80].mean((0, 1))
        expected = 0.45 * 128 + 0.55 * colours[labels[y, x]]
        assert np.abs(seen - expected).max() < 12


def test_thumbnail_of_more_than_254_classes() -> None:
    names = [f"class {number}" for number in range(300)]
    labels = np.full((300, 300), 65535, np.uint16)
    image = picture(300, 300)
    plain, tinted = halves(thumbnail(image, labels, names))
    assert np.abs(plain - tinted).mean() < 3
    labels[:] = 299
    plain, tinted = halves(thumbnail(image, labels, names))
    assert np.abs(plain - tinted).mean() > 20


@pytest.mark.parametrize(
    ("image", "labels", "side", "message"),
    [
        ((4, 5, 3), (5, 4), 256, "does not fit"),
        ((0, 5, 3), (0, 5), 256, "does not fit"),
        ((4, 5, 3), (4, 5), 9000, "1 to 8191"),
    ],
)
def test_what_makes_no_thumbnail(image: Sequence[int], labels: Sequence[int], side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        thumbnail(np.zeros(image, np.uint8), np.zeros(labels, np.uint8), CLASSES, side=side)


# ----------------------------------------------------------------------------------------------------------- rows


def ok(path: str, *regions: tuple[str, int, float], size: tuple[int, int] = (100, 50)) -> dict[str, Any]:
    names, areas, scores = zip(*regions, strict=True) if regions else ((), (), ())
    return {
        **{"path": path, "width": size[0], "height": size[1], "status": "ok", "error": None},
        **{"classes": list(names), "areas": list(areas), "scores": list(scores)},
    }


def rejected(path: str, error: str) -> dict[str, Any]:
    empty = dict.fromkeys(("width", "height", "classes", "areas", "scores"))
    return {"path": path, "status": "rejected", "error": error, **empty}


def about(folder: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="about">(.*?)</script>', (folder / "gallery.html").read_text()
    )
    assert found is not None
    return json.loads(found[1])


def chunks(folder: Path) -> list[dict[str, Any]]:
    texts = [file.read_text() for file in sorted((folder / "gallery").iterdir())]
    assert all(text.startswith("addRows(") and text.endswith(");\n") for text in texts)
    return [json.loads(text[len("addRows(") : -len(");\n")]) for text in texts]


def test_rows_are_written_in_columns_with_the_largest_region_first(tmp_path: Path) -> None:
    rows = [
        ok("a/1.jpg", ("cat", 500, 0.25), ("sky", 4000, 0.9996)),
        rejected("a/2.jpg", "the image is damaged"),
        ok("b/3 # ü.jpg"),
    ]
    write_gallery(str(tmp_path), rows, CLASSES, title="Cats & dogs")
    assert chunks(tmp_path) == [
        {
            "paths": ["a/1.jpg", "a/2.jpg", "b/3 # ü.jpg"],
            "sizes": [100, 50, 0, 0, 100, 50],
            "counts": [2, -1, 0],
            "regions": [0, 8000, 1000, 2, 1000, 250],
            "errors": ["the image is damaged"],
        }
    ]
    described = about(tmp_path)
    assert {key: described[key] for key in ("rows", "regions", "chunks")} == {"rows": 3, "regions": 2, "chunks": 1}
    assert described["classes"] == list(CLASSES)
    assert [tuple(bytes.fromhex(colour[1:])) for colour in described["colours"]] == [
        tuple(colour) for colour in class_colours(CLASSES)
    ]
    assert "<title>Cats &amp; dogs</title>" in (tmp_path / "gallery.html").read_text()


def test_a_speck_does_not_round_to_nothing(tmp_path: Path) -> None:
    write_gallery(str(tmp_path), [ok("a.jpg", ("cat", 1, 0.5), size=(5000, 4000))], CLASSES)
    assert chunks(tmp_path)[0]["regions"] == [2, 1, 500]


def test_names_cannot_leave_the_places_they_are_written_to(tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)>"
    write_gallery(str(tmp_path), [ok("a.jpg", (name, 10, 0.5))], [name], title=name)
    assert about(tmp_path)["classes"] == [name]
    assert "<img src=x" not in (tmp_path / "gallery.html").read_text()


def test_a_gallery_replaces_a_longer_one(tmp_path: Path) -> None:
    write_gallery(str(tmp_path), (ok(f"{number}.jpg") for number in range(9000)), CLASSES)
    assert [len(chunk["paths"]) for chunk in chunks(tmp_path)] == [4096, 4096, 808]
    (tmp_path / "thumbs").mkdir()
    write_gallery(str(tmp_path), [ok("0.jpg")], CLASSES)
    assert [len(chunk["paths"]) for chunk in chunks(tmp_path)] == [1]
    assert about(tmp_path)["chunks"] == 1
    assert (tmp_path / "thumbs").is_dir()


def test_no_page_is_left_without_all_of_its_rows(tmp_path: Path) -> None:
    write_gallery(str(tmp_path), [ok("0.jpg")], CLASSES)

    def failing() -> Iterator[dict[str, Any]]:
        yield from (ok(f"{number}.jpg") for number in range(5000))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_gallery(str(tmp_path), failing(), CLASSES)
    assert not (tmp_path / "gallery.html").exists()


def test_an_empty_archive_has_a_page(tmp_path: Path) -> None:
    write_gallery(str(tmp_path), [], CLASSES)
    assert about(tmp_path)["rows"] == 0


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        rows = (ok(f"folder/{number:08d}.jpg", ("cat", 10, 0.5), ("sky", 90, 0.7)) for number in range(count))
        tracemalloc.start()
        try:
            write_gallery(str(tmp_path), rows, CLASSES)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(16_000) < 1.2 * peak(5_000)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ok("a.jpg", ("dog", 10, 0.5)), "a.jpg names the class 'dog', which is not in the class list"),
        (ok("a.jpg", ("cat", 5001, 0.5)), "5001 of 5000 pixels"),
        (ok("a.jpg", ("cat", 10, float("nan"))), "a score of nan"),
        (ok("a\udcff.jpg"), "is not Unicode text"),
        (rejected("a.jpg", "cannot read \udcff"), "is not Unicode text"),
    ],
)
def test_rows_that_cannot_be_are_said_to_be_wrong(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_gallery(str(tmp_path), [row], CLASSES)
