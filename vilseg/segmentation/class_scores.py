"""Score every class at every patch, from patch embeddings and cluster assignments (ViL-Seg, section 3.5).

With the unit embeddings p_n of an image's patches, their soft assignments a_nk to K clusters, the unit embedding g of
their mean, and the unit embeddings t_c of the classes:

    region             r_k  = norm(sum_n a_nk p_n)
    image mix m        r'_k = norm((1 - m) r_k + m g),   p'_n = norm((1 - m) p_n + m g)
    blend w            s_nc = w sum_k a_nk <r'_k, t_c> + (1 - w) <p'_n, t_c>
    standardization q  s'_nc = (s_nc - q mu_c) (mean_c'(sigma_c') / sigma_c)^q

where mu_c = <mean p, t_c> and sigma_c^2 = t_c^T cov(p) t_c are the mean and the variance of the cosine with class c over the
patches of the training images, and mean_c' averages over all texts of the vocabulary. Some names ("person") are similar to
almost every patch, others to almost none; q = 1 measures each score relative to its own mean and deviation, q = 0 leaves the
cosines unchanged (q is ``calibration`` of the settings). The class ``background`` has the score of the best background word:

    s'_background = max_b s'_nb + bias + o (1 - 2 sum_k a_nk e_k)

over the background words b, or over the word background if there are none. e_k is the objectness of a region and o its weight.
The assumption is that the surroundings of objects touch the border of the image, and objects mostly do not. With the boundary
connectivity of Zhu et al. 2014 (Saliency optimization from robust background detection, sections 3 and 4, sigma 1), extended to
soft regions,

    e_k = exp(-c_k^2 / 2),   c_k = sum_{n on the border} a_nk / sqrt(sum_n a_nk).

A class with several names s has one of these scores, selected by ``synonyms`` of the settings (t is ``temperature`` of the
settings):

    max         max_s s'_ns
    mean        mean_s s'_ns
    logsumexp   t log mean_s exp(s'_ns / t), between the two; more names alone do not raise the score

A patch whose best score is that of a negative word is ``background`` (bias and objectness are not added to that score), or "no
class" if the vocabulary has no class ``background``. The gate keeps only the k classes of an image with the highest score at any
position.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vilseg.config import SegmentationConfig
from vilseg.model import ImageEmbeddings
from vilseg.segmentation.class_embeddings import ClassEmbeddings

_EPS = 1e-6
"""Lower bound of the size of a region, in patches, to avoid a division by zero."""


def compute_class_scores(
    embeddings: ImageEmbeddings,
    assignments_BNK: Float[Tensor, "B N K"],
    classes: ClassEmbeddings,
    config: SegmentationConfig,
    background_bias: float | None = None,
) -> Float[Tensor, "B R h w"]:
    """Score every class at every patch by the formulas in the module's docstring.

    Args:
        embeddings: embeddings of B images and their patches, unit length.
        assignments_BNK: soft cluster assignments of the patches, summing to 1 over K. Shape: (B, N, K).
        classes: embeddings of the classes, their synonyms, the negative words and the background words.
        config: settings region_weight, image_mix, synonyms, temperature, background_bias and objectness.
        background_bias: replaces the value in ``config``; None keeps it.

    Returns:
        Cosine similarities, standardized by offset and gain of ``classes``. Shape: (B, C, h, w). If there are negative words but
        no class ``background``, a last row with the score of "no class" is added: (B, C + 1, h, w).

    Example:
        >>> import torch
        >>> from vilseg.config import SegmentationConfig
        >>> from vilseg.model import ImageEmbeddings
        >>> patches = torch.eye(2)[[0, 0, 1, 1]].unsqueeze(0)  # a grid of 1 x 4 patches
        >>> embeddings = ImageEmbeddings(patches.mean(1), patches, (1, 4))
        >>> classes = ClassEmbeddings.standardized(torch.eye(2), torch.zeros(2), torch.eye(2), 0.0)
        >>> scores = compute_class_scores(embeddings, torch.ones(1, 4, 1), classes, SegmentationConfig(region_weight=0))
        >>> scores.shape, scores.argmax(1).tolist()
        (torch.Size([1, 2, 1, 4]), [[[0, 0, 1, 1]]])
    """
    patches_BND = embeddings.patches
    whole_B1D = F.normalize(patches_BND.mean(1, keepdim=True), dim=-1)
    texts_DE = classes.embeddings_ED.T
    similarity_BNE = patches_BND.new_zeros(1)
    if config.region_weight > 0:
        regions_BKD = F.normalize(assignments_BNK.transpose(1, 2) @ patches_BND, dim=-1)
        similarity_BNE = config.region_weight * (
            assignments_BNK @ (_mix(regions_BKD, whole_B1D, config.image_mix) @ texts_DE)
        )
    if config.region_weight < 1:
        own_BNE = _mix(patches_BND, whole_B1D, config.image_mix) @ texts_DE
        similarity_BNE = similarity_BNE + (1 - config.region_weight) * own_BNE
    similarity_BNE = (similarity_BNE - classes.offset_E) * classes.gain_E
    num_names = classes.num_classes + len(classes.synonym_of_S)
    # Order of the entries: class names with synonyms, negative words, background words.
    names_BNE, negatives_BNE, words_BNE = similarity_BNE.tensor_split(
        (num_names, num_names + classes.num_negatives), dim=2
    )
    scores_BNC = _join_synonyms(names_BNE, classes, config)
    if classes.background is not None:
        best_BN = words_BNE.amax(2) if words_BNE.shape[2] else scores_BNC[:, :, classes.background]
        best_BN = best_BN + (config.background_bias if background_bias is None else background_bias)
        if config.objectness:
            best_BN = best_BN + config.objectness * (1 - 2 * objectness(assignments_BNK, embeddings.grid))
        if classes.num_negatives:
            best_BN = best_BN.maximum(negatives_BNE.amax(2))
        scores_BNC = scores_BNC.clone()
        scores_BNC[:, :, classes.background] = best_BN
    elif classes.num_negatives:
        scores_BNC = torch.cat([scores_BNC, negatives_BNE.amax(2, keepdim=True)], dim=2)
    return scores_BNC.transpose(1, 2).unflatten(2, embeddings.grid)


def objectness(assignments_BNK: Float[Tensor, "B N K"], grid: tuple[int, int]) -> Float[Tensor, "B N"]:
    """Compute the objectness of every patch: sum_k a_nk e_k of the module's docstring.

    Args:
        assignments_BNK: soft cluster assignments of the patches, summing to 1 over K. Shape: (B, N, K).
        grid: (h, w) with h x w = N.

    Returns:
        Objectness in 0..1, small for patches of regions along the border of the image. Shape: (B, N).

    Example:
        >>> import torch
        >>> inside = torch.zeros(3, 3)
        >>> inside[1, 1] = 1
        >>> assignments = torch.stack([inside, 1 - inside], dim=-1).reshape(1, 9, 2)  # the centre, and a frame around it
        >>> [round(value, 3) for value in objectness(assignments, (3, 3))[0, 3:6].tolist()]
        [0.018, 1.0, 0.018]
    """
    border_hw = assignments_BNK.new_ones(grid)
    border_hw[1:-1, 1:-1] = 0
    size_BK = assignments_BNK.sum(1).clamp(min=_EPS)
    connectivity_BK = torch.einsum("n,bnk->bk", border_hw.flatten(), assignments_BNK) / size_BK.sqrt()
    return torch.einsum("bnk,bk->bn", assignments_BNK, (-connectivity_BK.square() / 2).exp())


def select_top_classes(
    scores_Rhw: Float[Tensor, "R h w"], most: int | None, background: int | None, num_classes: int
) -> Int[Tensor, " kept"]:
    """Select the ``most`` classes with the highest score at any position of an image.

    Args:
        scores_Rhw: scores of one image, as returned by `compute_class_scores`. Shape: (C, h, w) or (C + 1, h, w).
        most: maximum number of classes; None keeps all.
        background: index of the class ``background``, or None. This class and the row of "no class" are always kept and do not
            count.
        num_classes: C, number of classes including ``background``.

    Returns:
        Indices, in ascending order, of the rows of ``scores_Rhw`` that are kept.

    Example:
        >>> import torch
        >>> scores = torch.tensor([0.1, 0.9, 0.5, 0.2]).reshape(4, 1, 1)
        >>> select_top_classes(scores, 2, background=0, num_classes=4).tolist()
        [0, 1, 2]
    """
    rows_R = torch.arange(len(scores_Rhw), device=scores_Rhw.device)
    counted_R = rows_R < num_classes
    if background is not None:
        counted_R[background] = False
    if most is None or int(counted_R.sum()) <= most:
        return rows_R
    best_R = scores_Rhw.flatten(1).amax(1).masked_fill(~counted_R, -torch.inf)
    return torch.cat([best_R.topk(most).indices, rows_R[~counted_R]]).sort().values


def _join_synonyms(names_BNE: Tensor, classes: ClassEmbeddings, config: SegmentationConfig) -> Tensor:
    """Combine the scores of each class and its synonyms into one score per class. Shape: (B, N, C + S) -> (B, N, C)."""
    scores_BNC, synonyms_BNS = names_BNE.tensor_split((classes.num_classes,), dim=2)
    if not synonyms_BNS.shape[2]:
        return scores_BNC
    owner_BNS = classes.synonym_of_S.expand_as(synonyms_BNS)
    if config.synonyms == "mean":
        return scores_BNC.scatter_reduce(2, owner_BNS, synonyms_BNS, "mean")
    best_BNC = scores_BNC.scatter_reduce(2, owner_BNS, synonyms_BNS, "amax")
    if config.synonyms == "max":
        return best_BNC
    # Subtracting the best score first prevents an overflow of the exponentials.
    sums_BNC = ((scores_BNC - best_BNC) / config.temperature).exp()
    others_BNS = ((synonyms_BNS - best_BNC.gather(2, owner_BNS)) / config.temperature).exp()
    sums_BNC = sums_BNC.scatter_add(2, owner_BNS, others_BNS)
    names_C = 1 + classes.synonym_of_S.bincount(minlength=classes.num_classes)
    return best_BNC + config.temperature * (sums_BNC / names_C).log()


def _mix(embeddings_BND: Tensor, whole_B1D: Tensor, fraction: float) -> Tensor:
    """Mix the fraction ``fraction`` of the whole image's embedding into those of patches or regions; unit length."""
    if fraction == 0:
        return embeddings_BND
    return F.normalize(torch.lerp(embeddings_BND, whole_B1D.expand_as(embeddings_BND), fraction), dim=-1)
