"""Segment a GeoTIFF of any size into a GeoTIFF of class indices, in bounded memory.

Windows of the image are read and scored and their scores blended; the mask is labelled and written block by block. Requires
rasterio (extra ``geo``). :mod:`vilseg.segmentation.geotiff_io` reads and writes the files.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vilseg import storage
from vilseg.errors import ConfigError, StorageError
from vilseg.segmentation.geotiff_io import (
    BLOCK_SIDE,
    GDAL_CACHE_BYTES,
    RasterReader,
    block_group_size,
    gdal_errors,
    gdal_errors_as_data_error,
    gdal_errors_as_storage_error,
    import_rasterio,
    incomplete_mask_error,
    mask_profile,
    open_tiff,
    split_window,
    write_metadata,
)
from vilseg.segmentation.result import to_labels
from vilseg.segmentation.segmenter import Segmenter
from vilseg.segmentation.sliding_window import SlidingWindowScores, WindowAxis

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First four bytes of a TIFF: little and big endian, each as TIFF 6.0 and BigTIFF."""

_BLOCK_VALUES = 1 << 23
"""Maximum number of class scores held at full resolution at once (32 MB)."""


@dataclass(frozen=True)
class GeoMask:
    """Size of a mask, and the classes that have pixels in it, in index order, with their areas and scores."""

    width: int
    """Width of the mask in pixels."""
    height: int
    """Height of the mask in pixels."""
    classes: tuple[str, ...]
    """Names of the classes that have pixels."""
    areas: tuple[int, ...]
    """Number of pixels of each of these classes."""
    scores: tuple[float, ...]
    """Mean score of the pixels of each of these classes, in 0..1."""


def is_georeferenced(path: str) -> bool:
    """Return True if the file at a path or URI is a georeferenced TIFF.

    A TIFF is georeferenced if it has a coordinate reference system, a transform that is not the identity, ground control points
    or RPCs. Other files give False. Only the header of an object in an object store is read.

    Raises:
        StorageError: the file cannot be read.
        UserError: the file is a TIFF and rasterio is not installed.
    """
    with storage.reading(path) as stream:  # outside the try below: a broken connection is a StorageError
        if stream.read(4) not in _TIFF_STARTS:
            return False
    import_rasterio()

    def open_object(name: str, mode: str = "rb") -> Any:
        if name != "object.tif":  # GDAL also looks for auxiliary files in the same directory
            raise FileNotFoundError(name)
        return storage.open_input(path)

    # A local file is opened by its path, so that GDAL also finds its world file (.tfw).
    local = storage.is_local(path)
    try:
        with open_tiff(storage.absolute(path)) if local else open_tiff("object.tif", opener=open_object) as dataset:
            has_transform = not dataset.transform.is_identity
            return bool(dataset.crs or has_transform or dataset.gcps[0] or dataset.rpcs)
    except gdal_errors():
        return False


def segment_geotiff(
    segmenter: Segmenter,
    source: str,
    target: str,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GeoMask:
    """Segment a TIFF of any size in bounded memory and write its labels as a GeoTIFF of the same georeference.

    Each window of ``tile`` x ``tile`` pixels is resized to the model's ``input_size`` and encoded. The class scores of
    overlapping windows are blended, then every pixel gets the best class. The settings ``objectness`` and ``gate`` are not
    applied, because they need the whole image; apart from that, an image no larger than one window is labelled as by
    ``segmenter``. Pixels without data get "no class".

    Three bands are used: red, green and blue if the file declares them, otherwise the first three. If there are fewer than
    three, the first is used as grey. Bands of other types than uint8 are scaled so that the 2nd and 98th percentile of the whole
    band become black and white.

    The mask has one band of class indices, compressed by deflate: uint8 (255 = no class) or, for more than 254 classes, uint16
    (65535 = no class). It has the input's reference system, transform, ground control points, RPCs and block layout, a colour
    table (uint8 only), and the class names as a JSON list in the tag ``CLASS_NAMES``. The file is created atomically.

    Args:
        segmenter: model and classes.
        source: path or URI of a TIFF.
        target: path or URI of the mask.
        tile: side of a window in pixels; None takes the model's ``input_size``, so that pixels are not resampled.
        overlap: minimum overlap of neighbouring windows in pixels, at most half of ``tile``; None takes a quarter of ``tile``.
        progress: called with the number of pixels done and the total number of pixels.

    Raises:
        DataError: ``source`` is not a TIFF, is damaged, or contains complex numbers.
        StorageError: ``source`` cannot be read, ``target`` cannot be written, or both are the same file.
        ConfigError: ``tile`` is below 2, or ``overlap`` is negative or more than half of ``tile``.
        UserError: rasterio is not installed.
    """
    rasterio = import_rasterio()
    tile, overlap = _window_sizes(segmenter, tile, overlap)
    if storage.absolute(source) == storage.absolute(target):
        raise StorageError(f"{target} is the image itself: give the mask another name")
    with (
        storage.local_copy(source) as local,
        tempfile.TemporaryDirectory(prefix="vilseg-") as directory,
        rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES),
    ):
        mask = Path(directory) / "mask.tif"
        with gdal_errors_as_data_error(source), open_tiff(local) as dataset:
            raster = RasterReader(dataset, source)
            scores_at = SlidingWindowScores(
                WindowAxis.cover(dataset.height, tile, overlap),
                WindowAxis.cover(dataset.width, tile, overlap),
                lambda *window: (
                    segmenter.class_scores(raster.image(*window), use_objectness=False) / segmenter.config.temperature
                ),
            )
            with gdal_errors_as_storage_error(target):
                done = _write_mask(raster, segmenter.classes, segmenter.config.threshold, scores_at, mask, progress)
                _verify_mask(mask, done, target)
        with mask.open("rb") as content, storage.open_atomic(target) as stream:
            shutil.copyfileobj(content, stream, 1 << 20)
    return done


def _window_sizes(segmenter: Segmenter, tile: int | None, overlap: int | None) -> tuple[int, int]:
    tile = segmenter.config.input_size if tile is None else tile
    if tile < 2:
        raise ConfigError(f"a tile of {tile} pixels is too small: give at least 2, or none for the model's own size")
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap <= tile // 2:
        raise ConfigError(f"an overlap of {overlap} pixels does not fit tiles of {tile}: give 0 to {tile // 2}")
    return tile, overlap


def _write_mask(
    raster: RasterReader,
    classes: tuple[str, ...],
    threshold: float,
    scores_at: Callable[[int, int, int, int], Tensor],
    mask: Path,
    progress: Callable[[int, int], None],
) -> GeoMask:
    """Compute and write the labels block by block; return the statistics of the mask.

    Args:
        raster: reader of the image.
        classes: class names, in index order.
        threshold: minimum probability of a label; see `to_labels`.
        scores_at: function that takes (top, bottom, left, right) of a block and returns its class logits. Shape: (C, H, W) or
            (C + 1, H, W).
        mask: path of the mask.
        progress: called with the number of pixels done and the total number of pixels.
    """
    height, width = raster.dataset.shape
    count, done = len(classes), 0
    areas, score_sums = np.zeros(count, np.int64), np.zeros(count)
    profile = mask_profile(raster.dataset, count)
    with open_tiff(mask, "w", **profile) as output:
        write_metadata(output, raster.dataset, classes)
        # Whole blocks of the file are written: one written in several parts is compressed each time and leaves unused space.
        for block in split_window(
            (0, height, 0, width), *block_group_size(profile["blockysize"], profile["blockxsize"])
        ):
            top, bottom, left, right = block
            labels = np.full((bottom - top, right - left), profile["nodata"], profile["dtype"])
            rows = min(BLOCK_SIDE, max(1, _BLOCK_VALUES // (BLOCK_SIDE * count)))
            for part in split_window(block, rows, BLOCK_SIDE):
                valid = raster.valid(*part)
                if not valid.any():
                    continue
                best_classes, scores = (array[valid] for array in _best_class_and_probability(scores_at(*part)))
                found = to_labels(best_classes, scores, classes, threshold)
                labels[part[0] - top : part[1] - top, part[2] - left : part[3] - left][valid] = found
                found = np.minimum(
                    found, count
                )  # "no class" goes into one more bin after the last class; that bin is dropped
                areas += np.bincount(found, minlength=count + 1)[:count]
                score_sums += np.bincount(found, weights=scores, minlength=count + 1)[:count]
            output.write(labels, 1, window=((top, bottom), (left, right)))
            done += labels.size
            progress(done, height * width)
    present = np.flatnonzero(areas)
    return GeoMask(
        width,
        height,
        classes=tuple(classes[index] for index in present),
        areas=tuple(int(areas[index]) for index in present),
        scores=tuple(float(score_sums[index] / areas[index]) for index in present),
    )


def _verify_mask(mask: Path, done: GeoMask, target: str) -> None:
    """Raise StorageError unless the mask reads back with the areas that were written.

    The check is needed because closing a dataset does not raise errors of its last bytes, such as a full disk.
    """
    with open_tiff(mask) as dataset:
        counts = np.zeros(np.iinfo(dataset.dtypes[0]).max + 1, np.int64)
        for top, bottom, left, right in split_window(
            (0, done.height, 0, done.width), *block_group_size(*dataset.block_shapes[0])
        ):
            labels = dataset.read(1, window=((top, bottom), (left, right)))
            counts += np.bincount(labels.ravel(), minlength=len(counts))
    areas = counts[:-1]
    if tuple(areas[areas > 0]) != done.areas:
        raise incomplete_mask_error(target, "it does not read back as it was written")


@torch.inference_mode()
def _best_class_and_probability(logits_CHW: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the best class and its probability for every pixel. Shape: (R, H, W) -> (H, W), (H, W)."""
    best_HW, winner_HW = logits_CHW.max(0)
    total_HW = logits_CHW.sub_(best_HW).exp_().sum(0)
    return winner_HW.cpu().numpy(), total_HW.reciprocal().cpu().numpy()
