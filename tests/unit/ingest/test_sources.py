import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vilseg.config.data import ColumnsConfig
from vilseg.data.image_decoding import decode_image
from vilseg.data.shards import BadPair, Pair, read_shard, texts_from_metadata, write_tar
from vilseg.data.text_selection import TextSelector
from vilseg.errors import DataError, StorageError
from vilseg.ingest.sources import SourcePair, find_pairs, read_part


def picture(shade: int = 0, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 12, 3), shade, np.uint8)).save(buffer, format=kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_members(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_all(source: Path, columns: ColumnsConfig | None = None, **options: Any) -> list[SourcePair | BadPair]:
    return [pair for part in find_pairs(str(source), columns).parts for pair in read_part(part, **options)]


def captions(pairs: list[SourcePair | BadPair]) -> dict[str, list[str]]:
    """Captions by key, after a check that nothing is bad."""
    assert [pair for pair in pairs if isinstance(pair, BadPair)] == []
    return {
        pair.key: list(TextSelector().probabilities(texts_from_metadata(pair.metadata)))
        for pair in pairs
        if isinstance(pair, SourcePair)
    }


CAPTION_FILES = {
    "csv": ("c.csv", 'file,caption\nimages/a.jpg,A cat.\nimages/b.jpg,"A dog, running."\nimages/a.jpg,One cat.\n'),
    "csv-excel": (
        "c.csv",
        "\ufeffImage;Text\r\nimages/a.jpg;A cat.\r\nimages/a.jpg;One cat.\r\nimages/b.jpg;A dog, running.\r\n",
    ),
    "tsv": ("c.tsv", "filename\tcaption\nimages/a.jpg\t['A cat.', \"One cat.\"]\nimages/b.jpg\tA dog, running.\n"),
    "pipes": (
        "captions.txt",
        "image_name| n| comment\na.jpg| 0| A cat.\na.jpg| 1| One cat.\nb.jpg| 0| A dog, running.\n",
    ),
    "jsonl": (
        "c.jsonl",
        '{"path": "images/a.jpg", "captions": ["A cat.", "One cat."]}\n\n'
        '{"file_name": "images/b.jpg", "text": "A dog, running."}\n',
    ),
    "json-list": (
        "c.json",
        '[{"image": "images\\\\a.jpg", "caption": ["A cat.", "One cat."]},'
        ' {"image": "images/b.jpg", "caption": "A dog, running."}]',
    ),
    "coco": (
        "c.json",
        '{"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}, {"id": 4, "file_name": "c"}],'
        ' "annotations": [{"image_id": 7, "caption": "A cat."}, {"image_id": 3, "caption": "A dog, running.\\n"},'
        ' {"image_id": 7, "caption": "One cat."}]}',
    ),
}


@pytest.mark.parametrize(("name", "text"), CAPTION_FILES.values(), ids=CAPTION_FILES)
@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
def test_caption_files_of_every_kind(tmp_path: Path, name: str, text: str, as_file: bool) -> None:
    for shade, image in enumerate(("a", "b", "unused")):
        put(tmp_path / "images" / f"{image}.jpg", picture(shade))
    file = put(tmp_path / name, text)
    pairs = read_all(file if as_file else tmp_path)
    assert captions(pairs) == {"images/a": ["A cat.", "One cat."], "images/b": ["A dog, running."]}
    assert [p.image for p in pairs if isinstance(p, SourcePair)] == [picture(0), picture(1)]


def test_sidecars_and_images_without(tmp_path: Path) -> None:
    put(tmp_path / "x.y.jpg", picture())
    put(tmp_path / "x.y.txt", "A cat.\n")
    put(tmp_path / "deep" / "b.PNG", picture(kind="PNG"))
    put(tmp_path / "deep" / "b.json", '{"caption": "A dog.", "url": "u"}')
    put(tmp_path / "c.jpg", picture())
    put(tmp_path / "README.txt", "not a caption")
    *good, bad = read_all(tmp_path)
    assert captions(good) == {"deep/b": ["A dog."], "x_y": ["A cat."]}
    assert bad == BadPair("c", "no caption: there is no caption file and no c.txt")


def test_alt_text_and_hashtags_stand_in_for_captions(tmp_path: Path) -> None:
    lines = [
        {"image": "a.jpg", "alt_text": "a cat on a mat", "hashtags": ["#cat", "mat"]},
        {"image": "b.jpg", "caption": "A dog.", "alt": "dog", "tags": "#dog #park", "licence": 4},
        {"image": "c.jpg", "hashtags": "sea, old town"},
    ]
    for name in "abc":
        put(tmp_path / f"{name}.jpg", picture())
    put(tmp_path / "c.jsonl", "\n".join(map(json.dumps, lines)))
    pairs = read_all(tmp_path)
    assert captions(pairs) == {"a": ["a cat on a mat"], "b": ["A dog."], "c": ["sea, old town"]}
    assert [pair.metadata for pair in pairs if isinstance(pair, SourcePair)] == [
        {"alt": "a cat on a mat", "tags": ["cat", "mat"]},
        {"captions": ["A dog."], "alt": "dog", "tags": ["dog", "park"], "licence": 4},
        {"tags": ["sea", "old town"]},
    ]


def test_img2dataset_output_of_every_kind(tmp_path: Path) -> None:
    metadata = {"caption": "A cat.", "url": "u", "key": "000000001", "status": "success", "sha256": "f"}
    members: dict[str, bytes | str] = {
        "000000001.jpg": picture(),
        "000000001.txt": "A cat.",
        "000000001.json": json.dumps(metadata),
    }
    table = pa.table({"key": ["000000001"], "caption": ["A cat."], "url": ["u"]})
    write_members(tmp_path / "tars" / "00000.tar", members)
    for name, content in members.items():
        put(tmp_path / "files" / "00000" / name, content)
    for kind in ("tars", "files"):
        pq.write_table(table, tmp_path / kind / "00000.parquet")
        put(tmp_path / kind / "00000_stats.json", '{"count": 1}')
    rows = [{**metadata, "jpg": picture()}, {**metadata, "key": "2", "status": "failed_to_download", "jpg": None}]
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / "00000.parquet")
    for kind, key in {"tars": "000000001", "files": "00000/000000001", "parquet": "000000001"}.items():
        (pair,) = read_all(tmp_path / kind)
        assert isinstance(pair, SourcePair)
        assert (pair.key, pair.image, pair.suffix) == (key, picture(), "jpg")
        assert pair.metadata == {"captions": ["A cat."], **{k: v for k, v in metadata.items() if k != "caption"}}


def test_parquet_with_bytes_structs_or_paths(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.jpg", picture(1))
    tables = {
        "bytes": {"image": [picture(1)], "caption": ["A cat."]},
        "struct": {"image": [{"bytes": picture(1), "path": "images/a.jpg"}], "text": ["A cat."]},
        "paths": {"file_name": ["images/a.jpg"], "captions": [["A cat."]]},
        "own": {"bild": [picture(1)], "titel": ["A cat."], "id": [7]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    keys = {"bytes": "bytes/00000000", "struct": "images/a", "paths": "images/a", "own": "7"}
    for name, key in keys.items():
        mapped = ColumnsConfig(image="bild", caption="titel", key="id") if name == "own" else None
        pairs = read_all(tmp_path / f"{name}.parquet", mapped)
        assert captions(pairs) == {key: ["A cat."]}
        assert [pair.image for pair in pairs if isinstance(pair, SourcePair)] == [picture(1)]


def test_parquet_without_images_is_refused_by_name_of_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["u"], "caption": ["A cat."]}), tmp_path / "meta.parquet")
    with pytest.raises(DataError, match=r"meta\.parquet has no column of images .* only url, caption"):
        read_all(tmp_path)


def test_pair_shards_come_through_unchanged(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jpg", picture(3))
    put(tmp_path / "in" / "c.csv", "image,caption,alt,n\na.jpg,A cat.,cat,1\n")
    first = read_all(tmp_path / "in")
    shard = str(tmp_path / "out" / "sub" / "x.tar")
    assert write_tar(shard, [(p.key, p.image, p.suffix, p.metadata) for p in first if isinstance(p, SourcePair)]) == 1
    (again,) = read_all(tmp_path / "out")
    assert isinstance(again, SourcePair)
    assert isinstance(first[0], SourcePair)
    assert (again.key, again.image, again.metadata) == ("sub/a", first[0].image, first[0].metadata)
    assert list(read_shard(shard)) == [Pair("a", picture(3), ("A cat.",))]


def test_other_formats_become_png_and_names_that_lie_are_mended(tmp_path: Path) -> None:
    for suffix, kind in {"gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "webp": "WEBP", "jpg": "PNG"}.items():
        put(tmp_path / suffix / f"a.{suffix}", picture(9, kind))
        put(tmp_path / suffix / "a.txt", "A cat.")
    for check in (True, False):
        pairs = {pair.key: pair for pair in read_all(tmp_path, check=check) if isinstance(pair, SourcePair)}
        suffixes = {key: pair.suffix for key, pair in pairs.items()}
        assert suffixes == {"bmp/a": "png", "gif/a": "png", "jpg/a": "png", "tiff/a": "png", "webp/a": "webp"}
        assert pairs["jpg/a"].image == picture(9, "PNG")
        np.testing.assert_array_equal(decode_image(pairs["bmp/a"].image), np.full((8, 12, 3), 9))


def test_bad_pairs_say_why_and_keep_their_place(tmp_path: Path) -> None:
    put(tmp_path / "good.jpg", picture())
    put(tmp_path / "cut.jpg", picture()[:200])
    put(tmp_path / "page.jpg", "<html>404</html>")
    lines = [
        '{"image": "cut.jpg", "caption": "A"}',
        '{"image": "page.jpg", "caption": "B"}',
        '{"image": "gone.jpg", "caption": "C"}',
        '{"image": "good.jpg", "caption": "D"}',
        '{"caption": "E"}',
        "{",
        '{"image": "http://host/x.jpg", "caption": "F"}',
    ]
    put(tmp_path / "c.jsonl", "\n".join(lines))
    pairs = read_all(tmp_path)
    reasons = {pair.key: pair.reason for pair in pairs if isinstance(pair, BadPair)}
    assert [pair.key for pair in pairs] == ["cut", "page", "gone", "good", "c.jsonl:5", "c.jsonl:6", "host/x"]
    assert "damaged" in reasons["cut"]
    assert "not an image" in reasons["page"]
    assert reasons["gone"] == f"{tmp_path}/gone.jpg does not exist"
    assert "names no image" in reasons["c.jsonl:5"]
    assert "not JSON" in reasons["c.jsonl:6"]
    assert "http:// is not supported" in reasons["host/x"]
    unchecked = [pair.key for pair in read_all(tmp_path, check=False) if isinstance(pair, SourcePair)]
    assert unchecked == ["cut", "good"]


def test_text_that_is_not_unicode_is_one_bad_pair(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", picture())
    put(tmp_path / "b.jpg", picture())
    put(tmp_path / "c.jsonl", '{"image": "a.jpg", "caption": "\\ud83d"}\n{"image": "b.jpg", "caption": "ü"}')
    bad, good = read_all(tmp_path)
    assert bad == BadPair("a", "its text is not valid Unicode: surrogates not allowed")
    assert captions([good]) == {"b": ["ü"]}


def test_images_with_too_many_pixels_are_bad(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", picture())
    put(tmp_path / "a.txt", "A cat.")
    (bad,) = read_all(tmp_path, max_pixels=50)
    assert isinstance(bad, BadPair)
    assert "12 x 8 pixels" in bad.reason


def test_a_caption_that_lost_its_quotes_is_not_cut(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", picture())
    put(tmp_path / "c.csv", "image,caption\na.jpg,A cat.\na.jpg,A cat, sleeping\n")
    good, bad = read_all(tmp_path)
    assert captions([good]) == {"a": ["A cat."]}
    assert isinstance(bad, BadPair)
    assert bad.key == "c.csv:3"
    assert "3 fields where the header has 2" in bad.reason


def test_keys_are_unique_stable_and_free_of_dots(tmp_path: Path) -> None:
    images = ["a.jpg", "a.png", "a.b.jpg", "a_b.jpg", "v1.0/a.jpg"]
    for name in images:
        put(tmp_path / name, picture(kind="PNG" if name.endswith("png") else "JPEG"))
        put((tmp_path / name).with_suffix(".txt"), name)
    keys = [pair.key for pair in read_all(tmp_path)]
    assert keys == ["a_b", "a", "a-2", "a_b-2", "v1.0/a"]
    assert [pair.key for pair in read_all(tmp_path)] == keys


@pytest.mark.parametrize("name", ["../../etc/x", "/root/x", "./x", "a\nb/x"])
def test_keys_of_foreign_tars_stay_inside(tmp_path: Path, name: str) -> None:
    write_members(tmp_path / "x.tar", {f"{name}.jpg": picture(), f"{name}.txt": "A cat."})
    ((key, texts),) = captions(read_all(tmp_path)).items()
    assert key in ("etc/x", "root/x", "x", "a_b/x")
    assert texts == ["A cat."]


def test_images_outside_the_source_and_ambiguous_names(tmp_path: Path) -> None:
    outside = put(tmp_path / "elsewhere" / "o.jpg", picture())
    for folder in ("train", "val"):
        put(tmp_path / "in" / folder / "same.jpg", picture())
    put(tmp_path / "in" / "c.csv", f"image,caption\n{outside},A\n../elsewhere/o.jpg,B\nsame.jpg,C\nval/same.jpg,D\n")
    pairs = read_all(tmp_path / "in")
    assert [pair.key for pair in pairs] == [f"{tmp_path}/elsewhere/o"[1:], "c.csv:4", "val/same"]
    assert captions([pairs[0]]) == {pairs[0].key: ["A", "B"]}
    assert isinstance(pairs[1], BadPair)
    assert "same.jpg may mean" in pairs[1].reason


def test_parts_hold_so_many_records_and_a_shard_each(tmp_path: Path) -> None:
    for index in range(5):
        put(tmp_path / f"{index}.jpg", picture())
        put(tmp_path / f"{index}.txt", "A cat.")
    write_members(tmp_path / "y.tar", {"1.jpg": picture(), "1.txt": "A dog."})
    parts = find_pairs(str(tmp_path), part_pairs=2, prefix="mine").parts
    assert [len(part.records) for part in parts] == [2, 2, 1, 0]
    assert [pair.key for part in parts for pair in read_part(part)] == [f"mine/{i}" for i in (0, 1, 2, 3, 4, 1)]


def test_a_tar_that_breaks_off_loses_one_pair(tmp_path: Path) -> None:
    names = [f"{index}.{suffix}" for index in range(3) for suffix in ("jpg", "txt")]
    tar = write_members(tmp_path / "x.tar", {n: picture() if n.endswith("jpg") else "A cat." for n in names})
    tar.write_bytes(tar.read_bytes()[:6000])  # each pair takes 2,560 bytes
    *good, bad = read_all(tmp_path)
    assert list(captions(good)) == ["0", "1"]
    assert isinstance(bad, BadPair)
    assert "breaks off" in bad.reason


def test_tables_of_other_things_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", picture())
    put(tmp_path / "a.txt", "A cat.")
    put(tmp_path / "labels.csv", "image,label\na.jpg,3\n")
    put(tmp_path / "instances.json", '{"images": [], "annotations": []}')
    listing = find_pairs(str(tmp_path))
    assert captions([pair for part in listing.parts for pair in read_part(part)]) == {"a": ["A cat."]}
    assert len(listing.passed_over) == 2
    assert "labels.csv has no captions" in listing.passed_over[1]


@pytest.mark.parametrize(
    ("files", "source", "error", "message"),
    [
        ({}, "none", StorageError, "none does not exist"),
        ({"a.jpg": "x"}, "", DataError, "no pairs at .*: expected images with captions"),
        ({"a.jpg": "x"}, "a.jpg", DataError, "no pairs at .*a.jpg"),
        ({"c.csv": "a,b\n1,2\n"}, "c.csv", DataError, "no column of its first line, 'a,b', names the image"),
        ({"c.csv": "a,b\n1,2\n"}, "", DataError, "no pairs at .*; .*c.csv: no column of its first line"),
        ({"c.csv": "image,n\na.jpg,2\n"}, "c.csv", DataError, "has no captions; name the column"),
        ({"c.csv": ""}, "c.csv", DataError, "first line, '', names the image"),
        ({"c.jsonl": "[1]\n"}, "c.jsonl", DataError, "line 1: it is not a JSON object"),
        ({"c.json": "{"}, "c.json", DataError, "is not JSON"),
        ({"c.json": '{"x": 1}'}, "c.json", DataError, "neither COCO captions"),
        ({"c.csv": b"image,caption\na.jpg,\xff\n"}, "c.csv", StorageError, "not UTF-8"),
    ],
)
def test_sources_that_make_no_pairs(
    tmp_path: Path, files: dict[str, bytes | str], source: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        put(tmp_path / "in" / name, content)
    with pytest.raises(error, match=message):
        read_all(tmp_path / "in" / source)


def test_a_backslash_may_be_part_of_a_name(tmp_path: Path) -> None:
    put(tmp_path / "back\\slash.jpg", picture())
    put(tmp_path / "c.csv", "image,caption\nback\\slash.jpg,A cat.\n")
    assert captions(read_all(tmp_path)) == {"back\\slash": ["A cat."]}
