"""``vilseg evaluate``: evaluation of a model on images with masks."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from typing import Annotated

import typer

from cli.options import CLASSES, Json, Overrides, Overwrite, stdout_to_stderr
from cli.overrides import segmentation_overrides


def evaluate(
    model: Annotated[str, typer.Option(help="URI of a model folder.")],
    dataset: Annotated[
        str, typer.Option(help="KIND:URI with KIND folder, voc, context, coco-stuff or ade20k, as folder:data/val.")
    ],
    overrides: Overrides = None,
    classes: Annotated[
        str | None, typer.Option(help=f"Other names for the dataset's classes, in its order: {CLASSES}.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="Classes asked for and measured: all, no-background, or unseen (means over these only).")
    ] = "all",
    boundary_width: Annotated[
        float, typer.Option(help="Band along contours for boundary IoU, as a share of the diagonal.")
    ] = 0.02,
    fit_temperature: Annotated[
        bool, typer.Option(help="Also find the segmentation.temperature under which scores fit these masks best.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster whose machines share the images: auto or ray://…; none without it.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for report.html and evaluation.json.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Evaluate a model on images with masks: mIoU, boundary IoU, pixel accuracy and calibration error.

    Example: vilseg evaluate --model runs/first/model --dataset folder:data/val --out runs/first/val
    """
    from cli import console
    from cluster.ray_session import ray_session
    from jobs import evaluate as job
    from vilseg.text.vocabulary import Vocabulary

    cluster = nullcontext() if address is None else ray_session(address)
    with stdout_to_stderr(), cluster as session, console.CountProgress("evaluate", "images") as progress:
        done = job.main(
            model,
            dataset,
            classes=Vocabulary.parse(classes) if classes else None,
            protocol=protocol,
            boundary_width=boundary_width,
            fit=fit_temperature,
            out=out,
            overwrite=overwrite,
            settings=segmentation_overrides(overrides),
            progress=progress,
            command=shlex.join(["vilseg", *sys.argv[1:]]),
            session=session,
        )
    per_class = "\n".join(f"  {name:24} {value:.3f}" for name, value in done.per_class.items())
    figures = (
        f"mIoU {done.miou:.4f}  vocabulary {done.vocabulary}  boundary IoU {done.boundary_iou:.4f}  "
        f"pixel accuracy {done.pixel_accuracy:.4f}  calibration error {done.calibration_error:.4f}  images {done.images}"
    )
    if done.temperature is not None:
        figures += f"\nscores fit these masks best with segmentation.temperature={done.temperature:.4g}"
    if len(done.measured_classes) < len(done.per_class):
        figures += f"\nover {', '.join(done.measured_classes)}"
    console.print_result(done.to_dict(), as_json=json, text=f"{figures}\n{per_class}")
