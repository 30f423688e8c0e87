"""Segment a video with labels that are stable over time, at a lower cost than segmenting every frame.

Only keyframes are encoded by the model: every ``key_every``-th frame, and the first frame after a cut. The frames between two
keyframes get the class scores of both, propagated by `vilseg.segmentation.video_propagation` and weighted by nearness in time and
by the quality of the matches. The scores of a keyframe are mixed with those propagated to it from the previous keyframe (temporal
smoothing), which reduces flicker of the model's output.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vilseg.errors import ConfigError
from vilseg.segmentation import video_propagation
from vilseg.segmentation.refinement import best_classes
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.segmenter import Segmenter, to_array
from vilseg.segmentation.video_propagation import PropagatedScores

_MIN_GRID = 48
"""Minimum number of positions along the shorter side of the grid on which scores are propagated; a coarser one misses motion."""

_CUT = 0.35
"""Fraction of positions without a match in the previous frame, above which a frame is the first after a cut. In synthetic videos
it is below 0.19 even for frames two apart, and above 0.85 at every cut (above 0.41 at a fifth of the brightness)."""


@dataclass(frozen=True, eq=False)
class _PendingFrame:
    """Frame after the most recent keyframe of a shot; it is segmented when the next keyframe is known or the shot ends."""

    image: np.ndarray
    """Shape: (H, W, 3), uint8 RGB."""
    distances_Ohw: Tensor
    """Patch distances to the previous frame; see `video_propagation.patch_distances`. Shape: (O, h, w)."""


def segment_video(
    segmenter: Segmenter, frames: Iterable[np.ndarray], *, key_every: int = 6, smoothing: float = 0.7
) -> Iterator[Segmentation]:
    """Yield the segmentation of every frame of a video, in order, as soon as the next keyframe has been read.

    At most ``key_every`` frames are in memory at once. The results have no ``clusters``.

    Args:
        segmenter: model and classes.
        frames: RGB images in display order; a change of size counts as a cut. Shape of each: (H, W, 3), uint8.
        key_every: distance between keyframes, in frames. Larger values are cheaper and give more stable labels, but follow fast
            motion less well.
        smoothing: weight, from 0 to below 1, of the scores propagated to a keyframe from the previous one, at positions with a
            perfect match; the keyframe's own scores have the remaining weight.

    Raises:
        ConfigError: ``key_every`` or ``smoothing`` is out of range.
        DataError: a frame is not an (H, W, 3) uint8 array.

    Example:
        >>> import numpy as np
        >>> from vilseg import Segmenter, ViLSeg
        >>> from vilseg.config import ModelConfig
        >>> segmenter = Segmenter(ViLSeg.from_config(ModelConfig(embedding_dim=8), ["a cat"]), ["cat", "sofa"], device="cpu")
        >>> [result.labels.shape for result in segment_video(segmenter, [np.zeros((48, 64, 3), np.uint8)] * 3)]
        [(48, 64), (48, 64), (48, 64)]
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
        elif len(shot.pending) == key_every:
            yield from shot.finish_keyframe(smoothing)
    if shot is not None:
        yield from shot.finish()


class _Shot:
    """Shot of a video, from one cut to the next, read frame by frame.

    Holds the class scores of the most recent keyframe, and the pending frames: those read since then and not yet segmented.
    """

    def __init__(self, segmenter: Segmenter, image: np.ndarray) -> None:
        self.pending: list[_PendingFrame] = []
        self.keyframe_Chw = _keyframe_scores(segmenter, image)
        self._segmenter = segmenter
        self._image = image
        self._small_3hw = _downsample(image, self.keyframe_Chw)

    @torch.inference_mode()
    def add(self, image: np.ndarray) -> bool:
        """Add the next frame to the shot; return False, without adding it, if there is a cut before it."""
        if image.shape != self._image.shape:
            return False
        small_3hw = _downsample(image, self.keyframe_Chw)
        distances_Ohw = video_propagation.patch_distances(small_3hw, self._small_3hw)
        if video_propagation.unmatched_fraction(distances_Ohw, small_3hw) > _CUT:
            return False
        self.pending.append(_PendingFrame(image, distances_Ohw))
        self._image, self._small_3hw = image, small_3hw
        return True

    def finish_keyframe(self, smoothing: float) -> Iterator[Segmentation]:
        """Make the last pending frame a keyframe, and yield the segmentations of all pending frames."""
        own_Chw = _keyframe_scores(self._segmenter, self.pending[-1].image)
        classes_A = torch.cat([best_classes(self.keyframe_Chw), best_classes(own_Chw)]).unique()
        forward = self._propagate_forward(classes_A)
        keyframe_Chw = own_Chw.clone()
        keyframe_Chw[classes_A] = torch.lerp(
            own_Chw[classes_A], forward[-1].scores_Ahw, smoothing * forward[-1].confidence_1hw
        )
        backward = _propagate_backward(video_propagation.initial_scores(keyframe_Chw[classes_A]), self.pending)
        for number, frame in enumerate(self.pending[:-1], start=1):
            position = number / len(self.pending)
            scores_Ahw = video_propagation.interpolate(forward[number - 1], backward[number - 1], position)
            others_Chw = torch.lerp(self.keyframe_Chw, keyframe_Chw, position)
            yield self._segmenter.label_pixels(frame.image, _fill_other_classes(scores_Ahw, classes_A, others_Chw))
        yield self._segmenter.label_pixels(self.pending[-1].image, keyframe_Chw)
        self.keyframe_Chw, self.pending = keyframe_Chw, []

    def finish(self) -> Iterator[Segmentation]:
        """Yield the segmentations of the frames that are pending when the shot ends, propagated from the last keyframe alone."""
        classes_A = best_classes(self.keyframe_Chw)
        for frame, propagated in zip(self.pending, self._propagate_forward(classes_A), strict=True):
            scores_Chw = _fill_other_classes(propagated.scores_Ahw, classes_A, self.keyframe_Chw)
            yield self._segmenter.label_pixels(frame.image, scores_Chw)

    @torch.inference_mode()
    def _propagate_forward(self, classes_A: Tensor) -> list[PropagatedScores]:
        """Return the scores of the keyframe ``self.keyframe_Chw`` propagated to every pending frame."""
        scores, forward = video_propagation.initial_scores(self.keyframe_Chw[classes_A]), []
        for frame in self.pending:
            scores = video_propagation.propagate(scores, frame.distances_Ohw)
            forward.append(scores)
        return forward


@torch.inference_mode()
def _propagate_backward(scores: PropagatedScores, frames: list[_PendingFrame]) -> list[PropagatedScores]:
    """Propagate ``scores``, those of the last frame, back to all ``frames``; return one result per frame, in order."""
    backward = [scores]
    for frame in reversed(frames[1:]):
        scores = video_propagation.propagate(scores, video_propagation.reverse_distances(frame.distances_Ohw))
        backward.append(scores)
    return backward[::-1]


@torch.inference_mode()
def _fill_other_classes(scores_Ahw: Tensor, classes_A: Tensor, others_Chw: Tensor) -> Tensor:
    """Insert the propagated scores of ``classes_A`` into ``others_Chw``; other classes are limited so that they cannot win.

    Shape: -> (C, h, w).
    """
    return torch.minimum(others_Chw, scores_Ahw.amax(0)).index_copy_(0, classes_A, scores_Ahw)


@torch.inference_mode()
def _keyframe_scores(segmenter: Segmenter, image: np.ndarray) -> Tensor:
    """Compute the class scores of a keyframe on a grid fine enough for propagation (`_MIN_GRID`). Shape: -> (C, h, w)."""
    scores_Chw = segmenter.class_scores(image)
    patches = scores_Chw.shape[1:]
    factor = -(-_MIN_GRID // min(patches))
    size = [max(side, min(factor * side, pixels)) for side, pixels in zip(patches, image.shape[:2], strict=True)]
    return F.interpolate(scores_Chw.unsqueeze(0), size=size, mode="bilinear")[0] if factor > 1 else scores_Chw


def _downsample(image: np.ndarray, scores_Chw: Tensor) -> Tensor:
    """Resize a frame to the grid of ``scores_Chw``. Shape: (H, W, 3) -> (3, h, w), float32 in 0..255."""
    height, width = scores_Chw.shape[1:]
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(scores_Chw.device).float()
