"""Overhead of a sweep over its trainings, and time saved by early stopping.

Overhead: the same training, with the same evaluations and checkpoints, is timed as a trial under Tune and outside of Tune, one
after the other on one CPU. Early stopping: ASHA is compared with a random search that trains every trial to its end, on the same
points in the same order and on all CPUs. The compared value is the time until a trial ends with a score within 2 % of the best
score that either search found.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cli import console
from cluster.ray_session import Session, ray_session
from jobs.ingest import synthetic_scenes
from jobs.train.ray_data import read_batches_locally
from tune import sweep
from tune.report import rank_correlations
from tune.search_space import SearchSpace
from tune.trial_records import TrialRecord
from vilseg.config import RunConfig
from vilseg.evaluation.datasets import FirstImages, FolderDataset
from vilseg.evaluation.evaluate import evaluate
from vilseg.segmentation.segmenter import Segmenter
from vilseg.training import run_results, run_setup
from vilseg.training.checkpoints import write_checkpoint
from vilseg.training.metrics_log import MetricsFile

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
_PAIRS, _UNSEEN = 4_000, 60
_OVERHEAD_STEPS, _OVERHEAD_TRIALS, _ALONE = 150, 5, 3
_SEARCH_STEPS, _SEARCH_TRIALS = 300, 16
_EVALUATIONS = 5
_NEAR = 0.98
_POINTS: dict[str, Any] = {
    "optimizer.learning_rate": {"loguniform": [0.0001, 0.02]},
    "loss.nouns.weight": {"loguniform": [0.05, 2.0]},
    "model.clusters": {"choice": [5, 10, 15, 20, 25, 30, 35]},
}


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        out: folder for the scenes and the sweeps; replaced if it exists.

    Returns:
        ``ratio`` (time of the random search until a score within 2 % of the best, over that of ASHA; None if a search found
        none), ``asha_share`` (its inverse), ``overhead_seconds`` (of one more trial, beyond its training), ``overhead_share``
        (the same as a fraction of 120 s), ``sweep_seconds`` (cost of a sweep, independent of its number of trials),
        ``rank_correlation`` (of the proxy metrics with mIoU over the trials of the random search), and the raw results.
    """
    out = out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    with ray_session() as session:
        console.log("[scenes]")
        synthetic_scenes.main(f"{out}/pairs", f"{out}/unseen", pairs=_PAIRS, unseen=_UNSEEN, size=64, seed=0)
        overhead = _overhead(out, session)
        searches = {scheduler: _search(out, session, scheduler) for scheduler in ("none", "asha")}
    best = max(score for _, score in [*searches["none"]["ended"], *searches["asha"]["ended"]])
    reached = {
        name: min((at for at, score in found["ended"] if score >= _NEAR * best), default=None)
        for name, found in searches.items()
    }
    random, asha = reached["none"], reached["asha"]
    both = random is not None and asha is not None
    return {
        "benchmark": "tune",
        "ratio": round(random / asha, 3) if both else None,  # type: ignore[operator]
        "asha_share": round(asha / random, 3) if both else None,  # type: ignore[operator]
        **overhead,
        "best": round(best, 4),
        "seconds_to_best": {name: None if at is None else round(at, 1) for name, at in reached.items()},
        "seconds": {name: round(found["seconds"], 1) for name, found in searches.items()},
        "steps": {name: found["steps"] for name, found in searches.items()},
        "trials": _SEARCH_TRIALS,
        "rank_correlation": searches["none"]["rank_correlation"],
    }


def _config(out: Path, name: str, steps: int) -> RunConfig:
    overrides = [
        f"data.source={out}/pairs",
        f"trainer.storage={out}/sweeps",
        "trainer.workers=1",
        f"trainer.steps={steps}",
    ]
    return RunConfig.load(str(CONFIG), [*overrides, f"name={name}"])


def _space(out: Path, parameters: dict[str, Any], trials: int, **values: Any) -> SearchSpace:
    return SearchSpace.model_validate(
        {
            "parameters": parameters,
            "trials": trials,
            "dataset": f"folder:{out}/unseen",
            "images": _UNSEEN,
            "evaluations": _EVALUATIONS,
            **values,
        }
    )


def _overhead(out: Path, session: Session) -> dict[str, Any]:
    """Seconds that one more trial costs beyond its training, and those that a sweep costs whatever its trials."""
    console.log("[overhead]")
    config = _config(out, "alone", _OVERHEAD_STEPS)
    alone = [_alone(out, config, number) for number in range(_ALONE)]
    one, many = (_sweep_seconds(out, session, trials) for trials in (1, _OVERHEAD_TRIALS))
    a_trial = (many - one) / (_OVERHEAD_TRIALS - 1)
    seconds = a_trial - median(alone)
    return {
        "overhead_seconds": round(seconds, 2),
        "overhead_share": round(seconds / 120, 4),
        "sweep_seconds": round(one - a_trial, 2),
        "trial_seconds": round(a_trial, 2),
        "alone_seconds": [round(value, 2) for value in alone],
    }


def _sweep_seconds(out: Path, session: Session, trials: int) -> float:
    config = _config(out, f"overhead-{trials}", _OVERHEAD_STEPS)
    space = _space(out, {"trainer.seed": {"int": [0, trials - 1]}}, trials, search="grid")
    started = time.perf_counter()
    sweep.main(config, space, Session(1, 0))  # one after the other, as the trainings alone are
    return time.perf_counter() - started


def _alone(out: Path, config: RunConfig, number: int) -> float:
    """Seconds of a training with evaluations and checkpoints, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    every = config.trainer.steps // _EVALUATIONS
    trainer = config.trainer.replace(seed=number, storage=f"{out}/alone", checkpoint_every=every)
    config = config.replace(name=f"alone-{number}", trainer=trainer)
    folder = run_setup.open_run_directory(config, resume=False)
    prepared = run_setup.prepare(config, folder)
    trainer = run_setup.make_trainer(config, folder, prepared, torch.device("cpu"))
    dataset = FirstImages(FolderDataset(f"{out}/unseen"), _UNSEEN)
    metrics_file = MetricsFile(folder, config, 0)

    def on_checkpoint() -> None:
        metrics_file.sync()
        write_checkpoint(folder, trainer.state_dict())
        model = trainer.objective.model
        evaluate(Segmenter(model, dataset.classes, device="cpu"), dataset)
        model.train()

    trainer.train(read_batches_locally(config, prepared), on_report=metrics_file.add, on_checkpoint=on_checkpoint)
    run_results.save_trained_model(trainer.objective.model, config, folder, {})
    torch.set_num_threads(threads)
    return time.perf_counter() - started


def _search(out: Path, session: Session, scheduler: str) -> dict[str, Any]:
    """Seconds and score of every finished trial, and what the search took."""
    console.log(f"[search, scheduler {scheduler}]")
    ended: dict[int, tuple[float, float]] = {}
    started = time.perf_counter()

    def note(records: list[TrialRecord], objective: str) -> None:
        for record in records:
            if record.status == "done" and record.number not in ended:
                ended[record.number] = (time.perf_counter() - started, record.score(objective))
                console.log(f"trial {record.number} {ended[record.number]}")

    config = _config(out, scheduler, _SEARCH_STEPS).replace(**{"data.held_out": f"{out}/pairs/00000.tar"})
    done = sweep.main(config, _space(out, _POINTS, _SEARCH_TRIALS, scheduler=scheduler), session, show=note)
    return {
        "ended": list(ended.values()),
        "seconds": time.perf_counter() - started,
        "steps": sum(record.step for record in done.records),
        "rank_correlation": {name: round(value, 2) for name, value in rank_correlations(done.records)[2].items()},
    }
