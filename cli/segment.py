"""``vilseg segment``: bulk segmentation of images and videos."""

from __future__ import annotations

import os
import tempfile
from typing import Annotated

import typer

from cli import console
from cli.options import CLASSES, Address, Json, Overwrite, Resume, stdout_to_stderr
from cli.overrides import segmentation_overrides, split_overrides
from vilseg.errors import ConfigError


def segment(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT… [KEY=VALUE…]",
            help="Folders, s3:// prefixes, 'patterns/*.jpg', pictures, videos, tar or Parquet shards, lists of URIs (.txt).",
        ),
    ],
    model: Annotated[str, typer.Option(help="URI of a model folder.")],
    classes: Annotated[str, typer.Option(help=f"What to look for: {CLASSES}.")],
    out: Annotated[str, typer.Option(help="Folder or s3:// URI for the results.")],
    format: Annotated[
        str, typer.Option(help="What to write, with commas: png, coco, parquet, overlay, gallery, geotiff.")
    ] = "png,coco",
    limit: Annotated[int | None, typer.Option(help="Only the first so many inputs.")] = None,
    sample: Annotated[int | None, typer.Option(help="Only so many inputs, picked by chance.")] = None,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Segment files of equal bytes once.")] = False,
    min_side: Annotated[int, typer.Option(help="Reject pictures with a side of fewer pixels.")] = 1,
    max_pixels: Annotated[int, typer.Option(help="Reject pictures of more pixels, before decoding.")] = 100_000_000,
    key_every: Annotated[int, typer.Option(help="Of a video, look at one frame in so many.")] = 6,
    max_rejected: Annotated[float, typer.Option(help="End when more than this share cannot be used.")] = 1.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count, try a few inputs, estimate; write nothing.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """Segment many images and videos with a vocabulary of classes.

    Example: vilseg segment s3://bucket/photos --model runs/first/model --classes "cat,sofa" --out s3://bucket/masks
    """
    from cluster.ray_session import ray_session
    from jobs.segment import segment_job as job
    from jobs.segment.plan import estimate, plan
    from vilseg.bulk.outputs import Rules
    from vilseg.model.serialization import read_segmentation_config
    from vilseg.text.vocabulary import Vocabulary

    places, overrides = split_overrides(inputs)
    if not 0 <= max_rejected <= 1:
        raise ConfigError(f"--max-rejected is {max_rejected}, but it is a share from 0 to 1")
    wishes = plan(
        places,
        model,
        Vocabulary.parse(classes),
        out,
        formats=[name.strip() for name in format.split(",")],
        settings=segmentation_overrides(overrides)(read_segmentation_config(model)) if overrides else None,
        rules=Rules(max_pixels=max_pixels, min_side=min_side, key_every=key_every),
        limit=limit,
        sample=sample,
        deduplicate=deduplicate,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        if address is None:
            with tempfile.TemporaryDirectory(prefix="vilseg-") as scratch:
                guess, workers = estimate(wishes, scratch), os.cpu_count() or 1
        else:
            with stdout_to_stderr(), ray_session(address) as session:
                guess, workers = job.estimate_on_cluster(wishes, session)
        value = {**vars(guess), "workers": workers, "seconds": round(guess.seconds(workers), 1)}
        console.print_result(value, as_json=json, text=console.format_estimate(guess, workers))
        return
    with stdout_to_stderr(), console.SegmentationProgress() as progress, ray_session(address) as session:
        done = job.main(wishes, session, max_rejected=max_rejected, progress=progress)
    text = f"{done.ok} of {done.images} inputs segmented to {done.uri}, {done.rejected} rejected"
    console.print_result({**done.to_dict(), "out": done.uri}, as_json=json, text=text)
