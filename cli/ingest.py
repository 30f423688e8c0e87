"""``vilseg ingest``: conversion of captioned images to shards of image-caption pairs."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import console
from cli.options import Address, Json, Overwrite, stdout_to_stderr
from cli.overrides import columns_from_overrides, split_overrides
from vilseg.errors import UserError


def ingest(
    places: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE… DEST [KEY=VALUE…]", help="Where pairs come from, and where to."),
    ],
    shard_pairs: Annotated[int, typer.Option(help="Pairs a shard.")] = 1000,
    max_bad_share: Annotated[float, typer.Option(help="Stop when more than this share cannot be read.")] = 0.05,
    limit: Annotated[int | None, typer.Option(help="Stop after so many pairs.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Decode every picture once.")] = True,
    overwrite: Overwrite = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """Convert folders, CSV, JSONL, COCO captions, img2dataset output or Parquet to shards of image-caption pairs.

    Example: vilseg ingest photos/captions.csv s3://bucket/pairs
    """
    from cluster.ray_session import ray_session
    from jobs.ingest import ingest_job as job

    places, overrides = split_overrides(places)
    columns = columns_from_overrides(overrides)
    if len(places) < 2:
        raise UserError("ingest needs at least one SOURCE and a DEST")
    *sources, dest = places
    with stdout_to_stderr(), console.CountProgress("ingest", "parts") as shown, ray_session(address) as session:
        done = job.main(
            sources,
            dest,
            session,
            shard_pairs=shard_pairs,
            overwrite=overwrite,
            max_bad_share=max_bad_share,
            check=check,
            limit=limit,
            columns=columns,
            progress=lambda done, total, bad: shown(done, total, f"{bad} bad" if bad else ""),
        )
    for note in done.passed_over:
        console.log(f"passed over: {note}")
    value = {"pairs": done.pairs, "bad": done.bad, "shards": done.shards, "uri": done.uri}
    console.print_result(
        value, as_json=json, text=f"{done.pairs} pairs in {done.shards} shards at {done.uri}, {done.bad} bad"
    )
