"""The variants of a picture in a feature cache: where each is kept, and which one an epoch reads.

Features of a picture on the canvas are variant 0, those of V - 1 random views of it the others. The cache has V columns; variant
v of the picture with key k lies in column (v - h(k)) mod V, h being a hash. An epoch reads the one column (epoch + seed) mod V.
So a step reads as many bytes as without variants, its pictures are still of all variants, and in V epochs every picture is
seen in each of them.
"""

from __future__ import annotations

import hashlib

VIEW_KEYS = ("global_scale", "flip", "brightness", "contrast", "saturation", "hue")
"""Keys of ``views`` that the variants depend on."""


def column_name(column: int) -> str:
    """Of the column of that number; the first is named as in a cache without variants."""
    return f"image_{column}" if column else "image"


def column_of_variant(variant: int, key: str, variants: int) -> int:
    """Number of the column in which a picture's variant lies."""
    return (variant - variant_seed(key, 0)) % variants


def column_of_epoch(epoch: int, seed: int, variants: int) -> int:
    """Number of the column that an epoch of a run with that seed reads."""
    return (epoch + seed) % variants


def variant_seed(key: str, variant: int) -> int:
    """What the random view of a picture follows from: the same for any run, 63 bits."""
    digest = hashlib.blake2b(f"{variant}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
