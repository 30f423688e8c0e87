"""From a film to a segmentation of every frame that is steady in time and cheaper than frame by frame.

Only key frames go through the model: every ``key_every``-th frame, and the first one after a cut. What lies between two of
them takes its class scores from both, carried along by `vilseg.segmentation.video_propagation` and weighted by nearness in time
and by how well the frames matched. A key frame's own scores are mixed with those carried to it from the one before, so
that what the model sees differently from one moment to the next evens out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vilseg import storage
from vilseg.errors import ConfigError, DataError, StorageError, TooLargeError
from vilseg.segmentation import video_propagation
from vilseg.segmentation.refinement import best_classes
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.segmenter import Segmenter, to_array
from vilseg.segmentation.video_io import Frame, read_frames, write_video
from vilseg.segmentation.video_propagation import PropagatedScores

__all__ = ["Frame", "VideoResult", "read_frames", "segment_file", "segment_video", "write_video"]

_MIN_GRID = 48
"""Places along the shorter side on which scores are carried; on a coarser patch grid motion would not be seen."""

_CUT = 0.35
"""Share of a frame that looks like nothing around it in the frame before: more means another shot. In synthetic films
it is below 0.19 even two frames apart, and above 0.85 at every cut (0.41 at a fifth of the light)."""


@dataclass(frozen=True, eq=False)
class _PendingFrame:
    """A frame that waits for the next key frame."""

    image: np.ndarray
    distances_Ohw: Tensor
    """To the frame before."""


def segment_video(
    segmenter: Segmenter, frames: Iterable[np.ndarray], *, key_every: int = 6, smoothing: float = 0.7
) -> Iterator[Segmentation]:
    """Segment a film: one result a frame, in order, as soon as the next key frame has been seen.

    At most ``key_every`` frames are held at once, however long the film is. Results have no ``clusters``.

    Args:
        segmenter: of single pictures.
        frames: (H, W, 3) uint8 RGB each; where the size changes a new shot begins.
        key_every: distance of the key frames; more is cheaper and steadier, and follows quick motion less well.
        smoothing: weight, in 0..1 (1 excluded), that what was carried to a key frame has against the frame's own scores
            where it matched perfectly.

    Raises:
        ConfigError: ``key_every`` or ``smoothing`` is out of range.
        DataError: a frame is not such an array.
    """
    if key_every < 1:
        raise ConfigError(f"key_every is {key_every}; give the distance of key frames, 1 or more")
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing is {smoothing}; give a weight of at least 0 and below 1")
    return _segment(segmenter, frames, key_every, smoothing)


def _segment(
    segmenter: Segmenter, frames: Iterable[np.ndarray], key_every: int, smoothing: float
) -> Iterator[Segmentation]:
    shot: _Shot | None = None
    for frame in frames:
        image = to_array(frame)
        if shot is None or not shot.add(image):
            if shot is not None:
                yield from shot.finish()
            shot = _Shot(segmenter, image)
            yield segmenter.label_pixels(image, shot.keyframe_Chw)
        elif len(shot.waiting) == key_every:
            yield from shot.finish_keyframe(smoothing)
    if shot is not None:
        yield from shot.finish()


class _Shot:
    """Frames between two cuts: the scores of the last key frame, and the frames seen since."""

    def __init__(self, segmenter: Segmenter, image: np.ndarray) -> None:
        self.waiting: list[_PendingFrame] = []
        self.keyframe_Chw = _keyframe_scores(segmenter, image)
        self._segmenter = segmenter
        self._image = image
        self._small_3hw = _downsample(image, self.keyframe_Chw)

    @torch.inference_mode()
    def add(self, image: np.ndarray) -> bool:
        """Take in the next frame; False if it is not of this shot."""
        if image.shape != self._image.shape:
            return False
        small_3hw = _downsample(image, self.keyframe_Chw)
        distances_Ohw = video_propagation.patch_distances(small_3hw, self._small_3hw)
        if video_propagation.unmatched_fraction(distances_Ohw, small_3hw) > _CUT:
            return False
        self.waiting.append(_PendingFrame(image, distances_Ohw))
        self._image, self._small_3hw = image, small_3hw
        return True

    def finish_keyframe(self, smoothing: float) -> Iterator[Segmentation]:
        """Make the last frame that waits a key frame; all that wait have their labels then."""
        own_Chw = _keyframe_scores(self._segmenter, self.waiting[-1].image)
        classes_W = torch.cat([best_classes(self.keyframe_Chw), best_classes(own_Chw)]).unique()
        ahead = self._propagate_forward(classes_W)
        keyframe_Chw = own_Chw.clone()
        keyframe_Chw[classes_W] = torch.lerp(
            own_Chw[classes_W], ahead[-1].scores_Whw, smoothing * ahead[-1].confidence_1hw
        )
        back = _propagate_backward(video_propagation.initial_scores(keyframe_Chw[classes_W]), self.waiting)
        for number, step in enumerate(self.waiting[:-1], start=1):
            position = number / len(self.waiting)
            scores_Whw = video_propagation.interpolate(ahead[number - 1], back[number - 1], position)
            others_Chw = torch.lerp(self.keyframe_Chw, keyframe_Chw, position)
            yield self._segmenter.label_pixels(step.image, _fill_other_classes(scores_Whw, classes_W, others_Chw))
        yield self._segmenter.label_pixels(self.waiting[-1].image, keyframe_Chw)
        self.keyframe_Chw, self.waiting = keyframe_Chw, []

    def finish(self) -> Iterator[Segmentation]:
        """Labels of the frames that wait, when no key frame follows any more."""
        classes_W = best_classes(self.keyframe_Chw)
        for step, carried in zip(self.waiting, self._propagate_forward(classes_W), strict=True):
            yield self._segmenter.label_pixels(
                step.image, _fill_other_classes(carried.scores_Whw, classes_W, self.keyframe_Chw)
            )

    @torch.inference_mode()
    def _propagate_forward(self, classes_W: Tensor) -> list[PropagatedScores]:
        """The key frame's scores at every frame that waits."""
        carried, ahead = video_propagation.initial_scores(self.keyframe_Chw[classes_W]), []
        for step in self.waiting:
            carried = video_propagation.propagate(carried, step.distances_Ohw)
            ahead.append(carried)
        return ahead


@torch.inference_mode()
def _propagate_backward(carried: PropagatedScores, steps: list[_PendingFrame]) -> list[PropagatedScores]:
    """The scores of the last of these frames at all of them."""
    back = [carried]
    for step in reversed(steps[1:]):
        carried = video_propagation.propagate(carried, video_propagation.reverse_distances(step.distances_Ohw))
        back.append(carried)
    return back[::-1]


@torch.inference_mode()
def _fill_other_classes(scores_Whw: Tensor, classes_W: Tensor, others_Chw: Tensor) -> Tensor:
    """Scores of all classes: those carried, and others that are not best anywhere and are not to become it."""
    return torch.minimum(others_Chw, scores_Whw.amax(0)).index_copy_(0, classes_W, scores_Whw)


@torch.inference_mode()
def _keyframe_scores(segmenter: Segmenter, image: np.ndarray) -> Tensor:
    """Class scores of a key frame on the grid on which they are carried. Shape: (C, h, w)."""
    scores_Chw = segmenter.class_scores(image)
    patches = scores_Chw.shape[1:]
    factor = -(-_MIN_GRID // min(patches))
    size = [max(side, min(factor * side, pixels)) for side, pixels in zip(patches, image.shape[:2], strict=True)]
    return F.interpolate(scores_Chw.unsqueeze(0), size=size, mode="bilinear")[0] if factor > 1 else scores_Chw


def _downsample(image: np.ndarray, scores_Chw: Tensor) -> Tensor:
    """A frame on the grid of scores, (3, h, w) float32 grey levels."""
    height, width = scores_Chw.shape[1:]
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(scores_Chw.device).float()


@dataclass(frozen=True, kw_only=True)
class VideoResult:
    """What was found in a film, over all its frames."""

    frames: int
    width: int
    height: int
    """Pixels of the upright frames."""
    seconds: float
    """From the first frame to the end of the last, which is taken to last as long as the one before it."""
    classes: tuple[str, ...]
    """Names of the classes present in any frame."""
    areas: tuple[int, ...]
    """Pixels of each of them, summed over the frames."""
    scores: tuple[float, ...]
    """Mean score of these pixels, in 0..1."""


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
    """Segment a video file and write what was found.

    Args:
        segmenter: of single pictures.
        source_uri: a video of any format that FFmpeg reads.
        masks_uri: folder for ``000000.png`` and so on, an indexed PNG for each frame, and at last ``frames.csv`` with
            the ``index`` and ``seconds`` of every frame; a folder without it is not complete.
        overlay_uri: an MP4 file of the film with the classes laid over it, at the same times; it appears only whole.
        key_every: see `segment_video`.
        smoothing: see `segment_video`.
        max_pixels: largest width x height of the frames; 100 million where None.
        progress: told how many frames were read and at which second the last of them is shown; what it raises ends the work.

    Raises:
        TooLargeError: the frames have more pixels.
        DataError: not a video, or a damaged one; the masks of the frames before the damage are kept.
        StorageError: the source cannot be read, the results cannot be written, or ``masks_uri`` holds files already.
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
    """What is known of a film so far."""

    def __init__(self, classes: int) -> None:
        self.seconds: list[float] = []
        self.size = (0, 0)
        self.damage: DataError | None = None
        self._areas = np.zeros(classes, np.int64)
        self._score_sums = np.zeros(classes)

    def add(self, result: Segmentation) -> None:
        """Count the pixels of one frame."""
        areas, score_sums = result.areas_and_score_sums()
        self._areas += areas
        self._score_sums += score_sums
        self.size = result.labels.shape

    def result(self, classes: tuple[str, ...]) -> VideoResult:
        """The figures of the whole film."""
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
    """The frames' images; damage after the first of them ends the film rather than losing those that wait for a key."""
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
