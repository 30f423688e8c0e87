"""Multi-label contrastive loss between images and the noun phrases of their captions.

An image has several phrases and a phrase belongs to several images; each such pair is a positive. With the score
s_ip = mean top-k_n <p_in, t_p> of image i and phrase p, the mean of the k largest patch similarities, the inverse temperature s,
Y_i the phrases of image i and Y_p the images of phrase p,

    L = 1/2 [ mean_i 1/|Y_i| sum_{p in Y_i} -log softmax_p(s s_ip) + mean_p 1/|Y_p| sum_{i in Y_p} -log softmax_i(s s_ip) ]

(the supervised contrastive form L_out of Khosla et al. 2020, equation 2, in both directions).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vilseg.distributed import gather_rows


def top_k_pooled_scores(
    patches_BND: Float[Tensor, "B N D"], phrases_PD: Float[Tensor, "P D"], top_patches: int
) -> Float[Tensor, "B P"]:
    """Compute, for every image and phrase, the mean similarity of the image's most similar patches with the phrase.

    Args:
        patches_BND: unit-length patch embeddings.
        phrases_PD: unit-length phrase embeddings.
        top_patches: number of patches in the mean, k in the module's docstring; all patches if an image has fewer.

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


def multi_label_loss(
    scores_BP: Float[Tensor, "B P"], positives_BP: Bool[Tensor, "B P"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Compute the multi-label contrastive loss of images and phrases from their :func:`top_k_pooled_scores`.

    Args:
        scores_BP: similarities of this worker's images with the phrases that occur in the batch of all workers.
        positives_BP: True if one of the image's captions contains the phrase.
        scale: inverse temperature.

    Returns:
        Loss of the whole batch, the same on every worker; 0, still connected to the graph, if no image has a phrase.

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


def _multi_positive(logits_QP: Tensor, positives_QP: Tensor) -> Tensor:
    """Average the negative log-likelihood over the positives of each row, then over the rows with at least one positive."""
    counts_Q = positives_QP.sum(1)
    row_losses_Q = -(logits_QP.log_softmax(1) * positives_QP).sum(1) / counts_Q.clamp(min=1)
    return row_losses_Q.sum() / (counts_Q > 0).sum().clamp(min=1)
