"""Retries of requests to an object store that does not answer.

By default a failed request raises its error at once, so that checks on the command line report a mistake immediately. Long jobs
run inside ``with storage.retrying():``, where every function of `vilseg.storage` repeats a request as long as the store does not
answer, so that the job survives a restart of the store. Only `StoreUnavailable` is retried.

The setting is a context variable and holds for the current thread. Threads of a `ThreadPool` inherit it from the thread that
submits the task. Ray tasks and actors run in other processes and must enter `retrying` themselves.
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
"""Default time in seconds after the first failure until a request is given up."""
_PAUSES_S = (1.0, 10.0)
"""Maximum of the first pause and maximum of any pause between attempts, in seconds. Pauses are random, so that many processes do
not repeat their requests at the same moment."""

_seconds: contextvars.ContextVar[float] = contextvars.ContextVar("vilseg_storage_retry_seconds", default=0.0)

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def retrying(seconds: float = RETRY_S) -> Iterator[None]:
    """Make storage functions called by the current thread in the ``with`` block repeat requests to a store that does not answer.

    Args:
        seconds: time after the first failure during which a request is repeated; 0 disables retries, also inside another
            `retrying` block.

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
        _seconds.set(before)  # no token, because a generator may be closed in another thread


def retry_seconds() -> float:
    """Return the retry time in seconds of the enclosing `retrying` block; 0 outside of one."""
    return _seconds.get()


def call(action: Callable[[], T], seconds: float | None = None) -> T:
    """Return the result of ``action``, which is repeated while it raises `StoreUnavailable`.

    Args:
        action: function that makes one request.
        seconds: retry time as for `retrying`; None takes that of the enclosing `retrying` block.

    Raises:
        StoreUnavailable: the store still does not answer ``seconds`` after the first failure.
    """
    try:
        return action()
    except StoreUnavailable:
        seconds = _seconds.get() if seconds is None else seconds
        if not seconds:
            raise
    # The time counts from the first failure, not from the start of the request, which may have run for an hour.
    first, longest = _PAUSES_S
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(StoreUnavailable),
        wait=tenacity.wait_random_exponential(multiplier=first, max=longest),
        stop=tenacity.stop_before_delay(seconds),
        reraise=True,
    )
    return again(action)


def resume(begin: Callable[[T | None], Iterator[T]]) -> Iterator[T]:
    """Yield the items of a stream, which is restarted after the last yielded item when it raises `StoreUnavailable`.

    The retry time is that of the `retrying` block in which the first item is requested. It starts again for each item.

    Args:
        begin: function that returns an iterator over the items after a given item; called with None for the start.

    Raises:
        StoreUnavailable: the store still does not answer after the retry time.
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
    """Thread pool whose tasks inherit the `retrying` setting of the thread that submits them."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn`` in a thread of the pool, with the `retrying` setting of the calling thread."""
        return super().submit(contextvars.copy_context().run, fn, *args, **kwargs)  # type: ignore[arg-type]
