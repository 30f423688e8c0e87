"""``vilseg demo``: the whole pipeline on synthetic data, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.options import Json, stdout_to_stderr


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the store.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A minute's worth: shows that all parts run.")] = False,
    json: Json = False,
) -> None:
    """Run the whole pipeline on synthetic data, on this machine.

    Starts an object store, writes captioned scenes, trains with two workers, segments unseen images, measures mIoU and writes
    an HTML report.

    Example: vilseg demo --out runs/demo
    """
    from cli import demo_pipeline

    with stdout_to_stderr():
        summary = demo_pipeline.main(out, quick=quick)
    text = (
        f"mIoU {summary['miou']:.3f} (untrained {summary['miou_untrained']:.3f})\n"
        f"model   {summary['model_uri']}\nreport  {out / 'report.html'}"
    )
    console.print_result(summary, as_json=json, text=text)
