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

    s'_background = max_b s'_nb + bias + o (1 - 2 sum_k a_nk e_k)

over the background words b, or over the word background where there are none. e_k is the objectness of a region, o its
weight: what surrounds the objects runs out of the picture, and objects mostly do not. With the boundary connectivity of Zhu et
al. 2014 (Saliency optimization from robust background detection, sections 3 and 4, sigma 1), of soft regions,

    e_k = exp(-c_k^2 / 2),   c_k = sum_{n on the border} a_nk / sqrt(sum_n a_nk).

A class with several names s has one of these scores, by ``synonyms`` of the settings (t is their ``temperature``):

    max         max_s s'_ns
    mean        mean_s s'_ns
    logsumexp   t log mean_s exp(s'_ns / t), between the two: a class gains nothing by having many names

What a negative word names best is ``background`` (without bias and objectness), or no class where there is no such class. The
gate leaves a picture the k classes that have the highest score at their best place.
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
class ClassEmbeddings:
    """What patches are compared with: class names, their synonyms, negative words, and background words, in this order."""

    embeddings_TD: Tensor
    """(T, D) unit length; rows 0..C-1 are the classes."""
    classes: int
    synonym_of_S: Tensor
    """(S,) index of the class that each synonym, rows C..C+S-1, stands for."""
    negatives: int
    """How many negative words there are."""
    background: int | None
    """Index of the class ``background``, which takes the scores of the background words; None where there is none."""
    offset_T: Tensor
    """(T,) q mu, subtracted from the cosines."""
    gain_T: Tensor
    """(T,) what the difference is multiplied with."""

    def to(self, device: torch.device) -> ClassEmbeddings:
        """The same on another device."""
        return replace(
            self,
            embeddings_TD=self.embeddings_TD.to(device),
            synonym_of_S=self.synonym_of_S.to(device),
            offset_T=self.offset_T.to(device),
            gain_T=self.gain_T.to(device),
        )


def standardized_embeddings(
    embeddings_TD: Tensor,
    mean_D: Tensor,
    covariance_DD: Tensor,
    strength: float,
    *,
    classes: int,
    background: int | None,
    synonym_of_S: Tensor | None = None,
    negatives: int = 0,
) -> ClassEmbeddings:
    """Texts with the calibration that the statistics of patch embeddings give them; see the module for the formula.

    Args:
        embeddings_TD: classes, synonyms, negative words, background words, unit length. Shape: (T, D).
        mean_D: mean of unit-length patch embeddings. Shape: (D,).
        covariance_DD: their covariance. Shape: (D, D).
        strength: q in 0..1.
        classes: how many of the texts are classes.
        background: index of the class ``background``, or None.
        synonym_of_S: classes that the synonyms stand for, where there are any. Shape: (S,).
        negatives: how many of the texts are negative words.
    """
    deviation_T = score_deviations(embeddings_TD, covariance_DD)
    gain_T = (deviation_T.mean() / deviation_T) ** strength
    if synonym_of_S is None:
        synonym_of_S = torch.empty(0, dtype=torch.long, device=embeddings_TD.device)
    offset_T = strength * (embeddings_TD @ mean_D)
    return ClassEmbeddings(embeddings_TD, classes, synonym_of_S, negatives, background, offset_T, gain_T)


def score_deviations(embeddings_TD: Tensor, covariance_DD: Tensor) -> Tensor:
    """sigma_c of the module: how far the cosine with each text spreads over the patches. Shape: -> (T,), above 0."""
    return ((embeddings_TD @ covariance_DD) * embeddings_TD).sum(1).clamp(min=0).sqrt().clamp(min=_EPS)


def compute_class_scores(
    embeddings: ImageEmbeddings,
    assignments_BNK: Tensor,
    texts: ClassEmbeddings,
    config: SegmentationConfig,
    background_bias: float | None = None,
) -> Tensor:
    """How well every class fits every patch, through the region that the patch belongs to; see the module.

    Args:
        embeddings: of B images, unit length.
        assignments_BNK: soft assignments, summing to 1 over K. Shape: (B, N, K).
        texts: classes and the words beside them.
        config: region_weight, image_mix, synonyms, background_bias and objectness.
        background_bias: takes the place of the one in ``config``.

    Returns:
        Cosine similarities, calibrated if ``texts`` are. Shape: (B, C, h, w); (B, C + 1, h, w) where there are negative words
        and no class ``background``: the last row is that of no class.
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
    parts = (texts.classes + len(texts.synonym_of_S), texts.negatives)
    names_BNn, negatives_BNg, words_BNb = similarity_BNT.tensor_split((parts[0], sum(parts)), dim=2)
    similarity_BNC = _join_synonyms(names_BNn, texts, config)
    if texts.background is not None:
        best_BN = words_BNb.amax(2) if words_BNb.shape[2] else similarity_BNC[:, :, texts.background]
        best_BN = best_BN + (config.background_bias if background_bias is None else background_bias)
        if config.objectness:
            best_BN = best_BN + config.objectness * (1 - 2 * objectness(assignments_BNK, embeddings.grid))
        if texts.negatives:
            best_BN = best_BN.maximum(negatives_BNg.amax(2))
        similarity_BNC = similarity_BNC.clone()
        similarity_BNC[:, :, texts.background] = best_BN
    elif texts.negatives:
        similarity_BNC = torch.cat([similarity_BNC, negatives_BNg.amax(2, keepdim=True)], dim=2)
    return similarity_BNC.transpose(1, 2).unflatten(2, embeddings.grid)


def objectness(assignments_BNK: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far the regions that patches belong to keep away from the border of their picture; see the module.

    Args:
        assignments_BNK: soft assignments, summing to 1 over K. Shape: (B, N, K).
        grid: (h, w) with h x w = N.

    Returns:
        In 0..1, small for what runs along the border. Shape: (B, N).
    """
    border_hw = assignments_BNK.new_ones(grid)
    border_hw[1:-1, 1:-1] = 0
    size_BK = assignments_BNK.sum(1).clamp(min=_EPS)
    connectivity_BK = torch.einsum("n,bnk->bk", border_hw.flatten(), assignments_BNK) / size_BK.sqrt()
    return torch.einsum("bnk,bk->bn", assignments_BNK, (-connectivity_BK.square() / 2).exp())


def select_top_classes(scores_Chw: Tensor, most: int | None, background: int | None, classes: int) -> Tensor:
    """Indices, ascending, of the rows that a picture keeps: the ``most`` classes of the highest scores anywhere in it.

    Args:
        scores_Chw: as from `compute_class_scores`, of one picture. Shape: (C, h, w) or (C + 1, h, w).
        most: how many; all where None.
        background: index of the class ``background``, which is kept and not counted, like the row of no class.
        classes: C.
    """
    rows_R = torch.arange(len(scores_Chw), device=scores_Chw.device)
    counted_R = rows_R < classes
    if background is not None:
        counted_R[background] = False
    if most is None or int(counted_R.sum()) <= most:
        return rows_R
    best_R = scores_Chw.flatten(1).amax(1).masked_fill(~counted_R, -torch.inf)
    return torch.cat([best_R.topk(most).indices, rows_R[~counted_R]]).sort().values


def _join_synonyms(names_BNn: Tensor, texts: ClassEmbeddings, config: SegmentationConfig) -> Tensor:
    """Shape: classes and synonyms (B, N, C + S) -> (B, N, C)."""
    classes_BNC, synonyms_BNS = names_BNn.tensor_split((texts.classes,), dim=2)
    if not synonyms_BNS.shape[2]:
        return classes_BNC
    owner_BNS = texts.synonym_of_S.expand_as(synonyms_BNS)
    if config.synonyms == "mean":
        return classes_BNC.scatter_reduce(2, owner_BNS, synonyms_BNS, "mean")
    best_BNC = classes_BNC.scatter_reduce(2, owner_BNS, synonyms_BNS, "amax")
    if config.synonyms == "max":
        return best_BNC
    # Relative to the best one no exponential overflows.
    sums_BNC = ((classes_BNC - best_BNC) / config.temperature).exp()
    others_BNS = ((synonyms_BNS - best_BNC.gather(2, owner_BNS)) / config.temperature).exp()
    sums_BNC = sums_BNC.scatter_add(2, owner_BNS, others_BNS)
    names_C = 1 + texts.synonym_of_S.bincount(minlength=texts.classes)
    return best_BNC + config.temperature * (sums_BNC / names_C).log()


def _mix(embeddings_BRD: Tensor, whole_B1D: Tensor, share: float) -> Tensor:
    if share == 0:
        return embeddings_BRD
    return F.normalize(torch.lerp(embeddings_BRD, whole_B1D.expand_as(embeddings_BRD), share), dim=-1)
