"""Render segmentations: class colours, overlays, legends and cluster maps.

Shapes: H rows and W columns of pixels, C classes. Any label of C or more means "no class": such pixels are not tinted in an
overlay and not listed in a legend. Small images are enlarged by integer factors, so that each pixel becomes a sharp square.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND = "background"
"""Class name that is rendered in neutral grey instead of a colour of the palette."""

_BACKGROUND_COLOUR = (112, 117, 125)
_NO_CLASS_COLOUR = (214, 217, 222)
_DISTINCT_COLOURS = 256  # more would be hard to distinguish, so the sequence repeats after these
_MIN_SIDE = 256  # px: images whose shorter side is less are enlarged before anything is drawn on them
_MAX_SIDE = 2048  # px: maximum longer side after enlarging, so that a very long strip does not become a giant image


def _oklab(colours: np.ndarray) -> np.ndarray:
    """Convert 8-bit sRGB colours to OKLab coordinates, (N, 3) -> (N, 3) float64 (Ottosson 2020, bottosson.github.io)."""
    srgb = colours.astype(np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_lms.T) @ to_lab.T


@cache
def _colour_sequence() -> np.ndarray:
    """Return `_DISTINCT_COLOURS` colours, each as different as possible from all before it. Shape: (N, 3), uint8.

    They are chosen by greedy farthest-point selection in OKLab from sRGB colours that are not near black, near white, grey or
    neon.
    """
    axis = np.arange(0, 256, 15)
    colours = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(colours)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] >= 0.45) & (lab[:, 0] <= 0.90) & (chroma >= 0.07) & (chroma <= 0.20)
    # Lightness counts less than hue, because the lightness of the photo shows through the overlay.
    colours, lab = colours[usable], lab[usable] * (0.7, 1.0, 1.0)

    first = _oklab(np.array([[40, 110, 200]]))[0] * (0.7, 1.0, 1.0)
    chosen = [int(np.argmin(((lab - first) ** 2).sum(axis=1)))]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < _DISTINCT_COLOURS:
        distance = np.minimum(distance, ((lab - lab[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(np.argmax(distance)))
    sequence = colours[chosen].astype(np.uint8)
    sequence.setflags(write=False)  # it is cached and shared
    return sequence


def palette(count: int) -> np.ndarray:
    """Return the first ``count`` colours of a fixed sequence of distinct colours. Shape: (count, 3), uint8.

    Because the sequence is fixed, a class keeps its colour when others are appended. From the 257th on the colours repeat.

    Example:
        >>> palette(2).shape, bool((palette(2) == palette(5)[:2]).all())
        ((2, 3), True)
    """
    return _colour_sequence()[np.arange(count) % _DISTINCT_COLOURS]


def class_colours(classes: Sequence[str]) -> np.ndarray:
    """Return the colour of every class: from the palette, or grey for `BACKGROUND`. Shape: (C, 3), uint8."""
    colours = palette(len(classes))
    for index, name in enumerate(classes):
        if name == BACKGROUND:
            colours[index] = _BACKGROUND_COLOUR
    return colours


@dataclass(frozen=True, kw_only=True)
class LegendEntry:
    """One line of a legend: a class that is present in the image."""

    name: str
    """Class name."""
    colour: tuple[int, int, int]
    """8-bit sRGB colour of the class."""
    fraction: float
    """Fraction of the image's pixels that belong to the class, in 0..1."""


def legend_entries(labels: np.ndarray, classes: Sequence[str]) -> list[LegendEntry]:
    """List the classes that have pixels in labels (H, W), the largest first; pixels of "no class" get no entry."""
    values, counts = np.unique(labels, return_counts=True)
    colours = class_colours(classes)
    present = [(int(value), int(count)) for value, count in zip(values, counts, strict=True) if value < len(classes)]
    return [
        LegendEntry(name=classes[index], colour=rgb(colours[index]), fraction=count / labels.size)
        for index, count in sorted(present, key=lambda item: (-item[1], item[0]))
    ]


def rgb(colour: np.ndarray) -> tuple[int, int, int]:
    """Convert a row of a colour table to a tuple of three ints, as Pillow and CSS need it."""
    red, green, blue = (int(channel) for channel in colour)
    return red, green, blue


def upscale_factor(height: int, width: int, min_side: int = _MIN_SIDE) -> int:
    """Return the integer factor, at least 1, that enlarges the shorter side to ``min_side`` px or more.

    It is smaller if the longer side would exceed 2048 px.
    """
    wanted = -(-min_side // min(height, width))
    return max(1, min(wanted, _MAX_SIDE // max(height, width)))


def _enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    return array if factor == 1 else array.repeat(factor, axis=0).repeat(factor, axis=1)


def _borders(labels: np.ndarray) -> np.ndarray:
    """Return a mask of the pixels that differ from their right or lower neighbour. Shape: (H, W), bool."""
    border = np.zeros(labels.shape, dtype=bool)
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    border[:-1] |= labels[:-1] != labels[1:]
    return border


def _darken(rendered: Image.Image, where: np.ndarray) -> Image.Image:
    darker = Image.blend(rendered, Image.new("RGB", rendered.size, (10, 12, 16)), 0.7)
    return Image.composite(darker, rendered, Image.fromarray(where))


def draw_overlay(
    image: np.ndarray | None,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    opacity: float = 0.55,
    factor: int = 1,
) -> Image.Image:
    """Render class colours over an image, as an RGB image of factor * (W, H) px.

    The image is converted to grey under each class, so that every tint comes from the class colours alone. Pixels of "no class"
    keep the image's own colours.

    Args:
        image: the image; None renders the class colours only. Shape: (H, W, 3), uint8 RGB.
        labels: class index of every pixel. Shape: (H, W).
        classes: class names, in index order.
        opacity: opacity of the class colours, in 0..1; without effect if ``image`` is None.
        factor: integer factor to enlarge by.
    """
    index = _enlarge(np.minimum(labels, np.uint16(len(classes))), factor)
    table = np.vstack([class_colours(classes), np.array([_NO_CLASS_COLOUR], dtype=np.uint8)])
    tint = Image.fromarray(table[index])
    if image is None:
        return _darken(tint, _borders(index)) if factor > 1 else tint

    photo = Image.fromarray(image)
    if factor > 1:
        photo = photo.resize(tint.size, Image.Resampling.NEAREST)
    rendered = Image.blend(photo.convert("L").convert("RGB"), tint, opacity)
    rendered = Image.composite(rendered, photo, Image.fromarray(index < len(classes)))
    return _darken(rendered, _borders(index)) if factor > 1 else rendered


def draw_clusters(clusters: np.ndarray, *, factor: int = 1) -> Image.Image:
    """Render a cluster map as an RGB image of factor * (W, H) px.

    The colours are pastel, so that they are not mistaken for class colours; clusters have no names.

    Args:
        clusters: cluster index of every pixel, 0 or more. Shape: (H, W), integers.
        factor: integer factor to enlarge by.
    """
    index = _enlarge(clusters, factor)
    colours = palette(int(clusters.max()) + 1).astype(np.uint16)
    pastel = ((colours + 255) // 2).astype(np.uint8)
    rendered = Image.fromarray(pastel[index])
    return _darken(rendered, _borders(index)) if factor > 1 else rendered


def add_legend(rendered: Image.Image, entries: Sequence[LegendEntry]) -> Image.Image:
    """Add a white legend below the image, with a colour patch, the name and the area fraction of each entry.

    The font size grows with the width of the image. Names that are too long for the image end in an ellipsis.
    """
    if not entries:
        return rendered
    width = max(rendered.width, _MIN_SIDE)
    size = min(max(width // 32, 13), 44)  # px: one line
    font = _font(size, ascii_only=all(entry.name.isascii() for entry in entries))
    patch, pad, line = size, size // 2, size * 3 // 2
    texts = [_fit(_entry_text(entry), font, width - 3 * pad - patch) for entry in entries]
    cell = int(max(font.getlength(text) for text in texts)) + patch + 2 * pad
    columns = max(1, (width - pad) // cell)
    rows = -(-len(texts) // columns)

    canvas = Image.new("RGB", (width, rendered.height + rows * line + 2 * pad), "white")
    canvas.paste(rendered, ((width - rendered.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for number, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        left = pad + number % columns * cell
        middle = rendered.height + pad + number // columns * line + line // 2
        box = (left, middle - patch // 2, left + patch, middle - patch // 2 + patch)
        draw.rounded_rectangle(box, radius=patch // 5, fill=entry.colour)
        draw.text((left + patch + pad, middle), text, font=font, fill=(28, 30, 34), anchor="lm")
    return canvas


def percent_text(fraction: float) -> str:
    """Return a fraction in 0..1 as text in whole per cent; positive fractions below 0.5 % become "<1 %".

    Example:
        >>> percent_text(0.123), percent_text(0.001)
        ('12 %', '<1 %')
    """
    return "<1 %" if 0 < fraction < 0.005 else f"{fraction:.0%}".replace("%", " %")


def _font(size: int, *, ascii_only: bool) -> ImageFont.FreeTypeFont:
    """Load Pillow's built-in font, which has only ASCII, or the font of matplotlib for Latin, Greek and Cyrillic."""
    if ascii_only:
        return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))
    import matplotlib as mpl  # slow to import, and rarely needed

    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size=size)


def _entry_text(entry: LegendEntry) -> str:
    return f"{entry.name}  {percent_text(entry.fraction)}"


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
