"""Reader of training batches, which reads, decodes and collates the pairs that :mod:`vilseg.data.sampler` selects for a step.

All pairs of a window (the pairs of several successive steps) are read and shuffled, and then divided into batches. An unusable
pair is replaced by another one of the window.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from vilseg import storage
from vilseg.config.data import ColumnsConfig, FiltersConfig
from vilseg.data.cached_views import column_name, column_of_epoch
from vilseg.data.image_decoding import crop_to_square, decode_image, image_size
from vilseg.data.sampler import ReadTask, Segment, Window, apportion
from vilseg.data.shards import BadPair, Pair, Shard, count_pairs, list_shards, read_index, read_shard
from vilseg.data.text_selection import TextSelector, choose_text
from vilseg.errors import DataError, FilteredError
from vilseg.text.noun_phrases import NounPhrases

_SAMPLE_SHARDS = 20
"""Minimum number of shards from which a sample of pairs is read; if there are fewer shards, all are read."""
MAX_PHRASES_PER_PAIR = 32
"""Number of columns for noun phrases in a batch, which is more than the captions of one image contain."""


@dataclass(frozen=True)
class WorkerBatch:
    """Batch of B pairs for one worker in one step, as numpy arrays, which Ray transfers without a copy."""

    images: np.ndarray
    """RGB images. Shape: (B, canvas, canvas, 3), uint8. With a feature cache, patch features of N patches: (B, N, F), float16, or
    (B, N + 1, F) with the feature of the whole image."""
    tokens: np.ndarray
    """Token ids, padded to the maximum length T of the model. Shape: (B, T), int32. With cached caption features: (B, F),
    float16."""
    phrases: np.ndarray
    """Indices of the noun phrases of each pair, filled up with -1. Shape: (B, 32), int32."""
    seeds: np.ndarray
    """Seeds that depend on pair and epoch and determine all augmentation, on any worker. Shape: (B,), int64."""
    keys: tuple[str, ...]


_ARRAYS = ("images", "tokens", "phrases", "seeds")


def pack(batches: Sequence[WorkerBatch]) -> dict[str, np.ndarray]:
    """Convert a worker's batches of S steps to one table row: arrays of shape (1, S * B, ...), the number S, and the keys."""
    keys = [[key.replace("\n", " ") for key in batch.keys] for batch in batches]
    row = {name: np.concatenate([getattr(batch, name) for batch in batches])[None] for name in _ARRAYS}
    row["steps"] = np.array([len(batches)])
    row["keys"] = np.array(["\n".join(itertools.chain.from_iterable(keys))], dtype=object)
    return row


def unpack(row: dict[str, np.ndarray]) -> Iterator[WorkerBatch]:
    """Yield the batches in a row made by :func:`pack`."""
    steps = int(row["steps"][0])
    keys = str(row["keys"][0]).split("\n")
    batch_size = len(keys) // steps
    for start in range(0, len(keys), batch_size):
        part = slice(start, start + batch_size)
        images, tokens, phrases, seeds = (row[name][0][part] for name in _ARRAYS)
        yield WorkerBatch(images, tokens, phrases, seeds, tuple(keys[part]))


def decode_to_canvas(
    data: bytes, seed: int, *, canvas: int, max_pixels: int, filters: FiltersConfig | None = None
) -> np.ndarray:
    """Decode an image to a square, cropping the longer side at a random position determined by ``seed``.

    Args:
        data: encoded image.
        seed: seed of the crop position.
        canvas: side of the square in pixels.
        max_pixels: maximum width x height in the image's header.
        filters: limits on the image size; None sets no limit.

    Returns:
        RGB image. Shape: (canvas, canvas, 3), uint8.

    Raises:
        DataError: the data is not an image, is damaged, or has too many pixels.
        FilteredError: the filters leave out images of this size.
    """
    if filters is not None and (filters.min_side > 1 or filters.max_aspect is not None):
        _check_shape(*image_size(data), filters)
    image = decode_image(data, max_pixels=max_pixels, min_side=canvas)
    return crop_to_square(image, canvas, (seed & 0xFFFF) / 0xFFFF)


def _check_shape(width: int, height: int, filters: FiltersConfig) -> None:
    short, long = sorted((width, height))
    if short < filters.min_side:
        raise FilteredError(f"{width} x {height} pixels, a side shorter than {filters.min_side}")
    if filters.max_aspect is not None and long > filters.max_aspect * short:
        raise FilteredError(f"{width} x {height} pixels, longer than {filters.max_aspect} to 1")


def decode_features(data: bytes, seed: int, *, patches: int, features: int) -> np.ndarray:
    """Convert bytes of a feature cache to an array of shape (patches, features), float16; the seed is not used.

    Raises:
        DataError: the number of bytes is wrong.
    """
    if len(data) != 2 * patches * features:
        raise DataError(f"{len(data)} bytes of cached features where {patches} x {features} float16 were written")
    return np.frombuffer(data, np.float16).reshape(patches, features)


_Sample = tuple[np.ndarray, "str | np.ndarray", list[int], int, str]
"""Image array, caption or cached caption features, indices of noun phrases, seed, and key of a pair."""


class _Loaded(NamedTuple):
    pair: Pair
    epoch: int
    shard: str
    """URI of the shard."""


@dataclass(frozen=True, kw_only=True)
class BatchReader:
    """Reader that turns read tasks into worker batches; it is created once and sent to every reading process.

    Args:
        batch_size: number of pairs in a step, over all workers.
        workers: number of workers among which a step is divided.
        seed: seed of shuffling, choice of captions and augmentation.
        decode: function from image bytes and seed to an array, which raises DataError for a bad image.
        tokenize: function from B captions to token ids of shape (B, T), with constant T.
        nouns: noun phrases to find in the captions.
        columns: names of the columns of Parquet shards.
        selector: selector of the texts of a pair.
        variants: number of variants of every image in a feature cache, of which an epoch reads one.
        report: function called several times for each window with the number of pairs read and the list of bad and filtered
            pairs found since its previous call; it may raise to stop the run.

    Example:
        >>> import tempfile
        >>> from vilseg.data.sampler import PairSampler
        >>> from vilseg.data.shards import write_tar
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     number = write_tar(f"{folder}/0.tar", [(str(i), b"image", "jpg", {"caption": "a dog"}) for i in range(8)])
        ...     sampler = PairSampler(index_shards(folder), batch_size=4, seed=0)
        ...     reader = BatchReader(
        ...         batch_size=4,
        ...         workers=2,
        ...         seed=0,
        ...         decode=lambda data, seed: np.zeros((2, 2, 3), np.uint8),
        ...         tokenize=lambda captions: np.zeros((len(captions), 6), np.int32),
        ...     )
        ...     batches = [batch for task in sampler.read_tasks(0, 2) for batch in reader.read(task)]
        >>> [batch.images.shape for batch in batches]  # 2 steps of 2 workers
        [(2, 2, 2, 3), (2, 2, 2, 3), (2, 2, 2, 3), (2, 2, 2, 3)]
    """

    batch_size: int
    workers: int
    seed: int
    decode: Callable[[bytes, int], np.ndarray]
    tokenize: Callable[[Sequence[str]], np.ndarray]
    nouns: NounPhrases = field(default_factory=NounPhrases)
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    selector: TextSelector = field(default_factory=TextSelector)
    variants: int = 1
    report: Callable[[int, list[BadPair]], None] | None = None

    def read(self, task: ReadTask) -> Iterator[WorkerBatch]:
        """Yield the batches of a task, ordered by step and then by worker.

        An unusable pair is replaced by another one of its window, so that every batch is full.

        Raises:
            DataError: no pair of a window is usable, or ``report`` raised the error.
        """
        streams = _ShardStreams(self._begin)
        wanted = task.first_step + task.skip
        for number, window in enumerate(task.windows):
            if window.first_step + window.steps > wanted:
                yield from self._read_window(window, max(0, wanted - window.first_step), streams)
            streams.keep({_place(segment) for later in task.windows[number + 1 :] for segment in later.segments})

    def _begin(self, segment: Segment) -> Iterator[Pair | BadPair]:
        columns = self.columns
        if self.variants > 1:
            name = column_name(column_of_epoch(segment.epoch, self.seed, self.variants))
            columns = columns.replace(image=name)
        return read_shard(segment.uri, columns, self.selector)

    def _read_window(self, window: Window, skip: int, streams: _ShardStreams) -> Iterator[WorkerBatch]:
        with storage.retrying():
            pool, bad = self._load(window, streams)
        self._report(len(pool), bad)  # in one call, so that bad pairs are not counted before good ones
        reported = len(bad)
        order = np.random.default_rng((self.seed, window.first_step)).permutation(len(pool)).tolist()
        worker_size = self.batch_size // self.workers
        for start in range(skip * self.batch_size, window.steps * self.batch_size, worker_size):
            good = []
            for position in range(start, start + worker_size):
                sample = self._sample_at(pool, order, position, bad)
                if sample is None:
                    self._report(0, bad[reported:])
                    raise DataError(_no_usable_pair(window, bad))
                good.append(sample)
            self._report(0, bad[reported:])
            reported = len(bad)
            yield self._collate(good)

    def _load(self, window: Window, streams: _ShardStreams) -> tuple[list[_Loaded | None], list[BadPair]]:
        """Return the pairs of the window, with None in place of each unreadable pair, and the list of the unreadable pairs."""
        pool: list[_Loaded | None] = []
        bad: list[BadPair] = []
        for segment in window.segments:
            before = len(pool)
            for pair in streams.take(segment):
                if segment.source:  # pairs of two sources may have the same key
                    pair = replace(pair, key=f"{segment.source}/{pair.key}")
                if isinstance(pair, BadPair):
                    bad.append(replace(pair, shard=segment.uri))
                    pool.append(None)
                else:
                    pool.append(_Loaded(pair, segment.epoch, segment.uri))
            missing = len(segment) - (len(pool) - before)
            if missing:
                reason = f"{missing} pairs fewer than when the run began"
                bad.append(BadPair(storage.name(segment.uri), reason, shard=segment.uri))
                pool.extend([None] * missing)
        return pool, bad

    def _sample_at(
        self, pool: list[_Loaded | None], order: list[int], position: int, bad: list[BadPair]
    ) -> _Sample | None:
        """Return the pair at ``position`` of ``order`` if it is usable, otherwise a substitute; None if no pair is usable.

        The substitute is the first usable pair from half a window after ``position`` on, continuing at the start of ``order``. It
        therefore depends only on the position, is the same after a resumption, and is rarely in the same step.
        """
        middle = position + len(order) // 2
        for place in itertools.chain([position], range(middle, middle + len(order))):
            sample = self._sample(pool, order[place % len(order)], bad)
            if sample is not None:
                return sample
        return None

    def _sample(self, pool: list[_Loaded | None], index: int, bad: list[BadPair]) -> _Sample | None:
        entry = pool[index]
        if entry is None:
            return None
        pair, epoch, shard = entry
        seed = _pair_seed(self.seed, epoch, pair.key)
        try:
            image = self.decode(pair.image, seed)
        except DataError as error:
            bad.append(BadPair(pair.key, str(error), filtered=isinstance(error, FilteredError), shard=shard))
            pool[index] = None
            return None
        chosen = choose_text(pair.probabilities, seed) if pair.probabilities else seed % len(pair.captions)
        text = pair.captions[chosen] if pair.caption_features is None else _caption_row(pair, chosen)
        return image, text, self.nouns.find(pair.captions)[:MAX_PHRASES_PER_PAIR], seed, pair.key

    def _collate(self, samples: list[_Sample]) -> WorkerBatch:
        images, texts, phrases, seeds, keys = zip(*samples, strict=True)
        padded = np.full((len(samples), MAX_PHRASES_PER_PAIR), -1, dtype=np.int32)
        for row, found in enumerate(phrases):
            padded[row, : len(found)] = found
        tokens = self.tokenize(texts) if isinstance(texts[0], str) else np.stack(texts)
        return WorkerBatch(np.stack(images), tokens, padded, np.array(seeds, dtype=np.int64), tuple(keys))

    def _report(self, read: int, bad: list[BadPair]) -> None:
        if self.report is not None and (read or bad):
            self.report(read, bad)


class _ShardStreams:
    """Open shards, each at the position where its last segment ended."""

    def __init__(self, begin: Callable[[Segment], Iterator[Pair | BadPair]]) -> None:
        self._begin = begin
        self._begun: dict[_Place, tuple[Iterator[Pair | BadPair], int]] = {}

    def take(self, segment: Segment) -> list[Pair | BadPair]:
        """Return the pairs of a segment, skipping unread pairs before it in the shard."""
        pairs, position = self._begun.pop(_place(segment), (None, 0))
        if pairs is None or position > segment.start:
            pairs, position = self._begin(segment), 0
        found = list(itertools.islice(pairs, segment.start - position, segment.stop - position))
        self._begun[_place(segment)] = pairs, segment.stop
        return found

    def keep(self, places: Container[_Place]) -> None:
        """Close all shards except those with a key (source, URI, epoch) in ``places``."""
        self._begun = {place: stream for place, stream in self._begun.items() if place in places}


_Place = tuple[str, str, int]


def _place(segment: Segment) -> _Place:
    return segment.source, segment.uri, segment.epoch


def _no_usable_pair(window: Window, bad: Sequence[BadPair]) -> str:
    uris = ", ".join(sorted({segment.uri for segment in window.segments}))
    if all(pair.filtered for pair in bad):
        return (
            f"data.filters leave out every pair of {uris}, the first because of {bad[0].reason}; loosen them, or let more "
            "shards stand in for each other by data.shuffle_shards"
        )
    return f"no readable pair in {uris}; the first failed because {bad[0].reason}"


def index_shards(
    source: str, count: Callable[[list[str]], list[int]] | None = None, *, without: str | None = None, name: str = ""
) -> tuple[Shard, ...]:
    """Return the shards at ``source`` with the number of pairs in each, taken from ``index.json`` if listed there, else counted.

    Args:
        source: URI of a folder or a shard.
        count: function that counts the pairs of many shards, for example in parallel; None counts them sequentially.
        without: URI of shards to leave out; None leaves out none.
        name: name of the source in a mix.

    Raises:
        DataError: there are no shards at ``source``.
        StorageError: the URI cannot be read.
    """
    entries = list_shards(source, without=without)
    known = read_index(source)
    unknown = [entry.uri for entry in entries if entry.relative not in known]
    counts = dict(zip(unknown, count(unknown) if count else map(count_pairs, unknown), strict=True))
    return tuple(Shard(e.uri, counts[e.uri] if e.uri in counts else known[e.relative], name) for e in entries)


def sample_pairs(
    shards: Sequence[Shard], columns: ColumnsConfig, limit: int, selector: TextSelector | None = None
) -> tuple[list[Pair], list[BadPair]]:
    """Return a sample of the pairs in ``shards``, and the bad pairs found while reading it.

    Only some of the shards are read, evenly spaced in the list, because it may be sorted by topic.

    Args:
        shards: all shards.
        columns: names of the columns of Parquet shards.
        limit: maximum number of pairs in the sample; they are returned without image bytes.
        selector: selector of the texts of a pair; None takes the default one.
    """
    shards = [shard for shard in shards if shard.pairs]
    pairs = sum(shard.pairs for shard in shards)
    # More shards if this number contains too few pairs.
    count = min(len(shards), max(_SAMPLE_SHARDS, math.ceil(limit * len(shards) / max(1, pairs))))
    some = [shards[len(shards) * place // count] for place in range(count)]
    sizes = [shard.pairs for shard in some]
    good: list[Pair] = []
    bad: list[BadPair] = []
    for shard, share in zip(some, apportion(sizes, min(limit, sum(sizes))), strict=True):
        wanted = len(good) + share
        for pair in read_shard(shard.uri, columns, selector) if share else ():
            if isinstance(pair, BadPair):
                bad.append(pair)
            else:
                good.append(replace(pair, image=b""))  # drop the image, because thousands of photos are gigabytes
            if len(good) == wanted:
                break
    return good, bad


def _caption_row(pair: Pair, index: int) -> np.ndarray:
    assert pair.caption_features is not None
    return np.frombuffer(pair.caption_features, np.float16).reshape(len(pair.captions), -1)[index]


def _pair_seed(seed: int, epoch: int, key: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
