"""The feature cache without a cluster: which encoders write it, and what its key depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.cache_features import cache_key, make_encoders
from jobs.feed import read_here
from vilseg import ViLSeg, storage
from vilseg.config import RunConfig
from vilseg.data.pairs import Shard, list_shards, write_tar
from vilseg.text.nouns import NounPhrases
from vilseg.text.tokenizer import FixedTokenizer, train_tokenizer
from vilseg.training import run
from vilseg.training.folder import Prepared, RunFolder

ENCODERS = (
    "model.image_encoder.frozen=true",
    "model.image_encoder.sizes={width: 16, depth: 1}",
    "model.text_encoder.sizes={hidden_size: 16, num_hidden_layers: 0, num_attention_heads: 1}",
    *("model.embedding_dim=16", "model.clusters=4", "loss.nouns.weight=0"),
)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    source = str(tmp_path / "pairs")
    for name in ("a", "b"):
        write(f"{source}/{name}.tar", ["a dog", "the grass"])
    return source


def write(uri: str, captions: list[str]) -> None:
    write_tar(uri, ((f"k{number}", b"i", "jpg", {"caption": caption}) for number, caption in enumerate(captions)))


def settings(source: str, *overrides: str) -> RunConfig:
    return RunConfig.load(None, [*ENCODERS, f"data.source={source}", "data.feature_cache=/cache", *overrides])


def key(config: RunConfig) -> str:
    assert config.data.source is not None
    return cache_key(config, list_shards(config.data.source), make_encoders(config))


def begun_on(*shards: Shard) -> Prepared:
    tokenizer = train_tokenizer(["a dog"], 64).backend_tokenizer.to_str()
    return Prepared(shards, NounPhrases(), FixedTokenizer(tokenizer, 8, 0))


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("begins", ["with a run", "with a folder", "with a model of others"])
def test_features_are_of_the_encoders_that_the_run_begins_with(
    begins: str, pairs: str, tmp_path: Path, save_tiny_model: Callable[[str, int], str]
) -> None:
    place = str(tmp_path / "first")
    model = save_tiny_model(f"{place}/model", 32)
    beginning = {"run": f"init={place}", "folder": f"init={model}", "others": f"model.init={model}"}[begins.split()[-1]]
    # Another seed: encoders that are newly made have other weights than that model.
    others = ("model.text_encoder.frozen=true", "trainer.seed=7", f"trainer.storage={tmp_path}/runs", "name=r")
    config = settings(pairs, beginning, *others)
    encoders = make_encoders(config)
    folder = RunFolder(f"{tmp_path}/runs/r")
    run.prepare(config, folder)
    for start in (ViLSeg.from_pretrained(model), ViLSeg.from_pretrained(folder.initial)):
        assert same_weights(encoders.images, start.image_encoder)
        assert encoders.texts is not None
        assert same_weights(encoders.texts, start.text_encoder)
    assert not encoders.images.training


def test_encoders_that_are_new_are_those_of_the_run(pairs: str, tmp_path: Path) -> None:
    config = settings(pairs, f"trainer.storage={tmp_path}/runs", "name=r")
    encoders = make_encoders(config)
    folder = RunFolder(f"{tmp_path}/runs/r")
    run.prepare(config, folder)
    assert same_weights(encoders.images, ViLSeg.from_pretrained(folder.initial).image_encoder)
    assert encoders.texts is None


def test_the_key_depends_on_the_model_that_the_run_begins_with(
    pairs: str, tmp_path: Path, save_tiny_model: Callable[[str, int], str]
) -> None:
    model = save_tiny_model(f"{tmp_path}/model", 32)
    begun = key(settings(pairs, f"init={model}", "trainer.seed=7"))
    assert begun != key(settings(pairs, "trainer.seed=7"))
    with storage.local_copy(model) as folder:
        storage.upload_folder(folder, f"{tmp_path}/copy/model")
    assert begun == key(settings(pairs, f"init={tmp_path}/copy", "trainer.seed=8")), "the same weights elsewhere"


def test_unchanged_shards_keep_the_key_and_one_written_anew_changes_it(pairs: str, tmp_path: Path) -> None:
    before = key(settings(pairs))
    assert key(settings(pairs)) == before
    assert key(settings(os.path.relpath(pairs))) == before, "the same place by another name"
    shard = tmp_path / "pairs" / "a.tar"
    size = shard.stat().st_size
    write(str(shard), ["a cat", "the water"])
    assert shard.stat().st_size == size, "tars are padded"
    assert key(settings(pairs)) != before


def test_another_place_with_the_same_shards_has_another_key(pairs: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    storage.upload_folder(Path(pairs), other)
    for entry in list_shards(pairs):
        assert entry.modified_ns is not None
        os.utime(f"{other}/{entry.relative}", ns=(entry.modified_ns, entry.modified_ns))
    assert key(settings(other)) != key(settings(pairs))


def test_a_cache_is_read_by_its_own_columns(pairs: str) -> None:
    # It was written from columns of other names.
    columns = ("data.columns.image=jpg", "data.columns.captions=texts")
    config = settings(pairs, *columns, "trainer.batch_size=1", "trainer.steps=1")
    cached = str(Path(pairs).parent / "cache")
    row = {"key": ["k"], "captions": [["a dog"]], "image": [np.zeros((4, 2), np.float16).tobytes()]}
    Path(cached).mkdir()
    pq.write_table(pa.table(row), f"{cached}/a.parquet")
    storage.write_text(f"{cached}/manifest.json", json.dumps({"patches": 4, "features": 2}))
    (batch,) = read_here(config, begun_on(Shard(f"{cached}/a.parquet", 1)))
    assert (batch.keys, batch.images.shape) == (("k",), (1, 4, 2))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("data.columns.caption=caption", "data.columns.caption=alt"),
        ("data.max_pixels=1000", "data.max_pixels=2000"),
        ("data.canvas=224", "data.canvas=96"),
        # The weights of both are the same.
        ("model.image_encoder.sizes.num_attention_heads=2", "model.image_encoder.sizes.num_attention_heads=4"),
    ],
)
def test_the_key_depends_on_what_weights_do_not_tell(first: str, second: str, pairs: str) -> None:
    vit = (
        "model.image_encoder.architecture=vit",
        "model.image_encoder.sizes={hidden_size: 16, num_hidden_layers: 1, intermediate_size: 16, image_size: 32}",
    )
    keys = [
        key(settings(pairs, *vit, "model.image_encoder.sizes.num_attention_heads=2", last)) for last in (first, second)
    ]
    assert keys[0] != keys[1]
