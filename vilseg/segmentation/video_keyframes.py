"""Segment a video so that labels are steady in time, at less cost than frame by frame.

Only keyframes go through the model: every ``key_every``-th frame, and the first one after a cut. The frames between two of
them take their class scores from both, propagated by `vilseg.segmentation.video_propagation` and weighted by nearness in time
and by how well the frames matched. A keyframe's own scores are mixed with those propagated to it from the keyframe before
(temporal smoothing), which averages out changes of the model's output from one moment to the next.
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
"""Positions along the shorter side of the grid that scores are propagated on; on a coarser one motion would not be seen."""

_CUT = 0.35
"""Fraction of a frame that matches nothing around it in the frame before: more means a cut. In synthetic videos it is below
0.19 even two frames apart, and above 0.85 at every cut (0.41 at a fifth of the light)."""


@dataclass(frozen=True, eq=False)
class _PendingFrame:
    """A frame that waits for the next keyframe."""

    image: np.ndarray
    """Shape: (H, W, 3), uint8 RGB."""
    distances_Ohw: Tensor
    """Patch distances to the frame before. Shape: (O, h, w)."""


def segment_video(
    segmenter: Segmenter, frames: Iterable[np.ndarray], *, key_every: int = 6, smoothing: float = 0.7
) -> Iterator[Segmentation]:
    """Segment a video: one result a frame, in order, as soon as the next keyframe has been read.

    At most ``key_every`` frames are held at once, however long the video is. Results have no ``clusters``.

    Args:
        segmenter: of single images.
        frames: (H, W, 3) uint8 RGB each; a change of size counts as a cut.
        key_every: distance of the keyframes; more is cheaper and steadier, and follows quick motion less well.
        smoothing: weight, in 0..1 (1 excluded), of the scores propagated to a keyframe against the frame's own scores, at a
            perfect match.

    Raises:
        ConfigError: ``key_every`` or ``smoothing`` is out of range.
        DataError: a frame is not such an array.

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
    """Frames between two cuts: the scores of the last keyframe, and the frames since."""

    def __init__(self, segmenter: Segmenter, image: np.ndarray) -> None:
        self.pending: list[_PendingFrame] = []
        self.keyframe_Chw = _keyframe_scores(segmenter, image)
        self._segmenter = segmenter
        self._image = image
        self._small_3hw = _downsample(image, self.keyframe_Chw)

    @torch.inference_mode()
    def add(self, image: np.ndarray) -> bool:
        """Add the next frame; False if there is a cut before it."""
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
        """Make the last pending frame a keyframe, and yield the results of all pending frames."""
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
        """Yield the results of the pending frames when no keyframe follows any more."""
        classes_A = best_classes(self.keyframe_Chw)
        for frame, propagated in zip(self.pending, self._propagate_forward(classes_A), strict=True):
            scores_Chw = _fill_other_classes(propagated.scores_Ahw, classes_A, self.keyframe_Chw)
            yield self._segmenter.label_pixels(frame.image, scores_Chw)

    @torch.inference_mode()
    def _propagate_forward(self, classes_A: Tensor) -> list[PropagatedScores]:
        """Propagate the keyframe's scores to every pending frame."""
        scores, forward = video_propagation.initial_scores(self.keyframe_Chw[classes_A]), []
        for frame in self.pending:
            scores = video_propagation.propagate(scores, frame.distances_Ohw)
            forward.append(scores)
        return forward


@torch.inference_mode()
def _propagate_backward(scores: PropagatedScores, frames: list[_PendingFrame]) -> list[PropagatedScores]:
    """Propagate the scores of the last of these frames to all of them."""
    backward = [scores]
    for frame in reversed(frames[1:]):
        scores = video_propagation.propagate(scores, video_propagation.reverse_distances(frame.distances_Ohw))
        backward.append(scores)
    return backward[::-1]


@torch.inference_mode()
def _fill_other_classes(scores_Ahw: Tensor, classes_A: Tensor, others_Chw: Tensor) -> Tensor:
    """Add the classes that were not propagated, as they are best nowhere, with scores that cannot win. Shape: -> (C, h, w)."""
    return torch.minimum(others_Chw, scores_Ahw.amax(0)).index_copy_(0, classes_A, scores_Ahw)


@torch.inference_mode()
def _keyframe_scores(segmenter: Segmenter, image: np.ndarray) -> Tensor:
    """Compute the class scores of a keyframe on the grid on which they are propagated. Shape: -> (C, h, w)."""
    scores_Chw = segmenter.class_scores(image)
    patches = scores_Chw.shape[1:]
    factor = -(-_MIN_GRID // min(patches))
    size = [max(side, min(factor * side, pixels)) for side, pixels in zip(patches, image.shape[:2], strict=True)]
    return F.interpolate(scores_Chw.unsqueeze(0), size=size, mode="bilinear")[0] if factor > 1 else scores_Chw


def _downsample(image: np.ndarray, scores_Chw: Tensor) -> Tensor:
    """Resize a frame to the grid of scores. Shape: (H, W, 3) -> (3, h, w), float32 grey levels."""
    height, width = scores_Chw.shape[1:]
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(scores_Chw.device).float()
