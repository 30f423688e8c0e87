"""``manifest.json`` of a feature cache: sizes of the features, number of pairs in every shard, and rejected pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypedDict

from vilseg import storage
from vilseg.data.shards import MANIFEST, PARQUET, write_index
from vilseg.errors import DataError


class RejectedPair(NamedTuple):
    """Image-caption pair that could not be read and is therefore not in the cache."""

    shard: str
    """File name of the cached shard."""
    key: str
    """Key of the pair in the source."""
    reason: str
    """Error message."""


class ShardSummary(TypedDict):
    """Summary of one cached shard, stored as JSON in the metadata of its Parquet file."""

    target: str
    """URI of the cached shard."""
    pairs: int
    """Number of image-caption pairs in the cached shard; rejected pairs are not counted."""
    patches: int
    """Number of feature rows per image, as in `CacheManifest`."""
    features: int
    """Number of values in a feature row."""
    rejected: str
    """JSON list of ``[key, reason]`` for each pair that could not be read. A key may occur more than once."""


@dataclass(frozen=True)
class CacheManifest:
    """Contents of a complete feature cache."""

    uri: str
    """URI of the cache directory, a subdirectory of ``data.feature_cache``."""
    patches: int
    """Number of feature rows per image: one for each patch, and one more if the encoder returns a global feature."""
    features: int
    """Number of values in a feature row."""
    pairs: dict[str, int] = field(default_factory=dict)
    """Number of pairs in each cached shard, by file name."""
    rejected: tuple[RejectedPair, ...] = ()

    @classmethod
    def of_shards(cls, uri: str, shards: Sequence[ShardSummary], *, max_bad_share: float) -> CacheManifest:
        """Combine the summaries of all shards into the manifest of the cache.

        Args:
            uri: directory of the cache.
            shards: summaries of all shards; at least one.
            max_bad_share: maximum accepted fraction, in 0..1, of pairs that could not be read.

        Raises:
            DataError: a larger fraction than ``max_bad_share`` of all pairs could not be read.
        """
        by_name = {storage.name(shard["target"]): shard for shard in shards}
        rejected = tuple(
            RejectedPair(name, key, reason)
            for name, shard in by_name.items()
            for key, reason in json.loads(shard["rejected"])
        )
        pairs = {name: int(shard["pairs"]) for name, shard in by_name.items()}
        total = sum(pairs.values()) + len(rejected)
        if len(rejected) > max_bad_share * total:
            first = rejected[0]
            raise DataError(
                f"{len(rejected)} of {total} pairs could not be read, more than data.max_bad_share={max_bad_share} allows; "
                f"the first was {first.key}: {first.reason}"
            )
        return cls(uri, int(shards[0]["patches"]), int(shards[0]["features"]), pairs, rejected)

    @classmethod
    def read(cls, uri: str, source_shards: int) -> CacheManifest | None:
        """Read the manifest of the cache at ``uri``; return None if the cache is incomplete.

        Args:
            uri: directory of the cache.
            source_shards: number of shards of the source. A cache with another number of shards counts as incomplete, because
                earlier versions wrote the features of ``a/0.tar`` and ``a_0.tar`` to the same file.
        """
        place = storage.join(uri, MANIFEST)
        if not storage.exists(place):
            return None
        values: dict[str, Any] = json.loads(storage.read_text(place))
        if len(values["pairs"]) != source_shards:
            return None
        rejected = values["rejected"]
        if isinstance(rejected, dict):  # earlier versions wrote a mapping from key to reason
            rejected = [("", key, reason) for key, reason in rejected.items()]
        return cls(
            uri, values["patches"], values["features"], values["pairs"], tuple(RejectedPair(*r) for r in rejected)
        )

    def write(self) -> None:
        """Write ``index.json``, then ``manifest.json``, which marks the cache as complete."""
        write_index(self.uri, self.pairs.items())
        storage.write_text(storage.join(self.uri, MANIFEST), json.dumps(asdict(self), indent=1, ensure_ascii=False))


def delete_other_shards(uri: str, file_names: Sequence[str]) -> None:
    """Delete the shards of an incomplete cache that are not in ``file_names``, because training would read them too."""
    if not storage.exists(uri):
        return
    for entry in storage.list_files(uri, suffixes={PARQUET}):
        if entry.relative not in file_names:
            storage.delete(entry.uri)
