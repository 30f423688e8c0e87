"""Mutual information between the cluster assignments of an image and of its transformed version.

Invariant information clustering (IIC, Ji et al. 2019) in its dense form (section 3.3, equation 5). For a displacement t of
the patch grid,

    P_t = 1/n sum_{b,u} z_b(u) z'_b(u + t)^T,   made symmetric and normalised to sum 1,
    I_t = sum_kl P_kl (log P_kl - a log P_k. - a log P_.l),

and the loss is -mean_t I_t. The entropy weight a > 1 rewards balanced marginals and keeps clusters from collapsing
(section 3.2 of the paper's published code). z' has been brought onto z's grid by the inverse of the geometry beforehand.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vilseg.distributed import mean_over_workers

_EPS = 1e-12
"""Keeps log finite for pairs of clusters that never meet; far below the smallest joint probability that matters."""


def iic_loss(
    first_BKhw: Tensor,
    second_BKhw: Tensor,
    valid_Bhw: Tensor | None = None,
    *,
    radius: int = 1,
    entropy_weight: float = 1.0,
) -> Tensor:
    """Negative mutual information averaged over displacements of up to ``radius`` patches in each direction.

    Args:
        first_BKhw: soft assignments, summing to 1 over K. Shape: (B, K, h, w).
        second_BKhw: those of the transformed image on the same grid. Shape: (B, K, h, w).
        valid_Bhw: weight in 0..1 of each patch of ``second``, 0 where the transformed image does not reach. Shape: (B, h, w).
        radius: largest displacement; 0 compares patches in place.
        entropy_weight: a above.

    Returns:
        The loss of the whole batch, the same on every worker; displacements at which no patches overlap are
        left out, and it is 0 where that is all of them. At least -(2 entropy_weight - 1) log K.

    Raises:
        ValueError: shapes differ, or the grid is not larger than ``radius``.

    Example:
        >>> labels = torch.tensor([[[0, 0], [1, 1]]])  # one image of 2 x 2 patches in two even clusters
        >>> maps = torch.nn.functional.one_hot(labels).permute(0, 3, 1, 2).float()
        >>> round(float(iic_loss(maps, maps, radius=0)), 4)  # the least that there is: -log 2
        -0.6931
    """
    return iic_loss_from_joints(unnormalized_joints(first_BKhw, second_BKhw, valid_Bhw, radius=radius), entropy_weight)


def unnormalized_joints(
    first_BKhw: Tensor, second_BKhw: Tensor, valid_Bhw: Tensor | None = None, *, radius: int = 1
) -> Tensor:
    """n P_t above for every displacement, neither symmetric nor normalised; a sum over images, so that parts of a batch add up.

    Args and errors: as for :func:`iic_loss`.

    Returns:
        Shape: (O, K, K) with O = (2 radius + 1)^2.
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


def iic_loss_from_joints(joints_OKK: Tensor, entropy_weight: float = 1.0) -> Tensor:
    """The loss of :func:`iic_loss` from this worker's :func:`unnormalized_joints`."""
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
def cluster_metrics(joints_OKK: Tensor) -> dict[str, Tensor]:
    """Measure how evenly the patches of the whole batch are divided, from this worker's :func:`unnormalized_joints`.

    Returns:
        ``entropy``, of the clusters' fractions over its largest value log K: 1 where all are equal, 0 where one has everything;
        ``used``, the number of clusters with at least a tenth of an even fraction. The same on every worker.
    """
    sums_K = mean_over_workers(joints_OKK.sum((0, 1)) + joints_OKK.sum((0, 2)))
    fraction_K = sums_K / sums_K.sum().clamp(min=_EPS)
    clusters = len(fraction_K)
    entropy = torch.special.entr(fraction_K).sum() / max(math.log(clusters), _EPS)
    return {"entropy": entropy, "used": (fraction_K >= 0.1 / clusters).sum().to(fraction_K.dtype)}


class _JointSums(torch.autograd.Function):
    """Both maps lie row by row in a frame of zeros as wide as the largest displacement, so that a displacement is a shift of the
    rows: one matrix product on the maps where they are, forward and backward, without a copy of them for each."""

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
    """Shape: (B, K, h, w) -> (B x (h + 2 frame) x (w + 2 frame), K)."""
    return F.pad(map_BKhw.permute(0, 2, 3, 1), (0, 0, *[frame] * 4)).flatten(0, 2)


def _unframed(rows_RK: Tensor, grid: tuple[int, int], frame: int) -> Tensor:
    """The inverse of :func:`_framed_rows`."""
    h, w = grid
    framed = rows_RK.view(-1, h + 2 * frame, w + 2 * frame, rows_RK.shape[1])
    return framed[:, frame : frame + h, frame : frame + w].permute(0, 3, 1, 2)


def _shifts(rows: int, w: int, radius: int) -> tuple[slice, list[slice]]:
    """Return the rows that lie outside the frame, with a margin, and the rows that each displacement shifts them to."""
    wide = w + 2 * radius
    margin = radius * wide + radius
    displacements = range(-radius, radius + 1)
    starts = [margin + down * wide + right for down in displacements for right in displacements]
    return slice(margin, rows - margin), [slice(start, start + rows - 2 * margin) for start in starts]
