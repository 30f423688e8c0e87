"""Segment a GeoTIFF of any size into a GeoTIFF of class indices, in bounded memory.

Windows are read, scored and blended, and the mask is labelled and written block by block. Needs rasterio, the extra ``geo``; the
files are read and written by :mod:`vilseg.segmentation.geotiff_io`.
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
"""Little and big endian, TIFF 6.0 and BigTIFF."""

_BLOCK_VALUES = 1 << 23
"""Class scores held at full resolution at once (32 MB)."""


@dataclass(frozen=True)
class GeoMask:
    """Classes that are present in a mask, in index order, with their areas and scores."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    classes: tuple[str, ...]
    """Names."""
    areas: tuple[int, ...]
    """Pixels of each class."""
    scores: tuple[float, ...]
    """Mean score of each class's pixels, in 0..1."""


def is_georeferenced(path: str) -> bool:
    """Return True for the path or URI of a TIFF that says where on Earth it lies.

    It does by a coordinate reference system, a transform that is not the identity, ground control points or RPCs. False
    for anything else. Of an object on S3 the header alone is read.

    Raises:
        StorageError: it cannot be read.
        UserError: it is a TIFF and rasterio is missing.
    """
    with storage.reading(path) as stream:  # outside the try below: a broken connection is a StorageError
        if stream.read(4) not in _TIFF_STARTS:
            return False
    import_rasterio()

    def open_object(name: str, mode: str = "rb") -> Any:
        if name != "object.tif":  # GDAL looks for files beside it
            raise FileNotFoundError(name)
        return storage.open_input(path)

    # By its path a local file is found together with its world file (.tfw).
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

    Every window of ``tile`` x ``tile`` pixels is encoded at the model's ``input_size``; the class scores of overlapping
    windows are blended before the best class wins. An image no larger than one window is labelled as ``segmenter``
    labels it. Three bands are used: red, green and blue where the file says which they are, else the first three;
    fewer are grey. Bands of other types than uint8 are scaled by the 2nd and 98th percentile of the whole band. Where
    the file has no data there is no class.

    The mask has one band of class indices, uint8 (255 = no class) or, for more than 254 classes, uint16 (65535), deflated,
    with the input's reference system, transform, ground control points, RPCs and block layout, a colour for each class
    (uint8) and the class names as a JSON list in the tag ``CLASS_NAMES``. It appears complete or not at all.

    Args:
        segmenter: model and classes.
        source: path or URI of a TIFF.
        target: path or URI of the mask.
        tile: side of a window in pixels; the model's ``input_size`` where None, so that one pixel is one pixel to it.
        overlap: pixels by which neighbouring windows overlap, at most half a tile; a quarter where None.
        progress: called with (pixels done, pixels in all).

    Raises:
        DataError: not a TIFF, damaged, or its numbers are complex.
        StorageError: source cannot be read or target not written.
        ConfigError: tile or overlap make no windows.
        UserError: rasterio is missing.
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
    """Label block after block; ``scores_at`` returns the class scores (C or C + 1, H, W) of the pixels of a block."""
    height, width = raster.dataset.shape
    count, done = len(classes), 0
    areas, score_sums = np.zeros(count, np.int64), np.zeros(count)
    profile = mask_profile(raster.dataset, count)
    with open_tiff(mask, "w", **profile) as output:
        write_metadata(output, raster.dataset, classes)
        # Whole blocks of the file: a block written in parts is compressed anew each time and leaves unused space.
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
                found = np.minimum(found, count)  # no class falls into one bin after the last class, which is cut off
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
    """Read a mask again and compare: an error in the last bytes, such as a full disk, is not raised when a dataset is closed."""
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
    """Compute the index of the best class and its soft-max. Shape: (R, H, W) -> (H, W), (H, W)."""
    best_HW, winner_HW = logits_CHW.max(0)
    total_HW = logits_CHW.sub_(best_HW).exp_().sum(0)
    return winner_HW.cpu().numpy(), total_HW.reciprocal().cpu().numpy()
