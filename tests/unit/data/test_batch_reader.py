"""The stream of batches: every pair once an epoch, the same for any number of workers, resumed at any step."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.flaky_store import FlakyStore
from vilseg import storage
from vilseg.config.data import ColumnsConfig, FiltersConfig
from vilseg.data import shards as shards_module
from vilseg.data.batch_reader import BatchReader, _pair_seed, decode_to_canvas, index_shards, pack, sample_pairs, unpack
from vilseg.data.sampler import PairSampler, ReadTask
from vilseg.data.shards import BadPair, Shard, write_tar
from vilseg.data.text_selection import TextSelector
from vilseg.errors import DataError
from vilseg.text.noun_phrases import NounPhrases

NOUNS = NounPhrases(("cat", "dog"), {"cat": 0, "dog": 1, "dogs": 1})


def decode(data: bytes, seed: int) -> np.ndarray:
    """Decode bytes to an array that depends on the bytes and the seed."""
    if data == b"bad":
        raise DataError("its bytes say so")
    return np.array([data[0], seed % 251], dtype=np.uint8).reshape(1, 1, 2)


def tokenize(captions: Sequence[str]) -> np.ndarray:
    return np.array([[len(caption), sum(map(ord, caption)) % 1000] for caption in captions], dtype=np.int32)


def write_shards(
    folder: Path | str, sizes: Sequence[int], bad: Sequence[str] = (), *, source: str = ""
) -> tuple[Shard, ...]:
    """Write shards of pairs with the keys ``SHARD-NUMBER``; those in ``bad`` cannot be decoded."""
    for shard, size in enumerate(sizes):
        pairs = [
            (
                key := f"{shard}-{i}",
                b"bad" if key in bad else bytes([(16 * shard + i) % 256]),
                "jpg",
                {"captions": [f"a dog {i}", "two dogs and a cat", f"{shard} cats"]},
            )
            for i in range(size)
        ]
        write_tar(f"{folder}/{shard}.tar", pairs)
    return index_shards(str(folder), name=source)


def reader(batch_size: int, **options: Any) -> BatchReader:
    return BatchReader(
        **{"batch_size": batch_size, "workers": 1, "seed": 5, "decode": decode, "tokenize": tokenize, **options}
    )


def steps_of(reader: BatchReader, tasks: Sequence[ReadTask]) -> list[dict[str, np.ndarray]]:
    """Return the content of every step, the batches of its workers concatenated."""
    batches = [batch for task in tasks for batch in reader.read(task)]
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


# ---------------------------------------------------------------------------------------------------------- reading


def test_an_epoch_is_read_once_and_shuffled(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [5, 9, 0, 2, 8])
    steps = steps_of(reader(6), list(PairSampler(shards, 6, 0).read_tasks(0, 8)))
    keys = [key for step in steps for key in step["keys"].tolist()]
    everything = Counter(f"{shard}-{i}" for shard, size in enumerate([5, 9, 0, 2, 8]) for i in range(size))
    assert Counter(keys[:24]) == Counter(keys[24:]) == everything
    assert keys[:24] != keys[24:]
    assert len({int(seed) for step in steps for seed in step["seeds"]}) == 48, "a pair has another seed in every epoch"


def test_a_step_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [7, 12, 3], bad=["1-4", "0-0"])
    tasks = list(PairSampler(shards, 4, 0).read_tasks(0, 11))
    alone = steps_of(reader(4, nouns=NOUNS), tasks)
    assert alone[0]["phrases"].max() == 1
    for workers in (2, 4):
        assert_same(steps_of(reader(4, workers=workers, nouns=NOUNS), tasks), alone)


@pytest.mark.parametrize("bad", [(), ("0-1", "1-0", "1-1", "1-7", "2-2")], ids=["good", "bad pairs"])
def test_a_run_resumes_at_any_step(tmp_path: Path, bad: tuple[str, ...]) -> None:
    order = PairSampler(write_shards(tmp_path, [7, 12, 3], bad=bad), 4, 0)
    unbroken = steps_of(reader(4, nouns=NOUNS), list(order.read_tasks(0, 12)))
    for step in range(12):
        assert_same(steps_of(reader(4, nouns=NOUNS), list(order.read_tasks(step, 12))), unbroken[step:])


RAGGED = [7, 1, 0, 12, 4, 9]
EVERYTHING = [f"{shard}-{i}" for shard, size in enumerate(RAGGED) for i in range(size)]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("mixed", [1, 3])
@pytest.mark.parametrize("broken_at", [None, 7])
def test_every_pair_comes_once_an_epoch_over_all_workers(
    tmp_path: Path, workers: int, mixed: int, broken_at: int | None
) -> None:
    order = PairSampler(write_shards(tmp_path, RAGGED), 6, 0, mixed)
    steps, own = 3 * order.pairs // 6 + 1, reader(6, workers=workers)
    if broken_at is None:
        read = steps_of(own, list(order.read_tasks(0, steps)))
    else:
        # The first try is lost in the middle of a task; what it had read ahead is read again.
        read = steps_of(own, list(order.read_tasks(0, steps)))[:broken_at]
        read += steps_of(own, list(order.read_tasks(broken_at, steps)))
    assert all(len(step["keys"]) == 6 for step in read)
    seeds = {_pair_seed(5, epoch, key): (epoch, key) for epoch in range(4) for key in EVERYTHING}
    found = Counter(seeds[seed] for step in read for seed in step["seeds"].tolist())
    assert set(found.values()) == {1}
    assert [sum(epoch == e for epoch, _ in found) for e in range(3)] == [len(EVERYTHING)] * 3
    assert sum(epoch == 3 for epoch, _ in found) == 6 * steps - 3 * len(EVERYTHING)


@pytest.mark.parametrize("bad", [(), ("0-1", "3-0", "3-1", "4-2")], ids=["good", "bad pairs"])
def test_a_run_with_mixed_shards_resumes_at_any_step(tmp_path: Path, bad: tuple[str, ...]) -> None:
    order = PairSampler(write_shards(tmp_path, RAGGED, bad=bad), 4, 0, 3)
    unbroken = steps_of(reader(4, nouns=NOUNS), list(order.read_tasks(0, 20)))
    for step in range(20):
        assert_same(steps_of(reader(4, nouns=NOUNS), list(order.read_tasks(step, 20))), unbroken[step:])


def test_sources_are_read_by_weight_and_their_keys_told_apart(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "a", [5, 8], bad=["0-2"], source="photos")
    shards += write_shards(tmp_path / "b", [6, 4], bad=["1-1"], source="scenes")
    order = PairSampler(shards, 6, 0, 2, {"photos": 2.0, "scenes": 1.0})
    told: list[tuple[int, list[BadPair]]] = []
    alone = steps_of(reader(6, report=reports(told)), list(order.read_tasks(0, 13)))
    keys = Counter(key.partition("/")[0] for step in alone for key in step["keys"].tolist())
    assert keys.keys() == {"photos", "scenes"}
    assert keys["photos"] == pytest.approx(52, abs=3), "two of three, but for what stands in for bad pairs"
    assert {bad.key for _, pairs in told for bad in pairs} == {"photos/0-2", "scenes/1-1"}
    assert len({seed for step in alone for seed in step["seeds"].tolist()}) > 70, "equal keys have seeds of their own"
    assert_same(steps_of(reader(6, workers=3), list(order.read_tasks(0, 13))), alone)
    assert_same(steps_of(reader(6), list(order.read_tasks(5, 13))), alone[5:])


def test_a_shard_goes_on_where_the_store_failed(flaky_store: FlakyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_BUFFER", 512)  # or a shard this small is read at once
    order = PairSampler(write_shards("s3://bucket/pairs", [12, 12, 12]), 4, 0, 3)
    tasks = list(order.read_tasks(0, 9))
    unbroken = steps_of(reader(4), tasks)
    flaky_store.opened.clear()
    breaks = iter([2])

    def break_after_first_window(read: int, bad: list[BadPair]) -> None:
        assert not bad
        if read:
            flaky_store.away(next(breaks, 0))

    assert_same(steps_of(reader(4, report=break_after_first_window), tasks), unbroken)
    assert sorted(Counter(flaky_store.opened).values()) == [1, 1, 2], "the connection that broke is made once more"


def test_captions_and_seeds_follow_from_seed_epoch_and_key(tmp_path: Path) -> None:
    order = PairSampler(write_shards(tmp_path, [6]), 6, 0)
    first, again, other = (steps_of(reader(6, seed=seed), list(order.read_tasks(0, 3))) for seed in (1, 1, 2))
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
    steps = steps_of(reader(4, report=reports(told)), list(PairSampler(shards, 4, 0).read_tasks(0, 4)))
    assert [len(step["keys"]) for step in steps] == [4] * 4
    keys = Counter(key for step in steps for key in step["keys"].tolist())
    assert not {"0-3", "1-5"} & keys.keys()
    assert sum(keys.values()) == 16
    assert len(keys) == 14
    assert sorted(bad.key for _, pairs in told for bad in pairs) == ["0-3", "1-5"]
    assert all(bad.reason == "its bytes say so" for _, pairs in told for bad in pairs)
    assert sum(read for read, _ in told) == 16


def test_bad_pairs_of_equal_keys_are_told_apart_by_their_shards(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(
            f"{tmp_path}/{name}", [(str(i), b"bad" if i == 2 else b"x", "jpg", {"caption": "a"}) for i in range(4)]
        )
    told: list[tuple[int, list[BadPair]]] = []
    steps_of(reader(4, report=reports(told)), list(PairSampler(index_shards(str(tmp_path)), 4, 0).read_tasks(0, 2)))
    assert sorted((bad.key, bad.shard) for _, pairs in told for bad in pairs) == [
        ("2", f"{tmp_path}/a.tar"),
        ("2", f"{tmp_path}/b.tar"),
    ]


def test_bad_pairs_are_never_ahead_of_the_good_ones_read_with_them(tmp_path: Path) -> None:
    write_tar(
        f"{tmp_path}/0.tar",
        ((str(i), bytes([i]), "jpg", {"caption": "" if i in (3, 9) else "a dog"}) for i in range(32)),
    )
    shards = index_shards(str(tmp_path))
    told: list[tuple[int, list[BadPair]]] = []
    steps_of(reader(8, report=reports(told)), list(PairSampler(shards, 8, 0).read_tasks(0, 4)))
    read = bad = 0
    for more, worse in told:
        read, bad = read + more, bad + len(worse)
        assert bad <= read * 2 / 32


def test_a_shard_that_has_shrunk_is_reported_and_made_up_for(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [6])
    told: list[tuple[int, list[BadPair]]] = []
    steps = steps_of(reader(8, report=reports(told)), list(PairSampler((Shard(shard.uri, 8),), 8, 0).read_tasks(0, 1)))
    assert len(steps[0]["keys"]) == 8
    assert [bad.reason for _, pairs in told for bad in pairs] == ["2 pairs fewer than when the run began"]


def test_nothing_readable_is_an_error_that_names_the_shard(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3], bad=["0-0", "0-1", "0-2"])
    told: list[tuple[int, list[BadPair]]] = []
    with pytest.raises(DataError, match=r"no readable pair in .*0\.tar; the first failed because its bytes say so"):
        steps_of(reader(3, report=reports(told)), list(PairSampler(shards, 3, 0).read_tasks(0, 1)))
    assert len(told[-1][1]) == 3


def test_filters_that_leave_nothing_are_an_error_that_says_so(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3])
    selector = TextSelector(filters=FiltersConfig(min_words=9))
    with pytest.raises(
        DataError, match=r"data\.filters leave out every pair of .*0\.tar.*no text passes.*shuffle_shards"
    ):
        steps_of(reader(3, selector=selector), list(PairSampler(shards, 3, 0).read_tasks(0, 1)))


def test_the_report_may_stop_the_run(tmp_path: Path) -> None:
    def stop(read: int, bad: list[BadPair]) -> None:
        raise DataError(f"{len(bad)} of {read} pairs are bad")

    shards = write_shards(tmp_path, [8], bad=["0-3"])
    with pytest.raises(DataError, match="pairs are bad"):
        steps_of(reader(4, report=stop), list(PairSampler(shards, 4, 0).read_tasks(0, 2)))


# ----------------------------------------------------------------------------------------------------------- batches


def test_batches_survive_being_a_row_of_a_table(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [12])
    batches = list(reader(4, nouns=NOUNS).read(next(PairSampler(shards, 4, 0).read_tasks(0, 3))))
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


def test_a_sample_of_pairs_is_taken_from_all_over_the_set(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [4, 0, 8, 4])
    good, bad = sample_pairs(shards, ColumnsConfig(), 8)
    assert [pair.key for pair in good] == ["0-0", "0-1", "2-0", "2-1", "2-2", "2-3", "3-0", "3-1"]
    assert bad == []
    everything, _ = sample_pairs(shards, ColumnsConfig(), 100)
    assert len(everything) == 16


def test_a_sample_of_many_shards_reads_few(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [2] * 45)
    good, _ = sample_pairs(shards, ColumnsConfig(), 30)
    numbers = {storage.name(shard.uri).removesuffix(".tar"): place for place, shard in enumerate(shards)}
    read = sorted({numbers[pair.key.partition("-")[0]] for pair in good})
    assert len(good) == 30
    assert len(read) == 20
    assert max(b - a for a, b in pairwise([0, *read, 45])) <= 3
    everything, _ = sample_pairs(shards, ColumnsConfig(), 1000)
    assert len(everything) == 90
