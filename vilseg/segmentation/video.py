"""Segment a video file: read frames, write masks, frame times and an overlay video, return statistics.

The functions of `vilseg.segmentation.video_io` (decoding, encoding) and `vilseg.segmentation.video_keyframes` (segmentation of a
sequence of frames) can also be imported from here.
"""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vilseg import storage
from vilseg.errors import DataError, StorageError, TooLargeError
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.segmenter import Segmenter
from vilseg.segmentation.video_io import Frame, read_frames, write_video
from vilseg.segmentation.video_keyframes import segment_video

__all__ = ["Frame", "VideoResult", "read_frames", "segment_file", "segment_video", "write_video"]


@dataclass(frozen=True, kw_only=True)
class VideoResult:
    """Statistics of a segmented video: size, duration, and the classes that have pixels in any frame."""

    frames: int
    """Number of frames."""
    width: int
    """Width of the upright frames in pixels."""
    height: int
    """Height of the upright frames in pixels."""
    seconds: float
    """Duration in seconds; the last frame is assumed to last as long as the one before it."""
    classes: tuple[str, ...]
    """Names of the classes that have pixels in any frame, in index order."""
    areas: tuple[int, ...]
    """Number of pixels of each of these classes, summed over the frames."""
    scores: tuple[float, ...]
    """Mean score of the pixels of each of these classes, in 0..1."""


def segment_file(
    segmenter: Segmenter,
    source_uri: str,
    *,
    masks_uri: str,
    overlay_uri: str | None = None,
    key_every: int = 6,
    smoothing: float = 0.7,
    max_pixels: int | None = None,
    progress: Callable[[int, float], None] = lambda frames, seconds: None,
) -> VideoResult:
    """Segment a video file and write its masks.

    Args:
        segmenter: model and classes.
        source_uri: path or URI of a video in any format that FFmpeg can read, except formats that refer to other files.
        masks_uri: directory for the masks: one indexed PNG per frame (``000000.png`` and so on) and ``frames.csv`` with the
            ``index`` and ``seconds`` of every frame. That file is written last, so a directory without it is incomplete.
        overlay_uri: path or URI of an MP4 file with the class colours over the frames, at the same times; it is created
            atomically. None writes no such file.
        key_every: distance between keyframes in frames; see `segment_video`.
        smoothing: weight of temporal smoothing; see `segment_video`.
        max_pixels: maximum width x height of the frames; None allows 100 million.
        progress: called with the number of frames read and the display time, in seconds, of the last one. If it raises an
            exception, segmentation stops with that exception.

    Raises:
        TooLargeError: the frames have more than ``max_pixels`` pixels.
        DataError: ``source_uri`` is not a video, or is damaged; the masks of the frames before the damage are kept.
        StorageError: the source cannot be read, the results cannot be written, or ``masks_uri`` already contains files.
        ConfigError: ``key_every`` or ``smoothing`` is out of range.
        UserError: PyAV is not installed.
    """
    if storage.exists(masks_uri) and storage.list_files(masks_uri):
        raise StorageError(f"{masks_uri} holds files already; choose another folder for the masks or delete this one")
    statistics = _VideoStatistics(len(segmenter.classes))
    results = segment_video(
        segmenter,
        _images(read_frames(source_uri, max_pixels=max_pixels), statistics, progress),
        key_every=key_every,
        smoothing=smoothing,
    )
    written = _write_masks(results, masks_uri, statistics)
    if overlay_uri is None:
        for _ in written:
            pass
    else:
        overlays = (np.asarray(result.overlay(legend=False)) for result in written)
        write_video(overlay_uri, (Frame(i, statistics.seconds[i], image) for i, image in enumerate(overlays)))
    _write_times(masks_uri, statistics.seconds)
    return statistics.result(segmenter.classes)


class _VideoStatistics:
    """Areas, scores and display times accumulated over the frames of a video."""

    def __init__(self, num_classes: int) -> None:
        self.seconds: list[float] = []
        self.size = (0, 0)
        self.damage: DataError | None = None
        self._areas = np.zeros(num_classes, np.int64)
        self._score_sums = np.zeros(num_classes)

    def add(self, result: Segmentation) -> None:
        """Add the areas and scores of the classes in one frame."""
        areas, score_sums = result.areas_and_score_sums()
        self._areas += areas
        self._score_sums += score_sums
        self.size = result.labels.shape

    def result(self, classes: tuple[str, ...]) -> VideoResult:
        """Return the statistics of the whole video."""
        present = np.flatnonzero(self._areas)
        last = self.seconds[-2:]
        return VideoResult(
            frames=len(self.seconds),
            width=self.size[1],
            height=self.size[0],
            seconds=last[-1] + (last[-1] - last[0]),
            classes=tuple(classes[index] for index in present),
            areas=tuple(int(self._areas[index]) for index in present),
            scores=tuple(float(self._score_sums[index] / self._areas[index]) for index in present),
        )


def _images(
    frames: Iterator[Frame], statistics: _VideoStatistics, progress: Callable[[int, float], None]
) -> Iterator[np.ndarray]:
    """Yield the images of frames, and record their times.

    If the video is damaged after the first frame, the error is recorded in ``statistics`` and the iterator ends, so that the
    frames before the damage are still segmented.
    """
    try:
        for frame in frames:
            statistics.seconds.append(frame.seconds)
            progress(len(statistics.seconds), frame.seconds)
            yield frame.image
    except TooLargeError:
        raise
    except DataError as error:
        if not statistics.seconds:
            raise
        statistics.damage = error


def _write_masks(
    results: Iterator[Segmentation], masks_uri: str, statistics: _VideoStatistics
) -> Iterator[Segmentation]:
    for index, result in enumerate(results):
        result.to_png(storage.join(masks_uri, f"{index:06d}.png"))
        statistics.add(result)
        yield result
    if statistics.damage:
        raise DataError(
            f"{statistics.damage}; the masks of the frames before that are in {masks_uri}"
        ) from statistics.damage


def _write_times(masks_uri: str, seconds: list[float]) -> None:
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows(
        [("index", "seconds"), *((index, round(time, 6)) for index, time in enumerate(seconds))]
    )
    storage.write_text(storage.join(masks_uri, "frames.csv"), lines.getvalue())
