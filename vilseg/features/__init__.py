"""Feature cache: the features of frozen encoders, computed once so that training reads them instead of images and texts.

A cache is a directory of pair shards, one Parquet file for each shard of the source. Its columns:

- ``key`` and ``captions``, as in the source;
- ``image``: float16 (N, F), the patch features of the image on its canvas. Where the encoder has an embedding of its own for the
  image as a whole, that is one more row at the end;
- ``caption_features``: one float16 row for each caption; null where the text encoder is not frozen;
- with ``data.cache_variants`` above 1, one column for each further variant (see ``vilseg.data.cached_views``).

The directory's name is a key: the hash of everything that the features depend on. Another encoder, canvas or source, or a shard
that was written anew, has another key and leaves earlier caches as they are. ``manifest.json`` is written last. A directory
without it is incomplete; the shards that are there are kept and only the missing ones are written.

``encoders`` loads the encoders of a run, ``key`` computes the key, ``writer`` encodes one shard,
``manifest`` describes the whole cache.
Nothing here knows Ray: ``jobs.train.feature_cache`` runs a `FeatureWriter` in each of many actors.
"""
