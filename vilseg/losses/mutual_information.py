"""Mutual information between the cluster assignments of an image and of its transformed version.

Invariant information clustering (IIC, Ji et al. 2019) in its dense form (section 3.3, equation 5). For a displacement t of
the patch grid,

    P_t = 1/n sum_{b,u} z_b(u) z'_b(u + t)^T,   made symmetric and normalised to sum 1,
    I_t = sum_kl P_kl (log P_kl - a log P_k. - a log P_.l),

and the loss is -mean_t I_t. The entropy weight a > 1 rewards balanced marginals and keeps clusters from collapsing
(section 3.2 of the paper's published code). z' has been brought onto z's grid by the inverse of the geometry beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vilseg.distributed import mean_over_workers

_EPS = 1e-12
"""Keeps log finite for pairs of clusters that never meet; far below the smallest joint probability that matters."""


def mutual_information_loss(
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
    joints_SKK = torch.stack(
        [
            _joint(first, second, down, right)
            for down in range(-radius, radius + 1)
            for right in range(-radius, radius + 1)
        ]
    )
    joints_SKK = mean_over_workers(joints_SKK)
    joints_SKK = joints_SKK + joints_SKK.transpose(1, 2)
    total_S = joints_SKK.sum((1, 2))
    met_S = total_S > 0
    if not bool(met_S.any()):
        return joints_SKK.sum() * 0.0
    joints_SKK = (joints_SKK[met_S] / total_S[met_S].view(-1, 1, 1)).clamp(min=_EPS)
    marginal_SK = joints_SKK.sum(2)
    log_marginals_SKK = marginal_SK.log().unsqueeze(2) + marginal_SK.log().unsqueeze(1)
    information_S = (joints_SKK * (joints_SKK.log() - entropy_weight * log_marginals_SKK)).sum((1, 2))
    return -information_S.mean()


def _joint(first_BKhw: Tensor, second_BKhw: Tensor, down: int, right: int) -> Tensor:
    """Sum over images and patches of z(u) z'(u + t)^T for one displacement. Shape: -> (K, K)."""
    h, w = first_BKhw.shape[2:]
    here = first_BKhw[:, :, max(0, -down) : h - max(0, down), max(0, -right) : w - max(0, right)]
    there = second_BKhw[:, :, max(0, down) : h - max(0, -down), max(0, right) : w - max(0, -right)]
    return here.transpose(0, 1).flatten(1) @ there.transpose(0, 1).flatten(1).T
