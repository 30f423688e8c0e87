"""Segment an archive in bulk: Ray Data deals blocks of pictures to a pool of actors around one :class:`Segmenter` each.

Every actor writes the masks of a block and then one part file with the block's rows, both under their final name or not at
all. A block that is done again writes the same files; so whatever is killed on the way, each picture ends in one row.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from jobs.session import Session
from vilseg import storage
from vilseg.config import SegmentationConfig
from vilseg.data.decode import decode_image
from vilseg.errors import ConfigError, DataError, StorageError, UserError
from vilseg.model.pretrained import read_settings
from vilseg.text.vocabulary import Vocabulary

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_BLOCK = 32
"""Pictures an actor takes at once: enough to fill batches, little to lose when it dies."""
_JOB, _MASKS, _PARTS, _RESULTS = "job.json", "masks", "parts", "results.parquet"
_ANNOTATIONS, _SUMMARY = "annotations.json", "summary.json"
_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("classes", pa.list_(pa.string())),
        ("areas", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
        ("rle", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Job:
    """What decides an output; ``job.json`` there holds it, so that only the same job goes on with it."""

    inputs: list[str]
    """Absolute URIs, each once, sorted."""
    model: str
    """Absolute URI of a model folder, or a hub id."""
    classes: Vocabulary
    segmentation: SegmentationConfig
    formats: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As in ``job.json``."""
        segmentation = self.segmentation.model_dump(mode="json")
        return {**vars(self), "classes": list(self.classes.classes), "segmentation": segmentation}


@dataclass(frozen=True)
class Summary:
    """What came of a bulk segmentation."""

    images: int
    ok: int
    rejected: int
    images_per_second: float
    """Of this call, reading and writing included, starting Ray not."""
    uri: str


def main(
    inputs: Sequence[str],
    model: str,
    classes: Vocabulary,
    out: str,
    session: Session,
    *,
    formats: Sequence[str] = ("png", "coco"),
    settings: SegmentationConfig | None = None,
    max_pixels: int = 100_000_000,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, int], None] = lambda done, total, rejected: None,
) -> Summary:
    """Segment every picture below ``inputs`` and write the output contract to ``out``.

    Args:
        inputs: folders, ``s3://`` prefixes or picture files.
        model: URI of a model folder.
        classes: what to look for.
        out: folder or ``s3://`` URI; ``results.parquet`` and ``summary.json`` always come, the rest by ``formats``.
        session: the cluster.
        formats: ``png`` writes masks, ``coco`` writes ``annotations.json``.
        settings: replace those that the model carries.
        max_pixels: pictures whose header announces more are rejected.
        resume: go on with what an earlier call left at ``out``.
        overwrite: delete what an earlier call left at ``out`` first.
        progress: told (done, total, rejected) as blocks end.

    Raises:
        DataError: no picture at ``inputs``, or two that would be written under one name.
        UserError: as :func:`preflight`.
    """
    job = preflight(inputs, model, classes, out, formats=formats, settings=settings, resume=resume, overwrite=overwrite)
    out = storage.absolute(out)
    entries = list_images(job.inputs)
    if overwrite:
        _delete_output(out)
    storage.write_text(storage.join(out, _JOB), json.dumps(job.to_dict(), indent=2, ensure_ascii=False))
    done = set(_rows(out).column("path").to_pylist())
    todo = [entry for entry in entries if entry.relative not in done]
    blocks = [todo[i : i + _BLOCK] for i in range(0, len(todo), _BLOCK)]
    started = time.perf_counter()
    finished = rejected = 0
    progress(len(done), len(entries), 0)
    if blocks:
        actors = max(1, min(len(blocks), session.gpus or session.cpus))
        rows = [{"paths": [e.uri for e in block], "names": [e.relative for e in block]} for block in blocks]
        worker = partial(BlockSegmenter, job, out, max_pixels, session.cpus // actors)
        counted = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(worker,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=0.9 * session.cpus / actors,
            num_gpus=1 if session.gpus else 0,
        )
        for row in counted.iter_rows():
            finished += row["images"]
            rejected += row["rejected"]
            progress(len(done) + finished, len(entries), rejected)
    seconds = time.perf_counter() - started
    return _finish(out, job, entries, finished / seconds if finished else 0.0)


def preflight(
    inputs: Sequence[str],
    model: str,
    classes: Vocabulary,
    out: str,
    *,
    formats: Sequence[str] = ("png", "coco"),
    settings: SegmentationConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Job:
    """What can be said against a job before Ray is started and the inputs are listed; arguments as of :func:`main`.

    Raises:
        DataError: no input.
        StorageError: ``out`` overlaps an input or the model, is there without ``resume`` or ``overwrite``, or holds
            what this job did not write; a URI cannot be reached.
        ConfigError: an unknown format; ``resume`` of another job.
        ModelError: no model folder.
    """
    unknown = sorted(set(formats) - {"png", "coco", "parquet"})
    if unknown:
        raise ConfigError(f"--format {unknown[0]} is not known; choose among png, coco, parquet")
    if not inputs:
        raise DataError("no input is given: name folders, s3:// prefixes or pictures")
    for uri in (*inputs, model, out):
        storage.require_bucket(uri)
    for uri in inputs:
        if not storage.exists(uri):
            raise StorageError(f"{uri} does not exist")
    carried = read_settings(model)  # a sentence now instead of a pool of actors that die one by one
    job = Job(
        inputs=sorted({storage.absolute(uri) for uri in inputs}),
        # Actors may have another working directory; what does not exist here is a hub id.
        model=storage.absolute(model) if storage.exists(model) else model,
        classes=classes,
        segmentation=settings or carried,
        formats=sorted({"parquet", *formats}),  # that one always comes
    )
    _check_output(storage.absolute(out), job, resume=resume, overwrite=overwrite)
    return job


def list_images(inputs: Sequence[str]) -> list[storage.FileEntry]:
    """Every picture below ``inputs`` by its name in the output, which is its path below the input.

    Raises:
        DataError: there is none, or two inputs hold the same path.
    """
    entries = [entry for uri in inputs for entry in storage.list_files(storage.absolute(uri), IMAGE_SUFFIXES)]
    if not entries:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"no picture at {', '.join(inputs)}: expected files ending in {kinds}")
    seen: dict[str, str] = {}
    for entry in entries:
        if seen.setdefault(entry.relative, entry.uri) != entry.uri:
            raise DataError(
                f"{seen[entry.relative]} and {entry.uri} would both be written as {entry.relative}; "
                "segment the folder above them, or one at a time"
            )
    return entries


class BlockSegmenter:
    """Segments blocks of pictures; one an actor."""

    def __init__(self, job: Job, out: str, max_pixels: int, threads: int) -> None:
        import torch

        from vilseg.model import ViLSeg
        from vilseg.segmentation.segmenter import Segmenter

        torch.set_num_threads(max(1, threads))
        loaded = ViLSeg.from_pretrained(job.model)
        loaded.segmentation = job.segmentation
        self._segmenter = Segmenter(loaded, job.classes)
        self._out = out
        self._max_pixels = max_pixels
        self._masks = "png" in job.formats

    def block(self, uris: Sequence[str], names: Sequence[str]) -> tuple[int, int]:
        """Segment the pictures at ``uris`` and write their masks and rows; returns (pictures, rejected)."""
        rows: list[dict[str, Any]] = []
        images: list[tuple[dict[str, Any], np.ndarray]] = []
        for uri, name in zip(uris, names, strict=True):
            row: dict[str, Any] = {"path": name, "status": "ok"}
            rows.append(row)
            try:
                data = storage.read_bytes(uri)
                row["sha256"] = hashlib.sha256(data).hexdigest()
                image = decode_image(data, max_pixels=self._max_pixels)
            except UserError as error:
                row |= {"status": "rejected", "error": str(error)}
                continue
            row["height"], row["width"] = image.shape[:2]
            images.append((row, image))
        for row, image in images:
            # One at a time: on CPUs a batch is no faster, and the largest picture bounds the memory.
            result = self._segmenter(image)
            if self._masks:
                storage.write_bytes(storage.join(self._out, _MASKS, f"{row['path']}.png"), result.to_png_bytes())
            row["classes"] = [region.class_name for region in result.regions]
            row["areas"] = [region.area for region in result.regions]
            row["scores"] = [region.score for region in result.regions]
            row["rle"] = [region.rle["counts"] for region in result.regions]
        name = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:24]
        with storage.open_atomic(storage.join(self._out, _PARTS, f"{name}.parquet")) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file)
        return len(rows), sum(row["status"] == "rejected" for row in rows)


class _Actor:
    """What Ray Data makes one of in every actor."""

    def __init__(self, make: Callable[[], BlockSegmenter]) -> None:
        self._worker = make()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images, rejected = self._worker.block(list(batch["paths"][0]), list(batch["names"][0]))
        return {"images": np.array([images]), "rejected": np.array([rejected])}


# --------------------------------------------------------------------------------------------------------- output


def _check_output(out: str, job: Job, *, resume: bool, overwrite: bool) -> None:
    """Make sure that ``job`` may write to ``out``: it is new or empty, or an output to replace or to go on with."""
    for place in (*job.inputs, job.model):
        if storage.overlap(out, place):
            raise StorageError(f"cannot write to {out}: it and {place}, which is read, overlap; name a folder apart")
    if not storage.exists(out):
        return
    if not storage.is_folder(out):
        raise StorageError(f"cannot write to {out}: it is a file; name a folder")
    before = _job_at(out)
    if before is None:
        if storage.list_files(out):
            raise StorageError(
                f"cannot write to {out}: it holds files and is no output of vilseg segment, which --resume and "
                "--overwrite need; name an empty folder"
            )
    elif resume and not overwrite:
        said = {"model": "another model", "segmentation": "other segmentation settings"}
        other = [said.get(key, f"other {key}") for key, value in job.to_dict().items() if before[key] != value]
        if other:
            raise ConfigError(
                f"cannot resume into {out}: it was made with {' and '.join(other)}; "
                "repeat what it was made with, or replace it by --overwrite"
            )
    elif not overwrite:
        raise StorageError(f"the output {out} exists already; go on with it by --resume or replace it by --overwrite")


def _job_at(out: str) -> dict[str, Any] | None:
    """The ``job.json`` at ``out``, if there is one and it is a job's of ours."""
    marker = storage.join(out, _JOB)
    if not storage.exists(marker):
        return None
    try:
        tree = json.loads(storage.read_text(marker))
    except ValueError:
        return None
    ours = {field.name for field in fields(Job)}
    return tree if isinstance(tree, dict) and tree.keys() >= ours else None


def _delete_output(out: str) -> None:
    """Delete what an earlier job wrote and nothing else; its ``job.json`` stays until that of this job replaces it."""
    # Rows first: a picture with a row and without its mask would pass for done.
    for name in (_RESULTS, _PARTS, _SUMMARY, _ANNOTATIONS, _MASKS):
        storage.delete(storage.join(out, name))


def _rows(out: str) -> pa.Table:
    """Rows written so far, final or in parts, each path once, ordered by path."""
    tables = [_SCHEMA.empty_table()]
    results = storage.join(out, _RESULTS)
    uris = [results] if storage.exists(results) else []
    parts = storage.join(out, _PARTS)
    if storage.exists(parts):
        uris += [entry.uri for entry in storage.list_files(parts, {".parquet"})]
    for uri in uris:
        with storage.open_input(uri) as file:
            tables.append(pq.read_table(file, schema=_SCHEMA))
    table = pa.concat_tables(tables)
    paths = table.column("path").to_pylist()
    first = {path: row for row, path in reversed(list(enumerate(paths)))}
    return table.take(pa.array([first[path] for path in sorted(first)], pa.int64()))


def _finish(out: str, job: Job, entries: Sequence[storage.FileEntry], rate: float) -> Summary:
    """Gather the parts into the files of the contract; the summary comes last."""
    wanted = pa.array([entry.relative for entry in entries], pa.string())
    table = _rows(out)
    table = table.filter(pc.is_in(table.column("path"), value_set=wanted))
    with storage.open_atomic(storage.join(out, _RESULTS)) as file:
        pq.write_table(table, file)
    if "coco" in job.formats:
        tree = _coco(table, job.classes.classes, masks="png" in job.formats)
        with storage.open_atomic(storage.join(out, _ANNOTATIONS)) as file:
            for piece in json.JSONEncoder(ensure_ascii=False).iterencode(tree):
                file.write(piece.encode())
    storage.delete(storage.join(out, _PARTS))
    rejected = pc.sum(pc.equal(table.column("status"), "rejected")).as_py() or 0
    summary = Summary(table.num_rows, table.num_rows - rejected, rejected, round(rate, 2), out)
    counts = {name: value for name, value in asdict(summary).items() if name != "uri"}
    storage.write_text(storage.join(out, _SUMMARY), json.dumps(counts, indent=2))
    return summary


def _coco(table: pa.Table, classes: Sequence[str], *, masks: bool) -> dict[str, Any]:
    """COCO in both styles: ``annotations`` with a mask each and, with ``masks``, ``panoptic`` with every mask file's segments.

    A category's id is the index of its class plus 1, because COCO keeps 0 for "no category". A segment's id is the pixel
    value in its mask file, as in COCO's panoptic style, and that is the index itself, from 0: always ``category_id`` - 1.
    """
    index = {name: number for number, name in enumerate(classes)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    for image_id, row in enumerate(_ok_rows(table), start=1):
        images.append({"id": image_id, "file_name": row["path"], "width": row["width"], "height": row["height"]})
        segments = []
        regions = zip(row["classes"], row["areas"], row["scores"], row["rle"], strict=True)
        for name, area, score, counts in regions:
            rle = {"size": [row["height"], row["width"]], "counts": counts}
            region = {"category_id": index[name] + 1, "area": area, "bbox": _bbox(rle), "iscrowd": 0}
            segments.append({"id": index[name], **region})
            annotation = {"image_id": image_id, **region, "segmentation": rle, "score": round(score, 4)}
            annotations.append({"id": len(annotations) + 1, **annotation})
        panoptic.append({"image_id": image_id, "file_name": f"{_MASKS}/{row['path']}.png", "segments_info": segments})
    categories = [{"id": number + 1, "name": name, "supercategory": ""} for name, number in index.items()]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    return {**tree, "panoptic": panoptic} if masks else tree


def _ok_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.filter(pc.equal(table.column("status"), "ok")).to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _bbox(rle: dict[str, Any]) -> list[int]:
    from pycocotools import mask

    return [int(side) for side in mask.toBbox(rle)]
