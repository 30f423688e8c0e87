import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.ray_session import Session
from jobs.ingest import ingest_job
from vilseg import storage
from vilseg.data.batch_reader import index_shards
from vilseg.data.shards import BadPair, Pair, read_index, read_shard
from vilseg.errors import ConfigError, DataError, StorageError


def jpeg(index: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(index).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


def write_folder(folder: Path, pairs: int, bad: int = 0) -> Path:
    """Pictures with a CSV, two captions each; the first ``bad`` pictures are cut short."""
    (folder / "images").mkdir(parents=True)
    rows = ["image,caption"]
    for index in range(pairs):
        data = jpeg(index)
        (folder / "images" / f"{index:03d}.jpg").write_bytes(data[:100] if index < bad else data)
        rows += [f"images/{index:03d}.jpg,Picture {index}.", f'images/{index:03d}.jpg,"Number {index}, again."']
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


def expected(index: int, prefix: str = "") -> Pair:
    return Pair(f"{prefix}images/{index:03d}", jpeg(index), (f"Picture {index}.", f"Number {index}, again."))


def read_back(uri: str) -> list[Pair | BadPair]:
    return [pair for shard in index_shards(uri) for pair in read_shard(shard.uri)]


@pytest.fixture
def dest(request: pytest.FixtureRequest) -> str:
    return f"s3://vilseg/ingest/{request.node.name}"


def test_a_folder_with_a_csv_becomes_shards_on_s3(tmp_path: Path, dest: str, ray_cluster: Session) -> None:
    source = write_folder(tmp_path / "in", 50)
    told: list[tuple[int, int, int]] = []
    result = ingest_job.main(
        [str(source)],
        dest,
        ray_cluster,
        shard_pairs=8,
        progress=lambda done, total, bad: told.append((done, total, bad)),
    )
    assert result == ingest_job.IngestResult(uri=dest, pairs=50, bad=0, shards=7)
    assert read_index(dest) == {f"pairs-{part:06d}-000.tar": 8 if part < 6 else 2 for part in range(7)}
    assert read_back(dest) == [expected(index) for index in range(50)]
    assert told == [(done, 7, 0) for done in range(1, 8)]
    assert {file.relative for file in storage.list_files(dest)} == {*read_index(dest), "index.json"}


def test_what_is_there_is_replaced_only_when_told_to(tmp_path: Path, dest: str, ray_cluster: Session) -> None:
    first, second = write_folder(tmp_path / "first", 6), write_folder(tmp_path / "second", 3)
    ingest_job.main([str(first)], dest, ray_cluster, shard_pairs=2)
    with pytest.raises(StorageError, match=r"it holds pair shards; give --overwrite or another folder"):
        ingest_job.main([str(second)], dest, ray_cluster)
    assert len(read_back(dest)) == 6
    ingest_job.main([str(second)], dest, ray_cluster, overwrite=True, shard_pairs=2)
    assert read_back(dest) == [expected(index) for index in range(3)]
    storage.delete(storage.join(dest, "index.json"))
    with pytest.raises(StorageError, match=r"an earlier ingest there did not end"):
        ingest_job.main([str(second)], dest, ray_cluster)


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_touched(tmp_path: Path, ray_cluster: Session, overwrite: bool) -> None:
    source = write_folder(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("x")
    for dest, message in (("out", "it holds other files"), ("in/out", "overlap"), (".", "overlap")):
        with pytest.raises(StorageError, match=message):
            ingest_job.main([str(source)], str(tmp_path / dest), ray_cluster, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.doc").read_text() == "x"


def test_equal_sources_give_equal_bytes(tmp_path: Path, ray_cluster: Session) -> None:
    source = write_folder(tmp_path / "in", 10)
    for name in ("one", "two"):
        ingest_job.main([str(source)], str(tmp_path / name), ray_cluster, shard_pairs=4)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 4
    assert [(tmp_path / "one" / n).read_bytes() for n in names] == [(tmp_path / "two" / n).read_bytes() for n in names]


def test_bad_pictures_are_left_out_and_listed(tmp_path: Path, dest: str, ray_cluster: Session) -> None:
    source = write_folder(tmp_path / "in", 30, bad=2)
    result = ingest_job.main([str(source)], dest, ray_cluster, shard_pairs=10, max_bad_share=0.1)
    assert (result.pairs, result.bad) == (28, 2)
    assert read_back(dest) == [expected(index) for index in range(2, 30)]
    listed = [json.loads(line) for line in storage.read_text(f"{dest}/bad.jsonl").splitlines()]
    assert [bad["key"] for bad in listed] == ["images/000", "images/001"]
    assert all("damaged" in bad["reason"] for bad in listed)


def test_too_many_bad_pictures_leave_only_their_list(tmp_path: Path, dest: str, ray_cluster: Session) -> None:
    source = write_folder(tmp_path / "in", 30, bad=2)
    with pytest.raises(
        DataError, match=r"^2 of 30 pairs cannot be used, more than .* 0\.05 allows.*images/000.*bad\.jsonl"
    ):
        ingest_job.main([str(source)], dest, ray_cluster)
    assert [file.relative for file in storage.list_files(dest)] == ["bad.jsonl"]
    # The list alone does not bar the way, and it goes with the next attempt.
    assert ingest_job.main([str(source)], dest, ray_cluster, check=False).pairs == 30
    assert not storage.exists(f"{dest}/bad.jsonl")


def test_no_readable_pair_at_all(tmp_path: Path, ray_cluster: Session) -> None:
    source = write_folder(tmp_path / "in", 3, bad=3)
    with pytest.raises(DataError, match=r"no readable pair in .*; the first is images/000: the image is damaged"):
        ingest_job.main([str(source)], str(tmp_path / "out"), ray_cluster)


def test_shards_from_s3_are_cut_anew_beside_another_source(tmp_path: Path, dest: str, ray_cluster: Session) -> None:
    folder = write_folder(tmp_path / "photos", 5)
    ingest_job.main([str(folder)], f"{dest}/raw", ray_cluster, shard_pairs=5)
    result = ingest_job.main([f"{dest}/raw", str(folder)], f"{dest}/out", ray_cluster, shard_pairs=2)
    assert result.shards == 6
    assert read_back(f"{dest}/out") == [expected(i, p) for p, i in itertools.product(("raw/", "photos/"), range(5))]


def test_limit_is_exact(tmp_path: Path, ray_cluster: Session) -> None:
    source = write_folder(tmp_path / "in", 9, bad=1)
    result = ingest_job.main([str(source)], str(tmp_path / "out"), ray_cluster, shard_pairs=3, limit=4)
    assert (result.pairs, result.bad, result.shards) == (4, 1, 2)
    assert read_back(str(tmp_path / "out")) == [expected(index) for index in range(1, 5)]


def test_mistakes_inside_tasks_are_told_in_one_sentence(tmp_path: Path, ray_cluster: Session) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"url": ["u"], "caption": ["A cat."]}), tmp_path / "in" / "meta.parquet")
    with pytest.raises(DataError, match=r"^\S+meta\.parquet has no column of images[^\n]*$"):
        ingest_job.main([str(tmp_path / "in")], str(tmp_path / "out"), ray_cluster)
    with pytest.raises(ConfigError, match="shard_pairs is 0"):
        ingest_job.main([str(tmp_path / "in")], str(tmp_path / "out"), ray_cluster, shard_pairs=0)
    with pytest.raises(StorageError, match="no-such-bucket"):
        ingest_job.main([str(write_folder(tmp_path / "ok", 1))], "s3://no-such-bucket/pairs", ray_cluster)
