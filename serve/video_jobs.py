"""VideoJobs as jobs: a folder each, with the film, its state in ``job.json`` and, in the end, an overlay film and the masks."""

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
_STATE, _VIDEO = "job.json", "film"
_ID = re.compile(r"[0-9a-f]{32}")
_FRAMES_A_SECOND = 120
"""More are not believed: times may all be 0."""
_SILENCE = 600.0
"""Seconds after which a film that nobody says anything of any more is given up."""
_TELL_EVERY = 1.0
"""Seconds between two notes of how far a film is."""


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """A film and what to look for in it."""

    id: str
    folder: str
    model_uri: str
    vocabulary: Vocabulary
    key_every: int


class VideoJobs:
    """The folders of all films under one place.

    Args:
        place: folder or URI.
        keep_hours: age at which a film is deleted.
    """

    def __init__(self, place: str, keep_hours: float) -> None:
        self._place = storage.absolute(place)
        self._keep = keep_hours * 3600

    def add(self, film: IO[bytes]) -> str:
        """Keep a film; returns its id, which nobody guesses."""
        video_id = secrets.token_hex(16)
        with storage.open_atomic(storage.join(self.folder(video_id), _VIDEO)) as file:
            shutil.copyfileobj(film, file, 1 << 20)
        write_state(self.folder(video_id), {"status": "queued", "frames": 0})
        return video_id

    def folder(self, video_id: str) -> str:
        """Where a film and its results are."""
        assert _ID.fullmatch(video_id), "an id becomes a path, so it must be one of ours"
        return storage.join(self._place, video_id)

    def state(self, video_id: str) -> dict[str, Any] | None:
        """``status`` (queued, running, done, failed), ``frames`` and what came out; None where there is no such film."""
        if not _ID.fullmatch(video_id):
            return None
        place = storage.join(self.folder(video_id), _STATE)
        if not storage.exists(place):
            return None
        state = json.loads(storage.read_text(place))
        if state["status"] in ("queued", "running") and time.time() - state["updated"] > _SILENCE:
            return {**state, "status": "failed", "error": "The work was interrupted; send the film again."}
        return state

    def touch(self, video_id: str) -> None:
        """Note that a film that waits is not forgotten."""
        state = self.state(video_id)
        if state is not None and state["status"] == "queued":
            write_state(self.folder(video_id), state)

    def delete(self, video_id: str) -> None:
        """Forget a film and its results."""
        storage.delete(self.folder(video_id))

    def delete_old(self) -> int:
        """Delete what is older than may be kept; returns how many."""
        if not storage.exists(self._place):
            return 0
        states = [entry for entry in storage.list_files(self._place) if entry.relative.endswith(f"/{_STATE}")]
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


def write_state(folder: str, state: dict[str, Any]) -> None:
    """Replace a film's state, with the time."""
    storage.write_text(storage.join(folder, _STATE), json.dumps({**state, "updated": time.time()}))


def segment_video_job(
    job: VideoJob, segmenter: Callable[[], Segmenter], limits: Limits, cancelled: threading.Event
) -> None:
    """Segment a film and write what came out, or why nothing did, into its folder."""
    told = 0.0

    def progress(frames: int, seconds: float) -> None:
        nonlocal told
        if cancelled.is_set():
            raise InterruptedError
        if seconds > limits.video_seconds or frames > _FRAMES_A_SECOND * limits.video_seconds:
            raise TooLargeError(f"the film is longer than {limits.video_seconds:g} s, the most that is taken")
        if time.monotonic() - told > _TELL_EVERY:
            told = time.monotonic()
            write_state(job.folder, {"status": "running", "frames": frames})

    write_state(job.folder, {"status": "running", "frames": 0})
    try:
        with tempfile.TemporaryDirectory(prefix="vilseg-") as scratch:
            masks = Path(scratch) / "masks"
            found = segment_file(
                segmenter(),
                storage.join(job.folder, _VIDEO),
                masks_uri=str(masks),
                overlay_uri=storage.join(job.folder, OVERLAY),
                key_every=job.key_every,
                max_pixels=limits.video_pixels,
                progress=progress,
            )
            if cancelled.is_set():
                return
            _pack(masks, job.vocabulary, storage.join(job.folder, MASKS))
    except InterruptedError:
        return  # whoever cancelled it deletes the folder
    except DataError as error:
        # Places on the server are nobody's business.
        sentence = str(error).replace(storage.join(job.folder, _VIDEO), "the film").partition("; the masks")[0]
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
        write_state(job.folder, state)


def _pack(masks: Path, vocabulary: Vocabulary, uri: str) -> None:
    # PNG is compressed already.
    with storage.open_atomic(uri) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(masks.iterdir()):
            archive.write(path, path.name)
        archive.writestr("classes.txt", "\n".join(vocabulary.classes) + "\n")
