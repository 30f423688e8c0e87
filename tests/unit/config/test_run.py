"""The run configuration: defaults, overrides, and one sentence for whatever is wrong."""

from pathlib import Path

import pytest
import yaml

from vilseg.config import RunConfig, TrainerConfig
from vilseg.config.loss import LossConfig
from vilseg.errors import ConfigError


def sentence(*overrides: str, uri: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(uri, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trainer.batchsize=8", "trainer.batch_size"),
        ("model.image_encoder.frozn=true", "model.image_encoder.frozen"),
        ("loss.mutual_info.weight=1", "loss.mutual_information"),
        ("optimiser.learning_rate=1", "optimizer"),
        ("data.columns.images=x", "data.columns.image"),
        ("trainr.steps=1", "trainer"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(override: str, nearest: str) -> None:
    message = sentence(override)
    assert override.partition("=")[0].split(".")[0] in message
    assert f"did you mean '{nearest}" in message


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    config = RunConfig.load(
        None,
        [
            "trainer.steps=7",
            "optimizer.learning_rate=1e-4",
            "views.global_scale=[0.2, 1]",
            "model.image_encoder.sizes={width: 32, depth: 1}",
            "model.image_encoder.factory_options.name=a=b",
            "trainer.keep_checkpoints=null",
            "model.image_encoder.frozen=true",
            "name=first",
            "name=second",
        ],
    )
    assert config.trainer.steps == 7
    assert config.optimizer.learning_rate == 1e-4
    assert config.views.global_scale == (0.2, 1.0)
    assert config.model.image_encoder.sizes == {"width": 32, "depth": 1}
    assert config.model.image_encoder.factory_options == {"name": "a=b"}
    assert config.trainer.keep_checkpoints is None
    assert config.model.image_encoder.frozen is True
    assert config.name == "second"


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("trainer: {steps: 5, seed: 3}\nname: kept\n")
    config = RunConfig.load(str(path), ["trainer.steps=9"])
    assert (config.trainer.steps, config.trainer.seed, config.name) == (9, 3, "kept")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing set\n")
    assert RunConfig.load(str(path)) == RunConfig()


@pytest.mark.parametrize("override", ["trainer.steps", "=3", ""])
def test_what_is_no_override_is_told(override: str) -> None:
    assert "key.sub=value" in sentence(override)


def test_a_value_that_is_no_yaml_is_told() -> None:
    assert "views.global_scale" in sentence("views.global_scale=[0.2, 1")


def test_a_stage_without_its_beginning_is_told() -> None:
    assert "stage self-train needs init" in sentence("stage=self-train")
    assert "either 'init' or 'model.init'" in sentence("init=runs/first", "model.init=some/clip")


def test_a_best_checkpoint_by_what_is_not_measured_is_told() -> None:
    best = "trainer.best_by=held_out/retrieval"
    assert "needs data.held_out" in sentence(best)
    assert "trainer.sharding=fsdp; name a loss" in sentence(best, "data.held_out=pairs", "trainer.sharding=fsdp")
    assert RunConfig.load(None, [best, "data.held_out=pairs"]).trainer.best_by == "held_out/retrieval"


def test_variants_without_a_cache_are_told() -> None:
    assert "cache_variants are those of a feature_cache" in sentence("data.cache_variants=2")


def test_keys_below_a_value_are_told() -> None:
    assert "'name' holds a value" in sentence("name=x", "name.sub=1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: [1, 2", "not valid YAML"),
        ("- a\n- b\n", "mapping of keys to values, not list"),
        ("trainer: 3\n", "trainer"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = sentence(uri=str(path))
    assert str(path) in message
    assert words in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/none.yaml does not exist" in sentence(uri=f"{tmp_path}/none.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.steps=many", ["trainer.steps", "integer", "'many'"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate", "greater than 0", "-1"]),
        ("loss.mutual_information.entropy_weight=0.5", ["loss.mutual_information.entropy_weight", "0.5"]),
        ("trainer.precision=float16", ["trainer.precision", "'float32'", "'float16'"]),
        ("optimizer.betas=[0.9, 2]", ["optimizer.betas.1", "2"]),
        ("optimizer.betas=[0.9, 1]", ["optimizer.betas.1", "less than 1"]),
        ("trainer.seed=-1", ["trainer.seed", "-1"]),
        ("views.global_scale=[0, 1]", ["views.global_scale.0", "greater than 0"]),
        ("views.local_scale=[0.4, 0.1]", ["views.local_scale", "the first, 0.4, is more than the second, 0.1"]),
        ("views.global_scale=[0.5, 1.5]", ["views.global_scale.1", "1.5"]),
        ("loss.nouns.weight=.inf", ["loss.nouns.weight", "finite"]),
        ("loss.mutual_information.overclusters=1", ["loss.mutual_information.overclusters", "at least 2", "1"]),
        ("loss.vision.form=moco", ["loss.vision.form", "'infonce'", "'moco'"]),
        ("trainer.chunk_size=0", ["trainer.chunk_size", "0"]),
        ("trainer.workers=0", ["trainer.workers", "at least 1", "0"]),
        ("trainer.workers=[0, 2]", ["trainer.workers", "at least 1"]),
        ("trainer.workers=[4, 2]", ["trainer.workers", "fewest", "4"]),
    ],
)
def test_a_bad_value_is_told_with_its_key(override: str, words: list[str]) -> None:
    message = sentence(override)
    assert [word for word in words if word not in message] == []


def test_a_batch_that_cannot_be_shared_is_told() -> None:
    RunConfig.load(None, ["trainer.workers=4"]).trainer.check_even_split()
    with pytest.raises(ConfigError, match=r"batch_size 256 cannot be shared evenly by 3 workers.*255"):
        RunConfig.load(None, ["trainer.workers=3"]).trainer.check_even_split()


def test_elastic_workers_are_as_many_as_share_a_batch_evenly() -> None:
    trainer = RunConfig.load(None, ["trainer.workers=[1, 6]", "trainer.batch_size=20"]).trainer
    trainer.check_even_split()
    assert (trainer.min_workers, trainer.max_workers) == (1, 6)
    assert [trainer.max_even_workers(possible) for possible in range(8)] == [0, 1, 2, 2, 4, 5, 5, 5]
    with pytest.raises(ConfigError, match="cannot be shared evenly by 6 workers"):
        RunConfig.load(None, ["trainer.workers=[6, 7]", "trainer.batch_size=20"]).trainer.check_even_split()


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ([], 0.07),
        (["loss.cross_modal.form=sigmoid"], 0.1),
        (["loss.cross_modal.form=sigmoid", "loss.cross_modal.temperature=0.2"], 0.2),
    ],
)
def test_the_temperature_starts_where_the_form_says_unless_it_is_set(overrides: list[str], start: float) -> None:
    config = RunConfig.load(None, overrides)
    assert config.loss.cross_modal.temperature == start
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config


def mix(*uris: str) -> str:
    return f"data.mix=[{', '.join(f'{{source: {uri}}}' for uri in uris)}]"


def test_sources_have_names() -> None:
    def sources(*overrides: str) -> dict[str, tuple[str, float]]:
        data = RunConfig.load(None, overrides).data
        return {name: (part.source, part.weight) for name, part in data.sources.items()}

    assert sources() == {}
    assert sources("data.source=s3://b/pairs") == {"": ("s3://b/pairs", 1.0)}
    weighted = "data.mix=[{source: s3://b/photos/, weight: 3}, {source: scenes.tar}]"
    assert sources(weighted) == {"photos": ("s3://b/photos/", 3.0), "scenes.tar": ("scenes.tar", 1.0)}
    assert sources(mix("s3://a/pairs", "s3://b/pairs")).keys() == {"0-pairs", "1-pairs"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.source=a", mix("b")], ["data", "either 'source' or 'mix'"]),
        ([mix("s3://b/a", "s3://b/a/")], ["mix names s3://b/a twice", "sum of the weights"]),
        ([mix("a", "b"), "data.feature_cache=c"], ["feature_cache is made of one source"]),
        (["data.mix=[{source: a, weight: 0}]"], ["data.mix.0.weight", "greater than 0"]),
        (["data.mix=[{weight: 1}]"], ["data.mix.0.source", "required"]),
        (["data.mix=[{sorce: a}]"], ["data.mix.0.sorce", "did you mean 'data.mix.0.source'"]),
        (["data.mix={a: 1}"], ["data.mix", "list"]),
        (["data.shuffle_shards=0"], ["data.shuffle_shards", "greater than 0"]),
    ],
)
def test_a_mix_that_makes_no_sense_is_told(overrides: list[str], words: list[str]) -> None:
    message = sentence(*overrides)
    assert [word for word in words if word not in message] == []


def test_checkpoint_and_factory_exclude_each_other() -> None:
    message = sentence("model.image_encoder.checkpoint=a", "model.image_encoder.factory=b:c")
    assert "model.image_encoder" in message
    assert "not both" in message


def test_a_changed_configuration_is_a_checked_copy() -> None:
    config = RunConfig()
    changed = config.replace(name="42", trainer=TrainerConfig(steps=3), **{"data.filters.min_words": 2})
    assert (changed.name, changed.trainer.steps, changed.data.filters.min_words) == ("42", 3, 2)
    assert config == RunConfig()
    assert config.trainer.replace(workers=[1, 4]).workers == (1, 4)
    with pytest.raises(ConfigError, match=r"'trainer\.steps'.*greater than 0"):
        config.replace(**{"trainer.steps": 0})
    with pytest.raises(ConfigError, match=r"unknown configuration key 'stepps'; did you mean 'steps'"):
        config.trainer.replace(stepps=1)


def test_parts_cannot_be_assigned_to() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().trainer.steps = 3


def test_the_resolved_tree_is_whole_and_reads_back(tmp_path: Path) -> None:
    config = RunConfig.load(None, ["views.local_scale=[0.1, 0.3]", "data.source=s3://bucket/pairs", "name=größe"])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.load(str(path)) == config
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert tree["loss"].keys() == LossConfig.model_fields.keys()
    assert tree["views"]["local_scale"] == [0.1, 0.3]
    assert tree["data"]["source"] == "s3://bucket/pairs"


def test_parts_of_two_configurations_are_independent() -> None:
    first, second = RunConfig(), RunConfig()
    first.model.image_encoder.sizes["width"] = 8
    assert second.model.image_encoder.sizes == {}
