"""Preparation of a run: shards of all its sources, and a tokenizer and noun phrases from the captions of all of them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from vilseg.config import RunConfig
from vilseg.data.shards import write_tar
from vilseg.errors import ConfigError, DataError, StorageError
from vilseg.model import ViLSeg
from vilseg.training.run_dir import PreparedRun, RunDirectory
from vilseg.training.run_setup import preflight, prepare

SMALL = (
    "model.image_encoder.sizes={width: 16, depth: 1, patch_size: 8}",
    "model.text_encoder.sizes={hidden_size: 16, num_hidden_layers: 0, num_attention_heads: 2, intermediate_size: 32}",
    "model.text_encoder.vocabulary_size=400",
    "model.embedding_dim=16",
    "loss.nouns.min_count=2",
)


def write(folder: Path, captions: Sequence[str], shards: int = 1, pairs: int = 3) -> str:
    for shard in range(shards):
        write_tar(
            f"{folder}/{shard}.tar",
            ((f"k{pair}", b"i", "jpg", {"captions": list(captions)}) for pair in range(pairs)),
        )
    return str(folder)


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    return RunConfig.load(None, [*SMALL, f"trainer.storage={tmp_path}/runs", "name=r", *overrides])


def prepared(tmp_path: Path, *overrides: str) -> PreparedRun:
    return prepare(config(tmp_path, *overrides), RunDirectory(f"{tmp_path}/runs/r"))


def mix(*sources: str) -> str:
    return (
        f"data.mix=[{', '.join(f'{{source: {source}, weight: {weight}}}' for weight, source in enumerate(sources, 1))}]"
    )


def test_shards_and_words_come_from_every_source(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", ["a dog on the grass"], shards=2)
    scenes = write(tmp_path / "scenes", ["the lake by the mountain"])
    found = prepared(tmp_path, mix(photos, scenes))
    assert [(shard.source, shard.pairs) for shard in found.shards] == [("photos", 3), ("photos", 3), ("scenes", 3)]
    assert {"dog", "grass", "lake", "mountain"} <= set(found.nouns.phrases)
    card = (tmp_path / "runs" / "r" / "initial" / "README.md").read_text()
    assert f"`{photos}` (weight 1), `{scenes}` (weight 2)" in card
    assert isinstance(ViLSeg.from_pretrained(f"{tmp_path}/runs/r/initial"), ViLSeg)


def test_what_is_held_out_of_a_source_of_a_mix_is_left_out(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", ["a dog"], shards=3)
    scenes = write(tmp_path / "scenes", ["a lake"])
    found = prepared(tmp_path, mix(photos, scenes), f"data.held_out={photos}/1.tar")
    assert [shard.uri.removeprefix(f"{tmp_path}/") for shard in found.shards] == [
        "photos/0.tar",
        "photos/2.tar",
        "scenes/0.tar",
    ]


def test_a_source_of_a_mix_that_is_of_no_use_is_named(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", ["a dog"])
    empty = write(tmp_path / "empty", ["a dog"], pairs=0)
    silent = write(tmp_path / "silent", [])
    with pytest.raises(DataError, match=r"hold no pair at empty of data\.mix"):
        prepared(tmp_path, mix(photos, empty))
    with pytest.raises(DataError, match=r"no readable pair at .*/silent; the first, k0, failed because no caption"):
        prepared(tmp_path, mix(photos, silent))
    with pytest.raises(StorageError, match=r"/none does not exist"):
        preflight(config(tmp_path, mix(photos, f"{tmp_path}/none")), resume=False)
    with pytest.raises(ConfigError, match=r"data\.source is not set"):
        preflight(config(tmp_path), resume=False)
