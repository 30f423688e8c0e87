"""Image(s) and class names -> :class:`Segmentation`; the one way from a picture to masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vilseg import storage
from vilseg.data.image_decoding import decode_image, to_rgb
from vilseg.device import best_device
from vilseg.errors import DataError
from vilseg.model import ImageEmbeddings, ViLSeg
from vilseg.segmentation.class_embeddings import embed_classes
from vilseg.segmentation.class_scores import compute_class_scores, select_top_classes
from vilseg.segmentation.dense_features import DenseFeatures, encode_images, patch_size
from vilseg.segmentation.refinement import best_classes, refine
from vilseg.segmentation.result import Segmentation, label_dtype, to_labels
from vilseg.text.vocabulary import Vocabulary

_STRIP_VALUES = 1 << 22
"""Class scores held at full resolution at once; bounds the memory for large pictures and many classes (16 MB), and stays
in the cache, which makes it quicker than more would be."""

ImageLike = Image.Image | np.ndarray | str | Path


class _PixelLogits(NamedTuple):
    """What is compared at the pixels of one picture."""

    logits_Whw: Tensor
    classes_W: Tensor
    """Indices of the classes that can win; the one after the last class is that of no class."""
    others_1hw: Tensor | None
    """Logarithm of the summed exponentials of the other logits, on the patch grid; None where there are none."""
    others: int
    """How many others there are."""


class Segmenter:
    """Cuts pictures into regions named from a vocabulary.

    Args:
        model: a trained model; moved to ``device`` and put into evaluation mode.
        classes: names in index order, or a :class:`Vocabulary`.
        device: where to compute; a GPU where there is one.
        keep_clusters: fill `Segmentation.clusters`, which takes about as long as the labels.
        max_pixels: largest width x height that a path or URI may announce; 100 million where None.

    Raises:
        ConfigError: the model's settings want an attention that its image encoder cannot have.
        DataError: the class list is empty, repeats a name or is too long.
    """

    def __init__(
        self,
        model: ViLSeg,
        classes: Vocabulary | Iterable[str],
        *,
        device: str | torch.device | None = None,
        keep_clusters: bool = True,
        max_pixels: int | None = None,
    ) -> None:
        self._keep_clusters = keep_clusters
        self._max_pixels = max_pixels
        self.vocabulary = Vocabulary.of(classes)
        self.device = torch.device(device) if device else best_device()
        self.model = model.to(self.device).eval()
        model.check_attention()
        self.config = model.segmentation
        self._texts = embed_classes(model, self.vocabulary, self.config)

    def release_text_encoder(self) -> None:
        """Let go of the text encoder: the classes are embedded, and they cannot change any more."""
        self.model.text_encoder = None  # type: ignore[assignment]

    def to(self, device: str | torch.device) -> Segmenter:
        """Move everything to ``device``; returns itself."""
        self.device = torch.device(device)
        self.model.to(self.device)
        self._texts = self._texts.to(self.device)
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in index order."""
        return self.vocabulary.classes

    def with_classes(self, classes: Vocabulary | Iterable[str]) -> Segmenter:
        """A segmenter of the same model for other classes; costs nothing for those that the model was asked for lately.

        Raises:
            DataError: as of the class.
        """
        other = copy(self)
        other.vocabulary = Vocabulary.of(classes)
        other._texts = embed_classes(self.model, other.vocabulary, self.config)
        return other

    def __call__(self, image: ImageLike) -> Segmentation:
        """Segment one picture: a PIL image, an (H, W, 3) uint8 RGB array, a path or a URI.

        Raises:
            DataError: not a picture, or an array of another shape or type.
            StorageError: the URI cannot be read.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[ImageLike]) -> list[Segmentation]:
        """Segment pictures of any sizes together; those that come to one size share a pass through the model."""
        arrays = [to_array(image, self._max_pixels) for image in images]
        return [self.classify(look, array) for look, array in zip(self.encode(arrays), arrays, strict=True)]

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> list[DenseFeatures]:
        """The part of the work that does not depend on the classes: pictures of one model size share a pass.

        Args:
            images: (H, W, 3) uint8 RGB arrays of any sizes.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(self._model_size(image), []).append(index)
        looks: dict[int, DenseFeatures] = {}
        for size, members in groups.items():
            pixels_B3HW = torch.stack([_resize(images[index], size) for index in members]).to(self.device)
            looks.update(zip(members, encode_images(self.model, pixels_B3HW, self.config), strict=True))
        return [looks[index] for index in range(len(images))]

    @torch.inference_mode()
    def classify(
        self,
        look: DenseFeatures,
        image: np.ndarray,
        *,
        background_bias: float | None = None,
        keep_clusters: bool | None = None,
    ) -> Segmentation:
        """Name the pixels of a picture that was looked at, by this segmenter or one of the same model with other classes.

        Args:
            look: from `encode`.
            image: the picture. Shape: (H, W, 3), uint8 RGB.
            background_bias: takes the place of the one in the model's settings.
            keep_clusters: takes the place of what the segmenter was made with.
        """
        look = look._replace(
            pixels_3HW=look.pixels_3HW.to(self.device),
            patches_ND=look.patches_ND.to(self.device),
            assignments_NK=look.assignments_NK.to(self.device),
        )
        contenders = self._contenders(look.pixels_3HW, self._similarity(look, background_bias))
        keep = self._keep_clusters if keep_clusters is None else keep_clusters
        clusters_Khw = look.assignments_NK.T.unflatten(1, look.grid) if keep else None
        return self._label_pixels(image, contenders, clusters_Khw)

    @torch.inference_mode()
    def class_scores(self, image: ImageLike, *, whole: bool = True) -> Tensor:
        """Cosine of every class at every place of one picture, before the best one is taken; `label_pixels` does that.

        Args:
            image: as for `__call__`.
            whole: False for a part of a larger picture, whose border tells nothing of objects.

        Where the model's scores are refined, these are too, on the enlarged patch grid; there a class that was not
        refined, as it is best at no patch, has the score of its patch or that of the best class, whichever is lower.

        Returns:
            Shape: (C, h, w), float32, on the segmenter's device; (C + 1, h, w) where the vocabulary has negative words and no
            class ``background``: the last row is that of no class. No class is gated yet.

        Raises:
            DataError, StorageError: as `__call__`.
        """
        array = to_array(image, self._max_pixels)
        [look] = self.encode([array])
        similarity_Chw = self._similarity(look, whole=whole)
        if not self.config.refinement.iterations:
            return similarity_Chw
        classes_W, scores_Whw = refine(similarity_Chw, look.pixels_3HW.float(), self.config.refinement)
        enlarged = F.interpolate(similarity_Chw.unsqueeze(0), size=scores_Whw.shape[1:], mode="bilinear")[0]
        return torch.minimum(enlarged, scores_Whw.amax(0)).index_copy_(0, classes_W, scores_Whw)

    @torch.inference_mode()
    def label_pixels(self, image: np.ndarray, scores_Chw: Tensor) -> Segmentation:
        """Name every pixel of a picture after the class of the best score.

        Args:
            image: (H, W, 3) uint8 RGB.
            scores_Chw: as from `class_scores`, on a grid of any size. Shape: (C, h, w), or (C + 1, h, w).
        """
        scores_Rhw, rows_R = self._gated(scores_Chw)
        # As in `__call__`: where scores are refined, those count at full size that are best at some place of the grid.
        refined = bool(self.config.refinement.iterations)
        best_W = best_classes(scores_Rhw) if refined else torch.arange(len(rows_R), device=self.device)
        contenders = self._contest(scores_Rhw, rows_R, best_W, scores_Rhw[best_W] if refined else scores_Rhw)
        return self._label_pixels(image, contenders, None)

    def _similarity(self, look: DenseFeatures, background_bias: float | None = None, *, whole: bool = True) -> Tensor:
        """Shape: -> (C, h, w)."""
        config = self.config if whole else self.config.replace(objectness=0.0)
        # Of the image as a whole only the mean of its patches counts.
        embeddings = ImageEmbeddings(look.patches_ND.mean(0, keepdim=True), look.patches_ND.unsqueeze(0), look.grid)
        assignments_1NK = look.assignments_NK.unsqueeze(0)
        return compute_class_scores(embeddings, assignments_1NK, self._texts, config, background_bias)[0]

    def _model_size(self, image: np.ndarray) -> tuple[int, int]:
        """(H, W) that the model sees: shorter side ``input_size``, both multiples of the patch, the longer side bounded."""
        height, width = image.shape[:2]
        patch = patch_size(self.model)
        factor = self.config.input_size / min(height, width)
        longest = self.config.max_aspect * self.config.input_size
        rows, columns = (max(1, round(min(side * factor, longest) / patch)) * patch for side in (height, width))
        return rows, columns

    def _gated(self, scores_Chw: Tensor) -> tuple[Tensor, Tensor]:
        """What the gate leaves of the scores, and the indices of these rows. Shape: -> (R, h, w), (R,)."""
        rows_R = select_top_classes(scores_Chw, self.config.gate, self.vocabulary.background, len(self.classes))
        return (scores_Chw if len(rows_R) == len(scores_Chw) else scores_Chw[rows_R]), rows_R

    @torch.inference_mode()
    def _contenders(self, image_3HW: Tensor, similarity_Chw: Tensor) -> _PixelLogits:
        scores_Rhw, rows_R = self._gated(similarity_Chw)
        if not self.config.refinement.iterations:
            return self._contest(scores_Rhw, rows_R, torch.arange(len(rows_R), device=self.device), scores_Rhw)
        return self._contest(scores_Rhw, rows_R, *refine(scores_Rhw, image_3HW.float(), self.config.refinement))

    def _contest(self, scores_Rhw: Tensor, rows_R: Tensor, best_W: Tensor, scores_Whw: Tensor) -> _PixelLogits:
        """``best_W`` (places in ``rows_R``) may win by their scores on a grid of any size; the other rows only count."""
        others = torch.ones(len(rows_R), dtype=torch.bool, device=self.device)
        others[best_W] = False
        count, temperature = len(rows_R) - len(best_W), self.config.temperature
        rest_1hw = (scores_Rhw[others] / temperature).logsumexp(0, keepdim=True) if count else None
        return _PixelLogits(scores_Whw / temperature, rows_R[best_W], rest_1hw, count)

    @torch.inference_mode()
    def _label_pixels(self, image: np.ndarray, contenders: _PixelLogits, clusters_Khw: Tensor | None) -> Segmentation:
        """Bring class scores to the picture's own size, strip by strip, and let the best class win."""
        height, width = image.shape[:2]
        logits_Whw, classes_W, others_1hw, other_count = contenders
        labels = np.empty((height, width), label_dtype(len(self.classes)))
        scores = np.empty((height, width), np.float32)
        clusters = None if clusters_Khw is None else np.empty((height, width), label_dtype(len(clusters_Khw)))
        maps = max(len(classes_W), 0 if clusters_Khw is None else len(clusters_Khw))
        rows = max(1, _STRIP_VALUES // (width * maps))
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            logits = _resample(logits_Whw, (height, width), top, bottom)
            best, winner = logits.max(0)
            # The soft-max of the best class alone: all of them would be written and read once more for nothing.
            total = (logits - best).exp_().sum(0)
            if others_1hw is not None:
                others = _resample(others_1hw, (height, width), top, bottom)[0] - best
                # None of them is better than the best, though refinement may have lowered it.
                total += others.clamp(max=math.log(other_count)).exp()
            scores[top:bottom] = total.reciprocal().cpu().numpy()
            found = classes_W[winner].cpu().numpy()
            labels[top:bottom] = to_labels(found, scores[top:bottom], self.classes, self.config.threshold)
            if clusters is not None and clusters_Khw is not None:
                clusters[top:bottom] = (
                    _resample(clusters_Khw, (height, width), top, bottom).max(0).indices.cpu().numpy()
                )
        return Segmentation(labels=labels, classes=self.classes, scores=scores, clusters=clusters, image=image)


@torch.inference_mode()
def _resample(map_Chw: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows ``top`` to ``bottom`` of the bilinear enlargement of a map to ``size``. Shape: (C, h, w) -> (C, bottom - top, W)."""
    if map_Chw.shape[1:] == size:
        return map_Chw[:, top:bottom]
    height, width = size
    device = map_Chw.device
    y = (torch.arange(top, bottom, device=device) + 0.5) / height * 2 - 1
    x = (torch.arange(width, device=device) + 0.5) / width * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).unsqueeze(0)
    return F.grid_sample(map_Chw.unsqueeze(0), grid, padding_mode="border", align_corners=False)[0]


def _resize(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Shape: (H, W, 3) -> (3, rows, columns), uint8."""
    if image.shape[:2] != size:
        image = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=2.0))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def to_array(image: ImageLike, max_pixels: int | None = None) -> np.ndarray:
    """A picture in memory or elsewhere as upright RGB. Shape: -> (H, W, 3), uint8.

    Raises:
        DataError, StorageError: as `Segmenter.__call__`.
    """
    if isinstance(image, (str, Path)):
        return decode_image(storage.read_bytes(str(image)), max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image))
    right = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if not right or 0 in image.shape:
        shape = f"{getattr(image, 'shape', '')} {getattr(image, 'dtype', type(image).__name__)}".strip()
        raise DataError(f"an image must be a PIL image, an (H, W, 3) uint8 RGB array, a path or a URI, not {shape}")
    return image
