"""Guided filter (He, Sun & Tang 2013, section 3): maps that are, window by window, a linear function of the picture's colours.

In every square window w_k of radius r the map p is fitted by the colours I, and a pixel takes the mean of the fits of all
windows it lies in:

    a_k = (Sigma_k + eps U)^-1 (mean_k(I p) - mu_k mean_k(p)),    b_k = mean_k(p) - a_k^T mu_k       (eq. 14, 15)
    q_i = mean_i(a)^T I_i + mean_i(b)                                                               (eq. 16)

with the mean mu_k and the covariance Sigma_k of the colours in w_k and the 3 x 3 identity U. An edge of the picture inside a
window thus becomes an edge of the map. All means are box filters, so the time does not depend on r. Windows that reach over
the border hold only what is inside. eps is (tolerance sigma)^2 with the standard deviation sigma of the whole picture's
colours, so that neither range nor contrast of the picture matters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class GuidedFilter:
    """What a picture says of its edges, to be laid on any maps of its size.

    Args:
        image_3HW: floats of any range. Shape: (3, H, W).
        radius: of the windows in pixels.
        tolerance: contrast, in standard deviations of the whole picture, below which an edge is smoothed away.
    """

    def __init__(self, image_3HW: Tensor, radius: int, tolerance: float) -> None:
        # Covariances of large and nearly equal numbers lose their digits.
        self._image_3HW = image_3HW - image_3HW.mean((1, 2), keepdim=True)
        self._radius = radius
        self._size_1HW = _box_sum(torch.ones_like(image_3HW[:1]), radius)
        self._mean_3HW = self._mean(self._image_3HW)
        image, mean = self._image_3HW, self._mean_3HW
        pairs_9HW = (image.unsqueeze(1) * image.unsqueeze(0)).flatten(0, 1)
        covariance_33HW = (self._mean(pairs_9HW) - (mean.unsqueeze(1) * mean.unsqueeze(0)).flatten(0, 1)).unflatten(
            0, (3, 3)
        )
        variance = image.square().mean().clamp(min=1e-9)  # a picture of one colour has no edges, and no nan either
        self._inverse_33HW = _inverse(covariance_33HW, tolerance**2 * variance)

    def __call__(self, maps_CHW: Tensor) -> Tensor:
        """Filtered maps. Shape: (C, H, W) -> (C, H, W)."""
        mean_CHW = self._mean(maps_CHW)
        products_C3HW = maps_CHW.unsqueeze(1) * self._image_3HW
        covariance_C3HW = self._mean(products_C3HW.flatten(0, 1)).unflatten(0, (-1, 3))
        covariance_C3HW = covariance_C3HW - mean_CHW.unsqueeze(1) * self._mean_3HW
        slopes_C3HW = torch.einsum("ijhw,cjhw->cihw", self._inverse_33HW, covariance_C3HW)
        offset_CHW = mean_CHW - (slopes_C3HW * self._mean_3HW).sum(1)
        mean_slopes_C3HW = self._mean(slopes_C3HW.flatten(0, 1)).unflatten(0, (-1, 3))
        return (mean_slopes_C3HW * self._image_3HW).sum(1) + self._mean(offset_CHW)

    def _mean(self, maps_CHW: Tensor) -> Tensor:
        return _box_sum(maps_CHW, self._radius) / self._size_1HW


def _box_sum(maps_CHW: Tensor, radius: int) -> Tensor:
    """Sums over the windows around every pixel, one side after the other. Shape: (C, H, W) -> (C, H, W)."""
    for dim in (1, 2):
        length = maps_CHW.shape[dim]
        reach = min(radius, length)  # beyond, every window holds everything
        before = (reach + 1, reach) if dim == 2 else (0, 0, reach + 1, reach)
        # Doubles: a difference of two sums of thousands of float32 has no digit left for a small window.
        sums = F.pad(maps_CHW, before).cumsum(dim, dtype=torch.float64)
        maps_CHW = (sums.narrow(dim, 2 * reach + 1, length) - sums.narrow(dim, 0, length)).to(maps_CHW.dtype)
    return maps_CHW


def _inverse(symmetric_33HW: Tensor, added: Tensor) -> Tensor:
    """Inverse of each matrix with ``added`` on its diagonal, by cofactors: hundreds of times as fast as `torch.linalg.inv`."""
    a, b, c = symmetric_33HW[0, 0] + added, symmetric_33HW[0, 1], symmetric_33HW[0, 2]
    d, e, f = symmetric_33HW[1, 1] + added, symmetric_33HW[1, 2], symmetric_33HW[2, 2] + added
    cofactors = (d * f - e * e, c * e - b * f, b * e - c * d, a * f - c * c, b * c - a * e, a * d - b * b)
    determinant = a * cofactors[0] + b * cofactors[1] + c * cofactors[2]
    aa, ab, ac, bb, bc, cc = (one / determinant for one in cofactors)
    return torch.stack([torch.stack(row) for row in ((aa, ab, ac), (ab, bb, bc), (ac, bc, cc))])
