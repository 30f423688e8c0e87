"""Synthetic scenes with captions, which are the data of the demo and the tests and need no download.

A scene has one to three kinds of background stuff and one to four objects in front. Training uses only images and captions
(`pairs`). Evaluation uses images and exact masks (`write_masked_dataset`) from a stream that has no scene, texture or drawing in
common with training. A scene depends only on (seed, split, index, size).

As in real images, colour alone does not determine the class of a patch: each class has typical colours, but all of them occur in
other classes, and brightness, colour cast and noise vary. Texture and shape are needed as well.
"""

import dataclasses
import functools
import io
import math
import random
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from vilseg import storage
from vilseg.data.synthetic import objects, textures
from vilseg.data.synthetic.captions import write_caption
from vilseg.data.synthetic.drawing import favour_first
from vilseg.data.synthetic.layout import Band, Item, choose_bands, choose_items
from vilseg.errors import DataError

Split = Literal["train", "eval"]

_JPEG_QUALITY = 92
MIN_SIZE = 32
"""Minimum side of an image in pixels; in smaller ones, textures cannot be distinguished."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneClass:
    """Class of synthetic scenes, whose id is its index in `CLASSES`.

    Attributes:
        name: name of the class in ``classes.txt``.
        synonyms: other names that captions use, the most frequent first.
        kind: "stuff" (background without a definite outline) or "object".
    """

    name: str
    synonyms: tuple[str, ...]
    kind: Literal["stuff", "object"]

    @property
    def names(self) -> tuple[str, ...]:
        """Name and synonyms of the class, the most frequent first."""
        return (self.name, *self.synonyms)


_NAMES: dict[Literal["stuff", "object"], tuple[tuple[str, ...], ...]] = {
    "stuff": (
        ("sky", "clouds"),
        ("grass", "lawn", "meadow"),
        ("sand", "beach"),
        ("water", "sea", "lake"),
        ("snow", "ice"),
        ("wall", "bricks", "brick wall"),
        ("fence", "planks"),
    ),
    "object": (
        ("ball", "beachball"),
        ("tree", "oak"),
        ("house", "cottage", "home"),
        ("car", "automobile", "vehicle"),
        ("boat", "sailboat", "ship"),
        ("cat", "kitten"),
        ("umbrella", "parasol"),
        ("mushroom", "toadstool"),
        ("sheep", "lamb"),
        ("flower", "daisy", "blossom"),
        ("kite", "paper kite"),
        ("clock", "timer"),
    ),
}

CLASSES: tuple[SceneClass, ...] = tuple(
    SceneClass(name=names[0], synonyms=names[1:], kind=kind) for kind, group in _NAMES.items() for names in group
)
"""All classes. Every pixel of a scene belongs to one of them; there is no class ``background``."""

_ID = {scene_class.name: index for index, scene_class in enumerate(CLASSES)}
OBJECTS = tuple(scene_class.name for scene_class in CLASSES if scene_class.kind == "object")


class SceneObject(NamedTuple):
    """Object in a scene, with its class id and the box in which it was drawn (with a margin), in pixels of the image."""

    class_id: int
    x: int
    y: int
    width: int
    height: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Image with its caption and its exact mask.

    Attributes:
        image: RGB image. Shape: (H, W, 3), uint8.
        mask: class ids, which are indices in `CLASSES`. Shape: (H, W), uint8.
        caption: caption, which names some of the classes in the image.
        objects: objects, the farthest first.
        stuff: class ids of the background stuff.
        named: class ids that the caption names.
    """

    image: np.ndarray
    mask: np.ndarray
    caption: str
    objects: tuple[SceneObject, ...]
    stuff: tuple[int, ...]
    named: frozenset[int]


class ScenePair(NamedTuple):
    """Training pair: key, JPEG bytes and captions."""

    key: str
    image: bytes
    captions: list[str]


def render_scene(seed: int, index: int, size: int = 96, *, split: Split = "train") -> Scene:
    """Draw scene number ``index`` of the stream (``seed``, ``split``).

    The same arguments give the same bytes in every process. Another size gives the same scene with different textures. The splits
    have no scene in common.

    Args:
        seed: identifies the stream together with ``split``.
        index: number of the scene in the stream, from 0.
        size: height and width in pixels, at least 32.
        split: "train" or "eval".

    Raises:
        DataError: ``size`` is too small or ``split`` is unknown.

    Example:
        >>> scene = render_scene(seed=0, index=3, size=32)
        >>> scene.image.shape, scene.mask.shape
        ((32, 32, 3), (32, 32))
    """
    if size < MIN_SIZE:
        raise DataError(f"size of synthetic scenes is {size} pixels; ask for at least {MIN_SIZE}")
    if split not in ("train", "eval"):
        raise DataError(f"split of synthetic scenes is {split!r}; ask for 'train' or 'eval'")
    stream = f"{seed}/{split}"
    rng = random.Random(textures.seed_of(stream, index))
    bands = choose_bands(rng)
    items = choose_items(rng, bands, OBJECTS)

    canvas, mask = draw_stuff(rng, stream, bands, size)
    drawn = [draw_item(rng, stream, item, canvas, mask) for item in items]
    image = _light(rng, canvas)

    by_class: dict[str, list[str | None]] = {}
    for item in items:
        colour = objects.sprite(stream, item.name, item.variant).colour
        by_class.setdefault(item.name, []).append(colour)
    stuff = [band.name for band in bands]
    caption, said_objects, said_stuff = write_caption(
        [(CLASSES[_ID[name]].names, colours) for name, colours in by_class.items()],
        [(name, CLASSES[_ID[name]].names) for name in stuff],
        rng,
    )
    said = zip([*by_class, *stuff], [*said_objects, *said_stuff], strict=True)
    return Scene(
        image=image,
        mask=mask,
        caption=caption,
        objects=tuple(drawn),
        stuff=tuple(_ID[name] for name in stuff),
        named=frozenset(_ID[name] for name, named in said if named),
    )


def pairs(count: int, seed: int, size: int = 96, *, start: int = 0, split: Split = "train") -> Iterator[ScenePair]:
    """Yield ``count`` training pairs, which are the scenes ``start`` to ``start + count - 1`` of the stream.

    Several workers with successive ranges yield the same pairs as one worker with the whole range.
    """
    for index in range(start, start + count):
        scene = render_scene(seed, index, size, split=split)
        yield ScenePair(f"{index:08d}", _jpeg(scene.image), [scene.caption])


def write_masked_dataset(folder_uri: str, count: int, seed: int, size: int = 96, *, split: Split = "eval") -> None:
    """Write ``count`` scenes with their masks as a masked dataset of kind ``folder``.

    The files are ``images/NAME.jpg``, ``masks/NAME.png`` (8 bit, value = class id) and ``classes.txt`` (line i: class id i).

    Raises:
        StorageError: The folder cannot be written.
    """
    for index in range(count):
        scene = render_scene(seed, index, size, split=split)
        png = io.BytesIO()
        Image.fromarray(scene.mask).save(png, format="PNG")
        storage.write_bytes(storage.join(folder_uri, "images", f"{index:06d}.jpg"), _jpeg(scene.image))
        storage.write_bytes(storage.join(folder_uri, "masks", f"{index:06d}.png"), png.getvalue())
    # Written last, so that a folder with a class list is complete.
    names = "".join(f"{scene_class.name}\n" for scene_class in CLASSES)
    storage.write_bytes(storage.join(folder_uri, "classes.txt"), names.encode())


def _jpeg(image: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=_JPEG_QUALITY, colorspace="RGB", colorsubsampling="444"
    )


@functools.lru_cache(maxsize=8)
def _ticks(size: int) -> np.ndarray:
    """Return the coordinates of the pixel centres along one side, in 0..1. Shape: -> (size,), float32."""
    return ((np.arange(size) + 0.5) / size).astype(np.float32)


def draw_stuff(rng: random.Random, stream: str, bands: list[Band], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the background of a scene and return its image (3, H, W), float32 in 0..255, and its mask (H, W), uint8."""
    ticks = _ticks(size)
    canvas = _draw_texture(rng, stream, bands[0].name, size)
    mask = np.full((size, size), _ID[bands[0].name], np.uint8)
    for band in bands[1:]:
        edge = band.top + band.slope * (ticks - 0.5)
        if band.wave:
            bumps, shift = rng.uniform(1.0, 2.5), rng.uniform(0.0, 2 * math.pi)
            edge = edge + band.wave * np.sin(2 * math.pi * bumps * ticks + shift)
        # Distance below the boundary in pixels; the two bands are blended over one pixel.
        below = (ticks[:, None] - edge) * (size / math.hypot(1.0, band.slope))
        np.putmask(mask, below > 0, _ID[band.name])
        canvas += np.clip(below + 0.5, 0.0, 1.0) * (_draw_texture(rng, stream, band.name, size) - canvas)
    return canvas, mask


def _draw_texture(rng: random.Random, stream: str, name: str, size: int) -> np.ndarray:
    """Colour a random crop of a texture and return it. Shape: -> (3, size, size), float32 in 0..255."""
    fields = textures.texture(stream, name, rng.randrange(textures.VARIANTS), size)
    # Not randrange, because its number of draws depends on the size, and so would the rest of the scene.
    y, x = (int(rng.random() * (fields.shape[1] - size + 1)) for _ in range(2))
    blend, gain = fields[:, y : y + size, x : x + size]
    if rng.random() < 0.5:
        blend, gain = blend[:, ::-1], gain[:, ::-1]
    palettes = textures.PALETTES[name]
    palette = np.array(rng.choices(palettes, weights=favour_first(len(palettes)))[0], np.float32)
    # A large shift common to all three colours and a small one for each, because scenes differ more than parts of a surface.
    common = [rng.uniform(-16, 16) for _ in range(3)]
    palette += [[value + rng.uniform(-6, 6) for value in common] for _ in range(3)]
    far, near, accent = palette[:, :, None, None]
    surface = far + (near - far) * _ticks(size)[:, None]
    return (surface + (accent - surface) * blend) * gain


def draw_item(rng: random.Random, stream: str, item: Item, canvas: np.ndarray, mask: np.ndarray) -> SceneObject:
    """Draw an object with its shadow into ``canvas`` (3, H, W) and ``mask`` (H, W), which are changed in place."""
    size = mask.shape[0]
    side = item.scale * size
    angle = rng.gauss(0.0, 0.1)
    stretch_x, stretch_y = rng.uniform(0.92, 1.08), rng.uniform(0.92, 1.08)
    half = math.ceil(side * 0.5 * (abs(math.cos(angle)) + abs(math.sin(angle))) * max(stretch_x, stretch_y)) + 1
    cx, cy = item.x * size, item.base * size - side / 2
    left, top = round(cx) - half, round(cy) - half

    if item.name != "kite":
        _draw_shadow(canvas, cx, item.base * size, side)

    levels = objects.sprite(stream, item.name, item.variant).levels
    drawing = next((level for level in reversed(levels) if level.width >= side), levels[0])
    zoom_x = drawing.width / (side * stretch_x) * rng.choice((-1.0, 1.0))
    zoom_y = drawing.width / (side * stretch_y)
    cos, sin, middle = math.cos(angle), math.sin(angle), drawing.width / 2
    # Map from pixels of the box to pixels of the drawing: shift to the centre, inverse rotation, zoom, shift.
    dx, dy = left - cx, top - cy
    affine = (
        zoom_x * cos, zoom_x * sin, middle + zoom_x * (cos * dx + sin * dy),
        -zoom_y * sin, zoom_y * cos, middle + zoom_y * (cos * dy - sin * dx),
    )  # fmt: skip
    box = drawing.transform((2 * half, 2 * half), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    y0, y1, x0, x1 = max(0, top), min(size, top + 2 * half), max(0, left), min(size, left + 2 * half)
    pixels = np.frombuffer(box.tobytes(), np.uint8).reshape(2 * half, 2 * half, 4)[
        y0 - top : y1 - top, x0 - left : x1 - left
    ]
    planes = np.moveaxis(pixels, -1, 0).astype(np.float32)
    tint = np.array([rng.uniform(0.8, 1.12) for _ in range(3)], np.float32) * np.float32(rng.uniform(0.85, 1.1))
    opacity = planes[3] * np.float32(1 / 255)
    window = canvas[:, y0:y1, x0:x1]
    window *= 1.0 - opacity
    window += planes[:3] * tint[:, None, None]
    mask[y0:y1, x0:x1][opacity > 0.5] = _ID[item.name]
    return SceneObject(_ID[item.name], x0, y0, x1 - x0, y1 - y0)


def _draw_shadow(canvas: np.ndarray, cx: float, base: float, side: float) -> None:
    """Darken ``canvas`` in place under an object of ``side`` pixels whose lower edge has its middle at (cx, base)."""
    size = canvas.shape[1]
    x0, x1 = max(0, round(cx - 0.6 * side)), min(size, round(cx + 0.6 * side))
    y0, y1 = max(0, round(base - 0.16 * side)), min(size, round(base + 0.12 * side))
    dx = (np.arange(x0, x1, dtype=np.float32) + 0.5 - cx) / (0.34 * side)
    dy = (np.arange(y0, y1, dtype=np.float32) + 0.5 - base + 0.03 * side) / (0.07 * side)
    canvas[:, y0:y1, x0:x1] *= 1.0 - 0.45 * np.exp(-(dy * dy))[:, None] * np.exp(-(dx**4))


def _light(rng: random.Random, canvas: np.ndarray) -> np.ndarray:
    """Apply brightness, colour cast, uneven shading and sensor noise, and return the image (H, W, 3), uint8."""
    size = canvas.shape[1]
    bright = rng.uniform(0.8, 1.14)
    cast = np.array([bright * rng.uniform(0.9, 1.08) for _ in range(3)], np.float32)
    slope_x, slope_y = rng.uniform(-0.22, 0.22), rng.uniform(-0.15, 0.15)
    ticks = _ticks(size) - np.float32(0.5)
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(canvas.shape, np.float32)
    canvas *= cast[:, None, None] * (1.0 + slope_x * ticks + slope_y * ticks[:, None])
    canvas += noise * np.float32(rng.uniform(1.0, 5.0))
    np.clip(canvas, 0.0, 255.0, out=canvas)
    return np.ascontiguousarray(np.moveaxis(canvas.astype(np.uint8), 0, -1))
