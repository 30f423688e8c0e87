"""``vilseg export``: export of a model to ONNX."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Json, Overrides, Overwrite, stdout_to_stderr
from cli.overrides import segmentation_overrides


def export(
    model: Annotated[str, typer.Option(help="URI of a model folder.")],
    out: Annotated[str, typer.Option(help="Folder or s3:// URI for the ONNX files.")],
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Export a model to ONNX (image and text tower, clustering head), and compare the outputs to torch's.

    Example: vilseg export --model runs/first/model --out runs/first/onnx
    """
    from cli import console
    from jobs import export as job

    with stdout_to_stderr():
        done = job.main(model, out, overwrite=overwrite, settings=segmentation_overrides(overrides), say=console.log)
    size = "any size" if done.fixed_size is None else "{} x {} pixels".format(*done.fixed_size)
    text = f"{done.uri}\npictures of {size}; largest difference from torch {done.difference:.1e}"
    console.print_result(done.to_dict(), as_json=json, text=text)
