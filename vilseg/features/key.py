"""Key of a feature cache, which names its directory, and file names of its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.cached_views import VIEW_KEYS
from vilseg.data.shards import PARQUET
from vilseg.features.encoders import FrozenEncoders


def cache_key(config: RunConfig, shards: Sequence[storage.FileEntry], encoders: FrozenEncoders) -> str:
    """Return the hash of everything that cached features and captions depend on, as 16 hexadecimal digits.

    The hash does not include the contents of a source shard but its relative path, size and modification time, because reading
    every shard would cost as much as writing the cache. The size alone is not enough: tar files are padded, so a rewritten one
    often has the same size.

    Args:
        config: configuration of the run.
        shards: shards of the data source.
        encoders: the encoders whose features are cached.
    """
    data, model = config.data, encoders.settings
    # Only settings that change the output for the same weights; the path that weights were loaded from has no effect on it.
    text = model.text_encoder.model_dump(mode="json", include={"architecture", "sizes", "pooling", "max_tokens"})
    depends_on = [
        storage.absolute(str(data.source)),
        [(entry.relative, entry.size, entry.modified_ns) for entry in shards],
        data.columns.model_dump(),
        data.canvas,
        data.max_pixels,  # images with more pixels are left out
        data.cache_variants,
        config.views.model_dump(include=set(VIEW_KEYS)) if data.cache_variants > 1 else None,
        model.image_encoder.model_dump(mode="json", exclude={"checkpoint", "frozen"}),
        None if encoders.texts is None else text,
    ]
    digest = hashlib.sha256(json.dumps(depends_on).encode())
    for module in (encoders.images, encoders.texts):
        for name, tensor in module.state_dict().items() if module is not None else ():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def shard_file_name(relative: str) -> str:
    """Return the file name of the cached shard for the source shard at the relative path ``relative``.

    Different paths give different names. A cache has no subdirectories, so ``/`` is escaped as in a JSON pointer (RFC 6901):
    ``~`` becomes ``~0``, then ``/`` becomes ``~1``.

    Example:
        >>> shard_file_name("00001.tar")
        '00001.tar.parquet'
        >>> shard_file_name("a/0.tar"), shard_file_name("a_0.tar")
        ('a~10.tar.parquet', 'a_0.tar.parquet')
    """
    return relative.replace("~", "~0").replace("/", "~1") + PARQUET
