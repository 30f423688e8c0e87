"""Contrastive term of images and captions, on global image embeddings and on patch embeddings pooled for each caption."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilseg.config.loss import CrossModalConfig
from vilseg.losses import (
    contrastive_loss,
    contrastive_loss_from_scores,
    sigmoid_loss,
    sigmoid_loss_from_scores,
    softmax_pooled_scores,
)
from vilseg.model import ViLSeg
from vilseg.training.encoded_texts import OwnTexts
from vilseg.training.terms.term import EncodedImages, Needs, Term

_START_BIAS = -10.0
"""Bias of the sigmoid loss before training (SigLIP, Zhai et al. 2023, section 3.2)."""


class CaptionRepresentations(NamedTuple):
    """Representations of images for the comparison with captions."""

    images_BD: Tensor
    """Global embeddings, unit length."""
    patch_means_BD: Tensor | None
    """Mean patch embeddings, unit length; only with ``patch_pooling: mean``."""
    scores_BQ: Tensor | None
    """Pooled similarities of the patches with the captions of all workers; only with ``patch_pooling: softmax``."""


class CaptionTerm(Term[CaptionRepresentations]):
    """Contrastive loss of images and captions; ``loss.cross_modal`` in the configuration.

    Args:
        model: the student.
        config: form of the loss, pooling of patches, and ``patch_share``, the fraction of the loss that is computed on patches.
    """

    def __init__(self, model: ViLSeg, config: CrossModalConfig) -> None:
        self.weight = config.weight
        self._model, self._config = model, config
        self.needs = Needs(all_captions=config.patch_share > 0 and config.patch_pooling == "softmax")
        # A pretrained SigLIP model has its own bias and keeps it. Otherwise the term has a new bias, which is saved in
        # checkpoints but not with the model.
        new_bias = config.form == "sigmoid" and model.logit_bias is None
        self._new_bias = nn.Parameter(torch.tensor(_START_BIAS)) if new_bias else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the bias of the sigmoid loss; empty if the model has this bias or the loss is InfoNCE."""
        # A scalar is not sharded by FSDP, and moving the objective to a device keeps the same parameter object.
        return {} if self._new_bias is None else {"logit_bias": self._new_bias}

    def represent(self, images: EncodedImages) -> CaptionRepresentations:
        """Compute global embeddings and, if ``patch_share`` is above 0, mean patch embeddings or pooled scores."""
        views, config = images.views, self._config
        images_BD = self._model.embed_pooled(views.global_[0]._replace(pooled=views.pooled(0)))
        if not config.patch_share:
            return CaptionRepresentations(images_BD, None, None)
        if config.patch_pooling == "mean":
            return CaptionRepresentations(images_BD, F.normalize(images.patch_embeddings.mean(1), dim=-1), None)
        scores_BQ = softmax_pooled_scores(images.patch_embeddings, images.texts.captions_QD, config.pooling_temperature)
        return CaptionRepresentations(images_BD, None, scores_BQ)

    def losses(self, representations: CaptionRepresentations, texts: OwnTexts) -> dict[str, Tensor]:
        """Return the loss: that on global embeddings times 1 - ``patch_share``, plus that on patches times ``patch_share``."""
        fraction = self._config.patch_share
        loss = self._contrast(representations.images_BD, texts.captions_BD) * (1 - fraction)
        if representations.patch_means_BD is not None:
            loss = loss + fraction * self._contrast(representations.patch_means_BD, texts.captions_BD)
        if representations.scores_BQ is not None:
            loss = loss + fraction * self._contrast_scores(representations.scores_BQ)
        return {"cross_modal": loss}

    def _contrast(self, images_BD: Tensor, captions_BD: Tensor) -> Tensor:
        if self._bias is not None:
            return sigmoid_loss(images_BD, captions_BD, self._model.scale, self._bias)
        return contrastive_loss(images_BD, captions_BD, self._model.scale)

    def _contrast_scores(self, scores_BQ: Tensor) -> Tensor:
        if self._bias is not None:
            return sigmoid_loss_from_scores(scores_BQ, self._model.scale, self._bias)
        return contrastive_loss_from_scores(scores_BQ, self._model.scale)

    @property
    def _bias(self) -> nn.Parameter | None:
        """Bias of the sigmoid loss; None with InfoNCE."""
        if self._config.form != "sigmoid":
            return None
        return self._model.logit_bias if self._new_bias is None else self._new_bias
