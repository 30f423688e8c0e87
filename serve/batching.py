"""Dynamic batching: items that arrive during a forward pass of the model form the batch of the next pass.

Ray's ``serve.batch`` closes a batch when a timer expires, regardless of whether the model is free. A timer long enough to
fill batches delays single requests, and a short timer makes batches of one item under load. Here a batch is closed when
the model is free, so no item waits for other items to arrive, and batches grow with the load.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Batcher:
    """Queue that runs waiting items of the same group as one batch, in order of arrival, in one background thread.

    Args:
        run: Function called in the background thread with a group (such as a model) and the items of a batch. It yields one
            result per item, in order; each result is delivered immediately.
        size: Maximum number of items per batch.

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
        """Queue an item and return its result. If the caller is cancelled before the batch starts, the item is not run.

        Args:
            group: Only items with equal groups are in one batch.
            item: Item, which ``run`` gets in a list with the others of its batch.

        Raises:
            Exception: Exception of ``run``; raised for every item of the batch that has no result yet.
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
        """Run one batch and deliver its results; called in the background thread."""
        futures = deque(future for _, _, future in batch)
        try:
            for result in self._run(batch[0][0], [item for _, item, _ in batch]):
                loop.call_soon_threadsafe(_deliver, futures.popleft(), result, None)
            assert not futures, "every item has a result"
        except Exception as error:  # noqa: BLE001  (delivered to the callers)
            for future in futures:
                loop.call_soon_threadsafe(_deliver, future, None, error)

    def _take(self) -> list[tuple[Hashable, Any, asyncio.Future[Any]]]:
        """Remove and return the next batch: the oldest item that is not cancelled, and the next items of the same group."""
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
