"""From patch embeddings and cluster assignments to a score for every class at every patch (ViL-Seg, section 3.5).

With the unit embeddings p_n of an image's patches, their soft assignments a_nk to K clusters, the unit embedding g of
their mean, and the unit embeddings t_c of the classes:

    region         r_k  = norm(sum_n a_nk p_n)
    image mix m    r'_k = norm((1 - m) r_k + m g),   p'_n = norm((1 - m) p_n + m g)
    blend w        s_nc = w sum_k a_nk <r'_k, t_c> + (1 - w) <p'_n, t_c>
    calibration q  s'_nc = (s_nc - q mu_c) (mean_c'(sigma_c') / sigma_c)^q

where mu_c = <mean p, t_c> and sigma_c^2 = t_c^T cov(p) t_c are the mean and the variance that the cosine with class c
has over the patches of the training pictures, and mean_c' runs over all texts. Some names lie near everything
("person"), some near nothing; q = 1 judges each by what is usual for it, q = 0 takes the cosines as they are. The class
``background`` is what other words name better:

    s'_background = max_b s'_nb + bias   over the background words b, or over the word background where there are none.

A class with synonyms has the score of the one that fits best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.config import SegmentationConfig
from vilseg.model import ImageEmbeddings

_EPS = 1e-6
"""Keeps a class whose cosine never varies from dividing by zero; a spread that matters is above 1e-3."""


@dataclass(frozen=True, eq=False)
class ClassTexts:
    """What patches are compared with: class names, after them their synonyms, and after these the background words."""

    embeddings_TD: Tensor
    """(T, D) unit length; rows 0..C-1 are the classes."""
    classes: int
    synonym_of_S: Tensor
    """(S,) index of the class that each synonym, rows C..C+S-1, stands for."""
    background: int | None
    """Index of the class ``background``, which takes the scores of the background words; None where there is none."""
    offset_T: Tensor
    """(T,) q mu, subtracted from the cosines."""
    gain_T: Tensor
    """(T,) what the difference is multiplied with."""

    def to(self, device: torch.device) -> ClassTexts:
        """The same on another device."""
        return replace(
            self,
            embeddings_TD=self.embeddings_TD.to(device),
            synonym_of_S=self.synonym_of_S.to(device),
            offset_T=self.offset_T.to(device),
            gain_T=self.gain_T.to(device),
        )


def calibrate(
    embeddings_TD: Tensor,
    mean_D: Tensor,
    covariance_DD: Tensor,
    strength: float,
    *,
    classes: int,
    background: int | None,
    synonym_of_S: Tensor | None = None,
) -> ClassTexts:
    """Texts with the calibration that the statistics of patch embeddings give them; see the module for the formula.

    Args:
        embeddings_TD: classes, synonyms, background words, unit length. Shape: (T, D).
        mean_D: mean of unit-length patch embeddings. Shape: (D,).
        covariance_DD: their covariance. Shape: (D, D).
        strength: q in 0..1.
        classes: how many of the texts are classes.
        background: index of the class ``background``, or None.
        synonym_of_S: classes that the synonyms stand for, where there are any. Shape: (S,).
    """
    deviation_T = ((embeddings_TD @ covariance_DD) * embeddings_TD).sum(1).clamp(min=0).sqrt().clamp(min=_EPS)
    gain_T = (deviation_T.mean() / deviation_T) ** strength
    if synonym_of_S is None:
        synonym_of_S = torch.empty(0, dtype=torch.long, device=embeddings_TD.device)
    return ClassTexts(embeddings_TD, classes, synonym_of_S, background, strength * (embeddings_TD @ mean_D), gain_T)


def class_similarities(
    embeddings: ImageEmbeddings,
    assignments_BNK: Tensor,
    texts: ClassTexts,
    config: SegmentationConfig,
    background_bias: float | None = None,
) -> Tensor:
    """How well every class fits every patch, through the region that the patch belongs to; see the module.

    Args:
        embeddings: of B images, unit length.
        assignments_BNK: soft assignments, summing to 1 over K. Shape: (B, N, K).
        texts: classes and background words.
        config: region_weight, image_mix and background_bias.
        background_bias: takes the place of the one in ``config``.

    Returns:
        Cosine similarities, calibrated if ``texts`` are. Shape: (B, C, h, w).
    """
    patches_BND = embeddings.patches
    whole_B1D = F.normalize(patches_BND.mean(1, keepdim=True), dim=-1)
    texts_DT = texts.embeddings_TD.T
    similarity_BNT = patches_BND.new_zeros(1)
    if config.region_weight > 0:
        regions_BKD = F.normalize(assignments_BNK.transpose(1, 2) @ patches_BND, dim=-1)
        similarity_BNT = config.region_weight * (
            assignments_BNK @ (_mix(regions_BKD, whole_B1D, config.image_mix) @ texts_DT)
        )
    if config.region_weight < 1:
        own_BNT = _mix(patches_BND, whole_B1D, config.image_mix) @ texts_DT
        similarity_BNT = similarity_BNT + (1 - config.region_weight) * own_BNT
    similarity_BNT = (similarity_BNT - texts.offset_T) * texts.gain_T
    named = texts.classes + len(texts.synonym_of_S)
    similarity_BNC = similarity_BNT[:, :, : texts.classes]
    if len(texts.synonym_of_S):
        owner_BNS = texts.synonym_of_S.expand(*similarity_BNC.shape[:2], -1)
        similarity_BNC = similarity_BNC.scatter_reduce(
            2, owner_BNS, similarity_BNT[:, :, texts.classes : named], "amax"
        )
    if texts.background is not None:
        words_BNb = similarity_BNT[:, :, named:]
        best_BN = words_BNb.amax(2) if words_BNb.shape[2] else similarity_BNC[:, :, texts.background]
        similarity_BNC = similarity_BNC.clone()
        similarity_BNC[:, :, texts.background] = best_BN + (
            config.background_bias if background_bias is None else background_bias
        )
    return similarity_BNC.transpose(1, 2).unflatten(2, embeddings.grid)


def _mix(embeddings_BRD: Tensor, whole_B1D: Tensor, share: float) -> Tensor:
    if share == 0:
        return embeddings_BRD
    return F.normalize(torch.lerp(embeddings_BRD, whole_B1D.expand_as(embeddings_BRD), share), dim=-1)
