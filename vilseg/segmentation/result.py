"""Result of segmenting an image: labels, scores and regions, with methods to render and save them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from vilseg import storage
from vilseg.segmentation import visualization

_BLOCK_PIXELS = (
    1 << 20
)  # pixels per bincount, which converts labels to 8 bytes; a whole aerial image would not fit into memory


def label_dtype(class_count: int) -> np.dtype[Any]:
    """Return the dtype of a label map: uint8 for up to 254 classes, otherwise uint16; its largest value means "no class".

    Example:
        >>> label_dtype(254), no_class(label_dtype(255))
        (dtype('uint8'), 65535)
    """
    return np.dtype(np.uint8 if class_count <= 254 else np.uint16)


def no_class(dtype: np.dtype[Any] | type[np.generic]) -> int:
    """Return the label that means "no class" in a label map of this dtype: 255 (uint8) or 65535 (uint16)."""
    return int(np.iinfo(dtype).max)


def to_labels(
    best_classes: np.ndarray, scores: np.ndarray, classes: Sequence[str], threshold: float = 0.0
) -> np.ndarray:
    """Turn the best class of each pixel into its label.

    Args:
        best_classes: index of the best class of each pixel; any index above the last class means "no class". Any shape.
        scores: probability of each best class, in 0..1. Same shape as ``best_classes``.
        classes: class names, in index order.
        threshold: minimum probability. Pixels below it are labelled ``background``, or "no class" if there is no such class.
    """
    dtype = label_dtype(len(classes))
    nothing = no_class(dtype)
    labels = np.where(best_classes < len(classes), best_classes, nothing).astype(dtype, copy=False)
    if threshold > 0:
        rest = classes.index(visualization.BACKGROUND) if visualization.BACKGROUND in classes else nothing
        labels[scores < threshold] = rest
    return labels


@dataclass(frozen=True, kw_only=True)
class Region:
    """All pixels of one class in one image; they need not be connected.

    Example:
        >>> from pycocotools import mask
        >>> labels = np.array([[0, 1, 1], [0, 1, 1]], np.uint8)
        >>> segmentation = Segmentation(labels=labels, classes=("cat", "sofa"), scores=np.full((2, 3), 0.5, np.float32))
        >>> sofa = segmentation.regions[1]
        >>> sofa.class_name, sofa.score, sofa.area, sofa.bbox_xywh
        ('sofa', 0.5, 4, (1, 0, 2, 2))
        >>> mask.decode(sofa.rle).tolist()
        [[0, 1, 1], [0, 1, 1]]
    """

    class_name: str
    """Name as in the vocabulary."""
    score: float
    """Mean score of the region's pixels, in 0..1."""
    area: int
    """Number of pixels."""
    bbox_xywh: tuple[int, int, int, int]
    """Left, top, width, height of the bounding box, in pixels."""
    rle: Mapping[str, Any]
    """COCO's compressed run-length code, `{"size": [H, W], "counts": str}`, as pycocotools reads it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation:
    """Labels and scores of one image, at the original image size of H x W pixels.

    Example:
        >>> labels = np.array([[0, 1, 1], [0, 1, 255]], np.uint8)  # 255 is no class
        >>> segmentation = Segmentation(labels=labels, classes=("cat", "sofa"), scores=np.full((2, 3), 0.5, np.float32))
        >>> [(region.class_name, region.area) for region in segmentation.regions]
        [('cat', 2), ('sofa', 3)]
        >>> segmentation.overlay(legend=False).size
        (3, 2)
        >>> segmentation.to_coco()["annotations"][0]["bbox"]
        [0, 0, 1, 2]
        >>> segmentation.above(0.9).labels.tolist()
        [[255, 255, 255], [255, 255, 255]]

    Raises:
        ValueError: the dtype of `labels` does not match the number of classes, or another array differs from `labels` in height
            or width.
    """

    labels: np.ndarray
    """(H, W) uint8, or uint16 for more than 254 classes: index into `classes`; 255 (uint16: 65535) = no class."""
    classes: tuple[str, ...]
    """Class names, in index order."""
    scores: np.ndarray
    """(H, W) float32 in 0..1: probability of each pixel's label, the soft-max over the classes."""
    clusters: np.ndarray | None = None
    """(H, W) integers: cluster of each pixel, by the clustering head; None if not computed."""
    image: np.ndarray | None = None
    """(H, W, 3) uint8 RGB: the image that was segmented, used by `overlay`; None if not kept."""

    def __post_init__(self) -> None:
        expected = label_dtype(len(self.classes))
        if self.labels.dtype != expected or self.labels.ndim != 2:
            raise ValueError(
                f"labels of {len(self.classes)} classes must be (H, W) {expected}, "
                f"not {self.labels.shape} {self.labels.dtype}"
            )
        for name, array in (("scores", self.scores), ("clusters", self.clusters), ("image", self.image)):
            if array is not None and array.shape != self.labels.shape + (3,) * (name == "image"):
                raise ValueError(f"{name} of shape {array.shape} do not fit labels of shape {self.labels.shape}")

    @cached_property
    def regions(self) -> list[Region]:
        """Regions of the image: one for each class that has pixels, in the order of `classes`."""
        areas, score_sums = self.areas_and_score_sums()
        regions = []
        for index in np.flatnonzero(areas):
            rle = coco_mask.encode(np.asfortranarray(self.labels == index))
            left, top, width, height = (int(side) for side in coco_mask.toBbox(rle))
            regions.append(
                Region(
                    class_name=self.classes[index],
                    score=float(score_sums[index] / areas[index]),
                    area=int(areas[index]),
                    bbox_xywh=(left, top, width, height),
                    rle={"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")},
                )
            )
        return regions

    def above(self, threshold: float) -> Segmentation:
        """Return a copy in which pixels with scores below ``threshold`` are labelled ``background`` (or "no class").

        "No class" is used if `classes` has no class ``background``.

        Args:
            threshold: minimum score, from 0 (changes nothing) to 1.
        """
        if threshold <= 0:
            return self
        return replace(self, labels=to_labels(self.labels, self.scores, self.classes, threshold))

    def areas_and_score_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute the number of pixels and the sum of scores of every class. Shape: (C,) int64, (C,) float64."""
        count = len(self.classes)
        areas, score_sums = np.zeros(count, dtype=np.int64), np.zeros(count)
        rows = max(1, _BLOCK_PIXELS // self.labels.shape[1])
        for top in range(0, self.labels.shape[0], rows):
            # "No class" is counted in one more bin after the last class; that bin is dropped.
            labels = np.minimum(self.labels[top : top + rows].ravel(), count)
            scores = self.scores[top : top + rows].ravel()
            areas += np.bincount(labels, minlength=count + 1)[:count]
            score_sums += np.bincount(labels, weights=scores, minlength=count + 1)[:count]
        return areas, score_sums

    def overlay(self, opacity: float = 0.55, legend: bool = True) -> Image.Image:
        """Render the image tinted with class colours and, below it, a legend of class names and area fractions.

        Without a legend the result has the size of the image. With a legend, an image whose shorter side is below 256 px is
        first enlarged by an integer factor, so that the legend is readable. If `image` is None, only the class colours are
        rendered.

        Args:
            opacity: opacity of the tint, from 0 (the image in grey) to 1 (class colours only).
            legend: add the legend.
        """
        factor = visualization.upscale_factor(*self.labels.shape) if legend else 1
        image = visualization.draw_overlay(self.image, self.labels, self.classes, opacity=opacity, factor=factor)
        return (
            visualization.add_legend(image, visualization.legend_entries(self.labels, self.classes))
            if legend
            else image
        )

    def to_png_bytes(self) -> bytes:
        """Encode the label map as PNG; the value of a pixel is its label.

        The PNG has 8 bits and the class colours as palette for up to 254 classes, otherwise 16-bit grey.
        """
        image = Image.fromarray(self.labels)
        if self.labels.dtype == np.uint8:
            colours = np.zeros((256, 3), dtype=np.uint8)
            colours[: len(self.classes)] = visualization.class_colours(self.classes)
            image = Image.frombytes("P", image.size, image.tobytes())
            image.putpalette(colours.tobytes())
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()

    def to_png(self, path_or_uri: str) -> None:
        """Write the PNG of `to_png_bytes` to a path or URI.

        Raises:
            StorageError: the file cannot be written.
        """
        storage.write_bytes(str(path_or_uri), self.to_png_bytes())

    def to_coco(self, image_id: int = 1) -> dict[str, Any]:
        """Convert to COCO's instance format: a dictionary for JSON with one annotation for each class that has pixels.

        `category_id` is the index of the class plus 1, because COCO reserves 0 for "no category". Annotations have a `score`, as
        in COCO's result files. All `classes` are listed as categories, even those without pixels.
        """
        height, width = self.labels.shape
        category = {name: index + 1 for index, name in enumerate(self.classes)}
        annotations = [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category[region.class_name],
                "segmentation": dict(region.rle),
                "area": region.area,
                "bbox": list(region.bbox_xywh),
                "iscrowd": 0,
                "score": region.score,
            }
            for number, region in enumerate(self.regions, start=1)
        ]
        return {
            "images": [{"id": image_id, "width": width, "height": height}],
            "annotations": annotations,
            "categories": [{"id": index, "name": name} for name, index in category.items()],
        }
