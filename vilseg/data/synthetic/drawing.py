"""Drawing of a single object in a unit square: a canvas, the paints, and shapes as masks.

Coordinates are fractions of the square's side, x to the right and y down; a shape is an (N, N) boolean mask.
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
"""The colours of all objects, by the adjective a caption may use."""


class Canvas:
    """A drawing in progress: rgb (N, N, 3) in 0..255, alpha (N, N) in {0, 1}."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.numbers = np.random.default_rng(rng.getrandbits(64))
        self.rgb = np.zeros((SIDE, SIDE, 3), np.float32)
        self.alpha = np.zeros((SIDE, SIDE), bool)

    def paint(self, mask: np.ndarray, colour: Colour) -> None:
        """Cover ``mask`` (N, N) with ``colour``."""
        self.rgb[mask] = colour
        self.alpha |= mask

    def light(self, mask: np.ndarray, gain: np.ndarray) -> None:
        """Multiply the brightness under ``mask`` by ``gain`` (N, N)."""
        self.rgb[mask] *= gain[mask][:, None]

    def noise(self, cells_y: float, cells_x: float) -> np.ndarray:
        """Return smooth noise (N, N) in about -1..1 with ``cells_y`` x ``cells_x`` bumps."""
        return smooth_noise(self.numbers, SIDE, SIDE, cells_y, cells_x)

    def some(self, names: Sequence[str], *, but: str | None = None) -> tuple[str, Colour]:
        """Pick a paint by name, other than ``but``, the first of them most often, and vary it a little."""
        allowed = [name for name in names if name != but]
        name = self.rng.choices(allowed, weights=favour_first(len(allowed)))[0]
        return name, vary(PAINTS[name], self.rng)


def favour_first(count: int) -> list[float]:
    """Return weights of choices of which the first is usual and the last ones are rare."""
    return [0.55**place + 0.03 for place in range(count)]


def vary(colour: Colour, rng: random.Random, by: float = 16.0) -> Colour:
    """Return a neighbour of ``colour``."""
    r, g, b = (min(255.0, max(0.0, value + rng.uniform(-by, by))) for value in colour)
    return r, g, b


def scaled(colour: Colour, factor: float) -> Colour:
    """Return ``colour`` lighter (factor > 1) or darker."""
    r, g, b = (min(255.0, value * factor) for value in colour)
    return r, g, b


def ellipse(cx: float, cy: float, rx: float, ry: float, turn: float = 0.0) -> np.ndarray:
    """Return an ellipse around (cx, cy), its radii turned clockwise by ``turn`` radians."""
    dx, dy = grid_x - cx, grid_y - cy
    if turn:
        cos, sin = math.cos(turn), math.sin(turn)
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    return (dx / rx) ** 2 + (dy / ry) ** 2 < 1.0


def rect(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Return an upright rectangle."""
    return (grid_x > x0) & (grid_x < x1) & (grid_y > y0) & (grid_y < y1)


def polygon(points: Sequence[Point]) -> np.ndarray:
    """Return the inside of a closed polygon."""
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).polygon([(x * SIDE, y * SIDE) for x, y in points], fill=1)
    return np.asarray(image) > 0


def line(points: Sequence[Point], width: float) -> np.ndarray:
    """Return a line through ``points`` with round joints."""
    image = Image.new("L", (SIDE, SIDE))
    pixels = [(x * SIDE, y * SIDE) for x, y in points]
    ImageDraw.Draw(image).line(pixels, fill=1, width=max(1, round(width * SIDE)), joint="curve")
    return np.asarray(image) > 0


def dabs(rng: random.Random, count: int, radius: float, stretch: float = 1.0) -> np.ndarray:
    """Return (N, N) tones in -1..1: ``count`` overlapping dabs, darker at the lower rim, as leaves are."""
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
