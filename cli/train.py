"""``vilseg train``: training of a model on shards of image-caption pairs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from cli import console
from cli.options import Address, Json, Overrides, Resume, stdout_to_stderr
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.errors import ConfigError


def train(
    config: Annotated[str, typer.Option(help="Configuration file (YAML).")],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    resume: Resume = False,
    address: Address = None,
    json: Json = False,
) -> int:
    """Train a model on shards of image-caption pairs, and print the URI of the model.

    Example: vilseg train --config configs/demo.yaml --name first data.source=s3://bucket/pairs trainer.workers=2
    """
    from cluster.ray_session import check_workers, ray_session

    settings = RunConfig.load(config, overrides or [])
    if name is not None:
        settings = settings.replace(
            name=name
        )  # not by an override, whose value is parsed as YAML: 42 would become a number
    if resume and not settings.name:
        raise ConfigError("--resume needs the run's --name")
    from vilseg.training.run_setup import preflight

    if address is None:
        check_workers(settings.trainer.min_workers, os.cpu_count() or 1)
    preflight(settings, resume=resume)
    with (
        stdout_to_stderr(),
        console.TrainingProgress(settings.trainer.steps) as progress,
        ray_session(address) as session,
    ):
        from jobs.train import train_job as job

        done = job.main(settings, session, resume=resume, progress=progress)
    if done.stopped:
        console.log(
            f"stopped after step {done.metrics.get('step', 0):.0f}; go on with --resume --name {storage.name(done.run_dir.uri)}"
        )
        return 130
    console.print_result({"model": done.run_dir.model, **done.metrics}, as_json=json, text=done.run_dir.model)
    return 0
