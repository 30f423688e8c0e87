"""IIC loss: equal to loops over its formula, bounds, gradient, mask, and metrics of the clusters."""

import math

import pytest
import torch
from torch import Tensor

from vilseg.losses import cluster_metrics, iic_loss, unnormalized_joints


def assignments(*shape: int, seed: int = 0) -> Tensor:
    """Return random soft assignments. Shape: -> (B, K, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(1)


def one_hot(labels: Tensor, clusters: int) -> Tensor:
    """Return maps that are 1 at the labelled cluster. Shape: (B, h, w) -> (B, K, h, w)."""
    return torch.nn.functional.one_hot(labels, clusters).movedim(-1, 1).double()


def naive(first: Tensor, second: Tensor, valid: Tensor, radius: int, weight: float) -> float:
    images, clusters, h, w = first.shape
    a, b, v = first.tolist(), second.tolist(), valid.tolist()
    information = []
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            joint = [[0.0] * clusters for _ in range(clusters)]
            for i in range(images):
                for y in range(h):
                    for x in range(w):
                        if not (0 <= y + down < h and 0 <= x + right < w):
                            continue
                        share = v[i][y + down][x + right]
                        for k in range(clusters):
                            for m in range(clusters):
                                joint[k][m] += share * a[i][k][y][x] * b[i][m][y + down][x + right]
            total = 2 * sum(map(sum, joint))
            if total == 0:
                continue
            symmetric = [[(joint[k][m] + joint[m][k]) / total for m in range(clusters)] for k in range(clusters)]
            marginal = [sum(row) for row in symmetric]
            information.append(
                sum(
                    p * (math.log(p) - weight * (math.log(marginal[k]) + math.log(marginal[m])))
                    for k, row in enumerate(symmetric)
                    for m, p in enumerate(row)
                )
            )
    return -sum(information) / len(information)


@pytest.mark.parametrize(("radius", "weight"), [(0, 1.0), (1, 1.0), (2, 1.5)])
def test_it_is_the_formula(radius: int, weight: float) -> None:
    first, second = assignments(2, 3, 4, 3), assignments(2, 3, 4, 3, seed=1)
    valid = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    valid[0, :2] = 0
    loss = iic_loss(first, second, valid, radius=radius, entropy_weight=weight)
    assert loss.item() == pytest.approx(naive(first, second, valid, radius, weight), abs=1e-10)
    unmasked = iic_loss(first, second, radius=radius, entropy_weight=weight)
    assert unmasked.item() == pytest.approx(naive(first, second, torch.ones(2, 4, 3), radius, weight), abs=1e-10)


def test_gradient() -> None:
    first, second = assignments(2, 3, 3, 4).requires_grad_(), assignments(2, 3, 3, 4, seed=1).requires_grad_()
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[1, :, 2:] = False
    assert torch.autograd.gradcheck(lambda a, b: iic_loss(a, b, valid, radius=1, entropy_weight=1.5), (first, second))


@pytest.mark.parametrize(("radius", "grid"), [(0, (3, 4)), (1, (3, 4)), (2, (5, 3))])
def test_gradient_of_the_joint_sums(radius: int, grid: tuple[int, int]) -> None:
    first, second = (assignments(2, 3, *grid, seed=seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: unnormalized_joints(a, b, radius=radius), (first, second))


def test_joint_sums_of_parts_of_a_batch_add_up() -> None:
    first, second = assignments(5, 3, 4, 4), assignments(5, 3, 4, 4, seed=1)
    parts = [unnormalized_joints(a, b) for a, b in zip(first.split(2), second.split(2), strict=True)]
    torch.testing.assert_close(sum(parts), unnormalized_joints(first, second))


@pytest.mark.parametrize("clusters", [2, 5])
@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_balanced_certain_equal_assignments_reach_the_bound(clusters: int, weight: float) -> None:
    labels = torch.arange(clusters * 4).remainder(clusters).view(1, 4, clusters)
    certain = one_hot(labels, clusters)
    loss = iic_loss(certain, certain, radius=0, entropy_weight=weight)
    assert loss.item() == pytest.approx(-(2 * weight - 1) * math.log(clusters), abs=1e-8)


@pytest.mark.parametrize("value", ["one cluster", "uniform"])
def test_collapse_gives_nothing(value: str) -> None:
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    collapsed = one_hot(labels, 3) if value == "one cluster" else torch.full((2, 3, 4, 4), 1 / 3, dtype=torch.float64)
    assert iic_loss(collapsed, collapsed, radius=1).item() == pytest.approx(0, abs=1e-8)


def test_an_entropy_weight_above_one_punishes_collapse_to_one_cluster() -> None:
    collapsed = one_hot(torch.zeros(2, 4, 4, dtype=torch.long), 3)
    spread = one_hot(torch.arange(32).remainder(3).view(2, 4, 4), 3)
    losses = [iic_loss(x, x, radius=0, entropy_weight=1.5).item() for x in (collapsed, spread)]
    assert losses[1] < losses[0] - 1


def test_order_of_images_and_names_of_clusters_do_not_matter() -> None:
    first, second = assignments(3, 4, 3, 3), assignments(3, 4, 3, 3, seed=1)
    order, names = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    expected = iic_loss(first, second, entropy_weight=1.5).item()
    shuffled = iic_loss(first[order][:, names], second[order][:, names], entropy_weight=1.5)
    assert shuffled.item() == pytest.approx(expected)
    # Joint distributions are made symmetric and displacements come in opposite pairs, so either view may come first.
    assert iic_loss(second, first, entropy_weight=1.5).item() == pytest.approx(expected)


def test_what_lies_outside_the_mask_does_not_count() -> None:
    first, second = assignments(2, 3, 4, 4), assignments(2, 3, 4, 4, seed=1)
    valid = torch.zeros(2, 4, 4, dtype=torch.bool)
    valid[:, 1:3, 1:3] = True
    other = torch.where(valid.unsqueeze(1), second, assignments(2, 3, 4, 4, seed=9))
    expected = iic_loss(first, second, valid).item()
    assert iic_loss(first, other, valid).item() == pytest.approx(expected)
    inside = (slice(None), slice(None), slice(1, 3), slice(1, 3))
    cut = iic_loss(first[inside], second[inside], radius=0)
    assert iic_loss(first, second, valid, radius=0).item() == pytest.approx(cut.item())


def test_displacements_that_meet_no_valid_patch_are_left_out() -> None:
    first, second = assignments(2, 3, 4, 4), assignments(2, 3, 4, 4, seed=1)
    valid = torch.zeros(2, 4, 4, dtype=torch.bool)
    valid[:, 0, 0] = True  # the top left corner: there is no patch above it or to its left
    loss = iic_loss(first, second, valid, radius=1)
    assert loss.item() == pytest.approx(naive(first, second, valid.double(), 1, 1.0), abs=1e-10)
    assert loss.item() != 0


def test_no_overlap_at_all_is_zero_with_a_gradient() -> None:
    first = assignments(2, 3, 4, 4).requires_grad_()
    loss = iic_loss(first, assignments(2, 3, 4, 4), torch.zeros(2, 4, 4))
    loss.backward()
    assert loss.item() == 0
    assert first.grad is not None
    assert not first.grad.any()


@pytest.mark.usefixtures("without_annotation_checks")
def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match=r"two \(B, K, h, w\)"):
        iic_loss(assignments(2, 3, 4, 4), assignments(2, 3, 4, 5))
    with pytest.raises(ValueError, match="radius 3 does not fit a grid of 3 x 5"):
        iic_loss(assignments(2, 3, 3, 5), assignments(2, 3, 3, 5), radius=3)


@pytest.mark.parametrize(("used", "entropy"), [(1, 0.0), (2, 0.5), (4, 1.0)])
def test_metrics_of_evenly_used_clusters(used: int, entropy: float) -> None:
    maps = one_hot(torch.arange(2 * 4 * 4).view(2, 4, 4) % used, 4)
    metrics = cluster_metrics(unnormalized_joints(maps, maps, radius=0))
    assert metrics["used"] == used
    assert metrics["entropy"].item() == pytest.approx(entropy, abs=1e-6)


def test_a_cluster_with_hardly_a_patch_is_not_used() -> None:
    maps = one_hot((torch.arange(400).view(1, 20, 20) == 0).long(), 2)
    metrics = cluster_metrics(unnormalized_joints(maps, maps, radius=0))
    assert metrics["used"] == 1
    shares = (1 / 400, 399 / 400)
    assert metrics["entropy"].item() == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-6)
