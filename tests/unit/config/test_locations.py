"""Keys that name locations: all of them are found by their type and mean the same in another working directory."""

from pathlib import Path

import pytest

from serve.config import ServeConfig
from tune.search_space import SearchSpace
from vilseg.config import RunConfig, absolute_locations, is_hub_id, list_locations

LOCATIONS = {
    "data.source": "pairs",
    "data.held_out": "held",
    "data.feature_cache": "cache",
    "init": "before",
    "model.image_encoder.checkpoint": "vit",
    "model.text_encoder.checkpoint": "bert",
    "trainer.storage": "runs",
}


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("before", "vit", "bert"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_every_location_of_a_run_is_found_and_made_absolute(working_directory: Path) -> None:
    config = RunConfig.load(None, [f"{key}={value}" for key, value in LOCATIONS.items()])
    assert {location.key: location.value for location in list_locations(config)} == LOCATIONS
    moved = {location.key: location.value for location in list_locations(absolute_locations(config))}
    assert moved == {key: str(working_directory / value) for key, value in LOCATIONS.items()}


def test_sources_of_a_mix_and_model_init(working_directory: Path) -> None:
    config = RunConfig.load(None, ["data.mix=[{source: a, weight: 2}, {source: s3://b/c}]", "model.init=before"])
    moved = absolute_locations(config)
    assert [part.source for part in moved.data.mix] == [str(working_directory / "a"), "s3://b/c"]
    assert [part.weight for part in moved.data.mix] == [2, 1]
    assert moved.model.init == str(working_directory / "before")


@pytest.mark.parametrize("reference", ["gpt2", "openai/clip-vit-base-patch16"])
def test_hub_ids_stay_unless_there_is_such_a_path(working_directory: Path, reference: str) -> None:
    config = RunConfig().replace(**{"model.text_encoder.checkpoint": reference})
    assert is_hub_id(reference)
    assert absolute_locations(config).model.text_encoder.checkpoint == reference
    (working_directory / reference).mkdir(parents=True)
    assert absolute_locations(config).model.text_encoder.checkpoint == str(working_directory / reference)


@pytest.mark.parametrize("reference", ["./model", "/models/first", "~/model", "s3://bucket/model", "runs/first/model"])
def test_paths_and_uris_are_no_hub_ids(reference: str) -> None:
    assert not is_hub_id(reference)


def test_locations_of_a_deployment_and_a_search_space(working_directory: Path) -> None:
    served = absolute_locations(ServeConfig(models={"v1.2": "vit", "hub": "org/model"}, keys="keys.txt"))
    assert served.models == {"v1.2": str(working_directory / "vit"), "hub": "org/model"}
    assert served.keys == str(working_directory / "keys.txt")
    assert served.videos.storage == str(working_directory / "runs/serve/videos")
    space = SearchSpace.model_validate({"parameters": {"trainer.seed": {"choice": [1]}}, "dataset": "folder:val"})
    assert absolute_locations(space).dataset == f"folder:{working_directory / 'val'}"
