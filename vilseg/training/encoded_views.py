"""Encoding of the augmented views of a batch, or of cached features instead."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vilseg.config import ViewsConfig
from vilseg.data.views import make_views, uniform
from vilseg.model import ImageFeatures, ViLSeg
from vilseg.training.batch import TensorBatch
from vilseg.training.feature_dropout import cache_sized_slices

_DROPOUT_DRAW = 1_000
"""Number of the first random draw for feature dropout; the views use smaller numbers."""


class EncodedViews(NamedTuple):
    """Features of the views of a batch: float32, or cached features in the dtype of the cache, the same for all views."""

    global_: list[ImageFeatures]
    """Features of each global view, before feature dropout."""
    local: list[ImageFeatures]
    """Features of each local view."""
    geometry_GB23: Tensor | None
    """Geometries of the global views, see :class:`vilseg.data.views.Views`; None with cached features, whose views are the whole
    image."""
    pixels_GB3HW: Tensor | None
    """Pixels of the global views; None with cached features."""
    factors_GBF: Tensor | None
    """Factors by which feature dropout multiplies the channels of each global view; None without feature dropout."""

    @property
    def cached(self) -> bool:
        """True if the features come from a cache, so that global views differ by feature dropout only."""
        return self.pixels_GB3HW is None

    def view(self, number: int) -> ImageFeatures:
        """Return the features of the global view with index ``number`` after feature dropout, in float32."""
        features = as_float32(self.global_[number])
        if self.factors_GBF is None:
            return features
        factors_BF = self.factors_GBF[number]
        pooled = None if features.pooled is None else features.pooled * factors_BF
        return features._replace(patches=features.patches * factors_BF.unsqueeze(1), pooled=pooled)

    def pooled(self, number: int) -> Tensor:
        """Return the pooled features of the global view with index ``number`` after feature dropout. Shape: -> (B, F)."""
        pooled_BF = pooled_features(self.global_[number])
        return pooled_BF if self.factors_GBF is None else pooled_BF * self.factors_GBF[number]


def encode_views(
    model: ViLSeg, batch: TensorBatch, views: ViewsConfig, *, global_: int, local: int, second_learns: bool, drop: bool
) -> EncodedViews:
    """Make the augmented views of a batch and encode them. Call it in an autocast context if the networks should use one.

    Args:
        model: model whose image encoder is used.
        batch: images, or cached features of a frozen encoder; views of cached features differ by feature dropout only.
        views: settings of the augmentation.
        global_: number of global views, at least 1.
        local: number of local views; cached features have none.
        second_learns: True to let the gradient flow through the encoding of the global views after the first.
        drop: True to apply feature dropout, with the probability ``views.feature_dropout``.
    """
    share = views.feature_dropout if drop else 0.0
    if batch.images.dtype != torch.uint8:
        shared = [cached_features(batch.images)] * global_
        return EncodedViews(shared, [], None, None, _factors(shared, batch.seeds, share))
    made = make_views(batch.images, batch.seeds, views, global_crops=global_, local_crops=local)
    seen = []
    for number, view in enumerate(made.global_GB3HW):
        with torch.set_grad_enabled(torch.is_grad_enabled() and (number == 0 or second_learns)):
            seen.append(as_float32(model.image_features(view)))
    locals_ = [as_float32(model.image_features(view)) for view in made.local_LB3HW]
    factors_GBF = _factors(seen, batch.seeds, share)
    return EncodedViews(seen, locals_, made.geometry_GB23, made.global_GB3HW, factors_GBF)


def _factors(views: list[ImageFeatures], seeds_B: Tensor, share: float) -> Tensor | None:
    """Return the factors of feature dropout, one per channel for all patches of an image.

    They are None if the dropout probability ``share`` is 0.

    The dropped channels follow from the pair's seed. Shape: -> (G, B, F).
    """
    if not share:
        return None
    random_GBF = torch.stack(
        [uniform(seeds_B, _DROPOUT_DRAW + number, view.patches.shape[2]) for number, view in enumerate(views)]
    )
    return (random_GBF >= share).to(torch.float32) / (1 - share)


def pooled_features(features: ImageFeatures) -> Tensor:
    """Return the encoder's pooled features, or the mean of the patches if it has none. Shape: -> (B, F)."""
    if features.pooled is not None:
        return features.pooled
    patches_BNF = features.patches
    if patches_BNF.dtype == torch.float32:
        return patches_BNF.mean(1)
    return torch.cat([patches_BNF[part].float().mean(1) for part in cache_sized_slices(patches_BNF)])


def as_float32(features: ImageFeatures) -> ImageFeatures:
    """Convert the features of an autocast encoder to float32."""
    pooled = None if features.pooled is None else features.pooled.float()
    return features._replace(patches=features.patches.float(), pooled=pooled)


def cached_features(rows_BRF: Tensor) -> ImageFeatures:
    """Convert rows of a feature cache to the output format of an encoder; the patches keep the dtype of the cache.

    Args:
        rows_BRF: patch features of square images, so R is a square number, or one more if the last row is the pooled feature.
            Shape: (B, R, F).
    """
    rows = rows_BRF.shape[1]
    side = math.isqrt(rows)
    if rows == side * side + 1:
        return ImageFeatures(rows_BRF[:, :-1], rows_BRF[:, -1].float(), (side, side))
    return ImageFeatures(rows_BRF, None, (side, rows // side))
