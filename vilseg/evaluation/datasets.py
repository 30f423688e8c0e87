"""Images with a true mask, to measure against."""

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from vilseg import storage
from vilseg.data.decode import decode_image
from vilseg.errors import DataError

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedImage:
    """One image and what is true of it."""

    name: str
    """Path within the dataset without its suffix; unique."""
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    mask: np.ndarray
    """(H, W) uint8 or uint16: index of the class of each pixel, or `ignore`."""
    ignore: int
    """Mask value of the pixels that count for nothing: 255 in an 8-bit mask, 65535 in a 16-bit one."""


class MaskedDataset(Protocol):
    """What can be evaluated on: class names, a length, and an iterator that starts anew every time."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the mask value is the index."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[MaskedImage]: ...


class FolderDataset:
    """`images/NAME.jpg` (or png, webp), `masks/NAME.png`, `classes.txt` below one folder or S3 prefix.

    Masks are grey PNGs of 8 or 16 bit, or PNGs with a palette; the pixel value is the class id, 255 (16 bit: 65535) is
    to be ignored. Line i of `classes.txt`, from 0, names class id i.

    Args:
        uri: the folder. Lists of files are read at once, images and masks one by one in iteration.

    Raises:
        DataError: `classes.txt` or the images are missing, or an image has no mask. Iterating raises it for a file
            that cannot be decoded, a mask of another size than its image, or a value that is no class.
        StorageError: the folder cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self.classes = _read_classes(storage.join(uri, "classes.txt"))
        images = storage.list_files(storage.join(uri, "images"), suffixes=_IMAGE_SUFFIXES)
        if not images:
            raise DataError(
                f"no images in {storage.join(uri, 'images')}: a dataset of kind folder has jpg, png or webp files there"
            )
        masks = {
            entry.relative: entry.uri for entry in storage.list_files(storage.join(uri, "masks"), suffixes=(".png",))
        }
        self._files: list[tuple[str, str, str]] = []
        for entry in sorted(images, key=lambda entry: entry.relative):
            name = entry.relative.rsplit(".", 1)[0]
            if f"{name}.png" not in masks:
                raise DataError(
                    f"image {entry.uri} has no mask: write one to {storage.join(uri, 'masks', name + '.png')} "
                    "or take the image away"
                )
            self._files.append((name, entry.uri, masks[f"{name}.png"]))

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[MaskedImage]:
        for name, image_uri, mask_uri in self._files:
            try:
                image = decode_image(storage.read_bytes(image_uri))
            except DataError as error:
                raise DataError(f"image {image_uri}: {error}") from error
            height, width = image.shape[:2]
            mask = _decode_mask(storage.read_bytes(mask_uri), mask_uri, width, height)
            ignore = int(np.iinfo(mask.dtype).max)
            self._check_values(mask, ignore, mask_uri)
            yield MaskedImage(name=name, image=image, mask=mask, ignore=ignore)

    def _check_values(self, mask: np.ndarray, ignore: int, uri: str) -> None:
        values = np.flatnonzero(np.bincount(mask.ravel()))
        wrong = values[(values >= len(self.classes)) & (values != ignore)]
        if wrong.size:
            raise DataError(
                f"mask {uri} has the value {wrong[0]}, which is no class: classes.txt names 0 to "
                f"{len(self.classes) - 1}, and {ignore} means ignore in a mask of {mask.dtype.itemsize * 8} bit"
            )


class FirstImages:
    """The first images of a dataset, read once and kept: for what is evaluated again and again."""

    def __init__(self, dataset: MaskedDataset, count: int) -> None:
        self.classes = dataset.classes
        self._items = list(itertools.islice(dataset, count))

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[MaskedImage]:
        return iter(self._items)


def _read_classes(uri: str) -> tuple[str, ...]:
    if not storage.exists(uri):
        raise DataError(f"{uri} is missing: write one class name a line, the first for mask value 0")
    lines = storage.read_text(uri).rstrip().splitlines()
    names = tuple(line.strip() for line in lines)
    if not names:
        raise DataError(f"{uri} is empty: write one class name a line, the first for mask value 0")
    seen: dict[str, int] = {}
    for number, name in enumerate(names):
        if not name:
            raise DataError(f"{uri} has no name in line {number + 1}, for mask value {number}: write one there")
        if name in seen:
            raise DataError(f"{uri} names {name!r} twice, for mask values {seen[name]} and {number}: make them differ")
        seen[name] = number
    return names


def _decode_mask(data: bytes, uri: str, width: int, height: int) -> np.ndarray:
    """Class ids of a PNG mask: (H, W) uint8 or uint16, by its bit depth."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            # Bit depth and colour type as in the header (PNG, section 11.2.1): Pillow itself stretches grey of less
            # than 8 bit to 0..255, which would turn class 1 into class 85.
            depth, colour = data[24], data[25]
            if (colour, depth) not in {(0, 8), (0, 16)} and colour != 3:
                raise DataError(f"mask {uri} is neither a grey PNG of 8 or 16 bit nor one with a palette: convert it")
            # Before the pixels are unpacked: a mask as large as its image is as harmless as the image was.
            if picture.size != (width, height):
                raise DataError(
                    f"mask {uri} is {picture.width} x {picture.height} pixels but its image is {width} x {height}: "
                    "make them equal"
                )
            return np.array(picture, dtype=np.uint16 if depth == 16 else np.uint8)
    except UnidentifiedImageError as error:
        raise DataError(f"mask {uri} is no PNG: write it anew as one") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise DataError(f"mask {uri} is damaged, write it anew: {error}") from error


_KINDS: dict[str, Callable[[str], MaskedDataset]] = {"folder": FolderDataset}


def open_dataset(spec: str) -> MaskedDataset:
    """Open `KIND:URI`, such as `folder:s3://bucket/scenes`.

    Raises:
        DataError: the kind is unknown, or what lies at the URI is not of that kind.
    """
    kind, colon, uri = spec.partition(":")
    if not colon or not uri or kind not in _KINDS:
        raise DataError(f"dataset {spec!r} is not KIND:URI with KIND one of {', '.join(_KINDS)}")
    return _KINDS[kind](uri)
