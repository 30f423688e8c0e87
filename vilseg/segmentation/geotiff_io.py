"""Read and write windows of GeoTIFF files with rasterio (extra ``geo``).

Nodata values, alpha bands, masks, overviews and colour interpretation are interpreted as GDAL does:
https://gdal.org/en/stable/drivers/raster/gtiff.html.
"""

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vilseg.errors import DataError, StorageError, UserError
from vilseg.segmentation.result import label_dtype, no_class
from vilseg.segmentation.visualization import class_colours, rgb

CLASS_NAMES_TAG = "CLASS_NAMES"
"""Tag of a mask that holds the class names in index order, as a JSON list."""

GDAL_CACHE_BYTES = 256 << 20
"""Size of GDAL's block cache in bytes. GDAL's default is 5 % of the memory, several GB on a large machine."""

BLOCK_SIDE = 256
"""Side in pixels up to which neighbouring blocks of a file are processed together."""

_STRIP_PIXELS = 1 << 24  # px: maximum size of a strip in the mask; the input may consist of a single larger one
_SAMPLE_SIDE = (
    1024  # px: longer side of the downsampled image from which the value range of 16-bit and float bands is computed
)
_PERCENTILES = (2, 98)  # default contrast stretch of QGIS ("cumulative count cut")

Window = tuple[int, int, int, int]
"""Window of an image as (top, bottom, left, right) in pixels; bottom and right are excluded."""


def import_rasterio() -> Any:
    """Import and return rasterio, or raise a UserError that tells how to install it."""
    try:
        import rasterio
    except ImportError as error:
        raise UserError("GeoTIFF needs rasterio, which is not installed: pip install vilseg[geo]") from error
    return rasterio


@contextmanager
def open_tiff(file: str | Path, mode: str = "r", **options: Any) -> Iterator[Any]:
    """Open a file as TIFF and yield its dataset; formats that can refer to other files, such as VRT, are refused."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a photo without a georeference is accepted
        dataset = rasterio.open(file, mode, driver="GTiff", **options)
    with dataset:
        yield dataset


def gdal_errors() -> tuple[type[Exception], ...]:
    """Return the exception types that rasterio raises when GDAL fails."""
    from rasterio._err import CPLE_BaseError  # some of GDAL's errors are not wrapped by rasterio
    from rasterio.errors import CRSError, RasterioError, RPCError

    return RasterioError, CRSError, RPCError, CPLE_BaseError


@contextmanager
def gdal_errors_as_data_error(source: str) -> Iterator[None]:
    """Convert GDAL's errors in the ``with`` block to a DataError about ``source``."""
    try:
        yield
    except gdal_errors() as error:
        raise DataError(f"{source} is not a TIFF or is damaged: {_gdal_message(error)}") from error


@contextmanager
def gdal_errors_as_storage_error(target: str) -> Iterator[None]:
    """Convert GDAL's errors in the ``with`` block to a StorageError about ``target``."""
    try:
        yield
    except gdal_errors() as error:
        raise incomplete_mask_error(target, _gdal_message(error)) from error


def incomplete_mask_error(target: str, problem: str) -> StorageError:
    """Return the error for a mask that could not be written; its message names the temporary directory."""
    way = f"by way of {tempfile.gettempdir()} (is space left? TMPDIR chooses another folder)"
    return StorageError(f"cannot write {target} {way}: {problem}")


def _gdal_message(error: Exception) -> str:
    """Return GDAL's message, which rasterio stores as the cause of its own exception."""
    return str(error.__cause__ or error).strip().rstrip(".")


class RasterReader:
    """Reader of an open dataset: returns RGB pixels and the mask of valid pixels of any window.

    Args:
        dataset: dataset opened by rasterio.
        source: path or URI of the file, for error messages.

    Raises:
        DataError: the dataset contains complex numbers.
    """

    def __init__(self, dataset: Any, source: str) -> None:
        from rasterio.enums import ColorInterp, MaskFlags

        self.dataset = dataset
        self.source = source
        self.bands = _rgb_bands([kind.name for kind in dataset.colorinterp])
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
        self.value_range = None if dtype == np.uint8 or self.palette is not None else self._value_range()

    def _value_range(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute the values of each band that are mapped to black and to white, from a downsampled version of the image.

        Shape: (bands, 1, 1) each.
        """
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
        """Read a window as an RGB image. Shape: -> (bottom - top, right - left, 3), uint8."""
        values = self._read(top, bottom, left, right)
        if self.palette is not None:
            return self.palette[values[0]]
        if self.value_range is not None:
            low, high = self.value_range
            # NaN pixels get "no class" later; they become 0 here so that they do not affect their neighbours.
            scaled = (np.nan_to_num(values.astype(np.float64)) - low) * (255 / np.maximum(high - low, 1e-30))
            values = scaled.clip(0, 255).round().astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0))

    def valid(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Return a mask of the pixels of a window that have data. Shape: -> (bottom - top, right - left), bool."""
        if self.all_valid:
            return np.ones((bottom - top, right - left), bool)
        with gdal_errors_as_data_error(self.source):
            valid = self.dataset.dataset_mask(window=((top, bottom), (left, right))) > 0
        return valid & np.isfinite(self._read(top, bottom, left, right)).any(0) if self.has_nan else valid

    def _read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        with gdal_errors_as_data_error(self.source):
            return self.dataset.read(self.bands, window=((top, bottom), (left, right)))


def _rgb_bands(interpretations: list[str]) -> list[int]:
    """Return the numbers, from 1, of the bands to use as image: three for RGB, or one for grey."""
    if all(colour in interpretations for colour in ("red", "green", "blue")):
        return [interpretations.index(colour) + 1 for colour in ("red", "green", "blue")]
    shown = [number for number, name in enumerate(interpretations, start=1) if name != "alpha"] or [1]
    return shown[:3] if len(shown) >= 3 else shown[:1]


def split_window(window: Window, rows: int, columns: int) -> Iterator[Window]:
    """Yield windows of at most ``rows`` x ``columns`` pixels that together cover ``window``, in row-major order."""
    top, bottom, left, right = window
    for y in range(top, bottom, rows):
        for x in range(left, right, columns):
            yield y, min(y + rows, bottom), x, min(x + columns, right)


def block_group_size(rows: int, columns: int) -> tuple[int, int]:
    """Return the size (rows, columns), in pixels, of a group of whole blocks that are processed together.

    Each side is at most `BLOCK_SIDE`, or that of a single block if it is longer. A group that is more than one block high has at
    most `_STRIP_PIXELS` pixels.

    Args:
        rows: height of a block of the file.
        columns: width of a block of the file.
    """
    wide = columns * max(1, BLOCK_SIDE // columns)
    return rows * max(1, min(BLOCK_SIDE, _STRIP_PIXELS // wide) // rows), wide


def mask_profile(dataset: Any, count: int) -> dict[str, Any]:
    """Return rasterio's creation options for the mask of a dataset with ``count`` classes."""
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
        "bigtiff": "if_safer",  # the compressed size is not known in advance
    }


def write_metadata(output: Any, dataset: Any, classes: tuple[str, ...]) -> None:
    """Write metadata to a mask: ground control points, RPCs and pixel interpretation of the input, class names and colours."""
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
