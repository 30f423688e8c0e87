"""Bulk segmentation for real: pictures on an S3 server, a pool of Ray actors, the output contract."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from jobs import segment
from jobs.session import Session
from vilseg import Segmenter, ViLSeg, Vocabulary, storage
from vilseg.config import ModelConfig, SegmentationConfig
from vilseg.data import scenes
from vilseg.errors import ConfigError, DataError, StorageError

ROOT = "s3://vilseg/test-segment"
NAMES = Vocabulary.of(["sky", "grass", "boat"])
SIZES = [(64, 64), (64, 96), (80, 64)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig.model_validate(
        {
            "embedding_dim": 16,
            "clusters": 4,
            "image_encoder": {"sizes": {"width": 16, "depth": 1}},
            "text_encoder": {"sizes": {"hidden_size": 16, "num_hidden_layers": 0, "num_attention_heads": 1}},
        }
    )
    made = ViLSeg.from_config(
        config, ["the sky over the grass", "a boat"], segmentation=SegmentationConfig(input_size=64)
    )
    made.save_pretrained(str(folder))
    return str(folder)


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
def done(ray_cluster: Session, archive: str, model: str) -> segment.Summary:
    return segment.main([archive], model, NAMES, f"{ROOT}/out", ray_cluster)


def rows_of(out: str) -> list[dict]:
    with storage.open_input(f"{out}/results.parquet") as file:
        return pq.read_table(file).to_pylist()


def test_every_picture_has_one_row_and_the_broken_one_a_reason(done: segment.Summary) -> None:
    assert (done.images, done.ok, done.rejected) == (13, 12, 1)
    assert json.loads(storage.read_text(f"{done.uri}/summary.json"))["rejected"] == 1
    rows = rows_of(done.uri)
    paths = [row["path"] for row in rows]
    assert len(set(paths)) == len(paths) == 13
    rejected = [row for row in rows if row["status"] == "rejected"]
    assert [row["path"] for row in rejected] == ["broken.jpg"]
    assert "image" in rejected[0]["error"]


def test_masks_are_what_the_segmenter_says(done: segment.Summary, archive: str, model: str) -> None:
    segmenter = Segmenter(ViLSeg.from_pretrained(model), NAMES)
    for row in [row for row in rows_of(done.uri) if row["status"] == "ok"]:
        expected = segmenter(f"{archive}/{row['path']}")
        mask = np.asarray(Image.open(io.BytesIO(storage.read_bytes(f"{done.uri}/masks/{row['path']}.png"))))
        assert mask.shape == (row["height"], row["width"])
        assert np.array_equal(mask, expected.labels)
        for name, area, counts in zip(row["classes"], row["areas"], row["rle"], strict=True):
            decoded = coco_mask.decode({"size": list(mask.shape), "counts": counts})
            assert decoded.sum() == area
            assert np.array_equal(decoded.astype(bool), mask == NAMES.classes.index(name))


def test_annotations_open_in_pycocotools(done: segment.Summary, tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(storage.read_text(f"{done.uri}/annotations.json"))
    coco = COCO(str(path))
    assert len(coco.getImgIds()) == 12
    assert {category["name"] for category in coco.loadCats(coco.getCatIds())} == set(NAMES.classes)
    for annotation in coco.loadAnns(coco.getAnnIds()):
        assert coco.annToMask(annotation).sum() == annotation["area"]


def test_resume_does_the_missing_pictures_only(
    ray_cluster: Session, done: segment.Summary, archive: str, model: str
) -> None:
    before = rows_of(done.uri)
    name = f"{archive}/late.png"
    storage.write_bytes(name, storage.read_bytes(f"{archive}/picture 0.png"))
    mask = f"{done.uri}/masks/picture 0.png.png"
    storage.write_bytes(mask, b"untouched")
    again = segment.main([archive], model, NAMES, done.uri, ray_cluster, resume=True)
    assert again.images == 14
    assert storage.read_bytes(mask) == b"untouched"
    assert [row for row in rows_of(done.uri) if row["path"] != "late.png"] == before
    storage.delete(name)


def test_resume_with_other_classes_is_refused(
    ray_cluster: Session, done: segment.Summary, archive: str, model: str
) -> None:
    with pytest.raises(ConfigError, match="other classes"):
        segment.main([archive], model, Vocabulary.of(["cat"]), done.uri, ray_cluster, resume=True)


def test_output_that_exists_is_refused(ray_cluster: Session, done: segment.Summary, archive: str, model: str) -> None:
    with pytest.raises(StorageError, match="--overwrite"):
        segment.main([archive], model, NAMES, done.uri, ray_cluster)


def test_archive_without_pictures_is_refused(ray_cluster: Session, model: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no picture"):
        segment.main([str(tmp_path)], model, NAMES, str(tmp_path / "out"), ray_cluster)
