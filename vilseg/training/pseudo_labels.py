"""Pseudo labels for self-training: a trained model labels patches, and the student learns the confident labels.

The candidate labels of an image are the noun phrases of its own captions, so no list of classes is needed. The calibrated score
z_np of patch n and phrase p combines scores by patch and by region as in ``vilseg.segmentation.class_scores``, in standard
deviations above the mean for the phrase. A patch is labelled

    y_n = argmax_{p in caption} z_np   if that z is at least ``confidence``,

and the student learns the labels against all phrases of the batch, with its patch embeddings p_n, phrases t_p and scale s:

    L = mean over images of mean_{n labelled} -log softmax_p(s <p_n, t_p>)[y_n].

(Pseudo labels, Lee 2013; for masks as in the second row of results of ViL-Seg, section 4.)
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.model import ImageEmbeddings, ImageFeatures, ViLSeg
from vilseg.segmentation.class_embeddings import ClassEmbeddings, score_deviations
from vilseg.segmentation.class_scores import compute_class_scores

UNLABELED = -1
"""Label of a patch without a confident label."""


class PseudoLabeler:
    """Labeler of patches by a frozen copy of the model, which is neither trained nor saved.

    Args:
        model: model that is copied on construction; the copy does not follow later changes.
        tokens_PT: tokens of all phrases of the corpus.
        confidence: minimum score of a label, in standard deviations above the mean for the phrase.
    """

    def __init__(self, model: ViLSeg, tokens_PT: Tensor, confidence: float) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self._tokens_PT = tokens_PT
        self._confidence = confidence
        self._phrases_PD: Tensor | None = None

    def features(self, pixels_B3HW: Tensor) -> ImageFeatures:
        """Encode images by the copied image encoder; needed if the student's encoder is trained."""
        self._model.to(pixels_B3HW.device)
        return self._model.image_features(pixels_B3HW)

    @torch.no_grad()
    def __call__(self, features: ImageFeatures, present_P: Tensor, own_BP: Tensor) -> Tensor:
        """Label patches.

        Args:
            features: float32 features of the copied encoder.
            present_P: indices of the phrases of the batch.
            own_BP: True if one of the image's captions contains the phrase. Shape: (B, P), bool.

        Returns:
            Label of each patch: the index in ``present_P`` of its phrase, or ``UNLABELED``. Shape: (B, N).
        """
        if not len(present_P):
            return torch.full(features.patches.shape[:2], UNLABELED, device=features.patches.device)
        model, settings = self._model.to(present_P.device), self._model.segmentation
        if self._phrases_PD is None:
            chunks = self._tokens_PT.to(present_P.device).split(256)
            phrases_PD = torch.cat([model.embed_text(model.text_features(tokens).float()) for tokens in chunks])
            centre = model.caption_mean if settings.center_text else 0.0
            self._phrases_PD = F.normalize(phrases_PD - centre, dim=-1)
        # With full standardization (1.0) the scores of all texts have the same standard deviation: the mean over the texts.
        texts_PD = self._phrases_PD[present_P]
        texts = ClassEmbeddings.standardized(texts_PD, model.patch_mean, model.patch_covariance, 1.0)
        deviation = score_deviations(texts_PD, model.patch_covariance).mean()
        patches_BND = model.embed_patches(features)
        embeddings = ImageEmbeddings(patches_BND.mean(1), patches_BND, features.grid)
        scores_BPhw = compute_class_scores(embeddings, model.cluster_logits(features).softmax(-1), texts, settings)
        scores_BPN = scores_BPhw.flatten(2).masked_fill(~own_BP.unsqueeze(2), -torch.inf)
        best_BN, labels_BN = scores_BPN.max(1)
        return labels_BN.masked_fill(best_BN < self._confidence * deviation, UNLABELED)


def pseudo_label_losses(patches_BND: Tensor, phrases_PD: Tensor, labels_BN: Tensor, scale: Tensor) -> Tensor:
    """Compute the loss of every image, and 1 or 0 for whether it has a labelled patch.

    Args:
        patches_BND: patch embeddings of the student, unit length.
        phrases_PD: phrase embeddings of the student, unit length.
        labels_BN: labels from :class:`PseudoLabeler`.
        scale: inverse temperature. It gets no gradient, because this loss would only ever increase it.

    Returns:
        Two columns: the mean loss over the image's labelled patches (0 if it has none), and the number 1 if the
        image has a labelled patch, otherwise 0. Shape: (B, 2).
    """
    if not len(phrases_PD):
        return patches_BND.new_zeros(len(patches_BND), 2)
    logits_BPN = (scale.detach() * patches_BND @ phrases_PD.T).transpose(1, 2)
    loss_BN = F.cross_entropy(logits_BPN, labels_BN, ignore_index=UNLABELED, reduction="none")
    count_B = (labels_BN != UNLABELED).sum(1)
    return torch.stack([loss_BN.sum(1) / count_B.clamp(min=1), (count_B > 0).to(loss_BN.dtype)], dim=1)
