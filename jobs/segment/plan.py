"""Plan of a bulk segmentation: checks of the request before Ray starts, and an estimate of the time it takes."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vilseg import storage
from vilseg.bulk.gallery import DATA, PAGE, THUMBS
from vilseg.bulk.lease import LOCK, require_free
from vilseg.bulk.listing import Container, Input, fixed_part, scan
from vilseg.bulk.outputs import MASKS, OVERLAYS, Outputs, Rules
from vilseg.bulk.results_table import PARTS, RESULTS
from vilseg.config import SegmentationConfig
from vilseg.errors import ConfigError, DataError, StorageError, StoreUnavailable
from vilseg.text.vocabulary import Vocabulary

ANNOTATIONS, SUMMARY, JOB = "annotations.json", "summary.json", "job.json"
_KEYS = {"inputs", "model", "classes", "segmentation", "formats", "rules", "limit", "sample", "deduplicate"}
FORMATS = ("png", "coco", "parquet", "overlay", "gallery", "geotiff")
DEFAULT_FORMATS = ("png", "coco")
_PEEK = 1024
"""Maximum number of inputs listed before Ray starts, to check that there are any and to choose the number of actors."""
_ACTOR_INPUTS = 16
"""Number of inputs per actor below which no further actor is started."""
_TRIED = 16
"""Number of inputs segmented for the time estimate."""


@dataclass(frozen=True)
class Job:
    """Description of a bulk segmentation.

    The fields that determine the results are stored in ``job.json`` of the output. An output can be resumed only if they are
    equal.
    """

    inputs: list[str]
    """Absolute URIs or glob patterns, without duplicates, sorted."""
    model: str
    """Absolute URI of a model folder, or a hub id."""
    classes: Vocabulary
    segmentation: SegmentationConfig
    formats: list[str]
    out: str
    """Absolute URI."""
    rules: Rules = field(default_factory=Rules)
    limit: int | None = None
    """Number of inputs to segment, counted from the first one listed; None segments all."""
    sample: int | None = None
    """Number of inputs in a random sample, which is the same in every call; None segments all inputs."""
    deduplicate: bool = False
    """Segment files with identical bytes only once."""
    overwrite: bool = False
    """Delete an earlier job's output before the job starts."""
    parallelism: int = field(default=1, compare=False)
    """Maximum number of actors that these inputs keep busy."""

    @property
    def outputs(self) -> Outputs:
        """Output files that the actors write."""
        return Outputs(
            self.out,
            png="png" in self.formats,
            overlay="overlay" in self.formats,
            gallery="gallery" in self.formats,
            geotiff="geotiff" in self.formats,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``job.json``."""
        return {
            "inputs": self.inputs,
            "model": self.model,
            "classes": list(self.classes.entries),
            "vocabulary": self.classes.digest,
            "segmentation": self.segmentation.model_dump(mode="json"),
            "formats": self.formats,
            "rules": vars(self.rules),
            "limit": self.limit,
            "sample": self.sample,
            "deduplicate": self.deduplicate,
        }


def plan(
    inputs: Sequence[str],
    model: str,
    classes: Vocabulary,
    out: str,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    settings: SegmentationConfig | None = None,
    rules: Rules | None = None,
    limit: int | None = None,
    sample: int | None = None,
    deduplicate: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Job:
    """Check a bulk segmentation before Ray is started, and return it as a job.

    Args:
        inputs: folders, prefixes, glob patterns and files, see :mod:`vilseg.bulk.listing`.
        model: URI of a model folder, or a hub id.
        classes: vocabulary to segment with.
        out: folder or ``s3://`` URI. ``results.parquet`` and ``summary.json`` are always written, other files by ``formats``.
        formats: any of ``png`` (masks), ``coco`` (``annotations.json``), ``overlay``, ``gallery`` (``gallery.html``),
            ``geotiff`` (masks of georeferenced inputs) and ``parquet``, which is always written.
        settings: inference settings; None uses those stored with the model.
        rules: limits on inputs.
        limit: number of inputs to segment, counted from the first one listed; None segments all.
        sample: number of inputs in a random sample; None segments all inputs.
        deduplicate: segment files with identical bytes only once.
        resume: continue an earlier job at ``out``.
        overwrite: delete the output of an earlier job at ``out`` before the job starts.

    Raises:
        DataError: ``inputs`` is empty, or one of them holds no image.
        StorageError: ``out`` overlaps an input or the model, exists although neither ``resume`` nor ``overwrite`` is set, or
            holds files that no bulk segmentation wrote; or a URI cannot be reached.
        ConfigError: a format is unknown, a number is less than 1, options exclude each other, or ``out`` holds the output of
            another job and ``resume`` is set.
        ModelError: ``model`` is not a model folder.
    """
    from vilseg.model.serialization import (
        read_segmentation_config,
    )  # imports torch, which listing tasks do not need

    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise ConfigError(f"--format {unknown[0]} is not known; choose among {', '.join(FORMATS)}")
    rules = rules or Rules()
    counts = {"limit": limit, "sample": sample, "min-side": rules.min_side, "max-pixels": rules.max_pixels}
    for name, value in (counts | {"key-every": rules.key_every}).items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}, but it must be at least 1")
    if limit and sample:
        raise ConfigError("--limit and --sample exclude each other: give one of them")
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: go on with what is there, or replace it")
    if not inputs:
        raise DataError("no input is given: name folders, s3:// prefixes, patterns, shards, tables, lists or pictures")
    for uri in (*inputs, model, out):
        storage.require_bucket(uri)
    carried = read_segmentation_config(model)  # fails here, before a pool of actors is started
    job = Job(
        inputs=sorted({storage.absolute(uri) for uri in inputs}),
        # Absolute, because actors may have another working directory. A path that does not exist is taken as a hub id.
        model=storage.absolute(model) if storage.exists(model) else model,
        classes=classes,
        segmentation=settings or carried,
        formats=sorted({"parquet", *formats}),  # always written
        out=storage.absolute(out),
        rules=rules,
        limit=limit,
        sample=sample,
        deduplicate=deduplicate,
        overwrite=overwrite,
        parallelism=_parallelism(inputs),
    )
    _check_output(job, resume=resume)
    return job


def list_inputs(job: Job) -> Iterator[Input | Container]:
    """Return an iterator over the inputs of the job, in the order of the listing.

    Containers (shards, tables, lists) are yielded unopened, unless ``limit`` or ``sample`` requires to count their contents.
    """
    if not (job.limit or job.sample):
        return scan(job.inputs)

    def opened() -> Iterator[Input]:
        return itertools.chain.from_iterable(map(open_container, scan(job.inputs)))

    if job.limit:
        return itertools.islice(opened(), job.limit)
    # The inputs whose names have the smallest hashes: a random sample that is the same in every call, in constant memory.
    without_data = (replace(item, data=None) for item in opened())
    picked = {item.name for item in heapq.nsmallest(job.sample or 0, without_data, key=_digest)}
    return (item for item in opened() if item.name in picked)


def open_container(found: Input | Container) -> Iterator[Input]:
    """Yield the inputs inside a container, or the given input itself.

    If the container is damaged, the last yielded input has the container's name and the error as its ``problem``.

    Raises:
        StoreUnavailable: the store does not respond.
    """
    if isinstance(found, Input):
        yield found
        return
    try:
        yield from found.inputs()
    except StoreUnavailable:
        raise  # otherwise the rest of the container would be skipped silently
    except (DataError, StorageError) as error:
        yield Input(found.name, found.uri, problem=str(error))


def _digest(item: Input) -> bytes:
    return hashlib.sha256(item.name.encode("utf-8", "surrogateescape")).digest()


def clear_output(out: str) -> None:
    """Delete the files that an earlier job wrote, except its ``job.json``, which the new job replaces."""
    before = _job_at(out)
    formats = before["formats"] if before else []
    written = {"png": [MASKS], "geotiff": [MASKS], "overlay": [OVERLAYS], "gallery": [THUMBS, PAGE, DATA]}
    written["coco"] = [ANNOTATIONS]
    folders = [name for kind in formats for name in written.get(kind, [])]
    # Result rows first: after an interruption an image with a row but no mask would count as done.
    for name in (RESULTS, PARTS, SUMMARY, *dict.fromkeys(folders)):
        storage.delete(storage.join(out, name))


@dataclass(frozen=True)
class Estimate:
    """Estimate of the work and time of a job."""

    images: int
    bytes: int
    """Total size of the input files in bytes; for containers, of their members."""
    containers: int
    rejected_of_tried: int
    """Number of inputs rejected among those segmented for the estimate."""
    tried: int
    """Number of inputs segmented for the estimate."""
    seconds_per_image: float
    """Seconds per input on one CPU or GPU for reading, decoding, inference and writing."""

    def seconds(self, workers: int) -> float:
        """Return the estimated seconds on ``workers`` CPUs or GPUs, without the start of Ray."""
        return self.images * self.seconds_per_image / workers


def estimate(job: Job, scratch: str) -> Estimate:
    """Count all inputs and time the segmentation of a random sample of `_TRIED` of them.

    Args:
        job: job returned by `plan`; nothing is written to its output.
        scratch: folder for the outputs of the sampled inputs.
    """
    import torch

    from vilseg.bulk.worker import BlockSegmenter
    from vilseg.model import ViLSeg
    from vilseg.segmentation.segmenter import Segmenter

    images = size = containers = 0
    picked: list[tuple[int, int, Input]] = []
    for found in list_inputs(job):
        containers += isinstance(found, Container)
        for item in open_container(found):
            images += 1
            size += item.size or len(item.data or b"")
            # The heap keeps the smallest hashes of names, negated: a random sample that is the same in every call.
            entry = (-int.from_bytes(_digest(item)), images, item)
            if len(picked) < _TRIED:
                heapq.heappush(picked, entry)
            else:
                heapq.heappushpop(picked, entry)
    torch.set_num_threads(1)
    model = ViLSeg.from_pretrained(job.model)
    model.segmentation = job.segmentation
    outputs = replace(job.outputs, out=scratch)
    worker = BlockSegmenter(Segmenter(model, job.classes, keep_clusters=False), outputs, job.rules)
    tried = [item for _, _, item in picked]
    worker.block(tried[:1])  # warm-up: the first input takes longer
    started = time.perf_counter()
    result = worker.block(tried)
    seconds = (time.perf_counter() - started) / max(1, len(tried))
    return Estimate(images, size, containers, len(result.rejected), len(tried), seconds)


def _parallelism(inputs: Sequence[str]) -> int:
    found = list(itertools.islice(scan([storage.absolute(uri) for uri in inputs]), _PEEK))
    if any(isinstance(item, Container) for item in found) or len(found) == _PEEK:
        return _PEEK
    return max(1, len(found) // _ACTOR_INPUTS, sum(item.kind == "video" for item in found if isinstance(item, Input)))


def begin(job: Job, weights: str) -> None:
    """Clear the output or check that it can be resumed, and write ``job.json``.

    Args:
        job: job returned by `plan`.
        weights: digest of the model's weights, since the weights at a URI may change between calls.

    Raises:
        ConfigError: the existing output belongs to another job or to other weights.
    """
    before = _job_at(job.out)
    if job.overwrite:
        clear_output(job.out)
    elif before:
        _require_same(job, before)  # checked by `plan` too, but only now no other job can write
        if before.get("weights") not in (None, weights):
            raise ConfigError(
                f"cannot resume into {job.out}: the model at {job.model} has other weights now; replace it by --overwrite"
            )
    tree = {**job.to_dict(), "weights": weights}
    storage.write_text(storage.join(job.out, JOB), json.dumps(tree, indent=2, ensure_ascii=False))


def _check_output(job: Job, *, resume: bool) -> None:
    """Raise an error unless the output is new or empty, or holds an earlier output to be resumed or overwritten."""
    out = job.out
    for place in (*map(fixed_part, job.inputs), job.model):
        if storage.overlap(out, place):
            raise StorageError(f"cannot write to {out}: it and {place}, which is read, overlap; name a folder apart")
    if not storage.exists(out):
        return
    if not storage.is_folder(out):
        raise StorageError(f"cannot write to {out}: it is a file; name a folder")
    require_free(out)
    before = _job_at(out)
    if before is None:
        if any(entry.relative != LOCK for entry in storage.list_files(out)):
            raise StorageError(
                f"cannot write to {out}: it holds files and is no output of vilseg segment, which --resume and "
                "--overwrite need; name an empty folder"
            )
    elif resume:
        _require_same(job, before)
    elif not job.overwrite:
        raise StorageError(f"the output {out} exists already; go on with it by --resume or replace it by --overwrite")


def _require_same(job: Job, before: dict[str, Any]) -> None:
    """Raise ConfigError if ``before``, the content of an existing ``job.json``, differs from ``job``."""
    said = {"model": "another model", "segmentation": "other segmentation settings", "rules": "other limits"}
    said |= {"limit": "another --limit", "sample": "another --sample", "deduplicate": "another --deduplicate"}
    said |= {"vocabulary": "other prompts, background or negative words"}
    now = job.to_dict()
    # The vocabulary digest is not compared if the classes differ, which implies it, or if an earlier version wrote none.
    if before["classes"] != now["classes"] or "vocabulary" not in before:
        del now["vocabulary"]
    other = [said.get(key, f"other {key}") for key, value in now.items() if before[key] != value]
    if other:
        raise ConfigError(
            f"cannot resume into {job.out}: it was made with {' and '.join(other)}; "
            "repeat what it was made with, or replace it by --overwrite"
        )


def _job_at(out: str) -> dict[str, Any] | None:
    """Read ``job.json`` at ``out``; return None if it does not exist or has another format."""
    marker = storage.join(out, JOB)
    if not storage.exists(marker):
        return None
    try:
        tree = json.loads(storage.read_text(marker))
    except ValueError:
        return None
    return tree if isinstance(tree, dict) and tree.keys() >= _KEYS else None
