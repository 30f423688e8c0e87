"""Segmenter: computes a :class:`Segmentation` from an image and class names.

:meth:`Segmenter.batch` runs the steps in order: load and resize the images, encode them
(:mod:`vilseg.segmentation.dense_features`), score the classes at every patch (:mod:`vilseg.segmentation.class_scores`), refine
the scores along edges (:mod:`vilseg.segmentation.refinement`), upsample them and label every pixel
(:mod:`vilseg.segmentation.pixel_labeling`).
"""

from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vilseg import storage
from vilseg.data.image_decoding import decode_image, to_rgb
from vilseg.device import best_device
from vilseg.errors import DataError
from vilseg.model import ImageEmbeddings, ViLSeg
from vilseg.segmentation.class_embeddings import embed_classes
from vilseg.segmentation.class_scores import compute_class_scores, select_top_classes
from vilseg.segmentation.dense_features import DenseFeatures, encode_images, passes, patch_size
from vilseg.segmentation.pixel_labeling import ClassLogits, class_logits, label_pixels
from vilseg.segmentation.refinement import RefinedScores, best_classes, refine
from vilseg.segmentation.result import Segmentation
from vilseg.text.vocabulary import Vocabulary

ImageLike = Image.Image | np.ndarray | str | Path


class Segmenter:
    """Model and vocabulary that segment images into regions of named classes.

    Args:
        model: trained model; it is moved to ``device`` and set to evaluation mode.
        classes: class names in index order, or a :class:`Vocabulary`.
        device: device to compute on; None takes the GPU if there is one, otherwise the CPU.
        keep_clusters: also compute `Segmentation.clusters`, which takes about as long as the labels.
        max_pixels: maximum width x height, in pixels, of images that are loaded from a path or URI; None allows 100 million.

    Raises:
        ConfigError: the model's settings request an attention variant that its image encoder does not support.
        DataError: the class list is empty, repeats a name or is too long.

    Example:
        >>> import numpy as np
        >>> from vilseg import Segmenter, ViLSeg
        >>> from vilseg.config import ModelConfig
        >>> model = ViLSeg.from_config(ModelConfig(embedding_dim=8), ["a cat on a sofa"])  # untrained
        >>> segmenter = Segmenter(model, ["cat", "sofa"], device="cpu")
        >>> result = segmenter(np.zeros((48, 64, 3), np.uint8))
        >>> result.labels.shape, result.labels.dtype, result.classes
        ((48, 64), dtype('uint8'), ('cat', 'sofa'))
        >>> segmenter.with_classes(["dog", "grass", "sky"])(np.zeros((20, 30, 3), np.uint8)).labels.shape
        (20, 30)
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
        self._class_embeddings = embed_classes(model, self.vocabulary, self.config)

    def release_text_encoder(self) -> None:
        """Free the text encoder's memory; afterwards no other classes can be embedded, so `with_classes` must not be called."""
        self.model.text_encoder = None  # type: ignore[assignment]

    def to(self, device: str | torch.device) -> "Segmenter":
        """Move the model and the class embeddings to ``device``; return the segmenter itself."""
        self.device = torch.device(device)
        self.model.to(self.device)
        self._class_embeddings = self._class_embeddings.to(self.device)
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in index order."""
        return self.vocabulary.classes

    def with_classes(self, classes: Vocabulary | Iterable[str]) -> "Segmenter":
        """Return a segmenter with the same model and other classes; recently used vocabularies are not embedded again.

        Raises:
            DataError: the class list is empty, repeats a name or is too long.
        """
        other = copy(self)
        other.vocabulary = Vocabulary.of(classes)
        other._class_embeddings = embed_classes(self.model, other.vocabulary, self.config)
        return other

    def __call__(self, image: ImageLike) -> Segmentation:
        """Segment one image: a PIL image, an (H, W, 3) uint8 RGB array, a path or a URI.

        Raises:
            DataError: ``image`` is not an image, or an array of another shape or type.
            StorageError: the path or URI cannot be read.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[ImageLike]) -> list[Segmentation]:
        """Segment any number of images of any sizes; images whose resized sizes are equal are encoded together in batches.

        The size of these batches is limited, so memory use is bounded.

        Raises:
            DataError: an element of ``images`` is not an image, or is an array that is not (H, W, 3) uint8.
            StorageError: a path or URI cannot be read.
        """
        arrays = [to_array(image, self._max_pixels) for image in images]
        results: dict[int, Segmentation] = {}
        for indices in self._passes(arrays):
            features = self._encode_pass([arrays[index] for index in indices])
            results.update((i, self.classify(one, arrays[i])) for i, one in zip(indices, features, strict=True))
        return [results[index] for index in range(len(arrays))]

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> list[DenseFeatures]:
        """Compute the image features, which do not depend on the classes; images are batched as in `batch`.

        Args:
            images: RGB arrays of any sizes. Shape of each: (H, W, 3), uint8.
        """
        features: dict[int, DenseFeatures] = {}
        for indices in self._passes(images):
            features.update(zip(indices, self._encode_pass([images[index] for index in indices]), strict=True))
        return [features[index] for index in range(len(images))]

    @torch.inference_mode()
    def classify(
        self,
        features: DenseFeatures,
        image: np.ndarray,
        *,
        background_bias: float | None = None,
        keep_clusters: bool | None = None,
    ) -> Segmentation:
        """Segment an image whose features were computed by this segmenter, or by one with the same model and other classes.

        Args:
            features: features of the image, as returned by `encode`.
            image: the image. Shape: (H, W, 3), uint8 RGB.
            background_bias: replaces the value in the model's settings; None keeps it.
            keep_clusters: replaces the argument ``keep_clusters`` of the class; None keeps it.
        """
        features = features.to(self.device)
        scores_Rhw, rows_R = self._select_top_classes(self._class_scores(features, background_bias))
        logits = self._logits(scores_Rhw, rows_R, self._refine(scores_Rhw, features.pixels_3HW))
        keep = self._keep_clusters if keep_clusters is None else keep_clusters
        clusters_Khw = features.assignments_NK.T.unflatten(1, features.grid) if keep else None
        return label_pixels(image, logits, self.classes, self.config.threshold, clusters_Khw)

    @torch.inference_mode()
    def class_scores(self, image: ImageLike, *, use_objectness: bool = True) -> Float[Tensor, "R h w"]:
        """Compute the score of every class at every position of one image; `label_pixels` turns scores into a segmentation.

        If the model's settings have a refinement, the result is on the enlarged patch grid. Only candidate classes, which are
        best at some patch, are refined. Any other class has its upsampled score, limited to the score of the best candidate.

        Args:
            image: PIL image, (H, W, 3) uint8 RGB array, path or URI.
            use_objectness: False for a window of a larger image, because the border of a window does not tell objects from
                background.

        Returns:
            Scores before the gate. Shape: (C, h, w), float32, on the segmenter's device. If the vocabulary has negative words but
            no class ``background``, a last row with the score of "no class" is added: (C + 1, h, w).

        Raises:
            DataError: ``image`` is not an image, or an array of another shape or type.
            StorageError: the path or URI cannot be read.
        """
        array = to_array(image, self._max_pixels)
        [features] = self.encode([array])
        scores_Rhw = self._class_scores(features, use_objectness=use_objectness)
        if not self.config.refinement.iterations:
            return scores_Rhw
        classes_A, refined_AHW = refine(scores_Rhw, features.pixels_3HW.float(), self.config.refinement)
        upsampled = F.interpolate(scores_Rhw.unsqueeze(0), size=refined_AHW.shape[1:], mode="bilinear")[0]
        return torch.minimum(upsampled, refined_AHW.amax(0)).index_copy_(0, classes_A, refined_AHW)

    @torch.inference_mode()
    def label_pixels(self, image: np.ndarray, scores_Rhw: Float[Tensor, "R h w"]) -> Segmentation:
        """Upsample class scores to the original image size and label every pixel with the best class.

        Args:
            image: the image. Shape: (H, W, 3), uint8 RGB.
            scores_Rhw: scores as returned by `class_scores`, on a grid of any size. Shape: (C, h, w), or (C + 1, h, w).
        """
        scores_Rhw, rows_R = self._select_top_classes(scores_Rhw)
        candidates = self._all_candidates(scores_Rhw)
        if self.config.refinement.iterations:  # as in `classify`: only the classes that are best somewhere may win
            candidates_A = best_classes(scores_Rhw)
            candidates = RefinedScores(candidates_A, scores_Rhw[candidates_A])
        return label_pixels(image, self._logits(scores_Rhw, rows_R, candidates), self.classes, self.config.threshold)

    def _passes(self, images: Sequence[np.ndarray]) -> Iterable[list[int]]:
        return passes([self._input_size(image) for image in images])

    @torch.inference_mode()
    def _encode_pass(self, images: Sequence[np.ndarray]) -> list[DenseFeatures]:
        """Encode images whose sizes at the model's input are equal."""
        size = self._input_size(images[0])
        pixels_B3HW = torch.stack([_resize(image, size) for image in images]).to(self.device)
        return encode_images(self.model, pixels_B3HW, self.config)

    def _input_size(self, image: np.ndarray) -> tuple[int, int]:
        """Return (height, width) in pixels of an image at the model's input.

        The shorter side is about ``input_size``, the longer one at most about ``max_aspect`` times that; both are rounded to
        multiples of the patch size.
        """
        height, width = image.shape[:2]
        patch = patch_size(self.model)
        factor = self.config.input_size / min(height, width)
        longest = self.config.max_aspect * self.config.input_size
        rows, columns = (max(1, round(min(side * factor, longest) / patch)) * patch for side in (height, width))
        return rows, columns

    def _class_scores(
        self, features: DenseFeatures, background_bias: float | None = None, *, use_objectness: bool = True
    ) -> Tensor:
        """Compute the score of every class at every patch. Shape: -> (C, h, w), or (C + 1, h, w)."""
        config = self.config if use_objectness else self.config.replace(objectness=0.0)
        # `compute_class_scores` does not use the pooled embedding, so the mean of the patches is passed.
        patches_1ND = features.patches_ND.unsqueeze(0)
        embeddings = ImageEmbeddings(features.patches_ND.mean(0, keepdim=True), patches_1ND, features.grid)
        assignments_1NK = features.assignments_NK.unsqueeze(0)
        return compute_class_scores(embeddings, assignments_1NK, self._class_embeddings, config, background_bias)[0]

    def _select_top_classes(self, scores_Rhw: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the gate (see `select_top_classes`). Shape: -> kept scores (R', h, w), their rows in ``scores_Rhw`` (R',)."""
        rows_R = select_top_classes(scores_Rhw, self.config.gate, self.vocabulary.background, len(self.classes))
        return (scores_Rhw if len(rows_R) == len(scores_Rhw) else scores_Rhw[rows_R]), rows_R

    def _refine(self, scores_Rhw: Tensor, image_3HW: Tensor) -> RefinedScores:
        if not self.config.refinement.iterations:
            return self._all_candidates(scores_Rhw)
        return refine(scores_Rhw, image_3HW.float(), self.config.refinement)

    def _all_candidates(self, scores_Rhw: Tensor) -> RefinedScores:
        return RefinedScores(torch.arange(len(scores_Rhw), device=self.device), scores_Rhw)

    def _logits(self, scores_Rhw: Tensor, rows_R: Tensor, candidates: RefinedScores) -> ClassLogits:
        return class_logits(scores_Rhw, rows_R, candidates.classes_A, candidates.scores_AHW, self.config.temperature)


def _resize(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize an image to (rows, columns) pixels. Shape: (H, W, 3) -> (3, rows, columns), uint8."""
    if image.shape[:2] != size:
        image = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=2.0))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def to_array(image: ImageLike, max_pixels: int | None = None) -> np.ndarray:
    """Convert a PIL image or array, or load the image at a path or URI, to upright RGB. Shape: -> (H, W, 3), uint8.

    Args:
        image: PIL image, (H, W, 3) uint8 RGB array, path or URI.
        max_pixels: maximum width x height of an image that is loaded; None allows 100 million.

    Raises:
        DataError: ``image`` is not an image, or an array of another shape or type.
        StorageError: the path or URI cannot be read.
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
