"""Bulk segmentation for real: pictures on an S3 server, a pool of Ray actors, the output contract."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cluster.ray_session import Session
from jobs.segment import segment_job
from jobs.segment.plan import plan
from vilseg import Segmenter, ViLSeg, Vocabulary, storage
from vilseg.config import SegmentationConfig
from vilseg.data.synthetic import scenes
from vilseg.errors import ConfigError, DataError, StorageError

ROOT = "s3://vilseg/test-segment"
NAMES = Vocabulary.of(["sky", "grass", "boat"])
SIZES = [(64, 64), (64, 96), (80, 64)]
NO_CLUSTER = Session(cpus=1, gpus=0)
"""For what is refused before Ray is asked for anything."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[[str, int], str]) -> str:
    return save_tiny_model(str(tmp_path_factory.mktemp("model")), 64)


@pytest.fixture(scope="module")
def archive(ray_cluster: Session) -> str:
    uri = f"{ROOT}/archive"
    for number in range(12):
        picture = Image.fromarray(scenes.render_scene(5, number, 96).image).resize(SIZES[number % 3][::-1])
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        storage.write_bytes(f"{uri}/{'deep/' if number % 2 else ''}picture {number}.png", buffer.getvalue())
    storage.write_bytes(f"{uri}/broken.jpg", b"\xff\xd8 not a picture")
    return uri


@pytest.fixture(scope="module")
def done(ray_cluster: Session, archive: str, model: str) -> segment_job.Summary:
    return run([archive], model, NAMES, f"{ROOT}/out", ray_cluster)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(scenes.render_scene(5, number, 96).image).save(folder / f"{number}.png")
    return folder


def run(
    inputs: list[str], model: str, classes: Vocabulary, out: str, session: Session, **options: Any
) -> segment_job.Summary:
    return segment_job.main(plan(inputs, model, classes, out, **options), session)


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mask_of(out: str, name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(storage.read_bytes(f"{out}/{name}"))))


def rows_of(out: str) -> list[dict]:
    with storage.open_input(f"{out}/results.parquet") as file:
        return pq.read_table(file).to_pylist()


def test_every_picture_has_one_row_and_the_broken_one_a_reason(done: segment_job.Summary) -> None:
    assert (done.images, done.ok, done.rejected) == (13, 12, 1)
    assert json.loads(storage.read_text(f"{done.uri}/summary.json"))["rejected"] == 1
    rows = rows_of(done.uri)
    paths = [row["path"] for row in rows]
    assert len(set(paths)) == len(paths) == 13
    rejected = [row for row in rows if row["status"] == "rejected"]
    assert [row["path"] for row in rejected] == ["broken.jpg"]
    assert "image" in rejected[0]["error"]


def test_masks_are_what_the_segmenter_says(done: segment_job.Summary, archive: str, model: str) -> None:
    segmenter = Segmenter(ViLSeg.from_pretrained(model), NAMES)
    for row in [row for row in rows_of(done.uri) if row["status"] == "ok"]:
        expected = segmenter(f"{archive}/{row['path']}")
        mask = mask_of(done.uri, f"masks/{row['path']}.png")
        assert mask.shape == (row["height"], row["width"])
        assert np.array_equal(mask, expected.labels)
        for name, area, counts in zip(row["classes"], row["areas"], row["rle"], strict=True):
            decoded = coco_mask.decode({"size": list(mask.shape), "counts": counts})
            assert decoded.sum() == area
            assert np.array_equal(decoded.astype(bool), mask == NAMES.classes.index(name))


def test_annotations_open_in_pycocotools(done: segment_job.Summary, tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(storage.read_text(f"{done.uri}/annotations.json"))
    coco = COCO(str(path))
    assert len(coco.getImgIds()) == 12
    assert {category["name"] for category in coco.loadCats(coco.getCatIds())} == set(NAMES.classes)
    for annotation in coco.loadAnns(coco.getAnnIds()):
        assert coco.annToMask(annotation).sum() == annotation["area"]


def test_panoptic_segments_are_the_pixels_of_the_masks(done: segment_job.Summary) -> None:
    tree = json.loads(storage.read_text(f"{done.uri}/annotations.json"))
    names = {category["id"]: category["name"] for category in tree["categories"]}
    assert len(tree["panoptic"]) == 12
    for picture in tree["panoptic"]:
        assert len(picture["segments_info"]) > 1
        mask = mask_of(done.uri, picture["file_name"])
        assert {part["id"] for part in picture["segments_info"]} == set(np.unique(mask).tolist()) - {255}
        for part in picture["segments_info"]:
            pixels = mask == part["id"]
            rows, columns = np.nonzero(pixels)
            left, top = int(columns.min()), int(rows.min())
            assert part["area"] == pixels.sum()
            assert part["bbox"] == [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1]
            assert names[part["category_id"]] == NAMES.classes[part["id"]]


def test_without_masks_no_mask_is_named(ray_cluster: Session, pictures: Path, model: str, tmp_path: Path) -> None:
    done = run([str(pictures)], model, NAMES, str(tmp_path / "out"), ray_cluster, formats=["coco"])
    tree = json.loads(storage.read_text(f"{done.uri}/annotations.json"))
    assert tree["annotations"]
    assert "panoptic" not in tree
    assert not (tmp_path / "out" / "masks").exists()


def test_resume_does_the_missing_pictures_only(
    ray_cluster: Session, done: segment_job.Summary, archive: str, model: str
) -> None:
    before = rows_of(done.uri)
    name = f"{archive}/late.png"
    storage.write_bytes(name, storage.read_bytes(f"{archive}/picture 0.png"))
    mask = f"{done.uri}/masks/picture 0.png.png"
    storage.write_bytes(mask, b"untouched")
    again = run([archive], model, NAMES, done.uri, ray_cluster, resume=True)
    assert again.images == 14
    assert storage.read_bytes(mask) == b"untouched"
    assert [row for row in rows_of(done.uri) if row["path"] != "late.png"] == before
    storage.delete(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": Vocabulary.of(["cat"])}, "other classes;"),
        ({"classes": replace(NAMES, negatives=("sea",))}, "other prompts, background or negative words;"),
        ({"inputs": [f"{ROOT}/archive/deep"]}, "other inputs;"),
        ({"formats": ["png"]}, "other formats;"),
        ({"settings": SegmentationConfig(input_size=32, region_weight=0)}, "other segmentation settings;"),
        ({"classes": Vocabulary.of(["cat"]), "formats": ["coco"]}, "other classes and other formats;"),
    ],
)
def test_resume_of_another_job_is_refused(
    done: segment_job.Summary, archive: str, model: str, change: dict[str, Any], words: str
) -> None:
    asked: dict[str, Any] = {"inputs": [archive], "model": model, "classes": NAMES, "out": done.uri, **change}
    with pytest.raises(ConfigError, match=f"cannot resume into {done.uri}: it was made with {words}"):
        run(**asked, session=NO_CLUSTER, resume=True)


def test_resume_with_another_model_is_refused(
    done: segment_job.Summary, archive: str, model: str, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "other")
    with pytest.raises(ConfigError, match="another model;"):
        run([archive], str(tmp_path / "other"), NAMES, done.uri, NO_CLUSTER, resume=True)


def test_same_job_in_other_words_is_resumed(
    ray_cluster: Session, pictures: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths from the working directory, which is another one in the actors than here."""
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    first = run(["pictures"], "model", NAMES, "out", ray_cluster, formats=["png"])
    assert (first.ok, first.uri) == (2, str(tmp_path / "out"))
    again = run(
        [str(pictures), "./pictures"], "./model", NAMES, "./out", NO_CLUSTER, formats=["parquet", "png"], resume=True
    )
    assert again.ok == 2


def test_output_that_exists_is_refused(done: segment_job.Summary, archive: str, model: str) -> None:
    with pytest.raises(StorageError, match="--overwrite"):
        run([archive], model, NAMES, done.uri, NO_CLUSTER)


@pytest.mark.parametrize("out", ["pictures", "pictures/out", ".", "model", "model/out"])
def test_output_apart_from_what_is_read(pictures: Path, model: str, tmp_path: Path, out: str) -> None:
    shutil.copytree(model, tmp_path / "model")
    before = tree_of(tmp_path)
    with pytest.raises(StorageError, match="overlap"):
        run([str(pictures)], str(tmp_path / "model"), NAMES, str(tmp_path / out), NO_CLUSTER, overwrite=True)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("marker", [None, "{}", "[]", "not JSON", '{"classes": []}'])
def test_overwriting_what_is_not_ours_is_refused(
    pictures: Path, model: str, tmp_path: Path, marker: str | None
) -> None:
    out = tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    (out / "masks" / "drawn by hand.png").write_bytes(b"of the user's")
    if marker is not None:
        (out / "job.json").write_text(marker)
    before = tree_of(out)
    with pytest.raises(StorageError, match="no output of vilseg segment"):
        run([str(pictures)], model, NAMES, str(out), NO_CLUSTER, overwrite=True)
    assert tree_of(out) == before


def test_output_that_is_a_file_is_refused(pictures: Path, model: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("of the user's")
    with pytest.raises(StorageError, match="it is a file"):
        run([str(pictures)], model, NAMES, str(tmp_path / "out"), NO_CLUSTER, overwrite=True)


def test_overwrite_replaces_our_files_alone(ray_cluster: Session, pictures: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run([str(pictures)], model, NAMES, str(out), ray_cluster)
    (out / "notes.txt").write_text("of the user's")
    run([str(pictures / "0.png")], model, NAMES, str(out), ray_cluster, formats=["parquet"], overwrite=True)
    assert set(tree_of(out)) == {"job.json", "results.parquet", "summary.json", "notes.txt"}
    assert [row["path"] for row in rows_of(str(out))] == ["0.png"]


def test_no_input_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no input"):
        run([], model, NAMES, str(tmp_path / "out"), NO_CLUSTER)


def test_archive_without_pictures_is_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no picture"):
        run([str(tmp_path / "empty")], model, NAMES, str(tmp_path / "out"), NO_CLUSTER)
    assert not (tmp_path / "out").exists()
