"""Contrastive losses between images and captions, InfoNCE and sigmoid, on global or on pooled patch embeddings.

Symmetric InfoNCE (van den Oord et al. 2018; CLIP, Radford et al. 2021, figure 3; ViL-Seg, section 3.2):

    L = -1/2B sum_i [ log softmax_j(s <x_i, t_j>)_i + log softmax_j(s <t_i, x_j>)_i ]

and the sigmoid loss of SigLIP (Zhai et al. 2023, section 3.2), which classifies every pair of an image and a caption on its own,

    L = -1/B sum_ij log sigmoid(z_ij (s <x_i, t_j> + b)),   z_ij = 1 if i = j else -1,

where B counts the pairs of all workers, s is the inverse temperature and b a learnt bias. The forms on patches replace
<x_i, t_j> by a mean of the similarities of caption j with the patches of image i, weighted by a soft-max over these similarities
(:func:`softmax_pooled_scores`). This trains the patch embeddings to lie in the same space as the text embeddings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vilseg.distributed import gather_rows, rank


def contrastive_loss(
    images_BD: Float[Tensor, "B D"], texts_BD: Float[Tensor, "B D"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Compute the symmetric InfoNCE loss of matching rows, with negatives from all workers.

    Args:
        images_BD: unit-length embeddings of this worker's images.
        texts_BD: unit-length embeddings of their captions, in the same order.
        scale: inverse temperature.

    Returns:
        Loss of this worker's pairs; its mean over the workers is the loss of the whole batch.

    Raises:
        ValueError: the two shapes differ or are not (B, D).

    Example:
        >>> embeddings = torch.eye(3)
        >>> float(contrastive_loss(embeddings, embeddings, torch.tensor(100.0)))
        0.0
    """
    images, texts = _matching(images_BD, texts_BD)
    by_image = scale * images @ gather_rows(texts).T
    by_text = scale * texts @ gather_rows(images).T
    target = _own_columns(by_image)
    return (F.cross_entropy(by_image, target) + F.cross_entropy(by_text, target)) / 2


def sigmoid_loss(
    images_BD: Float[Tensor, "B D"],
    texts_BD: Float[Tensor, "B D"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Compute SigLIP's sigmoid loss of matching rows, with negatives from all workers.

    Args:
        images_BD: unit-length embeddings of this worker's images.
        texts_BD: unit-length embeddings of their captions, in the same order.
        scale: inverse temperature.
        bias: number added to every logit; -10 at the start of training compensates for the many negatives.

    Returns:
        Loss of this worker's pairs; its mean over the workers is the loss of the whole batch.

    Raises:
        ValueError: the two shapes differ or are not (B, D).

    Example:
        >>> embeddings = torch.eye(3)
        >>> loss = sigmoid_loss(embeddings, embeddings, torch.tensor(10.0), torch.tensor(-10.0))
        >>> round(float(loss), 4)  # per image: log 2 for the matching pair, almost nothing for the two others
        0.6932
    """
    images, texts = _matching(images_BD, texts_BD)
    return sigmoid_loss_from_scores(images @ gather_rows(texts).T, scale, bias)


def softmax_pooled_scores(
    patches_BND: Float[Tensor, "B N D"], texts_QD: Float[Tensor, "Q D"], pooling_temperature: float
) -> Float[Tensor, "B Q"]:
    """Compute the similarity of every image with every text: a weighted mean of the similarities of the image's patches.

    With p_in the patches of image i, text t_j and the weights w_n = softmax_n(<p_in, t_j> / pooling_temperature), the similarity
    is sum_n w_n <p_in, t_j>.

    Args:
        patches_BND: unit-length patch embeddings.
        texts_QD: unit-length text embeddings.
        pooling_temperature: temperature of the soft-max over patches; large values give the unweighted mean.

    Example:
        >>> patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # one image with two patches
        >>> softmax_pooled_scores(patches, torch.tensor([[1.0, 0.0]]), 0.01)  # the first patch has all the weight
        tensor([[1.]])
    """
    similarity_BNQ = _at_least_float32(patches_BND) @ _at_least_float32(texts_QD).T
    weights_BNQ = (similarity_BNQ / pooling_temperature).softmax(1)
    return (weights_BNQ * similarity_BNQ).sum(1)


def contrastive_loss_from_scores(scores_BQ: Float[Tensor, "B Q"], scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Compute the symmetric InfoNCE loss from the similarities of this worker's images with the captions of all workers.

    Args:
        scores_BQ: similarities from :func:`softmax_pooled_scores`. The captions are in rank order, those of a worker in the
            order of its images.
        scale: inverse temperature.

    Returns:
        Loss of the whole batch, the same on every worker.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # two images, two captions
        >>> round(float(contrastive_loss_from_scores(scores, torch.tensor(10.0))), 4)
        0.0012
    """
    # A worker has the scores of its own images only; the soft-max over images needs those of all images.
    logits_QQ = gather_rows(scale * _at_least_float32(scores_BQ))
    target = torch.arange(len(logits_QQ), device=logits_QQ.device)
    return (F.cross_entropy(logits_QQ, target) + F.cross_entropy(logits_QQ.T, target)) / 2


def sigmoid_loss_from_scores(
    scores_BQ: Float[Tensor, "B Q"], scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Compute SigLIP's sigmoid loss from the similarities of this worker's images with the captions of all workers.

    Args:
        scores_BQ: similarities from :func:`softmax_pooled_scores`. The captions are in rank order, those of a worker in the
            order of its images.
        scale: inverse temperature.
        bias: number added to every logit.

    Returns:
        Loss of this worker's images; its mean over the workers is the loss of the whole batch.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # two images, two captions
        >>> round(float(sigmoid_loss_from_scores(scores, torch.tensor(10.0), torch.tensor(-5.0))), 4)
        0.0667
    """
    logits_BQ = scale * _at_least_float32(scores_BQ) + bias
    right_B1 = logits_BQ.gather(1, _own_columns(logits_BQ).unsqueeze(1))
    # log sigmoid(x) = log sigmoid(-x) + x: treat every pair as a negative, then add x for the positives.
    return -(F.logsigmoid(-logits_BQ).sum() + right_B1.sum()) / len(logits_BQ)


def _matching(images_BD: Tensor, texts_BD: Tensor) -> tuple[Tensor, Tensor]:
    if images_BD.shape != texts_BD.shape or images_BD.ndim != 2:
        raise ValueError(f"expected two (B, D) of one shape, got {tuple(images_BD.shape)} and {tuple(texts_BD.shape)}")
    return _at_least_float32(images_BD), _at_least_float32(texts_BD)


def _own_columns(rows_BQ: Tensor) -> Tensor:
    """Return the index of the column of each image's own caption among the captions of all workers. Shape: -> (B,)."""
    count = len(rows_BQ)
    return torch.arange(count, device=rows_BQ.device) + rank() * count


def _at_least_float32(x: Tensor) -> Tensor:
    # In half precision a soft-max over thousands of logits of up to 100 loses its small terms.
    return x if x.dtype == torch.float64 else x.float()
