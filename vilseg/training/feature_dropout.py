"""Clustering head on several views of the same cached features that differ by dropped channels only.

With the features x_n of an image's patches, a view's channel factors m (0 or 1 / (1 - p) at dropout probability p), and the head,
a layer norm (gamma, beta) followed by a linear map (W, b),

    z_n = W (gamma (m x_n - mean_n) / sd_n + beta) + b = ((W gamma m) x_n - mean_n (W gamma) 1) / sd_n + W beta + b,
    mean_n = <m, x_n> / F,   sd_n^2 = <m^2, x_n^2> / F - mean_n^2 + eps.

The factors multiply the few weights instead of the many features. The features are read once for all views, a few images at a
time that fit into the processor's cache, instead of once for each operation on each view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHUNK_VALUES = 1 << 19
"""Number of feature values that are held in float32 at once on a CPU (2 MB). A GPU takes all images at once, because its memory
is fast but every kernel launch has a cost."""


def logits_with_feature_dropout(head: nn.Sequential, patches_BNF: Tensor, factors_VBF: Tensor) -> Tensor:
    """Compute ``head(patches * factors)`` for each view, without computing ``patches * factors``.

    Args:
        head: a layer norm and a linear map.
        patches_BNF: features of any floating dtype; no gradient flows to them. Shape: (B, N, F).
        factors_VBF: factors of the channels in each view. Shape: (V, B, F).

    Returns:
        Logits in the dtype of the head. Shape: (V, B, N, K).
    """
    norm, linear = head
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(linear, nn.Linear)
    weight_KF = linear.weight * norm.weight
    bias_K = linear.weight @ norm.bias + linear.bias
    return _DroppedLogits.apply(weight_KF, bias_K, patches_BNF.detach(), factors_VBF, norm.eps)


class _DroppedLogits(torch.autograd.Function):
    """Logits z_n of the module's docstring, with their gradient.

    In names of tensors, ``b`` counts the images of one slice of the batch.
    """

    @staticmethod
    def forward(
        ctx: Any, weight_KF: Tensor, bias_K: Tensor, patches_BNF: Tensor, factors_VBF: Tensor, eps: float
    ) -> Tensor:
        views, images, features = factors_VBF.shape
        patches, clusters = patches_BNF.shape[1], len(weight_KF)
        factors_VBF = factors_VBF.to(weight_KF.dtype)
        total_K = weight_KF.sum(1)
        logits_VBNK = weight_KF.new_empty(views, images, patches, clusters)
        means_VBN, rates_VBN = (weight_KF.new_empty(views, images, patches) for _ in range(2))
        for part in cache_sized_slices(patches_BNF):
            x_bNF, factors_VbF = patches_BNF[part].to(weight_KF.dtype), factors_VBF[:, part]
            # The weights of a view and, as the last row, its factors: one product gives logits and sums for the means.
            maps_VbKF = torch.cat([factors_VbF.unsqueeze(2) * weight_KF, factors_VbF.unsqueeze(2)], dim=2)
            products = x_bNF @ maps_VbKF.permute(1, 3, 0, 2).flatten(2)  # (b, N, V (K + 1))
            products_VbNK = products.unflatten(2, (views, clusters + 1)).permute(2, 0, 1, 3)
            squares_VbN = (x_bNF.square() @ factors_VbF.square().permute(1, 2, 0)).permute(2, 0, 1)
            mean_VbN = products_VbNK[..., -1] / features
            rate_VbN = (squares_VbN / features - mean_VbN.square()).clamp(min=0).add(eps).rsqrt()
            means_VBN[:, part], rates_VBN[:, part] = mean_VbN, rate_VbN
            shifted_VbNK = products_VbNK[..., :-1] - mean_VbN.unsqueeze(3) * total_K
            logits_VBNK[:, part] = shifted_VbNK * rate_VbN.unsqueeze(3) + bias_K
        ctx.save_for_backward(patches_BNF, factors_VBF, means_VBN, rates_VBN)
        return logits_VBNK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_VBNK: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        patches_BNF, factors_VBF, means_VBN, rates_VBN = ctx.saved_tensors
        scaled_VBNK = gradient_VBNK * rates_VBN.unsqueeze(3)
        by_weight_KF = gradient_VBNK.new_zeros(gradient_VBNK.shape[3], patches_BNF.shape[2])
        views, clusters = gradient_VBNK.shape[0], gradient_VBNK.shape[3]
        for part in cache_sized_slices(patches_BNF):
            x_bNF = patches_BNF[part].to(gradient_VBNK.dtype)
            products = scaled_VBNK[:, part].permute(1, 0, 3, 2).flatten(1, 2) @ x_bNF  # (b, V K, F)
            products_bVKF = products.unflatten(1, (views, clusters))
            by_weight_KF += (products_bVKF * factors_VBF[:, part].transpose(0, 1).unsqueeze(2)).sum((0, 1))
        by_weight_KF -= (scaled_VBNK * means_VBN.unsqueeze(3)).sum((0, 1, 2)).unsqueeze(1)
        return by_weight_KF, gradient_VBNK.sum((0, 1, 2)), None, None, None


def cache_sized_slices(patches_BNF: Tensor) -> list[slice]:
    """Split a batch (B, N, F) into slices of a few images that fit into the processor's cache; a GPU gets one slice of all."""
    images = len(patches_BNF)
    held = images if patches_BNF.is_cuda else max(1, _CHUNK_VALUES // (patches_BNF.shape[1] * patches_BNF.shape[2]))
    return [slice(start, min(images, start + held)) for start in range(0, images, held)]
