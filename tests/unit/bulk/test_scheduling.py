"""Blocks: every input in one, small at both ends, nothing read ahead of need."""

import itertools
from collections.abc import Iterator

import pytest

from vilseg.bulk.containers import Container, Input
from vilseg.bulk.scheduling import cut, cut_container


def inputs(count: int, *, suffix: str = "jpg", data: bytes | None = None) -> list[Input]:
    return [Input(f"{number:06d}.{suffix}", f"/archive/{number:06d}.{suffix}", data=data) for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 500, 20_000])
@pytest.mark.parametrize("workers", [1, 2, 64])
def test_every_input_is_in_one_block_in_order(count: int, workers: int) -> None:
    blocks = list(cut(inputs(count), workers))
    assert all(isinstance(block, list) and 0 < len(block) <= 256 for block in blocks)
    assert list(itertools.chain.from_iterable(blocks)) == inputs(count)


def test_all_workers_begin_early_and_end_together() -> None:
    sizes = [len(block) for block in cut(inputs(20_000), 2)]
    assert sizes[0] < 20
    assert max(sizes) == 256
    tail = sizes[-8:]
    assert tail == sorted(tail, reverse=True)
    # What one worker still has when the other ends is little beside all.
    assert tail[-1] <= 8
    assert len(sizes) < 20_000 / 100


def test_a_long_listing_is_not_waited_for() -> None:
    seen = []

    def listing() -> Iterator[Input]:
        for item in inputs(100_000):
            seen.append(item.name)
            yield item

    blocks = cut(listing(), 2)
    next(blocks)
    assert len(seen) < 30
    for _ in range(300):
        next(blocks)
    given = 300 * 256
    assert len(seen) < given, "what is kept back is bounded"


def test_a_video_is_a_block_of_its_own() -> None:
    mixed = [*inputs(3), *inputs(2, suffix="mp4"), *inputs(2)]
    films, pictures = inputs(2, suffix="mp4"), [*inputs(3), *inputs(2)]
    assert list(cut(mixed, 1)) == [films[:1], films[1:], pictures]
    assert list(cut_container(mixed)) == [pictures, films[:1], films[1:]]


def test_containers_pass() -> None:
    tar = Container("a.tar", "/archive/a.tar")
    assert list(cut([tar, *inputs(2), tar], 1)) == [tar, tar, inputs(2)]


def test_bytes_of_a_container_are_bounded() -> None:
    large = inputs(10, data=bytes(20 << 20))
    assert [len(block) for block in cut_container(large)] == [4, 4, 2]
    assert [len(block) for block in cut_container(inputs(150, data=b"x"))] == [64, 64, 22]
    held = []

    def opened() -> Iterator[Input]:
        for item in inputs(500, data=bytes(1 << 20)):
            held.append(item)
            yield item

    given = 0
    for block in cut(opened(), 64):
        assert len(held) - given < 100, "megabytes held"
        given += len(block)
    assert given == 500
