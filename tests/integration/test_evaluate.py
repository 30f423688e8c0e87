"""Evaluation on a cluster: the figures of one process to the last digit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.ray_session import Session
from jobs import evaluate
from vilseg.data.synthetic import scenes
from vilseg.errors import DataError

IMAGES = 70
"""Two whole parts and some."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write_masked_dataset(str(folder), IMAGES, seed=3, size=32)
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[[str, int], str]) -> str:
    return save_tiny_model(str(tmp_path_factory.mktemp("model")), 32)


def test_machines_that_share_the_images_give_the_figures_of_one(
    ray_cluster: Session, dataset: str, model: str, tmp_path: Path
) -> None:
    alone = evaluate.main(model, dataset, out=str(tmp_path / "alone"))
    told: list[tuple[int, int]] = []
    shared = evaluate.main(
        model, dataset, out=str(tmp_path / "shared"), session=ray_cluster, progress=lambda *done: told.append(done)
    )
    assert shared.to_dict() == alone.to_dict()
    assert shared.images == IMAGES
    assert told == [(0, IMAGES), (32, IMAGES), (64, IMAGES), (IMAGES, IMAGES)]
    for mine, theirs in ((shared.examples, alone.examples), (shared.worst, alone.worst)):
        assert [example.truth.name for example in mine] == [example.truth.name for example in theirs]
    figures = [json.loads((tmp_path / way / "evaluation.json").read_text()) for way in ("alone", "shared")]
    assert figures[0] == figures[1]


def test_a_broken_mask_is_told_in_one_sentence(ray_cluster: Session, dataset: str, model: str, tmp_path: Path) -> None:
    scenes.write_masked_dataset(str(tmp_path), 3, seed=3, size=32)
    broken = sorted((tmp_path / "masks").glob("*.png"))[1]
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match=broken.name):
        evaluate.main(model, f"folder:{tmp_path}", session=ray_cluster)
