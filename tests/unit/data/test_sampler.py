"""The order of pairs: every pair once an epoch, shards mixed, sources by weight, the same from any step on."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilseg.data.sampler import PairSampler, ReadTask, apportion
from vilseg.data.shards import Shard
from vilseg.errors import DataError

SIZES = st.lists(st.integers(0, 23), min_size=1, max_size=7).filter(any)
WEIGHTS = st.sampled_from([0.01, 0.1, 0.3, 0.5, 1.0, 2.5, 7.0])


def shards_of(sizes: Sequence[int], source: str = "") -> tuple[Shard, ...]:
    return tuple(Shard(f"{source}{number}", size, source) for number, size in enumerate(sizes))


def pairs_of(tasks: Sequence[ReadTask]) -> list[tuple[str, int, str, int]]:
    """Return (source, epoch, shard, position) of every pair."""
    return [(s.source, s.epoch, s.uri, i) for c in tasks for s in c.segments for i in range(s.start, s.stop)]


# -------------------------------------------------------------------------------------------------------- apportion


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_kinds_are_spread_as_sorting_their_places_spreads_them(weights: list[int]) -> None:
    count = 3 * sum(weights)
    row = sorted(
        (Fraction(2 * item + 1, 2 * weight), kind) for kind, weight in enumerate(weights) for item in range(4 * weight)
    )
    for some in (0, 1, 2, count // 2, sum(weights), count):
        found = Counter(kind for _, kind in row[:some])
        assert apportion(weights, some) == [found[kind] for kind in range(len(weights))]
    assert apportion(weights, sum(weights)) == weights


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 10**10))
def test_shares_never_fall_and_are_off_by_half_the_number_of_kinds(weights: list[int], count: int) -> None:
    now, then = apportion(weights, count), apportion(weights, count + 1)
    assert sum(now) == count
    assert sorted(b - a for a, b in zip(now, then, strict=True)) == [0] * (len(weights) - 1) + [1]
    for share, weight in zip(now, weights, strict=True):
        assert abs(share - count * weight / sum(weights)) <= max(1, len(weights) / 2)


# --------------------------------------------------------------------------------------------------- shards, mixed


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 17), mixed=st.integers(1, 9), steps=st.integers(1, 40))
def test_every_pair_comes_once_an_epoch(sizes: list[int], batch_size: int, mixed: int, steps: int) -> None:
    order = PairSampler(shards_of(sizes), batch_size, 0, mixed)
    tasks = list(order.read_tasks(0, steps))
    windows = [window for task in tasks for window in task.windows]
    assert [w.first_step for w in windows] == [0, *accumulate(w.steps for w in windows)][:-1]
    assert all(sum(map(len, window.segments)) == window.steps * batch_size for window in windows)
    pairs = pairs_of(tasks)
    assert len(set(pairs)) == len(pairs) == steps * batch_size
    whole = len(pairs) // order.pairs
    for epoch in range(whole):
        # What one epoch has is a stretch of the stream: no epoch begins before the one before is over.
        assert {e for _, e, _, _ in pairs[epoch * order.pairs : (epoch + 1) * order.pairs]} == {epoch}


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, others=SIZES, mixed=st.integers(1, 5), weight=WEIGHTS, first=st.integers(0, 30))
def test_the_stream_from_a_later_step_is_that_of_the_whole_run(
    sizes: list[int], others: list[int], mixed: int, weight: float, first: int
) -> None:
    shards = shards_of(sizes, "a") + shards_of(others, "b")
    order = PairSampler(shards, 6, 0, mixed, {"a": 1.0, "b": weight})
    whole = [task for task in order.read_tasks(0, 31) if task.first_step + task.steps > first]
    later = list(order.read_tasks(first, 31))
    assert [(c.first_step, c.windows) for c in later] == [(c.first_step, c.windows) for c in whole]
    assert later[0].first_step + later[0].skip == first
    assert all(task.skip == 0 for task in later[1:])


def test_a_shard_is_read_once_and_on_from_where_it_was() -> None:
    order = PairSampler(shards_of([100, 90, 110, 70, 100, 1, 0, 80]), 8, 0, 4)
    tasks = list(order.read_tasks(0, 150))
    for task in tasks:
        ends: dict[tuple[str, int], int] = {}
        for segment in task.segments:
            place = segment.uri, segment.epoch
            assert segment.start == ends.get(place, segment.start)
            ends[place] = segment.stop
    begun_inside = [s for task in tasks for s in task.windows[0].segments if s.start]
    # Only what the batch before borrowed is passed over.
    assert all(segment.start < 8 for segment in begun_inside)


@pytest.mark.parametrize("mixed", [1, 4, 12])
def test_windows_hold_pairs_of_so_many_shards_and_are_no_larger_than_one(mixed: int) -> None:
    order = PairSampler(shards_of([60] * 24), 10, 0, mixed)
    windows = [window for task in order.read_tasks(0, 24 * 6) for window in task.windows]
    assert {len({segment.uri for segment in window.segments}) for window in windows} == {mixed}
    assert {sum(map(len, window.segments)) for window in windows} == {60}


def test_shards_sorted_by_topic_make_mixed_batches() -> None:
    """Count the topics in batches of 32 from shards of one topic each, shuffled as a window is."""
    topics = {}
    for mixed in (1, 8):
        order = PairSampler(shards_of([320] * 16), 32, 0, mixed)
        found = []
        for task in order.read_tasks(0, 160):
            for window in task.windows:
                pool = np.repeat([s.uri for s in window.segments], [len(s) for s in window.segments])
                np.random.default_rng(window.first_step).shuffle(pool)
                found += [len(set(batch)) for batch in pool.reshape(window.steps, 32)]
        topics[mixed] = np.mean(found)
    assert topics[1] == 1
    assert topics[8] > 7


# ------------------------------------------------------------------------------------------------------------- mixes


@settings(max_examples=80, deadline=None)
@given(
    sources=st.lists(st.tuples(SIZES, WEIGHTS), min_size=1, max_size=4),
    batch_size=st.integers(1, 17),
    mixed=st.integers(1, 5),
    steps=st.integers(1, 60),
)
def test_sources_give_their_shares_and_have_epochs_of_their_own(
    sources: list[tuple[list[int], float]], batch_size: int, mixed: int, steps: int
) -> None:
    names = [f"source{number}" for number in range(len(sources))]
    weights = {name: weight for name, (_, weight) in zip(names, sources, strict=True)}
    shards = [shard for name, (sizes, _) in zip(names, sources, strict=True) for shard in shards_of(sizes, name)]
    order = PairSampler(tuple(shards), batch_size, 0, mixed, weights)
    tasks = list(order.read_tasks(0, steps))
    pairs = pairs_of(tasks)
    assert len(set(pairs)) == len(pairs) == steps * batch_size
    for window in (window for task in tasks for window in task.windows):
        done = (window.first_step + window.steps) * batch_size
        drawn = Counter(source for source, *_ in pairs[:done])
        for name in names:
            share = weights[name] / sum(weights.values())
            assert abs(drawn[name] - share * done) <= max(1, len(names) / 2)
    for name, (sizes, _) in zip(names, sources, strict=True):
        own = [pair for pair in pairs if pair[0] == name]
        for epoch in range(len(own) // sum(sizes)):
            part = own[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]
            assert {e for _, e, _, _ in part} == {epoch}
        assert order.epochs(len(pairs))[name] == len(own) / sum(sizes)


def test_little_is_passed_over_of_a_source_that_gives_little() -> None:
    shards = shards_of([100] * 30, "large") + shards_of([100] * 30, "small")
    order = PairSampler(shards, 10, 0, 4, {"large": 0.9, "small": 0.1})
    tasks = list(order.read_tasks(0, 1000))
    firsts = [segment for task in tasks for segment in {(s.uri, s.epoch): s for s in task.segments[::-1]}.values()]
    passed_over = sum(segment.start for segment in firsts)
    assert passed_over < 0.25 * len(pairs_of(tasks)), "each task reads its shards of the small source from their starts"


def test_one_source_alone_is_as_without_a_mix() -> None:
    sizes = [7, 12, 3, 0, 9]
    alone = pairs_of(list(PairSampler(shards_of(sizes), 4, 3).read_tasks(0, 20)))
    named = pairs_of(list(PairSampler(shards_of(sizes, "x"), 4, 3, 1, {"x": 0.3}).read_tasks(0, 20)))
    assert [(e, uri, i) for _, e, uri, i in alone] == [(e, uri.removeprefix("x"), i) for _, e, uri, i in named]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def uris(seed: int, epoch: int) -> list[str]:
        tasks = PairSampler(shards_of([1] * 30), 30, seed).read_tasks(epoch, epoch + 1)
        return [segment.uri for task in tasks for segment in task.segments]

    orders = [uris(seed, epoch) for seed in range(2) for epoch in range(2)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == sorted(map(str, range(30))) for order in orders)


def test_two_sources_of_equal_shards_have_orders_of_their_own() -> None:
    shards = shards_of([1] * 20, "a") + shards_of([1] * 20, "b")
    pairs = pairs_of(list(PairSampler(shards, 4, 0, 1, {"a": 1.0, "b": 1.0}).read_tasks(0, 10)))
    a, b = ([uri[1:] for source, _, uri, _ in pairs if source == name] for name in "ab")
    assert sorted(a) == sorted(b)
    assert a != b


def test_shards_without_a_pair_are_an_error() -> None:
    with pytest.raises(DataError, match="hold no pair"):
        PairSampler((Shard("a", 0),), 4, 0)
    with pytest.raises(DataError, match=r"hold no pair at b of data\.mix"):
        PairSampler((Shard("a", 3, "a"), Shard("b", 0, "b")), 4, 0, 1, {"a": 1.0, "b": 1.0})


def test_tasks_are_covered_without_a_gap() -> None:
    tasks = list(PairSampler(shards_of([7, 12, 3]), 4, 0, 2).read_tasks(0, 30))
    assert all(a.first_step + a.steps == b.first_step for a, b in pairwise(tasks))
