"""The guided filter against its formula, window by window."""

import pytest
import torch
from torch import Tensor

from vilseg.segmentation.guided_filter import guided_filter


def naive(maps_CHW: Tensor, image_3HW: Tensor, radius: int, eps: float) -> Tensor:
    """Equations 14 to 16 of the paper, one window and one pixel at a time."""
    height, width = image_3HW.shape[1:]

    def window(y: int, x: int) -> tuple[slice, slice]:
        return slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1)

    slopes = torch.empty(len(maps_CHW), 3, height, width, dtype=maps_CHW.dtype)
    offsets = torch.empty_like(maps_CHW)
    for y in range(height):
        for x in range(width):
            colours = image_3HW[(slice(None), *window(y, x))].flatten(1)
            mean = colours.mean(1)
            covariance = torch.cov(colours, correction=0) + eps * torch.eye(3, dtype=maps_CHW.dtype)
            for c, one in enumerate(maps_CHW):
                values = one[window(y, x)].flatten()
                slope = torch.linalg.solve(covariance, (colours * values).mean(1) - mean * values.mean())
                slopes[c, :, y, x], offsets[c, y, x] = slope, values.mean() - slope @ mean
    found = torch.empty_like(maps_CHW)
    for y in range(height):
        for x in range(width):
            place = window(y, x)
            for c in range(len(maps_CHW)):
                slope = slopes[c][(slice(None), *place)].flatten(1).mean(1)
                found[c, y, x] = slope @ image_3HW[:, y, x] + offsets[c][place].mean()
    return found


def random(*size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


@pytest.mark.parametrize(("size", "radius"), [((7, 9), 2), ((5, 4), 1), ((3, 8), 6), ((1, 6), 2)])
def test_as_the_formula_says(size: tuple[int, int], radius: int) -> None:
    image, maps = 40 * random(3, *size) + 100, random(2, *size)
    eps = 0.3**2 * float((image - image.mean((1, 2), keepdim=True)).square().mean())
    torch.testing.assert_close(guided_filter(maps, image, image, radius, 0.3), naive(maps, image, radius, eps))


def test_single_precision_is_enough_for_a_large_image() -> None:
    image, maps = 255 * random(3, 300, 400), random(1, 300, 400)
    exact = guided_filter(maps, image, image, 4, 0.1)
    found = guided_filter(maps.float(), image.float(), image.float(), 4, 0.1)
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)


def test_neither_range_nor_contrast_of_the_image_matters() -> None:
    image, maps = random(3, 12, 12), random(1, 12, 12)
    other = 17 + 90 * image
    torch.testing.assert_close(guided_filter(maps, other, other, 2, 0.2), guided_filter(maps, image, image, 2, 0.2))


def test_a_small_map_gets_the_edges_of_a_large_image() -> None:
    image = torch.full((3, 48, 48), 0.2, dtype=torch.float64)
    image[:, :, 22:] = 0.7  # an edge inside of a cell of the map
    small = torch.nn.functional.interpolate(image[None], scale_factor=1 / 8, mode="area")[0]
    maps = small[:1] * 2 - 0.1
    truth = image[:1] * 2 - 0.1
    smooth = torch.nn.functional.interpolate(maps[None], (48, 48), mode="bilinear")[0]
    found = guided_filter(maps, small, image, 2, 0.01)
    assert (found - truth).abs().mean() < 0.25 * (smooth - truth).abs().mean()
    assert ((found > 0.8) == (truth > 0.8)).all()


def test_an_image_of_one_colour_smooths() -> None:
    maps, grey = random(1, 12, 12).float(), torch.full((3, 12, 12), 0.5)
    smooth = guided_filter(maps, grey, grey, 2, 0.1)
    assert smooth.isfinite().all()
    assert smooth.std() < 0.5 * maps.std()
