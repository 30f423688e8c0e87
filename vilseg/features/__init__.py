"""Feature cache: the features of frozen encoders, computed once so that training reads them instead of images and texts.

A cache is a directory with one Parquet file for each shard of the data source. The columns of a file are:

- ``key`` and ``captions``: as in the source.
- ``image``: float16 (N, F), the patch features of the image after it was cropped to a square of ``data.canvas`` pixels a side.
  If the encoder also returns a global feature (such as a class token), it is one more row at the end.
- ``caption_features``: one float16 row for each caption; null if caption features are not cached, because the text encoder is
  trained or starts with random weights.
- If ``data.cache_variants`` is above 1, one column for each further variant of the image (see ``vilseg.data.cached_views``).

The name of the directory is the cache key: a hash of everything that the features depend on. A different encoder, square size
or source, or a rewritten shard, gives a different key; caches with other keys stay unchanged. ``manifest.json`` is written last,
so a directory without it is incomplete. A later run completes it: existing shards are kept and only missing ones are written.

``encoders`` loads the encoders of a run, ``key`` computes the key, ``writer`` encodes one shard,
``manifest`` describes the whole cache.
This package does not import Ray; ``jobs.train.feature_cache`` runs a `FeatureWriter` in each of many Ray actors.
"""
