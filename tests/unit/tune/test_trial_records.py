"""Records of trials, what is best among them, the searcher that goes on from them, and the page."""

import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from cluster.ray_session import Session
from tune.report import parameter_importance, rank_correlations, render
from tune.search_space import Point, SearchSpace
from tune.searcher import make_optuna_search, unfinished_points
from tune.sweep import plan_trials
from tune.trial_records import TrialRecord, TrialRecords, rank_points
from vilseg.config import RunConfig
from vilseg.errors import ConfigError

TEMPERATURE, CLUSTERS = "loss.cross_modal.temperature", "model.clusters"


def space(search: str = "random", **values: object) -> SearchSpace:
    parameters = {TEMPERATURE: {"loguniform": [0.01, 1.0]}, CLUSTERS: {"choice": [5, 15, 25]}}
    return SearchSpace.model_validate({"parameters": parameters, "search": search, "objective": "miou", **values})


def record(number: int, score: float, point: Point | None = None, *, step: int = 100, **values: object) -> TrialRecord:
    curve = [{"step": done, "seconds": float(done), "miou": score * done / step} for done in (step // 2, step)]
    made = {TEMPERATURE: 0.1, CLUSTERS: 5} if point is None else point
    return TrialRecord(number, made, **{"status": "done", "curve": curve, **values})  # type: ignore[arg-type]


def test_records_are_read_as_they_were_kept(tmp_path: Path) -> None:
    records = TrialRecords(f"{tmp_path}/records")
    kept = [record(1, 0.5), record(0, 0.4, status="failed", error="no", curve=[])]
    for one in kept:
        records.save(one)
    again = list(TrialRecords(f"{tmp_path}/records"))
    assert again == sorted(kept, key=lambda one: one.number)
    assert math.isnan(again[0].score("miou"))
    assert again[1].score("miou") == 0.5


def test_the_best_point_is_the_best_over_its_repeats() -> None:
    lucky = [record(i, score, {CLUSTERS: 5, "trainer.seed": i}) for i, score in enumerate((0.9, 0.1, 0.2))]
    steady = [record(i + 3, 0.5, {CLUSTERS: 15, "trainer.seed": i}) for i in range(3)]
    best, second = rank_points([*lucky, *steady], "miou")
    assert best.point == {CLUSTERS: 15}
    assert best.score == pytest.approx(0.5)
    assert second.score == pytest.approx(0.4)
    assert len(second.trials) == 3


def test_a_failed_trial_is_no_candidate_and_a_stopped_one_comes_after_those_that_ended() -> None:
    early = record(0, 0.9, {CLUSTERS: 5}, step=50, status="stopped")
    late = record(1, 0.6, {CLUSTERS: 15})
    failed = record(2, 1.0, {CLUSTERS: 25}, status="failed")
    assert [group.trials[0].number for group in rank_points([early, late, failed], "miou")] == [1, 0]
    assert rank_points([failed], "miou") == []


def test_only_what_has_not_ended_is_left() -> None:
    wanted = space(trials=6)
    points = wanted.points()
    records = [
        record(0, 0.5, points[0]),
        record(2, 0.5, points[2], status="failed"),
        record(3, 0.1, points[3], status="running"),
    ]
    assert [entry["number"] for entry in unfinished_points(wanted, records)] == [1, 3, 4, 5]
    assert all(entry["values"] == points[entry["number"]] for entry in unfinished_points(wanted, records))


def test_a_resumed_search_knows_what_was_tried() -> None:
    """The best of what is known lies at 25 clusters and a temperature of 0.5: suggestions must gather there."""
    chance = np.random.default_rng(0)

    def truth(point: Point) -> float:
        return (point[CLUSTERS] == 25) - abs(math.log(point[TEMPERATURE] / 0.5))

    known = []
    for number in range(40):
        point = {TEMPERATURE: float(np.exp(chance.uniform(np.log(0.01), 0))), CLUSTERS: int(chance.choice([5, 15, 25]))}
        known.append(record(number, truth(point), point))
    waiting = record(40, 0.2, {TEMPERATURE: 0.02, CLUSTERS: 5}, status="running")
    failed = record(41, 0, {TEMPERATURE: 0.03, CLUSTERS: 5}, status="failed", curve=[])
    search = pickle.loads(pickle.dumps(make_optuna_search(space("optuna"), [*known, waiting, failed])))
    suggested = []
    for number in range(21):
        suggested.append(search.suggest(str(number))["trial"])
        search.on_trial_complete(str(number), {"miou": truth(suggested[-1]["values"])})
    assert suggested[0] == {"number": 40, "values": waiting.point}, "what was on its way comes first, under its number"
    assert [entry["number"] for entry in suggested[1:]] == list(range(42, 62))
    points = [entry["values"] for entry in suggested[1:]]
    assert np.mean([point[CLUSTERS] == 25 for point in points]) > 0.6
    assert 0.25 < np.exp(np.median([np.log(point[TEMPERATURE]) for point in points])) < 1


def test_importance_tells_what_matters() -> None:
    chance = np.random.default_rng(0)
    records = []
    for number in range(24):
        point = {TEMPERATURE: float(np.exp(chance.uniform(np.log(0.01), 0))), CLUSTERS: int(chance.choice([5, 15, 25]))}
        records.append(record(number, math.log(point[TEMPERATURE]) + 0.01 * chance.normal(), point))
    shares = parameter_importance(space(), records)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[TEMPERATURE] > 0.9
    assert parameter_importance(space(), records[:3]) == {}, "of three trials nothing can be said"


def test_rank_correlation_is_over_evaluations_at_the_last_step_that_enough_trials_reached() -> None:
    records = [record(number, 0.1 * number) for number in range(8)]
    for one in records:
        for entry in one.curve:
            entry |= {"nouns": entry["miou"] ** 3, "agreement": -entry["miou"], "retrieval": 0.5}
    further = [record(8 + number, 5.0 - number, step=400) for number in range(3)]
    step, count, found = rank_correlations([*records, *further])
    assert (step, count) == (100, 8)
    assert found == pytest.approx({"nouns": 1, "agreement": -1})
    assert rank_correlations(records[:3]) == (0, 0, {})


def test_the_page_shows_every_trial_and_stands_for_itself() -> None:
    config = RunConfig.load(None, ["data.source=/pairs", "name=first"])
    points = space(trials=9).points()
    records = [record(number, 0.1 * number, point) for number, point in enumerate(points[:8])]
    records[1].curve.pop()
    records[1].status = "stopped"
    records.append(record(8, 0, points[8], status="failed", error="the loss is <nan>", curve=[]))
    html = render("first", config, space(), records, rank_points(records, "miou")[0], ["vilseg tune --space a&b"])
    assert html.count("<svg") == 4, "parallel coordinates, learning curves, heat map, importance"
    assert all(f"<td>{number:04d}</td>" in html for number in range(9))
    assert "the loss is &lt;nan&gt;" in html
    assert "0.7000" in html
    assert not re.search(r"(src|href)=\"http", html)
    only_failed = render("first", config, space(), records[8:], None, [])
    assert "No trial has a score" in only_failed
    assert "<svg" not in only_failed


def test_repeats_and_gaps_are_drawn() -> None:
    wanted = SearchSpace.model_validate(
        {
            "parameters": {
                "loss.vision.weight": {"choice": [0, 0.1]},
                "loss.vision.student_temperature": {"uniform": [0.1, 0.3], "when": {"loss.vision.weight": [0.1]}},
                "trainer.seed": {"choice": [0, 1]},
            },
            "objective": "miou",
        }
    )
    records = []
    for seed in (0, 1):
        records.append(record(2 * seed, 0.4 + seed / 10, {"loss.vision.weight": 0, "trainer.seed": seed}))
        point = {"loss.vision.weight": 0.1, "loss.vision.student_temperature": 0.2, "trainer.seed": seed}
        records.append(record(2 * seed + 1, 0.6 + seed / 10, point))
    html = render("gaps", RunConfig(), wanted, records, rank_points(records, "miou")[0], [])
    assert "0.650" in html
    assert "±0.050 (2)" in html, "mean, spread and number of the repeats"


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "concurrent", "each"),
    [(1, 2, 0, 2, (1, 0)), (1, 16, 4, 4, (1, 1)), (2, 2, 0, 1, (2, 0)), (2, 12, 0, 4, (3, 0)), (4, 32, 8, 2, (16, 4))],
)
def test_trials_share_the_cluster_without_waiting_for_each_other(
    workers: int, cpus: int, gpus: int, concurrent: int, each: tuple[int, int]
) -> None:
    config = RunConfig.load(None, [f"trainer.workers={workers}", "trainer.batch_size=64"])
    layout = plan_trials(config, Session(cpus, gpus))
    assert layout.concurrent == concurrent
    assert (layout.cpus, layout.gpus) == each
    assert layout.on_ray_workers == (workers > 1)
    assert layout.concurrent * layout.cpus <= cpus
    if layout.on_ray_workers:
        taken = Session(int(layout.cpus), int(layout.gpus)).worker_resources(workers)["CPU"] * workers
        assert layout.cpus - taken >= 0.5, "what reads for the workers has room"


def test_more_workers_than_cpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="there are 2 CPUs"):
        plan_trials(RunConfig.load(None, ["trainer.workers=4"]), Session(2, 0))


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"there are 2 GPUs .* set trainer\.workers=2"):
        plan_trials(RunConfig.load(None, ["trainer.workers=4"]), Session(16, 2))
