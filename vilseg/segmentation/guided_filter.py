"""Guided filter (He, Sun & Tang 2013, section 3): aligns a map with the edges of an image by local linear fits of its colours.

In every square window w_k of radius r, the map p is fitted by a linear function of the colours I. The result q at a pixel is the
mean of the fits of all windows that contain the pixel:

    a_k = (Sigma_k + eps U)^-1 (mean_k(I p) - mu_k mean_k(p)),    b_k = mean_k(p) - a_k^T mu_k       (eq. 14, 15)
    q_i = mean_i(a)^T I_i + mean_i(b)                                                               (eq. 16)

where mu_k and Sigma_k are the mean and the covariance of the colours in w_k, and U is the 3 x 3 identity matrix. An edge of the
image inside a window thus becomes an edge of the map. All means are box filters, so the time hardly depends on r. Windows that
extend over the border of the image contain only the pixels inside. eps is (tolerance sigma)^2, where sigma is the standard
deviation of the whole image's colours, so the result does not depend on range or contrast of the image.

The fit may use a smaller version of the image (fast guided filter, He & Sun 2015). Then mean(a) and mean(b) are upsampled, and
eq. 16 is the only step at the size of the large image.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def guided_filter(
    maps_Chw: Float[Tensor, "C h w"],
    small_3hw: Float[Tensor, "3 h w"],
    image_3HW: Float[Tensor, "3 H W"],
    radius: int,
    tolerance: float,
) -> Float[Tensor, "C H W"]:
    """Upsample maps to the size of ``image_3HW`` and align them with its edges.

    Args:
        maps_Chw: maps to filter, such as class scores. Shape: (C, h, w).
        small_3hw: the image at the size of the maps, floats of any range. Shape: (3, h, w).
        image_3HW: the image, in the same range. Shape: (3, H, W).
        radius: radius of the windows, in cells of the maps.
        tolerance: contrast, in standard deviations of the whole image, below which an edge is smoothed away.

    Returns:
        The filtered maps. Shape: (C, H, W).

    Example:
        >>> import torch
        >>> image = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).expand(3, 6, 6)
        >>> blurred = torch.tensor([0.0, 0.1, 0.3, 0.7, 0.9, 1.0]).expand(1, 6, 6)
        >>> sharp = guided_filter(blurred, image, image, radius=2, tolerance=0.01)
        >>> bool(sharp[0, 3, 3] - sharp[0, 3, 2] > blurred[0, 3, 3] - blurred[0, 3, 2])
        True
    """
    # The colours are centred first, because covariances of large and nearly equal numbers lose precision.
    centre_311 = small_3hw.mean((1, 2), keepdim=True)
    small_3hw = small_3hw - centre_311
    size_1hw = _box_sum(torch.ones_like(small_3hw[:1]), radius)

    def mean(maps_Rhw: Tensor) -> Tensor:
        return _box_sum(maps_Rhw, radius) / size_1hw

    mean_3hw, mean_Chw = mean(small_3hw), mean(maps_Chw)
    pairs_33hw = mean((small_3hw.unsqueeze(1) * small_3hw).flatten(0, 1)).unflatten(0, (3, 3))
    variance = small_3hw.square().mean().clamp(min=1e-9)  # prevents NaN for an image of a single colour
    inverse_33hw = _inverse(pairs_33hw - mean_3hw.unsqueeze(1) * mean_3hw, tolerance**2 * variance)
    products_C3hw = mean((maps_Chw.unsqueeze(1) * small_3hw).flatten(0, 1)).unflatten(0, (-1, 3))
    covariance_C3hw = products_C3hw - mean_Chw.unsqueeze(1) * mean_3hw
    slopes_C3hw = (inverse_33hw * covariance_C3hw.unsqueeze(1)).sum(2)
    offset_Chw = mean_Chw - (slopes_C3hw * mean_3hw).sum(1)
    fit_C4hw = mean(torch.cat([slopes_C3hw, offset_Chw.unsqueeze(1)], 1).flatten(0, 1)).unflatten(0, (-1, 4))
    if image_3HW.shape[1:] != small_3hw.shape[1:]:
        fit_C4hw = F.interpolate(fit_C4hw, image_3HW.shape[1:], mode="bilinear", align_corners=False)
    result_CHW = fit_C4hw[:, 3]
    for channel, colour_HW in enumerate(image_3HW - centre_311):
        result_CHW = torch.addcmul(result_CHW, fit_C4hw[:, channel], colour_HW)
    return result_CHW


def _box_sum(maps_CHW: Tensor, radius: int) -> Tensor:
    """Sum the window around every pixel, along one axis after the other. Shape: (C, H, W) -> (C, H, W)."""
    for dim in (1, 2):
        reach = min(radius, maps_CHW.shape[dim])  # with a larger radius every window contains the whole axis
        padded = F.pad(maps_CHW, (reach, reach) if dim == 2 else (0, 0, reach, reach))
        maps_CHW = _sliding_sum(padded, 2 * reach + 1, dim)
    return maps_CHW


def _sliding_sum(maps_CHW: Tensor, count: int, dim: int) -> Tensor:
    """Sum every run of ``count`` neighbours along axis ``dim``, from the sums of runs of 1, 2, 4, … neighbours.

    For small windows this is as fast as a difference of cumulative sums, without its loss of precision.
    """
    length = maps_CHW.shape[dim] - count + 1
    total: Tensor | None = None
    start, run, sums = 0, 1, maps_CHW
    while True:
        if count & run:
            part = sums.narrow(dim, start, length)
            total = part if total is None else total + part
            start += run
        if 2 * run > count:
            assert total is not None, "count is positive"
            return total
        rest = sums.shape[dim] - run
        sums = sums.narrow(dim, 0, rest) + sums.narrow(dim, run, rest)
        run *= 2


def _inverse(symmetric_33HW: Tensor, added: Tensor) -> Tensor:
    """Invert the 3 x 3 matrix of each pixel after adding ``added`` to its diagonal.

    Cofactors are hundreds of times as fast as `torch.linalg.inv`.
    """
    a, b, c = symmetric_33HW[0, 0] + added, symmetric_33HW[0, 1], symmetric_33HW[0, 2]
    d, e, f = symmetric_33HW[1, 1] + added, symmetric_33HW[1, 2], symmetric_33HW[2, 2] + added
    cofactors = (d * f - e * e, c * e - b * f, b * e - c * d, a * f - c * c, b * c - a * e, a * d - b * b)
    determinant = a * cofactors[0] + b * cofactors[1] + c * cofactors[2]
    aa, ab, ac, bb, bc, cc = (one / determinant for one in cofactors)
    return torch.stack([torch.stack(row) for row in ((aa, ab, ac), (ab, bb, bc), (ac, bc, cc))])
