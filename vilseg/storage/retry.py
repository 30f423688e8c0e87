"""Waiting for an object store that does not answer.

Work that has not begun (checks of a configuration, the command line) fails at once, so that a mistake shows at once. Work that
has begun waits, so that a job of a week survives a restart of the store: it runs inside ``with storage.retrying():``, and every
function of `vilseg.storage` then repeats a request while the store is away. Only `StoreUnavailable` is retried.

The setting belongs to the thread (it is a context variable). Threads of a `ThreadPool` take it over from the thread that submits;
Ray tasks and actors run in other processes and enter `retrying` themselves.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import tenacity

from vilseg.errors import StoreUnavailable

RETRY_S = 600.0
"""Seconds without an answer after which work is given up."""
_PAUSES_S = (1.0, 10.0)
"""Longest first pause and longest pause of all, in seconds; the actual ones are random, so that many processes that wait for the
same store do not come back all at once."""

_seconds: contextvars.ContextVar[float] = contextvars.ContextVar("vilseg_storage_retry_seconds", default=0.0)

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def retrying(seconds: float = RETRY_S) -> Iterator[None]:
    """Make storage functions wait for a store that does not answer, in this thread, for as long as the block lasts.

    Args:
        seconds: time after a first failure in which a request is repeated; 0 fails at once, also inside another such block.

    Example:
        >>> from vilseg import storage
        >>> with storage.retrying(seconds=60):
        ...     storage.exists("no-such-file")
        False
    """
    before = _seconds.get()
    _seconds.set(seconds)
    try:
        yield
    finally:
        _seconds.set(before)  # not reset by a token: a generator may be closed in another thread than it was begun in


def retry_seconds() -> float:
    """Return the seconds that the enclosing `retrying` allows; 0 outside of one."""
    return _seconds.get()


def call(action: Callable[[], T], seconds: float | None = None) -> T:
    """Return the result of ``action``, repeated while the store does not answer.

    Args:
        action: one request.
        seconds: as for `retrying`; those of the enclosing `retrying` where None.

    Raises:
        StoreUnavailable: the store does not answer ``seconds`` after the first failure.
    """
    try:
        return action()
    except StoreUnavailable:
        seconds = _seconds.get() if seconds is None else seconds
        if not seconds:
            raise
    # Time counts from the first failure: a request that fails after an hour has as much of it as one that fails at once.
    first, longest = _PAUSES_S
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(StoreUnavailable),
        wait=tenacity.wait_random_exponential(multiplier=first, max=longest),
        stop=tenacity.stop_before_delay(seconds),
        reraise=True,
    )
    return again(action)


def resume(begin: Callable[[T | None], Iterator[T]]) -> Iterator[T]:
    """Yield the items of a stream that is begun again after its last item when the store did not answer.

    The enclosing `retrying` of the first item counts for all. Each item has the whole time.

    Args:
        begin: makes the stream of what follows an item; called with the last item given, None at the start.

    Raises:
        StoreUnavailable: the store stays away.
    """
    seconds = _seconds.get()
    stream: Iterator[T] | None = None
    last: T | None = None

    def advance() -> T:
        nonlocal stream
        try:
            stream = begin(last) if stream is None else stream
            return next(stream)
        except StoreUnavailable:
            stream = None
            raise

    while True:
        try:
            item = call(advance, seconds)
        except StopIteration:
            return
        last = item
        yield item


class ThreadPool(ThreadPoolExecutor):
    """A thread pool whose tasks wait for the store as the thread does that submits them."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn`` in a thread, inside the `retrying` that encloses this call."""
        return super().submit(contextvars.copy_context().run, fn, *args, **kwargs)
