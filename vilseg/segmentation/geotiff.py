"""GeoTIFF in, GeoTIFF of class indices out, whatever the size: windows are read, named, blended and written block by block.

Needs rasterio, the extra ``geo``. What the pixels mean (nodata, alpha, masks, overviews, colour interpretation) is GDAL's
reading of the file: https://gdal.org/en/stable/drivers/raster/gtiff.html.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vilseg import storage
from vilseg.errors import ConfigError, DataError, StorageError, UserError
from vilseg.segmentation.result import label_dtype, no_class, to_labels
from vilseg.segmentation.segmenter import Segmenter
from vilseg.segmentation.sliding_window import SlidingWindowScores, WindowAxis
from vilseg.segmentation.visualization import class_colours, rgb

CLASS_NAMES_TAG = "CLASS_NAMES"
"""Tag of a mask that holds the class names in index order, as a JSON list."""

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Little and big endian, TIFF 6.0 and BigTIFF."""

_GDAL_CACHE_BYTES = 256 << 20  # GDAL's own default is 5 % of the memory, several GB on a large machine
_BLOCK_SIDE = 256  # px: blocks of the file are taken together up to this side
_STRIP_PIXELS = 1 << 24  # px: the longest strip that is written, though the input may be a single one
_BLOCK_VALUES = 1 << 23  # class scores held at full resolution at once (32 MB)
_SAMPLE_SIDE = 1024  # px: longer side of the small version that the range of 16-bit and float bands is taken from
_PERCENTILES = (2, 98)  # as QGIS stretches by default ("cumulative count cut")

Window = tuple[int, int, int, int]
"""Top, bottom, left, right in pixels."""


@dataclass(frozen=True)
class GeoMask:
    """What a mask holds, for the classes that are present in it, in index order."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    classes: tuple[str, ...]
    areas: tuple[int, ...]
    """Pixels of each class."""
    scores: tuple[float, ...]
    """Mean score of each class's pixels, in 0..1."""


def is_georeferenced(path: str) -> bool:
    """Whether a path or URI is a TIFF that says where on Earth it lies.

    That is a coordinate reference system, a transform that is not the identity, ground control points or RPCs. False
    for anything else. Of an object on S3 the header alone is read.

    Raises:
        StorageError: it cannot be read.
        UserError: it is a TIFF and rasterio is missing.
    """
    with storage.reading(path) as stream:  # a connection that breaks here is the store's affair
        if stream.read(4) not in _TIFF_STARTS:
            return False
    _import_rasterio()

    def open_object(name: str, mode: str = "rb") -> Any:
        if name != "object.tif":  # GDAL looks for files beside it
            raise FileNotFoundError(name)
        return storage.open_input(path)

    # By its path a local file is found together with its world file (.tfw).
    local = storage.is_local(path)
    try:
        with _open(storage.absolute(path)) if local else _open("object.tif", opener=open_object) as dataset:
            has_transform = not dataset.transform.is_identity
            return bool(dataset.crs or has_transform or dataset.gcps[0] or dataset.rpcs)
    except _gdal_errors():
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
    """Segment a TIFF of any size in bounded memory and write its labels as a GeoTIFF of the same place.

    Every window of ``tile`` x ``tile`` pixels is seen at the model's ``input_size``; the class scores of overlapping
    windows are blended before the best class wins. A picture no larger than one window is labelled as ``segmenter``
    labels it. Three bands are looked at: red, green and blue where the file says which they are, else the first three;
    fewer are grey. Bands of other types than uint8 are scaled by the 2nd and 98th percentile of the whole band. Where
    the file has no data there is no class.

    The mask has one band of class indices, uint8 (255 = no class) or, for more than 254 classes, uint16 (65535), deflated,
    with the input's reference system, transform, ground control points, RPCs and block layout, a colour for each class
    (uint8) and the class names as a JSON list in the tag ``CLASS_NAMES``. It appears whole or not at all.

    Args:
        segmenter: model and classes.
        source: path or URI of a TIFF.
        target: path or URI of the mask.
        tile: side of a window in pixels; the model's ``input_size`` where None, so that one pixel is one pixel to it.
        overlap: pixels that neighbouring windows share, at most half a tile; a quarter where None.
        progress: told (pixels done, pixels there are).

    Raises:
        DataError: not a TIFF, damaged, or its numbers are complex.
        StorageError: source cannot be read or target not written.
        ConfigError: tile or overlap make no windows.
        UserError: rasterio is missing.
    """
    rasterio = _import_rasterio()
    tile, overlap = _window_sizes(segmenter, tile, overlap)
    if storage.absolute(source) == storage.absolute(target):
        raise StorageError(f"{target} is the picture itself: give the mask another name")
    with (
        storage.local_copy(source) as picture,
        tempfile.TemporaryDirectory(prefix="vilseg-") as folder,
        rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE_BYTES),
    ):
        mask = Path(folder) / "mask.tif"
        with _gdal_errors_as_data_error(source), _open(picture) as dataset:
            raster = _RasterReader(dataset, source)
            scores_at = SlidingWindowScores(
                WindowAxis.cover(dataset.height, tile, overlap),
                WindowAxis.cover(dataset.width, tile, overlap),
                lambda *window: (
                    segmenter.class_scores(raster.image(*window), whole=False) / segmenter.config.temperature
                ),
            )
            with _gdal_errors_as_storage_error(target):
                done = _write_mask(raster, segmenter.classes, segmenter.config.threshold, scores_at, mask, progress)
                _require_whole(mask, done, target)
        with mask.open("rb") as content, storage.open_atomic(target) as stream:
            shutil.copyfileobj(content, stream, 1 << 20)
    return done


def _import_rasterio() -> Any:
    try:
        import rasterio
    except ImportError as error:
        raise UserError("GeoTIFF needs rasterio, which is not installed: pip install vilseg[geo]") from error
    return rasterio


def _window_sizes(segmenter: Segmenter, tile: int | None, overlap: int | None) -> tuple[int, int]:
    tile = segmenter.config.input_size if tile is None else tile
    if tile < 2:
        raise ConfigError(f"a tile of {tile} pixels is too small: give at least 2, or none for the model's own size")
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap <= tile // 2:
        raise ConfigError(f"an overlap of {overlap} pixels does not fit tiles of {tile}: give 0 to {tile // 2}")
    return tile, overlap


@contextmanager
def _open(file: str | Path, mode: str = "r", **options: Any) -> Iterator[Any]:
    """A TIFF of GDAL's; not a VRT or anything else that leads to other files."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a photo without a place is fine
        dataset = rasterio.open(file, mode, driver="GTiff", **options)
    with dataset:
        yield dataset


def _gdal_errors() -> tuple[type[Exception], ...]:
    """What rasterio raises where GDAL fails."""
    from rasterio._err import CPLE_BaseError  # some of GDAL's errors come through as they are
    from rasterio.errors import CRSError, RasterioError, RPCError

    return RasterioError, CRSError, RPCError, CPLE_BaseError


@contextmanager
def _gdal_errors_as_data_error(source: str) -> Iterator[None]:
    try:
        yield
    except _gdal_errors() as error:
        raise DataError(f"{source} is not a TIFF or is damaged: {_detail(error)}") from error


@contextmanager
def _gdal_errors_as_storage_error(target: str) -> Iterator[None]:
    try:
        yield
    except _gdal_errors() as error:
        raise _unwritten(target, _detail(error)) from error


def _unwritten(target: str, problem: str) -> StorageError:
    way = f"by way of {tempfile.gettempdir()} (is space left? TMPDIR chooses another folder)"
    return StorageError(f"cannot write {target} {way}: {problem}")


def _detail(error: Exception) -> str:
    """GDAL's own words, which rasterio keeps one exception further down."""
    return str(error.__cause__ or error).strip().rstrip(".")


class _RasterReader:
    """The picture and the validity of an open dataset, by windows of (top, bottom, left, right) pixels."""

    def __init__(self, dataset: Any, source: str) -> None:
        from rasterio.enums import ColorInterp, MaskFlags

        self.dataset = dataset
        self.source = source
        self.bands = _colour_bands([kind.name for kind in dataset.colorinterp])
        dtype = np.dtype(dataset.dtypes[self.bands[0] - 1])
        if "complex" in dataset.dtypes[self.bands[0] - 1]:
            raise DataError(f"{source} holds complex numbers: write their magnitude to a TIFF of real numbers first")
        self.has_nan = dtype.kind == "f"
        self.all_valid = not self.has_nan and all(flags == [MaskFlags.all_valid] for flags in dataset.mask_flag_enums)
        self.palette = None
        if dataset.colorinterp[self.bands[0] - 1] == ColorInterp.palette:
            self.palette = np.zeros((np.iinfo(dtype).max + 1, 3), np.uint8)
            for index, colour in dataset.colormap(self.bands[0]).items():
                self.palette[index] = colour[:3]
        self.range = None if dtype == np.uint8 or self.palette is not None else self._range()

    def _range(self) -> tuple[np.ndarray, np.ndarray]:
        """What becomes black and white in each band, (bands, 1, 1) each, from a small version of the whole."""
        height, width = self.dataset.shape
        factor = max(1.0, max(height, width) / _SAMPLE_SIDE)
        shape = (len(self.bands), max(1, round(height / factor)), max(1, round(width / factor)))
        sample = self.dataset.read(self.bands, out_shape=shape, masked=True)
        limits = []
        for band in sample:
            values = band.compressed().astype(np.float64)
            values = values[np.isfinite(values)]
            limits.append(np.percentile(values, _PERCENTILES) if len(values) else (0.0, 1.0))
        low, high = np.array(limits).T[:, :, None, None]
        return low, high

    def image(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Shape: (bottom - top, right - left, 3), uint8."""
        values = self._read(top, bottom, left, right)
        if self.palette is not None:
            return self.palette[values[0]]
        if self.range is not None:
            low, high = self.range
            # What is not a number has no class; it should only not harm its neighbours.
            scaled = (np.nan_to_num(values.astype(np.float64)) - low) * (255 / np.maximum(high - low, 1e-30))
            values = scaled.clip(0, 255).round().astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0))

    def valid(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Where there is data. Shape: (bottom - top, right - left), bool."""
        if self.all_valid:
            return np.ones((bottom - top, right - left), bool)
        with _gdal_errors_as_data_error(self.source):
            valid = self.dataset.dataset_mask(window=((top, bottom), (left, right))) > 0
        return valid & np.isfinite(self._read(top, bottom, left, right)).any(0) if self.has_nan else valid

    def _read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        with _gdal_errors_as_data_error(self.source):
            return self.dataset.read(self.bands, window=((top, bottom), (left, right)))


def _colour_bands(interpretations: list[str]) -> list[int]:
    """Numbers, from 1, of the bands to look at: three, or one that is grey."""
    if all(colour in interpretations for colour in ("red", "green", "blue")):
        return [interpretations.index(colour) + 1 for colour in ("red", "green", "blue")]
    shown = [number for number, name in enumerate(interpretations, start=1) if name != "alpha"] or [1]
    return shown[:3] if len(shown) >= 3 else shown[:1]


def _write_mask(
    raster: _RasterReader,
    classes: tuple[str, ...],
    threshold: float,
    scores_at: Callable[[int, int, int, int], Tensor],
    mask: Path,
    progress: Callable[[int, int], None],
) -> GeoMask:
    """Label block after block; ``scores_at`` gives the class scores (C or C + 1, H, W) of the pixels of a window."""
    height, width = raster.dataset.shape
    count, done = len(classes), 0
    areas, score_sums = np.zeros(count, np.int64), np.zeros(count)
    profile = _mask_profile(raster.dataset, count)
    with _open(mask, "w", **profile) as output:
        _describe(output, raster.dataset, classes)
        # Whole blocks of the file: what is compressed in parts is compressed anew each time and leaves holes.
        for block in _split((0, height, 0, width), *_whole_blocks(profile["blockysize"], profile["blockxsize"])):
            top, bottom, left, right = block
            labels = np.full((bottom - top, right - left), profile["nodata"], profile["dtype"])
            rows = min(_BLOCK_SIDE, max(1, _BLOCK_VALUES // (_BLOCK_SIDE * count)))
            for part in _split(block, rows, _BLOCK_SIDE):
                valid = raster.valid(*part)
                if not valid.any():
                    continue
                winners, scores = (array[valid] for array in _best_class_and_probability(scores_at(*part)))
                found = to_labels(winners, scores, classes, threshold)
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


def _require_whole(mask: Path, done: GeoMask, target: str) -> None:
    """Read a mask once more: an error of the last bytes, such as a full disk, is not raised when a dataset is closed."""
    with _open(mask) as dataset:
        counts = np.zeros(np.iinfo(dataset.dtypes[0]).max + 1, np.int64)
        for top, bottom, left, right in _split(
            (0, done.height, 0, done.width), *_whole_blocks(*dataset.block_shapes[0])
        ):
            labels = dataset.read(1, window=((top, bottom), (left, right)))
            counts += np.bincount(labels.ravel(), minlength=len(counts))
    areas = counts[:-1]
    if tuple(areas[areas > 0]) != done.areas:
        raise _unwritten(target, "it does not read back as it was written")


@torch.inference_mode()
def _best_class_and_probability(logits_CHW: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Index of the best class and its soft-max, (H, W) each."""
    best_HW, winner_HW = logits_CHW.max(0)
    total_HW = logits_CHW.sub_(best_HW).exp_().sum(0)
    return winner_HW.cpu().numpy(), total_HW.reciprocal().cpu().numpy()


def _split(window: Window, rows: int, columns: int) -> Iterator[Window]:
    """Parts of a window, row by row, of at most so many rows and columns."""
    top, bottom, left, right = window
    for y in range(top, bottom, rows):
        for x in range(left, right, columns):
            yield y, min(y + rows, bottom), x, min(x + columns, right)


def _whole_blocks(rows: int, columns: int) -> tuple[int, int]:
    """As many blocks of a file as come to about `_BLOCK_SIDE` a side, and to no more than `_STRIP_PIXELS`."""
    wide = columns * max(1, _BLOCK_SIDE // columns)
    return rows * max(1, min(_BLOCK_SIDE, _STRIP_PIXELS // wide) // rows), wide


def _mask_profile(dataset: Any, count: int) -> dict[str, Any]:
    """What a mask of ``count`` classes is created with."""
    height, width = dataset.shape
    rows, columns = dataset.block_shapes[0]
    tiled = columns != width
    if not tiled:
        rows = max(1, min(rows, _STRIP_PIXELS // width))
    dtype = label_dtype(count)
    return {
        "width": width,
        "height": height,
        "count": 1,
        "dtype": dtype.name,
        "nodata": no_class(dtype),
        "crs": dataset.crs,
        "transform": None if dataset.transform.is_identity else dataset.transform,
        "tiled": tiled,
        "blockysize": rows,
        "blockxsize": columns,
        "compress": "deflate",
        "bigtiff": "if_safer",  # the compressed size is not known beforehand
    }


def _describe(output: Any, dataset: Any, classes: tuple[str, ...]) -> None:
    """What a mask keeps of the input beside its profile, and what its values mean."""
    points, points_crs = dataset.gcps
    if points:
        output.gcps = (points, points_crs)
    if dataset.rpcs:
        output.rpcs = dataset.rpcs
    tags = {CLASS_NAMES_TAG: json.dumps(classes, ensure_ascii=False)}
    if "AREA_OR_POINT" in dataset.tags():
        tags["AREA_OR_POINT"] = dataset.tags()["AREA_OR_POINT"]
    output.update_tags(**tags)
    if output.dtypes[0] == "uint8":
        output.write_colormap(1, {index: rgb(colour) for index, colour in enumerate(class_colours(classes))})
