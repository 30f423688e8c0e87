"""``manifest.json`` of a feature cache: the sizes of its features, the pairs of every shard, and the pairs left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypedDict

from vilseg import storage
from vilseg.data.shards import MANIFEST, PARQUET, write_index
from vilseg.errors import DataError


class RejectedPair(NamedTuple):
    """A pair that could not be read, and is not in the cache."""

    shard: str
    """File name of the cached shard."""
    key: str
    reason: str


class ShardSummary(TypedDict):
    """Contents of one cached shard, as its Parquet metadata holds them."""

    target: str
    """URI of the cached shard."""
    pairs: int
    patches: int
    features: int
    rejected: str
    """JSON list of the key and the reason of each pair that could not be read. Keys may repeat."""


@dataclass(frozen=True)
class CacheManifest:
    """Contents of a complete feature cache."""

    uri: str
    """Directory of the cache, below ``data.feature_cache``."""
    patches: int
    """Rows of an image: its patches, and one more where the encoder has an embedding of its own for the image as a whole."""
    features: int
    pairs: dict[str, int] = field(default_factory=dict)
    """Number of pairs by file name."""
    rejected: tuple[RejectedPair, ...] = ()

    @classmethod
    def of_shards(cls, uri: str, shards: Sequence[ShardSummary], *, max_bad_share: float) -> CacheManifest:
        """Combine the summaries of all shards, at least one.

        Raises:
            DataError: more than the fraction ``max_bad_share`` of all pairs could not be read.
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
        """Read the manifest of the cache at ``uri``; None where the cache is not complete.

        Args:
            uri: directory of the cache.
            source_shards: number of shards of the source. Caches of earlier versions wrote ``a/0.tar`` and ``a_0.tar`` to one
                file; one that has fewer shards than its source is incomplete.
        """
        place = storage.join(uri, MANIFEST)
        if not storage.exists(place):
            return None
        values: dict[str, Any] = json.loads(storage.read_text(place))
        if len(values["pairs"]) != source_shards:
            return None
        rejected = values["rejected"]
        if isinstance(rejected, dict):  # reasons by key, as earlier versions wrote them
            rejected = [("", key, reason) for key, reason in rejected.items()]
        return cls(
            uri, values["patches"], values["features"], values["pairs"], tuple(RejectedPair(*r) for r in rejected)
        )

    def write(self) -> None:
        """Write ``index.json`` and, last, ``manifest.json``."""
        write_index(self.uri, self.pairs.items())
        storage.write_text(storage.join(self.uri, MANIFEST), json.dumps(asdict(self), indent=1, ensure_ascii=False))


def delete_other_shards(uri: str, file_names: Sequence[str]) -> None:
    """Delete shards in an incomplete cache that are none of ``file_names``: training would read them beside the others."""
    if not storage.exists(uri):
        return
    for entry in storage.list_files(uri, suffixes={PARQUET}):
        if entry.relative not in file_names:
            storage.delete(entry.uri)
