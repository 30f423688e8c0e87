"""From patch embeddings and cluster assignments to a score for every class at every patch (ViL-Seg, section 3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.config import SegmentationConfig
from vilseg.model import ImageEmbeddings


def class_similarities(
    embeddings: ImageEmbeddings, assignments_BNK: Tensor, texts_CD: Tensor, config: SegmentationConfig
) -> Tensor:
    """How well every class fits every patch, through the region that the patch belongs to.

    A region's embedding is the mean of its patches weighted by their soft assignment, mixed with the image's own; a patch
    takes over the similarities of its regions in proportion, blended with those of its own embedding.

    Args:
        embeddings: of B images, unit length.
        assignments_BNK: soft assignments, summing to 1 over K. Shape: (B, N, K).
        texts_CD: class embeddings, unit length. Shape: (C, D).
        config: region_weight and image_mix.

    Returns:
        Cosine similarities. Shape: (B, C, h, w).
    """
    patches_BND = embeddings.patches
    own_BNC = patches_BND @ texts_CD.T
    if config.region_weight == 0:
        similarity_BNC = own_BNC
    else:
        regions_BKD = F.normalize(assignments_BNK.transpose(1, 2) @ patches_BND, dim=-1)
        if config.image_mix:
            whole_B1D = F.normalize(patches_BND.mean(1, keepdim=True), dim=-1)
            regions_BKD = F.normalize(torch.lerp(regions_BKD, whole_B1D.expand_as(regions_BKD), config.image_mix), dim=-1)
        similarity_BNC = assignments_BNK @ (regions_BKD @ texts_CD.T)
        similarity_BNC = torch.lerp(own_BNC, similarity_BNC, config.region_weight)
    return similarity_BNC.transpose(1, 2).unflatten(2, embeddings.grid)
