"""Multi-label contrast of images and the noun phrases of their captions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vilseg.config.loss import NounsConfig
from vilseg.losses import multi_label_loss, top_k_pooled_scores
from vilseg.model import ViLSeg
from vilseg.training.encoded_texts import OwnTexts
from vilseg.training.terms.term import EncodedImages, Needs, Term


class NounPhraseRepresentations(NamedTuple):
    """Representations of images that meet noun phrases."""

    scores_BP: Tensor
    """Mean similarity of each image's best patches with each phrase."""


class NounPhraseTerm(Term[NounPhraseRepresentations]):
    """Contrast of images and noun phrases; ``loss.nouns`` in the configuration.

    Args:
        model: the student.
        config: weight, and how many of an image's best patches count.
    """

    needs = Needs(phrases=True)

    def __init__(self, model: ViLSeg, config: NounsConfig) -> None:
        self.weight = config.weight
        self._model, self._config = model, config

    def represent(self, images: EncodedImages) -> NounPhraseRepresentations:
        """Score images by their patches for every phrase of the batch."""
        scores_BP = top_k_pooled_scores(images.patch_embeddings, images.texts.phrases_PD, self._config.top_patches)
        return NounPhraseRepresentations(scores_BP)

    def losses(self, representations: NounPhraseRepresentations, texts: OwnTexts) -> dict[str, Tensor]:
        """Return the multi-label loss."""
        return {"nouns": multi_label_loss(representations.scores_BP, texts.positives_BP, self._model.scale)}
