"""Worker that segments blocks of inputs, with reading, inference and writing overlapped in one process.

Some threads read and decode inputs ahead of the model, others write results after it. An unusable input becomes a row with
status ``rejected``; requests to a store that does not respond are retried. Rows are written as a part file of the results
table at the end of a block, and every minute during a long block.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vilseg import storage
from vilseg.bulk.gallery import THUMBS, thumbnail
from vilseg.bulk.listing import Input
from vilseg.bulk.outputs import MASKS, OVERLAYS, BlockResult, Outputs, Rules
from vilseg.bulk.results_table import write_part
from vilseg.data.image_decoding import decode_image
from vilseg.errors import DataError, DiskFullError, StorageError, StoreUnavailable, UserError
from vilseg.segmentation.geotiff import GeoMask, is_georeferenced, segment_geotiff
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.segmenter import Segmenter
from vilseg.segmentation.video import VideoResult, segment_file

_PART_SECONDS = 60.0
_AHEAD_PIXELS = 64_000_000
"""Maximum pixels of decoded images that wait for the model, and of images whose results wait to be written.

Images that are being decoded or written may exceed it.
"""
_GPU_BATCH = 16
"""Maximum number of images per forward pass on a GPU; 1 on a CPU, where batches are not faster."""
_WRITERS = 4
_TIFF = (".tif", ".tiff")
_MAX_PART = 250
"""Maximum bytes of a folder or file name, without the suffix of up to 5 bytes that outputs add (most filesystems allow 255)."""
_MAX_NAME = 900
"""Maximum bytes of a whole name with its folders; S3 allows 1,024 for a key, including the prefix of the output folder."""
_MAX_OVERLAY = 4096
"""Maximum side of an overlay in pixels; the limit of WebP is 16,383."""


@dataclass
class _Loaded:
    row: dict[str, Any]
    image: np.ndarray | None = None
    """Decoded image; None if the row is complete or the input is segmented as a file (video, GeoTIFF)."""
    whole: Input | None = None
    """Input that is segmented as a file; None for images."""

    @property
    def pixels(self) -> int:
        """Number of pixels of the decoded image; 0 if there is none."""
        return 0 if self.image is None else self.image.shape[0] * self.image.shape[1]


class BlockSegmenter:
    """Segmenter of blocks of inputs, one per process.

    Args:
        segmenter: segmenter with the model and the classes.
        outputs: output folder and the files to write.
        rules: limits on the inputs.
        readers: number of threads that read and decode.
        claim: function that gets the SHA-256 and the name of an input, and returns the name of the first input with that hash.
            If it returns the name of another input, the input becomes a duplicate of that one. If None, equal inputs are
            segmented separately.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        outputs: Outputs,
        rules: Rules,
        *,
        readers: int = 2,
        claim: Callable[[str, str], str] | None = None,
    ) -> None:
        self._segmenter = segmenter
        self._outputs = outputs
        self._rules = rules
        self._claim = claim
        self._batch = _GPU_BATCH if segmenter.device.type == "cuda" else 1
        self._reading = storage.ThreadPool(readers, "vilseg-read")
        self._readers = readers
        self._writing = storage.ThreadPool(_WRITERS, "vilseg-write")
        self._turn = threading.Lock()

    def block(self, inputs: Sequence[Input]) -> BlockResult:
        """Segment ``inputs`` and write their masks and rows.

        Two threads may call this at once with different blocks. The second reads and decodes ahead, and gets the model when
        the inference of the first is finished, while the results of the first are still being written.

        Raises:
            StorageError: the output cannot be written, or the store does not respond.
        """
        result = BlockResult()
        done: list[dict[str, Any]] = []
        flushed = time.monotonic()
        with storage.retrying():
            for row in self._rows(inputs):
                done.append(row)
                result.images += 1
                if row["status"] == "rejected":
                    result.rejected.append((row["path"], row["error"]))
                if time.monotonic() > flushed + _PART_SECONDS:
                    self._flush(done)
                    flushed = time.monotonic()
            self._flush(done)
        return result

    def _flush(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            write_part(self._outputs.out, rows)
        rows.clear()

    def _rows(self, inputs: Sequence[Input]) -> Iterator[dict[str, Any]]:
        """Yield finished rows in the order of the inputs."""
        writing: deque[tuple[Future[dict[str, Any]], int]] = deque()
        pixels = 0
        ahead = _Ahead(self._reading, self._load, inputs, self._readers + self._batch)
        with self._turn:
            for batch in _batched(ahead, self._batch):
                results = iter(self._segmenter.batch([loaded.image for loaded in batch if loaded.image is not None]))
                for loaded in batch:
                    if loaded.image is not None:
                        future = self._begin_writing(loaded.row, loaded.image, next(results))
                    else:
                        row = loaded.row if loaded.whole is None else self._segment_file(loaded.whole, loaded.row)
                        future = _finished(row)
                    writing.append((future, loaded.pixels))
                    pixels += loaded.pixels
                while writing and (len(writing) > 2 * _WRITERS or pixels > _AHEAD_PIXELS or writing[0][0].done()):
                    future, written = writing.popleft()
                    pixels -= written
                    yield future.result()
        for future, _ in writing:
            yield future.result()

    def _load(self, item: Input) -> _Loaded:
        row: dict[str, Any] = {"path": item.name, "status": "ok"}
        try:
            _check_name(item.name)
            if item.problem is None and item.kind == "video":
                return _Loaded(row, whole=item)
            if self._outputs.geotiff and _is_geotiff(item):
                return _Loaded(row, whole=item)
            data = item.read()
            row["sha256"] = hashlib.sha256(data).hexdigest()
            image = decode_image(data, max_pixels=self._rules.max_pixels)
            row["height"], row["width"] = image.shape[:2]
            if min(image.shape[:2]) < self._rules.min_side:
                least = self._rules.min_side
                raise DataError(f"{row['width']} x {row['height']} pixels, less than --min-side {least}")
            # Claim after the checks, so that copies of a rejected file are rejected and counted too.
            if self._claim and (first := self._claim(row["sha256"], item.name)) != item.name:
                return _Loaded({"path": item.name, "status": "ok", "sha256": row["sha256"], "duplicate_of": first})
            return _Loaded(row, image=image)
        except (StoreUnavailable, DiskFullError):
            raise
        except UserError as error:
            return _Loaded(_rejected(row, str(error)))

    def _begin_writing(self, row: dict[str, Any], image: np.ndarray, result: Segmentation) -> Future[dict[str, Any]]:
        if self._segmenter.device.type != "cpu":
            return self._writing.submit(lambda: self._send(row, self._encode(row, image, result)))
        # On a CPU, encoding beside the model would compete for the same cores; only sending is asynchronous.
        files = self._encode(row, image, result)
        return self._writing.submit(self._send, row, files) if files else _finished(row)

    def _encode(self, row: dict[str, Any], image: np.ndarray, result: Segmentation) -> dict[str, bytes]:
        """Fill ``row`` with the result, and return the content of the files to write by path relative to the output folder."""
        outputs, name = self._outputs, row["path"]
        files = {}
        if outputs.png:
            files[f"{MASKS}/{name}.png"] = result.to_png_bytes()
        if outputs.overlay:
            files[f"{OVERLAYS}/{name}.webp"] = _encode_overlay(result)
        if outputs.gallery:
            files[f"{THUMBS}/{name}.webp"] = thumbnail(image, result.labels, result.classes)
        row["classes"] = [region.class_name for region in result.regions]
        row["areas"] = [region.area for region in result.regions]
        row["scores"] = [region.score for region in result.regions]
        row["rle"] = [region.rle["counts"] for region in result.regions]
        return files

    def _send(self, row: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        for name, data in files.items():
            storage.write_bytes(storage.join(self._outputs.out, name), data)
        return row

    def _segment_file(self, item: Input, row: dict[str, Any]) -> dict[str, Any]:
        """Segment a video or GeoTIFF, whose masks are written while it is read; return its row."""
        masks = storage.join(self._outputs.out, MASKS, item.name)
        with ExitStack() as stack:
            try:
                path = stack.enter_context(_as_file(item))
                row["sha256"] = _sha256(path)
            except (StoreUnavailable, DiskFullError):
                raise
            except StorageError as error:
                return _rejected(row, str(error))
            except OSError as error:
                return _rejected(row, f"cannot read {item.uri}: {error.strerror or error}")
            try:
                segment = self._segment_video if item.kind == "video" else self._segment_geotiff
                found = segment(item, path, masks)
            except StorageError:
                raise  # the output cannot be written, which is no fault of this input
            except UserError as error:
                return _rejected(row, str(error))
        return row | found | {"rle": []}

    def _segment_video(self, item: Input, path: Path, masks: str) -> dict[str, Any]:
        overlay = storage.join(self._outputs.out, OVERLAYS, f"{item.name}.mp4") if self._outputs.overlay else None
        every = self._rules.key_every
        with tempfile.TemporaryDirectory(prefix="vilseg-") as scratch:
            if self._outputs.png:
                storage.delete(masks)  # frames of an earlier attempt
            else:
                masks = scratch
            found = segment_file(self._segmenter, str(path), masks_uri=masks, overlay_uri=overlay, key_every=every)
        areas = [round(area / found.frames) for area in found.areas]
        return _summary(found, areas)

    def _segment_geotiff(self, item: Input, path: Path, masks: str) -> dict[str, Any]:
        found = segment_geotiff(self._segmenter, str(path), f"{masks}.tif")
        return _summary(found, list(found.areas))


def _summary(found: VideoResult | GeoMask, areas: list[int]) -> dict[str, Any]:
    """Return the fields of a row for a result without run lengths; the areas of a video are means over its frames."""
    kept = [(name, area, score) for name, area, score in zip(found.classes, areas, found.scores, strict=True) if area]
    names, areas, scores = (list(column) for column in zip(*kept, strict=True)) if kept else ([], [], [])
    return {"width": found.width, "height": found.height, "classes": names, "areas": areas, "scores": scores}


class _Ahead:
    """Iterator over decoded inputs, in order. The threads of ``pool`` read and decode ahead; they start on construction.

    At most ``most`` inputs are being decoded at once, because their sizes are not known yet. No further input is started while
    the decoded images that wait have `_AHEAD_PIXELS` or more pixels in total.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, load: Callable[[Input], _Loaded], inputs: Sequence[Input], most: int
    ) -> None:
        self._pool, self._load, self._most = pool, load, most
        self._coming = iter(inputs)
        self._waiting: deque[Future[_Loaded]] = deque()
        self._refill()

    def _refill(self) -> None:
        unknown = decoded = 0
        for future in self._waiting:
            if not future.done():
                unknown += 1
            elif future.exception() is None:
                decoded += future.result().pixels
        room = min(self._most - unknown, 2 * self._most - len(self._waiting))
        if decoded >= _AHEAD_PIXELS:
            room = int(not self._waiting)
        for item in itertools.islice(self._coming, max(0, room)):
            self._waiting.append(self._pool.submit(self._load, item))

    def __iter__(self) -> Iterator[_Loaded]:
        while self._waiting:
            loaded = self._waiting.popleft().result()
            self._refill()
            yield loaded


def _check_name(name: str) -> None:
    parts = [len(part.encode("utf-8", "surrogateescape")) for part in name.split("/")]
    if max(parts) > _MAX_PART or sum(parts) + len(parts) > _MAX_NAME:
        raise DataError(
            f"its name has {sum(parts)} bytes, {max(parts)} in one part; "
            f"what is written by it may have {_MAX_NAME}, and {_MAX_PART} in a part: rename it"
        )


@contextmanager
def _as_file(item: Input) -> Iterator[Path]:
    """Provide the input as a local file; a container member is written to a temporary file."""
    if item.data is None:
        with storage.local_copy(item.uri) as path:
            yield path
        return
    with tempfile.TemporaryDirectory(prefix="vilseg-") as folder:
        path = Path(folder) / f"member{Path(item.name).suffix}"
        path.write_bytes(item.data)
        yield path


def _is_geotiff(item: Input) -> bool:
    if item.data is not None or item.problem or not item.name.lower().endswith(_TIFF):
        return False

    return is_georeferenced(item.uri)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode_overlay(result: Segmentation) -> bytes:
    buffer = io.BytesIO()
    overlay = result.overlay()
    overlay.thumbnail((_MAX_OVERLAY, _MAX_OVERLAY))
    overlay.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()


def _rejected(row: dict[str, Any], reason: str) -> dict[str, Any]:
    # The reason may quote a file name that is not valid Unicode.
    return row | {"status": "rejected", "error": reason.encode("utf-8", "backslashreplace").decode()}


def _finished(row: dict[str, Any]) -> Future[dict[str, Any]]:
    future: Future[dict[str, Any]] = Future()
    future.set_result(row)
    return future


def _batched(items: Iterable[_Loaded], size: int) -> Iterator[list[_Loaded]]:
    """Yield batches of at most ``size`` items; a batch ends once its images have more than `_AHEAD_PIXELS` pixels in total."""
    batch: list[_Loaded] = []
    for item in items:
        batch.append(item)
        if len(batch) == size or sum(one.pixels for one in batch) > _AHEAD_PIXELS:
            yield batch
            batch = []
    if batch:
        yield batch
