"""Drawing of a single object in a unit square, with a canvas, a table of paints, and functions that return shapes.

Coordinates are fractions of the square's side, with x to the right and y down. A shape is an (N, N) boolean mask, N = `SIDE`.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from vilseg.data.synthetic.textures import smooth_noise

SIDE = 192
grid_y, grid_x = np.meshgrid(
    (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE, (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE, indexing="ij"
)

Colour = tuple[float, float, float]
Point = tuple[float, float]

PAINTS: dict[str, Colour] = {
    "red": (206, 54, 48),
    "orange": (232, 132, 44),
    "yellow": (240, 202, 70),
    "green": (78, 154, 78),
    "blue": (54, 104, 192),
    "purple": (134, 86, 168),
    "pink": (234, 140, 172),
    "white": (240, 238, 230),
    "brown": (138, 92, 60),
    "grey": (150, 150, 154),
    "black": (54, 52, 58),
}
"""RGB colours of all objects, by the adjective that a caption may use."""


class Canvas:
    """Drawing in progress, with the colours ``rgb`` (N, N, 3) in 0..255 and the opacity ``alpha`` (N, N), boolean."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.numbers = np.random.default_rng(rng.getrandbits(64))
        self.rgb = np.zeros((SIDE, SIDE, 3), np.float32)
        self.alpha = np.zeros((SIDE, SIDE), bool)

    def paint(self, mask: np.ndarray, colour: Colour) -> None:
        """Fill ``mask`` (N, N) with ``colour``."""
        self.rgb[mask] = colour
        self.alpha |= mask

    def light(self, mask: np.ndarray, gain: np.ndarray) -> None:
        """Multiply the colours in ``mask`` (N, N) by ``gain`` (N, N)."""
        self.rgb[mask] *= gain[mask][:, None]

    def noise(self, cells_y: float, cells_x: float) -> np.ndarray:
        """Return smooth noise (N, N) in about -1..1, interpolated from a ``cells_y`` x ``cells_x`` grid of random values."""
        return smooth_noise(self.numbers, SIDE, SIDE, cells_y, cells_x)

    def some(self, names: Sequence[str], *, but: str | None = None) -> tuple[str, Colour]:
        """Draw one of the paints ``names`` except ``but``; the first is most likely.

        Returns:
            Name of the paint, and its colour with a small random change.
        """
        allowed = [name for name in names if name != but]
        name = self.rng.choices(allowed, weights=favour_first(len(allowed)))[0]
        return name, vary(PAINTS[name], self.rng)


def favour_first(count: int) -> list[float]:
    """Return ``count`` weights for a random choice, which decrease from the first to the last."""
    return [0.55**place + 0.03 for place in range(count)]


def vary(colour: Colour, rng: random.Random, by: float = 16.0) -> Colour:
    """Return ``colour`` with a random change of at most ``by`` grey levels in each channel."""
    r, g, b = (min(255.0, max(0.0, value + rng.uniform(-by, by))) for value in colour)
    return r, g, b


def scaled(colour: Colour, factor: float) -> Colour:
    """Return ``colour`` multiplied by ``factor``: lighter if it is above 1, otherwise darker."""
    r, g, b = (min(255.0, value * factor) for value in colour)
    return r, g, b


def ellipse(cx: float, cy: float, rx: float, ry: float, turn: float = 0.0) -> np.ndarray:
    """Return the mask of an ellipse with centre (cx, cy) and radii (rx, ry), turned clockwise by ``turn`` radians."""
    dx, dy = grid_x - cx, grid_y - cy
    if turn:
        cos, sin = math.cos(turn), math.sin(turn)
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    return (dx / rx) ** 2 + (dy / ry) ** 2 < 1.0


def rect(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Return the mask of a rectangle with corners (x0, y0) and (x1, y1)."""
    return (grid_x > x0) & (grid_x < x1) & (grid_y > y0) & (grid_y < y1)


def polygon(points: Sequence[Point]) -> np.ndarray:
    """Return the mask of the inside of a closed polygon."""
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).polygon([(x * SIDE, y * SIDE) for x, y in points], fill=1)
    return np.asarray(image) > 0


def line(points: Sequence[Point], width: float) -> np.ndarray:
    """Return the mask of a line through ``points`` with round joints."""
    image = Image.new("L", (SIDE, SIDE))
    pixels = [(x * SIDE, y * SIDE) for x, y in points]
    ImageDraw.Draw(image).line(pixels, fill=1, width=max(1, round(width * SIDE)), joint="curve")
    return np.asarray(image) > 0


def dabs(rng: random.Random, count: int, radius: float, stretch: float = 1.0) -> np.ndarray:
    """Return a foliage texture (N, N) in -1..1, made from overlapping dabs that are darker at the lower rim.

    Args:
        rng: random number generator.
        count: approximate number of dabs.
        radius: mean radius of a dab.
        stretch: ratio of the height of a dab to its width.
    """
    image = Image.new("L", (SIDE, SIDE), 128)
    draw = ImageDraw.Draw(image)
    side = math.ceil(math.sqrt(count))
    spots = [(i % side, i // side) for i in range(side * side)]
    rng.shuffle(spots)
    for i, j in spots:
        x = (i + rng.uniform(0.0, 1.0)) / side * SIDE
        y = (j + rng.uniform(0.0, 1.0)) / side * SIDE
        r = radius * SIDE * rng.uniform(0.8, 1.25)
        tone = rng.randrange(120, 236)
        draw.ellipse((x - r, y - r * stretch, x + r, y + r * stretch), fill=max(0, tone - 120))
        draw.ellipse((x - r, y - r * stretch - 2, x + r * 0.75, y + r * stretch * 0.6), fill=tone)
    return np.asarray(image, np.float32) / 127.5 - 1.0
