"""Datasets of images with ground-truth masks."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import numpy as np

from vilseg import storage
from vilseg.errors import DataError
from vilseg.evaluation.benchmark_datasets import LAYOUTS, PublishedDataset
from vilseg.evaluation.image_and_mask import ImageFiles, MaskedImage, read_image_and_mask, values_of

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class MaskedDataset(Protocol):
    """Interface of a dataset to evaluate on: class names, number of images, and iterators that each begin at the first image."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the index of a name is its mask value."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[MaskedImage]: ...


class FolderDataset(ImageFiles):
    """Dataset of `images/NAME.jpg` (or png, webp), `masks/NAME.png` and `classes.txt` in one folder or S3 prefix.

    Masks are grey PNGs of 8 or 16 bit, or PNGs with a palette. The pixel value is the class id; 255 (16 bit: 65535) is
    ignored. Line i of `classes.txt`, counted from 0, has the name of class id i.

    Args:
        uri: URI of the folder. The constructor lists the files; iteration reads images and masks one by one.

    Raises:
        DataError: `classes.txt` or the images are missing, or an image has no mask. Iterating raises it if a file cannot be
            decoded, a mask and its image differ in size, or a mask value is no class.
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
        files: list[tuple[str, ...]] = []
        for entry in sorted(images, key=lambda entry: entry.relative):
            name = entry.relative.rsplit(".", 1)[0]
            if f"{name}.png" not in masks:
                raise DataError(
                    f"image {entry.uri} has no mask: write one to {storage.join(uri, 'masks', name + '.png')} "
                    "or take the image away"
                )
            files.append((name, entry.uri, masks[f"{name}.png"]))
        self._files = files

    def __iter__(self) -> Iterator[MaskedImage]:
        for name, image_uri, mask_uri in self._files:
            image, mask = read_image_and_mask(image_uri, mask_uri)
            ignore = int(np.iinfo(mask.dtype).max)
            self._check_values(mask, ignore, mask_uri)
            yield MaskedImage(name=name, image=image, mask=mask, ignore=ignore)

    def _check_values(self, mask: np.ndarray, ignore: int, uri: str) -> None:
        values = values_of(mask)
        wrong = values[(values >= len(self.classes)) & (values != ignore)]
        if wrong.size:
            raise DataError(
                f"mask {uri} has the value {wrong[0]}, which is no class: classes.txt names 0 to "
                f"{len(self.classes) - 1}, and {ignore} means ignore in a mask of {mask.dtype.itemsize * 8} bit"
            )


class FirstImages:
    """First `count` images of a dataset, read once and kept in memory for repeated evaluation."""

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


_KINDS: dict[str, Callable[[str], FolderDataset | PublishedDataset]] = {
    "folder": FolderDataset,
    **{layout.kind: partial(PublishedDataset, layout=layout) for layout in LAYOUTS},
}


def open_dataset(spec: str) -> FolderDataset | PublishedDataset:
    """Open the dataset that a specification describes.

    Args:
        spec: `KIND:URI`, such as `folder:s3://bucket/scenes` or `voc:data/VOCdevkit/VOC2012`.

    Raises:
        DataError: the kind is unknown, or the URI does not hold a dataset of that kind.
    """
    kind, colon, uri = spec.partition(":")
    if not colon or not uri or kind not in _KINDS:
        raise DataError(f"dataset {spec!r} is not KIND:URI with KIND one of {', '.join(_KINDS)}")
    return _KINDS[kind](uri)
