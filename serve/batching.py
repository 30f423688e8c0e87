"""Dynamic batching: what waits while the model is busy shares its next pass.

Ray's own ``serve.batch`` closes a batch when a timer runs out, whether the model is free or not: a timer long enough to
fill batches delays a lonely request, a short one makes batches of one under load. Here the model's being free is what
closes a batch, so nobody waits for company and batches grow with the load.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Batcher:
    """Runs items of one group together, in one thread, first come first served.

    Args:
        run: called in the thread with a group and its items; yields a result an item, in order, each of which goes on
            its way at once.
        size: most items a call.
    """

    def __init__(self, run: Callable[[Hashable, Sequence[Any]], Iterable[Any]], size: int) -> None:
        self._run = run
        self._size = size
        self._waiting: deque[tuple[Hashable, Any, asyncio.Future[Any]]] = deque()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._loop: asyncio.Task[None] | None = None

    async def submit(self, group: Hashable, item: Any) -> Any:
        """The result of one item. Whoever is cancelled before the model begins has cost nothing.

        Raises:
            Exception: what ``run`` raised, for every item of the call.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((group, item, future))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._take()
            if not batch:
                continue
            await loop.run_in_executor(self.thread, self._answer, loop, batch)

    def _answer(self, loop: asyncio.AbstractEventLoop, batch: list[tuple[Hashable, Any, asyncio.Future[Any]]]) -> None:
        """In the model's thread."""
        futures = deque(future for _, _, future in batch)
        try:
            for result in self._run(batch[0][0], [item for _, item, _ in batch]):
                loop.call_soon_threadsafe(_settle, futures.popleft(), result, None)
            assert not futures, "every item has a result"
        except Exception as error:  # noqa: BLE001  (it belongs to those who wait)
            for future in futures:
                loop.call_soon_threadsafe(_settle, future, None, error)

    def _take(self) -> list[tuple[Hashable, Any, asyncio.Future[Any]]]:
        """The next batch: the oldest item that is still wanted, and others of its group in the order they came."""
        batch: list[tuple[Hashable, Any, asyncio.Future[Any]]] = []
        left: deque[tuple[Hashable, Any, asyncio.Future[Any]]] = deque()
        for entry in self._waiting:
            if entry[2].done():  # cancelled
                continue
            fits = len(batch) < self._size and (not batch or entry[0] == batch[0][0])
            (batch if fits else left).append(entry)
        self._waiting = left
        return batch


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():  # whoever asked is gone
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
