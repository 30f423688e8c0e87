"""Dynamic batching: items that wait while the model is busy share its next pass.

Ray's own ``serve.batch`` closes a batch when a timer runs out, whether the model is free or not: a timer long enough to
fill batches delays a single request, a short one makes batches of one under load. Here a batch is closed when the model
is free, so no item waits for others and batches grow with the load.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Batcher:
    """Runs items of one group together in one thread, in order of arrival.

    Args:
        run: Called in the thread with a group and its items; yields one result per item, in order. Each is delivered
            at once.
        size: Largest number of items per call.

    Example:
        >>> async def main():
        ...     batcher = Batcher(lambda group, items: [2 * item for item in items], size=4)
        ...     return await asyncio.gather(*(batcher.submit("double", number) for number in range(3)))
        >>> asyncio.run(main())
        [0, 2, 4]
    """

    def __init__(self, run: Callable[[Hashable, Sequence[Any]], Iterable[Any]], size: int) -> None:
        self._run = run
        self._size = size
        self._waiting: deque[tuple[Hashable, Any, asyncio.Future[Any]]] = deque()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._loop: asyncio.Task[None] | None = None

    async def submit(self, group: Hashable, item: Any) -> Any:
        """Return the result of one item. An item that is cancelled before the model begins is never run.

        Raises:
            Exception: Raised by ``run``, for every item of the call without a result.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((group, item, future))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run_batches())
        return await future

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._take()
            if not batch:
                continue
            await loop.run_in_executor(self.thread, self._run_batch, loop, batch)

    def _run_batch(
        self, loop: asyncio.AbstractEventLoop, batch: list[tuple[Hashable, Any, asyncio.Future[Any]]]
    ) -> None:
        """Run one batch; executed in the model's thread."""
        futures = deque(future for _, _, future in batch)
        try:
            for result in self._run(batch[0][0], [item for _, item, _ in batch]):
                loop.call_soon_threadsafe(_deliver, futures.popleft(), result, None)
            assert not futures, "every item has a result"
        except Exception as error:  # noqa: BLE001  (delivered to the callers)
            for future in futures:
                loop.call_soon_threadsafe(_deliver, future, None, error)

    def _take(self) -> list[tuple[Hashable, Any, asyncio.Future[Any]]]:
        """Return the next batch: the oldest item that is not cancelled, and others of its group in order of arrival."""
        batch: list[tuple[Hashable, Any, asyncio.Future[Any]]] = []
        remaining: deque[tuple[Hashable, Any, asyncio.Future[Any]]] = deque()
        for entry in self._waiting:
            if entry[2].done():  # cancelled
                continue
            fits = len(batch) < self._size and (not batch or entry[0] == batch[0][0])
            (batch if fits else remaining).append(entry)
        self._waiting = remaining
        return batch


def _deliver(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():  # the caller was cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
