"""Figures told without masks, against peer libraries and against models whose figures are known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, average_precision_score

from vilseg import ViLSeg
from vilseg.data.shards import write_tar
from vilseg.data.synthetic import scenes
from vilseg.errors import DataError
from vilseg.evaluation.proxy_metrics import MEASURES, HeldOut, agreement, mean_average_precision, measure, retrieval


def write_scenes(uri: str, count: int, seed: int = 0) -> str:
    drawn = scenes.pairs(count, seed=seed, size=32)
    write_tar(uri, ((pair.key, pair.image, "jpg", {"captions": pair.captions}) for pair in drawn))
    return uri


def test_retrieval_is_the_mean_reciprocal_rank() -> None:
    similarity = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 30)))
    expected = []
    for matrix in (similarity, similarity.T):
        for row in range(30):
            expected.append(1 / (1 + sum(float(x) > float(matrix[row, row]) for x in matrix[row])))
    captions = tuple(str(i) for i in range(30))
    assert retrieval(similarity, captions) == pytest.approx(np.mean(expected))
    assert retrieval(torch.eye(30), captions) == 1


def test_any_of_equal_captions_is_the_right_one() -> None:
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.0, 0.0, 1.0]])
    assert retrieval(similarity, ("a cat", "a cat", "a dog")) == 1
    assert retrieval(similarity, ("a cat", "a bird", "a dog")) < 1


def test_a_model_that_says_the_same_of_everything_is_no_good() -> None:
    assert retrieval(torch.zeros(11, 11), tuple(str(i) for i in range(11))) == pytest.approx(1 / 6)


def test_average_precision_against_scikit_learn() -> None:
    chance = np.random.default_rng(1)
    scores, holds = chance.normal(size=(50, 6)), chance.random((50, 6)) < 0.3
    holds[:, 2], holds[:, 3] = True, False  # these tell nothing
    told = [0, 1, 4, 5]
    expected = np.mean([average_precision_score(holds[:, i], scores[:, i]) for i in told])
    assert mean_average_precision(scores, holds) == pytest.approx(expected)
    assert np.isnan(mean_average_precision(scores[:, 2:4], holds[:, 2:4]))


def test_agreement_against_scikit_learn() -> None:
    chance = np.random.default_rng(2)
    first = chance.integers(0, 4, (3, 8, 8))
    second = np.where(chance.random(first.shape) < 0.6, (first + 1) % 4, chance.integers(0, 4, first.shape))
    valid = chance.random(first.shape) < 0.8
    expected = np.mean([adjusted_rand_score(a[v], b[v]) for a, b, v in zip(first, second, valid, strict=True)])
    found = agreement(*(torch.from_numpy(array) for array in (first, second, valid)))
    assert found == pytest.approx(expected)


def test_one_region_everywhere_gets_no_credit() -> None:
    zeros = torch.zeros(2, 4, 4, dtype=torch.long)
    assert agreement(zeros, zeros, torch.ones(2, 4, 4, dtype=torch.bool)) == 0
    halves = zeros.clone()
    halves[:, 2:] = 1
    assert agreement(halves, 1 - halves, torch.ones(2, 4, 4, dtype=torch.bool)) == 1, "names of clusters do not matter"


def test_a_model_is_measured_and_left_as_it_was(tmp_path: Path, save_tiny_model: Callable[[str, int], str]) -> None:
    pairs = HeldOut.load(write_scenes(f"{tmp_path}/0.tar", 40), side=32, limit=30)
    assert pairs.images_BHW3.shape == (30, 32, 32, 3)
    assert pairs.phrases
    model = ViLSeg.from_pretrained(save_tiny_model(f"{tmp_path}/model", 32)).train()
    figures = measure(model, pairs)
    assert set(figures) == set(MEASURES)
    assert model.training
    assert measure(model, pairs) == figures, "the views must not change from one model to the next"
    # Chance: 1/30 sum 1/rank.
    assert figures["retrieval"] == pytest.approx(sum(1 / i for i in range(1, 31)) / 30, abs=0.1)
    assert 0 <= figures["mutual_information"] < np.log(4)
    assert -0.5 < figures["agreement"] < 1


def test_phrases_are_looked_for_in_all_captions(tmp_path: Path) -> None:
    drawn = list(scenes.pairs(12, seed=0, size=32))
    texts = [["a boat", "a dog by the lake"] if i < 6 else ["a boat"] for i in range(12)]
    write_tar(
        f"{tmp_path}/0.tar",
        ((pair.key, pair.image, "jpg", {"captions": text}) for pair, text in zip(drawn, texts, strict=True)),
    )
    pairs = HeldOut.load(f"{tmp_path}/0.tar", side=32)
    assert pairs.captions == ("a boat",) * 12
    held = dict(zip(pairs.phrases, pairs.holds_BP.T.tolist(), strict=True))
    assert held["dog"] == [True] * 6 + [False] * 6
    assert all(held["boat"])


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    write_tar(f"{tmp_path}/0.tar", [("a", b"no picture", "jpg", {"caption": "a"})])
    with pytest.raises(DataError, match=r"0\.tar 0 can be read; at least 2"):
        HeldOut.load(f"{tmp_path}/0.tar", side=32)
