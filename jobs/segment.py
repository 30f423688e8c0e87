"""Segment an archive in bulk: Ray Data deals blocks of pictures to a pool of actors around one :class:`Segmenter` each.

Every actor writes the masks of a block and then one part file with the block's rows, both under their final name or not at
all. A block that is done again writes the same files; so whatever is killed on the way, each picture ends in one row.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
        overwrite: delete what is there first.
        progress: told (done, total, rejected) as blocks end.

    Raises:
        DataError: no picture at ``inputs``.
        StorageError: ``out`` exists without ``resume`` or ``overwrite``; a URI cannot be reached.
        ConfigError: an unknown format; ``resume`` with another model or other classes.
        ModelError: no model folder.
    """
    unknown = sorted(set(formats) - {"png", "coco", "parquet"})
    if unknown:
        raise ConfigError(f"--format {unknown[0]} is not known; choose among png, coco, parquet")
    for uri in (*inputs, model, out):
        storage.require_bucket(uri)
    out = storage.absolute(out)
    entries = list_images(inputs)
    settings = settings or read_settings(model)  # a sentence now instead of a pool of actors that die one by one
    _open_output(out, {"model": model, "classes": list(classes.classes)}, resume=resume, overwrite=overwrite)
    done = set(_rows(out).column("path").to_pylist())
    todo = [entry for entry in entries if entry.relative not in done]
    blocks = [todo[i : i + _BLOCK] for i in range(0, len(todo), _BLOCK)]
    started = time.perf_counter()
    finished = rejected = 0
    progress(len(done), len(entries), 0)
    if blocks:
        actors = max(1, min(len(blocks), session.gpus or session.cpus))
        rows = [{"paths": [e.uri for e in block], "names": [e.relative for e in block]} for block in blocks]
        worker = partial(
            BlockSegmenter, model, classes, out, settings, max_pixels, "png" in formats, session.cpus // actors
        )
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
    return _finish(out, entries, "coco" in formats, finished / seconds if finished else 0.0)


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

    def __init__(
        self,
        model: str,
        classes: Vocabulary,
        out: str,
        settings: SegmentationConfig,
        max_pixels: int,
        masks: bool,
        threads: int,
    ) -> None:
        import torch

        from vilseg.model import ViLSeg
        from vilseg.segmentation.segmenter import Segmenter

        torch.set_num_threads(max(1, threads))
        loaded = ViLSeg.from_pretrained(model)
        loaded.segmentation = settings
        self._segmenter = Segmenter(loaded, classes)
        self._out = out
        self._max_pixels = max_pixels
        self._masks = masks

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
                storage.write_bytes(storage.join(self._out, "masks", f"{row['path']}.png"), result.to_png_bytes())
            row["classes"] = [region.class_name for region in result.regions]
            row["areas"] = [region.area for region in result.regions]
            row["scores"] = [region.score for region in result.regions]
            row["rle"] = [region.rle["counts"] for region in result.regions]
        name = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:24]
        with storage.open_atomic(storage.join(self._out, "parts", f"{name}.parquet")) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file)
        return len(rows), sum(row["status"] == "rejected" for row in rows)


class _Actor:
    """What Ray Data makes one of in every actor."""

    def __init__(self, make: Callable[[], BlockSegmenter]) -> None:
        self._worker = make()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images, rejected = self._worker.block(list(batch["paths"][0]), list(batch["names"][0]))
        return {"images": np.array([images]), "rejected": np.array([rejected])}


def _open_output(out: str, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Make ``out`` ours: new, emptied, or the same job's as before."""
    marker = storage.join(out, "job.json")
    if storage.exists(out) and storage.is_folder(out) and storage.list_files(out):
        if overwrite:
            storage.delete(out)
        elif not resume:
            raise StorageError(
                f"the output {out} exists already; go on with it by --resume or replace it by --overwrite"
            )
        elif not storage.exists(marker) or json.loads(storage.read_text(marker)) != identity:
            raise ConfigError(f"cannot resume into {out}: it was made with another model or other classes")
    storage.write_text(marker, json.dumps(identity, indent=2, ensure_ascii=False))


def _rows(out: str) -> pa.Table:
    """Rows written so far, final or in parts, each path once, ordered by path."""
    tables = [_SCHEMA.empty_table()]
    results = storage.join(out, "results.parquet")
    uris = [results] if storage.exists(results) else []
    parts = storage.join(out, "parts")
    if storage.exists(parts):
        uris += [entry.uri for entry in storage.list_files(parts, {".parquet"})]
    for uri in uris:
        with storage.open_input(uri) as file:
            tables.append(pq.read_table(file, schema=_SCHEMA))
    table = pa.concat_tables(tables)
    paths = table.column("path").to_pylist()
    first = {path: row for row, path in reversed(list(enumerate(paths)))}
    return table.take(pa.array([first[path] for path in sorted(first)], pa.int64()))


def _finish(out: str, entries: Sequence[storage.FileEntry], coco: bool, rate: float) -> Summary:
    """Gather the parts into the files of the contract; the summary comes last."""
    wanted = pa.array([entry.relative for entry in entries], pa.string())
    table = _rows(out)
    table = table.filter(pc.is_in(table.column("path"), value_set=wanted))
    with storage.open_atomic(storage.join(out, "results.parquet")) as file:
        pq.write_table(table, file)
    if coco:
        identity = json.loads(storage.read_text(storage.join(out, "job.json")))
        with storage.open_atomic(storage.join(out, "annotations.json")) as file:
            for piece in json.JSONEncoder(ensure_ascii=False).iterencode(_coco(table, identity["classes"])):
                file.write(piece.encode())
    storage.delete(storage.join(out, "parts"))
    rejected = pc.sum(pc.equal(table.column("status"), "rejected")).as_py() or 0
    summary = Summary(table.num_rows, table.num_rows - rejected, rejected, round(rate, 2), out)
    counts = {name: value for name, value in asdict(summary).items() if name != "uri"}
    storage.write_text(storage.join(out, "summary.json"), json.dumps(counts, indent=2))
    return summary


def _coco(table: pa.Table, classes: Sequence[str]) -> dict[str, Any]:
    """COCO in both styles: ``annotations`` with a mask each, and ``panoptic`` with the segments of every mask file."""
    category = {name: index + 1 for index, name in enumerate(classes)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    for image_id, row in enumerate(_ok_rows(table), start=1):
        images.append({"id": image_id, "file_name": row["path"], "width": row["width"], "height": row["height"]})
        segments = []
        regions = zip(row["classes"], row["areas"], row["scores"], row["rle"], strict=True)
        for name, area, score, counts in regions:
            rle = {"size": [row["height"], row["width"]], "counts": counts}
            segment = {"id": category[name], "category_id": category[name], "area": area, "iscrowd": 0}
            segments.append(segment)
            annotations.append(
                {
                    **segment,
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "segmentation": rle,
                    "bbox": _bbox(rle),
                    "score": round(score, 4),
                }
            )
        panoptic.append({"image_id": image_id, "file_name": f"masks/{row['path']}.png", "segments_info": segments})
    categories = [{"id": index, "name": name, "supercategory": ""} for name, index in category.items()]
    return {"images": images, "annotations": annotations, "categories": categories, "panoptic": panoptic}


def _ok_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.filter(pc.equal(table.column("status"), "ok")).to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _bbox(rle: dict[str, Any]) -> list[int]:
    from pycocotools import mask

    return [int(side) for side in mask.toBbox(rle)]
