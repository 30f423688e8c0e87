"""Run directory, its complete checkpoints, and the prepared data of a run."""

import json
from pathlib import Path

import pytest

from tests.unit.flaky_store import FlakyStore
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.shards import Shard
from vilseg.errors import ConfigError
from vilseg.text.noun_phrases import NounPhrases
from vilseg.text.tokenizer import FixedTokenizer, train_tokenizer
from vilseg.training.checkpoints import write_checkpoint
from vilseg.training.metrics_log import read_metrics
from vilseg.training.run_dir import PreparedRun, RunDirectory, checkpoint_directory_name
from vilseg.training.run_setup import resume


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    folder = RunDirectory(str(tmp_path / "run"))
    assert folder.checkpoint_steps() == []
    assert folder.last_step == 0
    for step in (1000, 20, 300):
        write_checkpoint(folder, {"step": step})
    (tmp_path / "run" / "checkpoints" / ".trainer").write_bytes(b"x")
    assert folder.checkpoint_steps() == [20, 300, 1000]
    whole = Path(folder.state(1000)).read_bytes()
    Path(folder.state(1000)).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "run" / "checkpoints" / checkpoint_directory_name(2000)).mkdir()
    assert folder.checkpoint_steps() == [20, 300], "one that was cut off does not count"
    assert folder.last_step == 300
    assert folder.checkpoint(20).endswith("run/checkpoints/step-00000020")


def test_a_store_that_is_away_is_waited_for_where_a_worker_begins_anew(flaky_store: FlakyStore) -> None:
    run_dir = RunDirectory("s3://bucket/run")
    write_checkpoint(run_dir, {"step": 20})
    storage.write_text(run_dir.metrics, '{"step": 20}\n')
    flaky_store.away(2)
    assert run_dir.last_step == 20
    flaky_store.away(2)
    assert read_metrics(run_dir) == [{"step": 20}]


def test_what_a_run_is_begun_with_survives_json() -> None:
    tokenizer = train_tokenizer(["a dog", "Käfer"], 100)
    fixed = FixedTokenizer(tokenizer.backend_tokenizer.to_str(), 9, tokenizer.pad_token_id)
    prepared = PreparedRun(
        (Shard("s3://b/0.tar", 3, "b"), Shard("s3://b/1.tar", 0)), NounPhrases(("dog",), {"dogs": 0}), fixed
    )
    again = PreparedRun.from_json(prepared.to_json())
    assert again == prepared
    assert again.tokenizer(["a dog"]).tolist() == fixed(["a dog"]).tolist()


def test_what_a_run_of_before_there_were_mixes_was_begun_with_is_read(tmp_path: Path) -> None:
    _, folder = begun(tmp_path)
    old = json.loads(storage.read_text(folder.prepared))
    old["shards"] = [[uri, pairs] for uri, pairs, _ in old["shards"]]
    assert PreparedRun.from_json(json.dumps(old)).shards == (Shard("0.tar", 3),)


def begun(tmp_path: Path, *overrides: str) -> tuple[RunConfig, RunDirectory]:
    config = RunConfig.load(None, ["name=r", "data.source=pairs", "trainer.steps=50", *overrides])
    folder = RunDirectory(str(tmp_path / "r"))
    storage.write_text(folder.config, config.to_yaml())
    tokenizer = FixedTokenizer(train_tokenizer(["a dog"], 100).backend_tokenizer.to_str(), 9, 0)
    storage.write_text(folder.prepared, PreparedRun((Shard("0.tar", 3),), NounPhrases(), tokenizer).to_json())
    return config, folder


def test_a_resumed_run_may_be_longer_and_its_settings_are_kept(tmp_path: Path) -> None:
    config, folder = begun(tmp_path)
    longer = config.with_overrides(["trainer.steps=80", "optimizer.learning_rate=0.1", "segmentation.image_mix=0.2"])
    assert resume(longer, folder).shards == (Shard("0.tar", 3),)
    assert RunConfig.load(folder.config) == longer


@pytest.mark.parametrize(
    "change",
    ["trainer.batch_size=8", "trainer.seed=1", "loss.vision.weight=0", "data.source=others", "model.clusters=3"],
)
def test_what_a_checkpoint_depends_on_must_stay(tmp_path: Path, change: str) -> None:
    config, folder = begun(tmp_path)
    with pytest.raises(ConfigError, match=f"cannot resume .*{change.partition('=')[0]} was"):
        resume(config.with_overrides([change]), folder)
    assert RunConfig.load(folder.config) == config


def test_fewer_steps_than_were_made_are_refused(tmp_path: Path) -> None:
    config, folder = begun(tmp_path)
    write_checkpoint(folder, {"step": 40})
    with pytest.raises(ConfigError, match="has made 40 steps"):
        resume(config.with_overrides(["trainer.steps=30"]), folder)
    resume(config.with_overrides(["trainer.steps=40"]), folder)
