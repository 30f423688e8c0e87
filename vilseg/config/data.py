"""Sources of pairs, filters and decoding: a part of the run configuration."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from vilseg import storage
from vilseg.config.base import ConfigPart, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt
from vilseg.config.locations import Uri


class ColumnsConfig(ConfigPart):
    """Names of the columns in Parquet pair shards."""

    key: str = "key"
    """Unique name of a pair; the row number stands in where the column is absent."""
    image: str = "image"
    """Encoded image bytes (or a struct with ``bytes``, as Hugging Face datasets write it)."""
    path: str = "path"
    """URI of an image, absolute or beside the shard; used where there is no ``image`` column."""
    caption: str = "caption"
    captions: str = "captions"


class TextConfig(ConfigPart):
    """Weights of the kinds of text from which a pair's text of an epoch is drawn. Kinds that a pair lacks are left out; kinds
    of weight 0 are used only if there is nothing else, alt-text before tags."""

    caption: NonNegative = 1.0
    """All captions of a pair together; which of them, is chosen anew each epoch."""
    alt: NonNegative = 0.0
    tags: NonNegative = 0.0
    """Hashtags and keywords, cleaned and joined by commas."""


class FiltersConfig(ConfigPart):
    """Pairs to leave out; they are counted by themselves and are not bad pairs. Defaults leave none out."""

    min_words: NonNegativeInt = 0
    """Texts with fewer are left out, and pairs without any other."""
    max_words: PositiveInt | None = None
    min_characters: NonNegativeInt = 0
    """Like ``min_words``, for languages that do not part words by spaces, where a sentence is one word."""
    max_characters: PositiveInt | None = None
    junk: bool = False
    """Leave out texts that say nothing in any language: codes, numbers, file names, one letter over and over."""
    min_side: PositiveInt = 1
    """Pixels of the shorter side, from the image header."""
    max_aspect: Annotated[float, Field(ge=1)] | None = None
    """Longer side over the shorter."""


class WeightedSource(ConfigPart):
    """One of several sources of pairs."""

    source: Uri
    """URI of pair shards, as ``data.source``."""
    weight: Positive = 1.0
    """Relative number of pairs drawn from it; each source goes through its own epochs."""


class DataConfig(ConfigPart):
    """Sources of image-text pairs and how they are read.

    Example:
        >>> DataConfig(source="s3://bucket/pairs").sources[""].weight
        1.0
    """

    source: Uri | None = None
    """URI of pair shards (tar or Parquet), a folder or a single file. This or ``mix`` is needed for training."""
    mix: list[WeightedSource] = []
    """Several sources in the place of one."""
    shuffle_shards: PositiveInt = 1
    """Shards whose pairs are mixed with each other. One of 1,000 to 10,000 pairs is as much as others shuffle in (5,000 pairs,
    OpenCLIP); shards sorted by topic need more, 8 say. Memory stays that of one shard."""
    held_out: Uri | None = None
    """URI of pair shards that are never trained on: `vilseg tune` measures by them. May be a file or folder of ``source``."""
    columns: ColumnsConfig = ColumnsConfig()
    canvas: PositiveInt = 224
    """Side in pixels of the square that images are decoded to: shorter side resized, longer side cropped at random."""
    max_pixels: PositiveInt = 100_000_000
    """Images whose header announces more pixels are rejected before decoding."""
    max_bad_share: Fraction = 0.05
    """The run stops when more than this fraction of the pairs read so far could not be read."""
    text: TextConfig = TextConfig()
    filters: FiltersConfig = FiltersConfig()
    feature_cache: Uri | None = None
    """URI of patch features written once for a frozen image encoder; training then reads features, not images."""
    cache_variants: PositiveInt = 1
    """Feature sets of each image in the feature cache, of which an epoch takes one: that of the image center, and those of
    random views by ``global_scale``, ``flip`` and the colours of ``views``, as large as the canvas. The encoding and the storage
    are so many times as much; an epoch reads as much as with one."""

    @property
    def sources(self) -> dict[str, WeightedSource]:
        """The sources by name: the last part of the URI, numbered where two have the same; "" where there is no mix. Empty
        where no source is set."""
        if not self.mix:
            return {"": WeightedSource(source=self.source)} if self.source else {}
        last = [storage.name(part.source) for part in self.mix]
        if len(set(last)) < len(last):
            last = [f"{number}-{name}" for number, name in enumerate(last)]
        return dict(zip(last, self.mix, strict=True))

    @model_validator(mode="after")
    def _one_way_to_name_sources(self) -> Self:
        if self.mix and self.source:
            raise ValueError("give either 'source' or 'mix', not both")
        uris = [part.source.rstrip("/") for part in self.mix]
        for uri in uris:
            if uris.count(uri) > 1:
                raise ValueError(f"mix names {uri} twice; give it once, with the sum of the weights")
        if self.mix and self.feature_cache:
            raise ValueError(
                "a feature_cache is made of one source; bring those of the mix together by `vilseg ingest`, or train "
                "without a cache"
            )
        return self

    @model_validator(mode="after")
    def _cached_as_it_is(self) -> Self:
        if self.cache_variants > 1 and not self.feature_cache:
            raise ValueError(
                "cache_variants are those of a feature_cache, and none is set; without one every view is new"
            )
        if self.feature_cache and (self.text != TextConfig() or self.filters != FiltersConfig()):
            raise ValueError(
                "a feature_cache holds every pair with all its texts alike; leave text and filters out, or filter the pairs "
                "by `vilseg ingest` first"
            )
        return self
