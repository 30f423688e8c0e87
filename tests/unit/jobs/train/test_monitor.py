"""Counting of pairs that cannot be read, and the file that lists them, without Ray."""

import json
from pathlib import Path

from jobs.train.monitor import BadPairCounter
from jobs.train.supervisor import QuarantineFile
from vilseg.data.shards import BadPair
from vilseg.training.run_dir import RunDirectory

EQUAL_KEYS = [BadPair("7", "damaged", shard="s3://b/0.tar"), BadPair("7", "empty", shard="s3://b/1.tar")]


def test_pairs_of_equal_keys_in_two_shards_are_two_and_each_is_told_once() -> None:
    counter = BadPairCounter(0.5)
    counter.add(100, EQUAL_KEYS)
    assert counter.take_new() == {("7", "s3://b/0.tar"): "damaged", ("7", "s3://b/1.tar"): "empty"}
    counter.add(100, EQUAL_KEYS)  # in the next epoch
    assert counter.take_new() == {}
    assert (counter.read, counter.bad) == (200, 4)


def test_the_quarantine_lists_both_and_goes_on_with_the_file_of_an_earlier_version(tmp_path: Path) -> None:
    folder = RunDirectory(str(tmp_path))
    Path(folder.quarantine).write_text('{"key": "old", "reason": "damaged"}\n')
    bad = {(pair.key, pair.shard): pair.reason for pair in EQUAL_KEYS}
    QuarantineFile(folder).add(bad)
    QuarantineFile(folder).add(bad)
    entries = [json.loads(line) for line in Path(folder.quarantine).read_text().splitlines()]
    assert [(entry["key"], entry["reason"]) for entry in entries] == [
        ("old", "damaged"),
        ("7", "damaged"),
        ("7", "empty"),
    ]
    assert [entry.get("shard") for entry in entries] == [None, "s3://b/0.tar", "s3://b/1.tar"]
