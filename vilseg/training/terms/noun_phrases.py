"""Multi-label contrastive term of images and the noun phrases of their captions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vilseg.config.loss import NounsConfig
from vilseg.losses import multi_label_loss, top_k_pooled_scores
from vilseg.model import ViLSeg
from vilseg.training.encoded_texts import OwnTexts
from vilseg.training.terms.term import EncodedImages, Needs, Term


class NounPhraseRepresentations(NamedTuple):
    """Representations of images for the comparison with noun phrases."""

    scores_BP: Tensor
    """Mean similarity of each image's most similar patches with each phrase."""


class NounPhraseTerm(Term[NounPhraseRepresentations]):
    """Multi-label loss of images and noun phrases; ``loss.nouns`` in the configuration.

    Args:
        model: the student.
        config: weight, and the number of patches in an image's score.
    """

    needs = Needs(phrases=True)

    def __init__(self, model: ViLSeg, config: NounsConfig) -> None:
        self.weight = config.weight
        self._model, self._config = model, config

    def represent(self, images: EncodedImages) -> NounPhraseRepresentations:
        """Compute the scores of the images for every phrase of the batch."""
        scores_BP = top_k_pooled_scores(images.patch_embeddings, images.texts.phrases_PD, self._config.top_patches)
        return NounPhraseRepresentations(scores_BP)

    def losses(self, representations: NounPhraseRepresentations, texts: OwnTexts) -> dict[str, Tensor]:
        """Return the multi-label loss."""
        return {"nouns": multi_label_loss(representations.scores_BP, texts.positives_BP, self._model.scale)}
