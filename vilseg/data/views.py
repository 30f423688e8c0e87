"""Augmented views of images, made on the training device, and the geometry that aligns the patches of two views.

All random numbers depend only on the seed of the pair, so that a pair has the same views on every worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import kornia.enhance as enhance
import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.config import ViewsConfig

_ASPECT = (3 / 4, 4 / 3)
"""Range of the ratio of width to height of random crops, as in Inception-style training (Szegedy et al. 2015)."""
_TAU = 6.283185307179586


@dataclass(frozen=True)
class Views:
    """Augmented views of B images, which are G global and L local crops of each.

    A geometry is the affine map from the coordinates of a view to those of its image, both in -1..1 from edge to edge (the
    convention of ``torch.nn.functional.affine_grid`` with ``align_corners=False``).
    """

    global_GB3HW: Tensor
    """Global views. Shape: (G, B, 3, H, W), float32 in 0..1."""
    geometry_GB23: Tensor
    """Geometries of the global views. Shape: (G, B, 2, 3)."""
    local_LB3HW: Tensor
    """Local views. Shape: (L, B, 3, H, W), float32 in 0..1, with another H and W than the global views."""


def make_views(
    images_BHW3: Tensor, seeds_B: Tensor, config: ViewsConfig, *, global_crops: int, local_crops: int
) -> Views:
    """Create views by random resized crops, flips and colour changes.

    Args:
        images_BHW3: RGB images, uint8. Shape: (B, H, W, 3).
        seeds_B: seeds of the pairs, int64, on the same device. Shape: (B,).
        config: sizes of the views and strengths of the augmentations.
        global_crops: number G of global crops, at least 1.
        local_crops: number L of local crops, which replaces ``config.local_crops`` because not every loss uses them.

    Returns:
        Global views (G, B, 3, global_size, global_size) and local views (L, B, 3, local_size, local_size), float32 in 0..1.

    Example:
        >>> images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
        >>> views = make_views(images, torch.tensor([1, 2]), ViewsConfig(global_size=32), global_crops=2, local_crops=0)
        >>> tuple(views.global_GB3HW.shape)
        (2, 2, 3, 32, 32)
    """
    images = images_BHW3.permute(0, 3, 1, 2).float().div_(255)
    global_views, geometries, local_views = [], [], []
    for number in range(global_crops + local_crops):
        is_global = number < global_crops
        scale, size = (
            (config.global_scale, config.global_size) if is_global else (config.local_scale, config.local_size)
        )
        random_BR = uniform(seeds_B, number, 9)
        geometry_B23 = random_geometry(random_BR[:, :5], scale, config.flip)
        grid = F.affine_grid(geometry_B23, [len(images), 3, size, size], align_corners=False)
        view = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        view = _change_colours(view, random_BR[:, 5:9], config)
        if is_global:
            global_views.append(view)
            geometries.append(geometry_B23)
        else:
            local_views.append(view)
    empty = images.new_empty((0, len(images), 3, config.local_size, config.local_size))
    return Views(torch.stack(global_views), torch.stack(geometries), torch.stack(local_views) if local_views else empty)


def random_geometry(random_B5: Tensor, scale: tuple[float, float], flip: float) -> Tensor:
    """Compute geometries of random crops.

    Args:
        random_B5: random numbers in 0..1, for area, aspect ratio, x, y and flip. Shape: (B, 5).
        scale: range of the crop area, as a fraction of the image area.
        flip: probability of a horizontal flip.

    Returns:
        Affine maps as in :class:`Views`. Shape: (B, 2, 3).
    """
    area = scale[0] + (scale[1] - scale[0]) * random_B5[:, 0]
    low, high = (torch.log(torch.tensor(a)) for a in _ASPECT)
    aspect = torch.exp(low + (high - low) * random_B5[:, 1])
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    x = (1 - width) * (2 * random_B5[:, 2] - 1)
    y = (1 - height) * (2 * random_B5[:, 3] - 1)
    sign = 1 - 2 * (random_B5[:, 4] < flip).to(area.dtype)
    zero = torch.zeros_like(x)
    return torch.stack([torch.stack([width * sign, zero, x], 1), torch.stack([zero, height, y], 1)], 1)


def align(map_BKhw: Tensor, from_B23: Tensor, to_B23: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resample a map over the patches of one view to the patch grid of another view of the same image.

    Args:
        map_BKhw: values at the patches of the first view. Shape: (B, K, h, w).
        from_B23: geometry of the first view. Shape: (B, 2, 3).
        to_B23: geometry of the second view. Shape: (B, 2, 3).
        grid: size (h', w') of the patch grid of the second view.

    Returns:
        Values at the patch centres of the second view, interpolated bilinearly. Shape: (B, K, h', w').
        Mask that is True for patches of the second view whose centre is inside the first view. Shape: (B, h', w').
    """
    to_first_B23 = compose(invert(from_B23), to_B23)
    where = F.affine_grid(to_first_B23, [len(map_BKhw), 1, *grid], align_corners=False)
    aligned = F.grid_sample(
        map_BKhw, where.to(map_BKhw.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )
    return aligned, (where.abs() <= 1).all(-1)


def invert(geometry_B23: Tensor) -> Tensor:
    """Return the inverse affine maps. Shape: (B, 2, 3) -> (B, 2, 3)."""
    inverse_B22 = torch.linalg.inv(geometry_B23[:, :, :2])
    return torch.cat([inverse_B22, -inverse_B22 @ geometry_B23[:, :, 2:]], 2)


def compose(outer_B23: Tensor, inner_B23: Tensor) -> Tensor:
    """Return the affine maps that apply ``inner`` first and then ``outer``. Shape: (B, 2, 3), (B, 2, 3) -> (B, 2, 3)."""
    linear = outer_B23[:, :, :2] @ inner_B23[:, :, :2]
    return torch.cat([linear, outer_B23[:, :, :2] @ inner_B23[:, :, 2:] + outer_B23[:, :, 2:]], 2)


def uniform(seeds_B: Tensor, draw: int, count: int) -> Tensor:
    """Return uniform random numbers in 0..1 for each seed (SplitMix64, Steele et al. 2014).

    Args:
        seeds_B: seeds, int64. Shape: (B,).
        draw: number of the draw; the numbers depend only on the seed and on this.
        count: number of random numbers for each seed.

    Returns:
        Random numbers, float32. Shape: (B, count).
    """
    index = torch.arange(1, count + 1, device=seeds_B.device, dtype=torch.int64) + draw * 65_537
    z = seeds_B.unsqueeze(1) + index * -7046029254386353131  # 0x9E3779B97F4A7C15 as int64; overflow wraps
    z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return (_shift(z ^ _shift(z, 31), 40)).to(torch.float32) * 2.0**-24


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift the bits of signed integers to the right, filling with zeros (logical shift)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _change_colours(view: Tensor, random_B4: Tensor, config: ViewsConfig) -> Tensor:
    signed = 2 * random_B4 - 1
    if config.brightness:
        view = enhance.adjust_brightness_accumulative(view, 1 + config.brightness * signed[:, 0])
    if config.contrast:
        view = enhance.adjust_contrast_with_mean_subtraction(view, 1 + config.contrast * signed[:, 1])
    if config.saturation:
        view = enhance.adjust_saturation_with_gray_subtraction(view, 1 + config.saturation * signed[:, 2])
    if config.hue:
        view = enhance.adjust_hue(view, _TAU * config.hue * signed[:, 3])
    return view
