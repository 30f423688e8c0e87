"""Number of workers on a cluster that other jobs use too, without Ray."""

import pytest

from cluster.ray_session import Session
from jobs.train import elastic
from jobs.train.elastic import ScaleUpTrigger, wait_for_workers
from vilseg.config import TrainerConfig

TRAINER = TrainerConfig(workers=(1, 8), batch_size=256)
EIGHT = Session(cpus=32, gpus=8)


@pytest.fixture(autouse=True)
def _cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "current_session", lambda: EIGHT)
    monkeypatch.setattr(elastic, "_CHECK_INTERVAL_S", 0.0)
    monkeypatch.setattr(elastic.time, "sleep", lambda seconds: None)


def test_fewer_are_taken_where_others_hold_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def is_free(session: Session, workers: int) -> bool:
        tried.append(workers)
        return workers <= 4

    monkeypatch.setattr(elastic, "_can_place", is_free)
    monkeypatch.setattr(elastic, "_FULL_SIZE_TIMEOUT_S", 0.05)
    assert wait_for_workers(TRAINER) == (4, EIGHT)
    assert tried[:2] == [8, 8], "all at first: a lost worker's room is not free at once"
    assert tried[-1] == 4


def test_a_run_on_gpus_waits_for_gpus_that_were_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = iter([Session(cpus=32, gpus=0), Session(cpus=32, gpus=0), Session(cpus=32, gpus=2)])
    monkeypatch.setattr(elastic, "current_session", lambda: next(clusters))
    monkeypatch.setattr(elastic, "_can_place", lambda session, workers: True)
    assert wait_for_workers(TRAINER, on_gpus=True) == (2, Session(cpus=32, gpus=2))


def test_a_run_on_gpus_does_not_grow_onto_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    trigger = ScaleUpTrigger(TRAINER, 2, EIGHT)
    monkeypatch.setattr(elastic, "current_session", lambda: Session(cpus=32, gpus=0))
    monkeypatch.setattr(elastic, "_unreserved_resources", lambda: {"CPU": 32.0, "GPU": 0.0})
    assert trigger() is False


@pytest.mark.parametrize(("gpus", "grows"), [(0, False), (3, False), (4, True)])
def test_a_run_grows_only_into_free_room(monkeypatch: pytest.MonkeyPatch, gpus: int, grows: bool) -> None:
    monkeypatch.setattr(elastic, "_unreserved_resources", lambda: {"CPU": 20.0, "GPU": gpus})
    assert ScaleUpTrigger(TRAINER, 4, EIGHT)() is grows
