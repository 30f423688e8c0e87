"""Parts become one table: ordered, each path once, duplicates with the outcome of the first."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from vilseg.bulk import results_table
from vilseg.bulk.results_table import Names, merge, names_done, read_results, write_part


def row(path: str, **values: Any) -> dict[str, Any]:
    about = {"status": "ok", "sha256": path * 2, "classes": ["cat"], "areas": [len(path)], "scores": [0.5]}
    return {"path": path, "rle": ["x"], **about, **values}


def table(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "results.parquet").to_pylist()


@pytest.mark.parametrize("seed", range(5))
def test_parts_in_any_arrangement_give_one_ordered_table(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_table, "_GROUP", 7)
    chance = random.Random(seed)
    names = [f"{chance.choice('abÄ日')}/{number}.jpg" for number in range(100)]
    wanted = sorted(names)
    chance.shuffle(names)
    while names:
        size = chance.randint(1, 20)
        write_part(str(tmp_path), [row(name) for name in names[:size]])
        names = names[chance.randint(1, size) :]  # some are done twice
    assert merge(str(tmp_path)) == 100
    assert [found["path"] for found in table(tmp_path)] == wanted
    assert not (tmp_path / "parts").exists()


def test_a_later_part_adds_to_the_table(tmp_path: Path) -> None:
    out = str(tmp_path)
    write_part(out, [row("b"), row("d")])
    assert merge(out) == 2
    assert merge(out) == 2
    write_part(out, [row("c"), row("a"), row("d")])
    done = names_done(out)
    assert [name in done for name in "abcde"] == [True, True, True, True, False]
    assert merge(out) == 4
    assert [found["path"] for found in read_results(out)] == ["a", "b", "c", "d"]


def test_duplicates_take_the_outcome_of_the_first(tmp_path: Path) -> None:
    out = str(tmp_path)
    write_part(out, [{"path": "a", "status": "ok", "sha256": "s", "duplicate_of": "z"}])
    write_part(out, [row("z", sha256="s", width=3), row("bad", status="rejected", error="no", sha256="t")])
    write_part(out, [{"path": "bad2", "status": "ok", "sha256": "t", "duplicate_of": "bad"}])
    assert dict(results_table.duplicates(out)) == {"a": "z", "bad2": "bad"}
    assert results_table.claims(out) == {"s": "z", "t": "bad"}
    merge(out)
    found = {entry["path"]: entry for entry in table(tmp_path)}
    assert found["a"] == {**found["z"], "path": "a", "duplicate_of": "z"}
    assert (found["bad2"]["status"], found["bad2"]["error"]) == ("rejected", "no")
    assert results_table.claims(out) == {"s": "z", "t": "bad"}
    assert not dict(results_table.duplicates(out)), "the table is complete"


def test_parts_that_all_overlap_are_merged_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_table, "_OPEN_FILES", 3)
    for start in range(20):  # as of a shuffled list
        write_part(str(tmp_path), [row(f"{number:04d}") for number in range(start, 400, 20)])
    opened: list[int] = [0, 0]
    read = results_table._read_rows

    def counted(uri: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        if columns is None:
            opened[0] += 1
            opened[1] = max(opened)
        yield from read(uri, columns)
        opened[0] -= columns is None

    monkeypatch.setattr(results_table, "_read_rows", counted)
    assert merge(str(tmp_path)) == 400
    assert [found["path"] for found in table(tmp_path)] == [f"{number:04d}" for number in range(400)]
    assert opened[1] == 3


def test_a_duplicate_of_what_was_never_done_is_done_itself(tmp_path: Path) -> None:
    out = str(tmp_path)
    lost = {"path": "a", "status": "ok", "sha256": "s", "duplicate_of": "never done"}
    write_part(out, [lost, row("b", sha256="t")])
    assert [name in names_done(out) for name in "ab"] == [False, True]
    assert results_table.claims(out) == {"t": "b"}
    write_part(out, [row("a", sha256="s")])
    assert merge(out) == 2
    assert [found["duplicate_of"] for found in read_results(out)] == [None, None]


def test_the_same_rows_are_the_same_part(tmp_path: Path) -> None:
    write_part(str(tmp_path), [row("a"), row("b")])
    write_part(str(tmp_path), [row("b"), row("a")])
    assert len(list((tmp_path / "parts").iterdir())) == 1


def test_names_are_told_apart() -> None:
    names = Names.of(f"{number}.jpg" for number in range(5000))
    assert len(names) == 5000
    assert all(f"{number}.jpg" in names for number in range(5000))
    assert not any(f"{number}.jpg" in names for number in range(5000, 10_000))
    assert "x" not in Names([])
