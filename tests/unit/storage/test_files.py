import errno
import os
from pathlib import Path

import pyarrow.fs
import pytest

from vilseg import storage
from vilseg.errors import StorageError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for relative in (
        "b.JPG",
        "a/two.png",
        "a/one.jpg",
        ".hidden/x.jpg",
        "a/.y.jpg",
        "_temporary/0/z.jpg",
        "a b/ü%.jpg",
    ):
        path = tmp_path / "tree" / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(relative.encode())
    return tmp_path / "tree"


def test_the_parts_of_a_uri() -> None:
    assert storage.join("s3://b/k/", "x", "", "/y/z.png") == "s3://b/k/x/y/z.png"
    assert storage.join("runs", "demo", "/model") == "runs/demo/model"
    assert storage.join("file:///data/a%20b", "c%20d") == "/data/a b/c%20d"
    assert storage.name("s3://b/k/model/") == "model"
    assert storage.name("runs/demo/") == "demo"
    assert storage.parent("s3://b/k/model") == "s3://b/k"
    assert storage.parent("s3://b/k") == storage.parent("s3://b") == "s3://b"
    assert storage.parent("/data/pairs") == "/data"
    assert [storage.is_local(uri) for uri in ("x", "file:///x", "S3://b/x")] == [True, True, False]


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("s3://b/k", "s3://b/k/", True),
        ("s3://b/k/x", "s3://b/k", True),
        ("s3://b", "s3://b/k", True),
        ("s3://b/k", "s3://b/kk", False),
        ("s3://b/k", "b/k", False),
        ("/data", "file:///data/x", True),
    ],
)
def test_overlapping_places(one: str, other: str, overlap: bool) -> None:
    assert storage.overlap(one, other) == storage.overlap(other, one) == overlap


def test_an_absolute_uri_means_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("runs/../x") == str(tmp_path / "x")
    assert storage.absolute("~/x") == "/home/someone/x"
    assert storage.absolute("s3://b/x/") == "s3://b/x"
    fs, path = storage.filesystem("runs")
    assert isinstance(fs, pyarrow.fs.LocalFileSystem)
    assert path == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("gs://bucket/x", "gs:// is not supported; give a plain path, file:///path or s3://bucket/key"),
        ("https://example.org/x", "https:// is not supported"),
        ("s3://", "names no bucket"),
        ("s3://b//x", "has an empty part"),
        ("file://host/x", "three slashes"),
        ("", "an empty text"),
    ],
)
def test_a_uri_that_names_nothing_is_refused(uri: str, told: str) -> None:
    with pytest.raises(StorageError, match=told):
        storage.exists(uri)


def test_files_are_listed_in_order_without_hidden_ones(tree: Path) -> None:
    files = storage.list_files(str(tree))
    assert [file.relative for file in files] == ["a b/ü%.jpg", "a/one.jpg", "a/two.png", "b.JPG"]
    assert all(storage.read_text(file.uri) == file.relative for file in files)
    assert [file.size for file in files] == [len(file.relative.encode()) for file in files]
    assert [file.modified_ns for file in files] == [os.stat(file.uri).st_mtime_ns for file in files]
    assert storage.list_files(files[1].uri)[0].modified_ns == files[1].modified_ns
    jpegs = storage.list_files(f"file://{tree}", {".jpg", ".jpeg"})
    assert [file.relative for file in jpegs] == ["a b/ü%.jpg", "a/one.jpg", "b.JPG"]
    (single,) = storage.list_files(str(tree / "a" / "two.png"), {".jpg"})
    assert (single.uri, single.relative) == (str(tree / "a" / "two.png"), "two.png")


def test_files_are_streamed_in_the_order_of_keys(tree: Path) -> None:
    (tree / "a.jpg").write_bytes(b"a.jpg")  # "a.jpg" < "a/", though "a" < "a.jpg"
    files = list(storage.stream_files(str(tree)))
    relatives = [file.relative for file in files]
    assert len(relatives) == 8
    assert relatives == sorted(relatives)
    assert all(storage.read_text(file.uri) == file.relative for file in files)
    assert [file.size for file in files] == [len(file.relative.encode()) for file in files]
    for position, last in enumerate(relatives):
        assert [file.relative for file in storage.stream_files(str(tree), after=last)] == relatives[position + 1 :]
    begin_so = [one for one in relatives if one.startswith("a/")]
    assert [file.relative for file in storage.stream_files(str(tree), prefix="a/")] == begin_so
    visible = [file.relative for file in storage.stream_files(str(tree), enter=lambda folder: folder == "a")]
    assert visible == ["a.jpg", "a/.y.jpg", "a/one.jpg", "a/two.png", "b.JPG"]
    (single,) = storage.stream_files(str(tree / "b.JPG"))
    assert (single.uri, single.relative, single.size) == (str(tree / "b.JPG"), "b.JPG", 5)


def test_a_file_whose_name_is_not_utf8_has_a_uri(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn%.jpg")).write_bytes(b"latin")
    (file,) = storage.stream_files(str(tmp_path))
    assert file.uri == f"file://{tmp_path}/gr%FCn%25.jpg"
    assert storage.read_bytes(file.uri) == b"latin"


def test_what_is_missing_is_told_by_its_name(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    assert not storage.exists(missing)
    assert not storage.is_folder(missing)
    for look in (storage.list_files, storage.open_input, storage.read_text):
        with pytest.raises(StorageError, match=f"^{missing} does not exist$"):
            look(missing)
    with pytest.raises(StorageError, match="does not exist"), storage.local_copy(missing):
        pass
    storage.delete(missing)


def test_a_folder_where_a_file_is_wanted(tree: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .* it is a folder"):
        storage.read_bytes(str(tree))
    with pytest.raises(StorageError, match=r"cannot write .* it is a folder"):
        storage.write_bytes(str(tree), b"x")
    with pytest.raises(StorageError, match=r"cannot write .* a part of its path is a file"):
        storage.write_bytes(str(tree / "b.JPG" / "x"), b"x")


def test_text_is_utf8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    storage.write_text(str(tmp_path / "new" / "a.txt"), "Bär")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "Bär".encode()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfcat")
    assert storage.read_text(str(tmp_path / "b.txt")) == "cat"
    (tmp_path / "c.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(StorageError, match=r"c\.txt is not UTF-8 text \(byte 1\)"):
        storage.read_text(str(tmp_path / "c.txt"))


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model" / "config.json"
    storage.write_text(str(target), "old")

    def interrupted_write() -> None:
        with storage.open_atomic(str(target)) as file:
            file.write(b"half")
            assert storage.list_files(str(target.parent)) == storage.list_files(str(target))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]
    with storage.open_atomic(str(target)) as file:
        file.write(b"new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with (
        pytest.raises(StorageError, match=f"cannot write {target}: no space is left"),
        storage.open_atomic(str(target)),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), storage.open_atomic(str(target)):
        Path(tmp_path / "another file").read_bytes()  # an error of the caller's own stays what it is


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_a_forbidden_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="no permission"):
        storage.write_bytes(str(tmp_path / "closed" / "x"), b"x")


def test_delete_takes_files_folders_and_links_but_not_what_a_link_leads_to(tree: Path) -> None:
    storage.delete(str(tree / "a" / "one.jpg"))
    assert not (tree / "a" / "one.jpg").exists()
    (tree.parent / "link").symlink_to(tree)
    storage.delete(str(tree.parent / "link"))
    assert (tree / "b.JPG").exists()
    storage.delete(f"file://{tree}")
    assert not tree.exists()


def test_a_folder_is_uploaded_whole_and_a_local_copy_is_the_thing_itself(tree: Path, tmp_path: Path) -> None:
    storage.upload_folder(tree, str(tmp_path / "copy"))
    assert (tmp_path / "copy" / ".hidden" / "x.jpg").exists()
    assert storage.list_files(str(tmp_path / "copy"))[0].relative == "a b/ü%.jpg"
    with storage.local_copy(f"file://{tmp_path}/copy") as path:
        assert path == tmp_path / "copy"
    assert path.exists()
    with pytest.raises(StorageError, match="not a folder"):
        storage.upload_folder(tree / "b.JPG", str(tmp_path / "copy"))


def test_a_wrong_environment_is_told(no_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(StorageError, match=r"AWS_ENDPOINT_URL is '127.0.0.1:9000': give http://host:port"):
        storage.exists("s3://vilseg/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://name:PASSWORD@host:9000")
    with pytest.raises(StorageError, match="holds a user name or password") as caught:
        storage.exists("s3://vilseg/x")
    assert "PASSWORD" not in str(caught.value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    with pytest.raises(StorageError, match="only one is set"):
        storage.exists("s3://vilseg/x")


def test_a_changed_environment_is_seen(no_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, path = storage.filesystem("s3://vilseg/a/b")
    assert path == "vilseg/a/b"
    assert storage.filesystem("s3://other/x")[0] is first
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    assert not storage.filesystem("s3://vilseg/a/b")[0].equals(first)
