"""Terms of the training objective, one file per term; :class:`~vilseg.training.terms.term.Term` is their base class.

To add a loss, write its term in a file here, add a class for its settings to ``vilseg/config/loss.py``, and append the term in
:func:`build_terms`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vilseg.config.loss import LossConfig
from vilseg.model import ViLSeg
from vilseg.training.terms.captions import CaptionTerm
from vilseg.training.terms.clusters import ClusterTerm
from vilseg.training.terms.noun_phrases import NounPhraseTerm
from vilseg.training.terms.self_training import SelfTrainingTerm
from vilseg.training.terms.statistics import StatisticsTerm
from vilseg.training.terms.term import EncodedImages, Needs, SummedTerm, Term
from vilseg.training.terms.vision_contrast import CropInfoNCETerm, DINOTerm

__all__ = ["EncodedImages", "Needs", "SummedTerm", "Term", "build_terms"]


def build_terms(
    model: ViLSeg, loss: LossConfig, phrase_tokens_PT: Tensor, *, local_crops: int, self_training: bool
) -> list[Term[Any]]:
    """Return the terms with a weight above 0, in the order in which their losses are summed.

    Args:
        model: the student.
        loss: settings of all losses.
        phrase_tokens_PT: tokens of all noun phrases of the corpus.
        local_crops: number of local views per image.
        self_training: True if the stage of the run is ``self-train``.
    """
    # Made before the cluster term: heads draw their initial weights from one seed, and another order would change results.
    vision_term = DINOTerm if loss.vision.form == "dino" else CropInfoNCETerm
    vision = [vision_term(model, loss.vision, local_crops)] if loss.vision.weight else []
    terms: list[Term[Any]] = [StatisticsTerm(model)]
    if loss.cross_modal.weight:
        terms.append(CaptionTerm(model, loss.cross_modal))
    if loss.nouns.weight:
        terms.append(NounPhraseTerm(model, loss.nouns))
    if self_training and loss.self_training.weight:
        terms.append(SelfTrainingTerm(model, loss.self_training, phrase_tokens_PT))
    if loss.mutual_information.weight:
        terms.append(ClusterTerm(model, loss.mutual_information))
    return [*terms, *vision]
