"""Cached features: what is written, that it is written once, and that training reads it."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.ray_session import Session
from jobs.train import feature_cache
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.config.data import ColumnsConfig
from vilseg.data.batch_reader import decode_features
from vilseg.data.shards import Pair, read_shard, write_tar
from vilseg.device import has_bfloat16_units
from vilseg.errors import ConfigError, DataError
from vilseg.features.writer import FeatureWriter
from vilseg.model.image_encoder import LocalConvEncoder

SIDE = 32


def photo(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_pairs(uri: str, count: int, *, broken: int = 0) -> None:
    images = [photo(seed) if seed >= broken else b"no image" for seed in range(count)]
    write_tar(uri, ((f"k{n}", image, "png", {"captions": [f"a dog {n}", "grass"]}) for n, image in enumerate(images)))


@pytest.fixture
def encoder() -> LocalConvEncoder:
    torch.manual_seed(0)
    return LocalConvEncoder(width=16, depth=1, patch_size=8).eval()


def writer(encoder: LocalConvEncoder) -> FeatureWriter:
    return FeatureWriter(encoder, None, canvas=SIDE, max_pixels=10_000, columns=ColumnsConfig())


def test_features_are_what_the_encoder_says_of_the_image(tmp_path: Path, encoder: LocalConvEncoder) -> None:
    # Where there are matrix units for bfloat16 the cache is written in it: 8 bits of a number are left.
    half = has_bfloat16_units(torch.device("cpu"))
    source, target = str(tmp_path / "a.tar"), str(tmp_path / "cache" / "a.parquet")
    write_pairs(source, 3)
    summary = writer(encoder).write(source, target)
    assert (summary["pairs"], summary["patches"], summary["features"]) == (3, 16, 16)
    for number, pair in enumerate(read_shard(target)):
        assert isinstance(pair, Pair)
        assert (pair.key, pair.captions, pair.caption_features) == (f"k{number}", (f"a dog {number}", "grass"), None)
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(photo(number))))).permute(2, 0, 1)[None] / 255
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
            wanted = encoder(pixels).patches[0].float().numpy()
        assert np.allclose(decode_features(pair.image, 0, patches=16, features=16), wanted, atol=0.05 if half else 2e-3)


def test_a_shard_that_is_there_is_not_written_again(tmp_path: Path, encoder: LocalConvEncoder) -> None:
    source, target = str(tmp_path / "a.tar"), str(tmp_path / "a.parquet")
    write_pairs(source, 3)
    first = writer(encoder).write(source, target)
    before = Path(target).stat().st_mtime_ns
    assert writer(encoder).write(source, target) == first
    assert Path(target).stat().st_mtime_ns == before


def test_a_broken_image_is_left_out_and_named(tmp_path: Path, encoder: LocalConvEncoder) -> None:
    source, target = str(tmp_path / "a.tar"), str(tmp_path / "a.parquet")
    write_pairs(source, 3, broken=1)
    summary = writer(encoder).write(source, target)
    assert summary["pairs"] == 2
    assert [key for key, _ in json.loads(summary["rejected"])] == ["k0"]


def test_features_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match="2 x 3 float16"):
        decode_features(b"\0" * 10, 0, patches=2, features=3)


def settings(root: str, *overrides: str) -> RunConfig:
    frozen = ["model.image_encoder.frozen=true", "model.image_encoder.sizes={width: 16, depth: 1, patch_size: 8}"]
    small = ["{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"]
    return RunConfig.load(
        None,
        [
            *(f"data.source={root}/pairs", f"data.feature_cache={root}/cache", f"data.canvas={SIDE}"),
            *frozen,
            f"model.text_encoder.sizes={small[0]}",
            *("model.text_encoder.vocabulary_size=64", "model.embedding_dim=16", "loss.nouns.weight=0"),
            *("trainer.workers=1", "trainer.batch_size=4", "trainer.steps=3", f"trainer.storage={root}/runs"),
            *("views.feature_dropout=0.3", "name=cached", *overrides),
        ],
    )


def test_an_encoder_that_learns_cannot_be_cached(ray_cluster: Session) -> None:
    config = settings("s3://vilseg/learns", "model.image_encoder.frozen=false")
    with pytest.raises(ConfigError, match="frozen=true"):
        feature_cache.main(config, ray_cluster)


def test_training_reads_the_cache_and_another_source_gets_another_one(ray_cluster: Session) -> None:
    from jobs.train import train_job

    root = "s3://vilseg/cached"
    for name in ("a", "b"):
        write_pairs(f"{root}/pairs/{name}.tar", 6)
    config = settings(root, "data.cache_variants=2")
    outcome = train_job.main(config, ray_cluster)
    assert outcome.metrics["step"] == 3
    assert np.isfinite(outcome.metrics["loss/mutual_information"])
    manifest = feature_cache.main(config, ray_cluster)
    assert manifest.uri.startswith(f"{root}/cache/")
    assert sum(manifest.pairs.values()) == 12
    written = storage.list_files(f"{root}/cache")
    assert feature_cache.main(config, ray_cluster) == manifest
    assert storage.list_files(f"{root}/cache") == written
    write_pairs(f"{root}/pairs/c.tar", 6)
    larger = feature_cache.main(config, ray_cluster)
    assert larger.uri != manifest.uri
    time.sleep(1.1)  # the store tells the time of writing by the second
    write_pairs(f"{root}/pairs/c.tar", 6)
    assert feature_cache.main(config, ray_cluster).uri != larger.uri, "a shard written anew, of the same size"
