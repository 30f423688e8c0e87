import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cluster.object_store import HOST, ObjectStore
from vilseg import storage
from vilseg.errors import StorageError


def use(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in store.environment().items():
        monkeypatch.setenv(variable, value)


def listeners(pid: int) -> set[str]:
    """The addresses on which a process listens, from /proc ("0100007F" is 127.0.0.1)."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(link))
        except FileNotFoundError:
            continue  # closed since the folder was listed
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].split(":")[0])
    return found


def test_life_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "store"
    # Started by a process that ends at once, as `vilseg store up` does.
    code = f"from pathlib import Path; from cluster.object_store import ObjectStore; ObjectStore.start(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    first = ObjectStore.attach(folder)
    assert first is not None
    try:
        assert ObjectStore.start(folder).pid == first.pid
        with pytest.raises(StorageError, match="already runs at"):
            ObjectStore.start(folder, port=first.ports["s3"] + 1)
        use(first, monkeypatch)
        storage.write_bytes("s3://vilseg/kept", b"data")

        first.stop()  # gracefully
        assert ObjectStore.attach(folder) is None
        with pytest.raises(StorageError, match="does not answer"):
            storage.read_bytes("s3://vilseg/kept")
        second = ObjectStore.start(folder)
        assert second.environment() == first.environment(), "same keys and same endpoint"
        assert storage.read_bytes("s3://vilseg/kept") == b"data"

        storage.write_bytes("s3://vilseg/late", b"written just before the end")
        os.kill(second.pid, signal.SIGKILL)
        while ObjectStore.attach(folder) is not None:  # it takes a moment to be gone
            time.sleep(0.05)
        with socket.create_server((HOST, 0)) as other:
            taken = other.getsockname()[1]
            with pytest.raises(StorageError, match=f"port {taken} on {HOST} cannot be used"):
                ObjectStore.start(folder, port=taken)
        moved = ObjectStore.start(folder, port=taken)
        assert moved.endpoint == f"http://{HOST}:{taken}"
        use(moved, monkeypatch)
        assert storage.read_bytes("s3://vilseg/kept") == b"data"
        assert storage.read_bytes("s3://vilseg/late") == b"written just before the end"
    finally:
        running = ObjectStore.attach(folder)
        if running is not None:
            running.stop(timeout=0)


def test_only_signed_requests_from_this_machine_are_served(object_store: ObjectStore) -> None:
    storage.write_bytes("s3://vilseg/private", b"data")
    addresses = [
        f"{object_store.endpoint}/",
        f"{object_store.endpoint}/vilseg/private",
        f"http://{HOST}:{object_store.ports['filer']}/buckets/vilseg/private",
    ]
    for address in addresses:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=10)
        assert caught.value.code in (401, 403)
    if sys.platform == "linux":
        assert listeners(object_store.pid) <= {"0100007F", "0000000000000000FFFF00000100007F"}
        assert listeners(object_store.pid)


def test_keys_are_random_and_readable_by_the_user_alone(object_store: ObjectStore) -> None:
    for name in ("identities.json", "security.toml"):
        assert (object_store.directory / name).stat().st_mode & 0o777 == 0o600
    environment = object_store.environment()
    assert len(environment["AWS_SECRET_ACCESS_KEY"]) >= 40
    assert environment["AWS_SECRET_ACCESS_KEY"] not in (object_store.directory / "weed.log").read_text()
    assert environment["AWS_SECRET_ACCESS_KEY"] not in (object_store.directory / "store.json").read_text()


def test_another_process_under_the_old_number_is_not_the_store(tmp_path: Path) -> None:
    assert ObjectStore.attach(tmp_path / "never") is None
    state = {"pid": os.getpid(), "endpoint": "http://127.0.0.1:1", "ports": {"s3": 1}}
    (tmp_path / "store.json").write_text(json.dumps(state))
    assert ObjectStore.attach(tmp_path) is None


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another with --dir"):
        ObjectStore.start(tmp_path / "file")
    with pytest.raises(StorageError, match="comma"):
        ObjectStore.start(tmp_path / "a,b")
    with pytest.raises(StorageError, match="port 70000 does not exist"):
        ObjectStore.start(tmp_path / "store", port=70000)


def test_a_store_that_cannot_start_says_where_the_log_is(tmp_path: Path) -> None:
    (tmp_path / "store" / "data").mkdir(parents=True)
    (tmp_path / "store" / "data" / "filerldb2").write_text("a file where the store wants a folder")
    with pytest.raises(StorageError, match=rf"ended while it started; see {tmp_path}/store/weed\.log"):
        ObjectStore.start(tmp_path / "store")
    assert ObjectStore.attach(tmp_path / "store") is None
