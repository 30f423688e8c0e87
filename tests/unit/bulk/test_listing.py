"""Listing of the inputs of bulk segmentation: every image once, under a name of its own, while the listing goes on."""

import errno
import glob
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vilseg.bulk.listing import Container, Input, scan
from vilseg.config.data import ColumnsConfig
from vilseg.data.image_decoding import decode_image
from vilseg.errors import DataError, StorageError, UserError


def put(folder: Path, *relatives: str) -> Path:
    """Files that hold their own path."""
    for relative in relatives:
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(relative.encode())
    return folder


def names(*inputs: object) -> list[str]:
    return [found.name for found in scan([str(one) for one in inputs])]


# -------------------------------------------------------------------------------------------------------- folders


def test_a_folder_gives_all_that_may_be_a_picture(tmp_path: Path) -> None:
    pictures = ["a/x.jpg", "b.JPG", "no_extension", "photo.jpg_size=1024", "x.jfif", "x.ppm", "clip.MP4", ".hidden.jpg"]
    others = ["a/x.txt", "a/x.json", "notes.MD", "index.csv", "x.zip", "half.jpg.partial", "Thumbs.db", ".DS_Store"]
    hidden = ["._x.jpg", ".hidden", ".git/x.jpg", "a/.thumbnails/x.jpg", "_temporary/0/x.jpg"]
    put(tmp_path, *pictures, *others, *hidden)
    found = list(scan([str(tmp_path)]))
    assert sorted(one.name for one in found) == sorted(pictures)
    for one in found:
        assert isinstance(one, Input)
        assert one.read() == one.name.encode()
        assert one.size == len(one.name)
        assert one.uri == str(tmp_path / one.name)
        assert one.kind == ("video" if one.name == "clip.MP4" else "image")


def test_names_come_through_as_they_are(tmp_path: Path) -> None:
    odd = [
        "with space.jpg",
        " lead.jpg",
        "caf\u00e9.jpg",
        "cafe\u0301.jpg",
        "new\nline.jpg",
        "tab\there.jpg",
        "b\\s.jpg",
    ]
    odd += ["bell\x07.jpg", "..dots..jpg", "%2e%2e%2fetc.jpg", "-rf.jpg", "x" * 240 + ".jpg", "Same.jpg", "same.jpg"]
    odd += ["[1].jpg", "star*?.jpg", "#hash.jpg", "~tilde.jpg", "sub/..dots../x.jpg"]
    put(tmp_path, *odd)
    found = list(scan([str(tmp_path)]))
    assert sorted(one.name for one in found) == sorted(one for one in odd if not one.startswith("sub"))
    assert all(isinstance(one, Input) and one.read() == one.name.encode() for one in found)


def test_a_name_that_is_not_utf8_can_be_written_and_the_file_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn%.jpg")).write_bytes(b"latin")
    (found,) = scan([str(tmp_path)])
    assert isinstance(found, Input)
    assert found.name == "gr%FCn%.jpg"
    assert json.loads(json.dumps(found.uri).encode()) == found.uri
    assert found.read() == b"latin"


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "photos", "a/x.jpg")
    put(tmp_path / "elsewhere", "y.jpg")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/a/circle").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "photos/pipe.jpg")  # reading it would wait for ever
    found = {one.name: one for one in scan([str(tmp_path / "photos")])}
    assert sorted(found) == ["a/x.jpg", "gone.jpg", "linked/y.jpg"]
    gone = found["gone.jpg"]
    assert isinstance(gone, Input)
    with pytest.raises(StorageError, match=r"gone\.jpg does not exist"):
        gone.read()


def test_the_first_picture_comes_before_the_rest_is_listed(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg", "b/2.jpg")
    found = scan([str(tmp_path)])
    assert next(found).name == "a/1.jpg"
    put(tmp_path, "b/3.jpg")
    assert [one.name for one in found] == ["b/2.jpg", "b/3.jpg"]


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are listed; those called "locked" are refused, whoever runs the tests."""
    folders: list[str] = []
    scandir = os.scandir

    def spy(folder: str) -> Any:
        folders.append(os.path.basename(folder.rstrip("/")))
        if folders[-1] == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", spy)
    return folders


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, listed: list[str]) -> None:
    put(tmp_path, "a.jpg", "locked/x.jpg")
    with pytest.raises(StorageError, match=f"^cannot list {tmp_path}/locked/?: this user has no permission"):
        names(tmp_path)


# ---------------------------------------------------------------------------------------------- arguments together


def test_several_inputs_and_single_files(tmp_path: Path) -> None:
    put(tmp_path, "one/a/x.jpg", "two/y.jpg", "z.bin")
    assert names(tmp_path / "one", tmp_path / "two", tmp_path / "z.bin") == ["a/x.jpg", "y.jpg", "z.bin"]


def test_what_is_named_twice_comes_once(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    assert names(tmp_path, tmp_path / "a.jpg", f"{tmp_path}/") == ["a.jpg", "b.jpg"]


def test_two_of_one_name_are_refused_by_both_uris(tmp_path: Path) -> None:
    put(tmp_path, "one/sub/a.jpg", "two/sub/a.jpg", "two/b.jpg")
    both = f"^{tmp_path}/one/sub/a.jpg and {tmp_path}/two/sub/a.jpg would both be written as sub/a.jpg; "
    with pytest.raises(DataError, match=both):
        names(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("wrong", ["folder", "notes.json", "folder/*.jpg", "empty.txt"])
def test_an_input_without_pictures_is_named(tmp_path: Path, wrong: str) -> None:
    put(tmp_path, "fine/x.jpg", "folder/x.txt", "notes.json")
    (tmp_path / "empty.txt").write_text("# nothing yet\n\n")
    with pytest.raises(DataError, match=rf"^no picture at {tmp_path}/{wrong.replace('*', '.')}: expected pictures"):
        names(tmp_path / "fine", tmp_path / wrong)


def test_a_missing_input_shows_before_anything_is_worked_on(tmp_path: Path) -> None:
    put(tmp_path, "fine/x.jpg")
    with pytest.raises(StorageError, match=r"none does not exist"):
        next(scan([str(tmp_path / "fine"), str(tmp_path / "none")]))
    with pytest.raises(StorageError, match=r"nothing matches .*/none/\*.jpg: .*/none does not exist"):
        next(scan([str(tmp_path / "none/*.jpg")]))
    with pytest.raises(DataError, match="no input is given"):
        next(scan([]))


# ---------------------------------------------------------------------------------------------------------- globs


@pytest.mark.parametrize(
    "pattern",
    [
        "*.jpg",
        "?.jpg",
        "a*",
        "[ab].jpg",
        "[!ab].jpg",
        "sub/*.jpg",
        "*/*.jpg",
        "**/*.jpg",
        "s*/**/x.jpg",
        "**",
        "sub/**/d*",
    ],
)
def test_globs_match_as_pythons_do(tmp_path: Path, pattern: str) -> None:
    files = [
        "a.jpg",
        "b.jpg",
        "c.jpg",
        "ab.jpg",
        "a.png",
        "sub/a.jpg",
        "sub/deep/x.jpg",
        "sub/deep/er/x.jpg",
        "t/x.jpg",
    ]
    put(tmp_path, *files)
    matched = [Path(one) for one in glob.glob(f"{tmp_path}/{pattern}", recursive=True)]
    # A folder that matches stands for all it holds.
    expected = {one for file in files if (one := tmp_path / file) in matched or set(matched) & set(one.parents)}
    found = list(scan([f"{tmp_path}/{pattern}"]))
    assert {Path(one.uri) for one in found} == expected
    fixed = tmp_path / "sub" if pattern.startswith("sub/") else tmp_path
    assert all(one.name == str(Path(one.uri).relative_to(fixed)) for one in found)


def test_a_path_that_exists_is_no_glob(tmp_path: Path) -> None:
    put(tmp_path, "[1].jpg", "1.jpg", "set[1]/x.jpg", "set1/y.jpg", "star*/z.jpg", "starry/z.jpg")
    assert names(tmp_path / "[1].jpg") == ["[1].jpg"]
    assert names(tmp_path / "[12].jpg") == ["1.jpg"]
    assert names(tmp_path / "set[1]") == names(tmp_path / "set[1]/*.jpg") == ["x.jpg"]
    assert [one.uri for one in scan([str(tmp_path / "star*")])] == [str(tmp_path / "star*/z.jpg")]


def test_a_glob_does_not_look_where_nothing_can_match(tmp_path: Path, listed: list[str]) -> None:
    put(tmp_path, "a/x.jpg", "a/deep/x.jpg", "b/x.jpg", ".git/x.jpg", "locked/x.jpg")
    assert names(f"{tmp_path}/[a]*/*.jpg") == ["a/x.jpg"]
    # What lies in a folder that matches would be taken.
    assert sorted(listed) == ["a", tmp_path.name]


# ---------------------------------------------------------------------------------------------------------- lists


def test_a_list_names_pictures_from_its_folder_on(tmp_path: Path) -> None:
    put(tmp_path, "lists/a/x.jpg", "lists/#odd.jpg", "lists/ lead.jpg", "other/y z.jpg", "lists/shard.tar")
    lines = ["# a comment", "", "a/x.jpg\r", "./#odd.jpg", " lead.jpg", "../other/y z.jpg", f"{tmp_path}/other/y z.jpg"]
    lines += [
        f"file://{tmp_path}/other/y%20z.jpg",
        "s3://bucket/k/e y.jpg",
        "gs://bucket/no.jpg",
        "shard.tar",
        "none.jpg",
    ]
    (tmp_path / "lists/all.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    found = {one.name: one for one in scan([str(tmp_path / "lists/all.txt")])}
    below_root = f"{tmp_path}/other/y z.jpg"[1:]
    assert list(found) == [
        *("a/x.jpg", "#odd.jpg", " lead.jpg", "%2E%2E/other/y z.jpg", below_root),
        *("bucket/k/e y.jpg", "bucket/no.jpg", "shard.tar", "none.jpg"),
    ]
    for name, content in [
        ("a/x.jpg", "lists/a/x.jpg"),
        (" lead.jpg", "lists/ lead.jpg"),
        (below_root, "other/y z.jpg"),
    ]:
        picture = found[name]
        assert isinstance(picture, Input)
        assert picture.read() == content.encode()
    assert found["bucket/k/e y.jpg"].uri == "s3://bucket/k/e y.jpg"
    assert isinstance(found["shard.tar"], Container)
    for name, told in [("bucket/no.jpg", "gs:// is not supported"), ("none.jpg", "does not exist")]:
        unreadable = found[name]
        assert isinstance(unreadable, Input)
        with pytest.raises(UserError, match=told):
            unreadable.read()


def test_a_list_that_is_no_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.lst").write_bytes(b"a.jpg\ngr\xfcn.jpg\n")
    with pytest.raises(DataError, match=r"latin\.lst is not UTF-8 text"):
        names(tmp_path / "latin.lst")
    (tmp_path / "binary.txt").write_bytes(b"x" * 200_000)
    with pytest.raises(DataError, match=r"binary\.txt, line 1 is too long for a path"):
        names(tmp_path / "binary.txt")


# ----------------------------------------------------------------------------------------------------- containers


def test_tars_and_parquet_files_are_containers(tmp_path: Path) -> None:
    put(tmp_path, "deep/x.TAR", "y.parquet", "z.jpg")
    columns = ColumnsConfig(image="pixels")
    x, y, z = scan([str(tmp_path)], columns)
    assert x == Container("deep/x.TAR", str(tmp_path / "deep/x.TAR"), 10, columns)
    assert y == Container("y.parquet", str(tmp_path / "y.parquet"), 9, columns)
    assert isinstance(z, Input)
    assert names(tmp_path / "y.parquet") == ["y.parquet"]


def test_tables_that_describe_a_tar_or_folder_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "0.parquet", "0.tar", "0_stats.json", "1.parquet", "1.tarx", "1.parquet.jpg", "1/x.jpg", "2-0.jpg")
    put(tmp_path, "2.parquet", "20.tar", "3.a.parquet", "3.parquet", "3.tar", "3.a.tar")
    found = names(tmp_path)
    assert sorted(found) == sorted(
        ["0.tar", "1.tarx", "1.parquet.jpg", "1/x.jpg", "2-0.jpg", "2.parquet", "20.tar", "3.tar", "3.a.tar"]
    )


# ---------------------------------------------------------------------------------------------------- dirty files

SHARED = Path(os.environ.get("VILSEG_SHARED_DATA", "../shared/data"))


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    maker, photos = SHARED / "dirty/make_dirty.py", SHARED / "flickr8k_full/images"
    if not maker.exists() or not photos.exists():
        pytest.skip(f"{maker} and {photos} are not there; VILSEG_SHARED_DATA names the folder above them")
    out = tmp_path_factory.mktemp("dirty")
    subprocess.run([sys.executable, str(maker), str(photos), str(out)], check=True, capture_output=True)
    return out


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    rows = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    return {row["file"].removeprefix("files/"): row for row in rows}


def test_every_dirty_file_is_found_once_and_decodes_or_is_refused(dirty: Path) -> None:
    expected = manifest(dirty)
    found = list(scan([str(dirty / "files")]))
    assert len(expected) > 200
    assert sorted(one.name for one in found) == sorted(expected)
    wrong = []
    for one in found:
        assert isinstance(one, Input)
        row = expected[one.name]
        data = one.read()
        assert len(data) == row["bytes"] == one.size
        try:
            outcome = "ok" if decode_image(data).ndim == 3 else "no picture"
        except DataError as error:
            outcome = "reject" if "\n" not in str(error) else "several lines"
        if outcome != row["expect"] and row["kind"] != "corrupt_tolerated" and "float32" not in one.name:
            wrong.append((one.name, row["why"], outcome))
    assert not wrong


def test_bombs_are_refused_in_little_memory(dirty: Path) -> None:
    bombs = [name for name, row in manifest(dirty).items() if row["kind"] == "bomb"]
    assert len(bombs) >= 8
    code = (
        "from pathlib import Path\nfrom vilseg.data.image_decoding import decode_image\n"
        "from vilseg.errors import DataError\n"
        # Not ru_maxrss, which a process takes over from the one that starts it.
        "peak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status') if 'VmHWM' in line)\n"
        "for path in sys.argv[1:]:\n"
        "    data, before = Path(path).read_bytes(), peak()\n"
        "    try:\n        decode_image(data)\n"
        "    except DataError:\n        assert peak() - before < 30_000, path\n"
        "    else:\n        sys.exit(f'{path} was decoded')\n"
    )
    subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *(str(dirty / "files" / bomb) for bomb in bombs)], check=True
    )
