"""Layout of a synthetic scene, which consists of bands of background stuff and of objects in front of them."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from vilseg.data.synthetic import objects

_GROUNDS = ("grass", "sand", "water", "snow")
_BACKDROPS = ("wall", "fence")


# Scale by class: larger for drawings that fill less of their square, so that all classes cover about the same area.
_SCALE = {
    "car": 1.15,
    "boat": 1.1,
    "house": 1.05,
    "tree": 1.1,
    "umbrella": 1.1,
    "sheep": 1.15,
    "kite": 1.1,
    "cat": 1.15,
}


class Band(NamedTuple):
    """Band of one kind of stuff, below a boundary curve; lengths are fractions of the image side.

    The first band of a scene fills the whole image and its boundary is ignored.
    """

    name: str
    top: float
    """Coordinate y of the boundary at the middle of the image."""
    slope: float
    """Increase of y per unit of x along the boundary."""
    wave: float
    """Amplitude of a sine that is added to the boundary; 0 for a straight one."""


class Item(NamedTuple):
    """Object to be drawn: class, drawing and position; lengths are fractions of the image side.

    (x, base) is the middle of the object's lower edge, and ``scale`` is the side of the square that contains it.
    """

    name: str
    variant: int
    x: float
    base: float
    scale: float


def choose_bands(rng: random.Random) -> list[Band]:
    """Draw the bands of a scene from top to bottom.

    The kinds of scenes are sky over a ground, sky over two bands, a wall or fence behind a ground, two grounds, and one band.
    """
    kind = rng.random()
    ground, other = rng.sample(_GROUNDS, 2)
    slope = rng.uniform(-0.12, 0.12)
    if kind < 0.36:
        wave = 0.0 if ground == "water" else rng.uniform(0.0, 0.04)
        horizon = Band(ground, rng.uniform(0.32, 0.6), 0.0 if ground == "water" else slope, wave)
        return [Band("sky", 0.0, 0.0, 0.0), horizon]
    if kind < 0.5:
        middle = rng.choice((other, *_BACKDROPS))
        flat = middle in ("water", *_BACKDROPS)
        first = Band(middle, rng.uniform(0.22, 0.34), 0.0 if flat else slope, 0.0 if flat else 0.03)
        second = Band(ground, rng.uniform(0.58, 0.72), rng.uniform(-0.3, 0.3), rng.uniform(0.0, 0.04))
        return [Band("sky", 0.0, 0.0, 0.0), first, second]
    if kind < 0.76:
        backdrop = rng.choice(_BACKDROPS)
        return [Band(backdrop, 0.0, 0.0, 0.0), Band(ground, rng.uniform(0.45, 0.72), slope, 0.01)]
    if kind < 0.9:
        slope = rng.choice((-1.0, 1.0)) * rng.uniform(0.3, 1.1)
        return [Band(ground, 0.0, 0.0, 0.0), Band(other, rng.uniform(0.4, 0.6), slope, rng.uniform(0.0, 0.05))]
    return [Band(rng.choice((*_GROUNDS, *_BACKDROPS)), 0.0, 0.0, 0.0)]


def choose_items(rng: random.Random, bands: Sequence[Band], names: Sequence[str]) -> list[Item]:
    """Draw one to four objects and positions for them with little overlap; the farthest object comes first.

    Args:
        rng: random number generator.
        bands: bands behind the objects.
        names: names of the object classes to choose from.
    """
    horizon = bands[1].top if len(bands) > 1 and bands[0].name in ("sky", *_BACKDROPS) else 0.2
    items: list[Item] = []
    for _ in range(rng.choices((1, 2, 3, 4), weights=(20, 38, 28, 14))[0]):
        name = items[-1].name if items and rng.random() < 0.14 else rng.choice(names)
        if not items and bands[-1].name == "water" and rng.random() < 0.25:
            name = "boat"  # Slightly plausible; more often, a model would learn boats and water as one class.
        variant = rng.randrange(objects.VARIANTS)
        if items and items[-1].name == name and rng.random() < 0.5:
            variant = items[-1].variant
        for _ in range(12):
            scale = min(0.62, rng.triangular(0.22, 0.6, 0.52) * _SCALE.get(name, 1.0))
            x = rng.uniform(0.4 * scale, 1.0 - 0.4 * scale)
            base = rng.uniform(max(horizon + 0.12, 0.95 * scale), 0.99)
            if name == "kite" and rng.random() < 0.7:
                base = rng.uniform(scale, max(scale, horizon + 0.15))
            item = Item(name, variant, x, base, scale)
            if all(_overlap(item, placed) < 0.3 for placed in items):
                items.append(item)
                break
    return sorted(items, key=lambda item: item.base)


def _overlap(a: Item, b: Item) -> float:
    """Return the intersection of two square boxes as a fraction of the smaller box."""
    width = min(a.x + a.scale / 2, b.x + b.scale / 2) - max(a.x - a.scale / 2, b.x - b.scale / 2)
    height = min(a.base, b.base) - max(a.base - a.scale, b.base - b.scale)
    return max(0.0, width) * max(0.0, height) / min(a.scale, b.scale) ** 2
