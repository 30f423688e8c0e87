"""Objects of synthetic scenes, which are drawn once with a side of 192 pixels and then scaled.

There is one function per class, which draws in a unit square with y down and the object's lower edge at y = 0.97. Classes have
typical colours, which all occur in other classes as well. Classes are distinguished by shape and texture: panels, leaves, wool,
checks, roof tiles.
"""

import dataclasses
import functools
import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from vilseg.data.synthetic.drawing import (
    SIDE,
    Canvas,
    Colour,
    dabs,
    ellipse,
    grid_x,
    grid_y,
    line,
    polygon,
    rect,
    scaled,
    vary,
)
from vilseg.data.synthetic.textures import seed_of

VARIANTS = 10
"""Number of drawings of each object class in a stream; scenes vary them by size, rotation, flip and light."""

_BRIGHT = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
_DARK_LINE: Colour = (50, 44, 46)
_LEAVES: tuple[Colour, ...] = (
    (70, 130, 56),
    (96, 150, 60),
    (52, 104, 60),
    (216, 130, 44),
    (200, 84, 48),
    (226, 160, 184),
)
_SPOTS = (  # of the mushroom: x, y, radius
    (0.5, 0.2, 0.085),
    (0.28, 0.3, 0.075),
    (0.7, 0.32, 0.08),
    (0.46, 0.41, 0.075),
    (0.15, 0.46, 0.06),
    (0.85, 0.47, 0.06),
    (0.66, 0.49, 0.05),
    (0.3, 0.49, 0.05),
    (0.36, 0.12, 0.045),
    (0.65, 0.14, 0.05),
)
_GLASS: Colour = (150, 186, 206)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sprite:
    """Drawing of an object at several resolutions.

    Attributes:
        levels: images of the drawing in mode RGBa (colour times opacity), the largest first, each half the size of the one
            before.
        colour: adjective for the colour of the object, or None if it has several.
    """

    levels: tuple[Image.Image, ...]
    colour: str | None


def _ball(c: Canvas) -> str | None:
    """Draw a beach ball with panels that meet in a pole, and a round highlight; return its colour."""
    name, first = c.some(_BRIGHT)
    _, second = c.some(("white", "yellow"), but=name)
    x, y = (grid_x - 0.5) / 0.47, (grid_y - 0.5) / 0.47
    inside = x * x + y * y < 1.0
    z = np.sqrt(np.clip(1.0 - x * x - y * y, 0.0, 1.0))
    tilt, turn = c.rng.uniform(0.5, 0.9), c.rng.uniform(0.0, 2 * math.pi)
    # Tilt the pole towards the viewer, then number the panels around it.
    up, ahead = y * math.cos(tilt) - z * math.sin(tilt), y * math.sin(tilt) + z * math.cos(tilt)
    panels = np.floor((np.arctan2(ahead, x) + turn) / (2 * math.pi) * 8)
    c.paint(inside, first)
    c.paint(inside & (panels % 2 == 0), second)
    c.paint(inside & (up < -0.96), first)
    c.light(inside, np.clip(0.62 + 0.5 * (-0.45 * x - 0.6 * y + 0.66 * z), 0.45, 1.12))
    c.paint(ellipse(0.36, 0.27, 0.06, 0.04, -0.6), (252, 252, 250))
    return name


def _tree(c: Canvas) -> str | None:
    """Draw a crown of overlapping leaves over a trunk; return None, because it has no single colour."""
    leaf = vary(c.rng.choices(_LEAVES, weights=(4, 4, 3, 2, 1, 1))[0], c.rng)
    bark = vary((104, 72, 50), c.rng)
    c.paint(polygon([(0.44, 0.5), (0.56, 0.5), (0.58, 0.9), (0.64, 0.97), (0.36, 0.97), (0.42, 0.9)]), bark)
    c.light(c.alpha, 1.0 + 0.3 * c.noise(4, 30))
    crown = ellipse(0.5, 0.38, 0.3, 0.28)
    for k in range(8):
        angle = k * math.pi / 4 + c.rng.uniform(-0.2, 0.2)
        crown |= ellipse(0.5 + 0.27 * math.cos(angle), 0.39 + 0.22 * math.sin(angle), c.rng.uniform(0.13, 0.18), 0.15)
    c.paint(crown, leaf)
    c.light(crown, 1.0 + 0.42 * dabs(c.rng, 130, 0.05, 0.8) - 0.35 * (grid_y - 0.35) - 0.15 * (grid_x - 0.5))
    return None


def _house(c: Canvas) -> str | None:
    """Draw a house with boarded walls, windows with crosses, a door and a tiled roof; return its colour."""
    name, wall = c.some(("white", "yellow", "red", "blue", "pink", "grey", "green"))
    _, roof = c.some(("red", "brown", "grey", "black", "orange", "blue"))
    c.paint(rect(0.68, 0.1, 0.77, 0.4), scaled(roof, 0.7))
    body = rect(0.12, 0.42, 0.88, 0.97)
    c.paint(body, wall)
    c.light(body, np.where((grid_y * 15) % 1.0 < 0.22, 0.78, 1.0) - 0.12 * (grid_x > 0.8))
    top = polygon([(0.02, 0.47), (0.26, 0.12), (0.74, 0.12), (0.98, 0.47)])
    c.paint(top, roof)
    row = np.floor(grid_y * 13)
    tile = np.floor(grid_x * 11 + 0.5 * (row % 2))
    tones = c.numbers.uniform(0.85, 1.15, (16, 16))
    scallop = ((grid_y * 13) % 1.0) + 0.9 * np.abs((grid_x * 11 + 0.5 * (row % 2)) % 1.0 - 0.5)
    c.light(top, tones[row.astype(int) % 16, tile.astype(int) % 16] * np.where(scallop > 1.05, 0.6, 1.0))
    _, door = c.some(("brown", "green", "red", "blue", "black"))
    c.paint(rect(0.43, 0.64, 0.58, 0.97), scaled(wall, 0.55))
    c.paint(rect(0.45, 0.66, 0.56, 0.97), door)
    for x in (0.18, 0.64):
        c.paint(rect(x, 0.54, x + 0.2, 0.78), (244, 242, 236))
        for i in (0, 1):
            for j in (0, 1):
                c.paint(rect(x + 0.02 + 0.09 * i, 0.56 + 0.11 * j, x + 0.09 + 0.09 * i, 0.65 + 0.11 * j), (70, 96, 122))
    return name


def _car(c: Canvas) -> str | None:
    """Draw a side view of a car with windows, doors, lamps and two wheels; return its colour."""
    name, coat = c.some(("blue", "red", "white", "grey", "green", "black", "yellow", "orange", "purple", "pink"))
    back = [(0.03, 0.86), (0.02, 0.66), (0.06, 0.58), (0.24, 0.55), (0.36, 0.36), (0.42, 0.33)]
    front = [(0.68, 0.33), (0.75, 0.37), (0.85, 0.55), (0.95, 0.58), (0.98, 0.66), (0.97, 0.86)]
    body = polygon([*back, *front])
    c.paint(body, coat)
    c.light(body, np.clip(1.3 - 0.75 * (grid_y - 0.35), 0.7, 1.2))
    c.paint(body & (grid_y > 0.8), scaled(coat, 0.5))
    c.paint(rect(0.04, 0.685, 0.96, 0.715), (226, 226, 226))
    for glass in (
        [(0.3, 0.54), (0.4, 0.39), (0.53, 0.39), (0.53, 0.54)],
        [(0.57, 0.54), (0.57, 0.39), (0.69, 0.39), (0.78, 0.54)],
    ):
        pane = polygon(glass)
        c.paint(pane, _GLASS)
        c.light(pane, np.where(((grid_x - grid_y) * 9) % 1.0 < 0.3, 1.25, 0.85))
    for x in (0.55, 0.29, 0.8):
        c.paint(rect(x - 0.008, 0.55, x + 0.008, 0.82), scaled(coat, 0.6))
    c.paint(rect(0.59, 0.62, 0.65, 0.645) | rect(0.33, 0.62, 0.39, 0.645), (232, 232, 232))
    c.paint(ellipse(0.06, 0.63, 0.035, 0.04), (250, 226, 130))
    c.paint(ellipse(0.955, 0.63, 0.025, 0.04), (196, 40, 36))
    for x in (0.23, 0.77):
        c.paint(ellipse(x, 0.845, 0.125, 0.125), (40, 40, 44))
        c.paint(ellipse(x, 0.845, 0.07, 0.07), (206, 206, 210))
        c.paint(ellipse(x, 0.845, 0.03, 0.03), (92, 92, 96))
    return name


def _boat(c: Canvas) -> str | None:
    """Draw a boat with two seamed sails on a mast over a planked hull; return its colour."""
    name, hull = c.some(("brown", "white", "red", "blue", "green", "yellow", "orange", "purple", "pink"))
    _, sail = c.some(("white", "orange", "red", "yellow", "pink"))
    c.paint(rect(0.485, 0.03, 0.515, 0.8), (110, 80, 56))
    for points, tone in (
        ([(0.53, 0.06), (0.53, 0.7), (0.94, 0.7), (0.72, 0.34)], 1.0),
        ([(0.47, 0.12), (0.47, 0.7), (0.1, 0.7)], 0.86),
    ):
        cloth = polygon(points)
        c.paint(cloth, scaled(sail, tone))
        c.light(cloth, np.where(((grid_y + 0.16 * np.abs(grid_x - 0.5)) * 9.5) % 1.0 < 0.24, 0.6, 1.0))
    side = polygon([(0.04, 0.74), (0.97, 0.74), (0.84, 0.97), (0.2, 0.97)])
    c.paint(side, hull)
    c.light(side, 1.15 - 1.4 * (grid_y - 0.76))
    c.paint(side & (grid_y < 0.78), (244, 240, 230))
    c.paint(side & (np.abs(grid_y - 0.875) < 0.012), scaled(hull, 0.5))
    for x in (0.32, 0.5, 0.68):
        c.paint(ellipse(x, 0.825, 0.028, 0.028), (44, 52, 66))
    return name


def _cat(c: Canvas) -> str | None:
    """Draw a sitting cat with striped fur, pointed ears and bright eyes; return its colour."""
    name, coat = c.some(("orange", "grey", "brown", "black", "white"))
    if name == "black":
        coat = scaled(coat, 1.35)
    tail = [(0.68, 0.9), (0.86, 0.88), (0.91, 0.74), (0.86, 0.6), (0.89, 0.5)]
    c.paint(line(tail, 0.11) | ellipse(0.89, 0.5, 0.055, 0.055), coat)
    body = ellipse(0.48, 0.74, 0.3, 0.235) | ellipse(0.47, 0.6, 0.23, 0.2) | ellipse(0.48, 0.89, 0.33, 0.08)
    head = ellipse(0.46, 0.31, 0.26, 0.21)
    head |= polygon([(0.24, 0.28), (0.235, 0.03), (0.43, 0.15)]) | polygon([(0.68, 0.28), (0.685, 0.03), (0.49, 0.15)])
    c.paint(body | head, coat)
    fur = c.noise(26, 60) + 0.7 * c.noise(40, 40)
    bands = np.sin(2 * math.pi * (grid_y * 8.5 + 0.9 * np.abs(grid_x - 0.47) + 0.16 * c.noise(9, 9)))
    c.light(c.alpha, 1.02 + 0.14 * fur - 0.4 * np.clip(2.2 * bands - 0.5, 0.0, 1.0))
    bib = ellipse(0.46, 0.66, 0.09, 0.15) | ellipse(0.46, 0.385, 0.11, 0.075)
    c.paint(bib, (240, 234, 224))
    c.paint(ellipse(0.36, 0.92, 0.08, 0.05) | ellipse(0.56, 0.92, 0.08, 0.05), (240, 234, 224))
    c.light(bib, 1.0 + 0.1 * fur)
    c.paint(polygon([(0.275, 0.2), (0.27, 0.09), (0.355, 0.145)]), (228, 160, 160))
    c.paint(polygon([(0.645, 0.2), (0.65, 0.09), (0.565, 0.145)]), (228, 160, 160))
    eye = vary((170, 206, 80), c.rng, 30)
    for x in (0.365, 0.555):
        c.paint(ellipse(x, 0.29, 0.058, 0.05), _DARK_LINE)
        c.paint(ellipse(x, 0.29, 0.046, 0.04), eye)
        c.paint(ellipse(x, 0.29, 0.015, 0.036), (20, 20, 20))
    c.paint(polygon([(0.43, 0.355), (0.49, 0.355), (0.46, 0.39)]), (214, 110, 120))
    return name


def _umbrella(c: Canvas) -> str | None:
    """Draw an umbrella with curved segments, a scalloped rim, a tip and a hooked handle; return its colour."""
    name, first = c.some(("purple", "blue", "black", "pink", "green", "red", "yellow", "orange"))
    _, second = c.some(("white", "yellow", "pink", "blue"), but=name)
    handle = [(0.5, 0.1), (0.5, 0.88), (0.52, 0.935), (0.565, 0.95), (0.61, 0.93), (0.625, 0.87)]
    c.paint(line(handle, 0.05), (96, 66, 48))
    c.paint(rect(0.485, 0.01, 0.515, 0.12), (90, 90, 96))
    dome = ellipse(0.5, 0.66, 0.485, 0.58) & (grid_y < 0.66)
    half = np.sqrt(np.clip(1.0 - ((grid_y - 0.66) / 0.58) ** 2, 0.01, 1.0)) * 0.485
    across = np.clip((grid_x - 0.5) / half, -1.0, 1.0)
    segments = np.arcsin(across) / math.pi * 6 + 3.0
    inside = segments - np.floor(segments)
    dome &= grid_y < 0.66 - 0.07 * (1.0 - (2.0 * inside - 1.0) ** 2)
    c.paint(dome, first)
    c.paint(dome & (np.floor(segments) % 2 == 0), second)
    c.light(dome, (1.12 - 0.35 * (grid_x - 0.2)) * np.where(np.minimum(inside, 1 - inside) < 0.06, 0.6, 1.0))
    return name


def _mushroom(c: Canvas) -> str | None:
    """Draw a mushroom with a spotted cap over a pale, fluted stem; return its colour."""
    name, cap = c.some(("red", "brown", "orange", "purple", "yellow", "pink"))
    stem = polygon([(0.4, 0.5), (0.6, 0.5), (0.64, 0.8), (0.7, 0.97), (0.3, 0.97), (0.36, 0.8)])
    c.paint(stem, vary((236, 224, 198), c.rng))
    c.light(stem, 0.9 + 0.16 * np.sin(grid_x * 110.0) - 0.35 * (grid_x - 0.5))
    gills = ellipse(0.5, 0.54, 0.43, 0.09)
    c.paint(gills, (214, 190, 158))
    c.light(gills, 0.85 + 0.25 * np.sin((grid_x - 0.5) * 120.0))
    dome = ellipse(0.5, 0.56, 0.48, 0.52) & (grid_y < 0.56 + 0.05 * (1.0 - ((grid_x - 0.5) / 0.48) ** 2) - 0.04)
    c.paint(dome, cap)
    c.light(dome, 1.15 - 0.5 * (grid_x - 0.3) ** 2 - 0.45 * (grid_y - 0.2))
    spots = np.zeros_like(dome)
    for x, y, radius in _SPOTS:
        r = radius * c.rng.uniform(0.8, 1.15)
        spots |= ellipse(x + c.rng.uniform(-0.03, 0.03), y + c.rng.uniform(-0.02, 0.02), r, r * 0.85)
    c.paint(dome & spots, (248, 242, 230))
    return name


def _sheep(c: Canvas) -> str | None:
    """Draw a sheep with curly wool, a face and four thin legs; return its colour."""
    name, wool = c.some(("white", "grey", "brown", "black"))
    if name == "black":
        wool = scaled(wool, 1.4)
    skin = vary((62, 52, 52), c.rng, 12) if name != "black" else vary((206, 184, 160), c.rng, 12)
    for x in (0.36, 0.46, 0.68, 0.78):
        c.paint(rect(x - 0.035, 0.7, x + 0.035, 0.97), skin)
    body = ellipse(0.57, 0.55, 0.34, 0.24)
    for k in range(14):
        angle = k * math.pi / 7
        body |= ellipse(0.57 + 0.33 * math.cos(angle), 0.55 + 0.22 * math.sin(angle), 0.09, 0.085)
    c.paint(body, wool)
    curls = np.zeros((SIDE, SIDE), np.float32)
    for j in range(9):
        for i in range(9):
            cx = 0.12 + 0.115 * (i + 0.5 * (j % 2)) + c.rng.uniform(-0.02, 0.02)
            cy = 0.22 + 0.085 * j + c.rng.uniform(-0.015, 0.015)
            d2 = ((grid_x - cx) ** 2 + (grid_y - cy) ** 2) / 0.06**2
            near = d2 < 1.0
            # A curl is bright inside with a dark ring, so that wool is a pattern of small rings at any scale.
            curls[near] = np.where(d2[near] > 0.52, -0.42, 0.16 - 0.3 * (d2[near] < 0.08))
    c.light(body, 1.0 + curls - 0.3 * (grid_y - 0.5))
    c.paint(ellipse(0.1, 0.36, 0.075, 0.035, 0.5) | ellipse(0.35, 0.36, 0.075, 0.035, -0.5), skin)
    c.paint(ellipse(0.225, 0.45, 0.11, 0.155), skin)
    c.paint(ellipse(0.225, 0.3, 0.1, 0.065), scaled(wool, 1.04))
    for x in (0.185, 0.265):
        c.paint(ellipse(x, 0.42, 0.026, 0.028), (246, 246, 240))
        c.paint(ellipse(x, 0.423, 0.012, 0.014), (20, 20, 20))
    return name


def _flower(c: Canvas) -> str | None:
    """Draw a flower with veined petals around a disc of seeds, on a stem with two leaves; return its colour."""
    name, petal = c.some(("pink", "yellow", "purple", "white", "red", "orange", "blue"))
    heart = vary((120, 76, 40) if c.rng.random() < 0.6 else (236, 190, 60), c.rng)
    if name in ("yellow", "orange"):
        heart = vary((104, 66, 40), c.rng)
    green = vary((84, 140, 64), c.rng)
    c.paint(line([(0.5, 0.4), (0.49, 0.8), (0.5, 0.97)], 0.065), green)
    leaves = ellipse(0.34, 0.86, 0.17, 0.07, 0.5) | ellipse(0.66, 0.88, 0.17, 0.07, -0.5)
    c.paint(leaves, scaled(green, 0.9))
    count, start = c.rng.choice((8, 9, 10, 11)), c.rng.uniform(0.0, 1.0)
    for k in range(count):
        angle = 2 * math.pi * k / count + start
        cx, cy = 0.5 + 0.255 * math.cos(angle), 0.41 + 0.255 * math.sin(angle)
        blade = ellipse(cx, cy, 0.15, 0.94 / count, angle)
        c.paint(blade, petal)
        off_vein = np.abs((grid_x - cx) * math.sin(angle) - (grid_y - cy) * math.cos(angle))
        c.light(blade, np.clip(1.08 - 6.0 * off_vein, 0.55, 1.1))
    disc = ellipse(0.5, 0.41, 0.145, 0.145)
    c.paint(disc, heart)
    c.light(disc, 1.0 + 0.35 * np.sign(np.sin(grid_x * 150.0) * np.sin(grid_y * 150.0)))
    return name


def _kite(c: Canvas) -> str | None:
    """Draw a kite, a checked diamond with an edge line and a tail with bows; return its colour."""
    name, first = c.some(("orange", "green", "purple", "yellow", "red", "blue", "pink"))
    _, second = c.some(("black", "yellow", "white", "blue", "orange"), but=name)
    tail = [(0.5, 0.78), (0.45, 0.83), (0.54, 0.88), (0.46, 0.93), (0.52, 0.97)]
    c.paint(line(tail, 0.02), _DARK_LINE)
    for (x, y), paint in zip(tail[1:4], (first, second, first), strict=True):
        c.paint(
            polygon([(x - 0.075, y - 0.035), (x + 0.075, y + 0.035), (x + 0.075, y - 0.035), (x - 0.075, y + 0.035)]),
            paint,
        )
    corners = [(0.5, 0.01), (0.97, 0.32), (0.5, 0.8), (0.03, 0.32)]
    cloth = polygon(corners)
    c.paint(cloth, first)
    checks = (np.floor((grid_x - 0.5) * 6.5 + 20.0) + np.floor((grid_y - 0.32) * 6.5 + 20.0)) % 2 == 0
    c.paint(cloth & checks, second)
    c.light(cloth, 1.1 - 0.3 * (grid_x > 0.5) * (1.0 - 0.4 * grid_y))
    c.paint(line([*corners, corners[0]], 0.016), scaled(first, 0.6))
    return name


def _clock(c: Canvas) -> str | None:
    """Draw an alarm clock with a coloured case, twelve marks, two hands, bells and feet; return its colour."""
    name, case = c.some(("green", "grey", "pink", "yellow", "brown", "black", "red", "blue", "orange", "purple"))
    for sign in (-1, 1):
        c.paint(line([(0.5 + sign * 0.22, 0.82), (0.5 + sign * 0.33, 0.97)], 0.07), scaled(case, 0.7))
        c.paint(ellipse(0.5 + sign * 0.26, 0.15, 0.155, 0.1, sign * 0.65), scaled(case, 0.85))
    c.paint(rect(0.47, 0.02, 0.53, 0.16), scaled(case, 0.7))
    c.paint(ellipse(0.5, 0.53, 0.42, 0.42), case)
    c.light(ellipse(0.5, 0.53, 0.42, 0.42), 1.2 - 0.6 * (grid_x + grid_y - 0.75))
    face = ellipse(0.5, 0.53, 0.33, 0.33)
    c.paint(face, vary(((246, 242, 228), (236, 226, 190), (206, 222, 236))[c.rng.randrange(3)], c.rng, 8))
    for k in range(12):
        angle = k * math.pi / 6
        near, far = (0.215 if k % 3 == 0 else 0.245), 0.305
        sx, sy = math.cos(angle), math.sin(angle)
        c.paint(line([(0.5 + near * sx, 0.53 + near * sy), (0.5 + far * sx, 0.53 + far * sy)], 0.042), _DARK_LINE)
    for length, width in ((0.16, 0.05), (0.24, 0.036)):
        angle = c.rng.uniform(0.0, 2 * math.pi)
        c.paint(
            line([(0.5, 0.53), (0.5 + length * math.cos(angle), 0.53 + length * math.sin(angle))], width), (30, 30, 34)
        )
    c.paint(ellipse(0.5, 0.53, 0.038, 0.038), (196, 50, 44))
    return name


_PAINTERS: dict[str, Callable[[Canvas], str | None]] = {
    "ball": _ball,
    "tree": _tree,
    "house": _house,
    "car": _car,
    "boat": _boat,
    "cat": _cat,
    "umbrella": _umbrella,
    "mushroom": _mushroom,
    "sheep": _sheep,
    "flower": _flower,
    "kite": _kite,
    "clock": _clock,
}


@functools.lru_cache(maxsize=512)
def sprite(stream: str, name: str, variant: int) -> Sprite:
    """Return a drawing of the object class ``name``.

    Args:
        stream: name of the stream; two streams have no drawing in common.
        name: object class of `vilseg.data.synthetic.scenes.CLASSES`.
        variant: number of the drawing, 0 to `VARIANTS` - 1.
    """
    canvas = Canvas(random.Random(seed_of(stream, name, variant)))
    colour = _PAINTERS[name](canvas)
    pixels = np.dstack([np.clip(canvas.rgb, 0, 255) * canvas.alpha[..., None], canvas.alpha * 255.0]).astype(np.uint8)
    # Averaging colour times opacity, instead of colour, prevents dark fringes at the outlines.
    largest = Image.frombytes("RGBa", (SIDE, SIDE), pixels.tobytes())
    return Sprite(levels=tuple(largest.reduce(2**k) if k else largest for k in range(4)), colour=colour)
