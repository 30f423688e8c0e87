"""Short videos of synthetic scenes with exact masks and exact motion, for measuring video segmentation.

A video is one scene of `vilseg.data.synthetic.scenes`, seen by a camera that pans over it while its objects move along. Light and
drawings stay as they are; sensor noise is new in every frame. Since everything that moves is moved here, each pixel's place
in the frame before is known, not estimated. Everything follows from (seed, split, index, size, frames).
"""

import math
import random
from dataclasses import dataclass

import numpy as np

from vilseg.data.synthetic import scenes
from vilseg.data.synthetic.layout import Item, choose_bands, choose_items
from vilseg.data.synthetic.textures import seed_of
from vilseg.errors import DataError

_WORLD = 1.25
"""Side of the scene that the camera pans over, in image sides."""

_CAMERA_SPEED = 0.012
_OBJECT_SPEED = 0.022
"""Highest speeds, in image sides a frame: a walk across the image takes two seconds at 25 frames/s."""

_NOTHING = 255


@dataclass(frozen=True, kw_only=True, eq=False)
class SyntheticVideo:
    """A video of T frames with its exact masks and motion."""

    images: np.ndarray
    """(T, H, W, 3) uint8 RGB."""
    masks: np.ndarray
    """(T, H, W) uint8 class ids, positions in `scenes.CLASSES`."""
    sources: np.ndarray
    """(T, H, W) int32: position of the same point of the same thing in the frame before, as y * W + x, rounded to whole
    pixels; -1 where it was hidden or outside, and everywhere in the first frame."""


def render_video(
    seed: int, index: int, size: int = 96, *, frames: int = 24, split: scenes.Split = "eval"
) -> SyntheticVideo:
    """Draw video ``index`` of the stream (``seed``, ``split``).

    Args:
        seed: Names the stream, with ``split``; textures and drawings are those that `scenes.render_scene` has for it.
        index: Position in the stream, from 0.
        size: Height and width in pixels, at least 32.
        frames: Length of the video.
        split: "train" or "eval".

    Raises:
        DataError: ``size`` or ``frames`` is too small.
    """
    if size < scenes.MIN_SIZE:
        raise DataError(f"size of synthetic scenes is {size} pixels; ask for at least {scenes.MIN_SIZE}")
    if frames < 1:
        raise DataError(f"a video of {frames} frames was asked for; ask for at least 1")
    stream = f"{seed}/{split}"
    rng = random.Random(seed_of(stream, "film", index))
    world = round(size * _WORLD)
    bands = choose_bands(rng)
    items = choose_items(rng, bands, scenes.OBJECTS)
    canvas, ground = scenes.draw_stuff(rng, stream, bands, world)
    drawing_seeds = [rng.getrandbits(64) for _ in items]
    speeds = [_velocity(rng, _OBJECT_SPEED / _WORLD) for _ in items]
    camera = _camera_path(rng, frames, size, world - size)
    shading, noise = _light(rng, size)

    images = np.empty((frames, size, size, 3), np.uint8)
    masks = np.empty((frames, size, size), np.uint8)
    sources = np.full((frames, size, size), -1, np.int32)
    before: tuple[np.ndarray, np.ndarray] | None = None
    for t, corner in enumerate(camera):
        window = (slice(None), *(slice(start, start + size) for start in corner))
        image, mask = canvas.copy(), ground.copy()
        owners = np.full((world, world), _NOTHING, np.uint8)
        # Where each thing is, ground last: owner number -> (y, x) in pixels of the image.
        places = np.empty((len(items) + 1, 2))
        for number, (item, drawing_seed, (down, right)) in enumerate(zip(items, drawing_seeds, speeds, strict=True)):
            moved = Item(item.name, item.variant, item.x + right * t, item.base + down * t, item.scale)
            outline = np.full_like(mask, _NOTHING)
            scenes.draw_item(random.Random(drawing_seed), stream, moved, image, outline)
            covered = outline != _NOTHING
            mask[covered], owners[covered] = outline[covered], number
            places[number] = (moved.base * world - corner[0], moved.x * world - corner[1])
        places[-1] = (-corner[0], -corner[1])
        owners[owners == _NOTHING] = len(items)
        owners = owners[window[1:]]
        grain = np.random.default_rng(seed_of(stream, "grain", index, t)).standard_normal(shading.shape, np.float32)
        exposed = image[window] * shading + noise * grain
        images[t] = np.moveaxis(exposed.clip(0, 255).astype(np.uint8), 0, -1)
        masks[t] = mask[window[1:]]
        if before is not None:
            sources[t] = _sources(owners, places, *before)
        before = owners, places
    return SyntheticVideo(images=images, masks=masks, sources=sources)


def _velocity(rng: random.Random, highest: float) -> tuple[float, float]:
    """Draw a velocity (down, right) per frame in any direction, with a speed up to ``highest``."""
    speed, angle = rng.uniform(0.0, highest), rng.uniform(0.0, 2 * math.pi)
    return 0.4 * speed * math.sin(angle), speed * math.cos(angle)  # things move along the ground more than up and down


def _camera_path(rng: random.Random, frames: int, size: int, room: int) -> list[tuple[int, int]]:
    """Draw top and left of the image in the world for every frame, within 0..``room`` pixels: to and fro, smoothly."""
    path = []
    for _ in range(2):
        # A sine of amplitude room / 2 moves by speed at most if its angle grows by 2 speed / room.
        speed = rng.uniform(0.0, _CAMERA_SPEED) * size
        angle = rng.uniform(0.0, 2 * math.pi) + 2 * speed / room * np.arange(frames)
        path.append(np.rint(room / 2 * (1 + np.sin(angle))).astype(int))
    return [(int(top), int(left)) for top, left in zip(*path, strict=True)]


def _light(rng: random.Random, size: int) -> tuple[np.ndarray, float]:
    """Draw light, cast and uneven shading as one factor, (3, H, W) float32, and the strength of the noise in grey levels."""
    cast = np.array([rng.uniform(0.9, 1.08) for _ in range(3)]) * rng.uniform(0.8, 1.14)
    ticks = (np.arange(size) + 0.5) / size - 0.5
    slope = 1 + rng.uniform(-0.22, 0.22) * ticks + rng.uniform(-0.15, 0.15) * ticks[:, None]
    return (cast[:, None, None] * slope).astype(np.float32), rng.uniform(1.0, 5.0)


def _sources(
    owners: np.ndarray, places: np.ndarray, owners_before: np.ndarray, places_before: np.ndarray
) -> np.ndarray:
    """Return the position of each pixel's thing in the frame before; see `SyntheticVideo.sources`."""
    size = len(owners)
    shift = np.rint(places - places_before).astype(int)[owners]
    y, x = np.indices(owners.shape)
    y, x = y - shift[..., 0], x - shift[..., 1]
    inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
    source = np.where(inside, y * size + x, 0)
    return np.where(inside & (owners_before.ravel()[source] == owners), source, -1)
