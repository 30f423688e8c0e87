"""Video jobs: each has a directory with the video, its state in ``job.json`` and, when it is done, overlay video and masks."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from serve.config import Limits
from vilseg import storage
from vilseg.errors import DataError, TooLargeError
from vilseg.segmentation.segmenter import Segmenter
from vilseg.segmentation.video import segment_file
from vilseg.text.vocabulary import Vocabulary

OVERLAY, MASKS = "overlay.mp4", "masks.zip"
_STATE, _VIDEO = "job.json", "video"
_ID = re.compile(r"[0-9a-f]{32}")
_MAX_FRAME_RATE = 120
"""Maximum frames per second of the allowed duration; limits the number of frames if timestamps are wrong, such as all 0."""
_STALE_S = 600.0
"""Seconds without an update of ``job.json`` after which a job counts as failed."""
_PROGRESS_S = 1.0
"""Seconds between two updates of the progress in ``job.json``."""


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """Job to segment a video into given classes."""

    id: str
    directory: str
    """URI of the directory of the job."""
    model_uri: str
    """URI of the model."""
    vocabulary: Vocabulary
    """Class list."""
    key_every: int
    """Interval in frames between key frames, which alone pass through the model."""


class VideoJobs:
    """The directories of all video jobs under a common root.

    Args:
        root: Path or URI of the directory that contains the directories of the jobs.
        keep_hours: Age in hours after which a job is deleted.
    """

    def __init__(self, root: str, keep_hours: float) -> None:
        self._root = storage.absolute(root)
        self._keep = keep_hours * 3600

    def add(self, video: IO[bytes]) -> str:
        """Store a video and return its id, which cannot be guessed."""
        video_id = secrets.token_hex(16)
        with storage.open_atomic(storage.join(self.directory(video_id), _VIDEO)) as file:
            shutil.copyfileobj(video, file, 1 << 20)
        write_state(self.directory(video_id), {"status": "queued", "frames": 0})
        return video_id

    def directory(self, video_id: str) -> str:
        """Return the URI of the directory of a job."""
        assert _ID.fullmatch(video_id), "an id becomes a path, so no other text may be one"
        return storage.join(self._root, video_id)

    def state(self, video_id: str) -> dict[str, Any] | None:
        """Return the state of a job: ``status`` (queued, running, done, failed), ``frames`` (number of frames read) and results.

        Returns:
            Content of ``job.json``; None if there is no such video. A job without updates for `_STALE_S` counts as failed.
        """
        if not _ID.fullmatch(video_id):
            return None
        uri = storage.join(self.directory(video_id), _STATE)
        if not storage.exists(uri):
            return None
        state = json.loads(storage.read_text(uri))
        if state["status"] in ("queued", "running") and time.time() - state["updated"] > _STALE_S:
            return {**state, "status": "failed", "error": "The segmentation was interrupted; send the video again."}
        return state

    def touch(self, video_id: str) -> None:
        """Write the current time to ``job.json`` of a queued job, so that it does not count as failed while it waits."""
        state = self.state(video_id)
        if state is not None and state["status"] == "queued":
            write_state(self.directory(video_id), state)

    def delete(self, video_id: str) -> None:
        """Delete a video and its results."""
        storage.delete(self.directory(video_id))

    def delete_old(self) -> int:
        """Delete expired jobs and return their number."""
        if not storage.exists(self._root):
            return 0
        states = [entry for entry in storage.list_files(self._root) if entry.relative.endswith(f"/{_STATE}")]
        count = 0
        for entry in states:
            video_id = entry.relative.split("/")[0]
            if (
                _ID.fullmatch(video_id)
                and time.time() - json.loads(storage.read_text(entry.uri))["updated"] > self._keep
            ):
                self.delete(video_id)
                count += 1
        return count


def write_state(directory: str, state: dict[str, Any]) -> None:
    """Write the state of a job and the current time to its ``job.json``."""
    storage.write_text(storage.join(directory, _STATE), json.dumps({**state, "updated": time.time()}))


def segment_video_job(
    job: VideoJob, segmenter: Callable[[], Segmenter], limits: Limits, cancelled: threading.Event
) -> None:
    """Segment a video and write its results, or the reason of the failure, to its directory.

    Args:
        job: Job to run.
        segmenter: Function that returns the segmenter for the model and class list of the job.
        limits: Limits on the size and duration of the video.
        cancelled: Event that ends the work; nothing more is written then.
    """
    written_at = 0.0

    def progress(frames: int, seconds: float) -> None:
        nonlocal written_at
        if cancelled.is_set():
            raise InterruptedError
        if seconds > limits.video_seconds or frames > _MAX_FRAME_RATE * limits.video_seconds:
            raise TooLargeError(f"the video is longer than {limits.video_seconds:g} s, the most that is taken")
        if time.monotonic() - written_at > _PROGRESS_S:
            written_at = time.monotonic()
            write_state(job.directory, {"status": "running", "frames": frames})

    write_state(job.directory, {"status": "running", "frames": 0})
    try:
        with tempfile.TemporaryDirectory(prefix="vilseg-") as scratch:
            masks = Path(scratch) / "masks"
            found = segment_file(
                segmenter(),
                storage.join(job.directory, _VIDEO),
                masks_uri=str(masks),
                overlay_uri=storage.join(job.directory, OVERLAY),
                key_every=job.key_every,
                max_pixels=limits.video_pixels,
                progress=progress,
            )
            if cancelled.is_set():
                return
            _pack(masks, job.vocabulary, storage.join(job.directory, MASKS))
    except InterruptedError:
        return  # write no state, because the caller that cancelled deletes the directory
    except DataError as error:
        # Remove the paths of the server from the message.
        sentence = str(error).replace(storage.join(job.directory, _VIDEO), "the video").partition("; the masks")[0]
        state = {"status": "failed", "frames": 0, "error": sentence[:1].upper() + sentence[1:] + "."}
    else:
        classes = [
            {"class": name, "area": area / found.frames, "score": round(score, 4)}
            for name, area, score in zip(found.classes, found.areas, found.scores, strict=True)
        ]
        state = {
            **{"status": "done", "frames": found.frames, "seconds": round(found.seconds, 3)},
            **{"width": found.width, "height": found.height, "classes": classes},
        }
    if not cancelled.is_set():
        write_state(job.directory, state)


def _pack(masks: Path, vocabulary: Vocabulary, uri: str) -> None:
    # Stored without compression, because PNG files are compressed already.
    with storage.open_atomic(uri) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(masks.iterdir()):
            archive.write(path, path.name)
        archive.writestr("classes.txt", "\n".join(vocabulary.classes) + "\n")
