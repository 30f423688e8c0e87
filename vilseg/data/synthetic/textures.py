"""Textures of the background stuff in synthetic scenes, which are grey and get their colours when a scene is drawn.

A texture consists of two arrays: ``blend``, the weight of the accent colour (for clouds, wave crests, mortar), and ``gain``, a
factor on the brightness (for blades, grains, planks). Because a texture has no colours, it can be combined with every palette of
its class. Palettes of different classes overlap deliberately, so that the pattern is needed to recognize the class of a patch.

Lengths are fractions of the image side, so that a texture is independent of the image size.
"""

import functools
import hashlib
from collections.abc import Callable

import numpy as np
from PIL import Image

VARIANTS = 6
"""Number of textures of each stuff class in a stream; scenes vary them by crops, mirroring and palettes."""

_MARGIN = 1.75
"""Side of a texture as a multiple of the image side, which leaves room for random crops."""

Texture = np.ndarray
"""``blend`` in 0..1 and ``gain`` around 1. Shape: (2, E, E), float32, with E = 1.75 image sides."""

# Surface colour far away (top of the image), surface colour nearby (bottom), and accent colour, as RGB in 0..255.
Palette = tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]

PALETTES: dict[str, tuple[Palette, ...]] = {
    "sky": (
        ((84, 142, 208), (176, 208, 232), (250, 250, 250)),
        ((54, 108, 190), (134, 182, 222), (240, 244, 250)),
        ((150, 160, 172), (196, 200, 204), (228, 230, 232)),
        ((110, 100, 160), (240, 170, 130), (250, 214, 180)),
        ((206, 120, 96), (246, 206, 140), (252, 232, 200)),
        ((60, 70, 110), (150, 130, 160), (190, 176, 190)),
        ((120, 186, 190), (206, 226, 210), (250, 250, 240)),
    ),
    "grass": (
        ((124, 168, 84), (82, 138, 56), (166, 200, 96)),
        ((96, 140, 80), (52, 104, 46), (122, 164, 84)),
        ((186, 176, 104), (150, 138, 70), (214, 202, 130)),
        ((150, 150, 90), (110, 118, 60), (190, 180, 110)),
        ((170, 136, 84), (134, 100, 56), (200, 160, 100)),
        ((110, 156, 140), (62, 112, 100), (146, 190, 166)),
    ),
    "sand": (
        ((228, 206, 164), (212, 184, 136), (240, 222, 186)),
        ((222, 190, 130), (200, 160, 96), (240, 212, 156)),
        ((190, 182, 170), (164, 154, 140), (212, 204, 194)),
        ((206, 150, 110), (184, 120, 84), (226, 176, 136)),
        ((236, 228, 212), (220, 208, 188), (250, 244, 232)),
        ((150, 130, 104), (122, 102, 78), (176, 156, 128)),
    ),
    "water": (
        ((96, 160, 204), (40, 98, 160), (200, 226, 240)),
        ((110, 196, 200), (40, 140, 156), (214, 242, 240)),
        ((150, 168, 180), (88, 108, 122), (212, 220, 226)),
        ((230, 170, 130), (126, 100, 130), (252, 216, 170)),
        ((110, 150, 120), (52, 96, 78), (178, 206, 172)),
        ((60, 84, 130), (28, 46, 84), (140, 166, 206)),
    ),
    "snow": (
        ((236, 240, 246), (246, 248, 252), (184, 198, 222)),
        ((214, 224, 240), (228, 236, 248), (154, 176, 212)),
        ((246, 226, 220), (250, 238, 232), (206, 176, 196)),
        ((196, 200, 210), (212, 216, 224), (146, 150, 168)),
        ((250, 238, 210), (252, 246, 228), (206, 196, 190)),
    ),
    "wall": (
        ((178, 88, 66), (160, 74, 56), (206, 196, 182)),
        ((144, 96, 72), (126, 80, 60), (190, 176, 158)),
        ((160, 158, 154), (140, 138, 136), (206, 204, 200)),
        ((212, 180, 120), (196, 160, 100), (232, 220, 196)),
        ((232, 228, 220), (220, 214, 204), (178, 172, 164)),
        ((104, 134, 168), (88, 116, 150), (176, 190, 206)),
        ((120, 148, 110), (100, 128, 92), (186, 196, 176)),
    ),
    "fence": (
        ((160, 116, 76), (142, 98, 62), (70, 46, 30)),
        ((176, 172, 164), (154, 150, 142), (84, 80, 76)),
        ((236, 234, 228), (222, 218, 210), (134, 130, 124)),
        ((92, 140, 110), (76, 120, 92), (36, 58, 46)),
        ((96, 140, 180), (80, 120, 160), (40, 60, 84)),
        ((174, 74, 60), (154, 60, 50), (76, 32, 28)),
        ((214, 176, 118), (196, 156, 98), (110, 80, 46)),
    ),
}
"""Palettes (far, near and accent colour) of each stuff class."""


def seed_of(*parts: object) -> int:
    """Return a 64-bit seed that depends only on ``parts`` and is the same in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells_y: float, cells_x: float) -> np.ndarray:
    """Return smooth noise in about -1..1, interpolated from a ``cells_y`` x ``cells_x`` grid of random values.

    Shape: -> (height, width), float32.
    """
    coarse = rng.uniform(-1.0, 1.0, (max(2, round(cells_y)), max(2, round(cells_x)))).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@functools.lru_cache(maxsize=256)
def texture(stream: str, name: str, variant: int, size: int) -> Texture:
    """Return a texture of the stuff class ``name``.

    Args:
        stream: name of the stream; two streams have no texture in common.
        name: stuff class, a key of `PALETTES`.
        variant: number of the texture, 0 to `VARIANTS` - 1.
        size: side of the image in pixels.
    """
    rng = np.random.default_rng(seed_of(stream, name, variant))
    extent = int(size * _MARGIN)
    ticks = (np.arange(extent, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    blend, gain = _PAINTERS[name](rng, y, x)
    return np.stack([np.clip(blend, 0.0, 1.0), gain]).astype(np.float32)


def _noise(rng: np.random.Generator, y: np.ndarray, period_y: float, period_x: float) -> np.ndarray:
    """Return smooth noise of the shape of ``y``, with a grid spacing of ``period_y`` x ``period_x`` image sides."""
    return smooth_noise(rng, y.shape[0], y.shape[1], _MARGIN / period_y, _MARGIN / period_x)


def _sky(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blend and gain of soft clouds, wider than high."""
    field = _noise(rng, y, 0.22, 0.42) + 0.5 * _noise(rng, y, 0.1, 0.19) + 0.25 * _noise(rng, y, 0.05, 0.09)
    clouds = np.clip((field - rng.uniform(-0.1, 0.25)) * 1.8, 0.0, 1.0)
    return clouds * clouds * (3.0 - 2.0 * clouds) * 0.95, np.ones_like(y)


def _grass(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blend and gain of upright, slightly leaning blades in tufts."""
    blades = _noise(rng, y, 0.075, 0.022) + 0.7 * _noise(rng, y, 0.05, 0.017)
    lean = np.round(rng.uniform(-0.4, 0.4) * np.arange(len(y))).astype(int)
    columns = (np.arange(len(y))[None, :] + lean[:, None]) % len(y)
    blades = np.take_along_axis(blades, columns, axis=1)
    tufts = _noise(rng, y, 0.16, 0.22)
    return 0.5 + 0.75 * blades, 1.0 + 0.2 * blades + 0.1 * tufts


def _sand(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blend and gain of fine grains with faint ripples and pebbles."""
    warp = 0.05 * _noise(rng, y, 0.3, 0.4)
    ripples = np.sin(2 * np.pi * (y + 0.3 * x + warp) / rng.uniform(0.2, 0.28))
    grains = rng.normal(0.0, 1.0, y.shape).astype(np.float32)
    coarse = _noise(rng, y, 0.03, 0.03)
    pebbles = np.clip((coarse - 0.72) * 6.0, 0.0, 1.0)
    return 0.5 + 0.25 * ripples + 0.2 * grains, 1.0 + 0.05 * grains + 0.03 * coarse - 0.3 * pebbles


def _water(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blend and gain of rows of waves with broken, bright crests."""
    period = rng.uniform(0.085, 0.115)
    warp = 0.045 * _noise(rng, y, 0.12, 0.2) + 0.012 * np.sin(2 * np.pi * x / 0.14 + rng.uniform(0.0, 6.28))
    phase = (y + warp) / period
    saw = phase - np.floor(phase)
    crest = np.exp(-(((saw - 0.5) / 0.13) ** 2)) * np.clip(0.55 + 0.9 * _noise(rng, y, 0.09, 0.2), 0.0, 1.0)
    return crest, 1.0 + 0.26 * (saw - 0.5) + 0.05 * _noise(rng, y, 0.2, 0.4)


def _snow(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blend and gain of soft drifts, lit from one side, with a few sparkles."""
    field = (y + 0.09 * _noise(rng, y, 0.3, 0.36) + 0.03 * _noise(rng, y, 0.1, 0.14)) / rng.uniform(0.2, 0.26)
    drift = field - np.floor(field)
    shadow = np.clip(1.15 - 1.5 * drift, 0.0, 1.0) * np.clip(drift * 9.0, 0.0, 1.0)
    sparkle = (rng.random(y.shape) > 0.982) * 0.16
    return 0.85 * shadow, 1.0 + sparkle + 0.02 * _noise(rng, y, 0.05, 0.05)


def _wall(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blend and gain of a brick wall in running bond, each brick with its own tone."""
    height = rng.uniform(0.085, 0.105)
    width = height * rng.uniform(2.0, 2.4)
    joint = 0.016
    row = np.floor(y / height)
    column = x / width + 0.5 * (row % 2)
    tones = rng.uniform(-0.2, 0.2, (64, 64))
    tone = tones[row.astype(int) % 64, np.floor(column).astype(int) % 64]
    in_y, in_x = (y - row * height), (column - np.floor(column)) * width
    mortar = np.maximum(np.clip((joint - in_y) / 0.006 + 0.5, 0, 1), np.clip((joint - in_x) / 0.006 + 0.5, 0, 1))
    rough = 0.05 * rng.normal(0.0, 1.0, y.shape)
    return mortar, 1.0 + (tone + rough) * (1.0 - mortar)


def _fence(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blend and gain of upright planks with dark gaps, grain and a bevel."""
    width = rng.uniform(0.12, 0.15)
    plank = np.floor(x / width)
    inside = x / width - plank
    tone = rng.uniform(-0.12, 0.12, 64)[plank.astype(int) % 64]
    grain = _noise(rng, y, 0.5, 0.022) + 0.4 * _noise(rng, y, 0.2, 0.014)
    edge = np.minimum(inside, 1.0 - inside) * width
    gap = np.clip((0.011 - edge) / 0.005 + 0.5, 0.0, 1.0)
    return gap, 1.0 + tone + 0.09 * grain + 0.22 * (0.5 - inside)


_PAINTERS: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "sky": _sky,
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "snow": _snow,
    "wall": _wall,
    "fence": _fence,
}
