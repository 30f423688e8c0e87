"""Pair shards: both layouts as users have them, damaged files, and a store that is away."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.flaky_store import FlakyStore
from vilseg import storage
from vilseg.config.data import ColumnsConfig
from vilseg.data.batch_reader import index_shards
from vilseg.data.shards import BadPair, Pair, count_pairs, list_shards, read_index, read_shard, write_index, write_tar
from vilseg.errors import DataError, StorageError, StoreUnavailable


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def parquet_of(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def bad(uri: str, columns: ColumnsConfig | None = None) -> BadPair:
    """Return the only pair of a shard, which cannot be read."""
    (found,) = read_shard(uri, columns)
    assert isinstance(found, BadPair)
    assert count_pairs(uri) == 1, "a position that cannot be read is a position all the same"
    return found


# ------------------------------------------------------------------------------------------------------------- tars


def test_text_beside_the_image(tmp_path: Path) -> None:
    uri = tar_of(
        tmp_path / "a.tar",
        [("0.jpg", b"one"), ("0.txt", b" a dog \n"), ("sub/1.PNG", b"two"), ("sub/1.txt", "zwei Käfer".encode())],
    )
    assert list(read_shard(uri)) == [Pair("0", b"one", ("a dog",)), Pair("sub/1", b"two", ("zwei Käfer",))]
    assert count_pairs(uri) == 2


def test_img2dataset_writes_text_and_json(tmp_path: Path) -> None:
    metadata = {
        "caption": "a cat",
        "url": "http://x",
        "key": "000000001",
        "status": "success",
        "width": 64,
        "exif": "{}",
    }
    members = [
        ("000000001.jpg", b"i"),
        ("000000001.json", json.dumps(metadata).encode()),
        ("000000001.txt", b"a cat"),
    ]
    assert list(read_shard(tar_of(tmp_path / "00000.tar", members))) == [Pair("000000001", b"i", ("a cat",))]


@pytest.mark.parametrize(
    ("metadata", "captions"),
    [
        ({"caption": "a", "captions": ["b", "a", " "]}, ("b", "a")),
        ({"alt": "an alt text", "tags": ["sea", "sun"]}, ("an alt text",)),
        ({"caption": None, "tags": ["sea", "sun"]}, ("sea, sun",)),
        ({"caption": "a", "alt": "not used"}, ("a",)),
    ],
)
def test_captions_of_the_json(tmp_path: Path, metadata: dict[str, Any], captions: tuple[str, ...]) -> None:
    uri = tar_of(tmp_path / "a.tar", [("0.webp", b"i"), ("0.json", json.dumps(metadata).encode())])
    assert list(read_shard(uri)) == [Pair("0", b"i", captions)]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("7.jpg", b"i")], "no caption"),
        ([("7.jpg", b"i"), ("7.txt", b"  ")], "no caption"),
        ([("7.txt", b"a dog")], "no image"),
        ([("7.jpg", b"i"), ("7.json", b"{broken")], "its text cannot be read"),
        ([("7.jpg", b"i"), ("7.json", b"[1]")], "not an object"),
        ([("7.jpg", b"i"), ("7.txt", b"\xff\xfe\xff")], "its text cannot be read"),
    ],
)
def test_pairs_that_are_none_come_out_as_bad_ones(tmp_path: Path, members: list[tuple[str, bytes]], words: str) -> None:
    found = bad(tar_of(tmp_path / "a.tar", members))
    assert found.key == "7"
    assert words in found.reason


def test_bad_pairs_keep_their_place(tmp_path: Path) -> None:
    members = [("0.jpg", b"i"), ("0.txt", b"a"), ("1.jpg", b"i"), ("2.jpg", b"i"), ("2.txt", b"c")]
    kinds = [(type(pair), pair.key) for pair in read_shard(tar_of(tmp_path / "a.tar", members))]
    assert kinds == [(Pair, "0"), (BadPair, "1"), (Pair, "2")]


def test_a_tar_that_breaks_off_gives_what_came_before(tmp_path: Path) -> None:
    members = [(f"{i}.{suffix}", data) for i in range(5) for suffix, data in (("jpg", b"x" * 3000), ("txt", b"text"))]
    path = Path(tar_of(tmp_path / "a.tar", members))
    path.write_bytes(path.read_bytes()[: 3 * (512 + 3072 + 512 + 512) + 1200])  # within the image of pair 3
    found = list(read_shard(str(path)))
    assert [pair.key for pair in found] == ["0", "1", "2", "a.tar:3"]
    assert all(isinstance(pair, Pair) for pair in found[:3])
    assert isinstance(found[3], BadPair)
    assert "breaks off" in found[3].reason
    assert count_pairs(str(path)) == 4


@pytest.mark.parametrize("content", [b"", b"this is not a tar file" * 100], ids=["zero bytes", "text"])
def test_what_is_no_tar_is_one_bad_pair(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    found = bad(str(path))
    assert found.key == "a.tar"
    assert "breaks off" in found.reason


def test_what_was_written_is_read_and_equal_pairs_give_equal_bytes(tmp_path: Path) -> None:
    pairs = [(f"{i:04}", bytes([i]) * 100, "jpg", {"caption": f"größe {i}", "id": i}) for i in range(3)]
    assert write_tar(f"{tmp_path}/a.tar", pairs) == 3
    assert list(read_shard(f"{tmp_path}/a.tar")) == [Pair(key, data, (m["caption"],)) for key, data, _, m in pairs]
    write_tar(f"{tmp_path}/b.tar", iter(pairs))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames()[:2] == ["0000.jpg", "0000.json"]


# ---------------------------------------------------------------------------------------------------------- Parquet


def test_image_bytes_and_one_caption(tmp_path: Path) -> None:
    uri = parquet_of(
        tmp_path / "a.parquet", [{"key": "k", "image": b"i", "caption": "a"}, {"image": b"j", "caption": "b"}]
    )
    assert list(read_shard(uri)) == [Pair("k", b"i", ("a",)), Pair("a.parquet:1", b"j", ("b",))]
    assert count_pairs(uri) == 2


def test_several_captions_and_the_struct_of_hugging_face_datasets(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": b"i", "path": "x.jpg"}, "captions": ["a", "b"]}]
    assert list(read_shard(parquet_of(tmp_path / "a.parquet", rows))) == [Pair("a.parquet:0", b"i", ("a", "b"))]


def test_paths_beside_the_shard_and_absolute_ones(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.jpg").write_bytes(b"i")
    rows = [
        {"path": "images/x.jpg", "caption": "a"},
        {"path": f"{tmp_path}/images/x.jpg", "caption": "b"},
        {"path": "images/none.jpg", "caption": "c"},
    ]
    beside, absolute, missing = read_shard(parquet_of(tmp_path / "a.parquet", rows))
    assert isinstance(beside, Pair)
    assert isinstance(absolute, Pair)
    assert beside.image == absolute.image == b"i"
    assert isinstance(missing, BadPair)
    assert "none.jpg does not exist" in missing.reason


def test_columns_by_other_names(tmp_path: Path) -> None:
    uri = parquet_of(tmp_path / "a.parquet", [{"id": "k", "jpg": b"i", "TEXT": "a"}])
    assert list(read_shard(uri, ColumnsConfig(key="id", image="jpg", caption="TEXT"))) == [Pair("k", b"i", ("a",))]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": b"i", "caption": None}, "no caption"),
        ({"image": None, "caption": "a"}, "no image"),
        ({"image": b"", "caption": "a"}, "no image"),
        ({"image": {"bytes": None, "path": "x"}, "caption": "a"}, "no image"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    assert words in bad(parquet_of(tmp_path / "a.parquet", [row])).reason


def test_a_table_without_images_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    uri = parquet_of(tmp_path / "a.parquet", [{"picture": b"i", "caption": "a"}])
    with pytest.raises(DataError, match=r"neither a column 'image' nor 'path'.*data\.columns\.image"):
        list(read_shard(uri))


@pytest.mark.parametrize("content", [b"", b"PAR1 no more than this"], ids=["zero bytes", "cut"])
def test_what_is_no_parquet_is_one_bad_pair(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    assert "Parquet file cannot be read" in bad(str(path)).reason


def test_a_store_that_is_away_is_no_damaged_shard(flaky_store: FlakyStore) -> None:
    with storage.open_atomic("s3://bucket/a.parquet") as file:
        pq.write_table(pa.table({"image": [b"i"] * 50, "caption": ["a"] * 50}), file)
    storage.write_bytes("s3://bucket/broken.parquet", b"PAR1 no more than this")
    write_tar("s3://bucket/a.tar", [(str(i), b"i", "jpg", {"caption": "a"}) for i in range(50)])
    opening = iter([0, 1])
    connect = flaky_store.open_input_file

    def break_after_opening(path: str) -> Any:
        file = connect(path)
        flaky_store.away(next(opening, 0))
        return file

    flaky_store.open_input_file = break_after_opening  # type: ignore[method-assign]
    assert count_pairs("s3://bucket/a.parquet") == 50
    with pytest.raises(StoreUnavailable, match="does not answer"):
        count_pairs("s3://bucket/a.parquet")
    for uri in ("s3://bucket/a.parquet", "s3://bucket/a.tar"):
        for read in (count_pairs, lambda uri: list(read_shard(uri))):
            opening = iter([1])
            with pytest.raises(StoreUnavailable):
                read(uri)
            opening = iter([1])
            with storage.retrying():
                read(uri)
    assert count_pairs("s3://bucket/broken.parquet") == 1
    flaky_store.away(1)
    with pytest.raises(StoreUnavailable):
        count_pairs("s3://bucket/broken.parquet")
    with pytest.raises(StorageError, match="does not exist"):
        count_pairs("s3://bucket/none.parquet")


# ----------------------------------------------------------------------------------------------------------- shards


def test_shards_are_found_in_order_and_alone(tmp_path: Path) -> None:
    for name in ("b.tar", "a.parquet", "notes.txt", ".hidden.tar", "sub/c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [entry.relative for entry in list_shards(str(tmp_path))] == ["a.parquet", "b.tar", "sub/c.tar"]
    assert [entry.uri for entry in list_shards(f"{tmp_path}/b.tar")] == [f"{tmp_path}/b.tar"]


def test_the_table_that_img2dataset_leaves_beside_a_tar_is_no_shard(tmp_path: Path) -> None:
    for name in ("00000.tar", "00000.parquet", "sub/00000.parquet", "00001.PARQUET", "00001.TAR"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [entry.relative for entry in list_shards(str(tmp_path))] == ["00000.tar", "00001.TAR", "sub/00000.parquet"]


def test_no_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no pair shards at {tmp_path}"):
        list_shards(str(tmp_path))
    with pytest.raises(StorageError, match="does not exist"):
        list_shards(f"{tmp_path}/none")


def test_the_index_saves_counting(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(f"{tmp_path}/{name}", [("0", b"i", "jpg", {"caption": "a"})])
    counted: list[str] = []

    def count(uris: list[str]) -> list[int]:
        counted.extend(uris)
        return [count_pairs(uri) for uri in uris]

    assert read_index(str(tmp_path)) == {}
    assert [shard.pairs for shard in index_shards(str(tmp_path), count)] == [1, 1]
    assert len(counted) == 2
    counted.clear()
    write_index(str(tmp_path), [("a.tar", 7)])
    assert read_index(str(tmp_path)) == {"a.tar": 7}
    assert [shard.pairs for shard in index_shards(str(tmp_path), count)] == [7, 1], "a.tar is believed, b.tar is new"
    assert counted == [f"{tmp_path}/b.tar"]
    assert [shard.pairs for shard in index_shards(f"{tmp_path}/b.tar")] == [1]


@pytest.mark.parametrize("content", ["{broken", "[1]", '{"shards": {"a.tar": "many"}}'])
def test_a_damaged_index_is_told(tmp_path: Path, content: str) -> None:
    write_tar(f"{tmp_path}/a.tar", [("0", b"i", "jpg", {"caption": "a"})])
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=r"index\.json.*delete it"):
        index_shards(str(tmp_path))


def test_held_out_shards_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.tar", "b.tar", "late/c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(f"{tmp_path}/{name}", [("0", b"i", "jpg", {"caption": "a"})])
    left = [entry.relative for entry in list_shards(str(tmp_path), without=f"{tmp_path}/late")]
    assert left == ["a.tar", "b.tar"]
    monkeypatch.chdir(tmp_path)
    assert [storage.name(shard.uri) for shard in index_shards(str(tmp_path), without="b.tar")] == ["a.tar", "c.tar"]
    with pytest.raises(DataError, match="holds out every pair shard"):
        list_shards(f"{tmp_path}/late", without=str(tmp_path))
    with pytest.raises(StorageError, match="does not exist"):
        list_shards(str(tmp_path), without=f"{tmp_path}/none")
