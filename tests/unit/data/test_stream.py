"""The stream of batches: every pair once an epoch, the same for any number of workers, resumed at any step."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vilseg.config import ColumnsConfig
from vilseg.data.order import Chunk, PairOrder
from vilseg.data.pairs import BadPair, Shard, write_tar
from vilseg.data.stream import (
    BatchReader,
    decode_to_canvas,
    index_shards,
    pack,
    sample_pairs,
    unpack,
)
from vilseg.errors import DataError
from vilseg.text.nouns import NounPhrases

NOUNS = NounPhrases(("cat", "dog"), {"cat": 0, "dog": 1, "dogs": 1})


def decode(data: bytes, seed: int) -> np.ndarray:
    """Stands in for pictures: what depends on the bytes and the seed shows in the array."""
    if data == b"bad":
        raise DataError("its bytes say so")
    return np.array([data[0], seed % 251], dtype=np.uint8).reshape(1, 1, 2)


def tokenize(captions: Sequence[str]) -> np.ndarray:
    return np.array([[len(caption), sum(map(ord, caption)) % 1000] for caption in captions], dtype=np.int32)


def write_shards(folder: Path, sizes: Sequence[int], bad: Sequence[str] = ()) -> tuple[Shard, ...]:
    """Shards of pairs with the keys ``SHARD-NUMBER``; those in ``bad`` cannot be decoded."""
    for shard, size in enumerate(sizes):
        pairs = [
            (
                key := f"{shard}-{i}",
                b"bad" if key in bad else bytes([16 * shard + i]),
                "jpg",
                {"captions": [f"a dog {i}", "two dogs and a cat", f"{shard} cats"]},
            )
            for i in range(size)
        ]
        write_tar(f"{folder}/{shard}.tar", pairs)
    return index_shards(str(folder))


def reader(batch_size: int, **options: Any) -> BatchReader:
    return BatchReader(
        **{"batch_size": batch_size, "workers": 1, "seed": 5, "decode": decode, "tokenize": tokenize, **options}
    )


def steps_of(reader: BatchReader, chunks: Sequence[Chunk]) -> list[dict[str, np.ndarray]]:
    """Content of every step, the batches of its workers put together."""
    batches = [batch for chunk in chunks for batch in reader.read(chunk)]
    steps = []
    for start in range(0, len(batches), reader.workers):
        parts = batches[start : start + reader.workers]
        arrays = {n: np.concatenate([getattr(p, n) for p in parts]) for n in ("images", "tokens", "phrases", "seeds")}
        steps.append({**arrays, "keys": np.array([key for part in parts for key in part.keys])})
    return steps


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ------------------------------------------------------------------------------------------------------------ order


SIZES = st.lists(st.integers(0, 23), min_size=1, max_size=6).filter(any)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 17), seed=st.integers(0, 9), steps=st.integers(1, 40))
def test_every_pair_comes_once_an_epoch(sizes: list[int], batch_size: int, seed: int, steps: int) -> None:
    order = PairOrder(tuple(Shard(str(i), size) for i, size in enumerate(sizes)), batch_size, seed)
    chunks = list(order.chunks(0, steps))
    assert sum(chunk.steps for chunk in chunks) == steps
    assert [chunk.first_step for chunk in chunks] == [sum(c.steps for c in chunks[:i]) for i in range(len(chunks))]
    for chunk in chunks:
        assert sum(map(len, chunk.segments)) == chunk.steps * batch_size
    seen = Counter((s.epoch, s.uri, i) for chunk in chunks for s in chunk.segments for i in range(s.start, s.stop))
    assert set(seen.values()) == {1}
    whole = steps * batch_size // order.pairs
    for epoch in range(whole):
        assert sum(e == epoch for e, _, _ in seen) == order.pairs
    assert {epoch for epoch, _, _ in seen} <= set(range(whole + 1)), "an epoch begins when the one before is over"


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 17), first=st.integers(0, 30))
def test_chunks_from_a_later_step_are_those_of_the_whole_run(sizes: list[int], batch_size: int, first: int) -> None:
    order = PairOrder(tuple(Shard(str(i), size) for i, size in enumerate(sizes)), batch_size, 0)
    whole = [chunk for chunk in order.chunks(0, 31) if chunk.first_step + chunk.steps > first]
    later = list(order.chunks(first, 31))
    assert [(c.first_step, c.steps, c.segments) for c in later] == [(c.first_step, c.steps, c.segments) for c in whole]
    assert later[0].first_step + later[0].skip == first
    assert all(chunk.skip == 0 for chunk in later[1:])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    shards = tuple(Shard(str(i), 1) for i in range(30))

    def uris(seed: int, epoch: int) -> list[str]:
        chunks = PairOrder(shards, 30, seed).chunks(epoch, epoch + 1)
        return [segment.uri for chunk in chunks for segment in chunk.segments]

    orders = [uris(seed, epoch) for seed in range(2) for epoch in range(2)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == sorted(shard.uri for shard in shards) for order in orders)


def test_shards_without_a_pair_are_an_error() -> None:
    with pytest.raises(DataError, match="hold no pair"):
        PairOrder((Shard("a", 0),), 4, 0)


# ---------------------------------------------------------------------------------------------------------- reading


def test_an_epoch_is_read_once_and_shuffled(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [5, 9, 0, 2, 8])
    steps = steps_of(reader(6), list(PairOrder(shards, 6, 0).chunks(0, 8)))
    keys = [key for step in steps for key in step["keys"].tolist()]
    everything = Counter(f"{shard}-{i}" for shard, size in enumerate([5, 9, 0, 2, 8]) for i in range(size))
    assert Counter(keys[:24]) == Counter(keys[24:]) == everything
    assert keys[:24] != keys[24:]
    assert len({int(seed) for step in steps for seed in step["seeds"]}) == 48, "a pair has another seed in every epoch"


def test_a_step_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [7, 12, 3], bad=["1-4", "0-0"])
    chunks = list(PairOrder(shards, 4, 0).chunks(0, 11))
    alone = steps_of(reader(4, nouns=NOUNS), chunks)
    assert alone[0]["phrases"].max() == 1
    for workers in (2, 4):
        assert_same(steps_of(reader(4, workers=workers, nouns=NOUNS), chunks), alone)


@pytest.mark.parametrize("bad", [(), ("0-1", "1-0", "1-1", "1-7", "2-2")], ids=["good", "bad pairs"])
def test_a_run_resumes_at_any_step(tmp_path: Path, bad: tuple[str, ...]) -> None:
    order = PairOrder(write_shards(tmp_path, [7, 12, 3], bad=bad), 4, 0)
    unbroken = steps_of(reader(4, nouns=NOUNS), list(order.chunks(0, 12)))
    for step in range(12):
        assert_same(steps_of(reader(4, nouns=NOUNS), list(order.chunks(step, 12))), unbroken[step:])


def test_captions_and_seeds_follow_from_seed_epoch_and_key(tmp_path: Path) -> None:
    order = PairOrder(write_shards(tmp_path, [6]), 6, 0)
    first, again, other = (steps_of(reader(6, seed=seed), list(order.chunks(0, 3))) for seed in (1, 1, 2))
    assert_same(first, again)
    seeds = [dict(zip(s["keys"].tolist(), s["seeds"].tolist(), strict=True)) for s in (*first, *other)]
    assert len({of_step["0-1"] for of_step in seeds}) == 6
    captions = {tuple(row) for step in first for row in step["tokens"].tolist()}
    assert len(captions) > 3, "over the epochs a pair is seen with several of its captions"


# --------------------------------------------------------------------------------------------------------- bad pairs


def reports(collected: list[tuple[int, list[BadPair]]]) -> Callable[[int, list[BadPair]], None]:
    return lambda read, bad: collected.append((read, list(bad)))


def test_bad_pairs_are_replaced_and_reported(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [8, 8], bad=["0-3", "1-5"])
    told: list[tuple[int, list[BadPair]]] = []
    steps = steps_of(reader(4, report=reports(told)), list(PairOrder(shards, 4, 0).chunks(0, 4)))
    assert [len(step["keys"]) for step in steps] == [4] * 4
    keys = Counter(key for step in steps for key in step["keys"].tolist())
    assert not {"0-3", "1-5"} & keys.keys()
    assert sum(keys.values()) == 16
    assert len(keys) == 14
    assert sorted(bad.key for _, pairs in told for bad in pairs) == ["0-3", "1-5"]
    assert all(bad.reason == "its bytes say so" for _, pairs in told for bad in pairs)
    assert sum(read for read, _ in told) == 16


def test_a_shard_that_has_shrunk_is_reported_and_made_up_for(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [6])
    told: list[tuple[int, list[BadPair]]] = []
    steps = steps_of(reader(8, report=reports(told)), list(PairOrder((Shard(shard.uri, 8),), 8, 0).chunks(0, 1)))
    assert len(steps[0]["keys"]) == 8
    assert [bad.reason for _, pairs in told for bad in pairs] == ["2 pairs fewer than when the run began"]


def test_nothing_readable_is_an_error_that_names_the_shard(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3], bad=["0-0", "0-1", "0-2"])
    told: list[tuple[int, list[BadPair]]] = []
    with pytest.raises(DataError, match=r"no readable pair in .*0\.tar; the first failed because its bytes say so"):
        steps_of(reader(3, report=reports(told)), list(PairOrder(shards, 3, 0).chunks(0, 1)))
    assert len(told[-1][1]) == 3


def test_the_report_may_stop_the_run(tmp_path: Path) -> None:
    def stop(read: int, bad: list[BadPair]) -> None:
        raise DataError(f"{len(bad)} of {read} pairs are bad")

    shards = write_shards(tmp_path, [8], bad=["0-3"])
    with pytest.raises(DataError, match="pairs are bad"):
        steps_of(reader(4, report=stop), list(PairOrder(shards, 4, 0).chunks(0, 2)))


# ----------------------------------------------------------------------------------------------------------- batches


def test_batches_survive_being_a_row_of_a_table(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [12])
    batches = list(reader(4, nouns=NOUNS).read(next(PairOrder(shards, 4, 0).chunks(0, 3))))
    row = pack(batches)
    assert {len(column) for column in row.values()} == {1}
    again = list(unpack(row))
    assert [batch.keys for batch in again] == [batch.keys for batch in batches]
    for one, other in zip(again, batches, strict=True):
        for name in ("images", "tokens", "phrases", "seeds"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_pictures_are_cropped_to_the_canvas_by_their_seed() -> None:
    x = np.linspace(0, 255, 60).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(np.repeat(x[None, :, None], 3, 2), 40, 0)).save(buffer, "PNG")
    left, right = (decode_to_canvas(buffer.getvalue(), seed, canvas=20, max_pixels=10**6) for seed in (0, 0xFFFF))
    assert left.shape == right.shape == (20, 20, 3)
    assert left.mean() < 100 < 150 < right.mean()


def test_a_sample_of_pairs_stops_at_its_limit(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3, 4])
    good, bad = sample_pairs(shards, ColumnsConfig(), 5)
    assert [pair.key for pair in good] == ["0-0", "0-1", "0-2", "1-0", "1-1"]
    assert bad == []
