"""Reading of an image and its ground-truth mask, for all datasets."""

import io
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image, UnidentifiedImageError

from vilseg import storage
from vilseg.data.image_decoding import decode_image
from vilseg.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedImage:
    """Image with its ground-truth mask."""

    name: str
    """Path relative to the dataset's image folder, without suffix; unique in the dataset."""
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    mask: np.ndarray
    """(H, W) uint8 or uint16: class index of each pixel, or `ignore`."""
    ignore: int
    """Mask value of ignored pixels: 255 in an 8-bit mask, 65535 in a 16-bit one."""


class ImageFiles:
    """Base class of datasets that read images one by one from a list of files."""

    _files: Sequence[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self._files)

    def part(self, start: int, stop: int) -> Self:
        """Return a dataset of the images with indices ``start`` to ``stop`` - 1."""
        part = copy(self)
        part._files = self._files[start:stop]
        return part


def read_image_and_mask(image_uri: str, mask_uri: str) -> tuple[np.ndarray, np.ndarray]:
    """Read an image, (H, W, 3) uint8 RGB, and its mask values, (H, W) uint8 or uint16.

    Raises:
        DataError: a file cannot be decoded, or the mask and the image differ in size.
        StorageError: a file cannot be read.
    """
    try:
        image = decode_image(storage.read_bytes(image_uri))
    except DataError as error:
        raise DataError(f"image {image_uri}: {error}") from error
    height, width = image.shape[:2]
    return image, _decode_mask(storage.read_bytes(mask_uri), mask_uri, width, height)


def values_of(mask: np.ndarray) -> np.ndarray:
    """Return the distinct values of a mask in ascending order."""
    return np.flatnonzero(np.bincount(mask.ravel()))


def _decode_mask(data: bytes, uri: str, width: int, height: int) -> np.ndarray:
    """Decode the class ids of a PNG mask: (H, W) uint8 or uint16, by its bit depth."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            # Read bit depth and colour type from the header (PNG, section 11.2.1), because Pillow scales grey of less
            # than 8 bit to 0..255, which would turn class 1 of a 2-bit mask into 85.
            depth, colour = data[24], data[25]
            if (colour, depth) not in {(0, 8), (0, 16)} and colour != 3:
                raise DataError(f"mask {uri} is neither a grey PNG of 8 or 16 bit nor one with a palette: convert it")
            # Check before decoding: the size of the image was checked, so a mask of the same size is safe to decode.
            if image.size != (width, height):
                raise DataError(
                    f"mask {uri} is {image.width} x {image.height} pixels but its image is {width} x {height}: "
                    "make them equal"
                )
            return np.array(image, dtype=np.uint16 if depth == 16 else np.uint8)
    except UnidentifiedImageError as error:
        raise DataError(f"mask {uri} is no PNG: write it anew as one") from error
    except (OSError, SyntaxError, ValueError) as error:  # raised by Pillow for damaged files
        raise DataError(f"mask {uri} is damaged, write it anew: {error}") from error
