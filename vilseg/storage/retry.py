"""Waiting for an object store that does not answer, for work that has begun: a week's job should survive a restart of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from vilseg.errors import StoreUnavailable

PATIENCE_S = 600.0
"""Seconds without an answer after which work is given up."""
_PAUSES_S = (1.0, 10.0)  # the first and the longest

T = TypeVar("T")


class _Waiting:
    """Pauses from the first failure on; one lives as long as the store stays away."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause, self._longest = _PAUSES_S

    def pause(self) -> bool:
        """Whether there was time for one more pause."""
        if time.monotonic() + self._pause > self._deadline:
            return False
        # Many processes wait for the same store: they should not come back all at once.
        time.sleep(self._pause * random.uniform(0.5, 1.0))
        self._pause = min(2 * self._pause, self._longest)
        return True


def patiently(action: Callable[[], T], *, seconds: float = PATIENCE_S) -> T:
    """The result of ``action``, which is tried again while the store does not answer.

    Raises:
        StoreUnavailable: it still does not ``seconds`` after the first failure.
    """
    waiting = None
    while True:
        try:
            return action()
        except StoreUnavailable:
            waiting = waiting or _Waiting(seconds)  # what fails after an hour has as much time as what fails at once
            if not waiting.pause():
                raise


def stream_patiently(begin: Callable[[int, T | None], Iterator[T]], *, seconds: float = PATIENCE_S) -> Iterator[T]:
    """The items of a stream, which is begun again where it was when the store did not answer.

    Args:
        begin: makes the stream without what was given before: called with the number of items and the last one (None at
            the start).
        seconds: how long it waits between two items.

    Raises:
        StoreUnavailable: the store stays away.
    """
    given, last, waiting = 0, None, None
    while True:
        try:
            for item in begin(given, last):
                given, last, waiting = given + 1, item, None
                yield item
        except StoreUnavailable:
            waiting = waiting or _Waiting(seconds)
            if not waiting.pause():
                raise
        else:
            return
