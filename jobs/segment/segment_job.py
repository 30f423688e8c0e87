"""Bulk segmentation: one task lists the inputs, small tasks open containers, and a pool of actors segments blocks of inputs.

A container is a shard, a table or a list of inputs. A block is a small group of inputs that one actor processes in one call.

Every actor writes the masks of its block and then the block's result rows as one part file of the results table. All files are
written atomically. A kill loses at most the blocks in progress, up to two per actor. On resume, inputs that have a row are
skipped, so that the final table has exactly one row per input.
"""

from __future__ import annotations

import itertools
import json
import pickle
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data

from cluster.ray_session import Session, find_user_error
from jobs.segment.plan import ANNOTATIONS, SUMMARY, Estimate, Job, begin, estimate, list_inputs, open_container
from vilseg import storage
from vilseg.bulk import results_table
from vilseg.bulk.coco_annotations import Row, write_coco
from vilseg.bulk.gallery import THUMBS, write_gallery
from vilseg.bulk.lease import lease
from vilseg.bulk.listing import Container, Input
from vilseg.bulk.outputs import MASKS, OVERLAYS, BlockResult
from vilseg.bulk.scheduling import cut, cut_container
from vilseg.errors import DataError

if TYPE_CHECKING:  # importing torch would delay every process that does not compute
    from vilseg.bulk.worker import BlockSegmenter
    from vilseg.model.shared_weights import SplitObject

_LISTING_CPUS, _OPENING_CPUS, _ACTOR_FRACTION = 0.05, 0.1, 0.85
"""CPUs of the listing task, of tasks that open containers, and fraction of an actor's CPUs requested from Ray.

Listing and opening mostly wait for storage. Their values differ because Ray Data fuses stages that request equal resources.
"""
_COPIES_AT_ONCE = 1000
"""Number of duplicates whose outputs are copied before the next ones are read."""
_DEATHS_TO_SUSPECT, _DEATHS_TO_REJECT = 2, 2
"""Actor deaths on a block before its inputs are processed one by one; actor deaths on a single input before it is rejected."""
_MIN_INPUTS_TO_STOP = 50
"""Number of processed inputs from which on the fraction of rejected ones is checked."""


@dataclass(frozen=True)
class Summary:
    """Result of a bulk segmentation."""

    images: int
    ok: int
    rejected: int
    images_per_second: float
    """Images per second of this call, including reading and writing, without the start of Ray."""
    uri: str

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``summary.json``."""
        return {name: value for name, value in vars(self).items() if name != "uri"}


@dataclass(frozen=True)
class Progress:
    """Progress of a job."""

    done: int
    """Number of inputs processed, including those of earlier calls of `main` with the same output."""
    listed: int
    """Number of inputs listed so far, including those processed in earlier calls."""
    listing_ended: bool
    """All inputs are listed and all containers opened, so that `listed` is final."""
    rejected: int
    """Number of inputs rejected in this call of `main`."""
    new_rejected: list[tuple[str, str]]
    """(name, reason) of each input rejected since the progress function was last called."""


def main(
    job: Job,
    session: Session,
    *,
    max_rejected: float = 1.0,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Run a bulk segmentation and return its summary.

    Args:
        job: job returned by :func:`jobs.segment.plan.plan`.
        session: the cluster.
        max_rejected: maximum fraction of rejected inputs; the job ends early when it is exceeded.
        progress: function called after every block.

    Raises:
        DataError: too many inputs were rejected.
        StorageError: another job writes to the same output, the output cannot be written, or the store does not respond.
        ModelError: the model cannot be loaded.
    """
    with lease(job.out) as held:
        started = time.perf_counter()
        parts, weights = _load(job)
        with storage.retrying():
            begin(job, weights)
            done = results_table.names_done(job.out)
            finished = rejected = 0
            tally: Any = _Tally.remote(len(done))  # type: ignore[attr-defined]  # ray.remote hides the class it wraps
            try:
                for result in _stream(job, session, parts, done, tally):
                    held.check()
                    finished += result["images"]
                    refusals = pickle.loads(result["rejected"])
                    rejected += len(refusals)
                    listed, ended = ray.get(tally.state.remote())
                    progress(Progress(len(done) + finished, listed, ended, rejected, refusals))
                    _check_rejected(rejected, finished, max_rejected, refusals)
            except Exception as error:
                raise find_user_error(error) or error from error
            rate = finished / (time.perf_counter() - started) if finished else 0.0
            held.check()
            summary = _finish(job, round(rate, 2))
            held.check()
            return summary


def estimate_on_cluster(job: Job, session: Session) -> tuple[Estimate, int]:
    """List the inputs of ``job`` and time a few of them in a task on the cluster.

    Args:
        job: job returned by `jobs.segment.plan.plan`.
        session: the cluster.

    Returns:
        The estimate, and the number of actors that :func:`main` would start.

    Raises:
        UserError: an input, the model or the storage cannot be read by the cluster's machines.
    """
    actors = _actors(job, session)
    cpus = session.reserved_cpus(_ACTOR_FRACTION * session.cpus_per_actor(actors))
    task: Any = ray.remote(num_cpus=cpus, num_gpus=1 if session.gpus else 0)(_estimate)
    try:
        return ray.get(task.remote(job)), actors
    except Exception as error:
        raise find_user_error(error) or error from error


def _estimate(job: Job) -> Estimate:
    with tempfile.TemporaryDirectory(prefix="vilseg-") as scratch:
        return estimate(job, scratch)


# --------------------------------------------------------------------------------------------------------- stages


def _actors(job: Job, session: Session) -> int:
    """Return the number of actors: one per GPU, or one per CPU if there are no GPUs, but at most `Job.parallelism`."""
    return max(1, min(job.parallelism, session.gpus or session.cpus))


def _stream(
    job: Job, session: Session, parts: SplitObject, done: results_table.Names, tally: Any
) -> Iterator[dict[str, Any]]:
    """List, open and segment all inputs; yield the result of each block when it is finished."""
    known = ray.put(done)
    actors = _actors(job, session)
    shared = ray.put(parts)
    claims: Any = None
    if job.deduplicate:
        claims = _Claims.remote(results_table.claims(job.out))  # type: ignore[attr-defined]
    cpus = session.cpus_per_actor(actors)
    make = partial(_make_segmenter, job, [shared], claims, max(1, int(cpus)))
    actor = (make, tally)
    listing = ray.data.from_items([{"id": 0}], override_num_blocks=1)
    listing.context.target_max_block_size = (
        1  # in bytes: makes every row a Ray Data block of its own, which is passed on at once
    )
    blocks = listing.map_batches(
        lambda _: _list_blocks(job, actors, ray.get(known), tally), batch_size=None, num_cpus=_LISTING_CPUS
    ).map_batches(lambda batch: _open_containers(batch, ray.get(known), tally), batch_size=1, num_cpus=_OPENING_CPUS)
    results = blocks.map_batches(
        _Actor,
        fn_constructor_args=actor,
        batch_size=1,
        # Two calls at a time, so that an actor computes one block while it writes the outputs of the previous one.
        compute=ray.data.ActorPoolStrategy(
            size=actors, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_cpus=session.reserved_cpus(_ACTOR_FRACTION * cpus),
        num_gpus=1 if session.gpus else 0,
    )
    yield from results.iter_rows()


def _list_blocks(job: Job, actors: int, done: results_table.Names, tally: Any) -> Iterator[dict[str, np.ndarray]]:
    """Yield rows, each of which holds either one block of inputs or one container."""
    with storage.retrying():
        new = (one for one in list_inputs(job) if isinstance(one, Container) or one.name not in done)
        for found in cut(new, actors):
            if isinstance(found, Container):
                tally.add_container.remote(found.name)
                yield _row([found])
            else:
                tally.add.remote(len(found))
                yield _row(found)
    tally.end.remote()


def _open_containers(
    batch: dict[str, np.ndarray], done: results_table.Names, tally: Any
) -> Iterator[dict[str, np.ndarray]]:
    """Yield a block unchanged; open a container and yield its members in blocks."""
    items = pickle.loads(batch["items"][0])
    if not isinstance(items[0], Container):
        yield _row(items)
        return
    with storage.retrying():
        for block in cut_container(item for item in open_container(items[0]) if item.name not in done):
            tally.add.remote(len(block))
            yield _row(block)
    tally.opened.remote(items[0].name)


def _row(items: list[Any]) -> dict[str, np.ndarray]:
    data = np.empty(1, object)
    data[0] = pickle.dumps(items, protocol=5)
    return {"items": data}


def _load(job: Job) -> tuple[SplitObject, str]:
    """Load the model, and return its segmenter split for Ray's object store, and the digest of the weights.

    Split, the weights are in shared memory, and all actors of a machine use one copy. The class embeddings are computed here
    once; the text encoder is left out, since images do not need it.
    """
    from vilseg.model import ViLSeg
    from vilseg.model.shared_weights import split_weights
    from vilseg.segmentation.segmenter import Segmenter

    model = ViLSeg.from_pretrained(job.model)
    # Not the digest of the segmenter, since class embeddings differ in rounding between processors.
    weights = split_weights(model.state_dict()).digest()
    model.segmentation = job.segmentation
    segmenter = Segmenter(model, job.classes, device="cpu", keep_clusters=False)
    segmenter.release_text_encoder()
    return split_weights(segmenter), weights


def _make_segmenter(job: Job, parts: list[Any], claims: Any, threads: int) -> BlockSegmenter:
    import torch

    from vilseg.bulk.worker import BlockSegmenter
    from vilseg.device import best_device
    from vilseg.model.shared_weights import join_weights

    torch.set_num_threads(threads)
    # The model's thread releases the GIL in every operator, and could wait up to 5 ms (the default) to acquire it again.
    sys.setswitchinterval(0.0005)
    segmenter = join_weights(ray.get(parts[0])).to(best_device())
    claim = None if claims is None else lambda digest, name: ray.get(claims.claim.remote(digest, name))
    return BlockSegmenter(segmenter, job.outputs, job.rules, readers=max(2, threads), claim=claim)


class _Actor:
    """Segmenter of blocks; Ray Data constructs it once in every actor and calls it for each block."""

    def __init__(self, make: Callable[[], BlockSegmenter], tally: Any) -> None:
        from ray.util import metrics

        self._segmenter = make()
        self._tally = tally
        self._alone = threading.Lock()
        self._count = metrics.Counter("vilseg_segmented_images", "Inputs of bulk segmentation.", tag_keys=("status",))

    def _block(self, inputs: list[Input]) -> BlockResult:
        """Segment a block; isolate and reject inputs that kill the actor, because Ray Data would retry their block forever."""
        if ray.get(self._tally.begin.remote(inputs[0].name)) <= _DEATHS_TO_SUSPECT:
            return self._segmenter.block(inputs)
        total = BlockResult()
        for item in inputs:
            alone = f"{item.name} alone"
            with self._alone:  # one at a time, so that a death is attributed to the right input
                deaths = ray.get(self._tally.begin.remote(alone)) - 1
                if deaths >= _DEATHS_TO_REJECT:
                    item = replace(item, problem=f"the process that works on it dies: {deaths} did", data=None)
                result = self._segmenter.block([item])
                ray.get(self._tally.survived.remote(alone))
            total.images += result.images
            total.rejected += result.rejected
        return total

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        result = self._block(pickle.loads(batch["items"][0]))
        rejected = len(result.rejected)
        for status, count in (("ok", result.images - rejected), ("rejected", rejected)):
            if count:
                self._count.inc(count, {"status": status})
        refusals = np.empty(1, object)
        refusals[0] = pickle.dumps(result.rejected)
        return {"images": np.array([result.images]), "rejected": refusals}


# Advisory state only: an actor that dies may restart empty.
_helper = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)


@_helper
class _Tally:
    """Counts listed inputs, containers not yet opened, and attempts per block."""

    def __init__(self, done: int) -> None:
        self._listed = done
        self._ended = False
        self._unopened: set[str] = set()
        self._begun: Counter[str] = Counter()

    def begin(self, block: str) -> int:
        self._begun[block] += 1
        return self._begun[block]

    def survived(self, block: str) -> None:
        self._begun.pop(block, None)

    def add(self, inputs: int) -> None:
        self._listed += inputs

    def add_container(self, name: str) -> None:
        self._unopened.add(name)

    def opened(self, name: str) -> None:
        self._unopened.discard(name)

    def end(self) -> None:
        self._ended = True

    def state(self) -> tuple[int, bool]:
        return self._listed, self._ended and not self._unopened


@_helper
class _Claims:
    """Registry of the first input with each content hash, for deduplication."""

    def __init__(self, claims: dict[str, str]) -> None:
        self._claims = claims

    def claim(self, digest: str, name: str) -> str:
        return self._claims.setdefault(digest, name)


# ------------------------------------------------------------------------------------------------------------ end


def _check_rejected(rejected: int, finished: int, max_rejected: float, refusals: list[tuple[str, str]]) -> None:
    if finished >= _MIN_INPUTS_TO_STOP and rejected > max_rejected * finished:
        last = f"; the last is {refusals[-1][0]}: {refusals[-1][1]}" if refusals else ""
        raise DataError(
            f"{rejected} of {finished} inputs cannot be used, more than --max-rejected {max_rejected} allows{last}; "
            "what was segmented is kept for --resume"
        )


def _finish(job: Job, rate: float) -> Summary:
    """Merge the part files of the results table into the final output files; the summary is written last."""
    _copy_for_duplicates(job)
    results_table.merge(job.out)
    if "coco" in job.formats:
        _write_annotations(job)
    if job.outputs.gallery:
        write_gallery(job.out, results_table.read_results(job.out), job.classes.classes)
    return _summarise(job, rate)


def _write_annotations(job: Job) -> None:
    masks = _mask_name if job.outputs.png else None
    with storage.open_atomic(storage.join(job.out, ANNOTATIONS)) as file:
        write_coco(file, lambda: _rows_of_images(job.out), job.classes.classes, masks)


def _summarise(job: Job, rate: float) -> Summary:
    counts = Counter(row["status"] for row in results_table.read_results(job.out, ["status"]))
    summary = Summary(counts.total(), counts["ok"], counts["rejected"], rate, job.out)
    storage.write_text(storage.join(job.out, SUMMARY), json.dumps(summary.to_dict(), indent=2))
    return summary


def _rows_of_images(out: str) -> Iterator[Row]:
    """Yield the rows of segmented images; videos and GeoTIFFs are left out, since their rows have no run-length encoding."""
    return (row for row in results_table.read_results(out) if row["status"] == "ok" and row["rle"])


def _mask_name(row: Row) -> str:
    return f"{MASKS}/{row['path']}.png"


def _copy_for_duplicates(job: Job) -> None:
    if not job.deduplicate:
        return
    kinds = {MASKS: ("png", job.outputs.png), OVERLAYS: ("webp", job.outputs.overlay)}
    kinds[THUMBS] = ("webp", job.outputs.gallery)

    def copy(names: tuple[str, str]) -> None:
        path, first = names
        for folder, (suffix, wanted) in kinds.items():
            source = storage.join(job.out, folder, f"{first}.{suffix}")
            if wanted and storage.exists(source):  # a rejected input has no outputs
                storage.write_bytes(storage.join(job.out, folder, f"{path}.{suffix}"), storage.read_bytes(source))

    with storage.ThreadPool(storage.TRANSFERS_AT_ONCE) as pool:
        pairs = results_table.duplicates(job.out)
        while some := list(itertools.islice(pairs, _COPIES_AT_ONCE)):
            list(pool.map(copy, some))
