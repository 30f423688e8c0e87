import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.object_store import ObjectStore
from vilseg import storage
from vilseg.errors import StorageError

pytestmark = pytest.mark.usefixtures("object_store")


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"s3://vilseg/tests/{request.node.name}"


def test_what_is_written_is_listed_and_read(prefix: str) -> None:
    relatives = ["a b/ü#?%20+.jpg", "a/one.jpg", "a/two.PNG", "empty", "x/y/z.jpg"]
    for relative in [*relatives, ".hidden/x.jpg", "_temporary/0/y.jpg"]:
        storage.write_text(storage.join(prefix, relative), "" if relative == "empty" else relative)
    files = storage.list_files(prefix)
    assert [file.relative for file in files] == relatives
    assert [storage.read_text(file.uri) for file in files] == ["" if r == "empty" else r for r in relatives]
    assert [file.size for file in files] == [0 if r == "empty" else len(r.encode()) for r in relatives]
    assert [file.relative for file in storage.list_files(prefix + "/", {".png"})] == ["a/two.PNG"]
    (single,) = storage.list_files(f"{prefix}/a/one.jpg")
    assert (single.uri, single.relative, single.size) == (f"{prefix}/a/one.jpg", "one.jpg", 9)


def test_files_folders_and_neither(prefix: str) -> None:
    storage.write_bytes(f"{prefix}/folder/file", b"x")
    cases = {
        f"{prefix}/folder/file": (True, False),
        f"{prefix}/folder/": (True, True),
        f"{prefix}/fold": (False, False),
    }
    assert {uri: (storage.exists(uri), storage.is_folder(uri)) for uri in cases} == cases
    assert storage.is_folder("s3://vilseg")
    for look in (storage.list_files, storage.read_bytes):
        with pytest.raises(StorageError, match=f"^{prefix}/none does not exist$"):
            look(f"{prefix}/none")


def test_ten_megabytes_there_and_back(prefix: str) -> None:
    data = os.urandom(10_000_000)
    storage.write_bytes(f"{prefix}/big", data)
    assert storage.read_bytes(f"{prefix}/big") == data
    with storage.open_input(f"{prefix}/big") as file:
        file.seek(9_999_990)
        assert file.read() == data[-10:]


def test_parquet_goes_over_the_same_filesystem(prefix: str) -> None:
    table = pa.table({"caption": ["a cat", "a sofa"]})
    fs, path = storage.filesystem(f"{prefix}/pairs.parquet")
    pq.write_table(table, path, filesystem=fs)
    assert pq.read_table(path, filesystem=fs).equals(table)


@pytest.mark.parametrize("size", [10, 12_000_000])
def test_an_exception_while_writing_publishes_nothing(prefix: str, size: int) -> None:
    uri = f"{prefix}/object"

    def write_and_fail(error: type[BaseException]) -> None:
        with storage.open_atomic(uri) as file:
            file.write(bytes(size))
            raise error

    with pytest.raises(RuntimeError):
        write_and_fail(RuntimeError)
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(KeyboardInterrupt)
    assert storage.read_bytes(uri) == b"old"
    with storage.open_atomic(uri) as file:
        file.write(b"new")
        assert storage.read_bytes(uri) == b"old"
    assert storage.read_bytes(uri) == b"new"


def test_delete(prefix: str) -> None:
    for relative in ("a/1", "a/b/2", "c"):
        storage.write_bytes(f"{prefix}/{relative}", b"x")
    storage.delete(f"{prefix}/c")
    assert not storage.exists(f"{prefix}/c")
    storage.delete(f"{prefix}/a")
    assert not storage.exists(f"{prefix}/a")
    assert not storage.exists(prefix), "the folder a store keeps for a prefix without objects counts as missing"
    with pytest.raises(StorageError, match="does not exist"):
        storage.list_files(prefix)
    storage.delete(f"{prefix}/a")
    with pytest.raises(StorageError, match="whole bucket"):
        storage.delete("s3://vilseg")


def test_a_folder_goes_up_and_comes_down_as_it_was(prefix: str, tmp_path: Path) -> None:
    content = {f"folder {i}/.file-{i}": os.urandom(1000 * i) for i in range(20)}
    for relative, data in content.items():
        storage.write_bytes(str(tmp_path / relative), data)
    storage.upload_folder(tmp_path, f"{prefix}/model")
    with storage.local_copy(f"{prefix}/model") as copy:
        assert copy.name == "model"
        assert {str(p.relative_to(copy)): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == content
    assert not copy.exists()
    with storage.local_copy(f"{prefix}/model/folder 3/.file-3") as copy:
        assert (copy.name, copy.read_bytes()) == (".file-3", content["folder 3/.file-3"])
    with pytest.raises(StorageError, match="does not exist"), storage.local_copy(f"{prefix}/none"):
        pass


def test_a_bucket_that_does_not_exist(object_store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    told = f"the object store at {object_store.endpoint} has no bucket 'nowhere'; create it or correct the URI"
    for attempt in (
        lambda: storage.require_bucket("s3://nowhere/x"),
        lambda: storage.read_bytes("s3://nowhere/x"),
        lambda: storage.list_files("s3://nowhere/x"),
        lambda: storage.list_files("s3://nowhere"),
        lambda: storage.write_bytes("s3://nowhere/x", b"x"),
        lambda: storage.upload_folder(tmp_path, "s3://nowhere/x"),
    ):
        with pytest.raises(StorageError, match=told):
            attempt()
    assert not storage.exists("s3://nowhere/x")
    storage.delete("s3://nowhere/x")
    storage.require_bucket("s3://vilseg/any/key")


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv(variable, "WRONG-KEY")
    for attempt in (
        storage.require_bucket,
        storage.exists,
        storage.list_files,
        storage.read_bytes,
        lambda uri: storage.write_bytes(uri, b"x"),
    ):
        with pytest.raises(StorageError, match="refused access to bucket 'vilseg'; check AWS_ACCESS_KEY_ID") as caught:
            attempt("s3://vilseg/x")
        assert "WRONG-KEY" not in str(caught.value)
        assert secret not in str(caught.value)


def test_an_open_port_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(StorageError, match="does not answer"):
            storage.require_bucket("s3://vilseg")
        assert time.monotonic() - start < 15


def test_an_address_that_swallows_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        waiting = [socket.socket() for _ in range(3)]  # they fill the queue, so that no further one gets an answer
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        for attempt in (storage.exists, storage.require_bucket):
            start = time.monotonic()
            with pytest.raises(StorageError, match="does not answer"):
                attempt("s3://vilseg/x")
            assert time.monotonic() - start < 12
        for client in waiting:
            client.close()


def test_an_unreachable_store_is_told_within_seconds_and_without_secrets(no_server: str, tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / str(i)).write_bytes(b"x")
    attempts = (
        lambda: storage.exists("s3://vilseg/x"),
        lambda: storage.list_files("s3://vilseg/x"),
        lambda: storage.read_bytes("s3://vilseg/x"),
        lambda: storage.write_bytes("s3://vilseg/x", b"x"),
        lambda: storage.delete("s3://vilseg/x"),
        lambda: storage.upload_folder(tmp_path, "s3://vilseg/x"),
        lambda: storage.require_bucket("s3://vilseg/x"),
    )

    def told(attempt: Callable[[], object]) -> tuple[str, float]:
        start = time.monotonic()
        with pytest.raises(StorageError) as caught:
            attempt()
        return str(caught.value), time.monotonic() - start

    with ThreadPoolExecutor(len(attempts)) as pool:  # each waits for its retries
        for sentence, seconds in pool.map(told, attempts):
            assert seconds < 30, "a user should not wait longer"
            assert f"the object store at {no_server} does not answer" in sentence
            assert "is the store running? `vilseg store up` starts the embedded one" in sentence
            assert "FOR-TEST" not in sentence
            assert "\n" not in sentence
