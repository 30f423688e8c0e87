"""The sampler: the order of all pairs over all epochs, and so the pairs of every step.

The order is a pure function of the shards, the batch size, the seed and the weights of the sources. Epochs of a source follow
each other without a gap, each with its own order of shards, and every pair occurs once an epoch. The order is cut into
:class:`ReadTask` s, which are read in parallel, and these into :class:`Window` s, whose pairs are shuffled together. So a step
holds the same pairs for any number of workers, and a run resumes at any step.

Shards that are written topic by topic need more than the shuffling of one shard. ``shuffle_shards`` of them are then read
side by side, a part of each for every window: a window has pairs of all of them and is still no larger than one shard, and no
shard is read twice.
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
    """Pairs ``start`` up to, not including, ``stop`` of a shard, in stored order, in one epoch of its source."""

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
    """The pairs of ``steps`` steps from ``first_step`` on, to be shuffled together."""

    first_step: int
    steps: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class ReadTask:
    """The pairs of ``steps`` steps from ``first_step`` on, of which the first ``skip`` steps are done already.

    A shard's segments in successive windows follow on each other, so that it is read once.
    """

    first_step: int
    steps: int
    skip: int
    windows: tuple[Window, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments of all windows."""
        return tuple(segment for window in self.windows for segment in window.segments)


@dataclass(frozen=True)
class PairSampler:
    """Sampler of pairs: their order over all epochs, as read tasks.

    With several sources a task is about as large as ``shuffle_shards`` shards of each, and ends where the source of the
    largest weight has given whole shards.

    Args:
        shards: every shard with its number of pairs and the name of its source.
        batch_size: pairs a step over all workers.
        seed: seed of the order of shards.
        shuffle_shards: shards that are mixed with each other; memory is that of one, whatever their number.
        weights: relative number of pairs drawn from each source, by name. After any number of steps the
            number of pairs drawn is exact but for a pair or so (at most half the number of sources).

    Raises:
        DataError: a source without a pair.

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
        """Number of pairs an epoch, of all sources together."""
        return sum(shard.pairs for shard in self.shards)

    def epochs(self, samples: int) -> dict[str, float]:
        """Return the number of epochs that ``samples`` pairs make of each source, by name."""
        drawn = apportion(_integers(self.weights.values()), samples)
        return {
            source: count / sum(shard.pairs for shard in self._shards_of(source))
            for source, count in zip(self.weights, drawn, strict=True)
        }

    def read_tasks(self, first_step: int, last_step: int) -> Iterator[ReadTask]:
        """Yield the tasks that cover steps ``first_step`` up to, not including, ``last_step``."""
        weights = _integers(self.weights.values())
        queues = [_Queue(self._groups(number, source)) for number, source in enumerate(self.weights)]
        leader = weights.index(max(weights))
        repeat = self._groups_a_task(weights, leader)

        def drawn(step: int) -> list[int]:
            return apportion(weights, step * self.batch_size)

        step = 0
        while step < last_step:
            # Whole batches: the one that the leader's last shard begins is finished with the head of the next, which is
            # cheap to read; its tail would cost the whole file.
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
        """Yield the shards of a source, epoch after epoch, in groups of up to ``shuffle_shards`` of one epoch."""
        shards = self._shards_of(source)
        for epoch in itertools.count():
            random = np.random.default_rng((self.seed, epoch, number) if number else (self.seed, epoch))
            visits = [
                Segment(shards[index].uri, epoch, 0, shards[index].pairs, source)
                for index in random.permutation(len(shards))
                if shards[index].pairs
            ]
            groups = math.ceil(len(visits) / self.shuffle_shards)
            for group in range(groups):  # of sizes that differ by one at most
                yield _Group(visits[len(visits) * group // groups : len(visits) * (group + 1) // groups])

    def _groups_a_task(self, weights: Sequence[int], leader: int) -> int:
        """Return the number of groups of the leading source in a task that is as large as one group of every source."""
        held = [[shard.pairs for shard in self._shards_of(source) if shard.pairs] for source in self.weights]
        means = [Fraction(sum(pairs), len(pairs)) for pairs in held]
        return math.ceil(Fraction(weights[leader], sum(weights)) * sum(means) / means[leader])


def apportion(weights: Sequence[int], count: int) -> list[int]:
    """Return how many of the first ``count`` items of an endless row are of each kind, all kinds spread evenly by weight.

    Item j of kind k stands at (j + 1/2) / w_k, and the row is sorted by that; of two at one place the first kind comes first.
    So no number ever falls as ``count`` grows, the numbers are exact where ``count`` is the sum of the weights, and
    elsewhere they are off by at most half the number of kinds.

    Args:
        weights: whole numbers, at least 1.
        count: number of items.

    Example:
        >>> apportion([3, 1], 8)
        [6, 2]
    """
    total, kinds = sum(weights), len(weights)
    # All that stand up to the place (count - kinds / 2) / total are at most ``count`` items, and few are missing.
    row = [max(0, ((2 * count - kinds) * weight + total) // (2 * total)) for weight in weights]
    while sum(row) < count:
        row[min(range(kinds), key=lambda kind: Fraction(2 * row[kind] + 1, weights[kind]))] += 1
    return row


class _Group:
    """Shards of one epoch that are read side by side."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.left = sum(map(len, segments))
        self._sizes = [len(segment) for segment in segments]

    def take(self, count: int) -> Iterator[Segment]:
        """Yield the segments of the next ``count`` pairs, a part of every shard."""
        taken = sum(self._sizes) - self.left
        self.left -= count
        starts, stops = apportion(self._sizes, taken), apportion(self._sizes, taken + count)
        for segment, start, stop in zip(self.segments, starts, stops, strict=True):
            if stop > start:
                yield replace(segment, start=start, stop=stop)


class _Queue:
    """Pairs of a source that were not taken yet."""

    def __init__(self, groups: Iterator[_Group]) -> None:
        self._groups = groups
        self._ahead: deque[_Group] = deque()

    def ahead(self, count: int) -> list[_Group]:
        """Return the next ``count`` groups; a part of the first may be taken already."""
        while len(self._ahead) < count:
            self._ahead.append(next(self._groups))
        return list(itertools.islice(self._ahead, count))

    def take(self, count: int) -> Iterator[Segment]:
        """Yield the segments of the next ``count`` pairs."""
        while count:
            (group,) = self.ahead(1)
            part = min(count, group.left)
            yield from group.take(part)
            count -= part
            if not group.left:
                self._ahead.popleft()


def _integers(weights: Iterable[float]) -> list[int]:
    """Return whole numbers in the same proportion."""
    fractions = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * common) for fraction in fractions]
