"""``vilseg serve``: deployment of models with an HTTP API and a web page."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from cli import console
from cli.options import Address, Json, Overrides, stdout_to_stderr


def serve(
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None, typer.Option(help="URI of a model folder, or NAME=URI; several times for several models.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Configuration file (YAML) of the deployment.")] = None,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need --keys.")] = "127.0.0.1",
    keys: Annotated[str | None, typer.Option(help="File of API keys, as 'vilseg key' writes it.")] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Serve models by an HTTP API and a web page, until Ctrl-C.

    Example: vilseg serve --model runs/first/model
    """
    from cluster.ray_session import ray_session
    from serve import launch as job
    from serve.config import ServeConfig

    settings = ServeConfig.of(config, model or [], keys, overrides or [])
    job.check_config(settings, host, port)

    def ready(url: str) -> None:
        console.log("Ctrl-C stops it" + ("" if settings.keys else "; without --keys it answers this machine only"))
        value = {"url": url, "api": f"{url}/docs", "models": list(settings.models)}
        with redirect_stdout(stdout):
            console.print_result(value, as_json=json, text=f"page {url}\nAPI  {url}/docs")

    job.prepare_environment()
    console.log("starting; this takes some 20 seconds")
    stdout = sys.stdout
    with stdout_to_stderr(), ray_session(address) as session:
        job.main(settings, session, host=host, port=port, ready=ready)
