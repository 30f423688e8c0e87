"""Image(s) and class names -> :class:`Segmentation`; the one way from a picture to masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vilseg import storage
from vilseg.data.decode import decode_image, to_rgb
from vilseg.device import best_device, has_bfloat16_units
from vilseg.errors import DataError
from vilseg.model import ImageEmbeddings, ViLSeg
from vilseg.segmentation.refinement import refine, winners
from vilseg.segmentation.regions import ClassTexts, calibrate, class_similarities
from vilseg.segmentation.result import Segmentation, label_dtype
from vilseg.text.vocabulary import Vocabulary

_STRIP_VALUES = 1 << 24
"""Class scores held at full resolution at once; bounds the memory for large pictures and many classes (64 MB)."""

_COCO_MARKS = ("-merged", "-other", "-stuff")
"""What COCO's panoptic class names say of how the classes were made, not of what they show."""

ImageLike = Image.Image | np.ndarray | str | Path


class Look(NamedTuple):
    """What the encoder and the clustering head made of one picture: all that naming its pixels takes, whatever the classes."""

    pixels_3HW: Tensor
    """(3, H, W) uint8, the picture at the size that the model saw."""
    patches_ND: Tensor
    """(N, D) float32 unit length, row by row over the grid."""
    assignments_NK: Tensor
    """(N, K) float32, summing to 1 over K."""
    grid: tuple[int, int]


class _Contenders(NamedTuple):
    """What is compared at the pixels of one picture."""

    logits_Whw: Tensor
    classes_W: Tensor
    """Indices of the classes that can win."""
    others_1hw: Tensor | None
    """Logarithm of the summed exponentials of all other classes' logits, on the patch grid; None where there are none."""


class Segmenter:
    """Cuts pictures into regions named from a vocabulary.

    Args:
        model: a trained model; moved to ``device`` and put into evaluation mode.
        classes: names in index order, or a :class:`Vocabulary`.
        device: where to compute; a GPU where there is one.
        keep_clusters: fill `Segmentation.clusters`, which takes about as long as the labels.

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
    ) -> None:
        self._keep_clusters = keep_clusters
        self.vocabulary = Vocabulary.of(classes)
        self.device = torch.device(device) if device else best_device()
        self.model = model.to(self.device).eval()
        model.check_attention()
        self.config = model.segmentation
        self._texts = self._class_texts()

    def forget_texts(self) -> None:
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

    def __call__(self, image: ImageLike) -> Segmentation:
        """Segment one picture: a PIL image, an (H, W, 3) uint8 RGB array, a path or a URI.

        Raises:
            DataError: not a picture, or an array of another shape or type.
            StorageError: the URI cannot be read.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[ImageLike]) -> list[Segmentation]:
        """Segment pictures of any sizes together; those that come to one size share a pass through the model."""
        arrays = [_to_array(image) for image in images]
        return [self.name(look, array) for look, array in zip(self.look(arrays), arrays, strict=True)]

    @torch.inference_mode()
    def look(self, images: Sequence[np.ndarray]) -> list[Look]:
        """The part of the work that does not depend on the classes: pictures of one model size share a pass.

        Args:
            images: (H, W, 3) uint8 RGB arrays of any sizes.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(self._model_size(image), []).append(index)
        looks: dict[int, Look] = {}
        for size, members in groups.items():
            pixels_B3HW = torch.stack([_resize(images[index], size) for index in members]).to(self.device)
            found = self._encode(pixels_B3HW)
            looks.update(zip(members, found, strict=True))
        return [looks[index] for index in range(len(images))]

    @torch.inference_mode()
    def name(
        self,
        look: Look,
        image: np.ndarray,
        *,
        background_bias: float | None = None,
        keep_clusters: bool | None = None,
    ) -> Segmentation:
        """Name the pixels of a picture that was looked at, by this segmenter or one of the same model with other classes.

        Args:
            look: from `look`.
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
        return self._paint(image, contenders, clusters_Khw)

    @torch.inference_mode()
    def class_scores(self, image: ImageLike) -> Tensor:
        """Cosine of every class at every place of one picture, before the best one is taken; `paint` does that.

        Where the model's scores are refined, these are too, on the enlarged patch grid; there a class that was not
        refined, as it is best at no patch, has the score of its patch or that of the best class, whichever is lower.

        Returns:
            Shape: (C, h, w), float32, on the segmenter's device.

        Raises:
            DataError, StorageError: as `__call__`.
        """
        array = _to_array(image)
        [look] = self.look([array])
        similarity_Chw = self._similarity(look)
        if not self.config.refinement.iterations:
            return similarity_Chw
        classes_W, scores_Whw = refine(similarity_Chw, look.pixels_3HW.float(), self.config.refinement)
        enlarged = F.interpolate(similarity_Chw.unsqueeze(0), size=scores_Whw.shape[1:], mode="bilinear")[0]
        return torch.minimum(enlarged, scores_Whw.amax(0)).index_copy_(0, classes_W, scores_Whw)

    @torch.inference_mode()
    def paint(self, image: np.ndarray, scores_Chw: Tensor) -> Segmentation:
        """Name every pixel of a picture after the class of the best score.

        Args:
            image: (H, W, 3) uint8 RGB.
            scores_Chw: as from `class_scores`, on a grid of any size. Shape: (C, h, w).
        """
        logits_Chw = scores_Chw / self.config.temperature
        others = torch.ones(len(logits_Chw), dtype=torch.bool, device=self.device)
        # As in `__call__`: where scores are refined, those count at full size that are best at some place of the grid.
        others[winners(logits_Chw) if self.config.refinement.iterations else slice(None)] = False
        rest_1hw = logits_Chw[others].logsumexp(0, keepdim=True) if others.any() else None
        return self._paint(image, _Contenders(logits_Chw[~others], (~others).nonzero()[:, 0], rest_1hw), None)

    def _encode(self, pixels_B3HW: Tensor) -> list[Look]:
        images = pixels_B3HW.float().div_(255)
        # Matrix units of recent CPUs and GPUs are several times faster in bfloat16; the comparison itself is not.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bfloat16_units(self.device)):
            features, named_BNF = self.model.dense_features(images, self.config.attention)
        features = features._replace(patches=features.patches.float(), pooled=None)
        patches_BND = self.model.embed_patches(features._replace(patches=named_BNF.float()))
        assignments_BNK = self.model.cluster_logits(features).softmax(-1)
        parts = zip(pixels_B3HW, patches_BND, assignments_BNK, strict=True)
        return [Look(pixels, patches, assignments, features.grid) for pixels, patches, assignments in parts]

    def _similarity(self, look: Look, background_bias: float | None = None) -> Tensor:
        """Shape: -> (C, h, w)."""
        # Of the image as a whole only the mean of its patches counts.
        embeddings = ImageEmbeddings(look.patches_ND.mean(0, keepdim=True), look.patches_ND.unsqueeze(0), look.grid)
        assignments_1NK = look.assignments_NK.unsqueeze(0)
        return class_similarities(embeddings, assignments_1NK, self._texts, self.config, background_bias)[0]

    @torch.inference_mode()
    def _class_texts(self) -> ClassTexts:
        """Class names and background words as the model sees them; each the mean over the prompts."""
        vocabulary = self.vocabulary
        owners = range(len(self.classes))
        names = [spoken(name) for name in self.classes]
        synonyms = [(index, spoken(name)) for index in owners for name in vocabulary.names(index)[1:]]
        words: list[str] = []
        if vocabulary.background is not None:
            asked_for = {name.casefold() for name in [*names, *(name for _, name in synonyms)]}
            candidates = vocabulary.background_words or self.config.background_words
            words = [word for word in candidates if spoken(word).casefold() not in asked_for]
        spoken_names = [*names, *(name for _, name in synonyms), *words]
        texts = [prompt.format(name) for name in spoken_names for prompt in self.config.prompts]
        embedded = torch.cat([self.model.encode_text(texts[i : i + 256]) for i in range(0, len(texts), 256)])
        mean_TD = embedded.unflatten(0, (-1, len(self.config.prompts))).mean(1)
        if self.config.center_text:
            mean_TD = mean_TD - self.model.caption_mean
        return calibrate(
            F.normalize(mean_TD, dim=-1),
            self.model.patch_mean,
            self.model.patch_covariance,
            self.config.calibration,
            classes=len(names),
            synonym_of_S=torch.tensor([index for index, _ in synonyms], dtype=torch.long, device=self.device),
            background=vocabulary.background,
        )

    def _model_size(self, image: np.ndarray) -> tuple[int, int]:
        """(H, W) that the model sees: shorter side ``input_size``, both multiples of the patch, the longer side bounded."""
        height, width = image.shape[:2]
        patch = int(getattr(self.model.image_encoder, "patch_size", 32))
        factor = self.config.input_size / min(height, width)
        longest = self.config.max_aspect * self.config.input_size
        rows, columns = (max(1, round(min(side * factor, longest) / patch)) * patch for side in (height, width))
        return rows, columns

    @torch.inference_mode()
    def _contenders(self, image_3HW: Tensor, similarity_Chw: Tensor) -> _Contenders:
        temperature, config = self.config.temperature, self.config.refinement
        count = len(similarity_Chw)
        if not config.iterations:
            return _Contenders(similarity_Chw / temperature, torch.arange(count, device=self.device), None)
        classes_W, scores_Whw = refine(similarity_Chw, image_3HW.float(), config)
        others = torch.ones(count, dtype=torch.bool, device=self.device)
        others[classes_W] = False
        rest_1hw = (similarity_Chw[others] / temperature).logsumexp(0, keepdim=True) if others.any() else None
        return _Contenders(scores_Whw / temperature, classes_W, rest_1hw)

    @torch.inference_mode()
    def _paint(self, image: np.ndarray, contenders: _Contenders, clusters_Khw: Tensor | None) -> Segmentation:
        """Bring class scores to the picture's own size, strip by strip, and let the best class win."""
        height, width = image.shape[:2]
        count = len(self.classes)
        logits_Whw, classes_W, others_1hw = contenders
        labels = np.empty((height, width), label_dtype(count))
        scores = np.empty((height, width), np.float32)
        clusters = None if clusters_Khw is None else np.empty((height, width), np.int16)
        maps = max(len(classes_W), 0 if clusters_Khw is None else len(clusters_Khw))
        rows = max(1, _STRIP_VALUES // (width * maps))
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            logits = _resample(logits_Whw, (height, width), top, bottom)
            best, winner = logits.max(0)
            labels[top:bottom] = classes_W[winner].cpu().numpy()
            # The soft-max of the best class alone: all of them would be written and read once more for nothing.
            total = (logits - best).exp_().sum(0)
            if others_1hw is not None:
                others = _resample(others_1hw, (height, width), top, bottom)[0] - best
                # None of them is better than the best, though refinement may have lowered it.
                total += others.clamp(max=math.log(count - len(classes_W))).exp()
            scores[top:bottom] = total.reciprocal().cpu().numpy()
            if clusters is not None and clusters_Khw is not None:
                clusters[top:bottom] = (
                    _resample(clusters_Khw, (height, width), top, bottom).max(0).indices.cpu().numpy()
                )
        return Segmentation(labels=labels, classes=self.classes, scores=scores, clusters=clusters, image=image)


def spoken(name: str) -> str:
    """A class name as a caption would have it: ``wall-other-merged`` (COCO) is wall, ``tv_monitor`` tv monitor."""
    for mark in _COCO_MARKS:
        name = name.replace(mark, "")
    return name.replace("-", " ").replace("_", " ").strip() or name


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


def _to_array(image: ImageLike) -> np.ndarray:
    if isinstance(image, (str, Path)):
        return decode_image(storage.read_bytes(str(image)))
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image))
    right = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if not right or 0 in image.shape:
        shape = f"{getattr(image, 'shape', '')} {getattr(image, 'dtype', type(image).__name__)}".strip()
        raise DataError(f"an image must be a PIL image, an (H, W, 3) uint8 RGB array, a path or a URI, not {shape}")
    return image
