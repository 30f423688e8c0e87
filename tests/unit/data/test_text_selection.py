"""Selection of the texts of a pair: their probabilities, and the texts that the filters leave out."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vilseg.config import RunConfig
from vilseg.config.data import FiltersConfig, TextConfig
from vilseg.data.batch_reader import BatchReader, decode_to_canvas, index_shards
from vilseg.data.sampler import PairSampler
from vilseg.data.shards import BadPair, Pair, read_shard, write_tar
from vilseg.data.text_selection import TextSelector, choose_text
from vilseg.errors import ConfigError, FilteredError

EVERYTHING = {"caption": ["a dog", "one dog"], "alt": ["Photo of a brown dog"], "tags": ["#goodDog", "park"]}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, {"a dog": 0.5, "one dog": 0.5}),
        ({"alt": 0.5, "tags": 0.5}, {"a dog": 0.25, "one dog": 0.25, "a brown dog": 0.25, "good dog, park": 0.25}),
        ({"caption": 0, "tags": 2}, {"good dog, park": 1.0}),
        ({"caption": 0}, {"a dog": 0.5, "one dog": 0.5}),
    ],
)
def test_weights_of_the_kinds(weights: dict[str, float], expected: dict[str, float]) -> None:
    assert TextSelector(TextConfig.model_validate(weights)).probabilities(EVERYTHING) == expected


def test_alt_text_and_then_tags_stand_in_for_captions() -> None:
    selector = TextSelector()
    assert selector.probabilities({"alt": ["a cat"], "tags": ["sea"]}) == {"a cat": 1.0}
    assert selector.probabilities({"tags": ["sea, old town"]}) == {"sea, old town": 1.0}
    assert selector.probabilities({"alt": ["IMG_12.jpg"], "tags": ["#sea"]}) == {"sea": 1.0}
    assert selector.probabilities({}) == {}


def test_texts_are_chosen_as_often_as_their_chances_say() -> None:
    seeds = np.random.default_rng(0).integers(0, 2**62, 20_000).tolist()
    found = Counter(choose_text([0.5, 0.2, 0.3], seed) for seed in seeds)
    assert [found[index] / len(seeds) for index in range(3)] == pytest.approx([0.5, 0.2, 0.3], abs=0.015)


def test_filters_on_texts() -> None:
    texts = {"caption": ["dog", "a dog on a mat", "IMG 0001 0002 0003 0004"]}
    wanted = FiltersConfig(min_words=2, max_words=5, junk=True)
    assert list(TextSelector(filters=wanted).probabilities(texts)) == ["a dog on a mat"]
    assert len(TextSelector().probabilities(texts)) == 3


def test_filters_on_letters_are_for_languages_without_spaces() -> None:
    texts = {"caption": ["犬", "犬が公園で遊んでいます", "犬" * 40]}
    wanted = FiltersConfig(min_characters=3, max_characters=30)
    assert list(TextSelector(filters=wanted).probabilities(texts)) == ["犬が公園で遊んでいます"]


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 9)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_filters_on_pictures_look_at_the_header_alone() -> None:
    filters = FiltersConfig(min_side=30, max_aspect=2)
    whole = picture(60, 40)
    assert decode_to_canvas(whole, 0, canvas=16, max_pixels=10**6, filters=filters).shape == (16, 16, 3)
    for bad, words in ((picture(29, 40), "shorter than 30"), (picture(90, 40), "longer than 2")):
        with pytest.raises(FilteredError, match=words):
            decode_to_canvas(bad[:-20], 0, canvas=16, max_pixels=10**6, filters=filters)


def test_filtered_pairs_are_told_apart_from_bad_ones_and_replaced(tmp_path: Path) -> None:
    members = [(f"good{i}", picture(40, 40), "jpg", {"caption": f"a dog number {i}"}) for i in range(6)]
    members += [
        ("short", picture(40, 40), "jpg", {"caption": "dog"}),
        ("small", picture(8, 8), "jpg", {"caption": "a dog"}),
        ("bad", b"no picture", "jpg", {"caption": "a dog"}),
    ]
    write_tar(f"{tmp_path}/0.tar", iter(members))
    filters = FiltersConfig(min_words=2, min_side=16)
    selector = TextSelector(filters=filters)
    found = {pair.key: pair for pair in read_shard(f"{tmp_path}/0.tar", selector=selector)}
    assert isinstance(found["good0"], Pair)
    assert isinstance(found["short"], BadPair)
    assert found["short"].filtered
    missing: list[BadPair] = []

    def decode(data: bytes, seed: int) -> np.ndarray:
        return decode_to_canvas(data, seed, canvas=16, max_pixels=10**6, filters=filters)

    reader = BatchReader(
        batch_size=3,
        workers=1,
        seed=0,
        decode=decode,
        tokenize=lambda texts: np.array([[len(text)] for text in texts], np.int32),
        selector=selector,
        report=lambda read, some: missing.extend(some),
    )
    tasks = PairSampler(index_shards(str(tmp_path)), 3, 0).read_tasks(0, 3)
    keys = [key for task in tasks for batch in reader.read(task) for key in batch.keys]
    assert len(keys) == 9
    assert set(keys) == {f"good{i}" for i in range(6)}
    assert {pair.key: pair.filtered for pair in missing} == {"short": True, "small": True, "bad": False}


def test_a_set_of_hashtags_alone_is_a_training_set(tmp_path: Path) -> None:
    members = ((f"k{i}", picture(40, 40), "jpg", {"tags": ["#goldenRetriever", "#park2023"]}) for i in range(3))
    write_tar(f"{tmp_path}/0.tar", members)
    found = [pair.captions for pair in read_shard(f"{tmp_path}/0.tar") if isinstance(pair, Pair)]
    assert found == [("golden retriever, park",)] * 3


def test_weights_and_filters_are_refused_beside_a_feature_cache() -> None:
    with pytest.raises(ConfigError, match="feature_cache"):
        RunConfig.load(None, ["data.feature_cache=/cache", "data.text.tags=1"])
