"""The views of a batch, encoded."""

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
"""Random numbers for feature dropout are drawn far from those of the views."""


class EncodedViews(NamedTuple):
    """Float32 features of a batch's views; cached features stay as they were cached, the same for all views."""

    global_: list[ImageFeatures]
    """Before feature dropout."""
    local: list[ImageFeatures]
    geometry_GB23: Tensor | None
    """Of the global views; None with cached features, whose views are the whole picture."""
    pixels_GB3HW: Tensor | None
    """The global views themselves."""
    factors_GBF: Tensor | None
    """What feature dropout multiplies the channels of every global view with; None without it."""

    @property
    def cached(self) -> bool:
        """The global views are one, but for feature dropout."""
        return self.pixels_GB3HW is None

    def view(self, number: int) -> ImageFeatures:
        """A global view with its dropout, in float32."""
        features = as_float32(self.global_[number])
        if self.factors_GBF is None:
            return features
        factors_BF = self.factors_GBF[number]
        pooled = None if features.pooled is None else features.pooled * factors_BF
        return features._replace(patches=features.patches * factors_BF.unsqueeze(1), pooled=pooled)

    def pooled(self, number: int) -> Tensor:
        """A global view as a whole, with its dropout. Shape: -> (B, F)."""
        pooled_BF = pooled_features(self.global_[number])
        return pooled_BF if self.factors_GBF is None else pooled_BF * self.factors_GBF[number]


def encode_views(
    model: ViLSeg, batch: TensorBatch, views: ViewsConfig, *, global_: int, local: int, second_learns: bool, drop: bool
) -> EncodedViews:
    """Make the views and encode them; the caller autocasts.

    Args:
        model: whose image encoder sees.
        batch: pictures, or cached features of a frozen encoder; with these views differ by dropout alone.
        views: augmentation.
        global_: views, at least 1.
        local: views; none of cached features.
        second_learns: let a gradient flow through the encoding of the global views after the first.
        drop: drop features, as ``views.feature_dropout`` says.
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
    """Feature dropout: the same channels of an image's every patch, chosen by the pair's seed. Shape: -> (G, B, F)."""
    if not share:
        return None
    random_GBF = torch.stack(
        [uniform(seeds_B, _DROPOUT_DRAW + number, view.patches.shape[2]) for number, view in enumerate(views)]
    )
    return (random_GBF >= share).to(torch.float32) / (1 - share)


def pooled_features(features: ImageFeatures) -> Tensor:
    """The image as a whole. Shape: -> (B, F)."""
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
    """Features of a feature cache as an encoder would give them, the patches in the dtype of the cache.

    Args:
        rows_BRF: patches of pictures on a square canvas, a square number; one row more is the image as a whole. Shape: (B, R, F).
    """
    rows = rows_BRF.shape[1]
    side = math.isqrt(rows)
    if rows == side * side + 1:
        return ImageFeatures(rows_BRF[:, :-1], rows_BRF[:, -1].float(), (side, side))
    return ImageFeatures(rows_BRF, None, (side, rows // side))
