"""Columns of a feature cache that contain the variants of each image, and the column that an epoch reads.

Variant 0 of an image contains the features of its central square, resized to the canvas (the side in pixels of the square images
that encoders get); the other V - 1 variants contain the features of random views of the image. The cache has V columns. Variant v
of the image with key k is in column (v - h(k)) mod V, where h is a hash. An epoch reads only column (epoch + seed) mod V. A step
therefore reads as many bytes as without variants, its images are of different variants, and V epochs read every variant of every
image once.
"""

from __future__ import annotations

import hashlib

VIEW_KEYS = ("global_scale", "flip", "brightness", "contrast", "saturation", "hue")
"""Keys of the configuration section ``views`` on which the variants depend."""


def column_name(column: int) -> str:
    """Return the name of column number ``column``; column 0 has the same name as in a cache without variants.

    >>> column_name(0), column_name(2)
    ('image', 'image_2')
    """
    return f"image_{column}" if column else "image"


def column_of_variant(variant: int, key: str, variants: int) -> int:
    """Return the number of the column that contains ``variant`` of the image with ``key``.

    Args:
        variant: number of the variant, from 0.
        key: key of the pair.
        variants: number of variants, V.
    """
    return (variant - variant_seed(key, 0)) % variants


def column_of_epoch(epoch: int, seed: int, variants: int) -> int:
    """Return the number of the column that ``epoch`` of a run with ``seed`` reads, out of ``variants`` columns."""
    return (epoch + seed) % variants


def variant_seed(key: str, variant: int) -> int:
    """Return the 63-bit seed of the random view for ``variant`` of the image with ``key``; it is the same in every run."""
    digest = hashlib.blake2b(f"{variant}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
