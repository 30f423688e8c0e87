"""Term without a loss that records running statistics of embeddings, used by inference for centring and calibration."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.distributed import mean_over_workers, world_size
from vilseg.model import ImageFeatures, ViLSeg
from vilseg.training.encoded_texts import OwnTexts
from vilseg.training.terms.term import EncodedImages, Term

_MEMORY = 100
"""Length of the moving average in steps: the statistics of a step enter with a weight of at least 1 / ``_MEMORY``."""
_RECORDED_PATCHES = 1024
"""Number of patches per step, over all workers, whose embeddings enter the statistics; enough of them, at little cost."""


class StatisticsRepresentations(NamedTuple):
    """Sample of the patches of the first view."""

    patches_RF: Tensor
    """Patch features of the encoder, without gradient."""


class StatisticsTerm(Term[StatisticsRepresentations]):
    """Recorder of the mean caption embedding, and of mean and covariance of the patch embeddings, in the model's buffers.

    Each is the mean over all steps so far; from step ``_MEMORY`` on it is an exponential moving average instead, because
    embeddings change during training.

    Args:
        model: the student, whose buffers are updated.
    """

    def __init__(self, model: ViLSeg) -> None:
        self._model = model

    def represent(self, images: EncodedImages) -> StatisticsRepresentations:
        """Sample patches of the first view."""
        return StatisticsRepresentations(_sample_patches(images.views.global_[0], images.batch.seeds, images.pairs))

    def losses(self, representations: StatisticsRepresentations, texts: OwnTexts) -> dict[str, Tensor]:
        """Return an empty dict, because the term has no loss."""
        return {}

    @torch.no_grad()
    def after_losses(self, representations: StatisticsRepresentations, texts: OwnTexts) -> None:
        """Update the running statistics with those of this step, averaged over all workers."""
        model = self._model
        model.recorded_steps += 1
        weight = max(1 / _MEMORY, 1 / int(model.recorded_steps))
        model.caption_mean.lerp_(mean_over_workers(texts.captions_BD.mean(0)), weight)
        patches_RD = F.normalize(model.image_projection(representations.patches_RF), dim=-1)
        mean_D = mean_over_workers(patches_RD.mean(0))
        deviation_RD = patches_RD - mean_D
        covariance_DD = mean_over_workers(deviation_RD.T @ deviation_RD / len(deviation_RD))
        model.patch_mean.lerp_(mean_D, weight)
        model.patch_covariance.lerp_(covariance_DD, weight)


def _sample_patches(features: ImageFeatures, seeds_B: Tensor, pairs: int) -> Tensor:
    """Sample patch features of every image, without gradient, about ``_RECORDED_PATCHES`` in the batch of all workers.

    The sampled positions follow from the pair's seed, so they do not depend on the chunk. Shape: -> (R, F).
    """
    patches_BNF = features.patches.detach()
    count = patches_BNF.shape[1]
    wanted = min(count, -(-_RECORDED_PATCHES // (pairs * world_size())))
    places = torch.arange(wanted, device=seeds_B.device) * (count // wanted)
    places_BR = (seeds_B.unsqueeze(1) + places) % count
    return patches_BNF.gather(1, places_BR.unsqueeze(2).expand(-1, -1, patches_BNF.shape[2])).flatten(0, 1).float()
