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


def noun_contrast(
    patches_BND: Tensor, phrases_PD: Tensor, positives_BP: Tensor, scale: Tensor, top_patches: int
) -> Tensor:
    """Contrast images with the phrases that occur in the batch.

    Args:
        patches_BND: unit-length patch embeddings of this worker's images. Shape: (B, N, D).
        phrases_PD: unit-length embeddings of the phrases of the whole batch, the same on every worker. Shape: (P, D).
        positives_BP: True where an image's captions hold the phrase. Shape: (B, P), bool.
        scale: inverse temperature, scalar.
        top_patches: patches whose mean similarity is the score; all of them where there are fewer.

    Returns:
        The loss of the whole batch, the same on every worker; zero (with gradient) where no image has a phrase.
    """
    if positives_BP.shape != (len(patches_BND), len(phrases_PD)):
        raise ValueError(f"positives must be {(len(patches_BND), len(phrases_PD))}, got {tuple(positives_BP.shape)}")
    if len(phrases_PD) == 0:
        return patches_BND.sum() * 0.0
    dtype = torch.promote_types(patches_BND.dtype, torch.float32)
    similarity_BNP = patches_BND.to(dtype) @ phrases_PD.to(dtype).T
    top_BkP = similarity_BNP.topk(min(top_patches, similarity_BNP.shape[1]), dim=1).values
    logits_QP = gather_rows(scale * top_BkP.mean(1))
    positives_QP = gather_rows(positives_BP.to(dtype))
    return (_multi_positive(logits_QP, positives_QP) + _multi_positive(logits_QP.T, positives_QP.T)) / 2


def _multi_positive(logits_RC: Tensor, positives_RC: Tensor) -> Tensor:
    """Mean over the rows that have a positive of the mean negative log-likelihood of their positives."""
    counts_R = positives_RC.sum(1)
    of_row_R = -(logits_RC.log_softmax(1) * positives_RC).sum(1) / counts_R.clamp(min=1)
    return of_row_R.sum() / (counts_R > 0).sum().clamp(min=1)
