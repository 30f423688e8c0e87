"""Short videos of synthetic scenes with exact masks and exact motion, for measuring video segmentation.

A video shows one scene in the style of `vilseg.data.synthetic.scenes`, over which a camera pans while the objects move. Light and
drawings are constant, and sensor noise is drawn for every frame. Because all motion is synthetic, the position of each pixel in
the previous frame is known exactly. The result depends only on (seed, split, index, size, frames).
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
"""Side of the scene over which the camera pans, as a multiple of the image side."""

_CAMERA_SPEED = 0.012
_OBJECT_SPEED = 0.022
"""Maximum speeds of the camera and of an object, in image sides per frame. At 25 frames/s, an object crosses the image
in two seconds."""

_NOTHING = 255


@dataclass(frozen=True, kw_only=True, eq=False)
class SyntheticVideo:
    """Video of T frames with its exact masks and motion."""

    images: np.ndarray
    """RGB frames. Shape: (T, H, W, 3), uint8."""
    masks: np.ndarray
    """Class ids, which are indices in `scenes.CLASSES`. Shape: (T, H, W), uint8."""
    sources: np.ndarray
    """Position of the same point of the same object (or of the background) in the previous frame, as y * W + x, rounded to whole
    pixels; -1 if the point was occluded or outside the image, and in the whole first frame. Shape: (T, H, W), int32."""


def render_video(
    seed: int, index: int, size: int = 96, *, frames: int = 24, split: scenes.Split = "eval"
) -> SyntheticVideo:
    """Draw video number ``index`` of the stream (``seed``, ``split``).

    Args:
        seed: identifies the stream together with ``split``; `scenes.render_scene` uses the same textures and drawings for it.
        index: number of the video in the stream, from 0.
        size: height and width in pixels, at least 32.
        frames: number of frames, at least 1.
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
        # Position (y, x) of each object, and last of the background, in pixels of the image; indexed by the values of `owners`.
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
    """Draw a velocity (down, right) in any direction, with a speed up to ``highest``, both in scene sides per frame."""
    speed, angle = rng.uniform(0.0, highest), rng.uniform(0.0, 2 * math.pi)
    return 0.4 * speed * math.sin(angle), speed * math.cos(angle)  # objects mostly move along the ground


def _camera_path(rng: random.Random, frames: int, size: int, room: int) -> list[tuple[int, int]]:
    """Draw a smooth, oscillating path of the image's (top, left) corner in the scene, in 0..``room`` pixels, for every frame."""
    path = []
    for _ in range(2):
        # A sine of amplitude room / 2 changes by at most `speed` per frame if its angle grows by 2 speed / room.
        speed = rng.uniform(0.0, _CAMERA_SPEED) * size
        angle = rng.uniform(0.0, 2 * math.pi) + 2 * speed / room * np.arange(frames)
        path.append(np.rint(room / 2 * (1 + np.sin(angle))).astype(int))
    return [(int(top), int(left)) for top, left in zip(*path, strict=True)]


def _light(rng: random.Random, size: int) -> tuple[np.ndarray, float]:
    """Draw brightness, colour cast and shading as one factor, (3, H, W) float32, and the noise deviation in grey levels."""
    cast = np.array([rng.uniform(0.9, 1.08) for _ in range(3)]) * rng.uniform(0.8, 1.14)
    ticks = (np.arange(size) + 0.5) / size - 0.5
    slope = 1 + rng.uniform(-0.22, 0.22) * ticks + rng.uniform(-0.15, 0.15) * ticks[:, None]
    return (cast[:, None, None] * slope).astype(np.float32), rng.uniform(1.0, 5.0)


def _sources(
    owners: np.ndarray, places: np.ndarray, owners_before: np.ndarray, places_before: np.ndarray
) -> np.ndarray:
    """Return the position of each pixel's point in the previous frame; see `SyntheticVideo.sources`."""
    size = len(owners)
    shift = np.rint(places - places_before).astype(int)[owners]
    y, x = np.indices(owners.shape)
    y, x = y - shift[..., 0], x - shift[..., 1]
    inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
    source = np.where(inside, y * size + x, 0)
    return np.where(inside & (owners_before.ravel()[source] == owners), source, -1)
