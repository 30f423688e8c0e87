"""Dynamic batching: items that wait while the model is busy share its next pass."""

import asyncio
import threading
from collections.abc import Hashable, Sequence

import pytest

from serve.batching import Batcher


class Model:
    """Doubles numbers; the first pass waits until it may go on."""

    def __init__(self) -> None:
        self.passes: list[tuple[Hashable, list[int]]] = []
        self.go = threading.Event()

    def __call__(self, group: Hashable, items: Sequence[int]) -> list[int]:
        self.passes.append((group, list(items)))
        if len(self.passes) == 1:
            assert self.go.wait(10)
        if -1 in items:
            raise ValueError("a negative number")
        return [2 * item for item in items]


def run(scenario: object) -> None:
    asyncio.run(asyncio.wait_for(scenario, 20))  # type: ignore[arg-type]


def test_a_lonely_item_waits_for_nobody_and_those_who_wait_are_taken_together() -> None:
    async def scenario() -> None:
        model = Model()
        batcher = Batcher(model, size=4)
        tasks = [asyncio.create_task(batcher.submit("m", 0))]
        await asyncio.sleep(0.05)
        assert model.passes == [("m", [0])]
        tasks += [asyncio.create_task(batcher.submit("m", number)) for number in range(1, 7)]
        await asyncio.sleep(0.05)
        model.go.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10, 12]
        assert [items for _, items in model.passes] == [[0], [1, 2, 3, 4], [5, 6]]

    run(scenario())


def test_groups_are_never_mixed_and_the_oldest_comes_first() -> None:
    async def scenario() -> None:
        model = Model()
        batcher = Batcher(model, size=4)
        tasks = [asyncio.create_task(batcher.submit("a", 0))]
        await asyncio.sleep(0.05)
        for group, item in (("b", 1), ("a", 2), ("b", 3), ("a", 4)):
            tasks.append(asyncio.create_task(batcher.submit(group, item)))
        await asyncio.sleep(0.05)
        model.go.set()
        await asyncio.gather(*tasks)
        assert model.passes == [("a", [0]), ("b", [1, 3]), ("a", [2, 4])]

    run(scenario())


def test_who_is_cancelled_before_the_model_begins_costs_nothing() -> None:
    async def scenario() -> None:
        model = Model()
        batcher = Batcher(model, size=4)
        first = asyncio.create_task(batcher.submit("m", 0))
        await asyncio.sleep(0.05)
        gone, stays = (asyncio.create_task(batcher.submit("m", number)) for number in (1, 2))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0)
        model.go.set()
        assert await asyncio.gather(first, stays) == [0, 4]
        assert model.passes == [("m", [0]), ("m", [2])]

    run(scenario())


def test_an_error_reaches_those_of_its_batch_and_the_next_batch_runs() -> None:
    async def scenario() -> None:
        model = Model()
        batcher = Batcher(model, size=2)
        model.go.set()
        with pytest.raises(ValueError, match="negative"):
            await batcher.submit("m", -1)
        assert await batcher.submit("m", 5) == 10

    run(scenario())
