"""Terms of the training objective, one file each; :class:`~vilseg.training.terms.term.Term` is their interface.

To add a loss: write its term in a file here, give it a part in ``vilseg/config/loss.py``, and add it to :func:`build_terms`.
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
    """Return the terms of weight above 0, in the order in which their losses are summed.

    Args:
        model: the student.
        loss: parts of the configuration, one per term.
        phrase_tokens_PT: tokens of all noun phrases of the corpus.
        local_crops: local views of an image.
        self_training: the run is of the stage ``self-train``.
    """
    # Before the clusters: the order in which heads draw their weights from the seed is part of a run.
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
