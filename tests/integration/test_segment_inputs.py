"""Bulk segmentation of everything at once: shards, tables, lists, films, GeoTIFF, damaged files, all formats."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from PIL import Image
from rasterio.transform import Affine

from cluster.ray_session import Session
from jobs.segment import segment_job
from jobs.segment.plan import estimate, list_inputs, plan
from vilseg import Segmenter, ViLSeg, Vocabulary, storage
from vilseg.bulk.outputs import Rules
from vilseg.data.image_decoding import decode_image
from vilseg.data.shards import write_tar
from vilseg.data.synthetic import scenes
from vilseg.data.synthetic.videos import render_video
from vilseg.errors import ConfigError, DataError, UserError
from vilseg.segmentation.video_io import Frame, write_video

ROOT = "s3://vilseg/test-segment-inputs"
NAMES = Vocabulary.of(["sky", "grass", "boat"])
UTM = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[[str, int], str]) -> str:
    return save_tiny_model(str(tmp_path_factory.mktemp("model")), 64)


def picture(number: int, size: int = 64) -> np.ndarray:
    return scenes.render_scene(5, number, size).image


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, "png")
    return buffer.getvalue()


def rows_of(out: str) -> dict[str, dict[str, Any]]:
    with storage.open_input(f"{out}/results.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    found = {row["path"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def read_mask(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(storage.read_bytes(uri))))


def test_everything_in_one_call(ray_cluster: Session, model: str, tmp_path: Path) -> None:
    write_tar(f"{ROOT}/in/pairs.tar", ((f"k{i}", png(i), "png", {"caption": "x"}) for i in range(3)))
    with storage.open_atomic(f"{ROOT}/in/table.parquet") as file:
        pq.write_table(pa.table({"key": ["a", "b"], "image": [png(3), b"no picture"]}), file)
    whole = storage.read_bytes(f"{ROOT}/in/pairs.tar")
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        end = tar.getmember("k2.png").offset + 1000
    storage.write_bytes(f"{ROOT}/in/cut.tar", whole[:end])
    (tmp_path / "local").mkdir()
    for number in range(4, 6):
        (tmp_path / "local" / f"photo {number}.png").write_bytes(png(number))
    (tmp_path / "list.txt").write_text(f"# two more\n{tmp_path}/local/photo 4.png\n{ROOT}/single.png\n")
    storage.write_bytes(f"{ROOT}/single.png", png(6))
    film = render_video(1, 0, 64, frames=8)
    frames = (Frame(i, Fraction(i, 10), image) for i, image in enumerate(film.images))
    write_video(str(tmp_path / "film.mp4"), frames)
    with rasterio.open(
        tmp_path / "land.tif", "w", driver="GTiff", width=96, height=80, count=3, dtype="uint8", **UTM
    ) as target:
        target.write(picture(7, 96)[:80].transpose(2, 0, 1))
    inputs = [f"{ROOT}/in", f"{tmp_path}/local/*5.png", str(tmp_path / "list.txt")]
    inputs += [str(tmp_path / "film.mp4"), str(tmp_path / "land.tif")]
    out = f"{ROOT}/out"
    formats = ["png", "coco", "overlay", "gallery", "geotiff"]
    done = segment_job.main(plan(inputs, model, NAMES, out, formats=formats, rules=Rules(key_every=3)), ray_cluster)
    rows = rows_of(out)
    listed = [f"{tmp_path}/local/photo 4.png".lstrip("/"), f"{ROOT}/single.png".removeprefix("s3://")]
    assert set(rows) == {
        *(f"pairs.tar/k{i}.png" for i in range(3)),
        *("table.parquet/a", "table.parquet/b", "cut.tar", "cut.tar/k0.png", "cut.tar/k1.png"),
        *("photo 5.png", "film.mp4", "land.tif", *listed),
    }
    rejected = {name for name, row in rows.items() if row["status"] == "rejected"}
    assert rejected == {"table.parquet/b", "cut.tar"}
    assert "damaged" in rows["cut.tar"]["error"]
    assert (done.images, done.rejected) == (len(rows), 2)
    segmenter = Segmenter(ViLSeg.from_pretrained(model), NAMES)
    for name, number in ((listed[0], 4), (listed[1], 6), ("pairs.tar/k2.png", 2), ("table.parquet/a", 3)):
        assert np.array_equal(read_mask(f"{out}/masks/{name}.png"), segmenter(picture(number)).labels)
        assert storage.exists(f"{out}/overlays/{name}.webp")
        assert storage.exists(f"{out}/thumbs/{name}.webp")
    masks = [entry.relative for entry in storage.list_files(f"{out}/masks/film.mp4", {".png"})]
    assert len(masks) == len(film.images)
    assert (rows["film.mp4"]["width"], rows["film.mp4"]["height"]) == (64, 64)
    assert abs(sum(rows["film.mp4"]["areas"]) - 64 * 64) <= len(NAMES.classes)
    assert storage.exists(f"{out}/overlays/film.mp4.mp4")
    with storage.local_copy(f"{out}/masks/land.tif.tif") as path, rasterio.open(path) as mask:
        assert mask.crs.to_string() == UTM["crs"]
        assert mask.transform == UTM["transform"]
        assert mask.shape == (80, 96)
    assert "rows-0000.js" in [entry.relative for entry in storage.list_files(f"{out}/gallery")]
    tree = json.loads(storage.read_text(f"{out}/annotations.json"))
    assert {image["file_name"] for image in tree["images"]} == set(rows) - rejected - {"film.mp4", "land.tif"}


def test_equal_files_are_segmented_once(ray_cluster: Session, model: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(png(number % 3))
    (folder / "bad 0.jpg").write_bytes(b"no picture")
    (folder / "bad 1.jpg").write_bytes(b"no picture")
    out = str(tmp_path / "out")
    done = segment_job.main(plan([str(folder)], model, NAMES, out, deduplicate=True), ray_cluster)
    assert (done.ok, done.rejected) == (40, 2)
    rows = rows_of(out)
    # Three pictures, and the bad ones: what cannot be used is told of every file.
    assert sum(row["duplicate_of"] is None for row in rows.values()) == 5
    by_bytes = {number: [rows[f"{i:02d}.png"] for i in range(number, 40, 3)] for number in range(3)}
    for same in by_bytes.values():
        assert len({(row["sha256"], tuple(row["areas"]), tuple(row["rle"]), row["width"]) for row in same}) == 1
        masks = {(tmp_path / "out" / "masks" / f"{row['path']}.png").read_bytes() for row in same}
        assert len(masks) == 1
    (folder / "late.png").write_bytes(png(1))
    segment_job.main(plan([str(folder)], model, NAMES, out, deduplicate=True, resume=True), ray_cluster)
    assert rows_of(out)["late.png"]["duplicate_of"] is not None
    assert (tmp_path / "out" / "masks" / "late.png.png").read_bytes() in masks | {
        (tmp_path / "out" / "masks" / "01.png.png").read_bytes()
    }


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.png").write_bytes(png(number % 5) if number % 2 else b"no picture")
    return folder


def test_some_inputs_only(ray_cluster: Session, model: str, pictures: Path, tmp_path: Path) -> None:
    first = segment_job.main(plan([str(pictures)], model, NAMES, str(tmp_path / "a"), limit=5), ray_cluster)
    assert sorted(rows_of(first.uri)) == [f"{number:02d}.png" for number in range(5)]
    sampled = plan([str(pictures)], model, NAMES, str(tmp_path / "b"), sample=12, formats=["parquet"])
    picked = [item.name for item in list_inputs(sampled)]
    assert sorted(rows_of(segment_job.main(sampled, ray_cluster).uri)) == picked
    assert len(picked) == 12
    assert picked != [f"{number:02d}.png" for number in range(12)]


@pytest.mark.slow
def test_too_many_rejected_end_the_job_and_the_rest_can_be_done(
    ray_cluster: Session, model: str, pictures: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(DataError, match=r"--max-rejected 0.2 allows; the last is .*: the bytes are not an image"):
        segment_job.main(plan([str(pictures)], model, NAMES, out), ray_cluster, max_rejected=0.2)
    assert not (tmp_path / "out" / "lock.json").exists()
    told: list[str] = []
    done = segment_job.main(
        plan([str(pictures)], model, NAMES, out, resume=True),
        ray_cluster,
        max_rejected=0.6,
        progress=lambda progress: told.extend(name for name, _ in progress.new_rejected),
    )
    assert (done.images, done.rejected) == (60, 30)
    assert len(told) == len(set(told)) <= 30


def test_small_and_large_pictures_are_refused_by_wish(ray_cluster: Session, model: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in (("small", (31, 200)), ("large", (300, 300)), ("good", (64, 64))):
        Image.new("RGB", size, "green").save(folder / f"{name}.png")
    job = plan([str(folder)], model, NAMES, str(tmp_path / "out"), rules=Rules(min_side=32, max_pixels=50_000))
    rows = rows_of(segment_job.main(job, ray_cluster).uri)
    assert {name: row["status"] for name, row in rows.items()} == {
        "small.png": "rejected",
        "large.png": "rejected",
        "good.png": "ok",
    }
    assert "--min-side 32" in rows["small.png"]["error"]
    assert "300 x 300" in rows["large.png"]["error"]


def test_a_dry_run_counts_and_writes_nothing(model: str, pictures: Path, tmp_path: Path) -> None:
    job = plan([str(pictures)], model, NAMES, str(tmp_path / "out"))
    (tmp_path / "scratch").mkdir()
    guess = estimate(job, str(tmp_path / "scratch"))
    assert guess.images == 60
    assert guess.bytes == sum(path.stat().st_size for path in pictures.iterdir())
    assert guess.tried == 16
    assert 0 < guess.rejected_of_tried < 16
    assert guess.seconds(2) == pytest.approx(30 * guess.seconds_per_image)
    assert guess.seconds_per_image > 0
    assert not (tmp_path / "out").exists()


def test_a_dry_run_on_a_cluster_lists_and_times_there(
    ray_cluster: Session, model: str, pictures: Path, tmp_path: Path
) -> None:
    """Measured on the cluster's machines for as many actors as it has room for, not on this machine's CPUs."""
    job = plan([str(pictures)], model, NAMES, str(tmp_path / "out"))
    guess, actors = segment_job.estimate_on_cluster(job, ray_cluster)
    assert (guess.images, guess.tried) == (60, 16)
    assert actors == min(job.parallelism, ray_cluster.cpus)
    four = Session(cpus=8, gpus=4)
    assert segment_job._actors(replace(job, parallelism=100), four) == 4, "an actor a GPU"
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no-such-model"):
        segment_job.estimate_on_cluster(replace(job, model=str(tmp_path / "no-such-model")), ray_cluster)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "--limit is 0"),
        ({"limit": 1, "sample": 1}, "exclude each other"),
        ({"formats": ["jpeg"]}, "--format jpeg is not known"),
        ({"rules": Rules(min_side=0)}, "--min-side is 0"),
    ],
)
def test_wishes_that_cannot_be(model: str, pictures: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan([str(pictures)], model, NAMES, str(tmp_path / "out"), **options)


def test_every_dirty_file_gets_what_is_right(ray_cluster: Session, model: str, tmp_path: Path) -> None:
    data = Path(os.environ.get("VILSEG_SHARED_DATA", "../shared/data")).absolute()
    maker, photos = data / "dirty" / "make_dirty.py", data / "flickr8k_full" / "images"
    if not (maker.exists() and photos.exists()):
        pytest.skip(f"{maker} and {photos} are not there; VILSEG_SHARED_DATA names the folder above them")
    subprocess.run([sys.executable, str(maker), str(photos), str(tmp_path)], check=True, capture_output=True)
    lines = map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines())
    expected = {line["file"].removeprefix("files/"): line for line in lines}
    done = segment_job.main(plan([str(tmp_path / "files")], model, NAMES, f"{ROOT}/dirty"), ray_cluster)
    rows = rows_of(f"{ROOT}/dirty")
    assert done.images == len(rows) == len(expected)
    assert set(rows) == set(expected)
    for name, row in rows.items():
        line = expected[name]
        if line["kind"] != "corrupt_tolerated" and "float32" not in name:
            assert row["status"] == {"ok": "ok", "reject": "rejected"}[line["expect"]], (
                name,
                line["why"],
                row["error"],
            )
        if row["status"] == "ok":
            shape = decode_image((tmp_path / "files" / name).read_bytes()).shape[:2]
            assert (row["height"], row["width"]) == shape
            assert read_mask(storage.join(f"{ROOT}/dirty", "masks", f"{name}.png")).shape == shape
        else:
            assert row["error"]
            assert "\n" not in row["error"]
