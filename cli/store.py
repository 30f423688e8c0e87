"""``vilseg store``: the embedded S3 server (SeaweedFS) on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json

store_app = typer.Typer(help="The embedded S3 server (SeaweedFS) on this machine.", no_args_is_help=True)

StoreFolder = Annotated[Path, typer.Option("--dir", help="Folder that the store keeps everything in.")]


@store_app.command()
def up(
    folder: StoreFolder = Path("store"),
    port: Annotated[int | None, typer.Option(help="Port of the S3 endpoint; a free one without it.")] = None,
    json: Json = False,
) -> None:
    """Start the store, and print its endpoint and the environment variables to export.

    Example: eval "$(vilseg store up --dir store)"
    """
    from cli import console
    from cluster.object_store import ObjectStore

    store = ObjectStore.start(folder, port)
    variables = store.environment()
    console.log(f"the store answers at {store.endpoint}, bucket s3://vilseg")
    exports = "\n".join(f"export {name}={value}" for name, value in variables.items())
    console.print_result({"endpoint": store.endpoint, **variables}, as_json=json, text=exports)


@store_app.command()
def status(folder: StoreFolder = Path("store"), json: Json = False) -> None:
    """Show if the store runs, and at which endpoint.

    Example: vilseg store status --dir store
    """
    from cli import console
    from cluster.object_store import ObjectStore

    store = ObjectStore.attach(folder)
    value = {"running": store is not None, "endpoint": store.endpoint if store else None}
    text = f"running at {store.endpoint}" if store else f"no store runs in {folder}"
    console.print_result(value, as_json=json, text=text)


@store_app.command()
def down(folder: StoreFolder = Path("store"), json: Json = False) -> None:
    """Stop the store; its data is kept.

    Example: vilseg store down --dir store
    """
    from cli import console
    from cluster.object_store import ObjectStore

    store = ObjectStore.attach(folder)
    if store is not None:
        store.stop()
    text = "stopped" if store else f"no store runs in {folder}"
    console.print_result({"stopped": store is not None}, as_json=json, text=text)
