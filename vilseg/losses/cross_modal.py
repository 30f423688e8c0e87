"""Cross-modal contrast between images and captions, on global and on pooled patch embeddings.

Symmetric InfoNCE (van den Oord et al. 2018; CLIP, Radford et al. 2021, figure 3; ViL-Seg, section 3.2):

    L = -1/2B sum_i [ log softmax_j(s <x_i, t_j>)_i + log softmax_j(s <t_i, x_j>)_i ]

over the batch of all workers, s the inverse temperature. The patch form replaces <x_i, t_j> by the similarity of caption j
with image i's patches pooled by a soft-max of their similarity with that caption, so that patches come to share the
texts' space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.distributed import gather_rows, rank


def contrast(images_BD: Tensor, texts_BD: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of matching rows, negatives from all workers.

    Args:
        images_BD: unit-length embeddings of this worker's images. Shape: (B, D).
        texts_BD: of their captions. Shape: (B, D).
        scale: inverse temperature, scalar.

    Returns:
        This worker's share; the mean over workers is the loss of the whole batch.

    Raises:
        ValueError: the shapes differ.
    """
    if images_BD.shape != texts_BD.shape or images_BD.ndim != 2:
        raise ValueError(f"expected two (B, D) of one shape, got {tuple(images_BD.shape)} and {tuple(texts_BD.shape)}")
    images, texts = _at_least_float32(images_BD), _at_least_float32(texts_BD)
    by_image = scale * images @ gather_rows(texts).T
    by_text = scale * texts @ gather_rows(images).T
    return _diagonal_cross_entropy(by_image, by_text)


def patch_contrast(patches_BND: Tensor, texts_BD: Tensor, scale: Tensor, pooling_temperature: float) -> Tensor:
    """InfoNCE on patches pooled for each caption by a soft-max over their similarity with it.

    With p_in the patches of image i and w = softmax_n(<p_in, t_j> / pooling_temperature), the similarity of image i and
    caption j is sum_n w_n <p_in, t_j>.

    Args:
        patches_BND: unit-length patch embeddings. Shape: (B, N, D).
        texts_BD: unit-length caption embeddings. Shape: (B, D).
        scale: inverse temperature, scalar.
        pooling_temperature: of the soft-max over patches; large values give the mean.

    Returns:
        The loss of the whole batch, the same on every worker.
    """
    if patches_BND.ndim != 3 or patches_BND.shape[0] != texts_BD.shape[0]:
        raise ValueError(f"expected (B, N, D) and (B, D), got {tuple(patches_BND.shape)} and {tuple(texts_BD.shape)}")
    texts_QD = gather_rows(_at_least_float32(texts_BD))
    similarity_BNQ = _at_least_float32(patches_BND) @ texts_QD.T
    weights_BNQ = (similarity_BNQ / pooling_temperature).softmax(1)
    # Rows of images are what a worker has; the text direction needs the columns of all of them.
    logits_QQ = gather_rows(scale * (weights_BNQ * similarity_BNQ).sum(1))
    target = torch.arange(len(logits_QQ), device=logits_QQ.device)
    return (F.cross_entropy(logits_QQ, target) + F.cross_entropy(logits_QQ.T, target)) / 2


def _diagonal_cross_entropy(by_image: Tensor, by_text: Tensor) -> Tensor:
    count = len(by_image)
    target = torch.arange(count, device=by_image.device) + rank() * count
    return (F.cross_entropy(by_image, target) + F.cross_entropy(by_text, target)) / 2


def _at_least_float32(x: Tensor) -> Tensor:
    # A soft-max over thousands of logits up to 100 loses its small terms in half precision.
    return x if x.dtype == torch.float64 else x.float()
