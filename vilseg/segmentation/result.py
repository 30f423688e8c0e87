"""What segmenting an image gives: labels, scores, regions, and the forms they are drawn and stored in."""

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

_BLOCK_PIXELS = 1 << 20  # pixels counted at once: bincount widens labels to 8 bytes, a whole aerial image would not fit


def label_dtype(class_count: int) -> np.dtype[Any]:
    """The type of a label map: uint8 for up to 254 classes, else uint16. Its largest value means "no class"."""
    return np.dtype(np.uint8 if class_count <= 254 else np.uint16)


def no_class(dtype: np.dtype[Any] | type[np.generic]) -> int:
    """The label that means "no class" in a label map of this type: 255 (uint8) or 65535 (uint16)."""
    return int(np.iinfo(dtype).max)


def to_labels(winners: np.ndarray, scores: np.ndarray, classes: Sequence[str], threshold: float = 0.0) -> np.ndarray:
    """The labels of pixels from what is best there.

    Args:
        winners: indices into ``classes``; whatever comes after the last one is no class. Any shape.
        scores: how sure each of them is, in 0..1. The same shape.
        classes: names, in index order.
        threshold: pixels of lower scores are given to the class ``background``, or to none where there is no such class.
    """
    dtype = label_dtype(len(classes))
    nothing = no_class(dtype)
    labels = np.where(winners < len(classes), winners, nothing).astype(dtype, copy=False)
    if threshold > 0:
        rest = classes.index(visualization.BACKGROUND) if visualization.BACKGROUND in classes else nothing
        labels[scores < threshold] = rest
    return labels


@dataclass(frozen=True, kw_only=True)
class Region:
    """All pixels of one class in one image; they need not touch each other."""

    class_name: str
    score: float
    """Mean score of its pixels, in 0..1."""
    area: int
    """Pixels."""
    bbox_xywh: tuple[int, int, int, int]
    """Left, top, width, height of the smallest box around it, in pixels."""
    rle: Mapping[str, Any]
    """COCO's compressed run-length code, `{"size": [H, W], "counts": str}`, as pycocotools reads it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation:
    """The named regions of one image, at the image's own size of H x W pixels.

    Raises:
        ValueError: the type of `labels` does not go with the number of classes, or an array has another height and
            width than `labels`.
    """

    labels: np.ndarray
    """(H, W) uint8, or uint16 for more than 254 classes: index into `classes`; 255 (uint16: 65535) = no class."""
    classes: tuple[str, ...]
    """Names, in index order."""
    scores: np.ndarray
    """(H, W) float32 in 0..1: how sure each pixel's label is."""
    clusters: np.ndarray | None = None
    """(H, W) integers: which region of the clustering head each pixel fell into."""
    image: np.ndarray | None = None
    """(H, W, 3) uint8 RGB: what was segmented, kept for `overlay`."""

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
        """One region for each class that is present, in the order of `classes`."""
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
        """The same with pixels of lower scores given to the class ``background``, or to none where there is no such class.

        Args:
            threshold: from 0 (leaves all as it is) to 1.
        """
        if threshold <= 0:
            return self
        return replace(self, labels=to_labels(self.labels, self.scores, self.classes, threshold))

    def areas_and_score_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and sum of scores of every class, (C,) int64 and (C,) float64."""
        count = len(self.classes)
        areas, score_sums = np.zeros(count, dtype=np.int64), np.zeros(count)
        rows = max(1, _BLOCK_PIXELS // self.labels.shape[1])
        for top in range(0, self.labels.shape[0], rows):
            # Everything that is no class falls into one bin after the last class, which is cut off.
            labels = np.minimum(self.labels[top : top + rows].ravel(), count)
            scores = self.scores[top : top + rows].ravel()
            areas += np.bincount(labels, minlength=count + 1)[:count]
            score_sums += np.bincount(labels, weights=scores, minlength=count + 1)[:count]
        return areas, score_sums

    def overlay(self, opacity: float = 0.55, legend: bool = True) -> Image.Image:
        """The image with every class tinted in its colour and, below it, a legend of names and shares of the area.

        Without a legend the picture has the image's own size. With one, an image whose shorter side is less than
        256 px is enlarged by a whole factor first, so that there is room to read. Where no image was kept the plain
        class map is drawn.

        Args:
            opacity: of the tint, from 0 (the image in grey) to 1 (the class colours alone).
            legend: whether to draw the legend.
        """
        factor = visualization.upscale_factor(*self.labels.shape) if legend else 1
        picture = visualization.draw_overlay(self.image, self.labels, self.classes, opacity=opacity, factor=factor)
        return (
            visualization.add_legend(picture, visualization.legend_entries(self.labels, self.classes))
            if legend
            else picture
        )

    def to_png_bytes(self) -> bytes:
        """The label map as PNG, pixel value = label.

        8-bit with the class colours as palette for up to 254 classes, else 16-bit grey.
        """
        picture = Image.fromarray(self.labels)
        if self.labels.dtype == np.uint8:
            colours = np.zeros((256, 3), dtype=np.uint8)
            colours[: len(self.classes)] = visualization.class_colours(self.classes)
            picture = Image.frombytes("P", picture.size, picture.tobytes())
            picture.putpalette(colours.tobytes())
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        return buffer.getvalue()

    def to_png(self, path_or_uri: str) -> None:
        """Write `to_png_bytes` to a file or an object store.

        Raises:
            StorageError: the place cannot be written.
        """
        storage.write_bytes(str(path_or_uri), self.to_png_bytes())

    def to_coco(self, image_id: int = 1) -> dict[str, Any]:
        """COCO's instance style, one annotation for each class present: a dict that is ready for JSON.

        `category_id` is the index of the class plus 1, because COCO keeps 0 for "no category". `score` is there as in
        COCO's result files. All `classes` are listed as categories, present or not.
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
