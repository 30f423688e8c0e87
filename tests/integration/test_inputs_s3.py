"""Bulk segmentation's inputs on a real S3 server: keys of all kinds, more than a page of them, a store that goes away."""

import io
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.object_store import ObjectStore
from vilseg import storage
from vilseg.bulk.listing import Container, Input, scan
from vilseg.errors import DataError, StorageError
from vilseg.storage import retry, s3

pytestmark = pytest.mark.usefixtures("object_store")


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"inputs/{request.node.name}"


def put(prefix: str, *relatives: str) -> str:
    """Objects that hold their own key below ``prefix``, whose URI is returned."""
    client = s3.boto_client(s3.read_settings())

    def one(relative: str) -> None:
        body = b"" if relative.endswith("/") else relative.encode()
        client.put_object(Bucket="vilseg", Key=f"{prefix}/{relative}", Body=body)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, relatives))
    return f"s3://vilseg/{prefix}"


def names(*inputs: str) -> list[str]:
    return [found.name for found in scan(inputs)]


def test_keys_come_through_as_they_are(prefix: str) -> None:
    odd = [
        "with space.jpg",
        " lead.jpg",
        "a+b.jpg",
        "caf\u00e9.jpg",
        "cafe\u0301.jpg",
        "new\nline.jpg",
        "tab\there.jpg",
    ]
    odd += ["bell\x07.jpg", "..dots..jpg", "%2e%2e%2fetc.jpg", "-rf.jpg", "x" * 240 + ".jpg", "Same.jpg", "same.jpg"]
    odd += ["[1].jpg", "star*?.jpg", "#hash?x=1.jpg", "a&b<c>.jpg", "🐶.jpg", "sub/deep/x.jpg", "noext", "clip.mp4"]
    skipped = ["mark/", ".git/x.jpg", "notes.txt", "._x.jpg", "0.parquet", "0.tar", "1.parquet", "1/x.jpg"]
    folder = put(prefix, *odd, *skipped)
    found = [one for one in scan([folder]) if isinstance(one, Input)]
    assert sorted(one.name for one in found) == sorted([*odd, "1/x.jpg"])
    for one in found:
        assert one.read() == one.name.encode()
        assert one.size == len(one.name.encode())
    (tar,) = (one for one in scan([folder]) if isinstance(one, Container))
    assert tar.name == "0.tar"


def test_globs_lists_and_single_objects(prefix: str) -> None:
    folder = put(prefix, "2020-a/x.jpg", "2020-a/y.png", "2021/x.jpg", "[1].jpg", "1.jpg", "top.jpg", "other/z.jpg")
    assert names(f"{folder}/2020*/*.jpg") == ["2020-a/x.jpg"]
    assert sorted(names(f"{folder}/**/*.jpg")) == sorted(
        ["2020-a/x.jpg", "2021/x.jpg", "[1].jpg", "1.jpg", "top.jpg", "other/z.jpg"]
    )
    assert names(f"{folder}/202*") == ["2020-a/x.jpg", "2020-a/y.png", "2021/x.jpg"]
    assert names(f"{folder}/[1].jpg", f"{folder}/top.jpg") == ["[1].jpg", "top.jpg"]
    storage.write_text(f"{folder}/all.lst", "top.jpg\n# no more\n\n../elsewhere/x.jpg\n" + f"{folder}/2021/x.jpg\n")
    found = list(scan([f"{folder}/all.lst"]))
    assert [one.name for one in found] == ["top.jpg", "%2E%2E/elsewhere/x.jpg", f"vilseg/{prefix}/2021/x.jpg"]
    assert [one.uri for one in found][:2] == [f"{folder}/top.jpg", "s3://vilseg/inputs/elsewhere/x.jpg"]


def test_nothing_there_is_told_with_the_input(prefix: str) -> None:
    folder = put(prefix, "some/x.txt")
    with pytest.raises(DataError, match=f"^no picture at {folder}: expected"):
        names(folder)
    with pytest.raises(StorageError, match=f"^{folder}/none does not exist$"):
        names(folder, f"{folder}/none")
    with pytest.raises(DataError, match=r"^no picture at .*none"):
        names(f"{folder}/none*")


def tar_of_twenty() -> bytes:
    """Members of a megabyte each, called by their number."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for number in range(20):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 1 << 20
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    return packed.getvalue()


def test_a_tar_streams_from_the_store(prefix: str) -> None:
    packed = tar_of_twenty()
    storage.write_bytes(f"s3://vilseg/{prefix}/whole.tar", packed)
    storage.write_bytes(f"s3://vilseg/{prefix}/cut.tar", packed[: 10 << 20])
    cut, whole = scan([f"s3://vilseg/{prefix}"])
    assert isinstance(cut, Container)
    assert isinstance(whole, Container)
    assert [one.read()[0] for one in whole.inputs()] == list(range(20))
    members = cut.inputs()
    assert [next(members).name for _ in range(9)] == [f"cut.tar/{number}.jpg" for number in range(9)]
    with pytest.raises(DataError, match=r"cut\.tar is damaged and cannot be read after 8\.jpg"):
        list(members)


@pytest.fixture(scope="module")
def many(object_store: ObjectStore) -> tuple[str, list[str]]:
    """More than a page of keys, in folders and beside them."""
    relatives = sorted(
        f"{number % 7}/{number:05d}.jpg" if number % 3 else f"{number:05d}.jpg" for number in range(2300)
    )
    return put("inputs/many", *relatives), relatives


def test_more_than_a_page_of_keys(many: tuple[str, list[str]]) -> None:
    folder, relatives = many
    assert sorted(names(folder)) == relatives
    in_order = [file.relative for file in storage.stream_files(folder)]
    for position in (0, 777, 999, 1000, 2298, 2299):
        rest = [file.relative for file in storage.stream_files(folder, after=in_order[position])]
        assert rest == in_order[position + 1 :]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Requests for listings, page by page."""
    asked: list[dict[str, Any]] = []
    client = s3.boto_client(s3.read_settings(), timeout_s=s3.REQUEST_TIMEOUT_S)
    listing = client.list_objects_v2

    def ask(**request: Any) -> Any:
        asked.append(request)
        return listing(**request)

    monkeypatch.setattr(client, "list_objects_v2", ask)
    return asked


def test_the_first_picture_comes_with_the_first_page(many: tuple[str, list[str]], pages: list[dict[str, Any]]) -> None:
    found = scan([many[0]])
    next(found)
    assert len(pages) == 1
    assert sum(1 for _ in found) == len(many[1]) - 1
    assert len(pages) == 3


def test_a_glob_asks_for_the_keys_that_begin_like_it(many: tuple[str, list[str]], pages: list[dict[str, Any]]) -> None:
    assert len(names(f"{many[0]}/0000*.jpg")) == 4
    assert [request["Prefix"] for request in pages] == ["inputs/many/0000"]


def test_a_listing_survives_a_store_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_PAUSES_S", (0.2, 0.2))
    store = ObjectStore.start(tmp_path / "store")
    try:
        for variable, value in store.environment().items():
            monkeypatch.setenv(variable, value)
        relatives = [f"{number:05d}.jpg" for number in range(1100)]
        folder = put("away", *relatives)
        with storage.retrying(seconds=60):
            found = scan([folder])
            seen = [next(found).name for _ in range(10)]
        store.stop(timeout=0)
        with ThreadPoolExecutor(1) as pool:
            returned = pool.submit(lambda: (time.sleep(3), ObjectStore.start(tmp_path / "store"))[1])
            seen += [one.name for one in found]
            store = returned.result()
        assert seen == relatives
        storage.write_bytes("s3://vilseg/tars/x.tar", tar_of_twenty())
        (tar,) = scan(["s3://vilseg/tars"])
        assert isinstance(tar, Container)
        members, impatient = tar.inputs(), scan([folder])
        next(impatient), next(members)
        store.stop(timeout=0)
        with pytest.raises(StorageError, match=f"^cannot list {folder}: the object store at .* does not answer"):
            list(impatient)
        # Not a DataError: the tar is whole, and reading it again may do.
        with pytest.raises(
            StorageError, match=r"^the connection broke while s3://vilseg/tars/x.tar was read \(after \d+.jpg"
        ):
            list(members)
    finally:
        store.stop(timeout=0)
