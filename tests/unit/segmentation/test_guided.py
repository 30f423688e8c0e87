"""The guided filter against its formula, window by window."""

import pytest
import torch
from torch import Tensor

from vilseg.segmentation.guided import GuidedFilter


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


@pytest.mark.parametrize(("size", "radius"), [((7, 9), 2), ((5, 4), 1), ((3, 8), 6), ((1, 6), 2)])
def test_as_the_formula_says(size: tuple[int, int], radius: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = 40 * torch.rand(3, *size, generator=generator, dtype=torch.float64) + 100
    maps = torch.rand(2, *size, generator=generator, dtype=torch.float64)
    centred = image - image.mean((1, 2), keepdim=True)
    eps = 0.3**2 * float(centred.square().mean())
    torch.testing.assert_close(GuidedFilter(image, radius, 0.3)(maps), naive(maps, image, radius, eps))


def test_single_precision_is_enough_for_a_large_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(3, 300, 400, generator=generator, dtype=torch.float64)
    maps = torch.rand(1, 300, 400, generator=generator, dtype=torch.float64)
    exact = GuidedFilter(image, 4, 0.1)(maps)
    torch.testing.assert_close(GuidedFilter(image.float(), 4, 0.1)(maps.float()).double(), exact, atol=1e-4, rtol=0)


def test_neither_range_nor_contrast_of_the_picture_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 12, 12, generator=generator, dtype=torch.float64)
    maps = torch.rand(1, 12, 12, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(GuidedFilter(17 + 90 * image, 2, 0.2)(maps), GuidedFilter(image, 2, 0.2)(maps))


def test_a_picture_of_one_colour_smooths() -> None:
    maps = torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(0))
    smooth = GuidedFilter(torch.full((3, 12, 12), 0.5), 2, 0.1)(maps)
    assert smooth.isfinite().all()
    assert smooth.std() < 0.5 * maps.std()
