"""The feature cache of a whole source: every shard has a file of its own, and every pair left out is counted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cluster.ray_session import Session
from jobs.train import feature_cache
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.shards import read_index, write_tar
from vilseg.errors import DataError
from vilseg.features.encoders import FrozenEncoders
from vilseg.features.manifest import ShardSummary
from vilseg.features.writer import FeatureWriter

SIDE = 32
SESSION = Session(cpus=1, gpus=0)


@pytest.fixture(autouse=True)
def _write_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the shards in this process, without Ray."""

    def write(
        rows: list[dict[str, str]],
        encoders: FrozenEncoders,
        config: RunConfig,
        session: Session,
        progress: Callable[[int, int], None],
    ) -> list[ShardSummary]:
        data = config.data
        writer = FeatureWriter(
            encoders.images, encoders.texts, canvas=SIDE, max_pixels=data.max_pixels, columns=data.columns
        )
        return [writer.write(row["source"], row["target"]) for row in rows]

    monkeypatch.setattr(feature_cache, "_write_shards", write)


def settings(root: Path, *overrides: str) -> RunConfig:
    return RunConfig.load(
        None,
        [
            f"data.source={root}/pairs",
            f"data.feature_cache={root}/cache",
            f"data.canvas={SIDE}",
            "data.max_bad_share=0.9",
            "model.image_encoder.frozen=true",
            "model.image_encoder.sizes={width: 16, depth: 1}",
            *overrides,
        ],
    )


def write_pairs(uri: str, good: int, *, bad: int = 0) -> None:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "green").save(file, "PNG")
    images = [file.getvalue()] * good + [b"no image"] * bad
    write_tar(uri, ((f"k{number}", image, "png", {"caption": "grass"}) for number, image in enumerate(images)))


def test_shards_whose_paths_differ_by_a_slash_are_both_kept(tmp_path: Path) -> None:
    write_pairs(f"{tmp_path}/pairs/a/0.tar", 2)
    write_pairs(f"{tmp_path}/pairs/a_0.tar", 3)
    manifest = feature_cache.main(settings(tmp_path), SESSION)
    assert sorted(manifest.pairs.values()) == [2, 3]
    assert sorted(read_index(manifest.uri).values()) == [2, 3]
    assert feature_cache.main(settings(tmp_path), SESSION) == manifest, "read back"


def test_equal_keys_in_two_shards_count_as_two_pairs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pairs(f"{tmp_path}/pairs/{name}.tar", 1, bad=1)
    manifest = feature_cache.main(settings(tmp_path), SESSION)
    assert [(pair.shard, pair.key) for pair in manifest.rejected] == [("a.tar.parquet", "k1"), ("b.tar.parquet", "k1")]
    assert feature_cache.main(settings(tmp_path), SESSION) == manifest
    strict = settings(tmp_path, "data.max_bad_share=0.4", f"data.feature_cache={tmp_path}/other")
    with pytest.raises(DataError, match="2 of 4 pairs could not be read"):
        feature_cache.main(strict, SESSION)


def test_a_cache_that_lost_a_shard_is_completed_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    """Earlier versions gave ``a/0.tar`` and ``a_0.tar`` one file, and kept rejected pairs by key."""
    write_pairs(f"{tmp_path}/pairs/a/0.tar", 2)
    write_pairs(f"{tmp_path}/pairs/b.tar", 1)
    manifest = feature_cache.main(settings(tmp_path), SESSION)
    place = f"{manifest.uri}/manifest.json"
    values = json.loads(storage.read_text(place))
    (stale,) = (name for name in manifest.pairs if name != "b.tar.parquet")
    storage.write_bytes(f"{manifest.uri}/a_0.tar.parquet", storage.read_bytes(f"{manifest.uri}/{stale}"))
    whole = {**values, "pairs": {"a_0.tar.parquet": 2, "b.tar.parquet": 1}, "rejected": {"k": "why"}}
    storage.write_text(place, json.dumps(whole))
    kept = feature_cache.main(settings(tmp_path), SESSION)
    assert kept.pairs == whole["pairs"]
    assert [(pair.key, pair.reason) for pair in kept.rejected] == [("k", "why")]
    storage.write_text(place, json.dumps({**whole, "pairs": {"a_0.tar.parquet": 2}}))
    completed = feature_cache.main(settings(tmp_path), SESSION)
    assert completed.pairs == manifest.pairs
    assert not storage.exists(f"{manifest.uri}/a_0.tar.parquet"), "training would read its pairs twice"
