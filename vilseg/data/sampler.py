"""Sampler, which determines the order of all pairs over all epochs and so the pairs of every step.

The order is a pure function of the shards, the batch size, the seed and the weights of the sources. The epochs of a source follow
each other without a gap. Each epoch has its own order of shards, and every pair occurs once in it. The order is divided into
:class:`ReadTask` s, which are read in parallel, and each task into :class:`Window` s, whose pairs are shuffled together. A step
therefore contains the same pairs for any number of workers, and a run can resume at any step.

If the shards are sorted by topic, shuffling within one shard is not enough. With ``shuffle_shards`` > 1, that many shards are
read in parallel, and every window takes a segment of each. A window then mixes pairs of all of them and is still no larger than
one shard, and no shard is read twice.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from vilseg.data.shards import Shard
from vilseg.errors import DataError


@dataclass(frozen=True)
class Segment:
    """Pairs ``start`` to ``stop - 1`` of a shard, in stored order, in one epoch of its source."""

    uri: str
    epoch: int
    start: int
    stop: int
    source: str = ""
    """Name of the source in a mix."""

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Window:
    """Pairs of ``steps`` successive steps from ``first_step`` on, which are shuffled together."""

    first_step: int
    steps: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class ReadTask:
    """Pairs of ``steps`` successive steps from ``first_step`` on, of which the first ``skip`` steps need no batches.

    A resumed run has already done those steps. The segments of a shard in successive windows are contiguous, so that the shard is
    read once.
    """

    first_step: int
    steps: int
    skip: int
    windows: tuple[Window, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Segments of all windows."""
        return tuple(segment for window in self.windows for segment in window.segments)


@dataclass(frozen=True)
class PairSampler:
    """Sampler of pairs, which divides their order over all epochs into read tasks.

    With several sources, a task is about as large as ``shuffle_shards`` shards of each source, and ends at the end of a shard of
    the source with the largest weight (rounded up to a whole step).

    Args:
        shards: all shards, each with its number of pairs and the name of its source.
        batch_size: number of pairs in a step, over all workers.
        seed: seed of the order of shards.
        shuffle_shards: number of shards whose pairs are shuffled together; the memory is that of one shard for any number.
        weights: relative number of pairs drawn from each source, by name. After any number of steps, the number of pairs drawn
            from a source is exact up to half the number of sources.

    Raises:
        DataError: a source has no pairs.

    Example:
        >>> sampler = PairSampler((Shard("0.tar", 6), Shard("1.tar", 6)), batch_size=4, seed=0)
        >>> [(task.first_step, task.steps) for task in sampler.read_tasks(0, 3)]
        [(0, 2), (2, 1)]
    """

    shards: tuple[Shard, ...]
    batch_size: int
    seed: int
    shuffle_shards: int = 1
    weights: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})

    def __post_init__(self) -> None:
        for source in self.weights:
            if not any(shard.pairs for shard in self._shards_of(source)):
                raise DataError("the pair shards hold no pair" + (f" at {source} of data.mix" if source else ""))

    @property
    def pairs(self) -> int:
        """Number of pairs of all sources together."""
        return sum(shard.pairs for shard in self.shards)

    def epochs(self, samples: int) -> dict[str, float]:
        """Return the number of epochs of each source, by name, in the first ``samples`` pairs of the order."""
        drawn = apportion(_integers(self.weights.values()), samples)
        return {
            source: count / sum(shard.pairs for shard in self._shards_of(source))
            for source, count in zip(self.weights, drawn, strict=True)
        }

    def read_tasks(self, first_step: int, last_step: int) -> Iterator[ReadTask]:
        """Yield the tasks that cover the steps ``first_step`` to ``last_step - 1``."""
        weights = _integers(self.weights.values())
        queues = [_Queue(self._groups(number, source)) for number, source in enumerate(self.weights)]
        leader = weights.index(max(weights))
        repeat = self._groups_a_task(weights, leader)

        def drawn(step: int) -> list[int]:
            return apportion(weights, step * self.batch_size)

        step = 0
        while step < last_step:
            # A task has whole batches. Its last one takes its missing pairs from the start of the leading source's next shard,
            # which is cheap to read, whereas the end of a shard would need reading the whole file.
            groups = queues[leader].ahead(repeat)
            wanted = drawn(step)[leader] + sum(group.left for group in groups)
            steps = max(1, (wanted - drawn(step)[leader]) * sum(weights) // (weights[leader] * self.batch_size))
            while drawn(step + steps)[leader] < wanted:
                steps += 1
            steps = min(steps, last_step - step)
            count = min(steps, math.ceil(sum(len(group.segments) for group in groups) / repeat))
            windows = []
            for number in range(count):
                begin, end = (step + steps * boundary // count for boundary in (number, number + 1))
                shares = zip(queues, drawn(begin), drawn(end), strict=True)
                segments = [segment for queue, before, after in shares for segment in queue.take(after - before)]
                windows.append(Window(begin, end - begin, tuple(segments)))
            if step + steps > first_step:
                yield ReadTask(step, steps, max(0, first_step - step), tuple(windows))
            step += steps

    def _shards_of(self, source: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.source == source]

    def _groups(self, number: int, source: str) -> Iterator[_Group]:
        """Yield the shards of a source, epoch after epoch, in groups of at most ``shuffle_shards`` shards of the same epoch."""
        shards = self._shards_of(source)
        for epoch in itertools.count():
            random = np.random.default_rng((self.seed, epoch, number) if number else (self.seed, epoch))
            visits = [
                Segment(shards[index].uri, epoch, 0, shards[index].pairs, source)
                for index in random.permutation(len(shards))
                if shards[index].pairs
            ]
            groups = math.ceil(len(visits) / self.shuffle_shards)
            for group in range(groups):  # group sizes differ by at most one
                yield _Group(visits[len(visits) * group // groups : len(visits) * (group + 1) // groups])

    def _groups_a_task(self, weights: Sequence[int], leader: int) -> int:
        """Return the number of groups of the source ``leader`` in a task as large as one group of each source in total."""
        held = [[shard.pairs for shard in self._shards_of(source) if shard.pairs] for source in self.weights]
        means = [Fraction(sum(pairs), len(pairs)) for pairs in held]
        return math.ceil(Fraction(weights[leader], sum(weights)) * sum(means) / means[leader])


def apportion(weights: Sequence[int], count: int) -> list[int]:
    """Return the number of items of each kind among the first ``count`` of a sequence that interleaves kinds evenly by weight.

    Item j of kind k has position (j + 1/2) / w_k, and the sequence is sorted by position; of equal positions, the kind with the
    lower index comes first. Therefore no number decreases when ``count`` increases. The numbers are exactly proportional to the
    weights if ``count`` is a multiple of their sum, and otherwise differ from that by at most half the number of kinds.

    Args:
        weights: weights of the kinds, integers of at least 1.
        count: number of items.

    Example:
        >>> apportion([3, 1], 8)
        [6, 2]
    """
    total, kinds = sum(weights), len(weights)
    # The items up to position (count - kinds / 2) / total are at most ``count``, and only a few are missing.
    row = [max(0, ((2 * count - kinds) * weight + total) // (2 * total)) for weight in weights]
    while sum(row) < count:
        row[min(range(kinds), key=lambda kind: Fraction(2 * row[kind] + 1, weights[kind]))] += 1
    return row


class _Group:
    """Shards of one epoch that are read in parallel, a segment of each for every window."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.left = sum(map(len, segments))
        self._sizes = [len(segment) for segment in segments]

    def take(self, count: int) -> Iterator[Segment]:
        """Yield the segments of the next ``count`` pairs, taken from all shards of the group in proportion to their sizes."""
        taken = sum(self._sizes) - self.left
        self.left -= count
        starts, stops = apportion(self._sizes, taken), apportion(self._sizes, taken + count)
        for segment, start, stop in zip(self.segments, starts, stops, strict=True):
            if stop > start:
                yield replace(segment, start=start, stop=stop)


class _Queue:
    """Queue of the pairs of a source that have not been taken yet."""

    def __init__(self, groups: Iterator[_Group]) -> None:
        self._groups = groups
        self._ahead: deque[_Group] = deque()

    def ahead(self, count: int) -> list[_Group]:
        """Return the next ``count`` groups; some pairs of the first may already have been taken."""
        while len(self._ahead) < count:
            self._ahead.append(next(self._groups))
        return list(itertools.islice(self._ahead, count))

    def take(self, count: int) -> Iterator[Segment]:
        """Take the next ``count`` pairs from the queue and yield their segments."""
        while count:
            (group,) = self.ahead(1)
            part = min(count, group.left)
            yield from group.take(part)
            count -= part
            if not group.left:
                self._ahead.popleft()


def _integers(weights: Iterable[float]) -> list[int]:
    """Return integers in the same proportion as ``weights``."""
    fractions = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * common) for fraction in fractions]
