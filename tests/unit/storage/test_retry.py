"""Work that has begun waits for a store that is away, goes on where it was, and gives up in the end; other work fails at once."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.flaky_store import FlakyStore
from vilseg import storage
from vilseg.errors import StorageError, StoreUnavailable
from vilseg.storage import retry


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_PAUSES_S", (0.01, 0.01))


class Numbers:
    """A stream of 0..9 whose store is away before some of them, once each."""

    def __init__(self, *away: int) -> None:
        self._away = set(away)
        self.begun: list[int | None] = []

    def __call__(self, last: int | None) -> Iterator[int]:
        self.begun.append(last)
        for number in range(0 if last is None else last + 1, 10):
            if number in self._away:
                self._away.remove(number)
                raise StoreUnavailable("away")
            yield number


def fails(times: int, error: StorageError) -> list[int]:
    """Let an action fail ``times`` times inside `retrying`; return its calls."""
    calls: list[int] = []

    def action() -> None:
        calls.append(len(calls))
        if len(calls) <= times:
            raise error

    with storage.retrying():
        retry.call(action)
    return calls


def test_a_request_is_repeated_until_the_store_answers() -> None:
    assert fails(3, StoreUnavailable("away")) == [0, 1, 2, 3]


def test_what_would_fail_again_is_not_tried_again() -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        fails(1, StorageError("no such bucket"))


def test_nothing_waits_that_has_not_begun() -> None:
    calls = []

    def away() -> None:
        calls.append(1)
        raise StoreUnavailable("away")

    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            retry.call(away)
    with storage.retrying(), pytest.raises(StoreUnavailable), storage.retrying(seconds=0):
        retry.call(away)
    assert len(calls) == 3


def test_time_is_over_in_the_end_and_counts_from_the_first_failure() -> None:
    def always(last: int | None) -> Iterator[int]:
        if last is None:
            yield 0
        if last == 0:
            yield 1
        raise StoreUnavailable("away")

    with storage.retrying(seconds=0.05):
        found = retry.resume(always)
        assert [next(found), next(found)] == [0, 1]
        with pytest.raises(StoreUnavailable):
            next(found)


def test_a_stream_goes_on_after_its_last_item() -> None:
    numbers = Numbers(0, 3, 7)
    with storage.retrying():
        assert list(retry.resume(numbers)) == list(range(10))
    assert numbers.begun == [None, None, 2, 6]
    with pytest.raises(StoreUnavailable):
        list(retry.resume(Numbers(3)))


def test_threads_of_a_pool_wait_as_the_thread_that_submits_and_others_do_not() -> None:
    with storage.ThreadPool(1) as pool:
        assert pool.submit(retry.retry_seconds).result() == 0
        with storage.retrying(seconds=7):
            assert pool.submit(retry.retry_seconds).result() == 7
            assert list(pool.map(lambda _: retry.retry_seconds(), range(2))) == [7, 7]
            seen: list[float] = []
            thread = threading.Thread(target=lambda: seen.append(retry.retry_seconds()))
            thread.start()
            thread.join()
        assert seen == [0]
        assert pool.submit(retry.retry_seconds).result() == 0


# -------------------------------------------------------------------------------------------- functions of storage


def test_each_function_waits_for_the_store(flaky_store: FlakyStore, tmp_path: Path) -> None:
    with storage.retrying():
        flaky_store.away(2)
        storage.write_bytes("s3://bucket/a/one", b"one")
        flaky_store.away(2)
        with storage.open_atomic("s3://bucket/a/two") as file:
            file.write(b"two")
        flaky_store.away(2)
        assert storage.exists("s3://bucket/a/one")
        flaky_store.away(2)
        assert storage.read_text("s3://bucket/a/one") == "one"
        flaky_store.away(3)
        assert [entry.relative for entry in storage.list_files("s3://bucket/a")] == ["one", "two"]
        flaky_store.away(3)
        with storage.local_copy("s3://bucket/a") as copy:
            assert (copy / "two").read_bytes() == b"two"
        (tmp_path / "local").mkdir()
        (tmp_path / "local" / "three").write_bytes(b"three")
        flaky_store.away(3)
        storage.upload_folder(tmp_path / "local", "s3://bucket/a")
        flaky_store.away(2)
        storage.delete("s3://bucket/a/one")
    assert not storage.exists("s3://bucket/a/one")
    assert storage.read_bytes("s3://bucket/a/three") == b"three"
    flaky_store.away(1)
    with pytest.raises(StoreUnavailable, match="does not answer"):
        storage.read_bytes("s3://bucket/a/two")


def test_a_file_that_is_being_read_goes_on_where_its_connection_broke(flaky_store: FlakyStore) -> None:
    data = bytes(range(256)) * 40
    storage.write_bytes("s3://bucket/file", data)
    with storage.retrying():
        file = storage.open_input("s3://bucket/file")
    with file:
        found = file.read(1000)
        flaky_store.away(2)
        found += file.read(5000)
        file.seek(-100, 2)
        flaky_store.away(1)
        assert file.read() == data[-100:]
        file.seek(6000)
        assert found + file.read() == data
        assert file.size() == len(data)


def test_a_table_is_read_over_a_connection_that_breaks(flaky_store: FlakyStore) -> None:
    table = pa.table({"number": range(1000)})
    with storage.open_atomic("s3://bucket/table.parquet") as target:
        pq.write_table(table, target, row_group_size=100)
    with storage.retrying(), storage.open_input("s3://bucket/table.parquet") as file:
        groups = pq.ParquetFile(file)
        found = [groups.read_row_group(0)]
        flaky_store.away(2)
        found += [groups.read_row_group(number) for number in range(1, 10)]
        assert pa.concat_tables(found).equals(table)
    with storage.open_input("s3://bucket/table.parquet") as file:
        flaky_store.away(1)
        with pytest.raises(StoreUnavailable, match="does not answer"):
            pq.ParquetFile(file)
