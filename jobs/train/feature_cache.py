"""Feature cache (``vilseg.features``) written by a pool of Ray actors, each of which processes one shard at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from cluster.ray_session import Session, find_user_error
from vilseg import storage
from vilseg.config import RunConfig
from vilseg.data.shards import list_shards
from vilseg.errors import ConfigError
from vilseg.features.encoders import FrozenEncoders, load_frozen_encoders
from vilseg.features.key import cache_key, shard_file_name
from vilseg.features.manifest import CacheManifest, ShardSummary, delete_other_shards
from vilseg.features.writer import FeatureWriter
from vilseg.training.run_setup import require_sources


def main(
    config: RunConfig, session: Session, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> CacheManifest:
    """Write the features of ``data.source`` under ``data.feature_cache``, unless a complete cache exists; return its manifest.

    Args:
        config: configuration of the run; its image encoder must be frozen.
        session: the cluster.
        progress: function called with the number of shards done and the number of all shards.

    Raises:
        ConfigError: the image encoder is not frozen, or a required configuration key is missing.
        DataError: more than ``data.max_bad_share`` of the pairs cannot be read.
        ModelError: an encoder cannot be loaded.
    """
    assert config.data.feature_cache is not None
    if not config.model.image_encoder.frozen:
        raise ConfigError(
            "data.feature_cache needs model.image_encoder.frozen=true: features of a network that learns change"
        )
    (source,) = (part.source for part in require_sources(config).values())  # RunConfig refuses a mix with a cache
    storage.require_bucket(config.data.feature_cache)
    shards = list_shards(storage.absolute(source), without=config.data.held_out)
    encoders = load_frozen_encoders(config)
    uri = storage.join(storage.absolute(config.data.feature_cache), cache_key(config, shards, encoders))
    complete = CacheManifest.read(uri, source_shards=len(shards))
    if complete is not None:
        return complete
    names = [shard_file_name(entry.relative) for entry in shards]
    delete_other_shards(uri, names)
    rows = [{"source": entry.uri, "target": storage.join(uri, name)} for entry, name in zip(shards, names, strict=True)]
    summaries = _write_shards(rows, encoders, config, session, progress)
    manifest = CacheManifest.of_shards(uri, summaries, max_bad_share=config.data.max_bad_share)
    manifest.write()
    return manifest


def _write_shards(
    rows: list[dict[str, str]],
    encoders: FrozenEncoders,
    config: RunConfig,
    session: Session,
    progress: Callable[[int, int], None],
) -> list[ShardSummary]:
    """Write the cache shard ``target`` of each row from its shard ``source``, with one actor per GPU, or per CPU without GPUs."""
    actors = max(1, min(len(rows), session.gpus or session.cpus))
    data = config.data
    settings = {
        "canvas": data.canvas,
        "max_pixels": data.max_pixels,
        "columns": data.columns,
        "variants": data.cache_variants,
        "views": config.views,
    }
    shared = ray.put((encoders.images, encoders.texts))
    written = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _FeatureActor,
        # Inside a list Ray does not resolve the reference: each actor fetches the encoders itself.
        fn_constructor_args=([shared], settings, max(1, session.cpus // actors)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.9 * session.cpus / actors,
        num_gpus=1 if session.gpus else 0,
    )
    summaries: list[ShardSummary] = []
    progress(0, len(rows))
    try:
        for row in written.iter_rows():
            summaries.append(row)  # type: ignore[arg-type]  # the columns are the keys of the dict that the actor returns
            progress(len(summaries), len(rows))
    except ray.exceptions.RayError as error:
        raise find_user_error(error) or error from None
    return summaries


class _FeatureActor:
    """Actor that holds a `FeatureWriter`, so that the encoders are loaded once per actor."""

    def __init__(self, encoders: list[Any], settings: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        image_encoder, text_encoder = ray.get(encoders[0])
        self._writer = FeatureWriter(image_encoder, text_encoder, **settings)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with storage.retrying():
            summary = self._writer.write(str(batch["source"][0]), str(batch["target"][0]))
        return {name: np.array([value]) for name, value in summary.items()}
