"""The feature cache without a cluster: which encoders write it, and what its key depends on."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.train.ray_data import read_batches_locally
from vilseg import ViLSeg, storage
from vilseg.config import ImageEncoderConfig, RunConfig, ViewsConfig
from vilseg.config.data import ColumnsConfig
from vilseg.data.batch_reader import decode_features
from vilseg.data.cached_views import column_name, column_of_variant
from vilseg.data.image_decoding import crop_to_square, decode_image
from vilseg.data.shards import Pair, Shard, list_shards, read_shard, write_tar
from vilseg.device import has_bfloat16_units
from vilseg.features.encoders import load_frozen_encoders
from vilseg.features.key import cache_key
from vilseg.features.writer import FeatureWriter
from vilseg.model.image_encoder import LocalConvEncoder, build_image_encoder
from vilseg.text.noun_phrases import NounPhrases
from vilseg.text.tokenizer import FixedTokenizer, train_tokenizer
from vilseg.training import run_setup
from vilseg.training.encoded_views import cached_features
from vilseg.training.run_dir import PreparedRun, RunDirectory

SIDE = 32
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
    return cache_key(config, list_shards(config.data.source), load_frozen_encoders(config))


def begun_on(*shards: Shard) -> PreparedRun:
    tokenizer = train_tokenizer(["a dog"], 64).backend_tokenizer.to_str()
    return PreparedRun(shards, NounPhrases(), FixedTokenizer(tokenizer, 8, 0))


def photo(seed: int) -> bytes:
    # Not square: variants differ in what they show of it, too.
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, 2 * SIDE, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_photos(uri: str, count: int) -> None:
    write_tar(uri, ((f"k{number}", photo(number), "png", {"caption": f"a dog {number}"}) for number in range(count)))


def write_cache(source: str, cache: str, variants: int, **views: float) -> dict[str, Any]:
    """Features of one shard, the encoder always the same."""
    torch.manual_seed(0)
    encoder = LocalConvEncoder(width=16, depth=1, patch_size=8).eval()
    of_views = ViewsConfig.model_validate(views)
    writer = FeatureWriter(
        encoder, None, canvas=SIDE, max_pixels=10_000, columns=ColumnsConfig(), variants=variants, views=of_views
    )
    summary = writer.write(source, f"{cache}/a.parquet")
    storage.write_text(f"{cache}/manifest.json", json.dumps({name: summary[name] for name in ("patches", "features")}))
    return summary


def variants_of(cache: str, variants: int) -> list[dict[str, bytes]]:
    """The features of the images by key, variant by variant."""
    rows = pq.read_table(f"{cache}/a.parquet").to_pylist()
    return [
        {row["key"]: row[column_name(column_of_variant(variant, row["key"], variants))] for row in rows}
        for variant in range(variants)
    ]


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
    encoders = load_frozen_encoders(config)
    folder = RunDirectory(f"{tmp_path}/runs/r")
    run_setup.prepare(config, folder)
    for start in (ViLSeg.from_pretrained(model), ViLSeg.from_pretrained(folder.initial)):
        assert same_weights(encoders.images, start.image_encoder)
        assert encoders.texts is not None
        assert same_weights(encoders.texts, start.text_encoder)
    assert not encoders.images.training


def test_encoders_that_are_new_are_those_of_the_run(pairs: str, tmp_path: Path) -> None:
    config = settings(pairs, f"trainer.storage={tmp_path}/runs", "name=r")
    encoders = load_frozen_encoders(config)
    folder = RunDirectory(f"{tmp_path}/runs/r")
    run_setup.prepare(config, folder)
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
    (batch,) = read_batches_locally(config, begun_on(Shard(f"{cached}/a.parquet", 1)))
    assert (batch.keys, batch.images.shape) == (("k",), (1, 4, 2))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("data.columns.caption=caption", "data.columns.caption=alt"),
        ("data.max_pixels=1000", "data.max_pixels=2000"),
        ("data.cache_variants=1", "data.cache_variants=2"),
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


def test_views_matter_to_the_key_where_images_have_variants(pairs: str) -> None:
    alone, several = "data.cache_variants=1", "data.cache_variants=2"
    assert key(settings(pairs, alone, "views.hue=0")) == key(settings(pairs, alone))
    assert key(settings(pairs, several, "views.hue=0")) != key(settings(pairs, several))
    # Of training, not of the cache.
    assert key(settings(pairs, several, "views.feature_dropout=0.5")) == key(settings(pairs, several))


def test_the_first_variant_is_the_image_as_without_variants_and_the_others_are_views(tmp_path: Path) -> None:
    source = f"{tmp_path}/pairs/a.tar"
    write_photos(source, 20)  # more than are encoded at once
    write_cache(source, f"{tmp_path}/one", 1)
    assert pq.read_schema(f"{tmp_path}/one/a.parquet").names == ["key", "captions", "image", "caption_features"]
    summary = write_cache(source, f"{tmp_path}/three", 3)
    assert (summary["pairs"], summary["patches"], summary["features"]) == (20, 16, 16)
    (alone,) = variants_of(f"{tmp_path}/one", 1)
    middle, second, third = variants_of(f"{tmp_path}/three", 3)
    assert middle == alone
    for name in alone:
        assert len({middle[name], second[name], third[name]}) == 3
        assert len(second[name]) == len(middle[name])


def test_variants_are_the_same_whichever_shard_a_pair_is_in(tmp_path: Path) -> None:
    for count in (5, 7):
        write_photos(f"{tmp_path}/{count}.tar", count)
        write_cache(f"{tmp_path}/{count}.tar", f"{tmp_path}/{count}", 2)
    fewer, more = (variants_of(f"{tmp_path}/{count}", 2)[1] for count in (5, 7))
    for name, features in fewer.items():
        ours, theirs = (np.frombuffer(one, np.float16).astype(np.float32) for one in (features, more[name]))
        assert np.allclose(ours, theirs, atol=0.05), "but for how many are encoded at once"


def test_variants_follow_the_settings_of_the_views(tmp_path: Path) -> None:
    write_photos(f"{tmp_path}/a.tar", 4)
    write_cache(f"{tmp_path}/a.tar", f"{tmp_path}/usual", 2)
    write_cache(f"{tmp_path}/a.tar", f"{tmp_path}/plain", 2, brightness=0, contrast=0, saturation=0, hue=0)
    usual, plain = (variants_of(f"{tmp_path}/{name}", 2) for name in ("usual", "plain"))
    assert usual[0] == plain[0]
    assert all(usual[1][name] != plain[1][name] for name in usual[1])


def test_an_epoch_reads_one_variant_of_every_image_and_in_the_end_all(tmp_path: Path) -> None:
    write_photos(f"{tmp_path}/a.tar", 20)
    write_cache(f"{tmp_path}/a.tar", f"{tmp_path}/cache", 3)
    known = {
        (name, features): variant
        for variant, images in enumerate(variants_of(f"{tmp_path}/cache", 3))
        for name, features in images.items()
    }

    def epochs(seed: int) -> list[dict[str, int]]:
        """The variants read by key, epoch by epoch."""
        sizes = ("trainer.batch_size=10", "trainer.steps=6", f"trainer.seed={seed}")
        config = settings(f"{tmp_path}/a.tar", "data.cache_variants=3", *sizes)
        batches = list(read_batches_locally(config, begun_on(Shard(f"{tmp_path}/cache/a.parquet", 20))))
        return [
            {
                name: known[name, features.tobytes()]
                for batch in batches[first : first + 2]
                for name, features in zip(batch.keys, batch.images, strict=True)
            }
            for first in (0, 2, 4)
        ]

    found = epochs(0)
    assert all(set(epoch.values()) == {0, 1, 2} for epoch in found), "an epoch has images of all variants"
    assert all({epoch[name] for epoch in found} == {0, 1, 2} for name in found[0]), "and an image each of its own"
    assert epochs(0) == found
    assert epochs(1)[0] == found[1], "another seed begins with another"


def test_the_encoders_own_embedding_of_the_whole_is_cached_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    vit = build_image_encoder(
        ImageEncoderConfig(architecture="vit", sizes={**sizes, "image_size": SIDE, "patch_size": 8})
    ).eval()
    write_tar(f"{tmp_path}/a.tar", [("k", photo(1), "png", {"caption": "a dog"})])
    writer = FeatureWriter(vit, None, canvas=SIDE, max_pixels=10_000, columns=ColumnsConfig())
    summary = writer.write(f"{tmp_path}/a.tar", f"{tmp_path}/a.parquet")
    assert (summary["patches"], summary["features"]) == (17, 16)
    (pair,) = read_shard(f"{tmp_path}/a.parquet")
    assert isinstance(pair, Pair)
    rows = torch.tensor(decode_features(pair.image, 0, patches=17, features=16)).unsqueeze(0)
    cached = cached_features(rows)
    image = crop_to_square(decode_image(photo(1)), SIDE)
    pixels = torch.tensor(image).permute(2, 0, 1).unsqueeze(0) / 255
    half = has_bfloat16_units(torch.device("cpu"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        wanted = vit(pixels)
    assert cached.grid == wanted.grid == (4, 4)
    assert wanted.pooled is not None
    assert cached.pooled is not None
    assert cached.pooled.dtype == torch.float32
    torch.testing.assert_close(cached.pooled, wanted.pooled.float(), atol=0.01, rtol=0.01)
    torch.testing.assert_close(cached.patches.float(), wanted.patches.float(), atol=0.01, rtol=0.01)
    # Nothing else is: patches alone have a mean.
    assert cached_features(rows[:, :-1]).pooled is None
