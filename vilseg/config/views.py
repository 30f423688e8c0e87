"""Configuration of the augmented views of images."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vilseg.config.base import ConfigPart, Fraction, FractionBelowOne, FractionRange, NonNegativeInt, PositiveInt


class ViewsConfig(ConfigPart):
    """Augmented views of an image; crop scales are fractions of the image area (DINO, Caron et al. 2021, section 3.2)."""

    global_size: PositiveInt = 224
    global_scale: FractionRange = (0.4, 1.0)
    local_size: PositiveInt = 96
    local_crops: NonNegativeInt = 2
    local_scale: FractionRange = (0.05, 0.4)
    flip: Fraction = 0.5
    brightness: Fraction = 0.3
    contrast: Fraction = 0.3
    saturation: Fraction = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.03
    """Maximum change of the hue, as a fraction of the colour circle. ``brightness``, ``contrast`` and ``saturation`` are maximum
    changes of a factor around 1."""
    feature_dropout: FractionBelowOne = 0.0
    """Fraction of a frozen encoder's feature channels that are dropped, the same ones at all patches of a view. With a feature
    cache, this is the only difference between the two views of an image."""
