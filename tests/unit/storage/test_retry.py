"""What waits for a store that is away goes on where it was, and gives up in the end."""

from collections.abc import Iterator

import pytest

from vilseg.errors import StorageError, StoreUnavailable
from vilseg.storage import retry
from vilseg.storage.retry import patiently, stream_patiently


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_PAUSES_S", (0.01, 0.01))


class Store:
    """Gives 0..9, but is away before some of them, once each."""

    def __init__(self, *away: int) -> None:
        self._away = set(away)
        self.begun: list[tuple[int, int | None]] = []

    def numbers(self, given: int, last: int | None) -> Iterator[int]:
        self.begun.append((given, last))
        for number in range(given, 10):
            if number in self._away:
                self._away.remove(number)
                raise StoreUnavailable("away")
            yield number


def test_a_stream_goes_on_where_it_was() -> None:
    store = Store(0, 3, 7)
    assert list(stream_patiently(store.numbers)) == list(range(10))
    assert store.begun == [(0, None), (0, None), (3, 2), (7, 6)]


def test_patience_is_counted_from_each_failure_and_ends() -> None:
    def always(given: int, last: int | None) -> Iterator[int]:
        if given < 2:
            yield given
        raise StoreUnavailable("away")

    found = stream_patiently(always, seconds=0.05)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(StoreUnavailable):
        next(found)


def test_what_would_fail_again_is_not_tried_again() -> None:
    tries = []

    def refused() -> None:
        tries.append(1)
        raise StorageError("no such bucket")

    with pytest.raises(StorageError):
        patiently(refused)
    assert tries == [1]


def test_an_action_is_tried_until_it_succeeds_or_time_is_up() -> None:
    tries = []

    def third() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise StoreUnavailable("away")
        return "here"

    assert patiently(third) == "here"
    with pytest.raises(StoreUnavailable):
        patiently(lambda: (_ for _ in ()).throw(StoreUnavailable("away")), seconds=0)
