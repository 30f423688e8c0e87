"""Sweeps for real: trials under Ray Tune, in their own process and on workers of Ray Train, on pairs on an S3 server."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.ray_session import Session
from jobs.ingest import synthetic_scenes
from tune import sweep
from tune.search_space import SearchSpace
from tune.trial_records import TrialRecord, TrialRecords
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.errors import ConfigError, StorageError, UserError
from vilseg.evaluation.proxy_metrics import MEASURES
from vilseg.model import ViLSeg
from vilseg.training.metrics_log import read_metrics
from vilseg.training.run_dir import RunDirectory

ROOT = "s3://vilseg/test-tune"
SIZE = 32
BASE = (
    f"data.canvas={SIZE}",
    f"views.global_size={SIZE}",
    "model.image_encoder.sizes={width: 8, depth: 1}",
    "model.text_encoder.sizes={hidden_size: 16, num_hidden_layers: 0, num_attention_heads: 1}",
    "model.embedding_dim=16",
    "model.clusters=4",
    "loss.nouns.min_count=2",
    "loss.vision.weight=0",
    "optimizer.warmup_steps=2",
    "trainer.batch_size=16",
    "trainer.steps=12",
    "trainer.log_every=4",
    f"segmentation.input_size={SIZE}",
    f"trainer.storage={ROOT}/sweeps",
    f"data.source={ROOT}/pairs",
    f"data.held_out={ROOT}/pairs/00001.tar",
)


@pytest.fixture(scope="module", autouse=True)
def pairs(ray_cluster: Session) -> Iterator[None]:
    synthetic_scenes.main(f"{ROOT}/pairs", f"{ROOT}/unseen", pairs=560, unseen=6, size=SIZE, seed=3)
    yield
    storage.delete(ROOT)


def config(name: str, *overrides: str) -> RunConfig:
    return RunConfig.load(None, [*BASE, f"name={name}", *overrides])


def space(parameters: dict[str, Any], **values: Any) -> SearchSpace:
    return SearchSpace.model_validate({"parameters": parameters, "evaluations": 3, "images": 50, **values})


def test_the_best_of_some_trials_trains_on_and_a_failed_one_is_told_of(ray_cluster: Session) -> None:
    shown: list[int] = []
    varied = space(
        {
            "model.clusters": {"choice": [4, 6]},
            "optimizer.learning_rate": {"choice": [0.003, 1e30]},  # the second one leads to no number
        },
        search="grid",
        dataset=f"folder:{ROOT}/unseen",
    )
    made = config("grid")
    done = sweep.main(made, varied, ray_cluster, show=lambda records, _: shown.append(len(records)))
    assert done.best is not None
    assert done.best.point["optimizer.learning_rate"] == 0.003
    statuses = {(r.point["model.clusters"], r.point["optimizer.learning_rate"]): r.status for r in done.records}
    assert statuses == {(4, 0.003): "done", (6, 0.003): "done", (4, 1e30): "failed", (6, 1e30): "failed"}
    failed = next(record for record in done.records if record.status == "failed")
    assert "a lower optimizer.learning_rate" in failed.error
    assert shown[-1] == 4
    for record in done.records:
        if record.status == "done":
            assert [entry["step"] for entry in record.curve] == [4, 8, 12]
            assert all(measure in record.curve[-1] for measure in ("miou", *MEASURES))
            model = ViLSeg.from_pretrained(f"{done.uri}/trials/{record.number:04d}/model")
            assert model.config.clusters == record.point["model.clusters"]
            assert RunDirectory(f"{done.uri}/trials/{record.number:04d}").checkpoint_steps() == [8, 12]
    best = RunConfig.load(done.best_config)
    assert best.model.clusters == done.best.point["model.clusters"]
    assert best.name is None
    assert "<svg" in storage.read_text(done.report)
    assert json.loads(storage.read_text(f"{done.uri}/sweep.json"))["best"]["score"] == done.best.score
    assert not storage.exists(f"{done.uri}/tune"), "what Tune keeps for itself is gone"
    with pytest.raises(StorageError, match="go on with its sweep by --resume"):
        sweep.main(made, varied, ray_cluster)
    with pytest.raises(ConfigError, match=r"space\.yaml is another"):
        sweep.main(made, varied.replace(scheduler="asha"), ray_cluster, resume=True)


def test_a_sweep_goes_on_from_its_records(ray_cluster: Session) -> None:
    varied = space({"model.clusters": {"choice": [4, 5, 6]}}, objective="agreement")
    made = config("again")
    first = sweep.main(made, varied.replace(trials=1), ray_cluster)
    [ended] = first.records
    # As a driver that was killed leaves a trial: begun, one evaluation made, its checkpoint there.
    folder = RunDirectory(f"{first.uri}/trials/{ended.number:04d}")
    points = varied.points()
    storage.write_text(f"{first.uri}/records/0001.json", json.dumps(vars(TrialRecord(1, points[1]))))
    resumed = sweep.main(made, varied.replace(trials=3), ray_cluster, resume=True)
    assert [record.status for record in resumed.records] == ["done"] * 3
    assert resumed.records[0] == ended, "what has ended is not done again"
    assert [record.point for record in resumed.records] == points
    assert folder.last_step == 12
    # And one whose last steps are missing goes on from its last checkpoint.
    storage.delete(folder.checkpoint(12))
    ended.status = "running"
    ended.curve = ended.curve[:-1]
    TrialRecords(f"{first.uri}/records").save(ended)
    third = sweep.main(made, varied.replace(trials=3), ray_cluster, resume=True)
    assert [entry["step"] for entry in third.records[0].curve] == [4, 8, 12]
    assert third.records[0].curve[:2] == ended.curve


@pytest.mark.slow  # two and a half minutes
def test_trials_on_workers_do_as_those_alone_and_make_room_for_the_next(ray_cluster: Session) -> None:
    """Both workers' CPUs go to one trial after the other; a trial's losses are those of one that trains by itself."""
    varied = space({"loss.nouns.weight": {"choice": [1.0, 0.1]}}, search="grid", objective="nouns")
    asha = varied.replace(scheduler="asha", asha={"grace": 0.3, "reduction": 2})
    settings = ("trainer.log_every=1", "trainer.precision=float32")
    together = sweep.main(config("nested", "trainer.workers=2", *settings), asha, ray_cluster)
    assert [entry["step"] for entry in together.records[0].curve] == [4, 8, 12]
    assert together.records[0].status == "done"
    assert together.records[1].status == ("done" if together.records[1].step == 12 else "stopped")
    alone = sweep.main(config("alone", *settings), varied.replace(trials=1), ray_cluster)
    runs = [read_metrics(RunDirectory(f"{done.uri}/trials/0000")) for done in (together, alone)]
    for ours, theirs in zip(*runs, strict=True):
        losses = {name: value for name, value in theirs.items() if name.startswith("loss")}
        assert {name: ours[name] for name in losses} == pytest.approx(losses, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_population_hands_weights_over(ray_cluster: Session) -> None:
    varied = space(
        {"optimizer.learning_rate": {"loguniform": [0.0001, 0.01]}},
        scheduler="pbt",
        pbt={"interval": 0.2, "quantile": 0.5},
        trials=3,
        evaluations=6,
        objective="retrieval",
    )
    done = sweep.main(config("population"), varied, ray_cluster)
    assert [record.status for record in done.records] == ["done"] * 3
    before = [point["optimizer.learning_rate"] for point in varied.points()]
    after = [record.point["optimizer.learning_rate"] for record in done.records]
    assert before != after, "some took over the weights of another, and vary its learning rate"
    assert all(0.0001 <= rate <= 0.01 for rate in after)
    assert all(record.step == 12 for record in done.records)


def test_optuna_and_the_end_of_the_time(ray_cluster: Session) -> None:
    varied = space(
        {"loss.cross_modal.temperature": {"loguniform": [0.02, 0.3]}, "model.clusters": {"int": [2, 9]}},
        search="optuna",
        trials=3,
        objective="mutual_information",
    )
    done = sweep.main(config("optuna"), varied, ray_cluster)
    assert sorted(record.number for record in done.records) == [0, 1, 2]
    assert len({json.dumps(record.point) for record in done.records}) == 3
    more = varied.replace(trials=4)
    assert len(sweep.main(config("optuna"), more, ray_cluster, resume=True).records) == 4
    with pytest.raises(UserError, match="before the time was over"):
        sweep.main(config("short", "trainer.steps=4000", "trainer.log_every=4000"), varied, ray_cluster, time_budget=1)
