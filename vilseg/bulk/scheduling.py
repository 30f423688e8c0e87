"""Scheduling of inputs in blocks: a block is a group of inputs that one worker processes and that is repeated if it dies.

A block has an overhead of some hundredths of a second, so blocks should be large, but all workers should start at once
and finish together. Block size therefore grows with the number of listed inputs. The last inputs are held back until the
listing ends, and are then scheduled in blocks of decreasing size (guided self-scheduling, Polychronopoulos and Kuck 1987).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from vilseg.bulk.containers import Container, Input

_SMALLEST, _LARGEST = 16, 256
_LAST = 8
_GROWTH = 16
"""Number of listed inputs for which the block size grows by one, from `_SMALLEST` to `_LARGEST`."""
_KEPT_BACK = 4
"""Until the listing ends, 1 / `_KEPT_BACK` of the listed inputs is held back, but at most 2 * `_LARGEST` per worker."""
_IN_CONTAINER = 64
"""Maximum number of container members in one block."""
_BYTES = 64 << 20
"""Approximate maximum bytes of container members in one block, and of inputs held back."""


def cut(found: Iterable[Input | Container], workers: int) -> Iterator[list[Input] | Container]:
    """Yield inputs in blocks while they are listed; a container is yielded as it is, and a video as a block of one input.

    Args:
        found: inputs and containers from the listing.
        workers: number of workers that process the blocks.
    """
    waiting: deque[Input] = deque()
    listed, held_bytes, size = 0, 0, _SMALLEST
    for one in found:
        if isinstance(one, Container):
            yield one
            continue
        listed += 1
        if _is_video(one):
            yield [one]
            continue
        waiting.append(one)
        held_bytes += _bytes(one)
        size = min(_LARGEST, _SMALLEST + listed // _GROWTH)
        if held_bytes > _BYTES or len(waiting) >= size + min(listed // _KEPT_BACK, 2 * workers * _LARGEST):
            block = _take(_drain(waiting), size)
            held_bytes -= sum(map(_bytes, block))
            yield block
    while waiting:
        yield _take(_drain(waiting), max(_LAST, min(size, len(waiting) // (2 * workers))))


def cut_container(inputs: Iterable[Input]) -> Iterator[list[Input]]:
    """Split the contents of a container into blocks of bounded size."""
    coming = iter(inputs)
    while block := _take(coming, _IN_CONTAINER):
        yield from _videos_apart(block)


def _videos_apart(block: list[Input]) -> Iterator[list[Input]]:
    # A video takes as long as a whole block, and the rows of images should not wait for it.
    images = [item for item in block if not _is_video(item)]
    yield from ([images] if images else [])
    yield from ([item] for item in block if _is_video(item))


def _is_video(item: Input) -> bool:
    return item.problem is None and item.kind == "video"


def _bytes(item: Input) -> int:
    return len(item.data or b"")


def _drain(waiting: deque[Input]) -> Iterator[Input]:
    while waiting:
        yield waiting.popleft()


def _take(inputs: Iterator[Input], most: int) -> list[Input]:
    block: list[Input] = []
    size = 0
    for item in itertools.islice(inputs, most):
        block.append(item)
        size += _bytes(item)
        if size > _BYTES:
            break
    return block
