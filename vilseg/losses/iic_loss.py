"""IIC loss: negative mutual information between the cluster assignments of an image and of its transformed version.

Invariant information clustering (IIC, Ji et al. 2019) in its dense form (section 3.3, equation 5). For a displacement t of
the patch grid,

    P_t = 1/n sum_{b,u} z_b(u) z'_b(u + t)^T,   made symmetric and normalised to sum 1,
    I_t = sum_kl P_kl (log P_kl - a log P_k. - a log P_.l),

and the loss is -mean_t I_t. Here z_b(u) are the soft assignments of the patch at u of image b, z' those of the transformed image,
already resampled onto the grid of z, and n counts the pairs of patches in the sum. An entropy weight a > 1 rewards balanced
marginals and keeps clusters from collapsing (IIC, section 3.2, and its published code).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vilseg.distributed import mean_over_workers

_EPS = 1e-12
"""Lower bound of joint probabilities, so that the log is finite for pairs of clusters that never occur together; far below the
smallest probability that matters."""


def iic_loss(
    first_BKhw: Float[Tensor, "B K h w"],
    second_BKhw: Float[Tensor, "B K h w"],
    valid_Bhw: Float[Tensor, "B h w"] | Bool[Tensor, "B h w"] | None = None,
    *,
    radius: int = 1,
    entropy_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Compute the negative mutual information, averaged over displacements of up to ``radius`` patches in each direction.

    Args:
        first_BKhw: soft cluster assignments of each patch, summing to 1 over K.
        second_BKhw: soft assignments of the transformed image on the same grid.
        valid_Bhw: weight in 0..1 of each patch of ``second_BKhw``; 0 if the transformed image does not cover the patch. None
            gives all patches weight 1.
        radius: largest displacement in patches; 0 compares each patch only with the one at the same position.
        entropy_weight: a in the module's docstring.

    Returns:
        Loss of the whole batch, the same on every worker; at least -(2 entropy_weight - 1) log K. Displacements at which no
        patches overlap are left out of the mean. If patches overlap at none, the loss is 0.

    Raises:
        ValueError: the shapes of the two assignment maps differ, or ``radius`` is not smaller than both sides of the grid.

    Example:
        >>> labels = torch.tensor([[[0, 0], [1, 1]]])  # one image of 2 x 2 patches in two clusters of equal size
        >>> maps = torch.nn.functional.one_hot(labels).permute(0, 3, 1, 2).float()
        >>> round(float(iic_loss(maps, maps, radius=0)), 4)  # -log 2, the minimum for two clusters
        -0.6931
    """
    return iic_loss_from_joints(unnormalized_joints(first_BKhw, second_BKhw, valid_Bhw, radius=radius), entropy_weight)


def unnormalized_joints(
    first_BKhw: Float[Tensor, "B K h w"],
    second_BKhw: Float[Tensor, "B K h w"],
    valid_Bhw: Float[Tensor, "B h w"] | Bool[Tensor, "B h w"] | None = None,
    *,
    radius: int = 1,
) -> Float[Tensor, "O K K"]:
    """Compute n P_t of the module's docstring for every displacement, before P_t is made symmetric and normalised.

    The result is a sum over images, so the results of the chunks of a batch can be added up. Arguments and errors are those of
    :func:`iic_loss`.

    Returns:
        One K x K matrix for each of the O = (2 radius + 1)^2 displacements (rows, columns), in
        row-major order from (-radius, -radius) to (radius, radius).

    Example:
        >>> labels = torch.tensor([[[0, 0], [0, 1]]])  # one image of 2 x 2 patches, three of them in the first cluster
        >>> maps = torch.nn.functional.one_hot(labels).permute(0, 3, 1, 2).float()
        >>> unnormalized_joints(maps, maps, radius=0)
        tensor([[[3., 0.],
                 [0., 1.]]])
    """
    if first_BKhw.shape != second_BKhw.shape or first_BKhw.ndim != 4:
        raise ValueError(f"expected two (B, K, h, w), got {tuple(first_BKhw.shape)} and {tuple(second_BKhw.shape)}")
    h, w = first_BKhw.shape[2:]
    if radius >= min(h, w):
        raise ValueError(f"radius {radius} does not fit a grid of {h} x {w}")
    dtype = torch.promote_types(first_BKhw.dtype, torch.float32)
    first, second = first_BKhw.to(dtype), second_BKhw.to(dtype)
    if valid_Bhw is not None:
        second = second * valid_Bhw.to(dtype).unsqueeze(1)
    return _JointSums.apply(first, second, radius)


def iic_loss_from_joints(joints_OKK: Float[Tensor, "O K K"], entropy_weight: float = 1.0) -> Float[Tensor, ""]:
    """Compute the loss of :func:`iic_loss` from the :func:`unnormalized_joints` of this worker's images.

    The loss is that of the whole batch, the same on every worker.

    Example:
        >>> joints = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])  # two clusters of equal size that agree in both views
        >>> round(float(iic_loss_from_joints(joints)), 4)
        -0.6931
    """
    joints_OKK = mean_over_workers(joints_OKK)
    joints_OKK = joints_OKK + joints_OKK.transpose(1, 2)
    total_O = joints_OKK.sum((1, 2))
    met_O = total_O > 0
    if not bool(met_O.any()):
        return joints_OKK.sum() * 0.0
    joints_OKK = (joints_OKK[met_O] / total_O[met_O].view(-1, 1, 1)).clamp(min=_EPS)
    marginal_OK = joints_OKK.sum(2)
    log_marginals_OKK = marginal_OK.log().unsqueeze(2) + marginal_OK.log().unsqueeze(1)
    information_O = (joints_OKK * (joints_OKK.log() - entropy_weight * log_marginals_OKK)).sum((1, 2))
    return -information_O.mean()


@torch.no_grad()
def cluster_metrics(joints_OKK: Float[Tensor, "O K K"]) -> dict[str, Float[Tensor, ""]]:
    """Measure how evenly the patches of the whole batch are divided among the clusters, from :func:`unnormalized_joints`.

    Args:
        joints_OKK: sums over this worker's images.

    Returns:
        Two scalars, the same on every worker. ``entropy`` is the entropy of the fractions of patches per cluster, divided by its
        maximum log K: 1 if all clusters have the same size, 0 if one has all patches. ``used`` is the number of clusters that
        have at least a tenth of 1 / K of the patches.

    Example:
        >>> metrics = cluster_metrics(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]))
        >>> round(float(metrics["entropy"]), 4), int(metrics["used"])
        (1.0, 2)
    """
    sums_K = mean_over_workers(joints_OKK.sum((0, 1)) + joints_OKK.sum((0, 2)))
    fraction_K = sums_K / sums_K.sum().clamp(min=_EPS)
    clusters = len(fraction_K)
    entropy = torch.special.entr(fraction_K).sum() / max(math.log(clusters), _EPS)
    return {"entropy": entropy, "used": (fraction_K >= 0.1 / clusters).sum().to(fraction_K.dtype)}


class _JointSums(torch.autograd.Function):
    """Sums over patches of the outer products of assignments, for every displacement, with their gradient.

    Both maps are padded with zeros by the largest displacement and flattened to one row per patch, so that a displacement is an
    offset between row numbers. Each displacement then takes one matrix product of two slices, forward and backward, without a
    copy of the maps.
    """

    @staticmethod
    def forward(ctx: Any, first_BKhw: Tensor, second_BKhw: Tensor, radius: int) -> Tensor:
        ctx.radius, ctx.grid = radius, first_BKhw.shape[2:]
        first_RK, second_RK = _framed_rows(first_BKhw, radius), _framed_rows(second_BKhw, radius)
        ctx.save_for_backward(first_RK, second_RK)
        here, shifts = _shifts(len(first_RK), first_BKhw.shape[3], radius)
        of_first_KR = first_RK[here].T
        return torch.stack([of_first_KR @ second_RK[there] for there in shifts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_OKK: Tensor) -> tuple[Tensor, Tensor, None]:
        first_RK, second_RK = ctx.saved_tensors
        here, shifts = _shifts(len(first_RK), ctx.grid[1], ctx.radius)
        by_first, by_second = torch.zeros_like(first_RK), torch.zeros_like(second_RK)
        for gradient_KK, there in zip(gradient_OKK, shifts, strict=True):
            by_first[here].addmm_(second_RK[there], gradient_KK.T)
            by_second[there].addmm_(first_RK[here], gradient_KK)
        return _unframed(by_first, ctx.grid, ctx.radius), _unframed(by_second, ctx.grid, ctx.radius), None


def _framed_rows(map_BKhw: Tensor, frame: int) -> Tensor:
    """Pad a map with ``frame`` zeros on each side; one row per position. Shape: -> (B x (h + 2 frame) x (w + 2 frame), K)."""
    return F.pad(map_BKhw.permute(0, 2, 3, 1), (0, 0, *[frame] * 4)).flatten(0, 2)


def _unframed(rows_RK: Tensor, grid: tuple[int, int], frame: int) -> Tensor:
    """Invert :func:`_framed_rows`."""
    h, w = grid
    framed = rows_RK.view(-1, h + 2 * frame, w + 2 * frame, rows_RK.shape[1])
    return framed[:, frame : frame + h, frame : frame + w].permute(0, 3, 1, 2)


def _shifts(rows: int, w: int, radius: int) -> tuple[slice, list[slice]]:
    """Return the slice of the first map's rows that holds all patches, and each displacement's slice of the second map's rows."""
    wide = w + 2 * radius
    margin = radius * wide + radius
    displacements = range(-radius, radius + 1)
    starts = [margin + down * wide + right for down in displacements for right in displacements]
    return slice(margin, rows - margin), [slice(start, start + rows - 2 * margin) for start in starts]
