"""Synthetic scenes: shards of image-caption pairs for training, and a dataset of other scenes with masks for evaluation."""

from __future__ import annotations

from typing import Any

import ray

from vilseg import storage
from vilseg.data.shards import write_index, write_tar
from vilseg.data.synthetic import scenes

_SHARD = 500


def main(pairs_uri: str, unseen_uri: str, *, pairs: int, unseen: int, size: int, seed: int) -> None:
    """Draw scenes in parallel on the connected cluster and write them to storage.

    Args:
        pairs_uri: folder for the training shards.
        unseen_uri: folder for the evaluation images and masks.
        pairs: number of training pairs.
        unseen: number of evaluation scenes.
        size: side of the square images in pixels.
        seed: random seed.
    """
    shard: Any = ray.remote(num_cpus=1)(_write_shard)
    dataset: Any = ray.remote(num_cpus=1)(scenes.write_masked_dataset)
    masked = dataset.remote(unseen_uri, unseen, seed, size)
    written = [
        shard.remote(storage.join(pairs_uri, f"{number:05d}.tar"), start, min(_SHARD, pairs - start), size, seed)
        for number, start in enumerate(range(0, pairs, _SHARD))
    ]
    write_index(pairs_uri, ray.get(written))
    ray.get(masked)


def _write_shard(uri: str, start: int, count: int, size: int, seed: int) -> tuple[str, int]:
    drawn = scenes.pairs(count, seed, size, start=start)
    members = ((pair.key, pair.image, "jpg", {"captions": list(pair.captions)}) for pair in drawn)
    return storage.name(uri), write_tar(uri, members)
