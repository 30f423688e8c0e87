"""The ``vilseg`` command. Every verb is a thin layer over a job's ``main``; heavy imports wait until a verb needs them."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, TextIO

import typer

from cli import console
from cli.cluster import cluster_app
from cli.evaluate import evaluate
from cli.export import export
from cli.options import CLASSES, Address, Json, Overrides, Overwrite, Resume, stdout_to_stderr
from cli.overrides import columns_from_overrides, segmentation_overrides, split_overrides
from cli.store import store_app
from cli.submit.commands import submit_app
from cli.tune import tune
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.errors import ConfigError, UserError

app = typer.Typer(
    help="Open-vocabulary segmentation trained from image-caption pairs.", no_args_is_help=True, add_completion=False
)
app.add_typer(store_app, name="store")
app.add_typer(submit_app, name="submit")
app.add_typer(cluster_app, name="cluster")
app.command()(tune)
app.command()(evaluate)
app.command()(export)


def main() -> None:
    """Entry point: 0 done, 2 the input is wrong, 1 the run failed, 130 interrupted; never a bare traceback."""
    # As `python -m` does, and Ray for its workers: a user's own factory may lie in the working folder.
    sys.path.insert(0, os.getcwd())
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], *, log: TextIO | None = None) -> int:
    """Run a verb and return its exit code; ``log`` takes the traceback of a failed run, a file of its own where None."""
    try:
        with console.logging_to_stderr():
            outcome = app(list(arguments), standalone_mode=False, prog_name="vilseg")
        return outcome if isinstance(outcome, int) else 0
    except typer.Exit as error:
        return error.exit_code
    except typer.TyperException as error:  # arguments that the verb does not take
        context = getattr(error, "ctx", None)
        said = error.format_message().rstrip(".")
        if context is not None and said:
            print(f"vilseg: {said}; see '{context.command_path} --help'", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("vilseg: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001  (the last line of defence: a sentence and a log instead of a traceback)
        return _failed(error, log)


def _failed(error: Exception, log: TextIO | None) -> int:
    from cluster.ray_session import find_user_error

    mistake = find_user_error(error)
    if mistake is not None:
        print(f"vilseg: {mistake}", file=sys.stderr)
        return 2
    if log is None:
        with tempfile.NamedTemporaryFile("w", prefix="vilseg-", suffix=".log", delete=False) as file:
            traceback.print_exception(error, file=file)
        where = f"the log is {file.name}"
    else:
        traceback.print_exception(error, file=log)
        where = "its traceback is above"
    last = str(error).strip().splitlines()[-1:] or [""]
    print(f"vilseg: the run failed: {type(error).__name__}: {last[0]}; {where}", file=sys.stderr)
    return 1


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the store.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A minute's worth: shows that all parts run.")] = False,
    json: Json = False,
) -> None:
    """The main job end to end on the embedded default.

    Starts an object store, writes captioned scenes, trains with two workers, segments unseen images, measures and reports.

    Example: vilseg demo --out runs/demo
    """
    from cli import demo as job

    with stdout_to_stderr():
        summary = job.main(out, quick=quick)
    text = (
        f"mIoU {summary['miou']:.3f} (untrained {summary['miou_untrained']:.3f})\n"
        f"model   {summary['model_uri']}\nreport  {out / 'report.html'}"
    )
    console.print_result(summary, as_json=json, text=text)


@app.command()
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
    """Turn folders, CSV, JSONL, COCO captions, img2dataset output or Parquet into pair shards.

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


@app.command()
def train(
    config: Annotated[str, typer.Option(help="Configuration file (YAML).")],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    resume: Resume = False,
    address: Address = None,
    json: Json = False,
) -> int:
    """Train from pair shards; prints the URI of the model.

    Example: vilseg train --config configs/demo.yaml --name first data.source=s3://bucket/pairs trainer.workers=2
    """
    from cluster.ray_session import check_workers, ray_session

    settings = RunConfig.load(config, overrides or [])
    if name is not None:
        settings = settings.replace(name=name)  # not by an override, whose value is YAML: a run may be called 42
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


@app.command()
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
    """Segment an archive in bulk.

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


@app.command()
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
    """Put models up: an HTTP API, and a page to try them; until Ctrl-C.

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


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: Annotated[str, typer.Option(help="File or URI of the keys; made where it is not.")],
    json: Json = False,
) -> None:
    """Make an API key for 'vilseg serve --keys'. It is printed once; the file holds its hash only.

    Example: vilseg key anna --file keys.txt
    """
    from serve.api_keys import add_key

    made = add_key(file, name)
    console.log(f"the key of {name}; delete the line {name} of {file} to take it back")
    console.print_result({"name": name, "key": made, "file": file}, as_json=json, text=made)


@app.command()
def doctor(
    store: Annotated[
        list[str] | None, typer.Option(help="Folder or s3:// URI to try writing to; several times.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster (HEAD:6379, ray://…) or its job server (http://…); RAY_ADDRESS without it."),
    ] = None,
    json: Json = False,
) -> int:
    """Say what is installed and what is reachable, and how to mend what is not; exits with 1 where something needed is.

    Example: vilseg doctor --store s3://bucket --address http://head:8265
    """
    from cli import doctor as job

    with stdout_to_stderr():
        found = list(job.main(address=address or os.environ.get("RAY_ADDRESS"), stores=store or []))
    healthy = all(finding.status != "missing" for finding in found)
    if json:
        console.print_result({"ok": healthy, "found": [vars(finding) for finding in found]}, as_json=True, text="")
    else:
        console.print_findings(found)
    return 0 if healthy else 1


if __name__ == "__main__":
    main()
