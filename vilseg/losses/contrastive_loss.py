"""Cross-modal contrast between images and captions, on global and on pooled patch embeddings, in two forms.

Symmetric InfoNCE (van den Oord et al. 2018; CLIP, Radford et al. 2021, figure 3; ViL-Seg, section 3.2):

    L = -1/2B sum_i [ log softmax_j(s <x_i, t_j>)_i + log softmax_j(s <t_i, x_j>)_i ]

and the sigmoid loss of SigLIP (Zhai et al. 2023, section 3.2), where every pair of an image and a caption is judged by itself,

    L = -1/B sum_ij log sigmoid(z_ij (s <x_i, t_j> + b)),   z_ij = 1 if i = j else -1,

over the batch of all workers, s the inverse temperature and b a learnt bias. The patch forms replace <x_i, t_j> by the
similarity of caption j with image i's patches pooled by a soft-max of their similarity with that caption, so that patches come
to share the texts' space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.distributed import gather_rows, rank


def contrastive_loss(images_BD: Tensor, texts_BD: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of matching rows, negatives from all workers.

    Args:
        images_BD: unit-length embeddings of this worker's images. Shape: (B, D).
        texts_BD: of their captions. Shape: (B, D).
        scale: inverse temperature, scalar.

    Returns:
        This worker's part, a scalar; the mean over workers is the loss of the whole batch.

    Raises:
        ValueError: the shapes differ.

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


def sigmoid_loss(images_BD: Tensor, texts_BD: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss of matching rows, negatives from all workers; arguments and result as for :func:`contrastive_loss`.

    Args:
        images_BD: unit-length embeddings of this worker's images. Shape: (B, D).
        texts_BD: of their captions. Shape: (B, D).
        scale: inverse temperature, scalar.
        bias: added to every logit, scalar; -10 at the start makes up for the many negatives.

    Example:
        >>> embeddings = torch.eye(3)
        >>> loss = sigmoid_loss(embeddings, embeddings, torch.tensor(10.0), torch.tensor(-10.0))
        >>> round(float(loss), 4)  # log 2 for the right pair, next to nothing for the two wrong ones
        0.6932
    """
    images, texts = _matching(images_BD, texts_BD)
    return sigmoid_loss_from_scores(images @ gather_rows(texts).T, scale, bias)


def softmax_pooled_scores(patches_BND: Tensor, texts_QD: Tensor, pooling_temperature: float) -> Tensor:
    """Similarity of images and texts, an image's patches pooled for each text by a soft-max over their similarity with it.

    With p_in the patches of image i and w = softmax_n(<p_in, t_j> / pooling_temperature) it is sum_n w_n <p_in, t_j>.

    Args:
        patches_BND: unit-length patch embeddings. Shape: (B, N, D).
        texts_QD: unit-length text embeddings. Shape: (Q, D).
        pooling_temperature: of the soft-max over patches; large values give the mean.

    Returns:
        Shape: (B, Q).

    Example:
        >>> patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # one image with two patches
        >>> softmax_pooled_scores(patches, torch.tensor([[1.0, 0.0]]), 0.01)  # the patch like the text counts
        tensor([[1.]])
    """
    similarity_BNQ = _at_least_float32(patches_BND) @ _at_least_float32(texts_QD).T
    weights_BNQ = (similarity_BNQ / pooling_temperature).softmax(1)
    return (weights_BNQ * similarity_BNQ).sum(1)


def contrastive_loss_from_scores(scores_BQ: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of this worker's rows of the similarities of images with the captions of all workers.

    Args:
        scores_BQ: similarities, as from :func:`softmax_pooled_scores`. Shape: (B, Q).
        scale: inverse temperature, scalar.

    Returns:
        The loss of the whole batch, the same on every worker.
    """
    # Rows of images are what a worker has; the text direction needs the columns of all of them.
    logits_QQ = gather_rows(scale * _at_least_float32(scores_BQ))
    target = torch.arange(len(logits_QQ), device=logits_QQ.device)
    return (F.cross_entropy(logits_QQ, target) + F.cross_entropy(logits_QQ.T, target)) / 2


def sigmoid_loss_from_scores(scores_BQ: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss of this worker's rows of the similarities of images with the captions of all workers.

    Args:
        scores_BQ: similarities, as from :func:`softmax_pooled_scores`. Shape: (B, Q).
        scale: inverse temperature, scalar.
        bias: added to every logit, scalar.

    Returns:
        This worker's part; the mean over workers is the loss of the whole batch.
    """
    logits_BQ = scale * _at_least_float32(scores_BQ) + bias
    right_B1 = logits_BQ.gather(1, _own_columns(logits_BQ).unsqueeze(1))
    # log sigmoid(-x) = log sigmoid(x) - x: all pairs as if they were wrong, and the right ones put right.
    return -(F.logsigmoid(-logits_BQ).sum() + right_B1.sum()) / len(logits_BQ)


def _matching(images_BD: Tensor, texts_BD: Tensor) -> tuple[Tensor, Tensor]:
    if images_BD.shape != texts_BD.shape or images_BD.ndim != 2:
        raise ValueError(f"expected two (B, D) of one shape, got {tuple(images_BD.shape)} and {tuple(texts_BD.shape)}")
    return _at_least_float32(images_BD), _at_least_float32(texts_BD)


def _own_columns(rows_BQ: Tensor) -> Tensor:
    """Return the columns of this worker's pairs among those of all workers. Shape: -> (B,)."""
    count = len(rows_BQ)
    return torch.arange(count, device=rows_BQ.device) + rank() * count


def _at_least_float32(x: Tensor) -> Tensor:
    # A soft-max over thousands of logits up to 100 loses its small terms in half precision.
    return x if x.dtype == torch.float64 else x.float()
