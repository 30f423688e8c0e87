"""Decoding of image files to RGB arrays, with the checks that keep one bad image from stopping a job."""

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

# The header is checked against the caller's own limit before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


def decode_image(data: bytes, *, max_pixels: int | None = None, min_side: int | None = None) -> np.ndarray:
    """Decode an image upright, as RGB, first frame only, transparency over white.

    Args:
        data: an encoded image of any format that Pillow knows.
        max_pixels: largest width x height that the header may announce; 100 million where None.
        min_side: a JPEG may come out smaller, by whole eighths, as long as both sides stay at least this long.

    Returns:
        Shape: (H, W, 3), uint8.

    Raises:
        DataError: not an image, or damaged.
        TooLargeError: too many pixels.

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
        # Pillow decodes the images in an icon to learn its size, whatever sizes the icon's own header gives.
        for size in _PNG_SIZE.findall(data):
            width, height = struct.unpack(">II", size)
            _check_size(width, height, limit)
    with _opened(data) as image:
        _check_size(image.width, image.height, limit)
        return np.asarray(to_rgb(image))


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height by an image's header, as it is stored (not turned upright).

    Raises:
        DataError: not an image, or its header is damaged.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            pass  # Pillow knows more kinds
        else:
            return width, height
    with _opened(data) as image:
        return image.size


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image with Pillow, not decoded yet; whatever fails in the block is a DataError."""
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
    """Resize the shorter side to ``side`` and crop the longer one at ``position``, 0 (start) to 1 (end).

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
    """Decode a JPEG by the fast path; return None where Pillow is needed (CMYK, rotated, damaged)."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, limit)
    if colorspace not in _JPEG_FAST or _is_rotated(data):
        return None
    try:
        # min_factor: libjpeg scales while decoding, so a large photo costs what its small version costs.
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
    except Exception:  # noqa: BLE001  (as above; decoding it will raise the error)
        return False


def _check_size(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise TooLargeError(f"the image has {width} x {height} pixels, more than the limit of {limit:,}")
    if width < 1 or height < 1:
        raise DataError(f"the image has no pixels ({width} x {height})")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB version of any Pillow image: 16 bits and floats in 0..1 scaled to 8 bits, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        if image.mode == "F" and values.min(initial=0) >= 0 and values.max(initial=0) <= 1:
            values = values * 255  # as programs that compute with images write them
        # 16-bit files hold 0..65535; what fits in 8 bits already is left as it is.
        values = values / 257.0 if values.max(initial=0) > 255 else values
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
