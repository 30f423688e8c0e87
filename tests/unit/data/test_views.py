"""Augmented views: their geometry against a loop over patches, and randomness that depends on the seed alone."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from vilseg.config import ViewsConfig
from vilseg.data.views import align, compose, invert, make_views, random_geometry, uniform

IDENTITY = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
FLIP = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
STILL = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


def geometries(count: int, seed: int, scale: tuple[float, float] = (0.2, 0.9)) -> Tensor:
    return random_geometry(uniform(torch.arange(count) + seed, 0, 5), scale, 0.5)


def seeds(count: int) -> Tensor:
    return torch.arange(count) * 7919 + 1


# ---------------------------------------------------------------------------------------------------------- geometry


def naive_align(map_: Tensor, of: Tensor, to: Tensor, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Follow every patch centre of the second view to the image and from there into the first view."""
    count, channels, h, w = map_.shape
    aligned, valid = np.zeros((count, channels, *grid)), np.zeros((count, *grid), bool)
    for b in range(count):
        (ax, _, ox), (_, ay, oy) = of[b].tolist()
        (bx, _, px), (_, by, py) = to[b].tolist()
        for row in range(grid[0]):
            for column in range(grid[1]):
                image_x = bx * (2 * (column + 0.5) / grid[1] - 1) + px
                image_y = by * (2 * (row + 0.5) / grid[0] - 1) + py
                view_x, view_y = (image_x - ox) / ax, (image_y - oy) / ay
                valid[b, row, column] = abs(view_x) <= 1 and abs(view_y) <= 1
                # In units of patches of the first view, patch i having its centre at i; beyond the last centre it stays.
                x = min(max((view_x + 1) / 2 * w - 0.5, 0), w - 1)
                y = min(max((view_y + 1) / 2 * h - 0.5, 0), h - 1)
                x0, y0 = min(int(x), w - 2), min(int(y), h - 2)
                fx, fy = x - x0, y - y0
                corners = map_[b, :, y0 : y0 + 2, x0 : x0 + 2].numpy()
                weights = np.array([[(1 - fy) * (1 - fx), (1 - fy) * fx], [fy * (1 - fx), fy * fx]])
                aligned[b, :, row, column] = (corners * weights).sum((1, 2))
    return aligned, valid


@pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
def test_align_is_the_loop_over_patches(grid: tuple[int, int]) -> None:
    map_ = torch.rand(6, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    of, to = geometries(6, 0), geometries(6, 100)
    aligned, valid = align(map_, of, to, grid)
    expected, reached = naive_align(map_, of, to, grid)
    np.testing.assert_allclose(aligned, expected, atol=1e-5)
    np.testing.assert_array_equal(valid, reached)
    assert 0 < reached.mean() < 1


def test_the_same_geometry_changes_nothing() -> None:
    map_, geometry = torch.rand(3, 2, 4, 4), geometries(3, 0)
    for same in (geometry, IDENTITY.expand(3, 2, 3)):
        aligned, valid = align(map_, same, same, (4, 4))
        np.testing.assert_allclose(aligned, map_, atol=1e-5)
        assert valid.all()


def test_a_mirrored_view_is_mirrored_back() -> None:
    map_ = torch.rand(1, 2, 4, 4)
    aligned, valid = align(map_, FLIP, IDENTITY, (4, 4))
    np.testing.assert_allclose(aligned, map_.flip(3), atol=1e-6)
    assert valid.all()


def test_a_crop_reaches_only_its_part() -> None:
    left_half = torch.tensor([[[0.5, 0, -0.5], [0, 1.0, 0]]])
    aligned, valid = align(torch.ones(1, 1, 4, 4), left_half, IDENTITY, (4, 4))
    assert valid[0].tolist() == [[True, True, False, False]] * 4
    assert (aligned == 1).all()


def test_align_passes_gradients_to_the_map() -> None:
    map_ = torch.rand(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    of, to = geometries(2, 0).double(), geometries(2, 9).double()
    assert torch.autograd.gradcheck(lambda x: align(x, of, to, (3, 3))[0], map_)


def test_invert_and_compose() -> None:
    geometry = geometries(5, 3)
    for pair in ((geometry, invert(geometry)), (invert(geometry), geometry)):
        np.testing.assert_allclose(compose(*pair), IDENTITY.expand(5, 2, 3), atol=1e-5)
    point = torch.tensor([0.3, -0.2, 1.0])
    inner, outer = geometries(5, 1), geometries(5, 2)
    by_steps = [(o @ torch.cat([i @ point, torch.ones(1)])).tolist() for o, i in zip(outer, inner, strict=True)]
    np.testing.assert_allclose(compose(outer, inner) @ point, by_steps, atol=1e-6)


def test_crops_stay_inside_and_have_the_area_asked_for() -> None:
    geometry = geometries(4000, 0, (0.2, 0.6))
    width, height = geometry[:, 0, 0].abs(), geometry[:, 1, 1]
    assert (width + geometry[:, 0, 2].abs() <= 1 + 1e-6).all()
    assert (height + geometry[:, 1, 2].abs() <= 1 + 1e-6).all()
    area, aspect = width * height, width / height
    assert (area.min(), area.max()) == (pytest.approx(0.2, abs=0.01), pytest.approx(0.6, abs=0.01))
    assert area.mean() == pytest.approx(0.4, abs=0.01)
    assert (aspect.min(), aspect.max()) == (pytest.approx(3 / 4, abs=0.01), pytest.approx(4 / 3, abs=0.01))
    assert (geometry[:, 0, 0] < 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (random_geometry(torch.rand(50, 5), (1, 1), 0.0)[:, 0, 0] > 0).all()


# ----------------------------------------------------------------------------------------------------------- uniform


def splitmix64(seed: int, index: int) -> float:
    """Return one number of SplitMix64 from seed + index steps of the golden gamma, in Python's unbounded integers."""
    mask = 2**64 - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 40) / 2**24


def test_uniform_is_splitmix64() -> None:
    values = [0, 1, 12345, 2**62 + 3, 2**63 - 1]
    expected = [[splitmix64(seed, i + 2 * 65_537) for i in range(1, 5)] for seed in values]
    np.testing.assert_array_equal(uniform(torch.tensor(values), 2, 4), np.array(expected, np.float32))


def test_uniform_hangs_on_the_seed_alone() -> None:
    whole = uniform(seeds(8), 3, 5)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    np.testing.assert_array_equal(uniform(seeds(8)[order], 3, 5), whole[order])
    np.testing.assert_array_equal(uniform(seeds(8)[2:3], 3, 5), whole[2:3])
    np.testing.assert_array_equal(uniform(seeds(8), 3, 2), whole[:, :2])
    assert not torch.equal(uniform(seeds(8), 4, 5), whole)


def test_uniform_is_uniform() -> None:
    values = uniform(torch.arange(5000), 0, 8)
    assert (values >= 0).all()
    assert (values < 1).all()
    counts = torch.histc(values, 20, 0, 1) / values.numel()
    assert (counts - 0.05).abs().max() < 0.003
    between = np.corrcoef(values.numpy().T) - np.eye(8)
    assert np.abs(between).max() < 0.05


# ------------------------------------------------------------------------------------------------------------- views


def pictures(count: int, size: int = 24) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_shapes_and_range() -> None:
    config = ViewsConfig(global_size=16, local_size=8, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    views = make_views(pictures(3), seeds(3), config, global_crops=2, local_crops=3)
    assert views.global_GB3HW.shape == (2, 3, 3, 16, 16)
    assert views.geometry_GB23.shape == (2, 3, 2, 3)
    assert views.local_LB3HW.shape == (3, 3, 3, 8, 8)
    for view in (views.global_GB3HW, views.local_LB3HW):
        assert view.dtype == torch.float32
        assert view.isfinite().all()
        assert view.min() >= 0
        assert view.max() <= 1
    none = make_views(pictures(3), seeds(3), config, global_crops=1, local_crops=0)
    assert none.local_LB3HW.shape == (0, 3, 3, 8, 8)
    assert len(none.global_GB3HW) == 1


def test_views_hang_on_the_pair_and_not_on_its_batch() -> None:
    make = partial(make_views, config=ViewsConfig(global_size=16, local_size=8), global_crops=2, local_crops=2)
    order = torch.tensor([2, 0, 3, 1])
    whole = make(pictures(4), seeds(4))
    shuffled = make(pictures(4)[order], seeds(4)[order])
    alone = make(pictures(4)[1:2], seeds(4)[1:2])
    np.testing.assert_allclose(shuffled.global_GB3HW, whole.global_GB3HW[:, order], atol=1e-6)
    np.testing.assert_allclose(shuffled.local_LB3HW, whole.local_LB3HW[:, order], atol=1e-6)
    np.testing.assert_allclose(alone.global_GB3HW, whole.global_GB3HW[:, 1:2], atol=1e-6)
    np.testing.assert_array_equal(shuffled.geometry_GB23, whole.geometry_GB23[:, order])


def test_views_and_pairs_differ() -> None:
    same = pictures(1).expand(2, -1, -1, -1)
    views = make_views(same, seeds(2), ViewsConfig(global_size=16), global_crops=2, local_crops=0).global_GB3HW
    assert (views[0, 0] - views[0, 1]).abs().mean() > 0.02, "another seed is another view"
    assert (views[0, 0] - views[1, 0]).abs().mean() > 0.02, "and so is another number"


def test_the_geometry_returned_is_that_of_the_view() -> None:
    # A picture whose colours are its coordinates: a view must show the coordinates that its geometry says.
    size = 64
    centres = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = torch.meshgrid(centres, centres, indexing="xy")
    image = torch.stack([(x + 1) * 127.5, (y + 1) * 127.5, torch.zeros_like(x)], -1).round().to(torch.uint8)
    config = ViewsConfig(global_size=16, **STILL)
    views = make_views(image.expand(5, -1, -1, -1), seeds(5), config, global_crops=2, local_crops=0)
    inner = (torch.arange(16) + 0.5) / 16 * 2 - 1
    view_x, view_y = torch.meshgrid(inner, inner, indexing="xy")
    points = torch.stack([view_x, view_y, torch.ones_like(view_x)])
    for number in range(2):
        expected = torch.einsum("bij,jhw->bihw", views.geometry_GB23[number], points)
        np.testing.assert_allclose(views.global_GB3HW[number][:, :2] * 2 - 1, expected, atol=0.03)
