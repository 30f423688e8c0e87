"""``vilseg tune``: hyperparameter sweep over trainings."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Annotated

import typer

from cli.options import Address, Json, Overrides, Resume, stdout_to_stderr
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.errors import ConfigError


def tune(
    config: Annotated[str, typer.Option(help="Configuration that every trial starts from (YAML).")],
    space: Annotated[
        str, typer.Option(help="What varies, how it is searched, what counts (YAML; see configs/spaces).")
    ],
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option(help="Points to try, at most.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Images with masks, KIND:URI, to measure mIoU on.")] = None,
    time_budget: Annotated[str | None, typer.Option(help="End after so long: 90s, 30m, 8h.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep.")] = None,
    resume: Resume = False,
    address: Address = None,
    json: Json = False,
) -> int:
    """Run a hyperparameter sweep over trainings; writes best.yaml and report.html, and prints the best point.

    Example: vilseg tune --config configs/demo.yaml --space configs/spaces/temperature_clusters.yaml data.source=s3://bucket/pairs
    """
    from cli import console
    from cli.sweep_table import SweepTable
    from cluster.ray_session import ray_session
    from tune.search_space import SearchSpace, format_value

    settings = RunConfig.load(config, overrides or [])
    if name is not None:
        settings = settings.replace(name=name)
    if resume and not settings.name:
        raise ConfigError("--resume needs the sweep's --name")
    wishes = SearchSpace.load(space)
    given = {"trials": trials, "dataset": dataset}
    wishes = wishes.replace(**{key: value for key, value in given.items() if value is not None})
    budget = None if time_budget is None else _seconds(time_budget)
    from tune import sweep as job

    job.check(settings, wishes, resume=resume)
    with stdout_to_stderr(), ray_session(address) as session, SweepTable(settings.trainer.steps) as table:
        done = job.main(
            settings,
            wishes,
            session,
            resume=resume,
            time_budget=budget,
            show=table,
            command=shlex.join(["vilseg", *sys.argv[1:]]),
        )
    if done.interrupted:
        console.log(f"stopped; go on with --resume --name {storage.name(done.uri)}")
        return 130
    assert done.best is not None
    point = "  ".join(f"{key}={format_value(value)}" for key, value in done.best.point.items())
    value = {
        "objective": wishes.objective_name,
        "score": done.best.score,
        "point": done.best.point,
        "trials": [trial.number for trial in done.best.trials],
        "best": done.best_config,
        "report": done.report,
    }
    text = f"{wishes.objective_name} {done.best.score:.4f}  {point}\nbest    {done.best_config}\nreport  {done.report}"
    console.print_result(value, as_json=json, text=text)
    return 0


def _seconds(duration: str) -> float:
    """Parse a duration such as ``90s``, ``30m``, ``8h``, or a number of seconds; return seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", duration.strip())
    if not found or not float(found[1]):
        raise ConfigError(f"--time-budget is {duration!r}; write how long, for example 90s, 30m or 8h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
