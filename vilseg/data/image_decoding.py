"""Decoding of image files to RGB arrays; a bad image raises `DataError`, which callers can skip."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from vilseg.errors import DataError, TooLargeError

_MAX_PIXELS = 100_000_000
_ORIENTATION = 0x0112
_JPEG_FAST = {"Gray", "YCbCr", "RGB"}
_ICON_STARTS = (b"\x00\x00\x01\x00", b"icns")
_PNG_SIZE = re.compile(rb"\x89PNG\r\n\x1a\n.{4}IHDR(.{8})", re.DOTALL)

# Pillow's own limit is off, because the header is checked against the caller's limit before decoding.
Image.MAX_IMAGE_PIXELS = None


def decode_image(data: bytes, *, max_pixels: int | None = None, min_side: int | None = None) -> np.ndarray:
    """Decode the first frame of an image to RGB, turned upright by its EXIF orientation, with transparency over white.

    Args:
        data: encoded image of any format that Pillow supports.
        max_pixels: maximum width x height in the header; None means 100 million.
        min_side: minimum length in pixels of both sides when a JPEG is decoded at a reduced size (a multiple of 1/8); None
            decodes it at full size.

    Returns:
        RGB image. Shape: (H, W, 3), uint8.

    Raises:
        DataError: the data is not an image, or is damaged.
        TooLargeError: the image has more than ``max_pixels`` pixels.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (4, 2), "red").save(file, "PNG")
        >>> decode_image(file.getvalue()).shape
        (2, 4, 3)
    """
    if not data:
        raise DataError("the image has no bytes")
    limit = _MAX_PIXELS if max_pixels is None else max_pixels
    if data[:2] == b"\xff\xd8":
        array = _decode_jpeg(data, limit, min_side)
        if array is not None:
            return array
    if data.startswith(_ICON_STARTS):
        # Pillow decodes the images in an icon to find its size, so their own headers are checked first.
        for size in _PNG_SIZE.findall(data):
            width, height = struct.unpack(">II", size)
            _check_size(width, height, limit)
    with _opened(data) as image:
        _check_size(image.width, image.height, limit)
        return np.asarray(to_rgb(image))


def image_size(data: bytes) -> tuple[int, int]:
    """Return the width and height in an image's header, before it is turned upright.

    Raises:
        DataError: the data is not an image, or its header is damaged.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            pass  # Pillow supports more kinds of JPEG
        else:
            return width, height
    with _opened(data) as image:
        return image.size


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image with Pillow without decoding it; raise any error inside the block as a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of metadata it skips
            yield Image.open(io.BytesIO(data))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("the bytes are not an image of a known format") from error
    except Exception as error:
        raise DataError(f"the image is damaged: {str(error).strip() or type(error).__name__}") from error


def crop_to_square(image: np.ndarray, side: int, position: float = 0.5) -> np.ndarray:
    """Resize the shorter side to ``side`` pixels and crop the longer side to it at ``position``, 0 (start) to 1 (end).

    Shape: (H, W, 3) -> (side, side, 3).
    """
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    short = min(height, width)
    top, left = round((height - short) * position), round((width - short) * position)
    box = (left, top, left + short, top + short)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _decode_jpeg(data: bytes, limit: int, min_side: int | None) -> np.ndarray | None:
    """Decode a JPEG of at most ``limit`` pixels with simplejpeg; return None if it needs Pillow (CMYK, rotated or damaged)."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, limit)
    if colorspace not in _JPEG_FAST or _is_rotated(data):
        return None
    try:
        # libjpeg reduces the size while decoding, which makes large photos much faster.
        return simplejpeg.decode_jpeg(data, "RGB", min_height=min_side or 0, min_width=min_side or 0, min_factor=1)
    except ValueError:
        return None


def _is_rotated(data: bytes) -> bool:
    if b"Exif\x00\x00" not in data[:65536]:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # noqa: BLE001  (Pillow raises many types; decoding the image will raise the error)
        return False


def _check_size(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise TooLargeError(f"the image has {width} x {height} pixels, more than the limit of {limit:,}")
    if width < 1 or height < 1:
        raise DataError(f"the image has no pixels ({width} x {height})")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to RGB and turn it upright.

    16-bit values, and floats in 0..1, are scaled to 8 bits. Transparency is drawn over white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        if image.mode == "F" and values.min(initial=0) >= 0 and values.max(initial=0) <= 1:
            values = values * 255  # a common convention of numerical programs
        # 16-bit files have values 0..65535; values that fit in 8 bits are not scaled.
        values = values / 257.0 if values.max(initial=0) > 255 else values
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
