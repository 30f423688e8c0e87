"""Self-training term: cross-entropy with labels that a frozen copy of the model gives to patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vilseg.config.loss import SelfTrainingConfig
from vilseg.distributed import mean_over_workers, world_size
from vilseg.model import ImageFeatures, ViLSeg
from vilseg.training.encoded_texts import OwnTexts
from vilseg.training.encoded_views import as_float32
from vilseg.training.pseudo_labels import PseudoLabeler, pseudo_label_losses
from vilseg.training.terms.term import EncodedImages, Needs, Term


class SelfTrainingRepresentations(NamedTuple):
    """Losses of the single images."""

    losses_B2: Tensor
    """Loss of each image, and 1 if it has a labelled patch, otherwise 0; see :func:`pseudo_label_losses`."""


class SelfTrainingTerm(Term[SelfTrainingRepresentations]):
    """Cross-entropy with pseudo labels; ``loss.self_training`` in the configuration, only in the stage ``self-train``.

    Args:
        model: the student; a copy of it, made on construction, gives the labels.
        config: weight of the loss and minimum confidence of a label.
        tokens_PT: tokens of all phrases of the corpus.
    """

    needs = Needs(phrases=True)

    def __init__(self, model: ViLSeg, config: SelfTrainingConfig, tokens_PT: Tensor) -> None:
        self.weight = config.weight
        self._model = model
        self._labeler = PseudoLabeler(model, tokens_PT, config.confidence)

    def represent(self, images: EncodedImages) -> SelfTrainingRepresentations:
        """Label the patches of the first view and compute the loss of each image."""
        patches_BND, texts = images.patch_embeddings, images.texts
        labels_BN = self._labeler(self._labeler_features(images), texts.phrase_ids_P, images.positives)
        losses_B2 = pseudo_label_losses(patches_BND, texts.phrases_PD, labels_BN, self._model.scale)
        return SelfTrainingRepresentations(losses_B2)

    def losses(self, representations: SelfTrainingRepresentations, texts: OwnTexts) -> dict[str, Tensor]:
        """Return the mean loss over all workers' images with a labelled patch; a single worker may have none."""
        loss, labelled = mean_over_workers(representations.losses_B2.sum(0))
        return {"self_training": loss / labelled.clamp(min=1 / world_size())}

    def _labeler_features(self, images: EncodedImages) -> ImageFeatures:
        """Return the first view's features from the labeler's encoder, or the student's if that is frozen and so identical."""
        views = images.views
        if self._model.config.image_encoder.frozen or views.cached:
            return as_float32(views.global_[0])
        assert views.pixels_GB3HW is not None
        with torch.no_grad(), images.autocast():
            return as_float32(self._labeler.features(views.pixels_GB3HW[0]))
