"""Multi-label contrast between images and the noun phrases of their captions.

An image has several phrases and a phrase several images; every pair of them is a positive. With the score of image i and
phrase p the mean of the k best patch similarities, s_ip = mean top-k_n <p_in, t_p>, and Y the matrix of positives,

    L = 1/2 [ mean_i 1/|Y_i| sum_{p in Y_i} -log softmax_p(s s_ip) + mean_p 1/|Y_p| sum_{i in Y_p} -log softmax_i(s s_ip) ]

(the supervised contrastive form L_out of Khosla et al. 2020, equation 2, in both directions).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vilseg.distributed import gather_rows


def top_k_pooled_scores(patches_BND: Tensor, phrases_PD: Tensor, top_patches: int) -> Tensor:
    """Mean similarity of each image's best patches with each phrase.

    Args:
        patches_BND: unit-length patch embeddings. Shape: (B, N, D).
        phrases_PD: unit-length phrase embeddings. Shape: (P, D).
        top_patches: k above; all patches where there are fewer.

    Returns:
        Shape: (B, P).

    Example:
        >>> patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # one image with two patches
        >>> top_k_pooled_scores(patches, torch.tensor([[1.0, 0.0]]), top_patches=1)
        tensor([[1.]])
    """
    if len(phrases_PD) == 0:
        return patches_BND.sum(2)[:, :0]
    dtype = torch.promote_types(patches_BND.dtype, torch.float32)
    similarity_BNP = patches_BND.to(dtype) @ phrases_PD.to(dtype).T
    return similarity_BNP.topk(min(top_patches, similarity_BNP.shape[1]), dim=1).values.mean(1)


def multi_label_loss(scores_BP: Tensor, positives_BP: Tensor, scale: Tensor) -> Tensor:
    """Contrast this worker's images with the phrases that occur in the batch, by their :func:`top_k_pooled_scores`.

    Args:
        scores_BP: similarities of this worker's images with the phrases of the whole batch. Shape: (B, P).
        positives_BP: True where an image's captions hold the phrase. Shape: (B, P), bool.
        scale: inverse temperature, scalar.

    Returns:
        The loss of the whole batch, the same on every worker; zero (with gradient) where no image has a phrase.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.9]])  # two images, two phrases
        >>> positives = torch.tensor([[True, False], [True, True]])
        >>> loss = multi_label_loss(scores, positives, torch.tensor(10.0))
        >>> round(float(loss), 3)
        0.407
    """
    if positives_BP.shape != scores_BP.shape:
        raise ValueError(f"positives must be {tuple(scores_BP.shape)}, got {tuple(positives_BP.shape)}")
    if scores_BP.shape[1] == 0:
        return scores_BP.sum() * 0.0
    logits_QP = gather_rows(scale * scores_BP)
    positives_QP = gather_rows(positives_BP.to(scores_BP.dtype))
    return (_multi_positive(logits_QP, positives_QP) + _multi_positive(logits_QP.T, positives_QP.T)) / 2


def _multi_positive(logits_RC: Tensor, positives_RC: Tensor) -> Tensor:
    """Mean over the rows that have a positive of the mean negative log-likelihood of their positives."""
    counts_R = positives_RC.sum(1)
    of_row_R = -(logits_RC.log_softmax(1) * positives_RC).sum(1) / counts_R.clamp(min=1)
    return of_row_R.sum() / (counts_R > 0).sum().clamp(min=1)
