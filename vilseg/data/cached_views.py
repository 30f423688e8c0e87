"""Variants of an image in a feature cache: the column that holds each, and the column that an epoch reads.

Variant 0 of an image holds the features of its middle on the canvas, the other V - 1 variants those of random views of it. The
cache has V columns; variant v of the image with key k lies in column (v - h(k)) mod V, where h is a hash. An epoch reads the one
column (epoch + seed) mod V. So a step reads as many bytes as without variants, its images are of all variants, and in V epochs
every variant of every image is read once.
"""

from __future__ import annotations

import hashlib

VIEW_KEYS = ("global_scale", "flip", "brightness", "contrast", "saturation", "hue")
"""Keys of ``views`` that the variants depend on."""


def column_name(column: int) -> str:
    """Return the name of column number ``column``; the first is named as in a cache without variants.

    >>> column_name(0), column_name(2)
    ('image', 'image_2')
    """
    return f"image_{column}" if column else "image"


def column_of_variant(variant: int, key: str, variants: int) -> int:
    """Return the number of the column that holds a variant of the image with that key."""
    return (variant - variant_seed(key, 0)) % variants


def column_of_epoch(epoch: int, seed: int, variants: int) -> int:
    """Return the number of the column that an epoch of a run with that seed reads."""
    return (epoch + seed) % variants


def variant_seed(key: str, variant: int) -> int:
    """Return the seed of a random view of the image with that key: 63 bits, the same in any run."""
    digest = hashlib.blake2b(f"{variant}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
