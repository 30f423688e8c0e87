"""Configuration of the image-text pairs: sources, selection of texts, filters and decoding."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from vilseg import storage
from vilseg.config.base import ConfigPart, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt
from vilseg.config.locations import Uri


class ColumnsConfig(ConfigPart):
    """Names of the columns in Parquet pair shards, and of the fields in the caption files of ``vilseg ingest``."""

    key: str = "key"
    """Column with the unique name of a pair; the row number is used if there is no such column."""
    image: str = "image"
    """Column with the encoded image bytes, or with a struct that has the field ``bytes``, as Hugging Face datasets write it."""
    path: str = "path"
    """Column with the URI of an image, absolute or relative to the shard's folder; used if there is no ``image`` column."""
    caption: str = "caption"
    captions: str = "captions"


class TextConfig(ConfigPart):
    """Relative probabilities with which the text of a pair is drawn from its captions, alt-text and tags in each epoch.

    Kinds of text that a pair lacks are ignored. A kind of weight 0 is used only if the pair has no kind of positive weight; then
    captions come before alt-text, and alt-text before tags.
    """

    caption: NonNegative = 1.0
    """Weight of all captions of a pair together; one of them is drawn in each epoch."""
    alt: NonNegative = 0.0
    tags: NonNegative = 0.0
    """Weight of the hashtags and keywords, which are cleaned and joined by commas."""


class FiltersConfig(ConfigPart):
    """Criteria for leaving out pairs, which are counted separately from bad pairs. The defaults leave none out."""

    min_words: NonNegativeInt = 0
    """Minimum number of words of a text; a pair is left out if none of its texts passes."""
    max_words: PositiveInt | None = None
    min_characters: NonNegativeInt = 0
    """Minimum number of characters of a text, for languages without spaces between words, in which a sentence counts as one
    word."""
    max_characters: PositiveInt | None = None
    junk: bool = False
    """If true, leave out texts without meaning in any language: codes, numbers, file names, repetitions of one letter."""
    min_side: PositiveInt = 1
    """Minimum length of the image's shorter side in pixels, read from the image header."""
    max_aspect: Annotated[float, Field(ge=1)] | None = None
    """Maximum ratio of the image's longer side to its shorter side."""


class WeightedSource(ConfigPart):
    """One of several sources of pairs, with its weight."""

    source: Uri
    """URI of pair shards, as for ``data.source``."""
    weight: Positive = 1.0
    """Relative number of pairs drawn from this source; each source has its own epochs."""


class DataConfig(ConfigPart):
    """Sources of image-text pairs and how they are read.

    Example:
        >>> DataConfig(source="s3://bucket/pairs").sources[""].weight
        1.0
    """

    source: Uri | None = None
    """URI of a folder of pair shards (tar or Parquet), or of a single shard. Training needs either this key or ``mix``."""
    mix: list[WeightedSource] = []
    """Several weighted sources, instead of ``source``."""
    shuffle_shards: PositiveInt = 1
    """Number of shards whose pairs are shuffled together. One shard of 1,000 to 10,000 pairs is comparable to other shuffle
    buffers (5,000 pairs in OpenCLIP). Shards sorted by topic need more, for example 8. The memory is that of one shard in any
    case."""
    held_out: Uri | None = None
    """URI of pair shards that are excluded from training and on which metrics are measured, for example by `vilseg tune`. It may
    be a file or folder within ``source``."""
    columns: ColumnsConfig = ColumnsConfig()
    canvas: PositiveInt = 224
    """Side in pixels of the square image (canvas) that a photo is decoded to: its shorter side is resized to this length and its
    longer side is cropped at a random position."""
    max_pixels: PositiveInt = 100_000_000
    """Maximum number of pixels of an image; an image whose header states more is rejected before decoding."""
    max_bad_share: Fraction = 0.05
    """Maximum fraction of bad pairs among the pairs read so far; the run stops above it."""
    text: TextConfig = TextConfig()
    filters: FiltersConfig = FiltersConfig()
    feature_cache: Uri | None = None
    """URI of a feature cache, the precomputed patch features of a frozen image encoder, which training reads instead of
    images."""
    cache_variants: PositiveInt = 1
    """Number of feature sets of each image in the feature cache, of which an epoch reads one. The first is computed from the
    image center, the others from random views of canvas size, by ``global_scale``, ``flip`` and the colour settings of ``views``.
    Encoding time and storage grow with this number; the amount read per epoch does not."""

    @property
    def sources(self) -> dict[str, WeightedSource]:
        """The sources by name; empty if no source is set.

        A source of ``mix`` is named by the last component of its URI, with a number in front if names repeat; ``source`` is "".
        """
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
