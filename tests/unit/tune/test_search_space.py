"""Spaces: what they refuse, and the points they make."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tune import sweep
from tune.search_space import SearchSpace, config_at_point, point_key
from vilseg.config import RunConfig
from vilseg.errors import ConfigError

TEMPERATURE, CLUSTERS = "loss.cross_modal.temperature", "model.clusters"
CONFIGS = Path(__file__).parents[3] / "configs"


def space(parameters: dict[str, Any], **values: Any) -> SearchSpace:
    overrides = [
        f"parameters={json.dumps(parameters)}",
        *(f"{key}={json.dumps(value)}" for key, value in values.items()),
    ]
    return SearchSpace.load(None, overrides)


def config(*overrides: str) -> RunConfig:
    return RunConfig.load(str(CONFIGS / "demo.yaml"), ["data.source=/pairs", "trainer.workers=1", *overrides])


@pytest.mark.parametrize("name", sorted(path.name for path in (CONFIGS / "spaces").glob("*.yaml")))
def test_shipped_spaces_fit_the_demo(name: str) -> None:
    shipped = SearchSpace.load(str(CONFIGS / "spaces" / name)).replace(dataset="folder:/val")
    shipped.check(config("loss.vision.weight=0.1"))
    if shipped.search != "optuna":
        assert len(shipped.points()) == shipped.trials


def test_random_points_are_drawn_once_and_always_the_same() -> None:
    parameters = {
        TEMPERATURE: {"loguniform": [0.01, 1]},
        CLUSTERS: {"choice": [5, 15]},
        "trainer.seed": {"int": [0, 3]},
    }
    points = space(parameters, trials=300).points()
    assert points == space(parameters, trials=300).points()
    assert points != space(parameters, trials=300, seed=1).points()
    assert len({point_key(point) for point in points}) == 300
    below = sum(point[TEMPERATURE] < 0.1 for point in points)
    assert 110 < below < 190, "every order of magnitude is as likely as the next"
    assert {point[CLUSTERS] for point in points} == {5, 15}
    assert {point["trainer.seed"] for point in points} == {0, 1, 2, 3}


def test_a_small_space_is_tried_whole_and_nothing_twice() -> None:
    points = space({CLUSTERS: {"choice": [5, 15, 25]}}, trials=100).points()
    assert sorted(point[CLUSTERS] for point in points) == [5, 15, 25]


def test_a_grid_has_every_combination_of_what_varies_together() -> None:
    parameters = {
        "loss.vision.weight": {"choice": [0, 0.1]},
        "loss.vision.student_temperature": {"choice": [0.1, 0.2], "when": {"loss.vision.weight": [0.1]}},
        CLUSTERS: {"int": [5, 6]},
    }
    points = space(parameters, search="grid", trials=100).points()
    assert len(points) == 2 + 4
    assert all(("loss.vision.student_temperature" in point) == (point["loss.vision.weight"] == 0.1) for point in points)
    assert len(space(parameters, search="grid", trials=4).points()) == 4


def test_a_point_becomes_a_configuration() -> None:
    made = config_at_point(config(), {TEMPERATURE: 3e-05, CLUSTERS: 7, "model.image_encoder.sizes.width": 8})
    assert made.loss.cross_modal.temperature == pytest.approx(3e-05)
    assert (made.model.clusters, made.model.image_encoder.sizes["width"]) == (7, 8)


@pytest.mark.parametrize(
    ("parameters", "values", "told"),
    [
        ({"model.cluster": {"choice": [5]}}, {}, "did you mean 'model.clusters'"),
        ({CLUSTERS: {"choice": [5, 1]}}, {}, "model.clusters.*greater than or equal to 2.*1"),
        ({CLUSTERS: {"choice": []}}, {}, "at least 1 item"),
        ({CLUSTERS: {}}, {}, "give one of choice, uniform, loguniform and int"),
        ({CLUSTERS: {"choice": [5], "int": [1, 2]}}, {}, "give one of"),
        ({TEMPERATURE: {"uniform": [0.3, 0.1]}}, {}, "uniform goes from 0.3 to 0.1"),
        ({TEMPERATURE: {"loguniform": [0, 0.1]}}, {}, "above 0 has a logarithm"),
        ({TEMPERATURE: {"uniform": [0.1, 0.3]}}, {"search": "grid"}, "no end of values"),
        ({CLUSTERS: {"choice": [5], "when": {TEMPERATURE: [1]}}}, {}, "no such parameter comes before it"),
        ({CLUSTERS: {"choice": [5]}}, {"scheduler": "hyperband"}, "scheduler.*'none', 'asha' or 'pbt'"),
        ({"trainer.steps": {"choice": [5]}}, {}, "all trials of a sweep share it"),
        ({CLUSTERS: {"choice": [5]}}, {"scheduler": "pbt"}, "model.clusters, but pbt hands weights"),
        ({TEMPERATURE: {"uniform": [0.1, 0.3]}}, {"scheduler": "pbt"}, "temperature, but pbt hands weights"),
        ({"loss.vision.weight": {"choice": [0, 1]}}, {"scheduler": "pbt"}, "loss.vision.weight from 0"),
        (
            {"loss.nouns.weight": {"choice": [1]}},
            {"scheduler": "pbt", "search": "optuna"},
            "pbt, which searches by itself",
        ),
        ({CLUSTERS: {"choice": [5]}}, {"objective": "miou", "dataset": None}, "give --dataset KIND:URI"),
        ({CLUSTERS: {"choice": [5]}}, {"objective": "agreement"}, "give data.held_out=URI"),
    ],
)
def test_what_cannot_be_swept(parameters: dict[str, Any], values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        space(parameters, **{"dataset": "folder:/val", **values}).check(config())


def test_population_training_is_of_one_process() -> None:
    population = space({"loss.nouns.weight": {"uniform": [0.1, 1]}}, scheduler="pbt", dataset="folder:/val")
    population.check(config())
    with pytest.raises(ConfigError, match=r"set trainer\.workers=1"):
        population.check(config("trainer.workers=2"))


def test_cached_features_are_of_one_encoder() -> None:
    encoders = space({"data.canvas": {"choice": [64, 96]}}, dataset="folder:/val")
    encoders.check(config())
    with pytest.raises(ConfigError, match=r"data\.canvas, but the features in data\.feature_cache"):
        encoders.check(config("data.feature_cache=/cache"))
    beginnings = space({"init": {"choice": ["runs/a", "runs/b"]}}, dataset="folder:/val")
    with pytest.raises(ConfigError, match=r"varies init, but the features in data\.feature_cache"):
        beginnings.check(config("data.feature_cache=/cache"))


def test_variants_in_a_cache_are_of_one_augmentation() -> None:
    flips = space({"views.flip": {"choice": [0, 0.5]}}, dataset="folder:/val")
    dropped = space({"views.feature_dropout": {"choice": [0, 0.5]}}, dataset="folder:/val")
    flips.check(config("data.feature_cache=/cache"))
    variants = config("data.feature_cache=/cache", "data.cache_variants=2")
    dropped.check(variants)
    with pytest.raises(ConfigError, match=r"varies views\.flip, but the features in data\.feature_cache"):
        flips.check(variants)


def test_the_objective_follows_what_there_is() -> None:
    assert space({CLUSTERS: {"choice": [5]}}).objective_name == "nouns"
    assert space({CLUSTERS: {"choice": [5]}}, dataset="folder:/val").objective_name == "miou"
    assert (
        space({CLUSTERS: {"choice": [5]}}, dataset="folder:/val", objective="agreement").objective_name == "agreement"
    )


def test_values_of_a_log_range_stay_in_it() -> None:
    points = space({TEMPERATURE: {"loguniform": [0.02, 0.3]}}, trials=50).points()
    assert all(0.02 <= point[TEMPERATURE] <= 0.3 and math.isfinite(point[TEMPERATURE]) for point in points)


def test_places_mean_the_same_in_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run in another working directory: relative models, also those that the space chooses from, are made absolute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit").mkdir()
    key = "model.image_encoder.checkpoint"
    chosen = space(
        {key: {"choice": ["vit", "org/vit", "s3://b/vit"]}, "trainer.seed": {"choice": [1]}}, dataset="folder:val"
    )
    moved = sweep.absolute_choices(config(), chosen)
    assert moved.parameters[key].choice == [str(tmp_path / "vit"), "org/vit", "s3://b/vit"]
    assert moved.parameters["trainer.seed"].choice == [1]
    assert moved.dataset == f"folder:{tmp_path / 'val'}"
