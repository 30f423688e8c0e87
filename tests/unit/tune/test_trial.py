"""Configurations of the trials of a sweep, without Ray."""

from pathlib import Path

import pytest

from cluster.ray_session import Session
from tune import sweep
from tune.search_space import SearchSpace
from tune.trial import TrialRunner
from vilseg.config import RunConfig
from vilseg.errors import UserError


@pytest.mark.parametrize(
    "key", ["init", "model.init", "model.image_encoder.checkpoint", "model.text_encoder.checkpoint", "data.source"]
)
def test_relative_places_lead_to_the_same_files_in_a_trial(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial runs in another working directory than the sweep."""
    runners: list[TrialRunner] = []
    monkeypatch.setattr(sweep, "check", lambda *arguments, **options: None)
    monkeypatch.setattr(sweep, "_run_tuner", lambda runner, *others: runners.append(runner))
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "start").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    config = RunConfig.load(None, [f"{key}=start", "trainer.workers=1", "trainer.storage=runs", "name=sweep"])
    space = SearchSpace.model_validate({"parameters": {"trainer.seed": {"choice": [0]}}})
    with pytest.raises(UserError, match="no trial was evaluated"):
        sweep.main(config, space, Session(cpus=1, gpus=0))
    monkeypatch.chdir(elsewhere)
    value: object = runners[0].trial_config(0, {"trainer.seed": 0})
    for part in key.split("."):
        value = getattr(value, part)
    assert value == str(home / "start")
    assert (home / "runs" / "sweep" / "sweep.json").exists()
