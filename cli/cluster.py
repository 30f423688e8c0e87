"""``vilseg cluster``: a local Ray cluster of several nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json

cluster_app = typer.Typer(help="A local Ray cluster of several nodes.", no_args_is_help=True)

ClusterFolder = Annotated[Path, typer.Option("--dir", help="Folder for the cluster's token, state and logs.")]


@cluster_app.command()
def up(
    nodes: Annotated[int, typer.Option(help="Nodes, the head included.")] = 1,
    cpus: Annotated[
        int | None, typer.Option(help="CPUs of each node; those of the machine divided among them.")
    ] = None,
    folder: ClusterFolder = Path("runs/cluster"),
    json: Json = False,
) -> None:
    """Start a cluster, or its nodes that have died, and print variables to export; commands then take --address auto.

    Example: eval "$(vilseg cluster up --nodes 2)"
    """
    from cli import console
    from cluster.local_cluster import LocalCluster
    from serve.launch import prepare_environment

    prepare_environment()  # otherwise Ray Serve would be slower on these nodes than on a node that `vilseg serve` starts
    console.log("starting; this takes some 20 seconds")
    cluster = LocalCluster.start(folder, nodes, cpus)
    variables = cluster.environment()
    console.log(f"{cluster.size} nodes at {cluster.address}, dashboard and jobs at {cluster.dashboard}")
    exports = "\n".join(f"export {name}={value}" for name, value in variables.items())
    value = {"address": cluster.address, "dashboard": cluster.dashboard, "nodes": cluster.nodes(), **variables}
    console.print_result(value, as_json=json, text=exports)


@cluster_app.command()
def status(folder: ClusterFolder = Path("runs/cluster"), json: Json = False) -> None:
    """Show the nodes of the cluster and their resources.

    Example: vilseg cluster status
    """
    from cli import console
    from cluster.local_cluster import LocalCluster

    cluster = LocalCluster.attach(folder)
    if cluster is None:
        console.print_result({"running": False, "nodes": []}, as_json=json, text=f"no cluster runs in {folder}")
        return
    nodes = cluster.nodes()
    value = {"running": True, "address": cluster.address, "dashboard": cluster.dashboard, "nodes": nodes}
    lines = [f"running at {cluster.address}, dashboard {cluster.dashboard}"]
    for node in nodes:
        resources = node["resources"]
        has = f"{resources.get('CPU', 0):g} CPUs"
        has += f", {resources['GPU']:g} GPUs" if resources.get("GPU") else ""
        has += f", object store {resources.get('object_store_memory', 0) / 1e9:.1f} GB"
        role = "head" if node["index"] == 0 else "node"
        lines.append(f"  {role} {node['index']}  process {node['pid']}  {has if node['alive'] else 'lost'}")
    console.print_result(value, as_json=json, text="\n".join(lines))


@cluster_app.command()
def down(folder: ClusterFolder = Path("runs/cluster"), json: Json = False) -> None:
    """Stop the cluster: end all its nodes and the programs that run on them.

    Example: vilseg cluster down
    """
    from cli import console
    from cluster.local_cluster import LocalCluster

    cluster = LocalCluster.attach(folder)
    if cluster is not None:
        cluster.stop()
    text = "stopped" if cluster else f"no cluster runs in {folder}"
    console.print_result({"stopped": cluster is not None}, as_json=json, text=text)
